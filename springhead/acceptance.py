"""Accepting a data set: a person says that it is what later ones are compared with.

The profile that a validate stage wrote beside its verdict is copied into ``data/accepted``, which git tracks, and the
ledger gets an entry. Data that failed validation cannot be accepted; data that failed for their drift alone can: that
is how one says that they are meant to differ.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from springhead.errors import BadInput, Finding
from springhead.jsonio import read_json, write_json_atomic
from springhead.keys import Keys
from springhead.lineage.accepted import acceptances
from springhead.lineage.digests import file_digest, tree_digest
from springhead.lineage.ledger import Ledger
from springhead.rl.drift import accepted_path, read_accepted
from springhead.rl.tasks import task


@dataclass(frozen=True)
class Acceptance:
    """What was accepted.

    Attributes:
        stage: The validate stage.
        path: The profile, in git's hands.
        data_digest: Digest of the accepted data set's folder.
        before: That of the one accepted before, or None.
        entry: The ledger entry; None where this very profile was accepted last.
    """

    stage: str
    path: Path
    data_digest: str
    before: str | None
    entry: int | None

    def as_json(self) -> dict[str, Any]:
        """The acceptance as JSON."""
        return {**vars(self), "path": str(self.path)}


def accept(stage: str, root: Path, home: Path) -> Acceptance:
    """Makes the data set that a validate stage judged the one later ones are compared with.

    Args:
        stage: Such as ``rl-validate@BallCircle``.
        root: The checkout.
        home: Its state folder.

    Raises:
        BadInput: If the stage is none that judges drift, or has not judged the data that are there now; if the
            profile accepted before is damaged.
        Finding: If the data failed validation.
    """
    step, _, name = stage.partition("@")
    if step != "rl-validate" or not name:
        raise BadInput(f"{stage}: only rl-validate@TASK judges drift; name one, such as rl-validate@BallCircle")
    of = task(name)
    data = root / "data/rl/filter" / of.name
    digest = tree_digest(data)
    # A run that was refused for its drift left its findings in the state folder.
    judged = [root / "data/rl/validate" / of.name, home / "failed" / stage]
    made = next((folder for folder in judged if _is_about(folder, digest)), None)
    if made is None:
        raise BadInput(f"{stage}: has not judged the data in {data.relative_to(root)}; run `dvc repro {stage}` first")
    if not read_json(made / "verdict.json")["success"]:
        raise Finding(f"{stage}: these data failed validation, see {made / 'verdict.json'}; mend them first")
    path = accepted_path(root, of.name)
    where, ledger = path.relative_to(root).as_posix(), Ledger(home)
    profile, known = read_json(made / "profile.json"), read_accepted(path, of)
    before = None if known is None else str(known["data_digest"])
    last = acceptances(ledger.entries(), where)[-1:]
    # Both must say so: a profile may have come with `git pull`, been edited, or been written before a kill.
    if known == profile and [body["profile"] for body in last] == [file_digest(path)]:
        return Acceptance(stage, path, digest, before, None)
    write_json_atomic(path, profile)
    body = {
        "stage": stage,
        "path": where,
        "data": digest,
        "before": before,
        "verdict": file_digest(made / "verdict.json"),
        "profile": file_digest(path),
    }
    entry = ledger.append("acceptance", body, Keys.of(root, home))
    return Acceptance(stage, path, digest, before, int(entry["seq"]))


def _is_about(folder: Path, digest: str) -> bool:
    """Whether a folder holds a verdict and a profile of these very data."""
    files = [folder / "verdict.json", folder / "profile.json"]
    return all(path.is_file() for path in files) and all(read_json(p).get("data_digest") == digest for p in files)
