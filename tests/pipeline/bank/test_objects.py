"""Block objects against stock readers and writers, and under damage."""

import dataclasses
import itertools
import threading
from concurrent.futures import ThreadPoolExecutor

import google_crc32c
import numcodecs
import numpy as np
import pytest
import tensorstore
import xarray
import zarr
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from manifests.errors import BankError
from manifests.storage import Store
from pipeline.bank.arrays import (
    ArraySpec,
    group_metadata,
    metadata,
    object_name,
    resized,
)
from pipeline.bank.objects import (
    ScatteredObject,
    decode_object,
    encode_object,
    object_crc32c,
    object_size,
)

CODECS = ["none", "lz4", "zstd"]
TYPES = [
    ("uint16", 0x7FC0),
    ("float32", "NaN"),
    ("float16", "NaN"),
    ("int8", -128),
    ("uint32", 2**32 - 1),
    ("bool", False),
]


def make_spec(dtype="uint16", fill=0x7FC0, codec="lz4", row_shape=(3, 4), **changes):
    fields = {
        "path": "t/image/256x256/patch",
        "dtype": dtype,
        "row_shape": row_shape,
        "dimension_names": tuple(f"patch_{axis}" for axis in range(len(row_shape))),
        "block_rows": 8,
        "chunk_rows": 2,
        "codec": codec,
        "fill": fill,
    }
    return ArraySpec(**(fields | changes))


def make_rows(spec, num_used=None, seed=0):
    rng = np.random.default_rng(seed)
    shape = (spec.block_rows, *spec.row_shape)
    rows = rng.integers(0, 100, shape).astype(spec.dtype)
    rows[spec.block_rows if num_used is None else num_used :] = spec.fill_value
    return rows


def joined(parts):
    return b"".join(bytes(part) for part in parts)


def write_array(root, spec, blocks, num_views=1, num_used=None):
    """Writes metadata and objects; ``blocks`` maps (block, view) to rows."""
    num_blocks = 1 + max(block for block, _ in blocks)
    store = Store(str(root))
    rows = num_blocks * spec.block_rows
    store.create(f"{spec.path}/zarr.json", metadata(spec, rows, num_views))
    group = spec.path.rpartition("/")[0]
    store.create(f"{group}/zarr.json", group_metadata({}))
    for (block, view), values in blocks.items():
        used = spec.block_rows if num_used is None else num_used
        parts = encode_object(values, spec, used)
        assert store.create(object_name(spec, block, view), parts)
    return store


def read_tensorstore(path):
    spec = {"driver": "zarr3", "kvstore": {"driver": "file", "path": str(path)}}
    return tensorstore.open(spec, open=True).result().read().result()


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize(("dtype", "fill"), TYPES)
def test_stock_readers_agree(tmp_path, codec, dtype, fill):
    spec = make_spec(dtype, fill, codec)
    keys = list(itertools.product(range(2), range(2)))
    blocks = {key: make_rows(spec, 5, seed) for seed, key in enumerate(keys)}
    write_array(tmp_path, spec, blocks, num_views=2, num_used=5)
    expected = np.stack(
        [
            np.concatenate([blocks[block, view] for block in range(2)])
            for view in (0, 1)
        ],
        axis=1,
    )
    path = tmp_path / spec.path
    np.testing.assert_array_equal(zarr.open_array(path, mode="r")[:], expected)
    np.testing.assert_array_equal(read_tensorstore(path), expected)
    opened = xarray.open_zarr(path.parent, consolidated=False)
    np.testing.assert_array_equal(opened["patch"].values, expected)
    assert opened["patch"].dims == ("sample", "view", *spec.dimension_names)
    for (block, view), rows in blocks.items():
        data = (tmp_path / object_name(spec, block, view)).read_bytes()
        np.testing.assert_array_equal(decode_object(data, spec), rows)


