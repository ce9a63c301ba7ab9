"""A model folder from a stranger: nothing in it is run, and what is wrong is named."""

import json
import pickle
from pathlib import Path

import pytest
import torch

from springhead.errors import BadInput
from springhead.llm import model_folder, students
from tests.llm.tiny import save_tiny, tiny_model, tiny_tokenizer

pytestmark = pytest.mark.fault


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save_tiny(tmp_path / "model")


class Bomb:
    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self):
        return Path.touch, (self.mark,)


def test_pickled_weights_are_refused_and_not_opened(folder: Path, tmp_path: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb(tmp_path / "went off")))
    with pytest.raises(BadInput, match=r"the weights are pickles \(pytorch_model.bin\).*get the model in safetensors"):
        students.load(folder)
    assert not (tmp_path / "went off").exists()
    pickle.loads((folder / "pytorch_model.bin").read_bytes())
    assert (tmp_path / "went off").exists()  # so it would have


@pytest.mark.parametrize("file", ["config.json", "tokenizer_config.json"])
def test_code_that_comes_with_a_model_is_not_run(folder: Path, tmp_path: Path, file: str) -> None:
    (folder / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w').close()\nclass Evil: pass\n")
    config = json.loads((folder / file).read_text())
    wanted = "AutoModelForCausalLM" if file == "config.json" else "AutoTokenizer"
    target = "evil.Evil" if file == "config.json" else ["evil.Evil", None]
    (folder / file).write_text(json.dumps(config | {"auto_map": {wanted: target}}))
    with pytest.raises(BadInput, match=rf"{file}: auto_map asks for code that came with the model .*never run"):
        students.load(folder)
    assert not (tmp_path / "ran").exists()


def test_an_adapter_that_pulls_in_another_model_is_refused(folder: Path, tmp_path: Path) -> None:
    (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "somebody/else"}')
    with pytest.raises(BadInput, match="would pull in another model"):
        students.load(folder)
    (folder / "config.json").unlink()
    with pytest.raises(BadInput, match="an adapter, not a model; merge it"):
        students.load(folder)


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ({"weight_map": {"a": "../../secret.safetensors"}}, "is no safetensors file of this folder; refused"),
        ({"weight_map": {"a": "/etc/passwd"}}, "is no safetensors file of this folder; refused"),
        ({"weight_map": {"a": "model.bin"}}, "is no safetensors file of this folder; refused"),
        ({"weight_map": {"a": "model-2.safetensors"}}, "the shard model-2.safetensors is missing"),
        ({"weight_map": {}}, "no weight_map"),
        ([], "no weight_map"),
    ],
)
def test_an_index_that_leads_astray_is_refused(folder: Path, index: object, message: str) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(BadInput, match=message):
        students.load(folder)


def test_weights_that_are_cut_off_or_missing_are_named(folder: Path) -> None:
    weights = folder / "model.safetensors"
    data = weights.read_bytes()
    weights.write_bytes(data[: len(data) // 2])
    with pytest.raises(BadInput, match=f"{folder.name}: cannot be loaded"):
        students.load(folder)
    weights.unlink()
    with pytest.raises(BadInput, match=r"no weights \(model.safetensors or model.safetensors.index.json\)"):
        students.load(folder)


def test_a_model_in_shards_is_read_whole(tmp_path: Path) -> None:
    model = tiny_model()
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    tiny_tokenizer().save_pretrained(tmp_path)
    assert len(model_folder.weight_files(tmp_path)) > 1
    loaded, _ = students.load(tmp_path)
    for name, value in model.state_dict().items():
        assert torch.equal(value, loaded.state_dict()[name]), name
