import io
import json
import os
import shutil
import time
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from rich.console import Console

from springhead.errors import BadInput
from springhead.lineage import query
from springhead.lineage.digests import file_digest
from springhead.lineage.graph import Graph
from springhead.lineage.ledger import Ledger
from springhead.lineage.rows import Rows
from springhead.lineage.tree import render
from springhead.tables import write_table
from tests.lineage.sample import (
    DECISIONS,
    DROPPED,
    EPISODES,
    REPAIRED,
    REPLACED,
    REVISION,
    TASK,
    episode,
    problem,
    text_row,
)

pytestmark = pytest.mark.unit

MODEL = f"data/rl/train/{TASK}/cdt/0/model"
TEXT = "data/llm/finetune/small-llama/mend/0/model"


def printed(answer: dict[str, object]) -> str:
    text = io.StringIO()
    Console(width=300, file=text).print(render(answer))
    return text.getvalue()


# -- from a model to its rows ---------------------------------------------------------------------


def test_a_model_leads_to_every_data_set_rule_expert_parameter_commit_verdict_and_evaluation(root: Path) -> None:
    answer = query.lineage_of_model(root, MODEL)
    assert answer["model"]["facts"] == {"task": TASK, "algorithm": "cdt", "seed": 0}
    assert [s["stage"].partition("@")[0] for s in answer["stages"]] == [
        "rl-experts", "rl-collect", "rl-filter", "rl-validate", "rl-train"]  # fmt: skip
    assert answer["stages"][-1]["params"]["rl.train"] == {"steps": 50}
    assert {run["git"]["revision"] for s in answer["stages"] for run in s["executions"]} == {REVISION}
    assert [(d["rows"], d["role"]) for d in answer["datasets"]] == [
        (EPISODES, "output"),
        (6, "output"),
        (6, "training"),
    ]
    rules = {r["rule"]: (r["kept"], r["dropped"], r["replaced"]) for r in answer["filters"]}
    assert rules == {"outlier": (6, 2, 0), "inpaint": (1, 0, 1)}
    assert sorted(o["model"] for o in answer["origins"]) == [f"data/rl/experts/{TASK}/p{i}" for i in (0, 1)]
    assert sum(o["rows"] for o in answer["origins"]) == 6
    (verdict,) = answer["verdicts"]
    assert (verdict["severity"], verdict["expectations"], verdict["failed"]) == ("none", 2, [])
    (evaluation,) = answer["evaluations"]
    assert evaluation["figures"]["limits"]["20"]["normalised_return"] == 0.618
    assert answer["promotion"] is None


def test_a_digest_a_path_and_the_folder_above_mean_the_same_model(root: Path) -> None:
    sha256 = query.lineage_of_model(root, MODEL)["sha256"]
    for ref in (sha256, sha256[:8], sha256[:12].upper(), str(root / MODEL), f"data/rl/train/{TASK}/cdt/0"):
        assert query.lineage_of_model(root, ref)["name"] == MODEL


def test_a_promotion_is_part_of_the_answer(root: Path) -> None:
    sha256 = query.lineage_of_model(root, MODEL)["sha256"]
    body = {"model": "policy-BallCircle", "version": "3", "digest": sha256, "signature": "5" * 64, "previous": None}
    Ledger(root / ".springhead").append("promotion", body)
    answer = query.lineage_of_model(root, sha256[:10])
    assert answer["promotion"]["version"] == "3"
    assert "promoted as policy-BallCircle/3" in printed(answer)
    with pytest.raises(BadInput, match="say which version: policy-BallCircle@champion"):
        query.lineage(root, "policy-BallCircle")


def test_ids_of_all_training_rows(root: Path) -> None:
    ids = query.rows_of(root, MODEL)
    assert ids == [REPAIRED if n == REPLACED else episode(n) for n in range(DROPPED[0])]
    assert len(query.rows_of(root, f"data/rl/collect/{TASK}")) == EPISODES


def test_fine_tuning_took_the_rows_of_its_method_only(root: Path) -> None:
    ids = query.rows_of(root, TEXT)
    assert ids == [text_row(n, "mend", v) for n in range(3) for v in range(2)][:-1]
    assert {o["method"] for o in query.lineage(root, TEXT)["origins"]} == {"mend"}


