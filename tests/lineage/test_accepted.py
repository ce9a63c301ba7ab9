"""Accepted profiles: what the audit says of them, and that accepting changes nothing else."""

from pathlib import Path

import pytest

from springhead.acceptance import accept
from springhead.errors import BadInput
from springhead.jsonio import read_json, write_json
from springhead.lineage.audit import audit
from springhead.lineage.digests import tree_digest
from springhead.lineage.ledger import Ledger
from springhead.lineage.workspace import RED, WARNING
from tests.lineage.sample import TASK

pytestmark = pytest.mark.fault

STAGE = f"rl-validate@{TASK}"
WHERE = f"data/accepted/rl/{TASK}.json"


def found(root: Path) -> list[tuple[str, str, str]]:
    """Returns what the audit says of accepted profiles: (severity, where, what)."""
    return [(p.severity, p.where, p.what) for p in audit(root).problems if p.check == "accepted"]


def judge(root: Path, mean: float = 1.0) -> None:
    """Puts a profile beside the verdict, as the validate stage does."""
    entry = {"mean": mean, "std": 0.0, "values": [mean], "below": [0.0], "up_to": [1.0]}
    digest = tree_digest(root / f"data/rl/filter/{TASK}")
    facts = {"format": 1, "task": TASK, "data_digest": digest, "episodes": 6, "steps": 6, "cost_rate": 0.5}
    write_json(root / f"data/rl/validate/{TASK}/profile.json", {**facts, "quantities": {"length": entry}})


@pytest.fixture
def checkout(root: Path) -> Path:
    """The sample, with a profile beside its verdict."""
    judge(root)
    return root


def test_accepting_makes_nothing_red(checkout: Path) -> None:
    before = audit(checkout)
    accept(STAGE, checkout, checkout / ".springhead")
    after = audit(checkout)
    assert after.problems == before.problems
    assert after.checked["accepted"] == 1


def test_an_edited_profile_is_red_until_it_is_put_back(checkout: Path) -> None:
    accept(STAGE, checkout, checkout / ".springhead")
    accepted = (checkout / WHERE).read_bytes()
    (checkout / WHERE).write_bytes(accepted.replace(b'"mean": 1', b'"mean": 2'))
    assert (checkout / WHERE).read_bytes() != accepted
    [(severity, where, what)] = found(checkout)
    assert (severity, where) == (RED, WHERE)
    assert what.startswith("was edited")
    (checkout / WHERE).write_bytes(accepted[:-9])
    assert found(checkout) == [(RED, WHERE, "is no readable profile")]
    (checkout / WHERE).write_bytes(accepted)
    assert found(checkout) == []


def test_accepting_again_puts_an_edited_profile_right_and_takes_over_one_of_another_ledger(checkout: Path) -> None:
    home = checkout / ".springhead"
    first = accept(STAGE, checkout, home)
    accepted = (checkout / WHERE).read_bytes()
    (checkout / WHERE).write_bytes(accepted.replace(b'"mean": 1', b'"mean": 2'))
    again = accept(STAGE, checkout, home)
    assert (checkout / WHERE).read_bytes() == accepted
    assert first.entry is not None
    assert again.entry == first.entry + 1
    assert accept(STAGE, checkout, home).entry is None

    (home / "ledger.jsonl").unlink()  # as after a pull: the profile is there, its acceptance is elsewhere
    (home / "ledger.head.json").unlink()
    assert found(checkout) == [(WARNING, WHERE, "was not accepted by an entry of this ledger")]
    assert accept(STAGE, checkout, home).entry == 0
    assert found(checkout) == []


def test_the_same_data_described_anew_are_accepted_anew(checkout: Path) -> None:
    home = checkout / ".springhead"
    accept(STAGE, checkout, home)
    judge(checkout, mean=3.0)  # code that describes data in another way
    found_now = accept(STAGE, checkout, home)
    assert found_now.entry is not None
    assert found_now.before == found_now.data_digest
    assert read_json(checkout / WHERE)["quantities"]["length"]["mean"] == 3.0
    [entry] = [e for e in Ledger(home).entries() if e["seq"] == found_now.entry]
    assert entry["body"]["path"] == WHERE


def test_a_damaged_profile_is_not_replaced_unseen(checkout: Path) -> None:
    write_json(checkout / WHERE, [])
    with pytest.raises(BadInput, match=rf"{TASK}\.json: not a profile of format 1; restore it with `git checkout`"):
        accept(STAGE, checkout, checkout / ".springhead")
