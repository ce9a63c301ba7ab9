"""How right, and how consistently right, a model is over rewritings of the same problems.

Premise-order and redundancy variants of a problem have one answer. Beside mean accuracy we therefore report, per
MEND (arXiv 2502.17800): worst case (a problem counts only if all its variants are right), consistency (share of
the most frequent answer over the variants, and how often all answers are equal), the histogram all right / mixed
/ all wrong, and accuracy against Kendall's tau of the statement order (the axis of the premise-order papers), in
five bins of equal width. Intervals re-draw whole problems, since the variants of a problem are not independent.

"Order variants" are a problem's rows without redundant statements; "all variants" include the redundant ones.
"""

import math
from bisect import bisect
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from springhead.errors import BadInput
from springhead.llm.mend import final_answer

Graded = dict[str, Any]
"""An evaluation row with the model's `given` answer (None where it gave none) and `right`."""
TAU_EDGES = (-0.6, -0.2, 0.2, 0.6)
"""Where a bin of Kendall's tau ends and the next one begins."""
TAU_BINS = ("-1.0 to -0.6", "-0.6 to -0.2", "-0.2 to 0.2", "0.2 to 0.6", "0.6 to 1.0")
"""The bins; each holds its lower edge, the last one both. The first has the reversed order, the last solving order."""


def grade(rows: Sequence[Mapping[str, Any]], texts: Sequence[str]) -> list[Graded]:
    """Compare each text's final answer with its row's, exactly.

    Raises:
        BadInput: there are not as many texts as rows.
    """
    if len(rows) != len(texts):
        raise BadInput(f"{len(texts)} answers for {len(rows)} evaluation rows")
    graded = []
    for row, text in zip(rows, texts, strict=True):
        given = final_answer(text)
        graded.append({**row, "problem": row["parents"][0], "given": given, "right": given == str(row["answer"])})
    return graded


def wilson(successes: int, trials: int, z: float = 1.96) -> tuple[float, float]:
    """Wilson's score interval of a proportion (95 % by default); (0, 1) without trials."""
    if trials == 0:
        return 0.0, 1.0
    share = successes / trials
    scale = 1 + z * z / trials
    centre = (share + z * z / (2 * trials)) / scale
    half = z / scale * math.sqrt(share * (1 - share) / trials + z * z / (4 * trials * trials))
    return max(0.0, centre - half), min(1.0, centre + half)


def bootstrap(values: Sequence[float], seed: int, draws: int = 1000) -> tuple[float, float]:
    """95 % percentile interval of the mean, re-drawing whole problems (whose variants are not independent)."""
    data = np.asarray(values, dtype=np.float64)
    picks = np.random.default_rng(seed).integers(len(data), size=(draws, len(data)))
    low, high = np.quantile(data[picks].mean(axis=1), [0.025, 0.975])
    return float(low), float(high)


def bootstrap_ratio(
    hits: Sequence[float], counts: Sequence[float], seed: int, draws: int = 1000
) -> tuple[float, float]:
    """95 % percentile interval of sum(hits) / sum(counts) over problems.

    A draw that counts nothing has no ratio and is left out; (0, 1), as for `wilson`, where none counts anything.
    """
    top, below = np.asarray(hits, dtype=np.float64), np.asarray(counts, dtype=np.float64)
    picks = np.random.default_rng(seed).integers(len(top), size=(draws, len(top)))
    sums, trials = top[picks].sum(axis=1), below[picks].sum(axis=1)
    if not trials.any():
        return 0.0, 1.0
    low, high = np.quantile(sums[trials > 0] / trials[trials > 0], [0.025, 0.975])
    return float(low), float(high)


def _share(flags: Iterable[bool]) -> float:
    values = list(flags)
    return sum(values) / len(values) if values else 0.0


def _by(rows: Iterable[Graded], key: Callable[[Graded], Any]) -> dict[Any, list[Graded]]:
    groups: dict[Any, list[Graded]] = defaultdict(list)
    for row in rows:
        groups[key(row)].append(row)
    return dict(sorted(groups.items()))


def order_name(row: Mapping[str, Any]) -> str:
    """topological, random or reversed: the arrangement without the number of a random order."""
    return str(row["arrangement"]).partition("-")[0]


