"""The artefact graph of an answer as nodes, edges and places, and what each node says when it is opened.

Everything in here is plain text and numbers; :mod:`springhead.lineage.page` puts it on the page.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from springhead.git import uncommitted
from springhead.lineage.graph import Graph, Model, item_of, role_of, step_of
from springhead.lineage.query import Executions, stage_facts
from springhead.lineage.tree import figures, flat, plain_text, short
from springhead.progress import duration

KINDS = {
    "version": "registered version",
    "model": "model",
    "data": "data set",
    "filter": "filter",
    "verdict": "verdict",
    "evaluation": "evaluation",
    "stage": "other stage",
    "row": "row",
}
_COLUMN, _LINE = 245, 84  # pixels between nodes
_TALL = 16  # nodes above each other before a column is made wider
_BRIEF = 24  # characters of a node's second line
_RELATIVES = 60  # rows drawn on each side of a row


@dataclass
class Drawing:
    """A graph to draw."""

    title: str = ""
    nodes: list[dict[str, Any]] = field(default_factory=list)
    edges: list[dict[str, Any]] = field(default_factory=list)
    start: int = 0
    """The node the page is about."""
    behind: set[str] = field(default_factory=set)
    """The stages whose rows are behind the answer."""
    of_stage: dict[str, int] = field(default_factory=dict)
    """The node of each stage."""
    tiles: list[dict[str, str]] = field(default_factory=list)
    rules: list[dict[str, Any]] = field(default_factory=list)
    origins: list[dict[str, Any]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def kinds(self) -> dict[str, str]:
        """The kinds of node that occur, with their names."""
        there = {node["kind"] for node in self.nodes}
        return {kind: name for kind, name in KINDS.items() if kind in there}

    def node(self, kind: str, title: str, note: str, sections: list[dict[str, Any]], state: str = "") -> int:
        """Adds a node and returns its number."""
        number = len(self.nodes)
        entry = {"id": number, "kind": kind, "title": title, "note": note, "sections": sections, "state": state}
        self.nodes.append(entry)
        return number

    def edge(self, start: int, end: int, verified: bool = True) -> None:
        """Adds an edge once."""
        entry = {"from": start, "to": end, "verified": verified}
        if start != end and entry not in self._last(start):
            self.edges.append(entry)
            self._last(start).append(entry)

    def _last(self, start: int) -> list[dict[str, Any]]:
        return self._by_start.setdefault(start, [])

    _by_start: dict[int, list[dict[str, Any]]] = field(default_factory=dict)


def draw(root: Path, graph: Graph, answer: Mapping[str, Any], ran: Executions) -> Drawing:
    """Returns the drawing of an answer of :mod:`springhead.lineage.query`.

    Args:
        root: the repository root.
        graph: its artefact graph.
        answer: what is behind a model, an artefact or a stage, or what became of a row.
        ran: the executions of the ledger.
    """
    drawing = Drawing()
    _stages(drawing, root, graph, answer, ran)
    if answer["kind"] == "row":
        _about_row(drawing, graph, answer)
    else:
        _about_artefact(drawing, answer)
    if answer["missing"]:
        some = ", ".join(answer["missing"][:3])
        drawing.notes.append(
            f"{len(answer['missing'])} row tables are not in the workspace ({some}); run `dvc checkout` and write this "
            "page again."
        )
    _place(drawing)
    return drawing


# -- stages and models ----------------------------------------------------------------------------


def _shown(graph: Graph, answer: Mapping[str, Any]) -> tuple[list[str], set[str]]:
    """Returns the stages to draw, makers first, and those whose rows are behind the answer."""
    if answer["kind"] == "row":
        holders = {place["stage"] for key in ("places", "decisions", "quarantine") for place in answer[key]}
        ends = holders | {model["stage"] for model in answer["models"] if model["current"]}
        shown = {stage for end in ends for stage in graph.upstream(end)}
        return [stage for stage in graph.order if stage in shown], shown
    behind = {stage["stage"] for stage in answer["stages"]}
    after = {stage["stage"] for stage in answer["judges"]}
    if answer["kind"] != "model":
        makers = [answer["name"]] if answer["kind"] == "stage" else graph.makers(answer["name"])
        after |= {stage for maker in makers for stage in graph.downstream(maker)}
    return [stage for stage in graph.order if stage in behind | after], behind


def _stages(drawing: Drawing, root: Path, graph: Graph, answer: Mapping[str, Any], ran: Executions) -> None:
    """Adds a node for each stage, for each model of a stage with several, and the links between them."""
    shown, drawing.behind = _shown(graph, answer)
    known = {entry["stage"]: entry for key in ("stages", "judges") for entry in answer.get(key, ())}
    models: dict[str, list[Model]] = {}
    for model in graph.models:
        models.setdefault(model.stage, []).append(model)
    ends: dict[str, list[int]] = {}
    makers = {m["sha256"] for m in answer["made_by"]} if answer.get("made_by") else None
    for stage in shown:
        own = models.get(stage, [])
        facts = known.get(stage) or stage_facts(root, graph, stage, ran)
        kind, note, state, first = _what(graph, answer, stage, own)
        name = f"{step_of(stage)} {item_of(stage)}".strip()
        number = drawing.node(kind, name, note, first + _receipt(facts), state)
        drawing.of_stage[stage] = number
        ends[stage] = [number]
        if len(own) > 1:  # the experts of a task are artefacts of their own: rows come from each of them
            ends[stage] = []
            for model in own:
                if makers is not None and model.sha256 not in makers:
                    continue
                inner = drawing.node("model", model.path.rpartition("/")[2], _brief(model.facts), [_model(model)])
                drawing.edge(number, inner)
                ends[stage].append(inner)
    # An evaluation also reads the experts and the data for comparison; here it is about the model.
    subject = answer["model"]["stage"] if answer["kind"] == "model" else None
    judges = {entry["stage"] for entry in answer.get("evaluations", ())} if subject else set()
    for stage in shown:
        for link in graph.links_of(stage):
            for maker in link.makers:
                if stage in judges and maker != subject:
                    continue
                for end in ends.get(maker, ()):
                    drawing.edge(end, drawing.of_stage[stage], link.verified)


def _what(
    graph: Graph, answer: Mapping[str, Any], stage: str, models: Sequence[Model]
) -> tuple[str, str, str, list[dict[str, Any]]]:
    """Returns kind, note and state of a stage's node, and the sections that tell what it made."""
    receipt = graph.receipts[stage]
    sections = [_outputs(receipt)]
    rules = [rule for rule in answer.get("filters", ()) if rule["stage"] == stage]
    verdicts = [verdict for verdict in answer.get("verdicts", ()) if verdict["stage"] == stage]
    files = {name.rpartition("/")[2] for facts in receipt["outputs"].values() for name in facts.get("files", {})}
    made = sum(d["rows"] for d in receipt["datasets"] if d["role"] == "output")
    rows = f"{made:,} rows" if made else ""
    if len(models) == 1:
        return "model", _brief(models[0].facts), "", [_model(models[0]), *_evaluations(answer, models[0]), *sections]
    if "decisions.parquet" in files:
        dropped = sum(rule["dropped"] for rule in rules)
        note = f"{rows} kept, {dropped:,} dropped" if rules else rows
        return "filter", note, "", [*_rules(rules), *sections]
    if "verdict.json" in files:
        bad = [v for v in verdicts if v["severity"] not in ("none", "warning")]
        warned = any(v["severity"] == "warning" for v in verdicts)
        note = "failed" if bad else "passed with warnings" if warned else "passed" if verdicts else ""
        state = "bad" if bad else "warn" if warned else "good" if verdicts else ""
        return "verdict", note, state, [*(_verdict(v) for v in verdicts), *sections]
    if role_of(stage) in ("evaluate", "attack"):
        about = [s for e in answer.get("evaluations", ()) if e["stage"] == stage for s in _figures(e)]
        return "evaluation", "", "", [*about, *sections]
    if made:
        return "data", rows, "", sections
    return "stage", f"{len(models)} models" if models else "", "", sections


