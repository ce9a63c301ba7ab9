import csv
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from springhead import gates
from springhead.errors import BadInput
from springhead.jsonio import read_json, read_jsonl, write_jsonl
from springhead.lineage.digests import tree_digest
from springhead.llm import evaluation, freerunning, generation, mend, plots, problems, students
from springhead.llm.bash import BashConfig
from springhead.llm.rac import RacConfig
from springhead.llm.sft import SftConfig
from springhead.llm.tuned import candidates
from springhead.progress import Progress
from springhead.stage import Stage, for_test
from springhead.tables import read_table
from stages.llm import evaluate, finetune
from stages.llm.evaluate import Exam
from tests.llm.tiny import tiny_model, tiny_tokenizer

pytestmark = pytest.mark.unit


def row(problem: str, arrangement: str, given: str | None, answer: str = "5", redundancy: int = 0, **more: Any):
    taus = {"topological": 1.0, "reversed": -1.0}
    facts = {"split": "id", "ops": 2, "depth": 2, "family": "dag", "kendall_tau": taus.get(arrangement, 0.0)}
    base = {"id": f"{problem}-{arrangement}-{redundancy}", "parents": [problem], "problem": problem, "answer": answer}
    right = {"given": given, "right": given == answer}
    return {**facts, **base, **right, "arrangement": arrangement, "redundancy": redundancy, **more}


ORDERS = ("topological", "random-1", "random-2", "reversed")
# Problem a: all four right. b: right but reversed. c: no answer at all. d: consistently wrong.
GRADED = [
    *[row("a", order, "5") for order in ORDERS],
    *[row("b", order, "4" if order == "reversed" else "5") for order in ORDERS],
    *[row("c", order, None) for order in ORDERS],
    *[row("d", order, "7", ops=3) for order in ORDERS],
]


def test_grading_reads_the_final_answer_exactly():
    rows = [{"parents": ["p"], "answer": "12"}] * 5
    texts = ["Ana = 12. Answer: 12", "Answer: 12.", "Ana = 12.", "Answer: 1", "Answer: 12 or 13"]
    graded = evaluation.grade(rows, texts)
    assert [g["right"] for g in graded] == [True, True, False, False, True]
    assert [g["given"] for g in graded] == ["12", "12", None, "1", "12"]
    assert graded[0]["problem"] == "p"
    with pytest.raises(BadInput, match="4 answers for 5 evaluation rows"):
        evaluation.grade(rows, texts[:4])


def test_worst_case_consistency_and_histogram_by_hand():
    figures = evaluation.over_variants(GRADED)
    assert figures["accuracy"] == pytest.approx(7 / 16)
    assert figures["worst_case"] == figures["all_right"] == pytest.approx(1 / 4)
    assert figures["mixed"] == pytest.approx(1 / 4)
    assert figures["all_wrong"] == pytest.approx(2 / 4)
    assert figures["consistency"] == pytest.approx((1 + 3 / 4 + 1 + 1) / 4)
    assert figures["all_equal"] == pytest.approx(3 / 4)


def test_no_mixed_problem_is_none_at_all_and_not_what_rounding_leaves():
    whole = [row(f"p{i}", order, "5" if i < 9 else "4") for i in range(10) for order in ORDERS]
    assert evaluation.over_variants(whole)["mixed"] == 0.0
    assert evaluation.over_variants([])["mixed"] == 0.0


