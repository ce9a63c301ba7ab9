"""Evaluate a student and everything fine-tuned from it on the rewritings of unseen problems.

Writes `answers.parquet` (every answer of every model and how it was decoded), `summary.json` (all metrics by model, and
mean and spread over seeds by method), `leaderboard.csv`, `accuracy_by_order.csv`, `accuracy_by_tau.csv` (the same by
bins of Kendall's tau), `free_running.csv` (what the model's own words before it cost the reference, by place) and three
figures. A model that was trained to correct itself (`rac`) also answers again with its first answer in view; what that
changed is in the summary. The stage metrics are those of the main split. A killed evaluation goes on with the batch
that it was at; the answers of such a model are kept when all are there.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from springhead.errors import BadInput
from springhead.jsonio import canonical, read_json, read_jsonl, write_json
from springhead.lineage.digests import tree_digest
from springhead.llm import asking, evaluation, freerunning, generation, plots, rac, students
from springhead.llm.packing import encode_rows
from springhead.llm.tuned import Candidate, candidates
from springhead.progress import Progress
from springhead.stage import Stage, run_stage
from springhead.tables import write_csv, write_table

ANSWERS = pa.schema(
    [
        ("row", pa.string()),
        ("problem", pa.string()),
        ("model", pa.string()),
        ("method", pa.string()),
        ("seed", pa.int64()),
        ("split", pa.string()),
        ("variant", pa.int64()),
        ("arrangement", pa.string()),
        ("redundancy", pa.int64()),
        ("text", pa.string()),
        ("given", pa.string()),
        ("answer", pa.string()),
        ("right", pa.bool_()),
        ("decoding", pa.string()),
    ]
)
Row = Mapping[str, Any]


@dataclass(frozen=True)
class Exam:
    """How to examine one student."""

    problems: int
    """Problems of each split, from the start of the file, each with all its variants; 0 for all."""
    redundant: bool
    """Whether to ask the variants with redundant statements too."""
    max_new_tokens: int
    """Longest answer in tokens."""
    batch_rows: int
    """Rows decoded together."""
    device: students.Device
    """cpu, cuda or auto. Only the CPU promises equal bytes."""
    gap_rows: int = 0
    """Rows of the main split, in solving order and without redundancy, that the free-running gap is measured on, from
    the first on; 0 for none."""


@dataclass(frozen=True)
class Params:
    """Parameters `llm.evaluate`."""

    main_split: str
    """The split that the stage metrics, `methods` of the summary and the figures show."""
    students: dict[str, Exam]
    """By student."""


def exam_rows(path: Path, exam: Exam) -> list[Row]:
    """The evaluation rows to ask: all variants of the first problems of each split."""
    chosen: list[Row] = []
    seen: dict[str, dict[str, None]] = {}
    for row in read_jsonl(path):
        mine = seen.setdefault(row["split"], {})
        mine.setdefault(row["parents"][0])
        position = list(mine).index(row["parents"][0]) if exam.problems else 0
        if (not exam.problems or position < exam.problems) and (exam.redundant or row["redundancy"] == 0):
            chosen.append(row)
    if not chosen:
        raise BadInput(f"{path}: no evaluation rows; re-run the filter stage with looser rules")
    return chosen


@dataclass(frozen=True)
class Examined:
    """A model's answers and grades; `facts` are what else is known, `places` the free-running gap by place."""

    texts: list[str]
    graded: list[evaluation.Graded]
    facts: dict[str, Any]
    places: list[dict[str, float]]


