"""DSRL's file format: round trips, equal bytes, reading in pieces, and every way a file can be broken."""

import dataclasses
import errno
import resource
import tracemalloc

import h5py
import numpy as np
import pytest

from springhead.errors import BadInput
from springhead.lineage.digests import arrays_digest, tree_files
from springhead.rl import dsrl_file
from springhead.rl.dataset import EPISODE_KEYS, Dataset, Episode, iter_episodes, read_dsrl, write_dsrl, write_minari
from springhead.rl.hdf5 import fletcher32
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


def test_sub_costs_are_an_array_of_their_own(tmp_path, episodes):
    path = tmp_path / "dataset.hdf5"
    parts = [np.stack([e.costs, e.costs * 0.5], axis=1) for e in episodes]
    with_parts = [dataclasses.replace(e, sub_costs=part) for e, part in zip(episodes, parts, strict=True)]
    write_dsrl(path, with_parts, ("boundary", "velocity"))
    with h5py.File(path) as stored:
        assert list(stored["sub_costs"].attrs["names"]) == ["boundary", "velocity"]
    assert [e.id for e in read_dsrl(path).episodes()] == [e.id for e in with_parts] != [e.id for e in episodes]
    assert [e.id for e in iter_episodes(path)] == [e.id for e in with_parts]
    assert with_parts[0].sub_cost_returns == pytest.approx([episodes[0].cost_return, episodes[0].cost_return / 2])
    with pytest.raises(BadInput, match="1 of 3 episodes have no sub_costs"):
        write_dsrl(path, [*with_parts[:2], episodes[2]])


def published(path, episodes, chunks, **filters):
    """A file as others write them: other types and shapes, other chunks and filters."""
    data = Dataset.of(episodes)
    with h5py.File(path, "w") as stored:
        for key in EPISODE_KEYS:
            array = getattr(data, key)
            if array.ndim == 1:
                array = array[:, None].astype(np.uint8 if array.dtype == bool else np.float64)
            shape = None if chunks is None else chunks if chunks is True else (chunks, min(3, array.shape[1]))
            stored.create_dataset(key, data=array, chunks=shape, **filters)


@pytest.mark.parametrize(
    ("chunks", "filters"),
    [
        (None, {}),
        (True, {"compression": "gzip"}),
        (7, {"compression": "gzip", "shuffle": True, "fletcher32": True}),
        (5, {"fletcher32": True}),
        (7, {"compression": "lzf"}),
        (9, {"scaleoffset": None, "compression": "gzip", "compression_opts": 9}),
    ],
)
def test_other_layouts_are_read_alike_by_both_readers(tmp_path, episodes, chunks, filters):
    published(tmp_path / "other.hdf5", episodes, chunks, **filters)
    expected = [e.id for e in episodes]
    assert [e.id for e in read_dsrl(tmp_path / "other.hdf5").episodes()] == expected
    assert [e.id for e in iter_episodes(tmp_path / "other.hdf5", 8)] == expected


def test_chunks_that_were_never_written_hold_the_fill_value(file):
    with h5py.File(file, "a") as stored:
        del stored["costs"]
        stored.create_dataset("costs", (28,), np.float32, chunks=(10,), fillvalue=2.0, compression="gzip")
        stored["costs"][:10] = 1.0
    assert read_dsrl(file).costs.tolist() == [1.0] * 10 + [2.0] * 18


@pytest.mark.parametrize("size", [0, 1, 2, 3, 511, 512, 513, 4096, 100_001])
def test_fletcher32_is_the_one_of_hdf5(tmp_path, size):
    content = np.random.default_rng(size).integers(0, 256, size, dtype=np.uint8)
    for array in (content, np.zeros(size, np.uint8), np.full(size, 255, np.uint8)):
        if not size:
            assert fletcher32(array.tobytes()) == 0
            continue
        with h5py.File(tmp_path / "x.hdf5", "w") as stored:
            made = stored.create_dataset("x", data=array, chunks=array.shape, fletcher32=True)
            raw = made.id.read_direct_chunk((0,))[1]
        assert fletcher32(raw[:-4]) == int.from_bytes(raw[-4:], "little")


