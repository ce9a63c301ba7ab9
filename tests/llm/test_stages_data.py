"""The stages problems, generate and filter, run one after the other on a small scale."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from springhead.errors import BadInput
from springhead.jsonio import read_json, read_jsonl, write_jsonl
from springhead.lineage.digests import tree_digest
from springhead.llm import solver
from springhead.llm.textrows import with_row_id
from springhead.params import load
from springhead.sources import obtain
from springhead.stage import Stage, for_test
from springhead.tables import read_table
from stages.llm import filter as filtering
from stages.llm import generate, problems, validate

pytestmark = pytest.mark.unit

LOGIC = {"logic_depth_min": 1, "logic_depth_max": 3}
PROBLEMS: dict[str, Any] = {
    "splits": {
        "train": {"dag": 40, "logic": 10, "ops_min": 2, "ops_max": 3, "depth_min": 1, "depth_max": 3, **LOGIC},
        "id": {"dag": 12, "logic": 4, "ops_min": 2, "ops_max": 3, "depth_min": 1, "depth_max": 3, **LOGIC},
        "ood-depth": {"dag": 8, "logic": 0, "ops_min": 4, "ops_max": 4, "depth_min": 3, "depth_max": 4, **LOGIC},
    },
    "vocabularies": ["market", "harbour"],
    "operators": ["more", "fewer", "sum"],
    "holders": 0,
    "items": 1,
    "max_value": 20,
    "max_constant": 9,
    "max_step": 5,
    "max_factor": 3,
    "redundant": 3,
    "redundant_linked": 0.5,
    "holdout": 0.2,
}
GENERATE: dict[str, Any] = {
    "variants": 3,
    "operators": ["order", "redundancy", "order+redundancy"],
    "redundant_max": 2,
    "mend_problems": 0,
    "rc_variants": 1,
    "eval_random_orders": 2,
    "eval_redundant": 2,
}
FILTER: dict[str, Any] = {
    "min_words": 5,
    "max_words": 200,
    "ngram": 3,
    "leakage_similarity": 0.9,
    "duplicate_similarity": 0.95,
}


def _stage(name: str, module: Any, values: dict[str, Any], base: Path, inputs: tuple[str, ...] = ()) -> Stage[Any]:
    params = load(module.Params, values, f"params.yaml: llm.{name}")
    found = {source: base / source for source in inputs}
    return for_test(params, out=base / name, inputs=found, branch="llm", stage=name, seed=11)


def _run_all(base: Path, public: dict[str, Any] | None = None) -> dict[str, Stage[Any]]:
    stages = {
        "problems": _stage("problems", problems, {**PROBLEMS, "public": public or {}}, base),
        "generate": _stage("generate", generate, GENERATE, base, ("problems",)),
        "filter": _stage("filter", filtering, FILTER, base, ("problems", "generate")),
    }
    problems.run(stages["problems"])
    generate.run(stages["generate"])
    filtering.run(stages["filter"])
    return stages


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Stage[Any]]]:
    base = tmp_path_factory.mktemp("llm")
    return base, _run_all(base)


def test_the_same_bytes_twice(made: tuple[Path, dict[str, Stage[Any]]], tmp_path: Path) -> None:
    _run_all(tmp_path)
    for name in ("problems", "generate", "filter"):
        assert tree_digest(made[0] / name) == tree_digest(tmp_path / name)


def test_row_tables_name_every_row_of_the_files(made: tuple[Path, dict[str, Stage[Any]]]) -> None:
    for name in ("problems", "generate", "filter"):
        table = read_table(made[0] / name / "rows.parquet").to_pylist()
        for file in ("train.jsonl", "eval.jsonl"):
            rows = list(read_jsonl(made[0] / name / file))
            entries = [entry for entry in table if entry["file"] == file]
            assert [entry["id"] for entry in entries] == [row["id"] for row in rows]
            assert [entry["index"] for entry in entries] == list(range(len(rows)))
            assert [entry["parents"] for entry in entries] == [row["parents"] for row in rows]
    assert {entry["generator"] for entry in table} >= {"sft.identity", "mend.order", "eval.redundancy"}


def test_splits_and_counts(made: tuple[Path, dict[str, Stage[Any]]]) -> None:
    drawn = list(read_jsonl(made[0] / "problems" / "eval.jsonl"))
    assert Counter((row["split"], row["family"]) for row in drawn) == {
        ("id", "dag"): 12,
        ("id", "logic"): 4,
        ("ood-depth", "dag"): 8,
    }
    assert all(row["ops"] == 4 for row in drawn if row["split"] == "ood-depth")
    train = Counter(row["method"] for row in read_jsonl(made[0] / "generate" / "train.jsonl"))
    assert train == {"sft": 50, "mend": 200, "rc-aug": 80}
    assert sum(1 for _ in read_jsonl(made[0] / "generate" / "eval.jsonl")) == 24 * 8


def test_metrics_count_what_is_in_the_files(made: tuple[Path, dict[str, Stage[Any]]]) -> None:
    _, stages = made
    metrics = stages["filter"].record.metrics
    decisions = read_table(stages["filter"].out / "decisions.parquet").to_pylist()
    assert sum(metrics["dropped"].values()) == sum(not d["kept"] for d in decisions)
    total = sum(metrics["rows_in"].values()) - sum(metrics["rows_out"].values())
    assert total == sum(metrics["dropped"].values())
    assert stages["problems"].record.metrics["train"]["dag"]["problems"] == 40
    assert {d["name"] for d in stages["filter"].record.datasets} == {"rows-filtered-train", "rows-filtered-eval"}


def test_a_longer_split_keeps_its_first_problems(made: tuple[Path, dict[str, Stage[Any]]]) -> None:
    values = {**PROBLEMS, "splits": {**PROBLEMS["splits"], "train": {**PROBLEMS["splits"]["train"], "dag": 60}}}
    more = problems.draw(load(problems.Params, values, "x"), 11)
    less = problems.draw(load(problems.Params, PROBLEMS, "x"), 11)
    assert more["train"][:40] == less["train"][:40]
    assert more["id"] == less["id"]


def test_mend_may_use_fewer_problems_than_plain_fine_tuning(made: tuple[Path, dict[str, Stage[Any]]]) -> None:
    params = load(generate.Params, {**GENERATE, "mend_problems": 10, "rc_variants": 0}, "x")
    found = generate.load_problems(made[0] / "problems" / "train.jsonl")
    rows = [row for index, problem in enumerate(found) for row in generate.train_rows(problem, index, params, 0)]
    assert Counter(row["method"] for row in rows) == {"sft": 50, "mend": 40}


def test_reworded_rows_pass_the_filters_and_the_verdict(
    made: tuple[Path, dict[str, Stage[Any]]], tmp_path: Path
) -> None:
    (tmp_path / "problems").symlink_to(made[0] / "problems")
    stage = _stage("generate", generate, {**GENERATE, "paraphrase_variants": 2}, tmp_path, ("problems",))
    generate.run(stage)
    assert stage.record.metrics["train"]["paraphrase"] == {"identity": 50, "paraphrase": 100}
    # The rows of the other methods are the ones made without it.
    before = [row["id"] for row in read_jsonl(made[0] / "generate" / "train.jsonl")]
    assert [r["id"] for r in read_jsonl(stage.out / "train.jsonl") if r["method"] != "paraphrase"] == before
    filtered = _stage("filter", filtering, FILTER, tmp_path, ("problems", "generate"))
    filtering.run(filtered)
    kept = Counter(row["method"] for row in read_jsonl(filtered.out / "train.jsonl"))
    assert kept["paraphrase"] == 3 * kept["sft"]
    asked = {**VALIDATE, "methods": ["mend", "sft", "paraphrase"]}
    judged = _stage("validate", validate, asked, tmp_path, ("problems", "filter"))
    validate.run(judged)
    assert read_json(judged.out / "verdict.json")["success"]


def test_planted_faults_are_dropped_by_name(made: tuple[Path, dict[str, Stage[Any]]], tmp_path: Path) -> None:
    train = list(read_jsonl(made[0] / "generate" / "train.jsonl"))
    dag = next(row for row in train if row["family"] == "dag")
    leak = next(row for row in read_jsonl(made[0] / "generate" / "eval.jsonl") if row["family"] == "dag")
    planted = {
        "content-id": {**dag, "id": "f" * 64},
        "parent": with_row_id({**dag, "parents": ["0" * 64]}),
        "length": with_row_id({**dag, "completion": dag["completion"] + " so it is" * 100}),
        "answer": with_row_id({**dag, "answer": "77"}),
        # The text of an evaluation problem under the name of a training problem.
        "leakage": with_row_id({**leak, "split": "train", "parents": dag["parents"], "method": "sft"}),
        "duplicate-row": with_row_id({**dag, "variant": 50}),
    }
    folder = tmp_path / "generate"
    write_jsonl(folder / "train.jsonl", [*train, *planted.values()])
    write_jsonl(folder / "eval.jsonl", read_jsonl(made[0] / "generate" / "eval.jsonl"))
    (tmp_path / "problems").symlink_to(made[0] / "problems")
    stage = _stage("filter", filtering, FILTER, tmp_path, ("problems", "generate"))
    filtering.run(stage)
    decisions = read_table(stage.out / "decisions.parquet").to_pylist()
    named = {d["id"]: d["rule"] for d in decisions if not d["kept"]}
    assert {rule: named[row["id"]] for rule, row in planted.items()} == {rule: rule for rule in planted}
    kept = {row["id"] for row in read_jsonl(stage.out / "train.jsonl")}
    assert not kept & {row["id"] for row in planted.values()}


def test_nothing_left_is_an_error_that_names_the_rule(made: tuple[Path, dict[str, Stage[Any]]], tmp_path: Path) -> None:
    for name in ("problems", "generate"):
        (tmp_path / name).symlink_to(made[0] / name)
    stage = _stage("filter", filtering, {**FILTER, "max_words": 6}, tmp_path, ("problems", "generate"))
    with pytest.raises(BadInput, match=r"nothing left .*split 'id'.*dropped by rule: length \d+"):
        filtering.run(stage)
    assert not (stage.out / "train.jsonl").exists()


def test_a_damaged_line_names_file_and_line(made: tuple[Path, dict[str, Stage[Any]]], tmp_path: Path) -> None:
    (tmp_path / "problems").symlink_to(made[0] / "problems")
    folder = tmp_path / "generate"
    write_jsonl(folder / "eval.jsonl", read_jsonl(made[0] / "generate" / "eval.jsonl"))
    rows = list(read_jsonl(made[0] / "generate" / "train.jsonl"))
    stage = _stage("filter", filtering, FILTER, tmp_path, ("problems", "generate"))
    for bad, reason in (
        ({**rows[1], "prompt": None}, r"train\.jsonl:2: .*prompt"),
        (rows[0], r"train\.jsonl:2: the id .* second time"),
    ):
        write_jsonl(folder / "train.jsonl", [rows[0], bad])
        with pytest.raises(BadInput, match=reason):
            filtering.run(stage)
    whole = (made[0] / "generate" / "train.jsonl").read_bytes()
    (folder / "train.jsonl").write_bytes(whole[: len(whole) // 2 + 1])
    with pytest.raises(BadInput, match=r"train\.jsonl:\d+: "):
        filtering.run(stage)
    write_jsonl(folder / "train.jsonl", [])
    with pytest.raises(BadInput, match="no rows"):
        filtering.run(stage)


def test_an_edited_problem_stops_generation(made: tuple[Path, dict[str, Stage[Any]]], tmp_path: Path) -> None:
    folder = tmp_path / "problems"
    rows = list(read_jsonl(made[0] / "problems" / "train.jsonl"))
    rows[3]["answer"] = "999"
    write_jsonl(folder / "train.jsonl", rows)
    write_jsonl(folder / "eval.jsonl", read_jsonl(made[0] / "problems" / "eval.jsonl"))
    with pytest.raises(BadInput, match=rows[3]["id"]):
        generate.run(_stage("generate", generate, GENERATE, tmp_path, ("problems",)))


@pytest.mark.parametrize(
    ("module", "values", "reason"),
    [
        (problems, {**PROBLEMS, "vocabularies": ["moon"]}, "moon"),
        (problems, {**PROBLEMS, "splits": {"id": PROBLEMS["splits"]["id"]}}, "needs 'train'"),
        (generate, {**GENERATE, "operators": ["synonyms"]}, "synonyms"),
        (generate, {**GENERATE, "redundant_max": 0}, "redundant_max"),
        (generate, {**GENERATE, "paraphrase_variants": -1}, "paraphrase_variants must not be negative"),
        (generate, {**GENERATE, "eval_redundant": 9}, "asked for 9"),
        (filtering, {**FILTER, "leakage_similarity": 1.5}, "leakage_similarity"),
        (filtering, {**FILTER, "min_words": 900}, "min_words"),
    ],
)
def test_bad_parameters_name_themselves(
    made: tuple[Path, dict[str, Stage[Any]]], tmp_path: Path, module: Any, values: dict[str, Any], reason: str
) -> None:
    for name in ("problems", "generate"):
        (tmp_path / name).symlink_to(made[0] / name)
    inputs = {problems: (), generate: ("problems",), filtering: ("problems", "generate")}[module]
    with pytest.raises(BadInput, match=reason):
        module.run(_stage("out", module, values, tmp_path, inputs))


def test_no_evaluation_expression_reaches_the_training_rows(made: tuple[Path, dict[str, Stage[Any]]]) -> None:
    expressions = {}
    for file in ("train.jsonl", "eval.jsonl"):
        rows = [row for row in read_jsonl(made[0] / "filter" / file) if row["family"] == "dag"]
        expressions[file] = {solver.signature(*solver.split_text(row["prompt"])) for row in rows}
    assert expressions["train.jsonl"]
    assert not expressions["train.jsonl"] & expressions["eval.jsonl"]


MIRROR = Path(__file__).parents[3] / "shared/data"
VALIDATE: dict[str, Any] = {
    "min_prompt_chars": 20,
    "max_prompt_chars": 2000,
    "min_completion_chars": 9,
    "max_completion_chars": 1000,
    "methods": ["mend", "sft"],
    "operators": GENERATE["operators"],
    "min_group_rows": 5,
    "max_label_share": 0.8,
    "max_answer_share": 0.5,
}


def test_problems_of_public_sets_go_all_the_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if MIRROR.is_dir():
        monkeypatch.setenv("SPRINGHEAD_SOURCES", str(MIRROR))
    try:
        for name in ("prontoqa-dev", "gsm8k-train", "gsm8k-test"):
            obtain(name)
    except BadInput as error:
        pytest.skip(f"needs public data: {error}")
    sets = {"prontoqa": {"split": "proofs", "problems": 20}, "gsm8k-test": {"split": "stories", "problems": 20}}
    monkeypatch.setattr(problems, "PUBLIC", {name: _here(read) for name, read in problems.PUBLIC.items()})
    _run_all(tmp_path, {**sets, "gsm8k-train": {"split": "train", "problems": 20}})
    kept = list(read_jsonl(tmp_path / "filter/train.jsonl")) + list(read_jsonl(tmp_path / "filter/eval.jsonl"))
    counts = Counter((row["split"], row["family"], row["redundancy"]) for row in kept)
    assert counts["proofs", "prontoqa", 0] == counts["proofs", "prontoqa", 2] == 20 * 4
    # A story has nothing redundant, so each of its operators re-orders it.
    assert counts["stories", "gsm8k", 0] > 20 * 2
    assert counts["train", "gsm8k", 0] > 20 * 2
    assert not any(row["redundancy"] for row in kept if row["family"] == "gsm8k")
    judged = _stage("validate", validate, VALIDATE, tmp_path, ("problems", "filter"))
    validate.run(judged)
    assert read_json(judged.out / "verdict.json")["success"]
    # Both stages say what is missing rather than call the stories wrong.
    monkeypatch.setenv("SPRINGHEAD_SOURCES", str(tmp_path / "nothing"))
    monkeypatch.setenv("SPRINGHEAD_HOME", str(tmp_path / "home"))
    for stage in (_stage("filter", filtering, FILTER, tmp_path, ("problems", "generate")), judged):
        with pytest.raises(BadInput, match=r"source 'gsm8k-test' is missing"):
            (filtering if stage is not judged else validate).run(stage)


def _here(read: Any) -> Any:
    """Reads a public set from where this checkout has it, whatever the stage's root."""
    return lambda split, root: read(split, None)