def test_split_metrics_by_order_ops_and_redundancy():
    redundant = [row(p, order, "1", redundancy=2) for p in "abcd" for order in ORDERS]
    metrics = evaluation.model_metrics([*GRADED, *redundant], seed=0)["id"]
    assert metrics["order"] == {
        "topological": pytest.approx(2 / 4),
        "random": pytest.approx(4 / 8),
        "reversed": pytest.approx(1 / 4),
    }
    assert metrics["order_drop"] == pytest.approx(0.25)
    assert metrics["worst_case"] == pytest.approx(0.25)
    assert metrics["all_variants"]["worst_case"] == 0.0
    assert metrics["redundancy"] == {"0": pytest.approx(7 / 16), "2": 0.0}
    assert metrics["ops"] == {"2": pytest.approx(7 / 12), "3": 0.0}
    assert metrics["problems"] == 4
    for name in ("worst_case", "accuracy", "consistency"):
        low, high = metrics[f"{name}_interval"]
        assert 0.0 <= low < metrics[name] < high <= 1.0
    assert metrics["tau"] == {
        "-1.0 to -0.6": metrics["order"]["reversed"],
        "-0.2 to 0.2": metrics["order"]["random"],
        "0.6 to 1.0": metrics["order"]["topological"],
    }
    with pytest.raises(BadInput, match="without redundancy are missing"):
        evaluation.split_metrics(redundant, 0)


def test_accuracy_by_order_pools_random_orders_and_keeps_splits_apart():
    table = evaluation.accuracy_by_order([*GRADED, row("e", "reversed", "5", split="ood")])
    cells = {(line["split"], line["order"]): line for line in table}
    assert cells["id", "random"]["rows"] == 8
    assert cells["id", "random"]["accuracy"] == pytest.approx(0.5)
    assert cells["id", "reversed"]["kendall_tau"] == -1.0
    assert cells["ood", "reversed"]["accuracy"] == 1.0


def test_accuracy_by_bins_of_tau_keeps_random_orders_apart():
    taus = [-1.0, -0.6, -1 / 3, -0.2, 0.0, 0.2, 1 / 3, 0.6, 1.0]
    orders = [row("a", f"random-{i}", "5" if tau > 0 else "4", kendall_tau=tau) for i, tau in enumerate(taus)]
    table = evaluation.accuracy_by_tau([*orders, row("a", "reversed", "5", redundancy=1)])
    plain = [line for line in table if line["redundancy"] == 0]
    assert [line["tau"] for line in plain] == list(evaluation.TAU_BINS)
    assert [line["rows"] for line in plain] == [1, 2, 2, 2, 2]
    assert [line["accuracy"] for line in plain] == [0.0, 0.0, 0.0, 1.0, 1.0]
    assert all(line["low"] <= line["accuracy"] <= line["high"] for line in plain)
    assert plain[3]["kendall_tau"] == pytest.approx((0.2 + 1 / 3) / 2)
    assert [(line["redundancy"], line["rows"]) for line in table[5:]] == [(1, 1)]


def test_intervals_of_correction_redraw_whole_problems():
    problems_of = [f"p{i // 4}" for i in range(80)]
    before = [i % 4 < 2 for i in range(80)]
    after = [i % 4 < 3 for i in range(80)]
    found = evaluation.correction_intervals(problems_of, before, after, 0)
    # All problems are alike, so drawing others changes nothing.
    assert found == {
        "plain": [0.5, 0.5], "corrected": [0.75, 0.75], "wrong_to_right": [0.5, 0.5], "right_to_wrong": [0.0, 0.0],
    }  # fmt: skip
    mixed = evaluation.correction_intervals([f"p{i}" for i in range(80)], before, after, 0)
    low, high = mixed["wrong_to_right"]
    assert low < 0.5 < high


def test_the_interval_of_a_rate_of_nothing_says_that_nothing_is_known():
    assert evaluation.bootstrap_ratio([0, 0], [0, 0], 0) == evaluation.wilson(0, 0) == (0.0, 1.0)
    found = evaluation.correction_intervals(["a", "b"], [True, True], [True, True], 0)
    assert found["wrong_to_right"] == [0.0, 1.0]
    assert found["right_to_wrong"] == [0.0, 0.0]


def test_draws_that_count_nothing_are_left_out_of_the_interval_of_a_ratio():
    # Of ten problems one has wrong answers, and all of them became right: every draw with any of them says 1.
    assert evaluation.bootstrap_ratio([2] + [0] * 9, [2] + [0] * 9, 0) == (1.0, 1.0)
    problems_of = [f"p{i}" for i in range(10)]
    before = [i > 0 for i in range(10)]
    assert evaluation.correction_intervals(problems_of, before, [True] * 10, 0)["wrong_to_right"] == [1.0, 1.0]