@pytest.mark.parametrize("codec", CODECS)
def test_arrays_without_views(tmp_path, codec):
    spec = make_spec("int64", -1, codec, row_shape=(), has_view=False)
    rows = make_rows(spec)
    write_array(tmp_path, spec, {(0, 0): rows})
    np.testing.assert_array_equal(
        zarr.open_array(tmp_path / spec.path, mode="r")[:], rows
    )


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize(("dtype", "fill"), TYPES)
def test_objects_of_zarr_python_are_the_same_bytes(tmp_path, codec, dtype, fill):
    spec = make_spec(dtype, fill, codec, row_shape=(16, 64))
    rows = make_rows(spec)
    path = tmp_path / spec.path
    path.mkdir(parents=True)
    (path / "zarr.json").write_bytes(metadata(spec, 8, 1))
    array = zarr.open_array(path, mode="r+", config={"write_empty_chunks": True})
    array[:, 0] = rows
    theirs = (tmp_path / object_name(spec, 0)).read_bytes()
    np.testing.assert_array_equal(decode_object(theirs, spec), rows)
    assert theirs == joined(encode_object(rows, spec, 8))


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("num_used", [0, 1, 2, 3, 8])
def test_chunks_of_padding_are_left_out(codec, num_used):
    spec = make_spec("float32", "NaN", codec)
    rows = make_rows(spec, num_used)
    data = joined(encode_object(rows, spec, num_used))
    index = np.frombuffer(data[-(4 * 16 + 4) : -4], "<u8").reshape(4, 2)
    num_stored = -(-num_used // 2)
    assert (index[num_stored:] == 2**64 - 1).all()
    assert (index[:num_stored] < len(data)).all()
    np.testing.assert_array_equal(decode_object(data, spec), rows)


@settings(max_examples=60, deadline=None)
@given(
    codec=st.sampled_from(CODECS),
    chunk_rows=st.sampled_from([1, 2, 3, 4, 6, 12]),
    row_shape=st.lists(st.integers(1, 5), max_size=3),
    num_used=st.integers(0, 12),
    bounds=st.tuples(st.integers(-13, 13), st.integers(-13, 13)),
    seed=st.integers(0, 9),
)
def test_decoding_gives_the_rows_back(
    codec, chunk_rows, row_shape, num_used, bounds, seed
):
    spec = make_spec(
        codec=codec, row_shape=tuple(row_shape), block_rows=12, chunk_rows=chunk_rows
    )
    rows = make_rows(spec, num_used, seed)
    data = joined(encode_object(rows, spec, num_used))
    np.testing.assert_array_equal(decode_object(data, spec), rows)
    part = slice(*bounds)
    out = np.full((len(rows[part]), *row_shape), 7, np.uint16)
    assert decode_object(data, spec, out, part) is out
    np.testing.assert_array_equal(out, rows[part])


@pytest.mark.parametrize("codec", CODECS)
def test_bytes_are_the_same_from_every_thread(codec):
    spec = make_spec(codec=codec, row_shape=(196, 768), chunk_rows=8)
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(8, 196, 768)).astype(np.float32).view(np.uint32) >> 16
    rows = rows.astype(np.uint16)
    numcodecs.blosc.use_threads = True  # as another library may leave it
    assert threading.current_thread() is threading.main_thread()
    made = {joined(encode_object(rows, spec, 8)) for _ in range(4)}
    with ThreadPoolExecutor(2) as pool:
        made |= {
            joined(parts)
            for parts in pool.map(lambda _: encode_object(rows, spec, 8), range(4))
        }
    assert len(made) == 1


def test_size_and_checksum_are_those_of_the_bytes():
    spec = make_spec()
    parts = encode_object(make_rows(spec), spec, 8)
    data = joined(parts)
    assert object_size(parts) == len(data)
    assert object_crc32c(parts) == google_crc32c.value(data[::-1])


@pytest.mark.parametrize("codec", ["none", "lz4", "zstd"])
def test_checksums_tell_sound_objects_apart(codec):
    """Which a crc32c of bytes in their order does not: they end in their own."""
    spec = make_spec(codec=codec)
    rows = make_rows(spec)
    found, plain = set(), set()
    for shift in range(20):
        parts = encode_object(np.roll(rows, shift, axis=-1), spec, 8)
        found.add(object_crc32c(parts))
        plain.add(google_crc32c.value(joined(parts)))
    assert len(plain) == 1
    assert len(found) > 1
    assert len(found) == len(
        {joined(encode_object(np.roll(rows, s, axis=-1), spec, 8)) for s in range(20)}
    )


@given(st.lists(st.binary(max_size=40), max_size=5), st.integers(0, 2**18 + 9))
def test_checksums_are_those_of_the_bytes_turned_round(parts, length):
    parts = [*parts, bytes(np.arange(length, dtype=np.uint8))]
    assert object_crc32c(parts) == google_crc32c.value(b"".join(parts)[::-1])


def test_without_a_codec_nothing_is_copied():
    spec = make_spec(codec="none")
    rows = make_rows(spec)
    first = encode_object(rows, spec, 8)[0]
    assert np.shares_memory(np.frombuffer(first, np.uint8), rows)


