"""Whether a text looks English: by its letters and, from a dozen words on, by how many of its words are common ones."""

from __future__ import annotations

import re

COMMON = frozenset(
    re.findall(
        r"\w+",
        """the a an and or but of to in on at for with from by as is are was be it its this that these you i we they
        my your his her our their not no do does can could will would should if so when where which who how what why
        about into up out""",
    )
)
"""The commonest words of English prose."""
_FROM_WORDS, _LEAST_SHARE = 12, 0.15
"""From so many words on, so large a share must be common ones."""


def foreign(text: str, common: frozenset[str] = COMMON) -> str | None:
    """Why a text does not look English, or None; short texts are not judged but by their letters."""
    letters = [c for c in text if c.isalpha()]
    strange = sum(ord(c) > 0x24F for c in letters)
    if strange > 0.1 * len(letters):
        return f"{strange} of {len(letters)} letters are not Latin"
    words = words_of(text)
    share = sum(word in common for word in words) / max(len(words), 1)
    if len(words) >= _FROM_WORDS and share < _LEAST_SHARE:
        return f"only {share:.0%} of {len(words)} words are common English words"
    return None


def words_of(text: str) -> list[str]:
    """The words of a text in small letters, without numbers and signs."""
    return re.findall(r"[^\W\d_]+", text.lower())
