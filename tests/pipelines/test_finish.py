"""Promotion at the end of a run: what cannot be judged is named, and holds back nothing else."""

import shutil
from pathlib import Path

import pytest

from pipelines.finish import Conclusion, conclude, raise_if_red
from pipelines.session import Request, Result
from springhead import report
from springhead.errors import BadInput, Finding
from springhead.jsonio import write_json
from tests.promotable import NAME, Checkout, with_store


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return with_store(tmp_path_factory)


@pytest.fixture
def checkout(template: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Checkout:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    shutil.copytree(template, tmp_path / "checkout")
    return Checkout(tmp_path / "checkout")


def concluded(checkout: Checkout) -> Conclusion:
    result = Result("run", checkout.root, {}, 0.0)
    return conclude(result, checkout.root, checkout.home, Request(1), True, lambda line: None)


@pytest.mark.fault
def test_an_evaluation_that_cannot_be_read_holds_back_no_other_model(
    checkout: Checkout, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(report, "build", lambda place, home, folder: place / "report/index.html")
    write_json(checkout.root / "data/rl/evaluate/AntCircle/summary.json", {"models": []})  # before NAME's
    conclusion = concluded(checkout)
    assert list(conclusion.champions) == [NAME]
    assert list(conclusion.closed) == ["policy-AntCircle"]
    assert "summary.json: no figures by cost limit" in conclusion.closed["policy-AntCircle"]
    assert conclusion.places["report"] == "report/index.html"
    assert any(line.startswith("gate closed for policy-AntCircle: data/rl/evaluate") for line in conclusion.table())
    with pytest.raises(Finding, match=r"^not promoted: policy-AntCircle$"):
        raise_if_red(conclusion)


@pytest.mark.fault
def test_gates_that_cannot_be_read_are_reported(checkout: Checkout, monkeypatch: pytest.MonkeyPatch) -> None:
    def unreadable(place: Path, home: Path, folder: Path | None) -> Path:
        raise BadInput("summary.json: not in the form the project writes")

    monkeypatch.setattr(report, "build", unreadable)
    rules = checkout.root / "mlflow/gates.yaml"
    rules.write_text(rules.read_text().replace("margin: 0.05", "margin: .inf", 1))
    conclusion = concluded(checkout)
    assert conclusion.champions == {}
    assert "families.rl.margin: must be a finite number" in conclusion.closed["every model"]
    assert conclusion.notes == ["the report could not be written: summary.json: not in the form the project writes"]
    with pytest.raises(Finding, match="not promoted: every model"):
        raise_if_red(conclusion)
