"""The text suite: sound rows are green, and every expectation goes red for its own fault, naming the row."""

import json
from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from springhead.errors import BadInput, Finding
from springhead.jsonio import read_json, write_jsonl
from springhead.lineage.digests import tree_digest
from springhead.llm import logic, mend, problems, suite
from springhead.llm.logic import LogicSpec
from springhead.llm.problems import Problem, ProblemSpec
from springhead.llm.textrows import Row, with_row_id, write_rows
from springhead.stage import for_test
from springhead.tables import read_table
from stages.llm import validate
from tests.llm.suites import Rows, by_name, check_names, places

PARAMS = validate.Params(
    min_prompt_chars=20,
    max_prompt_chars=2000,
    min_completion_chars=9,
    max_completion_chars=1000,
    methods=("mend", "sft"),
    operators=("order", "redundancy"),
    min_group_rows=5,
    max_label_share=0.8,
    max_answer_share=0.5,
)


def drawn(split: str, seed: int, count: int) -> list[Problem]:
    words = problems.generate(count, seed, ProblemSpec(split=split))
    return words + logic.generate(count, seed, LogicSpec(split=split))


@pytest.fixture(scope="module")
def made() -> tuple[Rows, list[Problem]]:
    """Sound rows of 60 problems, and the problems."""
    train, held = drawn("train", 1, 20), drawn("id", 2, 10)
    rows = [mend.sft_row(p) for p in train]
    rows += [row for p in train for row in mend.mend_rows(p, 2, PARAMS.operators, 2, 3)]
    evaluation = [row for p in held for row in mend.eval_rows(p, 1, 2, 4)]
    return {"train.jsonl": rows, "eval.jsonl": evaluation}, train + held


# -- every fault at once, each in a row of its own -------------------------------------------------


def _edit(**fields: Any) -> Callable[[Row], Row]:
    return lambda row: with_row_id({**row, **fields})


def _without(name: str) -> Callable[[Row], Row]:
    return lambda row: {key: value for key, value in row.items() if key != name}


def _wrong_step(row: Row) -> Row:
    steps = mend.steps_of(row["completion"])
    return with_row_id({**row, "completion": ". ".join([*steps[1:], f"{mend.ANSWER_CUE} {row['answer']}"])})


def _appended(text: str) -> Callable[[Row], Row]:
    return lambda row: with_row_id({**row, "completion": f"{row['completion']}{text}"})


def _preceded(text: str) -> Callable[[Row], Row]:
    return lambda row: with_row_id({**row, "prompt": f"{text}. {row['prompt']}"})


GERMAN = "Bitte sende dein Passwort gleich morgen durch diese Leitung, damit wir danach alles Weitere klären können"


# what to do to a training row: the expectations that must name it. A text that is no longer solvable fails the
# answer too, which is why some have more than one.
FAULTS: dict[str, tuple[Callable[[Row], Row], set[str]]] = {
    "no prompt field": (_without("prompt"), {"ExpectRowSchema", "ExpectRowIdsOfContent"}),
    "text for a number": (_edit(variant="1"), {"ExpectRowSchema"}),
    "half a character": (lambda row: {**row, "answer": "\ud83d"}, {"ExpectRowSchema", "ExpectRowIdsOfContent"}),
    "not a number": (lambda row: {**row, "kendall_tau": float("nan")}, {"ExpectRowIdsOfContent"}),
    "no id": (_without("id"), {"ExpectRowSchema", "ExpectRowIds", "ExpectRowIdsOfContent", "ExpectRowsListed"}),
    "edited": (lambda row: {**row, "kendall_tau": 0.123}, {"ExpectRowIdsOfContent"}),
    "unknown parent": (_edit(parents=["f" * 64]), {"ExpectParentsExist"}),
    "no parent": (_edit(parents=[]), {"ExpectParentsExist"}),
    "other split": (_edit(split="id"), {"ExpectSplitOfParent", "ExpectSplitOfFile"}),
    "other operator": (_edit(operator="rotate"), {"ExpectKnownOperators"}),
    "empty prompt": (_edit(prompt=" "), {"ExpectPromptLength", "ExpectRightAnswers"}),
    "empty completion": (_edit(completion=""), {"ExpectCompletionLength", "ExpectRightAnswers", "ExpectWholeForm"}),
    "second answer": (_appended(" Answer: 7"), {"ExpectWholeForm"}),
    "text after the answer": (_appended(". And so on"), {"ExpectWholeForm"}),
    "telephone number": (_appended(" call +49 30 1234567"), {"ExpectWholeForm", "ExpectNoPersonalData"}),
    "another language": (_appended(f" {GERMAN}"), {"ExpectWholeForm", "ExpectEnglish"}),
    "another language asked": (_preceded(", ".join([GERMAN] * 9)), {"ExpectEnglish", "ExpectRightAnswers"}),
    "answer in the prompt": (_preceded("Answer: 5"), {"ExpectWholeForm", "ExpectRightAnswers"}),
    "sign of a template": (_appended("<|im_end|>"), {"ExpectWholeForm", "ExpectRightAnswers"}),
    "over-long prompt": (
        lambda row: with_row_id({**row, "prompt": "Zed has 3 pears. " * 200 + row["prompt"]}),
        {"ExpectPromptLength", "ExpectRightAnswers"},
    ),
    "control character": (
        lambda row: with_row_id({**row, "completion": "\x07" + row["completion"]}),
        {"ExpectPrintableText", "ExpectValidChains"},
    ),
    "wrong answer": (_edit(answer="77"), {"ExpectRightAnswers"}),
    "wrong completion": (_edit(completion="Answer: 77"), {"ExpectRightAnswers"}),
    "step left out": (_wrong_step, {"ExpectValidChains"}),
}


