"""The environment a stage runs in: process settings, locked packages, loaded code."""

import ctypes
import os
import random
import re
import sys
from importlib import metadata
from pathlib import Path

from springhead.errors import BadInput
from springhead.lineage.digests import file_digest

# The harness itself runs in every stage. It decides nothing about the content of an output
# beyond its container, so it is recorded in receipts but is no dependency of the stages.
HARNESS = (
    "springhead/__init__.py",
    "springhead/bounds.py",
    "springhead/declared.py",
    "springhead/energy.py",
    "springhead/environment.py",
    "springhead/errors.py",
    "springhead/git.py",
    "springhead/hermetic.py",
    "springhead/home.py",
    "springhead/jsonio.py",
    "springhead/keys.py",
    "springhead/lineage/__init__.py",
    "springhead/lineage/digests.py",
    "springhead/lineage/head.py",
    "springhead/lineage/ledger.py",
    "springhead/lineage/receipts.py",
    "springhead/params.py",
    "springhead/progress.py",
    "springhead/signing.py",
    "springhead/spool.py",
    "springhead/stage.py",
    "springhead/tables.py",
    "springhead/tracking.py",
    "stages/__init__.py",
)
_PACKAGE_MARKERS = re.compile(r"^(springhead|stages)/(rl|llm)(/\w+)?/__init__\.py$")


def settle(seed: int) -> None:
    """Makes this process deterministic.

    One torch thread, deterministic kernels, and seeded global generators for third-party code
    that draws from them; our own code uses generators of its own.
    """
    random.seed(seed)
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed(seed)
    if "torch" in sys.modules:
        torch = sys.modules["torch"]
        torch.set_num_threads(1)
        torch.manual_seed(seed)
        torch.use_deterministic_algorithms(True)
        keep_memory()


_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # of glibc's malloc.h


def keep_memory() -> bool:
    """Lets this process keep the memory it frees, for its next allocation.

    A training step allocates and frees the same large tensors as the one before. The C library maps the large ones
    afresh each time and gives freed memory back, so that the system clears every page anew in every step; fine-tuning
    a model of 135 million parameters loses a fifth of its time to it.

    Returns:
        Whether the C library (glibc) could be told.
    """
    try:
        tell = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return False
    return bool(tell(_M_MMAP_MAX, 0)) and bool(tell(_M_TRIM_THRESHOLD, -1))


def alive(pid: int) -> bool:
    """Tells whether a process runs. One that ended but was not waited for yet, a zombie, does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def locked_packages(lock: Path) -> dict[str, str]:
    """Reads ``name==version`` lines of a lock file, names in their normalised form.

    Raises:
        BadInput: naming the line that is not of that form.
    """
    packages = {}
    for number, line in enumerate(lock.read_text(encoding="utf-8").splitlines(), start=1):
        text = line.partition("#")[0].strip()
        if not text:
            continue
        match = re.fullmatch(r"([A-Za-z0-9._-]+)==([A-Za-z0-9._!+-]+)", text)
        if match is None:
            raise BadInput(f"{lock}:{number}: expected NAME==VERSION, found {text!r}")
        packages[re.sub(r"[-_.]+", "-", match[1]).lower()] = match[2].partition("+")[0]
    return packages


def check_packages(lock: Path) -> dict[str, str]:
    """Checks that the installed packages are those of a branch's lock file, and returns them.

    Raises:
        BadInput: naming each package that is missing or has another version.
    """
    wanted = locked_packages(lock)
    wrong = []
    for name, version in wanted.items():
        try:
            found = metadata.version(name).partition("+")[0]
        except metadata.PackageNotFoundError:
            found = "not installed"
        if found != version:
            wrong.append(f"{name} {found}, wanted {version}")
    if wrong:
        raise BadInput(f"{lock}: the environment differs: {'; '.join(wrong)}. Run `make install`")
    return wanted


def loaded_code(root: Path) -> list[str]:
    """Returns the repository's own modules that this process has imported, as relative paths."""
    found = set()
    for module in list(sys.modules.values()):
        file = getattr(module, "__file__", None)
        if not file or not file.endswith(".py"):
            continue
        path = Path(os.path.realpath(file))
        if path.is_relative_to(root) and path.relative_to(root).parts[0] in ("springhead", "stages"):
            found.add(path.relative_to(root).as_posix())
    return sorted(found)


def undeclared_code(root: Path, dependencies: tuple[str, ...]) -> list[str]:
    """Returns imported modules of the repository that are neither harness nor declared.

    Without this check an edit of such a module would leave a stale result in DVC's cache.
    """
    folders = tuple(f"{dep}/" for dep in dependencies)
    return [
        path
        for path in loaded_code(root)
        if path not in HARNESS
        and path not in dependencies
        and not path.startswith(folders)
        and not _is_empty_marker(root, path)
    ]


def readable_code(root: Path) -> list[str]:
    """Returns the source files that a stage may load without declaring them: harness and empty markers."""
    markers = (
        path.relative_to(root).as_posix()
        for top in ("springhead", "stages")
        for path in root.glob(f"{top}/**/__init__.py")
    )
    return [*HARNESS, *(path for path in markers if path not in HARNESS and _is_empty_marker(root, path))]


def _is_empty_marker(root: Path, path: str) -> bool:
    """An ``__init__.py`` that holds nothing but a docstring cannot change a result."""
    if not _PACKAGE_MARKERS.match(path):
        return False
    import ast

    body = ast.parse((root / path).read_text(encoding="utf-8")).body
    return all(isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) for node in body)


def code_files(root: Path, dependencies: tuple[str, ...]) -> dict[str, str]:
    """Returns the digest of every source file a stage depends on, the harness included."""
    declared = [dep for dep in dependencies if dep.endswith((".py", ".json", ".jinja")) and not dep.startswith("data/")]
    for folder in (dep for dep in dependencies if (root / dep).is_dir() and not dep.startswith("data/")):
        declared += [p.relative_to(root).as_posix() for p in sorted((root / folder).rglob("*.py"))]
    present = [path for path in (*HARNESS, *declared) if (root / path).is_file()]
    return {path: file_digest(root / path) for path in sorted(set(present))}
