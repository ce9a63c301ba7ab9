"""Minari data sets: what Minari itself would have written, all that it knows to say, and what is wrong with others."""

import dataclasses
import json

import gymnasium
import h5py
import minari
import numpy as np
import pytest
from minari.data_collector import EpisodeBuffer

from springhead.errors import BadInput
from springhead.rl import minari_file
from springhead.rl.dataset import About, Dataset, iter_minari, read_minari, write_minari
from springhead.rl.envs import env_name
from springhead.rl.episodes import Episode
from springhead.rl.tasks import task
from tests.rl.test_dataset import make_episode

pytestmark = pytest.mark.unit

NAME = "springhead/BallCircle-v0"
ABOUT = About(("B. Author", "A. Author"), ("a@example.org",), "https://example.org/tree/abc")
FACTS = [{"seed": 5, "policy": "ab" * 32, "cost_limit": 10.0, "algorithm": "cpo"}, {"seed": 6, "source": "cd" * 32}]


@pytest.fixture
def episodes():
    return [make_episode(20, 0), make_episode(7, 1, terminal=True)]


@pytest.fixture
def root(tmp_path, episodes, monkeypatch):
    write_minari(tmp_path / "ours", NAME, episodes, task("BallCircle"), ABOUT, FACTS, ("cpo", "ppo-lag"))
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "ours"))
    return tmp_path / "ours"


def theirs(tmp_path, episodes, monkeypatch):
    """The same data set, written by Minari with everything it takes."""
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "theirs"))
    (tmp_path / "theirs").mkdir()
    buffers = [
        EpisodeBuffer(
            id=number,
            seed=facts["seed"],
            observations=np.concatenate([e.observations, e.next_observations[-1:]]),
            actions=e.actions,
            rewards=e.rewards,
            terminations=e.terminals,
            truncations=e.timeouts,
            infos={"cost": np.concatenate([np.zeros(1, np.float32), e.costs])},
        )
        for number, (e, facts) in enumerate(zip(episodes, FACTS, strict=True))
    ]
    spec = gymnasium.spec(env_name("BallCircle"))
    return minari.create_dataset_from_buffers(
        NAME, buffers, env=spec, eval_env=spec, algorithm_name="x", author=set(ABOUT.author),
        author_email=set(ABOUT.author_email), code_permalink=ABOUT.code_permalink, ref_min_score=0.0,
        ref_max_score=1.0, description="x", requirements=["x==1"],
    )  # fmt: skip


def test_it_is_what_minari_writes_and_more(root, tmp_path, episodes, monkeypatch):
    ours = minari.load_dataset(NAME)
    other = theirs(tmp_path, episodes, monkeypatch)
    said = json.loads((root / NAME / "data/metadata.json").read_text())
    there = json.loads((tmp_path / "theirs" / NAME / "data/metadata.json").read_text())
    # The one thing left out: over how many episodes reference scores were averaged. Ours are published extremes.
    assert set(there) - set(said) == {"num_episodes_average_score"}
    for key in ("observation_space", "action_space", "env_spec", "eval_env_spec", "total_steps", "total_episodes",
                "data_format", "minari_version", "code_permalink", "author_email"):  # fmt: skip
        assert said[key] == there[key], key
    assert ours.spec.env_spec == other.spec.env_spec
    for mine, its in zip(ours.iterate_episodes(), other.iterate_episodes(), strict=True):
        for key in ("observations", "actions", "rewards", "terminations", "truncations"):
            np.testing.assert_array_equal(getattr(mine, key), getattr(its, key))
            assert getattr(mine, key).dtype == getattr(its, key).dtype
        assert set(mine.infos) == set(its.infos) == {"cost"}
        np.testing.assert_array_equal(mine.infos["cost"], its.infos["cost"])
    own = ours.storage.get_episode_metadata([0, 1])
    for mine, its, episode, facts in zip(own, other.storage.get_episode_metadata([0, 1]), episodes, FACTS, strict=True):
        assert {key: mine[key] for key in its} == its
        assert {key: mine[key] for key in facts} == facts
        assert mine["episode_id"] == episode.id
        assert (mine["episode_return"], mine["cost_return"]) == (episode.episode_return, episode.cost_return)


def test_minari_understands_what_it_says(root):
    data = minari.load_dataset(NAME)
    said = data.storage.metadata
    assert said["author"] == set(ABOUT.author)
    assert said["algorithm_name"] == "cpo, ppo-lag"
    assert any(line.startswith("bullet-safety-gym==") for line in said["requirements"])
    low, high = task("BallCircle").return_range
    assert minari.get_normalized_score(data, np.array([low, high])).tolist() == [0.0, 1.0]
    assert list(minari.list_local_datasets()) == [NAME]
    assert "springhead" in minari.namespace.list_local_namespaces()
    safe = data.filter_episodes(lambda episode: episode.infos["cost"].sum() <= 3)
    assert len(safe) < len(data)
    for evaluation in (False, True):
        env = data.recover_environment(eval_env=evaluation)
        assert env.observation_space == data.observation_space
        env.close()


