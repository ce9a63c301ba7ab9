"""Signs model folders, so that a changed, added or removed file is noticed wherever the folder goes.

The signature is a DSSE envelope (https://github.com/secure-systems-lab/dsse) around an in-toto
Statement v1 that names every file of the folder with its SHA-256, signed with ECDSA over P-256. It
lies outside the folder, at ``<home>/signatures/<digest of the folder>.json``, because a file added
to the folder would change what is signed.

The key pair is made on first use in ``<home>/keys``. Whoever can write there can sign, so give a
shared installation a key from elsewhere by ``SPRINGHEAD_SIGNING_KEY`` (a PEM file, PKCS #8).
"""

import base64
import contextlib
import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from springhead.errors import BadInput, Finding
from springhead.jsonio import canonical, read_json, write_json_atomic
from springhead.lineage.digests import files_digest, tree_digest, tree_files

PAYLOAD_TYPE = "application/vnd.in-toto+json"
STATEMENT = "https://in-toto.io/Statement/v1"
PREDICATE = "https://slsa.dev/provenance/v1"
_ALGORITHM = ec.ECDSA(hashes.SHA256())
_SHOWN = 5  # names in one message


def private_key_path(home: Path) -> Path:
    """Returns the file of the signing key."""
    return Path(os.environ.get("SPRINGHEAD_SIGNING_KEY") or home / "keys" / "signing.pem")


def public_key_path(home: Path) -> Path:
    """Returns the file of the public key that :func:`verify` trusts; it may be given to others."""
    return home / "keys" / "signing.pub"


def signature_path(home: Path, digest: str) -> Path:
    """Returns where the signature of a model with this digest lies."""
    return home / "signatures" / f"{digest}.json"


# -- keys -----------------------------------------------------------------------------------------


def _make_key(path: Path) -> None:
    """Writes a new private key with mode 0600; if two processes do so at once, the first one's stays."""
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    pem = ec.generate_private_key(ec.SECP256R1()).private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(pem)
            file.flush()
            os.fsync(file.fileno())
        with contextlib.suppress(FileExistsError):
            os.link(temporary, path)  # unlike a rename, this never replaces a key that is there
    finally:
        temporary.unlink()


def _private_key(home: Path) -> ec.EllipticCurvePrivateKey:
    path = private_key_path(home)
    if not path.exists():
        if os.environ.get("SPRINGHEAD_SIGNING_KEY"):
            raise BadInput(f"{path}: no such file; SPRINGHEAD_SIGNING_KEY must name a private key in PEM form")
        _make_key(path)
    try:
        key = serialization.load_pem_private_key(path.read_bytes(), password=None)
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise BadInput(f"{path}: not an unencrypted private key in PEM form ({error}); restore it") from error
    if not isinstance(key, ec.EllipticCurvePrivateKey) or key.curve.name != "secp256r1":
        raise BadInput(
            f"{path}: must be an EC key on the curve P-256; make one with `openssl ecparam -name prime256v1`"
        )
    public = public_key_path(home)
    pem = _public_pem(key.public_key())
    if not public.exists():
        public.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        public.write_bytes(pem)
    elif public.read_bytes() != pem:
        raise BadInput(f"{public}: belongs to another key than {path}; remove it to trust the new key from now on")
    return key


def _public_pem(key: ec.EllipticCurvePublicKey) -> bytes:
    return key.public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)


def _public_key(path: Path) -> ec.EllipticCurvePublicKey:
    try:
        key = serialization.load_pem_public_key(path.read_bytes())
    except FileNotFoundError:
        raise BadInput(f"{path}: no public key to verify with; nothing was signed here yet") from None
    except (ValueError, UnsupportedAlgorithm) as error:
        raise BadInput(f"{path}: not a public key in PEM form ({error}); restore it") from error
    if not isinstance(key, ec.EllipticCurvePublicKey):
        raise BadInput(f"{path}: must be an EC public key; restore it")
    return key


def key_id(key: ec.EllipticCurvePublicKey) -> str:
    """Returns the SHA-256 of a public key's DER form, by which an envelope names its key."""
    der = key.public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)
    return hashlib.sha256(der).hexdigest()


