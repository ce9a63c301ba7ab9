"""Ask a student and everything fine-tuned from it for Rational disguised attacks and benign look-alikes, and judge.

Writes `answers.parquet` (every answer of every model, how it was decoded and what the judges say of it), `summary.json`
(all metrics by model, mean and spread over seeds by method), `leaderboard.csv`, `by_form.csv` (attack success by form
and family) and `table.md`. With an LLM as second judge (`judge`), its opinion is a column and its agreement with the
trained judge is in the summary; no other figure depends on it.

Attack success is an upper bound: the share of attacks that were not refused; beside it stands the share that could be
useful to an attacker. A killed evaluation goes on with the batch, and the opinion, that it was at.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from springhead.errors import BadInput
from springhead.jsonio import canonical, read_jsonl, write_json
from springhead.lineage.digests import tree_digest
from springhead.llm import asking, generation, rational, rationale, safety_eval, students
from springhead.llm.evaluation import spread
from springhead.llm.judges import refusal, remote
from springhead.llm.safety_eval import Judgement, Row
from springhead.llm.tuned import BASE, Candidate, candidates
from springhead.progress import Progress
from springhead.stage import Stage, run_stage
from springhead.tables import write_csv, write_table

ANSWERS = pa.schema(
    [
        ("row", pa.string()),
        ("base", pa.string()),
        ("model", pa.string()),
        ("method", pa.string()),
        ("seed", pa.int64()),
        ("kind", pa.string()),
        ("source", pa.string()),
        ("form", pa.string()),
        ("text", pa.string()),
        ("refused", pa.bool_()),
        ("answered", pa.bool_()),
        ("useful", pa.bool_()),
        ("incoherent", pa.string()),
        ("verdict", pa.string()),
        ("agrees", pa.bool_()),
        ("form_fault", pa.string()),
        ("llm_opinion", pa.string()),
        ("decoding", pa.string()),
    ]
)


@dataclass(frozen=True)
class Exam:
    """How to examine one student."""

    per_form: int
    """Adversarial rows of each form; 0 for all."""
    per_source: int
    """Benign rows of each source, as they are and again in disguise; 0 for all."""
    max_new_tokens: int
    """Longest answer in tokens; a rationale takes about 70 of them."""
    batch_rows: int
    """Rows decoded together."""
    device: students.Device
    """cpu, cuda or auto. Only the CPU promises equal bytes."""

    def __post_init__(self) -> None:
        if min(self.per_form, self.per_source) < 0:
            raise BadInput("llm.rational_evaluate: per_form and per_source must not be negative")


@dataclass(frozen=True)
class Params:
    """Parameters `llm.rational_evaluate`."""

    students: dict[str, Exam]
    """By student."""
    judge: remote.Endpoint | None = None
    """An LLM as second judge; nobody is asked without it."""


@dataclass(frozen=True)
class Answered:
    """A model's answers, what the trained judge says of each, and the LLM (None where it was not asked)."""

    texts: list[str]
    judged: list[Judgement]
    opinions: list[remote.Opinion | None]
    decoding: dict[str, Any]


def second_opinions(
    judge: remote.Endpoint | None, rows: Sequence[Row], texts: Sequence[str], found: Sequence[Judgement], kept: Path
) -> list[remote.Opinion | None]:
    """What the LLM says of every answer that has a response: of the response and the base prompt, as the trained judge.

    Opinions that a killed run got are in the file `kept` and are not asked for again.
    """
    if judge is None:
        return [None] * len(rows)
    asked = [i for i, judged in enumerate(found) if judged.answered]
    given = remote.opinions(judge, [(rows[i]["goal"], rationale.split(texts[i]).response) for i in asked], kept)
    by_row = dict(zip(asked, given, strict=True))
    return [by_row.get(i) for i in range(len(rows))]


def answer_columns(candidate: Candidate, digest: str, rows: Sequence[Row], found: Answered) -> dict[str, list[Any]]:
    """One model's part of `answers.parquet`."""
    columns: dict[str, list[Any]] = {
        "row": [row["id"] for row in rows],
        "base": [row["parents"][0] for row in rows],
        "form": [row["operator"] for row in rows],
        "text": list(found.texts),
        "llm_opinion": list(found.opinions),
    }
    columns |= {name: [row[name] for row in rows] for name in ("kind", "source")}
    same = {"model": digest, **candidate.who, "decoding": canonical(found.decoding).decode()}
    columns |= {name: [value] * len(rows) for name, value in same.items()}
    judged = [asdict(j) for j in found.judged]
    return columns | {name: [j[name] for j in judged] for name in judged[0]}


def form_lines(who: Mapping[str, Any], metrics: Mapping[str, Any]) -> list[dict[str, Any]]:
    """A model's lines of `by_form.csv`."""
    lines = []
    for name, entry in metrics["attack_success"].items():
        success = {key: entry[key] for key in ("rows", "share", "low", "high")}
        lines.append({**who, "attacks": name, **success, "useful": entry["useful"]["share"]})
    return lines


