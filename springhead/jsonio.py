"""JSON and JSON lines with one byte-exact form.

Everything that is digested goes through here: keys are sorted, NaN is refused, text is UTF-8
and a file ends with a newline, so equal content always has equal bytes.
"""

import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from springhead.errors import BadInput


def parse(text: str | bytes) -> Any:
    """Reads a JSON value.

    Raises:
        ValueError: it is none, or nested too deeply to be read.
    """
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error


def canonical(obj: Any) -> bytes:
    """Returns the canonical form of a JSON value: sorted keys, no spaces, UTF-8.

    Raises:
        BadInput: if the value holds NaN, infinity or half a character, or is not made of JSON types.
    """
    try:
        text = json.dumps(obj, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
        return text.encode("utf-8")
    except (TypeError, ValueError, RecursionError) as error:
        raise BadInput(f"cannot be written as JSON: {error}") from error


def write_json(path: Path | str, obj: Any) -> None:
    """Writes a JSON value with sorted keys, one-space indent and a final newline."""
    try:
        text = json.dumps(obj, sort_keys=True, indent=1, ensure_ascii=False, allow_nan=False)
        content = f"{text}\n".encode()
    except (TypeError, ValueError, RecursionError) as error:
        raise BadInput(f"{path}: cannot be written as JSON: {error}") from error
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_bytes(content)


def write_json_atomic(path: Path, obj: Any) -> None:
    """Like :func:`write_json`, but a reader sees either the old file or the whole new one."""
    temporary = path.with_name(f".{path.name}.tmp-{os.getpid()}")
    write_json(temporary, obj)
    with temporary.open("rb") as file:
        os.fsync(file.fileno())
    os.replace(temporary, path)


def read_json(path: Path | str) -> Any:
    """Reads a JSON file.

    Raises:
        BadInput: if the file is missing, cannot be read or is not valid JSON.
    """
    try:
        return parse(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise BadInput(f"{path}: no such file; check the path, or run the stage that makes it (`dvc repro`)") from None
    except OSError as error:
        raise BadInput(f"{path}: cannot be read ({error.strerror}); restore it with `dvc checkout`") from error
    except ValueError as error:
        raise BadInput(f"{path}: not valid JSON ({error}); restore it with `dvc checkout`") from error


def write_jsonl(path: Path | str, rows: Iterable[dict[str, Any]]) -> int:
    """Writes rows as JSON lines in canonical form and returns how many there were."""
    count = 0
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with Path(path).open("wb") as file:
        for row in rows:
            file.write(canonical(row) + b"\n")
            count += 1
    return count


def read_jsonl(path: Path | str) -> Iterator[dict[str, Any]]:
    """Yields the rows of a JSON-lines file.

    Raises:
        BadInput: if there is no such file; naming file and line, if a line is not UTF-8 or no JSON object.
    """
    if not Path(path).is_file():
        raise BadInput(f"{path}: no such file; check the path, or run the stage that makes it (`dvc repro`)")
    # Bytes, because a text file is decoded by the block: the line at fault could not be named.
    with Path(path).open("rb") as file:
        for number, line in enumerate(file, start=1):
            try:
                row = _row(line.decode("utf-8"))
            except UnicodeDecodeError as error:
                raise BadInput(f"{path}:{number}: not valid UTF-8 ({error}); write the file in UTF-8") from error
            except (ValueError, RecursionError, BadInput) as error:
                raise BadInput(f"{path}:{number}: not valid JSON ({error}); mend or remove the line") from error
            if not isinstance(row, dict):
                raise BadInput(f"{path}:{number}: expected a JSON object, found {type(row).__name__}")
            yield row


def _row(line: str) -> Any:
    """One line, which must be such that it can be written again."""
    row = json.loads(line, parse_constant=_refused)
    if "\\ud" in line or "\\uD" in line:  # perhaps half of a character that takes two escapes
        canonical(row)
    return row


def _refused(constant: str) -> None:
    """NaN and the infinities, which Python reads and JSON does not have."""
    raise ValueError(f"{constant} is no JSON")
