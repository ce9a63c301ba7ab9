"""GSM8K's problems whose sentences may be told in any order, as MEND's.

Source: Cobbe et al. 2021, "Training Verifiers to Solve Math Word Problems". The idea of re-ordering them is R-GSM's
(Chen et al. 2024, "Premise Order Matters in Reasoning with Large Language Models"), whose rewritings people checked.
Here nobody does, so only problems are taken in which an order can hardly matter: at least two sentences before the one
question, none of which points to another one (`_POINTS_BACK`: pronouns, "the", "then", "left" and so on). A problem
whose solution cannot be checked is left out too: every step is one equation of whole numbers, it is right, its numbers
are in the text, were found before or are among the `_KNOWN` ones (days of a week and the like), and the last result is
the published answer. The gold chain are these equations.

An answer cannot be computed from natural text. `solve` finds the published problem that has the same sentences in
whatever order, and computes its solution again. It reads the parts of GSM8K that are at hand; whoever judges rows makes
sure first, with `families.obtain_sources`, that the parts their problems come from are.
"""

from __future__ import annotations

import ast
import re
from collections import Counter
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

from springhead.errors import BadInput
from springhead.jsonio import read_jsonl
from springhead.lineage.digests import json_digest
from springhead.llm import solver
from springhead.llm.problems import Problem, with_id
from springhead.sources import SourceError, obtain

FAMILY = "gsm8k"
PARTS = ("train", "test")
_POINTS_BACK = re.compile(
    r"\b(he|she|it|they|him|her|his|hers|its|their|theirs|them|this|that|these|those|then|there|also|another|others?|"
    r"rest|remaining|remainder|left|again|after|afterwards|before|later|next|finally|last|however|but|so|such|same|both|"
    r"instead|additional|extra|still|already|now|former|latter|the|once|when|while|together|"
    r"more(?!( \w+){0,3} than))\b",
    re.IGNORECASE,
)
_SPLIT = re.compile(r"(?<=[.?!])\s+(?=[A-Z])")
_EQUATION = re.compile(r"<<([^<>=]+)=([^<>=]+)>>")
_NUMBER_WORDS = (
    *("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve"),
    *("thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen", "twenty"),
)
_AMOUNTS = {"dozen": 12, "half": 2, "twice": 2, "double": 2, "triple": 3, "quarter": 4, "third": 3, "pair": 2}
_KNOWN = frozenset({1, 2, 7, 12, 24, 30, 52, 60, 100, 365})
_SHORTEST = 4
"""Words of a sentence; shorter ones are torn ones, as "Ms." is."""


def value(expression: str) -> int:
    """The value of an expression of whole numbers with + - * / and parentheses.

    Raises:
        BadInput: it is anything else, or a step of it gives no whole number.
    """
    try:
        tree = ast.parse(expression.strip(), mode="eval").body
    except (SyntaxError, ValueError, MemoryError, RecursionError):
        raise BadInput(f"cannot read the expression {expression!r}") from None
    return _value(tree, expression)


def _value(tree: ast.expr, expression: str) -> int:
    if isinstance(tree, ast.Constant) and type(tree.value) is int:
        return tree.value
    if isinstance(tree, ast.BinOp):
        left, right = _value(tree.left, expression), _value(tree.right, expression)
        if isinstance(tree.op, ast.Add):
            return left + right
        if isinstance(tree.op, ast.Sub):
            return left - right
        if isinstance(tree.op, ast.Mult):
            return left * right
        if isinstance(tree.op, ast.Div) and right and left % right == 0:
            return left // right
    raise BadInput(f"{expression!r} is no calculation with whole numbers")


def numbers_in(text: str) -> set[int]:
    """The whole numbers a text states, in digits or words."""
    found = {int(digits.replace(",", "")) for digits in re.findall(r"\d[\d,]*", text)}
    for word in re.findall(r"[a-z]+", text.lower()):
        if word in _NUMBER_WORDS:
            found.add(_NUMBER_WORDS.index(word))
        elif word in _AMOUNTS:
            found.add(_AMOUNTS[word])
    return found


