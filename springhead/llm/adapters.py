"""LoRA adapters (Hu et al., arXiv 2106.09685) through PEFT: put on, merge, save alone.

With W the frozen weight and r the rank, a layer computes W x + (alpha / r) B A x; B begins at zero.
"""

from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import PreTrainedModel

from springhead.errors import BadInput


def with_lora(model: PreTrainedModel, rank: int, alpha: float, targets: Sequence[str], seed: int) -> torch.nn.Module:
    """Wrap a model with fresh LoRA layers; everything else is frozen.

    Args:
        model: changed in place.
        rank: r.
        alpha: the scale is alpha / r.
        targets: names of the linear layers to adapt, such as q_proj; empty: all but the output layer.
        seed: of the initial A.

    Raises:
        BadInput: the model has no layer of such a name.
    """
    from peft import LoraConfig, get_peft_model

    lora = LoraConfig(
        r=rank,
        lora_alpha=alpha,  # type: ignore[arg-type]  # peft divides by the rank, any number will do
        target_modules=list(targets) or "all-linear",
        lora_dropout=0.0,
        task_type="CAUSAL_LM",
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            adapted: torch.nn.Module = get_peft_model(model, lora)
        except ValueError as error:
            raise BadInput(f"lora_targets {list(targets)}: {error}") from error
        return adapted


def plain(model: torch.nn.Module) -> PreTrainedModel:
    """The transformers model itself, without PEFT's wrapper (LoRA layers stay in it)."""
    return model if isinstance(model, PreTrainedModel) else model.get_base_model()  # type: ignore[operator,no-any-return]


def merged(model: torch.nn.Module) -> PreTrainedModel:
    """The plain model with its LoRA updates added into the weights; a model without LoRA comes back as it is."""
    if isinstance(model, PreTrainedModel):
        return model
    return model.merge_and_unload()  # type: ignore[operator,no-any-return]


def save_adapter(model: torch.nn.Module, folder: Path) -> None:
    """Write the LoRA weights alone, as `PeftModel.from_pretrained(base, folder)` reads them."""
    for adapter in model.peft_config.values():  # type: ignore[operator,union-attr]
        adapter.base_model_name_or_path = ""  # the path of this machine is no property of an adapter
    model.save_pretrained(str(folder), safe_serialization=True)  # type: ignore[operator]
    (folder / "README.md").unlink(missing_ok=True)  # a card for the hub, of headings only