# -- sign and verify ------------------------------------------------------------------------------


def _to_sign(payload: bytes) -> bytes:
    """Returns DSSE's pre-authentication encoding of a payload."""
    kind = PAYLOAD_TYPE.encode()
    return b"DSSEv1 %d %b %d %b" % (len(kind), kind, len(payload), payload)


def sign(folder: Path, home: Path, predicate: Mapping[str, Any] | None = None) -> Path:
    """Signs a model folder and returns the file of the signature.

    Args:
        folder: the model folder; nothing is written to it.
        home: the state folder, with the keys.
        predicate: what is stated about the model, in the form of SLSA provenance v1.

    Raises:
        BadInput: if the folder is empty or the key cannot be used.
    """
    files = tree_files(folder)
    if not files:
        raise BadInput(f"{folder}: no files to sign; name a model folder")
    statement = {
        "_type": STATEMENT,
        "subject": [{"name": name, "digest": {"sha256": digest}} for name, digest in files.items()],
        "predicateType": PREDICATE,
        "predicate": dict(predicate or {}),
    }
    payload = canonical(statement)
    key = _private_key(home)
    envelope = {
        "payloadType": PAYLOAD_TYPE,
        "payload": base64.b64encode(payload).decode(),
        "signatures": [
            {
                "keyid": key_id(key.public_key()),
                "sig": base64.b64encode(key.sign(_to_sign(payload), _ALGORITHM)).decode(),
            }
        ],
    }
    path = signature_path(home, files_digest(files))
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json_atomic(path, envelope)
    return path


def verify(folder: Path, home: Path, digest: str | None = None, public_key: Path | None = None) -> dict[str, Any]:
    """Checks a model folder against its signature and returns the signed statement.

    Args:
        folder: the model folder, here or downloaded from anywhere.
        home: the state folder, with signatures and keys.
        digest: the digest under which it was signed; default is what the folder has now.
        public_key: the trusted key in PEM form; default is that of ``home``.

    Raises:
        Finding: if there is no signature, it is not from the trusted key, or a file was changed,
            added or removed; the message names the files.
        BadInput: if the public key is missing.
    """
    key = _public_key(public_key or public_key_path(home))
    path = signature_path(home, digest or tree_digest(folder))
    if not path.is_file():
        raise Finding(f"{folder}: no signature for it ({path.name}): it was never signed, or was changed since")
    statement = _opened(path, key)
    signed = {entry["name"]: entry["digest"]["sha256"] for entry in statement["subject"]}
    present = tree_files(folder)
    kinds = {
        "changed": [name for name in signed if name in present and present[name] != signed[name]],
        "added": [name for name in present if name not in signed],
        "removed": [name for name in signed if name not in present],
    }
    found = [f"{kind}: {', '.join(sorted(names)[:_SHOWN])}" for kind, names in kinds.items() if names]
    if found:
        raise Finding(f"{folder}: differs from what was signed ({'; '.join(found)}); restore it with `dvc checkout`")
    return statement


def _opened(path: Path, key: ec.EllipticCurvePublicKey) -> dict[str, Any]:
    """Returns the statement in an envelope once its signature holds."""
    envelope = read_json(path)
    try:
        payload = base64.b64decode(envelope["payload"], validate=True)
        signatures = [base64.b64decode(entry["sig"], validate=True) for entry in envelope["signatures"]]
        kind = envelope["payloadType"]
    except (KeyError, TypeError, ValueError) as error:
        raise Finding(
            f"{path}: not a DSSE envelope ({error}); sign the model again with `springhead promote`"
        ) from None
    if kind != PAYLOAD_TYPE or not any(_holds(key, signature, payload) for signature in signatures):
        raise Finding(f"{path}: not signed by the trusted key {key_id(key)[:16]}; do not use this model")
    statement: dict[str, Any] = json.loads(payload)
    return statement


def _holds(key: ec.EllipticCurvePublicKey, signature: bytes, payload: bytes) -> bool:
    try:
        key.verify(signature, _to_sign(payload), _ALGORITHM)
    except InvalidSignature:
        return False
    return True
