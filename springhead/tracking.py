"""Replays what executions recorded (:mod:`springhead.spool`) into MLflow, each exactly once.

MLflow gets one run per stage execution, in the experiment of its branch, nested under one run
per pipeline run. A stage that DVC restored from its cache has no execution and so no run: its
models are found by their digest at the run that made them.

Every step looks for what is there before it adds something, so a replay that was killed or lost
its server at any point is simply done again. Nothing here is a source of truth: with an empty
MLflow store, moving ``spool/replayed`` back to ``spool`` rebuilds it.
"""

import contextlib
import fcntl
import logging
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from springhead import spool
from springhead.errors import BadInput, SpringheadError
from springhead.jsonio import canonical
from springhead.lineage.ledger import Ledger
from springhead.spool import Recording

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

EXECUTION, PIPELINE = "springhead.execution", "springhead.pipeline"
_PARAM_LENGTH = 500  # characters; more is cut, the receipt has the whole value
_DIGEST_LENGTH = 36  # what MLflow's data set table takes of our 64; a tag has all of it
_BATCH = 900  # MLflow takes 1000 metrics in one request
_PARAM_BATCH = 100

# Telemetry off; no pickled model is ever loaded; an unreachable server is given up on in seconds
# instead of MLflow's minutes, because the spool keeps everything for the next replay.
_SETTINGS = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "DO_NOT_TRACK": "1",
    "MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "false",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "20",
}


def uri(home: Path) -> str:
    """Returns where MLflow's store is: ``$MLFLOW_TRACKING_URI``, else SQLite in the state folder."""
    return os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{home.resolve()}/mlflow.db"


def connect(home: Path) -> "MlflowClient":
    """Returns a client for the store of a state folder.

    Raises:
        BadInput: if MLflow cannot be reached.
    """
    for key, value in _SETTINGS.items():
        os.environ.setdefault(key, value)
    for name in ("alembic", "mlflow.store.db.utils", "mlflow.pyfunc"):  # their progress is no news to the user
        logging.getLogger(name).setLevel(logging.WARNING)
    import mlflow

    store = uri(home)
    # The registry resolves `models:/` through the global setting, so it must agree with the client.
    # The setters also write the variables that are the user's way to choose; that must stay as it was.
    chosen = {name: os.environ.get(name) for name in ("MLFLOW_TRACKING_URI", "MLFLOW_REGISTRY_URI")}
    mlflow.set_tracking_uri(store)
    mlflow.set_registry_uri(store)
    for variable, before in chosen.items():
        if before is None:
            os.environ.pop(variable, None)
    try:
        client = mlflow.MlflowClient(store, store)
        client.search_experiments(max_results=1)
    except Exception as error:  # MLflow lets errors of its database and HTTP libraries through
        raise BadInput(f"MLflow at {store} cannot be reached ({_brief(error)}); start it and try again") from error
    return client


def experiment(client: "MlflowClient", home: Path, branch: str) -> str:
    """Returns the id of the experiment ``springhead-<branch>``, made on first use."""
    from mlflow.exceptions import MlflowException

    name = f"springhead-{branch}"
    found = client.get_experiment_by_name(name)
    if found is None:
        # With a server, the server decides where artifacts go; without, they go beside the database.
        local = uri(home).startswith("sqlite:")
        place = f"{home.resolve().as_uri()}/mlartifacts/{name}" if local else None
        try:
            return str(client.create_experiment(name, artifact_location=place))
        except MlflowException:
            found = client.get_experiment_by_name(name)  # another process was faster
            if found is None:
                raise
    return str(found.experiment_id)


@dataclass
class ReplayReport:
    """What a replay did.

    Attributes:
        replayed: ids of the executions that are now in MLflow.
        waiting: how many recordings are still to be replayed.
        problems: one line per recording that could not be replayed, or per outage.
    """

    replayed: list[str] = field(default_factory=list)
    waiting: int = 0
    problems: list[str] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """Whether everything there was to replay is in MLflow."""
        return not self.problems and self.waiting == 0


