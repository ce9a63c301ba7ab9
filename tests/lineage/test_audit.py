import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

from springhead.errors import BadInput
from springhead.keys import Keys
from springhead.lineage.audit import Audit, audit
from springhead.lineage.dvcfiles import directory_md5, file_md5, read_lock
from springhead.lineage.head import check_head
from springhead.lineage.ledger import Ledger
from springhead.lineage.query import lineage_of_model
from springhead.lineage.repair import repair
from springhead.lineage.workspace import RED, WARNING
from tests.conftest import Project
from tests.lineage.sample import TASK

pytestmark = pytest.mark.fault

DATA = f"data/rl/filter/{TASK}/dataset.hdf5"
VERDICT = f"data/rl/validate/{TASK}/verdict.json"
RECEIPT = f"data/receipts/rl-train@{TASK}-cdt-0.json"
WEIGHTS = f"data/rl/train/{TASK}/cdt/0/model/weights.safetensors"
POLICIES = tuple(f"data/rl/train/{TASK}/{a}/{s}/model" for a in ("bc-safe", "cdt") for s in (0, 1))


def flip(path: Path, place: int = -5) -> None:
    """Flips one bit of a file, whatever its mode."""
    mode = path.stat().st_mode
    path.chmod(0o644)
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)
    path.chmod(mode)


def red(result: Audit) -> set[str]:
    """Returns what is red: (check, where)."""
    return {f"{p.check} {p.where}" for p in result.problems if p.severity == RED}


def affected(result: Audit, where: str) -> tuple[str, ...]:
    return next(p.affects for p in result.problems if p.where == where and p.severity == RED)


def test_a_sound_repository_is_green(root: Path) -> None:
    result = audit(root, deep=True)
    assert result.problems == ()
    assert not result.red
    assert result.checked["outputs"] >= 40
    assert result.checked["cache"] >= 40
    assert result.checked["verdicts"] == 2


@pytest.mark.parametrize(
    "path", [DATA, WEIGHTS, f"data/rl/collect/{TASK}/rows.parquet", f"data/metrics/rl-evaluate@{TASK}.json"]
)
def test_one_changed_bit_in_an_output_names_the_file(root: Path, path: str) -> None:
    flip(root / path)
    assert red(audit(root)) >= {f"outputs {path}"}


def test_changed_data_names_every_model_that_depends_on_it(root: Path) -> None:
    flip(root / DATA)
    result = audit(root)
    assert {m for m in affected(result, DATA) if "/train/" in m} == set(POLICIES)
    flip(root / DATA)
    flip(root / WEIGHTS)
    assert affected(audit(root), WEIGHTS) == (f"data/rl/train/{TASK}/cdt/0/model",)


def test_an_added_and_a_removed_file_are_named(root: Path) -> None:
    (root / WEIGHTS).unlink()
    added = root / WEIGHTS.replace("weights.safetensors", "extra.bin")
    added.write_bytes(b"1")
    found = {p.where: p.what for p in audit(root).problems if p.check == "outputs"}
    assert "is missing" in found[WEIGHTS]
    assert "was added" in found[added.relative_to(root).as_posix()]


def test_an_output_that_was_not_pulled_is_red_and_says_how_to_get_it(root: Path) -> None:
    shutil.rmtree(root / f"data/rl/train/{TASK}/cdt/0")
    problem = next(p for p in audit(root).problems if p.check == "outputs")
    assert problem.where == f"data/rl/train/{TASK}/cdt/0"
    assert "dvc pull" in problem.do


def test_a_changed_verdict_is_red(root: Path) -> None:
    path = root / VERDICT
    verdict = json.loads(path.read_text())
    verdict["data_digest"] = "0" * 64
    path.write_text(json.dumps(verdict))
    assert {f"outputs {VERDICT}", f"verdicts {VERDICT}"} <= red(audit(root))
    verdict["expectations"][0]["success"] = False
    path.write_text(json.dumps(verdict))
    whats = [p.what for p in audit(root).problems if p.check == "verdicts"]
    assert any("critical expectation failed" in what for what in whats)
    path.write_text("{}")
    assert any("no readable verdict" in p.what for p in audit(root).problems)


