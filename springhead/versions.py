"""Reading the model registry: which versions there are, what they hold, and what they really hold.

A version says by tags which model it is; :func:`content` and :func:`download` look at the bytes.
"""

import re
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit
from urllib.request import url2pathname

from springhead import signing, tracking
from springhead.errors import BadInput, Finding
from springhead.keys import Keys
from springhead.lineage.digests import files_digest, tree_files
from springhead.lineage.promotions import CHALLENGER, CHAMPION, PREVIOUS

__all__ = ["CHALLENGER", "CHAMPION", "PREVIOUS"]

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities.model_registry import ModelVersion

DIGEST, WITHIN, AT = "model.sha256", "model.within", "model.path"
_ADDED = "registered_model_meta"  # written by MLflow into what it downloads
_REFERENCE = re.compile(r"([^/@:]+)(?:@([\w-]+)|/(\d+))")
_DIGITS = re.compile(r"[0-9a-f]{8,64}")


@dataclass(frozen=True)
class Registered:
    """A version of a registered model.

    Attributes:
        name: name of the registered model.
        version: number of the version.
        digest: digest of the model folder, by the version's tag; empty if it has none.
        aliases: aliases on the version.
        tags: all tags of the version.
        stage: the DVC stage that made the model.
        path: where the model folder lies in the repository.
        within: where it lies inside what MLflow stores; ``.`` if it is all of it.
        run: the MLflow run that made it, or None.
    """

    name: str
    version: str
    digest: str
    aliases: tuple[str, ...]
    tags: dict[str, str]
    stage: str
    path: str
    within: str
    run: str | None


def aliases_of(client: "MlflowClient", name: str) -> dict[str, str]:
    """Returns the version that each alias of a registered model is on."""
    return {alias: str(version) for alias, version in client.get_registered_model(name).aliases.items()}


def stored_files(client: "MlflowClient", name: str, version: str) -> dict[str, str] | None:
    """Returns the digest of every file that MLflow really holds for a version, or None if it cannot be read.

    For a policy that is more than the model folder: the code that serves it is among them.
    """
    from mlflow.exceptions import MlflowException

    try:
        found = client.get_model_version(name, version)
        here = _local(client, found)
        if here is not None:
            files = tree_files(here)
        else:
            with tempfile.TemporaryDirectory() as temporary:
                files = tree_files(_fetch(found, Path(temporary)))
    except (MlflowException, OSError, BadInput):
        return None
    return {path: digest for path, digest in files.items() if path != _ADDED}


def content(client: "MlflowClient", name: str, version: str) -> str | None:
    """Returns the digest of the model folder that MLflow really holds for a version, or None."""
    from mlflow.exceptions import MlflowException

    files = stored_files(client, name, version)
    if files is None:
        return None
    try:
        inside = client.get_model_version(name, version).tags.get(WITHIN, ".")
    except MlflowException:
        return None
    if inside == ".":
        return files_digest(files)
    return files_digest({p[len(inside) + 1 :]: digest for p, digest in files.items() if p.startswith(f"{inside}/")})


def _local(client: "MlflowClient", version: "ModelVersion") -> Path | None:
    """Returns what a store on this machine holds for a version, which need not be copied to be digested."""
    where = str(client.get_model_version_download_uri(version.name, version.version))
    if where.startswith("models:/m-"):
        where = str(client.get_logged_model(where.removeprefix("models:/")).artifact_location)
    parts = urlsplit(where)
    if parts.scheme not in ("", "file") or parts.netloc:
        return None
    folder = Path(url2pathname(parts.path))
    return folder if folder.is_dir() else None


def local(client: "MlflowClient", version: Registered) -> Path | None:
    """Returns the folder of what MLflow holds for a version, where its store is on this machine."""
    return _local(client, client.get_model_version(version.name, version.version))


def _inside(folder: Path, version: "ModelVersion") -> Path:
    """Returns the model folder inside what MLflow stores for a version."""
    inside: Path = folder / version.tags.get(WITHIN, ".")
    if folder.resolve() not in (inside.resolve(), *inside.resolve().parents):
        raise BadInput(f"{version.name}/{version.version}: its tag {WITHIN} leads out of the model; promote it again")
    return inside


def _fetch(version: "ModelVersion", target: Path) -> Path:
    import mlflow

    source = f"models:/{version.name}/{version.version}"
    return Path(mlflow.artifacts.download_artifacts(source, dst_path=str(target)))


def download(root: Path, home: Path, ref: str, target: Path) -> Path:
    """Downloads the model folder of a registered version, checked against digest and signature.

    Args:
        root: the repository root, whose trusted keys count.
        home: the state folder.
        ref: any reference that :func:`resolve` takes and that is registered.
        target: a folder to make, or an empty one.

    Returns:
        The model folder, which is ``target`` or lies inside it.

    Raises:
        BadInput: if the reference is unknown, or the folder is not empty.
        Finding: if what MLflow holds is not the model that was signed at its promotion.
    """
    found = resolve(home, ref)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise BadInput(f"{target}: not an empty folder; name a new one to download into")
    target.mkdir(parents=True, exist_ok=True)
    version = tracking.connect(home).get_model_version(found.name, found.version)
    keys = Keys.of(root, home)
    uri = f"models:/{found.name}/{found.version}"
    summaries = [s["predicate"] for _, s in signing.statements(home, keys, found.digest) if _is_summary(s)]
    if not any(summary.get("resourceUri") == uri for summary in summaries):
        raise Finding(f"{ref}: no signed promotion says that {uri} is the model {found.digest[:12] or '(none)'}")
    folder = _inside(_fetch(version, target), version)
    signing.verify(folder, home, keys, found.digest)
    return folder


