"""BASH: batch-scheduled sampling, training on contexts in which some tokens are the model's own.

Paper: Cen et al., "Bridging the Training-Inference Gap in LLMs by Leveraging Self-Generated Tokens", arXiv 2410.14655.
With m_t ~ Bernoulli(beta) the context of a row becomes y~_t = m_t y^_t + (1 - m_t) y_t, where y^_t is a draw of an
earlier snapshot of the model; the targets stay the gold tokens:

    L(theta) = - sum_t log p_theta(y_t | x, y~_<t)

Offline: every `refresh` steps the model as it is becomes the snapshot and rewrites the rows of the next steps. Rows
and batches are those of plain fine-tuning at the same step; only what is read differs.

- one-pass: y^_t ~ p(. | x, y_<t), all positions from one teacher-forced pass;
- sequential: y^_t ~ p(. | x, y~_<t), decoded with forced tokens wherever m_t = 0.

Controls: with `refresh` 1 and one-pass it is online scheduled sampling; `tokens: uniform` puts as many uniformly drawn
tokens into a row as the one-pass draw would have changed, at random places: noise of the same rate.

Deviations, each also on docs/methods/bash.md: the paper's text was reachable in its abstract alone, so the objective is
our reading of it and beta, refresh and temperature are our choices; prompt, first token of an answer, end signs and
special tokens are never replaced (digits by option), nor is a special token put in; a share of each batch stays gold.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from springhead.llm.decoders import Decoder, decoder_for
from springhead.llm.generation import Decoding, choose, end_ids
from springhead.llm.packing import Example, batches
from springhead.llm.sft import SftConfig
from springhead.llm.teacher import target_logits

METHODS = ("bash", "bash-sequential", "noise", "scheduled")


@dataclass(frozen=True)
class BashConfig:
    """How contexts are mixed."""

    beta_from: float = 0.05
    """Share of a rewritten row's tokens that are drawn anew, at the first step after `start`."""
    beta_to: float = 0.2
    """The same at the last step; in between on a line."""
    share: float = 0.5
    """Share of the rows of a batch that are rewritten; the others stay gold."""
    refresh: int = 50
    """Steps between snapshots of the model; 1 is online scheduled sampling."""
    start: float = 0.0
    """Share of the steps that are plain fine-tuning, before the first snapshot."""
    mixing: Literal["one-pass", "sequential"] = "one-pass"
    """What the model reads before a token it draws: the gold tokens, or what was put in so far too."""
    tokens: Literal["own", "uniform"] = "own"
    """What is put in: the model's draws, or (the noise control) any tokens."""
    temperature: float = 1.0
    """Of the draws; 0 takes the likeliest token."""
    protect_digits: bool = False
    """Never to replace a token that has a digit, nor to put one in: a wrong number makes the gold target wrong."""
    batch_rows: int = 256
    """Rows decoded together (sequential)."""

    def __post_init__(self) -> None:
        checks = {
            "beta_from and beta_to must be in 0..1": 0 <= self.beta_from <= 1 and 0 <= self.beta_to <= 1,
            "share and start must be in 0..1": 0 <= self.share <= 1 and 0 <= self.start <= 1,
            "refresh and batch_rows must be at least 1": min(self.refresh, self.batch_rows) >= 1,
            "temperature must be at least 0, and finite": 0 <= self.temperature < math.inf,
            "tokens uniform goes with mixing one-pass": self.tokens == "own" or self.mixing == "one-pass",
        }
        for rule, holds in checks.items():
            if not holds:
                raise ValueError(rule)


def of_method(method: str, config: BashConfig) -> BashConfig:
    """The settings of one of `METHODS`, which share all others."""
    changes: dict[str, dict[str, Any]] = {
        "bash": {"mixing": "one-pass", "tokens": "own"},
        "bash-sequential": {"mixing": "sequential", "tokens": "own"},
        "noise": {"mixing": "one-pass", "tokens": "uniform"},
        "scheduled": {"mixing": "one-pass", "tokens": "own", "refresh": 1},
    }
    return replace(config, **changes[method])