def test_data_leads_to_the_models_made_from_it(root: Path) -> None:
    answer = query.lineage(root, f"data/rl/filter/{TASK}")
    assert answer["kind"] == "artefact"
    assert len(answer["models"]) == 4
    assert query.lineage(root, f"rl-filter@{TASK}")["kind"] == "stage"


def test_the_printed_tree_names_what_matters(root: Path) -> None:
    text = printed(query.lineage(root, MODEL))
    for part in (
        "outlier: 6 kept, 2 dropped",
        "threshold 165",
        "rl.train: steps 50",
        REVISION[:12],
        "passed",
        "cost limit 20:",
        "normalised_return 0.618",
        "not promoted",
        f"data/rl/experts/{TASK}/p0",
    ):
        assert part in text


def test_nested_parameters_are_printed_in_full(root: Path) -> None:
    path = root / f"data/receipts/rl-train@{TASK}-cdt-0.json"
    receipt = json.loads(path.read_text())
    receipt["params"]["rl.train"] = {
        "steps": 50,
        "device": None,
        "cdt": {"layers": 2, "hidden": [64, 0.5], "[bold]": {"min": 0}, "empty": {}},
    }
    path.write_text(json.dumps(receipt))
    text = printed(query.lineage(root, MODEL))
    assert "rl.train: device none · steps 50" in text
    assert "cdt: empty {} · hidden [64, 0.5] · layers 2" in text
    assert "[bold]: min 0" in text


# -- from a row to its models ---------------------------------------------------------------------


def test_a_kept_row_leads_to_every_model_it_trained(root: Path) -> None:
    answer = query.lineage_of_row(root, episode(0)[:8])
    assert answer["name"] == episode(0)
    assert [p["stage"] for p in answer["places"]] == [f"rl-collect@{TASK}", f"rl-filter@{TASK}"]
    assert len(answer["models"]) == 4
    assert all(m["direct"] and m["current"] for m in answer["models"])
    assert [m["path"] for m in answer["made_by"]] == [f"data/rl/experts/{TASK}/p0"]


def test_a_dropped_row_names_the_rule_the_value_and_the_threshold(root: Path) -> None:
    answer = query.lineage(root, f"row:{episode(DROPPED[1])}")
    (decision,) = answer["decisions"]
    row = decision["row"]
    assert (row["rule"], row["kept"], row["value"], row["threshold"]) == ("outlier", False, 210.0, 165.0)
    assert answer["models"] == []
    assert "dropped by outlier: value 210 · threshold 165" in printed(answer)


def test_a_row_that_was_changed_trained_through_what_became_of_it(root: Path) -> None:
    answer = query.lineage_of_row(root, episode(REPLACED))
    assert [(c["id"], c["relation"]) for c in answer["children"]] == [(REPAIRED, "changed by a filter")]
    assert {(m["direct"], tuple(m["through"])) for m in answer["models"]} == {(False, (REPAIRED,))}
    assert [p["id"] for p in query.lineage_of_row(root, REPAIRED)["parents"]] == [episode(REPLACED)]


def test_a_problem_leads_to_the_texts_made_from_it_and_their_models(root: Path) -> None:
    answer = query.lineage_of_row(root, problem(0))
    made = {text_row(0, "sft", 0), text_row(0, "mend", 0), text_row(0, "mend", 1)}
    assert {child["id"] for child in answer["children"]} == made
    through = {m["path"]: set(m["through"]) for m in answer["models"]}
    assert through[TEXT] == {text_row(0, "mend", 0), text_row(0, "mend", 1)}
    assert through[TEXT.replace("mend", "sft")] == {text_row(0, "sft", 0)}
    dropped = query.lineage_of_row(root, text_row(2, "mend", 1))
    assert dropped["models"] == []
    assert [p["id"] for p in dropped["parents"]] == [problem(2)]


def test_a_model_on_data_that_was_made_again_is_marked(root: Path) -> None:
    path = root / f"data/receipts/rl-train@{TASK}-cdt-0.json"
    trained_on = file_digest(root / f"data/rl/filter/{TASK}/dataset.hdf5")
    path.write_text(path.read_text().replace(trained_on, "0" * 64))
    stale = {m["path"]: m["current"] for m in query.lineage_of_row(root, episode(0))["models"]}
    assert stale[MODEL] is False
    assert stale[f"data/rl/train/{TASK}/cdt/1/model"] is True


