"""The DVC graph as the scheduler sees it: names, edges and hints, nothing stage-specific.

DVC owns the graph. Adding a stage to ``dvc.yaml`` therefore needs no edit here: matrices,
templates and defaults are expanded by DVC itself.

The scheduler reads two hints from a stage's ``meta`` block, which DVC keeps out of its hashes:

* ``retry: 2``: run the stage again up to twice when it fails;
* ``gpu: true``: at most one such stage per GPU at a time (no limit where there is no GPU).
"""

import contextlib
import difflib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from springhead.errors import BadInput

if TYPE_CHECKING:
    from dvc.repo import Repo

_UNKNOWN_SECONDS = 1.0  # weight of a stage that never ran, so that longer chains still go first


@dataclass(frozen=True)
class Node:
    """A stage of ``dvc.yaml``, or a ``.dvc`` file, which is a source and never runs."""

    name: str
    """DVC's addressing, for example ``rl-collect@BallCircle``."""
    upstream: tuple[str, ...] = ()
    description: str = ""
    source: bool = False
    retry: int = 0
    gpu: bool = False
    uncached: tuple[str, ...] = ()
    """Outputs with ``cache: false``, relative to the root: git keeps them, not DVC's cache."""

    @property
    def group(self) -> str:
        """The name without its matrix item: ``rl-collect``."""
        return self.name.partition("@")[0]


@dataclass(frozen=True)
class Graph:
    """All nodes by name, upstream before downstream, in the order of a plain ``dvc repro``."""

    nodes: Mapping[str, Node]

    @property
    def stages(self) -> list[str]:
        """Names of the stages, sources left out, in execution order."""
        return [name for name, node in self.nodes.items() if not node.source]

    def ancestors(self, names: Iterable[str]) -> set[str]:
        """Returns the given nodes and everything upstream of them."""
        found: set[str] = set()
        stack = list(names)
        while stack:
            name = stack.pop()
            if name not in found:
                found.add(name)
                stack.extend(self.nodes[name].upstream)
        return found

    def descendants(self, name: str) -> set[str]:
        """Returns everything downstream of a node, the node itself left out."""
        found: set[str] = set()
        for other, node in self.nodes.items():  # upstream comes first, so one pass is enough
            if not found.union([name]).isdisjoint(node.upstream):
                found.add(other)
        return found

    def restricted(self, targets: Iterable[str]) -> "Graph":
        """Returns the part needed to build the targets.

        Args:
            targets: stage names; a name without ``@item`` means all items of that stage.

        Raises:
            BadInput: naming the target that is no stage, with the closest names.
        """
        needed = self.ancestors(named(targets, self.stages))
        return Graph({name: node for name, node in self.nodes.items() if name in needed})

    def urgency(self, seconds: Mapping[str, float]) -> dict[str, float]:
        """Returns for each node the length in seconds of the longest chain that it starts.

        Starting the ready stage with the largest value first is critical-path scheduling.

        Args:
            seconds: how long each stage took last time; unknown ones count one second.
        """
        longest: dict[str, float] = dict.fromkeys(self.nodes, 0.0)
        for name in reversed(list(self.nodes)):
            longest[name] += max(seconds.get(name, _UNKNOWN_SECONDS), 1e-3)
            for above in self.nodes[name].upstream:
                if above in longest:
                    longest[above] = max(longest[above], longest[name])
        return longest


def named(targets: Iterable[str], stages: Iterable[str]) -> set[str]:
    """Returns the stages that targets name.

    Args:
        targets: stage names; a name without ``@item`` means all items of that stage.
        stages: names of all stages.

    Raises:
        BadInput: naming the target that is no stage, with the closest names.
    """
    groups: dict[str, set[str]] = {}
    for name in stages:
        groups.setdefault(name, set()).add(name)
        groups.setdefault(name.partition("@")[0], set()).add(name)
    wanted: set[str] = set()
    for target in targets:
        if target not in groups:
            close = difflib.get_close_matches(target, sorted(groups), n=3, cutoff=0.4)
            hint = f"did you mean {', '.join(close)}?" if close else "see `dvc stage list`"
            raise BadInput(f"dvc.yaml: no stage '{target}'; {hint}")
        wanted |= groups[target]
    return wanted


