"""What ``dvc.yaml`` declares of a stage: its dependencies, parameter keys and outputs.

DVC owns the graph. The harness asks DVC itself, so templates, matrices and defaults mean
exactly what they mean to ``dvc repro``.
"""

import hashlib
import json
import re
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from springhead.errors import BadInput
from springhead.jsonio import write_json_atomic

RECEIPTS, METRICS = "data/receipts", "data/metrics"
ACCEPTED = "data/accepted"
"""Profiles of accepted data sets: the one folder below ``data/`` that people fill, and git tracks."""
SOURCES = "data/sources.yaml"
"""The catalogue of public data sets, which git holds too."""


def is_data(path: str) -> bool:
    """Whether a dependency is data that stages make, rather than something that git holds."""
    return path.startswith("data/") and path not in (ACCEPTED, SOURCES) and not path.startswith(f"{ACCEPTED}/")


@dataclass(frozen=True)
class Declared:
    """A stage as declared, all paths relative to the repository root in posix form."""

    name: str
    """The addressing DVC uses, for example ``rl-collect@BallCircle``."""
    dependencies: tuple[str, ...]
    parameters: tuple[str, ...]
    outputs: tuple[str, ...]
    all_outputs: tuple[str, ...] = ()
    """The outputs of every stage of the repository."""

    @property
    def branch(self) -> str:
        """``rl`` or ``llm``."""
        return self.name.partition("-")[0]

    @property
    def stage(self) -> str:
        """The name without branch and item, for example ``collect``."""
        return self.name.partition("-")[2].partition("@")[0]

    @property
    def output(self) -> str:
        """The one folder that the stage's script fills.

        Raises:
            BadInput: unless ``dvc.yaml`` declares exactly one output besides receipt and metrics.
        """
        folders = [path for path in self.outputs if not path.startswith((RECEIPTS + "/", METRICS + "/"))]
        if len(folders) != 1:
            raise BadInput(f"dvc.yaml: stage {self.name}: expected one output folder, found {folders}")
        return folders[0]

    @property
    def receipt(self) -> str:
        """The receipt's path; its declaration is compulsory."""
        path = f"{RECEIPTS}/{self.name}.json"
        if path not in self.outputs:
            raise BadInput(f"dvc.yaml: stage {self.name}: add the output {path}")
        return path

    @property
    def metrics(self) -> str | None:
        """The metrics file's path, or None if the stage declares none."""
        path = f"{METRICS}/{self.name}.json"
        return path if path in self.outputs else None


def stage_name(module: str, items: list[str]) -> str:
    """Returns the DVC name of ``python -m stages.rl.collect BallCircle``: ``rl-collect@BallCircle``.

    Raises:
        BadInput: if the module is not a stage script.
    """
    match = re.fullmatch(r"stages\.(\w+)\.(\w+)", module)
    if match is None:
        raise BadInput(f"{module}: not a stage; run `python -m stages.<branch>.<stage> [item ...]`")
    base = f"{match[1]}-{match[2]}"
    return f"{base}@{'-'.join(items)}" if items else base


def read_stage(root: Path, name: str, cache: Path | None = None) -> Declared:
    """Reads one stage from ``dvc.yaml``.

    Args:
        root: the repository root.
        name: the stage, as DVC addresses it.
        cache: see :func:`read_stages`.

    Raises:
        BadInput: if DVC knows no such stage; the message lists the items of the same stage.
    """
    stages = read_stages(root, cache)
    if name not in stages:
        known = [other for other in stages if other.partition("@")[0] == name.partition("@")[0]]
        hint = f"its items are: {', '.join(known)}" if known else "see `dvc stage list`"
        raise BadInput(f"dvc.yaml: no stage '{name}'; {hint}")
    return stages[name]


def read_stages(root: Path, cache: Path | None = None) -> dict[str, Declared]:
    """Reads every stage from ``dvc.yaml``, as DVC itself reads it, sorted by name.

    Args:
        root: the repository root.
        cache: a folder in which DVC's answer is kept by the digest of all it was read from. Asking DVC
            takes seconds, which every stage of a run would spend again.

    Raises:
        BadInput: if DVC cannot read the file.
    """
    place = cache / f"{_digest_of_declarations(root)}.json" if cache is not None else None
    if place is not None and place.is_file():
        try:
            content = json.loads(place.read_text(encoding="utf-8"))
            outputs = tuple(content["outputs"])
            return {name: _declared(name, facts, outputs) for name, facts in content["stages"].items()}
        except (ValueError, KeyError, TypeError):  # damaged; it is only a cache
            pass
    content = _ask_dvc(root)
    if place is not None and not _uses_more_files(root):
        place.parent.mkdir(parents=True, exist_ok=True)
        write_json_atomic(place, content)
    return {name: _declared(name, facts, tuple(content["outputs"])) for name, facts in content["stages"].items()}


def _declared(name: str, facts: dict[str, list[str]], outputs: tuple[str, ...]) -> Declared:
    dependencies, parameters, made = (tuple(facts[kind]) for kind in ("dependencies", "parameters", "outputs"))
    return Declared(name, dependencies, parameters, made, outputs)


def _ask_dvc(root: Path) -> dict[str, Any]:
    """Returns ``{"stages": {name: {"dependencies", "parameters", "outputs"}}, "outputs": [...]}``."""
    from dvc.exceptions import DvcException
    from dvc.repo import Repo

    try:
        with Repo(str(root)) as repo:
            stages = sorted((s for s in repo.index.stages if hasattr(s, "name")), key=lambda s: str(s.name))
            return {
                "outputs": sorted(_posix(out.fs_path, root) for out in repo.index.outs),
                "stages": {
                    stage.name: {
                        "dependencies": [_posix(d.fs_path, root) for d in stage.deps if not hasattr(d, "params")],
                        "parameters": [key for d in stage.deps for key in getattr(d, "params", ())],
                        "outputs": [_posix(out.fs_path, root) for out in stage.outs],
                    }
                    for stage in stages
                },
            }
    except DvcException as error:
        raise BadInput(f"{root}/dvc.yaml: DVC cannot read it ({error}); `dvc stage list` shows where") from error


def _digest_of_declarations(root: Path) -> str:
    """Returns a digest of everything the declarations follow from: DVC, its files and the parameters."""
    digest = hashlib.sha256(metadata.version("dvc").encode())
    others = sorted((root / "data").rglob("*.dvc"))
    for path in (root / "dvc.yaml", root / "params.yaml", *others):
        content = path.read_bytes() if path.is_file() else b""
        digest.update(f"{path.relative_to(root)}\0{len(content)}\n".encode() + content)
    return digest.hexdigest()


def _uses_more_files(root: Path) -> bool:
    """Whether templates of ``dvc.yaml`` read files beside ``params.yaml``, which the digest does not cover."""
    return re.search(r"^\s*-?\s*vars:", (root / "dvc.yaml").read_text(encoding="utf-8"), re.MULTILINE) is not None


def stray_files(path: Path, outputs: tuple[str, ...], root: Path) -> list[str]:
    """Returns files below a dependency that no stage makes.

    A dependency may be the parent of many outputs, such as all models of a task. What a stage
    left there that was since taken out of ``dvc.yaml`` would be read as if it still belonged.
    """
    if path.is_file():
        return []
    folders = (f"{ACCEPTED}/", *(f"{output}/" for output in outputs))
    names = (item.relative_to(root).as_posix() for item in sorted(path.rglob("*")) if item.is_file())
    return [name for name in names if name not in outputs and not name.startswith(folders)]


def _posix(path: str, root: Path) -> str:
    return (root / path).relative_to(root).as_posix()
