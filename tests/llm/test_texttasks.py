import hashlib
from pathlib import Path

import pytest
import yaml

from springhead.errors import BadInput
from springhead.jsonio import read_jsonl, write_jsonl
from springhead.llm import texttasks
from springhead.llm.rouge import rouge, rouge_l, rouge_n

pytestmark = pytest.mark.unit
ROOT = Path(__file__).parents[2]
MIRROR = ROOT.parent / "shared" / "data"
shared = pytest.mark.skipif(not MIRROR.is_dir(), reason="the folder of public data is not beside the checkout")

# Made with the package rouge-score 0.1.2, use_stemmer=False, score_multi.
PACKAGE = [
    (
        ["The Punter is a kid-friendly pub near Café Rouge."],
        "The Punter, near Cafe Rouge, is a pub. It is kid friendly.",
        (0.8181818181818182, 0.3, 0.5454545454545454),
    ),
    (
        [
            "Alimentum is in the city centre.",
            "In the city centre there is a venue name Alimentum, this is not a family-friendly venue.",
        ],
        "There is a place in the city centre, Alimentum, that is not family-friendly.",
        (0.7741935483870968, 0.4827586206896552, 0.5806451612903226),
    ),
    (["a b a b c"], "b a b a", (0.888888888888889, 0.5714285714285715, 0.6666666666666665)),
    (["x"], "y", (0.0, 0.0, 0.0)),
    (["x y"], "", (0.0, 0.0, 0.0)),
]


@pytest.mark.parametrize(("references", "given", "expected"), PACKAGE)
def test_rouge_is_that_of_the_package(references, given, expected):
    assert list(rouge(references, given).values()) == pytest.approx(expected)


def test_rouge_by_hand():
    # Common words: the, cat (1 of 3 given "the"): precision 2/2, recall 2/3.
    assert rouge_n(["the", "cat", "sat"], ["the", "cat"], 1) == pytest.approx(0.8)
    assert rouge_n(["the", "cat", "sat"], ["the", "cat"], 2) == pytest.approx(2 / 3)
    # The longest common subsequence of a b c d and a c b d has three words.
    assert rouge_l(["a", "b", "c", "d"], ["a", "c", "b", "d"]) == pytest.approx(0.75)


def catalogue(root: Path, files: dict[str, tuple[str, str]]) -> None:
    """A catalogue of sources with these files (path and text by name), and the files in the state folder."""
    entries = {}
    for name, (path, content) in files.items():
        place = root / ".springhead/sources" / path
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_text(content, encoding="utf-8")
        sha = hashlib.sha256(content.encode()).hexdigest()
        entries[name] = {"path": path, "repository": "x", "commit": "y", "licence": "MIT", "sha256": sha}
    (root / "data").mkdir(exist_ok=True)
    (root / "data/sources.yaml").write_text(yaml.safe_dump({"packages": {}, "files": entries}))


def test_references_of_one_meaning_are_a_group(tmp_path: Path):
    table = 'mr,ref\n"name[A], area[b]",A is in b.\nname[C],C it is.\n"name[A], area[b]",In b is A.\n'
    catalogue(tmp_path, {"e2e-devset": ("e2e/devset.csv", table)})
    groups = texttasks.e2e_groups(tmp_path)
    assert [group["references"] for group in groups] == [["A is in b.", "In b is A."], ["C it is."]]
    assert [group["completion"] for group in groups] == ["A is in b.", "C it is."]
    # Prompts are skipped and taken, not references: what is trained on is not what is asked.
    pairs = texttasks.task_rows("e2e-pairs", take=1, root=tmp_path)
    assert [row["prompt"] for row in pairs] == ["name[A], area[b]"] * 2
    assert texttasks.task_rows("e2e", skip=1, root=tmp_path) == groups[1:]
    rows = texttasks.e2e_rows(groups)
    assert [(row["prompt"], row["completion"]) for row in rows] == [
        ("name[A], area[b]", "A is in b."),
        ("name[A], area[b]", "In b is A."),
        ("name[C]", "C it is."),
    ]
    assert [row["parents"] for row in rows] == [[groups[0]["id"]], [groups[0]["id"]], [groups[1]["id"]]]
    assert len({row["id"] for row in rows}) == 3


