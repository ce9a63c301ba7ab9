"""The stages: one script per DVC stage, run as ``python -m stages.<branch>.<stage> [item ...]``.

This module is the first thing every stage process imports, before NumPy and torch read their
environment, so the settings that make results independent of the machine's core count and
keep every tool offline live here.
"""

import ctypes
import os
import select
import signal
import sys
import threading
import time
from pathlib import Path

_SHELLS = {"sh", "dash", "bash", "zsh", "ksh", "fish", "ash", "busybox"}


def _started(process: int) -> str:
    """Returns when a process started, which tells it from a later one of the same number; empty once it is gone."""
    try:
        fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return ""
    return "" if fields[0] == "Z" else fields[19]


def _die_with_dvc() -> None:
    """Ends this process when DVC is gone, so that a killed run leaves nobody writing.

    DVC runs a command through a shell. Some shells replace themselves by a lone command, and DVC
    is then the parent, whose death the kernel reports; others (dash, when ``SHELL`` is not set)
    stay in between and outlive DVC, so the shell's parent is watched as well.
    """
    set_pdeathsig = 1
    ctypes.CDLL(None).prctl(set_pdeathsig, signal.SIGKILL, 0, 0, 0)
    try:
        # The name stands in parentheses and may hold spaces; state and parent follow it.
        name, _, rest = Path(f"/proc/{os.getppid()}/stat").read_text().partition("(")[2].rpartition(")")
        if name not in _SHELLS:
            return
        dvc = int(rest.split()[1])
        started = _started(dvc)
        if not started:
            raise ProcessLookupError
    except (FileNotFoundError, ProcessLookupError):
        os.kill(os.getpid(), signal.SIGKILL)  # they died while this process started
    try:
        watched = os.pidfd_open(dvc)
    except OSError:  # an old kernel, or a sandbox that forbids it
        watched = -1

    def watch() -> None:
        if watched >= 0:
            select.select([watched], [], [])
        while _started(dvc) == started:
            time.sleep(0.5)
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=watch, name="dvc-watch", daemon=True).start()


# Asked for here, before the slow imports, so that no moment is left in which a stage could stay
# behind as an orphan.
if sys.platform == "linux" and "DVC_STAGE" in os.environ:
    _die_with_dvc()

# One thread per process: sums split over threads would depend on the number of cores. Stages
# that want more cores start whole units of work in processes of their own.
for _name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "NUMEXPR_NUM_THREADS"):
    os.environ[_name] = "1"
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
for _name, _value in {
    "DO_NOT_TRACK": "1",
    "DVC_NO_ANALYTICS": "1",
    "GX_ANALYTICS_ENABLED": "false",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_HUB_OFFLINE": "1",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "PYGAME_HIDE_SUPPORT_PROMPT": "1",
    "TRANSFORMERS_OFFLINE": "1",
}.items():
    os.environ.setdefault(_name, _value)

# Processes that a sealed stage starts import this package too, and are sealed as it is.
if "SPRINGHEAD_SEAL" in os.environ:
    from springhead.hermetic import inherit

    inherit()
