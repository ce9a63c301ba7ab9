import csv
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import yaml

from springhead.errors import BadInput
from springhead.jsonio import read_json, write_json, write_jsonl
from springhead.lineage.digests import file_digest
from springhead.llm import answers, score, tune
from springhead.llm.generation import Answer, Decoding
from springhead.llm.rouge import rouge
from tests.llm.tiny import ROWS, save_tiny

pytestmark = pytest.mark.unit
ASKED: list[dict[str, Any]] = [
    {"id": "a", "prompt": "x", "answer": 5, "references": ["Ana has five figs. Answer: 5"]},
    {"id": "b", "prompt": "y", "answer": "7"},
    {"id": "c", "prompt": "z", "references": ["a b", "c d"]},
]
SAID = {"a": ("So. Answer: 5.", "Answer: 6"), "b": ("7", "Answer: 7"), "c": ("a b", "nothing")}


def answered(folder: Path, rows: list[dict[str, Any]] = ASKED) -> score.Settings:
    """Two answers to each row, out of a table."""

    def engine(conversations: Any, keys: Any) -> list[Answer]:
        pairs = [key.split("/") for key in keys]
        return [Answer([1], SAID[name][int(sample)], "end") for name, sample in pairs]

    write_jsonl(folder / "rows.jsonl", rows)
    how = Decoding(temperature=1.0)
    answers.write_answers(rows, engine, "d1", "t1", how, folder / "answers", samples=2)
    return score.Settings(str(folder / "answers"), str(folder / "rows.jsonl"), str(folder / "scores"))


def test_figures_are_means_over_the_rows_that_have_them(tmp_path: Path) -> None:
    summary = score.score(answered(tmp_path))
    assert summary == read_json(tmp_path / "scores/summary.json")
    assert (summary["model"], summary["answers"], summary["samples"], summary["cut"]) == ("d1", 6, 2, 0.0)
    exact = summary["scores"]["exact_match"]
    assert (exact["mean"], exact["rows"]) == (0.5, 2)  # one of two answers to each of a and b
    assert exact["low"] <= 0.5 <= exact["high"]
    first = [rouge(ASKED[0]["references"], text)["rougeL"] for text in SAID["a"]]
    assert summary["scores"]["rougeL"]["mean"] == pytest.approx((sum(first) / 2 + 0.5) / 2)
    lines = list(csv.DictReader((tmp_path / "scores/rows.csv").open()))
    assert [(line["row"], line["sample"]) for line in lines] == [(n, k) for n in "abc" for k in "01"]
    assert [line["exact_match"] for line in lines] == ["1", "0", "0", "1", "", ""]


@pytest.mark.fault
def test_other_rows_and_unfinished_or_nameless_answers_are_refused(tmp_path: Path, capsys) -> None:
    settings = answered(tmp_path)
    write_jsonl(tmp_path / "rows.jsonl", [{**row, "prompt": "other"} for row in ASKED])
    with pytest.raises(BadInput, match=r"rows\.jsonl: not the rows that"):
        score.score(settings)
    write_jsonl(tmp_path / "rows.jsonl", [*ASKED[:2], {"id": "c", "prompt": "z"}])
    with pytest.raises(BadInput, match="row c: needs 'references' or 'answer'"):
        score.score(settings)
    write_jsonl(tmp_path / "rows.jsonl", ASKED)
    (tmp_path / "answers/answers.jsonl").unlink()
    with pytest.raises(BadInput, match="not complete"):
        score.score(settings)
    (tmp_path / "s.yaml").write_text(yaml.safe_dump({"answers": "a", "rows": "r", "out": "o", "gap_rows": 3}))
    assert score.main([str(tmp_path / "s.yaml")]) == 2
    assert "needs both model and gap_rows" in capsys.readouterr().err


def test_a_model_is_answered_and_scored_by_command_with_its_gap(tmp_path: Path, capsys) -> None:
    model = save_tiny(tmp_path / "tiny", spread=0.6)
    rows = [{"prompt": row["prompt"], "references": [row["completion"]]} for row in ROWS]
    write_jsonl(tmp_path / "rows.jsonl", rows)
    asked = {"model": str(model), "rows": str(tmp_path / "rows.jsonl"), "out": str(tmp_path / "answers")}
    settings = {**asked, "decoding": {"max_new_tokens": 9}, "device": "cpu"}
    (tmp_path / "answers.yaml").write_text(yaml.safe_dump(settings))
    assert answers.main([str(tmp_path / "answers.yaml")]) == 0
    scored = {"answers": asked["out"], "rows": asked["rows"], "out": str(tmp_path / "scores"), "device": "cpu"}
    scored |= {"model": str(model), "gap_rows": 2}
    (tmp_path / "score.yaml").write_text(yaml.safe_dump(scored))
    assert score.main([str(tmp_path / "score.yaml")]) == 0
    assert "rougeL 0." in capsys.readouterr().out
    summary = read_json(tmp_path / "scores/summary.json")
    assert summary["free_running"]["rows"] == 2
    assert summary["cut"] == 1.0
    assert (summary["device"], summary["dtype"]) == ("cpu", "float32")
    run = read_json(tmp_path / "answers/run.json")
    for change, message in (
        ({"device": "cuda", "dtype": "bfloat16"}, "was answered in bfloat16 on cuda; set device to cuda"),
        ({"template": "t2"}, "was answered with another; set chat_template to the one in the answers' settings"),
    ):
        write_json(tmp_path / "answers/run.json", run | change)
        assert score.main([str(tmp_path / "score.yaml")]) == 2
        assert message in capsys.readouterr().err
    write_json(tmp_path / "answers/run.json", run)
    write_jsonl(tmp_path / "rows.jsonl", [rows[0], {**rows[1], "references": ["Ana has 3 figs. " * 200]}, *rows[2:]])
    assert score.main([str(tmp_path / "score.yaml")]) == 2
    said = capsys.readouterr().err
    assert "row rows.jsonl:2: " in said
    assert "the model's context is 512; shorten the reference, or lower gap_rows" in said
    write_jsonl(tmp_path / "rows.jsonl", rows)
    other = save_tiny(tmp_path / "other", spread=0.5)
    (tmp_path / "score.yaml").write_text(yaml.safe_dump({**scored, "model": str(other)}))
    assert score.main([str(tmp_path / "score.yaml")]) == 2
    assert "not the model of" in capsys.readouterr().err


