"""The training curve of a run and its file."""

import csv
from collections.abc import Mapping
from pathlib import Path

COLUMNS = ("step", "tokens", "train_loss", "learning_rate", "eval_loss")
History = list[dict[str, float]]
"""A line for each step, with `COLUMNS`; eval_loss is -1 where it was not measured."""


def write_history(path: Path, history: History) -> None:
    """One line per step; the evaluation loss is empty where it was not measured."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        for line in history:
            shown = {name: int(value) if name in ("step", "tokens") else f"{value:.6g}" for name, value in line.items()}
            writer.writerow(shown | ({"eval_loss": ""} if line["eval_loss"] < 0 else {}))


def run_figures(
    history: History, counts: Mapping[str, int], held_out: Mapping[str, int] | None = None
) -> dict[str, float]:
    """What a fine-tuning stage reports of a run: the counts of `springhead.llm.packing.encode_rows`, length, losses.

    There is no evaluation loss where none was measured.

    Args:
        history: of the run.
        counts: of the training rows.
        held_out: of the evaluation rows, where there are any.
    """
    last = history[-1]
    measured = {} if last["eval_loss"] < 0 else {"eval_loss": last["eval_loss"]}
    return {
        **{name: counts[name] for name in ("rows", "dropped", "truncated")},
        "steps": int(last["step"]),
        "tokens": int(last["tokens"]),
        "epochs": last["tokens"] / counts["tokens"],
        "train_loss": last["train_loss"],
        **measured,
        **{f"eval_{name}": held_out[name] for name in ("dropped", "truncated") if held_out},
    }
