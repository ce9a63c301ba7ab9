"""The benchmark of MEND's methods: the same problems for all, and nothing of the evaluation in training."""

import re
from dataclasses import replace

import pytest

from benchmarks.mend_methods import (
    MEND,
    MEND_ROWS,
    METHODS,
    NAMES,
    PARAPHRASE,
    RC,
    SETTING,
    SFT,
    SPLITS,
    asked,
    training,
)
from springhead.llm import problems, solver
from springhead.llm.problems import facts_key

pytestmark = pytest.mark.unit
CHANGED = ("prompt", "completion")
SMALL = replace(SETTING, problems=80, asked=20)


@pytest.fixture(scope="module")
def rows():
    return {method: training(SMALL, method) for method in METHODS[1:]}


def test_methods_differ_in_rows_and_not_in_problems(rows):
    problems_of = {method: {row["parents"][0] for row in made} for method, made in rows.items()}
    assert problems_of[SFT] == problems_of[RC] == problems_of[PARAPHRASE] == problems_of[MEND]
    assert len(rows[MEND_ROWS]) == len(rows[SFT]) == SMALL.problems
    assert {row["kendall_tau"] for row in rows[SFT] + rows[RC] + rows[PARAPHRASE]} == {1.0}
    assert {row["redundancy"] for row in rows[SFT] + rows[RC] + rows[PARAPHRASE]} == {0}
    assert {row["redundancy"] for row in rows[MEND]} == {0, 1}
    assert any(row["kendall_tau"] < 0 for row in rows[MEND])
    completions = {row["completion"] for row in rows[SFT]}
    assert any(row["completion"] not in completions for row in rows[RC])  # another order of the solution
    assert {row["completion"] for row in rows[PARAPHRASE]} == completions
    assert {row["ops"] for made in rows.values() for row in made} == {1, 2}


def test_what_is_asked_was_never_trained_on_and_the_parts_share_nothing(rows):
    test, dev = (asked(SMALL, part) for part in ("test", "dev"))
    trained = {facts_key(p) for p in problems.generate(600, 1, SMALL.spec)}
    keys = {}
    for part, found in (("test", test), ("dev", dev)):
        keys[part] = {row["parents"][0] for made in found.values() for row in made}
        assert {split: {row["redundancy"] for row in made} for split, made in found.items()} == {
            split: {count} for split, count in SPLITS.items()
        }
        assert {row["ops"] for row in found["ood-depth"]} == {3}
        assert {len(made) for made in found.values()} == {4 * SMALL.asked}
        prompts: dict[str, set[str]] = {}
        for row in found["order"]:
            prompts.setdefault(row["parents"][0], set()).add(row["prompt"])
        # Two statements have two orders only; from three on the four asked differ.
        assert {len(given) for given in prompts.values()} == {2, 4}
        assert_the_same_in_other_names(found["order"], found["ood-names"])
        assert not {row["prompt"] for made in found.values() for row in made} & {
            row["prompt"] for method in METHODS[1:] for row in rows[method]
        }
    assert not keys["test"] & keys["dev"]
    for ops in (SMALL.spec.ops_max, SMALL.spec.ops_max + 1):
        drawn = problems.generate(4 * SMALL.asked, 2, replace(SMALL.spec, ops_max=ops, depth_max=ops, split="id"))
        assert not trained & {facts_key(p) for p in drawn}


def assert_the_same_in_other_names(rows, renamed):
    holders = problems.vocabularies()["market"].holders
    trained, others = holders[:NAMES], holders[NAMES : 2 * NAMES]
    back = dict(zip(others, trained, strict=True))
    for row, other in zip(rows, renamed, strict=True):
        words = set(re.findall(r"\w+", other["prompt"] + other["completion"]))
        assert words & set(others)
        assert not words & set(trained)
        told = {key: re.sub(r"\w+", lambda word: back.get(word[0], word[0]), other[key]) for key in CHANGED}
        assert told == {key: row[key] for key in CHANGED}
        # The solver comes to the same: names do not change what the facts lead to.
        assert solver.solve(*solver.split_text(other["prompt"])) == row["answer"]
        assert other["id"] != row["id"]
        kept = row.keys() - {"id", "split", *CHANGED}
        assert {key: other[key] for key in kept} == {key: row[key] for key in kept}