@pytest.fixture(scope="module")
def long_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("long") / "dataset.hdf5"
    episodes = [make_episode(397, seed) for seed in range(400)]
    write_dsrl(path, episodes)
    return path, [e.id for e in episodes]


def test_episodes_longer_than_a_block_and_across_blocks(long_file):
    path, ids = long_file
    assert len(ids) * 397 > 2 * dsrl_file.BLOCK_ROWS
    assert [e.id for e in read_dsrl(path).episodes()] == ids
    for block in (3970, 5000, 100_000):
        assert [e.id for e in iter_episodes(path, block)] == ids


def test_reading_in_pieces_holds_a_few_pieces(long_file):
    path, ids = long_file
    row = 8 * 4 * 2 + 2 * 4 + 4 * 2 + 2  # bytes of one step
    block = 2 * 4096
    tracemalloc.start()
    try:
        seen = sum(1 for _ in iter_episodes(path, block))
        in_pieces = tracemalloc.get_traced_memory()[1]
        tracemalloc.reset_peak()
        read_dsrl(path)
        whole = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert seen == len(ids)
    assert whole > len(ids) * 397 * row  # the measure sees arrays
    assert in_pieces < 4 * block * row < whole / 3


def test_writing_holds_two_blocks_beside_the_episodes(tmp_path, long_file):
    episodes = read_dsrl(long_file[0]).episodes()
    row = 8 * 4 * 2 + 2 * 4 + 4 * 2 + 2
    tracemalloc.start()
    try:
        write_dsrl(tmp_path / "again.hdf5", episodes)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert (tmp_path / "again.hdf5").read_bytes() == long_file[0].read_bytes()
    assert peak < 2.5 * dsrl_file.BLOCK_ROWS * row


@pytest.mark.fault("F12")
@pytest.mark.parametrize("room", [0, 100, 3_000, 40_000, 400_000, 3_000_000])
def test_a_full_disk_is_an_error_and_leaves_nothing(tmp_path, long_file, room):
    episodes = read_dsrl(long_file[0]).episodes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, hard))
    try:
        with pytest.raises(OSError, match=r"dataset\.hdf5") as caught:
            write_dsrl(tmp_path / "dataset.hdf5", episodes)
        with pytest.raises(OSError, match=r"main_data\.hdf5"):
            write_minari(tmp_path, "springhead/BallCircle-v0", episodes, task("BallCircle"))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert caught.value.errno == errno.EFBIG
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []
    write_dsrl(tmp_path / "dataset.hdf5", episodes)
    assert (tmp_path / "dataset.hdf5").read_bytes() == long_file[0].read_bytes()


@pytest.mark.fault("F9")
def test_every_flipped_byte_of_a_chunk_is_caught_by_both_readers(tmp_path):
    path = tmp_path / "dataset.hdf5"
    write_dsrl(path, [make_episode(60, 3)])
    content = path.read_bytes()
    with h5py.File(path) as stored:
        where = stored["rewards"].id.get_chunk_info(0)
    for at in range(where.byte_offset, where.byte_offset + where.size, 7):
        path.write_bytes(content[:at] + bytes([content[at] ^ 0x10]) + content[at + 1 :])
        with pytest.raises(BadInput, match=r"dataset\.hdf5: array 'rewards' is damaged"):
            read_dsrl(path)
        with pytest.raises(BadInput, match=r"dataset\.hdf5: array 'rewards' is damaged"):
            list(iter_episodes(path))


@pytest.mark.fault
def test_reading_in_pieces_finds_the_cut_end(file):
    with h5py.File(file, "a") as stored:
        stored["timeouts"][-1] = False
    found = []
    with pytest.raises(BadInput, match="steps 27 to 27 belong to an episode without an end"):
        found.extend(iter_episodes(file, 10))
