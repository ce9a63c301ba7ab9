"""ProntoQA's problems as MEND's: statements that may be re-ordered, distractors that may be left out or added.

Source: Saparov, He 2023, "Language Models Are Greedy Reasoners" (ICLR), the 500 problems of five hops that Logic-LLM
publishes. A context is independent sentences ("Each wumpus is a dumpus.", "Jompuses are small.", "Max is a yumpus."),
a few of which prove or refute the question. Those are a problem's statements, in the order of the proof, the others
its redundant statements. The gold chain are the claims of the published proof.

The text is read by rewriting each sentence in the words of `springhead.llm.logic`, whose prover does the rest. One word
differs from the published problem: its question, "Is the following statement true or false? Max is sour.", ends in a
statement; ours is "True or false: Max is sour?".
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path

from springhead.errors import BadInput
from springhead.llm import logic
from springhead.llm.problems import Problem, with_id
from springhead.sources import obtain

FAMILY = "prontoqa"
SOURCE = "prontoqa-dev"
_SINGULAR = re.compile(r"(?:Each|Every) (\w+) is (?:an? (\w+)|((?:not )?[\w-]+))\.")
_PLURAL = re.compile(r"(\w+us)es are (?:(\w+us)es|((?:not )?[\w-]+))\.")
_NAMED = re.compile(r"([A-Z]\w+) is (?:an? (\w+)|((?:not )?[\w-]+))(\.?)")
_QUESTION = re.compile(r"Is the following statement true or false\? (\w+) is ((?:not )?[\w-]+)\.")


def normal(sentence: str) -> str:
    """A sentence in the words of `springhead.llm.logic`.

    Raises:
        BadInput: the sentence has none of ProntoQA's forms.
    """
    if match := _SINGULAR.fullmatch(sentence) or _PLURAL.fullmatch(sentence):
        kind, other, word = match.groups()
        return f"Every {kind.lower()} is {f'a {other.lower()}' if other else word}."
    if match := _NAMED.fullmatch(sentence):
        name, kind, word, stop = match.groups()
        return f"{name} is {f'a {kind}' if kind else word}{stop}"
    raise BadInput(f"cannot read the statement {sentence!r}: none of ProntoQA's sentence forms")


def solve(statements: Sequence[str], question: str) -> str:
    """Answer "True" or "False", proved from the text.

    Raises:
        BadInput: the text cannot be read, contradicts itself or does not decide the question.
    """
    return logic.solve([normal(text) for text in statements], question)


def needed_statements(statements: Sequence[str], question: str) -> list[str]:
    """The sentences of the shortest proof, in proof order; see `solve` for the errors."""
    texts = {normal(text): text for text in statements}
    return [texts[text] for text in logic.needed_statements(list(texts), question)]


def signature(statements: Sequence[str], question: str) -> str:
    """Digest of the proof's rules and the property asked for; see `springhead.llm.logic.signature`."""
    return logic.signature([normal(text) for text in statements], question)


def chain_error(statements: Sequence[str], question: str, chain: Sequence[str]) -> str | None:
    """Why a chain is no valid proof from the text, or None."""
    try:
        steps = [normal(step) for step in chain]
    except BadInput as error:
        return str(error)
    return logic.chain_error([normal(text) for text in statements], question, steps)


def problems(split: str, root: Path | None = None) -> list[Problem]:
    """The published problems, in file order.

    Args:
        split: the split they belong to.
        root: the repository.

    Raises:
        BadInput: the file cannot be had, or a problem's published answer is not the one its text proves.
    """
    path = obtain(SOURCE, root)
    found = []
    for row in json.loads(path.read_text(encoding="utf-8")):
        match = _QUESTION.fullmatch(row["question"])
        if match is None:
            raise BadInput(f"{path}: {row['id']}: cannot read the question {row['question']!r}; replace the file")
        question = f"True or false: {match[1]} is {match[2]}?"
        sentences = re.findall(r"\S[^.]*\.", row["context"])
        answer = {"A": "True", "B": "False"}[row["answer"]]
        if solve(sentences, question) != answer:
            raise BadInput(f"{path}: {row['id']}: the text does not prove the published answer; replace the file")
        needed = needed_statements(sentences, question)
        steps = [text.removesuffix(".") for text in row["explanation"] if text.startswith(f"{match[1]} ")]
        found.append(
            with_id(
                parents=(f"{SOURCE}/{row['id']}",),
                family=FAMILY,
                vocabulary=FAMILY,
                ops=len(needed) - 1,
                depth=len(needed) - 1,
                statements=tuple(needed),
                redundant=tuple(text for text in sentences if text not in needed),
                question=question,
                chain=tuple(steps),
                answer=answer,
                split=split,
            )
        )
    return found
