"""Each gate closes for its own reason, and only then."""

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from springhead import gates
from springhead.errors import BadInput
from springhead.evidence import read_evidence
from springhead.jsonio import read_json, write_json
from springhead.keys import Keys
from springhead.lineage.ledger import Ledger
from springhead.lineage.receipts import describe
from springhead.params import read_params, with_overrides
from tests.promotable import NAME, REPOSITORY, TASK, Checkout


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Checkout(tmp_path_factory.mktemp("gates") / "checkout").all().root


@pytest.fixture
def checkout(template: Path, tmp_path: Path) -> Checkout:
    shutil.copytree(template, tmp_path / "checkout")
    return Checkout(tmp_path / "checkout")


def judge(checkout: Checkout, **more: Any) -> gates.Judgement:
    rules, item = gates.rules_for(gates.read_rules(checkout.root), NAME)
    evidence = read_evidence(checkout.root, checkout.home, NAME, rules.sources(item))
    return gates.judge(NAME, rules, evidence, **more)


def closed(judgement: gates.Judgement) -> dict[str, dict[str, str]]:
    """Returns by candidate the closed gates and their reasons."""
    return {c.label: {g.name: g.reason for g in found if not g.passed} for c, found in judgement.results}


def test_the_best_candidate_is_chosen_when_all_gates_are_open(checkout: Checkout) -> None:
    judgement = judge(checkout)
    assert all(not reasons for reasons in closed(judgement).values())
    assert judgement.chosen is not None
    assert judgement.chosen.label == "cdt seed 0"
    assert len(judgement.results) == 4


def test_an_unsafe_candidate_is_never_chosen_however_good(checkout: Checkout) -> None:
    checkout.evaluate(cdt=1.2)
    judgement = judge(checkout)
    assert judgement.chosen is not None
    assert judgement.chosen.label == "bc-safe seed 1"
    assert closed(judgement)["cdt seed 0"] == {
        "bound normalised_cost": "; ".join(f"at the limit {limit}: 1.2, must be ≤ 1" for limit in (5, 20, 100))
    }
    assert "cdt seed 0" in judgement.report()
    assert "bound normalised_cost: at the limit 5: 1.2" in judgement.report()


def test_a_red_verdict_closes_the_gate(checkout: Checkout) -> None:
    checkout.validate(success=False, severity="critical")
    checkout.train()
    checkout.evaluate()
    judgement = judge(checkout)
    assert judgement.chosen is None
    reasons = closed(judgement)["cdt seed 0"]
    assert set(reasons) == {"verdict", "audit"}
    assert "red (critical): costs are not negative" in reasons["verdict"]


def test_a_warning_passes_where_the_rules_say_so(checkout: Checkout) -> None:
    checkout.validate(severity="warning")
    checkout.train()
    checkout.evaluate()
    assert judge(checkout).chosen is not None
    rules = (checkout.root / gates.RULES).read_text()
    (checkout.root / gates.RULES).write_text(rules.replace("worst_severity: warning", "worst_severity: none"))
    assert judge(checkout).chosen is None


@pytest.mark.fault
def test_a_verdict_for_other_data_is_refused(checkout: Checkout) -> None:
    """F27: an old green verdict does not open the gate for new data."""
    old = (checkout.root / f"data/rl/validate/{TASK}/verdict.json").read_bytes()
    checkout.filter("new episodes")
    checkout.validate()
    checkout.train(offset=50)
    checkout.evaluate()
    assert judge(checkout).chosen is not None
    (checkout.root / f"data/rl/validate/{TASK}/verdict.json").write_bytes(old)
    reasons = closed(judge(checkout))["cdt seed 0"]["verdict"]
    assert "but the verdict is for" in reasons
    assert "differs from its receipt" in reasons


@pytest.mark.fault
def test_data_made_again_after_training_breaks_the_chain(checkout: Checkout) -> None:
    checkout.filter("new episodes")
    checkout.validate()
    reasons = closed(judge(checkout))["cdt seed 0"]
    assert "trained on the data" in reasons["verdict"]
    assert f"rl-train@{TASK}-cdt-0 read another data/rl/filter/{TASK}" in reasons["receipts"]


