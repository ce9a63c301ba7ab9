from pathlib import Path

import pytest

from springhead.lineage.digests import tree_digest
from springhead.lineage.graph import Graph, branch_of, item_of, rows_method, step_of
from tests.lineage.sample import TASK

pytestmark = pytest.mark.unit

TRAIN = f"rl-train@{TASK}-cdt-0"


def test_names_are_taken_apart() -> None:
    assert (branch_of(TRAIN), step_of(TRAIN), item_of(TRAIN)) == ("rl", "train", f"{TASK}-cdt-0")
    assert (branch_of("llm-filter"), step_of("llm-filter"), item_of("llm-filter")) == ("llm", "filter", "")


def test_a_model_may_take_the_rows_of_another_method() -> None:
    assert rows_method({"method": "mend", "seed": 0}) == "mend"
    assert rows_method({"method": "bash", "rows_of": "sft"}) == "sft"
    assert rows_method({"algorithm": "cdt"}) is None


def test_upstream_is_everything_behind_a_model_makers_first(root: Path) -> None:
    expected = [f"rl-{step}@{TASK}" for step in ("experts", "collect", "filter", "validate")]
    assert Graph.read(root).upstream(TRAIN) == [*expected, TRAIN]


def test_downstream_of_the_data_is_every_model_and_its_evaluation(root: Path) -> None:
    below = Graph.read(root).downstream(f"rl-collect@{TASK}")
    assert sum(name.startswith("rl-train@") for name in below) == 4
    assert below[0] == f"rl-collect@{TASK}"
    assert below[-1] == f"rl-evaluate@{TASK}"
    assert not any(name.startswith("llm") for name in below)


def test_all_links_of_a_sound_repository_are_verified(root: Path) -> None:
    assert all(link.verified for link in Graph.read(root).links)


def test_a_dependency_may_be_a_part_of_an_output_or_stand_above_several(root: Path) -> None:
    graph = Graph.read(root)
    part, above = f"data/rl/filter/{TASK}/dataset.hdf5", f"data/rl/train/{TASK}"
    assert graph.makers(part) == (f"rl-filter@{TASK}",)
    assert len(graph.makers(above)) == 4
    for path in (part, above, f"{above}/cdt/1/model", f"data/rl/filter/{TASK}"):
        assert graph.digest(path) == tree_digest(root / path)
    assert graph.digest("data/rl/nothing") is None
    assert graph.digest(f"data/rl/filter/{TASK}/nothing") is None


def test_a_link_to_data_that_was_made_again_is_not_verified(root: Path) -> None:
    graph = Graph.read(root)
    graph.receipts[f"rl-collect@{TASK}"]["outputs"][f"data/rl/collect/{TASK}"]["sha256"] = "0" * 64
    assert [(k.stage, k.path) for k in graph.links if not k.verified] == [
        (f"rl-filter@{TASK}", f"data/rl/collect/{TASK}")
    ]


def test_a_single_changed_model_breaks_the_link_to_the_folder_above_it(root: Path) -> None:
    graph = Graph.read(root)
    out = f"data/rl/train/{TASK}/cdt/1"
    graph.receipts[f"rl-train@{TASK}-cdt-1"]["outputs"][out]["files"]["model/config.json"] = "0" * 64
    assert [k.stage for k in graph.links if not k.verified] == [f"rl-evaluate@{TASK}"]


def test_a_forged_cycle_does_not_hang(root: Path) -> None:
    graph = Graph.read(root)
    graph.receipts[f"rl-experts@{TASK}"]["dependencies"][f"data/rl/evaluate/{TASK}"] = {"sha256": "0" * 64, "bytes": 1}
    assert set(graph.order) == set(graph.receipts)
    assert f"rl-evaluate@{TASK}" in graph.upstream(f"rl-experts@{TASK}")


def test_models_behind_a_stage(root: Path) -> None:
    graph = Graph.read(root)
    paths = [model.path for model in graph.models_behind(["llm-filter"])]
    assert paths == [f"data/llm/finetune/small-llama/{method}/0/model" for method in ("mend", "sft")]
    assert graph.models_behind([f"rl-evaluate@{TASK}"]) == []


def test_what_people_accepted_is_no_data_that_a_stage_must_have_made(root: Path) -> None:
    graph = Graph.read(root)
    facts = graph.receipts[f"rl-validate@{TASK}"]["dependencies"]
    before = len(graph.links)
    facts["data/accepted"] = {"sha256": "0" * 64, "bytes": 1}
    graph = Graph(graph.receipts)
    assert len(graph.links) == before
    facts["data/accepted-by-nobody"] = {"sha256": "0" * 64, "bytes": 1}
    assert len(Graph(graph.receipts).links) == before + 1
