"""ProntoQA and GSM8K as problems whose sentences may be re-ordered; the public files are used where they are."""

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from springhead.errors import BadInput
from springhead.llm import families, gsm8k, mend, prontoqa
from springhead.llm.families import READERS, reader
from springhead.llm.problems import Problem
from springhead.llm.textfilters import answer
from springhead.sources import SourceError, obtain
from stages.llm.problems import Params, Public, add_public

pytestmark = pytest.mark.unit


MIRROR = Path(__file__).parents[3] / "shared/data"


@pytest.fixture(scope="module", autouse=True)
def public() -> Iterator[None]:
    """Public sets are taken from the folder beside the checkout, where it is."""
    with pytest.MonkeyPatch.context() as patch:
        if MIRROR.is_dir():
            patch.setenv("SPRINGHEAD_SOURCES", str(MIRROR))
        yield


def present(*names: str) -> None:
    try:
        for name in names:
            obtain(name)
    except BadInput as error:
        pytest.skip(f"needs public data: {error}")


@pytest.fixture(scope="module")
def proofs() -> list[Problem]:
    present("prontoqa-dev")
    return prontoqa.problems("prontoqa")


@pytest.fixture(scope="module")
def stories() -> list[Problem]:
    present("gsm8k-test", "gsm8k-train")
    return gsm8k.problems("test", "gsm8k")


@pytest.mark.parametrize(
    ("sentence", "expected"),
    [
        ("Each wumpus is a dumpus.", "Every wumpus is a dumpus."),
        ("Every yumpus is an impus.", "Every yumpus is a impus."),
        ("Each tumpus is not sour.", "Every tumpus is not sour."),
        ("Jompuses are rompuses.", "Every jompus is a rompus."),
        ("Jompuses are not shy.", "Every jompus is not shy."),
        ("Max is an impus.", "Max is a impus."),
        ("Max is not shy", "Max is not shy"),
    ],
)
def test_prontoqa_sentences_in_the_words_of_the_prover(sentence: str, expected: str) -> None:
    assert prontoqa.normal(sentence) == expected


def test_a_small_proof_by_hand() -> None:
    facts = ["Wumpuses are not red.", "Max is a yumpus.", "Each yumpus is an impus.", "Every impus is a wumpus."]
    question = "True or false: Max is red?"
    assert prontoqa.solve(facts, question) == "False"
    assert prontoqa.needed_statements(facts, question) == [facts[1], facts[2], facts[3], facts[0]]
    assert prontoqa.chain_error(facts, question, ["Max is an impus", "Max is a wumpus", "Max is not red"]) is not None
    good = ["Max is a yumpus", "Max is an impus", "Max is a wumpus", "Max is not red"]
    assert prontoqa.chain_error(facts, question, good) is None
    assert prontoqa.signature(facts, question) == prontoqa.signature(facts[::-1], "True or false: Max is not red?")
    with pytest.raises(BadInput, match="none of ProntoQA's sentence forms"):
        prontoqa.solve(["Some wumpuses are red."], question)


def test_every_published_proof_is_proved_again(proofs: list[Problem]) -> None:
    assert len(proofs) == 500
    rng = np.random.default_rng(0)
    for problem in proofs:
        texts = [*problem.statements, *problem.redundant]
        shuffled = [texts[i] for i in rng.permutation(len(texts))]
        assert prontoqa.solve(shuffled, problem.question) == problem.answer
        assert prontoqa.chain_error(shuffled, problem.question, problem.chain) is None
        assert len(problem.statements) == 6
        assert problem.redundant


def test_calculations_with_whole_numbers_only() -> None:
    assert gsm8k.value("3*(4+2)-10/5") == 16
    for wrong in ("7/2", "2**8", "1.5*2", "x+1", "__import__('os')", "4/0", "-3"):
        with pytest.raises(BadInput):
            gsm8k.value(wrong)


def test_a_chain_of_equations_is_checked() -> None:
    facts = ["Ana has three figs.", "Ben has twice as many figs as Ana."]
    question = "How many figs do they have?"
    assert gsm8k.chain_error(facts, question, ["3*2 = 6", "3+6 = 9"]) is None
    assert "should give 6" in str(gsm8k.chain_error(facts, question, ["3*2 = 7"]))
    assert "uses 5" in str(gsm8k.chain_error(facts, question, ["3+5 = 8"]))
    assert gsm8k.chain_error(facts, question, []) == "there is no step"