@contextlib.contextmanager
def repository(root: Path) -> "Iterator[Repo]":
    """Opens the DVC repository at ``root``.

    Raises:
        BadInput: with DVC's own message where ``dvc.yaml`` or its templates are wrong, or where
            another DVC process is at work in the same checkout.
    """
    from dvc.exceptions import DvcException
    from dvc.lock import LockError
    from dvc.repo import Repo

    try:
        # DVC names stages and resolves targets relative to the working folder.
        with contextlib.chdir(root), Repo(str(root)) as repo:
            yield repo
    except LockError as error:
        raise BadInput(f"{root}: another dvc command is at work in this checkout; wait until it has ended") from error
    except DvcException as error:
        raise BadInput(f"{root / 'dvc.yaml'}: {error}") from error


def read_graph(root: Path) -> Graph:
    """Reads the graph of a checkout.

    Raises:
        BadInput: where DVC cannot read it, on a ``dvc.yaml`` below the root, and on a bad hint.
    """
    from dvc.repo.reproduce import get_active_graph, plan_repro
    from dvc.stage import PipelineStage

    with repository(root) as repo:
        active = get_active_graph(repo.index.graph)
        ours = [stage for stage in repo.index.stages if isinstance(stage, PipelineStage)]
        for stage in ours:
            if Path(stage.path).parent != root:
                raise BadInput(f"{stage.path}: stages below the root are not supported; move them to dvc.yaml")
        nodes = {}
        for stage in plan_repro(active, ours):
            nodes[stage.addressing] = _node(stage, sorted(s.addressing for s in active.successors(stage)), root)
    return Graph(nodes)


def _node(stage: Any, upstream: list[str], root: Path) -> Node:
    from dvc.stage import PipelineStage

    meta = stage.meta or {}
    if not isinstance(meta, dict):
        raise BadInput(f"dvc.yaml: stage {stage.addressing}: meta must be a mapping, found {meta!r}")
    retry, gpu = meta.get("retry", 0), meta.get("gpu", False)
    if not isinstance(retry, int) or isinstance(retry, bool) or retry < 0:
        raise BadInput(f"dvc.yaml: stage {stage.addressing}: meta.retry must be a count, found {retry!r}")
    if not isinstance(gpu, bool):
        raise BadInput(f"dvc.yaml: stage {stage.addressing}: meta.gpu must be true or false, found {gpu!r}")
    uncached = [o for o in stage.outs if not o.use_cache and o.protocol == "local" and o.is_in_repo]
    return Node(
        name=stage.addressing,
        upstream=tuple(upstream),
        description=stage.desc or "",
        source=not isinstance(stage, PipelineStage),
        retry=retry,
        gpu=gpu,
        uncached=tuple(Path(o.fs_path).relative_to(root).as_posix() for o in uncached),
    )


def changed(root: Path, targets: Iterable[str] = ()) -> dict[str, Any]:
    """Returns what ``dvc status`` says: a mapping of each stage that is not up to date to its changes.

    Args:
        root: a checkout.
        targets: stage names whose whole upstream is looked at; all stages if empty.
    """
    with repository(root) as repo:
        wanted = list(targets)
        status: dict[str, Any] = repo.status(targets=wanted, with_deps=True) if wanted else repo.status()
    return status


def settled(root: Path, graph: Graph) -> set[str]:
    """Returns the stages whose entry in ``dvc.lock`` holds and whose outputs are all in the cache.

    Unlike :func:`changed` it needs no output to be checked out, so it can be asked of a fresh
    worktree. A stage that cannot be decided that way (its dependency is a folder above the
    outputs of others) is left out: running ``dvc repro`` on it decides.
    """
    found: set[str] = set()
    with repository(root) as repo, repo.lock:
        stages = {stage.addressing: stage for stage in repo.index.stages}
        outputs = {out.fs_path: out for stage in stages.values() for out in stage.outs}
        for name, node in graph.nodes.items():
            stage = stages[name]
            if node.source:
                found.add(name)
                continue
            if not found.issuperset(node.upstream) or stage.changed_stage() or stage.always_changed:
                continue
            if all(_dependency_holds(d, outputs) for d in stage.deps) and all(_output_held(o) for o in stage.outs):
                found.add(name)
    return found


def _dependency_holds(dependency: Any, outputs: Mapping[str, Any]) -> bool:
    made = outputs.get(dependency.fs_path)
    if made is not None:
        return bool(made.hash_info) and made.hash_info == dependency.hash_info
    return not dependency.status()


def _output_held(output: Any) -> bool:
    if output.use_cache:
        return not output.changed_cache()
    return not output.status()
