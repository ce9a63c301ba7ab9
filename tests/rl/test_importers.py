"""Files of others, written here with all their quirks, and every way in which one can be wrong."""

import functools
import hashlib
import http.server
import threading
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest

from springhead.errors import BadInput
from springhead.jsonio import read_json
from springhead.lineage.digests import tree_digest, tree_files
from springhead.params import load
from springhead.rl import foreign, importers, suite
from springhead.rl.dsrl_file import read_dsrl
from springhead.rl.episodes import Episode
from springhead.rl.facts import ROWS
from springhead.rl.importers import D4rl, Dsrl, Minari, Source, import_sources
from springhead.rl.tasks import task
from springhead.tables import read_table
from tests.rl.foreign_files import HORIZON, flat, make_episodes, write_hdf5, write_minari

pytestmark = pytest.mark.unit
TASK = replace(task("BallCircle"), terminates=True)
"""With episodes of all lengths: one that is shorter than the horizon ends with a terminal."""


@pytest.fixture
def shelf(tmp_path, monkeypatch):
    """Where sources are looked up."""
    monkeypatch.setenv("SPRINGHEAD_HOME", str(tmp_path / "state"))
    monkeypatch.setenv("SPRINGHEAD_SOURCES", str(tmp_path / "sources"))
    monkeypatch.delenv("MINARI_DATASETS_PATH", raising=False)
    return tmp_path / "sources"


@pytest.fixture
def out(tmp_path):
    (tmp_path / "out").mkdir()
    return tmp_path / "out"


def dsrl(path, **settings):
    settings = {"sha256": tree_digest(path), **settings}
    return Source(task="BallCircle", dsrl=Dsrl(file=path.name, **settings))


def d4rl(path, cost=None, **settings):
    return Source(task="BallCircle", d4rl=D4rl(path=path.name, sha256=tree_digest(path), cost=cost, **settings))


def minari(shelf, dataset_id, cost="cost", **settings):
    digest = tree_digest(shelf / dataset_id)
    return Source(task="BallCircle", minari=Minari(path=dataset_id, sha256=digest, cost=cost, **settings))


def ids(folder):
    return [episode.id for episode in read_dsrl(folder / "dataset.hdf5").episodes()]


def decisions(folder):
    return read_table(folder / "decisions.parquet").to_pylist()


def as_published(episodes):
    """The arrays in the shapes and types that published files have."""
    arrays = flat(episodes)
    return {
        "observations": arrays["observations"].astype(np.float64),
        "next_observations": arrays["next_observations"].astype(np.float64),
        "actions": arrays["actions"],
        "rewards": arrays["rewards"].astype(np.float64)[:, None],
        "costs": arrays["costs"][:, None],
        "terminals": arrays["terminals"].astype(np.uint8)[:, None],
        "timeouts": arrays["timeouts"].astype(np.float32),
    }


# -- DSRL's files -----------------------------------------------------------------------------------


@pytest.mark.parametrize("arrays_of", [flat, as_published])
def test_a_published_file_becomes_the_same_episodes(shelf, out, arrays_of):
    episodes = make_episodes()
    path = write_hdf5(shelf / "dsrl" / TASK.data_file, {**arrays_of(episodes), "infos/speed": np.zeros(430)})
    source = Source(task="BallCircle", dsrl=Dsrl(sha256=tree_digest(path)))
    index = import_sources(TASK, [source], out)
    assert ids(out) == [episode.id for episode in episodes]
    rows = read_table(out / "rows.parquet")
    assert rows.schema.equals(ROWS)
    assert [row["source"] for row in rows.to_pylist()] == [tree_digest(path)] * 3
    assert {(r["policy"], r["algorithm"], r["seed"], tuple(r["parents"])) for r in rows.to_pylist()} == {
        (None, "imported", None, ())
    }
    assert rows["index"].to_pylist() == [0, 1, 2]
    np.testing.assert_allclose(rows["cost_return"].to_pylist(), [e.cost_return for e in episodes])
    assert [(d["rule"], d["kept"]) for d in decisions(out)] == [("import", True)] * 3
    assert index == read_json(out / "index.json")
    assert index[0] | {"name": "", "sha256": ""} == {
        "name": "",
        "sha256": "",
        "format": "dsrl",
        "episodes": 3,
        "steps": 430,
        "left_out": {},
        "steps_cut": 0,
        "cost": "costs",
        "revision": None,
        "not_read": ["infos/speed"],
    }


