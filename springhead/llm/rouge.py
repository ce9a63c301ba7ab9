"""ROUGE-1, ROUGE-2 and ROUGE-L (Lin, 2004), F1, as the package rouge-score computes them without stemming.

Words are the runs of letters a-z and digits of the lower-cased text. With several references the best one counts.
"""

import re
from collections import Counter
from collections.abc import Sequence

NAMES = ("rouge1", "rouge2", "rougeL")


def words(text: str) -> list[str]:
    """The words of a text."""
    return re.findall("[a-z0-9]+", text.lower())


def _f1(common: int, reference: int, given: int) -> float:
    return 2 * common / (reference + given) if common else 0.0


def rouge_n(reference: Sequence[str], given: Sequence[str], n: int) -> float:
    """F1 of the n-grams of two texts in words, each counted as often as both have it."""
    one, two = (Counter(zip(*(text[i:] for i in range(n)), strict=False)) for text in (reference, given))
    return _f1(sum((one & two).values()), sum(one.values()), sum(two.values()))


def rouge_l(reference: Sequence[str], given: Sequence[str]) -> float:
    """F1 of the longest common subsequence of two texts in words."""
    row = [0] * (len(given) + 1)
    for word in reference:
        before = 0
        for i, other in enumerate(given, start=1):
            kept = row[i]
            row[i] = before + 1 if word == other else max(row[i], row[i - 1])
            before = kept
    return _f1(row[-1], len(reference), len(given))


def rouge(references: Sequence[str], given: str) -> dict[str, float]:
    """The best F1 over the references, of each of `NAMES`."""
    mine = words(given)
    theirs = [words(reference) for reference in references]
    return {
        "rouge1": max(rouge_n(reference, mine, 1) for reference in theirs),
        "rouge2": max(rouge_n(reference, mine, 2) for reference in theirs),
        "rougeL": max(rouge_l(reference, mine) for reference in theirs),
    }
