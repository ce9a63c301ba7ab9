"""Stages executed again: equal bytes, or the first artefact and the place in it that differ."""

import hashlib
import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pyarrow as pa
import pytest
from safetensors.numpy import save_file
from typer.testing import CliRunner

from springhead.cli import app
from springhead.keys import Keys
from springhead.lineage.contents import first_difference
from springhead.lineage.digests import file_digest
from springhead.lineage.ledger import Ledger
from springhead.lineage.receipts import receipt_path
from springhead.tables import write_table
from tests.conftest import Project
from tests.faults.processes import alive, await_that

# A stage in the form that a reproduction meets it (a command, a lock entry, a receipt), without the
# harness's own start of a second or two, which one test below does pay.
WORK = """
import hashlib, json, pathlib, sys, time

name = sys.argv[1]
params = json.load(open("params.yaml"))
def sha(path): return hashlib.sha256(pathlib.Path(path).read_bytes()).hexdigest()
def tree(files): return hashlib.sha256("".join(f"{n}\\0{files[n]}\\n" for n in sorted(files)).encode()).hexdigest()
out = pathlib.Path("data/rl") / name
out.mkdir(parents=True)
reads = ["work.py"]
if name == "make":
    (out / "rows.json").write_text(json.dumps({"rows": [params["rl"]["make"], CLOCK]}))
else:
    reads.append("data/rl/make")
    rows = json.loads(pathlib.Path("data/rl/make/rows.json").read_text())["rows"]
    (out / "a.txt").write_text("same")
    (out / "b.txt").write_text(f"{rows[0]} {CLOCK}")
if params["rl"]["make"] == "bad":
    sys.exit("rows are bad")
def facts(path):
    if path.is_file():
        return {"sha256": sha(path), "bytes": 1}
    files = {p.relative_to(path).as_posix(): sha(p) for p in path.rglob("*") if p.is_file()}
    return {"sha256": tree(files), "files": files}
receipt = {
    "stage": f"rl-{name}",
    "params": {f"rl.{name}": params["rl"][name]},
    "dependencies": {path: {"sha256": facts(pathlib.Path(path))["sha256"]} for path in reads},
    "code": {"digest": "", "files": {"work.py": sha("work.py")}},
    "outputs": {str(out): facts(out)},
    "command": "true", "seed": 0, "environment": {"lock": {}}, "datasets": [], "models": [],
    "metrics": {"count": 4},
}
folder = pathlib.Path("data/receipts")
folder.mkdir(parents=True, exist_ok=True)
(folder / f"rl-{name}.json").write_text(json.dumps(receipt))
"""


