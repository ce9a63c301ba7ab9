"""MEND beside plain fine-tuning, RC-Aug and paraphrases, in and out of distribution: a small Llama from scratch.

    python benchmarks/mend_methods.py run                   # goes on after the models that are done
    python benchmarks/mend_methods.py table                 # the tables of docs/results/mend.md

Problems over graphs of facts. The base knows one to three operations told in solving order, with 24 names. Every
method goes on from it by LoRA with the same problems (one and two operations, twelve of the names), steps and tokens a
step. Asked are unseen problems, each in four orders (solving order, reversed, two at random):

    order             nothing redundant
    redundancy        one redundant fact, as MEND shows in training
    ood-names         the problems of `order` with the other twelve names
    ood-redundancy    two redundant facts; no method saw more than one
    ood-depth         problems of three operations; no method went on with more than two

Settings were chosen with `--part dev`, on other problems and seed 0. Every model leaves one file.
"""

from __future__ import annotations

import argparse
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from over_seeds import cell
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from springhead.errors import BadInput
from springhead.jsonio import canonical, read_json, write_json
from springhead.lineage.digests import json_digest, tree_digest
from springhead.llm import evaluation, generation, mend, paraphrase, problems, sft, students, textrows
from springhead.llm.packing import encode_rows

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "docs/results/mend"
WORK = ROOT / ".springhead/mend-methods"
BASE, SFT, RC, PARAPHRASE, MEND, MEND_ROWS = "base", "sft", "rc-aug", "paraphrase", "mend", "mend-equal-rows"
METHODS = (BASE, SFT, RC, PARAPHRASE, MEND, MEND_ROWS)
"""`mend-equal-rows` has as many rows as plain fine-tuning, of a quarter of its problems."""
SEEDS = (0, 1, 2)
MAX_LENGTH = 400
VARIANTS = 3
SPLITS = {"order": 0, "redundancy": 1, "ood-names": 0, "ood-redundancy": 2, "ood-depth": 0}
"""What is asked, and how many redundant facts are shown."""
FIGURES = ("worst_case", "consistency", "accuracy", "all_wrong", "vote")
DEPTH = 2
"""Most operations of a training problem."""
NAMES = 12
"""Names of the training problems; the base knows twice as many."""


@dataclass(frozen=True)
class Setting:
    """What is trained on and how."""

    problems: int
    asked: int
    spec: problems.ProblemSpec
    small: students.SmallLlama
    sft: sft.SftConfig


SETTING = Setting(
    problems=4000,
    asked=200,
    spec=problems.ProblemSpec(
        vocabularies=("market",), operators=("more", "fewer", "sum"), ops_min=1, ops_max=DEPTH, depth_min=1,
        depth_max=DEPTH, max_value=20, max_constant=9, max_step=5, holders=NAMES, items=1, redundant=2, holdout=0.2,
    ),
    small=students.SmallLlama(
        hidden_size=128, layers=4, heads=4, intermediate_size=384, initial_std=0.09, problems=4000, ops_max=DEPTH + 1,
        orders="topological", redundant_max=0, vocabularies=("market",), holders=2 * NAMES,
        operators=("more", "fewer", "sum"), max_value=20, max_step=5, holdout=0.2,
        sft=sft.SftConfig(steps=2500, batch_tokens=1000, learning_rate=0.002),
    ),
    sft=sft.SftConfig(steps=2000, batch_tokens=1000, learning_rate=0.005, lora_rank=16, lora_alpha=16.0),
)  # fmt: skip


