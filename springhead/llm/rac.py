"""RAC: reference-answer-based correction, training a model to turn its own answer into the reference.

Paper: Cen et al., "Bridging the Training-Inference Gap in LLMs by Leveraging Self-Generated Tokens", arXiv 2410.14655.
A snapshot of the model answers the training prompts, y^ ~ p_old(. | x); a correction row is the prompt, that answer and
a cue, with the reference as its target:

    L(theta) = - sum_t log p_theta(y_t | x, y^, cue, y_<t) + lambda L_SFT(x -> y)

y^ and cue are context, never targets. At inference the model answers as ever (plain), or answers, is shown its answer
and the cue, and answers again (corrected); no oracle says whether the first answer was right.

Deviations, each also on docs/methods/rac.md: the paper's text was reachable in its abstract alone, so the objective is
our reading of it and cue, shares, lambda and refresh are our choices; the cue is a turn of the user in the model's own
chat template; y^ may be cut at a random token; the share of correction rows whose y^ is right already is bounded, since
a model shown its right answers alone would learn to repeat, and one shown none to change what is right.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import numpy as np
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from springhead.bounds import OutOfRange, at_least, fraction
from springhead.errors import BadInput
from springhead.llm import chat, generation
from springhead.llm.mend import final_answer
from springhead.llm.packing import Example
from springhead.llm.sft import SftConfig
from springhead.llm.tokenizer import unknown_words
from springhead.progress import Progress

METHOD = "rac"
_SHARES = 1
"""Tells the draws of which rows are corrected, and where answers are cut, from those of the answers."""
Right = Callable[[Sequence[int], Sequence[int]], bool]
"""Whether an answer (tokens without end sign) is as right as the reference (tokens)."""


@dataclass(frozen=True)
class RacConfig:
    """How correction rows are made."""

    cue: str
    """What the user says after an answer that is to be corrected; may be empty where the prompt is asked again."""
    again: bool = False
    """Whether the prompt is asked again after the cue. A small model finds facts that stand close by, as in a plain
    row; without it they stand before its own answer, farther off than it has ever looked."""
    share: float = 0.5
    """Share of the prompts that are answered and become correction rows too."""
    right_share: float = 0.2
    """Largest share of the correction rows whose answer is right already."""
    plain_weight: float = 1.0
    """Lambda: the weight of a plain row; 0 leaves plain rows out."""
    cut: Literal["full", "prefix"] = "full"
    """What is shown of an answer: all of it, or as many tokens as a draw says."""
    refresh: int = 50
    """Steps between snapshots of the model."""
    start: float = 0.0
    """Share of the steps that are plain fine-tuning, before the first snapshot."""
    temperature: float = 1.0
    """Of the answers; 0 takes the likeliest token."""
    max_new_tokens: int = 128
    """Longest answer."""
    batch_rows: int = 256
    """Answers decoded together."""

    def __post_init__(self) -> None:
        fraction(self, "share", "right_share", "start")
        at_least(1, self, "refresh", "max_new_tokens", "batch_rows")
        at_least(0, self, "temperature", "plain_weight")
        plain = self.plain_weight > 0
        checks = {
            "an empty cue needs again": self.cue != "" or self.again,
            "plain_weight 0 needs share 1 and right_share 1, or batches could stay empty": plain
            or self.share == self.right_share == 1,
            "plain_weight 0 needs start 0, since before start there are plain rows alone": plain or self.start == 0,
        }
        for rule, holds in checks.items():
            if not holds:
                raise OutOfRange(rule)

    def decoding(self, seed: int) -> generation.Decoding:
        """How a snapshot answers."""
        return generation.Decoding(self.max_new_tokens, self.batch_rows, self.temperature, seed=seed)


@dataclass(frozen=True)
class Form:
    """What the answers of a model stand in: `cue` comes between an answer and its correction, end sign first, and then
    the prompt once more where it is asked `again`.
    """

    cue: tuple[int, ...]
    again: bool
    ends: tuple[int, ...]
    pad: int

    @staticmethod
    def of(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, cue: str, again: bool = False) -> "Form":
        """The tokens that the chat template puts after an answer when the user says the cue next.

        Raises:
            BadInput: the template rewrites earlier turns, or the cue has words that the tokenizer does not know.
        """
        asked, said = [{"role": "user", "content": "1."}], "3."
        before = chat.render(tokenizer, asked, answer_next=True) + said
        turns = [*asked, {"role": "assistant", "content": said}, *([{"role": "user", "content": cue}] if cue else [])]
        whole = chat.render(tokenizer, turns, answer_next=not again)
        if not whole.startswith(before):
            raise BadInput("rac: the chat template rewrites earlier turns; choose another template")
        if words := unknown_words(tokenizer, [cue]):
            raise BadInput(f"rac cue {cue!r}: words outside the tokenizer's vocabulary: {words}")
        ids = tokenizer(whole[len(before) :], add_special_tokens=False)["input_ids"]
        pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
        return Form(tuple(ids), again, tuple(generation.end_ids(model, tokenizer)), int(pad))

    def asked_again(self, prompt: Sequence[int], answer: Sequence[int]) -> list[int]:
        """A prompt, an answer, the cue and perhaps the prompt: what a correction comes after."""
        return [*prompt, *answer, *self.cue, *(prompt if self.again else ())]


def same_answer(tokenizer: PreTrainedTokenizerBase, ends: Sequence[int]) -> Right:
    """Right is what gives the reference's final answer; for references without one, what has the same tokens."""

    def right(reference: Sequence[int], answer: Sequence[int]) -> bool:
        gold = [token for token in reference if token not in ends]
        wanted, given = (final_answer(str(tokenizer.decode(list(ids)))) for ids in (gold, answer))
        return wanted == given if wanted is not None else gold == list(answer)

    return right


