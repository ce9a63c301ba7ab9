"""The paraphrase baseline: other words, the same problem, and every wording is read back."""

from itertools import product

import pytest

from springhead.errors import BadInput
from springhead.llm import logic, mend, paraphrase, problems, textfilters, tokenizer
from springhead.llm.families import own_words, reader
from springhead.llm.problems import Problem, ProblemSpec

pytestmark = pytest.mark.unit


@pytest.fixture(scope="module", params=[1, 3], ids=["one item", "three items"])
def found(request: pytest.FixtureRequest) -> list[Problem]:
    """Problems with every relation; with three items, facts are referred to by name and item."""
    spec = ProblemSpec(ops_min=3, ops_max=6, depth_max=4, items=request.param, max_value=99)
    assert set(spec.operators) >= {"more", "fewer", "sum"}
    times = ProblemSpec(ops_min=2, ops_max=3, operators=("times", "more"), items=request.param, max_value=99)
    return [
        *problems.generate(30, 1, spec),
        *problems.generate(10, 2, times),
        *logic.generate(20, 3, logic.LogicSpec()),
    ]


def test_a_wording_has_the_same_names_and_numbers_and_is_read_back_as_the_same_fact(found: list[Problem]) -> None:
    several = 0
    for problem in found:
        module = reader(problem.family)
        base = problem.question.removesuffix("?").split()[-1]
        texts = [*problem.statements, problem.question]
        for place, text in enumerate(texts):
            first, *others = paraphrase.wordings(text, base)
            assert first == text
            several += len(others) > 1
            assert own_words(problem.family, first) == first
            for other in others:
                assert own_words(problem.family, other) == first
                changed = [*texts[:place], other, *texts[place + 1 :]]
                assert module.solve(changed[:-1], changed[-1]) == problem.answer
                assert module.signature(changed[:-1], changed[-1]) == module.signature(texts[:-1], texts[-1])
                assert module.chain_error(changed[:-1], changed[-1], problem.chain) is None
                numbers = [word for word in text.split() if word.isdigit()]
                assert [word for word in other.split() if word.isdigit()] == numbers
                names = {word.strip(".?:") for word in text.split() if word[0].isupper()} - {"How", "True", "Every"}
                assert names <= {word.strip(".?:") for word in other.split()}
    assert several > 100


def test_the_wordings_of_each_relation() -> None:
    assert paraphrase.wordings("Ana has 3 more figs than Ben.", "have") == [
        "Ana has 3 more figs than Ben.",
        "Ana has 3 figs more than Ben.",
        "Ana does have 3 more figs than Ben.",
        "Ana has 3 more figs than Ben does.",
    ]
    # A fact that is named with its item keeps its words.
    assert paraphrase.wordings("Ana has 3 times as many figs as Ben has nuts.", "have") == [
        "Ana has 3 times as many figs as Ben has nuts.",
        "Ana does have 3 times as many figs as Ben has nuts.",
    ]
    assert "Ben and Cal together have as many figs as Ana." in paraphrase.wordings(
        "Ana has as many figs as Ben and Cal together.", "have"
    )
    assert paraphrase.wordings("Every glim is not red.") == [
        "Every glim is not red.",
        "True: Every glim is not red.",
        "Every glim is not red: True.",
    ]
    with pytest.raises(BadInput, match="cannot reword 'Some figs fell"):
        paraphrase.wordings("Some figs fell from Ana.")


def test_rows_are_reworded_in_order_and_pass_the_answer_rule(found: list[Problem]) -> None:
    for problem, seed in product(found, (0, 1)):
        first, *others = rows = paraphrase.rows(problem, 3, seed)
        plain = mend.sft_row(problem)
        assert (first["prompt"], first["completion"]) == (plain["prompt"], plain["completion"])
        assert len({row["prompt"] for row in rows}) == 4
        for row in others:
            assert (row["method"], row["operator"], row["parents"]) == ("paraphrase", "paraphrase", [problem.id])
            assert (row["completion"], row["order"]) == (plain["completion"], plain["order"])
        assert all(decision.kept for decision in textfilters.answer(rows))
        assert rows == paraphrase.rows(problem, 3, seed)
        wrong = {**rows[1], "answer": "77", "completion": rows[1]["completion"].replace(problem.answer, "77")}
        assert not textfilters.answer([wrong])[0].kept


def test_the_small_student_knows_every_word(found: list[Problem]) -> None:
    small = tokenizer.small_tokenizer()
    for problem in found:
        for row in paraphrase.rows(problem, 3, 0):
            assert small.unk_token_id not in small(row["prompt"])["input_ids"]


def test_few_wordings_repeat_rather_than_run_forever() -> None:
    problem = problems.generate(1, 1, ProblemSpec(ops_min=1, ops_max=1, operators=("more",)))[0]
    texts = [row["prompt"] for row in paraphrase.rows(problem, 60, 0)]
    assert 20 < len(set(texts)) <= 3 * 4 * 2