def test_rows_in_another_memory_order_are_stored_by_value():
    spec = make_spec(codec="none")
    rows = make_rows(spec)
    turned = np.asfortranarray(rows)
    assert joined(encode_object(turned, spec, 8)) == joined(
        encode_object(rows, spec, 8)
    )


@pytest.mark.parametrize("codec", CODECS)
def test_every_flipped_bit_is_found(codec):
    spec = make_spec(codec=codec)
    rows = make_rows(spec, 5)
    data = joined(encode_object(rows, spec, 5))
    for position in range(8 * len(data)):
        damaged = bytearray(data)
        damaged[position // 8] ^= 1 << position % 8
        with pytest.raises(BankError, match="repair"):
            decode_object(damaged, spec)


@pytest.mark.parametrize("codec", CODECS)
def test_every_truncation_is_found(codec):
    spec = make_spec(codec=codec)
    data = joined(encode_object(make_rows(spec), spec, 8))
    for size in range(len(data)):
        with pytest.raises(BankError, match="repair"):
            decode_object(data[:size], spec)


@settings(deadline=None)
@given(garbage=st.binary(max_size=300))
def test_garbage_is_a_bank_error(garbage):
    with pytest.raises(BankError):
        decode_object(garbage, make_spec())


def sealed(payloads, spec):
    """Returns an object of any payloads with right checksums: a writer's fault."""
    body, index = b"", []
    for payload in payloads:
        index += [len(body), len(payload) + 4]
        body += payload + google_crc32c.value(payload).to_bytes(4, "little")
    entries = np.asarray(index, "<u8").tobytes()
    return body + entries + google_crc32c.value(entries).to_bytes(4, "little")


@pytest.mark.parametrize("codec", CODECS)
@settings(deadline=None)
@given(payload=st.binary(max_size=80))
def test_chunks_that_are_not_the_codecs_are_a_bank_error(codec, payload):
    spec = make_spec(codec=codec)
    # Without a codec any bytes of a chunk's length are a chunk.
    assume(codec != "none" or len(payload) != spec.chunk_bytes)
    magic = b"\x28\xb5\x2f\xfd" if codec == "zstd" else b""
    with pytest.raises(BankError, match="chunk 0"):
        decode_object(sealed([magic + payload] * 4, spec), spec)


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("keep", [0, 1, 12, 15, 17, -1])
def test_chunks_cut_by_their_writer_are_refused(codec, keep):
    spec = make_spec(codec=codec, row_shape=(30, 40))
    whole = bytes(encode_object(make_rows(spec), spec, 8)[0])
    with pytest.raises(BankError, match="chunk 0"):
        decode_object(sealed([whole[:keep]] * 4, spec), spec)
    if codec == "lz4":
        # A decoder that believed the header would read past the end of the chunk.
        with pytest.raises(BankError, match=r"chunk 0 .* no whole lz4 data"):
            decode_object(sealed([whole[:-1]] * 4, spec), spec)


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("row_shape", [(3, 3), (3, 5), (30, 40), (100, 1000)])
def test_an_object_of_another_row_shape_is_refused(codec, row_shape):
    spec = make_spec(codec=codec)
    other = dataclasses.replace(spec, row_shape=row_shape)
    data = joined(encode_object(make_rows(other), other, 8))
    with pytest.raises(BankError, match=r"chunk 0 .* holds"):
        decode_object(data, spec)


def test_an_index_that_points_outside_is_refused():
    spec = make_spec(codec="none")
    entries = np.asarray([0, 2**63] + [2**64 - 1] * 6, "<u8").tobytes()
    data = bytes(100) + entries + google_crc32c.value(entries).to_bytes(4, "little")
    with pytest.raises(BankError, match=r"chunk 0 .* claims bytes"):
        decode_object(data, spec)


@pytest.mark.parametrize(
    "rows",
    [
        np.zeros((7, 3, 4), np.uint16),
        np.zeros((8, 3, 5), np.uint16),
        np.zeros((8, 3, 4), np.int16),
        np.zeros((8, 3, 4), ">u2"),
    ],
)
def test_rows_that_are_not_the_arrays_are_refused(rows):
    with pytest.raises(BankError, match="rows of t/image/256x256/patch must be uint16"):
        encode_object(rows, make_spec(), 7)


def test_used_rows_outside_the_block_are_refused():
    spec = make_spec()
    with pytest.raises(BankError, match="must lie in"):
        encode_object(make_rows(spec), spec, 9)


@pytest.mark.parametrize(
    "out",
    [
        np.zeros((7, 3, 4), np.uint16),
        np.zeros((8, 3, 4), np.int16),
        np.zeros((8, 3, 8), np.uint16)[..., ::2],
        np.broadcast_to(np.uint16(0), (8, 3, 4)),
    ],
)
def test_destinations_that_do_not_fit_are_refused(out):
    spec = make_spec()
    data = joined(encode_object(make_rows(spec), spec, 8))
    with pytest.raises(BankError, match="out for"):
        decode_object(data, spec, out)
    with pytest.raises(BankError, match="without step"):
        decode_object(data, spec, rows=slice(0, 8, 2))


@pytest.mark.parametrize(
    ("dtype", "fill"),
    [("float32", "NaN"), ("float16", "NaN"), ("uint16", 0x7FC0), ("uint32", 2**32 - 1)],
)
def test_a_deleted_object_reads_as_missing_in_stock_zarr(tmp_path, dtype, fill):
    spec = make_spec(dtype, fill)
    store = write_array(
        tmp_path, spec, {(0, 0): make_rows(spec), (1, 0): make_rows(spec)}
    )
    store.delete(object_name(spec, 0))
    array = zarr.open_array(tmp_path / spec.path, mode="r")
    expected = np.full((8, 3, 4), spec.fill_value)
    np.testing.assert_array_equal(array[:8, 0], expected)
    np.testing.assert_array_equal(
        read_tensorstore(tmp_path / spec.path)[:8, 0], expected
    )
    np.testing.assert_array_equal(array[8:, 0], make_rows(spec))


def test_growing_touches_no_object(tmp_path):
    spec = make_spec()
    rows = make_rows(spec)
    store = write_array(tmp_path, spec, {(0, 0): rows})
    before = store.read(object_name(spec, 0))
    grown = resized(store.read(f"{spec.path}/zarr.json"), 24, 3)
    store.replace(f"{spec.path}/zarr.json", grown)
    more = make_rows(spec, seed=1)
    store.create(object_name(spec, 2, 1), encode_object(more, spec, 8))
    assert store.read(object_name(spec, 0)) == before
    array = zarr.open_array(tmp_path / spec.path, mode="r")
    assert array.shape == (24, 3, 3, 4)
    np.testing.assert_array_equal(array[:8, 0], rows)
    np.testing.assert_array_equal(array[16:, 1], more)
    assert (array[8:16] == spec.fill_value).all()


def scatter(data, spec, out):
    scattered = ScatteredObject.plan(len(data), spec, out)
    if scattered is None:
        return None
    position = 0
    for buffer in scattered.buffers:
        buffer[:] = data[position : position + len(buffer)]
        position += len(buffer)
    assert position == len(data)
    return scattered.check()


@pytest.mark.parametrize("num_used", [0, 1, 5, 8])
def test_scattered_reading_equals_decoding(num_used):
    spec = make_spec(codec="none")
    rows = make_rows(spec, num_used)
    data = joined(encode_object(rows, spec, num_used))
    out = np.zeros_like(rows)
    assert scatter(data, spec, out)
    np.testing.assert_array_equal(out, rows)


def test_scattered_reading_finds_every_flipped_bit():
    spec = make_spec(codec="none")
    data = joined(encode_object(make_rows(spec, 5), spec, 5))
    out = np.zeros((8, 3, 4), np.uint16)
    for position in range(8 * len(data)):
        damaged = bytearray(data)
        damaged[position // 8] ^= 1 << position % 8
        with pytest.raises(BankError, match="repair"):
            scatter(bytes(damaged), spec, out)


def test_scattered_reading_leaves_other_layouts_to_decoding():
    spec = make_spec(codec="none")
    rows = make_rows(spec)
    first, second = rows[:2].tobytes(), rows[2:4].tobytes()
    body = b"".join(
        part + google_crc32c.value(part).to_bytes(4, "little")
        for part in (second, first)
    )
    index = [len(first) + 4, len(first) + 4, 0, len(first) + 4] + [2**64 - 1] * 4
    entries = np.asarray(index, "<u8").tobytes()
    data = body + entries + google_crc32c.value(entries).to_bytes(4, "little")
    assert scatter(data, spec, np.zeros_like(rows)) is False
    np.testing.assert_array_equal(decode_object(data, spec)[:4], rows[:4])
    assert scatter(data[:-1], spec, np.zeros_like(rows)) is None
    compressed = make_spec()
    data = joined(encode_object(rows, compressed, 8))
    assert scatter(data, compressed, np.zeros_like(rows)) is None
