"""The arithmetic generator and the solver that reads its texts back."""

from __future__ import annotations

import re
from dataclasses import replace

import numpy as np
import pytest

from springhead.errors import BadInput
from springhead.jsonio import canonical
from springhead.llm import mend, problems, solver
from springhead.llm.problems import Problem, ProblemSpec

pytestmark = pytest.mark.unit

SPECS = {
    "default": ProblemSpec(),
    "one-path": ProblemSpec(operators=("more", "fewer"), ops_min=1, ops_max=4, depth_max=4),
    "mixed items": ProblemSpec(operators=problems.OPERATORS, ops_max=5, depth_max=5, max_value=60, items=3),
    "evaluation": ProblemSpec(ops_min=4, ops_max=5, depth_min=3, depth_max=5, split="ood-depth"),
}


@pytest.fixture(scope="module", params=list(SPECS))
def drawn(request: pytest.FixtureRequest) -> tuple[ProblemSpec, list[Problem]]:
    return SPECS[request.param], problems.generate(120, 3, SPECS[request.param])


def test_the_solver_agrees_with_the_generator_in_every_order(drawn: tuple[ProblemSpec, list[Problem]]) -> None:
    rng = np.random.default_rng(0)
    for problem in drawn[1]:
        texts = [*problem.statements, *problem.redundant]
        shuffled = [texts[i] for i in rng.permutation(len(texts))]
        assert solver.solve(shuffled, problem.question) == problem.answer
        assert solver.chain_error(shuffled, problem.question, problem.chain) is None
        assert problem.chain[-1].endswith(f"= {problem.answer}")


def test_bounds_hold(drawn: tuple[ProblemSpec, list[Problem]]) -> None:
    spec, found = drawn
    for problem in found:
        values = solver.values_of(problem.statements, problem.question)
        assert spec.ops_min <= problem.ops <= spec.ops_max
        assert spec.depth_min <= problem.depth <= min(spec.depth_max, problem.ops)
        assert all(1 <= value <= spec.max_value for value in values.values())
        facts = solver.parse(problem.statements)
        assert problem.ops == sum(fact.kind != "constant" for fact in facts.values())
        assert {fact.kind for fact in facts.values()} <= {"constant", *spec.operators}
        assert len(problem.redundant) == spec.redundant


def test_statements_are_the_targets_ancestors_in_topological_order(drawn: tuple[ProblemSpec, list[Problem]]) -> None:
    for problem in drawn[1]:
        assert solver.needed_statements(problem.statements, problem.question) == list(problem.statements)
        known: set[solver.Node] = set()
        for text in problem.statements:
            node, fact = solver.parse_statement(text)
            assert set(fact.parents) <= known
            known.add(node)


def test_redundant_statements_never_touch_what_the_answer_needs(drawn: tuple[ProblemSpec, list[Problem]]) -> None:
    for problem in drawn[1]:
        needed = set(solver.values_of(problem.statements, problem.question))
        extra = solver.parse(problem.redundant)
        assert not needed & set(extra)
        assert all(set(fact.parents) <= needed for fact in extra.values())


def test_a_problem_written_by_hand() -> None:
    statements = [
        "Cal has as many apples as Ana and Ben together.",
        "Dan has 3 times as many apples as Ana.",
        "Ben has 2 more apples than Ana.",
        "Eva has 5 fewer pears than Cal has apples.",
        "Ana has 3 apples.",
    ]
    assert solver.solve(statements, "How many apples does Cal have?") == "8"
    assert solver.solve(statements, "How many apples does Dan have?") == "9"
    assert solver.solve(statements, "How many pears does Eva have?") == "3"
    chain = ["Ana = 3", "Ben = 3 + 2 = 5", "Cal = 3 + 5 = 8"]
    question = "How many apples does Cal have?"
    assert solver.chain_error(statements, question, chain) is None
    wrong = {
        "arithmetic": ["Ana = 3", "Ben = 2 + 2 = 5", "Cal = 3 + 5 = 8"],
        "should give 5": ["Ana = 3", "Ben = 3 + 3 = 6", "Cal = 3 + 5 = 8"],
        "before a step": ["Ben = 3 + 2 = 5", "Ana = 3", "Cal = 3 + 5 = 8"],
        "does not need": ["Ana = 3", "Dan = 3 * 3 = 9"],
        "cannot read": ["Ana is 3"],
        "not about the question": ["Ana = 3", "Ben = 3 + 2 = 5"],
    }
    for reason, steps in wrong.items():
        assert reason in str(solver.chain_error(statements, question, steps))


@pytest.mark.parametrize(
    ("statements", "reason"),
    [
        (["Ana has some apples."], "known sentence forms"),
        (["Ana has 3 apples.", "Ana has 4 apples."], "second time"),
        (["Ana has 3 more apples than Ben."], "no statement says"),
        (["Ana has 3 more apples than Ben.", "Ben has 2 fewer apples than Ana."], "depends on itself"),
    ],
)
def test_a_text_without_one_answer_is_refused(statements: list[str], reason: str) -> None:
    with pytest.raises(BadInput, match=reason):
        solver.solve(statements, "How many apples does Ana have?")


