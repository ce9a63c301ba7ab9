"""Are evaluation rows among the training rows? A loss on rows that were trained on says nothing.

Compared are the words of whole conversations, as 3-grams inside each message, without case and without system messages
(one that all rows share would make all rows alike). MinHash finds candidates, an exact Jaccard index decides; a
repeated row has 1.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from springhead.errors import BadInput
from springhead.llm import similarity
from springhead.llm.chat import messages_of

Policy = Literal["error", "report", "ignore"]
_NGRAM = 3
_SHOWN = 5


@dataclass(frozen=True)
class Overlap:
    """An evaluation row and the training row that is most like it."""

    row: str
    like: str
    similarity: float


def overlaps(
    train: Sequence[Mapping[str, Any]], held_out: Sequence[Mapping[str, Any]], threshold: float
) -> list[Overlap]:
    """The evaluation rows that a training row is at least `threshold` similar to, in their order.

    Args:
        train: conversations with ids.
        held_out: the same.
        threshold: least Jaccard index, 0..1.
    """
    first: dict[similarity.Grams, str] = {}
    for row, grams in zip(train, _grams(train), strict=True):
        first.setdefault(grams, str(row["id"]))
    names = list(first.values())
    closest = similarity.closest(_grams(held_out), list(first), threshold)
    return [
        Overlap(str(row["id"]), names[index], round(score, 4))
        for row, (score, index) in zip(held_out, closest, strict=True)
        if index >= 0 and score >= threshold
    ]


def refuse(found: Sequence[Overlap], where: str) -> None:
    """Make sure that there are none.

    Args:
        found: by `overlaps`.
        where: the file of the evaluation rows.

    Raises:
        BadInput: naming the first of them by id.
    """
    if not found:
        return
    shown = ", ".join(f"{one.row} (like {one.like}: {one.similarity:g})" for one in found[:_SHOWN])
    more = f" and {len(found) - _SHOWN} more" if len(found) > _SHOWN else ""
    raise BadInput(
        f"{where}: {len(found)} evaluation rows are among the training rows, or nearly: {shown}{more}; remove them, or "
        "set overlap to report to train all the same"
    )


def _grams(rows: Iterable[Mapping[str, Any]]) -> list[similarity.Grams]:
    said = ([m["content"].casefold() for m in messages_of(row) if m["role"] != "system"] for row in rows)
    return [similarity.ngrams(texts, _NGRAM) for texts in said]
