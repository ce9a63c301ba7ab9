"""The audit beside plain SHA-256 of the same files: its cost must grow with bytes and with nothing else.

    python benchmarks/audit_speed.py                # 0.25, 0.5, 1 and 2 GB
    python benchmarks/audit_speed.py --sizes 0.1    # a quick look

Makes a checkout of that many bytes as the stages would have left it, audits it with
``springhead.lineage.audit.audit``, and hashes the same files with ``hashlib.sha256`` alone, with as many threads.
The audit must be free of red findings, or its time would mean nothing.
"""

import argparse
import contextlib
import hashlib
import os
import platform
import shutil
import statistics
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import yaml

from springhead.jsonio import write_json
from springhead.keys import Keys
from springhead.lineage.audit import audit
from springhead.lineage.digests import file_digest, files_digest
from springhead.lineage.ledger import Ledger
from springhead.lineage.receipts import describe, receipt_path
from springhead.lineage.workspace import RED

PARTS = 32  # outputs of one checkout
BLOCK = 1 << 20


def write_checkout(root: Path, size: int, seed: int = 0) -> list[Path]:
    """Writes ``size`` bytes of data with receipts, a ledger, ``dvc.lock`` and DVC's cache; returns the files."""
    rng = np.random.default_rng(seed)
    for name in ("rl", "llm"):
        (root / "locks").mkdir(parents=True, exist_ok=True)
        (root / f"locks/{name}.lock").write_text("numpy==2.4.6\n", encoding="utf-8")
    code = root / "stages/rl/collect.py"
    code.parent.mkdir(parents=True)
    code.write_text('"""The collect stage."""\n', encoding="utf-8")
    ledger, files, names = Ledger(root / ".springhead"), [], []
    keys = Keys.of(root, root / ".springhead")
    for part in range(PARTS):
        stage, out = f"rl-collect@part{part:02d}", f"data/rl/collect/part{part:02d}"
        data = root / out / "dataset.hdf5"
        data.parent.mkdir(parents=True)
        with data.open("wb") as file:
            left = size // PARTS
            while left > 0:
                left -= file.write(rng.bytes(min(left, BLOCK)))
        files.append(data)
        facts, lock = describe(root / out), "locks/rl.lock"
        codes = {"stages/rl/collect.py": file_digest(code)}
        receipt = {
            "stage": stage, "command": "python -m stages.rl.collect", "params": {"seed": 0}, "seed": 1,
            "dependencies": {lock: {"sha256": file_digest(root / lock), "bytes": (root / lock).stat().st_size}},
            "code": {"digest": files_digest(codes), "files": codes},
            "environment": {"python": "3.11", "lock": {lock: file_digest(root / lock)}, "packages": {}},
            "outputs": {out: facts}, "datasets": [], "models": [], "metrics": {},
        }  # fmt: skip
        write_json(receipt_path(root, stage), receipt)
        body = {
            "execution": stage,
            "stage": stage,
            "receipt": file_digest(receipt_path(root, stage)),
        }
        ledger.append("execution", body | {"outputs": {out: facts["sha256"]}, "models": []}, keys)
        names.append(f"part{part:02d}")
    _commit(root, names)
    return files


def _commit(root: Path, names: list[str]) -> None:
    """Lets DVC itself write its lock file and its cache, which shares its bytes with the workspace."""
    from dvc.repo import Repo

    outs = ["data/rl/collect/${item}", "data/receipts/rl-collect@${item}.json"]
    stage = {"cmd": "true", "deps": ["stages/rl/collect.py", "locks/rl.lock"], "outs": outs}
    graph = {"stages": {"rl-collect": {"foreach": names, "do": stage}}}
    (root / "dvc.yaml").write_text(yaml.safe_dump(graph), encoding="utf-8")
    with contextlib.chdir(root), Repo.init(str(root), no_scm=True) as repo:
        with repo.config.edit() as config:
            config["core"]["analytics"] = False
            config["cache"]["type"] = "hardlink"
    with contextlib.chdir(root), Repo(str(root)) as repo:
        repo.commit(force=True)
        repo.checkout(force=True, relink=True)  # a commit copies; this links, as the stages' outputs are


def plain_sha256(files: list[Path], threads: int) -> None:
    """Hashes the files as ``sha256sum`` would, with several threads."""

    def one(path: Path) -> str:
        digest = hashlib.sha256()
        with path.open("rb") as file:
            while block := file.read(BLOCK):
                digest.update(block)
        return digest.hexdigest()

    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(one, files))


def measure(size: int, repeats: int, threads: int) -> tuple[float, float]:
    """Returns the best seconds of the audit and of plain SHA-256, taken in turns, on ``size`` bytes."""
    root = Path(tempfile.mkdtemp(prefix="springhead-audit-"))
    os.environ["SPRINGHEAD_HOME"] = str(root / ".springhead")
    os.environ["XDG_CONFIG_HOME"] = str(root / ".config")  # a key of its own, not the user's
    try:
        files = write_checkout(root, size)
        took: dict[str, list[float]] = {"audit": [], "sha256": []}
        for turn in range(repeats + 1):
            start = time.perf_counter()
            plain_sha256(files, threads)
            middle = time.perf_counter()
            result = audit(root)
            end = time.perf_counter()
            red = [problem for problem in result.problems if problem.severity == RED]
            assert not red, f"the audit of a sound checkout found {red[0]}"
            if turn:  # the first turn brings the files into memory
                took["sha256"].append(middle - start)
                took["audit"].append(end - middle)
        medians = {name: statistics.median(seconds) for name, seconds in took.items()}
        best = {name: min(seconds) for name, seconds in took.items()}
        print(f"| {size / 1e9:.2f} | {size:,} | {len(files)} | {best['sha256']:.2f} | {medians['sha256']:.2f} | "
              f"{best['audit']:.2f} | {medians['audit']:.2f} | {best['audit'] / best['sha256']:.2f} | "
              f"{best['audit'] / size * 1e9:.2f} |", flush=True)  # fmt: skip
        return best["audit"], best["sha256"]
    finally:
        shutil.rmtree(root)


def main() -> None:
    """Measures each size and says whether the cost is linear."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=float, nargs="+", default=[0.25, 0.5, 1.0, 2.0], help="in GB")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1, help="of plain SHA-256")
    options = parser.parse_args()
    print(f"machine: {os.cpu_count()} cores, {platform.machine()}, Python {platform.python_version()}, "
          f"load {os.getloadavg()[0]:.1f}; sha256 with {options.threads} threads; files in memory\n")  # fmt: skip
    print(
        "| GB | bytes | files | sha256, min s | median s | audit, min s | median s | audit / sha256 | audit s per GB |"
    )
    print("|---|---|---|---|---|---|---|---|---|")
    found = [measure(int(size * 1e9), options.repeats, options.threads) for size in options.sizes]
    sizes, seconds = np.array(options.sizes), np.array([audit_seconds for audit_seconds, _ in found])
    if len(sizes) > 1:
        slope, fixed = np.polyfit(sizes, seconds, 1)
        residual = np.abs(seconds - (slope * sizes + fixed)).max()
        print(f"\nseconds = {fixed:.2f} + {slope:.2f} per GB, the largest deviation from that line is {residual:.2f} s")


if __name__ == "__main__":
    main()
