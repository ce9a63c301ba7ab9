"""BASH and RAC against plain fine-tuning, the noise control and online scheduled sampling, at equal steps and tokens.

    python benchmarks/bash_rac.py run arithmetic                            # goes on after the models that are done
    python benchmarks/bash_rac.py run arithmetic-first                      # the answer comes before the steps
    python benchmarks/bash_rac.py run backwards --methods sft noise bash bash-sequential
    SPRINGHEAD_SOURCES=<folder> python benchmarks/bash_rac.py run e2e
    python benchmarks/bash_rac.py table                                     # the tables of docs/results/bash-rac.md

`arithmetic`: problems over graphs of facts, a small Llama trained from scratch as the base. `backwards`: names to tell
in reverse, the same base. `e2e`: the E2E development set, split by meaning representation, the same small Llama with
the words of the training part. Every method starts from
the same base and takes the same steps and tokens a step. Settings were chosen with `--part dev`, on problems (meaning
representations) that the reported ones (`--part test`) do not share. One result file for each model.
"""

from __future__ import annotations

import argparse
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from over_seeds import cell
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import PreTrainedModel, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from springhead.jsonio import read_json, write_json
from springhead.lineage.digests import json_digest, tree_digest
from springhead.llm import bash, freerunning, generation, mend, problems, rac, rouge, sft, students, texttasks
from springhead.llm.packing import encode_rows
from springhead.llm.textrows import with_row_id
from springhead.llm.tokenizer import EOS, PAD, SEPARATOR, UNKNOWN, as_small_tokenizer
from springhead.llm.worlds import vocabularies

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "docs/results/bash-rac"
WORK = ROOT / ".springhead/bash-rac"
METHODS = ("sft", "noise", "scheduled", "bash", "bash-sequential", "rac")
SEEDS = (0, 1, 2)
MAX_LENGTH = 400
Column = Callable[[Mapping[str, Any]], float]

ARITHMETIC = problems.ProblemSpec(
    vocabularies=("market",), operators=("more", "fewer"), ops_min=3, ops_max=5, depth_min=3, depth_max=5,
    max_value=20, max_constant=9, max_step=5, holders=12, items=1, redundant=0, holdout=0.2,
)  # fmt: skip
SMALL = students.SmallLlama(
    hidden_size=128, layers=4, heads=4, intermediate_size=384, initial_std=0.09, problems=3000, ops_max=2,
    orders="topological", redundant_max=0, vocabularies=("market",), holders=12, operators=("more", "fewer"),
    max_value=20, max_step=5, holdout=0.2,
    sft=sft.SftConfig(steps=550, batch_tokens=550, learning_rate=0.002),
)  # fmt: skip


@dataclass(frozen=True)
class Task:
    """Rows and settings of one task."""

    train: list[dict[str, Any]]
    asked: list[dict[str, Any]]
    base: Path
    sft: sft.SftConfig
    bash: bash.BashConfig
    rac: rac.RacConfig
    max_new_tokens: int
    scores: tuple[str, ...]


def base_sft(steps: int) -> sft.SftConfig:
    """The training of a base and of every method after it."""
    return sft.SftConfig(steps=steps, batch_tokens=1000, learning_rate=0.001)


def arithmetic_asked(part: str, count: int) -> list[dict[str, Any]]:
    """Unseen problems; those of the two parts are told apart by the digest of the problem's facts."""
    held_out = problems.generate(4 * count, {"dev": 2, "test": 3}[part], replace(ARITHMETIC, split="id"))
    mine = [p for p in held_out if (int(problems.facts_key(p)[:8], 16) % 2 == 0) == (part == "dev")]
    return [mend.sft_row(p) for p in mine[:count]]


@cache
def arithmetic(part: str) -> Task:
    """Two to four operations told in solving order; the base knows problems of one and two."""
    base = WORK / "arithmetic-base"
    if not (base / "config.json").exists():
        students.build_small(base, SMALL, 0)
    return Task(
        train=[mend.sft_row(p) for p in problems.generate(400, 1, ARITHMETIC)],
        asked=arithmetic_asked(part, 200),
        base=base,
        sft=sft.SftConfig(steps=200, batch_tokens=600, learning_rate=0.001),
        bash=bash.BashConfig(beta_from=0.2, beta_to=0.6, share=0.5, refresh=20, start=0.2, protect_digits=True),
        rac=rac.RacConfig(
            cue="", again=True, share=0.5, right_share=0.5, temperature=0.7, refresh=20, start=0.25, max_new_tokens=60
        ),
        max_new_tokens=60,
        scores=("right",),
    )


