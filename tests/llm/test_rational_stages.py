"""Rational's stages, one after the other, with a model of a few thousand parameters."""

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from springhead import gates
from springhead.errors import BadInput, Finding
from springhead.jsonio import read_json, read_jsonl, write_jsonl
from springhead.lineage.digests import tree_digest
from springhead.lineage.graph import role_of
from springhead.llm import generation, mutators, rational, safety_data, safety_eval, students
from springhead.llm.judges import refusal, remote
from springhead.llm.sft import SftConfig
from springhead.llm.textrows import Row, with_row_id, write_rows
from springhead.llm.tokenizer import CHATML_TRAINING_TEMPLATE
from springhead.params import load, read_params
from springhead.stage import Stage, for_test
from springhead.tables import read_table
from stages.llm import rational as making
from stages.llm import rational_evaluate as evaluating
from stages.llm import rational_finetune as tuning
from stages.llm import rational_validate as validating
from tests.llm.judge_server import completion, running
from tests.llm.tiny import byte_tokenizer, tiny_model

ROOT = Path(__file__).parents[2]
MIRROR = ROOT.parent / "shared" / "data"
shared = pytest.mark.skipif(not MIRROR.is_dir(), reason="the folder of public data is not beside the checkout")
LLM = read_params(ROOT / "params.yaml")["llm"]
ROWS: making.Params = load(making.Params, LLM["rational"], "params.yaml: llm.rational")
BOUNDS: validating.Params = load(validating.Params, LLM["rational_validate"], "params.yaml: llm.rational_validate")
TUNING = tuning.Params(
    {"tiny": tuning.Tuning(
        SftConfig(steps=4, batch_tokens=1500, learning_rate=0.01), 1500, "drop",
        {"adversarial": 4, "contrast": 0, "benign": 4}, "cpu",
    )}
)  # fmt: skip
EXAM = evaluating.Params({"tiny": evaluating.Exam(1, 3, 8, 16, "cpu")})


def make(base: Path, params: making.Params = ROWS, name: str = "rational") -> Stage[making.Params]:
    stage = for_test(params, base / name, {"students": base / "students"}, branch="llm", stage="rational", seed=5)
    making.run(stage)
    return stage


def validate(base: Path, params: validating.Params = BOUNDS, out: str = "rational_validate") -> Path:
    inputs = {"rational": base / "rational"}
    validating.run(for_test(params, base / out, inputs, branch="llm", stage="rational_validate"))
    return base / out


def tune(base: Path, method: str, seed: int = 0, params: tuning.Params = TUNING) -> Stage[tuning.Params]:
    item = {"student": "tiny", "method": method, "seed": str(seed)}
    inputs = {"rational": base / "rational", "students": base / "students"}
    out = base / "rational_finetune" / method / str(seed)
    stage = for_test(params, out, inputs, item, seed, "llm", "rational_finetune")
    tuning.run(stage)
    return stage


