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
from springhead.keys import Keys, key_id, read_public_key
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


@pytest.fixture(autouse=True)
def keys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Keys:
    """Keys of an installation of its own, nothing made yet."""
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    return Keys(tmp_path / "trusted-keys", tmp_path / "home/keys/signing.pem")


def sign(model: Path, home: Path, keys: Keys, **predicate: str) -> Path:
    return signing.sign(model, home, keys, signing.PROVENANCE, predicate)


def test_sign_then_verify_states_every_file(model: Path, home: Path, keys: Keys) -> None:
    before = tree_digest(model)
    path = sign(model, home, keys, builder="x")
    assert path.parent == home / "signatures" / before
    assert tree_digest(model) == before
    statement = signing.verify(model, home, keys)
    assert [s["name"] for s in statement["subject"]] == ["config.json", "inner/tokenizer.json", "weights.safetensors"]
    assert statement["predicate"] == {"builder": "x"}
    assert signing.subject_digest(statement) == before


def test_the_same_statement_is_signed_once(model: Path, home: Path, keys: Keys) -> None:
    first = sign(model, home, keys, builder="x")
    assert sign(model, home, keys, builder="x") == first
    assert sign(model, home, keys, builder="y") != first  # nothing is ever written over
    assert len(signing.signatures(home, tree_digest(model))) == 2


def test_the_private_key_is_outside_for_its_owner_only_and_stays(model: Path, home: Path, keys: Keys) -> None:
    sign(model, home, keys)
    key = keys.private
    assert key.name == "signing.pem"
    assert home not in key.parents
    assert stat.S_IMODE(key.stat().st_mode) == 0o600
    before = key.read_bytes()
    (model / "config.json").write_text("{}")
    sign(model, home, keys)
    assert key.read_bytes() == before
    (public,) = keys.trusted.iterdir()
    assert public.stem == key_id(read_public_key(public))[:16]
    assert keys.unusable() == []
    key.chmod(0o644)
    assert "others may read it" in keys.unusable()[0]


@pytest.mark.fault
def test_of_two_keys_the_one_that_is_trusted_signs(
    model: Path, home: Path, keys: Keys, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    with monkeypatch.context() as patch:
        patch.setenv("XDG_CONFIG_HOME", str(tmp_path / "file"))
        sign(model, home, keys)  # made in the state folder, and trusted
    Keys(tmp_path / "another-repository", tmp_path / "x").sign(b"makes the user's own key")
    assert keys.private == home / "keys/signing.pem"
    assert keys.unusable() == []
    sign(model, home, keys, builder="again")


@pytest.mark.fault
def test_without_a_writable_home_the_key_is_kept_in_the_state_folder(
    model: Path, home: Path, keys: Keys, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "file"))
    sign(model, home, keys)
    assert keys.private == home / "keys/signing.pem"
    signing.verify(model, home, keys)


@pytest.mark.fault
def test_every_single_change_is_found(model: Path, home: Path, keys: Keys) -> None:
    """Sign, change, verify must fail: each byte position class, each file, each kind of change."""
    digest = tree_digest(model)
    sign(model, home, keys)
    generator = np.random.default_rng(0)
    files = sorted(path for path in model.rglob("*") if path.is_file())
    for file in files:
        whole = file.read_bytes()
        for position in generator.integers(0, len(whole), 8):
            changed = bytearray(whole)
            changed[position] ^= 1 << int(generator.integers(0, 8))
            file.write_bytes(bytes(changed))
            with pytest.raises(Finding, match=f"changed: {file.relative_to(model).as_posix()}"):
                signing.verify(model, home, keys, digest)
            with pytest.raises(Finding, match="no signature"):
                signing.verify(model, home, keys)
        file.unlink()
        with pytest.raises(Finding, match="removed: "):
            signing.verify(model, home, keys, digest)
        file.write_bytes(whole)
    (model / "inner" / "extra.py").write_text("")
    with pytest.raises(Finding, match=r"added: inner/extra\.py"):
        signing.verify(model, home, keys, digest)
    (model / "inner" / "extra.py").unlink()
    (model / "config.json").rename(model / "settings.json")
    with pytest.raises(Finding, match=r"added: settings\.json; removed: config\.json"):
        signing.verify(model, home, keys, digest)
    (model / "settings.json").rename(model / "config.json")
    signing.verify(model, home, keys, digest)