class Light:
    """A project of two stages, and what DVC and the harness leave when they ran."""

    def __init__(self, root: Path) -> None:
        self.root, self.home = root, root / ".springhead"
        self.write("work.py", WORK.replace("CLOCK", "0"))
        self.write("params.yaml", json.dumps({"seed": 0, "rl": {"make": 4, "use": 0.5}}))
        self.write(".gitignore", "/.springhead/\n/data/\n/dvc.lock\n/.dvc/\n/mlflow/\n")
        self.write("dvc.yaml", "stages: {}\n")
        self.write(".dvc/config", "")
        self.git("init", "-q", "-b", "main")
        self.commit()

    def write(self, name: str, text: str) -> None:
        (self.root / name).parent.mkdir(parents=True, exist_ok=True)
        (self.root / name).write_text(text)

    def git(self, *arguments: str) -> str:
        command = ["git", "-c", "user.name=t", "-c", "user.email=t@t", *arguments]
        return subprocess.run(command, cwd=self.root, check=True, capture_output=True, text=True).stdout.strip()

    def commit(self) -> str:
        self.git("add", "-A")
        self.git("commit", "-qm", "work")
        return self.git("rev-parse", "HEAD")

    def run(self, *names: str) -> None:
        """Executes the stages and stores their results as DVC would."""
        path = self.root / "dvc.lock"
        lock = json.loads(path.read_text()) if path.exists() else {"schema": "2.0", "stages": {}}
        for name in names or ("make", "use"):
            shutil.rmtree(self.root / "data/rl" / name, ignore_errors=True)
            command = f"{sys.executable} -S work.py {name}"
            subprocess.run(command, shell=True, cwd=self.root, check=True)
            outs = [f"data/rl/{name}", f"data/receipts/rl-{name}.json"]
            deps = ["work.py", *(["data/rl/make"] if name == "use" else [])]
            entry: dict[str, Any] = {"cmd": command}
            entry |= {
                k: [{"path": p, "md5": self.store(self.root / p)} for p in v]
                for k, v in (("deps", deps), ("outs", outs))
            }
            lock["stages"][f"rl-{name}"] = entry
            body = {
                "stage": f"rl-{name}",
                "execution": f"x-{name}",
                "receipt": file_digest(receipt_path(self.root, f"rl-{name}")),
                "git": {"revision": self.git("rev-parse", "HEAD")},
                "seconds": 3.0,
            }
            Ledger(self.home).append("execution", body, Keys.of(self.root, self.home))
        path.write_text(json.dumps(lock))

    def store(self, path: Path) -> str:
        cache = self.root / ".dvc/cache/files/md5"
        content = path.read_bytes() if path.is_file() else None
        if content is None:
            files = {p.relative_to(path).as_posix(): self.store(p) for p in path.rglob("*") if p.is_file()}
            content = json.dumps([{"md5": files[n], "relpath": n} for n in sorted(files)]).encode()
        md5 = hashlib.md5(content).hexdigest() + (".dir" if path.is_dir() else "")
        (cache / md5[:2]).mkdir(parents=True, exist_ok=True)
        (cache / md5[:2] / md5[2:]).write_bytes(content)
        return md5

    def replace(self, name: str, old: str, new: str) -> None:
        text = (self.root / name).read_text()
        assert old in text
        (self.root / name).write_text(text.replace(old, new))