def examine(
    candidate: Candidate,
    digest: str,
    rows: Sequence[Row],
    gap_rows: Sequence[Row],
    exam: Exam,
    scratch: Path,
    bar: Progress,
    seed: int,
) -> Examined:
    """Ask a model every row; where it was trained to, let it correct its answers; measure its free-running gap.

    What is in `scratch` already, from a run that was killed, is not asked again. `seed` is that of the intervals.
    """
    model, tokenizer = students.load_to_ask(candidate.folder, exam.device)
    decoding = generation.Decoding(exam.max_new_tokens, exam.batch_rows)
    facts: dict[str, Any] = {"decoding": asking.described(model, decoding)}
    if candidate.method == rac.METHOD:
        trained = read_json(candidate.folder.parent / "own_words.json")["settings"]
        form = rac.Form.of(model, tokenizer, trained["cue"], trained["again"])
        prompts = [row["prompt"] for row in rows]

        def corrected() -> list[list[str]]:
            return [[p.first, p.second] for p in rac.correct(model, tokenizer, prompts, form, decoding, bar)]

        if (kept := scratch / "corrected.json").exists():
            bar.advance(2 * len(rows))
        pairs = [rac.Corrected(*pair) for pair in asking.kept(kept, corrected)]
        texts = [pair.first for pair in pairs]
        facts["correction"], facts["correction_intervals"] = correction_rates(rows, pairs, seed)
    else:
        texts = asking.ask(rows, model, tokenizer, decoding, digest, scratch / "answers", bar)
    places: list[dict[str, float]] = []
    if gap_rows:
        ends_written = generation.end_texts(model, tokenizer)
        examples, _ = encode_rows(gap_rows, tokenizer, tokenizer.model_max_length, "error", ends_written)
        ends, pad = generation.end_ids(model, tokenizer), tokenizer.pad_token_id
        runs = freerunning.runs(model, examples, decoding, ends, int(pad if pad is not None else ends[0]))
        facts["free_running"], places = freerunning.summary(runs, seed), freerunning.by_place(runs)
    return Examined(texts, evaluation.grade(rows, texts), facts, places)


def correction_rates(
    rows: Sequence[Row], pairs: Sequence[rac.Corrected], seed: int
) -> tuple[dict[str, dict[str, float]], dict[str, dict[str, list[float]]]]:
    """By split, what correction did to the right and the wrong answers, and the intervals of that."""
    found, intervals = {}, {}
    for split in sorted({str(row["split"]) for row in rows}):
        mine = [(row, pair) for row, pair in zip(rows, pairs, strict=True) if row["split"] == split]
        asked = [row for row, _ in mine]
        grades = [evaluation.grade(asked, texts) for texts in zip(*((p.first, p.second) for _, p in mine), strict=True)]
        before, after = ([line["right"] for line in graded] for graded in grades)
        found[split] = rac.rates(before, after)
        intervals[split] = evaluation.correction_intervals([row["parents"][0] for row in asked], before, after, seed)
    return found, intervals


def answer_columns(candidate: Candidate, digest: str, found: Examined) -> dict[str, Any]:
    """One model's part of `answers.parquet`."""
    graded = found.graded
    columns: dict[str, Any] = {name: [row[name] for row in graded] for name in ANSWERS.names if name in graded[0]}
    same = {"model": digest, **candidate.who, "decoding": canonical(found.facts["decoding"]).decode()}
    columns |= {name: [value] * len(graded) for name, value in same.items()}
    return columns | {"row": [row["id"] for row in graded], "text": list(found.texts)}