def test_intervals():
    # Wilson's interval for 8 of 10, to four digits, from the closed formula's published example values.
    assert evaluation.wilson(8, 10) == (pytest.approx(0.4902, abs=1e-4), pytest.approx(0.9433, abs=1e-4))
    assert evaluation.wilson(0, 0) == (0.0, 1.0)
    low, high = evaluation.bootstrap([1.0] * 30 + [0.0] * 10, seed=1)
    assert 0.55 < low < 0.7
    assert 0.8 < high < 0.95
    assert evaluation.bootstrap([1.0] * 30 + [0.0] * 10, seed=1) == (low, high)


def test_side_by_side_spreads_over_seeds():
    def model(method: str, seed: int, worst: float) -> dict[str, Any]:
        names = [n for n in evaluation.SIDE_BY_SIDE if n != "worst_case"]
        metrics = dict.fromkeys(names, 0.5) | {"worst_case": worst, "order": {"reversed": worst}, "tau": {}}
        return {"method": method, "seed": seed, "metrics": {"id": metrics | {"all_variants": {"worst_case": 0.0}}}}

    table = evaluation.side_by_side([model("mend", 0, 0.6), model("mend", 1, 0.8), model("base", -1, 0.1)])["id"]
    assert list(table) == ["base", "mend"]
    assert table["mend"]["worst_case"] == {
        "mean": pytest.approx(0.7),
        "std": pytest.approx(0.1414, abs=1e-4),
        "min": 0.6,
        "max": 0.8,
        "seeds": 2,
    }
    assert table["base"]["worst_case"]["std"] == 0.0


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    """Filtered rows and a base student, as the stages before leave them."""
    root = tmp_path_factory.mktemp("world")
    spec = {"vocabularies": ("market",), "operators": ("more", "fewer"), "max_value": 12}
    train = problems.generate(12, 0, problems.ProblemSpec(**spec))
    held_out = problems.generate(3, 1, problems.ProblemSpec(split="id", **spec))
    rows = [r for p in train for r in [mend.sft_row(p), *mend.mend_rows(p, 2, ("order",), 1, 0)]]
    write_jsonl(root / "filter" / "train.jsonl", rows)
    write_jsonl(root / "filter" / "eval.jsonl", [r for p in held_out for r in mend.eval_rows(p, 1, 1, 0)])
    students.save(tiny_model(), tiny_tokenizer(), root / "students", torch.float32)
    return root


TUNING = finetune.Tuning(SftConfig(steps=3, batch_tokens=150, learning_rate=1e-3), 200, "error", 0, 4, "cpu", 2, 8)


def tune(world: Path, out: Path, method: str, seed: int):
    inputs = {"students": world / "students", "filter": world / "filter"}
    item = {"student": "small-llama", "method": method, "seed": str(seed)}
    mixing = BashConfig(beta_from=0.5, beta_to=0.5, share=1.0, refresh=2)
    params = finetune.Params({"small-llama": TUNING}, mixing, RacConfig(cue="Answer:", max_new_tokens=8))
    stage = for_test(params, out, inputs, item, seed, "llm", "finetune")
    finetune.run(stage)
    return stage


def test_finetune_stage_trains_on_its_method_and_reports(world: Path, tmp_path: Path):
    stage = tune(world, tmp_path / "mend", "mend", 0)
    assert stage.record.metrics["rows"] == 36
    assert stage.record.metrics["steps"] == 3
    assert stage.record.metrics["eval_loss"] > 0
    lines = list(csv.DictReader((stage.out / "history.csv").open()))
    assert [line["step"] for line in lines] == ["1", "2", "3"]
    assert [bool(line["eval_loss"]) for line in lines] == [False, False, True]
    assert tree_digest(stage.out / "model") != tree_digest(world / "students")
    samples = list(read_jsonl(stage.out / "samples.jsonl"))
    asked = {row["id"]: row["prompt"] for row in read_jsonl(world / "filter/eval.jsonl")}
    assert [(s["step"], s["prompt"]) for s in samples] == [(3, asked[s["row"]]) for s in samples]
    assert len(samples) == 2
    again = tune(world, tmp_path / "again", "mend", 0)
    assert tree_digest(again.out) == tree_digest(stage.out)
    assert tune(world, tmp_path / "sft", "sft", 0).record.metrics["rows"] == 12
    with pytest.raises(BadInput, match=r"no rows of method 'rc-aug'; methods in the file: mend, sft"):
        tune(world, tmp_path / "rc-aug", "rc-aug", 0)


