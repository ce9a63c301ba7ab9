"""Hermetic stages: a test mode in which a stage that reads what it does not declare fails.

DVC runs a stage again when a *declared* dependency changes. A file that is read but not declared
leaves stale results in the cache, and nothing says so. With ``SPRINGHEAD_HERMETIC=1`` the harness
seals a stage while its ``run`` function works. Two senses complete each other:

* Python's audit hook sees files that Python opens, folders it lists, SQLite and network connections,
  in the stage and in Python processes it starts (they inherit the seal, see ``stages/__init__.py``).
  It refuses before anything is read.
* A kernel watch (inotify) on ``data/`` sees files that HDF5, Arrow, DuckDB, safetensors and programs
  other than Python open by themselves, which no hook of Python is told of. The stage fails at its end.

docs/guide/reproducibility.md says what neither sees.
"""

# Paths are plain strings here: this runs for every file a process opens, and links must not be followed.
# ruff: noqa: PTH100, PTH112, PTH113

import contextlib
import ctypes
import importlib.util
import json
import os
import struct
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from springhead.errors import BadInput

if TYPE_CHECKING:
    from springhead.declared import Declared

SWITCH = "SPRINGHEAD_HERMETIC"
_INHERITED = "SPRINGHEAD_SEAL"  # how Python processes that a stage starts learn of its seal
_LOCAL = frozenset({"localhost", "127.0.0.1", "::1", "", "0.0.0.0", "::"})


@dataclass(frozen=True)
class Seal:
    """What one stage may read. All paths are absolute."""

    stage: str
    key: str
    """Where ``dvc.yaml`` lists the dependencies, for example ``stages.rl-collect.deps``."""
    roots: tuple[str, ...]
    """The checkout, and the main checkout if it is another: what lies elsewhere is not guarded."""
    readable: tuple[str, ...]
    """Files and folders that may be read."""
    journal: str
    """A file that takes the offences of all processes, so that no ``except`` can hide one."""

    def offence(self, path: str, verb: str) -> str:
        """Returns what is wrong with reading a path, or an empty string."""
        path = os.path.abspath(path)
        if path.endswith(".pyc"):
            with contextlib.suppress(ValueError):
                path = importlib.util.source_from_cache(path)
        if not self._guarded(path):
            path = os.path.realpath(path)  # another way to the same place
            if not self._guarded(path):
                return ""
        if any(path == allowed or path.startswith(allowed + "/") for allowed in self.readable):
            return ""
        root = next(root for root in self.roots if path == root or path.startswith(root + "/"))
        name = os.path.relpath(path, root)
        return f"dvc.yaml: stage {self.stage} {verb} {name}, which it does not declare; add it to {self.key}"

    def _guarded(self, path: str) -> bool:
        return any(path == root or path.startswith(root + "/") for root in self.roots)


_active: Seal | None = None
_installed = False


def _hook(event: str, arguments: tuple[Any, ...]) -> None:
    if _active is not None and event in _JUDGES:
        message = _JUDGES[event](_active, arguments)
        if message:
            _note(_active, message)
            raise BadInput(message)


def _note(seal: Seal, message: str) -> None:
    descriptor = os.open(seal.journal, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    try:
        os.write(descriptor, message.encode() + b"\n")  # one write, so that processes do not mix their lines
    finally:
        os.close(descriptor)


def _path(argument: Any) -> str | None:
    """Returns the path of an event's argument; None for a descriptor, whose opening was seen."""
    if isinstance(argument, int) or argument is None:
        return None
    return os.fsdecode(argument)


def _opened(seal: Seal, arguments: tuple[Any, ...]) -> str:
    path, flags = _path(arguments[0]), arguments[2]
    if path is None or (isinstance(flags, int) and flags & os.O_ACCMODE == os.O_WRONLY):
        return ""
    # A path relative to a descriptor cannot be told from one relative to the working folder; what is
    # not there cannot be read, and a folder is read by listing it.
    return seal.offence(path, "reads") if os.path.isfile(path) else ""


def _listed(seal: Seal, arguments: tuple[Any, ...]) -> str:
    path = _path(arguments[0] if arguments[0] is not None else ".")
    if path is None or not os.path.isdir(path):
        return ""
    path = os.path.abspath(path)
    # The import system lists the folders of code; what it loads is judged when it is opened.
    names = [os.path.relpath(path, root) for root in seal.roots if path == root or path.startswith(root + "/")]
    if names and (names[0] == "." or names[0].partition("/")[0] in ("springhead", "stages")):
        return ""
    return seal.offence(path, "lists the folder")


def _database(seal: Seal, arguments: tuple[Any, ...]) -> str:
    path = _path(arguments[0])
    return seal.offence(path, "reads") if path and os.path.isfile(path) else ""


def _connected(seal: Seal, arguments: tuple[Any, ...]) -> str:
    return _remote(seal, arguments[1])


def _resolved(seal: Seal, arguments: tuple[Any, ...]) -> str:
    return _remote(seal, (arguments[0] or "", arguments[1]))


def _remote(seal: Seal, address: Any) -> str:
    if not isinstance(address, tuple):  # a Unix socket has a path
        return ""
    host = os.fsdecode(address[0]) if isinstance(address[0], str | bytes) else str(address[0])
    if host in _LOCAL or host.startswith("127."):
        return ""
    return (
        f"stage {seal.stage} connects to {host}:{address[1]}; stages work offline: "
        "name the file in data/sources.yaml, fetch it once, and read it from there"
    )


_JUDGES = {
    "open": _opened,
    "os.listdir": _listed,
    "os.scandir": _listed,
    "socket.connect": _connected,
    "socket.getaddrinfo": _resolved,
    "socket.sendto": _connected,
    "sqlite3.connect": _database,
}


def _activate(seal: Seal | None) -> None:
    global _active, _installed
    _active = seal
    if seal is not None and not _installed:
        sys.addaudithook(_hook)  # it cannot be taken away again, only be made to look away
        _installed = True


def inherit() -> None:
    """Seals this process as the stage that started it is sealed."""
    values: dict[str, Any] = json.loads(os.environ[_INHERITED])
    values |= {key: tuple(values[key]) for key in ("roots", "readable")}
    _activate(Seal(**values))


# -- the kernel's watch -----------------------------------------------------------------------------


class Watch:
    """Tells which files below some folders were opened, by whomever."""

    _OPEN, _OVERFLOW, _IS_FOLDER = 0x20, 0x4000, 0x40000000
    _EVENT = struct.Struct("iIII")

    def __init__(self, folders: list[str]) -> None:
        self._libc = ctypes.CDLL(None, use_errno=True)
        self._descriptor = self._libc.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC)
        if self._descriptor < 0:
            raise BadInput(f"{SWITCH}: the kernel gives no watch ({os.strerror(ctypes.get_errno())}); unset it")
        self._folders = {}
        for folder in folders:
            number = self._libc.inotify_add_watch(self._descriptor, os.fsencode(folder), self._OPEN)
            if number < 0:
                raise BadInput(f"{SWITCH}: {folder} cannot be watched ({os.strerror(ctypes.get_errno())}); unset it")
            self._folders[number] = folder

    def close(self) -> list[str]:
        """Ends the watch and returns the paths of the files that were opened, sorted."""
        found = set()
        try:
            while True:
                content = os.read(self._descriptor, 1 << 16)
                place = 0
                while place < len(content):
                    number, mask, _, length = self._EVENT.unpack_from(content, place)
                    name = content[place + self._EVENT.size :][:length].rstrip(b"\0")
                    place += self._EVENT.size + length
                    if mask & self._OVERFLOW:
                        found.add(f"{self._folders[1]}/…")  # the kernel lost count, which is a finding too
                    elif name and not mask & self._IS_FOLDER:
                        found.add(os.path.join(self._folders[number], os.fsdecode(name)))
        except BlockingIOError:
            return sorted(found)
        finally:
            os.close(self._descriptor)