def split(example: Example) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """What comes before a row's last answer, and that answer with its end sign."""
    trained = np.flatnonzero(example.completion_mask)
    breaks = np.flatnonzero(np.diff(trained) > 1)
    start = int(trained[breaks[-1] + 1] if len(breaks) else trained[0])
    return example.ids[:start], example.ids[start : int(trained[-1]) + 1]


def correction(prompt: Sequence[int], shown: Sequence[int], reference: Sequence[int], form: Form) -> Example:
    """The row that turns what is shown into the reference; the reference alone is trained."""
    context = form.asked_again(prompt, shown)
    return Example((*context, *reference), (False,) * len(context) + (True,) * len(reference))


def source(
    config: RacConfig,
    examples: Sequence[Example],
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    training: SftConfig,
    max_length: int,
    seed: int,
) -> "Rac":
    """The source of a training run's batches; corrections have at most `max_length` tokens.

    Raises:
        BadInput: prompt tokens are trained too, or the cue cannot be put into the chat template.
    """
    if training.prompt_loss_weight:
        raise BadInput(
            f"sft.prompt_loss_weight is {training.prompt_loss_weight}, and rac would train the model's own answers and "
            "the cue at that weight; set sft.prompt_loss_weight to 0, or train without rac"
        )
    form = Form.of(model, tokenizer, config.cue, config.again)
    right = same_answer(tokenizer, form.ends)
    return Rac(examples, form, right, config, training.steps, training.batch_tokens, max_length, seed)


class Rac:
    """Batches of plain rows and their corrections; a `springhead.llm.sft.Source`.

    A prompt's plain and correction row share a batch. `state` holds the place in the stream of rows, counts answers and
    right ones among them, correction rows and those that begin with a right answer, and corrections left out as
    over-long, and knows how many rows in succession have added nothing to a batch. A row that no longer fits the last
    batch before a new snapshot is answered, and counted, once more.
    """

    def __init__(
        self,
        examples: Sequence[Example],
        form: Form,
        right: Right,
        config: RacConfig,
        steps: int,
        batch_tokens: int,
        max_length: int,
        seed: int,
    ) -> None:
        names = ("row", "answered", "answered_right", "corrections", "right", "overlong", "empty")
        self.state = dict.fromkeys(names, 0)
        self._parts = [split(example) for example in examples]
        self._plain = [replace(example, weight=config.plain_weight) for example in examples]
        self._form, self._is_right, self._config = form, right, config
        self._steps, self._batch_tokens, self._max_length, self._seed = steps, batch_tokens, max_length, seed
        self._first = round(config.start * steps)

    @property
    def identity(self) -> dict[str, Any]:
        """See `Source`."""
        return {"name": "rac", **asdict(self._config), "max_length": self._max_length}

    def next_batches(self, model: PreTrainedModel, step: int) -> list[list[Example]]:
        """See `Source`."""
        corrected = step >= self._first
        count = min(self._config.refresh, self._steps - step) if corrected else self._first - step
        filled: list[list[Example]] = []
        batch: list[Example] = []
        used = 0
        while True:
            for unit in self._units(model, self._chunk(count - len(filled)), corrected):
                size = sum(len(row.ids) for row in unit)
                if batch and used + size > self._batch_tokens:
                    filled.append(batch)
                    batch, used = [], 0
                    if len(filled) == count:
                        return filled
                batch += unit
                used += size
                self._passed(unit)

    def _passed(self, unit: Sequence[Example]) -> None:
        """Goes on to the next row.

        Raises:
            BadInput: an epoch is over and none of its rows added anything, so that no batch would ever be filled.
        """
        state, rows = self.state, len(self._plain)
        state["row"] += 1
        state["empty"] = 0 if unit else state["empty"] + 1
        if state["row"] % rows == 0 and state["empty"] >= rows:
            raise BadInput("rac: all corrections are longer than max_length; raise it, or lower max_new_tokens")

    def _chunk(self, batches_left: int) -> list[int]:
        """The next rows of the stream, about as many as fill so many batches; each epoch is shuffled anew."""
        mean = sum(len(row.ids) for row in self._plain) / len(self._plain)
        size = max(8, round(batches_left * self._batch_tokens / (mean * (1 + 2 * self._config.share))))
        found: list[int] = []
        epoch, skip = divmod(self.state["row"], len(self._plain))
        while len(found) < size:
            order = np.random.default_rng([self._seed, epoch]).permutation(len(self._plain))
            found += order[skip:].tolist()
            epoch, skip = epoch + 1, 0
        return found[:size]

    def _units(self, model: PreTrainedModel, rows: Sequence[int], corrected: bool) -> Iterator[list[Example]]:
        """For each row what it adds to a batch: itself, and its correction where it gets one."""
        config, first = self._config, self.state["row"]
        # A stream of its own: that of the seed and the row alone draws the answer.
        draws = [np.random.default_rng([self._seed, first + number, _SHARES]) for number in range(len(rows))]
        asked = [n for n, draw in enumerate(draws) if draw.random() < config.share] if corrected else []
        answers = self._answers(model, [rows[n] for n in asked], [first + n for n in asked])
        shown: Mapping[int, list[int]] = dict(zip(asked, answers, strict=True))
        for number, row in enumerate(rows):
            unit = [self._plain[row]] if config.plain_weight > 0 else []
            if number in shown and (fixed := self._correction(row, shown[number], draws[number])) is not None:
                unit.append(fixed)
            yield unit

    def _answers(self, model: PreTrainedModel, rows: Sequence[int], keys: Sequence[int]) -> list[list[int]]:
        if not rows:
            return []
        prompts = [self._parts[row][0] for row in rows]
        decoding = self._config.decoding(self._seed)
        return [
            a.ids for a in generation.answer_ids(model, prompts, decoding, self._form.ends, self._form.pad, keys=keys)
        ]

    def _correction(self, row: int, answer: Sequence[int], draw: np.random.Generator) -> Example | None:
        """A row's correction; None where enough right answers are shown already, or the row would be too long."""
        config, state = self._config, self.state
        prompt, reference = self._parts[row]
        right = self._is_right(reference, answer)
        state["answered"] += 1
        state["answered_right"] += right
        if right and state["right"] + 1 > config.right_share * (state["corrections"] + 1):
            return None
        kept = int(draw.integers(1, len(answer) + 1)) if config.cut == "prefix" and answer else len(answer)
        example = correction(prompt, answer[:kept], reference, self._form)
        if len(example.ids) > self._max_length:
            state["overlong"] += 1
            return None
        state["corrections"] += 1
        state["right"] += right
        return example