@pytest.mark.parametrize(
    ("name", "packages", "published"),
    [
        ("BallCircle", {"bullet-safety-gym", "pybullet"}, True),
        ("MazeUMaze", {"gymnasium-robotics", "mujoco"}, False),
        ("HopperSparse", {"safety-gymnasium", "mujoco"}, False),
    ],
)
def test_it_names_the_simulator_and_published_data_where_there_are_such(name, packages, published, tmp_path):
    of = task(name)
    states, end = np.zeros((5, of.observation_dim), np.float32), np.arange(4) == 3
    zeros, actions = np.zeros(4, np.float32), np.zeros((4, of.action_dim), np.float32)
    one = Episode(states[:-1], states[1:], actions, zeros, zeros, end & False, end)
    write_minari(tmp_path, "x/Y-v0", [one], of)
    said = json.loads((tmp_path / "x/Y-v0/data/metadata.json").read_text())
    assert {line.split("==")[0] for line in said["requirements"]} == {"springhead", *packages}
    text = f"Episodes of {name} over a range of cost limits. infos['cost'] is the cost of every step"
    scores = "; the reference scores are the lowest and the highest return of the published DSRL data set of the task"
    assert said["description"] == f"{text}{scores if published else ''}."


def test_it_can_be_read_back_and_appended_to(root, episodes):
    data = read_minari(root / NAME)
    assert [e.id for e in data.episodes()] == [e.id for e in episodes]
    minari.load_dataset(NAME).storage.update_episodes(
        [EpisodeBuffer(id=2, observations=np.zeros((3, 8), np.float32), actions=np.zeros((2, 2), np.float32),
                       rewards=np.ones(2, np.float32), terminations=np.zeros(2, bool), truncations=np.zeros(2, bool),
                       infos={"cost": np.ones(3, np.float32)})]
    )  # fmt: skip
    more = list(iter_minari(root / NAME))
    assert len(more) == 3
    assert more[2].timeouts.tolist() == [False, True]  # it ended because its collector stopped


def test_sub_costs_and_a_missing_cost(tmp_path, episodes):
    of = task("BallRun")
    assert of.sub_costs
    parts = [dataclasses.replace(e, sub_costs=np.stack([e.costs] * len(of.sub_costs), axis=1)) for e in episodes]
    write_minari(tmp_path, "springhead/BallRun-v0", parts, of)
    folder = tmp_path / "springhead/BallRun-v0"
    assert [e.id for e in iter_minari(folder, "cost", of.sub_costs)] == [e.id for e in parts]
    assert [e.id for e in iter_minari(folder)] == [e.id for e in episodes]
    assert read_minari(folder, cost=None).costs.max() == 0
    with pytest.raises(BadInput, match=r"BallRun-v0: episode 0: infos have no 'price' \(they have cost, cost_"):
        read_minari(folder, cost="price")