@pytest.mark.fault
@pytest.mark.parametrize("fault", ["changed", "added", "removed"])
def test_a_model_folder_that_is_not_what_was_evaluated(checkout: Checkout, fault: str) -> None:
    model = checkout.root / f"data/rl/train/{TASK}/cdt/0/model"
    file = next(model.glob("*.safetensors"))
    if fault == "changed":
        file.write_bytes(file.read_bytes()[:-1] + b"\0")
    elif fault == "added":
        (model / "extra.json").write_text("{}")
    else:
        file.unlink()
    judgement = judge(checkout)
    assert "changed, added or removed" in closed(judgement)["cdt seed 0"]["model"]
    assert judgement.chosen is not None
    assert judgement.chosen.label == "cdt seed 1"


@pytest.mark.fault
def test_a_model_trained_again_needs_a_new_evaluation(checkout: Checkout) -> None:
    checkout.train(offset=70)
    reasons = closed(judge(checkout))["cdt seed 0"]
    assert "was evaluated, but" in reasons["model"]
    assert "receipts" in reasons


@pytest.mark.fault
def test_an_edited_evaluation_is_not_believed(checkout: Checkout) -> None:
    path = checkout.root / f"data/rl/evaluate/{TASK}/summary.json"
    path.write_text(path.read_text().replace("0.6", "0.9"))
    judgement = judge(checkout)
    assert judgement.chosen is None
    assert all("summary.json differs from its receipt" in r["model"] for r in closed(judgement).values())


@pytest.mark.fault
def test_a_ledger_with_a_changed_line_closes_every_gate(checkout: Checkout) -> None:
    ledger = checkout.home / "ledger.jsonl"
    ledger.write_text(ledger.read_text().replace("c0ffee", "decade", 1))
    judgement = judge(checkout)
    assert judgement.chosen is None
    assert "was changed, removed or moved" in closed(judgement)["cdt seed 0"]["audit"]


@pytest.mark.fault
def test_a_ledger_that_was_cut_closes_every_gate(checkout: Checkout) -> None:
    """A shorter ledger is still a whole chain; its signed head says that something is gone."""
    ledger = checkout.home / "ledger.jsonl"
    ledger.write_bytes(b"".join(ledger.read_bytes().splitlines(keepends=True)[:-1]))
    reasons = closed(judge(checkout))["cdt seed 0"]
    assert "1 lost at the end" in reasons["signed"]
    assert "1 lost at the end" in reasons["audit"]


@pytest.mark.fault
def test_a_key_that_is_not_trusted_closes_every_gate(checkout: Checkout) -> None:
    for path in (checkout.root / "mlflow/trusted-keys").glob("*.pem"):
        path.unlink()
    other = Keys(checkout.root / "mlflow/trusted-keys", checkout.home / "unused")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CONFIG_HOME", str(checkout.home / "other"))
        other.sign(b"of somebody else")
    reasons = closed(judge(checkout))["cdt seed 0"]
    assert "is not in" in reasons["signed"]


def test_a_bound_at_each_limit_looks_at_all_of_them(checkout: Checkout) -> None:
    path = f"data/rl/evaluate/{TASK}/summary.json"
    summary = read_json(checkout.root / path)
    model = next(m for m in summary["models"] if m["algorithm"] == "cdt" and m["seed"] == 0)
    model["limits"]["5"]["normalised_cost"] = 1.3
    write_json(checkout.root / path, summary)
    checkout.receipt(f"rl-evaluate@{TASK}", f"data/rl/evaluate/{TASK}", [f"data/rl/train/{TASK}"])
    judgement = judge(checkout)
    assert closed(judgement)["cdt seed 0"] == {"bound normalised_cost": "at the limit 5: 1.3, must be ≤ 1"}
    assert judgement.chosen is not None
    assert judgement.chosen.label == "cdt seed 1"


