"""A small but whole repository: real digests, receipts, row tables, ledger, dvc.yaml and dvc.lock.

Nothing in it is trained; every file is written here, so a test knows each number it must find
again. Building takes a few seconds, so the fixtures build it once and copy the folder.
"""

import csv
import hashlib
import struct
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa

from springhead.jsonio import canonical, write_json
from springhead.lineage.digests import tree_digest, tree_files
from springhead.tables import write_table
from tests.lineage.repository import EPISODES, PROBLEMS, REVISION, Sample, digest_of

__all__ = ["EPISODES", "REVISION"]

TASK = "BallCircle"
DROPPED = (6, 7)  # the last two episodes are dropped by the outlier filter
REPLACED = 2  # this episode is changed by the inpaint filter


def episode(index: int) -> str:
    """Returns the id of a collected episode."""
    return digest_of("episode", index)


REPAIRED = digest_of("episode", REPLACED, "inpainted")


def problem(index: int) -> str:
    """Returns the id of a word problem."""
    return digest_of("problem", index)


def text_row(index: int, method: str, variant: int) -> str:
    """Returns the id of a training text made from a problem."""
    return digest_of("text", index, method, variant)


def _text(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


def write_image(path: Path) -> None:
    """Writes a white PNG image of one pixel."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header, pixel = struct.pack(">IIBBBBB", 1, 1, 8, 0, 0, 0, 0), zlib.compress(b"\x00\xff")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixel) + chunk(b"IEND", b""))


def _model_folder(path: Path, *content: object) -> None:
    write_json(path / "config.json", {"hidden": 8, "model_type": "sample", "content": [str(c) for c in content]})
    (path / "weights.safetensors").write_bytes(hashlib.sha256(repr(content).encode()).digest() * 4)


EPISODE_ROWS = pa.schema(
    [
        ("id", pa.string()),
        ("parents", pa.list_(pa.string())),
        ("policy", pa.string()),
        ("algorithm", pa.string()),
        ("cost_limit", pa.float64()),
        ("seed", pa.int64()),
        ("deterministic", pa.bool_()),
        ("episode_return", pa.float64()),
        ("cost_return", pa.float64()),
        ("length", pa.int64()),
        ("index", pa.int64()),
    ]
)
DECISIONS = pa.schema(
    [
        ("id", pa.string()),
        ("rule", pa.string()),
        ("kept", pa.bool_()),
        ("value", pa.float64()),
        ("threshold", pa.float64()),
        ("replaced_by", pa.string()),
    ]
)
QUARANTINE = pa.schema([(name, pa.string()) for name in ("id", "expectation", "severity", "detail")])
TEXT_ROWS = pa.schema(
    [
        ("id", pa.string()),
        ("parents", pa.list_(pa.string())),
        ("split", pa.string()),
        ("method", pa.string()),
        ("operator", pa.string()),
        ("variant", pa.int64()),
        ("generator", pa.string()),
        ("index", pa.int64()),
        ("file", pa.string()),
    ]
)


def _table(path: Path, schema: pa.Schema, rows: Sequence[Sequence[Any]]) -> None:
    columns = list(zip(*rows, strict=True)) if rows else [()] * len(schema)
    write_table(path, {n: list(c) for n, c in zip(schema.names, columns, strict=True)}, schema)


def _verdict(root: Path, folder: str, data: Path, warn: bool) -> dict[str, Any]:
    expectations = [
        {"name": "ExpectCostsNonNegative", "frame": "transitions", "column": "costs", "severity": "critical",
         "description": "costs are not negative", "success": True, "observed": {"min": 0.0},
         "unexpected_count": 0, "unexpected_id_count": 0, "unexpected_ids": []},
        {"name": "ExpectEnoughRows", "frame": "rows", "column": "", "severity": "warning",
         "description": "at least 100 rows", "success": not warn, "observed": 6,
         "unexpected_count": 0, "unexpected_id_count": 0, "unexpected_ids": []},
    ]  # fmt: skip
    verdict = {
        "suite": folder.replace("/", "."),
        "suite_digest": digest_of("suite"),
        "data_digest": tree_digest(data),
        "files": tree_files(data),
        "success": True,
        "severity": "warning" if warn else "none",
        "expectations": expectations,
        "quarantined": 0,
        "rows": 6,
    }
    write_json(root / folder / "verdict.json", verdict)
    _table(root / folder / "quarantine.parquet", QUARANTINE, [])
    return verdict


def write_rl(sample: Sample) -> None:
    """Writes the safe-RL branch: one task, two algorithms, two seeds."""
    root, item = sample.root, f"@{TASK}"
    policies = {}
    for index in range(2):
        folder = root / f"data/rl/experts/{TASK}/p{index}"
        _model_folder(folder, "expert", index)
        policies[f"p{index}"] = ("policy", {"task": TASK, "algorithm": "ppo-lag", "cost_limit": 10.0 * (index + 1)})
    write_json(root / f"data/rl/experts/{TASK}/index.json", [{"name": name} for name in policies])
    sample.stage(f"rl-experts{item}", f"data/rl/experts/{TASK}", models=policies)
    experts = [tree_digest(root / f"data/rl/experts/{TASK}/p{index}") for index in range(2)]

    def rows(ids: Sequence[tuple[str, list[str], int]]) -> list[list[Any]]:
        return [
            [i, parents, experts[n % 2], "ppo-lag", 10.0 * (n % 2 + 1), n, False, 30.0 * n, 5.0 * n, 100, place]
            for place, (i, parents, n) in enumerate(ids)
        ]

    collect, kept = f"data/rl/collect/{TASK}", f"data/rl/filter/{TASK}"
    _text(root / collect / "dataset.hdf5", "eight episodes " * 50)
    _table(root / collect / "rows.parquet", EPISODE_ROWS, rows([(episode(n), [], n) for n in range(EPISODES)]))
    sample.stage(f"rl-collect{item}", collect, [f"data/rl/experts/{TASK}"], datasets=[
        (f"{TASK}/collected", f"{collect}/dataset.hdf5", EPISODES, "output")])  # fmt: skip

    _text(root / kept / "dataset.hdf5", "six episodes " * 40)
    after = [(REPAIRED, [episode(n)], n) if n == REPLACED else (episode(n), [], n) for n in range(DROPPED[0])]
    _table(root / kept / "rows.parquet", EPISODE_ROWS, rows(after))
    _table(root / kept / "decisions.parquet", DECISIONS, [
        *([episode(n), "outlier", n not in DROPPED, 30.0 * n, 165.0, None] for n in range(EPISODES)),
        [episode(REPLACED), "inpaint", True, 60.0, 50.0, REPAIRED],
    ])  # fmt: skip
    sample.stage(f"rl-filter{item}", kept, [collect], datasets=[
        (f"{TASK}/filtered", f"{kept}/dataset.hdf5", 6, "output")])  # fmt: skip

    _verdict(root, f"data/rl/validate/{TASK}", root / kept, warn=False)
    sample.stage(f"rl-validate{item}", f"data/rl/validate/{TASK}", [kept])
    for algorithm in ("bc-safe", "cdt"):
        for seed in range(2):
            out = f"data/rl/train/{TASK}/{algorithm}/{seed}"
            _model_folder(root / out / "model", algorithm, seed)
            _text(root / out / "history.csv", "step,loss\n0,1.0\n50,0.5\n")
            facts = {"task": TASK, "algorithm": algorithm, "seed": seed}
            sample.stage(
                f"rl-train@{TASK}-{algorithm}-{seed}", out, [kept, f"data/rl/validate/{TASK}"],
                {"model": ("policy", facts)}, [(f"{TASK}/filtered", f"{kept}/dataset.hdf5", 6, "training")],
                {"loss": 0.5},
            )  # fmt: skip
    _rl_evaluation(sample)


def _rl_evaluation(sample: Sample) -> None:
    out, models = sample.root / f"data/rl/evaluate/{TASK}", sample.root / f"data/rl/train/{TASK}"
    write_image(out / "frontier.png")
    fields = ["algorithm", "cost_limit", "normalised_return_mean", "normalised_return_std", "normalised_cost_mean",
              "normalised_cost_std", "seeds"]  # fmt: skip
    lines = [
        ["bc-safe", 20, 0.412, 0.031, 0.93, 0.11, 2],
        ["bc-safe", 40, 0.497, 0.024, 0.71, 0.08, 2],
        ["cdt", 20, 0.618, 0.017, 0.88, 0.06, 2],
        ["cdt", 40, 0.655, 0.012, 0.64, 0.05, 2],
    ]
    with (out / "leaderboard.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file, lineterminator="\n").writerows([fields, *lines])
    entries = []
    for algorithm, seed in ((a, s) for a in ("bc-safe", "cdt") for s in (0, 1)):
        path = models / algorithm / str(seed) / "model"
        returns = {line[1]: {"return": line[2], "cost": line[4]} for line in lines if line[0] == algorithm}
        limits = {str(k): {f"normalised_{n}": v + 0.001 * seed for n, v in f.items()} for k, f in returns.items()}
        where = path.relative_to(sample.root).as_posix()
        entries.append(
            {"path": where, "digest": tree_digest(path), "algorithm": algorithm, "seed": seed, "limits": limits}
        )
    write_json(out / "summary.json", {"task": TASK, "models": entries, "references": {"random": {}}})
    metrics = {"cdt": {"normalised_return": 0.618, "normalised_cost": 0.88}}
    sample.stage(
        f"rl-evaluate@{TASK}", out.relative_to(sample.root).as_posix(), [f"data/rl/train/{TASK}"], metrics=metrics
    )


def write_llm(sample: Sample) -> None:
    """Writes the language branch: one student, two methods, one seed."""
    root = sample.root
    generator = "rule:dag"
    _text(root / "data/llm/problems/train.jsonl", "".join(f'{{"id":"{problem(n)}"}}\n' for n in range(PROBLEMS)))
    _table(root / "data/llm/problems/rows.parquet", TEXT_ROWS, [
        [problem(n), [], "id", None, None, 0, generator, n, "train.jsonl"] for n in range(PROBLEMS)])  # fmt: skip
    sample.stage("llm-problems", "data/llm/problems", datasets=[
        ("problems/train", "data/llm/problems/train.jsonl", PROBLEMS, "output")])  # fmt: skip

    ids = [(n, m, v) for m in ("sft", "mend") for n in range(PROBLEMS) for v in range(2 if m == "mend" else 1)]
    made = [
        [text_row(n, m, v), [problem(n)], "id", m, "order" if m == "mend" else None, v, generator, place, "train.jsonl"]
        for place, (n, m, v) in enumerate(ids)
    ]
    for step in ("generate", "filter"):
        table = made if step == "generate" else made[:-1]  # the last one is a near-duplicate
        folder = root / f"data/llm/{step}"
        lines = [canonical({"id": row[0], "method": row[3]}).decode() + "\n" for row in table]
        _text(folder / "train.jsonl", "".join(lines))
        _table(folder / "rows.parquet", TEXT_ROWS, table)
    _table(root / "data/llm/filter/decisions.parquet", DECISIONS, [
        [row[0], "near-duplicate", row is not made[-1], 0.99 if row is made[-1] else 0.2, 0.9, None] for row in made
    ])  # fmt: skip
    sample.stage("llm-generate", "data/llm/generate", ["data/llm/problems"])
    sample.stage("llm-filter", "data/llm/filter", ["data/llm/generate"], datasets=[
        ("texts/train", "data/llm/filter/train.jsonl", len(made) - 1, "output")])  # fmt: skip
    _verdict(root, "data/llm/validate", root / "data/llm/filter", warn=True)
    sample.stage("llm-validate", "data/llm/validate", ["data/llm/filter"])
    _model_folder(root / "data/llm/students/small-llama", "student")
    sample.stage("llm-students@small-llama", "data/llm/students/small-llama")
    reads = ["data/llm/filter", "data/llm/students/small-llama"]
    for method in ("sft", "mend"):
        out = f"data/llm/finetune/small-llama/{method}/0"
        _model_folder(root / out / "model", "llm", method)
        facts = {"student": "small-llama", "method": method, "seed": 0}
        sample.stage(
            f"llm-finetune@small-llama-{method}-0", out, reads, {"model": ("language-model", facts)},
            [("texts/train", "data/llm/filter/train.jsonl", len(made) - 1, "training")], {"loss": 0.25},
        )  # fmt: skip
    _llm_evaluation(sample)


def _llm_evaluation(sample: Sample) -> None:
    out = sample.root / "data/llm/evaluate/small-llama"
    out.mkdir(parents=True)
    lines = [
        ["split", "method", "seed", "worst_case", "accuracy", "worst_case_low", "worst_case_high"],
        ["id", "mend", 0, 0.69, 0.83, 0.64, 0.74],
        ["id", "sft", 0, 0.41, 0.77, 0.35, 0.47],
        ["id", "base", 0, 0.01, 0.05, 0.0, 0.03],
    ]
    with (out / "leaderboard.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file, lineterminator="\n").writerows(lines)
    entries = []
    for method, path, accuracy, worst in (
        ("base", "data/llm/students/small-llama", 0.05, 0.01),
        ("sft", "data/llm/finetune/small-llama/sft/0/model", 0.77, 0.41),
        ("mend", "data/llm/finetune/small-llama/mend/0/model", 0.83, 0.69),
    ):
        entry = {"path": path, "digest": tree_digest(sample.root / path), "method": method, "seed": 0}
        entries.append({**entry, "metrics": {"accuracy": accuracy, "worst_case": worst}})
    spread = {"base": 0.0, "sft": 0.03, "mend": 0.02}
    cells = {
        e["method"]: {name: {"mean": v, "std": spread[e["method"]]} for name, v in e["metrics"].items()}
        for e in entries
    }
    summary = {"student": "small-llama", "main_split": "id", "models": entries, "splits": {"id": cells}}
    write_json(out / "summary.json", summary)
    metrics = {"mend": {"worst_case": 0.69}, "sft": {"worst_case": 0.41}}
    reads = ["data/llm/finetune/small-llama", "data/llm/problems"]
    sample.stage("llm-evaluate@small-llama", "data/llm/evaluate/small-llama", reads, metrics=metrics)


def build(root: Path) -> Path:
    """Builds the whole sample repository and returns its root."""
    sample = Sample(root)
    write_rl(sample)
    write_llm(sample)
    sample.finish()
    return root