@dataclass(frozen=True)
class Vocabulary:
    """Which tokens may be replaced and put in, (words,) each; and a token to pad with."""

    words: torch.Tensor
    pad: int

    @staticmethod
    def of(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, protect_digits: bool) -> "Vocabulary":
        """All tokens of the tokenizer but special ones, end signs and, where they are protected, those with a digit."""
        allowed = torch.zeros(int(model.config.get_text_config().vocab_size), dtype=torch.bool)
        allowed[: len(tokenizer)] = True
        allowed[[*tokenizer.all_special_ids, *end_ids(model, tokenizer)]] = False
        if protect_digits:
            texts = [tokenizer.decode([token]) for token in range(len(tokenizer))]
            allowed[[token for token, text in enumerate(texts) if any(map(str.isdigit, text))]] = False
        pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
        return Vocabulary(allowed, int(pad))

    def draw(self, logits: torch.Tensor, temperature: float, generators: Sequence[np.random.Generator]) -> list[int]:
        """A token for each row of logits, never one that may not be put in."""
        barred = logits.masked_fill(~self.words.to(logits.device), -torch.inf)
        return choose(barred, Decoding(temperature=temperature), generators)


def replaceable(example: Example, vocabulary: Vocabulary) -> np.ndarray:
    """Which tokens of a row may be replaced, (tokens,): those of an answer after its first, where they are words."""
    mask = np.array(example.completion_mask)
    after = np.concatenate([[False], mask[:-1]])
    return np.asarray(mask & after & vocabulary.words[list(example.ids)].numpy())


@dataclass
class Draft:
    """A row to rewrite: at which places to draw, with which generator, and what it reads as so far."""

    example: Example
    drawn: np.ndarray
    generator: np.random.Generator
    read: list[int]

    @property
    def changed(self) -> int:
        """How many tokens are not the gold ones."""
        return sum(a != b for a, b in zip(self.read, self.example.ids, strict=True))


def one_pass(model: PreTrainedModel, drafts: Sequence[Draft], vocabulary: Vocabulary, temperature: float) -> None:
    """Draw all places of each draft from what the model predicts after the gold tokens."""
    rows = [draft.example for draft in drafts]
    for draft, logits in zip(drafts, target_logits(model, rows), strict=True):
        targets = np.flatnonzero(draft.example.completion_mask[1:]) + 1
        chosen = np.flatnonzero(draft.drawn[targets])
        tokens = vocabulary.draw(logits[torch.from_numpy(chosen)], temperature, [draft.generator] * len(chosen))
        for place, token in zip(targets[chosen], tokens, strict=True):
            draft.read[place] = token


@torch.no_grad()
def sequential(
    model: PreTrainedModel, drafts: Sequence[Draft], vocabulary: Vocabulary, temperature: float, batch_rows: int
) -> None:
    """Draw the places of each draft one after another; what is drawn is read by the later ones."""
    training = model.training
    model.eval()
    order = sorted(range(len(drafts)), key=lambda i: (-int(drafts[i].drawn.argmax()), i))
    try:
        for start in range(0, len(order), batch_rows):
            chosen = [drafts[i] for i in order[start : start + batch_rows]]
            prompts = [draft.read[: int(draft.drawn.argmax())] for draft in chosen]
            with decoder_for(model, prompts, vocabulary.pad) as decoder:
                _decode(decoder, chosen, vocabulary, temperature)
    finally:
        model.train(training)


def _decode(decoder: Decoder, drafts: Sequence[Draft], vocabulary: Vocabulary, temperature: float) -> None:
    """Draw where a draft says so and force its gold token elsewhere, up to its last place."""
    live = list(drafts)
    places = {id(draft): int(draft.drawn.argmax()) for draft in drafts}
    last = {id(draft): int(np.flatnonzero(draft.drawn)[-1]) for draft in drafts}
    logits = decoder.prefill()
    while True:
        free = [i for i, draft in enumerate(live) if draft.drawn[places[id(draft)]]]
        if free:
            tokens = vocabulary.draw(logits[free].float(), temperature, [live[i].generator for i in free])
            for i, token in zip(free, tokens, strict=True):
                live[i].read[places[id(live[i])]] = token
        kept = [i for i, draft in enumerate(live) if places[id(draft)] < last[id(draft)]]
        if not kept:
            return
        if len(kept) < len(live):
            live = [live[i] for i in decoder.keep(kept)]
        logits = decoder.step([draft.read[places[id(draft)]] for draft in live])
        for draft in live:
            places[id(draft)] += 1


