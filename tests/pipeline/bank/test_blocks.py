"""Reading blocks: what is checked, and that local and remote stores agree."""

import os
import threading
import uuid

import numpy as np
import pytest

from manifests.errors import BankError, StorageError
from manifests.storage import Store
from manifests.teacher import OutputConfig
from pipeline.bank import blocks
from pipeline.bank.arrays import object_name
from pipeline.bank.blocks import BankArray, BlockMaps, read_block, read_values
from pipeline.bank.encodings import make_encoding
from pipeline.bank.objects import encode_object, object_crc32c, object_size

ROWS = 6


@pytest.fixture(params=["local", "memory"])
def store(request, tmp_path):
    if request.param == "local":
        return Store(str(tmp_path))
    return Store(f"memory://{uuid.uuid4().hex}")


def write(store, encoding, values, num_used=ROWS, keys=((0, 0),)):
    """Stores the values at each (block, view); returns suffix -> BankArray."""
    encoded = encoding.encode(values, np.arange(ROWS) < num_used)
    arrays = {}
    for suffix, spec in zip(encoding.suffixes, encoding.arrays("t", ROWS), strict=True):
        parts = encode_object(encoded.arrays[suffix], spec, num_used)
        for block, view in keys:
            store.create(object_name(spec, block, view), parts)
        committed = dict.fromkeys(keys, (object_size(parts), object_crc32c(parts)))
        arrays[suffix] = BankArray(
            store, spec, lambda block, view, known=committed: known.get((block, view))
        )
    return arrays


def make(preset, shape=(4, 5, 3), dtype="float32"):
    config = OutputConfig(encoding=preset, topk=2 if preset == "topk" else None)
    kind = "grid" if len(shape) == 3 else "vector"
    return make_encoding(config, name="out", kind=kind, shape=shape, dtype=dtype)


@pytest.fixture
def values():
    return np.random.default_rng(0).normal(size=(ROWS, 4, 5, 3)).astype(np.float32)


@pytest.mark.parametrize("preset", ["raw", "lossless", "half"])
@pytest.mark.parametrize("num_used", [ROWS, 4])
def test_blocks_come_back(store, values, preset, num_used):
    encoding = make(preset)
    arrays = write(store, encoding, values, num_used, keys=[(0, 0), (3, 2)])
    expected = values.astype("float16" if preset == "half" else "float32")
    expected[num_used:] = np.nan
    out = np.zeros_like(expected)
    assert read_block(arrays[""], 3, 2, out=out) is out
    np.testing.assert_array_equal(out, expected)
    np.testing.assert_array_equal(read_block(arrays[""], 0), expected)
    decoded = read_values(encoding, arrays, 3, 2)
    assert decoded.dtype == np.float32
    np.testing.assert_array_equal(decoded, expected.astype(np.float32))


def test_outputs_of_several_arrays_come_back(store, values):
    encoding = make("topk")
    arrays = write(store, encoding, values, 5)
    decoded = read_values(encoding, arrays, 0)
    top = np.sort(values[:5], axis=-1)[..., 1:]
    np.testing.assert_array_equal(np.sort(decoded[:5], axis=-1)[..., 1:], top)
    assert np.isnan(decoded[5]).all()


def test_a_block_without_a_commit_is_refused(store, values):
    arrays = write(store, make("raw"), values)
    with pytest.raises(
        BankError,
        match=r"must be committed .* \(array t/out, block 1, view 0\); run precompute",
    ):
        read_block(arrays[""], 1)


@pytest.mark.parametrize("preset", ["raw", "lossless"])
def test_a_deleted_object_is_refused_by_name(store, values, preset):
    arrays = write(store, make(preset), values)
    store.delete("t/out/c.0.0.0.0.0")
    with pytest.raises(
        BankError,
        match=r"must have the committed \d+ bytes, got no object; .*"
        r"\(array t/out, block 0, view 0\)",
    ):
        read_block(arrays[""], 0)


@pytest.mark.parametrize("preset", ["raw", "lossless"])
@pytest.mark.parametrize("change", ["cut", "empty", "longer"])
def test_an_object_of_another_size_is_refused(store, values, preset, change):
    arrays = write(store, make(preset), values)
    data = store.read("t/out/c.0.0.0.0.0")
    changed = {"cut": data[:-1], "empty": b"", "longer": data + b"x"}[change]
    store.replace("t/out/c.0.0.0.0.0", changed)
    with pytest.raises(
        BankError, match=f"the committed {len(data)} bytes, got {len(changed)} bytes"
    ):
        read_block(arrays[""], 0)


