"""Each filter finds what was planted and leaves the rest."""

from __future__ import annotations

import numpy as np
import pytest

from springhead.errors import BadInput
from springhead.llm import logic, mend, paraphrase, problems, similarity, textfilters
from springhead.llm.problems import Problem, ProblemSpec
from springhead.llm.textrows import Row, with_row_id

pytestmark = pytest.mark.unit


@pytest.fixture(scope="module")
def found() -> list[Problem]:
    return [
        *problems.generate(30, 1, ProblemSpec(ops_min=3)),
        *logic.generate(10, 1, logic.LogicSpec()),
        *problems.generate(10, 2, ProblemSpec(ops_min=3, split="id")),
        *logic.generate(10, 2, logic.LogicSpec(split="id")),
    ]


@pytest.fixture
def rows(found: list[Problem]) -> list[Row]:
    train = [p for p in found if p.split == "train"]
    test = [p for p in found if p.split != "train"]
    made = [row for p in train for row in (mend.sft_row(p), *mend.mend_rows(p, 3, mend.OPERATORS, 2, seed=0))]
    return made + [row for p in test for row in mend.eval_rows(p, 1, 1, seed=0)]


def _dropped(decisions: list[textfilters.Decision]) -> dict[str, textfilters.Decision]:
    return {decision.id: decision for decision in decisions if not decision.kept}


def test_clean_rows_pass_every_rule(found: list[Problem], rows: list[Row]) -> None:
    by_id = {problem.id: problem for problem in found}
    for decisions in (
        textfilters.content_id(rows),
        textfilters.parent(rows, by_id),
        textfilters.length(rows, 5, 300),
        textfilters.answer(rows),
        textfilters.leakage(rows, found, 0.9, 3),
        textfilters.near_duplicate(rows, found, 0.95, 3),
        textfilters.duplicate_row(rows),
    ):
        assert [decision.id for decision in decisions] == [row["id"] for row in rows]
        assert not _dropped(decisions)


def test_an_edited_row_and_a_nan_are_dropped(rows: list[Row]) -> None:
    bad = [
        {**rows[0], "prompt": "Ana has 4 apples. How many apples does Ana have?"},
        {**rows[1], "kendall_tau": np.nan},
    ]
    assert set(_dropped(textfilters.content_id([*bad, *rows[2:]]))) == {rows[0]["id"], rows[1]["id"]}


def test_unknown_missing_and_foreign_parents_are_dropped(found: list[Problem], rows: list[Row]) -> None:
    evaluation = next(p for p in found if p.split == "id")
    bad = [with_row_id({**rows[0], "parents": parents}) for parents in (["0" * 64], [], [evaluation.id])]
    dropped = _dropped(textfilters.parent([*bad, *rows], {p.id: p for p in found}))
    assert set(dropped) == {row["id"] for row in bad}


def test_too_long_and_too_short_rows_are_dropped_with_their_length(rows: list[Row]) -> None:
    long = with_row_id({**rows[0], "completion": "Ana = 3. " * 200 + "Answer: 3"})
    short = with_row_id({**rows[0], "prompt": "Hm?", "completion": "3"})
    dropped = _dropped(textfilters.length([long, short, *rows], 5, 300))
    assert set(dropped) == {long["id"], short["id"]}
    assert dropped[long["id"]].value > dropped[long["id"]].threshold == 300
    assert (dropped[short["id"]].value, dropped[short["id"]].threshold) == (3, 5)