@dataclass(frozen=True)
class Corrected:
    """An answer, and the answer after it was shown again with the cue."""

    first: str
    second: str


def correct(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[generation.Conversation],
    form: Form,
    decoding: generation.Decoding,
    progress: Progress | None = None,
) -> list[Corrected]:
    """Answer prompts, then answer them again with the first answer and the cue in view; both count as progress."""
    asked = [generation.prompt_ids(tokenizer, prompt) for prompt in prompts]
    first = [
        answer.ids for answer in generation.answer_ids(model, asked, decoding, form.ends, form.pad, progress=progress)
    ]
    texts = [str(tokenizer.decode(ids, skip_special_tokens=True)).strip() for ids in first]
    second = again(model, tokenizer, asked, first, form, decoding, progress)
    return [Corrected(*pair) for pair in zip(texts, second, strict=True)]


def again(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    asked: Sequence[Sequence[int]],
    shown: Sequence[Sequence[int]],
    form: Form,
    decoding: generation.Decoding,
    progress: Progress | None = None,
) -> list[str]:
    """Answer prompts with an answer and the cue in view.

    Args:
        model: The model.
        tokenizer: Its tokenizer.
        asked: Tokens of the prompts.
        shown: For each an answer, without end sign; a model that reads it copies a right one.
        form: What answer and correction stand in.
        decoding: How to answer. Numbers are drawn anew: those of the first answer would repeat a slip at its place.
        progress: Told about finished rows.
    """
    rows = [form.asked_again(prompt, answer) for prompt, answer in zip(asked, shown, strict=True)]
    keys = [f"correction {number}" for number in range(len(rows))]
    found = generation.answer_ids(model, rows, decoding, form.ends, form.pad, keys=keys, progress=progress)
    return [str(tokenizer.decode(answer.ids, skip_special_tokens=True)).strip() for answer in found]


def rates(before: Sequence[bool], after: Sequence[bool]) -> dict[str, float]:
    """What correction did to right and wrong answers.

    Returns:
        `plain` and `corrected`: shares of right answers; `wrong_to_right`: of the wrong ones, the share that became
        right; `right_to_wrong`: of the right ones, the share that became wrong (0 where there are none; the interval
        of `springhead.llm.evaluation.correction_intervals` then says that nothing is known).
    """
    pairs = list(zip(before, after, strict=True))
    if not pairs:
        raise BadInput("no answers to compare; the evaluation rows are empty")
    wrong, right = ([b for a, b in pairs if a == flag] for flag in (False, True))
    return {
        "plain": sum(before) / len(pairs),
        "corrected": sum(after) / len(pairs),
        "wrong_to_right": sum(wrong) / max(1, len(wrong)),
        "right_to_wrong": sum(not flag for flag in right) / max(1, len(right)),
    }
