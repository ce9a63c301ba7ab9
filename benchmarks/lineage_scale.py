"""Both questions of lineage on a synthetic history of ten million rows and a thousand models.

    python benchmarks/lineage_scale.py                           # 10,000,000 rows, 1,000 models
    python benchmarks/lineage_scale.py --rows 200000 --models 40 # a quick look

Makes a checkout as the stages would have left it (row tables with parents, filters with decisions, verdicts,
receipts, a ledger, a registry), asks ``springhead.lineage.query`` and compares with what DuckDB alone needs to
scan the same id column. One answer is also compared with the one that reads all tables without an index.
Times are of the question, from reading the receipts to the finished answer, without starting Python. ``first`` is
the first time a question is asked, ``warm`` the next times, ``cold`` after the kernel was asked to forget the files;
``CPU`` is what a warm question costs in processor time, which a busy machine does not change.
"""

import argparse
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lineage_history import History, reread, write_history

from springhead.jsonio import write_json
from springhead.lineage import query

_KEPT = ("rows", "models", "samples", "table_rows")  # what a kept history must say of itself


def evict(root: Path) -> None:
    """Asks the kernel to forget the files, so that the next question reads the disk."""
    os.sync()
    for path in root.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def seconds(question: Callable[[], Any], repeats: int, clock: Callable[[], float] = time.perf_counter) -> list[float]:
    """Returns how long a question took by a clock, each time."""
    found = []
    for _ in range(repeats):
        start = clock()
        question()
        found.append(clock() - start)
    return found


def fresh_process(root: Path, ref: str) -> float:
    """Returns the wall time of the whole command in a new process, with the start of Python."""
    start = time.perf_counter()
    command = [sys.executable, "-m", "springhead", "lineage", ref, "--json"]
    subprocess.run(command, cwd=root, check=True, capture_output=True)
    return time.perf_counter() - start


def measure(history: History, home: Path, repeats: int) -> None:
    """Asks every question and prints the table of results."""
    import duckdb

    root = history.root
    trained = {s: r for s, r in history.receipts.items() if s.startswith(("rl-train@", "llm-finetune@"))}
    policy = next(r for s, r in trained.items() if s.startswith("rl"))["models"][0]["sha256"]
    text = next(r for s, r in trained.items() if s.startswith("llm"))["models"][0]["sha256"]
    questions = {"model -> everything, a policy": policy, "model -> everything, a language model": text}
    questions["model -> everything, by its alias in MLflow"] = history.register(home)
    last = max(name for name in history.samples if name.startswith("data/rl")).partition(":")[0]
    for name, row in history.samples.items():
        if name.startswith((last, "data/llm")):
            questions[f"row -> models, {name.partition(': ')[2]} of {name.partition(':')[0]}"] = f"row:{row}"

    shutil.rmtree(home / "index", ignore_errors=True)
    first_row = next(ref for ref in questions.values() if ref.startswith("row:"))
    (start_index,) = seconds(lambda: query.lineage(root, first_row), 1)
    print(f"the first row question, which makes the index: {start_index:.2f} s")
    kept = sum(path.stat().st_size for path in (home / "index").iterdir())
    print(f"the index: {kept / 1e6:.0f} MB; load of the machine {os.getloadavg()[0]:.1f}\n")
    print("| question | first, s | warm, min s | warm, median s | CPU, min s | cold, s | all tables read, s | answer |")
    print("|---|---|---|---|---|---|---|---|")
    slowest = 0.0
    compared = [ref for name, ref in questions.items() if "with children" in name]  # takes minutes
    for name, ref in questions.items():
        start = time.perf_counter()
        answer = query.lineage(root, ref)
        first = time.perf_counter() - start
        took = seconds(lambda ref=ref: query.lineage(root, ref), repeats)
        cpu = min(seconds(lambda ref=ref: query.lineage(root, ref), repeats, time.process_time))
        evict(root)
        (cold,) = seconds(lambda ref=ref: query.lineage(root, ref), 1)
        scanned = "-"
        if ref in compared:
            start = time.perf_counter()
            same = query.lineage(root, ref, scan=True)
            scanned = f"{time.perf_counter() - start:.1f}"
            assert same == answer, f"{ref}: the index gives another answer than the tables"
        size = len(answer["models"]) if answer["kind"] == "row" else len(answer["stages"])
        what = f"{size} {'models' if answer['kind'] == 'row' else 'stages'}"
        median = statistics.median(took)
        times = f"{first:.2f} | {min(took):.2f} | {median:.2f} | {cpu:.2f} | {cold:.2f} | {scanned}"
        print(f"| {name} | {times} | {what} |", flush=True)
        slowest = max(slowest, median)
    row = first_row.removeprefix("row:")
    files = [str(p) for p in sorted(root.glob("data/**/*.parquet"))]
    connection = duckdb.connect()

    def scan() -> None:
        sql = "SELECT count(*) FROM read_parquet(?, union_by_name = true) WHERE id = ?"
        connection.execute(sql, [files, row]).fetchall()

    scans = seconds(scan, 3)
    print(f"\npeer: DuckDB scans the id column of all {len(files)} tables: {min(scans):.2f} s at best")
    print(f"the slowest median to that: {slowest / min(scans):.3f}")
    commands = fresh_process(root, first_row), fresh_process(root, policy)
    print(f"the whole command in a new process: {commands[0]:.2f} s (row), {commands[1]:.2f} s (model)")
    print(f"slowest median: {slowest:.2f} s; load of the machine {os.getloadavg()[0]:.1f}")


def main() -> None:
    """Makes the history, measures, and removes it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=10_000_000)
    parser.add_argument("--models", type=int, default=1_000)
    parser.add_argument("--repeats", type=int, default=5)
    text = "make the history here and keep it, or use the one that is there (default: a temporary folder)"
    parser.add_argument("--folder", type=Path, help=text)
    options = parser.parse_args()
    root = options.folder or Path(tempfile.mkdtemp(prefix="springhead-scale-"))
    os.environ["SPRINGHEAD_HOME"] = str(root / ".springhead")
    try:
        home = root / ".springhead"
        history = reread(root)
        if history is None:
            start = time.perf_counter()
            history = write_history(root, options.rows, options.models)
            history.write_ledger(home)
            write_json(root / "history.json", {key: getattr(history, key) for key in _KEPT})
            print(f"written in {time.perf_counter() - start:.0f} s")
        size = sum(path.stat().st_size for path in root.rglob("*.parquet"))
        entries = len((home / "ledger.jsonl").read_bytes().splitlines())
        print(f"history: {history.rows:,} rows, {history.models:,} models, {len(history.receipts):,} receipts")
        print(
            f"         {history.table_rows:,} table rows in {size / 1e9:.2f} GB of Parquet, {entries:,} ledger entries"
        )
        print(f"machine: {os.cpu_count()} cores, {platform.machine()}, Python {platform.python_version()}")
        measure(history, home, options.repeats)
    finally:
        if options.folder is None:
            shutil.rmtree(root)


if __name__ == "__main__":
    main()