def test_same_seed_same_bytes_other_seed_other_problems() -> None:
    rows = [canonical(p.to_row()) for p in problems.generate(60, 5, ProblemSpec())]
    again = [canonical(p.to_row()) for p in problems.generate(60, 5, ProblemSpec())]
    longer = [canonical(p.to_row()) for p in problems.generate(80, 5, ProblemSpec())]
    other = [canonical(p.to_row()) for p in problems.generate(60, 6, ProblemSpec())]
    assert rows == again == longer[:60]
    assert not set(rows) & set(other)


def test_no_duplicates_in_a_small_space() -> None:
    spec = ProblemSpec(("market",), ("more",), 1, 1, depth_max=1, holders=3, redundant=0, max_constant=4)
    found = problems.generate(200, 0, spec)
    assert len({problems.facts_key(p) for p in found}) == 200


def test_train_and_evaluation_share_no_expression() -> None:
    train = problems.generate(400, 1, ProblemSpec())
    test = problems.generate(150, 2, ProblemSpec(split="id"))
    signatures = [{solver.signature(p.statements, p.question) for p in group} for group in (train, test)]
    assert not signatures[0] & signatures[1]
    assert {p.split for p in test} == {"id"}


def test_the_signature_ignores_order_names_and_redundancy_but_no_number() -> None:
    first = solver.signature(
        ["Ana has 3 apples.", "Ben has 2 more apples than Ana.", "Cal has as many apples as Ana and Ben together."],
        "How many apples does Cal have?",
    )
    renamed = solver.signature(
        [
            "Gull carries 7 nets.",
            "Tern carries as many nets as Seal and Otter together.",
            "Seal carries 2 more nets than Otter.",
            "Otter carries 3 nets.",
        ],
        "How many nets does Tern carry?",
    )
    changed = solver.signature(
        ["Ana has 3 apples.", "Ben has 4 more apples than Ana.", "Cal has as many apples as Ana and Ben together."],
        "How many apples does Cal have?",
    )
    assert first == renamed != changed


def test_every_word_is_in_the_lexicon(drawn: tuple[ProblemSpec, list[Problem]]) -> None:
    words = set(problems.lexicon())
    for problem in drawn[1]:
        prompt, completion = mend.render(problem, range(len(problem.statements) + len(problem.redundant)))
        assert set(re.findall(r"\w+|[^\w\s]", f"{prompt} {completion}")) <= words


def test_a_row_reads_back_and_an_edited_one_is_refused() -> None:
    problem = problems.generate(1, 0, ProblemSpec())[0]
    row = problem.to_row()
    assert Problem.from_row(row) == problem
    with pytest.raises(BadInput, match=problem.id):
        Problem.from_row({**row, "answer": "999"})
    with pytest.raises(BadInput, match="question"):
        Problem.from_row({key: value for key, value in row.items() if key != "question"})


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"vocabularies": ("market", "moon")}, "moon.*choose from harbour, market"),
        ({"operators": ("more", "divide")}, "divide"),
        ({"operators": ()}, "empty"),
        ({"ops_min": 4}, "ops_min"),
        ({"depth_min": 3}, "depth_min"),
        ({"holdout": 0.0}, "holdout"),
        ({"operators": ("more",), "depth_max": 2}, "raise depth_max to 3"),
        ({"holders": 4}, "do not fit 4 holders"),
        ({"items": 9}, "6 items"),
    ],
)
def test_a_wrong_spec_names_the_parameter(changes: dict[str, object], reason: str) -> None:
    with pytest.raises(BadInput, match=reason):
        replace(ProblemSpec(), **changes)  # type: ignore[arg-type]


def test_asking_for_more_than_there_are_says_so() -> None:
    spec = ProblemSpec(("market",), ("more",), 1, 1, depth_max=1, holders=3, redundant=0, max_constant=2, max_step=2)
    with pytest.raises(BadInput, match=r"found only \d+ of 100000"):
        problems.generate(100_000, 0, spec)


@pytest.mark.fault
@pytest.mark.parametrize(
    ("field", "value", "needed"),
    [
        ("statements", None, "a list of texts"),
        ("statements", "abc", "a list of texts"),
        ("redundant", 3, "a list of texts"),
        ("chain", [1], "a list of texts"),
        ("ops", "2", "a whole number"),
        ("split", 3, "a text"),
    ],
)
def test_a_field_of_a_wrong_type_is_named(field: str, value: object, needed: str) -> None:
    (problem,) = problems.generate(1, 0, ProblemSpec())
    with pytest.raises(BadInput, match=f"problem {problem.id}: '{field}' must be {needed}, found"):
        Problem.from_row({**problem.to_row(), field: value})
