"""Digests: the join key of everything."""

import hashlib
from pathlib import Path

import numpy as np
import pytest

from springhead.errors import BadInput
from springhead.jsonio import canonical, read_jsonl
from springhead.lineage.digests import arrays_digest, dependency_digest, file_digest, json_digest, tree_digest


@pytest.mark.unit
def test_a_file_has_the_digest_sha256sum_prints(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"abc")
    assert file_digest(tmp_path / "a") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert tree_digest(tmp_path / "a") == file_digest(tmp_path / "a")


@pytest.mark.unit
def test_a_folder_digest_sees_content_names_and_extra_files(tmp_path: Path) -> None:
    (tmp_path / "f" / "sub").mkdir(parents=True)
    (tmp_path / "f" / "a").write_bytes(b"1")
    (tmp_path / "f" / "sub" / "b").write_bytes(b"2")
    one, two = hashlib.sha256(b"1").hexdigest(), hashlib.sha256(b"2").hexdigest()
    first = tree_digest(tmp_path / "f")
    assert first == hashlib.sha256(f"a\0{one}\nsub/b\0{two}\n".encode()).hexdigest()
    (tmp_path / "f" / "a").rename(tmp_path / "f" / "c")
    renamed = tree_digest(tmp_path / "f")
    (tmp_path / "f" / "extra").write_bytes(b"")
    assert len({first, renamed, tree_digest(tmp_path / "f")}) == 3


@pytest.mark.unit
def test_a_link_out_of_an_artefact_is_refused(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "f").mkdir()
    (tmp_path / "f" / "link").symlink_to(tmp_path / "out", target_is_directory=True)
    with pytest.raises(BadInput, match="leads out of"):
        tree_digest(tmp_path / "f")
    with pytest.raises(BadInput, match="no such file"):
        tree_digest(tmp_path / "nothing")


@pytest.mark.unit
def test_json_and_arrays_have_one_form() -> None:
    assert json_digest({"b": 1, "a": [1.5, "é"]}) == hashlib.sha256('{"a":[1.5,"é"],"b":1}'.encode()).hexdigest()
    with pytest.raises(BadInput, match="JSON"):
        canonical({"x": float("nan")})
    a = np.arange(6, dtype=np.float32).reshape(2, 3)
    same = arrays_digest({"y": a, "x": a})
    assert same == arrays_digest({"x": a, "y": np.asfortranarray(a)})
    others = [
        {"x": a, "z": a},
        {"x": a, "y": a.astype(np.float64)},
        {"x": a, "y": a.reshape(3, 2)},
        {"x": a, "y": a + 1},
    ]
    assert same not in {arrays_digest(o) for o in others}


@pytest.mark.fault
def test_a_damaged_line_is_named(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"a": 1}\n{"a": \n')
    with pytest.raises(BadInput, match=r"rows.jsonl:2: not valid JSON"):
        list(read_jsonl(path))


@pytest.mark.fault
def test_rows_that_are_not_utf8_or_not_there_are_named(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"text": "fine"}\n' * 3 + '{"text": "Müller"}\n'.encode("latin-1"))
    with pytest.raises(BadInput, match=r"rows.jsonl:4: not valid UTF-8 .*write the file in UTF-8"):
        list(read_jsonl(path))
    with pytest.raises(BadInput, match=r"mine.jsonl: no such file; check the path"):
        list(read_jsonl(tmp_path / "mine.jsonl"))


@pytest.mark.unit
def test_bytecode_counts_in_data_and_not_in_code(tmp_path: Path) -> None:
    """Importing from a folder of code makes bytecode there, which is no change of the code; in data it is one."""
    for folder in ("springhead/rl/online", "data/models"):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "ppo.py").write_text("x = 1\n")
    before = {folder: dependency_digest(tmp_path, folder) for folder in ("springhead/rl/online", "data/models")}
    assert before["data/models"] == tree_digest(tmp_path / "data/models")
    for folder in before:
        (tmp_path / folder / "__pycache__").mkdir()
        (tmp_path / folder / "__pycache__/ppo.cpython-311.pyc").write_bytes(b"compiled")
    assert dependency_digest(tmp_path, "springhead/rl/online") == before["springhead/rl/online"]
    assert dependency_digest(tmp_path, "data/models") != before["data/models"]
    (tmp_path / "springhead/rl/online/ppo.py").write_text("x = 2\n")
    assert dependency_digest(tmp_path, "springhead/rl/online") != before["springhead/rl/online"]
    assert dependency_digest(tmp_path, "data/models/ppo.py") == tree_digest(tmp_path / "data/models/ppo.py")


@pytest.mark.unit
def test_a_link_to_a_folder_or_to_nothing_inside_an_artefact_is_refused(tmp_path: Path) -> None:
    """A link to a folder could be turned from one version to another, and the digest would stay."""
    folder = tmp_path / "data/x"
    (folder / "v1").mkdir(parents=True)
    (folder / "v1/w.bin").write_bytes(b"good")
    (folder / "same.bin").symlink_to("v1/w.bin")  # as DVC links a file to its cache
    assert tree_digest(folder)
    (folder / "current").symlink_to("v1")
    with pytest.raises(BadInput, match=r"x/current: a link to a folder; replace it by what it points to"):
        dependency_digest(tmp_path, "data/x")
    (folder / "current").unlink()
    (folder / "current").symlink_to("v3")
    with pytest.raises(BadInput, match=r"x/current: a link to nothing; replace it by what it points to"):
        tree_digest(folder)
