"""Writes the report: one HTML page with its style inside, and copies of the plots beside it.

The page needs no network, no script and no server. It may be opened from the disk, attached to
a build, or served as it is.
"""

import hashlib
import shutil
import subprocess
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from springhead.errors import BadInput, SpringheadError
from springhead.home import home as state_folder
from springhead.home import main_checkout
from springhead.lineage.graph import not_in_an_output
from springhead.pages import TEMPLATES, environment
from springhead.progress import duration
from springhead.report.collect import BRANCHES, Facts, collect, number
from springhead.report.dag import draw

_TITLES = {
    "scatter": "what became of each episode",
    "steps": "before and after each rule",
    "coverage": "how the plane is covered",
}
_WIDE = ("steps", "coverage")
_MARKER = ".springhead-report"


def build(root: Path, home: Path | None = None, out: Path | None = None) -> Path:
    """Writes the report of a checkout.

    Args:
        root: the checkout whose receipts and data are shown; may be a worktree.
        home: the state folder with the ledger, by default that of the checkout.
        out: the folder to write, by default ``report/`` of the main checkout. It is emptied
            first, if an earlier report made it.

    Returns:
        The path of the front page.

    Raises:
        BadInput: if ``out`` holds something that is no report, lies in what a stage made, or cannot be written.
    """
    root = root.resolve()
    if out is not None:
        not_in_an_output(root, out, "--out")
    home = home or state_folder(root)
    target = (out or main_checkout(root) / "report").resolve()
    _prepare(target)
    facts = collect(root, home)
    page = _page(root, target, facts)
    (target / "index.html").write_text(page, encoding="utf-8")
    return target / "index.html"


def _prepare(target: Path) -> None:
    """Makes the folder empty, but never empties a folder that something else filled."""
    try:
        _empty(target)
    except OSError as error:
        raise BadInput(f"--out {target}: cannot be written ({error.strerror}); choose another place") from error


def _empty(target: Path) -> None:
    if target.is_dir() and any(target.iterdir()) and not (target / _MARKER).is_file():
        raise BadInput(f"{target}: holds other files; give an empty or new folder with --out")
    for name in ("assets", "data_docs"):
        shutil.rmtree(target / name, ignore_errors=True)
    target.mkdir(parents=True, exist_ok=True)
    (target / _MARKER).write_text("written by `springhead report`\n", encoding="utf-8")


def _page(root: Path, target: Path, facts: Facts) -> str:
    templates = environment()
    templates.filters |= {"size": size, "time": lambda s: "" if s is None else duration(s), "figure": _figure}
    templates.filters |= {"short": lambda digest: str(digest)[:12], "words": lambda text: str(text).replace("_", " ")}
    states = {row["name"]: row["state"] for row in facts.stages}
    seconds = {row["name"]: row["seconds"] or 0.0 for row in facts.stages}
    return templates.get_template("index.html").render(
        style=(TEMPLATES / "style.css").read_text(encoding="utf-8"),
        branches=BRANCHES,
        facts=facts,
        tiles=_tiles(facts),
        dag=draw(facts.graph, states, seconds),
        results=[r | {"plots": [_asset(p, r["stage"], target) for p in r["plots"]]} for r in facts.results],
        films=[f | {"films": [_film(x, f["stage"], target) for x in f["films"]]} for f in facts.films],
        filters=[f | {"plots": [_asset(p, f["stage"], target) for p in f["plots"]]} for f in facts.filters],
        verdicts=[v | {"docs": _docs(v, target)} for v in facts.verdicts],
        histories=_histories(root, facts),
        total=sum(seconds.values()),
        commit=_commit(root),
        now=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        project=main_checkout(root).name,
    )