@pytest.mark.fault
def test_a_signature_of_another_key_is_refused(
    model: Path, home: Path, keys: Keys, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = sign(model, home, keys)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "theirs"))
    theirs = Keys(tmp_path / "their-trust", tmp_path / "nowhere")
    other = sign(model, tmp_path / "other", theirs)
    with pytest.raises(Finding, match="not signed by a key in"):
        signing.verify(model, home, theirs)
    path.unlink()
    shutil.copy(other, path.parent)
    with pytest.raises(Finding, match="not signed by a key in"):
        signing.verify(model, home, keys)
    with pytest.raises(BadInput, match="is not trusted in this repository; have it reviewed"):
        sign(model, home, keys)
    shutil.copy(next(theirs.trusted.iterdir()), keys.trusted)  # reviewed and committed
    signing.verify(model, home, keys)


@pytest.mark.fault
def test_a_changed_statement_or_envelope_is_refused(model: Path, home: Path, keys: Keys) -> None:
    envelope = json.loads(sign(model, home, keys).read_text())
    (model / "config.json").write_text("{}")
    statement = json.loads(base64.b64decode(envelope["payload"]))
    statement["subject"] = [
        {"name": name, "digest": {"sha256": digest}} for name, digest in signing.tree_files(model).items()
    ]
    envelope["payload"] = base64.b64encode(json.dumps(statement).encode()).decode()
    forged = home / "signatures" / tree_digest(model) / "x.json"
    forged.parent.mkdir()
    forged.write_text(json.dumps(envelope))
    with pytest.raises(Finding, match="not signed by a key in"):
        signing.verify(model, home, keys)
    for damage in ('{"payload": 3}', "[]", "[" * 100_000, '{"payload": "", "signatures": [3], "payloadType": ""}'):
        forged.write_text(damage)
        with pytest.raises(Finding, match="not a DSSE envelope"):
            signing.verify(model, home, keys)
    envelope["payloadType"] = "text/plain"
    forged.write_text(json.dumps(envelope))
    with pytest.raises(Finding, match="holds text/plain"):
        signing.verify(model, home, keys)


def test_a_digest_cannot_lead_elsewhere(home: Path) -> None:
    (home / "signatures").mkdir(parents=True)
    (home / "x.json").write_text("{}")
    assert signing.signatures(home, "..") == []


@openssl
def test_the_signature_is_one_that_openssl_verifies(model: Path, home: Path, keys: Keys, tmp_path: Path) -> None:
    """The envelope is plain DSSE: PAE over the payload, ECDSA P-256, DER. Another tool must agree."""
    envelope = json.loads(sign(model, home, keys).read_text())
    payload = base64.b64decode(envelope["payload"])
    kind = envelope["payloadType"].encode()
    (tmp_path / "pae").write_bytes(b"DSSEv1 %d %s %d %s" % (len(kind), kind, len(payload), payload))
    (tmp_path / "sig").write_bytes(base64.b64decode(envelope["signatures"][0]["sig"]))
    command = ["openssl", "dgst", "-sha256", "-verify", str(next(keys.trusted.iterdir()))]
    done = subprocess.run([*command, "-signature", str(tmp_path / "sig"), str(tmp_path / "pae")], capture_output=True)
    assert done.returncode == 0, done.stderr


@openssl
def test_a_key_from_elsewhere(
    model: Path, home: Path, keys: Keys, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    key = tmp_path / "mine.pem"
    monkeypatch.setenv("SPRINGHEAD_SIGNING_KEY", str(key))
    with pytest.raises(BadInput, match=r"mine\.pem: no such file"):
        sign(model, home, keys)
    key.write_text("not a key")
    with pytest.raises(BadInput, match=r"mine\.pem: not an unencrypted private key"):
        sign(model, home, keys)
    command = ["openssl", "ecparam", "-name", "prime256v1", "-genkey", "-noout", "-out", str(key)]
    subprocess.run(command, check=True, capture_output=True)
    sign(model, home, keys)
    signing.verify(model, home, keys)
    (keys.trusted / "bad.pem").write_text("not a key")
    with pytest.raises(BadInput, match=r"bad\.pem: not a public key"):
        signing.verify(model, home, keys)


def test_nothing_to_sign_and_nothing_to_verify_with(tmp_path: Path, home: Path, keys: Keys) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(BadInput, match="no files"):
        sign(tmp_path / "empty", home, keys)
    with pytest.raises(Finding, match="never signed"):
        signing.verify(tmp_path / "empty", home, keys)
