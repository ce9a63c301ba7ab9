"""Does a model know which facts a question needs? A linear probe of its hidden states, layer by layer.

MEND's paper (arXiv 2502.17800) shows by a linear probe that its training improves the extraction of knowledge from the
query; the target used here is the iGSM papers' "nece": is this fact needed for the question? After the whole query, the
question included, one of its facts is repeated, and a logistic regression reads the hidden state at its last token.
Needed and redundant facts are alike in form, so only a model that has related the fact to the question can tell.

    python -m springhead.llm.probe MODEL... --problems data/llm/problems/eval.jsonl --split id

Regressions are trained on some problems and judged on others; intervals are of problems. Balanced classes by weight.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from springhead.errors import BadInput, SpringheadError
from springhead.llm import chat, generation, mend, students
from springhead.llm.problems import Problem
from springhead.llm.textrows import read_rows

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Facts:
    """Repeated facts of some problems.

    Attributes:
        states: Hidden states at their last tokens, (layers, facts, width), the embeddings first.
        needed: Whether the question needs each, (facts,).
        problem: Number of each one's problem, (facts,).
    """

    states: npt.NDArray[np.float32]
    needed: npt.NDArray[np.bool_]
    problem: npt.NDArray[np.intp]


@torch.no_grad()
def collect(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, problems: Sequence[Problem], seed: int, batch: int = 64
) -> Facts:
    """Asks a model each problem once, in a random order with all redundant facts, repeating each of the facts.

    Args:
        model: Any causal model.
        tokenizer: Its tokenizer, with a chat template.
        problems: With redundant facts, or nothing can be told apart.
        seed: Of the orders.
        batch: Texts at once.

    Raises:
        BadInput: no problem has a redundant fact, or one is longer than the model's context.
    """
    context = generation.context_of(model.config)
    texts: list[list[int]] = []
    needed: list[bool] = []
    owner: list[int] = []
    for number, problem in enumerate(problems):
        facts = [*problem.statements, *problem.redundant]
        order = mend.permute(len(facts), mend.row_rng(seed, problem.id, "probe"))
        prompt = " ".join([*(facts[i] for i in order), problem.question])
        start = chat.prompt_ids(tokenizer, [{"role": "user", "content": prompt}])
        for index, fact in enumerate(facts):
            texts.append(start + tokenizer(fact, add_special_tokens=False)["input_ids"])
            needed.append(index < len(problem.statements))
            owner.append(number)
        if context is not None and (longest := max(map(len, texts[-len(facts) :]))) > context:
            raise BadInput(
                f"problem {problem.id}: {longest} tokens with a fact repeated, the model's context is {context}; "
                "remove it, or use a model with a longer context"
            )
    if all(needed):
        raise BadInput("the probe needs problems with redundant facts; raise `redundant` of llm.problems")
    model.eval()
    states: list[torch.Tensor] = [torch.empty(0)] * len(texts)
    by_length = sorted(range(len(texts)), key=lambda i: (len(texts[i]), i))
    for begin in range(0, len(texts), batch):
        chosen = by_length[begin : begin + batch]
        longest = len(texts[chosen[-1]])
        # Padded on the right: a causal model's states do not see what follows.
        ids = torch.tensor([texts[i] + [0] * (longest - len(texts[i])) for i in chosen], device=model.device)
        mask = torch.tensor([[1] * len(texts[i]) + [0] * (longest - len(texts[i])) for i in chosen])
        layers = model(
            input_ids=ids, attention_mask=mask.to(model.device), output_hidden_states=True, use_cache=False
        ).hidden_states
        for row, i in enumerate(chosen):
            states[i] = torch.stack([layer[row, len(texts[i]) - 1].float().cpu() for layer in layers])
    return Facts(torch.stack(states, dim=1).numpy(), np.array(needed), np.array(owner))


def fit(x: Floats, positive: npt.NDArray[np.bool_], strength: float = 1.0) -> Floats:
    """Weights, the intercept last, of a logistic regression with balanced classes and a quadratic penalty.

    Args:
        x: Standardised features (rows, width).
        positive: (rows,), of both classes.
        strength: Of the penalty, per row; the intercept has none.
    """
    rows = np.hstack([x, np.ones((len(x), 1))])
    share = positive.mean()
    weights = np.where(positive, 0.5 / share, 0.5 / (1 - share))
    penalty = np.full(rows.shape[1], strength / len(x))
    penalty[-1] = 0.0
    w = np.zeros(rows.shape[1])
    for _ in range(50):  # Newton's method; the loss is convex
        p = 1.0 / (1.0 + np.exp(-np.clip(rows @ w, -30, 30)))
        gradient = rows.T @ (weights * (p - positive)) / len(x) + penalty * w
        curvature = (rows * (weights * p * (1 - p))[:, None]).T @ rows / len(x) + np.diag(penalty + 1e-9)
        step = np.linalg.solve(curvature, gradient)
        w -= step
        if np.abs(step).max() < 1e-8:
            break
    return w


def auc(scores: Floats, positive: npt.NDArray[np.bool_]) -> float:
    """The chance that a positive row scores above a negative one; equal scores count half."""
    _, inverse, counts = np.unique(scores, return_inverse=True, return_counts=True)
    ranks = (np.cumsum(counts) - (counts - 1) / 2)[inverse]
    good = int(positive.sum())
    return float((ranks[positive].sum() - good * (good + 1) / 2) / (good * (len(positive) - good)))


@dataclass(frozen=True)
class Reading:
    """What a layer tells: area under the curve, its 95 % bootstrap interval over problems, and balanced accuracy."""

    layer: int
    auc: float
    low: float
    high: float
    accuracy: float


def read(facts: Facts, seed: int, train_share: float = 0.7, resamples: int = 200) -> list[Reading]:
    """Trains a probe for each layer on some problems and judges it on the others.

    Raises:
        BadInput: there are too few problems to have needed and redundant facts on both sides.
    """
    rng = np.random.default_rng(seed)
    numbers = rng.permutation(facts.problem.max() + 1)
    training = np.isin(facts.problem, numbers[: round(train_share * len(numbers))])
    if len({*facts.needed[training]}) < 2 or len({*facts.needed[~training]}) < 2:
        raise BadInput(f"{len(numbers)} problems are too few for the probe; give it more")
    owners, truth = facts.problem[~training], facts.needed[~training]
    judged = np.unique(owners)
    members = {problem: np.flatnonzero(owners == problem) for problem in judged}
    draws = [np.concatenate([members[p] for p in rng.choice(judged, len(judged))]) for _ in range(resamples)]
    found = []
    for layer, states in enumerate(facts.states.astype(np.float64)):
        mean, spread = states[training].mean(0), states[training].std(0)
        x = (states - mean) / np.where(spread > 0, spread, 1.0)
        w = fit(x[training], facts.needed[training])
        scores = x[~training] @ w[:-1] + w[-1]
        again = [auc(scores[rows], truth[rows]) for rows in draws if len({*truth[rows]}) == 2]
        low, high = np.quantile(again, [0.025, 0.975])
        right = (scores > 0) == truth
        accuracy = (right[truth].mean() + right[~truth].mean()) / 2
        found.append(Reading(layer, auc(scores, truth), float(low), float(high), float(accuracy)))
    return found


def table(models: Sequence[tuple[str, Sequence[Reading]]]) -> str:
    """A Markdown table: a row for each model, a column for each layer."""
    layers = range(max(len(readings) for _, readings in models))
    lines = ["| model | " + " | ".join(f"layer {n}" for n in layers) + " |", "|---|" + "--:|" * len(layers)]
    for name, readings in models:
        cells = [f"{one.auc:.3f} ({one.low:.3f}, {one.high:.3f})" for one in readings]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _chosen(path: Path, split: str | None) -> list[Problem]:
    """The problems of a file, or of one split of it, that have redundant facts.

    Raises:
        BadInput: there are none.
    """
    problems = [p for row in read_rows(path, {"id": str}) if (p := Problem.from_row(row)).redundant]
    if not problems:
        raise BadInput(f"{path}: no problem has redundant facts; raise `redundant` of llm.problems")
    chosen = [p for p in problems if split in (None, p.split)]
    if not chosen:
        there = ", ".join(sorted({p.split for p in problems}))
        raise BadInput(f"{path}: no problem of split {split!r} has redundant facts; those of {there} have")
    return chosen


def main(arguments: Sequence[str] | None = None) -> int:
    """Probes model folders and prints the table."""
    parser = argparse.ArgumentParser(prog="python -m springhead.llm.probe", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("models", nargs="+", type=Path, help="model folders")
    parser.add_argument("--problems", type=Path, required=True, help="JSONL of problems with redundant facts")
    parser.add_argument("--split", help="only this split")
    parser.add_argument("--count", type=int, help="the first so many problems; all if not given")
    parser.add_argument(
        "--seed",
        type=int,
        default=0,
        help="of the facts' order, the division of the problems and the intervals (%(default)s)",
    )
    parser.add_argument(
        "--device",
        default="cpu",
        choices=["cpu", "cuda", "auto"],
        help="auto takes a GPU where there is one (%(default)s)",
    )
    options = parser.parse_args(arguments)
    if options.count is not None and options.count < 1:
        parser.error(f"--count is {options.count}; use at least 1")
    if options.seed < 0:
        parser.error(f"--seed is {options.seed}; use at least 0")
    try:
        chosen = _chosen(options.problems, options.split)[: options.count]
        readings = []
        for folder in options.models:
            model, tokenizer = students.load(folder, options.device)
            readings.append((str(folder), read(collect(model, tokenizer, chosen, options.seed), options.seed)))
    except SpringheadError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    print(table(readings), end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
