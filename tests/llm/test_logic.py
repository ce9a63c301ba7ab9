"""The logic generator and its prover."""

from __future__ import annotations

import re

import numpy as np
import pytest

from springhead.errors import BadInput
from springhead.llm import logic, mend
from springhead.llm.logic import LogicSpec
from springhead.llm.problems import Problem

pytestmark = pytest.mark.unit


@pytest.fixture(scope="module")
def drawn() -> list[Problem]:
    return logic.generate(200, 4, LogicSpec(depth_max=5, redundant=6))


def test_the_prover_agrees_in_every_order_with_every_distractor(drawn: list[Problem]) -> None:
    rng = np.random.default_rng(0)
    for problem in drawn:
        texts = [*problem.statements, *problem.redundant]
        shuffled = [texts[i] for i in rng.permutation(len(texts))]
        assert logic.solve(shuffled, problem.question) == problem.answer
        assert logic.chain_error(shuffled, problem.question, problem.chain) is None
        assert logic.needed_statements(shuffled, problem.question) == list(problem.statements)
    assert 60 < sum(problem.answer == "True" for problem in drawn) < 140


def test_some_distractors_tempt_with_the_opposite_property(drawn: list[Problem]) -> None:
    tempting = 0
    for problem in drawn:
        rule = problem.statements[-1].removesuffix(".").split()
        opposite = [rule[-1]] if "not" in rule else ["not", rule[-1]]
        tempting += any(text.removesuffix(".").split()[3:] == opposite for text in problem.redundant)
    assert tempting > 100


def test_depth_counts_the_rules_of_the_proof(drawn: list[Problem]) -> None:
    for problem in drawn:
        assert problem.depth == problem.ops == len(problem.statements) - 1 == len(problem.chain) - 1


def test_a_problem_written_by_hand() -> None:
    statements = ["Every dorp is not red.", "Every zelk is red.", "Max is a glim.", "Every glim is a dorp."]
    assert logic.solve(statements, "True or false: Max is red?") == "False"
    assert logic.solve(statements, "True or false: Max is not red?") == "True"
    question = "True or false: Max is red?"
    assert logic.chain_error(statements, question, ["Max is a glim", "Max is a dorp", "Max is not red"]) is None
    assert "does not follow" in str(logic.chain_error(statements, question, ["Max is a glim", "Max is not red"]))
    assert "not about Max" in str(logic.chain_error(statements, question, ["Ana is a glim"]))
    assert "settle" in str(logic.chain_error(statements, question, ["Max is a glim", "Max is a dorp"]))


@pytest.mark.parametrize(
    ("statements", "reason"),
    [
        (["Max is a glim.", "Every dorp is red."], "do not decide"),
        (["Max is a glim.", "Every glim is red.", "Every glim is not red."], "is and is not red"),
        (["Every glim is red."], "what Max is"),
        (["Max likes plums."], "neither a fact nor a rule"),
    ],
)
def test_a_text_without_one_answer_is_refused(statements: list[str], reason: str) -> None:
    with pytest.raises(BadInput, match=reason):
        logic.solve(statements, "True or false: Max is red?")


def test_deterministic_without_duplicates_and_disjoint_from_evaluation(drawn: list[Problem]) -> None:
    spec = LogicSpec(depth_max=5, redundant=6)
    assert logic.generate(200, 4, spec) == drawn
    assert len({problem.id for problem in drawn}) == 200
    test = logic.generate(100, 4, LogicSpec(depth_max=5, redundant=6, split="id"))
    rules = [{logic.signature(p.statements, p.question) for p in group} for group in (drawn, test)]
    assert not rules[0] & rules[1]


def test_every_word_is_in_the_lexicon(drawn: list[Problem]) -> None:
    words = set(logic.lexicon())
    for problem in drawn:
        prompt, completion = mend.render(problem, range(len(problem.statements) + len(problem.redundant)))
        assert set(re.findall(r"\w+|[^\w\s]", f"{prompt} {completion}")) <= words


def test_too_deep_for_the_kinds_names_the_parameter() -> None:
    with pytest.raises(BadInput, match="logic depth 30"):
        LogicSpec(depth_max=30)
    with pytest.raises(BadInput, match="found only"):
        logic.generate(10_000, 0, LogicSpec(depth_max=1, redundant=0, holdout=0.01, split="id"))