def arithmetic_long(part: str) -> Task:
    """The same with three times the steps, for RAC, which spends most tokens on corrections."""
    short = arithmetic(part)
    # By half of the run nearly all cool answers to the training rows are right: hotter ones are not, and all are shown.
    correct = replace(short.rac, refresh=30, start=0.4, temperature=1.5, right_share=1.0)
    return replace(short, sft=replace(short.sft, steps=600), rac=correct)


def arithmetic_fresh(part: str) -> Task:
    """As many problems as steps can hold, so that greedy answers to them are those to unseen ones; 1,000 are asked."""
    short = arithmetic(part)
    correct = replace(short.rac, refresh=30, start=0.15, temperature=0.0, right_share=1.0)
    return replace(
        short,
        train=[mend.sft_row(p) for p in problems.generate(8000, 1, ARITHMETIC)],
        asked=arithmetic_asked(part, 1000),
        sft=replace(short.sft, steps=600, batch_tokens=1200),
        rac=correct,
        bash=replace(short.bash, refresh=30),
    )


def arithmetic_first(part: str) -> Task:
    """The answer is stated before it is derived: a guess then, which what follows it need not believe."""
    short = arithmetic(part)
    return replace(
        short,
        train=[answer_first(row) for row in short.train],
        asked=[answer_first(row) for row in arithmetic_asked(part, 500)],
        sft=replace(short.sft, steps=600),
        bash=replace(short.bash, beta_from=0.4, beta_to=0.9, protect_digits=False),
        rac=replace(short.rac, cue=mend.ANSWER_CUE, again=False, refresh=30, start=0.3, temperature=0.0),
        scores=("right", "derived"),
    )


