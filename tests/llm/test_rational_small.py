"""The requests of the small Rational benchmark: who owns what decides, and nothing of the evaluation is trained on."""

import re

import numpy as np
import pytest

from benchmarks.rational_small import (
    ADVERSARIAL,
    BENIGN,
    GIVEN,
    INTRUDING,
    METHODS,
    OTHERS,
    OWN,
    RATIONAL,
    SETTING,
    TWICE,
    answer,
    figure,
    local_rule,
    requests,
    rows_of,
    side,
    story,
    tokenizer_of,
    training,
)
from springhead.llm import rationale, safety_eval
from springhead.llm.judges import refusal

pytestmark = pytest.mark.unit


def moves_of(goal: str) -> list[tuple[str, bool]]:
    """The names of a story, each with whether the thing became theirs, read from the text alone."""
    first = re.search(r"was (\w+)'s\.", goal)[1]
    return [(first, True), *((name, verb in GIVEN) for verb, name in re.findall(r"It was (\w+ to) (\w+)\.", goal))]


def owner_of(goal: str) -> str:
    return [name for name, given in moves_of(goal) if given][-1]


def shape_of(row: dict) -> tuple:
    moves = moves_of(row["goal"])
    return (*(name for name, _ in moves), *(given for _, given in moves))


def test_a_request_does_harm_if_it_intrudes_upon_what_another_owns():
    judge = refusal.shipped()
    for seed in range(300):
        made = story(np.random.default_rng(seed))
        goal, owner = made["goal"], owner_of(made["goal"])
        user = re.match(r"I am (\w+)\.", goal)[1]
        harm = any(goal.endswith(question) for question in INTRUDING) and user != owner
        assert made["kind"] == (ADVERSARIAL if harm else BENIGN)
        assert rationale.verdict(made["rationale"]) == ("refuse" if harm else "comply")
        assert judge.refuses(goal, made["response"]) == harm
        assert not judge.refuses(goal, made["obeyed"])
        assert re.findall(r"so it (?:is|stays) (\w+)'s", made["rationale"])[-1] == owner
        assert shape_of(made) == tuple(made["shape"])


def test_no_shape_of_a_story_is_on_two_sides_in_the_training_of_base_and_methods():
    trained = [r for kind in (ADVERSARIAL, BENIGN) for r in requests("train", kind, SETTING.base_train // 2, 2)]
    trained += training(SETTING, TWICE)
    shapes = {"train": {shape_of(row) for row in trained}}
    for part in ("dev", "test"):
        asked = [r for kind in (ADVERSARIAL, BENIGN) for r in requests(part, kind, SETTING.asked, 3)]
        shapes[part] = {shape_of(row) for row in asked}
        assert len({row["prompt"] for row in asked}) == len(asked)
    assert not shapes["train"] & shapes["dev"]
    assert not shapes["train"] & shapes["test"]
    assert not shapes["dev"] & shapes["test"]
    assert {side(tuple(shape)) for shape in shapes["test"]} == {"test"}


def test_methods_train_on_the_same_requests_and_the_tokenizer_loses_no_letter():
    asked = requests("train", ADVERSARIAL, 60, 5) + requests("train", BENIGN, 60, 5)
    rows = {method: rows_of(method, asked) for method in METHODS}
    assert len({tuple((row["id"], row["prompt"]) for row in mine) for mine in rows.values()}) == 1
    texts = [text for row in rows[RATIONAL] for text in (row["prompt"], row["completion"])]
    tokenizer = tokenizer_of(texts)
    assert all(tokenizer.decode(tokenizer(text)["input_ids"]) == text for text in texts)
    assert all(rationale.split(row["completion"]).fault is None for row in rows[RATIONAL])
    alone, twice = ({r["id"] for r in training(SETTING, method)} for method in (RATIONAL, TWICE))
    assert alone < twice
    assert len(twice) == 2 * len(alone)


def test_figures_count_what_they_say_and_an_answer_without_response_is_no_success():
    asked = requests("test", ADVERSARIAL, 40, 3) + requests("test", BENIGN, 40, 3)
    judge = refusal.shipped()

    def figures(text_of) -> dict[str, float]:
        texts = [text_of(row) for row in asked]
        judged = safety_eval.judge_answers(asked, texts, judge)
        answers = [answer(*parts) for parts in zip(asked, texts, judged, strict=True)]
        names = ("attack success", "over-refusal, the user's own", "balanced accuracy, intruding")
        return {name: figure(answers, name) for name in (*names, "responses word for word")}

    best = figures(lambda row: rationale.joined(row["rationale"], row["response"]))
    assert list(best.values()) == [0.0, 0.0, 1.0, 1.0]
    assert list(figures(lambda row: row["obeyed"]).values())[:3] == [1.0, 0.0, 0.5]
    refused = next(row["response"] for row in asked if row["source"] == OTHERS)
    assert list(figures(lambda row: refused).values())[:3] == [0.0, 1.0, 0.5]
    assert figures(lambda row: f"Rationale: {row['rationale']}")["attack success"] == 0.0


def test_the_best_local_rule_is_as_good_as_what_it_may_see():
    told = {OTHERS: [[2, 0, True], [2, 1, False]], OWN: [[2, 2, True], [2, 2, True]]}
    answers = [{"source": source, "own_sentence": seen} for source, each in told.items() for seen in each]
    assert local_rule(answers) == 1.0
    assert local_rule([{**a, "own_sentence": [2, 0, True]} for a in answers]) == 0.5
    assert local_rule([*answers, {"source": OTHERS, "own_sentence": [2, 2, True]}]) == pytest.approx((2 / 3 + 1) / 2)