def replay(home: Path) -> ReplayReport:
    """Pushes every finished or killed recording into MLflow; never raises for an outage or a full disk.

    Args:
        home: the state folder.
    """
    report = ReplayReport()
    try:
        if spool.waiting(home):
            _replay(home, report)
    except OSError as error:
        report.problems.append(f"{spool.folder(home)}: {_brief(error)}")
    return report


def _replay(home: Path, report: ReplayReport) -> None:
    with _only_one(home):
        pending = spool.waiting(home)
        try:
            client = connect(home)
            receipts = _ledger_facts(home)
        except Exception as error:  # tracking must never take the work down with it
            report.problems.append(_brief(error))
            pending, report.waiting = [], len(pending)
        for number, path in enumerate(pending):
            try:
                recording = spool.read(path)
                _push(client, home, recording, receipts.get(recording.execution, {}))
                _put_away(path)
                report.replayed.append(recording.execution)
            except Exception as error:
                report.problems.append(f"{path.name}: {_brief(error)}")
                report.waiting += 1
                if not isinstance(error, SpringheadError) and not _reachable(home):
                    report.waiting += len(pending) - number - 1
                    break


def _brief(error: Exception) -> str:
    """Returns the first line of an error, cut to what fits on a screen line or two."""
    return (str(error).splitlines() or [type(error).__name__])[0][:300]


def _reachable(home: Path) -> bool:
    with contextlib.suppress(Exception):
        connect(home)
        return True
    return False


