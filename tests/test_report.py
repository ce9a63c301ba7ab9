# ruff: noqa: F401, F811  (fixtures of pytest are imported, then named as arguments)
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from pipelines.execution import Outcome
from pipelines.finish import conclude
from pipelines.session import Request, Result
from springhead.errors import BadInput
from springhead.jsonio import read_json, write_json
from springhead.lineage.graph import Graph
from springhead.lineage.ledger import Ledger
from springhead.report import build
from springhead.report.build import size
from springhead.report.collect import leaderboard, number
from tests.lineage.conftest import root, sample_template
from tests.lineage.sample import TASK

pytestmark = pytest.mark.unit


class Page(HTMLParser):
    """Checks that tags are closed in order, and collects links, ids and the text."""

    VOID = frozenset({"meta", "br", "img", "link", "input", "hr", "path", "rect"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.links: list[str] = []
        self.ids: list[str] = []
        self.images: list[dict[str, str | None]] = []
        self.words: list[str] = []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        self.links += [v for k in ("href", "src") if (v := values.get(k))]
        self.ids += [v for v in (values.get("id"),) if v]
        if tag == "img":
            self.images.append(values)
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.VOID:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open[-1:] != ["style"]:
            self.words.append(data)

    @property
    def text(self) -> str:
        return re.sub(r"\s+", " ", " ".join(self.words))


def promote(root: Path) -> None:
    model = next(m for m in Graph.read(root).models if m.path.endswith("cdt/0/model"))
    body = {"model": f"policy-{TASK}", "version": "4", "digest": model.sha256, "signature": "5" * 64,
            "data_digest": "6" * 64, "figures": {"normalised_return": 0.6181}}  # fmt: skip
    Ledger(root / ".springhead").append("promotion", body)


def test_the_page_shows_the_numbers_of_the_run(root: Path) -> None:
    promote(root)
    front = build(root, out=root / "out")
    page = Page(front.read_text())
    for part in (
        "17 of 17", "0.618 ± 0.017", "0.880 ± 0.060", "0.690 ± 0.020", "0.410 [0.350, 0.470]",
        f"policy-{TASK}", "version 4",
        f"springhead lineage models:/policy-{TASK}@champion", "near-duplicate", "outlier", "at least 100 rows",
        "3 dropped by filters", "25", "Where it comes from: 5 stages", "12s", "0123456789",
    ):  # fmt: skip
        assert part in page.text, part
    assert "Not everything could be shown" not in page.text


def test_the_page_needs_no_network_and_no_script(root: Path) -> None:
    promote(root)
    front = build(root, out=root / "out")
    text = front.read_text()
    page = Page(text)
    assert "<script" not in text
    assert "@import" not in text
    assert not re.search(r"url\((?!#)", text)
    for link in page.links:
        assert not link.startswith(("http:", "https:", "//", "/")), link
        if link.startswith("#"):
            assert link[1:] in page.ids
        else:
            assert (front.parent / link).is_file(), link


def test_the_page_is_accessible(root: Path) -> None:
    text = build(root, out=root / "out").read_text()
    page = Page(text)
    assert page.images
    assert all(image["alt"] for image in page.images)
    assert '<html lang="en">' in text
    assert "prefers-color-scheme: dark" in text
    assert text.count('<svg class="dag"') == text.count('aria-label="Safe policies') + text.count('aria-label="Lang')
    assert re.findall(r"<h1", text) == ["<h1"]


def test_an_empty_checkout_gives_a_page_that_says_so(tmp_path: Path) -> None:
    (tmp_path / "dvc.yaml").write_text("stages: {}\n")
    page = Page(build(tmp_path, tmp_path, tmp_path / "out").read_text())
    for part in ("No model has been promoted yet", "No evaluation has run yet", "Nothing has run yet", "0 of 0"):
        assert part in page.text


def test_what_is_missing_or_damaged_is_said(root: Path) -> None:
    promote(root)
    shutil.rmtree(root / f"data/rl/evaluate/{TASK}")
    (root / f"data/rl/validate/{TASK}/verdict.json").write_text("{}")
    (root / "data/llm/filter/decisions.parquet").write_bytes(b"no")
    (root / "data/receipts/llm-problems.json").write_text("{")
    (root / "dvc.lock").write_text("stages: [")
    ledger = root / ".springhead/ledger.jsonl"
    ledger.write_bytes(ledger.read_bytes().replace(b'"host":"sample"', b'"host":"simple"', 1))
    page = Page(build(root, out=root / "out").read_text())
    for part in (
        "Not everything could be shown", "The ledger is damaged", f"verdict of rl-validate@{TASK} cannot be read",
        "decisions.parquet: not a readable Parquet file", "llm-problems.json: not valid JSON",
        "dvc.lock cannot be read", f"not in the workspace: data/rl/evaluate/{TASK}", "No leaderboard",
    ):  # fmt: skip
        assert part in page.text, part


def test_a_failed_stage_is_marked_until_it_ran_again(root: Path) -> None:
    ledger = Ledger(root / ".springhead")
    ledger.append("failure", {"stage": f"rl-train@{TASK}-cdt-0", "error": "out of\nspace", "inputs": "x"})
    page = Page(build(root, out=root / "out").read_text())
    assert "failed out of" in page.text
    assert "16 of 17" in page.text


def test_the_verdict_of_a_red_run_stands_in_the_place_of_the_earlier_one(root: Path) -> None:
    ledger, stage = Ledger(root / ".springhead"), f"rl-validate@{TASK}"
    expected = Page(build(root, out=root / "out").read_text()).text.count("at least 100 rows")
    earlier = read_json(root / f"data/rl/validate/{TASK}/verdict.json")
    red = {
        "name": "costs are whole",
        "column": "costs",
        "severity": "critical",
        "success": False,
        "unexpected_count": 7,
    }
    write_json(
        root / f".springhead/failed/{stage}/verdict.json",
        {**earlier, "success": False, "severity": "critical", "rows": 4321, "expectations": [red]},
    )
    failure = {"stage": stage, "error": "1 critical expectation(s) failed\nin full", "inputs": "x", "findings": True}
    ledger.append("failure", failure)
    text = Page(build(root, out=root / "out").read_text()).text
    for part in ("1 stage failed when it ran last", f"{stage} : 1 critical expectation(s) failed", "made; 1 failed",
                 "verdicts 2 1 failed", "The last run failed : this is its verdict", "4,321 rows",
                 "costs are whole"):  # fmt: skip
        assert part in text, part
    assert "in full" not in text
    assert text.count("at least 100 rows") == expected - 1  # an expectation of the earlier verdict

    # A later failure that has no verdict: the earlier one is shown, and said to be so.
    ledger.append("failure", {**failure, "error": "killed", "findings": False})
    text = Page(build(root, out=root / "out").read_text()).text
    assert "The last run failed : killed. Below is the verdict of an earlier run" in text
    assert "verdicts 2 1 failed" in text
    assert text.count("at least 100 rows") == expected

    ledger.append("execution", {"stage": stage, "seconds": 1.0})
    text = Page(build(root, out=root / "out").read_text()).text
    assert "The last run failed" not in text
    assert "failed when" not in text


def test_a_red_run_writes_the_report_and_promotes_nothing(root: Path) -> None:
    home, stage = root / ".springhead", f"rl-validate@{TASK}"
    Ledger(home).append("failure", {"stage": stage, "error": "a row is bad", "inputs": "x", "findings": False})
    result = Result("20261124-000000-abcd", root, {stage: Outcome(stage, "failed", error="a row is bad")}, 1.0)
    conclusion = conclude(result, root, home, Request(1), True, print)
    page = root / conclusion.places["report"]
    assert f"{stage} : a row is bad" in Page(page.read_text()).text
    assert (conclusion.champions, conclusion.closed) == ({}, {})
    page.unlink()
    conclude(result, root, home, Request(1, targets=(stage,)), True, print)
    assert not page.exists()
    # That the report cannot be written does not hide why the run is red.
    (page.parent / ".springhead-report").unlink()
    notes = conclude(result, root, home, Request(1), True, print).notes
    assert [note for note in notes if "the report could not be written" in note and "holds other files" in note]


def test_text_from_the_outside_is_escaped(root: Path) -> None:
    board = root / f"data/rl/evaluate/{TASK}/leaderboard.csv"
    board.write_text("algorithm,normalised_return\n<script>alert(1)</script>,1.5\n")
    assert "<script" not in build(root, out=root / "out").read_text()


def test_a_folder_of_other_files_is_never_emptied(root: Path) -> None:
    (root / "mine").mkdir()
    (root / "mine" / "thesis.txt").write_text("years of work")
    with pytest.raises(BadInput, match="holds other files"):
        build(root, out=root / "mine")
    assert (root / "mine" / "thesis.txt").read_text() == "years of work"
    inside = root / f"data/rl/evaluate/{TASK}/report"
    with pytest.raises(BadInput, match=r"--out .*: lies in what rl-evaluate@.* made"):
        build(root, out=inside)
    assert not inside.exists()
    with pytest.raises(BadInput, match=r"--out .*: cannot be written"):
        build(root, out=root / "mine" / "thesis.txt" / "report")
    assert build(root).parent == root / "report"
    stale = root / "report" / "assets" / "old.png"
    stale.write_bytes(b"")
    build(root)
    assert not stale.exists()


def test_a_leaderboard_joins_figures_with_their_spread(tmp_path: Path) -> None:
    path = tmp_path / "leaderboard.csv"
    path.write_text("algorithm,normalised_cost,normalised_cost_spread,safe\ncdt,1.25,0.5,False\nbc,0.5,0,True\n")
    table = leaderboard(path, [])
    assert table is not None
    assert [title for _, title in table["columns"]] == ["algorithm", "normalised cost", "safe"]
    assert table["rows"][0]["normalised_cost"] == ("1.250 ± 0.500", "bad")
    assert table["rows"][1]["normalised_cost"] == ("0.500 ± 0.000", "good")
    assert table["rows"][1]["safe"] == ("yes", "")
    path.write_text("")
    assert leaderboard(path, []) is None


def test_a_single_model_has_no_spread_and_an_untrained_one_no_seed(tmp_path: Path) -> None:
    path = tmp_path / "leaderboard.csv"
    path.write_text("method,seed,models,accuracy,accuracy_std\nbase,-1,1,0.5,0.0\nmend,0,3,0.75,0.25\n")
    table = leaderboard(path, [])
    assert table is not None
    assert [row["seed"][0] for row in table["rows"]] == ["–", "0"]
    assert [row["accuracy"][0] for row in table["rows"]] == ["0.500", "0.750 ± 0.250"]


def test_figures_and_sizes_are_short() -> None:
    assert [number(x) for x in (3.0, 0.12345, 123.456, 1e9)] == ["3", "0.123", "123.5", "1,000,000,000.0"]
    assert [size(n) for n in (812, 3_400_000, 2_100_000_000)] == ["812 B", "3.4 MB", "2.1 GB"]


def validated(root: Path, drift: dict[str, Any]) -> None:
    write_json(root / f"data/rl/validate/{TASK}/drift.json", drift)


QUANTITIES = [
    {"quantity": f"observation[{n}]", "drift": n / 100, "accepted": 1.0, "now": 2.0} for n in range(9)
] + [
    {"quantity": "episode_return", "drift": 0.713, "accepted": 55.25, "now": 99.5},
    {"quantity": "action[7]", "drift": 1.0, "accepted": None, "now": 3.0},
]  # fmt: skip


def test_drift_is_shown_with_the_largest_first(root: Path) -> None:
    broken = {"success": False, "description": "no quantity has drifted by more than 0.2"}
    accepted = {"data_digest": "abcdef123456" + "0" * 52, "episodes": 1234}
    validated(root, {"accepted": accepted, "severity": "warning", "quantities": QUANTITIES, "expectations": [broken]})
    text = Page(build(root, out=root / "out").read_text()).text
    for part in ("Drift warning from the accepted data abcdef123456 of 1,234 episodes", broken["description"],
                 "action[7] – 3 1.000", "episode return 55.2 99.5 0.713", "The 8 largest of 11"):  # fmt: skip
        assert part in text, part
    assert text.index("action[7]") < text.index("episode return") < text.index("observation[8]")
    assert "observation[2]" not in text


def test_with_nothing_accepted_the_page_says_how_to_accept(root: Path) -> None:
    validated(root, {"accepted": None, "severity": "none", "quantities": [], "expectations": []})
    assert f"springhead accept rl-validate@{TASK}" in Page(build(root, out=root / "out").read_text()).text


def test_a_damaged_drift_file_is_said_and_the_verdict_still_shown(root: Path) -> None:
    validated(root, {"accepted": {}})
    text = Page(build(root, out=root / "out").read_text()).text
    assert f"The drift of rl-validate@{TASK} cannot be read" in text
    assert "at least 100 rows" in text


def test_films_and_the_pictures_of_filters_are_on_the_page(root: Path) -> None:
    folder, picture = root / f"data/rl/gallery/{TASK}", root / f"data/rl/filter/{TASK}/steps.png"
    who = {"name": "run-0-03", "algorithm": "cpo", "cost_limit": 10.0, "seed": 0, "digest": "0" * 64}
    figures = {"reset_seed": 1, "length": 100, "episode_return": 12.345, "cost_return": 3.0}
    safe = {**who, **figures, "film": "safe.gif"}
    write_json(folder / "gallery.json", {"safe": safe, "greedy": {**who, "film": None, "why": "no renderer <here>"}})
    (folder / "safe.gif").write_bytes(b"GIF89a")
    picture.write_bytes(b"picture")
    receipt = read_json(root / f"data/receipts/rl-filter@{TASK}.json")
    receipt["outputs"][f"data/rl/filter/{TASK}"]["files"]["steps.png"] = "0" * 64
    write_json(root / f"data/receipts/rl-filter@{TASK}.json", receipt)
    mine = {**receipt, "stage": f"rl-gallery@{TASK}", "datasets": [], "dependencies": {}}
    mine["outputs"] = {f"data/rl/gallery/{TASK}": {"sha256": "0" * 64, "bytes": 6, "files": {"safe.gif": "0" * 64}}}
    write_json(root / f"data/receipts/rl-gallery@{TASK}.json", mine)
    front = build(root, out=root / "out")
    page = Page(front.read_text())
    assert "the best that keeps the middle limit: cpo at cost limit 10; return 12.3, cost 3 in 100 steps" in page.text
    assert "No film: no renderer <here>" in page.text
    [film] = [link for link in page.links if link.endswith(".gif")][:1]
    assert (front.parent / film).read_bytes() == b"GIF89a"
    [wide] = [image for image in page.images if image["alt"] == f"before and after each rule of rl-filter@{TASK}"]
    assert (front.parent / str(wide["src"])).read_bytes() == b"picture"
