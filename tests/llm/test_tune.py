"""The command that fine-tunes any folder on any rows, on one process and on two."""

import csv
import json
import multiprocessing
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from springhead.errors import BadInput
from springhead.lineage.digests import tree_digest
from springhead.llm import parallel, sft, students, tune
from springhead.llm.overlap import overlaps
from tests.llm.tiny import ROWS, save_tiny

pytestmark = pytest.mark.unit
ROOT = Path(__file__).parents[2]


@pytest.fixture
def request_file(tmp_path: Path) -> Path:
    save_tiny(tmp_path / "base")
    lines = "".join(json.dumps({"prompt": row["prompt"], "completion": row["completion"]}) + "\n" for row in ROWS)
    (tmp_path / "rows.jsonl").write_text(lines)
    settings = {
        "model": str(tmp_path / "base"),
        "train": str(tmp_path / "rows.jsonl"),
        "eval": str(tmp_path / "rows.jsonl"),
        "out": str(tmp_path / "out"),
        "device": "cpu",
        "overlap": "report",
        "max_length": 128,
        "samples": [ROWS[0]["prompt"]],
        "sample_tokens": 12,
        "sft": {"steps": 6, "batch_tokens": 60, "learning_rate": 0.01, "checkpoint_every": 2, "sample_every": 3},
    }
    path = tmp_path / "tune.yaml"
    path.write_text(yaml.safe_dump(settings))
    return path


def losses(folder: Path) -> list[float]:
    with (folder / "history.csv").open() as file:
        return [float(row["train_loss"]) for row in csv.DictReader(file)]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return AutoModelForCausalLM.from_pretrained(folder / "model").state_dict()


def test_it_writes_a_model_that_anyone_can_load_with_what_it_was_made_of(request_file: Path, tmp_path: Path) -> None:
    assert tune.main([str(request_file), "sft.steps=5"]) == 0
    out = tmp_path / "out"
    assert sorted(path.name for path in out.iterdir()) == ["history.csv", "model", "run.json", "samples.jsonl"]
    run = json.loads((out / "run.json").read_text())
    assert run["parent"] == tree_digest(tmp_path / "base")
    assert run["model"] == tree_digest(out / "model")
    assert (run["settings"]["sft"]["steps"], run["counts"]["rows"], run["processes"]) == (5, 4, 1)
    assert (run["counts"]["eval_rows"], run["counts"]["eval_dropped"], run["counts"]["eval_truncated"]) == (4, 0, 0)
    samples = [json.loads(line) for line in (out / "samples.jsonl").read_text().splitlines()]
    assert [(s["step"], s["prompt"]) for s in samples] == [(3, ROWS[0]["prompt"]), (5, ROWS[0]["prompt"])]
    model = AutoModelForCausalLM.from_pretrained(out / "model")
    tokenizer = AutoTokenizer.from_pretrained(out / "model")
    chat = [{"role": "user", "content": ROWS[0]["prompt"]}]
    inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    generated = model.generate(**inputs, max_new_tokens=12, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    assert tokenizer.decode(generated, skip_special_tokens=True).strip() == samples[-1]["text"]
    assert tune.main([str(request_file)]) == 2  # finished runs are not overwritten


def test_the_merged_model_is_base_and_adapter(request_file: Path, tmp_path: Path) -> None:
    assert tune.main([str(request_file), "sft.lora_rank=2", "sft.learning_rate=0.03"]) == 0
    out = tmp_path / "out"
    adapted = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), out / "adapter")
    flat, made = adapted.merge_and_unload().state_dict(), weights(out)
    for name, value in made.items():
        torch.testing.assert_close(flat[name], value)
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base").state_dict()
    assert any(not torch.equal(base[name], value) for name, value in made.items())


@pytest.mark.fault
def test_killed_and_started_again_it_makes_the_same_bytes(request_file: Path, tmp_path: Path, monkeypatch) -> None:
    assert tune.main([str(request_file), f"out={tmp_path / 'whole'}"]) == 0
    step = sft.Trainer.train_step

    def killed_in_step_5(self, examples):
        if self.step == 4:
            raise KeyboardInterrupt
        return step(self, examples)

    monkeypatch.setattr(sft.Trainer, "train_step", killed_in_step_5)
    with pytest.raises(KeyboardInterrupt):
        tune.main([str(request_file)])
    monkeypatch.setattr(sft.Trainer, "train_step", step)
    assert tune.main([str(request_file)]) == 0
    for name in ("model", "history.csv", "samples.jsonl"):
        assert tree_digest(tmp_path / "out" / name) == tree_digest(tmp_path / "whole" / name)


