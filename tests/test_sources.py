"""Sources are accepted by digest alone, wherever they come from."""

import functools
import hashlib
import http.server
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from springhead.errors import BadInput
from springhead.sources import obtain, sources

ROOT = Path(__file__).parent.parent
MIRROR = ROOT.parent / "shared" / "data"


@pytest.fixture
def repo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    good = hashlib.sha256(b"good").hexdigest()
    entry = f"licence: MIT, sha256: {good}, commit: abc"
    (tmp_path / "data").mkdir()
    (tmp_path / "dvc.yaml").write_text("stages: {}\n")
    (tmp_path / "data/sources.yaml").write_text(
        "packages: {}\nfiles:\n"
        f"  plain: {{path: a/plain.txt, repository: example.org/a, {entry}}}\n"
        f"  net: {{path: a/net.txt, repository: example.org/a, {entry}, url: 'URL'}}\n"
    )
    monkeypatch.setenv("SPRINGHEAD_HOME", str(tmp_path / "state"))
    monkeypatch.delenv("SPRINGHEAD_SOURCES", raising=False)
    return tmp_path


@pytest.fixture
def server(tmp_path: Path) -> Iterator[str]:
    folder = tmp_path / "served"
    folder.mkdir()
    (folder / "good").write_bytes(b"good")
    (folder / "bad").write_bytes(b"bad")
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as httpd:
        thread = threading.Thread(target=httpd.serve_forever, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{httpd.server_port}"
        httpd.shutdown()


@pytest.mark.unit
def test_a_missing_source_says_where_to_get_it(repo: Path) -> None:
    with pytest.raises(BadInput, match=r"take a/plain\.txt from example\.org/a@abc"):
        obtain("plain", repo)
    with pytest.raises(BadInput, match="no source 'other'; it has net, plain"):
        obtain("other", repo)


@pytest.mark.fault
def test_a_mirror_is_used_and_other_bytes_are_refused(repo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = repo / "mirror/a/plain.txt"
    file.parent.mkdir(parents=True)
    monkeypatch.setenv("SPRINGHEAD_SOURCES", str(repo / "mirror"))
    file.write_bytes(b"good")
    assert obtain("plain", repo) == file
    file.write_bytes(b"gooD")
    with pytest.raises(BadInput, match="has sha256"):
        obtain("plain", repo)


@pytest.mark.fault
def test_a_download_is_kept_only_with_the_right_bytes(repo: Path, server: str) -> None:
    catalogue = repo / "data/sources.yaml"
    text = catalogue.read_text()
    catalogue.write_text(text.replace("URL", f"{server}/bad"))
    with pytest.raises(BadInput, match="has sha256"):
        obtain("net", repo)
    assert not [p for p in (repo / "state").rglob("*") if p.is_file()]
    catalogue.write_text(text.replace("URL", f"{server}/gone"))
    with pytest.raises(BadInput, match="cannot be fetched"):
        obtain("net", repo)
    catalogue.write_text(text.replace("URL", "no-address"))
    with pytest.raises(BadInput, match="no-address cannot be fetched"):
        obtain("net", repo)
    catalogue.write_text(text.replace("URL", f"{server}/good"))
    assert obtain("net", repo).read_bytes() == b"good"


@pytest.mark.fault
def test_a_source_given_twice_is_refused(repo: Path) -> None:
    catalogue = repo / "data/sources.yaml"
    text = catalogue.read_text()
    catalogue.write_text(text + "\n".join(text.splitlines()[:1]) + "\n")
    with pytest.raises(BadInput, match=r"gives the key '.*' again, first on line 1"):
        obtain("plain", repo)


@pytest.mark.unit
def test_the_catalogue_of_the_project_is_whole() -> None:
    found = sources(ROOT)
    assert len(found) >= 13
    assert all(len(s.sha256) == 64 and s.licence for s in found.values())
    assert obtain("smollm2-135m-instruct", ROOT).stat().st_size == 98362432


@pytest.mark.unit
@pytest.mark.skipif(not MIRROR.is_dir(), reason="the folder of public data is not beside the checkout")
def test_the_public_files_are_the_ones_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPRINGHEAD_SOURCES", str(MIRROR))
    for name, source in sources(ROOT).items():
        if source.package is None:
            assert obtain(name, ROOT).is_file()