def training(setting: Setting, method: str) -> list[dict[str, Any]]:
    """The rows of a method."""
    made = problems.generate(setting.problems, 1, setting.spec)
    if method == MEND_ROWS:
        made = made[: setting.problems // (1 + VARIANTS)]
    rows = []
    for problem in made:
        if method == SFT:
            rows.append(mend.sft_row(problem))
        elif method == RC:
            rows += mend.rc_rows(problem, VARIANTS, seed=0)
        elif method == PARAPHRASE:
            rows += paraphrase.rows(problem, VARIANTS, seed=0)
        else:
            rows += mend.mend_rows(problem, VARIANTS, mend.OPERATORS, redundant_max=1, seed=0)
    return rows


def asked(setting: Setting, part: str) -> dict[str, list[dict[str, Any]]]:
    """The rows that are asked, by split. Problems of the two parts are told apart by the digest of their facts."""
    deeper = replace(setting.spec, ops_min=DEPTH + 1, ops_max=DEPTH + 1, depth_min=2, depth_max=DEPTH + 1)
    rows: dict[str, list[dict[str, Any]]] = {}
    for split, redundant in SPLITS.items():
        spec = replace(deeper if split == "ood-depth" else setting.spec, split="id")
        drawn = problems.generate(4 * setting.asked, 2, spec)
        mine = [p for p in drawn if (int(problems.facts_key(p)[:8], 16) % 2 == 0) == (part == "dev")][: setting.asked]
        variants = [row for p in mine for row in mend.eval_rows(p, 2, redundant, seed=0)]
        if split == "ood-names":
            variants = [with_other_names(row) for row in variants]
        rows[split] = [row | {"split": split} for row in variants if row["redundancy"] == redundant]
    return rows


def with_other_names(row: Mapping[str, Any]) -> dict[str, Any]:
    """The row with each training name replaced by one that no method went on with."""
    holders = problems.vocabularies()[row["vocabulary"]].holders
    others = dict(zip(holders[:NAMES], holders[NAMES:], strict=True))
    texts = {k: re.sub(r"\w+", lambda word: others.get(word[0], word[0]), row[k]) for k in ("prompt", "completion")}
    return textrows.with_row_id(row | texts)


@cache
def base_folder(setting: Setting) -> Path:
    """The model that all methods start from, made if it is not there."""
    folder = WORK / json_digest(asdict(setting.small))[:12]
    if not (folder / "config.json").exists():
        students.build_small(folder, setting.small, 0)
    return folder


def run(part: str, methods: Sequence[str], seeds: Sequence[int], out: Path, setting: Setting) -> None:
    """Train and measure what has no result file yet."""
    base, questions = base_folder(setting), asked(setting, part)
    facts = {
        "part": part,
        "base": tree_digest(base),
        "asked": json_digest([row["id"] for rows in questions.values() for row in rows]),
        "setting": asdict(setting),
    }
    for seed in seeds:
        for method in methods:
            path = out / f"{method}-{seed}.json"
            if path.exists() or (method == BASE and seed):
                continue
            model, tokenizer = students.load(base)
            about: dict[str, Any] = {}
            if method != BASE:
                rows = training(setting, method)
                examples, counts = encode_rows(rows, tokenizer, MAX_LENGTH, "error", [str(tokenizer.eos_token)])
                model, history = sft.train(model, examples, [], setting.sft, seed)
                with TemporaryDirectory() as folder:
                    students.save(model, tokenizer, Path(folder) / "model", torch.float32)
                    about = {"rows": json_digest([row["id"] for row in rows]), "model": tree_digest(Path(folder))}
                about |= {
                    "tokens": history[-1]["tokens"],
                    "epochs": history[-1]["tokens"] / counts["tokens"],
                    "train_loss": history[-1]["train_loss"],
                }
            figures = {split: measured(model, tokenizer, rows) for split, rows in questions.items()}
            write_json(path, {"common": facts, "method": method, "seed": seed, **about, "figures": figures})
            worst = {split: round(found["worst_case"], 3) for split, found in figures.items()}
            print(method, seed, f"worst case {worst}", flush=True)


def measured(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, rows: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    """The figures of a model over the orders of each problem, and its accuracy in each order."""
    texts = generation.generate(model, tokenizer, [row["prompt"] for row in rows], generation.Decoding(80))
    graded = evaluation.grade(rows, texts)
    found: dict[str, Any] = evaluation.over_variants(graded)
    orders = evaluation.accuracy_by_order(graded)
    found["by_order"] = {line["order"]: line["accuracy"] for line in orders}
    return found


def table(out: Path) -> None:
    """Print the tables of the page.

    Raises:
        BadInput: there is no result, or results are not of one part and setting.
    """
    files = [read_json(path) for path in sorted(out.glob("*.json"))]
    if len({canonical(r["common"]) for r in files}) != 1:
        raise BadInput(f"{out}: no results, or of several parts or settings; keep one kind in a folder")
    found = {(r["method"], r["seed"]): r for r in files}
    done = [method for method in METHODS if any(key[0] == method for key in found)]
    for split in SPLITS:
        print(f"\n| {split} | {' | '.join(FIGURES)} |\n|---|{'---|' * len(FIGURES)}")
        for method in done:
            mine = [r["figures"][split] for (m, _), r in sorted(found.items()) if m == method]
            print(f"| {method} | {' | '.join(cell([f[name] for f in mine]) for name in FIGURES)} |")
        for other in [m for m in done if m not in (BASE, MEND)]:
            seeds = [s for m, s in sorted(found) if m == other and (MEND, s) in found]
            if not seeds:
                continue
            pairs = [(found[MEND, s]["figures"][split], found[other, s]["figures"][split]) for s in seeds]
            print(f"| {MEND} - {other} | {' | '.join(cell([a[n] - b[n] for a, b in pairs]) for n in FIGURES)} |")
    print(f"\n| accuracy | {' | '.join(done)} |\n|---|{'---|' * len(done)}")
    for split in SPLITS:
        for order in files[0]["figures"][split]["by_order"]:
            right = {m: [r["figures"][split]["by_order"][order] for (n, _), r in sorted(found.items()) if n == m]
                     for m in done}  # fmt: skip
            print(f"| {split}, {order} | {' | '.join(cell(right[m]) for m in done)} |")
    for r in files:
        if r["method"] != BASE:
            print(f"{r['method']} {r['seed']}: {r['tokens']} tokens, {r['epochs']:.1f} epochs, {r['train_loss']:.4f}")


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["run", "table"])
    parser.add_argument("--part", choices=["dev", "test"], default="test", help="whose problems are asked")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS, help="default all")
    parser.add_argument("--seeds", nargs="+", type=int, default=list(SEEDS), help="of the order of the rows")
    parser.add_argument("--steps", type=int, default=SETTING.sft.steps, help="of every method")
    parser.add_argument("--problems", type=int, default=SETTING.problems, help="to train on")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the result files")
    chosen = parser.parse_args()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    setting = replace(SETTING, problems=chosen.problems, sft=replace(SETTING.sft, steps=chosen.steps))
    try:
        if chosen.what == "table":
            table(chosen.out)
        else:
            run(chosen.part, chosen.methods, chosen.seeds, chosen.out, setting)
    except BadInput as error:
        parser.exit(error.exit_code, f"error: {error}\n")


if __name__ == "__main__":
    main()