def _tiles(facts: Facts) -> list[dict[str, str]]:
    """Returns the figures at the top: what there is, and whether all is well."""
    made = sum(row["state"] == "made" for row in facts.stages)
    failed = len(facts.failures)
    bad = [v for v in facts.verdicts if v["failed"] or not v["success"]]
    warned = [v for v in facts.verdicts if v not in bad and v["severity"] == "warning"]
    verdict = f"{len(bad)} failed" if bad else f"{len(warned)} with warnings" if warned else "all passed"
    done = bool(facts.stages) and made == len(facts.stages)
    rows = sum(d["rows"] for d in facts.datasets)
    dropped = sum(rule["dropped"] for f in facts.filters for rule in f["rules"])
    return [
        {
            "label": "stages",
            "value": f"{made} of {len(facts.stages)}",
            "note": f"made; {failed} failed" if failed else "made" if done else "made; see the table",
            "state": "bad" if failed else "good" if done else "warning",
        },
        {
            "label": "champions",
            "value": str(len(facts.champions)),
            "note": "promoted through the gates" if facts.champions else "nothing promoted yet",
            "state": "good" if facts.champions else "warning",
        },
        {
            "label": "verdicts",
            "value": str(len(facts.verdicts)),
            "note": verdict if facts.verdicts else "nothing validated yet",
            "state": "bad" if bad else "warning" if warned or not facts.verdicts else "good",
        },
        {
            "label": "rows of data",
            "value": f"{rows:,}",
            "note": f"in {len(facts.datasets)} sets; {dropped:,} dropped by filters",
            "state": "neutral",
        },
        {
            "label": "models",
            "value": str(sum(m.stage.partition("-")[2].startswith(("train", "finetune")) for m in facts.graph.models)),
            "note": "each with a receipt",
            "state": "neutral",
        },
    ]


def _asset(path: Path, stage: str, target: Path) -> dict[str, str]:
    """Copies a plot beside the page under a name that tells its stage."""
    digest = hashlib.sha256(path.read_bytes()).hexdigest()[:8]
    name = f"{stage.replace('@', '-')}-{path.stem}-{digest}{path.suffix}"
    (target / "assets").mkdir(exist_ok=True)
    shutil.copyfile(path, target / "assets" / name)
    title = _TITLES.get(path.stem, path.stem.replace("_", " ").replace("-", " "))
    return {
        "href": f"assets/{name}",
        "title": title,
        "alt": f"{title} of {stage}",
        "shape": "wide" if path.stem in _WIDE else "",
    }


def _film(film: Mapping[str, Any], stage: str, target: Path) -> dict[str, Any]:
    """Copies a film beside the page, where there is one."""
    if film["path"] is None:
        return {"href": None, "title": film["title"], "why": film["why"]}
    return _asset(film["path"], stage, target) | {"title": film["title"], "alt": f"Film of {film['title']}"}


def _docs(verdict: Mapping[str, Any], target: Path) -> str | None:
    """Copies the Data Docs of a verdict and returns the link to them."""
    if verdict["docs"] is None:
        return None
    name = str(verdict["stage"]).replace("@", "-")
    shutil.copytree(verdict["docs"], target / "data_docs" / name, dirs_exist_ok=True)
    return f"data_docs/{name}/index.html"


def _histories(root: Path, facts: Facts) -> dict[str, Any]:
    """Returns the lineage of each champion, by its registered name."""
    from springhead.lineage.query import lineage_of_model

    found: dict[str, Any] = {}
    for champion in facts.champions:
        if not champion["path"]:
            facts.notes.append(
                f"The model of {champion['name']} was not made in this checkout; its history is missing."
            )
            continue
        try:
            found[champion["name"]] = lineage_of_model(root, champion["digest"])
        except (SpringheadError, KeyError) as error:
            facts.notes.append(f"The history of {champion['name']} cannot be told: {error}.")
    return found


def _commit(root: Path) -> str:
    done = subprocess.run(["git", "rev-parse", "--short=10", "HEAD"], cwd=root, capture_output=True, text=True)
    return done.stdout.strip() if done.returncode == 0 else ""


def size(number_of_bytes: int) -> str:
    """Returns a number of bytes for reading: ``812 B``, ``3.4 MB``."""
    value = float(number_of_bytes)
    for unit in ("B", "kB", "MB"):
        if value < 1000:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1000
    return f"{value:.1f} GB"


def _figure(value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    return number(float(value))
