"""Prints the answer of :mod:`springhead.lineage.diff` for a terminal."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rich.console import RenderableType
from rich.markup import escape
from rich.table import Table
from rich.tree import Tree

from springhead.lineage.tree import short

_FEW = 4  # producers
_MANY = 12  # lines of one kind before the rest is counted
_BARS = " ▁▂▃▄▅▆▇█"
_COLOURS = {"a": "red", "b": "green"}


def render(answer: Mapping[str, Any]) -> Tree:
    """Returns the answer as a tree with tables of the columns' distributions."""
    tree = Tree("[bold]diff[/]", hide_root=True)
    for name in ("a", "b"):
        tree.add(_side(name, answer[name]))
    _rows(tree, answer)
    _receipts(tree, answer["receipts"])
    _numeric(tree, answer["numeric"])
    _categorical(tree, answer["categorical"])
    return tree


def _side(name: str, side: Mapping[str, Any]) -> str:
    chosen = "".join(f" · {key} {value}" for key, value in side["conditions"].items())
    digest = f" · {short(side['sha256'])}" if side["sha256"] else ""
    return (
        f"[bold {_COLOURS[name]}]{name.upper()}[/]  [bold]{escape(side['path'])}[/]  {side['rows']:,} rows"
        f"  [dim]{escape(side['revision'])} · made by {escape(side['stage'])}{digest}{escape(chosen)}[/]"
    )


def _listed(tree: Tree, title: str, lines: Sequence[RenderableType]) -> None:
    if not lines:
        return
    node = tree.add(title)
    for line in lines[:_MANY]:
        node.add(line)
    if len(lines) > _MANY:
        node.add(f"[dim]… and {len(lines) - _MANY} more; --json lists all[/]")


# -- rows -----------------------------------------------------------------------------------------


def _rows(tree: Tree, answer: Mapping[str, Any]) -> None:
    rows = answer["rows"]
    tree.add(f"[bold]{rows['common']:,} rows in both, {rows['only_a']:,} only in A, {rows['only_b']:,} only in B[/]")
    for name, other in (("a", "B"), ("b", "A")):
        fates = answer[f"only_{name}"]
        lines: list[RenderableType] = [_fate(f, name.upper(), other) for f in fates if "producer" not in f]
        lines += _produced([fate for fate in fates if "producer" in fate], other)
        _listed(tree, f"[bold {_COLOURS[name]}]only in {name.upper()}[/] ({rows[f'only_{name}']:,})", lines)
    if rows["other_facts"]:
        facts = ", ".join(f"{escape(column)} in {count:,} rows" for column, count in rows["other_facts"].items())
        tree.add(f"[yellow]rows in both that are described otherwise:[/] {facts}")


def _fate(fate: Mapping[str, Any], here: str, there: str) -> str:
    return f"{fate['rows']:,} {_what(fate, here, there)}{_examples(fate)}"


def _what(fate: Mapping[str, Any], here: str, there: str) -> str:
    rule = f"[bold]{escape(str(fate['rule']))}[/]"
    if fate["what"] == "dropped":
        return f"dropped in {there} by {rule}{_range(fate)}"
    if fate["what"] == "elsewhere":
        return f"in another part of {there}'s table: {escape(str(fate['rule']))}"
    if fate["what"] == "replaced here":
        return f"put in {here} by {rule} in the place of rows that {there} has as they came in"
    return f"left for another row in {there} by {rule}"


def _range(fate: Mapping[str, Any]) -> str:
    parts = []
    for name in ("value", "threshold"):
        low, high = fate.get(f"lowest_{name}"), fate.get(f"highest_{name}")
        if low is not None:
            parts.append(f"{name} {_number(low)}" + (f" to {_number(high)}" if high not in (low, None) else ""))
    return f" ({', '.join(parts)})" if parts else ""


def _produced(fates: Sequence[Mapping[str, Any]], there: str) -> list[RenderableType]:
    """Returns a branch for each reason, with the producers of its rows."""
    reasons = {
        ("left out", None): f"made in {there} too, but no part of the data set",
        ("not made", True): f"never made in {there}, which has the same producers: see what differs in the receipts",
        ("not made", False): f"never made in {there}, which does not have these producers",
        ("not made", None): f"never made in {there}",
    }
    found: list[RenderableType] = []
    for (what, known), reason in reasons.items():
        some = [f for f in fates if f["what"] == what and (what == "left out" or f["maker_is_there"] is known)]
        if some:
            node = Tree(f"{sum(f['rows'] for f in some):,} {reason}")
            for fate in some[:_FEW]:
                node.add(f"{fate['rows']:,} of {_producer(fate)}{_examples(fate)}")
            if len(some) > _FEW:
                node.add(f"[dim]… and {len(some) - _FEW} more producers; --json lists all[/]")
            found.append(node)
    return found