def test_a_verdict_follows_the_data_not_its_receipt(root: Path) -> None:
    flip(root / DATA)
    assert f"verdicts {VERDICT}" in red(audit(root))


def test_a_changed_receipt_is_red_even_where_it_agrees_with_itself(root: Path) -> None:
    path = root / RECEIPT
    path.write_text(path.read_text().replace('"steps": 50', '"steps": 51'))
    assert {f"dvc.lock {RECEIPT}", "dvc.lock dvc.lock"} <= red(audit(root))
    assert any(p.check == "ledger" and p.where == RECEIPT for p in audit(root).problems)


def test_a_receipt_that_contradicts_itself_is_red(root: Path) -> None:
    path = root / RECEIPT
    receipt = json.loads(path.read_text())
    receipt["models"][0]["sha256"] = "0" * 64
    path.write_text(json.dumps(receipt))
    assert f"receipts {RECEIPT}" in red(audit(root))


def test_a_missing_receipt_is_red(root: Path) -> None:
    (root / RECEIPT).unlink()
    assert f"dvc.lock {RECEIPT}" in red(audit(root))


def test_a_stage_that_read_older_data_is_red(root: Path) -> None:
    path = root / RECEIPT
    receipt = json.loads(path.read_text())
    receipt["dependencies"][f"data/rl/filter/{TASK}"]["sha256"] = "0" * 64
    receipt["datasets"][0]["sha256"] = "1" * 64
    path.write_text(json.dumps(receipt))
    assert {f"links data/rl/filter/{TASK}", f"links {DATA}"} <= red(audit(root))


def test_a_changed_lock_is_red(root: Path) -> None:
    path = root / "dvc.lock"
    lock = yaml.safe_load(path.read_text())
    name = f"rl-train@{TASK}-cdt-1"
    lock["stages"][name]["outs"][0]["md5"] = "0" * 32 + ".dir"
    lock["stages"]["llm-filter"]["params"]["params.yaml"]["llm.filter"]["longest"] = 1
    path.write_text(yaml.safe_dump(lock))
    assert red(audit(root)) == {f"dvc.lock {lock['stages'][name]['outs'][0]['path']}", "dvc.lock dvc.lock"}


def test_code_that_moved_on_is_a_warning_not_red(root: Path) -> None:
    path = root / "stages/rl/train.py"
    path.write_text(path.read_text() + "# more\n")
    result = audit(root)
    assert not result.red
    (problem,) = result.problems
    assert (problem.severity, problem.check, problem.where) == (WARNING, "code", "stages/rl/train.py")
    assert problem.affects == POLICIES


@pytest.mark.parametrize("damage", ["edit", "remove", "swap", "garbage"])
def test_a_damaged_ledger_is_red_and_names_the_line(root: Path, damage: str) -> None:
    path = root / ".springhead/ledger.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    if damage == "edit":
        lines[3] = lines[3].replace(b"sample", b"simple")
    elif damage == "remove":
        del lines[3]
    elif damage == "swap":
        lines[3], lines[4] = lines[4], lines[3]
    else:
        lines[3] = b"not json\n"
    path.write_bytes(b"".join(lines))
    where = {p.where for p in audit(root).problems if p.check == "ledger" and p.severity == RED}
    assert where & {f"{path}:4", f"{path}:5"}


def test_a_receipt_without_an_execution_is_a_warning(root: Path) -> None:
    (root / ".springhead/ledger.jsonl").unlink()
    (root / ".springhead/ledger.head.json").unlink()
    result = audit(root)
    assert not result.red
    assert {p.check for p in result.problems} == {"ledger"}
    assert len(result.problems) == 17


