"""Reads a word problem's text back and solves it, independently of the generator.

Nothing here sees the generator's graph: facts are parsed from the sentences, so an answer that survives
`solve` is right for the text a model is shown. Statement order does not matter and unneeded facts are ignored.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

from springhead.errors import BadInput
from springhead.lineage.digests import json_digest
from springhead.llm.worlds import vocabularies

Node = tuple[str, str]
"""(holder, item): whose number of what."""

_REF = r"(\w+)(?: (?:\w+) (\w+))?"
_CONSTANT = re.compile(r"(\w+) \w+ (\d+) (\w+)\.")
_CHANGE = re.compile(rf"(\w+) \w+ (\d+) (more|fewer) (\w+) than {_REF}\.")
_TIMES = re.compile(rf"(\w+) \w+ (\d+) times as many (\w+) as {_REF}\.")
_SUM = re.compile(rf"(\w+) \w+ as many (\w+) as {_REF} and {_REF} together\.")
_QUESTION = re.compile(r"How many (\w+) does (\w+) \w+(?: together)?\?")
_REWORDED = tuple(
    (re.compile(form), own)
    for form, own in (
        (r"(\w+) does (\w+ (?:\d+|as many) .+)", r"\1 \2"),
        (r"(\w+ \w+ \d+ \w+) together\.", r"\1."),
        (r"(\w+ \w+ \d+) (\w+) (more|fewer) than (.+)", r"\1 \3 \2 than \4"),
        (r"(\w+ \w+ \d+ .+ (?:than|as) \w+) does\.", r"\1."),
        (r"(\w+ \w+ as many \w+) together as (.+)\.", r"\1 as \2 together."),
        (r"(\w+ and \w+) together (\w+) as many (\w+) as (\w+)\.", r"\4 \2 as many \3 as \1 together."),
        (r"(How many \w+ does \w+ \w+) together\?", r"\1?"),
    )
)
"""Other wordings of these forms (`springhead.llm.paraphrase` writes them), and the form itself."""
_STEP = re.compile(r"(\w+)(?: (\w+))? = (?:(\d+) ([+*-]) (\d+) = )?(\d+)")


@dataclass(frozen=True)
class Fact:
    """One sentence: `kind` is constant, more, fewer, times or sum; `number` is the stated number (0 for a sum)."""

    kind: str
    number: int
    parents: tuple[Node, ...]


def apply(kind: str, number: int, values: Sequence[int]) -> int:
    """The value of a node from its stated number and its operands' values."""
    if kind == "constant":
        return number
    if kind == "sum":
        return sum(values)
    if kind == "times":
        return values[0] * number
    return values[0] + number if kind == "more" else values[0] - number


def split_text(text: str) -> tuple[list[str], str]:
    """A prompt's statements (each with its full stop) and its question, which is the last sentence.

    Raises:
        BadInput: the text does not end with a question.
    """
    sentences = re.findall(r"[^.?]+[.?]", text)
    parts = [sentence.strip() for sentence in sentences]
    if not parts or not parts[-1].endswith("?") or "".join(sentences).strip() != text.strip():
        raise BadInput(f"the prompt {text[:80]!r} does not end with a question")
    return parts[:-1], parts[-1]


@lru_cache(maxsize=1 << 16)  # the variants of a problem repeat its sentences
def parse_statement(text: str) -> tuple[Node, Fact]:
    """The node a sentence defines, and how.

    Raises:
        BadInput: the sentence has none of the known forms.
    """
    if match := _CONSTANT.fullmatch(text):
        return (match[1], match[3]), Fact("constant", int(match[2]), ())
    if match := _CHANGE.fullmatch(text):
        return (match[1], match[4]), Fact(match[3], int(match[2]), ((match[5], match[6] or match[4]),))
    if match := _TIMES.fullmatch(text):
        return (match[1], match[3]), Fact("times", int(match[2]), ((match[4], match[5] or match[3]),))
    if match := _SUM.fullmatch(text):
        item = match[2]
        return (match[1], item), Fact("sum", 0, ((match[3], match[4] or item), (match[5], match[6] or item)))
    if (other := _unworded(text)) is not None:
        return parse_statement(other)
    raise BadInput(f"cannot read the statement {text!r}: none of the known sentence forms")


def _unworded(text: str) -> str | None:
    """A reworded sentence in one of the known forms, its verb as it stands; None for any other."""
    return next((form.sub(own, text) for form, own in _REWORDED if form.fullmatch(text)), None)


@lru_cache(maxsize=1 << 16)
def plain(text: str) -> str:
    """A sentence in the generator's own words, if it is a reworded one; any other as it is."""
    other = _unworded(text)
    if other is None:
        return text
    words = other.split(" ")
    words[1] = _verbs().get(words[1], words[1])  # "does have 3" and "together have" leave the verb's base form
    return " ".join(words)