def evaluate(base: Path, out: str = "rational_evaluate", params: evaluating.Params = EXAM) -> Stage[evaluating.Params]:
    inputs = {name: base / name for name in ("rational", "students", "rational_finetune")}
    stage = for_test(params, base / out, inputs, {"student": "tiny"}, 1, "llm", "rational_evaluate")
    evaluating.run(stage)
    return stage


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the tiny student and the rows of the quick profile."""
    found = tmp_path_factory.mktemp("rational")
    tokenizer = byte_tokenizer("<|im_start|>", "<|im_end|>", eos_token="<|im_end|>", pad_token="<pad>")
    tokenizer.chat_template = CHATML_TRAINING_TEMPLATE
    ends = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    model = tiny_model(vocab_size=len(tokenizer), max_position_embeddings=2048)
    model.config.update(ends)
    model.generation_config.update(**ends)
    model.save_pretrained(found / "students")
    tokenizer.save_pretrained(found / "students")
    make(found)
    return found


@pytest.fixture
def copied(base: Path, tmp_path: Path) -> Callable[[Callable[[list[Row]], None]], Path]:
    """A function that gives a folder with the rows after a change of the training rows."""

    def copy(change: Callable[[list[Row]], None]) -> Path:
        rows = {name: list(read_jsonl(base / "rational" / name)) for name in ("train.jsonl", "eval.jsonl")}
        change(rows["train.jsonl"])
        write_rows(tmp_path / "rational", rows)
        write_jsonl(tmp_path / "rational/bases.jsonl", read_jsonl(base / "rational/bases.jsonl"))
        return tmp_path

    return copy


# -- rows ------------------------------------------------------------------------------------------


@pytest.mark.unit
def test_the_rows_of_the_authored_prompts(base: Path, tmp_path: Path) -> None:
    (tmp_path / "students").symlink_to(base / "students")
    stage = make(tmp_path)
    assert tree_digest(tmp_path / "rational") == tree_digest(base / "rational")  # the same bytes twice
    bases = {row["id"]: row for row in read_jsonl(stage.out / "bases.jsonl")}
    train = list(read_jsonl(stage.out / "train.jsonl"))
    held = list(read_jsonl(stage.out / "eval.jsonl"))
    assert Counter((b["kind"], b["split"]) for b in bases.values()) == {
        ("adversarial", "train"): 40, ("adversarial", "test"): 20, ("benign", "train"): 40, ("benign", "test"): 20,
    }  # fmt: skip
    forms, benign = len(ROWS.forms), len(ROWS.benign_forms)
    assert Counter(r["method"] for r in train) == {
        "rational": 40 * (forms + benign), "refusal-sft": 40 * (forms + benign),
        "rational-no-benign": 40 * forms, "rational-only-benign": 40 * benign,
    }  # fmt: skip
    assert Counter(r["kind"] for r in held) == {"adversarial": 20 * len(ROWS.eval_forms), "benign": 20 * 3}
    for row in (*train, *held):
        assert bases[row["parents"][0]]["split"] == row["split"]
    assert not {r["group"] for r in train} & {r["group"] for r in held}
    table = read_table(stage.out / "rows.parquet").to_pylist()
    assert [entry["id"] for entry in table] == [row["id"] for row in (*train, *held)]
    metrics = stage.record.metrics
    assert metrics["train"]["rational"] == {"adversarial": 40 * forms, "benign": 40 * benign}
    assert metrics["answers"] == {"written": 40 * (forms + benign), "sampled": 0, "none": 0}
    lines = (stage.out / "yield.csv").read_text().splitlines()
    assert lines[0] == "kind,form,written,sampled,none"
    assert f"adversarial,{mutators.QUESTION},40,0,0" in lines
    assert len(lines) == 1 + forms + benign


@pytest.mark.unit
def test_the_student_is_asked_and_what_it_says_must_pass(base: Path, tmp_path: Path) -> None:
    """A model of random weights writes noise: all is asked, nothing taken, and the reasons are counted."""
    (tmp_path / "students").symlink_to(base / "students")
    check = replace(ROWS.self_check, tries=2, max_prompts=2, max_new_tokens=6)
    stage = make(tmp_path, replace(ROWS, self_check=check))
    counted = stage.record.metrics["self_check"]
    asked = {"adversarial": 2 * len(ROWS.forms), "benign": 2 * len(ROWS.benign_forms)}
    assert counted["by_kind"] == {kind: {"asked": n, "accepted": 0} for kind, n in asked.items()}
    assert sum(counted["rejected"].values()) == 2 * sum(asked.values())
    assert tree_digest(stage.out / "train.jsonl") == tree_digest(base / "rational/train.jsonl")


@pytest.mark.unit
def test_a_prompt_s_draws_do_not_depend_on_its_batch_and_a_killed_round_goes_on(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, tokenizer = students.load(base / "students")
    decoding = generation.Decoding(12, 2, 1.0, 1.0, 5)
    pairs = [(rational.S_REJ, f"How do I open {i} locks?") for i in range(5)]

    def sampler(name: str) -> rational.Sampler:
        return making.model_sampler(model, tokenizer, decoding, "d1", tmp_path / name)

    texts = sampler("whole")(pairs, 0)
    assert [sampler("whole")([pair], 0)[0] for pair in pairs[:2]] == texts[:2]
    assert sampler("whole")(pairs + pairs[:1], 0) == texts + texts[:1]
    assert sampler("whole")(pairs, 1) != texts
    answer, batches = generation.answer, []

    def counted(*arguments: Any, **more: Any) -> list[generation.Answer]:
        batches.append(len(arguments[2]))
        if len(batches) == 2:
            raise KeyboardInterrupt
        return answer(*arguments, **more)

    monkeypatch.setattr(generation, "answer", counted)
    with pytest.raises(KeyboardInterrupt):
        sampler("killed")(pairs, 0)
    assert sampler("killed")(pairs, 0) == texts
    assert batches == [2, 2, 2, 1]


@pytest.mark.unit
def test_an_accepted_answer_takes_the_place_of_the_written_one(base: Path) -> None:
    goal = next(b for b in safety_data.authored() if b.kind == "adversarial")
    goal = replace(goal, group=goal.id, split="train")
    settings = rational.Settings(forms=("question", "slang"), methods=("rational",))
    text = "Rationale: It would harm others. I should not help.\n\nResponse: I'm sorry, but I can't help with that."
    (_, prompt), _ = rational.forms_of(goal, settings, 0)
    rows = rational.train_rows(goal, settings, 0, {prompt: rational.Sampled(text, "m" * 64, {"temperature": 0.7})})
    assert making.yields([goal], settings, 0, rows) == [
        ("adversarial", "question", 0, 1, 0), ("adversarial", "slang", 1, 0, 0),
    ]  # fmt: skip
    silent = replace(goal, kind="benign", response="")
    assert making.yields([silent], settings, 0, rational.train_rows(silent, settings, 0)) == [
        ("benign", "question", 0, 0, 1)
    ]


@shared
@pytest.mark.unit
def test_public_sets_come_beside_the_authored_prompts(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SPRINGHEAD_SOURCES", str(MIRROR))
    params = replace(ROWS, public=("advbench", "xstest"), contrast=True, forms=("question",), methods=("rational",))
    found = making.base_prompts(replace(params, harmbench=True), ROOT, 5)
    counts = Counter((b.source, b.split) for b in found.bases)
    assert (counts[safety_data.ATTACK_SET, "test"], counts[safety_data.ATTACK_SET, "train"]) == (41, 0)
    assert counts[safety_data.CONTRAST_SET, "test"] > 370
    assert (safety_data.CONTRAST_SET, "train") not in counts
    assert counts["advbench", "train"] > 250
    assert found.leaks > 0


@shared
@pytest.mark.unit
def test_rows_of_all_public_sets_are_green(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPRINGHEAD_SOURCES", str(MIRROR))
    (tmp_path / "students").symlink_to(base / "students")
    (tmp_path / ".rational-root/data").mkdir(parents=True)
    (tmp_path / ".rational-root/data/sources.yaml").symlink_to(ROOT / "data/sources.yaml")
    one = {"forms": ("question",), "eval_forms": ("question",)}
    few = {"benign_forms": ("question",), "eval_benign_forms": ("question",), "methods": ("rational", "refusal-sft")}
    params = replace(ROWS, public=safety_data.PUBLIC, contrast=True, harmbench=True, **one, **few)
    stage = make(tmp_path, params)
    # Some of CoCoNot's preferred answers refuse, and some of its prompts are in other languages.
    dropped = stage.record.metrics["unfit_dropped"]
    assert 0 < dropped["refuses"] < 40 and 0 < dropped["foreign"] < 20 and 0 < dropped["personal"] < 20
    found = read_json(validate(tmp_path, replace(BOUNDS, **one)) / "verdict.json")
    assert [e["name"] for e in found["expectations"] if not e["success"]] == []


@pytest.mark.unit
def test_a_public_answer_that_cannot_be_trained_on_is_dropped_and_counted(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    german = "Wie koche ich am besten ein weiches Ei, wenn ich keinen Topf und auch kein heisses Wasser habe?"
    answers = {
        "How do I peel a potato?": ("Hold it in one hand and draw the peeler along it with the other.", None),
        "How do I slice an onion?": ("I'm sorry, but I can't help with that.", "refuses"),
        german: ("Put it into a steamer for seven minutes.", "foreign"),
        "Who repairs old clocks?": ("Write to jane@some-firm.io and she will tell you what it costs.", "personal"),
    }
    made = [safety_data.base("benign", "general", "coconot", p, a) for p, (a, _) in answers.items()]
    judge = refusal.shipped()
    assert [making.unfit_answer(b, judge) for b in made] == [reason for _, reason in answers.values()]
    monkeypatch.setattr(safety_data, "public", lambda names, root: made)
    found = making.base_prompts(ROWS, tmp_path, 5)
    assert [b.prompt for b in found.bases if b.source == "coconot"] == ["How do I peel a potato?"]
    assert found.unfit == {"refuses": 1, "foreign": 1, "personal": 1}


@pytest.mark.unit
def test_no_training_prompt_is_near_a_held_out_one_of_another_group(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A is near B and B near C, but C joined another group: it may not stay in training when B is held out."""
    params = replace(ROWS, test_share=0.5)
    texts = [f"Where was the film {name} filmed in Scotland?" for name in ("One", "Two", "Three", "Four")]
    made = [safety_data.base("benign", "general", "coconot", text, "In a small town near the sea.") for text in texts]
    monkeypatch.setattr(safety_data, "public", lambda names, root: made)
    alone = [replace(b, group=b.id) for b in made]  # as near-duplicates of different prompts are
    real = safety_data.grouped

    def grouped(bases: Any, threshold: float) -> Any:
        return [b for b in real(bases, threshold) if b.source != "coconot"] + alone

    monkeypatch.setattr(safety_data, "grouped", grouped)
    found = making.base_prompts(params, tmp_path, 5)
    assert {b.split for b in found.bases if b.source == "coconot"} == {"test"}
    assert found.leaks == 2