@pytest.mark.fault
def test_an_entry_of_the_evaluation_that_is_none_is_named(checkout: Checkout) -> None:
    path = f"data/rl/evaluate/{TASK}/summary.json"
    summary = read_json(checkout.root / path)
    write_json(checkout.root / path, summary | {"models": [*summary["models"], 5]})
    with pytest.raises(BadInput, match=rf"summary\.json: models\[{len(summary['models'])}\] is no entry"):
        judge(checkout)


def test_models_with_limits_of_their_own_can_be_promoted(checkout: Checkout) -> None:
    path = f"data/rl/evaluate/{TASK}/summary.json"
    summary = read_json(checkout.root / path)
    for model in summary["models"]:
        if model["algorithm"] == "cdt":  # trained for 15 and 30, and evaluated at the others' higher limits too
            found = model["limits"].pop("5")
            model["limits"] |= {"15": found, "30": found}
    for reference in summary["references"]:
        reference["limits"] = {key: {"normalised_return": 0.0} for key in ("5", "15", "20", "30", "100")}
    write_json(checkout.root / path, summary)
    checkout.receipt(f"rl-evaluate@{TASK}", f"data/rl/evaluate/{TASK}", [f"data/rl/train/{TASK}"])
    rules = yaml.safe_load((checkout.root / gates.RULES).read_text())
    rules["families"]["rl"] |= {"limit": "lowest"}
    rules["families"]["rl"]["bounds"].append({"metric": "normalised_return", "not_below": "random", "at": "each"})
    (checkout.root / gates.RULES).write_text(yaml.safe_dump(rules))
    judgement = judge(checkout)
    assert judgement.chosen is not None
    assert judgement.chosen.label == "cdt seed 0"
    rules, item = gates.rules_for(gates.read_rules(checkout.root), NAME)
    assert read_evidence(checkout.root, checkout.home, NAME, rules.sources(item)).cost_limit == 20  # 5, 15, 30: not all


def test_noise_is_the_standard_error_of_the_difference() -> None:
    # By hand: sd 0.2 over 16 episodes is 0.05; a share of 0.5 of 100 problems has 0.05 as well.
    assert gates.standard_error({"r": 0.5, "r_std": 0.2, "episodes": 16}, "r") == pytest.approx(0.05)
    assert gates.standard_error({"worst_case": 0.5, "problems": 100}, "worst_case") == pytest.approx(0.05)
    assert gates.standard_error({"r": 0.5}, "r") == 0.0


def test_a_champion_that_is_better_by_noise_only_gives_way(checkout: Checkout) -> None:
    path = f"data/rl/evaluate/{TASK}/summary.json"
    summary = read_json(checkout.root / path)
    for model in summary["models"]:
        # standard errors .05 and 0.05: 1.64 times their hypotenuse is .116
        model["limits"]["20"] |= {"normalised_return_std": 0.2, "episodes": 16}
    write_json(checkout.root / path, summary)
    checkout.receipt(f"rl-evaluate@{TASK}", f"data/rl/evaluate/{TASK}", [f"data/rl/train/{TASK}"])
    promoted(checkout, "f" * 64, 0.73, normalised_return_std=0.2, episodes=16)
    assert "0.12 may be noise" in closed(judge(checkout))["cdt seed 0"]["champion"]
    promoted(checkout, "f" * 64, 0.71, normalised_return_std=0.2, episodes=16)
    chosen = judge(checkout).chosen
    assert chosen is not None
    assert chosen.label == "cdt seed 0"


def promoted(checkout: Checkout, digest: str, value: float, **more: float) -> None:
    figures = {"normalised_return": value, **more}
    body = {"action": "champion", "model": NAME, "version": "1", "digest": digest, "figures": figures}
    for key in ("data", "verdict", "evaluation", "gates"):
        body[f"{key}_digest"] = "0" * 64
    body |= {"receipt": "0" * 64, "provenance": "0" * 64, "summary": "0" * 64}
    Ledger(checkout.home).append("promotion", body, Keys.of(checkout.root, checkout.home))


