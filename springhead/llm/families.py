"""Which module reads the texts of a family of problems back and solves them."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from types import MappingProxyType, ModuleType

from springhead.errors import BadInput
from springhead.llm import gsm8k, logic, prontoqa, solver
from springhead.sources import obtain

READERS: Mapping[str, ModuleType] = MappingProxyType(
    {"dag": solver, "logic": logic, prontoqa.FAMILY: prontoqa, gsm8k.FAMILY: gsm8k}
)
"""By family; each has `solve`, `needed_statements`, `signature` and `chain_error`, and `plain` if its sentences are
reworded."""
LABELLED = frozenset({"logic", prontoqa.FAMILY})
"""Families whose answers are True and False; those of the others are numbers."""
STORIES = frozenset({gsm8k.FAMILY})
"""Families of natural text, whose problems come without redundant statements."""


def reader(family: str) -> ModuleType:
    """The module of a family.

    Raises:
        BadInput: there is no such family.
    """
    if family not in READERS:
        raise BadInput(f"unknown family {family!r}; known: {', '.join(READERS)}")
    return READERS[family]


def own_words(family: str, sentence: str) -> str:
    """A sentence of a generated family in the generator's own words; of any other family as it is.

    Raises:
        BadInput: there is no such family.
    """
    plain = getattr(reader(family), "plain", None)
    return str(plain(sentence)) if plain is not None else sentence


def obtain_sources(problems: Iterable[tuple[str, Iterable[str]]], root: Path | None = None) -> None:
    """Makes sure that the files are at hand which the answers of problems of natural text are looked up in.

    Args:
        problems: family and parents of each; the parents of a story name its source before the slash.
        root: the repository.

    Raises:
        BadInput: one of the files cannot be had.
    """
    names = {parent.partition("/")[0] for family, parents in problems if family in STORIES for parent in parents}
    for name in sorted(names):
        obtain(name, root)
