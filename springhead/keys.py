"""The keys behind signatures: which one signs here, and which ones are trusted.

The private key is not part of a checkout. By default it is made on first use, with mode 0600, at
``$XDG_CONFIG_HOME/springhead/signing.pem`` (``~/.config/…``), one for all checkouts of a user, as with
SSH; where that folder cannot be written, at ``<home>/keys/signing.pem``. ``SPRINGHEAD_SIGNING_KEY``
names another file. ``SPRINGHEAD_SIGNING_COMMAND`` names a program that signs with a key which never
leaves a KMS or HSM: it reads the bytes to sign on standard input and writes an ECDSA signature over
their SHA-256 (DER) on standard output; ``SPRINGHEAD_SIGNING_PUBLIC_KEY`` is then the public half.

The trusted public keys are files in ``mlflow/trusted-keys/`` of the repository, so that who may sign is
reviewed like code. The first key that signs in a repository without trusted keys is written there.
"""

import contextlib
import hashlib
import os
import shlex
import subprocess
from dataclasses import dataclass
from pathlib import Path

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from springhead.errors import BadInput
from springhead.git import git, git_bytes, head_commit, under_git
from springhead.home import main_checkout

TRUSTED = Path("mlflow/trusted-keys")
_ALGORITHM = ec.ECDSA(hashes.SHA256())
_PATIENCE = 60.0  # seconds for an external signer, which may ask a person for a PIN


def _configured() -> Path | None:
    """Returns the user's key file, or None for a user who has no home."""
    try:
        folder = os.environ.get("XDG_CONFIG_HOME") or Path("~/.config").expanduser()
    except RuntimeError:
        return None
    return Path(folder) / "springhead" / "signing.pem"


def _there(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # a folder that may not be searched
        return False


def key_id(key: ec.EllipticCurvePublicKey) -> str:
    """Returns the SHA-256 of a public key's DER form, by which an envelope names its key."""
    der = key.public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)
    return hashlib.sha256(der).hexdigest()


def read_public_key(path: Path) -> ec.EllipticCurvePublicKey:
    """Reads a public key.

    Raises:
        BadInput: if the file is missing or holds no EC public key on P-256 in PEM form.
    """
    try:
        key = serialization.load_pem_public_key(path.read_bytes())
    except FileNotFoundError:
        raise BadInput(f"{path}: no such file; name a public key in PEM form") from None
    except (ValueError, UnsupportedAlgorithm) as error:
        raise BadInput(f"{path}: not a public key in PEM form ({error}); restore it") from error
    if not isinstance(key, ec.EllipticCurvePublicKey) or key.curve.name != "secp256r1":
        raise BadInput(f"{path}: must be an EC public key on the curve P-256; restore it")
    return key


def _read_private_key(path: Path) -> ec.EllipticCurvePrivateKey:
    try:
        key = serialization.load_pem_private_key(path.read_bytes(), password=None)
    except (OSError, ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise BadInput(f"{path}: not an unencrypted private key in PEM form ({error}); restore it") from error
    if not isinstance(key, ec.EllipticCurvePrivateKey) or key.curve.name != "secp256r1":
        raise BadInput(
            f"{path}: must be an EC key on the curve P-256; make one with `openssl ecparam -name prime256v1`"
        )
    return key


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


def _pem(key: ec.EllipticCurvePublicKey) -> bytes:
    return key.public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)


