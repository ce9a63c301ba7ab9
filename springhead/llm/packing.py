"""From text rows to packed token batches, with a loss weight for every token.

Rows of one batch are laid end to end in one sequence of shape (1, tokens): no padding in the linear layers. Each
row has its own position ids and attends to itself alone (see `springhead.llm.attention`). The test is that a packed
batch has the loss of its rows taken one by one; `packs` asks the same of any model at hand, because some keep a state
from token to token or shape their scores in ways of their own. Those are trained on padded batches.
"""

import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from springhead.errors import BadInput
from springhead.jsonio import read_jsonl
from springhead.llm.attention import PACKED, Layout
from springhead.llm.chat import encode_messages, messages_of
from springhead.llm.tokenizer import unknown_words

Overlong = Literal["drop", "truncate", "error"]


@dataclass(frozen=True)
class Example:
    """One row in tokens: `ids` and, for each, whether it is a target (answer and end sign) or context.

    The model may be shown something else than it is trained to say: `context`, as long as `ids`, is what it reads where
    that is not `ids` (scheduled sampling). `weight` multiplies the row's loss.
    """

    ids: tuple[int, ...]
    completion_mask: tuple[bool, ...]
    context: tuple[int, ...] = ()
    weight: float = 1.0

    @property
    def read(self) -> tuple[int, ...]:
        """The tokens that the model reads."""
        return self.context or self.ids


def read_conversations(path: Path) -> list[dict[str, Any]]:
    """The rows of a JSON-lines file of conversations; a row without an id gets its file's name and line as id.

    Raises:
        BadInput: naming file and line, if a line is no JSON object or no conversation, or there are none.
    """
    rows: list[dict[str, Any]] = []
    for number, row in enumerate(read_jsonl(path), start=1):
        try:
            messages_of(row)
        except BadInput as error:
            raise BadInput(f"{path}:{number}: {error}") from error
        rows.append({"id": f"{path.name}:{number}", **row})
    if not rows:
        raise BadInput(f"{path}: no rows; write one JSON object a line")
    return rows


def encode(row: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase, ends: Collection[str] | None = None) -> Example:
    """Tokenize one row through the tokenizer's chat template; answers and their end signs are the target.

    Args:
        row: with `messages`, or with `prompt` and `completion`.
        tokenizer: with a chat template.
        ends: the end signs; the tokenizer's own if not given.

    Raises:
        BadInput: the row is malformed, has no target, or has words the tokenizer does not know.
    """
    messages = messages_of(row)
    ids, mask = encode_messages(tokenizer, messages, [str(tokenizer.eos_token)] if ends is None else ends)
    if tokenizer.unk_token_id is not None and tokenizer.unk_token_id in ids:
        words = unknown_words(tokenizer, [m["content"] for m in messages])
        if words:
            raise BadInput(f"row {row.get('id', '(no id)')}: words outside the tokenizer's vocabulary: {words}")
    if not any(mask):
        raise BadInput(
            f"row {row.get('id', '(no id)')}: no token to train on; the chat template needs a generation block "
            "and the row an answer of the assistant"
        )
    return Example(tuple(ids), tuple(mask))


def encode_rows(
    rows: Sequence[Mapping[str, Any]],
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    overlong: Overlong,
    ends: Collection[str],
    what: str = "training",
) -> tuple[list[Example], dict[str, int]]:
    """Tokenize rows; count and treat those longer than `max_length` tokens.

    Args:
        rows: with `messages`, or with `prompt` and `completion`.
        tokenizer: with a chat template.
        max_length: longest row in tokens.
        overlong: "drop" leaves them out, "truncate" keeps their first `max_length` tokens (dropping the row
            where no target is left), "error" refuses them.
        ends: the end signs, `springhead.llm.generation.end_texts`: those that the template was checked with.
        what: what the rows are for, in messages.

    Returns:
        The examples in order, and counts: rows, tokens, targets (tokens with loss), dropped, truncated.

    Raises:
        BadInput: with "error" on the first over-long row; or nothing is left.
    """
    examples: list[Example] = []
    counts = {"rows": 0, "tokens": 0, "targets": 0, "dropped": 0, "truncated": 0}
    for row in rows:
        example = encode(row, tokenizer, ends)
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
        raise BadInput(
            f"no {what} rows left of {len(rows)} ({counts['dropped']} longer than max_length {max_length}); raise it, "
            "or give shorter rows"
        )
    counts["rows"] = len(examples)
    counts["tokens"] = sum(len(e.ids) for e in examples)
    counts["targets"] = sum(sum(e.completion_mask[1:]) for e in examples)
    return examples, counts


@dataclass(frozen=True)
class Batch:
    """Rows as the model reads them; `labels` and `weights` have shape (targets,)."""

    labels: torch.Tensor
    weights: torch.Tensor

    def logits(self, model: torch.nn.Module) -> torch.Tensor:
        """What the model predicts for the targets, (targets, words)."""
        raise NotImplementedError

    def to(self, device: torch.device) -> Self:
        """The same batch on another device."""
        moved: Self = _moved(self, device)
        return moved


