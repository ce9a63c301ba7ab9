"""The lineage of a model or a row as one HTML page that needs nothing else: no network, no file beside it.

The graph is drawn by vis-network (Apache-2.0 or MIT), which the package ``pyvis`` carries and which is embedded
when the page is written. Names in a receipt may come from anywhere, so nothing of the answer becomes markup: it
is one block of JSON, which the script puts on the page as text, and the page's own security policy lets only its
two scripts run, by their digests, and lets nothing be fetched.
"""

import base64
import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from springhead.errors import BadInput
from springhead.home import home as state_folder
from springhead.lineage import query
from springhead.lineage.drawing import Drawing, draw
from springhead.lineage.graph import Graph, not_in_an_output, rows_method
from springhead.lineage.ledger import Ledger
from springhead.lineage.rows import DECISIONS, ROWS, Rows
from springhead.pages import TEMPLATES, environment

MOST_ROWS = 100_000
"""Rows whose ids a page carries; with more it would be slow to open, and says what to ask instead."""
Outcome = tuple[str, str, int | None]
"""What became of a row: in words, as a state for its colour, and the node that tells more."""
DIGITS = 16  # of an id that the page carries; two of 100,000 rows share them once in a billion pages


def write_page(root: Path, ref: str, target: Path, scan: bool = False) -> Path:
    """Writes the page about a reference and returns where it is.

    Args:
        root: the repository root.
        ref: anything that :func:`springhead.lineage.query.find` knows.
        target: the file to write; replaced if it is there.
        scan: do without the index of rows, as in :func:`springhead.lineage.query.lineage`.

    Raises:
        BadInput: if the reference is unknown, or the file cannot be written or lies in what a stage made.
    """
    not_in_an_output(root, target, "--html")
    text = page(root, ref, scan)
    temporary = target.with_name(f".{target.name[:200]}.{os.getpid()}")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(text, encoding="utf-8", newline="\n")
        os.replace(temporary, target)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise BadInput(f"{target}: cannot be written ({error.strerror}); name a file in a writable folder") from error
    return target


def page(root: Path, ref: str, scan: bool = False) -> str:
    """Returns the page about a reference; equal checkouts give equal bytes.

    Raises:
        BadInput: if the reference is unknown or ambiguous, or pyvis is not installed.
    """
    graph = Graph.read(root)
    answer = query.lineage(root, ref, scan, graph)
    ran = query.executions(Ledger(state_folder(root)).entries())
    rows = Rows(root, graph, scan)
    drawing = draw(root, graph, answer, ran)
    content = {
        "nodes": drawing.nodes,
        "edges": drawing.edges,
        "start": drawing.start,
        "rows": _lookup(graph, rows, answer, drawing),
        "digits": DIGITS,
    }
    return _render(ref, answer, content, drawing)


# -- rows -----------------------------------------------------------------------------------------


def _lookup(graph: Graph, rows: Rows, answer: Mapping[str, Any], drawing: Drawing) -> dict[str, Any]:
    """Returns the rows behind the answer for looking them up in the page: sorted ids, and what became of each."""
    tables = {kind: [p for p, s in rows.tables[kind].items() if s in drawing.behind] for kind in (ROWS, DECISIONS)}
    if answer["kind"] == "row":
        around: dict[str, Outcome] = {
            other["id"]: (f"{name} of this row: {other['relation']}, steps away: {other['step']}", "other", None)
            for name, key in (("parent", "parents"), ("child", "children"))
            for other in answer[key]
        }
        around[answer["name"]] = ("this is the row that the page is about", "trained", drawing.start)
        return _packed(around, {}, len(around))
    count = sum(rows.index.table(path).metadata.num_rows for path in tables[ROWS])
    if count > 20 * MOST_ROWS:  # most rows are in several tables
        return {"count": count, "ids": ""}
    seen: dict[str, str] = {}
    for path in tables[ROWS]:
        for entry in rows.ask(f"SELECT id FROM {rows.source(path)}"):
            seen.setdefault(entry["id"], path)
    if len(seen) > MOST_ROWS:
        return {"count": len(seen), "ids": ""}
    trained = set(_subject_rows(rows, answer))
    found: dict[str, Outcome] = {}
    values: dict[str, float] = {}
    where = "used as training data" if answer["kind"] == "model" else f"in {answer['name']}"
    for row, path in seen.items():
        node = drawing.of_stage.get(rows.tables[ROWS][path])
        found[row] = (f"in {path}, but not {where}", "other", node)
    for row in _ancestors(rows, tables[ROWS], trained) & seen.keys():
        path = seen[row]
        text = f"a row made from it is {where}; itself in {path}"
        found[row] = (text, "source", drawing.of_stage.get(rows.tables[ROWS][path]))
    for path in tables[DECISIONS]:
        stage = rows.tables[DECISIONS][path]
        sql = f"SELECT id, rule, kept, value, replaced_by FROM {rows.source(path)} WHERE NOT kept OR replaced_by <> id"
        for decision in rows.ask(sql):
            state = "changed" if decision["kept"] else "dropped"
            text = f"{state} by the rule {decision['rule']} of {stage}"
            if decision["replaced_by"]:
                text += f" {'into' if decision['kept'] else 'for the equal row'} {decision['replaced_by']}"
            found[decision["id"]] = (text, state, drawing.of_stage.get(stage))
            if decision["value"] is not None:
                values[decision["id"]] = float(decision["value"])
    for row in trained:
        found[row] = (where, "trained", drawing.start)
        values.pop(row, None)
    return _packed(found, values, len(found))


