"""The worlds of the arithmetic problems: who holds what, and the words of their sentences."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from springhead.errors import BadInput
from springhead.jsonio import read_json

_GRAMMAR = ("more", "fewer", "than", "times", "as", "many", "and", "together", "How", "does", "Answer")
_SIGNS = (".", "?", ":", "=", "+", "-", "*")


@dataclass(frozen=True)
class Vocabulary:
    """A world: who holds (`holders`), what (`items`, plural), and the verb in both forms ("has", "have")."""

    name: str
    verb: str
    base: str
    holders: tuple[str, ...]
    items: tuple[str, ...]


@lru_cache(maxsize=1)
def vocabularies() -> dict[str, Vocabulary]:
    """All vocabularies by name, read once from `vocabularies.json` beside this file."""
    raw = read_json(Path(__file__).with_name("vocabularies.json"))
    return {
        name: Vocabulary(name, v["verb"], v["base"], tuple(v["holders"]), tuple(v["items"]))
        for name, v in sorted(raw.items())
    }


def check_names(where: str, given: Sequence[str], known: Sequence[str]) -> None:
    """Raise BadInput, naming the known ones, unless `given` holds at least one name and only known ones."""
    unknown = sorted(set(given) - set(known))
    if unknown or not given:
        raise BadInput(f"{where}: unknown or empty {unknown}; choose from {', '.join(known)}")


def lexicon(names: Sequence[str] = (), max_number: int = 99) -> list[str]:
    """Every word and sign a problem, its question or its chain can contain, sorted.

    A word-level tokenizer built on it never meets an unknown word, whatever rows it is trained on.
    """
    check_names("vocabularies", names or tuple(vocabularies()), tuple(vocabularies()))
    words = {*_GRAMMAR, *_SIGNS}
    for name in names or vocabularies():
        world = vocabularies()[name]
        words |= {world.verb, world.base, *world.holders, *world.items}
    return sorted(words | {str(number) for number in range(max_number + 1)})
