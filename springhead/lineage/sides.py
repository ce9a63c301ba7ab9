"""Which data set a reference means, for comparing two of them: in the workspace, or at a revision."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from springhead.errors import BadInput
from springhead.home import home as state_folder
from springhead.lineage import query
from springhead.lineage.graph import Model, rows_method
from springhead.lineage.history import Commit, State, find_receipt
from springhead.lineage.rows import DECISIONS, ROWS


@dataclass(frozen=True)
class Side:
    """One of the two data sets."""

    name: str
    """``a`` or ``b``: also the name of its view in the database."""
    ref: str
    """What the user typed."""
    state: State
    path: str
    """The data set, relative to the repository root."""
    stage: str
    """The stage that made it."""
    table: str
    """Its row table, relative to the repository root."""
    conditions: Mapping[str, str]
    """Values of columns that choose the data set's rows in the table."""

    @property
    def decisions(self) -> str | None:
        """The table of the filter stage that made the data set, or None if none did."""
        path = f"{self.table.rpartition('/')[0]}/{DECISIONS}"
        return path if self.state.graph.digest(path) else None


def side(root: Path, name: str, ref: str) -> Side:
    """Finds the data set that a reference means.

    Known forms: ``REVISION:PATH``, and everything that ``springhead lineage`` takes. A model stands
    for the data it was trained on. A digest or registered version that the workspace does not have
    is looked up in the commits that changed ``dvc.lock``.

    Raises:
        BadInput: if nothing, or no data set with a row table, is meant, or its rows are not here.
    """
    if not ref.strip():
        raise BadInput("an empty reference; give REVISION:PATH, a path below data/, a digest or a model")
    revision, colon, path = ref.partition(":")
    if colon and revision not in ("models", "row") and not (root / ref).exists():
        state: State = Commit(root, revision)
        subject = _in_commit(state, path.strip("/"), ref)
    else:
        state, subject = _anywhere(root, ref)
    if subject.kind == "row":
        raise BadInput(f"{ref}: is a row; ask `springhead lineage {ref}`")
    return _rows_of(root, name, ref, state, subject)


def _in_commit(state: State, path: str, ref: str) -> query.Subject:
    assert isinstance(state, Commit)
    if not state.has(path):
        raise BadInput(
            f"{ref}: dvc.lock of {state.label} names nothing at '{path}'; `git show {ref.partition(':')[0]}:dvc.lock`"
        )
    models = [m for m in state.graph.models if m.path == path or m.path.startswith(path + "/")]
    if len(models) == 1:
        return query.Subject("model", models[0].path, models[0].sha256, models[0])
    return query.Subject("artefact", path, state.graph.digest(path) or "")


def _anywhere(root: Path, ref: str) -> tuple[State, query.Subject]:
    """Finds a reference in the workspace, or by its digest in the history."""
    here = State(root)
    try:
        subject = query.find(root, here.graph, ref)
        if subject.kind != "row" or ref.startswith("row:"):
            return here, subject
        digest = subject.name
    except BadInput:
        digest = _digest(root, ref)
        if not digest:
            raise
    found = find_receipt(root, digest)
    if found is None:
        raise BadInput(f"{ref}: no data set or model with this digest, neither here nor in the history of dvc.lock")
    return found[0], query.find(root, found[0].graph, digest)


def _digest(root: Path, ref: str) -> str:
    """Returns the digest of a registered version, or nothing for other references."""
    if not re.fullmatch(r"(models:/)?[\w.-]+(@[\w.-]+|/\d+)", ref) or (root / ref).exists():
        return ""
    from springhead import registry

    return registry.resolve(state_folder(root), ref).digest


def _rows_of(root: Path, name: str, ref: str, state: State, subject: query.Subject) -> Side:
    """Returns the rows of a data set, of a stage's output, or of a model's training data."""
    path, conditions = subject.name, {}
    if subject.model is not None:
        data = _training_data(subject.model, state, ref)
        path = str(data["path"])
        if state.graph.digest(path) not in (None, data["sha256"]):  # it was made again since
            found = find_receipt(root, str(data["sha256"]))
            if found is None:
                raise BadInput(
                    f"{ref}: was trained on {path} with the digest {data['sha256'][:12]}, which is neither here nor "
                    "in the history of dvc.lock"
                )
            state = found[0]
        method = rows_method(subject.model.facts)
        conditions = {"method": method} if method is not None else {}
    elif subject.kind == "stage":
        outputs = [o for o in state.graph.receipts[subject.name]["outputs"] if state.graph.digest(f"{o}/{ROWS}")]
        path = outputs[0] if outputs else path
    for folder in (path, path.rpartition("/")[0]):
        if state.graph.digest(f"{folder}/{ROWS}"):
            file = path.rpartition("/")[2]
            if folder != path and file.endswith((".jsonl", ".hdf5")):
                conditions["file"] = file  # one table may cover several files
            stage = state.graph.maker(folder) or ""
            return Side(name, ref, state, path, stage, f"{folder}/{ROWS}", conditions)
    if isinstance(state, Commit) and not state.graph.makers(path):
        raise BadInput(
            f"{ref}: the receipt of the stage that made {path} is not in DVC's cache; run `dvc fetch --all-commits`, "
            f"or `git checkout {state.commit[:12]}` and `dvc pull`"
        )
    raise BadInput(f"{ref}: {path} has no row table ({ROWS}); only data sets can be compared")


def _training_data(model: Model, state: State, ref: str) -> Mapping[str, Any]:
    found = [d for d in state.graph.receipts[model.stage]["datasets"] if d["role"] == "training"]
    if len(found) != 1:
        raise BadInput(f"{ref}: the model {model.path} was trained on {len(found)} data sets; name one by its path")
    return dict(found[0])
