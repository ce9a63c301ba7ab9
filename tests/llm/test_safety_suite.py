"""The suite of Rational's rows: sound rows are green, and every expectation goes red for its own fault."""

from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from springhead.errors import BadInput
from springhead.llm import mutators, rational, safety_data, safety_suite
from springhead.llm.judges import refusal
from springhead.llm.safety_data import Base
from springhead.llm.textrows import Row, with_row_id
from springhead.verdicts import Frame
from tests.llm.suites import Rows, by_name, check_names, places

FORMS = ("question", "slang", "role-play")
SETTINGS = safety_suite.Settings(
    min_prompt_chars=10,
    max_prompt_chars=1000,
    min_completion_chars=9,
    max_completion_chars=1000,
    methods=("rational", "refusal-sft"),
    forms=FORMS,
    eval_forms=(*FORMS, "past-tense"),
    min_group_rows=10,
    max_refuse_share=0.8,
    leakage_similarity=0.7,
)
ROWS = rational.Settings(forms=FORMS, benign_forms=("question",), eval_forms=SETTINGS.eval_forms)


@pytest.fixture(scope="module")
def bases() -> list[Base]:
    return safety_data.split(safety_data.grouped(safety_data.authored(), 0.7), 0.34, 0)


@pytest.fixture(scope="module")
def made(bases: list[Base]) -> Rows:
    """Sound rows of the authored prompts, benign and adversarial in turn."""
    train = [row for b in bases if b.split == "train" for row in rational.train_rows(b, ROWS, 1)]
    held = [row for b in bases if b.split == "test" for row in rational.eval_rows(b, ROWS, 1)]
    return {"train.jsonl": train, "eval.jsonl": held}


def frames(rows: Rows, bases: list[Base], settings: safety_suite.Settings = SETTINGS) -> list[Frame]:
    splits = {b.id: b.split for b in bases}
    return safety_suite.frames(rows, places(rows), splits, settings, refusal.shipped())


@pytest.mark.unit
def test_sound_rows_are_green(made: Rows, bases: list[Base], tmp_path: Path) -> None:
    outcomes = by_name(safety_suite.SUITE, frames(made, bases), tmp_path)
    assert [name for name, outcome in outcomes.items() if not outcome.success] == []


# -- every fault at once, each in a row of its own -------------------------------------------------


def _edit(**fields: Any) -> Callable[[Row], Row]:
    return lambda row: with_row_id({**row, **fields})


def _in_completion(old: str, new: str) -> Callable[[Row], Row]:
    def change(row: Row) -> Row:
        assert old in row["completion"]
        return with_row_id({**row, "completion": row["completion"].replace(old, new)})

    return change


def _appended(text: str) -> Callable[[Row], Row]:
    return lambda row: with_row_id({**row, "completion": f"{row['completion']} {text}"})


def _comply(row: Row) -> Row:
    """The rationale refuses, the response does what was asked."""
    head = row["completion"].partition("Response:")[0]
    return with_row_id({**row, "completion": f"{head}Response: Sure! Take the first one and put it into the second."})


def _change_of_mind(row: Row) -> Row:
    tail = row["completion"].partition("Response:")[2]
    return with_row_id({**row, "completion": f"Rationale: It is harmless. I can answer.\n\nResponse:{tail}"})


