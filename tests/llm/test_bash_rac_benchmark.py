"""The benchmark of BASH and RAC: rows that state the answer first, and how answers to them are scored."""

import pytest

from benchmarks.bash_rac import answer_first, score
from springhead.llm import mend, problems

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