def _subject_rows(rows: Rows, answer: Mapping[str, Any]) -> list[str]:
    """Returns the ids a model was trained on, or that an artefact or the outputs of a stage hold."""
    if answer["kind"] == "model":
        stage = answer["model"]["stage"]
        data = [d["path"] for d in answer["datasets"] if d["role"] == "training" and d["stage"] == stage]
        return [i for path in data for i in rows.ids(path, rows_method(answer["model"]["facts"]))]
    paths = answer["stages"][-1]["outputs"] if answer["kind"] == "stage" else [answer["name"]]
    return [i for path in paths for i in rows.ids(path)]


def _ancestors(rows: Rows, tables: Iterable[str], ids: set[str]) -> set[str]:
    """Returns the rows that some of ``ids`` were made from, over any number of steps."""
    parents: dict[str, list[str]] = {}
    for path in tables:
        if "parents" in rows.columns(path):
            sql = f"SELECT id, parents FROM {rows.source(path)} WHERE len(parents) > 0"
            parents |= {row["id"]: row["parents"] for row in rows.ask(sql)}
    found: set[str] = set()
    level = ids
    while level:
        level = {parent for row in level for parent in parents.get(row, ())} - found
        found |= level
    return found - ids


def _packed(found: Mapping[str, Outcome], values: Mapping[str, float], count: int) -> dict[str, Any]:
    """Packs rows for the page: eight bytes of each id in order, the number of its outcome, and its value or NaN."""
    order = sorted(found)
    outcomes = sorted({found[row] for row in order}, key=lambda outcome: (outcome[0], outcome[1], outcome[2] or 0))
    numbers = {outcome: number for number, outcome in enumerate(outcomes)}
    wide = "<u4" if len(outcomes) > 0xFFFF else "<u2"
    ids = b"".join(bytes.fromhex(_hexadecimal(row)) for row in order)
    chosen = np.array([numbers[found[row]] for row in order], wide)
    measured = np.array([values.get(row, np.nan) for row in order], "<f8") if values else np.zeros(0)
    return {
        "count": count,
        "example": order[0][:DIGITS] if order else "",
        "ids": _base64(ids),
        "outcome": _base64(chosen.tobytes()),
        "wide": wide == "<u4",
        "values": _base64(measured.tobytes()),
        "outcomes": [{"text": text, "state": state, "node": node} for text, state, node in outcomes],
    }


def _hexadecimal(row: str) -> str:
    """Returns the first digits of an id; what is no digit in a damaged id becomes 0, as it cannot be looked up."""
    digits = "".join(c if c in "0123456789abcdef" else "0" for c in row[:DIGITS])
    return digits.ljust(DIGITS, "0")


def _base64(content: bytes) -> str:
    return base64.b64encode(content).decode("ascii")


# -- the page -------------------------------------------------------------------------------------


def library() -> str:
    """Returns the script of vis-network that the installed package pyvis carries.

    Raises:
        BadInput: if pyvis is not installed, or carries no such script.
    """
    spec = find_spec("pyvis")
    folders = [Path(place) for place in (spec.submodule_search_locations or ())] if spec is not None else []
    found = sorted(file for folder in folders for file in folder.glob("templates/lib/vis-*/vis-network.min.js"))
    if not found:
        raise BadInput("pyvis: carries no vis-network here; run `pip install 'pyvis>=0.3.2,<0.4'`")
    lines = found[-1].read_text(encoding="utf-8").split("\n")
    # A source map is one more file to fetch, and a browser's tools would try.
    return "\n".join(line for line in lines if not line.startswith("//# sourceMappingURL="))


def embedded(value: Any) -> str:
    """Returns JSON that can stand inside a script element whatever it holds: no character of markup is left."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _inline(script: str) -> tuple[str, str]:
    """Returns a script as it can stand in a page, and its digest as a security policy names it."""
    script = script.replace("\r\n", "\n").replace("</script", "<\\/script").replace("<!--", "<\\!--")
    digest = hashlib.sha256(script.encode("utf-8")).digest()
    return script, f"'sha256-{_base64(digest)}'"


def _render(ref: str, answer: Mapping[str, Any], content: Mapping[str, Any], drawing: Drawing) -> str:
    drawn, drawn_digest = _inline(library())
    script, script_digest = _inline((TEMPLATES / "lineage.js").read_text(encoding="utf-8"))
    style = "".join((TEMPLATES / name).read_text(encoding="utf-8") for name in ("style.css", "lineage.css"))
    return (
        environment()
        .get_template("lineage.html")
        .render(
            ref=ref,
            answer=answer,
            title=drawing.title,
            tiles=drawing.tiles,
            rules=drawing.rules,
            origins=drawing.origins,
            kinds=drawing.kinds,
            notes=drawing.notes,
            lookup=content["rows"],
            most=MOST_ROWS,
            style=style,
            library=drawn,
            script=script,
            policy=f"default-src 'none'; script-src {drawn_digest} {script_digest}; style-src 'unsafe-inline'; "
            "img-src data:; base-uri 'none'; form-action 'none'",
            content=embedded(content),
        )
    )
