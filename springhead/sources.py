"""Public data sets and packaged models, obtained by digest.

``data/sources.yaml`` names each by repository, commit, licence and sha256. A file is accepted
only with exactly those bytes, wherever it came from.
"""

import http.client
import os
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import yaml

from springhead.errors import BadInput
from springhead.home import home, repository
from springhead.lineage.digests import tree_digest
from springhead.params import Loader

CATALOGUE = "data/sources.yaml"
_TIMEOUT = 60.0  # seconds


class SourceError(BadInput):
    """A source cannot be had with the bytes that are meant; this says nothing about the data at hand."""


@dataclass(frozen=True)
class Source:
    """One public file or folder: where it comes from and which bytes are meant (a folder by its tree digest)."""

    name: str
    path: str
    origin: str
    licence: str
    sha256: str
    url: str | None = None
    package: str | None = None


def sources(root: Path | None = None) -> dict[str, Source]:
    """Reads the catalogue.

    Raises:
        BadInput: naming the entry and key that is missing.
    """
    path = (root or repository()) / CATALOGUE
    try:
        catalogue = yaml.load(path.read_text(encoding="utf-8"), Loader=Loader)
        found = {}
        for name, entry in catalogue["packages"].items():
            origin = f"package {entry['package']}"
            found[name] = Source(
                name, entry["file"], origin, entry["licence"], entry["sha256"], package=entry["package"]
            )
        for name, entry in catalogue["files"].items():
            origin = entry["repository"] + (f"@{entry['commit']}" if entry.get("commit") else "")
            found[name] = Source(name, entry["path"], origin, entry["licence"], entry["sha256"], entry.get("url"))
    except FileNotFoundError:
        raise BadInput(f"{path}: no such file; restore it with `git checkout`") from None
    except (KeyError, TypeError, AttributeError, yaml.YAMLError) as error:
        raise BadInput(f"{path}: entry is incomplete or not valid YAML: {error}") from error
    return found


def obtain(name: str, root: Path | None = None) -> Path:
    """Returns a local path to a source's file, fetching it if need be.

    Looks in the installed package, in ``$SPRINGHEAD_SOURCES``, in the state folder, and then on
    the network.

    Raises:
        BadInput: if the name is unknown.
        SourceError: if the file cannot be had, or its bytes are others.
    """
    known = sources(root)
    if name not in known:
        raise BadInput(f"{CATALOGUE}: no source '{name}'; it has {', '.join(sorted(known))}")
    return fetch(known[name], root)


def fetch(source: Source, root: Path | None = None, also: Sequence[Path] = ()) -> Path:
    """Returns a local path to a file or folder that is described rather than named; see :func:`obtain`.

    Args:
        source: what is wanted.
        root: the repository.
        also: more places that are looked at before the network.

    Raises:
        SourceError: if it cannot be had, or its bytes are others.
    """
    if source.package is not None:
        return _checked(source, _in_package(source))
    stored = home(root) / "sources" / source.path
    mirror = os.environ.get("SPRINGHEAD_SOURCES")
    for path in (*([Path(mirror) / source.path] if mirror else []), stored, *also):
        if path.exists():
            return _checked(source, path)
    if source.url is None:
        raise SourceError(
            f"source '{source.name}' is missing: take {source.path} from {source.origin} ({source.licence}) and put it "
            f"in {stored.parent}, or set SPRINGHEAD_SOURCES to a folder that holds {source.path}"
        )
    _download(source, stored)
    return stored


def _in_package(source: Source) -> Path:
    package, _, version = str(source.package).partition("==")
    try:
        distribution = metadata.distribution(package)
    except metadata.PackageNotFoundError:
        raise SourceError(f"source '{source.name}': package {package} is not installed; run `make install`") from None
    if distribution.version != version:
        raise SourceError(f"source '{source.name}': {package} {distribution.version} is installed, wanted {version}")
    return Path(str(distribution.locate_file(source.path)))


def _checked(source: Source, path: Path) -> Path:
    if not path.exists():
        raise SourceError(f"source '{source.name}': {path} is missing; run `make install` or fetch it again")
    digest = tree_digest(path)
    if digest != source.sha256:
        raise SourceError(f"source '{source.name}': {path} has sha256 {digest}, wanted {source.sha256}; replace it")
    return path


def _download(source: Source, target: Path) -> None:
    """Fetches to a temporary sibling, checks the bytes, and only then renames."""
    assert source.url is not None
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f".{target.name}.tmp-{os.getpid()}")
    try:
        with urllib.request.urlopen(source.url, timeout=_TIMEOUT) as answer, partial.open("wb") as file:
            while block := answer.read(1 << 20):
                file.write(block)
        _checked(source, partial)
        os.replace(partial, target)
    except (OSError, http.client.HTTPException, ValueError) as error:  # the last: no address
        raise SourceError(
            f"source '{source.name}': {source.url} cannot be fetched ({error}); try again later"
        ) from error
    finally:
        partial.unlink(missing_ok=True)
