# ruff: noqa: F401, F811  (fixtures of pytest are imported, then named as arguments)
"""What happens where nobody reads the output any more: the pipe is closed before a command writes its first line."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from springhead import output
from tests.lineage.conftest import root, sample_template
from tests.lineage.sample import TASK

pytestmark = pytest.mark.unit

MODEL = f"data/rl/train/{TASK}/cdt/0/model"


def unread(root: Path, *command: str, both: bool = False) -> tuple[int, str]:
    """Runs a command whose standard output, or both streams, nobody reads; returns exit code and standard error."""
    read, write = os.pipe()
    os.close(read)
    errors = write if both else subprocess.PIPE
    # pytest has SIGPIPE ignored as Python has; a shell's children do not.
    done = subprocess.run([sys.executable, *command], stdout=write, stderr=errors, text=True, cwd=root)
    os.close(write)
    return done.returncode, done.stderr or ""


@pytest.mark.parametrize(
    "arguments",
    [
        ("tasks",),
        ("algorithms",),
        ("--help",),
        ("lineage", "--help"),
        ("lineage", MODEL),  # Rich prints this one
        ("lineage", f"data/rl/collect/{TASK}", "--rows"),
        ("diff", f"data/rl/collect/{TASK}", f"data/rl/filter/{TASK}"),
        ("audit",),
        ("cost",),
        ("doctor",),
    ],
    ids=" ".join,
)
def test_a_command_ends_as_if_killed_by_the_signal(root: Path, arguments: tuple[str, ...]) -> None:
    assert unread(root, "-m", "springhead", *arguments) == (141, "")


def test_the_help_of_every_command_may_be_cut_short(tmp_path: Path) -> None:
    code = (
        "import os, sys; from springhead.cli import app, main\n"
        "names = [c.name or c.callback.__name__ for c in app.registered_commands]\n"
        "codes = {}\n"
        "for name in names:\n"
        "    read, write = os.pipe(); os.close(read); os.dup2(write, 1); os.close(write)\n"
        "    codes[name] = main([name, '--help']) if name != 'run' else 141\n"
        "sys.stderr.write(f'{len(codes)} {set(codes.values())}')"
    )
    assert unread(tmp_path, "-c", code) == (0, "19 {141}")


def test_errors_that_nobody_reads_are_no_fault_of_ours(root: Path) -> None:
    assert unread(root, "-m", "springhead", "lineage", "nonsense")[0] == 2  # the error itself is read
    code, _ = unread(root, "-m", "springhead", "lineage", MODEL, both=True)
    assert code == 141


def test_a_run_goes_on_where_nobody_listens(root: Path) -> None:
    code, errors = unread(root, "-m", "springhead", "run", "--help")
    assert (code, errors) == (0, "")


def test_another_pipe_that_breaks_is_an_error(root: Path) -> None:
    code = (
        "import sys; from springhead.cli import base; from springhead import doctor\n"
        "def broken(root): raise BrokenPipeError(32, 'a pipe of another kind')\n"
        "doctor.examine = broken; sys.exit(base.main(['doctor']))"
    )
    done = subprocess.run([sys.executable, "-c", f"import springhead.cli; {code}"], cwd=root, capture_output=True)
    assert done.returncode == 70
    assert b"internal error: BrokenPipeError" in done.stderr


def test_lines_of_a_long_run_go_nowhere_once_the_reader_has_gone(tmp_path: Path) -> None:
    code = (
        "from springhead import output\n"
        "for number in range(3): output.say(f'line {number}')\n"
        f"open({str(tmp_path / 'end')!r}, 'w').write('reached')"
    )
    assert unread(tmp_path, "-c", code) == (0, "")
    assert (tmp_path / "end").read_text() == "reached"


def test_a_reader_that_listens_is_there() -> None:
    assert not output.reader_gone()
    assert output.flush()
