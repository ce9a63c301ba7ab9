"""The mazes against the package's own simulation and numbers by hand; the planner; data sets it collects."""

import tempfile
from pathlib import Path

import gymnasium
import numpy as np
import pytest

from springhead.errors import BadInput
from springhead.lineage.digests import file_digest
from springhead.rl import conduct, importers, mazes, task_table
from springhead.rl.dsrl_file import read_dsrl
from springhead.rl.envs import make, record, run_episodes
from springhead.rl.mazes import Planner, PlannerSettings, collect, next_cells
from springhead.rl.simulators.point_maze import Layout, PointMazeEnv, layout
from springhead.rl.tasks import task
from springhead.tables import read_table

pytestmark = pytest.mark.unit

MAZES = ("MazeUMaze", "MazeMedium", "MazeLarge")
ROOM = Layout(np.array([[1, 1, 1, 1], [1, 0, 0, 1], [1, 0, 1, 1], [1, 1, 1, 1]]) == 1, (2, 1))


@pytest.fixture(scope="module")
def env():
    made = make("MazeUMaze").unwrapped
    yield made
    made.close()


@pytest.mark.parametrize(
    ("name", "cells", "goal"),
    [("MazeUMaze", 7, (-1, 1)), ("MazeMedium", 26, (2.5, -2.5)), ("MazeLarge", 46, (3.5, -3))],
)
def test_goals_are_the_middles_of_d4rls_goal_cells(name, cells, goal):
    maze = layout(task(name))
    assert maze.goal.tolist() == list(goal)
    assert len(maze.free) == cells
    assert not maze.walls[maze.goal_cell]
    for corner in (-0.49, 0.49):
        assert maze.cells(maze.centres(maze.free) + corner).tolist() == maze.free.tolist()


def test_shortest_ways_are_those_of_all_pairs():
    for maze in (ROOM, *map(layout, map(task, MAZES))):
        cells = maze.free
        apart = np.abs(cells[:, None] - cells[None]).sum(axis=2).astype(float)
        length = np.where(apart <= 1, apart, np.inf)
        for middle in range(len(cells)):  # Floyd and Warshall
            length = np.minimum(length, length[:, middle, None] + length[None, middle])
        following = next_cells(maze)
        for start in range(len(cells)):
            for goal in range(len(cells)):
                step = following[start, goal]
                assert apart[start, step] == (start != goal)
                assert length[step, goal] == max(length[start, goal] - 1, 0)


@pytest.mark.fault
def test_a_cell_behind_walls_is_named():
    walls = np.ones((5, 5), dtype=bool)
    walls[1, 1] = walls[3, 3] = False
    with pytest.raises(BadInput, match=r"the maze's cell \(3, 3\) cannot be reached from cell \(1, 1\)"):
        next_cells(Layout(walls, (1, 1)))


def test_the_task_keeps_its_word():
    seen = conduct.check("MazeUMaze", steps=300, other_process=False)
    assert (seen.steps, seen.ended, seen.episode_cost) == (300, "truncated", 0.0)


def test_an_episode_is_the_packages_own_simulation(env):
    """Under pushes long enough to meet walls and the limit on the speed, which must both have been met."""
    theirs = gymnasium.make(task("MazeUMaze").env_id).unwrapped
    theirs.reset(seed=0)
    ours, _ = env.reset(seed=5)
    point = theirs.point_env
    point.set_state(env._qpos.copy(), env._qvel.copy())
    rng, top, walls = np.random.default_rng(0), 0.0, 0
    try:
        for step in range(300):
            if step % 25 == 0:
                action = rng.uniform(-1.5, 1.5, 2)
            ours, reward, terminated, truncated, info = env.step(action.astype(np.float32))
            expected = point.step(action.astype(np.float32))[0]
            np.testing.assert_allclose(ours, expected, atol=1e-5)
            assert reward == (np.hypot(expected[0] + 1, expected[1] - 1) <= 0.5)
            assert (terminated, truncated, info["cost"]) == (False, False, 0.0)
            top, walls = max(top, np.abs(expected[2:]).max()), walls + point.data.ncon
    finally:
        theirs.close()
    assert top > 4.9
    assert walls > 0


def test_starts_are_all_free_cells_but_the_goals(env):
    starts = np.array([env.reset(seed=seed)[0] for seed in range(300)])
    cells = env.layout.cells(starts[:, :2])
    assert {tuple(cell) for cell in cells.tolist()} == {tuple(c) for c in env.layout.free.tolist()} - {(1, 1)}
    off = starts[:, :2] - env.layout.centres(cells)
    assert 0.09 < np.abs(off).max() <= 0.1001
    assert starts[:, 2:].std() == pytest.approx(0.1, rel=0.15)