def test_blocks_do_not_change_what_is_read(shelf, out, tmp_path, monkeypatch):
    path = write_hdf5(shelf / "dsrl" / "x.hdf5", as_published(make_episodes((200, 3, 1, 40, 200, 7))))
    import_sources(TASK, [dsrl(path)], out)
    monkeypatch.setattr(foreign, "BLOCK_ROWS", 45)
    (tmp_path / "again").mkdir()
    import_sources(TASK, [dsrl(path)], tmp_path / "again")
    assert tree_files(out) == tree_files(tmp_path / "again")


def test_steps_without_an_end_are_an_error_unless_told_otherwise(shelf, out):
    episodes = make_episodes()
    arrays = flat(episodes)
    arrays["timeouts"][-1] = False
    path = write_hdf5(shelf / "dsrl" / "x.hdf5", arrays)
    with pytest.raises(BadInput, match=r"x\.hdf5: episode 2: its 200 steps are followed by no terminal .* drop"):
        import_sources(TASK, [dsrl(path)], out)
    assert not list(out.iterdir())
    index = import_sources(TASK, [dsrl(path, unfinished="drop")], out)
    assert index[0]["left_out"] == {"unfinished": 1}
    assert ids(out) == [episode.id for episode in episodes[:2]]
    last = decisions(out)[2]
    assert (last["rule"], last["kept"], last["value"], last["source_index"]) == ("unfinished", False, 200, 2)


def change(episode, key, step, value):
    array = getattr(episode, key).copy()
    array[step] = value
    return replace(episode, **{key: array})


def timed_out(episode):
    """Ended by time, whatever ended it before."""
    ends = np.arange(episode.length) == episode.length - 1
    return replace(episode, terminals=np.zeros_like(ends), timeouts=ends)


FAULTS = [
    ("action range", lambda e: change(e, "actions", 7, 1.000002), r"episode 1: actions reach 1\.00000203 at step 7"),
    ("finite", lambda e: change(e, "observations", 4, np.nan), r"episode 1: observations are not finite at step 4"),
    ("finite", lambda e: change(e, "rewards", 0, np.inf), r"episode 1: rewards are not finite at step 0"),
    ("action range", lambda e: change(e, "actions", 7, -1.5), r"episode 1: actions reach 1\.5 at step 7"),
    ("cost sign", lambda e: change(e, "costs", 29, -0.5), r"episode 1: costs are -0\.5 at step 29"),
    ("horizon", lambda e: make_episodes((1, 201))[1], r"episode 1: has 201 steps; BallCircle ends at 200"),
    ("timeout before horizon", lambda e: timed_out(e), r"episode 1: has a time-out after 30 steps; BallCircle runs"),
    ("end flags", lambda e: change(e, "timeouts", -1, True), r"episode 1: its last step, 29, is terminal and time-out"),
    ("cost kind", lambda e: change(e, "costs", 3, 0.5), r"episode 1: the cost is 0\.5 at step 3 \(1 such steps\)"),
    ("cost kind", lambda e: change(e, "costs", 8, 2), r"episode 1: the cost is 2 at step 8 .*BallCircle costs 0 or 1"),
]


@pytest.mark.fault
@pytest.mark.parametrize(("rule", "spoil", "message"), FAULTS)
def test_an_episode_that_does_not_fit_is_named_or_left_out_when_told(shelf, out, rule, spoil, message):
    episodes = make_episodes()
    episodes[1] = spoil(episodes[1])
    path = write_hdf5(shelf / "dsrl" / "x.hdf5", flat(episodes))
    with pytest.raises(BadInput, match=rf"x\.hdf5: {message}.*faulty: drop"):
        import_sources(TASK, [dsrl(path)], out)
    assert not list(out.iterdir())
    import_sources(TASK, [dsrl(path, faulty="drop")], out)
    assert ids(out) == [episodes[0].id, episodes[2].id]
    left = decisions(out)[1]
    assert (left["id"], left["rule"], left["kept"]) == (episodes[1].id, rule, False)