@pytest.fixture
def light(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Light:
    monkeypatch.delenv("SPRINGHEAD_HOME", raising=False)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    made = Light(tmp_path / "project")
    monkeypatch.chdir(made.root)
    return made


def verified(*arguments: str, code: int = 0) -> Any:
    """Calls the command; returns its JSON, or the error message."""
    done = CliRunner().invoke(app, ["verify-repro", "--json", *arguments])
    assert done.exit_code == code, done.output
    return json.loads(done.stdout) if code < 2 else done.stderr


def tidy(root: Path) -> bool:
    """Whether nothing of a reproduction is left."""
    left = [path for path in (root / ".springhead/reproductions").iterdir() if path.is_dir()]
    listed = subprocess.run(["git", "worktree", "list"], cwd=root, check=True, capture_output=True, text=True)
    return not left and listed.stdout.count("\n") == 1


def files(root: Path) -> dict[str, tuple[int, int]]:
    """Returns inode and time of every file of a project but those of git and of the ledger."""
    own = ("ledger", "head", "reproductions", ".git", "__pycache__", ".site", "tmp", "keys", "trusted-keys")
    found = (path for path in root.rglob("*") if path.is_file())
    kept = (p for p in found if not any(part.startswith(own) for part in p.relative_to(root).parts))
    return {p.relative_to(root).as_posix(): (p.stat().st_ino, p.stat().st_mtime_ns) for p in kept}


@pytest.mark.unit
def test_equal_bytes_are_told_and_only_the_ledger_knows(light: Light) -> None:
    light.run()
    before = files(light.root)
    commit = light.git("rev-parse", "HEAD")
    facts = {"commit": commit, "state": "equal", "differences": [], "error": ""}
    expected = {"equal": True, "first": None, "stages": [{"stage": f"rl-{n}", **facts} for n in ("make", "use")]}
    assert verified() == expected
    assert files(light.root) == before
    entry = Ledger(light.home).entries()[-1]
    assert (entry["kind"], entry["body"]["equal"], entry["seq"]) == ("reproduction", True, 2)
    assert Ledger(light.home).verify() == []
    assert tidy(light.root)
    shown = CliRunner().invoke(app, ["verify-repro", "rl-use"])
    assert shown.stdout.splitlines() == ["equal   rl-use", "1 stages executed again, 1 equal"]
    assert "> [1/1] rl-use at" in shown.stderr
    assert "about 3s" in shown.stderr


@pytest.mark.fault
def test_a_stage_that_is_not_deterministic_is_named_with_the_place(light: Light) -> None:
    light.replace("work.py", "], 0]", "], time.time()]")
    light.replace("work.py", "{0}", "{time.time()}")
    light.commit()
    light.run()
    found = verified(code=1)
    assert [stage["state"] for stage in found["stages"]] == ["differs", "differs"]
    assert found["first"]["path"] == "data/rl/make/rows.json"
    assert found["first"]["what"].startswith("key rows[1]: 17")
    assert found["stages"][1]["differences"][0]["path"] == "data/rl/use/b.txt"
    assert found["stages"][1]["differences"][0]["what"].startswith("line 1: '4 17")
    shown = CliRunner().invoke(app, ["verify-repro"])
    assert shown.exit_code == 1
    assert "first difference: data/rl/make/rows.json of rl-make, key rows[1]" in shown.stdout
    assert Ledger(light.home).entries()[-1]["body"]["first"]["path"] == "data/rl/make/rows.json"


@pytest.mark.fault
def test_each_stage_starts_from_the_recorded_inputs(light: Light) -> None:
    light.replace("work.py", "], 0]", "], time.time()]")
    light.commit()
    light.run()
    assert [stage["state"] for stage in verified(code=1)["stages"]] == ["differs", "equal"]


@pytest.mark.fault
def test_a_receipt_that_claims_too_much_is_named_by_key(light: Light) -> None:
    light.run()
    light.replace("data/receipts/rl-use.json", '"count": 4', '"count": 400')
    first = verified("rl-use", code=1)["first"]
    assert first == {
        "stage": "rl-use",
        "path": "data/receipts/rl-use.json",
        "what": "key metrics.count: 400 recorded, 4 now",
    }


@pytest.mark.fault
def test_edits_that_no_commit_holds_are_refused_before_anything_runs(light: Light) -> None:
    light.run()
    light.replace("work.py", "same", "other")
    message = verified("rl-use", code=2)
    assert "work.py: has changes that are not committed" in message
    assert "dvc repro rl-use" in message
    light.run("use")  # now the receipt is about code that no commit has
    assert "work.py is in no commit as the receipt has it" in verified("rl-use", code=2)
    light.commit()
    verified("rl-use")
    light.replace("params.yaml", '"use": 0.5', '"use": 0.75')
    assert "rl.use: has changes that are not committed" in verified("rl-use", code=2)
    verified("rl-make")  # made with the code of the first commit; the parameter is not its own
    assert tidy(light.root)


@pytest.mark.unit
def test_the_commit_of_the_execution_counts_and_head_where_the_ledger_knows_none(light: Light) -> None:
    light.run()
    first = light.git("rev-parse", "HEAD")
    light.replace("work.py", "same", "other")
    light.commit()
    assert verified("rl-use")["stages"][0]["commit"] == first
    (light.home / "ledger.jsonl").unlink()  # as after `dvc pull` on another machine
    assert "work.py is in no commit as the receipt has it" in verified("rl-use", code=2)
    light.git("revert", "--no-edit", "HEAD")
    assert verified("rl-use")["stages"][0]["commit"] == light.git("rev-parse", "HEAD")


@pytest.mark.fault
def test_unknown_stages_lost_inputs_and_failing_stages_are_told_apart(light: Light) -> None:
    light.run()
    for name in ("rl-used", "../../etc", "x" * 5000, "ü@\n"):
        assert "no stage of this name has run here; there are rl-make" in verified(name, code=2)
    stored = next(
        p for p in (light.root / ".dvc/cache").rglob("*") if p.is_file() and p.read_bytes().startswith(b'{"rows"')
    )
    good = stored.read_bytes()
    stored.write_bytes(good.replace(b"4", b"9"))
    assert "data/rl/make: what was stored has digest" in verified("rl-use", code=1)["stages"][0]["error"]
    stored.unlink()
    verified("rl-use")  # the checkout still has the same bytes
    light.write("data/rl/make/rows.json", "{}")
    assert "not in DVC's cache; `dvc fetch`" in verified("rl-use", code=1)["stages"][0]["error"]
    stored.write_bytes(good)
    lock = json.loads((light.root / "dvc.lock").read_text())
    lock["stages"]["rl-use"]["cmd"] = "echo rows are bad >&2; exit 3"
    light.write("dvc.lock", json.dumps(lock))
    error = verified("rl-use", code=1)["stages"][0]["error"]
    assert "exited with status 3" in error
    assert "rows are bad" in error


# -- with the real harness and DVC ----------------------------------------------------------------


@pytest.mark.e2e
def test_what_the_harness_made_is_made_again_and_a_killed_verification_is_swept(project: Project) -> None:
    project.params("rows: 4, pause: 4.0")
    project.run("git", "-c", "user.name=t", "-c", "user.email=t@t", "commit", "-qam", "slow")
    project.run("dvc", "repro", "-q", "rl-use@a")
    before, command = files(project.root), [sys.executable, "-m", "springhead", "verify-repro"]
    for number in (signal.SIGINT, signal.SIGKILL):
        process = subprocess.Popen(
            [*command, "rl-make"],
            cwd=project.root,
            env=project.env,
            stderr=subprocess.DEVNULL,
            # A shell starts what it runs in the background with this signal ignored, which would be inherited.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )
        left: list[Path] = []
        places = project.root / ".springhead/reproductions"
        await_that(lambda: left.extend(places.glob("*/trees/*/data/rl/.make.tmp-*")) or left)  # noqa: B023
        process.send_signal(number)
        assert process.wait(30) == (130 if number == signal.SIGINT else -number)
        await_that(lambda: not alive(int(left[0].name.rpartition("-")[2])))  # noqa: B023
        assert tidy(project.root) == (number == signal.SIGINT)
    out = project.run(*command).stdout
    assert out.splitlines() == ["equal   rl-make", "equal   rl-use@a", "2 stages executed again, 2 equal"]
    assert files(project.root) == before
    kinds = [entry["kind"] for entry in Ledger(project.root / ".springhead").entries()]
    assert kinds == ["execution", "execution", "reproduction"]
    assert tidy(project.root)


# -- where two files differ -----------------------------------------------------------------------


def changed(tmp_path: Path, suffix: str, write) -> str:  # type: ignore[no-untyped-def]
    one, other = tmp_path / f"one{suffix}", tmp_path / "object-without-a-name"
    write(one, False)
    write(other, True)
    return first_difference(one, other, f"data/x{suffix}")


@pytest.mark.unit
def test_the_place_in_hdf5_is_data_set_and_index(tmp_path: Path) -> None:
    def write(path: Path, change: bool) -> None:
        rewards = np.zeros((3, 2), np.float32)
        rewards[0, 0] = np.nan  # equal to itself
        rewards[2, 1] = 5.0 if change else 4.0
        with h5py.File(path, "w") as file:
            file["actions"] = np.arange(4)
            file["group/rewards"] = rewards
            file.attrs["horizon"] = 200

    assert changed(tmp_path, ".hdf5", write) == "dataset 'group/rewards'[2, 1]: 4.0 recorded, 5.0 now"

    def attribute(path: Path, change: bool) -> None:
        with h5py.File(path, "w") as file:
            file.attrs["horizon"] = 300 if change else 200

    assert changed(tmp_path, ".hdf5", attribute) == "attribute of '/': horizon: 200 recorded, 300 now"

    def missing(path: Path, change: bool) -> None:
        with h5py.File(path, "w") as file:
            file["b" if change else "a"] = 1

    assert changed(tmp_path, ".h5", missing) == "dataset 'a': is missing"


@pytest.mark.unit
def test_the_place_in_parquet_is_column_and_row(tmp_path: Path) -> None:
    schema = pa.schema([("id", pa.string()), ("cost", pa.float64()), ("parents", pa.list_(pa.string()))])

    def write(path: Path, change: bool) -> None:
        columns = {"id": ["a", "b"], "cost": [float("nan"), 1.0], "parents": [["p"], ["q"] if change else ["p", "q"]]}
        write_table(path, columns, schema)

    assert changed(tmp_path, ".parquet", write) == "column 'parents', row 1: ['p', 'q'] recorded, ['q'] now"

    def types(path: Path, change: bool) -> None:
        write_table(path, {"n": [1]}, pa.schema([("n", pa.int64() if change else pa.int32())]))

    assert changed(tmp_path, ".parquet", types) == "schema: n: 'int32' recorded, 'int64' now"

    def longer(path: Path, change: bool) -> None:
        write_table(path, {"n": [1] * (3 if change else 2)}, pa.schema([("n", pa.int64())]))

    assert changed(tmp_path, ".parquet", longer) == "2 rows recorded, 3 now"


@pytest.mark.unit
def test_the_place_in_safetensors_is_tensor_and_index(tmp_path: Path) -> None:
    def write(path: Path, change: bool) -> None:
        weights = np.zeros((2, 3), np.float16)
        weights[1, 2] = change
        save_file({"bias": np.ones(2, np.float32), "weight": weights}, str(path))

    assert changed(tmp_path, ".safetensors", write) == "tensor 'weight'[1, 2]: other bytes"

    def shape(path: Path, change: bool) -> None:
        save_file({"weight": np.zeros((2, 4 if change else 3), np.float32)}, str(path))

    assert changed(tmp_path, ".safetensors", shape) == "tensor 'weight': shape[1]: 3 recorded, 4 now"


@pytest.mark.unit
@pytest.mark.parametrize(
    ("suffix", "one", "other", "words"),
    [
        (".json", '{"a": [1, {"b": 2}]}', '{"a": [1, {"b": true}]}', "key a[1].b: 2 recorded, True now"),
        (".json", '{"a": 1}', '{"a": 1, "b": 2}', "key b: nothing recorded, 2 now"),
        (".json", '{"a": 1}', '{"a":1}', "byte 5, 8 bytes recorded, 7 now; the content is equal"),
        (".json", '{"a": 1}', '{"a"', "byte 4, 8 bytes recorded, 4 now (not readable as json"),
        (".jsonl", '{"a":1}\n{"a":2}\n', '{"a":1}\n{"a":3}\n', "line 2: a: 2 recorded, 3 now"),
        (".csv", "a,b\n1,2\n", "a,b\n1,3\n", "line 2: '1,2' recorded, '1,3' now"),
        (".png", "abcdef", "abcxef", "byte 3"),
        (".hdf5", "no hdf5", "no HDF5", "byte 3 (not readable as hdf5"),
    ],
)
def test_the_place_in_text_and_bytes(tmp_path: Path, suffix: str, one: str, other: str, words: str) -> None:
    (tmp_path / "one").write_text(one)
    (tmp_path / "other").write_text(other)
    assert first_difference(tmp_path / "one", tmp_path / "other", f"x{suffix}").startswith(words)
