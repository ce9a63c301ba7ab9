# ruff: noqa: F401, F811  (fixtures of pytest are imported, then named as arguments)
"""What git did not say is shown as unknown."""

import json
from pathlib import Path

import jsonschema
import pytest
from typer.testing import CliRunner

from springhead.cli import app
from springhead.export import openlineage
from springhead.export.cards import Facts, data_card
from springhead.git import uncommitted
from springhead.keys import Keys
from springhead.lineage.ledger import Ledger
from springhead.report import build
from tests.lineage.conftest import root, sample_template
from tests.lineage.sample import TASK

pytestmark = pytest.mark.unit


def test_uncommitted_changes_are_there_or_not_or_unknown() -> None:
    assert uncommitted({"revision": "c0ffee", "dirty": False}) == uncommitted({"revision": "c0ffee"}) == ""
    assert uncommitted({"revision": "c0ffee", "dirty": True}) == " with uncommitted changes"
    assert uncommitted({"revision": "", "dirty": True}) == ""  # nothing is committed
    assert "unknown" in uncommitted({"revision": "", "dirty": None})


@pytest.mark.parametrize("revision", ["", "c0ffee" * 6])
def test_every_reader_shows_what_git_did_not_say_as_unknown(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, revision: str
) -> None:
    home, stage = root / ".springhead", f"rl-collect@{TASK}"
    monkeypatch.chdir(root)
    ran = [e["body"] for e in Ledger(home).entries() if e["body"].get("stage") == stage]
    again = ran[-1] | {"execution": "a" * 32, "git": {"revision": revision, "dirty": None}}
    Ledger(home).append("execution", again, Keys.of(root, home))

    assert "uncommitted changes unknown" in CliRunner().invoke(app, ["lineage", f"data/rl/collect/{TASK}"]).stdout
    CliRunner().invoke(app, ["lineage", f"data/rl/collect/{TASK}", "--html", str(tmp_path / "page.html")])
    assert "uncommitted changes unknown" in (tmp_path / "page.html").read_text()
    assert "uncommitted changes unknown" in data_card(Facts(root), f"rl-filter@{TASK}")
    assert "uncommitted changes unknown" in build(root, home, tmp_path / "report").read_text()

    schema = json.loads(openlineage.SCHEMA.read_text())
    facets = [event["run"]["facets"]["springhead_execution"] for event in openlineage.events(root)]
    mine = [facet for facet in facets if facet["execution"] == "a" * 32]
    assert mine and not any("dirty" in facet for facet in mine)
    for facet in mine:
        jsonschema.validate({"springhead_execution": facet}, schema)
