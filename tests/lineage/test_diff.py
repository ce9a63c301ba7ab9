"""What differs between two data sets: rows by rule, distributions, receipts, other revisions."""

import io
import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from rich.console import Console

from springhead import cli
from springhead.errors import BadInput
from springhead.jsonio import read_json, write_json
from springhead.lineage.diff import diff
from springhead.lineage.difftext import render
from springhead.lineage.digests import tree_digest
from springhead.lineage.ledger import Ledger
from springhead.lineage.receipts import describe, receipt_path
from tests.lineage import sample as made
from tests.lineage.sample import DROPPED, REPAIRED, REPLACED, TASK, episode, problem, text_row

pytestmark = pytest.mark.unit

COLLECTED, FILTERED = f"data/rl/collect/{TASK}", f"data/rl/filter/{TASK}"


def _git(root: Path, *arguments: str) -> str:
    identity = ["-c", "user.name=t", "-c", "user.email=t@t"]
    return subprocess.run(["git", *identity, *arguments], cwd=root, check=True, capture_output=True, text=True).stdout


def printed(answer: dict[str, Any]) -> str:
    text = io.StringIO()
    Console(width=250, file=text).print(render(answer))
    return text.getvalue()


def _redo(root: Path, stage: str, output: str, params: dict[str, Any]) -> None:
    """Writes the receipt of a stage again after its output was changed, as the harness would."""
    path = receipt_path(root, stage)
    receipt = read_json(path)
    receipt["outputs"][output] = describe(root / output)
    receipt["params"] |= params
    for entry in receipt["datasets"]:
        entry["sha256"] = tree_digest(root / entry["path"])
    write_json(path, receipt)


def _table(path: Path, schema: Any, rows: list[list[Any]]) -> None:
    made._table(path, schema, rows)


def _columns(path: Path) -> list[list[Any]]:
    table = pq.read_table(path)
    return [list(row.values()) for row in table.to_pylist()]


@pytest.fixture
def history(root: Path) -> Path:
    """The sample under git, then another revision: a stricter filter and another collection.

    Episode 5 is dropped now; the outlier rule keeps 6. Episode 2 is left as it came in. Episode 8
    is new, of an expert that the first revision did not have, and episode 0 is gone.
    """
    _git(root, "init", "-q", "-b", "main")
    _git(root, "add", "-f", "dvc.lock", "dvc.yaml", "params.yaml")
    _git(root, "commit", "-qm", "first")
    _git(root, "tag", "first")
    rows = _columns(root / COLLECTED / "rows.parquet")
    fresh = list(rows[1])
    fresh[0], fresh[2], fresh[7] = episode(8), "e" * 64, 240.0
    _table(root / COLLECTED / "rows.parquet", made.EPISODE_ROWS, [*rows[1:], fresh])
    _redo(root, f"rl-collect@{TASK}", COLLECTED, {"rl.collect": {"episodes": 9}})
    after = [row for row in [*rows[1:], fresh] if row[0] not in (episode(5), episode(7))]
    _table(root / FILTERED / "rows.parquet", made.EPISODE_ROWS, after)
    _table(root / FILTERED / "decisions.parquet", made.DECISIONS, [
        [row[0], "outlier", row[0] not in (episode(5), episode(7)), row[7], 120.0, None] for row in [*rows[1:], fresh]
    ])  # fmt: skip
    _redo(root, f"rl-filter@{TASK}", FILTERED, {"rl.filter": {"outlier": 50.0, "inpaint": False}})
    return root


# -- rows -----------------------------------------------------------------------------------------


def test_before_and_after_a_filter_each_row_has_the_rule_that_took_it(root: Path) -> None:
    answer = diff(root, COLLECTED, FILTERED)
    assert answer["rows"] == {"common": 5, "only_a": 3, "only_b": 1, "other_facts": {}}
    fates = {(f["what"], f["rule"]): f for f in answer["only_a"]}
    dropped = fates["dropped", "outlier"]
    assert dropped["rows"] == 2
    assert sorted(dropped["examples"]) == sorted(map(episode, DROPPED))
    assert (dropped["lowest_value"], dropped["highest_value"], dropped["lowest_threshold"]) == (180.0, 210.0, 165.0)
    assert fates["replaced there", "inpaint"]["examples"] == [episode(REPLACED)]
    (back,) = answer["only_b"]
    assert (back["what"], back["rule"], back["examples"]) == ("replaced here", "inpaint", [REPAIRED])


