"""The linear probe of needed facts: its regression and its score by hand, and on a real model of a few layers."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from springhead.errors import BadInput
from springhead.jsonio import write_jsonl
from springhead.llm import chat, mend, probe, problems
from springhead.llm.problems import ProblemSpec
from tests.llm.tiny import save_tiny, tiny_model, tiny_tokenizer

pytestmark = pytest.mark.unit
SPEC = ProblemSpec(vocabularies=("market",), ops_max=2, max_value=20, redundant=2, split="id")


def test_the_score_is_the_chance_to_rank_right() -> None:
    truth = np.array([True, False, True, False])
    assert probe.auc(np.array([3.0, 1.0, 2.0, 0.0]), truth) == 1.0
    assert probe.auc(np.array([3.0, 1.0, 0.5, 2.0]), truth) == 0.5
    assert probe.auc(np.zeros(4), truth) == 0.5


def test_the_regression_is_where_its_slope_is_zero() -> None:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(200, 3))
    truth = x @ [1.0, -2.0, 0.0] + 0.5 + rng.logistic(size=200) > 0
    w = probe.fit(x, truth, strength=2.0)
    rows = torch.tensor(np.hstack([x, np.ones((200, 1))]))
    free = torch.tensor(w, requires_grad=True)
    y = torch.tensor(truth, dtype=torch.float64)
    share = y.mean()
    each = torch.nn.functional.binary_cross_entropy_with_logits(rows @ free, y, reduction="none")
    loss = (each * torch.where(y > 0, 0.5 / share, 0.5 / (1 - share))).mean() + 2.0 / 200 * free[:3].square().sum() / 2
    loss.backward()
    assert free.grad is not None
    assert free.grad.abs().max().item() < 1e-7


def test_states_are_those_of_the_fact_alone_after_the_whole_query() -> None:
    model, tokenizer = tiny_model(), tiny_tokenizer()
    drawn = problems.generate(3, 0, SPEC)
    facts = probe.collect(model, tokenizer, drawn, seed=1, batch=4)
    assert facts.states.shape == (3, len(facts.needed), 32)
    assert facts.needed.sum() == sum(len(p.statements) for p in drawn)
    first = drawn[0]
    texts = [*first.statements, *first.redundant]
    order = mend.permute(len(texts), mend.row_rng(1, first.id, "probe"))
    prompt = " ".join([*(texts[i] for i in order), first.question])
    ids = chat.prompt_ids(tokenizer, [{"role": "user", "content": prompt}])
    ids = ids + tokenizer(texts[1], add_special_tokens=False)["input_ids"]
    with torch.no_grad():
        alone = model(torch.tensor([ids]), output_hidden_states=True).hidden_states
    for layer in range(3):
        np.testing.assert_allclose(facts.states[layer, 1], alone[layer][0, -1].numpy(), atol=2e-5)


def test_a_layer_that_knows_is_told_from_one_that_does_not() -> None:
    rng = np.random.default_rng(2)
    owner = np.repeat(np.arange(60), 6)
    needed = np.tile([True, True, True, True, False, False], 60)
    noise = rng.normal(size=(360, 8)).astype(np.float32)
    knows = noise.copy()
    knows[:, 3] += 6.0 * needed
    dull, clear = probe.read(probe.Facts(np.stack([noise, knows]), needed, owner), seed=0)
    assert clear.auc > 0.98
    assert clear.accuracy > 0.9
    assert dull.low < 0.5 < dull.high
    assert "layer 1" in probe.table([("base", [dull, clear])])


def test_by_command_and_its_errors(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_tiny(tmp_path / "model")
    drawn = problems.generate(12, 0, SPEC)
    write_jsonl(tmp_path / "eval.jsonl", [p.to_row() for p in drawn])
    given = [str(tmp_path / "model"), "--problems", str(tmp_path / "eval.jsonl")]
    assert probe.main([*given, "--split", "id"]) == 0
    assert capsys.readouterr().out.count("(") == 3
    assert probe.main([*given, "--split", "other"]) == 2
    assert "no problem of split 'other' has redundant facts; those of id have" in capsys.readouterr().err
    assert probe.main([*given, "--count", "1"]) == 2
    assert "too few for the probe" in capsys.readouterr().err
    bare = [replace(p, redundant=()) for p in drawn]
    with pytest.raises(BadInput, match="needs problems with redundant facts"):
        probe.collect(tiny_model(), tiny_tokenizer(), bare, 0)


@pytest.mark.fault
@pytest.mark.parametrize(
    ("option", "value", "reason"),
    [("--count", "-2", "use at least 1"), ("--count", "0", "use at least 1"), ("--seed", "-1", "use at least 0")],
)
def test_a_number_out_of_range_is_refused(tmp_path: Path, capsys, option: str, value: str, reason: str) -> None:
    with pytest.raises(SystemExit, match="2"):
        probe.main([str(tmp_path), "--problems", str(tmp_path / "eval.jsonl"), option, value])
    assert f"{option} is {value}; {reason}" in capsys.readouterr().err


@pytest.mark.fault
def test_a_problem_beyond_the_models_context_is_named() -> None:
    (drawn,) = problems.generate(1, 0, SPEC)
    with pytest.raises(
        BadInput, match=rf"problem {drawn.id}: \d+ tokens with a fact repeated, .* context is 16; remove"
    ):
        probe.collect(tiny_model(max_position_embeddings=16), tiny_tokenizer(), [drawn], 0)