def test_an_action_that_misses_1_by_a_rounding_is_imported_as_validation_allows(shelf, out):
    episodes = make_episodes()
    episodes[1] = change(episodes[1], "actions", 7, 1.0000001)
    import_sources(TASK, [dsrl(write_hdf5(shelf / "dsrl" / "x.hdf5", flat(episodes)))], out)
    assert ids(out) == [episode.id for episode in episodes]


@pytest.mark.fault
@pytest.mark.parametrize("known", ["whole", "cut"])
def test_a_terminal_in_a_task_that_never_terminates_is_refused_also_where_it_was_cut(shelf, out, known):
    arrays = flat(make_episodes())
    if known == "cut":
        del arrays["next_observations"]
    path = write_hdf5(shelf / "x.hdf5", arrays)
    never = task("BallCircle")
    with pytest.raises(BadInput, match=r"episode 1: ends with a terminal after 30 steps; BallCircle never terminates"):
        import_sources(never, [d4rl(path, "costs")], out)
    import_sources(never, [d4rl(path, "costs", faulty="drop")], out)
    assert [(d["rule"], d["value"], d["threshold"]) for d in decisions(out) if not d["kept"]] == [("terminal", 30, 200)]
    assert len(ids(out)) == 2


def test_costs_of_any_size_stay_where_the_task_has_such(shelf, out):
    episodes = [change(e, "costs", 3, 0.5) for e in make_episodes()]
    path = write_hdf5(shelf / "dsrl" / "x.hdf5", flat(episodes))
    import_sources(replace(TASK, cost_kind="continuous"), [dsrl(path)], out)
    assert ids(out) == [episode.id for episode in episodes]


@pytest.mark.fault
def test_data_of_a_task_with_the_same_dimensions_but_another_horizon_are_refused(shelf, out):
    """BallRun's episodes have CarRun's dimensions and end after 100 steps, CarRun's after 200."""
    ball, car = task("BallRun"), task("CarRun")
    assert (ball.observation_dim, ball.action_dim) == (car.observation_dim, car.action_dim)
    states = np.random.default_rng(0).normal(size=(2, ball.horizon + 1, ball.observation_dim)).astype(np.float32)
    ends = np.arange(ball.horizon) == ball.horizon - 1
    episodes = [
        Episode(
            those[:-1],
            those[1:],
            np.zeros((ball.horizon, 2), np.float32),
            np.ones(ball.horizon, np.float32),
            np.zeros(ball.horizon, np.float32),
            np.zeros_like(ends),
            ends,
        )
        for those in states
    ]
    path = write_hdf5(shelf / "dsrl" / ball.data_file, flat(episodes))
    given = Dsrl(file=path.name, sha256=tree_digest(path))
    message = r"episode 0: has a time-out after 100 steps; CarRun runs for 200: is it of another task"
    with pytest.raises(BadInput, match=message):
        import_sources(car, [Source(task="CarRun", dsrl=given)], out)
    everything = r"none of its 2 episodes can be imported \(left out: 2 by timeout before horizon\)"
    with pytest.raises(BadInput, match=f"{everything}.*{message}"):
        import_sources(car, [Source(task="CarRun", dsrl=replace(given, faulty="drop"))], out)
    assert not list(out.iterdir())
    assert import_sources(ball, [Source(task="BallRun", dsrl=given)], out)[0]["episodes"] == 2


def test_numbers_too_large_for_float32_are_not_finite(shelf, out):
    arrays = as_published(make_episodes())
    arrays["rewards"][5] = 1e300
    path = write_hdf5(shelf / "dsrl" / "x.hdf5", arrays)
    with pytest.raises(BadInput, match="episode 0: rewards are not finite at step 5"):
        import_sources(TASK, [dsrl(path)], out)


