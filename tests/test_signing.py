"""A signed folder verifies as it was and no other way."""

import base64
import json
import shutil
import stat
import subprocess
from pathlib import Path

import numpy as np
import pytest

from springhead import signing
from springhead.errors import BadInput, Finding
from springhead.lineage.digests import tree_digest

openssl = pytest.mark.skipif(shutil.which("openssl") is None, reason="needs the openssl command as second opinion")


@pytest.fixture
def model(tmp_path: Path) -> Path:
    from safetensors.numpy import save_file

    folder = tmp_path / "model"
    (folder / "inner").mkdir(parents=True)
    save_file({"weight": np.arange(12, dtype=np.float32)}, str(folder / "weights.safetensors"))
    (folder / "config.json").write_text('{"algorithm": "bc-safe"}\n')
    (folder / "inner" / "tokenizer.json").write_text("{}\n")
    return folder


@pytest.fixture
def home(tmp_path: Path) -> Path:
    return tmp_path / "home"


def test_sign_then_verify_states_every_file(model: Path, home: Path) -> None:
    before = tree_digest(model)
    path = signing.sign(model, home, {"buildDefinition": {"buildType": "x"}})
    assert path == home / "signatures" / f"{before}.json"
    assert tree_digest(model) == before
    statement = signing.verify(model, home)
    assert [s["name"] for s in statement["subject"]] == ["config.json", "inner/tokenizer.json", "weights.safetensors"]
    assert statement["predicate"]["buildDefinition"] == {"buildType": "x"}


def test_the_private_key_is_for_its_owner_only_and_stays(model: Path, home: Path) -> None:
    signing.sign(model, home)
    key = signing.private_key_path(home)
    assert stat.S_IMODE(key.stat().st_mode) == 0o600
    before = key.read_bytes()
    (model / "config.json").write_text("{}")
    signing.sign(model, home)
    assert key.read_bytes() == before
    assert sorted(path.name for path in key.parent.iterdir()) == ["signing.pem", "signing.pub"]


@pytest.mark.fault
def test_every_single_change_is_found(model: Path, home: Path) -> None:
    """Sign, change, verify must fail: each byte position class, each file, each kind of change."""
    digest = tree_digest(model)
    signing.sign(model, home)
    generator = np.random.default_rng(0)
    files = sorted(path for path in model.rglob("*") if path.is_file())
    for file in files:
        whole = file.read_bytes()
        for position in generator.integers(0, len(whole), 8):
            changed = bytearray(whole)
            changed[position] ^= 1 << int(generator.integers(0, 8))
            file.write_bytes(bytes(changed))
            with pytest.raises(Finding, match=f"changed: {file.relative_to(model).as_posix()}"):
                signing.verify(model, home, digest)
            with pytest.raises(Finding, match="no signature"):
                signing.verify(model, home)
        file.unlink()
        with pytest.raises(Finding, match="removed: "):
            signing.verify(model, home, digest)
        file.write_bytes(whole)
    (model / "inner" / "extra.py").write_text("")
    with pytest.raises(Finding, match=r"added: inner/extra\.py"):
        signing.verify(model, home, digest)
    (model / "inner" / "extra.py").unlink()
    (model / "config.json").rename(model / "settings.json")
    with pytest.raises(Finding, match=r"added: settings\.json; removed: config\.json"):
        signing.verify(model, home, digest)
    (model / "settings.json").rename(model / "config.json")
    signing.verify(model, home, digest)


@pytest.mark.fault
def test_a_signature_of_another_key_is_refused(model: Path, home: Path, tmp_path: Path) -> None:
    signing.sign(model, home)
    other = tmp_path / "other"
    signing.sign(model, other)
    with pytest.raises(Finding, match="not signed by the trusted key"):
        signing.verify(model, home, public_key=signing.public_key_path(other))
    path = signing.signature_path(home, tree_digest(model))
    shutil.copy(signing.signature_path(other, tree_digest(model)), path)
    with pytest.raises(Finding, match="not signed by the trusted key"):
        signing.verify(model, home)


@pytest.mark.fault
def test_a_changed_statement_or_envelope_is_refused(model: Path, home: Path) -> None:
    path = signing.sign(model, home)
    (model / "config.json").write_text("{}")
    envelope = json.loads(path.read_text())
    statement = json.loads(base64.b64decode(envelope["payload"]))
    statement["subject"] = [
        {"name": name, "digest": {"sha256": digest}} for name, digest in signing.tree_files(model).items()
    ]
    envelope["payload"] = base64.b64encode(json.dumps(statement).encode()).decode()
    signing.signature_path(home, tree_digest(model)).write_text(json.dumps(envelope))
    with pytest.raises(Finding, match="not signed by the trusted key"):
        signing.verify(model, home)
    signing.signature_path(home, tree_digest(model)).write_text('{"payload": 3}')
    with pytest.raises(Finding, match="not a DSSE envelope"):
        signing.verify(model, home)


@openssl
def test_the_signature_is_one_that_openssl_verifies(model: Path, home: Path, tmp_path: Path) -> None:
    """The envelope is plain DSSE: PAE over the payload, ECDSA P-256, DER. Another tool must agree."""
    envelope = json.loads(signing.sign(model, home).read_text())
    payload = base64.b64decode(envelope["payload"])
    kind = envelope["payloadType"].encode()
    (tmp_path / "pae").write_bytes(b"DSSEv1 %d %s %d %s" % (len(kind), kind, len(payload), payload))
    (tmp_path / "sig").write_bytes(base64.b64decode(envelope["signatures"][0]["sig"]))
    command = ["openssl", "dgst", "-sha256", "-verify", str(signing.public_key_path(home))]
    done = subprocess.run([*command, "-signature", str(tmp_path / "sig"), str(tmp_path / "pae")], capture_output=True)
    assert done.returncode == 0, done.stderr


@openssl
def test_a_key_from_elsewhere(model: Path, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    key = tmp_path / "mine.pem"
    monkeypatch.setenv("SPRINGHEAD_SIGNING_KEY", str(key))
    with pytest.raises(BadInput, match=r"mine\.pem: no such file"):
        signing.sign(model, home)
    key.write_text("not a key")
    with pytest.raises(BadInput, match=r"mine\.pem: not an unencrypted private key"):
        signing.sign(model, home)
    command = ["openssl", "ecparam", "-name", "prime256v1", "-genkey", "-noout", "-out", str(key)]
    subprocess.run(command, check=True, capture_output=True)
    signing.sign(model, home)
    signing.verify(model, home)
    monkeypatch.delenv("SPRINGHEAD_SIGNING_KEY")
    with pytest.raises(BadInput, match="belongs to another key"):
        signing.sign(model, home)


def test_nothing_to_sign_and_nothing_to_verify_with(tmp_path: Path, home: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(BadInput, match="no files"):
        signing.sign(tmp_path / "empty", home)
    with pytest.raises(BadInput, match="nothing was signed here yet"):
        signing.verify(tmp_path / "empty", home)
