"""Two programs side by side: each a process of its own, warm, asked in turns, and measured from outside.

A side is a Python function ``answer(request) -> dict`` in a script of its own; :func:`serve` is its main program. The
benchmark starts it with the interpreter of its environment (:data:`OURS`, :data:`PEERS`), bound to the same cores as
the others. Nothing is imported here beyond the standard library, so that it runs in both environments.
"""

import contextlib
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
OURS = ROOT / ".venv/bin/python"
PEERS = ROOT / ".venv-peers/bin/python"
TICK = os.sysconf("SC_CLK_TCK")
ONE_THREAD = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "NUMBA_NUM_THREADS"), "1")


def family(process: int) -> list[int]:
    """Returns a process and all its descendants."""
    found = [process]
    for parent in found:
        for thread in Path(f"/proc/{parent}/task").iterdir():
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # it has just ended
                found += [int(child) for child in (thread / "children").read_text().split()]
    return found


def cpu_seconds(process: int) -> float:
    """Processor time of a process, its descendants, and those of them that it waited for."""
    total = 0
    for member in family(process):
        fields = Path(f"/proc/{member}/stat").read_text().rpartition(")")[2].split()
        total += sum(int(value) for value in fields[11:15])
    return total / TICK


def peak_megabytes(process: int) -> float:
    """The sum of the peak resident sizes (``ru_maxrss``) of a process and its descendants.

    Pages that a fork shares with its parent count twice.
    """
    total = 0
    for member in family(process):
        status = Path(f"/proc/{member}/status").read_text()
        total += int(status.partition("VmHWM:")[2].split()[0])
    return total / 1024


def shared_megabytes(process: int) -> float:
    """Present memory of a process and its descendants, pages that they share counted once (PSS)."""
    total = 0
    for member in family(process):
        rollup = Path(f"/proc/{member}/smaps_rollup").read_text()
        total += int(rollup.partition("Pss:")[2].split()[0])
    return total / 1024


class Side:
    """One side of a comparison, in a process of its own.

    Args:
        name: Its name in the table.
        python: The interpreter of its environment.
        script: The script that calls :func:`serve`, and its arguments.
        cores: The cores it may use.
    """

    def __init__(self, name: str, python: Path, script: Iterable[str], cores: Iterable[int]) -> None:
        if not python.exists():
            raise SystemExit(f"{python}: no such interpreter; run `make peers` (or `make install`) first")
        self.name = name
        down, up = os.pipe(), os.pipe()
        command = [str(python), *map(str, script), str(down[0]), str(up[1])]
        environment = {**os.environ, **ONE_THREAD, "DSRL_SUPPRESS_IMPORT_ERROR": "1", "WANDB_MODE": "disabled"}
        environment.pop("PYTHONDONTWRITEBYTECODE", None)  # each side would compile its packages again
        chosen = set(cores)
        self._process = subprocess.Popen(
            command, env=environment, pass_fds=[down[0], up[1]], stdout=subprocess.DEVNULL, cwd=ROOT,
            preexec_fn=lambda: os.sched_setaffinity(0, chosen),
        )  # fmt: skip
        os.close(down[0])
        os.close(up[1])
        self._to, self._from = os.fdopen(down[1], "w"), os.fdopen(up[0])
        self.runs: list[dict[str, float]] = []
        self.facts: dict[str, Any] = {}

    def ask(self, keep: bool = True, **request: Any) -> dict[str, Any]:
        """Asks the side for a piece of work and measures it from outside, unless it measured itself."""
        cpu = cpu_seconds(self._process.pid)
        start = time.perf_counter()
        self._to.write(json.dumps(request) + "\n")
        self._to.flush()
        line = self._from.readline()
        if not line:
            raise SystemExit(f"{self.name}: its process ended with code {self._process.wait()}; see its message above")
        answer: dict[str, Any] = json.loads(line)
        answer.setdefault("seconds", time.perf_counter() - start)
        answer.setdefault("cpu", cpu_seconds(self._process.pid) - cpu)
        if keep:
            self.runs.append(answer)
        return answer

    def median(self, key: str) -> float:
        """The median of a figure over the runs."""
        return statistics.median(run[key] for run in self.runs)

    def rates(self, per: str = "seconds") -> list[float]:
        """Steps per second of every run."""
        return [run["steps"] / run[per] for run in self.runs]

    def memory(self) -> str:
        """Two table cells: the peak resident megabytes of the side's processes, and what they hold now, as PSS."""
        return f"{peak_megabytes(self._process.pid):.0f} | {shared_megabytes(self._process.pid):.0f}"

    def close(self) -> None:
        """Ends the side."""
        self._to.close()
        self._process.wait(30)
        self._from.close()


def serve(answer: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    """Answers requests until there are no more. The last two arguments of the script are the pipes."""
    with os.fdopen(int(sys.argv[-2])) as requests, os.fdopen(int(sys.argv[-1]), "w") as answers:
        for line in requests:
            answers.write(json.dumps(answer(json.loads(line))) + "\n")
            answers.flush()


def paired_ratio(a: Side, b: Side, key: str = "seconds") -> tuple[float, float, float]:
    """Median, lowest and highest over the turns of ``a``'s rate over ``b``'s in the same turn."""
    ratios = [x / y for x, y in zip(a.rates(key), b.rates(key), strict=True)]
    return statistics.median(ratios), min(ratios), max(ratios)


def machine(cores: Iterable[int], packages: Iterable[str]) -> str:
    """Describes the machine, the interpreter and our packages."""
    from importlib.metadata import version

    cpus = Path("/proc/cpuinfo").read_text().splitlines()
    model = next((line.partition(":")[2].strip() for line in cpus if line.startswith("model name")), "")
    versions = ", ".join(f"{name} {version(name)}" for name in packages)
    return (
        f"machine: {model or platform.machine()}, cores {sorted(cores)} of {os.cpu_count()}, "
        f"Python {platform.python_version()}, load {os.getloadavg()[0]:.1f}\nours: {versions}"
    )


def peer_versions(packages: Iterable[str]) -> str:
    """Names the versions in the peers' environment."""
    code = (
        "import sys; from importlib.metadata import version as v; print(', '.join(f'{n} {v(n)}' for n in sys.argv[1:]))"
    )
    found = subprocess.run([PEERS, "-c", code, *packages], capture_output=True, text=True, check=True)
    return f"peers: {found.stdout.strip()}"
