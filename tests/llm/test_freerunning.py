import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from springhead.errors import BadInput
from springhead.jsonio import write_jsonl
from springhead.llm import answers, freerunning, rac, score, sft
from springhead.llm.freerunning import Run, paired
from springhead.llm.generation import Decoding
from springhead.llm.packing import Example, encode_rows
from springhead.llm.sft import SftConfig
from springhead.llm.teacher import target_losses
from springhead.params import load
from tests.llm.tiny import ENDS, ROWS, save_tiny, tiny_model, tiny_tokenizer

pytestmark = pytest.mark.unit
EOS = 1


@pytest.fixture(scope="module")
def examples() -> list[Example]:
    return encode_rows(ROWS, tiny_tokenizer(), 128, "error", ENDS)[0]


def losses_of(model, context: list[int], targets: list[int]) -> list[float]:
    """The loss of each target, the context one token longer each time, by the library's own attention."""
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([context])).logits[0, -len(targets) :]
    return torch.nn.functional.cross_entropy(logits, torch.tensor(targets), reduction="none").tolist()


def test_the_reference_is_read_after_the_answer_of_equal_length():
    gold, own = paired([5, 6], [7, 8, 9, EOS], [7, 4, 4, 4, 4])
    assert gold.ids == own.ids == (5, 6, 7, 8, 9, EOS)
    assert own.context == (5, 6, 7, 4, 4, EOS)
    assert gold.completion_mask == own.completion_mask == (False, False, True, True, True, True)


def test_places_after_the_answer_has_ended_do_not_count():
    # The model said 7 and ended: the second place has an own prefix (7), the third has none.
    gold, own = paired([5, 6], [7, 8, 9, EOS], [4])
    assert gold.ids == (5, 6, 7, 8)
    assert own.read == (5, 6, 4, 8)
    assert paired([5], [7, EOS], [])[1].read == (5, 7)


def test_losses_are_those_of_the_models_own_forward_pass():
    model = tiny_model(spread=0.3)
    gold, own = paired([5, 6], [7, 8, 9, EOS], [7, 4, 4])
    got = target_losses(model, [gold, own])
    np.testing.assert_allclose(got[0], losses_of(model, [5, 6, 7, 8, 9], [7, 8, 9, EOS]), rtol=1e-4)
    np.testing.assert_allclose(got[1], losses_of(model, [5, 6, 7, 4, 4], [7, 8, 9, EOS]), rtol=1e-4)


def test_a_model_that_says_the_reference_has_no_gap(examples):
    config = SftConfig(steps=80, batch_tokens=200, learning_rate=1e-2)
    trained, _ = sft.train(tiny_model(), examples, [], config, 0)
    found = freerunning.runs(trained, examples, Decoding(24), [EOS], 0)
    figures = freerunning.summary(found, 0)
    assert figures["agreement"] == 1.0
    assert figures["gap"] == pytest.approx(0.0, abs=1e-5)
    assert figures["places"] == sum(len(rac.split(example)[1]) for example in examples)


def test_places_after_a_stop_text_do_not_count(examples):
    config = SftConfig(steps=80, batch_tokens=200, learning_rate=1e-2)
    trained, _ = sft.train(tiny_model(), examples, [], config, 0)
    tokenizer = tiny_tokenizer()
    ((whole,), (stopped,)) = (
        freerunning.runs(trained, examples[1:2], Decoding(24, stop=stop), [EOS], 0, tokenizer=tokenizer)
        for stop in ((), ("Answer:",))
    )
    said = tokenizer.decode(list(stopped.answer))
    assert said.endswith("Answer:")
    assert len(stopped.gold) == len(stopped.answer) < len(whole.gold)  # nothing is said after the stop text
    assert stopped.agrees.all()
    np.testing.assert_allclose(stopped.own, whole.own[: len(stopped.own)], atol=1e-5)
    with pytest.raises(ValueError, match="stop texts need the tokenizer"):
        freerunning.runs(trained, examples, Decoding(24, stop=("Answer:",)), [EOS], 0)


def test_the_gap_of_scored_answers_ends_where_their_stop_texts_do(tmp_path: Path):
    folder = save_tiny(tmp_path / "tiny", spread=0.6)
    write_jsonl(tmp_path / "rows.jsonl", [{"prompt": r["prompt"], "references": [r["completion"]]} for r in ROWS])
    names = {name: str(tmp_path / name) for name in ("rows.jsonl", "answers", "scores")}
    places = []
    for stop in ([], [" "]):  # a space is part of the text as soon as there are two words
        asked = {"model": str(folder), "rows": names["rows.jsonl"], "out": names["answers"], "device": "cpu"}
        asked |= {"decoding": {"max_new_tokens": 9, "stop": stop}}
        answers.run(load(answers.Settings, asked, "answers.yaml"))
        settings = score.Settings(
            names["answers"], names["rows.jsonl"], names["scores"], str(folder), gap_rows=4, device="cpu"
        )
        places.append(score.score(settings)["free_running"]["places"])
        shutil.rmtree(names["answers"])
    assert places[1] <= 3 * len(ROWS) < places[0]


def test_the_gap_by_hand():
    found = [
        Run(np.array([1.0, 1.0]), np.array([1.0, 3.0]), np.array([True, False]), (7, 8)),
        Run(np.array([2.0]), np.array([2.0]), np.array([True]), (7,)),
    ]
    figures = freerunning.summary(found, 0)
    assert (figures["rows"], figures["places"]) == (2, 3)
    assert figures["gold"] == pytest.approx(4 / 3)
    assert figures["own"] == pytest.approx(2.0)
    assert figures["gap"] == pytest.approx(2 / 3)
    assert figures["agreement"] == pytest.approx(2 / 3)
    low, high = figures["gap_interval"]
    assert low <= 2 / 3 <= high
    uneven = [Run(np.ones(n), np.ones(n) * gap, np.ones(n, bool), (7,)) for n, gap in ((1, 9.0), (99, 2.0)) * 20]
    low, high = freerunning.summary(uneven, 0)["gap_interval"]  # a mean of the rows' means would be 4.5
    assert low <= freerunning.summary(uneven, 0)["gap"] <= high < 1.5
    assert freerunning.by_place(found) == [
        {"place": 0, "rows": 2, "gold": 1.5, "own": 1.5, "gap": 0.0, "agreement": 1.0},
        {"place": 1, "rows": 1, "gold": 1.0, "own": 3.0, "gap": 2.0, "agreement": 0.0},
    ]
    with pytest.raises(BadInput, match="no rows to measure"):
        freerunning.summary([], 0)


def test_an_untrained_model_has_own_words_and_sampled_answers_follow_their_keys(examples):
    model = tiny_model(spread=0.5)
    decoding = Decoding(24, temperature=1.0)
    one = freerunning.runs(model, examples, decoding, [EOS], 0, keys=["a", "b", "c", "d"])
    two = freerunning.runs(model, examples[::-1], decoding, [EOS], 0, keys=["d", "c", "b", "a"])[::-1]
    for a, b in zip(one, two, strict=True):
        np.testing.assert_allclose(a.own, b.own, rtol=1e-4)
    assert freerunning.summary(one, 0)["agreement"] < 0.5
    assert any(float(abs(run.own - run.gold).max()) > 0.01 for run in one)