def _producer(fate: Mapping[str, Any]) -> str:
    facts = [f"{key} {_value(value)}" for key, value in fate["producer"].items() if value is not None]
    model = f" [dim]({escape(fate['model'])})[/]" if fate["model"] else ""
    return (", ".join(facts) or "unknown producers") + model


def _examples(fate: Mapping[str, Any]) -> str:
    shown = ", ".join(short(i) for i in fate["examples"][:2])
    return f"  [dim]row:{shown}{' …' if fate['rows'] > 2 else ''}[/]"


# -- receipts -------------------------------------------------------------------------------------


def _receipts(tree: Tree, receipts: Sequence[Mapping[str, Any]]) -> None:
    if not receipts:
        tree.add("[bold]the receipts behind both are the same[/]")
        return
    node = tree.add("[bold]what differs between the receipts[/]  [dim]makers first[/]")
    for pair in receipts:
        if pair["a"] is None or pair["b"] is None:
            node.add(f"{escape(pair['a'] or pair['b'])}  [dim]only behind {'A' if pair['a'] else 'B'}[/]")
            continue
        title = pair["a"] if pair["a"] == pair["b"] else f"{pair['a']} → {pair['b']}"
        _listed(node, escape(title), [_change(change) for change in pair["changes"]])


def _change(change: Mapping[str, Any]) -> str:
    values = [_value(change[side]) for side in ("a", "b")]
    return f"{change['kind']} {escape(change['name'])}: [red]{values[0]}[/] → [green]{values[1]}[/]"


def _value(value: Any) -> str:
    if isinstance(value, float):
        return _number(value)
    text = "(absent)" if value is None else short(value) if isinstance(value, str) and len(value) == 64 else str(value)
    return escape(text if len(text) <= 60 else text[:57] + "…")


# -- columns --------------------------------------------------------------------------------------


def _numeric(tree: Tree, columns: Mapping[str, Any]) -> None:
    if not columns:
        return
    table = Table(box=None, pad_edge=False, header_style="dim")
    for title in (
        "column",
        "",
        "rows",
        "mean",
        "sd",
        "min",
        "5 %",
        "25 %",
        "50 %",
        "75 %",
        "95 %",
        "max",
        "distribution",
    ):
        table.add_column(title, justify="left" if title in ("column", "", "distribution") else "right", no_wrap=True)
    for column, facts in columns.items():
        for name in ("a", "b"):
            side = facts[name]
            if side is None or not side["count"]:
                continue
            figures = [side["mean"], side["sd"], side["min"], *side["quantiles"].values(), side["max"]]
            cells = [f"{side['count']:,}", *("" if f is None else _number(f) for f in figures)]
            bars = f"[{_COLOURS[name]}]{_histogram(facts['histogram'].get(name, ()))}[/]"
            table.add_row(escape(column) if name == "a" else "", name.upper(), *cells, bars)
    node = tree.add(
        "[bold]numeric columns[/]  [dim]same bins for A and B, from the lowest to the highest value of both[/]"
    )
    node.add(table)


def _histogram(counts: Iterable[int]) -> str:
    """Returns one bar per bin, scaled to the fullest; a bin with anything in it is never blank."""
    counts = list(counts)
    most = max(counts, default=0) or 1
    return "".join(_BARS[0 if not n else max(1, round(n / most * (len(_BARS) - 1)))] for n in counts)


def _number(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _categorical(tree: Tree, columns: Mapping[str, Any]) -> None:
    lines, same = [], []
    for column, facts in columns.items():
        changed = [v for v in facts["values"] if v["a"] != v["b"]]
        if not changed:
            same.append(column)
            continue
        shown = [f"{_value(v['value'])} [red]{v['a']:,}[/]→[green]{v['b']:,}[/]" for v in changed[:6]]
        rest = f" … {len(changed) - 6} more" if len(changed) > 6 else ""
        values = f"{facts['distinct_a']} and {facts['distinct_b']} values, {facts['distinct_common']} of them in both"
        lines.append(f"[bold]{escape(column)}[/]  [dim]{values}:[/] {' · '.join(shown)}{rest}")
    if same:
        lines.append(f"[dim]same on both sides: {escape(', '.join(same))}[/]")
    _listed(tree, "[bold]other columns[/]  [dim]rows in A→B by value[/]", lines)
