import json
from pathlib import Path

import pytest
import yaml

from springhead.errors import BadInput
from springhead.jsonio import write_jsonl
from springhead.lineage.digests import tree_digest
from springhead.llm import answers, students, vllm_engine
from springhead.llm.answers import read_answers, torch_engine, write_answers
from springhead.llm.generation import Answer, Decoding
from springhead.params import load
from tests.llm.tiny import ROWS, save_tiny

pytestmark = pytest.mark.unit
ASKED = [{"id": row["id"], "prompt": row["prompt"]} for row in ROWS]
SAMPLED = Decoding(max_new_tokens=10, temperature=1.0, seed=3)


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("model") / "tiny", spread=0.6)


@pytest.fixture(scope="module")
def engine(model: Path) -> answers.Engine:
    return torch_engine(model, SAMPLED, "cpu")


def test_every_answer_names_its_row_its_model_and_how_it_was_decoded(model: Path, engine, tmp_path: Path) -> None:
    path = write_answers(ASKED, engine, "d1", "t1", SAMPLED, tmp_path / "out", samples=2, shard_rows=3)
    lines = list(read_answers(path))
    assert [(line["parents"], line["sample"]) for line in lines] == [([r["id"]], k) for r in ASKED for k in (0, 1)]
    assert {(line["model"], line["template"]) for line in lines} == {("d1", "t1")}
    assert lines[0]["decoding"] == {
        "max_new_tokens": 10, "temperature": 1.0, "top_p": 1.0, "top_k": 0, "seed": 3, "stop": [],
    }  # fmt: skip
    assert {line["finish"] for line in lines} <= {"end", "length"}
    assert all(lines[2 * k]["text"] != lines[2 * k + 1]["text"] for k in range(4))
    assert len({line["id"] for line in lines}) == 8


def test_the_text_of_a_row_depends_on_nothing_but_its_request(engine, tmp_path: Path) -> None:
    def texts(rows, folder: str, shard_rows: int) -> dict[str, str]:
        path = write_answers(rows, engine, "d1", "t1", SAMPLED, tmp_path / folder, shard_rows=shard_rows)
        return {line["parents"][0]: line["text"] for line in read_answers(path)}

    whole = texts(ASKED, "a", 4)
    assert texts(ASKED, "b", 1) == whole
    assert texts(ASKED[::-1], "c", 3) == whole
    assert texts(ASKED[2:3], "d", 3) == {"c": whole["c"]}


@pytest.mark.fault
def test_a_killed_run_goes_on_after_its_last_whole_shard(engine, tmp_path: Path) -> None:
    calls: list[int] = []

    def counted(conversations, keys):
        calls.append(len(conversations))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return engine(conversations, keys)

    whole = write_answers(ASKED, engine, "d1", "t1", SAMPLED, tmp_path / "whole", shard_rows=1)
    with pytest.raises(KeyboardInterrupt):
        write_answers(ASKED, counted, "d1", "t1", SAMPLED, tmp_path / "cut", shard_rows=1)
    assert sorted(path.name for path in (tmp_path / "cut").iterdir()) == [
        "run.json", "shard-00000.jsonl", "shard-00001.jsonl",
    ]  # fmt: skip
    again = write_answers(ASKED, counted, "d1", "t1", SAMPLED, tmp_path / "cut", shard_rows=1)
    assert calls == [1] * 5  # two, the killed one, and two more
    assert again.read_bytes() == whole.read_bytes()


@pytest.mark.fault
def test_other_requests_and_changed_answers_are_refused(engine, tmp_path: Path) -> None:
    out = tmp_path / "out"
    path = write_answers(ASKED, engine, "d1", "t1", SAMPLED, out)
    for rows, digest, template in ((ASKED[1:], "d1", "t1"), (ASKED, "d2", "t1"), (ASKED, "d1", "t2")):
        with pytest.raises(BadInput, match="holds the answers of another run"):
            write_answers(rows, engine, digest, template, SAMPLED, out)
    lines = path.read_text().splitlines()
    changed = {**json.loads(lines[1]), "text": "I refuse."}
    path.write_text("\n".join([lines[0], json.dumps(changed)]) + "\n")
    with pytest.raises(BadInput, match=r"answers\.jsonl:2: the answer is not the one that was written"):
        list(read_answers(path))
    (tmp_path / "full").mkdir()
    (tmp_path / "full/mine.txt").write_text("x")
    with pytest.raises(BadInput, match=r"is not empty and has no run\.json"):
        write_answers(ASKED, engine, "d1", "t1", SAMPLED, tmp_path / "full")


