# ruff: noqa: F401, F811  (fixtures of pytest are imported, then named as arguments)
"""What other tools read: OpenLineage events, Croissant descriptions, data cards and model cards."""

import itertools
import json
import logging
import os
import re
import subprocess
import sys
import threading
import types
import typing
import uuid
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import attr
import jsonschema
import pytest
import yaml
from openlineage.client import event_v2, facet_v2

from springhead import cli
from springhead.errors import BadInput, Finding
from springhead.export import openlineage
from springhead.export.documents import export
from springhead.jsonio import read_json, write_json
from springhead.lineage.digests import file_digest
from springhead.lineage.ledger import Ledger
from springhead.lineage.receipts import read_receipts, receipt_path
from tests.lineage.conftest import root, sample_template
from tests.lineage.sample import REVISION, TASK

pytestmark = pytest.mark.unit

FILTERED = f"data/rl/filter/{TASK}"
TRAIN, MODEL = f"rl-train@{TASK}-cdt-0", f"data/rl/train/{TASK}/cdt/0/model"
FLOW = "27a8bf83-9d64-46d3-bd6f-de487782672f"


# -- OpenLineage: form ----------------------------------------------------------------------------


def _classes() -> dict[str, type]:
    """Returns the client's class of each facet by the address of its schema."""
    modules = [m for m in vars(facet_v2).values() if isinstance(m, types.ModuleType)]
    found = [c for m in modules for c in vars(m).values() if isinstance(c, type) and hasattr(c, "_get_schema")]
    return {c._get_schema(): c for c in [*found, openlineage.ExecutionRunFacet]}  # type: ignore[attr-defined]


def _conforms(value: Any, kind: Any, where: str) -> None:
    """Asserts that a JSON value is what a type of the client's classes says: keys, types, nothing missing or more."""
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if kind is Any:
        return
    if origin in (typing.Union, types.UnionType):
        options = [option for option in inner if option is not type(None)]
        assert len(options) == 1, where
        _conforms(value, options[0], where)
    elif origin is list:
        assert isinstance(value, list), where
        for number, item in enumerate(value):
            _conforms(item, inner[0], f"{where}[{number}]")
    elif origin is dict:
        assert isinstance(value, dict), where
        for key, item in value.items():
            _conforms(item, inner[1], f"{where}.{key}")
    elif attr.has(kind):
        hints = typing.get_type_hints(kind)
        fields = {field.name: field for field in attr.fields(kind)}
        assert isinstance(value, dict), where
        assert value.keys() <= fields.keys(), f"{where}: {value.keys() - fields.keys()}"
        for name, field in fields.items():
            assert name in value or field.default is not attr.NOTHING, f"{where}: no {name}"
            if name in value:
                _conforms(value[name], hints[name], f"{where}.{name}")
    else:
        expected = (int, float) if kind is float else kind
        assert isinstance(value, expected) and isinstance(value, bool) is (kind is bool), f"{where}: {value!r}"


