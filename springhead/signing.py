"""Signed statements about models, so that a change is noticed wherever a model goes.

A statement is an in-toto Statement v1 whose subject is every file of a model folder with its SHA-256,
in a DSSE envelope (https://github.com/secure-systems-lab/dsse), signed with ECDSA over P-256. Two kinds
are made at a promotion: SLSA provenance v1 (how the model was made) and a SLSA verification summary v1
(which rules it was judged by, on which verdict and evaluation, and as which version it ships).

Envelopes lie outside the folder, at ``<home>/signatures/<digest of the folder>/<sha256>.json``, because a
file added to the folder would change what is signed. They are never written over.
"""

import base64
import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from springhead.errors import BadInput, Finding
from springhead.jsonio import canonical, parse
from springhead.keys import Keys
from springhead.lineage.digests import file_digest, files_digest, tree_digest, tree_files

STATEMENT_TYPE = "application/vnd.in-toto+json"
STATEMENT = "https://in-toto.io/Statement/v1"
PROVENANCE = "https://slsa.dev/provenance/v1"
SUMMARY = "https://slsa.dev/verification_summary/v1"
_SHOWN = 5  # names in one message


def signature_path(home: Path, digest: str, envelope_digest: str) -> Path:
    """Returns where an envelope about a model lies; the name of the file is the digest of its content."""
    return home / "signatures" / digest / f"{envelope_digest}.json"


def signatures(home: Path, digest: str) -> list[Path]:
    """Returns the envelopes about the model with this digest, by name."""
    if not digest.isalnum():  # a digest from elsewhere must not lead anywhere
        return []
    return sorted((home / "signatures" / digest).glob("*.json"))


# -- envelopes ------------------------------------------------------------------------------------


def _to_sign(kind: str, payload: bytes) -> bytes:
    """Returns DSSE's pre-authentication encoding of a payload."""
    name = kind.encode()
    return b"DSSEv1 %d %b %d %b" % (len(name), name, len(payload), payload)


def envelope(value: Any, kind: str, keys: Keys) -> dict[str, Any]:
    """Signs a JSON value and returns the DSSE envelope around it.

    Args:
        value: what is signed, in its canonical form.
        kind: media type of the payload.
        keys: the keys of the checkout.

    Raises:
        BadInput: if the key cannot be used.
    """
    payload = canonical(value)
    key, signature = keys.sign(_to_sign(kind, payload))
    return {
        "payloadType": kind,
        "payload": base64.b64encode(payload).decode(),
        "signatures": [{"keyid": key, "sig": base64.b64encode(signature).decode()}],
    }


def opened(path: Path, kind: str, keys: Keys) -> Any:
    """Returns what is in an envelope, once a signature by a trusted key holds.

    Raises:
        Finding: if the file is missing, no envelope, of another kind, or not signed by a trusted key.
        BadInput: if a trusted key cannot be read.
    """
    try:
        content = parse(path.read_bytes())
        payload = _decoded(content["payload"])
        found = [(str(s["keyid"]), _decoded(s["sig"])) for s in content["signatures"]]
        stated = content["payloadType"]
    except FileNotFoundError:
        raise Finding(f"{path}: no such file; restore it from a backup") from None
    except OSError as error:
        raise Finding(f"{path}: cannot be read ({error.strerror}); restore it from a backup") from None
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise Finding(f"{path}: not a DSSE envelope ({error}); restore it from a backup") from None
    if stated != kind:
        raise Finding(f"{path}: holds {stated}, not {kind}; restore it from a backup")
    if not any(keys.holds(signature, _to_sign(kind, payload), key) for key, signature in found):
        raise Finding(f"{path}: not signed by a key in {keys.trusted}; do not trust it")
    return parse(payload)


def _decoded(text: str) -> bytes:
    """Decodes base64 in its one canonical form: elsewhere some bits of the text would not count."""
    content = base64.b64decode(text, validate=True)
    if base64.b64encode(content).decode() != text:
        raise ValueError("not canonical base64")
    return content