def test_the_same_bytes_count_once_over_all_sources(shelf, out):
    episodes = make_episodes()
    first = write_hdf5(shelf / "dsrl" / "x.hdf5", flat([*episodes, episodes[0]]))
    second = write_hdf5(shelf / "dsrl" / "y.hdf5", flat([episodes[1], *make_episodes((50,), seed=9)]))
    index = import_sources(TASK, [dsrl(first), dsrl(second)], out)
    assert [entry["left_out"] for entry in index] == [{"duplicate": 1}, {"duplicate": 1}]
    assert len(ids(out)) == 4
    assert read_table(out / "rows.parquet")["source"].to_pylist() == [tree_digest(first)] * 3 + [tree_digest(second)]


def without(key):
    return lambda arrays: {k: v for k, v in arrays.items() if k != key}


HOSTILE = [
    (without("costs"), "no array 'costs'"),
    (without("next_observations"), "no array 'next_observations'"),
    (lambda a: {**a, "observations": a["observations"][:, :7]}, r"'observations' has shape \(430, 7\); .*another task"),
    (lambda a: {**a, "actions": np.zeros((430, 3))}, r"'actions' has shape \(430, 3\); task BallCircle needs"),
    (lambda a: {**a, "rewards": a["rewards"][:-1]}, "differ in their number of steps .*rewards 429"),
    (lambda a: {**a, "rewards": np.zeros((430, 2))}, r"'rewards' has shape \(430, 2\)"),
    (lambda a: {**a, "costs": np.full(430, b"x")}, "'costs' holds"),
    (lambda a: {**a, "terminals": np.full(430, 0.5)}, "'terminals' holds 0.5 at step 0; flags are 0 or 1"),
    (lambda a: {**a, "timeouts": np.full(430, np.nan)}, "'timeouts' holds nan at step 0"),
    (lambda a: {k: v[:0] for k, v in a.items()}, "no steps in the file"),
]


@pytest.mark.fault
@pytest.mark.parametrize(("spoil", "message"), HOSTILE)
def test_a_file_that_is_not_what_it_should_be(shelf, out, spoil, message):
    path = write_hdf5(shelf / "dsrl" / "x.hdf5", spoil(flat(make_episodes())))
    with pytest.raises(BadInput, match=rf"x\.hdf5: .*{message}"):
        import_sources(TASK, [dsrl(path, unfinished="drop", faulty="drop")], out)
    assert not list(out.iterdir())


@pytest.mark.fault
def test_damaged_bytes_and_other_bytes(shelf, out):
    path = write_hdf5(shelf / "dsrl" / "x.hdf5", flat(make_episodes()))
    source, content = dsrl(path), path.read_bytes()
    path.write_bytes(content[:-100])
    with pytest.raises(BadInput, match=r"x\.hdf5 has sha256 \w+, wanted"):
        import_sources(TASK, [source], out)
    with pytest.raises(BadInput, match=r"x\.hdf5: damaged or not an HDF5 file"):
        import_sources(TASK, [dsrl(path)], out)
    import h5py

    path.write_bytes(content)
    with h5py.File(path) as file:
        where = file["actions"].id.get_chunk_info(0)
    flipped = bytearray(content)
    flipped[where.byte_offset + where.size // 2] ^= 0xFF
    path.write_bytes(flipped)
    with pytest.raises(BadInput, match=r"x\.hdf5: array 'actions' is damaged"):
        import_sources(TASK, [dsrl(path)], out)
    assert not list(out.iterdir())


def test_a_published_file_is_fetched_by_revision_and_digest(shelf, out, tmp_path, monkeypatch):
    revision = "0123456789" * 4
    monkeypatch.setattr(importers, "MIRROR", "mirror.invalid/DSRL")
    path = write_hdf5(tmp_path / "served" / "resolve" / revision / TASK.data_file, flat(make_episodes()))
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(tmp_path / "served"))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as served:
        threading.Thread(target=served.serve_forever, daemon=True).start()
        fetch = importers.sources.fetch

        def over_http(wanted, *places):
            assert wanted.url == f"https://mirror.invalid/DSRL/resolve/{revision}/{TASK.data_file}"
            local = f"http://127.0.0.1:{served.server_port}/resolve/{revision}/{TASK.data_file}"
            return fetch(replace(wanted, url=local), *places)

        monkeypatch.setattr(importers.sources, "fetch", over_http)
        wrong = Source(task="BallCircle", dsrl=Dsrl(sha256="0" * 64, revision=revision))
        with pytest.raises(BadInput, match="has sha256"):
            import_sources(TASK, [wrong], out, tmp_path)
        assert not list(out.iterdir())
        good = Source(task="BallCircle", dsrl=Dsrl(sha256=tree_digest(path), revision=revision))
        assert import_sources(TASK, [good], out, tmp_path)[0]["revision"] == revision
        served.shutdown()
    assert len(ids(out)) == 3


