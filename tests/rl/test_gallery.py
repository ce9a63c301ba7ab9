"""Films: the right policies act, the film is theirs, and a machine that cannot draw stops nothing."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from springhead.errors import BadInput
from springhead.jsonio import read_json, write_json
from springhead.lineage.digests import tree_digest
from springhead.params import load
from springhead.rl import film
from springhead.rl.acting import ExpertConfig, ExpertPolicy, load_expert, save_expert
from springhead.rl.envs import run_episodes
from springhead.rl.simulators import mujoco_camera
from springhead.rl.tasks import task
from springhead.stage import for_test
from stages.rl import gallery
from tests.rl.offline_data import dataset

pytestmark = pytest.mark.unit
RUN = task("BallRun")
PARAMS = gallery.Params(pictures=6, colours=32)


def expert(name: str, value: float, cost: float) -> dict[str, Any]:
    return {"name": name, "episode_return": value, "cost_return": cost}


def test_the_best_safe_and_the_greediest_policy_act() -> None:
    experts = [expert("a", 10.0, 5.0), expert("b", 30.0, 20.0), expert("c", 40.0, 21.0), expert("d", 90.0, 70.0)]
    chosen = gallery.cast(experts, RUN)  # its middle limit is 20
    assert {role: e["name"] for role, e in chosen.items()} == {"safe": "b", "greedy": "d"}
    assert gallery.cast([expert("a", 1.0, 2.0)], RUN).keys() == {"safe"}
    nobody = gallery.cast([expert("a", 1.0, 50.0), expert("b", 2.0, 60.0)], RUN)
    assert {role: e["name"] for role, e in nobody.items()} == {"safe": "a", "greedy": "b"}
    with pytest.raises(BadInput, match="names no experts"):
        gallery.cast([], RUN)


def test_the_line_below_a_picture_counts_and_turns_red_where_steps_cost(tmp_path: Path) -> None:
    [episode] = dataset([(20.0, 0)], length=10)
    episode.costs[4:6] = 1.0  # between the pictures of steps 4 and 8
    pictures = np.full((4, 30, 200, 3), (0, 0, 255), np.uint8)
    film.write_gif(tmp_path / "film.gif", pictures, episode, every=4, colours=16)
    with Image.open(tmp_path / "film.gif") as shown:
        assert shown.n_frames == 4  # steps 0, 4, 8 and 10
        corners, durations = [], []
        for number in range(4):
            shown.seek(number)
            corners.append(np.asarray(shown.convert("RGB"))[-1, -1])
            durations.append(shown.info["duration"])
    red = [int(corner[0]) - int(corner[2]) > 100 for corner in corners]
    assert red == [False, False, True, False]
    assert durations[-1] > durations[0]


@pytest.fixture(scope="module")
def experts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two real policies of BallRun with an index: one that stands still, one that runs."""
    folder = tmp_path_factory.mktemp("experts")
    entries = []
    for name, push, value, cost in (("still", 0.0, 30.0, 0.0), ("runs", 1.0, 900.0, 80.0)):
        flat = (0.0,) * RUN.observation_dim
        config = ExpertConfig(RUN.name, "ppo-lag", 20.0, 0, 100, flat, (1.0,) * len(flat), (4,), RUN.action_dim)
        weights = {key: np.zeros(shape, np.float32) for key, shape in config.weight_shapes().items()}
        weights["net.2.bias"][:] = (push, 0.0)
        save_expert(folder / name, ExpertPolicy(config, weights))
        facts = {"digest": tree_digest(folder / name), "algorithm": "ppo-lag", "cost_limit": 20.0, "seed": 0}
        entries.append({**expert(name, value, cost), **facts})
    write_json(folder / "index.json", entries)
    return folder


def run(experts: Path, out: Path) -> dict[str, Any]:
    stage = for_test(PARAMS, out, {"experts": experts}, {"task": RUN.name}, seed=4, stage="gallery")
    gallery.run(stage)
    found: dict[str, Any] = read_json(out / "gallery.json")
    return found


def test_the_stage_films_the_very_episodes_it_names_twice_with_the_same_bytes(experts: Path, tmp_path: Path) -> None:
    entries = run(experts, tmp_path / "first")
    assert run(experts, tmp_path / "second") == entries
    assert tree_digest(tmp_path / "first") == tree_digest(tmp_path / "second")
    assert {role: entry["name"] for role, entry in entries.items()} == {"safe": "still", "greedy": "runs"}
    for entry in entries.values():
        [episode] = run_episodes(RUN.name, load_expert(experts / entry["name"]), [4], 20.0, 1)
        assert (entry["episode_return"], entry["length"]) == (episode.episode_return, episode.length)
    films = {}
    for role in entries:
        with Image.open(tmp_path / "first" / f"{role}.gif") as shown:
            assert shown.n_frames == 8  # a hundred steps, every sixteenth, and the last
            shown.seek(6)
            films[role] = np.asarray(shown.convert("RGB"))
    assert films["safe"].std() > 10  # not an empty picture
    assert (films["safe"] != films["greedy"]).any()


@pytest.mark.fault
def test_a_task_that_cannot_be_drawn_says_why_instead_of_a_film(
    experts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mujoco_camera, "_PLATFORMS", ("nothing",))
    stage = for_test(PARAMS, tmp_path / "out", {"experts": experts}, {"task": "SwimmerVelocity"}, stage="gallery")
    gallery.run(stage)
    entries = read_json(tmp_path / "out/gallery.json")
    assert entries["safe"]["film"] is None
    assert entries["safe"]["why"].startswith("MuJoCo cannot draw here")
    assert list((tmp_path / "out").glob("*.gif")) == []


@pytest.mark.fault
def test_an_expert_that_cannot_be_read_stops_the_stage(experts: Path, tmp_path: Path) -> None:
    damaged = tmp_path / "experts"
    shutil.copytree(experts, damaged)
    (damaged / "runs/policy.json").unlink()
    with pytest.raises(BadInput, match=r"runs.policy\.json"):
        run(damaged, tmp_path / "out")


@pytest.mark.parametrize(("key", "value"), [("pictures", 0), ("colours", 300), ("colours", 4)])
def test_bad_settings_are_refused_by_name(key: str, value: int) -> None:
    block = {"pictures": 6, "colours": 32, key: value}
    with pytest.raises(BadInput, match=rf"rl\.gallery: {key} must be"):
        load(gallery.Params, block, "params.yaml: rl.gallery")