def _folders(data: Path, seal: Seal) -> list[str]:
    """Returns the folders below ``data/`` in which a stage has nothing, or not everything, to read."""
    found = []
    for folder, inner, _ in os.walk(data):
        inner[:] = [name for name in inner if seal.offence(os.path.join(folder, name), "reads")]
        found.append(folder)
    return found


# -- the harness's side -----------------------------------------------------------------------------


@contextlib.contextmanager
def sealed(root: Path, home: Path, declared: "Declared", *own: Path) -> Iterator[None]:
    """Seals a stage while its body runs, if the environment asks for it; else does nothing.

    Args:
        root: the checkout the stage runs in.
        home: its state folder.
        declared: what ``dvc.yaml`` says of the stage.
        *own: folders the stage may read because it fills them: output and scratch.

    Raises:
        BadInput: naming what was read, and the key of ``dvc.yaml`` that lacks it.
    """
    if os.environ.get(SWITCH) != "1":
        yield
        return
    seal = _seal(root, home, declared, own)
    journal = Path(seal.journal)
    journal.unlink(missing_ok=True)
    data = root / "data"
    watch = Watch(_folders(data, seal)) if sys.platform == "linux" and data.is_dir() else None
    os.environ[_INHERITED] = json.dumps(asdict(seal))
    _activate(seal)
    try:
        yield
    except BaseException as error:
        _raise_offences(seal, watch, error)
        raise
    _raise_offences(seal, watch, None)


def _raise_offences(seal: Seal, watch: Watch | None, cause: BaseException | None) -> None:
    """Breaks the seal and raises what was found; an error of the stage itself may be only its echo."""
    _activate(None)
    os.environ.pop(_INHERITED, None)
    journal = Path(seal.journal)
    found = journal.read_text(encoding="utf-8").splitlines() if journal.exists() else []
    journal.unlink(missing_ok=True)
    found += [offence for path in (watch.close() if watch else ()) if (offence := seal.offence(path, "reads"))]
    if found and not isinstance(cause, KeyboardInterrupt):
        found = list(dict.fromkeys(found))
        raise BadInput("\n".join(found[:20])) from cause


def _seal(root: Path, home: Path, declared: "Declared", own: tuple[Path, ...]) -> Seal:
    import yaml

    from springhead import environment
    from springhead.home import main_checkout

    base = declared.name.partition("@")[0]
    block = yaml.safe_load((root / "dvc.yaml").read_text(encoding="utf-8"))["stages"][base]
    main = main_checkout(root)
    inside = [*declared.dependencies, *environment.readable_code(root), "params.yaml"]
    state = [home / "sources", home / "spool"]
    packages = [Path(sys.prefix), Path(sys.base_prefix), *(p for r in (root, main) for p in r.glob("*.egg-info"))]
    caches = [folder / ".dvc" / "cache" for folder in (root, main)]  # behind the links that a checkout may be made of
    return Seal(
        stage=declared.name,
        key=f"stages.{base}.{'do.' if 'do' in block else ''}deps",
        roots=tuple(dict.fromkeys(str(folder) for folder in (root, main))),
        readable=tuple(str(path) for path in (*(root / name for name in inside), *own, *state, *packages, *caches)),
        journal=str(home / f"offences-{os.getpid()}"),
    )