@pytest.mark.parametrize(
    ("overrides", "counted"),
    [
        (["bash.refresh=2", "bash.share=1", "bash.beta_from=1"], "drawn"),
        (["rac.cue='Answer:'", "rac.share=1"], "answered"),
    ],
)
def test_it_mixes_own_words_in_where_told(request_file: Path, tmp_path: Path, overrides, counted) -> None:
    assert tune.main([str(request_file), *overrides]) == 0
    facts = json.loads((tmp_path / "out/run.json").read_text())
    assert facts["own_words"][counted] > 0
    assert facts["settings"]["bash" if counted == "drawn" else "rac"] is not None
    both = ["bash.share=1", "rac.cue='Answer:'", f"out={tmp_path / 'other'}"]
    assert tune.main([str(request_file), *both]) == 2


def test_over_long_evaluation_rows_are_counted(request_file: Path, tmp_path: Path) -> None:
    assert tune.main([str(request_file), "overlong=drop", "max_length=30"]) == 0
    counts = json.loads((tmp_path / "out/run.json").read_text())["counts"]
    assert (counts["dropped"], counts["eval_rows"], counts["eval_dropped"]) == (1, 3, 1)


def test_evaluation_rows_that_are_trained_on_are_named(request_file: Path, tmp_path: Path, capsys) -> None:
    nearly = {**ROWS[2], "id": "nearly", "completion": ROWS[2]["completion"].replace("8", "9")}
    new = {"id": "new", "prompt": "Eva has 7 plums. How many plums does Eva have?", "completion": "Answer: 7"}
    held_out = [new, {**ROWS[1], "id": "same"}, nearly]
    (tmp_path / "held-out.jsonl").write_text("".join(json.dumps(row) + "\n" for row in held_out))
    request = [str(request_file), f"eval={tmp_path / 'held-out.jsonl'}", "overlap_similarity=0.6"]
    assert tune.main([*request, "overlap=error"]) == 2
    error = capsys.readouterr().err
    assert (
        "held-out.jsonl: 2 evaluation rows are among the training rows, or nearly: same (like rows.jsonl:2: 1), "
        in error
    )
    assert "nearly (like rows.jsonl:3: 0." in error
    assert "set overlap to report to train all the same" in error
    assert tune.main([*request, "overlap=report"]) == 0
    listed = json.loads((tmp_path / "out/run.json").read_text())["overlap"]
    assert [(one["row"], one["like"]) for one in listed] == [("same", "rows.jsonl:2"), ("nearly", "rows.jsonl:3")]
    assert tune.main([*request, "overlap=ignore", f"out={tmp_path / 'other'}"]) == 0
    assert json.loads((tmp_path / "other/run.json").read_text())["overlap"] == []


def test_a_long_shared_system_message_makes_no_rows_alike() -> None:
    system = {"role": "system", "content": "Answer the question about fruit in as few words as you can. " * 5}

    def row(name: str, question: str, answer: str) -> dict[str, Any]:
        said = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        return {"id": name, "messages": [system, *said]}

    train = [row("a", "How many figs does Ana have?", "Three."), row("b", "Who has the most pears here?", "Ben.")]
    held_out = [
        row("c", "Which fruit is the heaviest?", "The melon."),
        row("d", "HOW MANY figs does Ana have?", "three"),
    ]
    assert [(one.row, one.like) for one in overlaps(train, held_out, 0.9)] == [("d", "a")]