def test_stories_that_may_be_told_in_any_order(stories: list[Problem]) -> None:
    assert 30 < len(stories) < 60
    left_out: Counter[str] = Counter()
    assert [p.id for p in gsm8k.problems("test", "gsm8k", left_out=left_out)] == [p.id for p in stories]
    assert sum(left_out.values()) + len(stories) == 1319
    for problem in stories:
        assert len(problem.statements) >= 2
        assert gsm8k.solve(problem.statements[::-1], problem.question) == problem.answer
        for text in problem.statements:
            assert not {"he", "she", "they", "it", "then", "the"} & {*text.lower().strip(".").split()}
    with pytest.raises(BadInput, match="no problem of GSM8K has exactly"):
        gsm8k.solve(stories[0].statements[1:], stories[0].question)


def test_rows_of_both_pass_the_answer_filter_and_wrong_ones_do_not(
    proofs: list[Problem], stories: list[Problem]
) -> None:
    rows = [row for p in (*proofs[:20], *stories[:20]) for row in mend.eval_rows(p, 1, 1 if p.redundant else 0, 0)]
    assert all(decision.kept for decision in answer(rows))
    wrong = [{**row, "answer": "True" if row["answer"] == "False" else "False"} for row in rows[:4]]
    assert not any(decision.kept for decision in answer(wrong))


def test_only_the_parts_of_gsm8k_in_use_are_needed(
    stories: list[Problem], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "gsm8k").mkdir()
    (tmp_path / "gsm8k/test.jsonl").write_bytes(obtain("gsm8k-test").read_bytes())
    monkeypatch.setenv("SPRINGHEAD_SOURCES", str(tmp_path))
    monkeypatch.setenv("SPRINGHEAD_HOME", str(tmp_path / "home"))
    origins = [(p.family, p.parents) for p in stories]
    rows = [row for p in stories[:5] for row in mend.eval_rows(p, 1, 0, 0)]
    gsm8k._published.cache_clear()
    try:
        families.obtain_sources(origins)
        assert all(decision.kept for decision in answer(rows))
        assert not answer([{**rows[0], "prompt": rows[0]["prompt"].replace("?", " now?")}])[0].kept
        with pytest.raises(SourceError, match=r"source 'gsm8k-train' is missing"):
            families.obtain_sources([*origins, (gsm8k.FAMILY, ("gsm8k-train/7",))])
        # Without any part at hand an answer cannot be looked up, which makes it no wrong one.
        (tmp_path / "gsm8k/test.jsonl").unlink()
        gsm8k._published.cache_clear()
        with pytest.raises(SourceError, match=r"source 'gsm8k-train' is missing"):
            answer(rows)
        with pytest.raises(SourceError, match=r"source 'gsm8k-test' is missing"):
            families.obtain_sources(origins)
    finally:
        gsm8k._published.cache_clear()


def test_families_without_a_look_up_need_no_file(proofs: list[Problem], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPRINGHEAD_SOURCES", "/nowhere")
    families.obtain_sources([("dag", ()), (prontoqa.FAMILY, proofs[0].parents)])


def test_public_problems_join_their_splits_once(proofs: list[Problem]) -> None:
    drawn: dict[str, list[Problem]] = {"train": proofs[:3]}
    public = {"prontoqa": Public("proofs", 5)}
    add_public(drawn, _params(public), None)  # type: ignore[arg-type]
    assert [p.id for p in drawn["proofs"]] == [p.id for p in prontoqa.problems("proofs")[3:8]]


def _params(public: dict[str, Public]) -> Params:
    fixed = {"splits": {}, "vocabularies": (), "operators": (), "holders": 0, "items": 1, "max_value": 9}
    more = {"max_constant": 9, "max_step": 2, "max_factor": 2, "redundant": 0, "redundant_linked": 0.0, "holdout": 0.2}
    return Params(**fixed, **more, public=public)  # type: ignore[arg-type]


def test_unknown_sets_and_families_are_named() -> None:
    with pytest.raises(BadInput, match=r"unknown set 'gsm9k'; known: prontoqa, gsm8k-train, gsm8k-test"):
        _params({"gsm9k": Public("x")})
    with pytest.raises(BadInput, match="use 0 for all"):
        _params({"prontoqa": Public("x", -1)})
    with pytest.raises(BadInput, match="unknown family 'poem'"):
        reader("poem")
    assert {*READERS} == {"dag", "logic", "prontoqa", "gsm8k"}
