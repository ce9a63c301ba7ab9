"""Immutable git worktrees: where the stages of a run execute.

DVC records the hash that an input has *after* the stage, so an edit during a run would become
false lineage; and two DVC processes in one checkout lock each other out. A run therefore takes a
snapshot commit of the checkout, uncommitted edits included, and works in worktrees of it that
share the checkout's DVC cache. The snapshot stays reachable as ``refs/springhead/runs/<run>``,
so the revision in every ledger entry can be checked out later.
"""

import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from pipelines.graph import repository
from springhead.errors import BadInput
from springhead.git import add_worktree as git_worktree
from springhead.git import clean_environment, git
from springhead.git import remove_worktree as remove_worktree
from springhead.jsonio import canonical
from springhead.params import Loader, overlay, read_params

REFS = "refs/springhead/runs"
_LARGEST_UNTRACKED = 20 * 2**20  # bytes; data belongs to DVC, and git would keep it for ever
_IDENTITY = {
    "GIT_AUTHOR_NAME": "springhead",
    "GIT_AUTHOR_EMAIL": "springhead@localhost",
    "GIT_COMMITTER_NAME": "springhead",
    "GIT_COMMITTER_EMAIL": "springhead@localhost",
}


@dataclass(frozen=True)
class Snapshot:
    """A commit that holds exactly what a run works on."""

    run: str
    commit: str
    params_changed: bool
    """Whether a profile or a setting made its ``params.yaml`` differ from the checkout's."""


def read_settings(settings: Sequence[str]) -> dict[str, Any]:
    """Turns ``["rl.train.steps=100"]`` into a nested mapping; values are YAML.

    Raises:
        BadInput: naming the setting that is not ``key=value``.
    """
    nested: dict[str, Any] = {}
    for setting in settings:
        key, equals, text = setting.partition("=")
        parts = key.split(".")
        if not equals or not all(parts):
            raise BadInput(f"--set {setting}: expected key=value, for example --set seed=1")
        try:
            value = yaml.load(text, Loader=Loader)
            canonical(value)  # no parameter is a date, or anything else that YAML has and JSON has not
        except (yaml.YAMLError, ValueError) as error:
            raise BadInput(f"--set {setting}: the value is not valid YAML: {error}") from error
        except BadInput as error:
            raise BadInput(f"--set {setting}: no value of a parameter ({error}); put a text in quotes") from error
        here = nested
        for part in parts[:-1]:
            here = here.setdefault(part, {})
            if not isinstance(here, dict):
                raise BadInput(f"--set {setting}: '{part}' was set to a value by an earlier --set")
        here[parts[-1]] = value
    return nested


def overlaid_params(root: Path, profile: str | None, settings: Sequence[str]) -> bytes | None:
    """Returns the ``params.yaml`` that a profile and settings give, or None if they change nothing.

    The profile ``quick`` is ``params.yaml`` itself.

    Raises:
        BadInput: on an unknown profile, or naming the key that ``params.yaml`` does not have.
    """
    base = read_params(root / "params.yaml")
    values: dict[str, Any] = base
    if profile and profile != "quick":
        folder = root / "pipelines" / "profiles"
        path = folder / f"{profile}.yaml"
        if not re.fullmatch(r"[\w-]+", profile) or not path.is_file():
            known = ["quick", *sorted(p.stem for p in folder.glob("*.yaml"))]
            raise BadInput(f"--profile {profile}: no such profile; known are {', '.join(known)}")
        values = overlay(values, read_params(path), str(path.relative_to(root)))
    if settings:
        values = overlay(values, read_settings(settings), "--set")
    if values == base:
        return None
    return yaml.safe_dump(values, sort_keys=False, allow_unicode=True).encode()


def take_snapshot(root: Path, run: str, params: bytes | None = None) -> Snapshot:
    """Commits the state of a checkout, without touching its index, branch or files.

    Untracked files that git does not ignore are included. Where nothing differs from ``HEAD``
    the snapshot is ``HEAD`` itself.

    Args:
        root: the checkout.
        run: the run's id, which names the reference that keeps the commit.
        params: content for ``params.yaml`` in place of the checkout's.

    Raises:
        BadInput: if an untracked file is so large that it is surely data.
    """
    _refuse_large_files(root)
    head = subprocess.run(
        ["git", "rev-parse", "--verify", "--quiet", "HEAD"], cwd=root, env=clean_environment(), capture_output=True
    )
    parent = head.stdout.decode().strip()
    tree = _write_tree(root, params)
    if parent and tree == git(root, "rev-parse", f"{parent}^{{tree}}"):
        commit = parent
    else:
        lineage = ["-p", parent] if parent else []
        commit = git(root, "commit-tree", tree, *lineage, "-m", f"springhead run {run}", env=_IDENTITY)
    git(root, "update-ref", f"{REFS}/{run}", commit)
    return Snapshot(run, commit, params is not None)


def _refuse_large_files(root: Path) -> None:
    for name in git(root, "ls-files", "--others", "--exclude-standard", "-z").split("\0"):
        path = root / name
        if name and path.is_file() and path.stat().st_size > _LARGEST_UNTRACKED:
            size = path.stat().st_size / 2**20
            raise BadInput(f"{name}: untracked file of {size:.0f} MB; `dvc add` it, or add it to .gitignore")