def over_variants(rows: Sequence[Graded]) -> dict[str, float]:
    """Worst case, consistency and histogram over the variants of each problem in these rows.

    Returns:
        accuracy (mean over rows), worst_case, consistency (mean share of the modal answer), all_equal, all_right,
        mixed, all_wrong, and vote: how often the commonest answer given is right (of equals, the earlier variant's),
        which is what asking in every order and taking the majority gets, at as many times the cost. Shares in 0..1
        of the problems. A missing answer is an answer of its own, but has no vote.
    """
    groups = list(_by(rows, lambda r: r["problem"]).values())
    right = [[row["right"] for row in group] for group in groups]
    modal = [_modal_share(group) for group in groups]
    worst = _share(all(flags) for flags in right)
    return {
        "accuracy": _share(row["right"] for row in rows),
        "vote": _share(_vote(group) for group in groups),
        "worst_case": worst,
        "consistency": sum(modal) / len(modal) if modal else 0.0,
        "all_equal": _share(share == 1.0 for share in modal),
        "all_right": worst,
        "mixed": _share(any(flags) and not all(flags) for flags in right),
        "all_wrong": _share(not any(flags) for flags in right),
    }


def _modal_share(group: Sequence[Graded]) -> float:
    """The share of the most frequent answer among a problem's variants."""
    return Counter(row["given"] for row in group).most_common(1)[0][1] / len(group)


def _vote(group: Sequence[Graded]) -> bool:
    """Whether the commonest answer of a problem's variants is right."""
    votes = Counter(row["given"] for row in group if row["given"] is not None)
    if not votes:
        return False
    winner = votes.most_common(1)[0][0]
    return any(row["right"] for row in group if row["given"] == winner)


def accuracy_by_order(rows: Sequence[Graded]) -> list[dict[str, Any]]:
    """Accuracy with Wilson's interval for each split, number of redundant statements and order.

    `kendall_tau` is the mean over the rows of an order; `accuracy_by_tau` keeps different taus apart.
    """
    return _accuracy_by(rows, "order", order_name)


def accuracy_by_tau(rows: Sequence[Graded]) -> list[dict[str, Any]]:
    """Accuracy with Wilson's interval for each split, number of redundant statements and bin of Kendall's tau."""
    lines = _accuracy_by(rows, "tau", lambda row: bisect(TAU_EDGES, row["kendall_tau"]))
    return [{**line, "tau": TAU_BINS[line["tau"]]} for line in lines]


def _accuracy_by(rows: Sequence[Graded], name: str, key: Callable[[Graded], Any]) -> list[dict[str, Any]]:
    table = []
    for (split, redundancy, value), group in _by(rows, lambda r: (r["split"], r["redundancy"], key(r))).items():
        right = sum(row["right"] for row in group)
        low, high = wilson(right, len(group))
        taus = [float(row["kendall_tau"]) for row in group]
        table.append(
            {
                "split": split,
                "redundancy": int(redundancy),
                name: value,
                "rows": len(group),
                "kendall_tau": sum(taus) / len(taus),
                "accuracy": right / len(group),
                "low": low,
                "high": high,
            }
        )
    return table


def split_metrics(rows: Sequence[Graded], seed: int) -> dict[str, Any]:
    """All metrics of one split's graded rows.

    Returns:
        The figures of `over_variants` for the order variants; `worst_case_interval`, `accuracy_interval` and
        `consistency_interval` (bootstrap over problems); the same figures over all variants under `all_variants`;
        accuracy by `order`, `tau` (see `TAU_BINS`), `redundancy`, `ops`, `depth` and `family`;
        `order_drop` = accuracy(topological) - accuracy(reversed), order variants only.
    """
    plain = [row for row in rows if row["redundancy"] == 0]
    if not plain:
        raise BadInput("evaluation rows without redundancy are missing; re-run the generate stage")
    metrics: dict[str, Any] = dict(over_variants(plain))
    groups = list(_by(plain, lambda r: r["problem"]).values())
    worst = [float(all(r["right"] for r in group)) for group in groups]
    metrics["worst_case_interval"] = list(bootstrap(worst, seed))
    right = [sum(r["right"] for r in group) for group in groups]
    metrics["accuracy_interval"] = list(bootstrap_ratio(right, [len(group) for group in groups], seed))
    metrics["consistency_interval"] = list(bootstrap([_modal_share(group) for group in groups], seed))
    metrics["problems"] = len(worst)
    metrics["all_variants"] = over_variants(rows)

    def shares(chosen: Sequence[Graded], key: Callable[[Graded], Any]) -> dict[str, float]:
        return {str(name): _share(r["right"] for r in group) for name, group in _by(chosen, key).items()}

    by_order = shares(plain, order_name)
    metrics["order"] = by_order
    metrics["order_drop"] = by_order.get("topological", 0.0) - by_order.get("reversed", 0.0)
    by_bin = shares(plain, lambda r: TAU_BINS[bisect(TAU_EDGES, r["kendall_tau"])])
    metrics["tau"] = {name: by_bin[name] for name in TAU_BINS if name in by_bin}
    metrics["redundancy"] = shares(rows, lambda r: r["redundancy"])
    for name in ("ops", "depth", "family"):
        metrics[name] = shares(plain, lambda r, key=name: r[key])  # type: ignore[misc]
    return metrics