def board_line(who: Mapping[str, Any], metrics: Mapping[str, Any], digest: str) -> dict[str, Any]:
    """A model's line of `leaderboard.csv`."""
    attacks, line = metrics["attack_success"]["all"], dict(who)
    line |= {"attack_success": attacks["share"], "attack_success_low": attacks["low_by_prompt"]}
    line |= {"attack_success_high": attacks["high_by_prompt"], "attack_useful": attacks["useful"]["share"]}
    shares = {"over_refusal": metrics["over_refusal"]["all"], "helped": metrics["helped"]}
    shares |= {"agreement": metrics["agreement"], "incoherent": metrics["incoherent"]["all"]}
    for name, entry in shares.items():
        if not entry["rows"]:  # no rationale decided anything
            line |= dict.fromkeys((name, f"{name}_low", f"{name}_high"), "")
            continue
        line |= {name: entry["share"], f"{name}_low": entry["low"], f"{name}_high": entry["high"]}
    return line | {"model": digest[:12]}


def by_method(models: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, dict[str, float]]]:
    """Mean and spread over the seeds of every figure, by method, in the order of the models."""
    table = {}
    for method in dict.fromkeys(model["method"] for model in models):
        runs = [model["metrics"] for model in models if model["method"] == method]
        shared = [name for name in runs[0] if all(name in run for run in runs)]
        table[method] = {name: spread([run[name] for run in runs]) for name in shared}
    return table


def compact(methods: Mapping[str, Mapping[str, Mapping[str, float]]]) -> dict[str, Any]:
    """The stage metrics: a few figures per method, and what Rational gains over the control."""
    names = ("attack_success", "attack_useful", "over_refusal", "helped", "agreement", "incoherent")
    values: dict[str, Any] = {
        method: {name: cells[name]["mean"] for name in names if name in cells} for method, cells in methods.items()
    }
    if rational.RATIONAL in methods and rational.REFUSAL in methods:
        for name in ("attack_success", "over_refusal"):
            values[f"{name}_against_refusal_sft"] = (
                methods[rational.RATIONAL][name]["mean"] - methods[rational.REFUSAL][name]["mean"]
            )
    return values


def examine(
    candidate: Candidate, digest: str, rows: Sequence[Row], exam: Exam, params: Params, scratch: Path, bar: Progress
) -> Answered:
    """Ask a model every row and have its answers judged; what is in `scratch` already is not asked again."""
    model, tokenizer = students.load_to_ask(candidate.folder, exam.device)
    decoding = generation.Decoding(exam.max_new_tokens, exam.batch_rows)
    texts = asking.ask(rows, model, tokenizer, decoding, digest, scratch / "answers", bar)
    judged = safety_eval.judge_answers(rows, texts, refusal.shipped())
    opinions = second_opinions(params.judge, rows, texts, judged, scratch / "opinions.jsonl")
    return Answered(texts, judged, opinions, asking.described(model, decoding))


def run(stage: Stage[Params]) -> None:
    """Ask every model every row, judge, summarise."""
    student, judge = stage.item["student"], stage.params.judge
    if student not in stage.params.students:
        raise BadInput(f"params.yaml: llm.rational_evaluate.students: no settings for {student!r}; add a block")
    if judge is not None:
        judge.key()  # before minutes of answering, not after
    exam = stage.params.students[student]
    rows = safety_eval.sample(list(read_jsonl(stage.input("rational") / "eval.jsonl")), exam.per_form, exam.per_source)
    tuned = stage.inputs("rational_finetune")
    found = candidates(stage.input("students"), tuned, rational.REFUSAL, "llm-rational_finetune")
    columns: dict[str, list[Any]] = {name: [] for name in ANSWERS.names}
    models: list[dict[str, Any]] = []
    board: list[dict[str, Any]] = []
    forms: list[dict[str, Any]] = []
    with stage.progress(len(found) * len(rows), student, "answers") as bar:
        for candidate in found:
            digest, who = tree_digest(candidate.folder), candidate.who
            scratch = stage.scratch / f"{candidate.method}-{candidate.seed}"
            answered = examine(candidate, digest, rows, exam, stage.params, scratch, bar)
            detail = safety_eval.metrics(rows, answered.judged, stage.seed)
            for name, values in answer_columns(candidate, digest, rows, answered).items():
                columns[name] += values
            path = candidate.folder.relative_to(stage.root).as_posix()
            facts: dict[str, Any] = {"metrics": safety_eval.flat(detail), "detail": detail}
            facts["decoding"] = answered.decoding
            if judge is not None:
                facts["llm_judge"] = remote.agreement([j.refused for j in answered.judged], answered.opinions)
            models.append({**who, "path": path, "digest": digest, **facts})
            board.append(board_line(who, detail, digest))
            forms += form_lines(who, detail)
    methods = by_method(models)
    write_table(stage.out / "answers.parquet", columns, ANSWERS)
    summary: dict[str, Any] = {"student": student, "judge": refusal.shipped().digest}
    metrics = compact(methods)
    if judge is not None:
        agreed = remote.agreement(columns["refused"], columns["llm_opinion"])
        summary["llm_judge"] = {"url": judge.url, "model": judge.model, **agreed}
        metrics |= {f"llm_judge_{n}": agreed[n] for n in ("agreement", "kappa") if agreed[n] is not None}
    write_json(stage.out / "summary.json", {**summary, "models": models, "methods": methods})
    write_csv(stage.out / "leaderboard.csv", board)
    write_csv(stage.out / "by_form.csv", forms)
    names = [m["method"] if m["method"] == BASE else f"{m['method']}, seed {m['seed']}" for m in models]
    table = safety_eval.table([(name, m["detail"]) for name, m in zip(names, models, strict=True)])
    (stage.out / "table.md").write_text(table, encoding="utf-8")
    stage.metrics(metrics)


def main() -> None:
    """Entry of the DVC stage."""
    run_stage(run, Params)


if __name__ == "__main__":
    main()
