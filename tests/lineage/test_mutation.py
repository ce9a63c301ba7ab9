"""A byte is flipped in every file that a promoted model rests on, one at a time: the audit must name each."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from springhead import registry, tracking, versions
from springhead.lineage.audit import audit
from springhead.lineage.graph import Graph
from springhead.lineage.workspace import RED, Workspace

pytestmark = [pytest.mark.fault, pytest.mark.e2e]
NAME = "mend-small-llama"


@pytest.fixture
def promoted(root: Path) -> Path:
    """The sample with a real promotion; copies, not links, between DVC's cache and the workspace."""
    (root / "mlflow").mkdir(exist_ok=True)
    shutil.copy(Path(__file__).parents[2] / "mlflow" / "gates.yaml", root / "mlflow" / "gates.yaml")
    registry.promote(NAME, root=root, home=root / ".springhead")
    return root


def rests_on(root: Path) -> dict[str, list[Path]]:
    """Every file that the champion rests on, by kind."""
    home, graph = root / ".springhead", Graph.read(root)
    (champion,) = registry.champions(home)
    judges = [name for name in graph.children(champion.stage) if "-evaluate@" in name]
    stages = {*graph.upstream(champion.stage), *(s for judge in judges for s in graph.upstream(judge))}
    stages |= {name for name in graph.receipts if "validate" in name and set(graph.parents(name)) & stages}
    workspace = Workspace(root)
    outputs = [file for s in stages for out in graph.receipts[s]["outputs"] for file in workspace.files[out].values()]
    locked = [workspace.locked[stage] for stage in stages]
    objects = {place for entry in locked for _, _, place in entry.objects}
    cache = root / ".dvc/cache/files/md5"
    listings = {cache / md5[:2] / md5[2:] for entry in locked for md5 in entry.outs.values() if md5.endswith(".dir")}
    client = tracking.connect(home)
    stored = versions.local(client, champion)
    assert stored is not None
    found = {
        "outputs": outputs,
        "cache": sorted(objects | listings),
        "receipts": [root / f"data/receipts/{stage}.json" for stage in sorted(stages)],
        "ledger": [home / "ledger.jsonl", home / "ledger.head.json"],
        "statements": sorted((home / "signatures").rglob("*.json")),
        "keys": sorted((root / "mlflow/trusted-keys").iterdir()),
        "registry": sorted(path for path in stored.rglob("*") if path.is_file()),
    }
    assert all(found.values()), {kind: len(files) for kind, files in found.items()}
    kinds = {path.name for path in found["outputs"]}
    assert {"rows.parquet", "decisions.parquet", "verdict.json", "summary.json"} <= kinds
    assert any(path.suffix == ".safetensors" for path in found["outputs"])
    return found


def flips(path: Path, generator: np.random.Generator) -> Iterator[int]:
    """Flips one bit at a drawn place, yields the place, and puts the file back as it was."""
    mode, whole = path.stat().st_mode, path.read_bytes()
    place = int(generator.integers(len(whole)))
    changed = bytearray(whole)
    changed[place] ^= 1 << int(generator.integers(8))
    path.chmod(0o644)
    try:
        path.write_bytes(bytes(changed))
        yield place
    finally:
        path.write_bytes(whole)
        path.chmod(mode)


def test_every_flipped_byte_is_found_and_named(promoted: Path) -> None:
    assert not audit(promoted).red
    generator = np.random.default_rng(20)
    unseen, unnamed, tried = [], [], 0
    for kind, files in rests_on(promoted).items():
        for path in files:
            shown = path.relative_to(promoted).as_posix()
            for place in flips(path, generator):
                tried += 1
                # Where the damage is not in the registry, the quicker half of the audit has to see it.
                red = [p for p in audit(promoted, registry=kind == "registry").problems if p.severity == RED]
                text = " ".join(f"{p.where} {p.what}" for p in red)
                if not red:
                    unseen.append(f"{kind} {shown} byte {place}")
                elif path.name not in text and path.stem[:12] not in text:
                    unnamed.append(f"{kind} {shown}: {text[:300]}")
    assert tried > 60
    assert unseen == []
    assert unnamed == []
    assert not audit(promoted).red
