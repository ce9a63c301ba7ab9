"""Prints answers about lineage as trees for a terminal."""

from collections.abc import Iterable, Mapping
from typing import Any

from rich.markup import escape
from rich.tree import Tree

from springhead.git import uncommitted
from springhead.progress import duration

_SHORT = 12  # digits of a digest in print; --json has all of them
_MANY = 12  # lines of one kind before the rest is counted


def render(answer: Mapping[str, Any]) -> Tree:
    """Returns the tree of an answer of :mod:`springhead.lineage.query`."""
    return _row_tree(answer) if answer["kind"] == "row" else _model_tree(answer)


def short(digest: str | None) -> str:
    """Returns the first digits of a digest."""
    return (digest or "?")[:_SHORT]


def figures(values: Mapping[str, Any], skip: Iterable[str] = ()) -> str:
    """Returns ``key value`` pairs of plain values, rounded for reading."""
    parts = []
    for key, value in values.items():
        if key in skip or value is None or isinstance(value, dict | list):
            continue
        text = f"{value:.4g}" if isinstance(value, float) else str(value)
        parts.append(f"{key} {short(text) if len(text) == 64 else text}")
    return " · ".join(parts)


def _branch(tree: Tree, title: str, lines: list[str]) -> Tree | None:
    """Adds a titled branch, cut after a screenful."""
    if not lines:
        return None
    node = tree.add(f"[bold]{title}[/]")
    for line in lines[:_MANY]:
        node.add(line)
    if len(lines) > _MANY:
        node.add(f"[dim]… and {len(lines) - _MANY} more; --json lists all[/]")
    return node


def _model_tree(answer: Mapping[str, Any]) -> Tree:
    registry = answer.get("registry")
    title = f"[bold cyan]{escape(answer['name'])}[/]"
    if registry:
        aliases = "".join(f" @{alias}" for alias in registry["aliases"])
        title = f"[bold green]{escape(registry['name'])}/{registry['version']}{aliases}[/]  {title}"
    tree = Tree(f"{title}  [dim]{short(answer['sha256']) if answer['sha256'] else answer['kind']}[/]")
    if answer.get("model"):
        tree.add(f"{answer['model']['kind']} · {escape(figures(answer['model']['facts']))}")
    _promotion(tree, answer)
    _branch(tree, "data sets", [_dataset(d) for d in answer["datasets"]])
    _branch(tree, "filter rules", [_rule(rule) for rule in answer["filters"]])
    _branch(tree, "rows come from", [_origin(o) for o in answer["origins"]])
    _branch(tree, "verdicts", [_verdict(v) for v in answer["verdicts"]])
    for evaluation in answer["evaluations"]:
        _branch(tree, f"evaluated by {escape(evaluation['stage'])}", _evaluated(evaluation))
    _branch(tree, "models made from it", [_model(m) for m in answer.get("models", ())])
    stages = tree.add("[bold]made by[/]  [dim]latest first[/]")
    for stage in reversed(answer["stages"]):
        _stage(stages, stage)
    _missing(tree, answer)
    return tree


def _promotion(tree: Tree, answer: Mapping[str, Any]) -> None:
    promotion = answer.get("promotion")
    if promotion:
        signature = promotion.get("signature")
        signed = f" · signature {short(signature) if isinstance(signature, str) else 'present'}" if signature else ""
        line = f"promoted as {promotion['model']}/{promotion['version']} on {promotion['time'][:19]}"
        tree.add(f"[green]{escape(line)}[/] · ledger entry {promotion['entry']}{signed}")
    elif answer["kind"] == "model":
        tree.add("[dim]not promoted[/]")


def _dataset(data: Mapping[str, Any]) -> str:
    made = "made by" if data["role"] == "output" else "trained on by"
    rows = f"{data['rows']:,} rows" if data["rows"] != 1 else "1 row"
    return f"{escape(data['path'])}  {rows}  [dim]{short(data['sha256'])} · {made} {escape(data['stage'])}[/]"


def _rule(rule: Mapping[str, Any]) -> str:
    dropped = f"[red]{rule['dropped']} dropped[/]" if rule["dropped"] else "0 dropped"
    replaced = f", {rule['replaced']} replaced" if rule["replaced"] else ""
    low, high = rule.get("lowest_threshold"), rule.get("highest_threshold")
    threshold = ""
    if low is not None:
        threshold = f" · threshold {_number(low)}" + (f" to {_number(high)}" if high != low else "")
    return (
        f"{escape(rule['rule'])}: {rule['kept']} kept, {dropped}{replaced}  [dim]{escape(rule['stage'])}{threshold}[/]"
    )