def _moved(value: Any, device: torch.device) -> Any:
    """A dataclass of tensors on another device."""
    if isinstance(value, torch.Tensor):
        return value.to(device)
    return type(value)(**{f.name: _moved(getattr(value, f.name), device) for f in fields(value)})


@dataclass(frozen=True)
class Packed(Batch):
    """Rows end to end: `input_ids` and `position_ids` (1, tokens); `predictors` (targets,) are the tokens whose next
    token is trained.
    """

    input_ids: torch.Tensor
    position_ids: torch.Tensor
    layout: Layout
    predictors: torch.Tensor

    def logits(self, model: torch.nn.Module) -> torch.Tensor:
        """Of the targets alone; the model must be set to the attention `PACKED`."""
        return model(  # type: ignore[no-any-return]
            input_ids=self.input_ids,
            position_ids=self.position_ids,
            layout=self.layout,
            logits_to_keep=self.predictors,
            use_cache=False,
        ).logits[0]


@dataclass(frozen=True)
class Padded(Batch):
    """Rows below each other, padded on the right: `input_ids` and `attention_mask` (rows, longest); `predictors`
    (targets,) index the flattened grid.
    """

    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    predictors: torch.Tensor

    def logits(self, model: torch.nn.Module) -> torch.Tensor:
        """Of the targets, by the model's own attention."""
        logits = model(input_ids=self.input_ids, attention_mask=self.attention_mask, use_cache=False).logits
        return logits.flatten(0, 1).index_select(0, self.predictors)  # type: ignore[no-any-return]


def pack(examples: Sequence[Example], prompt_loss_weight: float = 0.0) -> Packed:
    """Lay rows end to end. A token's weight is the row's in the completion, `prompt_loss_weight` of it in the prompt; a
    row's first token is never a target, since nothing in its row precedes it.
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
    rows = np.repeat([e.weight for e in examples], lengths)
    weight = np.where(mask, 1.0, prompt_loss_weight) * (position > 0) * rows
    targets = np.flatnonzero(weight > 0)
    return Packed(
        labels=torch.from_numpy(ids[targets]),
        weights=torch.from_numpy(weight[targets].astype(np.float32)),
        input_ids=torch.from_numpy(np.concatenate([e.read for e in examples]))[None],
        position_ids=torch.from_numpy(position)[None],
        layout=Layout(torch.from_numpy(gather), torch.from_numpy(row * longest + position)),
        predictors=torch.from_numpy(targets - 1),
    )


def pad(examples: Sequence[Example], prompt_loss_weight: float = 0.0) -> Padded:
    """Lay rows below each other; weights as in `pack`. Any token will do as padding: nothing looks at it."""
    packed = pack(examples, prompt_loss_weight)
    scatter, layout = packed.layout.scatter, packed.layout
    longest = layout.gather.shape[1]
    mask = torch.zeros(layout.gather.numel(), dtype=torch.long)
    mask[scatter] = 1
    ids = packed.input_ids[0].index_select(0, layout.gather.reshape(-1)).view(-1, longest)
    return Padded(packed.labels, packed.weights, ids, mask.view(-1, longest), scatter[packed.predictors])


@torch.no_grad()
def packs(model: PreTrainedModel) -> bool:
    """Whether the model predicts for rows in a packed batch what it predicts for each alone.

    Two rows of made-up tokens decide it; a configuration with attention in chunks never packs. The answer is remembered
    for each configuration. Of a model whose predictions are not finite nothing can be told, and nothing is remembered;
    training stops at its first loss.
    """
    key = json.dumps(model.config.to_dict(), sort_keys=True, default=str)
    if key not in _PACKS:
        found = _probe(model)
        if found is None:
            return True
        _PACKS[key] = found
    return _PACKS[key]


_PACKS: dict[str, bool] = {}


def _probe(model: PreTrainedModel) -> bool | None:
    text = model.config.get_text_config()
    if getattr(text, "attention_chunk_size", None):
        return False  # attention in chunks; rows this short would not show it
    words = int(text.vocab_size)
    ids = np.random.default_rng(0).integers(words, size=20).tolist()
    rows = [Example(tuple(ids[:7]), (True,) * 7), Example(tuple(ids[7:]), (True,) * 13)]
    device, before, training = model.device, model.config._attn_implementation, model.training
    model.eval()
    alone = torch.cat([pad([row]).to(device).logits(model) for row in rows]).float()
    if not alone.isfinite().all():
        model.train(training)
        return None
    try:
        model.set_attn_implementation(PACKED)
        together = pack(rows).to(device).logits(model).float()
    except (BadInput, TypeError, ValueError, RuntimeError, NotImplementedError):
        return False  # the architecture has no such interface, or wants more of its attention
    finally:
        model.set_attn_implementation(before)
        model.train(training)
    if together.shape != alone.shape:
        return False
    # A row that sees its neighbour is off by as much as logits differ; rounding is far below a hundredth of it.
    return bool((together - alone).abs().max() <= 0.01 * alone.std() + 1e-6)


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