def answer_first(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row whose completion states the answer before the steps that derive it."""
    steps, _, answer = row["completion"].rpartition(f" {mend.ANSWER_CUE} ")
    return with_row_id({**row, "completion": f"{mend.ANSWER_CUE} {answer}. {steps}"})


def backwards_rows(count: int, seed: int) -> list[dict[str, Any]]:
    """Eight to sixteen of twelve names in a random order, to tell backwards; some come several times."""
    names = vocabularies()["market"].holders[:12]
    rows = []
    for length in np.random.default_rng(seed).integers(8, 17, size=count).tolist():
        told = [str(name) for name in np.random.default_rng([seed, len(rows)]).choice(names, length)]
        words = told[::-1]
        row = {"prompt": " ".join(told) + "?", "completion": " ".join(words) + ".", "words": words}
        rows.append(with_row_id({**row, "parents": []}))
    return rows


def backwards(part: str) -> Task:
    """What has to come next follows from the prompt and the place, whatever was said before: a slip spoils nothing."""
    short = arithmetic(part)
    return replace(
        short,
        train=backwards_rows(1000, 1),
        asked=backwards_rows(500, {"dev": 2, "test": 3}[part]),
        sft=replace(short.sft, steps=500, batch_tokens=1000),
        bash=bash.BashConfig(beta_from=0.1, beta_to=0.4, share=0.5, refresh=20, start=0.3),
        max_new_tokens=24,
        scores=("exact", "in place"),
    )


def word_tokenizer(texts: Sequence[str]) -> PreTrainedTokenizerFast:
    """One token a word or sign of these texts; other words are unknown."""
    pattern = r"[^\W\d_]+|\d|[^\w\s]|_"
    split = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(pattern), "isolated"), pre_tokenizers.Split(Regex(r"^\s+$"), "removed")]
    )
    words = sorted({word for text in texts for word, _ in split.pre_tokenize_str(text)})
    ids = {word: number for number, word in enumerate([PAD, EOS, UNKNOWN, SEPARATOR, *words])}
    backend = Tokenizer(models.WordLevel(vocab=ids, unk_token=UNKNOWN))
    backend.pre_tokenizer = split
    return as_small_tokenizer(backend)


@cache
def e2e(part: str) -> Task:
    """A sentence for a meaning representation; 300 of them train, 100 choose settings, the others are reported."""
    groups = sorted(texttasks.e2e_groups(), key=lambda group: str(group["id"]))
    train = texttasks.e2e_rows(groups[:300])
    base = WORK / "e2e-base"
    if not (base / "config.json").exists():
        tokenizer = word_tokenizer([text for group in groups for text in (group["prompt"], *group["references"])])
        fresh = students.new_small(SMALL, tokenizer, 0)
        examples, _ = encode_rows(train, tokenizer, MAX_LENGTH, "error", [str(tokenizer.eos_token)])
        trained, _ = sft.train(fresh, examples, [], base_sft(300), 0)
        students.save(trained, tokenizer, base, torch.float32)
    return Task(
        train=train,
        asked=groups[300:400] if part == "dev" else groups[400:],
        base=base,
        sft=base_sft(400),
        bash=bash.BashConfig(beta_from=0.1, beta_to=0.3, share=0.75, refresh=40, start=0.25, temperature=0.7),
        rac=rac.RacConfig(cue="", again=True, refresh=40, start=0.25, max_new_tokens=80),
        max_new_tokens=80,
        scores=rouge.NAMES,
    )


TASKS: dict[str, Callable[[str], Task]] = {
    "arithmetic": arithmetic,
    "arithmetic-long": arithmetic_long,
    "arithmetic-fresh": arithmetic_fresh,
    "arithmetic-first": arithmetic_first,
    "backwards": backwards,
    "e2e": e2e,
}


def score(row: Mapping[str, Any], text: str) -> dict[str, float]:
    """The figures of one answer, each in 0..1."""
    if "references" in row:
        return rouge.rouge(row["references"], text)
    if "words" in row:
        given = text.removesuffix(".").split()
        hits = sum(a == b for a, b in zip(row["words"], given, strict=False))
        return {"exact": float(given == row["words"]), "in place": hits / len(row["words"])}
    values = re.findall(r"= (\d+)", text)
    return {
        "right": float(mend.final_answer(text) == row["answer"]),
        "derived": float(values[-1:] == [row["answer"]]),
    }


def scores(task: Task, texts: Sequence[str]) -> dict[str, float]:
    """The mean figures of a model's answers."""
    found = [score(row, text) for row, text in zip(task.asked, texts, strict=True)]
    return {name: float(np.mean([line[name] for line in found])) for name in task.scores}


def source_of(task: Task, method: str, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, seed: int) -> Any:
    """The source of a method's batches; None for plain fine-tuning."""
    examples, _ = encode_rows(task.train, tokenizer, MAX_LENGTH, "error", [str(tokenizer.eos_token)])
    if method in bash.METHODS:
        return bash.source(bash.of_method(method, task.bash), examples, model, tokenizer, task.sft, seed)
    if method == rac.METHOD:
        return rac.source(task.rac, examples, model, tokenizer, task.sft, MAX_LENGTH, seed)
    return None


def measure(
    task: Task, method: str, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, seed: int
) -> dict[str, Any]:
    """Score and free-running gap (greedy and sampled answers).

    For RAC the corrected answers too, and as their control those of plain fine-tuning, never taught to correct.
    """
    rows = [row | {"completion": row.get("completion") or row["references"][0]} for row in task.asked]
    examples, _ = encode_rows(rows, tokenizer, MAX_LENGTH, "error", [str(tokenizer.eos_token)])
    ends, pad = generation.end_ids(model, tokenizer), int(tokenizer.pad_token_id or 0)
    greedy = generation.Decoding(task.max_new_tokens)
    runs = {
        name: freerunning.runs(model, examples, replace(greedy, temperature=temperature), ends, pad)
        for name, temperature in (("greedy", 0.0), ("sampled", 1.0))
    }
    texts = [str(tokenizer.decode(list(run.answer), skip_special_tokens=True)).strip() for run in runs["greedy"]]
    found: dict[str, Any] = {"plain": scores(task, texts)}
    if method == rac.METHOD or (method == "sft" and task.rac.cue):
        prompts = [row["prompt"] for row in task.asked]
        form = rac.Form.of(model, tokenizer, task.rac.cue, task.rac.again)
        pairs = rac.correct(model, tokenizer, prompts, form, greedy)
        again = [pair.second for pair in pairs]
        found["corrected"] = scores(task, again)
        # A model that reads what it is shown copies the reference, and is led astray by another prompt's answer.
        asked = [generation.prompt_ids(tokenizer, prompt) for prompt in prompts]
        own = [list(run.answer) for run in runs["greedy"]]
        references = [[t for t in rac.split(example)[1] if t not in form.ends] for example in examples]
        for shown, answers in (("reference", references), ("other", [*own[1:], own[0]])):
            found[f"shown_{shown}"] = scores(task, rac.again(model, tokenizer, asked, answers, form, greedy))
        if "right" in task.scores:
            flags = [
                [score(r, t)["right"] == 1 for r, t in zip(task.asked, part, strict=True)] for part in (texts, again)
            ]
            found["rates"] = rac.rates(*flags)
    found |= {f"gap_{name}": freerunning.summary(those, seed) for name, those in runs.items()}
    places = freerunning.by_place(runs["greedy"])
    found["by_place"] = [{k: round(v, 4) for k, v in line.items()} for line in places]
    return found


def run(name: str, part: str, methods: Sequence[str], seeds: Sequence[int], out: Path) -> None:
    """Train and measure what has no result file yet."""
    task = TASKS[name](part)
    facts = {
        "task": name,
        "part": part,
        "base": tree_digest(task.base),
        "train_rows": json_digest([row["id"] for row in task.train]),
        "asked_rows": json_digest([row["id"] for row in task.asked]),
        "train": len(task.train),
        "asked": len(task.asked),
        "sft": asdict(task.sft),
    }
    for seed in seeds:
        for method in methods:
            path = out / f"{name}-{method}-{seed}.json"
            if path.exists():
                continue
            model, tokenizer = students.load(task.base)
            facts_of_method: dict[str, Any] = {}
            if method != "base":
                source = source_of(task, method, model, tokenizer, seed)
                examples, _ = encode_rows(task.train, tokenizer, MAX_LENGTH, "error", [str(tokenizer.eos_token)])
                model, history = sft.train(model, examples, [], task.sft, seed, source=source)
                facts_of_method = {"tokens": history[-1]["tokens"], "train_loss": history[-1]["train_loss"]}
                if source is not None:
                    facts_of_method |= {"settings": source.identity, "counts": source.state}
                with TemporaryDirectory() as folder:
                    students.save(model, tokenizer, Path(folder) / "model", torch.float32)
                    facts_of_method["model"] = tree_digest(Path(folder) / "model")
            found = measure(task, method, model, tokenizer, seed)
            write_json(path, {**facts, "method": method, "seed": seed, **facts_of_method, **found})
            print(
                name,
                method,
                seed,
                found["plain"],
                f"gap {found['gap_greedy']['gap']:.3f}",
                found.get("rates", ""),
                flush=True,
            )


def table(out: Path) -> None:
    """Print one table for each task, and what each method adds to plain fine-tuning, seed by seed."""
    for name in TASKS:
        files = [read_json(path) for path in sorted(out.glob("*.json"))]
        found = {(result["method"], result["seed"]): result for result in files if result["task"] == name}
        if not found:
            continue
        columns = {**{s: score_column(s) for s in scores_of(found)}, **GAPS}
        print(f"\n{name}\n\n| method | {' | '.join(columns)} |\n|---|{'---|' * len(columns)}")
        done = [m for m in ("base", *METHODS) if any(key[0] == m for key in found)]
        for method in done:
            mine = [found[key] for key in sorted(found) if key[0] == method]
            print(f"| {method} | {' | '.join(cell([f(r) for r in mine]) for f in columns.values())} |")
            if all("corrected" in r for r in mine):
                again = [cell([r["corrected"][s] for r in mine]) for s in scores_of(found)]
                print(f"| {method}, corrected | {' | '.join(again + ['' for _ in GAPS])} |")
        for control in ("sft", "noise"):
            print(f"\n| against {control} | {' | '.join(columns)} |\n|---|{'---|' * len(columns)}")
            for method in [m for m in done if m not in ("base", control)]:
                seeds = [s for m, s in sorted(found) if m == method and (control, s) in found]
                gains = [[f(found[method, s]) - f(found[control, s]) for s in seeds] for f in columns.values()]
                if seeds:
                    print(f"| {method} | {' | '.join(map(cell, gains))} |")
        if rated := [r["rates"] for (method, _), r in found.items() if method == rac.METHOD and "rates" in r]:
            print("\n| rates of rac | |\n|---|---|")
            for rate in rated[0]:
                print(f"| {rate} | {cell([r[rate] for r in rated])} |")


GAPS: dict[str, Column] = {
    "gap, greedy": lambda r: r["gap_greedy"]["gap"],
    "gap, sampled": lambda r: r["gap_sampled"]["gap"],
    "loss after gold": lambda r: r["gap_greedy"]["gold"],
}


def score_column(name: str) -> Column:
    """The column of a score."""
    return lambda result: float(result["plain"][name])


def scores_of(found: Mapping[Any, Mapping[str, Any]]) -> list[str]:
    """The names of a task's scores."""
    return list(next(iter(found.values()))["plain"])


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["run", "table"], help="measure, or print what was measured")
    parser.add_argument("task", nargs="?", choices=sorted(TASKS), help="what the models are asked")
    parser.add_argument("--part", choices=["dev", "test"], default="test", help="whose problems are asked")
    parser.add_argument("--methods", nargs="+", default=["base", *METHODS], help="default all")
    parser.add_argument("--seeds", nargs="+", type=int, default=list(SEEDS), help="of the runs")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the result files")
    chosen = parser.parse_args()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    if chosen.what == "table":
        table(chosen.out)
    elif chosen.task is None:
        parser.error("run needs a task")
    else:
        run(chosen.task, chosen.part, chosen.methods, chosen.seeds, chosen.out)


if __name__ == "__main__":
    main()
