"""Costs: what the ledger says was spent and saved, and the counters of energy."""

import json
import threading
from pathlib import Path

import pytest

from pipelines.execution import Outcome
from pipelines.finish import conclude
from pipelines.session import Request, Result
from springhead import cli
from springhead.energy import Counter, Meter, nvml, rapl
from springhead.errors import BadInput
from springhead.lineage.cost import cost, lines
from springhead.lineage.ledger import Ledger
from springhead.lineage.receipts import read_receipts
from tests.lineage.sample import TASK

pytestmark = pytest.mark.unit
SECONDS = 12.5  # of every execution of the sample
TRAIN = f"rl-train@{TASK}-cdt-0"


def _stages(answer: dict[str, object]) -> dict[str, dict[str, object]]:
    return {entry["stage"]: entry for entry in answer["stages"]}  # type: ignore[attr-defined]


# -- spent ----------------------------------------------------------------------------------------


def test_every_attempt_counts_and_failed_ones_are_named(root: Path) -> None:
    stages = len(read_receipts(root))
    ledger = Ledger(root / ".springhead")
    ledger.append("failure", {"stage": TRAIN, "seconds": 4.0, "cpu_seconds": 3.0, "error": "no memory"})
    answer = cost(root)
    assert len(answer["stages"]) == stages
    assert answer["total"]["spent"] == {"seconds": stages * SECONDS + 4.0, "cpu_seconds": 3.0}
    assert answer["total"]["failed"]["seconds"] == 4.0
    entry = _stages(answer)[TRAIN]
    assert (entry["executions"], entry["failures"], entry["spent"]["seconds"]) == (1, 1, SECONDS + 4.0)  # type: ignore[index]


def test_a_model_costs_what_is_behind_it_and_shared_stages_are_named(root: Path) -> None:
    answer = cost(root)
    model = next(m for m in answer["models"] if m["stage"] == TRAIN)
    behind = [f"rl-{step}@{TASK}" for step in ("experts", "collect", "filter", "validate")]
    assert model["stages"] == [*behind, TRAIN]
    assert model["shared_stages"] == behind
    assert (model["made"]["seconds"], model["alone"]["seconds"]) == (5 * SECONDS, SECONDS)
    union = {stage for m in answer["models"] for stage in m["stages"]}
    assert answer["total"]["models"]["seconds"] == len(union) * SECONDS
    assert len(union) < sum(len(m["stages"]) for m in answer["models"])


def test_a_reference_leaves_only_what_is_behind_it(root: Path) -> None:
    answer = cost(root, f"data/rl/train/{TASK}/cdt/0/model")
    assert [s["stage"] for s in answer["stages"]][-1] == TRAIN
    assert len(answer["stages"]) == 5
    assert answer["models"][-1]["shared_stages"]  # shared with models that were not asked for


def test_energy_is_added_where_it_was_read_and_absent_elsewhere(root: Path) -> None:
    body: dict[str, object] = {"execution": "x", "stage": TRAIN, "receipt": "0" * 64, "seconds": 1.0}
    body["energy"] = {"package": 7200.0, "gpu": 30.0}
    Ledger(root / ".springhead").append("execution", body)
    answer = cost(root)
    entry = _stages(answer)[TRAIN]
    assert entry["spent"] == {"seconds": SECONDS + 1.0, "energy_package": 7200.0, "energy_gpu": 30.0}
    assert not any(key.startswith("energy") for key in _stages(answer)["llm-filter"]["spent"])  # type: ignore[attr-defined]
    text = "\n".join(lines(answer))
    assert "2.00 Wh" in text
    assert "30 J" in text
    assert "other processes included" in text


def test_without_counters_the_text_says_so_and_shows_no_zero(root: Path) -> None:
    text = "\n".join(lines(cost(root)))
    assert "no counter could be read" in text
    assert "0 J" not in text
    assert "reuse is not known" in text


# -- saved ----------------------------------------------------------------------------------------


def _run(root: Path, cached: list[str], kept: list[str]) -> None:
    """Concludes a run, as the flow does, in which some results were used again."""
    outcomes = {name: Outcome(name, "cached") for name in cached}
    outcomes |= {name: Outcome(name, "up to date") for name in kept} | {"rl-new": Outcome("rl-new", "executed", 1.0)}
    result = Result("20260102-030405-abcd", root, outcomes, 3.0)
    conclude(result, root, root / ".springhead", Request(1, targets=("rl-new",)), False, lambda line: None)


def test_a_run_records_what_it_used_again_and_each_reuse_saves_what_the_result_took(root: Path) -> None:
    _run(root, [TRAIN], ["llm-filter", "llm-generate"])
    _run(root, [TRAIN, "llm-filter"], [])
    assert Ledger(root / ".springhead").verify() == []
    answer = cost(root)
    stages = _stages(answer)
    assert (stages[TRAIN]["restored"], stages[TRAIN]["saved"]) == (2, {"seconds": 2 * SECONDS})
    assert (stages["llm-filter"]["restored"], stages["llm-filter"]["kept"]) == (1, 1)
    assert answer["total"]["saved"] == {"seconds": 3 * SECONDS}
    assert answer["total"]["up_to_date"] == {"seconds": 2 * SECONDS}
    assert (answer["total"]["runs"], answer["total"]["unknown_reuses"]) == (2, 0)
    assert "Recorded runs: 2. Restored from the cache: 3 results, which saved 37s" in "\n".join(lines(answer))