def correction_intervals(
    problems: Sequence[str], before: Sequence[bool], after: Sequence[bool], seed: int
) -> dict[str, list[float]]:
    """Intervals of the four rates of `springhead.llm.rac.rates`, re-drawing whole problems; see `bootstrap_ratio`.

    Args:
        problems: the problem of each row.
        before: whether the first answer is right.
        after: whether the corrected one is.
        seed: of the draws.
    """
    place = np.unique(np.asarray(problems), return_inverse=True)[1]
    first, second = np.asarray(before, dtype=bool), np.asarray(after, dtype=bool)
    every = np.ones(len(first), dtype=bool)
    rates = {
        "plain": (first, every),
        "corrected": (second, every),
        "wrong_to_right": (~first & second, ~first),
        "right_to_wrong": (first & ~second, first),
    }
    return {
        name: list(bootstrap_ratio(np.bincount(place, hits).tolist(), np.bincount(place, of).tolist(), seed))
        for name, (hits, of) in rates.items()
    }


def model_metrics(rows: Sequence[Graded], seed: int) -> dict[str, dict[str, Any]]:
    """`split_metrics` of every split."""
    return {str(split): split_metrics(group, seed) for split, group in _by(rows, lambda r: r["split"]).items()}


def spread(values: Sequence[float]) -> dict[str, float]:
    """Mean, sample standard deviation (0 for a single value), minimum and maximum."""
    data = np.asarray(values, dtype=np.float64)
    return {
        "mean": float(data.mean()),
        "std": float(data.std(ddof=1)) if len(data) > 1 else 0.0,
        "min": float(data.min()),
        "max": float(data.max()),
        "seeds": len(data),
    }


SIDE_BY_SIDE = (
    "accuracy",
    "vote",
    "worst_case",
    "consistency",
    "all_equal",
    "all_right",
    "mixed",
    "all_wrong",
    "order_drop",
)


def side_by_side(models: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Mean and spread over seeds of each method, by split.

    Args:
        models: entries with `method` and `metrics` (of `model_metrics`).

    Returns:
        {split: {method: {metric: spread, "worst_case_all_variants": spread, "order": {name: spread},
        "tau": {bin: spread}}}}.
    """
    table: dict[str, dict[str, Any]] = {}
    splits = sorted({split for model in models for split in model["metrics"]})
    methods = sorted({str(model["method"]) for model in models}, key=lambda m: (m != "base", m != "sft", m))
    for split in splits:
        for method in methods:
            runs = [m["metrics"][split] for m in models if m["method"] == method]
            cell: dict[str, Any] = {name: spread([run[name] for run in runs]) for name in SIDE_BY_SIDE}
            cell["worst_case_all_variants"] = spread([run["all_variants"]["worst_case"] for run in runs])
            orders = sorted({order for run in runs for order in run["order"]})
            cell["order"] = {order: spread([run["order"][order] for run in runs]) for order in orders}
            bins = [name for name in TAU_BINS if any(name in run["tau"] for run in runs)]
            cell["tau"] = {name: spread([run["tau"][name] for run in runs]) for name in bins}
            table.setdefault(split, {})[method] = cell
    return table
