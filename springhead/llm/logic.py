"""Logic problems over an invented ontology: which kinds are which, who is what, true or false?

Shape of ProntoQA (independent sentences, a linear proof, distractors), words of our own: every kind is a made-up
noun, so nothing a model knows about the world helps. A problem is a fact ("Max is a glim."), a path of rules
("Every glim is a dorp."), and a last rule that ends in a property, affirmed or denied ("Every dorp is not red.").
The question is a claim about that property. Statements are independent sentences, so order permutation and
redundancy apply as they do to the arithmetic problems.

Train and evaluation never share the rules of a proof, whoever they are about; see `signature`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from springhead.errors import BadInput
from springhead.lineage.digests import json_digest
from springhead.llm.problems import TRAIN, Problem, facts_key, side_of, with_id

# Every kind begins with a consonant: "a" always fits.
KINDS = (
    *("glim", "dorp", "zelk", "vask", "munt", "brel", "tronk", "plim", "quell", "snarf", "flomp", "grint"),
    *("hask", "jorp", "kelm", "lurn", "nesk", "pronk", "rilt", "sturm", "twill", "varn", "wisk", "yelp"),
)
PROPERTIES = ("red", "cold", "loud", "soft", "brave", "quick", "round", "sweet", "heavy", "bright")
NAMES = ("Max", "Ana", "Ben", "Eva", "Sam", "Uma", "Finn", "Nora", "Otto", "Rosa")
_GRAMMAR = ("Every", "is", "a", "not", "True", "False", "or", "false", "Answer", ".", "?", ":")

_FACT = re.compile(r"(\w+) is a (\w+)\.")
_RULE = re.compile(r"Every (\w+) is (?:a (\w+)|(not )?(\w+))\.")
_QUESTION = re.compile(r"True or false: (\w+) is (not )?(\w+)\?")
_REWORDED = re.compile(r"True: (?P<before>[^:]+)\.|(?P<after>[^:]+): True\.|(?P<asked>[^:]+): True or false\?")
"""Other wordings of a statement and of a question (`springhead.llm.paraphrase` writes them)."""
_STEP = re.compile(r"(\w+) is (?:a (\w+)|(not )?(\w+))")
_FRUITLESS_TRIES = 5000

Claim = tuple[str, bool]
"""(kind or property, affirmed)."""


@dataclass(frozen=True)
class LogicSpec:
    """What kind of logic problems to draw; `depth` counts the rules a proof applies."""

    depth_min: int = 1
    depth_max: int = 3
    redundant: int = 4
    holdout: float = 0.2
    split: str = TRAIN

    def __post_init__(self) -> None:
        if not 1 <= self.depth_min <= self.depth_max:
            raise BadInput(f"llm.problems: logic depth_min must be in 1..depth_max (split {self.split!r})")
        if self.redundant < 0 or not 0.0 < self.holdout < 1.0:
            raise BadInput(f"llm.problems: redundant must not be negative, holdout lies in 0..1 (split {self.split!r})")
        if self.depth_max + self.redundant > len(KINDS):
            raise BadInput(
                f"llm.problems: logic depth {self.depth_max} with {self.redundant} redundant statements needs "
                f"{self.depth_max + self.redundant} kinds, there are {len(KINDS)}; lower one of them"
            )


def lexicon() -> list[str]:
    """Every word and sign a logic problem or its chain can contain, sorted."""
    return sorted({*KINDS, *PROPERTIES, *NAMES, *_GRAMMAR})


def generate(count: int, seed: int, spec: LogicSpec) -> list[Problem]:
    """Draw `count` different logic problems, half of the claims true in expectation.

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
                f"llm.problems: found only {len(found)} of {count} different logic problems for split "
                f"{spec.split!r} (depth {spec.depth_min}..{spec.depth_max}); raise depth_max or ask for fewer"
            )
        problem = _draw(rng, spec)
        if problem is not None and (key := facts_key(problem)) not in seen:
            seen.add(key)
            found.append(problem)
            fruitless = 0
    return found


def _draw(rng: np.random.Generator, spec: LogicSpec) -> Problem | None:
    depth = int(rng.integers(spec.depth_min, spec.depth_max + 1))
    kinds = [KINDS[i] for i in rng.permutation(len(KINDS))]
    path, others = kinds[:depth], kinds[depth:]
    name = NAMES[int(rng.integers(len(NAMES)))]
    properties = [PROPERTIES[i] for i in rng.permutation(len(PROPERTIES))]
    holds, claimed = bool(rng.random() < 0.5), bool(rng.random() < 0.5)
    rules = [f"Every {a} is a {b}." for a, b in pairwise(path)]
    rules.append(f"Every {path[-1]} is {_polarity(holds)}{properties[0]}.")
    statements = (f"{name} is a {path[0]}.", *rules)
    question = f"True or false: {name} is {_polarity(claimed)}{properties[0]}?"
    if side_of(signature(statements, question), spec.holdout) != (TRAIN if spec.split == TRAIN else "eval"):
        return None
    chain = [f"{name} is a {kind}" for kind in path] + [f"{name} is {_polarity(holds)}{properties[0]}"]
    return with_id(
        parents=(),
        family="logic",
        vocabulary="ontology",
        ops=depth,
        depth=depth,
        statements=statements,
        redundant=_redundant(rng, spec.redundant, path, others, properties, holds),
        question=question,
        chain=tuple(chain),
        answer=str(holds == claimed),
        split=spec.split,
    )