def test_two_revisions_differ_by_rule_by_producer_and_by_parameter(history: Path) -> None:
    answer = diff(history, f"first:{FILTERED}", FILTERED)
    assert answer["rows"]["common"] == 3  # episodes 1, 3 and 4
    fates = {(f["what"], f["rule"]): f for f in answer["only_a"]}
    assert fates["dropped", "outlier"]["examples"] == [episode(5)]
    assert fates["replaced here", "inpaint"]["examples"] == [REPAIRED]  # B has episode 2 as it came in
    gone = fates["not made", None]
    assert (gone["examples"], gone["maker_is_there"]) == ([episode(0)], True)
    assert gone["model"] == f"data/rl/experts/{TASK}/p0"
    back = {f["what"]: f for f in answer["only_b"]}
    assert back["dropped"]["examples"] == [episode(6)]
    assert back["replaced there"]["examples"] == [episode(REPLACED)]
    assert (back["not made"]["examples"], back["not made"]["maker_is_there"]) == ([episode(8)], False)
    assert sum(f["rows"] for f in answer["only_a"]) == answer["rows"]["only_a"] == 3
    assert sum(f["rows"] for f in answer["only_b"]) == answer["rows"]["only_b"] == 3
    changes = {(c["kind"], c["name"]): (c["a"], c["b"]) for pair in answer["receipts"] for c in pair["changes"]}
    assert changes["parameter", "rl.filter.outlier"] == (100.0, 50.0)
    assert changes["parameter", "rl.filter.inpaint"] == (None, False)
    assert changes["parameter", "rl.collect.episodes"] == (8, 9)


def test_code_of_the_harness_is_told_from_code_of_the_stage(history: Path) -> None:
    path = receipt_path(history, f"rl-filter@{TASK}")
    receipt = read_json(path)
    receipt["code"]["files"] |= {"stages/rl/filter.py": "1" * 64, "springhead/stage.py": "2" * 64}
    receipt["environment"]["packages"]["numpy"] = "9.9"
    write_json(path, receipt)
    (pair,) = (p for p in diff(history, f"first:{FILTERED}", FILTERED)["receipts"] if p["b"] == receipt["stage"])
    found = {c["name"]: c["kind"] for c in pair["changes"]}
    assert (found["stages/rl/filter.py"], found["springhead/stage.py"]) == ("code", "harness")
    assert (found["numpy"], found["rl.filter.outlier"]) == ("package", "parameter")


def test_the_text_says_it_in_words(history: Path) -> None:
    text = printed(diff(history, f"first:{FILTERED}", FILTERED))
    for part in (
        "3 rows in both, 3 only in A, 3 only in B",
        "dropped in B by outlier",
        "put in A by inpaint in the place of rows that B has as they came in",
        "never made in A, which does not have these producers",
        "never made in B, which has the same producers",
        "parameter rl.filter.outlier: 100 → 50",
        "episode_return",
        "█",
    ):
        assert part in text


def test_a_row_that_stands_for_its_twin_is_no_row_that_was_made(root: Path) -> None:
    kept, twin = text_row(0, "mend", 0), text_row(1, "mend", 1)
    folder = root / "data/llm/filter"
    rows = [row for row in _columns(root / "data/llm/generate/rows.parquet") if row[0] != twin]
    _table(folder / "rows.parquet", made.TEXT_ROWS, rows)
    judged = [[row[0], "length", True, 9.0, 400.0, None] for row in _columns(root / "data/llm/generate/rows.parquet")]
    _table(folder / "decisions.parquet", made.DECISIONS, [*judged, [twin, "duplicate", False, 1.0, 1.0, kept]])
    _redo(root, "llm-filter", "data/llm/filter", {})
    answer = diff(root, "data/llm/generate", "data/llm/filter")
    assert [(f["what"], f["rule"], f["examples"]) for f in answer["only_a"]] == [
        ("replaced there", "duplicate", [twin])
    ]
    answer = diff(root, "data/llm/problems", "data/llm/filter")  # the twin that stayed came in itself
    assert {f["what"] for f in answer["only_b"]} == {"not made"}


def test_a_part_of_a_table_is_compared_alone(root: Path) -> None:
    """A model stands for the rows of its method; what it lacks lies elsewhere in the same table."""
    model = "data/llm/finetune/small-llama/mend/0/model"
    answer = diff(root, "data/llm/filter/train.jsonl", model)
    assert answer["b"]["conditions"] == {"method": "mend", "file": "train.jsonl"}
    (fate,) = answer["only_a"]
    assert (fate["what"], fate["rows"]) == ("elsewhere", 3)
    assert fate["examples"] == sorted(text_row(n, "sft", 0) for n in range(3))
    assert "in another part of B's table" in printed(answer)


def test_rows_that_are_described_otherwise_are_counted(history: Path) -> None:
    path = history / COLLECTED / "rows.parquet"
    rows = _columns(path)
    rows[0][4] = 99.0  # another cost limit for the same episode
    _table(path, made.EPISODE_ROWS, rows)
    answer = diff(history, f"first:{COLLECTED}", COLLECTED)
    assert answer["rows"]["other_facts"] == {"cost_limit": 1}
    assert "described otherwise" in printed(answer)