def chain_error(statements: Sequence[str], question: str, chain: Sequence[str]) -> str | None:
    """Why a chain of equations is no valid solution of the text, or None."""
    known = numbers_in(" ".join([*statements, question])) | _KNOWN
    result: int | None = None
    for step in chain:
        left, sign, right = step.partition(" = ")
        try:
            result = value(left)
            stated = value(right) if sign else None
        except BadInput as error:
            return str(error)
        if stated != result:
            return f"the step {step!r} should give {result}"
        unknown = numbers_in(left) - known
        if unknown:
            return f"the step {step!r} uses {min(unknown)}, which nothing before it gives"
        known.add(result)
    return "there is no step" if result is None else None


def signature(statements: Sequence[str], question: str) -> str:
    """Digest of the sentences in alphabetic order, and the question: equal for every re-ordering."""
    return json_digest([sorted(statements), question])


def needed_statements(statements: Sequence[str], question: str) -> list[str]:
    """All of them, in alphabetic order: natural text does not tell which are redundant."""
    return sorted(statements)


def solve(statements: Sequence[str], question: str) -> str:
    """The answer of the published problem that has these sentences, computed from its solution.

    Raises:
        BadInput: there is none.
        SourceError: no part of GSM8K is at hand; that says nothing about the text.
    """
    known = _published().get(signature(statements, question))
    if known is None:
        raise BadInput(f"no problem of GSM8K has exactly the sentences of {question!r}")
    return str(value(known.chain[-1].partition(" = ")[0]))


@lru_cache(maxsize=1)
def _published() -> dict[str, Problem]:
    """The problems of the parts that are at hand, by signature."""
    found: dict[str, Problem] = {}
    missing = []
    for part in PARTS:
        try:
            read = problems(part, part)
        except SourceError as error:
            missing.append(error)
            continue
        found |= {signature(problem.statements, problem.question): problem for problem in read}
    if len(missing) == len(PARTS):
        raise missing[0]
    return found


def problems(part: str, split: str, root: Path | None = None, left_out: Counter[str] | None = None) -> list[Problem]:
    """The problems of a part of GSM8K that may be re-ordered, in file order.

    Args:
        part: train or test.
        split: the split they belong to.
        root: the repository.
        left_out: counts the others by reason.

    Raises:
        BadInput: there is no such part, or the file cannot be had.
    """
    if part not in PARTS:
        raise BadInput(f"gsm8k has no part {part!r}; it has {', '.join(PARTS)}")
    counts: Counter[str] = Counter() if left_out is None else left_out
    found = []
    for number, row in enumerate(read_jsonl(obtain(f"gsm8k-{part}", root))):
        *statements, question = _SPLIT.split(" ".join(str(row["question"]).split()))
        solution, _, answer = str(row["answer"]).rpartition("#### ")
        chain = tuple(f"{left.strip()} = {right.strip()}" for left, right in _EQUATION.findall(solution))
        reason = _unfit(statements, question, chain, answer.strip().replace(",", ""))
        if reason is not None:
            counts[reason] += 1
            continue
        found.append(
            with_id(
                parents=(f"gsm8k-{part}/{number}",),
                family=FAMILY,
                vocabulary=FAMILY,
                ops=len(chain),
                depth=len(chain),
                statements=tuple(statements),
                redundant=(),
                question=question,
                chain=chain,
                answer=answer.strip().replace(",", ""),
                split=split,
            )
        )
    return found


def _unfit(statements: Sequence[str], question: str, chain: Sequence[str], answer: str) -> str | None:
    if len(statements) < 2:
        return "fewer than two sentences before the question"
    try:
        torn = solver.split_text(" ".join([*statements, question])) != (list(statements), question)
    except BadInput:
        torn = True
    if torn or any(len(text.split()) < _SHORTEST for text in statements):
        return "sentences that cannot be told apart"
    if any(_POINTS_BACK.search(text) for text in statements):
        return "a sentence that may point to another"
    if chain_error(statements, question, chain) is not None or chain[-1].partition(" = ")[2] != answer:
        return "a solution that cannot be checked"
    return None
