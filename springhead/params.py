"""Parameters: a block of ``params.yaml`` read strictly into a frozen dataclass.

An unknown key, a missing key or a wrong type is an error that names the key, because a
parameter that is silently ignored is a false statement about how a model was made.
"""

import argparse
import ast
import dataclasses
import difflib
import inspect
import itertools
import json
import re
import textwrap
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml

from springhead.errors import BadInput

P = TypeVar("P")


class DuplicateKey(yaml.YAMLError):
    """A mapping that gives a key twice, of which PyYAML would drop the first without a word."""


class Loader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # type: ignore[misc]
    """A safe YAML loader that reads ``1e-6`` as a number and refuses a key given twice, as DVC does.

    PyYAML alone reads text, and keeps the last of the two values.
    """

    def construct_document(self, node: yaml.Node) -> Any:
        """Makes the values of a document.

        Raises:
            DuplicateKey: a mapping in it gives a key twice.
        """
        # Before anything is made: merge keys (<<) are then put into the mappings, whose own keys go over theirs.
        ahead, seen = [node], set()
        while ahead:
            here = ahead.pop()
            if id(here) in seen:  # an alias leads to the same node again
                continue
            seen.add(id(here))
            if isinstance(here, yaml.MappingNode):
                self._refuse_duplicates(here)
                ahead += [part for pair in reversed(here.value) for part in reversed(pair)]
            elif isinstance(here, yaml.SequenceNode):
                ahead += reversed(here.value)
        return super().construct_document(node)

    def _refuse_duplicates(self, mapping: yaml.MappingNode) -> None:
        lines: dict[Any, int] = {}
        for key, _ in mapping.value:
            if not isinstance(key, yaml.ScalarNode):  # PyYAML refuses it later: it cannot be a key in Python
                continue
            # `<<` and `=` stand for no value of their own; of others the value counts: `on` and `true` are one key.
            special = key.tag in ("tag:yaml.org,2002:merge", "tag:yaml.org,2002:value")
            value = key.value if special else self.construct_object(key, deep=True)
            line = key.start_mark.line + 1
            if value in lines:
                first = f"first on line {lines[value]}"
                raise DuplicateKey(f"line {line} gives the key {key.value!r} again, {first}; keep one of the two")
            lines[value] = line


Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+(\.\d*)?|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)


def read_params(path: Path | str) -> dict[str, Any]:
    """Reads a parameter file.

    Raises:
        BadInput: if it is missing, cannot be read, is not valid YAML, or not a mapping.
    """
    try:
        values = yaml.load(Path(path).read_text(encoding="utf-8"), Loader=Loader)
    except FileNotFoundError:
        do = "restore it with `git checkout`" if Path(path).name == "params.yaml" else "check its name"
        raise BadInput(f"{path}: no such file; {do}") from None
    except IsADirectoryError:
        raise BadInput(f"{path}: is a folder; name a YAML file") from None
    except OSError as error:
        raise BadInput(f"{path}: cannot be read ({error.strerror}); name a YAML file that can") from error
    except UnicodeDecodeError as error:
        raise BadInput(f"{path}: not valid UTF-8 ({error}); write the file in UTF-8") from error
    except (yaml.YAMLError, ValueError) as error:  # a ValueError: a date that the calendar does not have
        raise BadInput(f"{path}: not valid YAML: {error}") from error
    if not isinstance(values, dict):
        raise BadInput(f"{path}: expected a mapping of parameters at the top level")
    return values