def leaderboard(models: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """One line per split and model, the best worst case first."""
    names = ("worst_case", "accuracy", "consistency", "all_equal", "all_right", "mixed", "all_wrong", "order_drop")
    lines = []
    for model in models:
        for split, metrics in model["metrics"].items():
            line = {"split": split, "method": model["method"], "seed": model["seed"]}
            line |= {name: metrics[name] for name in names}
            for name in ("worst_case", "accuracy", "consistency"):
                line[f"{name}_low"], line[f"{name}_high"] = metrics[f"{name}_interval"]
            lines.append(line | {"model": model["digest"][:12]})
    return sorted(lines, key=lambda line: (line["split"], -line["worst_case"], line["method"], line["seed"]))


def compact(table: Mapping[str, Any], split: str) -> dict[str, Any]:
    """The stage metrics: a few figures per method, and by how much MEND leads where it was trained."""
    cells = table[split]
    names = ("worst_case", "accuracy", "consistency", "order_drop")
    values: dict[str, Any] = {
        method: {name: cell[name]["mean"] for name in names} | {"worst_case_std": cell["worst_case"]["std"]}
        for method, cell in cells.items()
    }
    for other in ("base", "sft"):
        if "mend" in cells and other in cells:
            lead = cells["mend"]["worst_case"]["mean"] - cells[other]["worst_case"]["mean"]
            values[f"mend_lead_over_{other}"] = lead
    return values


def own_figures(model: Mapping[str, Any], split: str) -> dict[str, float]:
    """What a model makes of its own words: the free-running gap, and what correction changed, where it was measured."""
    correction = dict(model.get("correction", {}).get(split, {}))
    if correction:
        correction["corrected_gain"] = correction["corrected"] - correction.pop("plain")  # plain is the accuracy
    return correction | ({"free_running_gap": model["free_running"]["gap"]} if "free_running" in model else {})


def own_words(models: Sequence[Mapping[str, Any]], split: str) -> dict[str, dict[str, float]]:
    """Stage metrics by method, means over seeds of `own_figures`."""
    values: dict[str, dict[str, float]] = {}
    for method in dict.fromkeys(str(model["method"]) for model in models):
        lines = [own_figures(model, split) for model in models if model["method"] == method]
        values[method] = {name: sum(line[name] for line in lines) / len(lines) for name in lines[0]}
    return values


def run(stage: Stage[Params]) -> None:
    """Ask every model every row, grade, summarise, draw."""
    student, split = stage.item["student"], stage.params.main_split
    if student not in stage.params.students:
        raise BadInput(f"params.yaml: llm.evaluate.students: no settings for {student!r}; add a block")
    exam = stage.params.students[student]
    rows = exam_rows(stage.input("filter") / "eval.jsonl", exam)
    if split not in (known := sorted({str(row["split"]) for row in rows})):
        raise BadInput(f"params.yaml: llm.evaluate.main_split: no rows of split {split!r}; there are {known}")
    found = candidates(stage.input("students"), stage.inputs("finetune"), "sft", "llm-finetune")
    columns: dict[str, list[Any]] = {name: [] for name in ANSWERS.names}
    models: list[dict[str, Any]] = []
    by_order: list[dict[str, Any]] = []
    by_tau: list[dict[str, Any]] = []
    by_place: list[dict[str, Any]] = []
    plain = [row for row in rows if (row["split"], row["arrangement"], row["redundancy"]) == (split, "topological", 0)]
    answers = len(rows) * sum(2 if candidate.method == rac.METHOD else 1 for candidate in found)
    with stage.progress(answers, f"{student}", "answers") as bar:
        for candidate in found:
            digest = tree_digest(candidate.folder)
            scratch = stage.scratch / f"{candidate.method}-{candidate.seed}"
            found_out = examine(candidate, digest, rows, plain[: exam.gap_rows], exam, scratch, bar, stage.seed)
            graded = found_out.graded
            for name, values in answer_columns(candidate, digest, found_out).items():
                columns[name] += values
            who = candidate.who
            by_order += [{**who, **line} for line in evaluation.accuracy_by_order(graded)]
            by_tau += [{**who, **line} for line in evaluation.accuracy_by_tau(graded)]
            by_place += [{**who, **line} for line in found_out.places]
            path = candidate.folder.relative_to(stage.root).as_posix()
            metrics = evaluation.model_metrics(graded, stage.seed)
            models.append({**who, "path": path, "digest": digest, "metrics": metrics, **found_out.facts})
    write_results(stage, student, columns, models, by_order)
    write_csv(stage.out / "accuracy_by_tau.csv", by_tau)
    if by_place:
        write_csv(stage.out / "free_running.csv", by_place)


def write_results(
    stage: Stage[Params],
    student: str,
    columns: Mapping[str, list[Any]],
    models: Sequence[Mapping[str, Any]],
    by_order: Sequence[Mapping[str, Any]],
) -> None:
    """Write tables, summary and figures, and report the metrics."""
    out, split = stage.out, stage.params.main_split
    write_table(out / "answers.parquet", columns, ANSWERS)
    table = evaluation.side_by_side(models)
    flat = [{**m, "metrics": m["metrics"][split] | own_figures(m, split), "splits": m["metrics"]} for m in models]
    write_json(
        out / "summary.json",
        {"student": student, "main_split": split, "models": flat, "methods": table[split], "splits": table},
    )
    write_csv(out / "leaderboard.csv", leaderboard(models))
    write_csv(out / "accuracy_by_order.csv", by_order)
    plots.accuracy_by_order(out / "accuracy_by_order.png", table[split], f"{student}: unseen problems ({split})")
    plots.accuracy_by_tau(out / "accuracy_by_tau.png", table[split], f"{student}: unseen problems ({split})")
    plots.histogram(out / "histogram.png", table[split], f"{student}: over the orders of a problem ({split})")
    metrics = compact(table, split)
    for method, figures in own_words(models, split).items():
        metrics[method] |= figures
    stage.metrics(metrics)


def main() -> None:
    """Entry of the DVC stage."""
    run_stage(run, Params)


if __name__ == "__main__":
    main()