def test_the_execution_before_the_run_is_the_one_that_was_reused(root: Path) -> None:
    ledger = Ledger(root / ".springhead")
    receipt = next(e["body"]["receipt"] for e in ledger.entries() if e["body"]["stage"] == TRAIN)
    same = {"execution": "x", "stage": TRAIN, "receipt": receipt}
    ledger.append("execution", same | {"seconds": 100.0})  # made again, slower
    _run(root, [TRAIN], [])
    ledger.append("execution", same | {"seconds": 1.0})  # and after the run
    assert _stages(cost(root))[TRAIN]["saved"] == {"seconds": 100.0}


def test_a_result_that_was_made_elsewhere_saved_an_unknown_amount(root: Path) -> None:
    ledger = Ledger(root / ".springhead")
    ledger.append("run", {"run": "x", "cached": {TRAIN: "f" * 64}, "up_to_date": {}})
    answer = cost(root)
    assert answer["total"]["unknown_reuses"] == 1
    assert answer["total"]["saved"] == {}
    assert "made elsewhere" in "\n".join(lines(answer))


def test_nothing_known_and_nothing_meant_are_errors(root: Path, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="not known here"):
        cost(root, "--no such thing")
    with pytest.raises(BadInput, match="no model, data set or stage"):
        cost(root, "ffffffffffff")
    (tmp_path / "empty").mkdir()
    with pytest.raises(BadInput, match="no executions"):
        cost(tmp_path / "empty")


def test_the_command(root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(root)
    assert cli.main(["cost", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["total"]["executions"] == len(read_receipts(root))
    assert cli.main(["cost", f"rl-filter@{TASK}"]) == 0
    assert f"rl-collect@{TASK}" in capsys.readouterr().out
    assert cli.main(["cost", "nowhere"]) == 2


# -- energy ---------------------------------------------------------------------------------------


def _zone(powercap: Path, name: str, kind: str, energy: int, wraps_at: int = 1_000_000_000) -> Path:
    """Writes one zone of the powercap tree as the kernel lays it out."""
    zone = powercap / name
    zone.mkdir(parents=True)
    (zone / "name").write_text(f"{kind}\n")
    (zone / "max_energy_range_uj").write_text(f"{wraps_at}\n")
    (zone / "energy_uj").write_text(f"{energy}\n")
    return zone / "energy_uj"


@pytest.fixture
def powercap(tmp_path: Path) -> Path:
    """Two packages, one with memory; a core domain, psys and mmio that count the same energy again."""
    _zone(tmp_path, "intel-rapl:0", "package-0", 1_000_000)
    _zone(tmp_path, "intel-rapl:0:0", "core", 500_000)
    _zone(tmp_path, "intel-rapl:0:1", "dram", 200_000)
    _zone(tmp_path, "intel-rapl:1", "package-1", 3_000_000)
    _zone(tmp_path, "intel-rapl:2", "psys", 9_000_000)
    _zone(tmp_path, "intel-rapl-mmio:0", "package-0", 1_000_000)
    return tmp_path


def test_packages_and_memory_are_counted_once(powercap: Path) -> None:
    assert [counter.kind for counter in rapl(powercap)] == ["package", "dram", "package"]
    meter = Meter(rapl(powercap))
    (powercap / "intel-rapl:0/energy_uj").write_text("6000000\n")
    (powercap / "intel-rapl:1/energy_uj").write_text("5500000\n")
    (powercap / "intel-rapl:0:0/energy_uj").write_text("99000000\n")
    (powercap / "intel-rapl:0:1/energy_uj").write_text("450000\n")
    assert meter.stop() == {"dram": 0.25, "package": 7.5}


def test_a_counter_that_wraps_is_counted_on(tmp_path: Path) -> None:
    energy = _zone(tmp_path, "intel-rapl:0", "package-0", 900_000_000)
    meter = Meter(rapl(tmp_path))
    energy.write_text("100000000\n")
    assert meter.stop() == {"package": 200.0}


def test_a_counter_that_wraps_twice_is_read_in_between(tmp_path: Path) -> None:
    energy = _zone(tmp_path, "intel-rapl:0", "package-0", 0)
    (counter,) = rapl(tmp_path)
    reads, three = [], threading.Event()

    def read() -> float:
        value = counter.read()
        reads.append(value)
        # The file takes its next value before the next reading: 900, then 800 and 700 after a wrap each.
        energy.write_text(f"{max(700, 1000 - 100 * len(reads)) * 1_000_000}\n")
        if len(reads) == 4:
            three.set()
        return value

    meter = Meter([Counter("package", read, counter.wraps_at)], interval=0.01)
    assert three.wait(10)
    assert meter.stop() == {"package": 2700.0}
    assert reads[:4] == [0.0, 900.0, 800.0, 700.0]


def test_what_cannot_be_read_is_absent(powercap: Path, tmp_path: Path) -> None:
    assert rapl(tmp_path / "nothing") == []
    assert Meter([]).stop() == {}
    (powercap / "intel-rapl:1/energy_uj").write_text("not a number\n")
    (powercap / "intel-rapl:0:1/max_energy_range_uj").unlink()
    assert [counter.kind for counter in rapl(powercap)] == ["package"]


def test_a_kind_of_which_one_counter_fails_is_absent_as_a_whole(powercap: Path) -> None:
    meter = Meter(rapl(powercap))
    (powercap / "intel-rapl:1/energy_uj").unlink()
    assert meter.stop() == {"dram": 0.0}  # memory was readable, and used nothing


def test_a_count_that_was_set_back_is_no_count() -> None:
    values = iter([5.0, 1.0])
    assert Meter([Counter("gpu", lambda: next(values), None)]).stop() == {}


def test_devices_that_are_not_there_give_no_counters() -> None:
    assert nvml({"CUDA_VISIBLE_DEVICES": "GPU-no-such-device, 99,"}) == []
