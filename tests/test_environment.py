"""Process settings of a stage."""

import subprocess
import sys

import pytest

pytestmark = pytest.mark.unit

FAULTS = """
import resource
from springhead.environment import keep_memory

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(20):
        bytearray(64 * 2**20)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

print(faults(), keep_memory(), faults(), faults())
"""


def test_freed_memory_is_kept_for_the_next_allocation() -> None:
    # In a process of its own: what it tells the C library cannot be taken back.
    done = subprocess.run([sys.executable, "-c", FAULTS], capture_output=True, text=True, check=True)
    before, told, _, after = done.stdout.split()
    if told != "True":
        pytest.skip("needs the GNU C library")
    assert int(after) * 10 < int(before), done.stdout