def _is_summary(statement: dict[str, Any]) -> bool:
    return bool(statement.get("predicateType") == signing.SUMMARY)


def _registered(version: "ModelVersion", aliases: dict[str, str]) -> Registered:
    tags = {str(key): str(value) for key, value in version.tags.items()}
    number = str(version.version)
    return Registered(
        name=version.name,
        version=number,
        digest=tags.get(DIGEST, ""),
        aliases=tuple(sorted(alias for alias, on in aliases.items() if on == number)),
        tags=tags,
        stage=tags.get("dvc.stage", ""),
        path=tags.get(AT, ""),
        within=tags.get(WITHIN, "."),
        run=version.run_id or None,
    )


def champions(home: Path) -> list[Registered]:
    """Returns every version that carries the alias ``champion``, by name, whoever set it.

    Raises:
        BadInput: if MLflow cannot be reached.
    """
    return [version for version in everything(home) if CHAMPION in version.aliases]


def everything(home: Path) -> list[Registered]:
    """Returns every version of every registered model, by name and number.

    Raises:
        BadInput: if MLflow cannot be reached.
    """
    if not tracking.has_store(home):
        return []
    client = tracking.connect(home)
    names = sorted(str(model.name) for model in client.search_registered_models(max_results=1000))
    aliases = {name: aliases_of(client, name) for name in names}
    found = [_registered(v, aliases[v.name]) for name in names for v in _all_of(client, name)]
    return sorted(found, key=lambda v: (v.name, int(v.version)))


def _all_of(client: "MlflowClient", name: str) -> list["ModelVersion"]:
    quoted = name.replace("'", "''")
    return list(client.search_model_versions(f"name = '{quoted}'", max_results=10_000))


def resolve(home: Path, ref: str) -> Registered:
    """Finds a registered version.

    Args:
        home: the state folder.
        ref: ``models:/NAME@ALIAS``, ``models:/NAME/VERSION``, the same without ``models:/``, or
            at least eight digits of a model's digest.

    Raises:
        BadInput: if there is no such version, or MLflow cannot be reached.
    """
    if not tracking.has_store(home):
        raise BadInput(f"{ref}: nothing is registered yet; run `springhead promote NAME`")
    client = tracking.connect(home)
    plain = ref.removeprefix("models:/")
    if _DIGITS.fullmatch(plain):
        return _by_digest(client, plain)
    match = _REFERENCE.fullmatch(plain)
    if match is None:
        raise BadInput(f"{ref}: not a reference; use models:/NAME@ALIAS, models:/NAME/VERSION or a digest")
    return _by_name(client, ref, match[1], match[2], match[3])


def _by_name(client: "MlflowClient", ref: str, name: str, alias: str | None, version: str | None) -> Registered:
    from mlflow.exceptions import MlflowException

    try:
        aliases = aliases_of(client, name)
    except MlflowException:
        known = sorted(str(model.name) for model in client.search_registered_models(max_results=1000))
        raise BadInput(f"{ref}: no registered model {name}; there are {', '.join(known) or 'none'}") from None
    if alias is not None:
        if alias not in aliases:
            raise BadInput(f"{ref}: {name} has no alias {alias}; it has {', '.join(sorted(aliases)) or 'none'}")
        version = aliases[alias]
    try:
        return _registered(client.get_model_version(name, str(version)), aliases)
    except MlflowException:
        raise BadInput(f"{ref}: {name} has no version {version}") from None


def _by_digest(client: "MlflowClient", prefix: str) -> Registered:
    versions = [
        v for v in client.search_model_versions(max_results=10_000) if v.tags.get(DIGEST, "").startswith(prefix)
    ]
    if not versions:
        raise BadInput(f"{prefix}: no registered model has this digest; run `springhead promote NAME`")
    if len({v.tags[DIGEST] for v in versions}) > 1:
        raise BadInput(f"{prefix}: several models begin like this; give more digits")
    newest = max(versions, key=lambda v: int(v.version))
    return _registered(newest, aliases_of(client, newest.name))


def versions_of(home: Path, name: str) -> list[Registered]:
    """Returns all versions of a registered model, oldest first.

    Raises:
        BadInput: if MLflow cannot be reached.
    """
    client = tracking.connect(home)
    found = sorted(client.search_model_versions(f"name = '{name}'"), key=lambda v: int(v.version))
    aliases = aliases_of(client, name) if found else {}
    return [_registered(version, aliases) for version in found]
