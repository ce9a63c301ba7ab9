"""The artefact graph: which stage read what another stage made, matched by digest.

Receipts alone decide it. A link is *verified* when the digest that the reader recorded follows
from the file digests that the makers recorded, so a graph read from disk is evidence, not a
drawing of ``dvc.yaml``.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from springhead.declared import is_data
from springhead.errors import BadInput
from springhead.lineage.digests import files_digest
from springhead.lineage.receipts import read_receipts


@dataclass(frozen=True)
class Link:
    """One dependency on data, seen from the stage that read it."""

    stage: str
    """The reader, for example ``rl-train@BallCircle-cdt-0``."""
    path: str
    """The dependency, relative to the repository root."""
    sha256: str
    """Its digest when the reader ran."""
    makers: tuple[str, ...]
    """The stages that made it; empty for data that comes from outside the graph."""
    verified: bool
    """Whether the makers' receipts give this digest. Always true without makers."""


@dataclass(frozen=True)
class Model:
    """A model that some receipt declares."""

    stage: str
    path: str
    sha256: str
    kind: str
    """``policy`` or ``language-model``."""
    facts: Mapping[str, Any]


def rows_method(facts: Mapping[str, Any]) -> str | None:
    """Returns the method whose rows of a data set a model took: ``rows_of`` of its facts, else its own method."""
    method = facts.get("rows_of", facts.get("method"))
    return method if isinstance(method, str) else None


def branch_of(stage: str) -> str:
    """Returns ``rl`` for ``rl-train@BallCircle-cdt-0``."""
    return stage.partition("-")[0]


def step_of(stage: str) -> str:
    """Returns ``train`` for ``rl-train@BallCircle-cdt-0``."""
    return stage.partition("-")[2].partition("@")[0]


def role_of(stage: str) -> str:
    """Returns ``evaluate`` for ``llm-evaluate@x`` and for ``llm-rational_evaluate@x``: what a step does to its data."""
    return step_of(stage).rpartition("_")[2]


def item_of(stage: str) -> str:
    """Returns ``BallCircle-cdt-0`` for ``rl-train@BallCircle-cdt-0``, or an empty string."""
    return stage.partition("@")[2]


def _parents(path: str) -> Iterable[str]:
    """Yields a path and the folders above it, innermost first."""
    while path:
        yield path
        path = path.rpartition("/")[0]


