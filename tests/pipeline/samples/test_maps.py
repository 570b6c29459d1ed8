"""Label maps: the numbers that were stored, and the nearest of them in a view."""

from __future__ import annotations

import io
import struct
import zlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from pipeline.samples.errors import SampleError
from pipeline.samples.maps import decode_map, map_in_view


def encode(image: Image.Image, kind: str = "PNG") -> bytes:
    sink = io.BytesIO()
    image.save(sink, kind)
    return sink.getvalue()


def grey_png(values: np.ndarray, bits: int) -> bytes:
    """A greyscale PNG of any depth, by the PNG specification (sections 5, 7.2, 11)."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        crc = zlib.crc32(kind + data)
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", crc)

    lines = b""
    for row in values:
        text = "".join(format(int(value), f"0{bits}b") for value in row)
        text += "0" * (-len(text) % 8)
        lines += b"\0" + int(text, 2).to_bytes(len(text) // 8, "big")
    height, width = values.shape
    header = struct.pack(">IIBBBBB", width, height, bits, 0, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(lines))
        + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize("bits", [1, 2, 4, 8, 16])
def test_grey_values_are_what_was_stored(bits):
    """Pillow stretches shallow ones over 0..255: class 1 of 2 would become 255."""
    values = np.random.default_rng(bits).integers(0, 2**bits, (5, 7))
    values[0, :2] = 0, 2**bits - 1
    np.testing.assert_array_equal(
        np.asarray(decode_map(grey_png(values, bits))), values
    )


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_a_palette_gives_its_indices(bits):
    values = np.random.default_rng(bits).integers(0, 2**bits, (6, 9), np.uint8)
    image = Image.fromarray(values)
    image.putpalette(np.random.default_rng(1).bytes(768))
    sink = io.BytesIO()
    image.save(sink, "PNG", bits=bits)
    np.testing.assert_array_equal(np.asarray(decode_map(sink.getvalue())), values)


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "LA"])
def test_colours_are_no_map(mode):
    with pytest.raises(
        SampleError, match=f"a label map has one number a pixel, got mode {mode}"
    ) as caught:
        decode_map(encode(Image.new(mode, (4, 3))))
    assert caught.value.reason == "not_a_map"


@pytest.mark.parametrize(
    ("data", "code"),
    [(b"", "empty"), (b"GIF89a nothing", "undecodable"), (None, "truncated")],
)
def test_damage_is_named(data, code):
    whole = encode(Image.fromarray(np.arange(64, dtype=np.uint8).reshape(8, 8)))
    with pytest.raises(SampleError) as caught:
        decode_map(whole[:-20] if data is None else data)
    assert caught.value.reason == code


def nearest(values, box, image_size, flip, size):
    """The pixel of the map that each centre falls into, by arithmetic."""
    height, width = values.shape
    down, across = height / image_size[0], width / image_size[1]
    x = (box[0] + (np.arange(size[1]) + 0.5) * (box[2] - box[0]) / size[1]) * across
    y = (box[1] + (np.arange(size[0]) + 0.5) * (box[3] - box[1]) / size[0]) * down
    found = values[np.floor(y).astype(int)[:, None], np.floor(x).astype(int)[None]]
    # Centres that fall on a border between two pixels may go to either.
    unsure = (np.abs(y - np.round(y)) < 1e-3)[:, None] | (
        np.abs(x - np.round(x)) < 1e-3
    )
    if flip:
        found, unsure = found[:, ::-1], unsure[:, ::-1]
    return found, unsure


@given(
    st.integers(1, 40),
    st.integers(1, 40),
    st.integers(1, 33),
    st.integers(1, 33),
    st.booleans(),
    st.sampled_from([1, 2, 0.5]),
    st.integers(0, 2**32),
    st.sampled_from([np.uint8, np.uint16]),
)
def test_a_view_takes_the_nearest_pixel(
    height, width, rows, columns, flip, resolution, seed, dtype
):
    rng = np.random.default_rng(seed)
    values = rng.integers(0, np.iinfo(dtype).max, (height, width), dtype)
    size = max(1, int(height / resolution)), max(1, int(width / resolution))
    x0, y0 = rng.uniform(0, 0.5) * size[1], rng.uniform(0, 0.5) * size[0]
    box = (x0, y0, rng.uniform(0.6, 1) * size[1], rng.uniform(0.6, 1) * size[0])
    label = decode_map(encode(Image.fromarray(values)))
    found = map_in_view(label, box, size, flip, (rows, columns))
    expected, unsure = nearest(values, box, size, flip, (rows, columns))
    assert found.dtype == np.int32
    assert found.shape == (rows, columns)
    assert found.flags.c_contiguous
    np.testing.assert_array_equal(found[~unsure], expected[~unsure])
    assert set(found.ravel().tolist()) <= set(values.ravel().tolist())


def test_the_whole_image_at_its_own_size_is_the_map():
    values = np.random.default_rng(0).integers(0, 2**16, (9, 13), np.uint16)
    label = decode_map(encode(Image.fromarray(values)))
    box = (0.0, 0.0, 13.0, 9.0)
    np.testing.assert_array_equal(
        map_in_view(label, box, (9, 13), False, (9, 13)), values
    )
    mirrored = map_in_view(label, box, (9, 13), True, (9, 13))
    np.testing.assert_array_equal(mirrored, values[:, ::-1])
