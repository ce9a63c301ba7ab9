"""OpenLineage events of the executions in the ledger: https://openlineage.io, specification 2-0-2.

Each execution is a run of the job that its stage is, with a START and a COMPLETE event; a failure
ends with FAIL. The inputs and outputs come from the receipt, which is looked up by the digest in
the ledger, in the workspace or in the commits that changed ``dvc.lock``. Ids follow from the
ledger, so the same history gives the same events, and sending them twice does no harm.
"""

import json
import os
import re
import subprocess
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import attr
import pyarrow.parquet as pq
from openlineage.client.event_v2 import (
    InputDataset,
    Job,
    OutputDataset,
    Run,
    RunEvent,
    RunState,
)
from openlineage.client.facet_v2 import (
    RunFacet,
    column_lineage_dataset,
    data_quality_assertions_dataset,
    dataset_type_dataset,
    dataset_version_dataset,
    documentation_job,
    error_message_run,
    execution_parameters_run,
    input_statistics_input_dataset,
    job_type_job,
    output_statistics_output_dataset,
    parent_run,
    processing_engine_run,
    schema_dataset,
    source_code_job,
    source_code_location_job,
)
from openlineage.client.serde import Serde

import springhead
from springhead.errors import BadInput
from springhead.git import clean_environment
from springhead.home import home as state_folder
from springhead.jsonio import read_json
from springhead.lineage import query
from springhead.lineage.digests import file_digest
from springhead.lineage.graph import Graph, branch_of, role_of, step_of
from springhead.lineage.history import State, receipts_by_digest
from springhead.lineage.ledger import Ledger
from springhead.lineage.rows import DECISIONS, ROWS

NAMESPACE = "springhead"
"""Of jobs and data sets, unless ``OPENLINEAGE_NAMESPACE`` names another."""
PARENT = "springhead"
"""The job that a flow run is a run of: the name of the Prefect flow."""
FACET = "springhead_execution"
SCHEMA = Path(__file__).parent / "ExecutionRunFacet.json"
_IDS = uuid.uuid5(uuid.NAMESPACE_URL, "urn:springhead:execution")
_PATIENCE = 10.0  # seconds for one event
_ATTEMPTS = 5
_RETRY: dict[str, Any] = {
    "total": _ATTEMPTS - 1,
    "backoff_factor": 0.5,  # waits 0.5, 1, 2 and 4 seconds
    "status_forcelist": [429, 500, 502, 503, 504],
    "allowed_methods": ["POST"],
    "raise_on_status": False,
}


@attr.define
class ExecutionRunFacet(RunFacet):
    """What the ledger says of an execution beyond what the standard facets hold."""

    execution: str
    attempt: int
    inputs: str
    """Digest of everything that went in: parameters and dependencies."""
    revision: str
    dirty: bool | None
    """None, and then absent, where git failed."""
    seconds: float
    receipt: str | None = None
    cpuSeconds: float | None = None
    energyJoules: dict[str, float] | None = None
    codeDigest: str | None = None
    locks: dict[str, str] | None = None

    @staticmethod
    def _get_schema() -> str:
        return "urn:springhead:openlineage:1-0-0:ExecutionRunFacet.json#/$defs/ExecutionRunFacet"


def run_id(execution: str) -> str:
    """Returns the run id of an execution, a UUID that follows from the ledger's id of it."""
    return str(uuid.uuid5(_IDS, execution))


def events(root: Path, ref: str | None = None) -> list[dict[str, Any]]:
    """Returns the events of all executions in the ledger, or of those behind a reference, oldest first.

    Args:
        root: the repository root.
        ref: a model, data set, stage or digest, as `springhead lineage` takes it.

    Raises:
        BadInput: if the reference is unknown, or nothing has been executed here.
    """
    entries = [e for e in Ledger(state_folder(root)).entries() if e["kind"] in ("execution", "failure")]
    if ref is not None:
        wanted = _behind(root, ref)
        entries = [e for e in entries if e["body"]["stage"] in wanted]
    if not entries:
        raise BadInput(f"{ref or root}: no execution of it is in the ledger of this machine; run `springhead run`")
    return [Serde.to_dict(event) for event in _Exporter(root, entries).events()]


