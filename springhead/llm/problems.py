"""Word problems drawn from random graphs of facts, in the spirit of iGSM.

A problem is a directed acyclic graph. Each node is "how many ITEMS a HOLDER has"; a leaf states a number,
an inner node states an operation on one or two other nodes. The text is one short sentence per node, so the
statements may be re-ordered freely; that symmetry is what MEND (arXiv 2502.17800) trains on.

Choices of ours, against the iGSM generator that paper uses: no category tree and no modulo arithmetic (every
number stays in 1..max_value), one sentence form per operation, and a canonical solution: the chain visits the
graph in post-order from the question (first-mentioned operand first). The chain therefore depends on the facts
alone and never on the order in which a prompt lists them, so it is a learnable target for every order.

Train and evaluation never share a problem: each expression (graph with its numbers, names removed) belongs to
one side by its digest, so a permuted or renamed copy of a training problem cannot appear in an evaluation split.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from springhead.errors import BadInput
from springhead.lineage.digests import json_digest
from springhead.llm import solver
from springhead.llm.spec import OPERATORS as OPERATORS
from springhead.llm.spec import TRAIN as TRAIN
from springhead.llm.spec import ProblemSpec as ProblemSpec
from springhead.llm.worlds import Vocabulary, vocabularies
from springhead.llm.worlds import lexicon as lexicon

_FRUITLESS_TRIES = 5000
_TRIES_PER_SIZE = 40


@dataclass(frozen=True)
class Problem:
    """One problem: its facts, its question and its gold solution.

    `statements` are the facts the answer needs, in topological order; `redundant` are true facts it does not
    need. `chain` is the gold solution, one step per statement needed, the last one giving the answer.
    """

    id: str
    parents: tuple[str, ...]
    family: str
    vocabulary: str
    ops: int
    depth: int
    statements: tuple[str, ...]
    redundant: tuple[str, ...]
    question: str
    chain: tuple[str, ...]
    answer: str
    split: str

    def to_row(self) -> dict[str, Any]:
        """The JSON row of this problem, `id` included."""
        row = _content(self)
        row["id"] = self.id
        return row

    @staticmethod
    def from_row(row: Mapping[str, Any]) -> Problem:
        """Read a problem back from its JSON row.

        Raises:
            BadInput: a field is missing, unknown or of a wrong type, or the id is not the digest of the content.
        """
        fields = set(Problem.__dataclass_fields__)
        wrong = sorted(fields.symmetric_difference(row))
        if wrong:
            name = row.get("id", "(no id)")
            raise BadInput(f"problem {name}: missing or unknown fields {wrong}; re-run the problems stage")
        values = dict(row)
        for name, field in Problem.__dataclass_fields__.items():
            value, kind = row[name], str(field.type)
            if not _fits(value, kind):
                needed = {"int": "a whole number", "str": "a text"}.get(kind, "a list of texts")
                raise BadInput(
                    f"problem {row['id']}: {name!r} must be {needed}, found {value!r}; re-run the problems stage"
                )
            values[name] = tuple(value) if isinstance(value, list) else value
        problem = Problem(**values)
        if json_digest(_content(problem)) != problem.id:
            raise BadInput(f"problem {problem.id}: its content was changed; re-run the problems stage")
        return problem


def _fits(value: Any, kind: str) -> bool:
    """Whether a JSON value is of the type that a field of `Problem` is annotated with."""
    if kind == "int":
        return isinstance(value, int) and not isinstance(value, bool)
    if kind == "str":
        return isinstance(value, str)
    return isinstance(value, list) and all(isinstance(item, str) for item in value)


def _content(problem: Problem) -> dict[str, Any]:
    names = [name for name in Problem.__dataclass_fields__ if name != "id"]
    values = {name: getattr(problem, name) for name in names}
    return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}


def with_id(**fields: Any) -> Problem:
    """Build a problem whose id is the digest of all its other fields."""
    draft = Problem(id="", **fields)
    return Problem(id=json_digest(_content(draft)), **fields)


@dataclass(frozen=True)
class _Node:
    """Kind is "constant" or an operator; `number` is the stated number (0 for a sum); `parents` are node indices."""

    kind: str
    number: int
    parents: tuple[int, ...]
    value: int


def generate(count: int, seed: int, spec: ProblemSpec) -> list[Problem]:
    """Draw `count` different problems.

    The first n problems of a longer list equal the list of length n with the same seed and spec. No two
    problems have the same facts and question, in whatever order.

    Raises:
        BadInput: the spec does not allow that many different problems.
    """
    rng = np.random.default_rng(seed)
    found: list[Problem] = []
    seen: set[str] = set()
    fruitless = 0
    while len(found) < count:
        fruitless += 1
        if fruitless > _FRUITLESS_TRIES:
            raise BadInput(
                f"llm.problems: found only {len(found)} of {count} different problems for split {spec.split!r} "
                f"(ops {spec.ops_min}..{spec.ops_max}, depth {spec.depth_min}..{spec.depth_max}, "
                f"values up to {spec.max_value}); widen these or ask for fewer"
            )
        problem = _draw(rng, spec)
        if problem is not None and (key := facts_key(problem)) not in seen:
            seen.add(key)
            found.append(problem)
            fruitless = 0
    return found


def facts_key(problem: Problem) -> str:
    """Digest of the needed facts and the question, whatever their order: equal for permuted copies."""
    return json_digest([sorted(problem.statements), problem.question])


def side_of(signature: str, holdout: float) -> str:
    """Return "eval" for a share `holdout` of all signatures, else "train"; depends on the signature alone."""
    return "eval" if int(signature[:13], 16) / 16**13 < holdout else TRAIN


def _draw(rng: np.random.Generator, spec: ProblemSpec) -> Problem | None:
    """One attempt; None when the drawn graph breaks a bound or belongs to the other side."""
    world = vocabularies()[spec.vocabularies[int(rng.integers(len(spec.vocabularies)))]]
    nodes = _draw_graph(rng, spec)
    if nodes is None:
        return None
    labels = _draw_labels(rng, spec, world, len(nodes) + spec.redundant)
    statements = tuple(_sentence(world, node, labels, i) for i, node in enumerate(nodes))
    holder, item = labels[len(nodes) - 1]
    question = f"How many {item} does {holder} {world.base}?"
    signature = solver.signature(statements, question)
    if side_of(signature, spec.holdout) != (TRAIN if spec.split == TRAIN else "eval"):
        return None
    extra = [_redundant_node(rng, spec, nodes) for _ in range(spec.redundant)]
    mixed = spec.items > 1
    return with_id(
        parents=(),
        family="dag",
        vocabulary=world.name,
        ops=sum(node.kind != "constant" for node in nodes),
        depth=_depths(nodes)[-1],
        statements=statements,
        redundant=tuple(_sentence(world, node, labels, len(nodes) + i) for i, node in enumerate(extra)),
        question=question,
        chain=tuple(_step(node, nodes, labels[i], mixed) for i, node in enumerate(nodes)),
        answer=str(nodes[-1].value),
        split=spec.split,
    )


def _draw_graph(rng: np.random.Generator, spec: ProblemSpec) -> list[_Node] | None:
    ops = int(rng.integers(spec.ops_min, spec.ops_max + 1))
    deepest = min(spec.depth_max, ops)
    # Two operations cannot both be the target, so the depth is 1 only where there is one operation.
    least = min(max(spec.depth_min, 2), ops)
    depth = int(rng.integers(least, max(least, deepest) + 1)) if "sum" in spec.operators else ops
    # Long chains break the bounds more often. Several tries at one size keep the sizes evenly spread.
    for _ in range(_TRIES_PER_SIZE):
        nodes = _fill(rng, spec, _draw_edges(rng, spec, ops, depth))
        if nodes is not None:
            return _post_order(nodes)
    return None


def _fill(rng: np.random.Generator, spec: ProblemSpec, edges: list[list[int]] | None) -> list[_Node] | None:
    """Operations and numbers for a graph; None where a number would leave its bounds."""
    nodes: list[_Node] = []
    for parents in edges or ():
        node = _draw_node(rng, spec, nodes, parents)
        if node is None:
            return None
        nodes.append(node)
    return nodes or None


def _draw_edges(rng: np.random.Generator, spec: ProblemSpec, ops: int, depth: int) -> list[list[int]] | None:
    """Operands of each node, leaves first; the last node is the target and depends on every other one.

    Every operation takes one operand from the level below it, which fixes the depth. A node nobody uses then becomes
    the second operand of a random operation above it, which turns that operation into a sum.
    """
    share = 1.0 / len(spec.operators) if "sum" in spec.operators else 0.0
    leaves = 1 + int(rng.binomial(ops, share)) if share else 1
    between = np.sort(rng.integers(1, max(depth, 2), size=ops - depth)).tolist()
    levels = [0] * leaves + sorted([*range(1, depth + 1), *between])
    total = leaves + ops
    edges: list[list[int]] = [[] for _ in range(total)]
    used = [False] * (total - 1) + [True]
    for node in range(leaves, total):
        below = [i for i in range(node) if levels[i] == levels[node] - 1]
        fresh = [i for i in below if not used[i]] or below
        first = fresh[int(rng.integers(len(fresh)))]
        edges[node] = [first]
        used[first] = True
    for unused in [i for i in range(total) if not used[i]]:
        free = [n for n in range(leaves, total) if len(edges[n]) == 1 and levels[n] > levels[unused]]
        if not free or not share:
            return None
        edges[free[int(rng.integers(len(free)))]].append(unused)
    for node in range(leaves, total):
        _maybe_sum(rng, edges, levels, node, share)
    return edges


def _maybe_sum(rng: np.random.Generator, edges: list[list[int]], levels: list[int], node: int, share: float) -> None:
    """Give a one-operand operation a second, already used operand now and then; shuffle the two operands."""
    lower = [i for i in range(node) if levels[i] < levels[node] and i not in edges[node]]
    if len(edges[node]) == 1 and lower and rng.random() < share / 2:
        edges[node].append(lower[int(rng.integers(len(lower)))])
    if len(edges[node]) == 2 and rng.random() < 0.5:
        edges[node].reverse()


def _draw_node(
    rng: np.random.Generator, spec: ProblemSpec, nodes: Sequence[_Node], parents: Sequence[int]
) -> _Node | None:
    if not parents:
        number = int(rng.integers(2, spec.max_constant + 1))
        return _Node("constant", number, (), number)
    values = [nodes[i].value for i in parents]
    if len(values) == 2:
        total = sum(values)
        return _Node("sum", 0, tuple(parents), total) if total <= spec.max_value else None
    limits = {
        "more": min(spec.max_step, spec.max_value - values[0]),
        "fewer": min(spec.max_step, values[0] - 1),
        "times": min(spec.max_factor, spec.max_value // values[0]),
    }
    # The smallest stated number is 2, so that every item stays in the plural.
    kinds = [kind for kind in spec.operators if kind != "sum" and limits[kind] >= 2]
    if not kinds:
        return None
    kind = kinds[int(rng.integers(len(kinds)))]
    number = int(rng.integers(2, limits[kind] + 1))
    return _Node(kind, number, tuple(parents), solver.apply(kind, number, values))


def _redundant_node(rng: np.random.Generator, spec: ProblemSpec, nodes: Sequence[_Node]) -> _Node:
    """A node that the target does not depend on. It may refer to a node of the problem, never to another
    redundant node, so that any subset of the redundant statements still makes a complete text.
    """
    if rng.random() < spec.redundant_linked:
        linked = _draw_node(rng, spec, nodes, [int(rng.integers(len(nodes)))])
        if linked is not None:
            return linked
    number = int(rng.integers(2, spec.max_constant + 1))
    return _Node("constant", number, (), number)


def _post_order(nodes: Sequence[_Node]) -> list[_Node]:
    """The nodes in the order in which a solver that starts at the target finishes them."""
    position: dict[int, int] = {}

    def visit(index: int) -> None:
        if index not in position:
            for parent in nodes[index].parents:
                visit(parent)
            position[index] = len(position)

    visit(len(nodes) - 1)
    ordered = sorted(position, key=lambda index: position[index])
    return [
        _Node(n.kind, n.number, tuple(position[p] for p in n.parents), n.value)
        for n in (nodes[index] for index in ordered)
    ]


def _depths(nodes: Sequence[_Node]) -> list[int]:
    depths: list[int] = []
    for node in nodes:
        depths.append(1 + max(depths[p] for p in node.parents) if node.parents else 0)
    return depths


def _draw_labels(rng: np.random.Generator, spec: ProblemSpec, world: Vocabulary, count: int) -> list[tuple[str, str]]:
    holders = world.holders[: spec.holders] if spec.holders else world.holders
    items = [world.items[i] for i in rng.permutation(len(world.items))[: spec.items]]
    chosen = rng.permutation(len(holders) * len(items))[:count]
    return [(holders[int(i) // len(items)], items[int(i) % len(items)]) for i in chosen]


def _sentence(world: Vocabulary, node: _Node, labels: Sequence[tuple[str, str]], index: int) -> str:
    holder, item = labels[index]
    others = []
    for parent in node.parents:
        other, other_item = labels[parent]
        others.append(other if other_item == item else f"{other} {world.verb} {other_item}")
    head = f"{holder} {world.verb}"
    if node.kind == "constant":
        return f"{head} {node.number} {item}."
    if node.kind == "sum":
        return f"{head} as many {item} as {others[0]} and {others[1]} together."
    if node.kind == "times":
        return f"{head} {node.number} times as many {item} as {others[0]}."
    return f"{head} {node.number} {node.kind} {item} than {others[0]}."


def _step(node: _Node, nodes: Sequence[_Node], label: tuple[str, str], mixed: bool) -> str:
    name = " ".join(label) if mixed else label[0]
    values = [nodes[p].value for p in node.parents]
    if node.kind == "constant":
        return f"{name} = {node.value}"
    sign = {"more": "+", "fewer": "-", "times": "*", "sum": "+"}[node.kind]
    second = values[1] if node.kind == "sum" else node.number
    return f"{name} = {values[0]} {sign} {second} = {node.value}"