def test_a_clearly_better_champion_stays(checkout: Checkout) -> None:
    promoted(checkout, "f" * 64, 0.66)
    judgement = judge(checkout)
    assert judgement.chosen is None
    assert closed(judgement)["cdt seed 0"] == {
        "champion": "normalised_return 0.6 against 0.66 of version 1, 0.05 may be noise"
    }
    promoted(checkout, "f" * 64, 0.64)  # within the margin
    chosen = judge(checkout).chosen
    assert chosen is not None
    assert chosen.label == "cdt seed 0"


def test_a_champion_in_the_evaluation_counts_with_its_figures_there(checkout: Checkout) -> None:
    other = next(c for c, _ in judge(checkout).results if c.label == "bc-safe seed 0")
    promoted(checkout, other.digest, 9.0)  # what it once reached elsewhere does not matter
    chosen = judge(checkout).chosen
    assert chosen is not None
    assert chosen.label == "cdt seed 0"


def test_a_champion_that_breaks_a_bound_holds_nobody_back(checkout: Checkout) -> None:
    """Rules that got stricter, or a new evaluation: an unsafe champion is no measure for safe ones."""
    best = next(c for c, _ in judge(checkout).results if c.label == "cdt seed 0")
    promoted(checkout, best.digest, 0.6)
    checkout.evaluate(cdt=1.2)
    judgement = judge(checkout)
    assert judgement.chosen is not None
    assert judgement.chosen.label == "bc-safe seed 1"  # 0.45 against 0.6
    reasons = next(gates for c, gates in judgement.results if c.label == "bc-safe seed 1")
    assert any("it breaks the bound normalised_cost" in gate.reason for gate in reasons)


@pytest.mark.fault
def test_evidence_that_no_execution_wrote_closes_the_gate(checkout: Checkout) -> None:
    """Whoever can write files can write a receipt that fits them; only the harness enters it in the ledger."""
    path = f"data/rl/evaluate/{TASK}/summary.json"
    summary = read_json(checkout.root / path)
    for model in summary["models"]:
        model["limits"]["20"]["normalised_return"] += 0.3
    write_json(checkout.root / path, summary)
    receipt = checkout.root / f"data/receipts/rl-evaluate@{TASK}.json"
    facts = read_json(receipt)
    facts["outputs"] = {f"data/rl/evaluate/{TASK}": describe(checkout.root / f"data/rl/evaluate/{TASK}")}
    write_json(receipt, facts)
    judgement = judge(checkout)
    assert judgement.chosen is None
    reasons = closed(judgement)["cdt seed 0"]["receipts"]
    assert reasons == f"the ledger has no execution that wrote the receipt of rl-evaluate@{TASK}"


def test_missing_figures_and_references_close_the_gate(checkout: Checkout) -> None:
    rules = yaml.safe_load((checkout.root / gates.RULES).read_text())
    rules["families"]["rl"]["bounds"] = [
        {"metric": "applause", "at_least": 1},
        {"metric": "normalised_return", "not_below": "oracle"},
    ]
    (checkout.root / gates.RULES).write_text(yaml.safe_dump(rules))
    reasons = closed(judge(checkout))["cdt seed 0"]
    assert "no figure applause" in reasons["bound applause"]
    assert "reference oracle" in reasons["bound normalised_return"]


