"""Receipts: what a stage read, with which parameters and code, and what it made.

A receipt holds deterministic facts only, so executing a stage again gives the same bytes. It
is a DVC output (``data/receipts/<stage>.json``) that no stage depends on.
"""

from pathlib import Path
from typing import Any

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


def read_receipts(root: Path) -> dict[str, dict[str, Any]]:
    """Returns all receipts of a checkout by stage name, sorted by name.

    Raises:
        BadInput: naming the file, if one is not valid JSON.
    """
    return {path.stem: read_json(path) for path in sorted((root / FOLDER).glob("*.json"))}