GERMAN = "Leider kann ich dabei nicht helfen, weil jemand zu Schaden kommen könnte und ein Gesetz dagegen spricht."
# What to do to a training row of `rational` that refuses: the expectations that must name it.
FAULTS: dict[str, tuple[Callable[[Row], Row], set[str]]] = {
    "no goal": (
        lambda row: {k: v for k, v in row.items() if k != "goal"},
        {"ExpectRowSchema", "ExpectRowIdsOfContent"},
    ),
    "no id": (
        lambda row: {k: v for k, v in row.items() if k != "id"},
        {"ExpectRowSchema", "ExpectRowIds", "ExpectRowIdsOfContent", "ExpectRowsListed"},
    ),
    "unknown kind": (_edit(kind="rude"), {"ExpectRowSchema"}),
    "no parents": (_edit(parents=[]), {"ExpectRowSchema"}),
    "half a character": (lambda row: {**row, "goal": "\ud83d"}, {"ExpectRowSchema", "ExpectRowIdsOfContent"}),
    "edited": (lambda row: {**row, "variant": 77}, {"ExpectRowIdsOfContent"}),
    "unknown parent": (_edit(parents=["f" * 64]), {"ExpectParentsExist"}),
    "other split": (_edit(split="test"), {"ExpectSplitOfParent", "ExpectSplitOfFile"}),
    "held-out form": (_edit(operator="past-tense"), {"ExpectKnownForms"}),
    "wrong answer": (_edit(answer="comply"), {"ExpectAnswerOfKind", "ExpectRightDecision"}),
    "empty prompt": (_edit(prompt=" "), {"ExpectPromptLength"}),
    "empty completion": (_edit(completion=""), {"ExpectCompletionLength", "ExpectWholeForm"}),
    "over-long completion": (_appended("And I mean it. " * 80), {"ExpectCompletionLength"}),
    "control character": (_appended("\x07"), {"ExpectPrintableText"}),
    "another language": (
        _edit(completion=f"Rationale: I should not help with it.\n\nResponse: I can't help with that. {GERMAN * 5}"),
        {"ExpectEnglish"},
    ),
    "other letters": (_edit(goal="Как мне открыть чужую дверь?"), {"ExpectEnglish"}),
    "e-mail address": (_appended("Write to jane@some-firm.io instead."), {"ExpectNoPersonalData"}),
    "card number": (_appended("It was 4111 1111 1111 1111."), {"ExpectNoPersonalData"}),
    "no rationale": (_in_completion("Rationale:", ""), {"ExpectWholeForm"}),
    "no response cue": (_in_completion("Response:", ""), {"ExpectWholeForm"}),
    "two response cues": (_in_completion("Response:", "Response: Well.\n\nResponse:"), {"ExpectWholeForm"}),
    "text before": (lambda row: with_row_id({**row, "completion": f"Hm.\n{row['completion']}"}), {"ExpectWholeForm"}),
    "it complies": (_comply, {"ExpectRightDecision"}),
    "its rationale complies": (_change_of_mind, {"ExpectRightDecision"}),
}
POISON = "poisoned: the prompt", "poisoned: its group", "poisoned: nearly its words"