def with_overrides(values: dict[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """The settings with ``key=value`` arguments in; a dot leads into a block.

    Raises:
        BadInput: an argument has no ``=``, its value is not valid YAML, or a key leads through something that is no
            block.
    """
    for override in overrides:
        key, sign, text = override.partition("=")
        if not sign or not key:
            raise BadInput(f"{override!r}: expected key=value, such as sft.learning_rate=1e-4")
        *blocks, last = key.split(".")
        place: Any = values
        for block in blocks:
            place = place.setdefault(block, {})
            if not isinstance(place, dict):
                raise BadInput(f"{override!r}: {block} is no block of settings")
        try:
            place[last] = yaml.load(text, Loader=Loader)
        except (yaml.YAMLError, ValueError) as error:
            raise BadInput(f"{override!r}: the value is not valid YAML ({' '.join(str(error).split())})") from error
    return values


def from_command(cls: type[P], module: str, about: str, arguments: Sequence[str]) -> P:
    """The settings of a command: a YAML file, and ``key=value`` arguments over it. ``--help`` lists the keys.

    Args:
        cls: the dataclass of the settings.
        module: the command's module.
        about: what it does.
        arguments: of the command line; one that cannot be parsed ends the process with exit code 2.

    Raises:
        BadInput: the file, or a key of it, cannot be used.
    """
    parser = argparse.ArgumentParser(
        prog=f"python -m {module}",
        description=about,
        epilog="\n".join(["keys of the settings:", *keys_of(cls)]),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("settings", help="YAML file with the keys below")
    over = "put over the keys of the file; a dot leads into a block"
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", default=[], help=over)
    given = parser.parse_args(arguments)
    return load(cls, with_overrides(read_params(given.settings), given.overrides), given.settings)


def keys_of(cls: type, prefix: str = "") -> Iterator[str]:
    """Yields lines that list the keys of a dataclass with their types, defaults and docstrings, blocks by dots."""
    hints, docs = typing.get_type_hints(cls), _docs(cls)
    for field in dataclasses.fields(cls):
        kind, key = hints[field.name], prefix + field.name
        yield f"  {key}: {_kind_name(kind)}{_default(field)}"
        yield from textwrap.wrap(docs.get(field.name, ""), 104, initial_indent=" " * 6, subsequent_indent=" " * 6)
        for block in (kind, *typing.get_args(kind)):
            if isinstance(block, type) and dataclasses.is_dataclass(block):
                yield from keys_of(block, f"{key}.")


def _docs(cls: type) -> dict[str, str]:
    """The docstring below each attribute of a class; Python itself does not keep them."""
    (node,) = ast.parse(textwrap.dedent(inspect.getsource(cls))).body
    found = {}
    for field, below in itertools.pairwise(node.body if isinstance(node, ast.ClassDef) else []):
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name) and isinstance(below, ast.Expr):
            found[field.target.id] = " ".join(str(ast.literal_eval(below.value)).split())
    return found


def _kind_name(kind: Any) -> str:
    """An annotated type in words."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (types.UnionType, typing.Union):
        return " or ".join(map(_kind_name, arguments))
    if origin is typing.Literal:
        return ", ".join(map(str, arguments))
    if origin in (tuple, list):
        return f"list of {_kind_name(arguments[0])}" if arguments else "list"
    if dataclasses.is_dataclass(kind):
        return "block"
    words = {str: "text", int: "whole number", float: "number", bool: "true or false", types.NoneType: "null"}
    return words.get(kind, getattr(kind, "__name__", str(kind)))


def _default(field: dataclasses.Field[Any]) -> str:
    """What a key has if it is not given, as it would be written."""
    if field.default is not dataclasses.MISSING:
        return f" = {json.dumps(field.default, default=str)}"
    return "" if field.default_factory is not dataclasses.MISSING else " (needed)"


def lookup(values: Mapping[str, Any], key: str, where: str) -> Any:
    """Returns the value at a dotted key.

    Raises:
        BadInput: naming the first part of the key that is not there.
    """
    here: Any = values
    for depth, part in enumerate(parts := key.split("."), start=1):
        if not isinstance(here, Mapping) or part not in here:
            raise BadInput(f"{where}: missing key '{'.'.join(parts[:depth])}'; add it")
        here = here[part]
    return here


def load(cls: type[P], values: Any, where: str) -> P:
    """Makes a dataclass from a mapping, checking every key and type.

    Args:
        cls: a (frozen) dataclass; nested dataclasses, ``X | None``, ``Literal``, ``tuple``,
            ``list`` and ``dict`` fields are understood.
        values: the mapping read from YAML.
        where: how errors name the place, for example ``params.yaml: rl.collect``.

    Raises:
        BadInput: naming the key that is unknown, missing, of a wrong type or out of range.
    """
    if not isinstance(values, Mapping):
        raise BadInput(f"{where}: expected a mapping of parameters, found {values!r}")
    hints = typing.get_type_hints(cls)
    fields = {field.name: field for field in dataclasses.fields(cls)}  # type: ignore[arg-type]
    for key in values:
        if key not in fields:
            close = difflib.get_close_matches(str(key), list(fields), n=1)
            hint = f"; did you mean '{close[0]}'?" if close else f"; known keys: {', '.join(fields)}"
            raise BadInput(f"{where}.{key}: unknown parameter{hint}")
    missing = [
        name
        for name, field in fields.items()
        if name not in values and field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
    ]
    if missing:
        raise BadInput(f"{where}.{missing[0]}: missing parameter; add it")
    made = {key: _convert(hints[key], value, f"{where}.{key}") for key, value in values.items()}
    try:
        return cls(**made)
    except ValueError as error:  # range checks of __post_init__
        raise BadInput(f"{where}: {error}") from error


def _convert(kind: Any, value: Any, where: str) -> Any:
    """Converts one YAML value to an annotated type, or raises BadInput naming ``where``."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if kind is Any:
        return value
    if dataclasses.is_dataclass(kind) and isinstance(kind, type):
        return load(kind, value, where)
    if origin in (types.UnionType, typing.Union):
        return _convert_union(arguments, value, where)
    if origin is typing.Literal:
        if value in arguments:
            return value
        raise BadInput(f"{where}: {value!r} is not one of {', '.join(map(repr, arguments))}")
    if origin in (tuple, list):
        return _convert_sequence(origin, arguments, value, where)
    if origin is dict and isinstance(value, Mapping):
        return {key: _convert(arguments[1], item, f"{where}.{key}") for key, item in value.items()}
    if kind is float and isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    if isinstance(kind, type) and type(value) is kind:
        return value
    name = getattr(kind, "__name__", str(kind))
    raise BadInput(f"{where}: expected {name}, found {value!r} ({type(value).__name__})")


def _convert_union(arguments: tuple[Any, ...], value: Any, where: str) -> Any:
    if value is None and type(None) in arguments:
        return None
    problems = []
    for option in arguments:
        if option is type(None):
            continue
        try:
            return _convert(option, value, where)
        except BadInput as error:
            problems.append(str(error))
    raise BadInput("; or ".join(problems) or f"{where}: expected null, found {value!r}")


def _convert_sequence(origin: Any, arguments: tuple[Any, ...], value: Any, where: str) -> Any:
    if not isinstance(value, list | tuple):
        raise BadInput(f"{where}: expected a list, found {value!r}")
    if origin is tuple and arguments and arguments[-1] is not Ellipsis:
        if len(arguments) != len(value):
            raise BadInput(f"{where}: expected {len(arguments)} items, found {len(value)}")
        kinds: tuple[Any, ...] = arguments
    else:
        kinds = (arguments[0] if arguments else Any,) * len(value)
    items = [_convert(kind, item, f"{where}[{i}]") for i, (kind, item) in enumerate(zip(kinds, value, strict=True))]
    return origin(items)


OPEN = ("rl.train.algorithms", "rl.train.tasks")
"""Blocks that hold what differs from defaults in the code: a profile may add keys, the stage checks them."""


def overlay(base: Mapping[str, Any], changes: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Returns ``base`` with the leaves of ``changes`` put over it; null takes a whole mapping away.

    Raises:
        BadInput: if ``changes`` names a key that ``base`` does not have, outside the blocks of ``OPEN``.
    """
    merged = dict(base)
    is_open = any(f"{where}.".endswith(f".{block}.") or f".{block}." in where for block in OPEN)
    for key, value in changes.items():
        if key not in base and not is_open:
            close = difflib.get_close_matches(str(key), list(base), n=1)
            raise BadInput(f"{where}: unknown key '{key}'" + (f"; did you mean '{close[0]}'?" if close else ""))
        if value is None and isinstance(base.get(key), Mapping):
            del merged[key]
            continue
        both = isinstance(value, Mapping) and isinstance(base.get(key), Mapping)
        merged[key] = overlay(base[key], value, f"{where}.{key}") if both else value
    return merged