def _facets(event: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    yield from event["run"]["facets"].items()
    yield from event["job"]["facets"].items()
    for data in [*event["inputs"], *event["outputs"]]:
        yield from data["facets"].items()
        yield from {**data.get("inputFacets", {}), **data.get("outputFacets", {})}.items()


def _failed(root: Path) -> None:
    body = {
        "execution": "f" * 32, "stage": TRAIN, "attempt": 2, "inputs": "1" * 64, "error": "no memory\nleft",
        "git": {"revision": REVISION, "dirty": True}, "host": "secret-host", "python": "3.11.7",
        "started": "2026-01-02T04:00:00+00:00", "seconds": 4.0, "cpu_seconds": 3.5, "energy": {"package": 250.0},
        "flow_run": FLOW,
    }  # fmt: skip
    Ledger(root / ".springhead").append("failure", body)


@pytest.fixture
def events(root: Path) -> list[dict[str, Any]]:
    _failed(root)
    return openlineage.events(root)


def test_events_have_the_form_of_the_clients_own_classes(events: list[dict[str, Any]]) -> None:
    classes, seen = _classes(), set()
    for event in events:
        bare = json.loads(json.dumps(event))
        assert event_v2.RunState(bare.pop("eventType"))
        assert bare.pop("schemaURL") == event_v2.RunEvent._get_schema()
        for name, facet in _facets(event):
            _conforms(facet, classes[facet["_schemaURL"]], name)
            seen.add(name)
        uuid.UUID(event["run"]["runId"])
        assert re.match(r"[a-z]+:", event["producer"])
    assert seen == {
        "parent", "processing_engine", "executionParameters", "errorMessage", "springhead_execution",
        "jobType", "sourceCode", "version", "datasetType", "schema", "columnLineage",
        "inputStatistics", "outputStatistics", "dataQualityAssertions",
    }  # fmt: skip


def test_a_wrong_form_would_be_found(events: list[dict[str, Any]]) -> None:
    facet = events[0]["run"]["facets"]["processing_engine"]
    kind = _classes()[facet["_schemaURL"]]
    _conforms(facet, kind, "")
    for wrong in ({**facet, "more": 1}, {**facet, "version": 3}, {k: v for k, v in facet.items() if k != "version"}):
        with pytest.raises(AssertionError):
            _conforms(wrong, kind, "")


def test_our_own_facet_has_a_schema_that_it_fits(events: list[dict[str, Any]]) -> None:
    schema = json.loads(openlineage.SCHEMA.read_text())
    for event in events:
        facet = event["run"]["facets"]["springhead_execution"]
        assert facet["_schemaURL"].partition("#")[0] == schema["$id"]
        jsonschema.validate({"springhead_execution": facet}, schema)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({"springhead_execution": {"execution": "x"}}, schema)


SPECIFICATION = os.environ.get("OPENLINEAGE_SPEC", "")


@pytest.mark.skipif(not SPECIFICATION, reason="OPENLINEAGE_SPEC names no folder `spec` of an OpenLineage checkout")
def test_events_are_valid_against_the_published_schemas(events: list[dict[str, Any]]) -> None:
    from referencing import Registry, Resource

    files = [Path(SPECIFICATION) / "OpenLineage.json", *sorted((Path(SPECIFICATION) / "facets").glob("*.json"))]
    schemas = {s["$id"]: s for s in (json.loads(f.read_text()) for f in [*files, openlineage.SCHEMA])}
    registry: Any = Registry().with_resources((name, Resource.from_contents(s)) for name, s in schemas.items())
    checker = jsonschema.Draft202012Validator.FORMAT_CHECKER

    def validate(value: Any, reference: str) -> None:
        jsonschema.Draft202012Validator({"$ref": reference}, registry=registry, format_checker=checker).validate(value)

    for event in events:
        validate(event, event["schemaURL"])
        for name, facet in _facets(event):
            validate(facet, facet["_schemaURL"])
            assert name in schemas[facet["_schemaURL"].partition("#")[0]]["properties"]


# -- OpenLineage: content -------------------------------------------------------------------------


def _of(events: list[dict[str, Any]], stage: str, kind: str) -> dict[str, Any]:
    return next(e for e in events if e["job"]["name"] == stage and e["eventType"] == kind)


def test_every_execution_starts_and_ends_and_the_same_ledger_gives_the_same_events(
    root: Path,
    events: list[dict[str, Any]],
) -> None:
    runs = {
        e["run"]["runId"]: [x["eventType"] for x in events if x["run"]["runId"] == e["run"]["runId"]] for e in events
    }
    assert sorted(runs.values()) == [["START", "COMPLETE"]] * len(read_receipts(root)) + [["START", "FAIL"]]
    assert openlineage.events(root) == events
    assert openlineage.run_id("f" * 32) == _of(events, TRAIN, "FAIL")["run"]["runId"]


def test_inputs_and_outputs_meet_by_name_and_version(events: list[dict[str, Any]]) -> None:
    made = {
        d["name"]: d["facets"]["version"]["datasetVersion"]
        for e in events if e["eventType"] == "COMPLETE" for d in e["outputs"]
    }  # fmt: skip
    for event in events:
        for data in event["inputs"]:
            assert made[data["name"]] == data["facets"]["version"]["datasetVersion"]
    train = _of(events, TRAIN, "COMPLETE")
    assert [d["name"] for d in train["inputs"]] == [FILTERED, f"data/rl/validate/{TASK}"]
    assert train["outputs"][1]["facets"]["datasetType"] == {
        **train["outputs"][1]["facets"]["datasetType"], "datasetType": "MODEL", "subType": "policy"
    }  # fmt: skip


def test_a_verdict_becomes_assertions_on_the_data_it_is_about(events: list[dict[str, Any]]) -> None:
    (data,) = _of(events, "llm-validate", "COMPLETE")["inputs"]
    assertions = data["inputFacets"]["dataQualityAssertions"]["assertions"]
    assert [(a["assertion"], a["success"], a["severity"]) for a in assertions] == [
        ("ExpectCostsNonNegative", True, "error"), ("ExpectEnoughRows", False, "warn")]  # fmt: skip
    assert "dataQualityAssertions" not in _of(events, TRAIN, "COMPLETE")["inputs"][0]["inputFacets"]


def test_columns_of_a_filter_come_from_what_it_filtered(events: list[dict[str, Any]]) -> None:
    (data,) = _of(events, "llm-filter", "COMPLETE")["outputs"]
    lineage = data["facets"]["columnLineage"]
    (source,) = lineage["fields"]["method"]["inputFields"]
    assert (source["name"], source["field"]) == ("data/llm/generate", "method")
    assert source["transformations"] == [{"type": "DIRECT", "subtype": "IDENTITY"}]
    assert lineage["dataset"][0]["transformations"][0]["subtype"] == "FILTER"
    (data,) = _of(events, f"rl-filter@{TASK}", "COMPLETE")["outputs"]  # it changed an episode
    (source,) = data["facets"]["columnLineage"]["fields"]["cost_return"]["inputFields"]
    assert source["transformations"][0]["subtype"] == "TRANSFORMATION"
    (data,) = _of(events, "llm-generate", "COMPLETE")["outputs"]
    assert "columnLineage" not in data["facets"]
    assert [f["name"] for f in data["facets"]["schema"]["fields"]][:2] == ["id", "parents"]


def test_a_failure_names_its_error_and_its_flow_run_and_no_machine(events: list[dict[str, Any]]) -> None:
    event = _of(events, TRAIN, "FAIL")
    facets = event["run"]["facets"]
    assert facets["errorMessage"]["message"] == "no memory\nleft"
    assert (facets["parent"]["run"]["runId"], facets["parent"]["job"]["name"]) == (FLOW, "springhead")
    assert facets["springhead_execution"]["energyJoules"] == {"package": 250.0}
    assert event["inputs"] == event["outputs"] == []
    assert "secret-host" not in json.dumps(event)


def test_a_remote_is_named_as_a_uri_without_its_password(root: Path, events: list[dict[str, Any]]) -> None:
    assert "sourceCodeLocation" not in events[0]["job"]["facets"]
    subprocess.run(["git", "init", "-q"], cwd=root, check=True)
    for address, shown in (
        ("https://me:secret@example.org/a/b.git", "https://example.org/a/b.git"),
        ("git@example.org:a/b.git", "ssh://git@example.org/a/b.git"),
    ):
        subprocess.run(["git", "config", "remote.origin.url", address], cwd=root, check=True)
        location = openlineage.events(root, "llm-problems")[0]["job"]["facets"]["sourceCodeLocation"]
        assert (location["url"], location["version"]) == (shown, REVISION)
        assert location["path"] == "stages/llm/problems.py"


def test_events_of_one_model_are_those_behind_it_and_of_its_judges(root: Path) -> None:
    stages = {e["job"]["name"] for e in openlineage.events(root, MODEL)}
    behind = {f"rl-{step}@{TASK}" for step in ("experts", "collect", "filter", "validate", "evaluate")}
    assert stages == behind | {TRAIN}
    with pytest.raises(BadInput, match="no model, data set or stage"):
        openlineage.events(root, "ffffffffffff")


# -- OpenLineage: to a server ---------------------------------------------------------------------


class _Server(ThreadingHTTPServer):
    """Takes events as Marquez does; first gives the answers that a test wants."""

    def __init__(self, answers: list[int]) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.answers, self.taken, self.headers, self.paths = answers, [], [], []  # type: ignore[var-annotated]
        self.url = f"http://127.0.0.1:{self.server_port}"

    def __enter__(self) -> "_Server":
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        self.shutdown()
        self.server_close()


class _Handler(BaseHTTPRequestHandler):
    server: _Server

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        status = self.server.answers.pop(0) if self.server.answers else 201
        if status == 201:
            self.server.taken.append(body)
        self.server.paths.append(self.path)
        self.server.headers.append(dict(self.headers))
        self.send_response(status)
        self.end_headers()
        self.wfile.write(b"" if status == 201 else b"runId is not known")

    def log_message(self, *arguments: object) -> None:
        pass


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(openlineage._RETRY, "backoff_factor", 0.001)
    monkeypatch.delenv("OPENLINEAGE_API_KEY", raising=False)


@pytest.mark.usefixtures("quick")
def test_a_server_gets_every_event_also_after_it_was_unavailable(
    root: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(root)
    monkeypatch.setenv("OPENLINEAGE_API_KEY", "key-1")
    with _Server([503, 429, 201, 500]) as server:
        assert cli.main(["export", "openlineage", TRAIN, "--url", server.url]) == 0
        expected = openlineage.events(root, TRAIN)
    assert server.taken == expected
    assert capsys.readouterr().out == f"{len(expected)} events sent\n"
    assert set(server.paths) == {"/api/v1/lineage"}
    assert {h["Authorization"] for h in server.headers} == {"Bearer key-1"}


@pytest.mark.usefixtures("quick")
def test_an_address_with_a_path_is_taken_as_it_is(root: Path) -> None:
    with _Server([]) as server:
        export(root, "openlineage", "llm-problems", url=f"{server.url}/openapi/openlineage/api/v1/lineage")
    assert set(server.paths) == {"/openapi/openlineage/api/v1/lineage"}


@pytest.mark.fault
@pytest.mark.usefixtures("quick")
def test_a_refusal_and_a_server_that_is_not_there_say_what_happened(root: Path) -> None:
    with _Server([201, 422]) as server, pytest.raises(BadInput, match="refused event 2 with status 422: runId is not"):
        export(root, "openlineage", TRAIN, url=server.url)
    with pytest.raises(BadInput, match=rf"{server.url}/api/v1/lineage: no answer after 5 attempts, 0 events"):
        export(root, "openlineage", TRAIN, url=server.url)
    for address in ("localhost:5000", "ftp://x", "http://", "--x"):
        with pytest.raises(BadInput, match="expected an address"):
            export(root, "openlineage", TRAIN, url=address)
    for address in ("http://[::", "http://localhost:99999"):
        with pytest.raises(BadInput, match="no address"):
            export(root, "openlineage", TRAIN, url=address)


# -- Croissant ------------------------------------------------------------------------------------


def test_descriptions_are_valid_and_their_records_load(root: Path, tmp_path: Path) -> None:
    """In the eyes of the format's own library."""
    import mlcroissant

    out = tmp_path / "described"
    written = [Path(line) for line in export(root, "croissant", out=out).splitlines()]
    assert {p.name for p in written} == {
        f"rl-collect@{TASK}.croissant.json", "llm-problems.croissant.json",
        "llm-filter.croissant.json", f"rl-filter@{TASK}.croissant.json",
    }  # fmt: skip
    logging.disable(logging.WARNING)  # about what no receipt tells: licence, citation, date
    try:
        for path in written:
            described = mlcroissant.Dataset(jsonld=str(path))
            issues = described.metadata.ctx.issues
            assert not issues.errors
            assert {re.search(r'"\S+[/#](\w+)" is recommended', w)[1] for w in issues.warnings} == {  # type: ignore[index]
                "citeAs", "datePublished", "license"}  # fmt: skip
            for records in described.metadata.record_sets:
                first = next(iter(described.records(record_set=records.uuid)))
                assert first.keys() == {field.uuid for field in records.fields}
        texts = mlcroissant.Dataset(jsonld=str(out / "llm-filter.croissant.json"))
        ids = [r["train/id"].decode() for r in itertools.islice(texts.records(record_set="train"), 3)]
    finally:
        logging.disable(logging.NOTSET)
    with (root / "data/llm/filter/train.jsonl").open() as lines:
        assert ids == [json.loads(line)["id"] for line in itertools.islice(lines, 3)]


def test_a_description_names_every_file_with_its_digest_and_the_filter_rules(root: Path) -> None:
    described = json.loads(export(root, "croissant", FILTERED))
    files = {f["name"]: f for f in described["distribution"]}
    assert {name: f["sha256"] for name, f in files.items()} == {
        name: file_digest(root / FILTERED / name) for name in ("dataset.hdf5", "rows.parquet", "decisions.parquet")
    }
    assert files["dataset.hdf5"]["encodingFormat"] == "application/x-hdf5"
    assert files["dataset.hdf5"]["contentUrl"] == f"{FILTERED}/dataset.hdf5"
    assert {r["@id"] for r in described["recordSet"]} == {"rows", "decisions"}
    parents = next(f for r in described["recordSet"] for f in r["field"] if f["@id"] == "rows/parents")
    assert parents["isArray"] is True
    assert (
        f"rl-filter@{TASK}: outlier: 6 rows kept, 2 not kept, 0 replaced" in described["rai:dataPreprocessingProtocol"]
    )
    published = json.loads(export(root, "croissant", FILTERED, url="https://example.org/d/"))
    assert published["distribution"][0]["contentUrl"].startswith(f"https://example.org/d/{FILTERED}/")


@pytest.mark.fault
def test_a_file_that_is_not_what_its_receipt_says_is_not_described(root: Path) -> None:
    (root / FILTERED / "dataset.hdf5").write_text("swapped")
    with pytest.raises(BadInput, match=r"dataset\.hdf5: is not what its receipt says"):
        export(root, "croissant", FILTERED)
    (root / FILTERED / "dataset.hdf5").unlink()
    with pytest.raises(BadInput, match=rf"dvc checkout {FILTERED}"):
        export(root, "croissant", FILTERED)


# -- cards ----------------------------------------------------------------------------------------


def _front(card: str) -> dict[str, Any]:
    return dict(yaml.safe_load(card.split("---\n")[1]))


def test_a_data_card_says_what_the_receipts_say(root: Path) -> None:
    from huggingface_hub import DatasetCard

    card = export(root, "data-card", FILTERED)
    assert DatasetCard(card).data.to_dict()["task_categories"] == ["reinforcement-learning"]
    digest = file_digest(root / FILTERED / "dataset.hdf5")
    for part in (
        f"# {TASK}/filtered",
        f"| `{FILTERED}/dataset.hdf5` | 6 | `{digest}` |",
        "| `outlier` | 6 | 2 | 0 | 165 |",
        "| `inpaint` | 1 | 0 | 1 | 50 |",
        f"| `rl-collect@{TASK}` | `{REVISION[:12]}` |",
        "outlier: 100.0",
        "| passed | 2 | none | 0 |",
        f"data/rl/experts/{TASK}/p0",
        f"| `{MODEL}` |",
        "| `cost_return` | 6 | 12.5 |",
        "No licence is recorded",
        f"springhead lineage {digest[:12]}",
    ):
        assert part in card
    assert "license" not in _front(card)


def test_a_card_of_texts_names_the_files_of_each_split(root: Path) -> None:
    card = export(root, "data-card", "llm-filter")
    assert _front(card)["configs"] == [
        {"config_name": "default", "data_files": [{"split": "train", "path": "train.jsonl"}]}
    ]
    assert "passed with warnings" in card
    assert "ExpectEnoughRows" in card


def test_a_model_card_has_its_evaluation_with_seeds_and_spread(root: Path) -> None:
    from huggingface_hub import ModelCard

    card = export(root, "model-card", MODEL)
    results = ModelCard(card).data.eval_results
    figure = {(r.dataset_name, r.metric_type): r.metric_value for r in results}
    assert figure[f"{TASK}, cost limit 20", "normalised_return"] == 0.618
    for part in (
        "A policy: algorithm cdt, seed 0, task BallCircle.",
        "not promoted",
        "| **this model** | 1 | 0.618 | 0.88 |",
        "| cdt | 2 | 0.6185 ± 0.00071 | 0.8805 ± 0.00071 |",  # seeds 0 and 1 differ by 0.001
        "| bc-safe | 2 |",
        f"| `{FILTERED}/dataset.hdf5` | 6 |",
        "simulation only",
        "No licence is recorded for this model itself.",
    ):
        assert part in card


def test_a_promoted_model_is_named_and_is_the_default(root: Path) -> None:
    with pytest.raises(BadInput, match="no model of this checkout was promoted"):
        export(root, "model-card")
    digest = next(m["sha256"] for r in read_receipts(root).values() for m in r["models"] if m["path"] == MODEL)
    body = {"model": f"policy-{TASK}", "version": "3", "digest": digest, "signature": "5" * 64, "previous": None}
    Ledger(root / ".springhead").append("promotion", body)
    card = export(root, "model-card")
    assert f"# policy-{TASK}/3" in card
    assert f"springhead lineage models:/policy-{TASK}/3" in card


def test_the_licence_of_a_base_model_comes_from_the_catalogue_of_sources(root: Path) -> None:
    path = "data/llm/finetune/small-llama/mend/0/model"
    assert "license" not in _front(export(root, "model-card", path))
    entry = {"file": "x.gguf", "licence": "Apache-2.0", "sha256": "a" * 64}
    packages = {"small-llama-base": {**entry, "package": "numpy==2.4.6"}, "other": {**entry, "package": "numpy==2.4.6"}}
    (root / "data/sources.yaml").write_text(yaml.safe_dump({"packages": packages, "files": {}}))
    card = export(root, "model-card", path)
    assert _front(card)["license"] == "apache-2.0"
    assert "The base model is under Apache-2.0 (`data/sources.yaml`, small-llama-base)." in card
    packages["small-llama-base"]["package"] = "numpy==1.0"  # not the version that the receipt names
    (root / "data/sources.yaml").write_text(yaml.safe_dump({"packages": packages, "files": {}}))
    assert "license" not in _front(export(root, "model-card", path))


@pytest.mark.fault
def test_no_card_is_made_of_a_history_that_is_not_the_things_own(root: Path) -> None:
    path = receipt_path(root, f"rl-filter@{TASK}")
    receipt = read_json(path)
    receipt["outputs"][FILTERED]["sha256"] = "0" * 64
    write_json(path, receipt)
    with pytest.raises(
        Finding, match=rf"rl-train@{TASK}-cdt-0 read another {FILTERED}|rl-validate@{TASK} read another"
    ):
        export(root, "model-card", MODEL)
    assert "# BallCircle/collected" in export(root, "data-card", f"rl-collect@{TASK}")


def test_figures_of_another_model_are_not_this_models(root: Path) -> None:
    summary = root / f"data/rl/evaluate/{TASK}/summary.json"
    summary.write_text(summary.read_text().replace("0.618", "0.999"))  # not what the receipt says
    assert "It was not evaluated." in export(root, "model-card", MODEL)


# -- where documents go ---------------------------------------------------------------------------


def test_documents_go_to_a_file_a_folder_or_the_terminal(
    root: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(root)
    assert cli.main(["export", "data-card", FILTERED, "--out", str(tmp_path / "a/card.md")]) == 0
    printed = capsys.readouterr().out
    assert printed == f"{tmp_path}/a/card.md\n"
    assert cli.main(["export", "data-card", FILTERED]) == 0
    assert capsys.readouterr().out == (tmp_path / "a/card.md").read_text() + "\n"
    assert cli.main(["export", "data-card", "--out", str(tmp_path / "all")]) == 0
    assert {p.name for p in (tmp_path / "all").iterdir()} == {
        f"rl-collect@{TASK}.md", f"rl-filter@{TASK}.md", "llm-problems.md", "llm-filter.md"
    }  # fmt: skip
    assert cli.main(["export", "openlineage", "--out", str(tmp_path / "events.jsonl")]) == 0
    assert len((tmp_path / "events.jsonl").read_text().splitlines()) == 2 * len(read_receipts(root))


def test_wrong_arguments_and_places_are_errors(root: Path, tmp_path: Path) -> None:
    before = sorted((root / "data").rglob("*"))
    for arguments, message in (
        (("pdf",), "no such format"),
        (("croissant",), "these are 4 documents"),
        (("model-card", FILTERED), "means no model"),
        (("data-card", f"rl-validate@{TASK}"), "no data set; stages that make some"),
        (("data-card", "../../etc"), "not known here"),
        (("data-card", "ffffffffffff"), "no data set or model"),
    ):
        with pytest.raises(BadInput, match=message):
            export(root, *arguments)
    with pytest.raises(BadInput, match="--url is for"):
        export(root, "data-card", FILTERED, url="http://x")
    with pytest.raises(BadInput, match="lies in what rl-filter"):
        export(root, "data-card", FILTERED, out=root / FILTERED / "README.md")
    (tmp_path / "file").write_text("")
    with pytest.raises(BadInput, match="cannot be written"):
        export(root, "data-card", FILTERED, out=tmp_path / "file" / "x.md")
    assert sorted((root / "data").rglob("*")) == before


def test_a_hostile_name_stays_one_file_name_and_one_cell(root: Path, tmp_path: Path) -> None:
    path = receipt_path(root, f"rl-filter@{TASK}")
    receipt = read_json(path)
    receipt["datasets"][0]["name"] = "../../x|y\n# title --- ünï" + "z" * 400
    write_json(path, receipt)
    written = Path(export(root, "data-card", FILTERED, out=tmp_path / "out.md"))
    assert written.parent == tmp_path
    assert not [line for line in written.read_text().splitlines() if line.startswith("# title")]
    assert _front(written.read_text())["pretty_name"] == receipt["datasets"][0]["name"]
    described = json.loads(export(root, "croissant", FILTERED))
    assert "/" not in described["name"]


def test_the_help_does_not_load_what_it_does_not_need() -> None:
    code = "import sys; from springhead import cli; cli.main(['export', '--help']); "
    code += "print([m for m in ('openlineage', 'duckdb', 'pyarrow', 'mlcroissant') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.rstrip().endswith("[]")
    assert "croissant" in done.stdout