def _polarity(affirmed: bool) -> str:
    return "" if affirmed else "not "


def _redundant(
    rng: np.random.Generator,
    count: int,
    path: Sequence[str],
    others: Sequence[str],
    properties: Sequence[str],
    holds: bool,
) -> tuple[str, ...]:
    """True rules the proof does not need, each about a kind of its own, so any subset is consistent.

    Three sorts: a path kind is also some other kind that leads nowhere; an unrelated kind has the asked
    property with the opposite sign (tempting); an unrelated kind has another property.
    """
    found = []
    for i in range(count):
        other, sort = others[i], int(rng.integers(3))
        if sort == 0:
            found.append(f"Every {path[int(rng.integers(len(path)))]} is a {other}.")
        elif sort == 1:
            found.append(f"Every {other} is {_polarity(not holds)}{properties[0]}.")
        else:
            other_property = properties[1 + int(rng.integers(len(properties) - 1))]
            found.append(f"Every {other} is {_polarity(bool(rng.random() < 0.5))}{other_property}.")
    return tuple(found)


# -- reading the text back, independently of the generator ----------------------------------------


def plain(text: str) -> str:
    """A sentence in the generator's own words, if it is a reworded one; any other as it is."""
    match = _REWORDED.fullmatch(text)
    if match is None:
        return text
    return f"True or false: {match['asked']}?" if match["asked"] else f"{match['before'] or match['after']}."


def _parse(statements: Sequence[str]) -> tuple[dict[str, set[str]], dict[str, list[tuple[Claim, str]]]]:
    """Facts (who is which kinds) and rules (kind -> claims with their sentence)."""
    facts: dict[str, set[str]] = {}
    rules: dict[str, list[tuple[Claim, str]]] = {}
    for text in map(plain, statements):
        if match := _RULE.fullmatch(text):
            claim = (match[2], True) if match[2] else (match[4], match[3] is None)
            rules.setdefault(match[1], []).append((claim, text))
        elif match := _FACT.fullmatch(text):
            facts.setdefault(match[1], set()).add(match[2])
        else:
            raise BadInput(f"cannot read the statement {text!r}: neither a fact nor a rule")
    return facts, rules


def _parse_question(question: str) -> tuple[str, Claim]:
    match = _QUESTION.fullmatch(plain(question))
    if match is None:
        raise BadInput(f"cannot read the question {question!r}: expected 'True or false: NAME is [not] PROPERTY?'")
    return match[1], (match[3], match[2] is None)


def _proof(statements: Sequence[str], question: str) -> tuple[list[str], Claim]:
    """The sentences that decide the question, and the claim they establish about its property.

    Raises:
        BadInput: unreadable text, an undecided question, or statements that contradict each other.
    """
    facts, rules = _parse(statements)
    name, (asked, _) = _parse_question(question)
    if name not in facts:
        raise BadInput(f"no statement says what {name} is")
    reached: dict[Claim, list[str]] = {(kind, True): [f"{name} is a {kind}."] for kind in sorted(facts[name])}
    frontier = list(reached)
    while frontier:
        claim = frontier.pop(0)
        for then, text in rules.get(claim[0], []) if claim[1] else []:
            if then not in reached:
                reached[then] = [*reached[claim], text]
                frontier.append(then)
    for word, affirmed in reached:
        if (word, not affirmed) in reached:
            raise BadInput(f"the statements prove that {name} is and is not {word}")
    for affirmed in (True, False):
        if (asked, affirmed) in reached:
            return reached[(asked, affirmed)], (asked, affirmed)
    raise BadInput(f"the statements do not decide whether {name} is {asked}")


def solve(statements: Sequence[str], question: str) -> str:
    """Answer "True" or "False", by forward chaining over the text; see `_proof` for the errors."""
    _, claim = _proof(statements, question)
    return str(claim == _parse_question(question)[1])


def needed_statements(statements: Sequence[str], question: str) -> list[str]:
    """The sentences of the shortest proof, in proof order."""
    return _proof(statements, question)[0]


def signature(statements: Sequence[str], question: str) -> str:
    """Digest of the rules of the proof and the property asked for, without the name and the claim's sign.

    Equal for every re-ordering, added distractor, other name and negated question. Kinds are not renamed away:
    without them a proof is only its length.
    """
    proof, (asked, _) = _proof(statements, question)
    return json_digest([sorted(text for text in proof if text.startswith("Every ")), asked])


def chain_error(statements: Sequence[str], question: str, chain: Sequence[str]) -> str | None:
    """Why a chain is no valid proof from the text, or None.

    Every step must follow from a fact, or from one rule and an earlier step; the last must settle the question.
    """
    facts, rules = _parse(statements)
    name, (asked, _) = _parse_question(question)
    known: set[str] = set()
    last: Claim | None = None
    for step in chain:
        match = _STEP.fullmatch(step)
        if match is None or match[1] != name:
            return f"the step {step!r} is not about {name} or cannot be read"
        last = (match[2], True) if match[2] else (match[4], match[3] is None)
        follows = any(last == claim for kind in known for claim, _ in rules.get(kind, []))
        if not follows and not (match[2] and match[2] in facts.get(name, set())):
            return f"the step {step!r} does not follow from the steps before it"
        if last[1]:
            known.add(last[0])
    return None if last is not None and last[0] == asked else "the last step does not settle the question"