def _number(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _origin(origin: Mapping[str, Any]) -> str:
    where = f"  [dim]{escape(origin['model'])}[/]" if origin.get("model") else ""
    return f"{origin['rows']:,} rows · {escape(figures(origin, ('rows', 'data', 'model')))}{where}"


def _verdict(verdict: Mapping[str, Any]) -> str:
    colour = {"none": "green", "warning": "yellow"}.get(verdict["severity"], "red")
    state = {"none": "passed", "warning": "passed with warnings"}.get(verdict["severity"], "FAILED")
    failed = f" · failed: {', '.join(verdict['failed'])}" if verdict["failed"] else ""
    facts = f"{verdict['expectations']} expectations, {verdict['rows']:,} rows, {verdict['quarantined']} quarantined"
    return (
        f"[{colour}]{state}[/] {escape(verdict['suite'])}: {facts}{escape(failed)}  [dim]{escape(verdict['path'])}[/]"
    )


def _evaluated(evaluation: Mapping[str, Any]) -> list[str]:
    """Returns one line per cost limit, or one for all figures, or where to look."""
    found = evaluation["figures"]
    lines = [f"cost limit {escape(k)}: {escape(figures(v))}" for k, v in found.get("limits", {}).items()]
    if found.get("metrics"):
        lines.append(escape(figures(found["metrics"])))
    return lines or [f"[dim]{escape(', '.join(evaluation['outputs']))}[/]"]


def _model(model: Mapping[str, Any]) -> str:
    return f"{escape(model['path'])}  [dim]{short(model['sha256'])} · {escape(figures(model['facts']))}[/]"


def _stage(tree: Tree, stage: Mapping[str, Any]) -> None:
    node = tree.add(f"[bold]{escape(stage['stage'])}[/]  [dim]receipt {short(stage['receipt'])}[/]")
    for run in stage["executions"][-1:]:
        git = run.get("git", {})
        commit = (f"commit {short(git['revision'])}" if git.get("revision") else "no commit") + uncommitted(git)
        node.add(f"{run['started'][:19]} on {escape(run['host'])} in {duration(run['seconds'])} · {commit}")
    if not stage["executions"]:
        node.add("[dim]no execution in this ledger (made on another machine)[/]")
    for key, value in sorted(stage["params"].items()):
        if key != "seed":
            _parameters(node, key, value)
    for used in stage["inputs"]:
        mark = "" if used["verified"] else "  [red]does not match what was made[/]"
        node.add(f"read {escape(used['path'])}  [dim]{short(used['sha256'])}[/]{mark}")


def _parameters(tree: Tree, name: str, value: Any) -> None:
    """Adds a parameter; a block of them gets one line for its plain values and a branch for each block in it."""
    if not isinstance(value, Mapping):
        tree.add(f"[dim]{escape(name)}:[/] {escape(plain_text(value))}")
        return
    inner = {key: entry for key, entry in value.items() if isinstance(entry, Mapping) and entry}
    line = " · ".join(f"{key} {plain_text(entry)}" for key, entry in sorted(value.items()) if key not in inner)
    node = tree.add(f"[dim]{escape(name)}:[/] {escape(line)}".rstrip())
    for key, entry in sorted(inner.items()):
        _parameters(node, key, entry)


def flat(name: str, value: Any) -> list[tuple[str, str]]:
    """Returns a parameter as lines of a dotted name and a text: one for each plain value in nested blocks."""
    if not isinstance(value, Mapping) or not value:
        return [(name, plain_text(value))]
    return [line for key, entry in sorted(value.items()) for line in flat(f"{name}.{key}", entry)]


def plain_text(value: Any) -> str:
    """Returns a parameter as people write it."""
    if isinstance(value, list):
        return f"[{', '.join(plain_text(entry) for entry in value)}]"
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key} {plain_text(entry)}" for key, entry in sorted(value.items())) + "}"
    return "none" if value is None else _number(value)


def _row_tree(answer: Mapping[str, Any]) -> Tree:
    tree = Tree(f"[bold cyan]row {answer['name']}[/]")
    for place in answer["places"]:
        node = tree.add(f"in {escape(place['table'])}  [dim]{escape(place['stage'])}[/]")
        node.add(escape(figures(place["row"], ("id", "parents"))))
    _branch(tree, "made by", [_model(m) for m in answer["made_by"]])
    _branch(tree, "filters", [_decision(d) for d in answer["decisions"]])
    found = [f"[red]{escape(q['row']['expectation'])}[/] {escape(str(q['row'].get('detail', '')))}"
             for q in answer["quarantine"]]  # fmt: skip
    _branch(tree, "in quarantine", found)
    _branch(tree, "made from", [_relative(r) for r in answer["parents"]])
    _branch(tree, "became", [_relative(r) for r in answer["children"]])
    _branch(tree, "in the training data of", [_trained(m) for m in answer["models"] if m["direct"]])
    through = [_trained(m) for m in answer["models"] if not m["direct"]]
    _branch(tree, "in the training data of, through rows made from it", through)
    if not answer["models"]:
        tree.add("[dim]trained no model[/]")
    _missing(tree, answer)
    return tree


def _decision(decision: Mapping[str, Any]) -> str:
    row = decision["row"]
    state = "[green]kept[/]" if row["kept"] else "[red]dropped[/]"
    if row.get("replaced_by"):
        # A changed row goes on under another id; a duplicate goes because an equal row stays.
        state = "[yellow]changed[/]" if row["kept"] else "[red]dropped[/]"
        state += f" {'into' if row['kept'] else 'for the equal row'} {short(row['replaced_by'])}"
    facts = figures({key: row.get(key) for key in ("value", "threshold")})
    return f"{state} by {escape(row['rule'])}: {escape(facts)}  [dim]{escape(decision['stage'])}[/]"


def _relative(relative: Mapping[str, Any]) -> str:
    step = f"{relative['step']} steps" if relative["step"] > 1 else "1 step"
    return f"row {short(relative['id'])}  [dim]{relative['relation']}, {step}[/]"


def _trained(model: Mapping[str, Any]) -> str:
    promoted = f"  [green]{escape(', '.join(model['promoted_as']))}[/]" if model["promoted_as"] else ""
    part = ""
    if model["trained_rows"] < model["data_rows"]:
        part = f"  [yellow]took {model['trained_rows']} of {model['data_rows']} rows[/]"
    old = "" if model["current"] else "  [yellow]its data was made again since[/]"
    return f"{_model(model)}{promoted}{part}{old}"


def _missing(tree: Tree, answer: Mapping[str, Any]) -> None:
    if answer["missing"]:
        some = ", ".join(answer["missing"][:3])
        tree.add(
            f"[yellow]{len(answer['missing'])} row tables are not in the workspace[/] ({some}); run `dvc checkout`"
        )
