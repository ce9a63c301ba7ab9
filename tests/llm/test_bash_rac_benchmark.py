"""The benchmark of BASH and RAC: rows of its own tasks, and how answers to them are scored."""

import pytest

from benchmarks.bash_rac import answer_first, backwards_rows, score
from springhead.llm import mend, problems
from springhead.llm.tokenizer import small_tokenizer

pytestmark = pytest.mark.unit

SPEC = problems.ProblemSpec(
    vocabularies=("market",), operators=("more", "fewer"), ops_min=3, ops_max=5, depth_min=3, depth_max=5,
    max_value=20, max_constant=9, max_step=5, holders=12, items=1, redundant=0, holdout=0.2,
)  # fmt: skip


def test_the_answer_comes_first_and_the_steps_derive_it():
    for problem in problems.generate(50, 1, SPEC):
        row = mend.sft_row(problem)
        first = answer_first(row)["completion"]
        assert first == f"Answer: {problem.answer}. {'. '.join(problem.chain)}."
        assert score(row, first) == score(row, row["completion"]) == {"right": 1.0, "derived": 1.0}


@pytest.mark.parametrize(
    ("text", "right", "derived"),
    [
        ("Answer: 4. Ana = 3. Ben = 3 + 2 = 5.", 0.0, 1.0),
        ("Answer: 5. Ana = 3. Ben = 3 + 1 = 4.", 1.0, 0.0),
        ("Answer: 5. Ana = 3. Ben = 3 + 2 = 15.", 1.0, 0.0),
        ("Answer: 5", 1.0, 0.0),
        ("Ana = 5.", 0.0, 1.0),
        ("", 0.0, 0.0),
    ],
)
def test_what_is_stated_and_what_is_derived_are_scored_apart(text, right, derived):
    assert score({"answer": "5"}, text) == {"right": right, "derived": derived}


def test_names_are_told_backwards_and_no_row_is_on_two_sides():
    rows = {seed: backwards_rows(1000, seed) for seed in (1, 2, 3)}
    for row in rows[1]:
        told = row["prompt"].removesuffix("?").split()
        assert row["completion"] == " ".join(reversed(told)) + "."
        assert 8 <= len(told) <= 16
    prompts = [{row["prompt"] for row in part} for part in rows.values()]
    assert not prompts[0] & (prompts[1] | prompts[2])
    assert not prompts[1] & prompts[2]


def test_names_are_a_token_each_and_come_back_from_the_tokenizer_as_they_are_scored():
    tokenizer = small_tokenizer()
    for row in backwards_rows(50, 1):
        ids = tokenizer.encode(row["completion"], add_special_tokens=False)
        assert len(ids) == len(row["words"]) + 1
        assert score(row, tokenizer.decode(ids, skip_special_tokens=True).strip()) == {"exact": 1.0, "in place": 1.0}


@pytest.mark.parametrize(
    ("text", "exact", "in_place"),
    [
        ("Cal Ben Ana Ana.", 1.0, 1.0),
        ("Cal Ben Ana", 0.0, 0.75),
        ("Cal Ben Ana Ana Ana.", 0.0, 1.0),
        ("Cal Ana Ben Ana.", 0.0, 0.5),
        ("Ben Ana Ana.", 0.0, 0.25),
        ("", 0.0, 0.0),
    ],
)
def test_a_slip_costs_its_place_and_a_lost_place_all_that_follow(text, exact, in_place):
    assert score({"words": ["Cal", "Ben", "Ana", "Ana"]}, text) == {"exact": exact, "in place": in_place}