@pytest.mark.parametrize("kept", [1, 16])
def test_a_ledger_that_was_cut_is_red_though_its_chain_is_whole(root: Path, kept: int) -> None:
    path = root / ".springhead/ledger.jsonl"
    path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[:kept]))
    assert Ledger(path.parent).verify() == []
    (problem,) = (p for p in audit(root).problems if p.severity == RED)
    assert problem.where == ".springhead/ledger.head.json"
    assert f"17 entries were signed, {kept} are left" in problem.what


def test_a_cut_is_not_hidden_by_the_next_entry(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    home = root / ".springhead"
    path = home / "ledger.jsonl"
    path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[:9]))
    Ledger(home).append("failure", {"execution": "x", "stage": "rl-make"}, Keys.of(root, home))
    assert "the head of the ledger is not signed" in capsys.readouterr().err
    assert any("17 entries were signed" in p.what for p in audit(root).problems)
    (home / "ledger.head.json").unlink()
    Ledger(home).append("failure", {"execution": "x", "stage": "rl-make"}, Keys.of(root, home))
    assert any("is missing" in p.what and p.check == "ledger" for p in audit(root).problems)


def test_entries_after_the_signed_head_are_a_warning(root: Path) -> None:
    Ledger(root / ".springhead").append("failure", {"execution": "x", "stage": "rl-make"})
    (problem,) = audit(root).problems
    assert (problem.severity, problem.check) == (WARNING, "ledger")
    assert "the last 1 entries" in problem.what


def test_objects_of_old_revisions_are_hashed_by_deep(root: Path) -> None:
    stray = root / ".dvc/cache/files/md5/ab" / ("0" * 30)
    stray.parent.mkdir(exist_ok=True)
    stray.write_bytes(b"not what its name says")
    assert not audit(root).red
    assert red(audit(root, deep=True)) == {f"cache {stray.relative_to(root)}"}


def test_a_changed_cache_object_is_named(root: Path) -> None:
    md5 = file_md5(root / WEIGHTS)
    cached = root / ".dvc/cache/files/md5" / md5[:2] / md5[2:]
    assert not os.access(cached, os.W_OK) or os.geteuid() == 0
    inode = (root / WEIGHTS).read_bytes()
    flip(cached)
    (root / WEIGHTS).unlink()  # it may be a link to the object that was just changed
    (root / WEIGHTS).write_bytes(inode)
    result = audit(root)
    assert red(result) == {f"cache {cached.relative_to(root)}"}
    assert f"data/rl/train/{TASK}/cdt/0/model" in affected(result, str(cached.relative_to(root)))
    assert red(audit(root, deep=True)) == red(result)
    cached.unlink()  # taken by `dvc gc`; the workspace still proves itself
    assert not audit(root, deep=True).red


def test_our_directory_hash_is_dvc_s(root: Path) -> None:
    for entry in read_lock(root).values():
        for out in entry["outs"]:
            path = root / out["path"]
            if path.is_dir():
                files = {p.relative_to(path).as_posix(): file_md5(p) for p in path.rglob("*") if p.is_file()}
                assert directory_md5(files) == out["md5"]


@pytest.mark.parametrize("content", ["", "stages: [", "- 1\n"])
def test_a_lock_file_that_was_cut_off_says_how_to_get_it_back(root: Path, content: str) -> None:
    (root / "dvc.lock").write_text(content)
    (problem,) = (p for p in audit(root).problems if p.severity == RED)
    assert problem.where == "dvc.lock"
    assert "git checkout dvc.lock" in problem.what + problem.do
    with pytest.raises(BadInput, match=r"git checkout dvc\.lock"):
        read_lock(root)


@pytest.mark.parametrize("damage", ["not json", "[]", "{}", '{"stage": 1}'])
def test_a_receipt_that_cannot_be_read_is_red(root: Path, damage: str) -> None:
    (root / RECEIPT).unlink()
    (root / RECEIPT).write_text(damage)
    whats = [p.what for p in audit(root).problems if p.severity == RED and p.where == RECEIPT]
    assert any("cannot be read" in what for what in whats)