def test_a_duplicate_is_dropped_for_its_equal_row(root: Path) -> None:
    path = root / "data/llm/filter/decisions.parquet"
    table = pq.read_table(path).to_pydict()
    gone = table["kept"].index(False)
    table["replaced_by"][gone] = text_row(2, "mend", 0)
    write_table(path, table, DECISIONS)
    answer = query.lineage_of_row(root, table["id"][gone])
    assert [(c["id"], c["relation"]) for c in answer["children"]] == [
        (text_row(2, "mend", 0), "dropped for an equal row")
    ]
    assert {(m["path"], m["direct"]) for m in answer["models"]} == {(TEXT, False)}
    assert "dropped for the equal row" in printed(answer)
    (rule,) = query.lineage(root, TEXT)["filters"]
    assert (rule["kept"], rule["dropped"], rule["replaced"]) == (8, 1, 0)


def test_the_stages_that_judge_are_told_with_commit_and_parameters(root: Path) -> None:
    judges = {judge["stage"]: judge for judge in query.lineage(root, MODEL)["judges"]}
    assert list(judges) == [f"rl-evaluate@{TASK}"]
    judge = judges[f"rl-evaluate@{TASK}"]
    assert judge["params"]["rl.evaluate"] == {"episodes": 20}
    assert judge["executions"][0]["git"]["revision"] == REVISION


# -- the index of rows ----------------------------------------------------------------------------

REFERENCES = [episode(0), episode(REPLACED), REPAIRED, episode(DROPPED[0]), problem(0), text_row(0, "mend", 1)]


def aged(root: Path) -> None:
    """Makes the tables older than the index takes for settled."""
    for path in root.rglob("*.parquet"):
        os.utime(path, ns=(0, time.time_ns() - 3_600_000_000_000))


@pytest.mark.parametrize("row", REFERENCES)
def test_the_index_gives_the_answer_of_the_tables(root: Path, row: str) -> None:
    aged(root)
    read = query.lineage(root, row, scan=True)
    assert not (root / ".springhead/index").exists()
    assert query.lineage(root, row) == read  # builds the index
    assert query.lineage(root, row) == read  # uses it


def test_an_index_is_made_once_and_again_where_a_table_changes(root: Path) -> None:
    aged(root)
    kept = root / f"data/rl/filter/{TASK}/rows.parquet"

    def built() -> int:
        rows = Rows(root, Graph.read(root))
        rows.places(episode(0))
        return rows.index.built

    assert built() > 5
    assert built() == 0
    shutil.copytree(root / "data", root / "elsewhere")  # equal content elsewhere has the same index
    shutil.rmtree(root / "data")
    (root / "elsewhere").rename(root / "data")
    assert built() == 0
    table = pq.read_table(kept)
    pq.write_table(table.slice(1), kept)
    assert built() == 1
    assert query.lineage_of_row(root, episode(0))["models"] == []
    assert query.lineage(root, MODEL)["origins"] == query.lineage(root, MODEL, scan=True)["origins"]


@pytest.mark.fault
@pytest.mark.parametrize("content", [b"", b"\0" * 16, b"junk", b"\xff" * 800])
def test_a_damaged_index_is_made_again(root: Path, content: bytes) -> None:
    aged(root)
    before = query.lineage(root, episode(0))
    counts = query.lineage(root, MODEL)
    for path in (root / ".springhead/index").iterdir():
        path.write_bytes(content)
    assert query.lineage(root, episode(0)) == before
    assert query.lineage(root, MODEL) == counts


@pytest.mark.fault
def test_questions_are_answered_where_no_index_can_be_kept(root: Path) -> None:
    aged(root)
    (root / ".springhead/index").write_text("a file where the folder should be")
    assert len(query.lineage(root, episode(0))["models"]) == 4
    assert query.lineage(root, MODEL)["filters"]


def test_the_index_of_a_table_that_is_gone_is_removed(root: Path) -> None:
    aged(root)
    query.lineage(root, episode(0))
    index = root / ".springhead/index"
    before = {path.name for path in index.iterdir()}
    shutil.rmtree(root / "data/llm")
    table = root / f"data/rl/filter/{TASK}/rows.parquet"
    pq.write_table(pq.read_table(table).slice(1), table)
    aged(root)
    query.lineage(root, episode(1))
    after = {path.name for path in index.iterdir()}
    assert len([name for name in after if name.endswith(".index")]) < len(
        [name for name in before if name.endswith(".index")]
    )