def _write_tree(root: Path, params: bytes | None) -> str:
    """Writes the checkout as a git tree through an index of its own."""
    index = Path(git(root, "rev-parse", "--path-format=absolute", "--git-path", "index"))
    with tempfile.TemporaryDirectory(prefix="springhead-index-") as folder:
        temporary = Path(folder) / "index"
        if index.exists():  # its file times spare git from reading every unchanged file
            shutil.copy2(index, temporary)
        env = {"GIT_INDEX_FILE": str(temporary)}
        git(root, "add", "--all", "--", ":/", env=env)
        if params is not None:
            blob = git(root, "hash-object", "-w", "--stdin", stdin=params)
            name = git(root, "rev-parse", "--show-prefix") + "params.yaml"
            git(root, "update-index", "--add", "--cacheinfo", f"100644,{blob},{name}", env=env)
        return git(root, "write-tree", env=env)


def differences(root: Path, snapshot: Snapshot) -> list[str]:
    """Returns the files of a checkout that are no longer as they are in the snapshot.

    ``dvc.lock`` is left out: that the run changes it is its purpose.
    """
    now = _write_tree(root, None)
    names = git(root, "diff-tree", "-r", "-z", "--name-only", "--relative", snapshot.commit, now)
    return [name for name in names.split("\0") if name and name != "dvc.lock"]


def add_worktree(root: Path, snapshot: Snapshot, folder: Path) -> Path:
    """Makes a worktree of the snapshot whose DVC cache is the checkout's.

    Returns:
        The folder in it that corresponds to ``root``: ``folder`` itself, unless the project
        lives in a sub-folder of its git repository.
    """
    place = git_worktree(root, snapshot.commit, folder)
    _share_cache(root, place)
    return place


def _share_cache(root: Path, place: Path) -> None:
    """Writes the worktree's local DVC configuration: the checkout's own, plus its cache folder."""
    from dvc.config import Config

    with repository(root) as repo:
        cache = repo.cache.local_cache_dir
    local = Config(str(root / ".dvc"), validate=False).load_one("local")  # paths come out absolute
    with Config(str(place / ".dvc"), validate=False).edit("local", validate=False) as settings:
        for section, values in local.items():
            settings.setdefault(section, {}).update(values)
        settings.setdefault("cache", {})["dir"] = cache
        settings.setdefault("core", {}).update(analytics=False, check_update=False, autostage=False)


def read_lock(root: Path) -> dict[str, Any]:
    """Returns ``dvc.lock`` as a mapping, an empty one if there is none.

    Raises:
        BadInput: if it is damaged, for example cut off by a kill.
    """
    from dvc.utils.serialize import YAMLFileCorruptedError, load_yaml

    path = root / "dvc.lock"
    if not path.exists():
        return {}
    try:
        content = load_yaml(str(path))  # DVC's own reader: YAML 1.2, where 1e-05 is a number
    except YAMLFileCorruptedError:
        content = None
    if not isinstance(content, dict) or not content or not isinstance(content.get("stages", {}), dict):
        raise BadInput(
            f"{path}: damaged; restore it with `git checkout dvc.lock`, or delete it: the cache knows the rest"
        )
    return content


def merge_lock(base: Mapping[str, Any], entries: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a lock with some stages' entries replaced or, in their order, added at the end."""
    return {"schema": "2.0", **base, "stages": {**base.get("stages", {}), **entries}}


def write_lock(root: Path, content: Mapping[str, Any]) -> None:
    """Writes ``dvc.lock`` in DVC's own form, whole or not at all."""
    from dvc.utils.serialize import dump_yaml

    path = root / "dvc.lock"
    temporary = path.with_name(f".dvc.lock.tmp-{os.getpid()}")
    dump_yaml(str(temporary), dict(content))
    os.replace(temporary, path)


def record_result(root: Path, snapshot: Snapshot, place: Path) -> str:
    """Commits a worktree's ``dvc.lock`` on top of the snapshot and moves the run's reference to it.

    Returns:
        The commit, the snapshot's own if the lock is as it was.
    """
    with tempfile.TemporaryDirectory(prefix="springhead-index-") as folder:
        env = {"GIT_INDEX_FILE": str(Path(folder) / "index")}
        git(root, "read-tree", snapshot.commit, env=env)
        blob = git(root, "hash-object", "-w", "--stdin", stdin=(place / "dvc.lock").read_bytes())
        name = git(root, "rev-parse", "--show-prefix") + "dvc.lock"
        git(root, "update-index", "--add", "--cacheinfo", f"100644,{blob},{name}", env=env)
        tree = git(root, "write-tree", env=env)
    if tree == git(root, "rev-parse", f"{snapshot.commit}^{{tree}}"):
        return snapshot.commit
    message = f"springhead run {snapshot.run}: results"
    commit = git(root, "commit-tree", tree, "-p", snapshot.commit, "-m", message, env=_IDENTITY)
    git(root, "update-ref", f"{REFS}/{snapshot.run}", commit)
    return commit