def test_equal_data_sets_have_no_difference(root: Path) -> None:
    answer = diff(root, FILTERED, FILTERED)
    assert answer["rows"] == {"common": 6, "only_a": 0, "only_b": 0, "other_facts": {}}
    assert (answer["only_a"], answer["only_b"], answer["receipts"]) == ([], [], [])
    text = printed(answer)
    assert "the receipts behind both are the same" in text
    assert "same on both sides" in text


# -- distributions --------------------------------------------------------------------------------


def test_figures_of_numeric_columns(root: Path) -> None:
    answer = diff(root, COLLECTED, FILTERED)["numeric"]["episode_return"]
    assert answer["a"] == {
        "count": 8, "min": 0.0, "max": 210.0, "mean": 105.0, "sd": pytest.approx(73.4846922835),
        "quantiles": {"0.05": 10.5, "0.25": 52.5, "0.5": 105.0, "0.75": 157.5, "0.95": 199.5},
    }  # fmt: skip
    assert answer["b"]["max"] == 150.0
    bins = answer["histogram"]
    assert len(bins["edges"]) == 21
    assert (bins["edges"][0], bins["edges"][-1]) == (0.0, 210.0)
    assert (sum(bins["a"]), sum(bins["b"])) == (8, 6)
    assert (bins["a"][-1], bins["b"][-1]) == (1, 0)  # the highest value is in the last bin


def test_whole_numbers_have_a_bin_each_and_values_that_are_no_number_do_not_count(root: Path) -> None:
    path = root / FILTERED / "rows.parquet"
    rows = _columns(path)
    rows[0][7], rows[1][7], rows[2][7] = None, float("nan"), float("inf")
    for number, row in enumerate(rows):
        row[9] = 100 + number % 3
    _table(path, made.EPISODE_ROWS, rows)
    answer = diff(root, FILTERED, FILTERED)["numeric"]
    assert answer["episode_return"]["a"]["count"] == 3
    assert answer["length"]["histogram"]["edges"] == [100.0, 101.0, 102.0, 103.0]
    assert answer["length"]["histogram"]["a"] == [2, 2, 2]
    assert "index" not in answer


def test_counts_of_other_columns(root: Path) -> None:
    answer = diff(root, "data/llm/generate", "data/llm/filter")["categorical"]
    assert answer["method"]["values"][0] == {"value": "mend", "a": 6, "b": 5}
    operators = {v["value"]: (v["a"], v["b"]) for v in answer["operator"]["values"]}
    assert operators == {"order": (6, 5), None: (3, 3)}
    assert (answer["split"]["distinct_a"], answer["split"]["distinct_common"]) == (1, 1)


# -- references -----------------------------------------------------------------------------------


def test_a_digest_of_an_older_revision_is_found_in_the_history(history: Path) -> None:
    old = diff(history, f"first:{FILTERED}", FILTERED)["a"]["sha256"]
    answer = diff(history, old[:16], FILTERED)
    assert answer["a"]["path"] == FILTERED
    assert answer["rows"]["only_a"] == 3


def test_models_stand_for_the_data_they_were_trained_on_even_if_it_was_made_again(history: Path) -> None:
    (history / FILTERED / "dataset.hdf5").write_text("other episodes")
    _redo(history, f"rl-filter@{TASK}", FILTERED, {})
    answer = diff(history, f"data/rl/train/{TASK}/cdt/0", FILTERED)
    assert answer["a"]["path"] == f"{FILTERED}/dataset.hdf5"
    assert answer["a"]["revision"] != "workspace"
    assert answer["rows"]["only_a"] == 3
    again = diff(history, f"first:data/rl/train/{TASK}/cdt/0/model", f"first:{FILTERED}")
    assert again["rows"]["only_a"] == again["rows"]["only_b"] == 0


@pytest.mark.fault
def test_content_that_is_not_in_the_cache_is_named_with_what_to_fetch(history: Path) -> None:
    shutil.rmtree(history / ".dvc/cache/files/md5")
    message = rf"the receipt .*{FILTERED} is not in DVC's cache; run `dvc fetch --all-commits`"
    with pytest.raises(BadInput, match=message):
        diff(history, f"first:{FILTERED}", FILTERED)


@pytest.mark.fault
def test_a_single_table_that_is_not_in_the_cache_is_named(history: Path) -> None:
    old = _git(history, "show", "first:./dvc.lock")
    assert FILTERED in old
    from springhead.lineage.history import Commit

    Commit(history, "first").file(f"{FILTERED}/rows.parquet").unlink()
    with pytest.raises(BadInput, match=rf"first .*{FILTERED}/rows.parquet.*dvc fetch --all-commits"):
        diff(history, f"first:{FILTERED}", FILTERED)


