"""What differs between the receipts of the stages behind two data sets."""

from collections.abc import Iterator, Mapping
from typing import Any

from springhead.declared import is_data
from springhead.lineage.graph import step_of
from springhead.lineage.sides import Side


def changes(a: Side, b: Side) -> list[dict[str, Any]]:
    """Returns what differs between the receipts of the stages behind two data sets, makers first.

    Stages are matched by name; one that is alone with its step on both sides (``rl-filter@X`` and
    ``rl-filter@Y``) is matched too. Only pairs that differ are part of the answer.
    """
    found = []
    for one, two in _pairs(a, b):
        before = a.state.graph.receipts.get(one or "")
        after = b.state.graph.receipts.get(two or "")
        entry: dict[str, Any] = {"a": one, "b": two}
        if before is None or after is None:
            found.append(entry | {"changes": []})
        elif before != after and (listed := list(_changes(before, after))):
            found.append(entry | {"changes": listed})
    return found


def _pairs(a: Side, b: Side) -> list[tuple[str | None, str | None]]:
    first, second = (one.state.graph.upstream(one.stage) for one in (a, b))
    alone_a, alone_b = [s for s in first if s not in second], [s for s in second if s not in first]
    pairs: list[tuple[str | None, str | None]] = []
    for stage in first:
        if stage in second:
            pairs.append((stage, stage))
            continue
        same = [s for s in alone_b if step_of(s) == step_of(stage)]
        single = len(same) == 1 and sum(step_of(s) == step_of(stage) for s in alone_a) == 1
        pairs.append((stage, same[0] if single else None))
    matched = {two for _, two in pairs}
    return [*pairs, *((None, s) for s in alone_b if s not in matched)]


def _changes(a: Mapping[str, Any], b: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Yields the differences of two receipts of one stage, most telling first.

    ``harness`` is code that runs around every stage; it is no dependency, and decides nothing about the content.
    """
    facts = {
        "parameter": [
            {k: v for key, value in r["params"].items() for k, v in _flat(key, value).items()} for r in (a, b)
        ],
        "input": [{p: f["sha256"] for p, f in r["dependencies"].items() if is_data(p)} for r in (a, b)],
        "code": [_code(r, declared=True) for r in (a, b)],
        "lock": [r["environment"]["lock"] for r in (a, b)],
        "package": [r["environment"]["packages"] for r in (a, b)],
        "harness": [_code(r, declared=False) for r in (a, b)],
    }
    for kind, (before, after) in facts.items():
        for name in sorted(before.keys() | after.keys()):
            if before.get(name) != after.get(name):
                yield {"kind": kind, "name": name, "a": before.get(name), "b": after.get(name)}


def _code(receipt: Mapping[str, Any], declared: bool) -> dict[str, str]:
    """Returns the source files of a receipt that are dependencies of the stage, or those that are not."""
    folders = tuple(f"{path}/" for path in receipt["dependencies"])
    return {
        path: digest
        for path, digest in receipt["code"]["files"].items()
        if (path in receipt["dependencies"] or path.startswith(folders)) is declared
    }


def _flat(key: str, value: Any) -> dict[str, Any]:
    if isinstance(value, Mapping) and value:
        return {name: v for part, inner in value.items() for name, v in _flat(f"{key}.{part}", inner).items()}
    return {key: value}