# -- statements about a folder --------------------------------------------------------------------


def sign(folder: Path, home: Path, keys: Keys, kind: str, predicate: Mapping[str, Any]) -> Path:
    """States something about a model folder, signed, and returns the file of the envelope.

    Signing the same statement again returns the envelope that is there.

    Args:
        folder: the model folder; nothing is written to it.
        home: the state folder.
        keys: the keys of the checkout.
        kind: predicate type, :data:`PROVENANCE` or :data:`SUMMARY`.
        predicate: what is stated.

    Raises:
        BadInput: if the folder is empty or the key cannot be used.
    """
    files = tree_files(folder)
    if not files:
        raise BadInput(f"{folder}: no files to sign; name a model folder")
    statement = {
        "_type": STATEMENT,
        "subject": [{"name": name, "digest": {"sha256": digest}} for name, digest in files.items()],
        "predicateType": kind,
        "predicate": dict(predicate),
    }
    digest = files_digest(files)
    wanted = json.loads(canonical(statement))
    for path in signatures(home, digest):
        try:
            if opened(path, STATEMENT_TYPE, keys) == wanted:
                return path
        except Finding:  # the audit names it; a good one is written beside it
            continue
    signed = envelope(statement, STATEMENT_TYPE, keys)
    content = canonical(signed) + b"\n"
    path = signature_path(home, digest, hashlib.sha256(content).hexdigest())
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    with temporary.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    return path


def statements(home: Path, keys: Keys, digest: str) -> Iterator[tuple[Path, dict[str, Any]]]:
    """Yields every statement about a model whose signature holds, with the file of its envelope.

    Raises:
        BadInput: if a trusted key cannot be read.
    """
    for path in signatures(home, digest):
        try:
            statement = opened(path, STATEMENT_TYPE, keys)
        except Finding:
            continue
        yield path, statement


def by_digest(home: Path, digest: str, envelope_digest: str) -> Path | None:
    """Returns the envelope about a model whose file has the given digest, or None."""
    return next((path for path in signatures(home, digest) if file_digest(path) == envelope_digest), None)


def subject_digest(statement: Mapping[str, Any]) -> str:
    """Returns the digest of the folder that a statement is about."""
    return files_digest({entry["name"]: entry["digest"]["sha256"] for entry in statement["subject"]})


def verify(folder: Path, home: Path, keys: Keys, digest: str | None = None) -> dict[str, Any]:
    """Checks a model folder against its signed provenance, which it returns.

    Args:
        folder: the model folder, here or downloaded from anywhere.
        home: the state folder with the signatures.
        keys: the keys to trust.
        digest: the digest under which it was signed; default is what the folder has now.

    Raises:
        Finding: if there is no signature, none is from a trusted key, or a file was changed,
            added or removed; the message names the files.
    """
    wanted = digest or tree_digest(folder)
    known = signatures(home, wanted)
    if not known:
        raise Finding(f"{folder}: no signature for it ({wanted[:16]}…): it was never signed, or was changed since")
    statement = next((s for _, s in statements(home, keys, wanted) if s.get("predicateType") == PROVENANCE), None)
    if statement is None:
        for path in known:
            opened(path, STATEMENT_TYPE, keys)  # says what is wrong with it
        raise Finding(f"{folder}: signed, but without provenance; promote it again")
    signed = {entry["name"]: entry["digest"]["sha256"] for entry in statement["subject"]}
    present = tree_files(folder)
    kinds = {
        "changed": [name for name in signed if name in present and present[name] != signed[name]],
        "added": [name for name in present if name not in signed],
        "removed": [name for name in signed if name not in present],
    }
    found = [f"{what}: {', '.join(sorted(names)[:_SHOWN])}" for what, names in kinds.items() if names]
    if found:
        raise Finding(f"{folder}: differs from what was signed ({'; '.join(found)}); restore it with `dvc checkout`")
    return statement
