"""From text rows to packed token batches, with a loss weight for every token.

Rows of one batch are laid end to end in one sequence of shape (1, tokens): no padding in the linear layers. Each
row has its own position ids and attends to itself alone; `packed_attention` does that through transformers'
attention interface, so every model of the library that uses the interface (Llama, Qwen, Mistral, ...) packs
without a change. The test is that a packed batch has the loss of its rows taken one by one.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from transformers import AttentionInterface, PreTrainedTokenizerBase

from springhead.errors import BadInput
from springhead.llm.tokenizer import unknown_words

PACKED = "springhead_packed"
"""Name of the attention implementation a model must be set to while it reads packed batches."""

Overlong = Literal["drop", "truncate", "error"]


@dataclass(frozen=True)
class Example:
    """One row in tokens: `ids` and, for each, whether it is a target (answer and end sign) or context."""

    ids: tuple[int, ...]
    completion_mask: tuple[bool, ...]


def messages_of(row: Mapping[str, Any]) -> list[dict[str, str]]:
    """A row's conversation: its `messages`, or its `prompt` and `completion` as user and assistant.

    Raises:
        BadInput: the row has neither (the message names it).
    """
    messages = row.get("messages")
    if messages is None and {"prompt", "completion"} <= set(row):
        messages = [
            {"role": "user", "content": row["prompt"]},
            {"role": "assistant", "content": row["completion"]},
        ]
    if not messages or not all(isinstance(m, Mapping) and {"role", "content"} <= set(m) for m in messages):
        raise BadInput(
            f"row {row.get('id', '(no id)')}: needs 'messages' (each with role and content) "
            "or 'prompt' and 'completion'"
        )
    return list(messages)


def encode(row: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase) -> Example:
    """Tokenize one row through the tokenizer's chat template; the template's generation block is the target.

    Raises:
        BadInput: the row is malformed, has no target, or has words the tokenizer does not know.
    """
    encoded = tokenizer.apply_chat_template(
        messages_of(row), tokenize=True, return_dict=True, return_assistant_tokens_mask=True
    )
    ids, mask = encoded["input_ids"], [bool(flag) for flag in encoded["assistant_masks"]]
    if tokenizer.unk_token_id is not None and tokenizer.unk_token_id in ids:
        words = unknown_words(tokenizer, [m["content"] for m in messages_of(row)])
        if words:
            raise BadInput(f"row {row.get('id', '(no id)')}: words outside the tokenizer's vocabulary: {words}")
    if not any(mask):
        raise BadInput(
            f"row {row.get('id', '(no id)')}: no token to train on; the chat template needs a generation block "
            "and the row an answer of the assistant"
        )
    return Example(tuple(ids), tuple(mask))


def encode_rows(
    rows: Sequence[Mapping[str, Any]], tokenizer: PreTrainedTokenizerBase, max_length: int, overlong: Overlong
) -> tuple[list[Example], dict[str, int]]:
    """Tokenize rows; count and treat those longer than `max_length` tokens.

    Args:
        rows: with `messages`, or with `prompt` and `completion`.
        tokenizer: with a chat template that has a generation block.
        max_length: longest row in tokens.
        overlong: "drop" leaves them out, "truncate" keeps their first `max_length` tokens (dropping the row
            where no target is left), "error" refuses them.

    Returns:
        The examples in order, and counts: rows, tokens, targets (tokens with loss), dropped, truncated.

    Raises:
        BadInput: with "error" on the first over-long row; or nothing is left.
    """
    examples: list[Example] = []
    counts = {"rows": 0, "tokens": 0, "targets": 0, "dropped": 0, "truncated": 0}
    for row in rows:
        example = encode(row, tokenizer)
        if len(example.ids) > max_length:
            if overlong == "error":
                raise BadInput(
                    f"row {row.get('id', '(no id)')}: {len(example.ids)} tokens, max_length is {max_length}; "
                    "raise it, or set overlong to drop or truncate"
                )
            cut = Example(example.ids[:max_length], example.completion_mask[:max_length])
            if overlong == "drop" or not any(cut.completion_mask[1:]):
                counts["dropped"] += 1
                continue
            counts["truncated"] += 1
            example = cut
        examples.append(example)
    if not examples:
        raise BadInput(f"no training rows left of {len(rows)} ({counts['dropped']} over-long); raise max_length")
    counts["rows"] = len(examples)
    counts["tokens"] = sum(len(e.ids) for e in examples)
    counts["targets"] = sum(sum(e.completion_mask[1:]) for e in examples)
    return examples, counts


@dataclass(frozen=True)
class Layout:
    """Where the rows of a packed sequence lie.

    `gather` has shape (rows, longest): the packed index of each token of each row, 0 beyond a row's end.
    `scatter` has shape (tokens,): the index of each packed token in the flattened (rows, longest) grid.
    """

    gather: torch.Tensor
    scatter: torch.Tensor


@dataclass(frozen=True)
class Packed:
    """A packed batch: `input_ids` and `position_ids` (1, tokens); for the tokens `predictors` (targets,), whose
    next token is trained, the `labels` (targets,) and `weights` (targets,).
    """

    input_ids: torch.Tensor
    position_ids: torch.Tensor
    layout: Layout
    predictors: torch.Tensor
    labels: torch.Tensor
    weights: torch.Tensor

    def to(self, device: torch.device) -> "Packed":
        """The same batch on another device."""
        layout = Layout(self.layout.gather.to(device), self.layout.scatter.to(device))
        others = (self.predictors, self.labels, self.weights)
        moved = [tensor.to(device) for tensor in others]
        return Packed(self.input_ids.to(device), self.position_ids.to(device), layout, *moved)


def pack(examples: Sequence[Example], prompt_loss_weight: float = 0.0) -> Packed:
    """Lay rows end to end. A token's weight is 1 in the completion, `prompt_loss_weight` in the prompt; a row's
    first token is never a target, since nothing in its row precedes it.
    """
    lengths = np.array([len(e.ids) for e in examples])
    starts = np.concatenate([[0], np.cumsum(lengths)[:-1]])
    longest, total = int(lengths.max()), int(lengths.sum())
    row = np.repeat(np.arange(len(examples)), lengths)
    position = np.arange(total) - starts[row]
    column = np.arange(longest)[None, :]
    gather = np.where(column < lengths[:, None], starts[:, None] + column, 0)
    ids = np.concatenate([e.ids for e in examples])
    mask = np.concatenate([e.completion_mask for e in examples])
    weight = np.where(mask, 1.0, prompt_loss_weight) * (position > 0)
    targets = np.flatnonzero(weight > 0)
    return Packed(
        input_ids=torch.from_numpy(ids)[None],
        position_ids=torch.from_numpy(position)[None],
        layout=Layout(torch.from_numpy(gather), torch.from_numpy(row * longest + position)),
        predictors=torch.from_numpy(targets - 1),
        labels=torch.from_numpy(ids[targets]),
        weights=torch.from_numpy(weight[targets].astype(np.float32)),
    )


def packed_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    layout: Layout | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Causal attention inside each row of a packed sequence.

    Rows are gathered to (rows, heads, longest, head_dim) for the attention alone. Padding is on the right, so
    the causal mask already keeps it away from real tokens and no mask tensor is needed.

    Args:
        module: the attention layer that asks; unused.
        query: (1, heads, tokens, head_dim).
        key: like the query, perhaps with fewer heads (grouped queries).
        value: like the key.
        attention_mask: always None; the layout says what attends to what.
        scaling: factor of the scores; None for 1 / sqrt(head_dim).
        dropout: share of attention weights dropped in training.
        layout: where the rows lie; the model hands it down from its own arguments.

    Returns:
        (1, tokens, heads, head_dim), and None for the weights, as the attention interface wants.
    """
    if layout is None:
        raise BadInput(f"attention {PACKED!r} needs the batch's layout; pass layout=packed.layout to the model")
    rows, longest = layout.gather.shape
    flat = layout.gather.reshape(-1)

    def spread(tensor: torch.Tensor) -> torch.Tensor:
        grid = tensor[0].transpose(0, 1).index_select(0, flat)
        return grid.view(rows, longest, *grid.shape[1:]).transpose(1, 2)

    groups = query.shape[1] // key.shape[1]
    q, k, v = spread(query), spread(key), spread(value)
    if groups > 1:
        k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
    out = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scaling, dropout_p=dropout)
    out = out.transpose(1, 2).reshape(rows * longest, *query.shape[1::2])
    return out.index_select(0, layout.scatter)[None], None


AttentionInterface.register(PACKED, packed_attention)


def batches(lengths: Sequence[int], batch_tokens: int, seed: int) -> Iterator[list[int]]:
    """Endless batches of row indices: shuffled anew each epoch, as many rows as fit `batch_tokens`, at least one.

    A pure function of its arguments, so a resumed run skips to its step and goes on with the same batches. Rows
    of two epochs may share a batch: no batch is short.
    """
    batch: list[int] = []
    used, epoch = 0, 0
    while True:
        for index in np.random.default_rng([seed, epoch]).permutation(len(lengths)).tolist():
            if batch and used + lengths[index] > batch_tokens:
                yield batch
                batch, used = [], 0
            batch.append(index)
            used += lengths[index]
        epoch += 1


def split_by_tokens(examples: Sequence[Example], micro_tokens: int) -> list[list[Example]]:
    """Cut a batch into consecutive parts of at most `micro_tokens` tokens (one row at least each)."""
    parts: list[list[Example]] = []
    used = 0
    for example in examples:
        if not parts or used + len(example.ids) > micro_tokens:
            parts.append([])
            used = 0
        parts[-1].append(example)
        used += len(example.ids)
    return parts
