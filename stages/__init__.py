"""The stages: one script per DVC stage, run as ``python -m stages.<branch>.<stage> [item ...]``.

This module is the first thing every stage process imports, before NumPy and torch read their
environment, so the settings that make results independent of the machine's core count and
keep every tool offline live here.
"""

import ctypes
import os
import signal
import sys

# DVC runs a stage as its child. If DVC is killed, the stage must not go on writing as an orphan;
# asked for here, before the slow imports, so that no moment is left in which it could.
if sys.platform == "linux" and "DVC_STAGE" in os.environ:
    _PR_SET_PDEATHSIG = 1
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)

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