class Graph:
    """Stages and the links between them.

    Args:
        receipts: receipts by stage name, as :func:`springhead.lineage.receipts.read_receipts`
            returns them.
    """

    def __init__(self, receipts: Mapping[str, dict[str, Any]]) -> None:
        self.receipts = dict(receipts)
        self._maker = {out: name for name, receipt in self.receipts.items() for out in receipt["outputs"]}
        self._below: dict[str, list[str]] = {}
        for out in sorted(self._maker):
            for folder in _parents(out):
                self._below.setdefault(folder, []).append(out)

    @classmethod
    def read(cls, root: Path) -> "Graph":
        """Reads the graph of a checkout.

        Raises:
            BadInput: if a receipt is not valid JSON.
        """
        return cls(read_receipts(root))

    def maker(self, path: str) -> str | None:
        """Returns the stage whose output is ``path`` or holds it, or None."""
        return next((self._maker[folder] for folder in _parents(path) if folder in self._maker), None)

    def makers(self, path: str) -> tuple[str, ...]:
        """Returns the stages that made ``path``: one for a file, several for a shared folder."""
        one = self.maker(path)
        return (one,) if one else tuple(sorted({self._maker[out] for out in self._below.get(path, ())}))

    def digest(self, path: str) -> str | None:
        """Returns the digest of a path as the receipts have it, or None if they do not tell.

        Works for an output, for a file or folder inside one, and for a folder above several.
        """
        owner = next((folder for folder in _parents(path) if folder in self._maker), None)
        if owner is None:
            return self._digest_above(path)
        facts = self.receipts[self._maker[owner]]["outputs"][owner]
        if owner == path:
            return str(facts["sha256"])
        inside = path[len(owner) + 1 :]
        files: dict[str, str] = facts.get("files", {})
        if inside in files:
            return files[inside]
        below = {name[len(inside) + 1 :]: d for name, d in files.items() if name.startswith(inside + "/")}
        return files_digest(below) if below else None

    def _digest_above(self, path: str) -> str | None:
        files: dict[str, str] = {}
        for out in self._below.get(path, ()):
            facts = self.receipts[self._maker[out]]["outputs"][out]
            prefix = out[len(path) + 1 :]
            inner = facts.get("files")
            files |= {prefix: facts["sha256"]} if inner is None else {f"{prefix}/{n}": d for n, d in inner.items()}
        return files_digest(files) if files else None

    @cached_property
    def links(self) -> tuple[Link, ...]:
        """Every dependency on data, by reader and path. Code and lock files are no links."""
        found = []
        for name, receipt in self.receipts.items():
            data = [path for path in receipt["dependencies"] if is_data(path)]
            for path in sorted(data):
                facts = receipt["dependencies"][path]
                makers = tuple(maker for maker in self.makers(path) if maker != name)
                verified = not makers or self.digest(path) == facts["sha256"]
                found.append(Link(name, path, facts["sha256"], makers, verified))
        return tuple(found)

    @cached_property
    def _links_by_reader(self) -> dict[str, list[Link]]:
        found: dict[str, list[Link]] = {}
        for link in self.links:
            found.setdefault(link.stage, []).append(link)
        return found

    def links_of(self, stage: str) -> list[Link]:
        """Returns the dependencies on data of one stage, by path."""
        return self._links_by_reader.get(stage, [])

    @cached_property
    def _up(self) -> dict[str, set[str]]:
        found: dict[str, set[str]] = {name: set() for name in self.receipts}
        for link in self.links:
            found[link.stage].update(link.makers)
        return found

    @cached_property
    def _down(self) -> dict[str, set[str]]:
        found: dict[str, set[str]] = {name: set() for name in self.receipts}
        for name, makers in self._up.items():
            for maker in makers:
                found[maker].add(name)
        return found

    def parents(self, stage: str) -> list[str]:
        """Returns the stages whose outputs ``stage`` read."""
        return sorted(self._up[stage])

    def children(self, stage: str) -> list[str]:
        """Returns the stages that read an output of ``stage``."""
        return sorted(self._down[stage])

    def upstream(self, stage: str) -> list[str]:
        """Returns everything behind ``stage``, itself last, makers before readers."""
        return self._ordered(self._reach(stage, self._up))

    def downstream(self, stage: str) -> list[str]:
        """Returns everything made with ``stage``, itself first, makers before readers."""
        return self._ordered(self._reach(stage, self._down))

    @staticmethod
    def _reach(stage: str, edges: Mapping[str, set[str]]) -> set[str]:
        seen, todo = {stage}, [stage]
        while todo:
            fresh = edges[todo.pop()] - seen
            seen |= fresh
            todo.extend(fresh)
        return seen

    @cached_property
    def depth(self) -> dict[str, int]:
        """The longest way from a source to each stage, in links: makers are less deep than readers."""
        depths: dict[str, int] = {}
        todo = sorted(self.receipts)
        while todo:
            ready = [name for name in todo if all(maker in depths for maker in self._up[name])]
            # A cycle cannot come from DVC; a forged receipt must still not hang the reader.
            for name in ready or todo:
                depths[name] = 1 + max((depths.get(maker, -1) for maker in self._up[name]), default=-1)
            todo = [name for name in todo if name not in depths]
        return depths

    def _ordered(self, stages: Iterable[str]) -> list[str]:
        return sorted(stages, key=lambda name: (self.depth[name], name))

    @cached_property
    def order(self) -> list[str]:
        """All stages, makers before readers."""
        return self._ordered(self.receipts)

    @cached_property
    def models(self) -> list[Model]:
        """Every model that a receipt declares, by stage and path."""
        return [
            Model(name, entry["path"], entry["sha256"], entry["kind"], entry.get("facts", {}))
            for name, receipt in sorted(self.receipts.items())
            for entry in sorted(receipt.get("models", ()), key=lambda e: str(e["path"]))
        ]

    def models_behind(self, stages: Iterable[str]) -> list[Model]:
        """Returns the models that were made by the given stages or with what they made."""
        affected: set[str] = set()
        for stage in stages:
            if stage in self.receipts:
                affected |= self._reach(stage, self._down)
        return [model for model in self.models if model.stage in affected]


def not_in_an_output(root: Path, place: Path, option: str) -> None:
    """Refuses to write into what a stage made, where a file more is damage.

    Raises:
        BadInput: naming the option that asked for it, and the stage.
    """
    root, whole = root.resolve(), place.resolve()
    try:
        graph = Graph.read(root)
    except BadInput:
        return  # damaged receipts: whoever goes on says so
    if whole.is_relative_to(root) and (stage := graph.maker(whole.relative_to(root).as_posix())):
        raise BadInput(f"{option} {place}: lies in what {stage} made, which must stay as it is; choose another place")
