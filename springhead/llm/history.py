"""The training curve of a run and its file."""

import csv
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