def test_wrong_answers_wrong_chains_and_unreadable_texts_are_dropped(rows: list[Row]) -> None:
    dag, claim = rows[0], next(row for row in rows if row["family"] == "logic")
    flipped = {"True": "False", "False": "True"}[claim["answer"]]
    cases = {
        0.0: [
            with_row_id({**dag, "answer": "77", "completion": "Answer: 77"}),
            with_row_id({**dag, "completion": dag["completion"].rpartition(" ")[0] + " 77"}),
            with_row_id({**dag, "prompt": dag["prompt"].replace("How many", "Guess how many")}),
            with_row_id({**dag, "prompt": ""}),
            with_row_id({**claim, "answer": flipped, "completion": f"Answer: {flipped}"}),
            *(
                with_row_id({**dag, "completion": dag["completion"] + more})
                for more in (" Answer: 7", ". Ring me", ".")
            ),
        ],
        0.5: [with_row_id({**dag, "completion": dag["completion"].partition(". ")[2]})],
    }
    dropped = _dropped(textfilters.answer([*rows, *cases[0.0], *cases[0.5]]))
    assert {key: decision.value for key, decision in dropped.items()} == {
        row["id"]: value for value, bad in cases.items() for row in bad
    }


def test_an_unknown_family_is_an_error(rows: list[Row]) -> None:
    with pytest.raises(BadInput, match="riddle"):
        textfilters.answer([{**rows[0], "family": "riddle"}])


def _planted(problem: Problem, **changes: object) -> Problem:
    fields = {name: getattr(problem, name) for name in Problem.__dataclass_fields__ if name != "id"}
    return problems.with_id(**{**fields, "split": "train", **changes})


def test_permuted_and_renamed_copies_of_evaluation_problems_are_leaks(found: list[Problem], rows: list[Row]) -> None:
    target = next(p for p in found if p.split == "id" and p.family == "dag")
    world = problems.vocabularies()[target.vocabulary]

    def rename(text: str) -> str:
        # Rotate the names: every name of the world becomes its successor.
        words = dict(zip(world.holders, [*world.holders[1:], world.holders[0]], strict=True))
        return " ".join(words.get(w, words.get(w[:-1], "") + w[-1] if w[:-1] in words else w) for w in text.split(" "))

    permuted = _planted(target, statements=tuple(reversed(target.statements)))
    renamed = _planted(
        target,
        statements=tuple(map(rename, target.statements)),
        question=rename(target.question),
        chain=tuple(map(rename, target.chain)),
    )
    assert renamed.statements != target.statements
    planted = [mend.sft_row(permuted), mend.sft_row(renamed), with_row_id({**rows[0], "parents": [target.id]})]
    assert not _dropped(textfilters.answer(planted[1:2]))  # the renamed copy is a proper problem
    dropped = _dropped(textfilters.leakage([*rows, *planted], found, 0.9, 3))
    assert set(dropped) == {row["id"] for row in planted}
    assert all(decision.value == 1.0 for decision in dropped.values())
    assert {decision.replaced_by for decision in dropped.values()} == {target.id}


def test_overlapping_training_text_is_a_leak_from_the_threshold_on(found: list[Problem], rows: list[Row]) -> None:
    target = max((p for p in found if p.split == "id" and p.family == "dag"), key=lambda p: len(p.statements))
    number = next(word for word in target.statements[0].split() if word.isdigit())
    close = _planted(target, statements=(target.statements[0].replace(number, "1"), *target.statements[1:]))
    planted = mend.sft_row(close)
    value = similarity.jaccard(
        similarity.ngrams((*close.statements, close.question), 3),
        similarity.ngrams((*target.statements, target.question), 3),
    )
    assert 0.5 < value < 1.0
    hit = _dropped(textfilters.leakage([*rows, planted], found, value - 0.01, 3))[planted["id"]]
    assert (hit.value, hit.replaced_by) == (pytest.approx(value), target.id)
    assert planted["id"] not in _dropped(textfilters.leakage([*rows, planted], found, value + 0.01, 3))