def test_an_environment_leaves_no_file_behind(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    PointMazeEnv("MazeUMaze").close()
    assert list(tmp_path.iterdir()) == []
    assert tempfile.tempdir == str(tmp_path)


def test_the_planner_that_knows_the_goal_goes_there_and_stays():
    for name in MAZES:
        (episode,) = run_episodes(name, Planner(task(name), PlannerSettings()), [3], 0.0, 1)
        arrived = int(np.argmax(episode.rewards))
        assert 0 < arrived < 0.8 * task(name).horizon
        assert episode.rewards[arrived:].all()


def test_the_planner_with_random_goals_goes_everywhere_and_never_gets_stuck():
    of = task("MazeLarge")
    episodes = run_episodes(of.name, Planner(of, PlannerSettings(), range(6)), range(6), 0.0, 6)
    maze = layout(of)
    seen = set()
    for episode in episodes:
        places = episode.observations[:, :2]
        seen |= {tuple(cell) for cell in maze.cells(places).tolist()}
        for start in range(0, 700, 100):
            assert np.ptp(places[start : start + 100], axis=0).max() > 0.5
    assert len(seen) > 40
    assert np.abs(np.concatenate([e.actions for e in episodes])).max() == 1.0


def test_an_episode_of_the_planner_is_a_function_of_its_seed_not_of_its_neighbours():
    of = task("MazeUMaze")
    together = run_episodes(of.name, Planner(of, PlannerSettings(), [7, 8]), [7, 8], 0.0, 2)
    alone = run_episodes(of.name, Planner(of, PlannerSettings(), [8]), [8], 0.0, 1)
    assert together[1].id == alone[0].id != together[0].id


def test_a_collected_data_set_is_the_same_bytes_and_says_where_each_episode_came_from(tmp_path, monkeypatch):
    of = task("MazeUMaze")
    done = []
    path = collect(of, 12, 4, tmp_path / "sources" / "dsrl", done=done.append)
    assert done == [10, 12]
    again = collect(of, 12, 4, tmp_path / "again")
    other = collect(of, 12, 5, tmp_path / "other")
    assert file_digest(path) == file_digest(again) != file_digest(other)
    assert file_digest(path.with_name("rows.parquet")) == file_digest(again.with_name("rows.parquet"))
    data, rows = read_dsrl(path), read_table(path.with_name("rows.parquet")).to_pylist()
    assert (len(data), data.num_steps) == (12, 3600)
    assert [row["id"] for row in rows] == [episode.id for episode in data.episodes()]
    assert {row["policy"] for row in rows} == {PlannerSettings().digest} != {PlannerSettings(noise=0.0).digest}
    assert {(row["algorithm"], row["deterministic"], row["source"]) for row in rows} == {("planner", False, None)}
    seed = rows[11]["seed"]
    (replayed,) = run_episodes(of.name, Planner(of, PlannerSettings(), [seed]), [seed], 0.0, 1)
    assert replayed.id == rows[11]["id"]
    # The imports stage takes it as it is.
    monkeypatch.setenv("SPRINGHEAD_SOURCES", str(tmp_path / "sources"))
    source = importers.Source(task=of.name, dsrl=importers.Dsrl(file=path.name, sha256=file_digest(path)))
    (tmp_path / "out").mkdir()
    (entry,) = importers.import_sources(of, [source], tmp_path / "out", tmp_path)
    assert (entry["episodes"], entry["left_out"]) == (12, {})


def test_references_are_means_of_the_two_policies():
    found = mazes.references(task("MazeUMaze"), 3, 0)
    seeds = mazes.episode_seeds(0, 3)
    planned = run_episodes("MazeUMaze", Planner(task("MazeUMaze"), PlannerSettings()), seeds, 0.0)
    assert found["planner"].tolist() == [episode.episode_return for episode in planned]
    assert found["random"].mean() < found["planner"].mean()


def test_scores_span_random_actions_and_the_planner():
    for name in MAZES:
        low, high = task(name).return_range
        assert 0 < low < 0.15 * task(name).horizon
        assert 0.6 * task(name).horizon < high < task(name).horizon


def test_the_page_shows_the_catalogue():
    page = (Path(__file__).parents[2] / "docs/methods/mazes.md").read_text(encoding="utf-8")
    assert "\n".join(task_table.markdown_lines("gymnasium-robotics")) in page


def test_a_maze_is_drawn():
    try:
        pictures, episode = record("MazeUMaze", Planner(task("MazeUMaze"), PlannerSettings()), 1, 0.0, every=150)
    except BadInput as error:
        pytest.skip(str(error))
    assert pictures.shape == (3, 240, 320, 3)
    assert (pictures[0] != pictures[-1]).any()
    assert episode.id == run_episodes("MazeUMaze", Planner(task("MazeUMaze"), PlannerSettings()), [1], 0.0, 1)[0].id


@pytest.mark.fault
@pytest.mark.parametrize(
    ("settings", "message"),
    [({"reach": 0.5}, "reach is 0.5; it must be above 0 and below 0.5"), ({"noise": -1}, "noise must be 0 or more")],
)
def test_bad_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        PlannerSettings(**settings)


@pytest.mark.fault
def test_what_is_no_maze_and_no_episodes_are_refused(tmp_path):
    with pytest.raises(BadInput, match="task BallRun is no maze"):
        collect(task("BallRun"), 1, 0, tmp_path)
    with pytest.raises(BadInput, match="episodes is 0; collect at least 1"):
        collect(task("MazeUMaze"), 0, 0, tmp_path)