def _behind(root: Path, ref: str) -> set[str]:
    """Returns the stages behind a reference and those that judge it."""
    graph = Graph.read(root)
    subject = query.find(root, graph, ref)
    if subject.kind == "row":
        raise BadInput(f"{ref}: no model, data set or stage here has this digest; events are about those")
    starts = [subject.name] if subject.kind == "stage" else list(graph.makers(subject.name))
    stages = {stage for start in starts for stage in graph.upstream(start)}
    judges = {
        k.stage for k in graph.links if role_of(k.stage) in ("validate", "evaluate") and set(k.makers) & set(starts)
    }
    return stages | judges


class _Exporter:
    """Makes the events of ledger entries."""

    def __init__(self, root: Path, entries: Sequence[dict[str, Any]]) -> None:
        self.root, self.entries = root, entries
        self.namespace = os.environ.get("OPENLINEAGE_NAMESPACE") or NAMESPACE
        self.producer = f"urn:springhead:{springhead.__version__}"
        digests = {str(e["body"]["receipt"]) for e in entries if e["kind"] == "execution"}
        self.receipts = receipts_by_digest(root, digests)

    def events(self) -> Iterator[RunEvent]:
        for entry in self.entries:
            body = entry["body"]
            state, stage = self.receipts.get(str(body.get("receipt")), (None, ""))
            receipt = state.graph.receipts[stage] if state is not None else None
            run = Run(run_id(str(body["execution"])), self._run_facets(body, receipt))
            job = Job(self.namespace, str(body["stage"]), self._job_facets(body, receipt))
            inputs = self._inputs(state, receipt) if state is not None and receipt is not None else []
            outputs = self._outputs(state, body, receipt)
            yield self._event(RunState.START, body["started"], run, job, inputs, [])
            if entry["kind"] == "execution":
                yield self._event(RunState.COMPLETE, entry["time"], run, job, inputs, outputs)
            else:
                error = error_message_run.ErrorMessageRunFacet(str(body["error"]), "PYTHON", producer=self.producer)
                failed = Run(run.runId, {**(run.facets or {}), "errorMessage": error})
                yield self._event(RunState.FAIL, entry["time"], failed, job, [], [])

    def _event(
        self,
        kind: RunState,
        time: str,
        run: Run,
        job: Job,
        inputs: list[InputDataset],
        outputs: list[OutputDataset],
    ) -> RunEvent:
        return RunEvent(
            eventTime=time, producer=self.producer, eventType=kind, run=run, job=job, inputs=inputs, outputs=outputs
        )

    # -- run and job ------------------------------------------------------------------------------

    def _run_facets(self, body: Mapping[str, Any], receipt: Mapping[str, Any] | None) -> dict[str, RunFacet]:
        git = body.get("git", {})
        facets: dict[str, RunFacet] = {
            FACET: ExecutionRunFacet(
                execution=str(body["execution"]),
                attempt=int(body["attempt"]),
                inputs=str(body["inputs"]),
                revision=str(git.get("revision", "")),
                dirty=git.get("dirty", False),
                seconds=float(body["seconds"]),
                receipt=body.get("receipt"),
                cpuSeconds=body.get("cpu_seconds"),
                energyJoules=body.get("energy"),
                codeDigest=receipt["code"]["digest"] if receipt else None,
                locks=dict(receipt["environment"]["lock"]) if receipt else None,
                producer=self.producer,
            ),
            "processing_engine": processing_engine_run.ProcessingEngineRunFacet(
                version=str(body["python"]), name="python", openlineageAdapterVersion=springhead.__version__,
                producer=self.producer,
            ),
        }  # fmt: skip
        if _is_uuid(str(body.get("flow_run", ""))):
            facets["parent"] = parent_run.ParentRunFacet(
                parent_run.Run(str(body["flow_run"])), parent_run.Job(self.namespace, PARENT), producer=self.producer
            )
        if receipt is not None:
            parameters = [
                execution_parameters_run.ExecutionParameter(key=key, name=key, value=json.dumps(value, sort_keys=True))
                for key, value in sorted(receipt["params"].items())
            ]
            facets["executionParameters"] = execution_parameters_run.ExecutionParametersRunFacet(
                parameters, producer=self.producer
            )
        return facets

    def _job_facets(self, body: Mapping[str, Any], receipt: Mapping[str, Any] | None) -> dict[str, Any]:
        stage = str(body["stage"])
        facets: dict[str, Any] = {
            "jobType": job_type_job.JobTypeJobFacet("BATCH", "SPRINGHEAD", "TASK", producer=self.producer)
        }
        if described := self._descriptions.get(stage.partition("@")[0]):
            facets["documentation"] = documentation_job.DocumentationJobFacet(described, producer=self.producer)
        path, revision = f"stages/{branch_of(stage)}/{step_of(stage)}.py", str(body.get("git", {}).get("revision", ""))
        if self._remote and revision:
            facets["sourceCodeLocation"] = source_code_location_job.SourceCodeLocationJobFacet(
                "git", self._remote, repoUrl=self._remote, path=path, version=revision, producer=self.producer
            )
        script = self.root / path
        if receipt and script.is_file() and file_digest(script) == receipt["code"]["files"].get(path):
            text = script.read_text(encoding="utf-8")
            facets["sourceCode"] = source_code_job.SourceCodeJobFacet("python", text, producer=self.producer)
        return facets

    @cached_property
    def _descriptions(self) -> dict[str, str]:
        """Returns the ``desc`` of each stage of ``dvc.yaml``, without its item."""
        import yaml

        path = self.root / "dvc.yaml"
        stages = (yaml.safe_load(path.read_text(encoding="utf-8")) or {}).get("stages") or {}
        found = {name: (block.get("do") or block).get("desc") for name, block in stages.items()}
        return {name: str(text) for name, text in found.items() if text}

    @cached_property
    def _remote(self) -> str:
        """Returns the address of the remote ``origin`` as a URI without a password, or nothing."""
        command = ["git", "config", "--get", "remote.origin.url"]
        done = subprocess.run(command, cwd=self.root, env=clean_environment(), capture_output=True, text=True)
        url = done.stdout.strip()
        if match := re.fullmatch(r"([\w.-]+@)?([\w.-]+):(?!//)(.+)", url):
            url = f"ssh://{match[1] or ''}{match[2]}/{match[3]}"
        return re.sub(r"^(https?://)[^/@]*@", r"\1", url) if re.match(r"[a-z+]+://", url) else ""

    # -- data sets --------------------------------------------------------------------------------

    def _inputs(self, state: State, receipt: Mapping[str, Any]) -> list[InputDataset]:
        """Returns what a stage read, as the outputs that its makers wrote, so that the graph is one."""
        graph, stage = state.graph, str(receipt["stage"])
        verdict = self._verdict(state, receipt)
        found: dict[str, InputDataset] = {}
        for link in graph.links:
            if link.stage != stage:
                continue
            parts = [(o, m) for m in link.makers for o in graph.receipts[m]["outputs"] if _touches(o, link.path)]
            if not parts or not link.verified:
                found[link.path] = InputDataset(
                    self.namespace, link.path, facets={"version": self._version(link.sha256)}
                )
                continue
            for out, maker in parts:
                facts = graph.receipts[maker]["outputs"][out]
                facets = self._data_facets(state, graph.receipts[maker], out, facts)
                judged = verdict is not None and verdict["data_digest"] in (facts["sha256"], link.sha256)
                extra = {"dataQualityAssertions": self._assertions(verdict)} if judged and verdict else {}
                statistics = input_statistics_input_dataset.InputStatisticsInputDatasetFacet(
                    rowCount=_rows(graph.receipts[maker], out), size=int(facts["bytes"]),
                    fileCount=_count(facts), producer=self.producer,
                )  # fmt: skip
                found[out] = InputDataset(self.namespace, out, {"inputStatistics": statistics, **extra}, facets=facets)
        return [found[name] for name in sorted(found)]

    def _outputs(
        self, state: State | None, body: Mapping[str, Any], receipt: Mapping[str, Any] | None
    ) -> list[OutputDataset]:
        found = []
        for out, digest in sorted(body.get("outputs", {}).items()):
            if state is None or receipt is None:
                facets: dict[str, Any] = {"version": self._version(str(digest))}
                found.append(OutputDataset(self.namespace, out, facets=facets))
                continue
            facts = receipt["outputs"][out]
            facets = self._data_facets(state, receipt, out, facts)
            if lineage := self._column_lineage(state, receipt, out):
                facets["columnLineage"] = lineage
            statistics = output_statistics_output_dataset.OutputStatisticsOutputDatasetFacet(
                rowCount=_rows(receipt, out), size=int(facts["bytes"]), fileCount=_count(facts),
                producer=self.producer,
            )  # fmt: skip
            found.append(OutputDataset(self.namespace, out, {"outputStatistics": statistics}, facets=facets))
        return found

    def _version(self, digest: str) -> dataset_version_dataset.DatasetVersionDatasetFacet:
        return dataset_version_dataset.DatasetVersionDatasetFacet(digest, producer=self.producer)

    def _data_facets(
        self, state: State, receipt: Mapping[str, Any], out: str, facts: Mapping[str, Any]
    ) -> dict[str, Any]:
        facets: dict[str, Any] = {"version": self._version(str(facts["sha256"]))}
        models = [m for m in receipt["models"] if m["path"] == out or m["path"].startswith(f"{out}/")]
        kind, detail = ("MODEL", models[0]["kind"]) if models else ("FILE", None)
        facets["datasetType"] = dataset_type_dataset.DatasetTypeDatasetFacet(kind, detail, producer=self.producer)
        if ROWS in facts.get("files", {}) and (columns := self._columns(state, f"{out}/{ROWS}")):
            fields = [
                schema_dataset.SchemaDatasetFacetFields(name=name, type=kind, ordinal_position=number)
                for number, (name, kind) in enumerate(columns.items(), start=1)
            ]
            facets["schema"] = schema_dataset.SchemaDatasetFacet(fields, producer=self.producer)
        return facets

    def _columns(self, state: State, table: str) -> dict[str, str]:
        """Returns the columns of a row table with their types; empty if it is not here."""
        try:
            schema = pq.read_schema(state.file(table))
        except (BadInput, OSError, ValueError):
            return {}
        return {field.name: str(field.type) for field in schema}

    def _column_lineage(self, state: State, receipt: Mapping[str, Any], out: str) -> Any:
        """Returns from which columns those of a filter's row table come: the same rows, fewer of them.

        Other stages make new rows, whose columns are not taken from columns of what they read.
        """
        files = receipt["outputs"][out].get("files", {})
        if DECISIONS not in files or ROWS not in files:
            return None
        sources = [
            (o, self._columns(state, f"{o}/{ROWS}"))
            for link in state.graph.links
            if link.stage == receipt["stage"] and link.verified
            for maker in link.makers
            for o in state.graph.receipts[maker]["outputs"]
            if _touches(o, link.path)
        ]
        columns = self._columns(state, f"{out}/{ROWS}")
        sources = [(o, there) for o, there in sources if there and step_of(receipt["stage"]) not in o.split("/")]
        # The filter of texts also reads the problems; its rows are those of what comes last before it.
        latest = max(sources, key=lambda s: state.graph.depth.get(state.graph.maker(s[0]) or "", 0), default=None)
        if latest is None or not columns:
            return None
        source, there = latest
        changed = self._changes_rows(state, f"{out}/{DECISIONS}")
        fields = {}
        for name in (c for c in columns if c in there):
            direct = name != "index" and not changed
            step = column_lineage_dataset.Transformation("DIRECT", "IDENTITY" if direct else "TRANSFORMATION")
            field = column_lineage_dataset.InputField(self.namespace, source, name, [step])
            fields[name] = column_lineage_dataset.Fields([field])
        drop = column_lineage_dataset.Transformation("INDIRECT", "FILTER", "rows that a rule of the stage dropped")
        whole = [column_lineage_dataset.InputField(self.namespace, source, "id", [drop])]
        return column_lineage_dataset.ColumnLineageDatasetFacet(fields, whole, producer=self.producer)

    def _changes_rows(self, state: State, table: str) -> bool:
        """Whether a rule put another row in the place of one. Then no column is surely the same."""
        try:
            column = pq.read_table(state.file(table), columns=["replaced_by"])["replaced_by"]
        except (BadInput, OSError, ValueError, KeyError):
            return True
        return bool(column.null_count < len(column))

    def _verdict(self, state: State, receipt: Mapping[str, Any]) -> dict[str, Any] | None:
        for out, facts in receipt["outputs"].items():
            if role_of(str(receipt["stage"])) == "validate" and "verdict.json" in facts.get("files", {}):
                try:
                    return dict(read_json(state.file(f"{out}/verdict.json")))
                except BadInput:
                    return None
        return None

    def _assertions(self, verdict: Mapping[str, Any]) -> Any:
        assertions = [
            data_quality_assertions_dataset.Assertion(
                assertion=str(e["name"]),
                success=bool(e["success"]),
                column=str(e["column"]) or None,
                severity="error" if e["severity"] == "critical" else "warn",
                name=f"{verdict['suite']}.{e['frame']}.{e['name']}" + (f".{e['column']}" if e["column"] else ""),
                description=str(e["description"]),
                actual=json.dumps(e["observed"], sort_keys=True),
            )
            for e in verdict["expectations"]
        ]
        return data_quality_assertions_dataset.DataQualityAssertionsDatasetFacet(assertions, producer=self.producer)