def _section(title: str, lines: Iterable[Sequence[Any]]) -> dict[str, Any]:
    """Returns a section of a node: lines of key, value, and how to show it (``mono``, ``good``, ``bad``, ``warn``)."""
    return {"title": title, "lines": [[str(k), str(v), (style or [""])[0]] for k, v, *style in lines]}


def _brief(facts: Mapping[str, Any]) -> str:
    """Returns the facts of a model for the second line of its node."""
    brief = ""
    for key, value in sorted(facts.items()):
        longer = f"{brief} · {key.replace('_', ' ')} {plain_text(value)}".removeprefix(" · ")
        if len(longer) > _BRIEF:
            break
        brief = longer
    return brief


def _model(model: Model) -> dict[str, Any]:
    facts = [(key.replace("_", " "), plain_text(value)) for key, value in sorted(model.facts.items())]
    where = [("path", model.path, "mono"), ("sha256", model.sha256, "mono")]
    ask = ("ask", f"springhead lineage {model.sha256[:16]}", "mono")
    return _section("Model", [("kind", model.kind), *facts, *where, ask])


def _outputs(receipt: Mapping[str, Any]) -> dict[str, Any]:
    lines: list[tuple[str, ...]] = []
    for data in receipt["datasets"]:
        does = "made" if data["role"] == "output" else "trained on"
        lines += [(does, f"{data['path']} · {data['rows']:,} rows"), ("sha256", data["sha256"], "mono")]
    for path, facts in sorted(receipt["outputs"].items()):
        lines += [("output", f"{path} · {facts['bytes']:,} bytes"), ("sha256", facts["sha256"], "mono")]
    return _section("Data", lines)