def test_a_reworded_near_copy_is_a_leak_like_the_copy_itself(found: list[Problem], rows: list[Row]) -> None:
    planted: list[Row] = []
    for target in (p for p in found if p.split == "id" and p.family == "dag"):
        number = next(word for word in target.statements[0].split() if word.isdigit())
        twin = _planted(target, statements=(target.statements[0].replace(number, "98"), *target.statements[1:]))
        planted += [mend.sft_row(twin), *paraphrase.rows(twin, 12, seed=0)]
    assert len({row["prompt"] for row in planted}) > 100
    decisions = {decision.id: decision for decision in textfilters.leakage([*rows, *planted], found, 0.5, 3)}
    assert not any(decisions[row["id"]].kept for row in planted)
    by_parent: dict[str, set[tuple[float, str | None]]] = {}
    for row in planted:
        decision = decisions[row["id"]]
        by_parent.setdefault(row["parents"][0], set()).add((decision.value, decision.replaced_by))
    assert all(len(verdicts) == 1 for verdicts in by_parent.values())  # the words make no difference
    assert all(decisions[row["id"]].kept for row in rows)


def test_a_near_duplicate_problem_loses_all_its_rows_and_variants_survive(
    found: list[Problem], rows: list[Row]
) -> None:
    original = found[0]
    copy = _planted(original, statements=tuple(reversed(original.statements)), chain=(*original.chain,))
    copies = mend.mend_rows(copy, 3, mend.OPERATORS, 2, seed=0)
    dropped = _dropped(textfilters.near_duplicate([*rows, *copies], [*found, copy], 0.95, 3))
    assert set(dropped) == {row["id"] for row in copies}
    assert {(d.value, d.replaced_by) for d in dropped.values()} == {(1.0, original.id)}


def test_a_repeated_training_row_is_dropped_and_evaluation_is_left_alone(rows: list[Row]) -> None:
    train, test = rows[0], rows[-1]
    again = [with_row_id({**train, "variant": 50}), with_row_id({**test, "variant": 50})]
    dropped = _dropped(textfilters.duplicate_row([*rows, *again]))
    assert {key: d.replaced_by for key, d in dropped.items()} == {again[0]["id"]: train["id"]}


def test_minhash_estimates_the_jaccard_index() -> None:
    words = [f"w{i}" for i in range(400)]
    left = frozenset(words[:300])
    for share in (60, 150, 270):
        right = frozenset(words[300 - share : 600 - share])
        signatures = similarity.minhash([left, right])
        estimate = float((signatures[0] == signatures[1]).mean())
        exact = similarity.jaccard(left, right)
        assert abs(estimate - exact) < 4 * np.sqrt(exact * (1 - exact) / similarity.PERMUTATIONS) + 1e-9


@pytest.mark.parametrize("threshold", [0.5, 0.7, 0.9])
def test_candidates_miss_nothing_that_brute_force_finds(threshold: float) -> None:
    rng = np.random.default_rng(1)
    base = [frozenset(map(str, rng.choice(60, size=20, replace=False))) for _ in range(60)]
    near = [frozenset([*sorted(s)[int(rng.integers(0, 6)) :], f"x{i}"]) for i, s in enumerate(base)]
    sets = base + near
    kept: list[int] = []
    expected = set()
    for j in range(len(sets)):
        if any(similarity.jaccard(sets[i], sets[j]) >= threshold for i in kept):
            expected.add(j)
        else:
            kept.append(j)
    twins = similarity.earlier_twins(sets, threshold)
    assert {j for j, (value, _) in twins.items() if value >= threshold} == expected
    assert expected
    best = similarity.closest(near, base, threshold)
    for s, (value, where) in zip(near, best, strict=True):
        exact = [similarity.jaccard(s, other) for other in base]
        if max(exact) >= threshold:
            assert (value, where) == (max(exact), int(np.argmax(exact)))


def test_only_a_kept_text_can_replace_another() -> None:
    chain = [frozenset(map(str, range(start, start + 20))) for start in (0, 2, 4)]
    assert similarity.jaccard(chain[0], chain[1]) == similarity.jaccard(chain[1], chain[2]) > 0.8
    twins = similarity.earlier_twins(chain, 0.8)
    # The second falls to the first; the third is close to the second alone, which is gone.
    assert twins[1] == (18 / 22, 0)
    assert twins.get(2, (0.0, 0))[0] < 0.8
