"""Is a model folder safe and whole? Asked before anything of it is loaded, whoever it came from.

A model is data here: JSON, a tokenizer and safetensors. Refused by name are weights that are pickles (loading them
runs what is in them), configurations that ask for code of their own (`auto_map`), adapters (they name another model
to load), and indices that point outside the folder.
"""

from pathlib import Path
from typing import Any

from springhead.errors import BadInput
from springhead.jsonio import read_json

PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl", "*.pickle")
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
_CONFIGS = ("config.json", "tokenizer_config.json", "generation_config.json", "processor_config.json")


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a model folder, one or the shards that its index lists, in order of name.

    Raises:
        BadInput: there are none, the index points outside the folder, or a shard is missing.
    """
    if (folder / WEIGHTS).is_file():
        return [folder / WEIGHTS]
    if not (folder / INDEX).is_file():
        pickles = sorted(path.name for pattern in PICKLES for path in folder.glob(pattern))
        if pickles:
            raise BadInput(
                f"{folder}: the weights are pickles ({', '.join(pickles[:3])}), and to load a pickle is to run what is "
                "in it; get the model in safetensors"
            )
        raise BadInput(f"{folder}: no weights ({WEIGHTS} or {INDEX})")
    table = read_json(folder / INDEX)
    shards = table.get("weight_map") if isinstance(table, dict) else None
    if not isinstance(shards, dict) or not shards or not all(isinstance(name, str) for name in shards.values()):
        raise BadInput(f"{folder / INDEX}: no weight_map; get the model again")
    names = sorted(set(shards.values()))
    for name in names:
        if Path(name).name != name or not name.endswith(".safetensors"):
            raise BadInput(f"{folder / INDEX}: the shard {name!r} is no safetensors file of this folder; refused")
        if not (folder / name).is_file():
            raise BadInput(f"{folder}: the shard {name} is missing; get the model again")
    return [folder / name for name in names]


def check(folder: Path) -> None:
    """Refuse a folder that is no model, not whole, or not plain data.

    Raises:
        BadInput: naming the file and what is wrong with it.
    """
    if not (folder / "config.json").is_file() and (folder / "adapter_config.json").is_file():
        raise BadInput(f"{folder}: an adapter, not a model; merge it into its base model first")
    if not (folder / "config.json").is_file() or not (folder / "tokenizer.json").is_file():
        raise BadInput(f"{folder}: not a model folder (no config.json or tokenizer.json); run the students stage")
    if (folder / "adapter_config.json").is_file():
        raise BadInput(f"{folder}: adapter_config.json would pull in another model; merge the adapter or move it away")
    for name in _CONFIGS:
        if (folder / name).is_file():
            _no_code(folder / name, read_json(folder / name))
    weight_files(folder)


def _no_code(path: Path, value: Any) -> None:
    """Refuse `auto_map` anywhere in a configuration."""
    if isinstance(value, dict):
        if value.get("auto_map"):
            raise BadInput(
                f"{path}: auto_map asks for code that came with the model ({value['auto_map']}); it is never run. "
                "Use a model whose architecture transformers has itself"
            )
        for item in value.values():
            _no_code(path, item)
    elif isinstance(value, list):
        for item in value:
            _no_code(path, item)
