"""Files that somebody else may have put there: pickles, code, links and paths that lead elsewhere."""

import ast
import json
import pickle
from pathlib import Path

import pytest

from springhead import signing
from springhead.errors import BadInput, Finding, SpringheadError
from springhead.keys import Keys
from springhead.lineage.digests import tree_digest
from tests.llm.tiny import tiny_model, tiny_tokenizer
from tests.promotable import policy

ROOT = Path(__file__).parents[2]


class Bomb:
    """Touches a file when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return (Path.touch, (self.marker,))  # type: ignore[return-value]


@pytest.fixture
def marker(tmp_path: Path) -> Path:
    return tmp_path / "the code ran"


def plant(folder: Path, marker: Path, *names: str) -> None:
    for name in names:
        (folder / name).write_bytes(pickle.dumps(Bomb(marker)))


@pytest.mark.fault("F14")
def test_the_bomb_works(tmp_path: Path, marker: Path) -> None:
    plant(tmp_path, marker, "model.pt")
    pickle.loads((tmp_path / "model.pt").read_bytes())
    assert marker.exists()


@pytest.mark.fault("F14")
def test_no_pickle_in_a_policy_folder_is_read_and_the_signature_fails(tmp_path: Path, marker: Path) -> None:
    from springhead.rl.policy import load_policy

    folder, home = tmp_path / "model", tmp_path / "home"
    policy(folder, 0)
    keys = Keys(tmp_path / "trusted-keys", home / "keys/signing.pem")
    signing.sign(folder, home, keys, signing.PROVENANCE, {})
    digest = tree_digest(folder)
    plant(folder, marker, "model.pt", "weights.pkl", "config.pkl", "__init__.py")
    load_policy(folder)
    assert not marker.exists()
    with pytest.raises(Finding, match=r"model\.pt|__init__"):
        signing.verify(folder, home, keys, digest)
    for path in folder.glob("*.safetensors"):
        plant(folder, marker, path.name)
    with pytest.raises(SpringheadError, match="safetensors"):
        load_policy(folder)
    assert not marker.exists()


@pytest.mark.fault("F14")
def test_no_pickle_and_no_code_in_a_language_model_folder_is_run(tmp_path: Path, marker: Path) -> None:
    from springhead.llm.students import load, save

    folder = tmp_path / "model"
    import torch

    save(tiny_model(), tiny_tokenizer(), folder, torch.float32)
    plant(folder, marker, "pytorch_model.bin", "model.pt", "optimizer.pt")
    (folder / "modeling_bomb.py").write_text(f"from pathlib import Path\nPath({str(marker)!r}).touch()\n")
    load(folder)
    config = json.loads((folder / "config.json").read_text())
    strange = {**config, "model_type": "bomb", "auto_map": {"AutoConfig": "modeling_bomb.Config"}}
    (folder / "config.json").write_text(json.dumps(strange))
    with pytest.raises(BadInput, match="auto_map asks for code"):
        load(folder)
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "model.safetensors").unlink()  # only pickled weights are left
    with pytest.raises(BadInput, match="safetensors"):
        load(folder)
    assert not marker.exists()


@pytest.mark.fault("F14")
@pytest.mark.fault("F24")
def test_nothing_of_ours_unpickles_or_unpacks() -> None:
    """What no code does cannot be tricked into running: no pickle is loaded, no archive is unpacked."""
    banned = {
        ("pickle", "load"), ("pickle", "loads"), ("torch", "load"), ("joblib", "load"), ("dill", "load"),
        ("shutil", "unpack_archive"), ("marshal", "loads"), ("yaml", "unsafe_load"), ("pyfunc", "load_model"),
    }  # fmt: skip
    anywhere = {"extractall", "eval", "exec", "full_load", "read_pickle"}
    files = [path for top in ("springhead", "stages", "pipelines") for path in sorted((ROOT / top).rglob("*.py"))]
    found = []
    for path in files:
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.Call):
                continue
            function = node.func
            if isinstance(function, ast.Name) and function.id in anywhere:
                found.append(f"{path}:{node.lineno}")
            if isinstance(function, ast.Attribute):
                owner = (
                    function.value.id if isinstance(function.value, ast.Name) else getattr(function.value, "attr", "")
                )
                if (owner, function.attr) in banned or function.attr in anywhere - {"eval", "exec"}:
                    found.append(f"{path}:{node.lineno}")
            if any(
                k.arg in ("allow_pickle", "trust_remote_code") and ast.unparse(k.value) == "True" for k in node.keywords
            ):
                found.append(f"{path}:{node.lineno}")
    assert len(files) > 60
    assert found == []


@pytest.mark.fault("F24")
def test_a_link_that_leads_out_of_a_model_folder_is_refused(tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "config.json").write_text("{}")
    folder = tmp_path / "model"
    policy(folder, 0)
    (folder / "inner").symlink_to(outside)
    with pytest.raises(BadInput, match="leads out of"):
        tree_digest(folder)