@contextlib.contextmanager
def _only_one(home: Path) -> Iterator[None]:
    with (spool.folder(home) / "replay.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _put_away(path: Path) -> None:
    done = path.parent / "replayed"
    done.mkdir(exist_ok=True)
    os.replace(path, done / path.name.removesuffix(".part"))


def _ledger_facts(home: Path) -> dict[str, dict[str, Any]]:
    """Returns the ledger's facts about each execution by its id."""
    try:
        entries = Ledger(home).entries()
    except SpringheadError:  # `springhead audit` reports a damaged ledger; the runs do not wait for it
        return {}
    bodies = (entry["body"] for entry in entries if entry["kind"] in ("execution", "failure"))
    return {str(body.get("execution")): body for body in bodies}


# -- one execution --------------------------------------------------------------------------------


def has_store(home: Path) -> bool:
    """Whether there is a store to ask; asking SQLite for one would take seconds to make it."""
    store = uri(home)
    return not store.startswith("sqlite:///") or Path(store.removeprefix("sqlite:///")).is_file()


def recorded(home: Path) -> dict[str, dict[str, str]]:
    """Returns what MLflow has of every execution: ``run``, ``stage``, ``status`` and ``receipt`` by execution.

    Raises:
        BadInput: if MLflow cannot be reached.
    """
    client = connect(home)
    places = [place.experiment_id for place in client.search_experiments()]
    found, token = {}, None
    while True:
        page = client.search_runs(places, f"tags.`{EXECUTION}` LIKE '%'", max_results=1000, page_token=token)
        for run in page:
            tags = run.data.tags
            found[tags[EXECUTION]] = {
                "run": run.info.run_id,
                "stage": tags.get("springhead.stage", ""),
                "status": run.info.status,
                "receipt": tags.get("springhead.receipt", ""),
            }
        token = page.token
        if not token:
            return found


def _push(client: "MlflowClient", home: Path, recording: Recording, ledger: Mapping[str, Any]) -> None:
    """Brings one execution into MLflow, or completes what an earlier replay began."""
    start = recording.of("start")[0]
    branch = str(start["stage"]).partition("-")[0]
    place = experiment(client, home, branch)
    parent = _parent(client, place, start)
    run = _run(client, place, recording, start, parent, ledger)
    if run.info.status == "RUNNING":
        run_id = run.info.run_id
        _log_params(client, run_id, start.get("params") or {})
        models = _log_models(client, place, run, recording, start)
        _log_metrics(client, run_id, recording, models)
        _log_datasets(client, run_id, recording)
        client.set_terminated(run_id, recording.status, _milliseconds(_last_time(recording)))
    if parent is not None:
        _close_parent(client, place, parent)


def _milliseconds(seconds: float) -> int:
    return round(seconds * 1000)


def _last_time(recording: Recording) -> float:
    return max(float(body["time"]) for _, body in recording.events if "time" in body)


def _run(
    client: "MlflowClient",
    place: str,
    recording: Recording,
    start: Mapping[str, Any],
    parent: str | None,
    ledger: Mapping[str, Any],
) -> "Run":
    """Finds the run of an execution, or makes it."""
    found = client.search_runs([place], f"tags.`{EXECUTION}` = '{recording.execution}'", max_results=1)
    if found:
        return found[0]
    tags = {f"springhead.{key}": str(value) for key, value in (start.get("tags") or {}).items() if value}
    tags |= {EXECUTION: recording.execution, "springhead.stage": str(start["stage"]), "mlflow.source.type": "JOB"}
    tags |= {"springhead.attempt": str(start.get("attempt", 1)), "springhead.host": str(start.get("host", ""))}
    tags["mlflow.source.name"] = str(start["stage"])
    if parent is not None:
        tags["mlflow.parentRunId"] = parent
    if ledger.get("receipt"):
        tags["springhead.receipt"] = str(ledger["receipt"])
    if ledger.get("git"):
        tags["mlflow.source.git.commit"] = str(ledger["git"].get("revision", ""))
        dirty = ledger["git"].get("dirty", "")
        tags["git.dirty"] = "unknown" if dirty is None else str(dirty).lower()
    return client.create_run(place, _milliseconds(float(start["time"])), tags, str(start["stage"]))


def _parent(client: "MlflowClient", place: str, start: Mapping[str, Any]) -> str | None:
    """Returns the run of the pipeline run that an execution belongs to, made on first use."""
    tags = start.get("tags") or {}
    flow = str(tags.get("parent_run") or tags.get("flow_run") or "")
    if not flow:
        return None
    found = client.search_runs([place], f"tags.`{PIPELINE}` = '{flow}'", max_results=1)
    if found:
        return str(found[0].info.run_id)
    run = client.create_run(place, _milliseconds(float(start["time"])), {PIPELINE: flow}, f"pipeline {flow[:8]}")
    return str(run.info.run_id)


def _close_parent(client: "MlflowClient", place: str, parent: str) -> None:
    """Gives a pipeline's run the time and outcome of its children, of which the last attempt counts."""
    children = client.search_runs([place], f"tags.`mlflow.parentRunId` = '{parent}'", order_by=["start_time ASC"])
    last = {child.data.tags.get("springhead.stage", ""): child.info for child in children}
    bad = [info.status for info in last.values() if info.status != "FINISHED"]
    ends = [info.end_time for info in last.values() if info.end_time]
    client.set_terminated(parent, bad[0] if bad else "FINISHED", max(ends, default=None))


# -- what a run holds -----------------------------------------------------------------------------


def flatten(values: Mapping[str, Any], joint: str, prefix: str = "") -> dict[str, Any]:
    """Returns a nested mapping as one level, the keys joined by ``joint``."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        name = f"{prefix}{joint}{key}" if prefix else str(key)
        if isinstance(value, Mapping):
            flat |= flatten(value, joint, name)
        else:
            flat[name] = value
    return flat


def _key(name: str) -> str:
    """Returns a name with only the characters that MLflow takes in keys."""
    return re.sub(r"[^\w\-. /]", "_", name)[:250]


def _log_params(client: "MlflowClient", run_id: str, params: Mapping[str, Any]) -> None:
    from mlflow.entities import Param

    flat = flatten(params, ".")
    texts = {k: v if isinstance(v, str) else canonical(v).decode() for k, v in flat.items()}
    entries = [Param(_key(k), v if len(v) <= _PARAM_LENGTH else v[: _PARAM_LENGTH - 1] + "…") for k, v in texts.items()]
    for begin in range(0, len(entries), _PARAM_BATCH):
        client.log_batch(run_id, params=entries[begin : begin + _PARAM_BATCH])


def _log_metrics(client: "MlflowClient", run_id: str, recording: Recording, models: Sequence[str]) -> None:
    """Logs curves and final metrics; a stage with one model has its final metrics on the model too."""
    from mlflow.entities import Metric, RunTag

    points: list[Metric] = []
    for body in recording.of("metric"):
        time = _milliseconds(float(body["time"]))
        points += [Metric(_key(k), float(v), time, int(body["step"])) for k, v in body["values"].items()]
    texts: list[RunTag] = []
    model = models[0] if len(models) == 1 else None
    for body in recording.of("metrics"):
        time = _milliseconds(float(body.get("time", recording.of("start")[0]["time"])))
        for key, value in flatten(body["values"], "/").items():
            if isinstance(value, int | float) or value in ("nan", "inf", "-inf"):
                points.append(Metric(f"final/{_key(key)}"[:250], float(value), time, 0, model_id=model))
            elif value is not None:
                text = value if isinstance(value, str) else canonical(value).decode()
                texts.append(RunTag(f"final.{_key(key)}"[:250], text[:5000]))
    for begin in range(0, len(points), _BATCH):
        client.log_batch(run_id, metrics=points[begin : begin + _BATCH])
    for begin in range(0, len(texts), _PARAM_BATCH):
        client.log_batch(run_id, tags=texts[begin : begin + _PARAM_BATCH])


def _log_datasets(client: "MlflowClient", run_id: str, recording: Recording) -> None:
    from mlflow.data.code_dataset_source import CodeDatasetSource
    from mlflow.data.meta_dataset import MetaDataset
    from mlflow.entities import DatasetInput, InputTag

    inputs = []
    for body in recording.of("dataset"):
        # The path is relative to the repository and DVC owns the bytes, so this is a reference.
        source = CodeDatasetSource(tags={"dvc.path": body["path"], "sha256": body["sha256"]})
        name, digest = str(body["name"])[:500], str(body["sha256"])[:_DIGEST_LENGTH]
        data = MetaDataset(source, name, digest)  # type: ignore[abstract]  # a fault in MLflow's own typing
        facts = {"mlflow.data.context": body["role"], "sha256": body["sha256"], "dvc.path": body["path"]}
        facts["rows"] = str(body["rows"])
        tags = [InputTag(key, str(value)[:500]) for key, value in facts.items()]
        inputs.append(DatasetInput(data._to_mlflow_entity(), tags))
    if inputs:
        client.log_inputs(run_id, inputs)


def _log_models(
    client: "MlflowClient", place: str, run: "Run", recording: Recording, start: Mapping[str, Any]
) -> list[str]:
    """Makes one logged model per model folder, which stays in DVC, and links it to its run."""
    from mlflow.entities import LoggedModelOutput

    linked = {output.model_id for output in (run.outputs.model_outputs if run.outputs else None) or []}
    made = []
    for body in recording.of("model"):
        query = f"tags.`{EXECUTION}` = '{recording.execution}' AND tags.`model.path` = '{body['path']}'"
        found = client.search_logged_models([place], query, max_results=1)
        if found:
            model = found[0]
        else:
            tags = {EXECUTION: recording.execution, "model.sha256": body["sha256"], "model.path": body["path"]}
            tags |= {"springhead.stage": str(start["stage"]), "mlflow.model.isExternal": "true"}
            facts = {_key(k): str(v)[:_PARAM_LENGTH] for k, v in flatten(body.get("facts") or {}, ".").items()}
            name = re.sub(r"[^\w\-]", "-", str(start["stage"]))
            model = client.create_logged_model(place, name, run.info.run_id, tags, facts, body["kind"])
        if str(model.status) != "READY":
            client.finalize_logged_model(model.model_id, "READY")
        if model.model_id not in linked:
            client.log_outputs(run.info.run_id, [LoggedModelOutput(model.model_id, 0)])
        made.append(str(model.model_id))
    return made
