"""MEND's two symmetry operators on a problem's statements: order permutation and redundancy.

Paper: Yao et al., "Your Language Model May Think Too Rigidly: Achieving Reasoning Consistency with
Symmetry-Enhanced Training", arXiv 2502.17800. For a problem with statements s_1..s_n, question and gold solution
a, the training set is D together with {(g(q), a)} for g in a group G of rewritings that keep the answer; the loss
is the cross-entropy of a. This file is G; the loss is the ordinary fine-tuning loss.

Deviations from the paper, each also on the page docs/methods/mend.md:
- the paper's released texts were not reachable, so the operators follow its description: shuffle the statements
  with the question kept last, and insert facts that are no ancestors of the target;
- the redundant facts come with the problem (the generator writes them) instead of being invented here;
- the gold solution is canonical (it does not follow the prompt's order), so it stays the same under G;
- RC-Aug, the paper's contrast (another topological order of the solution, same query), is `permute_chain`.

Every function is pure. A row's randomness comes from its own key (seed, problem id, purpose), so a row does not
change when other problems are added, removed or re-ordered.
"""

from __future__ import annotations

import math
from bisect import bisect
from collections.abc import Sequence

import numpy as np

from springhead.errors import BadInput
from springhead.lineage.digests import json_digest
from springhead.llm import solver
from springhead.llm.problems import Problem
from springhead.llm.textrows import Row, with_row_id

ANSWER_CUE = "Answer:"


def row_rng(seed: int, problem_id: str, purpose: str) -> np.random.Generator:
    """The generator of one row: a function of the seed, the problem and the row's purpose alone."""
    return np.random.default_rng(int(json_digest([seed, problem_id, purpose])[:16], 16))


def permute(count: int, rng: np.random.Generator, distinct_from: Sequence[Sequence[int]] = ()) -> list[int]:
    """A random order of 0..count-1, different from those given as long as another one exists."""
    taken = {tuple(order) for order in distinct_from}
    exhausted = len(taken) >= math.factorial(count)
    while True:
        order = [int(i) for i in rng.permutation(count)]
        if exhausted or tuple(order) not in taken:
            return order


def add_redundancy(problem: Problem, order: Sequence[int], count: int, rng: np.random.Generator) -> list[int]:
    """Insert `count` of the problem's redundant statements at random places of an order.

    Indices of redundant statements follow those of the needed ones. The needed statements keep their order.

    Raises:
        BadInput: the problem has fewer redundant statements.
    """
    if count > len(problem.redundant):
        raise BadInput(
            f"problem {problem.id} has {len(problem.redundant)} redundant statements, asked for {count}; "
            "raise `redundant` of llm.problems"
        )
    result = list(order)
    for choice in rng.permutation(len(problem.redundant))[:count]:
        result.insert(int(rng.integers(len(result) + 1)), len(problem.statements) + int(choice))
    return result


def arranged(problem: Problem, order: Sequence[int], redundant: Sequence[str] | None = None) -> list[str]:
    """The statements in the given order (indices into the needed, then the redundant statements).

    Raises:
        BadInput: the order leaves out or repeats a needed statement, or names one that does not exist.
    """
    extra = problem.redundant if redundant is None else redundant
    texts = [*problem.statements, *extra]
    needed = [i for i in order if 0 <= i < len(problem.statements)]
    if sorted(needed) != list(range(len(problem.statements))) or len(set(order)) != len(order):
        raise BadInput(f"problem {problem.id}: the order {list(order)} must name each needed statement once")
    if any(not 0 <= i < len(texts) for i in order):
        raise BadInput(f"problem {problem.id}: the order {list(order)} names a statement beyond {len(texts) - 1}")
    return [texts[i] for i in order]


def render(
    problem: Problem,
    order: Sequence[int] | None = None,
    redundant: Sequence[str] | None = None,
    chain: Sequence[str] | None = None,
) -> tuple[str, str]:
    """Prompt and completion.

    Args:
        problem: the problem.
        order: indices into statements followed by redundant statements; default: topological, none redundant.
        redundant: the redundant statements the order refers to; default: the problem's own.
        chain: the solution to show; default: the problem's own.

    Returns:
        The prompt ends with the question, the completion with "Answer: X"; neither begins or ends with a space,
        so whoever joins them (a chat template, a tokenizer) chooses the separator.
    """
    order = range(len(problem.statements)) if order is None else order
    prompt = " ".join([*arranged(problem, order, redundant), problem.question])
    steps = "".join(f"{step}. " for step in (problem.chain if chain is None else chain))
    return prompt, f"{steps}{ANSWER_CUE} {problem.answer}"


def kendall_tau(problem: Problem, order: Sequence[int]) -> float:
    """Kendall's tau between an order and the topological one, over the needed statements: 1 same, -1 reversed.

    Redundant statements have no place in the topological order and do not count. A single statement gives 1.
    """
    needed = [i for i in order if i < len(problem.statements)]
    pairs = len(needed) * (len(needed) - 1) // 2
    if not pairs:
        return 1.0
    before: list[int] = []
    inversions = 0
    for count, index in enumerate(needed):
        place = bisect(before, index)
        inversions += count - place
        before.insert(place, index)
    return (pairs - 2 * inversions) / pairs


def permute_chain(problem: Problem, rng: np.random.Generator) -> tuple[str, ...]:
    """RC-Aug: the gold steps in another random topological order, the answer's step last.

    A chain that allows only one order (a single path, every logic proof) comes back unchanged.
    """
    if problem.family != "dag":
        return problem.chain
    facts = solver.parse(problem.statements)
    nodes = [solver.parse_statement(text)[0] for text in problem.statements]
    waiting = list(range(len(nodes)))
    done: set[solver.Node] = set()
    order: list[int] = []
    while waiting:
        ready = [i for i in waiting if done.issuperset(facts[nodes[i]].parents)]
        chosen = ready[int(rng.integers(len(ready)))]
        waiting.remove(chosen)
        done.add(nodes[chosen])
        order.append(chosen)
    return tuple(problem.chain[i] for i in order)


