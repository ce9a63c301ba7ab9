"""The lineage page, and what a browser makes of it."""

import contextlib
import html
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from springhead.cli import main
from springhead.errors import BadInput
from springhead.lineage import page as module
from springhead.lineage.page import MOST_ROWS, page, write_page
from springhead.tables import write_table
from tests.lineage.sample import DECISIONS, DROPPED, EPISODES, REPAIRED, REPLACED, TASK, episode, problem, text_row

pytestmark = pytest.mark.unit

MODEL = f"data/rl/train/{TASK}/cdt/0/model"
TEXT = "data/llm/finetune/small-llama/mend/0/model"
CHROMIUM = Path("/usr/bin/chromium")
FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
         "--disable-background-networking", "--disable-component-update", "--disable-sync"]  # fmt: skip
STYLE = Path(module.__file__).parent.parent / "report" / "templates"
HOSTILE = '</script><script>window.hacked = 1</script><img src=x onerror="window.hacked = 2">\u2028{{ 7 * 7 }}'


def content(text: str) -> dict[str, Any]:
    """Returns what the page's script is given."""
    (found,) = re.findall(r'<script type="application/json" id="content">(.*?)</script>', text, re.DOTALL)
    return json.loads(found)


def node(text: str, title: str) -> dict[str, Any]:
    (found,) = [n for n in content(text)["nodes"] if n["title"] == title]
    return found


def lines(of: dict[str, Any]) -> dict[str, str]:
    return {key: value for section in of["sections"] for key, value, _ in section["lines"]}


# -- what is in it --------------------------------------------------------------------------------


def test_a_page_has_everything_behind_a_model(root: Path) -> None:
    text = page(root, MODEL)
    titles = {n["title"] for n in content(text)["nodes"]}
    steps = ("experts", "collect", "filter", "validate", "evaluate")
    assert titles == {"p0", "p1", f"train {TASK}-cdt-0", *(f"{step} {TASK}" for step in steps)}
    trained = lines(node(text, f"train {TASK}-cdt-0"))
    assert trained["rl.train.steps"] == "50"
    (limit,) = [s for s in node(text, f"train {TASK}-cdt-0")["sections"] if s["title"] == "Evaluated at cost limit 20"]
    assert ["normalised return", "0.618", ""] in limit["lines"]
    assert trained["commit"].startswith("0123456789abcdef")
    rules = lines(node(text, f"filter {TASK}"))
    assert rules["outlier"] == "6 kept · 2 dropped · threshold 165"
    assert lines(node(text, f"validate {TASK}"))["says"] == "passed"
    assert node(text, f"validate {TASK}")["state"] == "good"
    edges = {(e["from"], e["to"]) for e in content(text)["edges"]}
    number = {n["title"]: n["id"] for n in content(text)["nodes"]}
    assert (number["p0"], number[f"collect {TASK}"]) in edges
    assert (number[f"filter {TASK}"], number[f"train {TASK}-cdt-0"]) in edges
    assert all(e["verified"] for e in content(text)["edges"])


def test_equal_checkouts_give_equal_bytes_and_nothing_is_fetched(root: Path) -> None:
    text = page(root, TEXT)
    assert page(root, TEXT) == text
    assert str(root) not in text
    assert not re.search(r"<(?:script|img|link|iframe)[^>]+(?:src|href)=[\"'](?!data:)", text)
    assert "sourceMappingURL" not in text
    assert "default-src 'none'; script-src 'sha256-" in html.unescape(text)
    assert "vis-network" in text


def test_rows_that_went_another_way_than_training_are_told_apart(root: Path) -> None:
    rows = content(page(root, TEXT))["rows"]
    states = {outcome["state"] for outcome in rows["outcomes"]}
    # Behind the MEND model are also the rows of the other method, and the problems both were made from.
    assert states == {"trained", "source", "dropped", "other"}
    assert rows["count"] == 3 + 9


def test_a_link_that_does_not_match_is_marked(root: Path) -> None:
    path = root / f"data/receipts/rl-filter@{TASK}.json"
    receipt = json.loads(path.read_text())
    receipt["dependencies"][f"data/rl/collect/{TASK}"]["sha256"] = "0" * 64
    path.write_text(json.dumps(receipt))
    text = page(root, MODEL)
    wrong = [e for e in content(text)["edges"] if not e["verified"]]
    assert [(e["from"], e["to"]) for e in wrong] == [
        (node(text, f"collect {TASK}")["id"], node(text, f"filter {TASK}")["id"])
    ]


