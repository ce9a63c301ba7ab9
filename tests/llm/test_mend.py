"""MEND's operators keep the answer and change nothing else."""

from __future__ import annotations

from itertools import permutations

import numpy as np
import pytest

from springhead.errors import BadInput
from springhead.llm import logic, mend, problems, solver
from springhead.llm.problems import Problem, ProblemSpec
from springhead.llm.textrows import row_id

pytestmark = pytest.mark.unit


@pytest.fixture(scope="module")
def drawn() -> list[Problem]:
    spec = ProblemSpec(ops_min=2, ops_max=5, depth_max=4, items=2)
    return [*problems.generate(60, 1, spec), *logic.generate(40, 1, logic.LogicSpec(depth_min=2))]


def _solve(prompt: str, family: str) -> str:
    statements, question = solver.split_text(prompt)
    return (solver if family == "dag" else logic).solve(statements, question)


def test_every_variant_keeps_answer_chain_and_question(drawn: list[Problem]) -> None:
    for problem in drawn:
        rows = mend.mend_rows(problem, 6, mend.OPERATORS, 3, seed=0)
        assert [row["operator"] for row in rows] == ["identity", *mend.OPERATORS, *mend.OPERATORS]
        for row in rows:
            assert _solve(row["prompt"], problem.family) == problem.answer == mend.final_answer(row["completion"])
            assert tuple(mend.steps_of(row["completion"])) == problem.chain
            assert row["prompt"].endswith(problem.question)
            assert row["parents"] == [problem.id]
            assert row["id"] == row_id(row)
            needed = [i for i in row["order"] if i < len(problem.statements)]
            assert (needed == sorted(needed)) == ("order" not in row["operator"])
            assert (row["redundancy"] > 0) == ("redundancy" in row["operator"])


def test_a_row_depends_on_its_own_problem_alone(drawn: list[Problem]) -> None:
    alone = mend.mend_rows(drawn[7], 4, mend.OPERATORS, 3, seed=5)
    among = [mend.mend_rows(problem, 4, mend.OPERATORS, 3, seed=5) for problem in reversed(drawn)]
    assert alone in among
    assert alone != mend.mend_rows(drawn[7], 4, mend.OPERATORS, 3, seed=6)


def test_plain_rows_are_topological_without_redundancy(drawn: list[Problem]) -> None:
    for problem in drawn:
        row = mend.sft_row(problem)
        assert row["prompt"] == " ".join([*problem.statements, problem.question])
        assert (row["method"], row["kendall_tau"], row["redundancy"]) == ("sft", 1.0, 0)


def test_evaluation_variants_are_paired_and_distinct(drawn: list[Problem]) -> None:
    for problem in drawn:
        rows = mend.eval_rows(problem, 2, 2, seed=0)
        assert [row["variant"] for row in rows] == list(range(8))
        names = ["topological", "reversed", "random-1", "random-2"]
        assert [row["arrangement"] for row in rows] == names * 2
        assert [row["redundancy"] for row in rows] == [0] * 4 + [2] * 4
        orders = [tuple(row["order"]) for row in rows[:4]]
        assert len(set(orders)) == 4  # three statements or more have six orders
        needed = [tuple(i for i in row["order"] if i < len(problem.statements)) for row in rows[4:]]
        assert needed == orders
        assert (rows[0]["kendall_tau"], rows[1]["kendall_tau"]) == (1.0, -1.0)
        assert len({row["id"] for row in rows}) == 8


def test_kendall_tau_by_hand(drawn: list[Problem]) -> None:
    problem = next(p for p in drawn if len(p.statements) == 3)
    # (1, 0, 2): one of three pairs is out of order; a redundant statement (3) does not count.
    assert mend.kendall_tau(problem, [1, 3, 0, 2]) == pytest.approx(1 / 3)


def test_permute_avoids_given_orders_until_none_is_left() -> None:
    rng = np.random.default_rng(0)
    all_but_one = [order for order in permutations(range(3)) if order != (2, 0, 1)]
    assert mend.permute(3, rng, all_but_one) == [2, 0, 1]
    assert sorted(mend.permute(3, rng, list(permutations(range(3))))) == [0, 1, 2]


def test_redundant_statements_fall_everywhere(drawn: list[Problem]) -> None:
    problem = drawn[0]
    size = len(problem.statements)
    places = {
        mend.add_redundancy(problem, range(size), 1, np.random.default_rng(seed)).index(size + extra)
        for seed in range(80)
        for extra in range(len(problem.redundant))
        if size + extra in mend.add_redundancy(problem, range(size), 1, np.random.default_rng(seed))
    }
    assert places == set(range(size + 1))


def test_the_chain_operator_keeps_a_valid_solution() -> None:
    spec = ProblemSpec(operators=("sum", "more"), ops_min=3, ops_max=4, depth_max=4)
    found = problems.generate(60, 2, spec)
    changed = 0
    for problem in found:
        for row in mend.rc_rows(problem, 2, seed=0)[1:]:
            steps = mend.steps_of(row["completion"])
            assert sorted(steps) == sorted(problem.chain)
            assert solver.chain_error(problem.statements, problem.question, steps) is None
            changed += tuple(steps) != problem.chain
    assert changed > 20


@pytest.mark.parametrize("order", [[0, 1], [0, 1, 2, 2], [0, 1, 2, 99], [0, 1, 2, -1]])
def test_an_order_that_loses_or_repeats_statements_is_refused(drawn: list[Problem], order: list[int]) -> None:
    problem = next(p for p in drawn if len(p.statements) == 3)
    with pytest.raises(BadInput, match=problem.id):
        mend.render(problem, order)


def test_bad_requests_are_named(drawn: list[Problem]) -> None:
    with pytest.raises(BadInput, match="synonyms"):
        mend.mend_rows(drawn[0], 1, ["synonyms"], 1, seed=0)
    with pytest.raises(BadInput, match="4 redundant statements, asked for 9"):
        mend.add_redundancy(drawn[0], [0, 1, 2], 9, np.random.default_rng(0))


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("Ana = 3. Answer: 3", "3"),
        ("Answer: 12.", "12"),
        ("Answer: True", "True"),
        ("Ana = 3.", None),
        ("Answer:", None),
    ],
)
def test_final_answer(text: str, answer: str | None) -> None:
    assert mend.final_answer(text) == answer


def test_a_gold_completion_ends_with_its_one_answer() -> None:
    assert mend.ends_with_answer("Ana = 5. Answer: 5", "5")
    for text in ("Ana = 5", "Answer: 15", "Answer: 5.", "Answer: 5 Answer: 5", "Answer: 5. Answer: 7 and call me"):
        assert not mend.ends_with_answer(text, "5")
    # What a model writes is still graded by its first answer.
    assert mend.final_answer("Answer: 5. Answer: 7 and call me") == "5"