@pytest.mark.parametrize("preset", ["raw", "lossless"])
@pytest.mark.parametrize("position", [0, 100, -30, -1])
def test_damage_is_refused_by_name(store, values, preset, position):
    arrays = write(store, make(preset), values)
    data = bytearray(store.read("t/out/c.0.0.0.0.0"))
    data[position] ^= 4
    store.replace("t/out/c.0.0.0.0.0", bytes(data))
    with pytest.raises(BankError, match=r"\(array t/out, block 0, view 0\)"):
        read_block(arrays[""], 0)


def test_a_destination_that_does_not_fit_is_refused(store, values):
    arrays = write(store, make("raw"), values)
    with pytest.raises(BankError, match="out for t/out must be"):
        read_block(arrays[""], 0, out=np.zeros((ROWS, 4, 5, 2), np.float32))


def test_a_store_that_cannot_be_read_is_a_storage_error(tmp_path, values):
    arrays = write(Store(str(tmp_path)), make("raw"), values)
    path = tmp_path / "t/out/c.0.0.0.0.0"
    path.unlink()
    path.symlink_to(path)
    with pytest.raises(StorageError, match="cannot read"):
        read_block(arrays[""], 0)


def test_buffers_are_reused_within_a_thread_and_never_shared():
    first = blocks._buffer(1000)
    assert np.shares_memory(np.frombuffer(first, np.uint8), blocks._buffer(10))
    seen = []
    thread = threading.Thread(target=lambda: seen.append(blocks._buffer(1000)))
    thread.start()
    thread.join()
    assert not np.shares_memory(np.frombuffer(first, np.uint8), seen[0])


def test_short_reads_and_many_buffers_are_put_together(tmp_path, monkeypatch):
    data = np.random.default_rng(0).bytes(5000)
    (tmp_path / "object").write_bytes(data)
    real = os.preadv
    monkeypatch.setattr(blocks, "_MAX_BUFFERS", 3)
    monkeypatch.setattr(
        blocks.os, "preadv", lambda fd, parts, at: real(fd, [parts[0][:7]], at)
    )
    joined = bytearray(5000)
    view = memoryview(joined)
    handle = os.open(tmp_path / "object", os.O_RDONLY)
    try:
        blocks._read_into(handle, [view[:1], view[1:3000], view[3000:]])
        assert joined == data
        with pytest.raises(BankError, match="ends at byte 5000"):
            blocks._read_into(handle, [view, memoryview(bytearray(1))])
    finally:
        os.close(handle)


def taken(found, rows):
    out = np.zeros((len(rows), 4, 5, 3), np.float32)
    found.take(np.asarray(rows), out)
    return out


@pytest.mark.parametrize("num_used", [ROWS, 4])
def test_a_plain_local_block_is_mapped_once(tmp_path, values, num_used):
    array = write(Store(str(tmp_path)), make("raw"), values, num_used)[""]
    maps = BlockMaps()
    found = maps.get(array, 0)
    np.testing.assert_array_equal(taken(found, [3, 0, 3]), values[[3, 0, 3]])
    assert maps.get(array, 0) is found


def test_few_maps_are_kept(tmp_path, values):
    keys = [(block, 0) for block in range(3)]
    array = write(Store(str(tmp_path)), make("raw"), values, keys=keys)[""]
    maps = BlockMaps(limit=2)
    first = [maps.get(array, block) for block in range(3)]
    assert maps.get(array, 2) is first[2]
    assert maps.get(array, 0) is not first[0]
    # Whoever still looks at a map that was dropped sees what was there.
    np.testing.assert_array_equal(taken(first[0], [1]), values[[1]])


def test_what_cannot_be_mapped_is_left_to_reading(store, values):
    maps = BlockMaps()
    lossless = write(store, make("lossless"), values)[""]
    assert maps.get(lossless, 0) is None
    assert maps.get(lossless, 5) is None
    raw = write(Store(f"memory://{uuid.uuid4().hex}"), make("raw"), values)[""]
    assert maps.get(raw, 0) is None


@pytest.mark.parametrize("position", [10, -30])
@pytest.mark.parametrize("is_mapped_before", [False, True])
def test_a_damaged_block_is_not_mapped(tmp_path, values, position, is_mapped_before):
    array = write(Store(str(tmp_path)), make("raw"), values)[""]
    maps = BlockMaps()
    if is_mapped_before:
        assert maps.get(array, 0) is not None
    path = tmp_path / object_name(array.spec, 0, 0)
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.unlink()
    path.write_bytes(data)
    with pytest.raises(BankError, match=r"array t/out, block 0, view 0"):
        maps.get(array, 0)
    path.unlink()
    path.write_bytes(data[:-1])
    with pytest.raises(BankError, match=r"must have the committed \d+ bytes"):
        maps.get(array, 0)
