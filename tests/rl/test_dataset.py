"""The two file formats: round trips, equal bytes, and every way a file can be broken."""

import h5py
import numpy as np
import pytest

from springhead.errors import BadInput
from springhead.lineage.digests import arrays_digest, tree_files
from springhead.rl.dataset import EPISODE_KEYS, Dataset, Episode, read_dsrl, write_dsrl, write_minari
from springhead.rl.tasks import task

pytestmark = pytest.mark.unit


def make_episode(length, seed, terminal=False):
    generator = np.random.default_rng(seed)
    states = generator.normal(size=(length + 1, 8)).astype(np.float32)
    ends = np.arange(length) == length - 1
    return Episode(
        observations=states[:-1],
        next_observations=states[1:],
        actions=generator.uniform(-1, 1, (length, 2)).astype(np.float32),
        rewards=generator.normal(size=length).astype(np.float32),
        costs=(generator.random(length) < 0.3).astype(np.float32),
        terminals=ends & terminal,
        timeouts=ends & (not terminal),
    )


@pytest.fixture
def episodes():
    return [make_episode(20, 0), make_episode(7, 1, terminal=True), make_episode(1, 2)]


@pytest.fixture
def file(tmp_path, episodes):
    write_dsrl(tmp_path / "dataset.hdf5", episodes)
    return tmp_path / "dataset.hdf5"


def test_round_trip(file, episodes):
    data = read_dsrl(file)
    assert len(data) == 3
    assert data.num_steps == 28
    assert [e.id for e in data.episodes()] == [e.id for e in episodes]
    assert data.starts.tolist() == [0, 20, 27]
    assert data.ends.tolist() == [20, 27, 28]
    np.testing.assert_allclose(data.episode_returns, [e.episode_return for e in episodes])
    np.testing.assert_allclose(data.cost_returns, [e.cost_return for e in episodes])
    assert [e.length for e in data.episodes()] == [20, 7, 1]


def test_schema_on_disk(file):
    with h5py.File(file) as stored:
        assert set(stored) == set(EPISODE_KEYS)
        for key in EPISODE_KEYS:
            assert stored[key].dtype == (np.bool_ if key in ("terminals", "timeouts") else np.float32)
            assert stored[key].compression == "gzip"
            assert stored[key].fletcher32


def test_an_id_is_the_digest_of_the_seven_arrays(episodes):
    arrays = {key: getattr(episodes[0], key) for key in EPISODE_KEYS}
    assert episodes[0].id == arrays_digest(arrays)
    assert episodes[0].id != arrays_digest({**arrays, "rewards": arrays["rewards"] + np.float32(1e-6)})


def test_both_formats_have_the_same_bytes_when_written_again(tmp_path, episodes, monkeypatch):
    for name in ("first", "second"):
        folder = tmp_path / name
        folder.mkdir()
        monkeypatch.chdir(folder)
        write_dsrl(folder / "dataset.hdf5", episodes)
        write_minari(folder / "minari", "springhead/BallCircle-v0", episodes, task("BallCircle"))
    first, second = tree_files(tmp_path / "first"), tree_files(tmp_path / "second")
    assert first == second
    assert len(first) == 4


@pytest.mark.fault
def test_truncated_file(file):
    content = file.read_bytes()
    file.write_bytes(content[: len(content) * 2 // 3])
    with pytest.raises(BadInput, match=r"dataset\.hdf5.*damaged"):
        read_dsrl(file)


@pytest.mark.fault
def test_flipped_byte_is_caught_by_the_checksum(tmp_path):
    path = tmp_path / "dataset.hdf5"
    write_dsrl(path, [make_episode(500, 3)])
    with h5py.File(path) as stored:
        where = stored["actions"].id.get_chunk_info(0)
    content = bytearray(path.read_bytes())
    content[where.byte_offset + where.size // 2] ^= 0xFF
    path.write_bytes(bytes(content))
    with pytest.raises(BadInput, match=r"dataset\.hdf5: array 'actions' is damaged"):
        read_dsrl(path)


@pytest.mark.fault
@pytest.mark.parametrize("key", EPISODE_KEYS)
def test_missing_array(file, key):
    with h5py.File(file, "a") as stored:
        del stored[key]
    with pytest.raises(BadInput, match=f"no array '{key}'"):
        read_dsrl(file)


def replace(file, key, array):
    with h5py.File(file, "a") as stored:
        del stored[key]
        stored[key] = array


@pytest.mark.fault
def test_arrays_that_do_not_fit_each_other(file):
    replace(file, "rewards", np.zeros(27, dtype=np.float32))
    with pytest.raises(BadInput, match="rewards 27"):
        read_dsrl(file)
    replace(file, "rewards", np.zeros((28, 3), dtype=np.float32))
    with pytest.raises(BadInput, match=r"'rewards' has shape \(28, 3\)"):
        read_dsrl(file)
    replace(file, "rewards", np.array([b"x"] * 28))
    with pytest.raises(BadInput, match="expected numbers"):
        read_dsrl(file)
    replace(file, "rewards", np.zeros((28, 1), dtype=np.float64))  # a shape and type that published files have
    assert read_dsrl(file).rewards.dtype == np.float32
    replace(file, "next_observations", np.zeros((28, 9), dtype=np.float32))
    with pytest.raises(BadInput, match="differ in shape"):
        read_dsrl(file)


@pytest.mark.fault
def test_a_trailing_partial_episode_is_never_dropped(file):
    with h5py.File(file, "a") as stored:
        stored["timeouts"][-1] = False
    with pytest.raises(BadInput, match="steps 27 to 27 belong to an episode without an end"):
        read_dsrl(file)


@pytest.mark.fault
def test_nothing_there(tmp_path):
    with pytest.raises(BadInput, match="no such file"):
        read_dsrl(tmp_path / "dataset.hdf5")
    (tmp_path / "dataset.hdf5").write_text("not HDF5")
    with pytest.raises(BadInput, match="not an HDF5 file"):
        read_dsrl(tmp_path / "dataset.hdf5")
    with pytest.raises(BadInput, match="at least one episode"):
        Dataset.of([])
    with pytest.raises(BadInput, match="no episodes"):
        write_minari(tmp_path / "minari", "springhead/BallCircle-v0", [], task("BallCircle"))
    with h5py.File(tmp_path / "empty.hdf5", "w") as stored:
        for key in EPISODE_KEYS:
            stored[key] = np.zeros((0, 2) if "act" in key or "obs" in key else 0, dtype=np.float32)
        for key in ("terminals", "timeouts"):
            del stored[key]
            stored[key] = np.zeros(0, dtype=np.bool_)
    with pytest.raises(BadInput, match="no steps in the file"):
        read_dsrl(tmp_path / "empty.hdf5")