@lru_cache(maxsize=1)
def _verbs() -> dict[str, str]:
    """The worlds' verbs by their base form."""
    return {world.base: world.verb for world in vocabularies().values()}


def parse_question(text: str) -> Node:
    """The node a question asks for.

    Raises:
        BadInput: the question has not the known form.
    """
    match = _QUESTION.fullmatch(text)
    if match is None:
        raise BadInput(f"cannot read the question {text!r}: expected 'How many ITEMS does NAME VERB?'")
    return match[2], match[1]


def parse(statements: Sequence[str]) -> dict[Node, Fact]:
    """All facts of a text.

    Raises:
        BadInput: an unreadable statement, or two statements about the same node.
    """
    facts: dict[Node, Fact] = {}
    for text in statements:
        node, fact = parse_statement(text)
        if node in facts:
            raise BadInput(f"the statement {text!r} defines {' '.join(node)} a second time")
        facts[node] = fact
    return facts


def needed(facts: Mapping[Node, Fact], target: Node) -> list[Node]:
    """The target and everything it depends on, operands before results, first-mentioned operand first.

    Raises:
        BadInput: a node is never defined, or the definitions run in a circle.
    """
    order: list[Node] = []
    done: set[Node] = set()
    open_nodes: set[Node] = set()

    def visit(node: Node) -> None:
        if node in done:
            return
        if node in open_nodes:
            raise BadInput(f"{' '.join(node)} depends on itself")
        if node not in facts:
            raise BadInput(f"no statement says how many {node[1]} there are for {node[0]}")
        open_nodes.add(node)
        for parent in facts[node].parents:
            visit(parent)
        done.add(node)
        order.append(node)

    visit(target)
    return order


def needed_statements(statements: Sequence[str], question: str) -> list[str]:
    """The statements the question needs, operands before results; see `needed` for the errors."""
    texts = {parse_statement(text)[0]: text for text in statements}
    return [texts[node] for node in needed(parse(statements), parse_question(question))]


def values_of(statements: Sequence[str], question: str) -> dict[Node, int]:
    """Values of all nodes the question needs, in solving order; the last one is the answer's.

    Raises:
        BadInput: the text cannot be read or does not determine the answer.
    """
    return _values(parse(statements), parse_question(question))


def _values(facts: Mapping[Node, Fact], target: Node) -> dict[Node, int]:
    values: dict[Node, int] = {}
    for node in needed(facts, target):
        fact = facts[node]
        values[node] = apply(fact.kind, fact.number, [values[parent] for parent in fact.parents])
    return values


def solve(statements: Sequence[str], question: str) -> str:
    """The answer of an arithmetic problem, recomputed from its text; see `values_of` for the errors."""
    return str(list(values_of(statements, question).values())[-1])


def signature(statements: Sequence[str], question: str) -> str:
    """Digest of the expression the question asks for: operations and numbers, without names.

    Equal for every re-ordering, every added unneeded fact and every renaming of a problem. Sums commute.
    """
    facts = parse(statements)
    keys: dict[Node, str] = {}
    order = needed(facts, parse_question(question))
    for node in order:
        fact = facts[node]
        keys[node] = json_digest([fact.kind, fact.number, sorted(keys[parent] for parent in fact.parents)])
    return keys[order[-1]]


def chain_error(statements: Sequence[str], question: str, chain: Sequence[str]) -> str | None:
    """Why a chain is no valid solution of the text, or None.

    Every step must be arithmetically right, give the value its node has, use only what the node depends on
    after it was derived, and the last step must be about the node asked for.
    """
    facts, target = parse(statements), parse_question(question)
    values = _values(facts, target)
    known: set[Node] = set()
    last: Node | None = None
    for step in chain:
        match = _STEP.fullmatch(step)
        if match is None:
            return f"cannot read the step {step!r}"
        last = (match[1], match[2] or target[1])
        if last not in values:
            return f"the step {step!r} is about a fact the question does not need"
        if int(match[6]) != values[last]:
            return f"the step {step!r} should give {values[last]}"
        if match[4] and _evaluate(int(match[3]), match[4], int(match[5])) != int(match[6]):
            return f"the step {step!r} is wrong arithmetic"
        if not set(facts[last].parents) <= known:
            return f"the step {step!r} comes before a step it needs"
        known.add(last)
    return None if last == target else "the last step is not about the question"


def _evaluate(left: int, sign: str, right: int) -> int:
    if sign == "*":
        return left * right
    return left + right if sign == "+" else left - right