def test_it_takes_a_pinned_model_of_the_hub(request_file: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    import huggingface_hub.constants

    commit, snapshots = "7" * 40, tmp_path / "cache/models--some--body/snapshots"
    shutil.copytree(tmp_path / "base", snapshots / commit)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    pin = {"repository": "some/body", "commit": commit, "sha256": students.weights_digest(tmp_path / "base")}

    def request(**changes: str) -> str:
        values = yaml.safe_load(request_file.read_text()) | {"model": pin | changes}
        (tmp_path / "pinned.yaml").write_text(yaml.safe_dump(values))
        return str(tmp_path / "pinned.yaml")

    assert tune.main([request()]) == 0
    run = json.loads((tmp_path / "out/run.json").read_text())
    assert (run["parent"], run["settings"]["model"]) == (tree_digest(tmp_path / "base"), pin)
    again = f"out={tmp_path / 'again'}"
    assert tune.main([str(request_file), again]) == 0  # from the folder
    assert tree_digest(tmp_path / "again/model") == run["model"]
    for changes, message in (
        ({"sha256": "0" * 64}, "model: the weights of some/body have the digest"),
        ({"commit": "main"}, "pinned.yaml.model: commit must be a full hash of 40 digits"),
        ({"commit": "8" * 40}, "model: cannot fetch some/body@888"),
        ({"chat_template": "chatml"}, "pinned.yaml.model.chat_template: unknown parameter"),
    ):
        assert tune.main([request(**changes), f"out={tmp_path / 'third'}"]) == 2
        assert message in capsys.readouterr().err


@pytest.mark.fault
def test_a_run_is_not_continued_from_another_base(request_file: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(students, "save", killed)
    with pytest.raises(KeyboardInterrupt):
        tune.main([str(request_file)])
    monkeypatch.undo()
    save_tiny(tmp_path / "other", seed=1)
    assert tune.main([str(request_file), f"model={tmp_path / 'other'}"]) == 2
    assert "or from another base model; delete the folder and run again" in capsys.readouterr().err
    assert tune.main([str(request_file)]) == 0


def killed(*_: Any) -> None:
    raise KeyboardInterrupt


@pytest.mark.fault
@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("max_length=4096", "max_length is 4096, but the model's context is 512 tokens"),
        ("max_length=20", "rows.jsonl:1: 30 tokens, max_length is 20; raise it, or set overlong"),
        ("chat_template=vicuna", "unknown template 'vicuna'"),
        ("chat_template=chatml", "the tokenizer has no token <|im_start|>"),
        ("sft.stepz=3", "unknown parameter; did you mean 'steps'"),
        ("sft.steps.x=3", "steps is no block"),
        ("sft.steps=[", "'sft.steps=[': the value is not valid YAML (while parsing a flow node"),
        ("seed=-1", "tune.yaml: seed is -1; use at least 0"),
        ("model=nowhere", "nowhere: not a model folder"),
        ("train=nowhere.jsonl", "nowhere.jsonl: no such file"),
        ("steps", "expected key=value"),
        ("rac.cue=Zounds", "rac cue 'Zounds': words outside the tokenizer's vocabulary"),
        ("sft.clip=-1", "tune.yaml.sft: clip is -1.0; use at least 0"),
        ("overlap_similarity=0", "overlap_similarity is 0.0; use more than 0"),
        ("bash.beta_to=2", "beta_from and beta_to must be in 0..1"),
    ],
)
def test_what_cannot_be_used_is_named(request_file: Path, capsys, override: str, message: str) -> None:
    assert tune.main([str(request_file), override]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert message in error


@pytest.mark.fault
@pytest.mark.parametrize("out", ["rows.jsonl", "rows.jsonl/deeper"])
def test_a_folder_that_cannot_be_is_refused_before_training(
    request_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys, out: str
) -> None:
    monkeypatch.setattr(sft, "train", lambda *_, **__: pytest.fail("it was trained"))
    assert tune.main([str(request_file), f"out={tmp_path / out}"]) == 2
    assert "rows.jsonl is no folder that can be written to; choose another" in capsys.readouterr().err


def process(rank: int, port: int, arguments: list[str]) -> None:
    """One of two processes, as a launcher starts them."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os._exit(tune.main(arguments))


@pytest.mark.parametrize("rank", [0, 2])
def test_two_processes_have_the_losses_of_one(request_file: Path, tmp_path: Path, rank: int) -> None:
    request = [str(request_file), f"sft.lora_rank={rank}", "sft.micro_tokens=30"]
    assert tune.main([*request, f"out={tmp_path / 'one'}"]) == 0
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    fork = multiprocessing.get_context("fork")
    pair = [fork.Process(target=process, args=(k, port, [*request, f"out={tmp_path / 'two'}"])) for k in (0, 1)]
    for one in pair:
        one.start()
    for one in pair:
        one.join(300)
    assert [one.exitcode for one in pair] == [0, 0]
    same_training(tmp_path)


def same_training(folder: Path) -> None:
    """The runs `one` and `two` came out alike."""
    assert json.loads((folder / "two/run.json").read_text())["processes"] == 2
    np.testing.assert_allclose(losses(folder / "two"), losses(folder / "one"), rtol=1e-4)
    one, two = weights(folder / "one"), weights(folder / "two")
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, rtol=1e-3, atol=1e-4)


@pytest.mark.e2e
@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["torchrun", "accelerate"])
def test_the_usual_launchers_start_it(request_file: Path, tmp_path: Path, launcher: str) -> None:
    assert tune.main([str(request_file), f"out={tmp_path / 'one'}"]) == 0
    if launcher == "torchrun":
        start = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m"]
    else:
        # --multi_gpu is its name for torchrun's way of starting; tune.yaml says that the device is the CPU.
        start = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1"]
        start += ["--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0", "-m"]
    command = [sys.executable, *start, "springhead.llm.tune", str(request_file), f"out={tmp_path / 'two'}"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    same_training(tmp_path)


def test_rows_are_shared_out_evenly_and_each_once() -> None:
    costs = [9, 1, 1, 1, 6, 3, 3]
    shares = [parallel.World(rank, 3).share(range(7), costs) for rank in range(3)]
    assert sorted(i for share in shares for i in share) == list(range(7))
    assert all(share == sorted(share) for share in shares)
    assert max(sum(costs[i] for i in share) for share in shares) == 9
    assert parallel.World(1, 2).share([5], [1]) == []
    assert parallel.ALONE.share([3, 1], [1, 1]) == [3, 1]


@pytest.mark.fault
def test_half_a_launcher_is_named(monkeypatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("RANK", raising=False)
    with (
        pytest.raises(BadInput, match=r"WORLD_SIZE is 2 but RANK, .* not set; start with torchrun"),
        parallel.joined(torch.device("cpu")),
    ):
        pass
