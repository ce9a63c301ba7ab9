"""The rows the refusal judge is trained on: human labels, weak labels, and frames written for this project.

| rows | label | weight |
|---|---|---|
| XSTest responses | refusal, even partial, as the annotators settled | 1; halved if they disagreed; .7 if partial |
| CoCoNot preferences | by a short rule on the first 200 characters, only where it is plain | .2 |
| frames filled in (`authored.json`) | as written | 1 |

A partial refusal counts as a refusal, as in the XSTest paper's own binary reading. Only the first kind is measured on.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

from springhead.jsonio import read_json
from springhead.llm import publicsets
from springhead.llm.judges.refusal import Labelled

AUTHORED = Path(__file__).parent / "authored.json"
_DISAGREED, _PARTIAL, _WEAK = 0.5, 0.7, 0.2
_FILLINGS = 4
"""How many of the acts or claims each frame is filled with."""
_PLAIN_REFUSAL = re.compile(
    r"\bi(?:'m| am)? (?:cannot|can't|can not|not able to|unable to|won't|will not|must decline)\b", re.IGNORECASE
)


def human_rows(responses: Sequence[publicsets.Judged]) -> list[Labelled]:
    """The labelled responses of XSTest; the model is the group."""
    rows = []
    for found in responses:
        weight = (1.0 if found.labels[0] == found.labels[1] else _DISAGREED) * (
            _PARTIAL if found.label == "partial" else 1.0
        )
        rows.append(Labelled(found.prompt, found.response, found.label != "compliance", found.model, weight))
    return rows


def weak_rows(pairs: Sequence[tuple[str, str, str, str]]) -> list[Labelled]:
    """CoCoNot's preference pairs: a chosen response complies unless it plainly refuses; a rejected one is used only if
    it plainly refuses.
    """
    rows = []
    for _, prompt, chosen, rejected in pairs:
        plain = _PLAIN_REFUSAL.search(chosen[:200]) is not None
        rows.append(Labelled(prompt, chosen, plain, "coconot", _WEAK, measured=False))
        if _PLAIN_REFUSAL.search(rejected[:200]):
            rows.append(Labelled(prompt, rejected, True, "coconot", _WEAK, measured=False))
    return rows


@cache
def authored_rows() -> tuple[Labelled, ...]:
    """Every frame of `authored.json`, filled with some of the acts or claims in turn."""
    kinds: dict[str, Any] = read_json(AUTHORED)
    rows = []
    for kind, refusal in (("refusals", True), ("compliances", False)):
        for number, frame in enumerate(kinds[kind]):
            for k in range(_FILLINGS):
                prompt, act = kinds["acts"][(number + 3 * k) % len(kinds["acts"])]
                rows.append(Labelled(prompt, _begun(frame.replace("{act}", act)), refusal, "authored"))
    for kind, refusal in (("denials", True), ("explanations", False)):
        for number, frame in enumerate(kinds[kind]):
            for k in range(_FILLINGS):
                prompt, claim, quality, subject = kinds["claims"][(number + k) % len(kinds["claims"])]
                text = frame.replace("{claim}", claim).replace("{quality}", quality).replace("{subject}", subject)
                rows.append(Labelled(prompt, _begun(text), refusal, "authored"))
    return tuple(replace(row, measured=False) for row in rows)


def _begun(text: str) -> str:
    return text[:1].upper() + text[1:]


def all_rows(root: Path | None = None) -> list[Labelled]:
    """The rows of the shipped judge.

    Raises:
        BadInput: one of the public sets is missing.
    """
    human = human_rows(publicsets.xstest_responses(root))
    return [*human, *weak_rows(publicsets.coconot_pairs(root)), *authored_rows()]