def _rules(rules: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    lines = []
    for rule in rules:
        low, high = rule.get("lowest_threshold"), rule.get("highest_threshold")
        limit = "" if low is None else f" · threshold {plain_text(low)}"
        limit += f" to {plain_text(high)}" if low is not None and high != low else ""
        changed = f" · {rule['replaced']:,} changed" if rule["replaced"] else ""
        lines.append((rule["rule"], f"{rule['kept']:,} kept · {rule['dropped']:,} dropped{changed}{limit}"))
    return [_section("Rules, in their order", lines)] if lines else []


def _verdict(verdict: Mapping[str, Any]) -> dict[str, Any]:
    state = {"none": ("passed", "good"), "warning": ("passed with warnings", "warn")}.get(verdict["severity"])
    said, style = state or ("failed", "bad")
    failed = [("failed", name, "bad" if style == "bad" else "warn") for name in verdict["failed"]]
    return _section("Verdict", [
        ("says", said, style), ("suite", verdict["suite"]), ("expectations", verdict["expectations"]), *failed,
        ("rows", f"{verdict['rows']:,}"), ("quarantined", verdict["quarantined"]),
        ("data", verdict["data_digest"], "mono"), ("sha256", verdict["sha256"], "mono")])  # fmt: skip


def _figures(evaluation: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Returns a section for each cost limit, or one for all figures."""
    found = [(f"Evaluated at cost limit {k}", v) for k, v in evaluation["figures"].get("limits", {}).items()]
    if evaluation["figures"].get("metrics"):
        found.append(("Evaluated", evaluation["figures"]["metrics"]))
    return [
        _section(title, [(name.replace("_", " "), v) for k in sorted(values) for name, v in flat(k, values[k])])
        for title, values in found
    ]


def _evaluations(answer: Mapping[str, Any], model: Model) -> list[dict[str, Any]]:
    """Returns what the evaluations say, on the node of the model that the answer is about."""
    if answer.get("sha256") != model.sha256 or answer["kind"] != "model":
        return []
    return [section for evaluation in answer["evaluations"] for section in _figures(evaluation)]


def _receipt(facts: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Returns the sections every stage has: parameters, executions, what it read, and with which code."""
    params = [line for key, value in sorted(facts["params"].items()) for line in flat(key, value)]
    runs: list[tuple[str, ...]] = []
    for run in facts["executions"][-1:]:
        git = run.get("git", {})
        commit = (str(git.get("revision", "")) or "none") + uncommitted(git)
        runs += [("commit", commit, "mono"), ("when", f"{run['started'][:19]} UTC, {duration(run['seconds'])}")]
        runs += [("where", f"{run['host']}, Python {run.get('python', '?')}"), ("attempt", str(run.get("attempt", 1)))]
        runs += [("ledger entry", str(run["entry"]))]
        runs += [("flow run", run["flow_run"], "mono")] if run.get("flow_run") else []
    if not runs:
        runs = [("", "no execution in this ledger: it was made on another machine", "warn")]
    reads: list[tuple[str, ...]] = []
    for used in facts["inputs"]:
        reads.append(("read", used["path"]))
        reads.append(("sha256", used["sha256"], "mono"))
        if not used["verified"]:
            reads.append(("", "is not what the stages before it made since", "bad"))
    locks = [("lock", f"{path} {digest}", "mono") for path, digest in sorted(facts["lock"].items())]
    code = [("command", facts["command"], "mono"), ("code", facts["code"], "mono"), *locks]
    code += [("seed", str(facts["seed"]), ""), ("receipt", facts["receipt"], "mono")]
    found = [_section("Parameters", params), _section("Last execution", runs), _section("What it read", reads)]
    return [section for section in [*found, _section("Code and environment", code)] if section["lines"]]


# -- what the page is about -----------------------------------------------------------------------


def _tile(label: str, value: str, note: str, state: str = "neutral") -> dict[str, str]:
    return {"label": label, "value": value, "note": note, "state": state}


def _about_artefact(drawing: Drawing, answer: Mapping[str, Any]) -> None:
    """Marks the model, artefact or stage that was asked for, and fills what stands above the graph."""
    drawing.title, drawing.rules = answer["name"], list(answer["filters"])
    hidden = ("rows", "data", "model")
    drawing.origins = [
        {"rows": o["rows"], "what": figures(o, hidden), "model": o.get("model") or ""} for o in answer["origins"]
    ]
    model = answer["kind"] == "model"
    stage = answer["model"]["stage"] if model else answer["stages"][-1]["stage"] if answer["stages"] else ""
    drawing.start = drawing.of_stage.get(stage, 0)
    path = answer["name"]
    for node in drawing.nodes:  # one of several models of a stage
        if any(line[:2] == ["path", path] for section in node["sections"] for line in section["lines"]):
            drawing.start = node["id"]
    role = "training" if model else "output"
    data = [d for d in answer["datasets"] if d["role"] == role and d["stage"] == stage]
    dropped = sum(rule["dropped"] for rule in answer["filters"])
    label = "rows trained on" if model else "rows"
    where = data[0]["path"] if len(data) == 1 else f"in {len(data)} data sets"
    drawing.tiles = [
        _tile(label, f"{sum(d['rows'] for d in data):,}", where),
        _tile("dropped by filters", f"{dropped:,}", f"{len(answer['filters'])} rules looked at the rows"),
    ]
    bad = [v for v in answer["verdicts"] if v["severity"] not in ("none", "warning")]
    warned = [v for v in answer["verdicts"] if v["severity"] == "warning"]
    said = "failed" if bad else "warnings" if warned else "passed" if answer["verdicts"] else "none"
    state = "bad" if bad else "warning" if warned or not answer["verdicts"] else "good"
    checked = sum(v["expectations"] for v in answer["verdicts"])
    drawing.tiles.append(_tile("verdict on the data", said, f"{checked} expectations", state))
    if model:
        _about_model(drawing, answer)
    else:
        drawing.tiles.append(_tile("models made from it", str(len(answer["models"])), "each opens in the graph"))


def _about_model(drawing: Drawing, answer: Mapping[str, Any]) -> None:
    """Adds the registered version of a model and its promotion."""
    registry, promotion = answer.get("registry"), answer.get("promotion")
    if registry is None:
        drawing.tiles.append(_tile("promoted", "no", "nothing is registered from this model", "warning"))
        return
    name = f"{registry['name']}/{registry['version']}"
    aliases = " ".join(f"@{alias}" for alias in registry["aliases"])
    lines: list[tuple[str, ...]] = [("name", registry["name"]), ("version", str(registry["version"]))]
    lines += [("alias", aliases)] if aliases else []
    lines += [("model", answer["sha256"], "mono")]
    if promotion:
        lines += [("promoted", f"{promotion['time'][:19]} UTC"), ("ledger entry", str(promotion["entry"]))]
        for key in ("signature", "data_digest", "evaluation_digest", "gates_digest"):
            if isinstance(promotion.get(key), str):
                lines.append((key.replace("_", " "), promotion[key], "mono"))
    number = drawing.node("version", name, aliases or "registered", [_section("Registered version", lines)])
    drawing.edge(drawing.start, number)
    drawing.title = name
    signed = "signed" if promotion and promotion.get("signature") else "not signed"
    when = f"{promotion['time'][:10]}, {signed}" if promotion else "not by a promotion in this ledger"
    drawing.tiles.append(_tile("promoted as", name, when, "good" if promotion else "bad"))


def _about_row(drawing: Drawing, graph: Graph, answer: Mapping[str, Any]) -> None:
    """Adds the row and its relatives, and where it is."""
    name = answer["name"]
    dropped = [d for d in answer["decisions"] if not d["row"]["kept"]]
    direct = [m for m in answer["models"] if m["direct"]]
    through = len(answer["models"]) - len(direct)
    note = f"dropped by {dropped[0]['row']['rule']}" if dropped else f"in the data of {len(answer['models'])} models"
    sections = [_section("Row", [("id", name, "mono"), ("ask", f"springhead lineage row:{name[:16]}", "mono")])]
    for place in answer["places"]:
        facts = [(k.replace("_", " "), plain_text(v)) for k, v in place["row"].items() if k not in ("id", "parents")]
        sections.append(_section(f"In {place['table']}", facts))
    lines = []
    for decision in answer["decisions"]:
        row = decision["row"]
        verb = "kept" if row["kept"] and not row.get("replaced_by") else "changed" if row["kept"] else "dropped"
        value = f" · value {plain_text(row['value'])}" if row.get("value") is not None else ""
        limit = f" · threshold {plain_text(row['threshold'])}" if row.get("threshold") is not None else ""
        style = {"kept": "good", "changed": "warn", "dropped": "bad"}[verb]
        lines.append((row["rule"], f"{verb} by {decision['stage']}{value}{limit}", style))
    sections += [_section("What the filters decided", lines)] if lines else []
    failed = [(q["row"]["expectation"], str(q["row"].get("detail") or ""), "bad") for q in answer["quarantine"]]
    sections += [_section("In quarantine", failed)] if failed else []
    trained = [(m["path"], "directly" if m["direct"] else "through rows made from it") for m in answer["models"]]
    sections += [_section("In the training data of", trained)] if trained else []
    drawing.start = drawing.node("row", f"row {short(name)}", note, sections, "bad" if dropped else "good")
    numbers = {name: drawing.start}
    for key in ("parents", "children"):
        for relative in answer[key][:_RELATIVES]:
            about = _section("Row", [("id", relative["id"], "mono"), ("relation", relative["relation"]),
                                     ("ask", f"springhead lineage row:{relative['id'][:16]}", "mono")])  # fmt: skip
            words = {"parents": "it was made from this", "children": "made from it"}[key]
            how = words if relative["relation"] == "parent" else relative["relation"]
            number = drawing.node("row", f"row {short(relative['id'])}", how, [about])
            numbers[relative["id"]] = number
            other = numbers.get(relative["of"], drawing.start)
            drawing.edge(*((number, other) if key == "parents" else (other, number)))
        if len(answer[key]) > _RELATIVES:
            drawing.notes.append(f"{len(answer[key])} {key} of this row are known; {_RELATIVES} of them are drawn.")
    made_by = ", ".join(model["path"] for model in answer["made_by"])
    for place in answer["places"]:
        node = drawing.of_stage[place["stage"]]
        # A maker's table is where the row comes from; every later one is where it went.
        first = place is answer["places"][0]
        drawing.edge(*((node, drawing.start) if first else (drawing.start, node)))
        drawing.nodes[node]["state"] = drawing.nodes[node]["state"] or "marked"
    for decision in dropped:
        node = drawing.of_stage[decision["stage"]]
        drawing.edge(drawing.start, node)
        drawing.nodes[node]["state"] = "bad"
    drawing.title = f"row {short(name)}"
    outcome = "dropped" if dropped else "kept" if answer["decisions"] else "not filtered"
    drawing.tiles = [
        _tile("outcome", outcome, note, "bad" if dropped else "good" if answer["decisions"] else "neutral"),
        _tile("trained directly", str(len(direct)), "models have it in their data"),
        _tile("trained through others", str(through), "models have a row made from it"),
        _tile("made by", "a model" if made_by else "a rule", made_by or "no model took part"),
    ]


# -- places ---------------------------------------------------------------------------------------


def _place(drawing: Drawing) -> None:
    """Gives every node a place: columns from left to right along the links, in each the order of what is before."""
    before: dict[int, list[int]] = {node["id"]: [] for node in drawing.nodes}
    after: dict[int, list[int]] = {node["id"]: [] for node in drawing.nodes}
    for edge in drawing.edges:
        before[edge["to"]].append(edge["from"])
        after[edge["from"]].append(edge["to"])
    level: dict[int, int] = {}
    waiting = {number: len(set(makers)) for number, makers in before.items()}
    ready = sorted(number for number, count in waiting.items() if count == 0)
    while len(level) < len(drawing.nodes):
        if not ready:  # a forged receipt can make a ring; it must be drawn all the same
            ready = [min(number for number in waiting if number not in level)]
        number = ready.pop(0)
        if number in level:
            continue
        level[number] = 1 + max((level[maker] for maker in before[number] if maker in level), default=-1)
        for reader in sorted(set(after[number])):
            waiting[reader] -= 1
            if waiting[reader] == 0:
                ready.append(reader)
    # What nothing stands before is drawn just before its first reader.
    for number, makers in before.items():
        if not makers and after[number]:
            level[number] = max(0, min(level[reader] for reader in after[number]) - 1)
    columns: dict[int, list[int]] = {}
    for number in sorted(level, key=lambda n: (level[n], n)):
        columns.setdefault(level[number], []).append(number)
    place: dict[int, float] = {}
    x = 0
    for _, column in sorted(columns.items()):

        def mean(number: int) -> tuple[float, str, int]:
            known = [place[maker] for maker in before[number] if maker in place]
            return (sum(known) / len(known) if known else 0.0, drawing.nodes[number]["title"], number)

        tall = max(_TALL, math.ceil(math.sqrt(3 * len(column))))
        wide = math.ceil(len(column) / tall)
        tall = math.ceil(len(column) / wide)
        for index, number in enumerate(sorted(column, key=mean)):
            line = index % tall
            place[number] = (line - (min(tall, len(column)) - 1) / 2) * _LINE
            drawing.nodes[number]["x"] = x + index // tall * _COLUMN
            drawing.nodes[number]["y"] = round(place[number])
        x += wide * _COLUMN + (_COLUMN // 3 if wide > 1 else 0)