def test_nothing_to_audit_says_what_to_run(root: Path) -> None:
    shutil.rmtree(root / "data/receipts")
    with pytest.raises(BadInput, match="springhead run"):
        audit(root)


@pytest.mark.e2e
def test_what_the_real_harness_and_dvc_leave_is_green(project: Project) -> None:
    project.run("dvc", "repro", "-q")
    result = audit(project.root, deep=True)
    assert result.problems == ()
    assert result.checked["receipts"] == 3
    answer = lineage_of_model(project.root, "data/rl/use/a/model")
    assert [stage["stage"] for stage in answer["stages"]] == ["rl-make", "rl-use@a"]
    assert len(answer["stages"][0]["executions"]) == 1
    project.write("source.txt", "other\n")
    project.write("data/rl/use/a/model/config.json", "{}")
    problems = audit(project.root).problems
    assert {p.check for p in problems if p.severity == RED} == {"outputs"}
    assert [p.where for p in problems if p.severity == WARNING] == ["source.txt"]


# -- the registry, with a real MLflow on SQLite ---------------------------------------------------


@pytest.fixture
def promoted(root: Path) -> Path:
    """The sample with a real promotion through the project's own gates."""
    from springhead import registry

    gates = Path(__file__).parents[2] / "mlflow" / "gates.yaml"
    (root / "mlflow").mkdir(exist_ok=True)
    shutil.copy(gates, root / "mlflow" / "gates.yaml")
    registry.promote("mend-small-llama", root=root, home=root / ".springhead")
    return root


@pytest.mark.e2e
def test_a_promoted_champion_is_green_and_its_damage_is_red(promoted: Path) -> None:
    from springhead import tracking

    # The sample's stages left no spool, so MLflow cannot have their runs.
    assert [(p.severity, p.check) for p in audit(promoted).problems] == [(WARNING, "runs")]
    answer = lineage_of_model(promoted, "models:/mend-small-llama@champion")
    assert answer["registry"] == {"name": "mend-small-llama", "version": "1", "aliases": ["champion"]}
    assert answer["promotion"]["digest"] == answer["sha256"]

    stored = list(promoted.glob(".springhead/**/weights.safetensors"))
    assert len(stored) == 1
    flip(stored[0])
    (problem,) = (p for p in audit(promoted).problems if p.severity == RED)
    assert (problem.check, problem.where) == ("registry", "mend-small-llama/1")
    assert str(stored[0]) in problem.what
    flip(stored[0])

    client = tracking.connect(promoted / ".springhead")
    version = client.get_model_version("mend-small-llama", "1")
    client.create_model_version("mend-small-llama", version.source, tags={**version.tags, "model.sha256": "0" * 64})
    client.set_registered_model_alias("mend-small-llama", "champion", "2")
    found = [p.what for p in audit(promoted).problems]
    assert any("moved by hand" in what for what in found)
    assert any("was promoted, but the ledger has no such entry" in what for what in found)
    client.delete_registered_model_alias("mend-small-llama", "champion")
    assert "nothing carries the alias champion now" in audit(promoted).problems[0].what


@pytest.mark.e2e
def test_an_alias_set_by_hand_is_red(root: Path) -> None:
    from springhead import tracking

    client = tracking.connect(root / ".springhead")
    client.create_registered_model("by-hand")
    client.create_model_version("by-hand", str(root / f"data/rl/train/{TASK}/cdt/0/model"))
    client.set_registered_model_alias("by-hand", "champion", "1")
    result = audit(root)
    assert red(result) == {"registry by-hand"}
    assert "set by hand" in result.problems[0].what


def test_a_promotion_whose_registry_is_gone_is_red(root: Path) -> None:
    home = root / ".springhead"
    body = {"action": "champion", "model": "policy-x", "version": "1", "digest": "0" * 64}
    Ledger(home).append("promotion", body, Keys.of(root, home))
    assert red(audit(root)) == {"registry policy-x", "registry policy-x/1", "signatures policy-x/1"}