def test_without_verdict_or_evaluation(checkout: Checkout) -> None:
    (checkout.root / f"data/rl/validate/{TASK}/verdict.json").unlink()
    assert "no verdict" in closed(judge(checkout))["cdt seed 0"]["verdict"]
    (checkout.root / f"data/rl/evaluate/{TASK}/summary.json").unlink()
    with pytest.raises(BadInput, match=r"summary\.json: no such file"):
        judge(checkout)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"limits": "middle"}, r"families\.rl: unknown key limits"),
        ({"margin": None}, r"families\.rl\.margin: must be a finite number of 0 or more, found None"),
        ({"margin": float("inf")}, r"families\.rl\.margin: must be a finite number of 0 or more, found inf"),
        ({"noise": float("nan")}, r"families\.rl\.noise: must be a finite number of 0 or more, found nan"),
        ({"noise": True}, r"families\.rl\.noise: must be a finite number"),
        ({"limit": "upper"}, r"families\.rl\.limit"),
        ({"bounds": [{"metric": "x", "minimum": 1}]}, r"bounds\[0\]: unknown key minimum"),
        ({"bounds": [{"metric": "x"}]}, r"bounds\[0\]: bounds nothing"),
        ({"bounds": [{"metric": "x", "at_most": "low"}]}, r"bounds\[0\]: at_most must be a finite number"),
        ({"bounds": [{"metric": "x", "at_most": float("inf")}]}, r"at_most must be a finite number, found inf"),
        ({"bounds": [{"metric": "x", "at_least": float("-inf")}]}, r"at_least must be a finite number, found -inf"),
        (
            {"bounds": [{"metric": "x", "not_below": "sft", "by": float("nan")}]},
            r"by must be a finite number, found nan",
        ),
        ({"bounds": [{"metric": "x", "at_most": 10**400}]}, r"at_most must be a finite number"),
        ({"bounds": [{"metric": 3, "at_most": 1}]}, r"bounds\[0\]: metric must be a name, found 3"),
        ({"methods": "cdt"}, r"families\.rl\.methods"),
        ({"name": "policy"}, r"families\.rl\.name"),
        ({"worst_severity": "mild"}, r"worst_severity"),
    ],
)
def test_a_mistake_in_the_rules_is_named(tmp_path: Path, change: dict[str, object], message: str) -> None:
    content = yaml.safe_load((REPOSITORY / gates.RULES).read_text())
    content["families"]["rl"] |= change
    (tmp_path / "mlflow").mkdir()
    (tmp_path / gates.RULES).write_text(yaml.safe_dump(content))
    with pytest.raises(BadInput, match=message):
        gates.read_rules(tmp_path)


@pytest.mark.fault
@pytest.mark.parametrize(
    ("old", "new", "key"),
    [
        ("    choose: normalised_return\n", "    bounds:\n      - {metric: x, at_least: 0}\n    choose: a\n", "bounds"),
        ("at_most: 1.0, at: each}", "at_most: 1.0, at: each, at_most: 9.0}", "at_most"),
        ("  llm:\n", "  rl:\n", "rl"),
    ],
)
def test_a_key_given_twice_drops_no_gate(tmp_path: Path, old: str, new: str, key: str) -> None:
    content = (REPOSITORY / gates.RULES).read_text()
    assert old in content
    (tmp_path / "mlflow").mkdir()
    (tmp_path / gates.RULES).write_text(content.replace(old, new, 1))
    message = rf"mlflow/gates\.yaml: not valid YAML: line \d+ gives the key '{key}' again, first on line \d+; keep one"
    with pytest.raises(BadInput, match=message):
        gates.read_rules(tmp_path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1\nb: 2\na: 3\n", "line 3 gives the key 'a' again, first on line 1"),
        ("a:\n  - {b: 1, 'b': 2}\n", "line 2 gives the key 'b' again, first on line 2"),
        ("on: 1\nyes: 2\n", "line 2 gives the key 'yes' again"),  # both are true
        ("a: &x {k: 1}\nb: &y {k: 2}\nc:\n  <<: *x\n  <<: *y\n", "line 5 gives the key '<<' again"),
        ("base: &x {k: 1, k: 2}\nc: {<<: *x}\n", "line 1 gives the key 'k' again"),
        ("1: a\n0x1: b\n", "line 2 gives the key '0x1' again"),
    ],
)
def test_parameters_refuse_a_key_given_twice(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "params.yaml").write_text(text)
    with pytest.raises(BadInput, match=rf"params\.yaml: not valid YAML: {message}"):
        read_params(tmp_path / "params.yaml")