def turn(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


TALK = [turn("user", "Hi"), turn("assistant", "Yes?"), turn("user", "How many?")]


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"messages": TALK, "references": ["Five.", "5"]}, [*TALK, turn("assistant", "Five.")]),
        ({"messages": [*TALK, turn("assistant", "Six.")], "references": ["5"]}, [*TALK, turn("assistant", "Six.")]),
        ({"prompt": TALK, "references": ["Five."]}, [*TALK, turn("assistant", "Five.")]),
        ({"prompt": [*TALK, turn("assistant", "Six.")], "references": ["5"]}, [*TALK, turn("assistant", "Six.")]),
        ({"prompt": TALK, "completion": [turn("assistant", "Six.")]}, [*TALK, turn("assistant", "Six.")]),
        (
            {"prompt": "How?", "completion": "So.", "references": ["5"]},
            [turn("user", "How?"), turn("assistant", "So.")],
        ),
        ({"prompt": "How?", "references": ["5"]}, [turn("user", "How?"), turn("assistant", "5")]),
    ],
)
def test_the_gap_compares_with_the_answer_to_what_was_asked(row: dict[str, Any], expected: list[Any]) -> None:
    assert score.with_reference({"id": "a", **row}) == {"id": "a", "messages": expected}


@pytest.mark.fault
@pytest.mark.parametrize(
    "row",
    [
        {"messages": TALK},
        {"messages": TALK, "references": []},
        {"prompt": TALK, "answer": "5"},
        {"prompt": TALK, "completion": TALK},
        {"prompt": "How?"},
    ],
)
def test_a_row_without_an_answer_has_no_gap(row: dict[str, Any]) -> None:
    with pytest.raises(BadInput, match="row a: the free-running gap needs an answer to compare with; give it"):
        score.with_reference({"id": "a", **row})


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"answer": "7", "references": None}, {"exact_match"}),
        ({"answer": None, "references": ["Answer: 7"]}, {"rouge1", "rouge2", "rougeL"}),
    ],
)
def test_a_null_is_no_answer_and_no_reference(row: dict[str, Any], expected: set[str]) -> None:
    assert set(score.figures({"id": "a", **row}, "Answer: 7")) == expected
    with pytest.raises(BadInput, match="row a: needs 'references' or 'answer'"):
        score.figures({"id": "a", "answer": None, "references": None}, "Answer: 7")


def test_scores_name_the_file_that_they_were_made_with(tmp_path: Path) -> None:
    settings = answered(tmp_path)
    before = score.score(settings)["rows"]
    assert before == file_digest(tmp_path / "rows.jsonl")
    write_jsonl(tmp_path / "rows.jsonl", [*ASKED[:2], {**ASKED[2], "references": ["other"]}])
    assert score.score(settings)["rows"] != before  # what was asked is the same, what it is compared with is not


@pytest.mark.fault
@pytest.mark.parametrize(
    ("override", "reason"),
    [
        ("seed=-1", "seed is -1; use at least 0"),
        ("gap_rows=-1", "gap_rows is -1; use at least 0"),
        ("out={folder}/rows.jsonl", "rows.jsonl is no folder that can be written to; choose another"),
    ],
)
def test_an_override_that_cannot_be_used_is_named(tmp_path: Path, capsys, override: str, reason: str) -> None:
    settings = answered(tmp_path)
    (tmp_path / "score.yaml").write_text(yaml.safe_dump(asdict(settings)))
    assert score.main([str(tmp_path / "score.yaml"), override.format(folder=tmp_path)]) == 2
    assert reason in capsys.readouterr().err


@pytest.mark.parametrize(
    ("command", "keys"),
    [
        (answers.main, ["decoding.max_new_tokens: whole number = 128", "chat_template: text"]),
        (score.main, ["gap_rows: whole number = 0", "answers: text (needed)"]),
        (tune.main, ["sft.learning_rate: number (needed)", "Peak learning rate.", "rac.cue: text (needed)"]),
    ],
)
def test_commands_list_their_keys_and_do_not_pass_without_settings(
    command: Callable[[list[str]], int], keys: list[str], capsys
) -> None:
    with pytest.raises(SystemExit, match="2"):
        command([])
    assert "the following arguments are required: settings" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="0"):
        command(["--help"])
    said = capsys.readouterr().out
    assert [key for key in keys if key not in said] == []