def _is_uuid(text: str) -> bool:
    try:
        uuid.UUID(text)
    except ValueError:
        return False
    return True


def _touches(output: str, path: str) -> bool:
    return output == path or path.startswith(f"{output}/") or output.startswith(f"{path}/")


def _count(facts: Mapping[str, Any]) -> int:
    return len(facts["files"]) if "files" in facts else 1


def _rows(receipt: Mapping[str, Any], out: str) -> int | None:
    """Returns the rows of the data sets in an output, or None if its receipt names none."""
    rows = [d["rows"] for d in receipt["datasets"] if d["role"] == "output" and _touches(out, d["path"])]
    return sum(rows) if rows else None


# -- where they go --------------------------------------------------------------------------------


def send(made: Iterable[Mapping[str, Any]], url: str) -> int:
    """Posts events to an endpoint, each up to five times, and returns how many there were.

    Args:
        made: the events.
        url: a server such as ``http://localhost:5000``, which gets ``/api/v1/lineage`` added as
            Marquez has it; an address with a path is taken as it is. ``OPENLINEAGE_API_KEY`` is
            sent as a bearer token.

    Raises:
        BadInput: if the address is wrong, the server cannot be reached or it refuses an event.
    """
    import requests
    from openlineage.client.transport.http import ApiKeyTokenProvider, HttpConfig, HttpTransport, TokenProvider

    match = re.fullmatch(r"(https?://[^/?#\s]+)(/\S*)?", url)
    if match is None:
        raise BadInput(f"--url {url}: expected an address such as http://localhost:5000")
    path = (match[2] or "").strip("/") or "api/v1/lineage"
    shown = re.sub(r"//[^/@]*@", "//", f"{match[1]}/{path}")
    key = os.environ.get("OPENLINEAGE_API_KEY")
    auth = ApiKeyTokenProvider({"api_key": key}) if key else TokenProvider({})
    config = HttpConfig(url=match[1], endpoint=f"/{path}", timeout=_PATIENCE, auth=auth, retry=_RETRY)
    try:
        transport = HttpTransport(config)
    except ValueError as error:
        raise BadInput(f"--url {url}: no address ({error}); expected one such as http://localhost:5000") from error
    sent = 0
    try:
        for event in made:
            transport.emit(dict(event))  # type: ignore[arg-type]  # it serialises mappings as well
            sent += 1
    except requests.HTTPError as error:
        answer = error.response
        assert answer is not None
        said = answer.text.strip()[:300] or "no reason given"
        raise BadInput(f"{shown}: refused event {sent + 1} with status {answer.status_code}: {said}") from None
    except requests.RequestException as error:
        raise BadInput(
            f"{shown}: no answer after {_ATTEMPTS} attempts, {sent} events were taken "
            f"({type(error).__name__}); start the server and export again, which repeats nothing"
        ) from None
    finally:
        transport.close()
    return sent