def test_gsm8k_solutions_lose_their_notes_and_end_in_the_answer(tmp_path: Path):
    good = '{"question": "How many?", "answer": "She has 48/2 = <<48/2=24>>24.\\n#### 1,024"}\n'
    catalogue(
        tmp_path, {"gsm8k-train": ("gsm8k/train.jsonl", good), "gsm8k-test": ("gsm8k/test.jsonl", good[:-12] + '"}')}
    )
    (row,) = texttasks.gsm8k_rows("train", tmp_path)
    assert row["completion"] == "She has 48/2 = 24.\nAnswer: 1024"
    assert row["answer"] == "1024"
    with pytest.raises(BadInput, match="gsm8k test: row 0 has no final answer"):
        texttasks.gsm8k_rows("test", tmp_path)


def test_documents_and_dialogues_become_rows(tmp_path: Path, capsys):
    news = [{"text": " It rained. ", "gist": "Rain."}, {"text": "Sun.", "gist": ["A", "B"]}]
    write_jsonl(tmp_path / "news.jsonl", news)
    rows = texttasks.summary_rows(tmp_path / "news.jsonl", "text", "gist", "In one word:")
    assert rows[0] == {
        "id": "news.jsonl:1", "prompt": "In one word:\n\nIt rained.", "completion": "Rain.", "references": ["Rain."],
    }  # fmt: skip
    assert rows[1]["references"] == ["A", "B"]
    talk = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes?"}]
    write_jsonl(tmp_path / "talks.jsonl", [{"id": "t", "messages": talk}])
    out = tmp_path / "rows.jsonl"
    assert texttasks.main(["dialogue", str(out), "--source", str(tmp_path / "talks.jsonl")]) == 0
    assert list(read_jsonl(out)) == [{"id": "t", "messages": talk, "references": ["Yes?"]}]
    assert texttasks.main(["dialogue", str(out), "--source", str(tmp_path / "talks.jsonl"), "--skip", "1"]) == 2
    assert texttasks.main(["summaries", str(out)]) == 2
    assert "no rows left" in (said := capsys.readouterr().err)
    assert "--source is for summaries and dialogue" in said


@pytest.mark.fault
def test_a_line_that_is_no_task_is_named(tmp_path: Path):
    path = tmp_path / "rows.jsonl"
    for line, reason in (({"summary": "x"}, "'document' must"), ({"document": "x", "summary": [""]}, "'summary' must")):
        write_jsonl(path, [line])
        with pytest.raises(BadInput, match=rf"rows\.jsonl:1: {reason}"):
            texttasks.summary_rows(path)
    for messages in ([{"role": "user", "content": "Hi"}], [{"role": "assistant", "content": "Yes?"}]):
        write_jsonl(path, [{"messages": messages}])
        with pytest.raises(BadInput, match=r"rows\.jsonl:1: must end with an answer"):
            texttasks.dialogue_rows(path)
    write_jsonl(path, [{"messages": [{"role": "bot", "content": "x"}]}])
    with pytest.raises(BadInput, match=r"rows\.jsonl:1: .*has the role 'bot'"):
        texttasks.dialogue_rows(path)


@shared
def test_the_public_tasks_by_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("SPRINGHEAD_SOURCES", str(MIRROR))
    monkeypatch.chdir(ROOT)
    assert texttasks.main(["e2e", str(tmp_path / "e2e.jsonl"), "--skip", "540"]) == 0
    assert len(list(read_jsonl(tmp_path / "e2e.jsonl"))) == 7
    assert texttasks.main(["gsm8k-test", str(tmp_path / "gsm8k.jsonl"), "--take", "3"]) == 0
    assert all(row["answer"] and row["prompt"] for row in read_jsonl(tmp_path / "gsm8k.jsonl"))


@pytest.mark.fault
@pytest.mark.parametrize("out", [".", "talks.jsonl/rows.jsonl"])
def test_an_output_that_is_no_file_is_named(tmp_path: Path, capsys, out: str):
    talk = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes?"}]
    write_jsonl(tmp_path / "talks.jsonl", [{"messages": talk}])
    assert texttasks.main(["dialogue", str(tmp_path / out), "--source", str(tmp_path / "talks.jsonl")]) == 2
    assert f"{tmp_path / out}: cannot be written (" in capsys.readouterr().err
