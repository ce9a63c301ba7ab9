"""Promotion into a real MLflow registry, and what is read back from it."""

import contextlib
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from springhead import registry, signing, tracking, versions
from springhead.errors import BadInput, Finding
from springhead.jsonio import read_json, write_json
from springhead.keys import Keys
from springhead.lineage.audit import audit
from springhead.lineage.digests import tree_digest
from springhead.lineage.ledger import Ledger
from springhead.spool import Spool
from tests import promotable
from tests.promotable import NAME, TASK, Checkout, with_store


@pytest.fixture(autouse=True)
def _no_server(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return with_store(tmp_path_factory)


@pytest.fixture
def checkout(template: Path, tmp_path: Path) -> Checkout:
    shutil.copytree(template, tmp_path / "checkout")
    return Checkout(tmp_path / "checkout")


def promote(checkout: Checkout, **more: Any) -> registry.PromotionResult:
    return registry.promote(NAME, checkout.root, checkout.home, **more)


def promotions(checkout: Checkout) -> list[dict[str, Any]]:
    return [e["body"] for e in Ledger(checkout.home).entries() if e["kind"] == "promotion"]


def model_of(checkout: Checkout, algorithm: str = "cdt", seed: int = 0) -> Path:
    return checkout.root / f"data/rl/train/{TASK}/{algorithm}/{seed}/model"


def test_a_promotion_binds_alias_version_digests_signature_and_ledger(checkout: Checkout, tmp_path: Path) -> None:
    digest = tree_digest(model_of(checkout))
    head = Ledger(checkout.home).head()
    result = promote(checkout)
    assert result.changed
    assert (result.version, result.digest, result.label) == ("1", digest, "cdt seed 0")
    assert str(result) == f"version 1 is the champion (cdt seed 0, {digest[:12]})"
    (body,) = promotions(checkout)
    assert body["digest"] == digest
    assert body["data_digest"] == tree_digest(checkout.root / f"data/rl/filter/{TASK}")
    assert body["figures"]["normalised_return"] == 0.6
    assert body["previous"] is None
    (champion,) = registry.champions(checkout.home)
    assert (champion.name, champion.version, champion.digest, champion.aliases) == (NAME, "1", digest, ("champion",))
    assert champion.tags["ledger.head"] == head
    assert champion.tags["git.revision"] == "c0ffee"
    assert champion.tags["data.sha256"] == body["data_digest"]
    assert champion.stage == f"rl-train@{TASK}-cdt-0"
    assert champion.path == model_of(checkout).relative_to(checkout.root).as_posix()
    statement = signing.verify(model_of(checkout), checkout.home, Keys.of(checkout.root, checkout.home))
    sources = {d["name"]: d["digest"] for d in statement["predicate"]["buildDefinition"]["resolvedDependencies"]}
    assert sources[f"data/rl/filter/{TASK}"] == {"sha256": body["data_digest"]}
    assert Ledger(checkout.home).verify() == []
    folder = registry.download(checkout.root, checkout.home, f"models:/{NAME}@champion", tmp_path / "got")
    assert tree_digest(folder) == digest
    assert not [path for path in tmp_path.rglob("*") if path.suffix in (".pkl", ".pickle", ".pt")]


def test_promoting_the_same_again_changes_nothing(checkout: Checkout) -> None:
    promote(checkout)
    entries = Ledger(checkout.home).entries()
    again = promote(checkout)
    assert not again.changed
    assert "already the champion" in str(again)
    assert Ledger(checkout.home).entries() == entries
    assert len(registry.versions_of(checkout.home, NAME)) == 1


def test_a_better_model_replaces_the_champion_which_becomes_previous(checkout: Checkout) -> None:
    promote(checkout)
    first = tree_digest(model_of(checkout))
    checkout.train(offset=50)
    checkout.evaluate(bonus=0.1)
    result = promote(checkout)
    assert result.version == "2"
    one, two = registry.versions_of(checkout.home, NAME)
    assert (one.aliases, two.aliases) == (("previous",), ("champion",))
    assert promotions(checkout)[-1]["previous"] == {"version": "1", "digest": first}
    assert registry.resolve(checkout.home, f"{NAME}@previous").digest == first


def test_a_worse_model_is_refused_and_nothing_moves(checkout: Checkout) -> None:
    promote(checkout)
    checkout.train(offset=50)
    checkout.evaluate(bonus=-0.2)
    with pytest.raises(Finding, match=r"normalised_return 0\.4 against 0\.6 of version 1") as refusal:
        promote(checkout)
    assert str(refusal.value).count("champion:") == 4  # one reason for each candidate
    assert registry.champions(checkout.home)[0].version == "1"
    assert len(promotions(checkout)) == 1


@pytest.mark.fault
def test_a_red_verdict_or_a_changed_model_registers_nothing(checkout: Checkout) -> None:
    checkout.validate(success=False, severity="critical")
    with pytest.raises(Finding, match="the verdict is red"):
        promote(checkout)
    assert registry.champions(checkout.home) == []
    assert promotions(checkout) == []
    assert not (checkout.home / "signatures").exists()


def test_a_dry_run_only_judges(checkout: Checkout) -> None:
    result = promote(checkout, dry_run=True)
    assert "would become the champion" in str(result)
    assert promotions(checkout) == []
    assert registry.champions(checkout.home) == []
    promote(checkout)
    assert "would stay the champion" in str(promote(checkout, dry_run=True))


@pytest.mark.fault
def test_an_alias_set_by_hand_is_visible_and_put_back(checkout: Checkout) -> None:
    """F15: the registry takes any alias; the ledger tells which one is ours."""
    promote(checkout)
    checkout.train(offset=50)
    checkout.evaluate(bonus=0.1)
    promote(checkout)
    tracking.connect(checkout.home).set_registered_model_alias(NAME, "champion", "1")
    (champion,) = registry.champions(checkout.home)
    assert champion.version != promotions(checkout)[-1]["version"]
    result = promote(checkout)
    assert "the alias is back on version 2, it was on version 1" in str(result)
    assert registry.champions(checkout.home)[0].version == "2"
    assert len(promotions(checkout)) == 2


@pytest.mark.fault
def test_bytes_swapped_in_the_store_are_noticed(checkout: Checkout, tmp_path: Path) -> None:
    """F13: MLflow says READY; the digest says no."""
    promote(checkout)
    stored = min((checkout.home / "mlartifacts").rglob("*.safetensors"))
    stored.write_bytes(stored.read_bytes()[:-1] + b"\x01")
    with pytest.raises(Finding, match="differs from what was signed"):
        registry.download(checkout.root, checkout.home, f"{NAME}@champion", tmp_path / "got")
    result = promote(checkout)  # the model in the checkout is whole, so it is registered again
    assert result.version == "2"
    with pytest.raises(BadInput, match="not an empty folder"):
        registry.download(checkout.root, checkout.home, f"{NAME}@champion", tmp_path / "got")
    assert registry.download(checkout.root, checkout.home, f"{NAME}@champion", tmp_path / "again").is_dir()


@pytest.mark.fault
@pytest.mark.parametrize(
    "call", ["create_model_version", "set_registered_model_alias", "finalize_logged_model", "log_model_artifacts"]
)
def test_a_promotion_that_dies_anywhere_is_completed_by_the_next(
    checkout: Checkout, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    from mlflow import MlflowClient

    original = getattr(MlflowClient, call)

    def dies(self: MlflowClient, *args: Any, **kwargs: Any) -> Any:
        original(self, *args, **kwargs)
        raise KeyboardInterrupt

    monkeypatch.setattr(MlflowClient, call, dies)
    with pytest.raises(KeyboardInterrupt):
        promote(checkout)
    monkeypatch.setattr(MlflowClient, call, original)
    promote(checkout)
    (champion,) = registry.champions(checkout.home)
    assert champion.version == promotions(checkout)[-1]["version"]
    assert len(promotions(checkout)) == 1
    # A version that was registered but not entered stays behind, marked, and is not used again.
    known = registry.versions_of(checkout.home, NAME)
    assert [v.version for v in known if v.tags["gate.verdict"] == "passed"] == [champion.version]
    assert not audit(checkout.root).red


def test_references_in_every_form(checkout: Checkout) -> None:
    with pytest.raises(BadInput, match="no registered model"):
        registry.resolve(checkout.home, f"models:/{NAME}@champion")
    digest = promote(checkout).digest
    forms = (f"models:/{NAME}@champion", f"{NAME}@champion", f"models:/{NAME}/1", f"{NAME}/1", digest, digest[:8])
    assert {registry.resolve(checkout.home, ref).digest for ref in forms} == {digest}
    for ref, message in {
        f"{NAME}@hero": "no alias hero; it has champion",
        f"{NAME}/9": "no version 9",
        "policy-Other@champion": f"there are {NAME}",
        "f" * 64: "no registered model has this digest",
        "what/ever/it": "not a reference",
    }.items():
        with pytest.raises(BadInput, match=message):
            registry.resolve(checkout.home, ref)


def test_names_that_can_be_promoted(checkout: Checkout) -> None:
    assert registry.promotable(checkout.root) == [NAME]
    rules = checkout.root / "mlflow/gates.yaml"
    rules.write_text(rules.read_text().replace("items: all  # or a list of tasks", "items: [CarRun]"))
    assert registry.promotable(checkout.root) == []
    with pytest.raises(BadInput, match="no gates"):
        promote(checkout)


def test_the_version_points_at_the_run_that_made_the_model(checkout: Checkout) -> None:
    recorder = Spool(checkout.home, "x-train")
    stage = f"rl-train@{TASK}-cdt-0"
    recorder.event("start", stage=stage, attempt=1, params={}, tags={}, time=1000.0)
    path = model_of(checkout).relative_to(checkout.root).as_posix()
    recorder.event("model", path=path, sha256=tree_digest(model_of(checkout)), kind="policy", facts={})
    recorder.event("end", status="FINISHED", seconds=1.0, time=1001.0)
    recorder.close()
    promote(checkout)
    (champion,) = registry.champions(checkout.home)
    assert champion.run is not None
    run = tracking.connect(checkout.home).get_run(champion.run)
    assert run.data.tags[tracking.EXECUTION] == "x-train"


@pytest.mark.fault
def test_without_mlflow_the_message_says_so(checkout: Checkout, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    with pytest.raises(BadInput, match=r"MLflow at http://127\.0\.0\.1:9 cannot be reached"):
        promote(checkout)
    assert promotions(checkout) == []


@pytest.mark.fault
def test_a_tag_cannot_lead_out_of_the_model(checkout: Checkout, tmp_path: Path) -> None:
    """F24: whoever may write tags must not make us read elsewhere."""
    promote(checkout)
    client = tracking.connect(checkout.home)
    client.set_model_version_tag(NAME, "1", versions.WITHIN, "../../../../..")
    with pytest.raises(BadInput, match="leads out of the model"):
        registry.download(checkout.root, checkout.home, f"{NAME}@champion", tmp_path / "got")


def test_the_served_form_answers_like_the_policy(checkout: Checkout) -> None:
    import mlflow
    import pandas as pd

    from springhead.rl.policy import load_policy, predict

    promote(checkout)
    tracking.connect(checkout.home)
    served = mlflow.pyfunc.load_model(f"models:/{NAME}@champion")
    policy = load_policy(model_of(checkout))
    observations = np.random.default_rng(0).standard_normal((3, policy.observation_dim), dtype=np.float32)
    for limit in (10.0, 40.0):
        expected = predict(policy, observations, limit)
        np.testing.assert_array_equal(served.predict(observations, params={"cost_limit": limit}), expected)
        frame = pd.DataFrame(observations)
        np.testing.assert_array_equal(served.predict(frame, params={"cost_limit": limit}), expected)
    np.testing.assert_array_equal(served.predict(observations), predict(policy, observations, 20.0))


def test_a_policy_that_knows_no_limits_is_served_without_one(tmp_path: Path) -> None:
    import mlflow

    from springhead import packaging
    from springhead.rl.policy import load_policy, predict

    promotable.policy(tmp_path / "model", 0)
    knows = packaging.prepare(tmp_path / "model", tmp_path / "knows", 20.0)
    signature = mlflow.models.get_model_info(str(knows)).signature
    assert [each.name for each in signature.params.params] == ["cost_limit"]
    config = read_json(tmp_path / "model/config.json")
    shutil.copytree(tmp_path / "model", tmp_path / "bc-all")
    write_json(tmp_path / "bc-all/config.json", {**config, "algorithm": "bc-all", "limits": []})
    shutil.copy(tmp_path / "model/limit-10.safetensors", tmp_path / "bc-all/policy.safetensors")
    made = packaging.prepare(tmp_path / "bc-all", tmp_path / "served", 20.0)
    assert mlflow.models.get_model_info(str(made)).signature.params is None
    rows = np.ones((2, config["observation_dim"]), np.float32)
    expected = predict(load_policy(tmp_path / "bc-all"), rows, 0.0)
    np.testing.assert_array_equal(mlflow.pyfunc.load_model(str(made)).predict(rows), expected)


def small_llama(folder: Path, seed: int) -> None:
    """Writes a real, tiny language model."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 1}
    torch.manual_seed(seed)
    LlamaForCausalLM(LlamaConfig(vocab_size=16, max_position_embeddings=16, **sizes)).save_pretrained(folder)


def test_a_language_model_loads_from_what_mlflow_gives_back(checkout: Checkout, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    root = checkout.root
    rules = root / "mlflow/gates.yaml"
    rules.write_text(rules.read_text().replace("items: [small-llama]", "items: [tiny]"))
    for step, reads in (("generate", []), ("filter", ["data/llm/generate"])):
        (root / f"data/llm/{step}").mkdir(parents=True)
        (root / f"data/llm/{step}/train.jsonl").write_text(f"{step}\n")
        checkout.receipt(f"llm-{step}", f"data/llm/{step}", reads)
    verdict = {"data_digest": tree_digest(root / "data/llm/filter"), "success": True, "severity": "none"}
    write_json(root / "data/llm/validate/verdict.json", {**verdict, "suite": "llm", "expectations": []})
    checkout.receipt("llm-validate", "data/llm/validate", ["data/llm/filter"])
    models = []
    small_llama(root / "data/llm/students/tiny", 0)
    checkout.receipt("llm-students@tiny", "data/llm/students/tiny", [], ["data/llm/students/tiny"])
    for seed, (method, value) in enumerate([("sft", 0.5), ("mend", 0.7), ("mend", 0.6)]):
        out = f"data/llm/finetune/tiny/{method}/{seed}"
        small_llama(root / out / "model", seed + 1)
        reads = ["data/llm/filter", "data/llm/students/tiny"]
        checkout.receipt(f"llm-finetune@tiny-{method}-{seed}", out, reads, [f"{out}/model"])
        entry = {"method": method, "seed": seed, "path": f"{out}/model", "digest": tree_digest(root / out / "model")}
        models.append(entry | {"metrics": {"worst_case": value, "worst_case_interval": [0.1, 0.9]}})
    base = {"method": "base", "seed": -1, "path": "data/llm/students/tiny"}
    base |= {"digest": tree_digest(root / "data/llm/students/tiny"), "metrics": {"worst_case": 0.0}}
    write_json(root / "data/llm/evaluate/tiny/summary.json", {"models": [base, *models]})
    reads = ["data/llm/filter", "data/llm/students/tiny", "data/llm/finetune/tiny"]
    checkout.receipt("llm-evaluate@tiny", "data/llm/evaluate/tiny", reads)

    result = registry.promote("mend-tiny", root, checkout.home)
    assert (result.label, len(result.judgement.results)) == ("mend seed 1", 2)
    folder = registry.download(checkout.root, checkout.home, "models:/mend-tiny@champion", tmp_path / "got")
    assert tree_digest(folder) == result.digest
    assert AutoModelForCausalLM.from_pretrained(folder).config.vocab_size == 16


# -- challenger, rollback, attestations -----------------------------------------------------------


def better(checkout: Checkout) -> registry.PromotionResult:
    """Promotes a second champion over the first."""
    checkout.train(offset=50)
    checkout.evaluate(bonus=0.1)
    return promote(checkout)


def test_a_challenger_stands_beside_the_champion_and_may_win(checkout: Checkout) -> None:
    promote(checkout)
    result = promote(checkout, challenger=True)
    assert (result.version, result.label) == ("2", "cdt seed 1")
    assert registry.resolve(checkout.home, f"{NAME}@challenger").version == "2"
    assert registry.champions(checkout.home)[0].version == "1"
    assert not promote(checkout, challenger=True).changed
    assert "already the champion" in str(promote(checkout))  # a challenger moves no champion
    chosen = promote(checkout, model=result.digest[:10])
    assert (chosen.version, chosen.label) == ("2", "cdt seed 1")
    one, two = registry.versions_of(checkout.home, NAME)
    assert (one.aliases, two.aliases) == (("previous",), ("champion",))


def test_a_digest_of_no_candidate_names_those_there_are(checkout: Checkout) -> None:
    with pytest.raises(BadInput, match=r"no such candidate; it has .*cdt seed 0"):
        promote(checkout, model="0123456789")
    for text in ("", "0", "cdt seed 0"):
        with pytest.raises(BadInput, match="give at least 8 of its hexadecimal digits"):
            promote(checkout, model=text, dry_run=True)


def test_a_rollback_puts_the_earlier_champion_back_and_says_so(checkout: Checkout) -> None:
    with pytest.raises(BadInput, match="nothing was promoted yet"):
        registry.rollback(NAME, checkout.root, checkout.home)
    promote(checkout)
    with pytest.raises(Finding, match="earlier champions: none"):
        registry.rollback(NAME, checkout.root, checkout.home)
    better(checkout)
    with pytest.raises(Finding, match=r"version 9 was never champion; earlier champions: 1"):
        registry.rollback(NAME, checkout.root, checkout.home, to="9")
    result = registry.rollback(NAME, checkout.root, checkout.home, reason="it drifts")
    assert str(result).startswith("version 1 is the champion again, instead of version 2")
    assert registry.resolve(checkout.home, f"{NAME}@champion").version == "1"
    assert registry.resolve(checkout.home, f"{NAME}@previous").version == "2"
    body = promotions(checkout)[-1]
    assert (body["action"], body["reason"], body["previous"]["version"]) == ("rollback", "it drifts", "2")
    with pytest.raises(Finding, match=r"no champion is left to go back to; earlier champions: 2 \(rolled back from\)"):
        registry.rollback(NAME, checkout.root, checkout.home)  # the withdrawn model comes back only by name
    with pytest.raises(Finding, match="version 1 is the champion already; earlier champions: 2"):
        registry.rollback(NAME, checkout.root, checkout.home, to="1")
    assert len(promotions(checkout)) == 3
    assert registry.rollback(NAME, checkout.root, checkout.home, to="2").version == "2"
    assert registry.rollback(NAME, checkout.root, checkout.home, to="1").version == "1"
    assert not audit(checkout.root).red


def three(checkout: Checkout) -> list[str]:
    """Promotes three models, each better than the one before, and returns their digests."""
    models = [model_of(checkout, *which) for which in (("bc-safe", 0), ("bc-safe", 1), ("cdt", 0))]
    digests = [tree_digest(model) for model in models]
    assert [promote(checkout, model=digest).version for digest in digests] == ["1", "2", "3"]
    return digests


def test_a_second_rollback_goes_further_back(checkout: Checkout) -> None:
    three(checkout)
    assert registry.rollback(NAME, checkout.root, checkout.home).version == "2"
    assert registry.rollback(NAME, checkout.root, checkout.home).version == "1"
    with pytest.raises(
        Finding, match=r"earlier champions: 2 \(rolled back from\), 3 \(rolled back from\); `--to VERSION`"
    ):
        registry.rollback(NAME, checkout.root, checkout.home)
    assert registry.resolve(checkout.home, f"{NAME}@champion").version == "1"
    assert not audit(checkout.root).red


def test_a_rollback_never_leads_to_another_version_of_the_same_model(checkout: Checkout) -> None:
    promote(checkout)
    stored = min((checkout.home / "mlartifacts").rglob("*.safetensors"))
    whole = stored.read_bytes()
    stored.write_bytes(whole[:-1] + b"\x01")
    assert promote(checkout).version == "2"  # the same model again
    stored.write_bytes(whole)
    with pytest.raises(Finding, match="no champion is left to go back to; earlier champions: 1"):
        registry.rollback(NAME, checkout.root, checkout.home)


@pytest.mark.fault
@pytest.mark.parametrize("died_at", ["previous", "champion"])
@pytest.mark.parametrize("to", [None, "2"])
def test_a_rollback_that_died_before_the_alias_is_completed(
    checkout: Checkout, monkeypatch: pytest.MonkeyPatch, died_at: str, to: str | None
) -> None:
    from mlflow import MlflowClient

    three(checkout)
    original = MlflowClient.set_registered_model_alias

    def dies(self: MlflowClient, name: str, alias: str, version: str) -> None:
        if alias == died_at:
            raise KeyboardInterrupt
        original(self, name, alias, version)

    with monkeypatch.context() as patch:
        patch.setattr(MlflowClient, "set_registered_model_alias", dies)
        with pytest.raises(KeyboardInterrupt):
            registry.rollback(NAME, checkout.root, checkout.home, reason="it drifts")
    assert registry.resolve(checkout.home, f"{NAME}@champion").version == "3"
    result = registry.rollback(NAME, checkout.root, checkout.home, to=to)
    assert str(result).startswith("version 2 is the champion again, instead of version 3, as the last rollback entered")
    assert registry.resolve(checkout.home, f"{NAME}@champion").version == "2"
    assert registry.resolve(checkout.home, f"{NAME}@previous").version == "3"
    assert [(b["action"], b["version"]) for b in promotions(checkout)[2:]] == [("champion", "3"), ("rollback", "2")]
    assert result.entry["reason"] == "it drifts"
    assert not audit(checkout.root).red


@pytest.mark.fault
def test_a_rollback_that_nobody_signed_is_not_completed(checkout: Checkout) -> None:
    digests = three(checkout)
    forged = promotions(checkout)[0] | {"action": "rollback", "promoted_as": "champion"}
    previous = {"version": "3", "digest": digests[2]}
    Ledger(checkout.home).append("promotion", forged | {"previous": previous})
    with pytest.raises(Finding, match="the ledger has a promotion that nobody signed"):
        registry.rollback(NAME, checkout.root, checkout.home)
    assert registry.resolve(checkout.home, f"{NAME}@champion").version == "3"


# -- two at the same time -------------------------------------------------------------------------


def before_the_lock(monkeypatch: pytest.MonkeyPatch, other: Callable[[], object]) -> None:
    """Has another process do its work just before this one gets the lock."""
    original = registry._only_one

    @contextlib.contextmanager
    def waits(home: Path) -> Iterator[None]:
        monkeypatch.setattr(registry, "_only_one", original)
        other()
        with original(home):
            yield

    monkeypatch.setattr(registry, "_only_one", waits)


@pytest.mark.fault
def test_a_promotion_is_judged_against_the_champion_of_that_moment(
    checkout: Checkout, monkeypatch: pytest.MonkeyPatch
) -> None:
    best, worse = (tree_digest(model_of(checkout, algorithm)) for algorithm in ("cdt", "bc-safe"))
    before_the_lock(monkeypatch, lambda: promote(checkout, model=best))
    with pytest.raises(Finding, match=r"normalised_return 0\.4 against 0\.6 of version 1"):
        promote(checkout, model=worse)
    assert [body["digest"] for body in promotions(checkout)] == [best]
    assert registry.champions(checkout.home)[0].digest == best


@pytest.mark.fault
def test_a_rollback_starts_from_the_champion_of_that_moment(
    checkout: Checkout, monkeypatch: pytest.MonkeyPatch
) -> None:
    three(checkout)
    before_the_lock(monkeypatch, lambda: registry.rollback(NAME, checkout.root, checkout.home))
    result = registry.rollback(NAME, checkout.root, checkout.home)
    assert str(result).startswith("version 1 is the champion again, instead of version 2")
    assert [body["previous"]["version"] for body in promotions(checkout)[3:]] == ["3", "2"]
    assert registry.resolve(checkout.home, f"{NAME}@champion").version == "1"


@pytest.mark.fault
def test_a_rollback_to_swapped_bytes_or_lost_statements_is_refused(checkout: Checkout) -> None:
    promote(checkout)
    better(checkout)
    first = promotions(checkout)[0]
    stored = versions.local(tracking.connect(checkout.home), registry.versions_of(checkout.home, NAME)[0])
    assert stored is not None
    weights = next(stored.rglob("*.safetensors"))
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(Finding, match="no longer holds the bytes"):
        registry.rollback(NAME, checkout.root, checkout.home)
    weights.write_bytes(whole)
    shutil.rmtree(checkout.home / "signatures" / first["digest"])
    with pytest.raises(Finding, match="signed provenance is missing"):
        registry.rollback(NAME, checkout.root, checkout.home)
    assert registry.champions(checkout.home)[0].version == "2"


def test_a_promotion_is_stated_in_two_signed_statements(checkout: Checkout) -> None:
    promote(checkout)
    (body,) = promotions(checkout)
    keys = Keys.of(checkout.root, checkout.home)
    found = {s["predicateType"]: s for _, s in signing.statements(checkout.home, keys, body["digest"])}
    assert set(found) == {signing.PROVENANCE, signing.SUMMARY}
    assert all(signing.subject_digest(s) == body["digest"] for s in found.values())
    summary = found[signing.SUMMARY]["predicate"]
    assert summary["resourceUri"] == f"models:/{NAME}/1"
    assert summary["verificationResult"] == "PASSED"
    named = {a["uri"].rpartition(":")[2]: a["digest"]["sha256"] for a in summary["inputAttestations"]}
    assert (named["verdict"], named["data"]) == (body["verdict_digest"], body["data_digest"])
    materials = found[signing.PROVENANCE]["predicate"]["buildDefinition"]["resolvedDependencies"]
    assert materials[0] == {"name": "repository", "digest": {"gitCommit": "c0ffee"}}


@pytest.mark.fault
def test_an_old_signed_model_with_another_verdict_is_found(checkout: Checkout) -> None:
    """F27: neither an entry nor a tag can lend a signed model the verdict of other data."""
    promote(checkout)
    (old,) = promotions(checkout)
    keys = Keys.of(checkout.root, checkout.home)
    forged = dict(old) | {"verdict_digest": "a" * 64, "data_digest": "b" * 64}
    Ledger(checkout.home).append("promotion", forged, keys)
    problems = {p.what for p in audit(checkout.root).problems if p.severity == "red"}
    assert any("states another inputAttestations than the ledger" in what for what in problems)
    assert any("names another data.sha256, verdict.sha256 than its promotion" in what for what in problems)


@pytest.mark.fault
def test_a_version_whose_tags_were_edited_is_found(checkout: Checkout) -> None:
    promote(checkout)
    assert not audit(checkout.root).red
    tracking.connect(checkout.home).set_model_version_tag(NAME, "1", "verdict.sha256", "a" * 64)
    (problem,) = [p for p in audit(checkout.root).problems if p.severity == "red"]
    assert problem.where == f"{NAME}/1"
    assert "verdict.sha256" in problem.what


@pytest.mark.fault
def test_an_old_ledger_with_its_old_head_is_found(checkout: Checkout) -> None:
    """Whoever puts back ledger and head together has a valid pair; the registry remembers a later head."""
    files = ("ledger.jsonl", "ledger.head.json")
    promote(checkout)
    before = {name: (checkout.home / name).read_bytes() for name in files}
    better(checkout)
    for name in files:
        (checkout.home / name).write_bytes(before[name])
    found = {f"{p.where}: {p.what}" for p in audit(checkout.root).problems if p.severity == "red"}
    assert any("the ledger has version 1: it was moved by hand" in what for what in found)


@pytest.mark.fault
def test_a_key_in_a_kms_signs_through_a_program(checkout: Checkout, monkeypatch: pytest.MonkeyPatch) -> None:
    key, public = checkout.home / "hsm.pem", checkout.home / "hsm.pub"
    make = ["openssl", "ecparam", "-name", "prime256v1", "-genkey", "-noout", "-out", str(key)]
    subprocess.run(make, check=True, capture_output=True)
    derive = ["openssl", "ec", "-in", str(key), "-pubout", "-out", str(public)]
    subprocess.run(derive, check=True, capture_output=True)
    shutil.copy(public, checkout.root / "mlflow/trusted-keys/hsm.pem")
    monkeypatch.setenv("SPRINGHEAD_SIGNING_COMMAND", f"openssl dgst -sha256 -sign {key}")
    with pytest.raises(BadInput, match="SPRINGHEAD_SIGNING_PUBLIC_KEY must name"):
        promote(checkout)
    monkeypatch.setenv("SPRINGHEAD_SIGNING_PUBLIC_KEY", str(public))
    assert promote(checkout).changed
    assert not audit(checkout.root).red
    monkeypatch.setenv("SPRINGHEAD_SIGNING_COMMAND", "cat")
    with pytest.raises(BadInput, match="is no ECDSA signature"):
        promote(checkout, challenger=True)
    monkeypatch.setenv("SPRINGHEAD_SIGNING_COMMAND", "false")
    with pytest.raises(BadInput, match="false failed"):
        promote(checkout, challenger=True)


@pytest.mark.fault
def test_serving_code_swapped_in_the_store_is_never_promoted(checkout: Checkout) -> None:
    promote(checkout)
    promote(checkout, challenger=True)
    client = tracking.connect(checkout.home)
    stored = versions.local(client, registry.versions_of(checkout.home, NAME)[1])
    assert stored is not None
    code = stored / "serving.py"
    code.write_text(code.read_text() + "# more\n")
    assert any(str(code) in p.what for p in audit(checkout.root).problems if p.severity == "red")
    challenger = promotions(checkout)[-1]["digest"]
    result = promote(checkout, model=challenger[:12])
    assert result.version == "3"  # not the version that was touched
    new = versions.local(client, registry.versions_of(checkout.home, NAME)[2])
    assert new is not None
    assert "# more" not in (new / "serving.py").read_text()


@pytest.mark.fault
def test_a_rollback_is_not_undone_by_the_next_promotion(checkout: Checkout) -> None:
    promote(checkout)
    second = better(checkout)
    registry.rollback(NAME, checkout.root, checkout.home, reason="it drifts")
    again = promote(checkout)
    assert again.digest != second.digest
    assert promote(checkout, model=second.digest[:12]).digest == second.digest  # by name it may come back
    assert promote(checkout).digest == second.digest


@pytest.mark.fault
def test_a_forged_promotion_is_not_signed_by_the_next_entry(
    checkout: Checkout, capsys: pytest.CaptureFixture[str]
) -> None:
    promote(checkout)
    better(checkout)
    keys = Keys.of(checkout.root, checkout.home)
    old = promotions(checkout)[0] | {"action": "rollback", "promoted_as": "champion"}
    Ledger(checkout.home).append("promotion", old)
    tracking.connect(checkout.home).set_registered_model_alias(NAME, "champion", "1")
    Ledger(checkout.home).append("failure", {"execution": "x", "stage": "rl-make"}, keys)
    assert "a promotion that nobody signed" in capsys.readouterr().err
    whats = [p.what for p in audit(checkout.root).problems if p.severity == "red"]
    assert any("its ledger entry is not signed" in what for what in whats)
    with pytest.raises(Finding, match="its last 2 entries are not signed"):
        promote(checkout)


@pytest.mark.fault
def test_a_ledger_that_is_gone_is_not_begun_anew(checkout: Checkout, capsys: pytest.CaptureFixture[str]) -> None:
    promote(checkout)
    (checkout.home / "ledger.jsonl").unlink()
    keys = Keys.of(checkout.root, checkout.home)
    Ledger(checkout.home).append("failure", {"execution": "x", "stage": "rl-make"}, keys)
    assert "are left" in capsys.readouterr().err
    assert any("was promoted, but the ledger has no such entry" in p.what for p in audit(checkout.root).problems)


@pytest.mark.fault
def test_a_model_that_was_never_promoted_as_this_version_is_not_handed_out(checkout: Checkout, tmp_path: Path) -> None:
    promote(checkout)
    client = tracking.connect(checkout.home)
    version = client.get_model_version(NAME, "1")
    client.create_registered_model("policy-CarRun")
    client.create_model_version("policy-CarRun", version.source, tags=dict(version.tags), model_id=version.model_id)
    with pytest.raises(Finding, match="no signed promotion says that models:/policy-CarRun/1"):
        registry.download(checkout.root, checkout.home, "policy-CarRun/1", tmp_path / "got")