@pytest.mark.parametrize("method", finetune.OWN_WORDS)
def test_finetune_stage_mixes_own_words_into_the_rows_of_sft(world: Path, tmp_path: Path, method: str):
    stage = tune(world, tmp_path / method, method, 0)
    assert stage.record.metrics["rows"] == 12
    assert stage.record.metrics["steps"] == 3
    (facts,) = [model["facts"] for model in stage.record.models]
    assert (facts["method"], facts["rows_of"]) == (method, "sft")
    own = read_json(stage.out / "own_words.json")
    assert own["counts"]["changed" if method != "rac" else "corrections"] > 0
    assert tree_digest(tune(world, tmp_path / "again", method, 0).out) == tree_digest(stage.out)


def test_evaluate_stage_examines_base_and_all_tuned_models(world: Path, tmp_path: Path):
    tuned = tmp_path / "finetune"
    for method, seed in (("sft", 0), ("mend", 0), ("mend", 1)):
        tune(world, tuned / method / str(seed), method, seed)
    inputs = {"students": world / "students", "filter": world / "filter", "finetune": tuned}
    params = evaluate.Params("id", {"small-llama": Exam(2, True, 8, 16, "cpu")})

    def run(name: str):
        out = tmp_path / name
        stage = for_test(params, out, inputs, {"student": "small-llama"}, 0, "llm", "evaluate")
        evaluate.run(stage)
        return stage

    stage = run("out")
    summary = read_json(stage.out / "summary.json")
    assert [(m["method"], m["seed"]) for m in summary["models"]] == [("base", -1), ("sft", 0), ("mend", 0), ("mend", 1)]
    assert summary["models"][0]["digest"] == tree_digest(world / "students")
    assert set(summary["methods"]) == {"base", "sft", "mend"}
    assert summary["methods"]["mend"]["worst_case"]["seeds"] == 2
    answers = read_table(stage.out / "answers.parquet").to_pylist()
    assert len(answers) == 4 * 2 * 6
    assert {a["model"] for a in answers} == {m["digest"] for m in summary["models"]}
    share = sum(a["right"] for a in answers if a["method"] == "base" and a["redundancy"] == 0) / 6
    assert summary["models"][0]["metrics"]["accuracy"] == pytest.approx(share)
    assert len(list(csv.DictReader((stage.out / "leaderboard.csv").open()))) == 4
    for figure in ("accuracy_by_order.png", "accuracy_by_tau.png"):
        assert (stage.out / figure).read_bytes()[:4] == b"\x89PNG"
    bins = list(csv.DictReader((stage.out / "accuracy_by_tau.csv").open()))
    assert {line["tau"] for line in bins} <= set(evaluation.TAU_BINS)
    assert sum(int(line["rows"]) for line in bins) == len(answers)
    assert set(summary["methods"]["mend"]["tau"]) == {line["tau"] for line in bins if line["redundancy"] == "0"}
    board = list(csv.DictReader((stage.out / "leaderboard.csv").open()))
    assert all(float(line["consistency_low"]) <= float(line["consistency"]) for line in board)
    assert set(stage.record.metrics) == {"base", "sft", "mend", "mend_lead_over_base", "mend_lead_over_sft"}
    assert tree_digest(run("again").out) == tree_digest(stage.out)
    # Shards change no text: it is that of one call with all rows.
    model, tokenizer = students.load(world / "students")
    rows = evaluate.exam_rows(world / "filter/eval.jsonl", params.students["small-llama"])
    plain = generation.generate(model, tokenizer, [r["prompt"] for r in rows], generation.Decoding(8, 16))
    assert [a["text"] for a in answers if a["method"] == "base"] == plain
    how = {"max_new_tokens": 8, "batch_rows": 16, "temperature": 0.0, "device": "cpu", "dtype": "float32"}
    assert how.items() <= json.loads(answers[0]["decoding"]).items()
    assert how.items() <= summary["models"][0]["decoding"].items()


