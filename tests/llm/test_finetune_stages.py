"""What both fine-tuning stages do alike: end signs, context, counts, evaluation loss and samples."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from springhead.errors import BadInput
from springhead.jsonio import read_jsonl, write_jsonl
from springhead.llm.bash import BashConfig
from springhead.llm.rac import RacConfig
from springhead.llm.sft import SftConfig
from springhead.stage import Stage, for_test
from stages.llm import finetune, rational_finetune
from tests.llm.tiny import byte_tokenizer, tiny_model

pytestmark = pytest.mark.unit
LIKE_GEMMA = (
    "{% for m in messages %}{{ '<start_of_turn>' + ('model' if m['role'] == 'assistant' else m['role']) + '\n'"
    " + m['content'] + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
SFT = SftConfig(steps=1, batch_tokens=200, learning_rate=0.01)
MEND = finetune.Tuning(SFT, 200, "drop", 0, 2, "cpu")
RATIONAL = rational_finetune.Tuning(SFT, 200, "drop", {}, "cpu")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A student with a template of its own, whose end sign is not the tokenizer's, and rows for both stages."""
    root = tmp_path_factory.mktemp("world")
    tokenizer = byte_tokenizer("<start_of_turn>", "<end_of_turn>", pad_token="<pad>")
    tokenizer.chat_template = LIKE_GEMMA
    ends = [tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<end_of_turn>")]
    model = tiny_model(vocab_size=len(tokenizer))
    model.generation_config.eos_token_id = ends
    model.save_pretrained(root / "students")
    tokenizer.save_pretrained(root / "students")
    said = {"prompt": "How many figs?", "completion": "Three figs."}
    write_jsonl(root / "filter/train.jsonl", [{"id": f"t{k}", "method": "sft", **said} for k in range(3)])
    held_out = [{"id": "e0", **said}, {"id": "e1", **said, "completion": "Three. " * 40}]
    write_jsonl(root / "filter/eval.jsonl", held_out)
    bases, rows = [], []
    for kind in ("adversarial", "benign"):
        for k in range(6):
            bases.append({"id": f"{kind}-{k}", "group": f"{kind}-{k // 2}"})
            for method in ("rational", "refusal-sft"):
                row = {"id": f"{method}-{kind}-{k}", "parents": [f"{kind}-{k}"], "operator": "question", "kind": kind}
                rows.append(
                    {**row, "method": method, "answer": "refuse" if kind == "adversarial" else "comply", **said}
                )
    write_jsonl(root / "rational/bases.jsonl", bases)
    write_jsonl(root / "rational/train.jsonl", rows)
    write_jsonl(root / "rational/eval.jsonl", [{"id": f"r{k}", "prompt": f"Who has {k} figs?"} for k in range(5)])
    return root


def tune(world: Path, out: Path, tuning: finetune.Tuning) -> Stage[finetune.Params]:
    params = finetune.Params({"tiny": tuning}, BashConfig(), RacConfig(cue="No."))
    inputs, item = {name: world / name for name in ("students", "filter")}, {"method": "sft"}
    stage = for_test(params, out, inputs, {"student": "tiny", "seed": "0"} | item, 0, "llm", "finetune")
    finetune.run(stage)
    return stage


def tune_rational(
    world: Path, out: Path, tuning: rational_finetune.Tuning, method: str = "rational"
) -> Stage[rational_finetune.Params]:
    inputs, item = {name: world / name for name in ("students", "rational")}, {"method": method}
    params = rational_finetune.Params({"tiny": tuning})
    stage = for_test(params, out, inputs, {"student": "tiny", "seed": "0"} | item, 0, "llm", "rational_finetune")
    rational_finetune.run(stage)
    return stage


BOTH = pytest.mark.parametrize(
    ("stage", "run", "tuning"), [(finetune, tune, MEND), (rational_finetune, tune_rational, RATIONAL)]
)


class Stopped(Exception):
    """Stands for the training."""


@BOTH
def test_trained_is_what_was_checked(
    world: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    stage: ModuleType,
    run: Callable[..., Any],
    tuning: Any,
) -> None:
    seen: list[Any] = []

    def train(model: Any, examples: Any, held_out: Any, *_: Any, **__: Any) -> None:
        seen.extend([*examples, *held_out])
        raise Stopped

    monkeypatch.setattr(stage.sft, "train", train)
    with pytest.raises(Stopped):
        run(world, tmp_path / "out", tuning)
    end = byte_tokenizer("<start_of_turn>", "<end_of_turn>", pad_token="<pad>").convert_tokens_to_ids("<end_of_turn>")
    assert seen
    # The line break after the end sign would be trained too if the template's end sign were not known.
    assert {[t for t, m in zip(e.ids, e.completion_mask, strict=True) if m][-1] for e in seen} == {end}


@pytest.mark.fault
@BOTH
def test_rows_longer_than_the_context_are_refused(
    world: Path, tmp_path: Path, stage: ModuleType, run: Callable[..., Any], tuning: Any
) -> None:
    name = stage.__name__.rpartition(".")[2]
    with pytest.raises(BadInput, match=rf"llm\.{name}\.students\.tiny\.max_length is 600, .* context is 512 tokens"):
        run(world, tmp_path / "out", replace(tuning, max_length=600))
    for key in ("max_length", "sample_tokens"):
        with pytest.raises(ValueError, match=f"{key} is 0; use at least 1"):
            replace(tuning, **{key: 0})
    with pytest.raises(ValueError, match="sample_rows is -1; use at least 0"):
        replace(tuning, sample_rows=-1)


def test_over_long_evaluation_rows_are_in_the_metrics(world: Path, tmp_path: Path) -> None:
    metrics = tune(world, tmp_path / "drop", MEND).record.metrics
    assert (metrics["dropped"], metrics["eval_dropped"], metrics["eval_truncated"]) == (0, 1, 0)
    metrics = tune(world, tmp_path / "truncate", replace(MEND, overlong="truncate")).record.metrics
    assert (metrics["eval_dropped"], metrics["eval_truncated"]) == (0, 1)


def test_rational_measures_the_loss_on_prompts_it_does_not_train_on(world: Path, tmp_path: Path) -> None:
    often = replace(SFT, steps=2, eval_every=1, sample_every=1)
    tuning = replace(RATIONAL, sft=often, eval_groups=1, sample_rows=2, sample_tokens=4)
    stage = tune_rational(world, tmp_path / "out", tuning)
    assert stage.record.metrics["rows"] == 12 - 2 * 2
    assert stage.record.metrics["eval_loss"] > 0
    assert stage.record.metrics["eval_dropped"] == 0
    taken = [(sample["step"], sample["row"]) for sample in read_jsonl(stage.out / "samples.jsonl")]
    assert taken == [(1, "r0"), (1, "r2"), (2, "r0"), (2, "r2")]
    # Nothing of it where it was not asked for.
    plain = tune_rational(world, tmp_path / "plain", RATIONAL)
    assert (plain.record.metrics["rows"], "eval_loss" in plain.record.metrics) == (12, False)
    assert sorted(path.name for path in plain.out.iterdir()) == ["history.csv", "model"]
    with pytest.raises(BadInput, match=r"sft\.eval_every is 1, but no rows or prompts"):
        tune_rational(world, tmp_path / "none", replace(RATIONAL, sft=replace(SFT, eval_every=1)))


def test_groups_are_kept_back_whole_and_alike_for_every_method(world: Path) -> None:
    rows, bases = (list(read_jsonl(world / "rational" / f"{name}.jsonl")) for name in ("train", "bases"))
    group = {base["id"]: base["group"] for base in bases}
    training, kept = rational_finetune.keep_back(rows, bases, 1, 0)

    def groups(some: list[dict[str, Any]], method: str) -> set[str]:
        return {group[row["parents"][0]] for row in some if row["method"] == method}

    assert sorted(row["id"] for row in [*training, *kept]) == sorted(row["id"] for row in rows)
    assert groups(kept, "rational") == groups(kept, "refusal-sft")
    assert not groups(kept, "rational") & groups(training, "rational")
    assert sorted(name.split("-")[0] for name in groups(kept, "rational")) == ["adversarial", "benign"]
    assert rational_finetune.keep_back(rows, bases, 0, 0) == (rows, [])
    assert any(rational_finetune.keep_back(rows, bases, 1, seed)[1] != kept for seed in range(1, 6))


def test_a_group_of_two_kinds_is_kept_back_whole_and_may_come_on_top() -> None:
    bases = [{"id": "a", "group": "1"}, {"id": "b", "group": "1"}, {"id": "c", "group": "2"}]
    rows = [
        {"kind": kind, "parents": [name]} for kind, name in (("adversarial", "a"), ("benign", "b"), ("benign", "c"))
    ]
    counts = set()
    for seed in range(10):
        _, kept = rational_finetune.keep_back(rows, bases, 1, seed)
        assert [row["parents"] for row in kept][:2] == [["a"], ["b"]]
        counts.add(len(kept))
    assert counts == {2, 3}  # of each kind one group at least