@dataclass(frozen=True)
class Keys:
    """The keys of a checkout.

    Attributes:
        trusted: the folder of trusted public keys, one PEM file each.
        fallback: where a private key is kept if the user's configuration folder cannot be written.
    """

    trusted: Path
    fallback: Path

    @classmethod
    def of(cls, root: Path, home: Path) -> "Keys":
        """Returns the keys of a checkout; a worktree of a run uses those of the main checkout."""
        return cls(main_checkout(root) / TRUSTED, home / "keys" / "signing.pem")

    @property
    def external(self) -> bool:
        """Whether a program signs, which may cost money or ask a person, so not at every entry."""
        return bool(os.environ.get("SPRINGHEAD_SIGNING_COMMAND"))

    @property
    def private(self) -> Path:
        """The file of the private key, which need not exist yet."""
        named = os.environ.get("SPRINGHEAD_SIGNING_KEY")
        if named:
            return Path(named)
        usual = _configured()
        there = [path for path in (usual, self.fallback) if path is not None and _there(path)]
        return next((path for path in there if self._trusts(path)), there[0] if there else usual or self.fallback)

    def _trusts(self, path: Path) -> bool:
        """Tells whether the public half of a private key is trusted here."""
        try:
            return key_id(_read_private_key(path).public_key()) in self.public()
        except BadInput:
            return False

    # -- trust ----------------------------------------------------------------------------------

    def public(self) -> dict[str, ec.EllipticCurvePublicKey]:
        """Returns the trusted keys by id.

        Raises:
            BadInput: if a file in the folder is no public key.
        """
        found = (read_public_key(path) for path in sorted(self.trusted.glob("*.pem")))
        return {key_id(key): key for key in found}

    def holds(self, signature: bytes, data: bytes, key: str) -> bool:
        """Tells whether a signature over ``data`` is by the trusted key with the id ``key``."""
        trusted = self.public().get(key)
        if trusted is None:
            return False
        try:
            trusted.verify(signature, data, _ALGORITHM)
        except InvalidSignature:
            return False
        return True

    # -- signing --------------------------------------------------------------------------------

    def sign(self, data: bytes) -> tuple[str, bytes]:
        """Signs bytes and returns the id of the key and the signature (ECDSA, SHA-256, DER).

        Raises:
            BadInput: if the key cannot be read or made, is not trusted here, or its program fails.
        """
        if self.external:
            return self._sign_outside(data)
        key = self._private_key()
        return self._trust(key.public_key(), self.private), key.sign(data, _ALGORITHM)

    def _private_key(self) -> ec.EllipticCurvePrivateKey:
        path = self.private
        if not _there(path):
            if os.environ.get("SPRINGHEAD_SIGNING_KEY"):
                raise BadInput(f"{path}: no such file; SPRINGHEAD_SIGNING_KEY must name a private key in PEM form")
            try:
                _make_key(path)
            except OSError:  # a home folder that is read-only or does not exist
                path = self.fallback
                if not path.exists():
                    _make_key(path)
        return _read_private_key(path)

    def _sign_outside(self, data: bytes) -> tuple[str, bytes]:
        command = shlex.split(os.environ["SPRINGHEAD_SIGNING_COMMAND"])
        half = os.environ.get("SPRINGHEAD_SIGNING_PUBLIC_KEY", "")
        if not half:
            raise BadInput("SPRINGHEAD_SIGNING_COMMAND is set: SPRINGHEAD_SIGNING_PUBLIC_KEY must name its public key")
        public = read_public_key(Path(half))
        try:
            done = subprocess.run(command, input=data, capture_output=True, timeout=_PATIENCE, check=True)
            public.verify(done.stdout, data, _ALGORITHM)
        except (OSError, subprocess.SubprocessError) as error:
            said = (getattr(error, "stderr", None) or b"").decode(errors="replace").strip()[-300:]
            raise BadInput(f"SPRINGHEAD_SIGNING_COMMAND: {command[0]} failed ({error}) {said}") from error
        except InvalidSignature:
            raise BadInput(
                f"SPRINGHEAD_SIGNING_COMMAND: what {command[0]} wrote is no ECDSA signature (DER, over SHA-256) of its "
                f"input by the key {half}"
            ) from None
        return self._trust(public, Path(half)), done.stdout

    def _trust(self, key: ec.EllipticCurvePublicKey, path: Path) -> str:
        """Returns the id of a key that is trusted, making the very first one of a repository so."""
        name = key_id(key)
        if name in self.public():
            return name
        target = self.trusted / f"{name[:16]}.pem"
        if any(self.trusted.glob("*.pem")):
            raise BadInput(
                f"{path}: its public key {name[:16]} is not trusted in this repository; have it reviewed and committed "
                f"as {target} (`openssl ec -in {shlex.quote(str(path))} -pubout -out {shlex.quote(str(target))}`), "
                "or name a trusted key by SPRINGHEAD_SIGNING_KEY"
            )
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(_pem(key))
        return name

    def untrustworthy(self) -> list[str]:
        """Returns what is wrong with the trusted keys; without them nothing can be verified."""
        try:
            return [] if self.public() else [f"{self.trusted}: no trusted key; the first signature makes one"]
        except BadInput as error:
            return [str(error)]

    def unusable(self) -> list[str]:
        """Returns what keeps the private key from signing here, without making or using one."""
        if self.external or not _there(self.private):
            return []
        found = []
        mode = self.private.stat().st_mode & 0o777
        if mode & 0o077:
            found.append(f"{self.private}: others may read it (mode {mode:04o}); `chmod 600 {self.private}`")
        try:
            own, trusted = key_id(_read_private_key(self.private).public_key()), self.public()
        except BadInput as error:
            return [*found, str(error)]
        if trusted and own not in trusted:
            found.append(f"{self.private}: its public key {own[:16]} is not in {self.trusted}; nothing can be signed")
        return found


def changed_keys(root: Path) -> list[str]:
    """Returns the trusted keys that are not as the last commit has them, where it has any.

    Before the first key is committed there is nothing to compare with: it was made on first use. The
    bytes are compared, and not what ``git status`` says, which can be told to overlook a file.

    Raises:
        BadInput: if git refuses to read the checkout: then nobody knows what was reviewed.
    """
    main = main_checkout(root)
    if not under_git(main):  # an exported tree
        return []
    try:
        committed = _committed_keys(main)
    except BadInput as error:
        raise BadInput(f"{TRUSTED}: nobody can tell whether these keys were reviewed: {error}") from error
    if committed is None:
        return []
    present = {path.relative_to(main).as_posix(): path for path in (main / TRUSTED).rglob("*.pem")}
    return sorted(
        name
        for name in committed.keys() | present.keys()
        if name not in present or not _there(present[name]) or present[name].read_bytes() != committed.get(name)
    )


def _committed_keys(main: Path) -> dict[str, bytes] | None:
    """Returns the keys of the last commit by path, or None where it has nothing in their folder."""
    if head_commit(main) is None:
        return None
    plain = {"GIT_NO_REPLACE_OBJECTS": "1"}  # a replacement would stand in for what was committed
    listed = git(main, "ls-tree", "-r", "-z", "HEAD", "--", f"./{TRUSTED}", env=plain)
    entries = [entry.split("\t", 1) for entry in listed.split("\0") if entry]
    blobs = {name: facts.split()[2] for facts, name in entries if name.endswith(".pem")}
    keys = {name: git_bytes(main, "cat-file", "blob", blob, env=plain) for name, blob in blobs.items()}
    return keys if entries else None