@pytest.mark.fault
def test_a_run_does_not_go_on_in_another_number_format(engine, tmp_path: Path) -> None:
    on_cpu, on_gpu = {"device": "cpu", "dtype": "float32"}, {"device": "cuda", "dtype": "bfloat16"}
    path = write_answers(ASKED, engine, "d1", "t1", SAMPLED, tmp_path / "out", numerics=on_cpu)
    assert write_answers(ASKED, engine, "d1", "t1", SAMPLED, tmp_path / "out", numerics=on_cpu) == path
    with pytest.raises(BadInput, match="holds the answers of another run"):
        write_answers(ASKED, engine, "d1", "t1", SAMPLED, tmp_path / "out", numerics=on_gpu)


def test_the_torch_back_end_loads_as_the_gap_does(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = []

    def load_to_ask(folder: Path, device: students.Device):
        loaded.append((folder, device))
        return students.load(folder)

    monkeypatch.setattr(students, "load_to_ask", load_to_ask)
    torch_engine(model, SAMPLED, "auto")
    assert loaded == [(model, "auto")]


@pytest.mark.fault
def test_bad_requests_are_named(engine, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="row 5: the id 'a' is that of row 1; ids must be different"):
        write_answers([*ASKED, ASKED[0]], engine, "d", "t1", SAMPLED, tmp_path)
    with pytest.raises(BadInput, match="row 2: its 'id' must be a text that is not empty, found 7"):
        write_answers([ASKED[0], {**ASKED[1], "id": 7}], engine, "d", "t1", SAMPLED, tmp_path)
    with pytest.raises(BadInput, match="rows to answer: no rows; give at least one"):
        write_answers([], engine, "d", "t1", SAMPLED, tmp_path)
    (tmp_path / "rows.jsonl").write_text('{"prompt": "x"}\n{"id": null, "prompt": "y"}\n')
    with pytest.raises(BadInput, match=r"rows\.jsonl: row 2: its 'id' must be a text that is not empty, found None"):
        answers.read_rows(tmp_path / "rows.jsonl")
    with pytest.raises(BadInput, match="at temperature 0 all are the same"):
        write_answers(ASKED, engine, "d", "t1", Decoding(), tmp_path, samples=2)
    with pytest.raises(BadInput, match="row z: needs a 'prompt' or 'messages'"):
        write_answers([{"id": "z", "question": "?"}], engine, "d", "t1", SAMPLED, tmp_path)
    with pytest.raises(BadInput, match="row z: needs a 'prompt' or 'messages'"):
        answers.conversation_of({"id": "z", "messages": [{"role": "assistant", "content": "x"}]})


def test_the_command_answers_a_file(model: Path, tmp_path: Path, capsys) -> None:
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"prompt": row["prompt"]}) + "\n" for row in ROWS))
    settings = {"model": str(model), "rows": str(tmp_path / "rows.jsonl"), "out": str(tmp_path / "out"),
                "decoding": {"max_new_tokens": 5}, "device": "cpu"}  # fmt: skip
    (tmp_path / "answers.yaml").write_text(yaml.safe_dump(settings))
    assert answers.main([str(tmp_path / "answers.yaml")]) == 0
    lines = list(read_answers(Path(capsys.readouterr().out.strip())))
    assert [line["parents"] for line in lines] == [[f"rows.jsonl:{k}"] for k in (1, 2, 3, 4)]
    assert {line["model"] for line in lines} == {tree_digest(model)}
    own = {line["template"] for line in lines}
    run = json.loads((tmp_path / "out/run.json").read_text())
    assert (run["device"], run["dtype"]) == ("cpu", "float32")
    # The same again goes on, another template is another run.
    assert answers.main([str(tmp_path / "answers.yaml")]) == 0
    (tmp_path / "answers.yaml").write_text(yaml.safe_dump({**settings, "chat_template": "plain"}))
    assert answers.main([str(tmp_path / "answers.yaml")]) == 2
    assert "holds the answers of another run" in capsys.readouterr().err
    plain = {**settings, "chat_template": "plain", "out": str(tmp_path / "plain")}
    assert answers.run(load(answers.Settings, plain, "x")).parent == tmp_path / "plain"
    assert {line["template"] for line in read_answers(tmp_path / "plain/answers.jsonl")} != own
    (tmp_path / "answers.yaml").write_text(yaml.safe_dump({**settings, "backend": "llama.cpp"}))
    assert answers.main([str(tmp_path / "answers.yaml")]) == 2
    assert "backend: 'llama.cpp' is not one of 'torch', 'vllm'" in capsys.readouterr().err


@pytest.mark.fault
def test_without_vllm_its_back_end_says_what_to_do(model: Path) -> None:
    with pytest.raises(BadInput, match=r"backend vllm: .*; use backend torch"):
        vllm_engine.VllmEngine(model, SAMPLED)


@pytest.mark.fault
def test_vllm_takes_no_other_template_than_the_models_own() -> None:
    values = {"model": "m", "rows": "r", "out": "o", "decoding": {}, "backend": "vllm", "chat_template": "chatml"}
    with pytest.raises(BadInput, match=r"answers\.yaml: chat_template 'chatml': backend vllm .*; set it to own"):
        load(answers.Settings, values, "answers.yaml")


