"""What DVC keeps on disk, read without DVC: ``dvc.lock``, its hashes and its cache objects.

Reading the files directly is the point: DVC's own answers come from a state database and trust
a cache object by its file mode, so a changed byte would go unseen.
"""

import contextlib
import hashlib
import json
import re
import time
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import yaml

from springhead.errors import BadInput
from springhead.lineage.receipts import is_inside
from springhead.params import Loader

_BLOCK = 1 << 20
_MD5 = re.compile(r"[0-9a-f]{32}(\.dir)?")


def file_md5(path: Path) -> str:
    """Returns DVC's hash of a file."""
    digest = hashlib.md5(usedforsecurity=False)
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()


def directory_md5(files: Mapping[str, str]) -> str:
    """Returns DVC's hash of a folder from the MD5 of each file: of a JSON list sorted by path."""
    listing = [{"md5": files[name], "relpath": name} for name in sorted(files)]
    text = json.dumps(listing, sort_keys=True).encode()
    return hashlib.md5(text, usedforsecurity=False).hexdigest() + ".dir"


def read_lock(root: Path) -> dict[str, dict[str, Any]]:
    """Returns the stages of ``dvc.lock`` by name; empty if there is no such file.

    Raises:
        BadInput: if the file is empty, cut off or no lock file.
    """
    path = root / "dvc.lock"
    if not path.exists():
        return {}
    restore = "restore it with `git checkout dvc.lock`, or remove it and run `dvc repro` (the cache restores the rest)"
    try:
        lock = yaml.load(path.read_text(encoding="utf-8"), Loader=Loader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise BadInput(f"{path}: not valid YAML ({str(error).splitlines()[0]}); {restore}") from error
    if not isinstance(lock, dict) or not isinstance(lock.get("stages", {}), dict):
        raise BadInput(f"{path}: {'empty' if lock is None else 'not a lock file'}; {restore}")
    for name, entry in lock.get("stages", {}).items():
        if not _is_entry(entry):  # what a kill cut off between two lines can be valid YAML
            raise BadInput(f"{path}: the entry of {name} is cut off; {restore}")
    return dict(lock.get("stages") or {})


def _is_entry(entry: Any) -> bool:
    """Whether DVC would take this for the entry of a stage."""
    if not isinstance(entry, dict) or not isinstance(entry.get("cmd"), str | list):
        return False
    listed = [entry.get(kind, []) for kind in ("deps", "outs")]
    if not all(isinstance(part, list) for part in listed) or not isinstance(entry.get("params", {}), dict):
        return False
    return all(isinstance(item, dict) and _is_artefact(item) for part in listed for item in part)


def _is_artefact(item: Mapping[str, Any]) -> bool:
    texts = [item.get("path"), item.get("md5", ""), item.get("hash", "")]
    return all(isinstance(text, str) for text in texts) and isinstance(item.get("size", 0), int)


@lru_cache(maxsize=8)
def cache_folder(root: Path) -> Path:
    """Returns the folder of DVC's cache, as DVC's configuration has it.

    Raises:
        BadInput: if DVC cannot open the folder.
    """
    from dvc.exceptions import DvcException
    from dvc.repo import Repo

    try:
        with Repo(str(root)) as repo:
            return Path(repo.cache.local.path)
    except DvcException as error:
        raise BadInput(f"{root}: DVC cannot open this folder ({error}); run `dvc init`") from error


def object_path(cache: Path, md5: str) -> Path:
    """Returns where the cache keeps the object of a hash; a text that is no hash has no object."""
    return cache / md5[:2] / md5[2:] if _MD5.fullmatch(md5) else cache / "no-such-object"


def folder_listing(path: Path, md5: str) -> dict[str, str] | None:
    """Returns the MD5 of each file of a folder by path, or None if its listing is missing or damaged."""
    try:
        content = path.read_bytes()
        if hashlib.md5(content, usedforsecurity=False).hexdigest() != md5.removesuffix(".dir"):
            return None
        found = {str(entry["relpath"]): str(entry["md5"]) for entry in json.loads(content)}
        return found if all(is_inside(name) for name in found) else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def broken_run_cache(root: Path, age: float = 0.0) -> list[Path]:
    """Returns the folders of DVC's run cache that a kill left empty.

    DVC makes a folder per stage and inputs, then the entry in it. Killed in between, it leaves a folder
    for which every later ``dvc repro`` ends with an error of Python's.

    Args:
        root: the repository root.
        age: how many seconds old they must be, where a living process may be about to write.
    """
    before = time.time() - age
    folders = (cache_folder(root).parents[1] / "runs").glob("[0-9a-f][0-9a-f]/*")
    return sorted(f for f in folders if f.is_dir() and not any(f.iterdir()) and f.stat().st_mtime <= before)


def remove_run_cache(folders: list[Path]) -> None:
    """Removes what :func:`broken_run_cache` found."""
    for folder in folders:
        with contextlib.suppress(OSError):  # gone already, or filled in this moment
            folder.rmdir()


def cache_objects(root: Path) -> list[tuple[str, Path]]:
    """Returns every object of the cache: its name, which is its MD5, and its file."""
    found = []
    for path in sorted(cache_folder(root).glob("[0-9a-f][0-9a-f]/*")):
        name = path.parent.name + path.name
        if len(name.removesuffix(".dir")) == 32 and path.is_file():
            found.append((name, path))  # others are temporary files of a transfer that was cut off
    return found