def test_more_rows_than_a_page_carries_are_said_and_left_out(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MOST_ROWS", 5)
    text = page(root, MODEL)
    assert content(text)["rows"] == {"count": EPISODES + 1, "ids": ""}
    assert "more than the 5 that a page carries" in text
    assert MOST_ROWS == 100_000


def test_a_page_is_written_whole_or_not_at_all(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "new folder" / "-é<b>.html"
    assert write_page(root, MODEL, target) == target
    assert [path.name for path in target.parent.iterdir()] == [target.name]
    with pytest.raises(BadInput, match="cannot be written"):
        write_page(root, MODEL, tmp_path)
    with pytest.raises(BadInput, match=r"--html .*: lies in what rl-train@.* made"):
        write_page(root, MODEL, root / MODEL / "page.html")
    assert not (root / MODEL / "page.html").exists()
    monkeypatch.chdir(root)
    assert main(["lineage", MODEL, "--html", str(tmp_path / "page.html")]) == 0
    assert (tmp_path / "page.html").read_bytes() == target.read_bytes()
    assert main(["lineage", MODEL, "--html", str(tmp_path / "other.html"), "--rows"]) == 2
    assert not (tmp_path / "other.html").exists()


def _luminance(colour: str) -> float:
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    red, green, blue = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def _contrast(a: str, b: str) -> float:
    low, high = sorted((_luminance(a), _luminance(b)))
    return (high + 0.05) / (low + 0.05)


def test_text_and_borders_have_the_contrast_that_wcag_asks_for() -> None:
    themes: list[dict[str, str]] = [{}, {}]
    for name in ("style.css", "lineage.css"):
        text = (STYLE / name).read_text()
        for theme, block in zip(themes, re.findall(r":root \{(.*?)\}", text, re.DOTALL)[:2], strict=True):
            theme |= dict(re.findall(r"(--[\w-]+): (#[0-9a-f]{6})", block))
    for theme in themes:
        kinds = {name for name in theme if name.startswith("--k-") and not name.endswith("-soft")}
        assert len(kinds) == 8
        for kind in kinds:
            assert _contrast(theme["--ink"], theme[f"{kind}-soft"]) >= 7
            assert _contrast(theme[kind], theme["--surface"]) >= 4.5
        assert _contrast(theme["--soft"], theme["--surface"]) >= 4.5
        assert _contrast(theme["--wrong"], theme["--surface"]) >= 4.5
        assert _contrast(theme["--edge"], theme["--surface"]) >= 2.5


# -- in a browser ---------------------------------------------------------------------------------


class Tab:
    """A page in a browser tab, with everything it said or asked the network for."""

    def __init__(self, context: Any, path: Path) -> None:
        self.page = context.new_page()
        self.page.set_default_timeout(20_000)
        self.messages: list[str] = []
        self.requests: list[str] = []
        self.page.on("console", lambda message: self.messages.append(message.text))
        self.page.on("pageerror", lambda error: self.messages.append(str(error)))
        self.page.on("dialog", lambda dialog: (self.messages.append(dialog.message), dialog.dismiss()))
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.goto(path.as_uri())
        self.page.wait_for_selector("#detail[data-node]")
        self.address = path.as_uri()

    def click_node(self, number: int) -> None:
        """Clicks the drawn box of a node, where it is on the screen."""
        self.page.locator("#graph").scroll_into_view_if_needed()
        place = self.page.evaluate(
            "(id) => { const n = window.lineage.network, p = n.canvasToDOM(n.getPosition(id)),"
            " b = document.getElementById('graph').getBoundingClientRect(); return [b.x + p.x, b.y + p.y]; }",
            number,
        )
        self.page.mouse.click(*place)
        self.page.wait_for_selector(f"#detail[data-node='{number}']")

    def look_up(self, text: str) -> str:
        self.page.fill("#row-id", text)
        self.page.press("#row-id", "Enter")
        return self.page.inner_text("#found")

    def check(self) -> None:
        """Nothing was said on the console, and nothing but the page itself was asked for."""
        assert self.messages == []
        assert self.requests == [self.address]


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    if not CHROMIUM.exists():
        pytest.skip(f"no {CHROMIUM}: `make browser` installs it where it may")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        launched = playwright.chromium.launch(executable_path=str(CHROMIUM), args=FLAGS)
        yield launched
        launched.close()


@contextlib.contextmanager
def opened(browser: Any, path: Path, scheme: str = "light") -> Iterator[Tab]:
    context = browser.new_context(color_scheme=scheme, viewport={"width": 1400, "height": 1000})
    try:
        yield Tab(context, path)
    finally:
        context.close()


@pytest.mark.e2e
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_node_opens_by_mouse_and_by_keyboard(root: Path, tmp_path: Path, browser: Any, scheme: str) -> None:
    target = write_page(root, MODEL, tmp_path / "page.html")
    nodes = content(target.read_text())["nodes"]
    with opened(browser, target, scheme) as tab:
        assert tab.page.inner_text("#detail h3") == f"train {TASK}-cdt-0"
        for entry in nodes:
            tab.click_node(entry["id"])
            assert tab.page.inner_text("#detail h3") == entry["title"]
            shown = tab.page.inner_text("#detail")
            assert all(key in shown and value in shown for key, value in lines(entry).items())
        tab.page.focus("#list li:nth-child(1) button")
        tab.page.keyboard.press("Enter")
        assert tab.page.inner_text("#detail h3") == nodes[0]["title"]
        tab.page.click("#detail .near button")
        assert tab.page.inner_text("#detail h3") == "p0"
        tab.page.fill("#list-filter", "filter")
        assert tab.page.inner_text("#list-count") == f"1 of {len(nodes)}"
        ground = tab.page.evaluate("() => getComputedStyle(document.body).backgroundColor")
        assert ground == {"light": "rgb(246, 248, 250)", "dark": "rgb(16, 22, 28)"}[scheme]
        tab.check()


@pytest.mark.e2e
def test_rows_can_be_looked_up(root: Path, tmp_path: Path, browser: Any) -> None:
    with opened(browser, write_page(root, MODEL, tmp_path / "page.html")) as tab:
        assert "used as training data" in tab.look_up(episode(0))
        assert "used as training data" in tab.look_up(f"row:{REPAIRED[:8].upper()}")
        dropped = tab.look_up(episode(DROPPED[0])[:12])
        assert f"dropped by the rule outlier of rl-filter@{TASK}" in dropped
        assert "value 180" in dropped
        assert f"changed by the rule inpaint of rl-filter@{TASK} into {REPAIRED}" in tab.look_up(episode(REPLACED))
        tab.page.click("#found button")
        assert tab.page.inner_text("#detail h3") == f"filter {TASK}"
        assert "No row behind this page" in tab.look_up("f" * 64)
        assert "No row behind this page" in tab.look_up(problem(0))
        for wrong in ("", "abc", "not hexadecimal", "<b>" * 4, "0" * 65):
            assert "8 to 64 digits" in tab.look_up(wrong)
        tab.check()


@pytest.mark.e2e
def test_the_page_of_a_row_shows_where_it_went(root: Path, tmp_path: Path, browser: Any) -> None:
    dropped = write_page(root, f"row:{episode(DROPPED[1])}", tmp_path / "dropped.html")
    with opened(browser, dropped) as tab:
        shown = tab.page.inner_text("#detail")
        assert f"dropped by rl-filter@{TASK} · value 210 · threshold 165" in shown
        tab.check()
    source = write_page(root, problem(0), tmp_path / "source.html")
    with opened(browser, source) as tab:
        child = text_row(0, "mend", 1)
        assert "child of this row" in tab.look_up(child)
        tab.page.fill("#list-filter", child[:12])
        tab.page.click("#list button")
        assert child in tab.page.inner_text("#detail")
        tab.check()


@pytest.mark.e2e
@pytest.mark.fault
def test_hostile_names_stay_text(root: Path, tmp_path: Path, browser: Any) -> None:
    path = root / f"data/receipts/rl-train@{TASK}-cdt-0.json"
    receipt = json.loads(path.read_text())
    receipt["models"][0]["facts"]["algorithm"] = HOSTILE
    receipt["params"]["rl.train"] = {HOSTILE: [HOSTILE]}
    path.write_text(json.dumps(receipt))
    evil = "rl-train@<img src=x onerror=alert(1)>"
    (root / f"data/receipts/{evil}.json").write_text(json.dumps(receipt | {"stage": evil, "outputs": {}, "models": []}))
    decisions = root / f"data/rl/filter/{TASK}/decisions.parquet"
    table = pq.read_table(decisions).to_pydict()
    write_table(decisions, {**table, "rule": [HOSTILE] * len(table["id"])}, DECISIONS)
    for ref in (MODEL, evil, f"row:{episode(DROPPED[0])}"):
        target = write_page(root, ref, tmp_path / "page.html")
        assert "<script>window.hacked" not in target.read_text()
        with opened(browser, target) as tab:
            for entry in content(target.read_text())["nodes"]:
                tab.page.evaluate("(id) => window.lineage.open(id, false)", entry["id"])
            if ref == MODEL:
                assert HOSTILE in (tab.page.text_content("#rules-section") or "")
                assert "window.hacked = 2" in tab.look_up(episode(DROPPED[0]))
            assert tab.page.evaluate("() => window.hacked") is None
            assert tab.page.locator("img").count() == 0
            assert tab.page.locator("script").count() == 3
            tab.check()


@pytest.mark.e2e
def test_a_thousand_models_are_drawn_apart_and_open(root: Path, tmp_path: Path, browser: Any) -> None:
    made = (root / f"data/receipts/rl-train@{TASK}-cdt-0.json").read_text()
    for number in range(2, 1002):
        text = made.replace("cdt/0", f"cdt/{number}").replace("cdt-0", f"cdt-{number}")
        receipt = json.loads(text)
        receipt["models"][0]["sha256"] = f"{number:064x}"
        (root / f"data/receipts/rl-train@{TASK}-cdt-{number}.json").write_text(json.dumps(receipt))
    target = write_page(root, f"data/rl/filter/{TASK}", tmp_path / "page.html")
    nodes = content(target.read_text())["nodes"]
    assert len(nodes) > 1000
    assert len({(entry["x"], entry["y"]) for entry in nodes}) == len(nodes)
    with opened(browser, target) as tab:
        tab.click_node(nodes[-1]["id"])
        assert tab.page.inner_text("#list-count") == f"{len(nodes)} nodes"
        tab.page.fill("#list-filter", "cdt-777")
        tab.page.click("#list button")
        assert tab.page.inner_text("#detail h3") == f"train {TASK}-cdt-777"
        tab.check()