OPERATORS = ("order", "redundancy", "order+redundancy")


def make_row(
    problem: Problem,
    method: str,
    operator: str,
    variant: int,
    arrangement: str,
    order: Sequence[int],
    chain: Sequence[str] | None = None,
) -> Row:
    """One text row with its id; its parent is the problem.

    `arrangement` names how the needed statements were ordered (topological, reversed, random-1, ...),
    `redundancy` counts the redundant statements shown, and `order` indexes the problem's statements followed by
    its redundant statements, so a row can be rebuilt from its problem.
    """
    prompt, completion = render(problem, order, chain=chain)
    return with_row_id(
        {
            "parents": [problem.id],
            "method": method,
            "operator": operator,
            "variant": variant,
            "arrangement": arrangement,
            "redundancy": sum(i >= len(problem.statements) for i in order),
            "order": list(order),
            "kendall_tau": kendall_tau(problem, order),
            "prompt": prompt,
            "completion": completion,
            "answer": problem.answer,
            "split": problem.split,
            "family": problem.family,
            "vocabulary": problem.vocabulary,
            "ops": problem.ops,
            "depth": problem.depth,
        }
    )


def sft_row(problem: Problem) -> Row:
    """The row of plain fine-tuning: topological order, nothing redundant."""
    return make_row(problem, "sft", "identity", 0, "topological", range(len(problem.statements)))


def mend_rows(problem: Problem, variants: int, operators: Sequence[str], redundant_max: int, seed: int) -> list[Row]:
    """The original row and `variants` rewritten ones, the operators taking turns.

    Args:
        problem: the problem.
        variants: rewritten rows per problem.
        operators: names from `OPERATORS`.
        redundant_max: a redundancy row shows 1..redundant_max redundant statements, drawn evenly.
        seed: the stage's seed; each row has a generator of its own.

    Raises:
        BadInput: an unknown operator.
    """
    unknown = sorted(set(operators) - set(OPERATORS))
    if unknown or not operators:
        raise BadInput(f"llm.generate operators: unknown or empty {unknown}; choose from {', '.join(OPERATORS)}")
    topological = list(range(len(problem.statements)))
    rows = [make_row(problem, "mend", "identity", 0, "topological", topological)]
    orders = [topological]
    for variant in range(1, variants + 1):
        operator = operators[(variant - 1) % len(operators)]
        rng = row_rng(seed, problem.id, f"mend {variant}")
        order, arrangement = topological, "topological"
        if "order" in operator:
            order, arrangement = permute(len(topological), rng, orders), "random"
            orders.append(order)
        if "redundancy" in operator:
            order = add_redundancy(problem, order, int(rng.integers(1, redundant_max + 1)), rng)
        rows.append(make_row(problem, "mend", operator, variant, arrangement, order))
    return rows


def rc_rows(problem: Problem, variants: int, seed: int) -> list[Row]:
    """RC-Aug: the plain row and `variants` rows whose solution is re-ordered, the prompt as it was."""
    topological = range(len(problem.statements))
    rows = [make_row(problem, "rc-aug", "identity", 0, "topological", topological)]
    for variant in range(1, variants + 1):
        chain = permute_chain(problem, row_rng(seed, problem.id, f"rc-aug {variant}"))
        rows.append(make_row(problem, "rc-aug", "chain-order", variant, "topological", topological, chain))
    return rows


def eval_rows(problem: Problem, random_orders: int, redundant: int, seed: int) -> list[Row]:
    """Every evaluation variant of a problem: {topological, reversed, random-1..n} x {no, `redundant`} statements.

    A problem's random orders differ from the other two and from each other as long as it has enough orders, and
    the cells with redundancy use the same orders as those without, so the two are paired.
    """
    topological = list(range(len(problem.statements)))
    orders = {"topological": topological, "reversed": topological[::-1]}
    for i in range(1, random_orders + 1):
        rng = row_rng(seed, problem.id, f"eval {i}")
        orders[f"random-{i}"] = permute(len(topological), rng, list(orders.values()))
    rows: list[Row] = []
    for count in (0, redundant) if redundant else (0,):
        for name, order in orders.items():
            operators = ["order"] * (order != topological) + ["redundancy"] * (count > 0)
            rng = row_rng(seed, problem.id, f"eval redundancy {name}")
            shown = add_redundancy(problem, order, count, rng)
            rows.append(make_row(problem, "eval", "+".join(operators) or "identity", len(rows), name, shown))
    return rows


def final_answer(text: str) -> str | None:
    """What a completion gives as its answer: the word after the first "Answer:"; None when there is none."""
    _, cue, rest = text.partition(ANSWER_CUE)
    words = rest.split()
    return words[0].rstrip(".,;") if cue and words else None


def ends_with_answer(completion: str, answer: str) -> bool:
    """Whether a completion gives this answer and nothing else: one cue, and no text after the answer.

    A gold completion must. A model's own text is graded by its first answer (`final_answer`), whatever follows.
    """
    return completion.count(ANSWER_CUE) == 1 and completion.endswith(f"{ANSWER_CUE} {answer}")


def steps_of(completion: str) -> list[str]:
    """The chain steps of a completion, without the answer."""
    body = completion.partition(ANSWER_CUE)[0]
    return [step.strip() for step in body.split(".") if step.strip()]
