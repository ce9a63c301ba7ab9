"""The ledger: append-only JSON lines, each holding the digest of the line before it.

It keeps the volatile facts (when, where, who, how long) that must not enter any output, and
the promotions. Editing, removing or reordering a line breaks the chain and is named by
:meth:`Ledger.verify`.
"""

import fcntl
import hashlib
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from springhead.errors import BadInput, SpringheadError
from springhead.jsonio import canonical, parse

if TYPE_CHECKING:
    from springhead.keys import Keys

GENESIS = "0" * 64
_KEYS = ("seq", "prev", "time", "kind", "body")
# What every reader of an entry of a kind may rely on.
_BODY = {
    "execution": ("execution", "stage", "receipt"),
    "promotion": ("model", "version", "digest"),
    "acceptance": ("stage", "path", "data", "profile"),
}


def _check(entry: Any) -> None:
    """Raises KeyError, TypeError or ValueError unless a value is an entry that readers can rely on."""
    if any(key not in entry for key in _KEYS) or not isinstance(entry["seq"], int):
        raise ValueError("not an entry")
    if any(not isinstance(entry["body"][key], str) for key in _BODY.get(entry["kind"], ())):
        raise ValueError("a digest, name or version is no text")


class Ledger:
    """The ledger file ``ledger.jsonl`` in the state folder of a repository."""

    def __init__(self, home: Path) -> None:
        self.path = home / "ledger.jsonl"

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keeps other processes from appending."""
        # The kernel drops the lock when the process dies, so no stale lock can be left behind.
        with (self.path.parent / "ledger.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield

    def _lines(self) -> list[bytes]:
        return self.path.read_bytes().split(b"\n")[:-1] if self.path.exists() else []

    def append(self, kind: str, body: dict[str, Any], keys: "Keys | None" = None) -> dict[str, Any]:
        """Adds an entry, signs the new head where keys are given, and returns the entry.

        A head that cannot be signed is a warning on standard error, because the entry is a fact that
        must not be lost; :mod:`springhead.lineage.head` says what the audit makes of it.

        Args:
            kind: what the entry is: ``execution``, ``promotion``, ``failure`` ...
            body: its facts, JSON types only.
            keys: the keys of the checkout. A signer outside this process is asked for promotions only.

        Raises:
            BadInput: if the last line is no entry: somebody wrote into the file.
        """
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.locked():
            self._drop_torn_line()
            last = self._last_line()
            entry = {
                "seq": self._seq(last) + 1,
                "prev": hashlib.sha256(last).hexdigest() if last else GENESIS,
                "time": datetime.now(UTC).isoformat(timespec="milliseconds"),
                "kind": kind,
                "body": body,
            }
            with self.path.open("ab") as file:
                file.write(canonical(entry) + b"\n")
                file.flush()
                os.fsync(file.fileno())
            if keys is not None and (kind == "promotion" or not keys.external):
                from springhead.lineage import head

                try:
                    head.sign_head(self, keys)
                except (SpringheadError, OSError) as error:
                    print(f"warning: the head of the ledger is not signed: {error}", file=sys.stderr)
        return entry

    def _last_line(self) -> bytes:
        """Returns the last whole line without its newline, reading only the end of the file."""
        if not self.path.exists():
            return b""
        with self.path.open("rb") as file:
            end = file.seek(0, os.SEEK_END)
            tail, block = b"", 1 << 16
            while end > 0 and tail.count(b"\n") < 2:
                start = max(0, end - block)
                file.seek(start)
                tail = file.read(end - start) + tail
                end = start
        return tail.rstrip(b"\n").rpartition(b"\n")[2]

    def _seq(self, line: bytes) -> int:
        """Returns the number of an entry, -1 for none."""
        try:
            return int(parse(line)["seq"]) if line else -1
        except (ValueError, KeyError, TypeError) as error:
            raise BadInput(f"{self.path}: its last line is no entry; `springhead audit` says more") from error

    def _drop_torn_line(self) -> None:
        """Removes what a kill left of an unfinished append: bytes after the last newline."""
        if not self.path.exists() or self.path.stat().st_size == 0:
            return
        with self.path.open("rb") as file:
            file.seek(-1, os.SEEK_END)
            if file.read(1) == b"\n":
                return
        end = self.path.read_bytes().rfind(b"\n") + 1
        with self.path.open("r+b") as file:
            file.truncate(end)

    def entries(self) -> list[dict[str, Any]]:
        """Returns all entries, oldest first.

        Raises:
            BadInput: naming the line that is not JSON.
        """
        found = []
        for number, line in enumerate(self._lines(), start=1):
            try:
                entry = parse(line)
                _check(entry)
            except (ValueError, KeyError, TypeError) as error:
                raise BadInput(f"{self.path}:{number}: damaged line; restore the file from a backup") from error
            found.append(entry)
        return found

    def head(self) -> str:
        """Returns the digest of the last line, or 64 zeros for an empty ledger."""
        return self.extent()[1]

    def extent(self) -> tuple[int, str]:
        """Returns how many entries there are and the digest of the last, reading only the end."""
        last = self._last_line()
        return self._seq(last) + 1, hashlib.sha256(last).hexdigest() if last else GENESIS

    def digests(self) -> list[str]:
        """Returns the digest of every line, oldest first."""
        return [hashlib.sha256(line).hexdigest() for line in self._lines()]

    def verify(self) -> list[str]:
        """Checks the chain and returns one message per broken line; empty means whole."""
        problems, expected = [], GENESIS
        for number, line in enumerate(self._lines(), start=1):
            try:
                entry = parse(line)
                _check(entry)
                if entry["prev"] != expected:
                    problems.append(
                        f"{self.path}:{number}: does not follow line {number - 1}: a line was changed, removed or moved"
                    )
                if entry["seq"] != number - 1:
                    problems.append(f"{self.path}:{number}: holds entry {entry['seq']}, expected {number - 1}")
            except (ValueError, KeyError, TypeError):
                problems.append(f"{self.path}:{number}: not a ledger entry")
            expected = hashlib.sha256(line).hexdigest()
        return problems