@pytest.mark.fault
def test_a_table_that_is_not_in_the_workspace_and_a_damaged_one_are_named(root: Path) -> None:
    path = root / FILTERED / "rows.parquet"
    path.write_bytes(b"PAR1 not really")
    with pytest.raises(BadInput, match=r"rows\.parquet"):
        diff(root, COLLECTED, FILTERED)
    path.unlink()
    with pytest.raises(BadInput, match=f"dvc checkout {FILTERED}/rows.parquet"):
        diff(root, COLLECTED, FILTERED)


def test_references_that_mean_no_data_set(history: Path) -> None:
    for ref, message in (
        ("nowhere:data/rl", "git knows no such revision"),
        ("first:data/rl/nothing", "names nothing at"),
        ("first:../../etc/passwd", "names nothing at"),
        ("--upload-pack=x:data/rl", "git knows no such revision"),
        ("x" * 5000, "not known here"),
        ("ünïcode/../…", "not known here"),
        ("ffffffffffff", "neither here nor in the history"),
        ("", "an empty reference"),
        (":", "git knows no such revision"),
        (f"row:{episode(0)}", "is a row"),
        (f"data/rl/evaluate/{TASK}", "has no row table"),
        (f"rl-validate@{TASK}", "has no row table"),
    ):
        with pytest.raises(BadInput, match=message):
            diff(history, ref, FILTERED)


def test_outside_git_a_revision_is_an_error(root: Path) -> None:
    with pytest.raises(BadInput, match="git knows no such revision"):
        diff(root, f"HEAD:{FILTERED}", FILTERED)


def test_the_command(root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(root)
    before = Ledger(root / ".springhead").head()
    assert cli.main(["diff", COLLECTED, FILTERED, "--json"]) == 0
    first = capsys.readouterr().out
    assert json.loads(first)["rows"]["common"] == 5
    assert cli.main(["diff", COLLECTED, FILTERED, "--json"]) == 0
    assert capsys.readouterr().out == first
    assert cli.main(["diff", COLLECTED, FILTERED]) == 0
    assert "dropped in B by outlier" in capsys.readouterr().out
    assert cli.main(["diff", COLLECTED, "nowhere"]) == 2
    assert problem(0) not in first
    assert Ledger(root / ".springhead").head() == before
    assert not list((root / ".springhead").glob("tmp*"))  # nothing is left of what was spilled


@pytest.mark.slow
def test_ten_million_rows(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Prints seconds and memory; `docs/results/diff-ten-million-rows.md` has a measured run."""
    import resource
    import time

    import duckdb

    count, dropped = 10_000_000, 1_000_000
    row = "sha256(i::VARCHAR) AS id, []::VARCHAR[] AS parents, sha256('policy' || i % 30) AS policy, "
    row += "'ppo-lag' AS algorithm, (i % 3)::DOUBLE AS cost_limit, i AS seed, i % 4 = 0 AS deterministic, "
    row += "sin(i) * 100 AS episode_return, cos(i) * 50 + 50 AS cost_return, 200 + i % 7 AS length, i AS index"
    decision = "sha256(i::VARCHAR) AS id, 'outlier' AS rule, i % 10 <> 0 AS kept, (i % 10)::DOUBLE AS value, "
    decision += "0.5::DOUBLE AS threshold, NULL::VARCHAR AS replaced_by"
    for path, what, where in (
        (f"{COLLECTED}/rows.parquet", row, "true"),
        (f"{FILTERED}/rows.parquet", row, "i % 10 <> 0"),
        (f"{FILTERED}/decisions.parquet", decision, "true"),
    ):
        source = f"SELECT {what} FROM range({count}) AS t(i) WHERE {where}"
        duckdb.sql(f"COPY ({source}) TO '{root / path}' (COMPRESSION zstd)")
    made_of = sum((root / p).stat().st_size for p in (f"{COLLECTED}/rows.parquet", f"{FILTERED}/rows.parquet"))
    started = time.perf_counter()
    answer = diff(root, COLLECTED, FILTERED)
    seconds = time.perf_counter() - started
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    with capsys.disabled():
        print(f"\n{count:,} and {count - dropped:,} rows, {made_of / 1e6:,.0f} MB: {seconds:.1f} s, {memory:,.0f} MB")
    assert answer["rows"] == {"common": count - dropped, "only_a": dropped, "only_b": 0, "other_facts": {}}
    (fate,) = answer["only_a"]
    assert (fate["what"], fate["rule"], fate["rows"]) == ("dropped", "outlier", dropped)
    assert answer["numeric"]["length"]["a"]["count"] == count
    assert seconds < 600