def test_vllm_is_asked_for_what_the_torch_back_end_does() -> None:
    class Output:
        text, token_ids, finish_reason = " Yes. ", [5, 6, 0], "stop"

    engine = object.__new__(vllm_engine.VllmEngine)
    engine._decoding, engine._ends = Decoding(9, temperature=0.7, top_p=0.9, seed=4, stop=("\n",)), [0, 0, 2]
    asked = engine.sampling("row/0")
    assert asked.pop("seed") != engine.sampling("row/1")["seed"]
    assert asked == {
        "temperature": 0.7, "top_p": 0.9, "top_k": -1, "max_tokens": 9, "stop": ["\n"], "stop_token_ids": [0, 2],
        "skip_special_tokens": True,
    }  # fmt: skip
    assert engine.read(Output) == Answer([5, 6], "Yes.", "end")


@pytest.fixture
def request_file(model: Path, tmp_path: Path) -> Path:
    """Settings that ask rows.jsonl."""
    settings = {"model": str(model), "rows": str(tmp_path / "rows.jsonl"), "out": str(tmp_path / "out"),
                "decoding": {"max_new_tokens": 5}, "device": "cpu"}  # fmt: skip
    (tmp_path / "answers.yaml").write_text(yaml.safe_dump(settings))
    write_jsonl(tmp_path / "rows.jsonl", ASKED)
    return tmp_path / "answers.yaml"


@pytest.fixture
def unloaded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails the test as soon as a model is loaded."""
    monkeypatch.setattr(students, "load_to_ask", lambda *_: pytest.fail("the model was loaded"))


USER = {"role": "user", "content": "Cal has 4 nuts."}


@pytest.mark.fault
@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"messages": ["hi"]}, "rows.jsonl:2: row rows.jsonl:2: message 0 must have role and content, found 'hi'"),
        ({"prompt": ["hi"]}, "rows.jsonl:2: row rows.jsonl:2: message 0 must have role and content, found 'hi'"),
        ({"id": "x", "messages": [{"content": "hi"}]}, "rows.jsonl:2: row x: message 0 must have role and content"),
        ({"id": "x", "messages": [USER, {"role": "user"}]}, "rows.jsonl:2: row x: message 1 must have role and"),
        ({"id": "x", "messages": [{**USER, "role": "banana"}]}, "rows.jsonl:2: row x: message 0 has the role 'banana'"),
        (
            {"id": "x", "messages": [{**USER, "content": []}]},
            "row x: the content of message 0 must be text, found list",
        ),
        ({"id": "x", "question": "?"}, "rows.jsonl:2: row x: needs a 'prompt' or 'messages' to answer"),
        ({"id": "x", "prompt": "Cal has 4 Feigen."}, "row x: words outside the tokenizer's vocabulary: ['Feigen']"),
        ({"id": "x", "prompt": "Ana " * 600}, "row x: 601 tokens leave no room in the model's context of 512 for an"),
    ],
)
def test_a_row_that_cannot_be_answered_is_named_before_the_model_is_loaded(
    request_file: Path, unloaded: None, capsys, row: dict[str, object], reason: str
) -> None:
    write_jsonl(request_file.with_name("rows.jsonl"), [ASKED[0], row])
    assert answers.main([str(request_file)]) == 2
    assert reason in capsys.readouterr().err
    assert not request_file.with_name("out").exists()


@pytest.mark.fault
@pytest.mark.parametrize(
    ("override", "reason"),
    [
        ("decoding.seed=-1", "seed must not be negative"),
        ("decoding.sed=1", "decoding.sed: unknown parameter; did you mean 'seed'?"),
        ("rows", "'rows': expected key=value"),
        ("out={folder}/rows.jsonl", "rows.jsonl is no folder that can be written to; choose another"),
        ("out={folder}/rows.jsonl/deeper", "rows.jsonl is no folder that can be written to; choose another"),
    ],
)
def test_an_override_that_cannot_be_used_is_named(
    request_file: Path, unloaded: None, capsys, override: str, reason: str
) -> None:
    assert answers.main([str(request_file), override.format(folder=request_file.parent)]) == 2
    assert reason in capsys.readouterr().err
    assert not request_file.with_name("out").exists()


def test_keys_are_put_over_those_of_the_file(request_file: Path) -> None:
    assert answers.main([str(request_file), "decoding.seed=4", "shard_rows=3"]) == 0
    run = json.loads(request_file.with_name("out").joinpath("run.json").read_text())
    assert (run["decoding"]["seed"], run["decoding"]["max_new_tokens"], run["shard_rows"]) == (4, 5, 3)


def test_null_messages_are_absent() -> None:
    assert answers.conversation_of({"id": "x", "messages": None, "prompt": "Why?"}) == "Why?"