def test_merge_keys_and_equal_keys_of_different_mappings_are_read(tmp_path: Path) -> None:
    text = "x: &x {k: 1, m: 1}\ny: &y\n  <<: *x\n  k: 2\nz:\n  <<: [*y, *x]\n  m: 3\n=: 4\nl: [{k: 1}, {k: 2}, *x]\n"
    (tmp_path / "params.yaml").write_text(text)
    x = {"k": 1, "m": 1}
    wanted = {"x": x, "y": {"k": 2, "m": 1}, "z": {"k": 2, "m": 3}, "=": 4, "l": [{"k": 1}, {"k": 2}, x]}
    assert read_params(tmp_path / "params.yaml") == wanted
    with pytest.raises(BadInput, match=r"'a=.*line 1 gives the key 'b' again"):
        with_overrides({}, ["a={b: 1, b: 2}"])


# -- which candidate ------------------------------------------------------------------------------


def test_a_model_is_named_by_digits_of_its_digest(checkout: Checkout) -> None:
    digest = next(c.digest for c, _ in judge(checkout).results if c.label == "bc-safe seed 1")
    for text in (digest[:8], digest[:12].upper(), digest):
        judgement = judge(checkout, model=text)
        assert judgement.chosen is not None
        assert [c.digest for c, _ in judgement.results] == [judgement.chosen.digest] == [digest]


@pytest.mark.fault
@pytest.mark.parametrize("text", ["", "3", "3f0c9b6", "bc-safe seed 0", " 3f0c9b62", "3f0c9b62\n"])
def test_what_names_no_model_is_refused(checkout: Checkout, text: str) -> None:
    with pytest.raises(BadInput, match="not a model's digest; give at least 8 of its hexadecimal digits"):
        judge(checkout, model=text)


@pytest.mark.fault
def test_digits_that_several_digests_begin_with_are_refused(checkout: Checkout) -> None:
    rules, item = gates.rules_for(gates.read_rules(checkout.root), NAME)
    evidence = read_evidence(checkout.root, checkout.home, NAME, rules.sources(item))
    alike = [replace(c, digest=f"3f0c9b62{number}" + "0" * 55) for number, c in enumerate(evidence.candidates)]
    with pytest.raises(BadInput, match=r"3f0c9b62: the digests of 4 candidates begin like this; .*3f0c9b620000 \("):
        gates.judge(NAME, rules, replace(evidence, candidates=alike), "3f0c9b62")
    chosen = gates.judge(NAME, rules, replace(evidence, candidates=alike), "3f0c9b621").results
    assert [c.digest for c, _ in chosen] == [alike[1].digest]


def test_the_champion_is_no_challenger_of_itself(checkout: Checkout) -> None:
    best = judge(checkout).chosen
    assert best is not None
    promoted(checkout, best.digest, 0.6)
    with pytest.raises(BadInput, match="is the champion itself"):
        judge(checkout, model=best.digest, challenger=True)


@pytest.mark.parametrize("challenger", [False, True])
def test_without_the_figure_to_choose_by_nobody_is_chosen(checkout: Checkout, challenger: bool) -> None:
    rules = checkout.root / gates.RULES
    rules.write_text(rules.read_text().replace("choose: normalised_return", "choose: normalised_retrun"))
    judgement = judge(checkout, challenger=challenger)
    assert judgement.chosen is None
    reason = "the evaluation has no figure normalised_retrun to choose by"
    assert closed(judgement)["cdt seed 0"] == {"choose": reason}


def test_the_project_s_own_rules_and_names() -> None:
    rules = gates.read_rules(REPOSITORY)
    assert gates.rules_for(rules, "policy-CarRun")[1] == "CarRun"
    assert gates.rules_for(rules, "mend-small-llama") == (rules["llm"], "small-llama")
    for family in ("bash", "rac"):  # off until a student is named
        with pytest.raises(BadInput, match=f"{family}-small-llama: no gates"):
            gates.rules_for(rules, f"{family}-small-llama")
        on = {**rules, family: replace(rules[family], items=("small-llama",))}
        assert gates.rules_for(on, f"{family}-small-llama") == (on[family], "small-llama")
    with pytest.raises(BadInput, match="nothing-here: no gates"):
        gates.rules_for(rules, "nothing-here")


def test_nothing_in_the_mlflow_folder_can_shadow_the_package() -> None:
    assert [path.name for path in (REPOSITORY / "mlflow").rglob("*.py")] == []