# -- D4RL-style files -------------------------------------------------------------------------------


def as_d4rl(episodes, *keys):
    arrays = flat(episodes)
    return {key: arrays[key] for key in ("observations", "actions", "rewards", "terminals", *keys)}


def test_without_successors_the_last_step_of_each_episode_goes(shelf, out):
    episodes = make_episodes((200, 30, 1, 200))
    path = write_hdf5(shelf / "hopper.hdf5", as_d4rl(episodes, "timeouts") | {"infos/cost": flat(episodes)["costs"]})
    with pytest.raises(BadInput, match=r"episode 1: ends with a terminal after 30 .*cut off.*Add next_observations"):
        import_sources(TASK, [d4rl(path, "infos/cost")], out)
    index = import_sources(TASK, [d4rl(path, "infos/cost", faulty="drop")], out)
    assert (index[0]["steps_cut"], index[0]["steps"]) == (2, 398)
    assert index[0]["left_out"] == {"terminal cut": 1, "one step": 1}
    data = read_dsrl(out / "dataset.hdf5").episodes()
    for made, episode in zip(data, [episodes[0], episodes[3]], strict=True):
        for key in ("observations", "next_observations", "actions", "rewards", "costs"):
            np.testing.assert_array_equal(getattr(made, key), getattr(episode, key)[:-1], err_msg=key)
        assert not made.terminals.any()
        assert made.timeouts.tolist() == [False] * (made.length - 1) + [True]
    assert [(d["rule"], d["kept"]) for d in decisions(out)] == [
        ("last step", True),
        ("terminal cut", False),
        ("one step", False),
        ("last step", True),
    ]


@pytest.mark.parametrize(("length", "whole"), [(HORIZON, True), (HORIZON - 1, False)])
def test_validation_takes_what_was_imported_without_its_last_step(shelf, out, length, whole):
    """Import and validation agree on what the full length is: the file's episodes must reach the horizon."""
    path = write_hdf5(shelf / "x.hdf5", as_d4rl([timed_out(e) for e in make_episodes((length, length))], "timeouts"))
    if not whole:
        with pytest.raises(BadInput, match="episode 0: has a time-out after 199 steps; BallCircle runs for 200"):
            import_sources(TASK, [d4rl(path)], out)
        return
    import_sources(TASK, [d4rl(path)], out)
    data, rows = read_dsrl(out / "dataset.hdf5"), read_table(out / "rows.parquet")
    arrays = {key: getattr(data, key) for key in data.keys}
    table = suite.episode_table(arrays, rows, *suite.boundaries(arrays), TASK)
    assert (table["length"].tolist(), table["full_length"].tolist()) == ([199, 199], [True, True])
    # The same episodes are too short where they were rolled out here.
    ours = rows.set_column(rows.schema.get_field_index("source"), ROWS.field("source"), pa.nulls(2, pa.string()))
    table = suite.episode_table(arrays, ours, *suite.boundaries(arrays), TASK)
    assert table["full_length"].tolist() == [False, False]


def test_what_was_cut_once_can_be_imported_again(shelf, out, tmp_path):
    """Our own export of such an import has the successors, and a step less than the horizon."""
    path = write_hdf5(shelf / "x.hdf5", as_d4rl(make_episodes((HORIZON, HORIZON)), "timeouts"))
    import_sources(TASK, [d4rl(path)], out)
    again = shelf / "dsrl" / "again.hdf5"
    again.parent.mkdir()
    again.write_bytes((out / "dataset.hdf5").read_bytes())
    (tmp_path / "again").mkdir()
    import_sources(TASK, [dsrl(again)], tmp_path / "again")
    assert ids(tmp_path / "again") == ids(out)


