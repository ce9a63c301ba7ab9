"""The command that fine-tunes any folder on any rows, on one process and on two."""

import csv
import json
import multiprocessing
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from springhead.errors import BadInput
from springhead.lineage.digests import tree_digest
from springhead.llm import parallel, sft, tune
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
        ("model=nowhere", "nowhere: not a model folder"),
        ("train=nowhere.jsonl", "nowhere.jsonl: no such file"),
        ("steps", "expected key=value"),
        ("rac.cue=Zounds", "rac cue 'Zounds': words outside the tokenizer's vocabulary"),
        ("bash.beta_to=2", "beta_from and beta_to must be in 0..1"),
    ],
)
def test_what_cannot_be_used_is_named(request_file: Path, capsys, override: str, message: str) -> None:
    assert tune.main([str(request_file), override]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert message in error


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