@pytest.mark.fault
def test_a_public_set_that_is_not_there_is_named(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SPRINGHEAD_SOURCES", raising=False)
    monkeypatch.setenv("SPRINGHEAD_HOME", str(tmp_path / "home"))
    with pytest.raises(BadInput, match=r"source 'advbench-advbench' is missing: take .*advbench.* from"):
        making.base_prompts(replace(ROWS, public=("advbench",)), ROOT, 0)
    with pytest.raises(BadInput, match=r"unknown public sets \['harmbench'\]"):
        making.base_prompts(replace(ROWS, public=("harmbench",)), ROOT, 0)


# -- the verdict -----------------------------------------------------------------------------------


@pytest.mark.unit
def test_the_rows_of_the_quick_profile_are_green(base: Path) -> None:
    found = read_json(validate(base) / "verdict.json")
    assert [e["name"] for e in found["expectations"] if not e["success"]] == []
    assert found["data_digest"] == tree_digest(base / "rational")


@pytest.mark.fault
def test_a_poisoned_row_stops_the_stage_and_is_named(base: Path, copied: Callable[..., Path]) -> None:
    """A training row that gives a held-out prompt away, under the name of a training prompt."""
    held = next(r for r in read_jsonl(base / "rational/eval.jsonl") if r["operator"] == "question")
    poisoned: list[Row] = []

    def poison(train: list[Row]) -> None:
        poisoned.append(with_row_id({**train[3], "prompt": held["prompt"], "goal": held["goal"]}))
        train[3] = poisoned[0]

    folder = copied(poison)
    with pytest.raises(Finding, match=f"ExpectNoLeak.*{poisoned[0]['id'][:7]}"):
        validate(folder)
    [line] = read_table(folder / "rational_validate/quarantine.parquet").to_pylist()
    assert (line["id"], line["expectation"]) == (poisoned[0]["id"], "ExpectNoLeak")
    assert line["detail"] == f"file=train.jsonl, line=4, leak=the prompt of evaluation row {held['id']}"


@pytest.mark.fault
def test_a_broken_form_and_unbalanced_refusals_stop_the_stage(copied: Callable[..., Path]) -> None:
    def damage(train: list[Row]) -> None:
        train[0] = with_row_id({**train[0], "completion": train[0]["completion"].replace("Response:", "So:")})
        train[:] = [r for r in train if r["method"] != "refusal-sft" or r["answer"] == "refuse"]

    with pytest.raises(Finding) as caught:
        validate(copied(damage))
    assert "ExpectWholeForm" in str(caught.value)
    assert "ExpectBalancedAnswers" in str(caught.value)
    assert "train/refusal-sft" in str(caught.value)


@pytest.mark.fault
def test_damaged_files_are_bad_input(copied: Callable[..., Path]) -> None:
    folder = copied(lambda train: None)
    write_jsonl(folder / "rational/bases.jsonl", [{"id": "x"}])
    with pytest.raises(BadInput, match=r"bases\.jsonl:1: a base prompt needs an id and a split"):
        validate(folder, out="first")
    path = folder / "rational/train.jsonl"
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(BadInput, match=r"train\.jsonl:\d+"):
        validate(folder, out="second")


# -- training and evaluation -----------------------------------------------------------------------


@pytest.fixture(scope="module")
def tuned(base: Path) -> dict[tuple[str, int], Stage[tuning.Params]]:
    runs = [("rational", 0), ("rational", 1), ("refusal-sft", 0), ("rational-only-benign", 0)]
    return {(method, seed): tune(base, method, seed) for method, seed in runs}


@pytest.mark.unit
def test_a_model_of_each_method(base: Path, tuned: dict[tuple[str, int], Stage[tuning.Params]]) -> None:
    before, _ = students.load(base / "students")
    for (method, seed), stage in tuned.items():
        assert len((stage.out / "history.csv").read_text().splitlines()) == 1 + 4
        after, _ = students.load(stage.out / "model")
        assert any(not torch.equal(a, b) for a, b in zip(before.parameters(), after.parameters(), strict=True))
        assert stage.record.metrics["refuse_share"] == (0.0 if method == "rational-only-benign" else 0.5)
        [model] = stage.record.models
        assert model["facts"] == {"student": "tiny", "method": method, "seed": seed}
    # The seed draws the prompts; the method does not.
    rows = list(read_jsonl(base / "rational/train.jsonl"))
    drawn = {
        key: [r["prompt"] for r in tuning.rows_of(rows, key[0], TUNING.students["tiny"].prompts, key[1])]
        for key in tuned
    }
    assert drawn["rational", 0] == drawn["refusal-sft", 0]
    assert drawn["rational-only-benign", 0] == [
        p for p in drawn["rational", 0] if p in drawn["rational-only-benign", 0]
    ]
    assert drawn["rational", 0] != drawn["rational", 1]
    assert all(len(prompts) == 8 for key, prompts in drawn.items() if key[0] != "rational-only-benign")


@pytest.mark.unit
def test_all_models_are_asked_the_same_and_judged(
    base: Path, tuned: dict[tuple[str, int], Stage[tuning.Params]]
) -> None:
    stage = evaluate(base)
    summary = read_json(stage.out / "summary.json")
    order = [("base", -1), ("refusal-sft", 0), ("rational", 0), ("rational", 1), ("rational-only-benign", 0)]
    assert [(m["method"], m["seed"]) for m in summary["models"]] == order
    answers = read_table(stage.out / "answers.parquet").to_pylist()
    asked = {(a["method"], a["seed"]): [] for a in answers}
    for answer in answers:
        asked[answer["method"], answer["seed"]].append(answer["row"])
    assert len({tuple(rows) for rows in asked.values()}) == 1
    assert len(asked["base", -1]) == len(ROWS.eval_forms) + 3 + 3
    for model in summary["models"]:
        mine = [a for a in answers if (a["method"], a["seed"]) == (model["method"], model["seed"])]
        attacks = [a for a in mine if a["kind"] == "adversarial"]
        success = sum(a["answered"] and not a["refused"] for a in attacks) / len(attacks)
        assert model["metrics"]["attack_success"] == pytest.approx(success)
        assert {a["model"] for a in mine} == {model["digest"]} == {tree_digest(stage.root / model["path"])}
    spread = summary["methods"]["rational"]["over_refusal"]
    assert (spread["seeds"], summary["methods"]["base"]["over_refusal"]["seeds"]) == (2, 1)
    board = (stage.out / "leaderboard.csv").read_text().splitlines()
    assert len(board) == 1 + len(order)
    forms = (stage.out / "by_form.csv").read_text().splitlines()
    assert len(forms) == 1 + len(order) * (len(ROWS.eval_forms) + 4 + 1)
    assert (stage.out / "table.md").read_text().count("\n") == 2 + len(order)
    metrics = stage.record.metrics
    lead = metrics["rational"]["attack_success"] - metrics["refusal-sft"]["attack_success"]
    assert metrics["attack_success_against_refusal_sft"] == pytest.approx(lead)
    assert tree_digest(evaluate(base, "again").out) == tree_digest(stage.out)


@pytest.mark.unit
def test_an_llm_as_second_judge_has_a_column_and_an_agreement(
    base: Path, tuned: dict[tuple[str, int], Stage[tuning.Params]], monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = read_json(evaluate(base, "one-judge").out / "summary.json")
    assert "llm_judge" not in plain
    with running() as server:
        server.reply = lambda n: completion("ABC"[n % 3])
        block = {"url": server.url, "model": "judge-1", "key_variable": "JUDGE_KEY", "retries": 0}
        judge = load(remote.Endpoint, block, "params.yaml: llm.rational_evaluate.judge")
        values = LLM["rational_evaluate"]
        assert load(evaluating.Params, values, "params.yaml").judge is None  # off by default
        assert load(evaluating.Params, {**values, "judge": block}, "params.yaml").judge == judge
        monkeypatch.delenv("JUDGE_KEY", raising=False)
        with pytest.raises(BadInput, match="JUDGE_KEY is not set"):
            evaluate(base, "two-judges", replace(EXAM, judge=judge))
        assert server.asked == []
        monkeypatch.setenv("JUDGE_KEY", "secret-7")
        stage = evaluate(base, "two-judges", replace(EXAM, judge=judge))
        asked = len(server.asked)
        bodies = [body["messages"][0]["content"] for _, _, body in server.asked]
    answers = read_table(stage.out / "answers.parquet").to_pylist()
    judged = [a for a in answers if a["llm_opinion"] is not None]
    assert {a["llm_opinion"] for a in judged} == {"refusal", "partial", "compliance"}
    assert all(a["answered"] for a in judged)
    assert 0 < asked <= len(judged)
    goals = {row["id"]: row["goal"] for row in read_jsonl(base / "rational/eval.jsonl")}
    assert any(goals[judged[0]["row"]] in body for body in bodies)  # the base prompt, as the trained judge has it
    same = sum((a["llm_opinion"] != "compliance") == a["refused"] for a in judged)
    summary = read_json(stage.out / "summary.json")
    found = summary["llm_judge"]
    assert (found["model"], found["rows"]) == ("judge-1", len(judged))
    assert found["agreement"] == pytest.approx(same / len(judged)) == stage.record.metrics["llm_judge_agreement"]
    assert sum(model["llm_judge"]["rows"] for model in summary["models"]) == len(judged)
    assert "secret-7" not in (stage.out / "summary.json").read_text()
    # No other figure depends on it.
    assert summary["methods"] == plain["methods"]
    with pytest.raises(BadInput, match=r"params\.yaml: llm\.rational_evaluate\.judge: url 'ftp://x' is no http"):
        load(remote.Endpoint, {**block, "url": "ftp://x"}, "params.yaml: llm.rational_evaluate.judge")


@pytest.mark.fault
def test_what_a_user_may_get_wrong_is_named(base: Path, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="no rows of method 'rational-2' drawn; methods in the file: rational, "):
        tune(base, "rational-2")
    drawn = replace(TUNING.students["tiny"], prompts={"rude": 1})
    with pytest.raises(BadInput, match="prompts: rude: not adversarial, contrast or benign"):
        tune(base, "rational", params=tuning.Params({"tiny": drawn}))
    with pytest.raises(BadInput, match="no settings for 'tiny'"):
        tune(base, "rational", params=tuning.Params({}))
    for values, reason in (
        ({"forms": ["past-tense"]}, "past-tense are kept for evaluation"),
        ({"methods": ["rude"]}, r"llm\.rational\.methods: unknown or none \['rude'\]"),
        ({"eval_benign_forms": []}, "llm.rational.eval_benign_forms"),
    ):
        with pytest.raises(BadInput, match=reason):
            load(making.Params, {**LLM["rational"], **values}, "x").settings()
    with pytest.raises(BadInput, match="similarity"):
        replace(ROWS, similarity=0.0)
    with pytest.raises(BadInput, match="tries and max_prompts"):
        replace(ROWS.self_check, tries=-1)
    with pytest.raises(BadInput, match="per_form and per_source"):
        evaluating.Exam(-1, 0, 8, 8, "cpu")


@pytest.mark.unit
def test_the_gates_ask_for_figures_that_the_evaluation_has() -> None:
    rules = gates.read_rules(ROOT)["rational"]
    figures = {"agreement", *safety_eval.flat(_figures())}
    assert {bound.metric for bound in rules.bounds} | {rules.choose} <= figures
    assert {bound.not_above or bound.not_below or rational.REFUSAL for bound in rules.bounds} == {rational.REFUSAL}
    assert rules.items == ()  # a run of the quick profile is too short to be judged


def _figures() -> dict[str, Any]:
    bases = [replace(b, group=b.id, split="test") for b in safety_data.authored()]
    rows = [row for b in bases for row in rational.eval_rows(b, rational.Settings(), 0)]
    return safety_eval.metrics(rows, safety_eval.judge_answers(rows, ["I can't."] * len(rows), refusal.shipped()), 0)


@pytest.mark.unit
def test_report_and_lineage_know_the_stages_by_what_they_do() -> None:
    names = ("llm-rational", "llm-rational_validate", "llm-rational_finetune@smollm2-rational-0", "rl-evaluate@CarRun")
    assert [role_of(name) for name in names] == ["rational", "validate", "finetune", "evaluate"]
