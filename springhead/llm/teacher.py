"""What a model predicts for the targets of rows when it reads them as they are (teacher forcing)."""

from collections.abc import Iterator, Sequence
from contextlib import nullcontext

import torch
from transformers import PreTrainedModel

from springhead.llm.packing import Example, pack, packs, pad, split_by_tokens
from springhead.llm.sft import packed_attention_on


@torch.no_grad()
def target_logits(model: PreTrainedModel, examples: Sequence[Example], tokens: int = 8192) -> Iterator[torch.Tensor]:
    """The logits of each row's targets, (targets, words), row by row.

    Args:
        model: in evaluation or training mode; left as it is.
        examples: the rows; the model reads their `context` where they have one.
        tokens: read in one pass.
    """
    packed, training = packs(model), model.training
    model.eval()
    try:
        for part in split_by_tokens(examples, tokens):
            batch = (pack if packed else pad)(part).to(model.device)
            with packed_attention_on(model) if packed else nullcontext():
                logits = batch.logits(model).float()
            yield from logits.split([sum(row.completion_mask[1:]) for row in part])
    finally:
        model.train(training)


def target_losses(model: PreTrainedModel, examples: Sequence[Example], tokens: int = 8192) -> list[torch.Tensor]:
    """The loss (nats) of each row's targets, one tensor (targets,) a row."""
    losses = []
    for row, logits in zip(examples, target_logits(model, examples, tokens), strict=True):
        labels = torch.tensor(
            [token for token, trained in zip(row.ids[1:], row.completion_mask[1:], strict=True) if trained]
        )
        losses.append(torch.nn.functional.cross_entropy(logits, labels.to(logits.device), reduction="none").cpu())
    return losses
