"""SHA-256 digests of files, folders, JSON values and arrays.

They are the only join key between DVC, MLflow, Prefect, Great Expectations and the ledger.
"""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from springhead.errors import BadInput
from springhead.jsonio import canonical

_BLOCK = 1 << 20


def file_digest(path: Path | str) -> str:
    """Returns the SHA-256 of a file's bytes, as 64 hexadecimal digits."""
    digest = hashlib.sha256()
    with Path(path).open("rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()


def tree_files(path: Path | str, bytecode: bool = True) -> dict[str, str]:
    """Returns ``{relative posix path: digest}`` of every file below a folder, sorted by path.

    Args:
        path: the folder.
        bytecode: False leaves out ``__pycache__``, which Python makes in a folder of code by importing it. In data
            and models nothing may be left out: their bytecode would be run as well.

    Raises:
        BadInput: on a symbolic link to a folder or to nothing. What it leads to is in no digest, so that it
            could be turned elsewhere unseen.
    """
    root = Path(path)
    files: dict[str, str] = {}
    for item in sorted(root.rglob("*"), key=lambda p: p.relative_to(root).as_posix()):
        # DVC may link a file to its cache, whose content is digested like any other.
        if item.is_symlink() and not item.is_file():
            raise BadInput(f"{item}: {_link(item, root)}; replace it by what it points to")
        if not bytecode and "__pycache__" in item.relative_to(root).parts:
            continue
        if item.is_file():
            files[item.relative_to(root).as_posix()] = file_digest(item)
    return files


def _link(item: Path, root: Path) -> str:
    """Says what is wrong with a link that is not one to a file."""
    if not item.exists():
        return "a link to nothing"
    if root.resolve() not in item.resolve().parents:
        return f"a link that leads out of {root}"
    return "a link to a folder"


def files_digest(files: Mapping[str, str]) -> str:
    """Returns the digest of a folder from the digests of its files."""
    digest = hashlib.sha256()
    for name in sorted(files):
        digest.update(f"{name}\0{files[name]}\n".encode())
    return digest.hexdigest()


def tree_digest(path: Path | str) -> str:
    """Returns the digest of a file (its SHA-256) or of a folder (over its sorted file digests).

    Raises:
        BadInput: if nothing is there.
    """
    path = Path(path)
    if path.is_file():
        return file_digest(path)
    if path.is_dir():
        return files_digest(tree_files(path))
    raise BadInput(f"{path}: no such file or folder; run the stage that makes it (`dvc repro`)")


def dependency_files(root: Path, path: str) -> dict[str, str]:
    """Returns the files of a stage's dependency, a folder, as :func:`tree_files`; of code without its bytecode."""
    return tree_files(root / path, bytecode=path.partition("/")[0] == "data")


def dependency_digest(root: Path, path: str) -> str:
    """Returns the digest of a stage's dependency, a file or a folder; of code without its bytecode.

    Args:
        root: the repository.
        path: the dependency, relative to it.

    Raises:
        BadInput: if nothing is there.
    """
    return files_digest(dependency_files(root, path)) if (root / path).is_dir() else tree_digest(root / path)


def tree_bytes(path: Path | str) -> int:
    """Returns the number of bytes in a file or in all files below a folder."""
    path = Path(path)
    if path.is_file():
        return path.stat().st_size
    return sum(item.stat().st_size for item in path.rglob("*") if item.is_file())


def json_digest(obj: Any) -> str:
    """Returns the SHA-256 of a JSON value's canonical form."""
    return hashlib.sha256(canonical(obj)).hexdigest()


def arrays_digest(arrays: Mapping[str, np.ndarray]) -> str:
    """Returns the digest of named arrays: names sorted, then dtype, shape and bytes in C order.

    This is the id of an episode when given its seven arrays (DESIGN, row-level lineage).
    """
    digest = hashlib.sha256()
    for name in sorted(arrays):
        array = np.ascontiguousarray(arrays[name])
        digest.update(f"{name}\0{array.dtype.str}\0{array.shape}\n".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()