@pytest.fixture(scope="module")
def red(made: tuple[Rows, list[Problem]], tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The outcomes on the faulty rows, and the name of each fault's row."""
    rows, found = deepcopy(made)
    train, held = rows["train.jsonl"], rows["eval.jsonl"]
    names = {}
    # Fault k goes to the second MEND row of the k-th arithmetic problem.
    for k, (fault, (change, _)) in enumerate(FAULTS.items()):
        position = len(found[:40]) + 3 * k + 1
        train[position] = change(train[position])
        names[fault] = train[position].get("id", f"train.jsonl:{position + 1}")
    twice = {**train[0], "variant": 7}
    train.append(train[1])  # one row twice
    train.append(with_row_id(twice))  # the same text as another variant
    names |= {"twice": train[1]["id"], "same text": train[-1]["id"], "unlisted": train[2]["id"]}
    leak = with_row_id({**train[3], "split": "id", "method": "eval"})
    held.append(leak)  # a training row among the evaluation rows
    held[0] = with_row_id({**held[0], "variant": held[1]["variant"]})  # one variant twice, one missing
    listed = [(file, i, "0" * 64 if row_id == train[2]["id"] else row_id) for file, i, row_id in places(rows)]
    moved = next(row for row in train if row.get("id") == names["other split"])
    # Both put a problem with a single variant into the evaluation split.
    names |= {"moved problem": moved["parents"][0], "leaked problem": leak["parents"][0]}
    names |= {"leak": leak["id"], "uneven problem": held[0]["parents"][0], "repeated problem": train[1]["parents"][0]}
    strict = replace(PARAMS, min_group_rows=1000, operators=(*PARAMS.operators, "swap"))
    splits = {problem.id: problem.split for problem in found}
    docs = tmp_path_factory.mktemp("red")
    return by_name(suite.SUITE, suite.frames(rows, listed, splits, strict), docs), names


EXTRA: dict[str, list[str]] = {
    "ExpectRowIdsUnique": ["twice"],
    "ExpectRowsListed": ["unlisted"],
    "ExpectSplitOfParent": ["leak"],
    "ExpectNoPromptLeak": ["leak"],
    "ExpectNoParentLeak": ["leak"],
    "ExpectNoExpressionLeak": ["leak"],
    "ExpectNoRepeatedText": ["same text"],
    "ExpectCompleteVariants": ["leaked problem", "moved problem", "uneven problem"],
    "ExpectNoRepeatedVariants": ["repeated problem", "uneven problem"],
}


@pytest.mark.fault
@pytest.mark.parametrize("name", sorted(set(EXTRA).union(*(named for _, named in FAULTS.values()))))
def test_an_expectation_names_the_faulty_rows_alone(red: Any, name: str) -> None:
    check_names(red, name, FAULTS, EXTRA)


@pytest.mark.fault
def test_groups_and_operators_go_red(red: Any, made: tuple[Rows, list[Problem]], tmp_path: Path) -> None:
    outcomes, _ = red
    assert outcomes["ExpectEnoughRows"].ids() == ["id/eval/all", "train/mend/all", "train/sft/all"]
    assert outcomes["ExpectOperatorRows"].ids() == ["swap"]

    nothing = by_name(
        suite.SUITE, suite.frames({"train.jsonl": [], "eval.jsonl": []}, [], {}, PARAMS), tmp_path / "empty"
    )
    assert not nothing["ExpectRows"].success
    assert nothing["ExpectEnoughRows"].ids() == ["train/mend/all", "train/sft/all"]
    sizes = (("train", "logic", "True", 100), ("train", "dag", "7", 100), ("id", "logic", "False", 5))
    alike = [
        {"split": split, "method": "sft", "family": family, "parents": [f"{split}{i}"], "answer": answer}
        for split, family, answer, count in sizes
        for i in range(count)
    ]
    lopsided = by_name(suite.SUITE, [suite.group_frame(alike, {}, PARAMS)], tmp_path / "lopsided")
    assert lopsided["ExpectBalancedLabels"].ids() == ["train/sft/logic"]  # five problems prove nothing
    assert lopsided["ExpectVariedAnswers"].ids() == ["train/sft/dag"]
    seen_red = {name for part in (outcomes, nothing, lopsided) for name, o in part.items() if not o.success}
    assert seen_red == set(outcomes)  # no expectation of the suite has never been seen to fail


def test_many_spare_facts_in_any_world_still_look_english() -> None:
    """Names and items are most of their words; the verbs must be known."""
    for name in problems.vocabularies():
        spec = ProblemSpec(ops_min=1, ops_max=1, vocabularies=(name,), redundant=8, redundant_linked=0.0)
        rows = [row for p in problems.generate(10, 1, spec) for row in mend.eval_rows(p, 1, 8, 4)]
        table = suite.text_table([("eval.jsonl", i, row) for i, row in enumerate(rows)], [], {}, PARAMS)
        assert table["foreign_text"].isna().all()


# -- the stage ------------------------------------------------------------------------------------


def run(rows: Rows, found: list[Problem], folder: Path, out: str = "out") -> Path:
    if not folder.exists():
        write_rows(folder / "filter", rows)
        for name, side in (("train.jsonl", True), ("eval.jsonl", False)):
            kept = [p.to_row() for p in found if (p.split == "train") == side]
            write_jsonl(folder / "problems" / name, kept)
    inputs = {"filter": folder / "filter", "problems": folder / "problems"}
    validate.run(for_test(PARAMS, folder / out, inputs, branch="llm", stage="validate"))
    return folder / out


def test_sound_rows_are_green_and_the_output_is_the_same_twice(
    made: tuple[Rows, list[Problem]], tmp_path: Path
) -> None:
    first, second = (run(*made, tmp_path / "run", name) for name in ("first", "second"))
    verdict = read_json(first / "verdict.json")
    assert [e["name"] for e in verdict["expectations"] if not e["success"]] == []
    assert (verdict["success"], verdict["severity"], verdict["quarantined"]) == (True, "none", 0)
    assert verdict["rows"] == sum(map(len, made[0].values()))
    assert verdict["data_digest"] == tree_digest(tmp_path / "run/filter")
    assert tree_digest(first) == tree_digest(second)


@pytest.mark.fault
def test_a_wrong_answer_stops_the_stage_and_names_the_row(made: tuple[Rows, list[Problem]], tmp_path: Path) -> None:
    rows, found = deepcopy(made)
    rows["eval.jsonl"][5] = wrong = with_row_id({**rows["eval.jsonl"][5], "answer": "77"})
    with pytest.raises(Finding, match=f"ExpectRightAnswers.*{wrong['id']}"):
        run(rows, found, tmp_path / "run")
    [line] = read_table(tmp_path / "run/out/quarantine.parquet").to_pylist()
    assert (line["id"], line["expectation"]) == (wrong["id"], "ExpectRightAnswers")
    assert line["detail"].startswith("file=eval.jsonl, line=6, answer_error=answer '77', the text gives ")


@pytest.mark.fault
def test_a_damaged_line_is_bad_input(made: tuple[Rows, list[Problem]], tmp_path: Path) -> None:
    folder = tmp_path / "run"
    write_rows(folder / "filter", made[0])
    write_jsonl(folder / "problems/train.jsonl", [])
    write_jsonl(folder / "problems/eval.jsonl", [])
    path = folder / "filter/train.jsonl"
    lines = path.read_text().splitlines()
    path.write_text("\n".join([*lines[:3], lines[3][:40], *lines[4:]]))
    with pytest.raises(BadInput, match=r"train\.jsonl:4"):
        run(*made, folder)


@pytest.mark.fault
def test_a_problem_without_an_id_is_bad_input(tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_text(json.dumps({"split": "train"}) + "\n")
    with pytest.raises(BadInput, match=r"train\.jsonl:1: a problem needs an id"):
        validate.problem_splits(tmp_path)


@pytest.mark.parametrize(
    ("key", "value"),
    [("min_prompt_chars", 3000), ("max_completion_chars", 0), ("max_label_share", 1.5), ("min_group_rows", 0)],
)
def test_impossible_bounds_are_refused(key: str, value: float) -> None:
    with pytest.raises(BadInput, match=r"llm\.validate"):
        replace(PARAMS, **{key: value})
