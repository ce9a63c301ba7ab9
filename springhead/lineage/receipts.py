"""Receipts: what a stage read, with which parameters and code, and what it made.

A receipt holds deterministic facts only, so executing a stage again gives the same bytes. It
is a DVC output (``data/receipts/<stage>.json``) that no stage depends on.
"""

import os
import posixpath
from pathlib import Path
from typing import Any

from springhead.errors import BadInput
from springhead.jsonio import read_json
from springhead.lineage.digests import file_digest, files_digest, tree_files

FOLDER = Path("data/receipts")


def describe(path: Path) -> dict[str, Any]:
    """Returns ``{"sha256", "bytes"}`` of a file, and ``"files"`` too for a folder."""
    if path.is_file():
        return {"sha256": file_digest(path), "bytes": path.stat().st_size}
    files = tree_files(path)
    size = sum((path / name).stat().st_size for name in files)
    return {"sha256": files_digest(files), "bytes": size, "files": files}


def receipt_path(root: Path, stage: str) -> Path:
    """Returns where the receipt of a stage such as ``rl-collect@BallCircle`` lies."""
    return root / FOLDER / f"{stage}.json"


def is_inside(path: object) -> bool:
    """Tells whether a path is relative, normalised and does not lead out of the repository."""
    return (
        isinstance(path, str)
        and path not in ("", ".", "..")
        and not path.startswith(("/", "../"))
        and (posixpath.normpath(path) == path)
    )


_SHAPE: dict[str, type] = {
    "stage": str,
    "command": str,
    "params": dict,
    "seed": int,
    "dependencies": dict,
    "code": dict,
    "environment": dict,
    "outputs": dict,
    "datasets": list,
    "models": list,
}


def checked_receipt(path: Path) -> dict[str, Any]:
    """Reads a receipt that may have been damaged.

    Raises:
        BadInput: if it is not valid JSON, or not what the harness writes.
    """
    receipt = read_json(path)
    if not isinstance(receipt, dict):
        raise BadInput(f"{path}: not a receipt; `dvc checkout {path.name}` restores it")
    wrong = [key for key, kind in _SHAPE.items() if not isinstance(receipt.get(key), kind)]
    try:
        facts = [*receipt["outputs"].values(), *receipt["dependencies"].values(), *receipt["models"]]
        facts += [d for d in receipt["datasets"] if (d["path"], d["role"], d["rows"])]
        digests = [fact["sha256"] for fact in facts] + [receipt["code"]["digest"]]
        digests += [d for fact in facts for d in fact.get("files", {}).values()]
        digests += [*receipt["code"]["files"].values(), *receipt["environment"]["lock"].values()]
        paths = [model["path"] for model in receipt["models"] if (model["kind"], model.get("facts", {}))]
        paths += [*receipt["outputs"], *receipt["dependencies"], *receipt["code"]["files"]]
        paths += [data["path"] for data in receipt["datasets"]] + [n for f in facts for n in f.get("files", {})]
        if not all(isinstance(digest, str) for digest in digests):
            wrong.append("a digest that is no text")
        wrong += [f"path {path!r}" for path in paths if not is_inside(path)][:3]
    except (KeyError, TypeError, AttributeError) as error:
        wrong.append(str(error))
    if wrong:
        raise BadInput(f"{path}: not a whole receipt ({', '.join(wrong)}); restore it with `dvc checkout`")
    return receipt


def read_receipts(root: Path) -> dict[str, dict[str, Any]]:
    """Returns all receipts of a checkout by stage name, sorted by name.

    Raises:
        BadInput: naming the file, if one is not what the harness writes.
    """
    folder = root / FOLDER
    # Sorting names, not paths, and listing once: a history may have thousands of receipts.
    names = sorted(entry.name for entry in os.scandir(folder)) if folder.is_dir() else []
    return {name[:-5]: checked_receipt(folder / name) for name in names if name.endswith(".json")}
