"""What ``dvc.yaml`` declares of a stage: its dependencies, parameter keys and outputs.

DVC owns the graph. The harness asks DVC itself, so templates, matrices and defaults mean
exactly what they mean to ``dvc repro``.
"""

import re
from dataclasses import dataclass
from pathlib import Path

from springhead.errors import BadInput

RECEIPTS, METRICS = "data/receipts", "data/metrics"


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


def read_stage(root: Path, name: str) -> Declared:
    """Reads one stage from ``dvc.yaml``.

    Raises:
        BadInput: if DVC knows no such stage; the message lists the items of the same stage.
    """
    from dvc.exceptions import DvcException
    from dvc.repo import Repo

    with Repo(str(root)) as repo:
        try:
            stage = repo.stage.load_one(str(root / "dvc.yaml"), name)
        except DvcException as error:
            base = name.partition("@")[0]
            known = sorted(s.addressing for s in repo.index.stages if s.addressing.partition("@")[0] == base)
            hint = f"its items are: {', '.join(known)}" if known else "see `dvc stage list`"
            raise BadInput(f"dvc.yaml: no stage '{name}' ({error}); {hint}") from None
        parameters = tuple(key for dep in stage.deps for key in getattr(dep, "params", None) or ())
        return Declared(
            name=name,
            dependencies=tuple(_posix(d.fs_path, root) for d in stage.deps if not getattr(d, "params", None)),
            parameters=parameters,
            outputs=tuple(_posix(o.fs_path, root) for o in stage.outs),
            all_outputs=tuple(sorted(_posix(o.fs_path, root) for o in repo.index.outs)),
        )


def stray_files(path: Path, outputs: tuple[str, ...], root: Path) -> list[str]:
    """Returns files below a dependency that no stage makes.

    A dependency may be the parent of many outputs, such as all models of a task. What a stage
    left there that was since taken out of ``dvc.yaml`` would be read as if it still belonged.
    """
    if path.is_file():
        return []
    folders = tuple(f"{output}/" for output in outputs)
    names = (item.relative_to(root).as_posix() for item in sorted(path.rglob("*")) if item.is_file())
    return [name for name in names if name not in outputs and not name.startswith(folders)]


def _posix(path: str, root: Path) -> str:
    return (root / path).relative_to(root).as_posix()