# -- references that mean nothing -----------------------------------------------------------------


@pytest.mark.parametrize(
    ("ref", "message"),
    [
        ("row:ffffffffffff", "no row has this digest"),
        ("ffffffffffff", "no model, output or row has this digest"),
        ("policy-BallCircle/7", "nothing is registered yet"),
        (f"rl-train@{TASK}-cdt-9", f"no stage of this name has a receipt here; there are rl-train@{TASK}-cdt"),
        ("llm-finetune", "no stage of this name has a receipt here"),
        ("models:/policy-BallCircle@champion", "nothing is registered yet"),
        ("../../etc/passwd", "not known here"),
        ("--rows", "not known here"),
        ("é" * 300, "not known here"),
        ("", "not known here"),
        ("row:", "expected 8 to 64 hexadecimal digits"),
        ("row:" + "a" * 65, "expected 8 to 64 hexadecimal digits"),
        ("row:abc", "expected 8 to 64 hexadecimal digits"),
        ("row:not-hexadecimal", "expected 8 to 64 hexadecimal digits"),
        ("nothing here", "not known here"),
        ("data/rl/train/Nowhere", "not known here"),
        (f"data/rl/filter/{TASK}/other.txt", "no receipt names this file"),
        ("policy-BallCircle@champion", "nothing is registered yet"),
    ],
)
def test_a_reference_to_nothing_says_what_to_give(root: Path, ref: str, message: str) -> None:
    with pytest.raises(BadInput, match=message):
        query.lineage(root, ref)


def test_an_ambiguous_prefix_is_refused(root: Path) -> None:
    shared = next(  # two ids with one first digit exist for sure among so many
        a[:1] for a in map(episode, range(EPISODES)) for b in map(episode, range(EPISODES)) if a != b and a[0] == b[0]
    )
    with pytest.raises(BadInput, match="rows begin like this"):
        Rows(root, Graph.read(root)).find(shared)


def test_tables_that_are_not_in_the_workspace_are_named(root: Path) -> None:
    (root / f"data/rl/filter/{TASK}/decisions.parquet").unlink()
    answer = query.lineage(root, MODEL)
    assert answer["missing"] == [f"data/rl/filter/{TASK}/decisions.parquet"]
    assert "dvc checkout" in printed(answer)


def test_a_damaged_table_is_named(root: Path) -> None:
    (root / f"data/rl/collect/{TASK}/rows.parquet").write_bytes(b"PAR1 not really")
    with pytest.raises(BadInput, match=f"data/rl/collect/{TASK}/rows.parquet"):
        query.lineage(root, f"row:{episode(0)}")


@pytest.mark.fault
def test_a_table_without_ids_is_named(root: Path) -> None:
    path = root / f"data/rl/collect/{TASK}/rows.parquet"
    pq.write_table(pq.read_table(path).drop(["id"]), path)
    with pytest.raises(BadInput, match="is no table of rows"):
        query.lineage(root, f"row:{episode(0)}")


@pytest.mark.fault
@pytest.mark.parametrize(
    ("file", "text", "key"),
    [
        (f"data/rl/validate/{TASK}/verdict.json", "[]", "expectations"),
        (f"data/rl/validate/{TASK}/verdict.json", '{"expectations": [{"name": "x"}]}', "expectations"),
        (f"data/rl/evaluate/{TASK}/summary.json", '{"models": null}', "models"),
        (f"data/rl/evaluate/{TASK}/summary.json", '{"models": ["a"]}', "models"),
    ],
)
def test_an_edited_verdict_or_summary_is_named(root: Path, file: str, text: str, key: str) -> None:
    (root / file).chmod(0o644)
    (root / file).write_text(text)
    with pytest.raises(BadInput, match=rf"{Path(file).name}: has no list of {key}; restore it"):
        query.lineage(root, MODEL)


def test_data_is_no_model(root: Path) -> None:
    with pytest.raises(BadInput, match="is no model but an artefact"):
        query.lineage_of_model(root, f"data/rl/filter/{TASK}")
