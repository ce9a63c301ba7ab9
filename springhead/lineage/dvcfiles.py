"""What DVC keeps on disk, read without DVC: ``dvc.lock``, its hashes and its cache objects.

Reading the files directly is the point: DVC's own answers come from a state database and trust
a cache object by its file mode, so a changed byte would go unseen.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from springhead.errors import BadInput
from springhead.params import Loader

_BLOCK = 1 << 20


@dataclass(frozen=True)
class Hashes:
    """Both digests of a file, from one reading."""

    sha256: str
    md5: str


def hash_file(path: Path) -> Hashes:
    """Returns the SHA-256 (ours) and the MD5 (DVC's) of a file."""
    sha256, md5 = hashlib.sha256(), hashlib.md5(usedforsecurity=False)
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            sha256.update(block)
            md5.update(block)
    return Hashes(sha256.hexdigest(), md5.hexdigest())


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
    return dict(lock.get("stages") or {})


def cache_folder(root: Path) -> Path:
    """Returns the folder of DVC's cache, as DVC's configuration has it."""
    from dvc.exceptions import DvcException
    from dvc.repo import Repo

    try:
        with Repo(str(root)) as repo:
            return Path(repo.cache.local.path)
    except DvcException as error:
        raise BadInput(f"{root}: DVC cannot open this folder ({error}); run `dvc init`") from error


def cache_objects(root: Path) -> list[tuple[str, Path, list[str]]]:
    """Returns each cache object: its name (the MD5), its file, and the files a folder's listing names."""
    folder = cache_folder(root)
    found = []
    for path in sorted(folder.glob("[0-9a-f][0-9a-f]/*")):
        name = path.parent.name + path.name
        if len(name.removesuffix(".dir")) != 32 or not path.is_file():
            continue  # a temporary file of a transfer that was cut off; DVC ignores it too
        inner: list[str] = []
        if name.endswith(".dir"):
            try:
                inner = [entry["md5"] for entry in json.loads(path.read_bytes())]
            except (ValueError, KeyError, TypeError):
                inner = []  # its hash cannot match either, which the caller reports
        found.append((name, path, inner))
    return found
