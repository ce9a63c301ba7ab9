"""Jaccard similarity of word n-grams at scale: MinHash with banding finds candidates, an exact count decides.

Source: Broder, "On the resemblance and containment of documents" (1997); banding as in Leskovec, Rajaraman and
Ullman, Mining of Massive Datasets, chapter 3. Our own vectorised implementation, with fixed keys, so that equal
texts give equal results on every machine.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Sequence

import numpy as np

PERMUTATIONS = 128
_MISS = 1e-3
"""Bound on the chance that banding overlooks a pair that lies exactly at the threshold."""
_MARGIN = 0.2
"""Candidates whose estimate lies further below the threshold are not counted exactly (4 standard errors at .5)."""

Grams = frozenset[str]


def ngrams(sentences: Iterable[str], size: int) -> Grams:
    """Word n-grams inside each sentence. A shorter sentence counts as one, no text at all as an empty one."""
    found: set[str] = set()
    for sentence in sentences:
        words = re.findall(r"\w+", sentence)
        found.update(" ".join(words[i : i + size]) for i in range(max(1, len(words) - size + 1)))
    return frozenset(found or {""})  # never empty: a MinHash needs something to hash


def jaccard(left: Grams, right: Grams) -> float:
    """Size of the intersection over the size of the union; 1 for two empty sets."""
    union = len(left | right)
    return len(left & right) / union if union else 1.0


def minhash(sets: Sequence[Grams]) -> np.ndarray:
    """MinHash signatures, uint64 [sets, 128]. The share of equal columns of two rows estimates their Jaccard index.

    Every set must hold at least one n-gram.
    """
    words = sorted(set().union(*sets))
    number = {word: i for i, word in enumerate(words)}
    hashes = [int.from_bytes(hashlib.blake2b(w.encode(), digest_size=8).digest(), "little") for w in words]
    base = np.array(hashes, dtype=np.uint64)
    flat = np.array([number[word] for s in sets for word in s], dtype=np.int64)
    starts = np.cumsum([0, *(len(s) for s in sets[:-1])])
    keys = np.random.default_rng(0).integers(0, 2**63, size=PERMUTATIONS, dtype=np.uint64)
    # The minimum does not depend on the order inside a set, so the sets' own order is harmless.
    columns = [np.minimum.reduceat(_mix(base ^ key)[flat], starts) for key in keys]
    return np.stack(columns, axis=1)


def _mix(x: np.ndarray) -> np.ndarray:
    """A bijection of uint64 that spreads every bit over the word (finaliser of the SplitMix64 generator)."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return np.asarray(x ^ (x >> np.uint64(31)))


def band_width(threshold: float) -> int:
    """Columns per band: the most (fewest false candidates) at which a pair at the threshold is hardly ever missed."""
    widths = [w for w in (16, 8, 4, 2) if (1 - threshold**w) ** (PERMUTATIONS // w) <= _MISS]
    return widths[0] if widths else 1


def _candidates(signatures: np.ndarray, left: int, threshold: float) -> np.ndarray:
    """Pairs [n, 2] that agree on a whole band and look similar enough over all columns, sorted.

    With `left` = 0, pairs (i, j) with i < j among all rows; else pairs of one of the first `left` rows and one of
    the others.
    """
    width, total = band_width(threshold), len(signatures)
    found: list[np.ndarray] = []
    for start in range(0, PERMUTATIONS, width):
        # One number per row and band; a chance collision only adds a candidate, and candidates are counted exactly.
        keys = np.zeros(total, dtype=np.uint64)
        for column in signatures[:, start : start + width].T:
            keys = _mix(keys ^ column)
        order = np.argsort(keys, kind="stable")
        breaks = np.flatnonzero(keys[order][1:] != keys[order][:-1]) + 1
        for bucket in np.split(order, breaks):
            if len(bucket) > 1:
                found.append(_pairs(bucket, left, total))
    codes = np.unique(np.concatenate(found)) if found else np.empty(0, dtype=np.int64)
    pairs = np.stack([codes // total, codes % total], axis=1)
    chunks = np.array_split(pairs, len(pairs) // 100_000 + 1)
    close = [(signatures[c[:, 0]] == signatures[c[:, 1]]).mean(axis=1) >= threshold - _MARGIN for c in chunks]
    return np.asarray(pairs[np.concatenate(close)])


def _pairs(bucket: np.ndarray, left: int, total: int) -> np.ndarray:
    """The bucket's pairs as codes i * total + j; inside a bucket the rows are in ascending order."""
    if left:
        first, second = np.meshgrid(bucket[bucket < left], bucket[bucket >= left], indexing="ij")
        return np.ravel(first * total + second)
    a, b = np.triu_indices(len(bucket), k=1)
    codes: np.ndarray = bucket[a] * total + bucket[b]
    return codes


def earlier_twins(sets: Sequence[Grams], threshold: float) -> dict[int, tuple[float, int]]:
    """For each set, its most similar *kept* earlier set among the candidates: {index: (similarity, other)}.

    A set is kept unless it is at least `threshold` similar to a kept earlier one. Sets without any candidate are
    left out.
    """
    result: dict[int, tuple[float, int]] = {}
    if len(sets) < 2:
        return result
    pairs = _candidates(minhash(sets), 0, threshold)
    dropped: set[int] = set()
    for i, j in pairs[np.lexsort((pairs[:, 0], pairs[:, 1]))].tolist():
        if i in dropped:
            continue
        similarity = jaccard(sets[i], sets[j])
        if similarity > result.get(j, (-1.0, 0))[0]:
            result[j] = (similarity, i)
        if similarity >= threshold:
            dropped.add(j)
    return result


def closest(sets: Sequence[Grams], references: Sequence[Grams], threshold: float) -> list[tuple[float, int]]:
    """For each set, (similarity, index) of the most similar reference among the candidates; (0, -1) without one."""
    if not sets or not references:
        return [(0.0, -1)] * len(sets)
    # Many rows are variants of one problem: compare each different set once.
    unique = list(dict.fromkeys(sets))
    best = [(0.0, -1)] * len(unique)
    signatures = minhash([*unique, *references])
    for i, j in _candidates(signatures, len(unique), threshold).tolist():
        similarity = jaccard(unique[i], references[j - len(unique)])
        if similarity > best[i][0]:
            best[i] = (similarity, j - len(unique))
    found = dict(zip(unique, best, strict=True))
    return [found[s] for s in sets]
