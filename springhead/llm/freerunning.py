"""The free-running gap: what a model's own words before it cost the reference.

At place t of an answer: the loss (nats) of the reference token after the model's own first t - 1 tokens, minus its loss
after the reference's. A model that says what the reference says has a gap of 0; teacher-forced training alone never
sees the first of the two. Places after the model has ended its answer, or a stop text has, have no such prefix and do
not count, on either side.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from springhead.errors import BadInput
from springhead.llm.evaluation import bootstrap_ratio
from springhead.llm.generation import Decoding, Key, answer_ids
from springhead.llm.packing import Example
from springhead.llm.rac import split
from springhead.llm.teacher import target_losses


@dataclass(frozen=True)
class Run:
    """One row: losses of the reference by place, whether the model said the reference's token there, and its answer."""

    gold: np.ndarray
    own: np.ndarray
    agrees: np.ndarray
    answer: tuple[int, ...]


def paired(prompt: Sequence[int], reference: Sequence[int], answer: Sequence[int]) -> tuple[Example, Example]:
    """The row twice, cut to the places with an own prefix: read as the reference has it, and as the model said it.

    Args:
        prompt: tokens before the answer.
        reference: the answer with its end sign.
        answer: the model's answer without an end sign.
    """
    places = min(len(reference), len(answer) + 1)
    ids = (*prompt, *reference[:places])
    gold = Example(ids, (False,) * len(prompt) + (True,) * places)
    # The last token is never read: nothing of the row comes after it.
    return gold, replace(gold, context=(*prompt, *answer[: places - 1], ids[-1]))


def runs(
    model: PreTrainedModel,
    examples: Sequence[Example],
    decoding: Decoding,
    ends: Sequence[int],
    pad: int,
    keys: Sequence[Key] | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> list[Run]:
    """Let the model answer and measure the reference after what it said.

    Args:
        model: left as it is.
        examples: rows with their references.
        decoding: how the model answers.
        ends: end signs.
        pad: a token to pad with.
        keys: what each row's draws are seeded by.
        tokenizer: the model's; for stop texts alone.
    """
    if decoding.stop and tokenizer is None:
        raise ValueError("stop texts need the tokenizer")
    parts = [split(example) for example in examples]
    answers = answer_ids(model, [prompt for prompt, _ in parts], decoding, ends, pad, keys, tokenizer)
    pairs = []
    for (prompt, reference), given in zip(parts, answers, strict=True):
        # The token that completed a stop text was the last one said, as an end sign is where there is one.
        before_last = given.ids[:-1] if given.finish == "stop" else given.ids
        pairs.append(paired(prompt, reference, before_last))
    losses = target_losses(model, [row for pair in pairs for row in pair])
    found = []
    for i, ((_, reference), given) in enumerate(zip(parts, answers, strict=True)):
        gold, own = losses[2 * i].numpy(), losses[2 * i + 1].numpy()
        said = [*given.ids, *([reference[-1]] if given.finish == "end" else [])]
        agrees = [t < len(said) and said[t] == reference[t] for t in range(len(gold))]
        found.append(Run(gold, own, np.array(agrees), tuple(given.ids)))
    return found


def summary(found: Sequence[Run], seed: int) -> dict[str, Any]:
    """The figures over all places of all rows.

    Returns:
        rows, places; gold and own: mean losses; gap: own - gold, with `gap_interval` (95 %, bootstrap over rows,
        each with the weight of its places); agreement: share of places where the model said the reference's token.
    """
    if not found:
        raise BadInput("no rows to measure the free-running gap on")
    gold, own, agrees = (np.concatenate([getattr(run, name) for run in found]) for name in ("gold", "own", "agrees"))
    sums = [float((run.own - run.gold).sum()) for run in found]
    return {
        "rows": len(found),
        "places": len(gold),
        "gold": float(gold.mean()),
        "own": float(own.mean()),
        "gap": float((own - gold).mean()),
        "gap_interval": list(bootstrap_ratio(sums, [len(run.gold) for run in found], seed)),
        "agreement": float(agrees.mean()),
    }


def by_place(found: Sequence[Run]) -> list[dict[str, float]]:
    """The same by place, from 0: rows that reach it, gold, own, gap and agreement."""
    table = []
    for place in range(max((len(run.gold) for run in found), default=0)):
        there = [run for run in found if len(run.gold) > place]
        gold, own = (float(np.mean([getattr(run, name)[place] for run in there])) for name in ("gold", "own"))
        agreement = float(np.mean([run.agrees[place] for run in there]))
        line = {"place": place, "rows": len(there), "gold": gold, "own": own, "gap": own - gold}
        table.append({**line, "agreement": agreement})
    return table
