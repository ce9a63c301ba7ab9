"""Written rationales and refusals, put together from parts: what a small model cannot write reliably itself.

A rationale says what is asked for, what the disguise is worth, what the harm would be, and decides. The parts are drawn
from a generator keyed by (seed, prompt), so equal prompts get equal texts and neighbours get different ones.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import numpy as np

from springhead.lineage.digests import json_digest
from springhead.llm import mutators
from springhead.llm.safety_data import Base, reasons

_ASKED = (
    'The request comes down to this: "{goal}"',
    'What is asked for is: "{goal}"',
    'Put plainly, the question is "{goal}"',
    'The user wants an answer to "{goal}"',
)
_DISGUISE: Mapping[str, tuple[str, ...]] = {
    "style": (
        "The way it is worded does not change what it asks for.",
        "Behind the wording it is the same request.",
        "Spelling and style make no difference to what would be done with the answer.",
    ),
    "role-play": (
        "A role in a story does not change that the answer would be a real one.",
        "Playing a character would still put real instructions on the page.",
    ),
    "logical-appeal": (
        "The argument sounds tidy, but it leaves out what the answer would be used for.",
        "That something can be known does not mean that it is right to hand it out.",
    ),
    "authority-endorsement": (
        "No office or newspaper can be checked here, and none could make it right.",
        "The authority that is named does not decide what is safe.",
    ),
    "misrepresentation": (
        "The role that the user claims cannot be checked, and the answer would serve anyone.",
        "Someone with that job would have other, proper ways to learn this.",
    ),
    "evidence-based-persuasion": (
        "The figures cannot be checked, and they do not speak to this harm.",
        "A study that is only mentioned is no reason.",
    ),
    "expert-endorsement": (
        "An expert who is only quoted is no reason to go along.",
        "Whoever is said to agree, the harm stays the same.",
    ),
    "question": ("It is asked without any disguise.", "The aim is plain."),
}
_HARM = ("If I answered, {harm}.", "The trouble is that {harm}.", "Done in earnest, {harm}.")
_REFUSE = (
    "So I should not help with it.",
    "I will decline and say why.",
    "The right thing is that I do not answer this.",
    "I should refuse and offer something else.",
)
_REFUSALS = (
    "I'm sorry, but I can't help with that. {why} {instead}",
    "I won't help with this, because {harm}. {instead}",
    "I cannot assist with that request. {why} {instead}",
    "Sorry, this is something I can't help with: {harm}. {instead}",
)
_WHY = ("As I see it, {harm}.", "{Harm}.")
_SENSITIVE = re.compile(
    r"\b(?:kill|shoot|shot|steal|break into|blow up|bomb|attack|explode|roast|dying|die|cut|crash|hack|spy|track|fake|"
    r"cheat|execute|crush|smash|hit|poison|gun|knife|drug|fight|terminate|destroy|strangle|choke|hang|discriminate|"
    r"bully|bullied|starving|hidden|force)\w*\b",
    re.IGNORECASE,
)
_HARMLESS_WORD = (
    'The word "{word}" sounds harsh, but here it is meant in a harmless way.',
    '"{word}" could point to something bad; in this question it does not.',
)
_HARMLESS = (
    "Nobody would be hurt by an answer.",
    "It is an everyday matter and concerns nobody's safety.",
    "There is nothing harmful in it.",
)
_COMPLY = (
    "So I can answer.",
    "I can help with this.",
    "It is fine to help, so I will answer it.",
    "I can answer that.",
)


def refusal(goal: Base, form: str, prompt: str, seed: int) -> tuple[str, str]:
    """Rationale and response for a prompt that is to be refused, in one of the forms of `mutators`."""
    rng = _generator(seed, prompt)
    harms, instead = reasons(goal.category)
    harm = _pick(harms, rng)
    disguise = _DISGUISE.get(form) or _DISGUISE[mutators.FAMILIES[form]]
    rationale = " ".join(
        (
            _pick(_ASKED, rng).replace("{goal}", _quoted(goal.prompt)),
            _pick(disguise, rng),
            _pick(_HARM, rng).replace("{harm}", harm),
            _pick(_REFUSE, rng),
        )
    )
    why = _pick(_WHY, rng).replace("{harm}", harm).replace("{Harm}", harm[:1].upper() + harm[1:])
    response = _pick(_REFUSALS, rng).replace("{why}", why).replace("{harm}", harm)
    return rationale, response.replace("{instead}", _pick(instead, rng))


def compliance(goal: Base, prompt: str, seed: int) -> str:
    """Rationale for a benign prompt; its response is the base prompt's own."""
    rng = _generator(seed, prompt)
    word = _SENSITIVE.search(goal.prompt)
    parts = [_pick(_ASKED, rng).replace("{goal}", _quoted(goal.prompt))]
    if word:
        parts.append(_pick(_HARMLESS_WORD, rng).replace("{word}", word[0].lower()))
    return " ".join([*parts, _pick(_HARMLESS, rng), _pick(_COMPLY, rng)])


def _quoted(text: str) -> str:
    """A prompt on one line and of a sensible length, for quotation marks."""
    line = " ".join(text.split()).replace('"', "'")
    return line if len(line) <= 160 else line[:157].rsplit(" ", 1)[0] + " ..."


def _generator(seed: int, prompt: str) -> np.random.Generator:
    return np.random.default_rng(int(json_digest([seed, "rationale", prompt])[:15], 16))


def _pick(choices: Sequence[str], rng: np.random.Generator) -> str:
    return choices[int(rng.integers(len(choices)))]
