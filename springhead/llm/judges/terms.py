"""What the refusal judge sees of an answer: word n-grams of its beginning, without the words of the prompt.

A refusal is told by how an answer begins. What it is about ("launder money") only misleads a judge that was trained
on other topics, so a word that the prompt has too is replaced by one sign, as numbers are ("delexicalised").
"""

from __future__ import annotations

import re
from collections.abc import Sequence

Bag = dict[str, int]
"""How often each n-gram occurs."""

_TOKEN = re.compile(r"[a-z]+(?:'[a-z]+)?|\d+|[^\w\s]")
_SENTENCE = re.compile(r"(?<=[.!?:])\s+|\n+")
_ENDINGS = ("ing", "ers", "ies", "ed", "es", "er", "s", "e")
# Words of a prompt that an answer has for other reasons: they stay. The last line's are what a refusal declines to do.
_COMMON = frozenset(
    re.findall(
        r"\w+",
        """a about an and any are as at be best by can could did do does for from get good has have he how i if in
    into is it make me my need no not of on or out people she should so some someone something than that the
    their them then there they this to up use want was way ways we what when where which who why will with
    would you your
    help tell give explain write create provide assist answer describe show teach say know support""",
    )
)
FROM_PROMPT, NUMBER = "<prompt>", "<number>"
BEGINNING = 60
"""Tokens of the first view."""
SENTENCES, SENTENCE_TOKENS = 4, 40
"""The second view: the first sentences, each marked by its place, each cut to so many tokens."""
LONGEST = 3
"""Words of the longest n-gram."""
VIEWS = ("beginning", "sentences")


def tokens(text: str) -> list[str]:
    """Lower-case words, numbers and signs."""
    return _TOKEN.findall(text.lower().replace("\u2019", "'"))


def sentences(text: str) -> list[str]:
    """The sentences and lines of a text, none of them empty."""
    return [part for part in _SENTENCE.split(text.strip()) if part.strip()]


def stem(word: str) -> str:
    """A word without its commonest ending."""
    for ending in _ENDINGS:
        if word.endswith(ending) and len(word) - len(ending) >= 3:
            return word[: -len(ending)]
    return word


def content_stems(text: str) -> set[str]:
    """Stems of the words that say what a text is about."""
    return {stem(word) for word in tokens(text) if word.isalpha() and word not in _COMMON}


def delexicalised(prompt_stems: set[str], text: str) -> list[str]:
    """Tokens with the prompt's words and numbers replaced by one sign each; a run of the first counts once."""
    found: list[str] = []
    for word in tokens(text):
        if word.isalpha() and stem(word) in prompt_stems:
            if not found or found[-1] != FROM_PROMPT:
                found.append(FROM_PROMPT)
        else:
            found.append(NUMBER if word.isdigit() else word)
    return found


def views(prompt: str, response: str) -> list[Bag]:
    """The n-grams of each of the `VIEWS` of a response."""
    stems = content_stems(prompt)
    marked: list[str] = []
    for place, sentence in enumerate(sentences(response)[:SENTENCES]):
        marked += [f"<{place}>", *delexicalised(stems, sentence)[:SENTENCE_TOKENS]]
    # Four tokens of eight letters fill the beginning long before this cut, which keeps long answers cheap.
    beginning = delexicalised(stems, response[: BEGINNING * 40])[:BEGINNING]
    return [_ngrams(beginning), _ngrams(marked)]


def _ngrams(words: Sequence[str]) -> Bag:
    found: Bag = {}
    for size in range(1, LONGEST + 1):
        for start in range(len(words) - size + 1):
            term = " ".join(words[start : start + size])
            found[term] = found.get(term, 0) + 1
    return found