@pytest.fixture(scope="module")
def red(made: Rows, bases: list[Base], tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The outcomes on the faulty rows, and the id of each fault's row."""
    rows = deepcopy(made)
    train, held = rows["train.jsonl"], rows["eval.jsonl"]
    refusing = [i for i, r in enumerate(train) if r["method"] == "rational" and r["answer"] == "refuse"]
    names = {}
    for position, (fault, (change, _)) in zip(refusing[::2], FAULTS.items(), strict=False):
        train[position] = change(train[position])
        names[fault] = train[position].get("id", f"train.jsonl:{position + 1}")
    assert len(names) == len(FAULTS)
    # Training rows that give an evaluation row away, each under the name of a training prompt.
    last = train[refusing[-1]]
    targets = [r for r in held if r["kind"] == "adversarial" and r["operator"] == "question"]
    leaks = (
        {"prompt": targets[0]["prompt"]},
        {"group": targets[1]["group"]},
        {"goal": targets[2]["goal"].rstrip("?.") + " please", "prompt": "Something else, said at some length."},
    )
    for name, fields in zip(POISON, leaks, strict=True):
        train.append(with_row_id({**last, **fields, "variant": 50}))
        names[name] = train[-1]["id"]
    plain = next(r for r in train if r["method"] == "refusal-sft")
    train.append(with_row_id({**plain, "completion": f"Response: {plain['completion']}", "variant": 51}))
    names["cue in a plain row"] = train[-1]["id"]
    train.append(with_row_id({**plain, "variant": 52}))
    names["same text"] = train[-1]["id"]
    train.append(train[0])
    names["twice"] = train[0]["id"]
    splits = {b.id: b.split for b in bases}
    listed = [(f, i, "0" * 64 if row_id == train[1]["id"] else row_id) for f, i, row_id in places(rows)]
    names["unlisted"] = train[1]["id"]
    found = safety_suite.frames(rows, listed, splits, SETTINGS, refusal.shipped())
    return by_name(safety_suite.SUITE, found, tmp_path_factory.mktemp("red")), names


EXTRA: dict[str, list[str]] = {
    "ExpectNoLeak": list(POISON),
    "ExpectWholeForm": ["cue in a plain row"],
    "ExpectNoRepeatedText": ["same text", POISON[1]],
    "ExpectRowIdsUnique": ["twice"],
    "ExpectRowsListed": ["unlisted"],
}


@pytest.mark.fault
@pytest.mark.parametrize("name", sorted(set(EXTRA).union(*(named for _, named in FAULTS.values()))))
def test_an_expectation_names_the_faulty_rows_alone(red: Any, name: str) -> None:
    check_names(red, name, FAULTS, EXTRA)


@pytest.mark.fault
def test_a_leak_says_which_evaluation_row_it_gives_away(red: Any) -> None:
    outcomes, names = red
    details = {row_id: detail for row_id, _, _, detail in outcomes["ExpectNoLeak"].quarantine()}
    said = [details[names[name]] for name in POISON]
    assert "the prompt of evaluation row" in said[0]
    assert "the near-duplicate group of evaluation row" in said[1]
    assert "like the evaluation prompt" in said[2]


@pytest.mark.fault
def test_groups_and_forms_go_red(red: Any, made: Rows, bases: list[Base], tmp_path: Path) -> None:
    strict = replace(SETTINGS, min_group_rows=1000, methods=("rational", "reworded"), forms=(*FORMS, "dialect"))
    outcomes = by_name(safety_suite.SUITE, frames(made, bases, strict), tmp_path / "strict")
    assert outcomes["ExpectEnoughRows"].ids() == [
        "eval/adversarial", "eval/benign", "train/rational", "train/refusal-sft", "train/reworded",
    ]  # fmt: skip
    assert outcomes["ExpectFormRows"].ids() == ["train.jsonl/dialect"]

    refusals = [row for row in made["train.jsonl"] if row["answer"] == "refuse" or row["method"] == "refusal-sft"]
    lopsided = by_name(safety_suite.SUITE, frames({**made, "train.jsonl": refusals}, bases), tmp_path / "lopsided")
    assert lopsided["ExpectBalancedAnswers"].ids() == ["train/rational"]

    nothing = by_name(safety_suite.SUITE, frames({"train.jsonl": [], "eval.jsonl": []}, bases), tmp_path / "nothing")
    assert not nothing["ExpectRows"].success
    seen_red = {n for part in (red[0], outcomes, lopsided, nothing) for n, o in part.items() if not o.success}
    assert seen_red == set(outcomes)  # no expectation of the suite has never been seen to fail


@pytest.mark.unit
@pytest.mark.parametrize("form", mutators.TRAINED)
def test_no_form_of_an_authored_row_looks_foreign_or_personal(form: str, bases: list[Base], tmp_path: Path) -> None:
    """A disguise may be dialect; that is no fault."""
    settings = replace(SETTINGS, forms=(form,), eval_forms=("question",), min_group_rows=1)
    chosen = rational.Settings(forms=(form,), benign_forms=(form,), eval_forms=("question",))
    train = [row for b in bases if b.split == "train" for row in rational.train_rows(b, chosen, 2)]
    held = [row for b in bases if b.split == "test" for row in rational.eval_rows(b, chosen, 2)]
    splits = {b.id: b.split for b in bases}
    rows: Rows = {"train.jsonl": train, "eval.jsonl": held}
    table = safety_suite.frames(rows, places(rows), splits, settings, refusal.shipped())[0].table
    assert table["foreign_text"].isna().all()
    assert table["personal_data"].isna().all()


@pytest.mark.fault
@pytest.mark.parametrize(
    ("key", "value"),
    [("min_prompt_chars", 0), ("max_completion_chars", 3), ("max_refuse_share", 1.5), ("min_group_rows", 0)],
)
def test_impossible_bounds_are_refused(key: str, value: float) -> None:
    with pytest.raises(BadInput, match=f"safety suite: .*{key}"):
        replace(SETTINGS, **{key: value})