def test_with_successors_every_step_stays(shelf, out):
    episodes = make_episodes()
    path = write_hdf5(shelf / "x.hdf5", as_d4rl(episodes, "timeouts", "next_observations"))
    index = import_sources(TASK, [d4rl(path)], out)
    assert (index[0]["cost"], index[0]["steps_cut"]) == (None, 0)
    free = [replace(episode, costs=np.zeros_like(episode.costs)) for episode in episodes]
    assert ids(out) == [episode.id for episode in free]


def test_without_timeouts_episodes_are_cut_at_the_horizon_only_when_told(shelf, out):
    episodes = make_episodes((HORIZON, 30, HORIZON, HORIZON, 12))
    episodes[4] = change(episodes[4], "terminals", -1, False)
    path = write_hdf5(shelf / "x.hdf5", as_d4rl(episodes, "next_observations", "costs"))
    with pytest.raises(BadInput, match=r"x\.hdf5: no array 'timeouts'.*timeouts: horizon.*200 steps"):
        import_sources(TASK, [d4rl(path, "costs")], out)
    with pytest.raises(BadInput, match="episode 4: its 12 steps are followed by no terminal"):
        import_sources(TASK, [d4rl(path, "costs", timeouts="horizon")], out)
    assert not list(out.iterdir())
    import_sources(TASK, [d4rl(path, "costs", timeouts="horizon", unfinished="drop")], out)
    assert ids(out) == [episode.id for episode in episodes[:4]]


@pytest.mark.fault
def test_the_cost_must_be_named_rightly(shelf, out):
    path = write_hdf5(shelf / "x.hdf5", as_d4rl(make_episodes(), "timeouts"))
    with pytest.raises(BadInput, match=r"x\.hdf5: no array 'infos/cost' \(found: actions, .*needed for the costs"):
        import_sources(TASK, [d4rl(path, "infos/cost")], out)


# -- Minari data sets -------------------------------------------------------------------------------


@pytest.mark.parametrize("with_reset", [True, False])
def test_a_minari_data_set_becomes_the_same_episodes(shelf, out, with_reset):
    episodes = make_episodes()
    begin = [0] if with_reset else []
    infos = lambda e: {"safety": {"cost": np.concatenate([begin, e.costs]).astype(np.float32)}}  # noqa: E731
    write_minari(shelf, "others/ball-v0", episodes, infos)
    source = minari(shelf, "others/ball-v0", "safety/cost")
    index = import_sources(TASK, [source], out)
    assert ids(out) == [episode.id for episode in episodes]
    assert (index[0]["name"], index[0]["format"], index[0]["episodes"]) == ("others/ball-v0", "minari", 3)
    assert set(read_table(out / "rows.parquet")["source"].to_pylist()) == {tree_digest(shelf / "others/ball-v0")}


def test_a_minari_data_set_is_found_where_minari_keeps_them(shelf, out, tmp_path, monkeypatch):
    write_minari(tmp_path / "of-minari", "ball-v0", make_episodes())
    source = minari(tmp_path / "of-minari", "ball-v0", None)
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "of-minari"))
    assert import_sources(TASK, [source], out)[0]["cost"] is None
    assert not read_dsrl(out / "dataset.hdf5").costs.any()


def test_observations_of_parts_are_joined_as_gymnasium_does(shelf, out):
    episodes = make_episodes()
    write_minari(shelf, "parts-v0", episodes, parts=True)
    import_sources(TASK, [minari(shelf, "parts-v0")], out)
    states = read_dsrl(out / "dataset.hdf5").observations
    expected = flat(episodes)["observations"]
    np.testing.assert_array_equal(states, np.concatenate([expected[:, 5:], expected[:, :5]], axis=1))


