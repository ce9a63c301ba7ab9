"""Energy that the machine used while a stage ran, where its counters can be read.

Two kinds of counter: RAPL of the processor packages and their memory (Linux powercap; AMD has
it too), and NVML of the NVIDIA devices. Both count the whole package or device, whatever runs
on it, so a figure is an upper bound for one stage and two stages at once both count it. What
cannot be read is absent, never zero: since Linux 5.10 the RAPL files are for root only.
"""

import os
import threading
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

POWERCAP = Path("/sys/class/powercap")
_INTERVAL = 30.0  # seconds; a counter of 65 kJ wraps after two minutes at 500 W
_MICROJOULES, _MILLIJOULES = 1e6, 1e3


@dataclass(frozen=True)
class Counter:
    """One running count of energy."""

    kind: str
    """``package``, ``dram`` or ``gpu``."""
    read: Callable[[], float]
    """Returns joules since some moment; raises OSError if it cannot be read any more."""
    wraps_at: float | None
    """Joules at which it starts again from 0, or None if it does not."""


def rapl(powercap: Path = POWERCAP) -> list[Counter]:
    """Returns the readable RAPL counters: each processor package, and its memory where that is apart.

    A package's cores and graphics are part of the package, and ``psys`` holds the packages, so
    counting them as well would count twice; so would ``intel-rapl-mmio``, another way to the same counter.
    """
    found = []
    for zone in sorted(powercap.glob("intel-rapl:*")):
        with suppress(OSError, ValueError):
            kind = (zone / "name").read_text(encoding="utf-8").strip().partition("-")[0]
            if kind in ("package", "dram"):
                wraps_at = _number(zone / "max_energy_range_uj") / _MICROJOULES
                counter = Counter(kind, _reader(zone / "energy_uj"), wraps_at)
                counter.read()  # a file that only root may read is no counter
                found.append(counter)
    return found


def _number(path: Path) -> int:
    return int(path.read_text(encoding="utf-8"))


def _reader(path: Path) -> Callable[[], float]:
    def read() -> float:
        try:
            return _number(path) / _MICROJOULES
        except ValueError as error:
            raise OSError(f"{path}: no number in it") from error

    return read


def nvml(environment: Mapping[str, str] = os.environ) -> list[Counter]:
    """Returns one counter per NVIDIA device that this process may use; empty without driver or device.

    Args:
        environment: where ``CUDA_VISIBLE_DEVICES`` is looked up, by index or UUID.
    """
    try:
        import pynvml

        pynvml.nvmlInit()
    except Exception:  # no driver, no library, no permission: all mean that there is nothing to read
        return []
    found = []
    chosen = environment.get("CUDA_VISIBLE_DEVICES")
    names = [str(i) for i in range(pynvml.nvmlDeviceGetCount())] if chosen is None else chosen.split(",")
    for name in (part.strip() for part in names):
        with suppress(pynvml.NVMLError, ValueError, OSError):
            by_index = name.isdigit()
            handle = (
                pynvml.nvmlDeviceGetHandleByIndex(int(name)) if by_index else pynvml.nvmlDeviceGetHandleByUUID(name)
            )
            counter = Counter("gpu", _device(handle), None)
            counter.read()
            found.append(counter)
    return found


def _device(handle: object) -> Callable[[], float]:
    import pynvml

    def read() -> float:
        try:
            return float(pynvml.nvmlDeviceGetTotalEnergyConsumption(handle)) / _MILLIJOULES
        except pynvml.NVMLError as error:
            raise OSError(str(error)) from error

    return read


class Meter:
    """Adds up what counters count from its making until :meth:`stop`.

    A thread reads them twice a minute, so that a counter that wraps more than once is still
    counted whole. It does not exist where there is nothing to read.
    """

    def __init__(self, counters: list[Counter] | None = None, interval: float = _INTERVAL) -> None:
        self._counters = rapl() + nvml() if counters is None else counters
        self._joules = dict.fromkeys(range(len(self._counters)), 0.0)
        self._last: dict[int, float] = {}
        self._ended = threading.Event()
        self._lock = threading.Lock()
        self._sample()
        self._thread: threading.Thread | None = None
        if self._counters:
            self._thread = threading.Thread(target=self._watch, args=(interval,), name="energy", daemon=True)
            self._thread.start()

    def _watch(self, interval: float) -> None:
        while not self._ended.wait(interval):
            self._sample()

    def _sample(self) -> None:
        with self._lock:
            for number, counter in enumerate(self._counters):
                if number not in self._joules:
                    continue
                try:
                    now = counter.read()
                except OSError:  # a counter with a gap tells nothing about the whole
                    del self._joules[number]
                    continue
                used = now - self._last.get(number, now)
                if used < 0:
                    used += counter.wraps_at or 0.0
                if used < 0:  # set back, as when a driver is loaded again
                    del self._joules[number]
                    continue
                self._joules[number] += used
                self._last[number] = now

    def stop(self) -> dict[str, float]:
        """Returns joules by kind (``package``, ``dram``, ``gpu``), only those that could be read throughout.

        The figure of a kind is the sum over its packages or devices; if one of them failed, the kind is absent.
        """
        self._ended.set()
        self._sample()
        kinds = {counter.kind for counter in self._counters}
        failed = {c.kind for number, c in enumerate(self._counters) if number not in self._joules}
        return {
            kind: round(sum(j for n, j in self._joules.items() if self._counters[n].kind == kind), 3)
            for kind in sorted(kinds - failed)
        }