def test_an_entry_that_no_promotion_wrote_is_named(root: Path) -> None:
    home = root / ".springhead"
    Ledger(home).append("promotion", {"model": "policy-x", "version": "1", "digest": "0" * 64})
    whats = [p.what for p in audit(root).problems if p.check == "signatures"]
    assert any("it lacks action" in what for what in whats)
    assert any("its ledger entry is not signed" in what for what in whats)


# -- hostile records ------------------------------------------------------------------------------


def test_every_bit_of_the_signed_head_counts(root: Path) -> None:
    """Neither the key's name nor the spare bits of base64 may change unseen."""
    home = root / ".springhead"
    keys, path = Keys.of(root, home), home / "ledger.head.json"
    whole = path.read_bytes()
    unseen = []
    for place in range(len(whole)):
        for bit in (0, 3, 5):
            changed = bytearray(whole)
            changed[place] ^= 1 << bit
            path.write_bytes(bytes(changed))
            if not check_head(Ledger(home), keys).problem:
                unseen.append((place, bit))
    assert unseen == []


def test_hashes_and_paths_that_lead_out_are_no_hashes_and_paths(root: Path, tmp_path: Path) -> None:
    treasure = tmp_path / "treasure"
    treasure.write_text("mine")
    lock = yaml.safe_load((root / "dvc.lock").read_text())
    name = f"rl-train@{TASK}-cdt-1"
    lock["stages"][name]["outs"][0]["md5"] = f"ab{treasure}"
    lock["stages"][name]["outs"].append({"path": "../treasure", "md5": "0" * 32})
    (root / "dvc.lock").write_text(yaml.safe_dump(lock))
    assert audit(root).red
    repair(root, execute=False)
    assert treasure.read_text() == "mine"
    receipt = json.loads((root / RECEIPT).read_text())
    for path in ("/", "../x", "data/../../x", ""):
        (root / RECEIPT).unlink()
        (root / RECEIPT).write_text(json.dumps(receipt | {"outputs": {path: {"sha256": "0" * 64, "bytes": 0}}}))
        assert RECEIPT in {p.where for p in audit(root).problems if p.severity == RED}


def test_a_link_to_a_folder_inside_an_output_is_red(root: Path, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    link = (root / WEIGHTS).with_name("inner")
    link.symlink_to(tmp_path / "elsewhere")
    assert f"outputs {link.relative_to(root)}" in red(audit(root))


def test_a_stage_whose_receipt_and_lock_entry_are_both_gone_is_red(root: Path) -> None:
    lock = yaml.safe_load((root / "dvc.lock").read_text())
    name = f"rl-validate@{TASK}"
    del lock["stages"][name]
    (root / "dvc.lock").write_text(yaml.safe_dump(lock))
    (root / f"data/receipts/{name}.json").unlink()
    assert f"ledger {name}" in red(audit(root))


def test_a_missing_lock_file_is_red(root: Path) -> None:
    (root / "dvc.lock").unlink()
    assert red(audit(root)) == {"dvc.lock dvc.lock"}


def test_a_trusted_key_that_nobody_committed_is_red(root: Path) -> None:
    def git(*arguments: str) -> None:
        identity = ["-c", "user.name=t", "-c", "user.email=t@t"]
        subprocess.run(["git", *identity, *arguments], cwd=root, check=True, capture_output=True)

    git("init", "-q")
    assert not audit(root).red  # made on first use, not committed yet
    git("add", "-f", "mlflow/trusted-keys")
    git("commit", "-qm", "who may sign")
    assert not audit(root).red
    (known,) = (root / "mlflow/trusted-keys").iterdir()
    shutil.copy(known, known.with_name("another.pem"))
    assert red(audit(root)) == {"keys mlflow/trusted-keys/another.pem"}