@pytest.mark.fault("F9")
def test_a_damaged_minari_data_set_is_named(root, tmp_path):
    with pytest.raises(BadInput, match=r"springhead: no Minari data set"):
        read_minari(root / "springhead")
    path = root / NAME / "data/main_data.hdf5"
    with h5py.File(path) as stored:
        where = stored["episode_1/rewards"].id.get_chunk_info(0)
    content = bytearray(path.read_bytes())
    content[where.byte_offset + 3] ^= 0xFF
    path.write_bytes(bytes(content))
    with pytest.raises(BadInput, match="episode 1 or a later one cannot be read"):
        read_minari(root / NAME)
    path.write_bytes(bytes(content[: len(content) // 2]))
    with pytest.raises(BadInput, match="episode 0 or a later one cannot be read"):
        read_minari(root / NAME)
    with pytest.raises(BadInput, match="exists already"):
        write_minari(root, NAME, Dataset.of([make_episode(3, 0)]).episodes(), task("BallCircle"))


@pytest.mark.fault
def test_what_is_no_vector_is_refused(root):
    path = root / NAME / "data/main_data.hdf5"
    with h5py.File(path, "a") as stored:
        del stored["episode_0/observations"]
        stored["episode_0/observations"] = np.zeros((21, 4, 2), np.float32)
    with pytest.raises(BadInput, match="episode 0: observations are not vectors"):
        read_minari(root / NAME)


def equal(a, b):
    keys = [field.name for field in dataclasses.fields(Dataset)]
    for one, two in ((getattr(a, key), getattr(b, key)) for key in keys):
        if one is None or two is None:
            assert one is two
        else:
            assert one.dtype == two.dtype
            np.testing.assert_array_equal(one, two)


def test_reading_at_once_gives_what_reading_episode_by_episode_gives(root, tmp_path, episodes, monkeypatch):
    several = [
        dataclasses.replace(episode, sub_costs=np.arange(2.0 * episode.length, dtype=np.float32).reshape(-1, 2))
        for episode in [*episodes, make_episode(1, 2), make_episode(12, 3, terminal=True)]
    ]
    write_minari(tmp_path / "several", "springhead/BallRun-v0", several, task("BallRun"))
    folder, names = tmp_path / "several/springhead/BallRun-v0", task("BallRun").sub_costs
    for cost, sub_costs in (("cost", names), ("cost", ()), (None, ()), (None, names)):
        at_once = minari_file._read_at_once(folder, cost, sub_costs)
        equal(at_once, Dataset.of(list(iter_minari(folder, cost, sub_costs))))
    theirs(tmp_path, episodes, monkeypatch)
    equal(minari_file._read_at_once(tmp_path / "theirs" / NAME, "cost", ()), Dataset.of(episodes))


@pytest.mark.parametrize("change", ["shape", "missing", "kind", "total"])
def test_what_surprises_reading_at_once_is_left_to_the_other(root, change):
    with h5py.File(root / NAME / "data/main_data.hdf5", "r+") as file:
        group = file["episode_1"]
        if change == "total":
            del file["episode_1"]
        elif change == "missing":
            del group["infos/cost"]
        else:
            old = group["rewards"][()]
            del group["rewards"]
            group["rewards"] = old[:-1] if change == "shape" else np.array([b"x"] * len(old))
    assert minari_file._read_at_once(root / NAME, "cost", ()) is None
    with pytest.raises(
        BadInput, match="total_episodes is 2, but main_data.hdf5 has 1" if change == "total" else "episode 1"
    ):
        read_minari(root / NAME)


METADATA = [
    (lambda stated: [1], "metadata.json: is no mapping"),
    (lambda stated: {**stated, "total_episodes": "many"}, "metadata.json: total_episodes is 'many'"),
    (lambda stated: {**stated, "total_episodes": None}, "metadata.json: total_episodes is None"),
    (lambda stated: {**stated, "total_episodes": 5}, "total_episodes is 5, but main_data.hdf5 has 2"),
    (lambda stated: {**stated, "total_episodes": 1}, "total_episodes is 1, but main_data.hdf5 has 2"),
    (
        lambda stated: {**stated, "total_episodes": 1, "total_steps": 20},
        "total_episodes is 1, but main_data.hdf5 has 2",
    ),
]


@pytest.mark.fault
@pytest.mark.parametrize(("change", "message"), METADATA)
def test_what_the_description_says_wrong_is_named(root, change, message):
    path = root / NAME / "data/metadata.json"
    path.write_text(json.dumps(change(json.loads(path.read_text()))))
    with pytest.raises(BadInput, match=message):
        read_minari(root / NAME)


@pytest.mark.fault
def test_a_space_that_minari_cannot_read_is_named(root):
    path = root / NAME / "data/metadata.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "observation_space": 7}))
    with pytest.raises(BadInput, match="episode 0 or a later one cannot be read"):
        list(iter_minari(root / NAME))


@pytest.mark.fault
@pytest.mark.parametrize(
    ("key", "values", "message"),
    [
        ("infos/cost", 3.0, r"episode 1: infos\['cost'\] is a single float64"),
        ("infos/cost", [b"a"] * 8, r"episode 1: infos\['cost'\] is of type"),
        ("terminations", [b"a"] * 7, "episode 1: terminations are not a flag per step"),
        ("terminations", np.zeros(0, bool), "episode 1: terminations are not a flag per step"),
        ("rewards", 3.0, "episode 1 or a later one cannot be read"),
        ("observations", 3.0, "episode 1: observations are not vectors"),
    ],
)
def test_single_numbers_and_text_instead_of_a_number_per_step_are_named(root, key, values, message):
    with h5py.File(root / NAME / "data/main_data.hdf5", "r+") as file:
        del file[f"episode_1/{key}"]
        file[f"episode_1/{key}"] = values
    with pytest.raises(BadInput, match=message):
        read_minari(root / NAME)


@pytest.mark.parametrize("name", ["BallRun", "HalfCheetahVelocity", "PointGoal1"])
def test_the_spaces_are_those_of_the_environment(tmp_path, monkeypatch, name):
    of = task(name)
    flat = Dataset.of([make_episode(5, 0)])
    zeros = np.zeros((5, of.observation_dim), np.float32)
    actions = np.zeros((5, of.action_dim), np.float32)
    episode = dataclasses.replace(flat.episode(0), observations=zeros, next_observations=zeros, actions=actions)
    write_minari(tmp_path, env_name(name), [episode], of)
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    data = minari.load_dataset(env_name(name))
    env = data.recover_environment()
    assert (data.observation_space, data.action_space) == (env.observation_space, env.action_space)
    env.close()