def test_a_killed_evaluation_does_not_ask_again(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    tuned = tmp_path / "finetune"
    for method in ("sft", "rac"):
        tune(world, tuned / method / "0", method, 0)
    inputs = {"students": world / "students", "filter": world / "filter", "finetune": tuned}
    params = evaluate.Params("id", {"small-llama": Exam(0, True, 8, 5, "cpu")})
    whole = for_test(params, tmp_path / "whole", inputs, {"student": "small-llama"}, 0, "llm", "evaluate")
    evaluate.run(whole)
    answer_ids, batches = generation.answer_ids, []

    def counted(*arguments: Any, **more: Any) -> list[generation.Answer]:
        batches.append(len(arguments[1]))
        if len(batches) == 3:
            raise KeyboardInterrupt
        return answer_ids(*arguments, **more)

    monkeypatch.setattr(generation, "answer_ids", counted)
    stage = for_test(params, tmp_path / "killed", inputs, {"student": "small-llama"}, 0, "llm", "evaluate")
    with pytest.raises(KeyboardInterrupt):
        evaluate.run(stage)
    evaluate.run(stage)
    # Base and sft have 18 rows each in batches of 5; the third of the base was killed. RAC answers all rows twice.
    assert batches == [5, 5, 5, *[5, 3], *[5, 5, 5, 3], 18, 18]
    assert tree_digest(stage.out) == tree_digest(whole.out)
    batches.clear()
    evaluate.run(stage)
    assert batches == []


def test_every_interval_is_drawn_with_the_seed_of_the_stage_and_the_bar_gets_to_its_end(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    for method in ("sft", "rac"):
        tune(world, tmp_path / "finetune" / method / "0", method, 0)
    inputs = {"students": world / "students", "filter": world / "filter", "finetune": tmp_path / "finetune"}
    params = evaluate.Params("id", {"small-llama": Exam(0, True, 8, 5, "cpu", gap_rows=2)})
    seeds, bars = [], []
    bootstrap, ratio = evaluation.bootstrap, evaluation.bootstrap_ratio
    monkeypatch.setattr(evaluation, "bootstrap", lambda values, seed: seeds.append(seed) or bootstrap(values, seed))
    for module in (evaluation, freerunning):
        monkeypatch.setattr(module, "bootstrap_ratio", lambda a, b, seed: seeds.append(seed) or ratio(a, b, seed))

    class Bar(Progress):
        def __exit__(self, *_: Any) -> None:
            bars.append((self.done, self.total))

    monkeypatch.setattr(Stage, "progress", lambda _, *how: Bar(*how))
    stage = for_test(params, tmp_path / "out", inputs, {"student": "small-llama"}, 5, "llm", "evaluate")
    evaluate.run(stage)
    assert set(seeds) == {stage.seed} == {5}
    evaluate.run(stage)  # all is in scratch
    # Eighteen rows, three models, and one of them answers twice.
    assert bars == [(72, 72), (72, 72)]


def test_evaluate_stage_measures_the_gap_and_what_correction_changed(world: Path, tmp_path: Path):
    tuned = tmp_path / "finetune"
    for method in ("sft", "rac"):
        tune(world, tuned / method / "0", method, 0)
    inputs = {"students": world / "students", "filter": world / "filter", "finetune": tuned}
    params = evaluate.Params("id", {"small-llama": Exam(0, True, 8, 16, "cpu", gap_rows=2)})
    stage = for_test(params, tmp_path / "out", inputs, {"student": "small-llama"}, 0, "llm", "evaluate")
    evaluate.run(stage)
    models = {model["method"]: model for model in read_json(stage.out / "summary.json")["models"]}
    assert all(model["free_running"]["rows"] == 2 for model in models.values())
    assert set(models["rac"]["correction"]["id"]) == {"plain", "corrected", "wrong_to_right", "right_to_wrong"}
    assert "correction" not in models["sft"]
    for name, (low, high) in models["rac"]["correction_intervals"]["id"].items():
        assert low <= models["rac"]["correction"]["id"][name] <= high
    right = [a["right"] for a in read_table(stage.out / "answers.parquet").to_pylist() if a["method"] == "rac"]
    assert models["rac"]["correction"]["id"]["plain"] == pytest.approx(sum(right) / len(right))
    figures = stage.record.metrics
    assert figures["sft"]["free_running_gap"] == models["sft"]["free_running"]["gap"]
    assert figures["rac"]["corrected"] == models["rac"]["correction"]["id"]["corrected"]
    # What the gates of BASH and RAC look at is there, for the model and for what it is compared with.
    for family, method in (("bash", "sft"), ("rac", "rac")):
        rules = gates.read_rules(Path(__file__).parents[2])[family]
        for metric in (rules.choose, *(bound.metric for bound in rules.bounds)):
            assert isinstance(models[method]["metrics"][metric], float), metric
    gain = models["rac"]["metrics"]["corrected"] - models["rac"]["correction"]["id"]["plain"]
    assert models["rac"]["metrics"]["corrected_gain"] == pytest.approx(gain)
    lines = list(csv.DictReader((stage.out / "free_running.csv").open()))
    assert {line["method"] for line in lines} == {"base", "sft", "rac"}
    assert [line["place"] for line in lines if line["method"] == "sft"] == [str(i) for i in range(len(lines) // 3)]


def test_evaluate_refuses_what_it_cannot_examine(world: Path, tmp_path: Path):
    (tmp_path / "finetune").mkdir()
    with pytest.raises(BadInput, match="no fine-tuned model"):
        candidates(world / "students", [tmp_path / "finetune"], "sft", "llm-finetune")
    hidden = tmp_path / "finetune/.tmp-1/sft/0/model"
    hidden.mkdir(parents=True)
    (hidden / "config.json").write_text("{}")
    with pytest.raises(BadInput, match="no fine-tuned model among the dependencies; run llm-finetune"):
        candidates(world / "students", [tmp_path / "finetune"], "sft", "llm-finetune")
    inputs = {"students": world / "students", "filter": world / "filter", "finetune": tmp_path / "finetune"}
    params = evaluate.Params("ood", {"small-llama": Exam(0, True, 8, 16, "cpu")})
    stage = for_test(params, tmp_path / "out", inputs, {"student": "small-llama"}, 0, "llm", "evaluate")
    with pytest.raises(BadInput, match=r"main_split: no rows of split 'ood'; there are \['id'\]"):
        evaluate.run(stage)
    other = for_test(params, tmp_path / "other", inputs, {"student": "smollm2"}, 0, "llm", "evaluate")
    with pytest.raises(BadInput, match=r"llm\.evaluate\.students: no settings for 'smollm2'"):
        evaluate.run(other)


def test_no_line_is_drawn_across_an_empty_bin(monkeypatch, tmp_path):
    figures = []
    monkeypatch.setattr(plots, "_save", lambda figure, path: figures.append(figure))
    first, *_, last = evaluation.TAU_BINS
    plots.accuracy_by_tau(
        tmp_path / "a.png", {"sft": {"tau": {n: {"mean": 0.5, "std": 0.1} for n in (first, last)}}}, ""
    )
    (line, *_) = figures[0].axes[0].lines
    heights = [float(value) for value in line.get_ydata()]
    assert [not math.isnan(height) for height in heights] == [name in (first, last) for name in evaluation.TAU_BINS]
