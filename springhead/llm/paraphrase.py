"""Paraphrase augmentation, a baseline for MEND: the same facts in the same order, in other words.

A problem's sentences are reworded one by one by rules: names, numbers, the relation and the order stay, the frame of
the sentence changes. It shows what wording alone gives, where MEND changes the order and adds facts. Ours, and a
deviation: paraphrase baselines usually have a language model rewrite, which can change the meaning unseen. Here the
solver reads every frame, so a reworded row is checked like any other.

The frames have no word that the generated problems do not have, since the small student knows no others.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from springhead.errors import BadInput
from springhead.llm import mend
from springhead.llm.problems import Problem
from springhead.llm.textrows import Row

METHOD = OPERATOR = "paraphrase"
FAMILIES = ("dag", "logic")
"""The generated families; published text is not reworded."""
_REF = r"\w+(?: \w+ \w+)?"
_SUM_OF_NAMES = "{b} and {c} together {base} as many {items} as {a}."
_FORMS: tuple[tuple[re.Pattern[str], tuple[str, ...]], ...] = (
    (
        re.compile(r"(?P<a>\w+) (?P<verb>\w+) (?P<n>\d+) (?P<items>\w+)\."),
        ("{a} {verb} {n} {items}.", "{a} does {base} {n} {items}.", "{a} {verb} {n} {items} together."),
    ),
    (
        re.compile(rf"(?P<a>\w+) (?P<verb>\w+) (?P<n>\d+) (?P<word>more|fewer) (?P<items>\w+) than (?P<b>{_REF})\."),
        (
            "{a} {verb} {n} {word} {items} than {b}.",
            "{a} {verb} {n} {items} {word} than {b}.",
            "{a} does {base} {n} {word} {items} than {b}.",
            "{a} {verb} {n} {word} {items} than {b} does.",
        ),
    ),
    (
        re.compile(rf"(?P<a>\w+) (?P<verb>\w+) (?P<n>\d+) times as many (?P<items>\w+) as (?P<b>{_REF})\."),
        (
            "{a} {verb} {n} times as many {items} as {b}.",
            "{a} does {base} {n} times as many {items} as {b}.",
            "{a} {verb} {n} times as many {items} as {b} does.",
        ),
    ),
    (
        re.compile(rf"(?P<a>\w+) (?P<verb>\w+) as many (?P<items>\w+) as (?P<b>{_REF}) and (?P<c>{_REF}) together\."),
        (
            "{a} {verb} as many {items} as {b} and {c} together.",
            "{a} does {base} as many {items} as {b} and {c} together.",
            "{a} {verb} as many {items} together as {b} and {c}.",
            _SUM_OF_NAMES,
        ),
    ),
    (
        re.compile(r"How many (?P<items>\w+) does (?P<a>\w+) (?P<base>\w+)\?"),
        ("How many {items} does {a} {base}?", "How many {items} does {a} {base} together?"),
    ),
    (re.compile(r"True or false: (?P<claim>[\w ]+)\?"), ("True or false: {claim}?", "{claim}: True or false?")),
    (re.compile(r"(?P<claim>[\w ]+ is [\w ]+)\."), ("{claim}.", "True: {claim}.", "{claim}: True.")),
)
"""Each sentence form of the generators, and its frames, the generator's own first."""
_TRIES = 100


def wordings(sentence: str, base: str = "") -> list[str]:
    """All wordings of a generated sentence, its own first.

    Args:
        sentence: a statement or a question.
        base: the verb of an arithmetic problem as its question has it ("have").

    Raises:
        BadInput: the sentence has none of the generators' forms.
    """
    for form, frames in _FORMS:
        if match := form.fullmatch(sentence):
            parts = {"base": base, **match.groupdict()}
            named = all(" " not in parts.get(name, "") for name in "bc")
            # "than Ben has pears does" is no English: these frames are for facts that are referred to by name alone.
            fit = [f for f in frames if named or not (f.endswith(" does.") or f == _SUM_OF_NAMES)]
            return [frame.format_map(parts) for frame in fit]
    raise BadInput(f"cannot reword {sentence!r}: none of the sentence forms of the families {', '.join(FAMILIES)}")


def reword(problem: Problem, rng: np.random.Generator, taken: Sequence[Problem]) -> Problem:
    """The problem with each sentence in a wording drawn at random, and the same id.

    It differs from the problems in `taken` unless no other was found in a hundred draws.
    """
    base = problem.question.removesuffix("?").split()[-1]
    choices = [wordings(text, base) for text in (*problem.statements, problem.question)]
    seen = {(*other.statements, other.question) for other in taken}
    for _ in range(_TRIES):
        texts = tuple(options[int(rng.integers(len(options)))] for options in choices)
        if texts not in seen:
            break
    return replace(problem, statements=texts[:-1], question=texts[-1])


def rows(problem: Problem, variants: int, seed: int) -> list[Row]:
    """The plain row and `variants` reworded ones, in solving order, nothing redundant.

    Raises:
        BadInput: a sentence has none of the generators' forms.
    """
    order = range(len(problem.statements))
    made = [mend.make_row(problem, METHOD, "identity", 0, "topological", order)]
    taken = [problem]
    for variant in range(1, variants + 1):
        taken.append(reword(problem, mend.row_rng(seed, problem.id, f"{METHOD} {variant}"), taken))
        made.append(mend.make_row(taken[-1], METHOD, OPERATOR, variant, "topological", order))
    return made