def uniform(model: PreTrainedModel, drafts: Sequence[Draft], vocabulary: Vocabulary, temperature: float) -> None:
    """The noise control: as many changed tokens in each draft as `one_pass` makes, any tokens at any free places."""
    one_pass(model, drafts, vocabulary, temperature)
    words = np.flatnonzero(vocabulary.words.numpy())
    for draft in drafts:
        count = draft.changed
        draft.read[:] = draft.example.ids
        free = np.flatnonzero(replaceable(draft.example, vocabulary))
        for place in draft.generator.permutation(free)[:count]:
            others = words[words != draft.example.ids[place]]
            draft.read[place] = int(others[int(draft.generator.integers(len(others)))])


def source(
    config: BashConfig,
    examples: Sequence[Example],
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    training: SftConfig,
    seed: int,
) -> "Bash":
    """The source of a training run's batches."""
    vocabulary = Vocabulary.of(model, tokenizer, config.protect_digits)
    return Bash(examples, vocabulary, config, training.steps, training.batch_tokens, seed)


class Bash:
    """The batches of plain fine-tuning with mixed contexts; a `springhead.llm.sft.Source`.

    `state` counts rows seen, rows rewritten, tokens drawn and tokens that came out different from the gold ones.
    """

    def __init__(
        self,
        examples: Sequence[Example],
        vocabulary: Vocabulary,
        config: BashConfig,
        steps: int,
        batch_tokens: int,
        seed: int,
    ) -> None:
        self.state = {"rows": 0, "rewritten": 0, "drawn": 0, "changed": 0}
        self._examples, self._vocabulary, self._config = examples, vocabulary, config
        self._steps, self._batch_tokens, self._seed = steps, batch_tokens, seed
        self._first = round(config.start * steps)
        self._order: Iterator[list[int]] = iter(())
        self._next: int | None = None

    @property
    def identity(self) -> dict[str, Any]:
        """See `Source`."""
        return {"name": "bash", **asdict(self._config)}

    def beta(self, step: int) -> float:
        """The share of tokens drawn anew at a step from `start` on."""
        config = self._config
        done = (step - self._first) / max(1, self._steps - 1 - self._first)
        return config.beta_from + (config.beta_to - config.beta_from) * done

    def next_batches(self, model: PreTrainedModel, step: int) -> list[list[Example]]:
        """See `Source`."""
        count = self._first - step if step < self._first else min(self._config.refresh, self._steps - step)
        chosen = [[self._examples[i] for i in rows] for rows in self._batches(step, count)]
        self.state["rows"] += sum(map(len, chosen))
        if step < self._first:
            return chosen
        drafts: dict[tuple[int, int], Draft] = {}
        for number, rows in enumerate(chosen):
            for place, example in enumerate(rows):
                generator = np.random.default_rng([self._seed, step + number, place])
                if generator.random() < self._config.share:
                    drawn = generator.random(len(example.ids)) < self.beta(step + number)
                    drawn &= replaceable(example, self._vocabulary)
                    drafts[number, place] = Draft(example, drawn, generator, list(example.ids))
        self._rewrite(model, [draft for draft in drafts.values() if draft.drawn.any()])
        for (number, place), draft in drafts.items():
            self.state["rewritten"] += 1
            self.state["drawn"] += int(draft.drawn.sum())
            self.state["changed"] += draft.changed
            chosen[number][place] = replace(draft.example, context=tuple(draft.read))
        return chosen

    def _batches(self, step: int, count: int) -> list[list[int]]:
        """The rows of `count` steps of plain fine-tuning."""
        if self._next != step:
            self._order = batches([len(e.ids) for e in self._examples], self._batch_tokens, self._seed)
            for _ in range(step):
                next(self._order)
        self._next = step + count
        return [next(self._order) for _ in range(count)]

    def _rewrite(self, model: PreTrainedModel, drafts: Sequence[Draft]) -> None:
        config = self._config
        if not drafts:
            return
        if config.tokens == "uniform":
            uniform(model, drafts, self._vocabulary, config.temperature)
        elif config.mixing == "sequential":
            sequential(model, drafts, self._vocabulary, config.temperature, config.batch_rows)
        else:
            one_pass(model, drafts, self._vocabulary, config.temperature)
