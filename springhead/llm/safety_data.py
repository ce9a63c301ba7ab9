"""Base prompts of the Rational branch: where they come from, which are near-duplicates, which are held out.

The authored set ships with the project, so the branch runs without outside data; AdvBench goals, XSTest prompts and
CoCoNot are added when asked for. A near-duplicate group (token Jaccard from a threshold on; AdvBench repeats itself
and other sets) is on one side of the split as a whole, and every variant of a prompt goes with its prompt.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, Literal

from springhead.errors import BadInput
from springhead.jsonio import read_json
from springhead.lineage.digests import json_digest
from springhead.llm import publicsets
from springhead.llm.similarity import closest, earlier_twins, ngrams

Kind = Literal["adversarial", "contrast", "benign"]
"""To be refused; to be refused and shown undisguised only (XSTest's unsafe contrasts); to be answered."""
AUTHORED = Path(__file__).parent / "safety_prompts.json"
TRAIN, TEST = "train", "test"
PUBLIC = ("advbench", "xstest", "coconot")
"""Public sets that may be trained on."""
CONTRAST_SET, ATTACK_SET = "coconot-contrast", "harmbench"
"""Sources of the prompts that may not: CoCoNot's contrast prompts, HarmBench's behaviours."""
_LONGEST_RESPONSE = 400  # characters of a public response; longer ones are cut at the end of a sentence


@dataclass(frozen=True)
class Base:
    """A base prompt.

    Attributes:
        id: The digest of kind, source and text.
        category: The key of its category in the authored set, "general" for public prompts.
        response: A benign prompt's answer, empty where there is none.
        group: The id of the first of its near-duplicates, itself included.
        split: train or test.
    """

    id: str
    kind: Kind
    category: str
    source: str
    prompt: str
    response: str = ""
    group: str = ""
    split: str = ""


def base(kind: Kind, category: str, source: str, prompt: str, response: str = "") -> Base:
    """A base prompt with its id, not yet in a group.

    Raises:
        BadInput: the prompt is empty.
    """
    if not prompt.strip():
        raise BadInput(f"{source}: a base prompt is empty; remove it")
    return Base(json_digest([kind, source, prompt]), kind, category, source, prompt, response)


@cache
def _authored() -> dict[str, Any]:
    found: dict[str, Any] = read_json(AUTHORED)["categories"]
    return found


def reasons(category: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """What harm a category does, and what may be offered instead; of "general", what holds for all."""
    if category == "general":
        return (
            ("it could hurt people or break the law", "someone could come to harm through it"),
            ("I am glad to help with something safe and lawful instead.", "I can talk about the risks of it instead."),
        )
    found = _authored()[category]
    return tuple(found["harms"]), tuple(found["instead"])


def authored() -> list[Base]:
    """The base prompts of `safety_prompts.json`."""
    found = []
    for category, entry in _authored().items():
        found += [base("adversarial", category, "authored", prompt) for prompt in entry["harmful"]]
        found += [base("benign", category, "authored", prompt, response) for prompt, response in entry["benign"]]
    return found


def public(names: Sequence[str], root: Path | None = None) -> list[Base]:
    """Base prompts of public sets; see `springhead.llm.publicsets` for what may be used for what.

    XSTest's safe prompts take the response that its annotators agreed complies; CoCoNot's preferred responses are
    taken as they are, so the stage that makes rows must choose among them.

    Raises:
        BadInput: a name is unknown or a file is missing.
    """
    unknown = sorted(set(names) - set(PUBLIC))
    if unknown:
        raise BadInput(f"unknown public sets {unknown}; those to train on are {', '.join(PUBLIC)}")
    found: list[Base] = []
    if "advbench" in names:
        found += [base("adversarial", "general", "advbench", goal) for _, goal in publicsets.advbench_goals(root)]
    if "xstest" in names:
        answers = {
            row.prompt.strip(): row.response
            for row in publicsets.xstest_responses(root)
            if row.model == "mistralinstruct" and row.label == "compliance" and row.labels[0] == row.labels[1]
        }
        for _, prompt, _, safe in publicsets.xstest_prompts(root):
            if not safe:
                found.append(base("contrast", "general", "xstest", prompt))
            elif prompt in answers:
                found.append(base("benign", "general", "xstest", prompt, _cut(answers[prompt])))
    if "coconot" in names:
        for _, prompt, chosen, _ in publicsets.coconot_pairs(root):
            found.append(base("benign", "general", "coconot", prompt, _cut(chosen)))
    return found


def contrast_bases(prompts: Sequence[tuple[str, str]]) -> list[Base]:
    """CoCoNot's contrast prompts, given as (id, prompt), as benign base prompts of the test side, none twice."""
    return _held_out("benign", CONTRAST_SET, prompts)


def attack_bases(prompts: Sequence[tuple[str, str]]) -> list[Base]:
    """HarmBench's behaviours, given as (id, prompt), as adversarial base prompts of the test side, none twice."""
    return _held_out("adversarial", ATTACK_SET, prompts)


def _held_out(kind: Kind, source: str, prompts: Sequence[tuple[str, str]]) -> list[Base]:
    found = [base(kind, "general", source, prompt) for prompt in dict.fromkeys(p for _, p in prompts)]
    return [replace(b, group=b.id, split=TEST) for b in found]


def _cut(text: str) -> str:
    """The first paragraphs and sentences of a text, up to the longest response."""
    if len(text) <= _LONGEST_RESPONSE:
        return text
    head = text[:_LONGEST_RESPONSE]
    end = max(head.rfind(sign) for sign in (". ", "! ", "? ", ".\n", "\n\n"))
    return head[: end + 1].strip() if end > 0 else head.strip()


def grouped(bases: Sequence[Base], threshold: float) -> list[Base]:
    """The bases without exact repetitions, each with the group of its near-duplicates.

    Two prompts are near-duplicates from a Jaccard index of their words of `threshold` on; a prompt joins the group of
    the earlier prompt that it is most similar to.
    """
    first: dict[str, Base] = {}
    for found in bases:
        first.setdefault(" ".join(found.prompt.lower().split()), found)
    unique = list(first.values())
    twins = earlier_twins([ngrams([b.prompt.lower()], 1) for b in unique], threshold)
    group: list[str] = []
    for index, found in enumerate(unique):
        similarity, other = twins.get(index, (0.0, index))
        group.append(group[other] if similarity >= threshold else found.id)
    return [
        Base(b.id, b.kind, b.category, b.source, b.prompt, b.response, g, b.split)
        for b, g in zip(unique, group, strict=True)
    ]


def split(bases: Sequence[Base], test_share: float, seed: int) -> list[Base]:
    """The bases with their split: the groups of each source are put in an order by digest, the first share tests.

    Raises:
        BadInput: the share is not between 0 and 1, or a kind to train or test on would be empty.
    """
    if not 0.0 < test_share < 1.0:
        raise BadInput("llm.rational.test_share must be strictly between 0 and 1")
    first: dict[str, Base] = {}
    for found in bases:
        first.setdefault(found.group, found)
    held: set[str] = set()
    for key in sorted({(b.kind, b.source, b.category) for b in first.values()}):
        groups = [g for g, b in first.items() if (b.kind, b.source, b.category) == key and b.kind != "contrast"]
        groups.sort(key=lambda g: json_digest([seed, g]))
        held.update(groups[: round(test_share * len(groups))])
    placed = [
        Base(b.id, b.kind, b.category, b.source, b.prompt, b.response, b.group, TEST if b.group in held else TRAIN)
        for b in bases
    ]
    for kind in ("adversarial", "benign"):
        for side in (TRAIN, TEST):
            if not any(b.kind == kind and b.split == side for b in placed):
                raise BadInput(f"no {kind} base prompts in the {side} split; use more prompts or another test_share")
    return placed


def without_leaks(bases: Sequence[Base], evaluation: Sequence[str], threshold: float) -> tuple[list[Base], int]:
    """The bases whose group has no training prompt near one of the evaluation prompts, and how many were dropped."""
    training = [b for b in bases if b.split == TRAIN]
    near = closest(
        [ngrams([b.prompt.lower()], 1) for b in training], [ngrams([p.lower()], 1) for p in evaluation], threshold
    )
    leaking = {b.group for b, (similarity, _) in zip(training, near, strict=True) if similarity >= threshold}
    kept = [b for b in bases if b.group not in leaking]
    return kept, len(bases) - len(kept)