@pytest.mark.fault
def test_minari_data_sets_that_do_not_fit(shelf, out):
    write_minari(shelf, "a-v0", make_episodes())
    with pytest.raises(BadInput, match=r"a-v0: episode 0: infos have no 'costs' \(they have cost\)"):
        import_sources(TASK, [minari(shelf, "a-v0", "costs")], out)
    with pytest.raises(BadInput, match=r"a-v0: episode 0: observations has shape \(201, 8\); task CarRun needs"):
        import_sources(task("CarRun"), [minari(shelf, "a-v0")], out)
    open_end = make_episodes()
    open_end[2] = change(open_end[2], "timeouts", -1, False)
    write_minari(shelf, "b-v0", open_end)
    with pytest.raises(BadInput, match="b-v0: episode 2: its 200 steps are followed by no"):
        import_sources(TASK, [minari(shelf, "b-v0")], out)
    nan = make_episodes()
    nan[1] = change(nan[1], "costs", 3, np.nan)
    write_minari(shelf, "c-v0", nan)
    with pytest.raises(BadInput, match="c-v0: episode 1: costs are not finite at step 3"):
        import_sources(TASK, [minari(shelf, "c-v0")], out)
    main = shelf / "c-v0" / "data" / "main_data.hdf5"
    main.write_bytes(main.read_bytes()[:-2000])
    with pytest.raises(BadInput, match=r"c-v0: episode .* cannot be read"):
        import_sources(TASK, [minari(shelf, "c-v0")], out)
    (shelf / "d-v0").mkdir()
    with pytest.raises(BadInput, match="d-v0: no Minari data set"):
        import_sources(TASK, [minari(shelf, "d-v0")], out)
    assert not list(out.iterdir())


# -- all formats ------------------------------------------------------------------------------------


@pytest.mark.fault
def test_a_source_from_which_nothing_is_left_is_an_error(shelf, out):
    path = write_hdf5(shelf / "dsrl" / "x.hdf5", flat([change(e, "costs", 0, -1) for e in make_episodes()]))
    everything = r"x\.hdf5: none of its 3 episodes can be imported \(left out: 3 by cost sign\)"
    with pytest.raises(BadInput, match=f"{everything}; .*episode 0: costs are -1"):
        import_sources(TASK, [dsrl(path, faulty="drop")], out)
    assert not list(out.iterdir())


@pytest.mark.fault
def test_a_source_that_is_nowhere_says_where_to_get_it(shelf, out, tmp_path):
    source = Source(task="BallCircle", dsrl=Dsrl(sha256="0" * 64))
    with pytest.raises(BadInput, match=rf"take dsrl/{TASK.data_file} from huggingface\.co/datasets/YYY-45/DSRL"):
        import_sources(TASK, [source], out, tmp_path)


SHA = hashlib.sha256(b"").hexdigest()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"task": "BallCircle"}, "exactly one format of dsrl, minari, d4rl"),
        (
            {"task": "BallCircle", "dsrl": {"sha256": SHA}, "d4rl": {"path": "x", "sha256": SHA, "cost": None}},
            "exactly",
        ),
        ({"task": "BallCircle", "dsrl": {"sha256": SHA, "revison": "0" * 40}}, "dsrl.revison: unknown parameter"),
        ({"task": "BallCircle", "dsrl": {"sha256": SHA, "revision": "main"}}, "name a commit, 40 hexadecimal digits"),
        ({"task": "BallCircle", "dsrl": {"sha256": "abc"}}, "64 hexadecimal digits"),
        ({"task": "BallCircle", "minari": {"path": "x", "sha256": SHA}}, "minari.cost: missing parameter"),
        ({"task": "BallCircle", "d4rl": {"path": "/home/x", "sha256": SHA, "cost": None}}, "must be relative"),
        ({"task": "BallCircle", "d4rl": {"path": "../x", "sha256": SHA, "cost": None}}, "must be relative"),
        ({"task": "BallCircle", "dsrl": {"sha256": SHA, "faulty": "ignore"}}, "'ignore' is not one of 'error', 'drop'"),
    ],
)
def test_parameters_that_make_no_sense_are_named(given, message):
    with pytest.raises(BadInput, match=message):
        load(Source, given, "params.yaml: rl.imports.sources[0]")
