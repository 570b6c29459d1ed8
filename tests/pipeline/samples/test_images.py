"""Decoding: the written rules, against NumPy arrays and Pillow's own opening."""

from __future__ import annotations

import io
import struct
import warnings
import zlib
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from pipeline.samples.errors import SampleError
from pipeline.samples.images import decode_image, image_size, resize_view

HEIGHT, WIDTH = 48, 80
GIF = b"GIF89a" + struct.pack("<HHBBB", 65535, 65535, 0, 0, 0) + b"\x2c"
BMP = b"BM" + bytes(12) + struct.pack("<IiiHHI20x", 40, 50000, 50000, 1, 24, 0)


def gradient() -> np.ndarray:
    """A smooth colour picture, uint8 (48, 80, 3), without mid-grey corners."""
    y, x = np.mgrid[:HEIGHT, :WIDTH]
    return np.stack([x * 3, y * 5, 255 - x - y], axis=-1).astype(np.uint8)


def saved(image: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def png(
    width: int,
    height: int,
    depth: int,
    color: int,
    *chunks: tuple[bytes, bytes],
    interlaced: bool = False,
) -> bytes:
    def chunk(kind: bytes, data: bytes) -> bytes:
        crc = zlib.crc32(kind + data).to_bytes(4, "big")
        return len(data).to_bytes(4, "big") + kind + data + crc

    head = struct.pack(">IIBBBBB", width, height, depth, color, 0, 0, interlaced)
    parts = [(b"IHDR", head), *chunks, (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*part) for part in parts)


@pytest.fixture(scope="module")
def image() -> Image.Image:
    return Image.fromarray(gradient())


@pytest.mark.parametrize("kind", ["PNG", "BMP", "TIFF", "PPM", "WEBP"])
def test_lossless_formats_give_the_pixels(image: Image.Image, kind: str) -> None:
    options = {"lossless": True} if kind == "WEBP" else {}
    data = saved(image, kind, **options)
    decoded = decode_image(data)
    assert decoded.mode == "RGB"
    assert type(decoded) is Image.Image
    np.testing.assert_array_equal(np.asarray(decoded), gradient())
    assert image_size(data) == (HEIGHT, WIDTH)


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"subsampling": 0}])
def test_jpegs_are_what_pillow_makes_of_them(
    image: Image.Image, options: dict[str, Any]
) -> None:
    data = saved(image, "JPEG", **options)
    expected = np.asarray(Image.open(io.BytesIO(data)))
    for tail in (b"", b"\0" * 100, b"trailing garbage \xff\xd9" * 9):
        np.testing.assert_array_equal(np.asarray(decode_image(data + tail)), expected)


def test_other_colours_become_rgb(image: Image.Image) -> None:
    grey = image.convert("L")
    expected = np.repeat(np.asarray(grey)[..., None], 3, axis=2)
    np.testing.assert_array_equal(
        np.asarray(decode_image(saved(grey, "PNG"))), expected
    )

    palette = image.quantize(64)
    data = saved(palette, "PNG")
    expected = np.asarray(palette.convert("RGB"))
    np.testing.assert_array_equal(np.asarray(decode_image(data)), expected)

    bits = grey.convert("1")
    decoded = np.asarray(decode_image(saved(bits, "PNG")))
    assert set(np.unique(decoded)) == {0, 255}

    cmyk = np.asarray(decode_image(saved(image.convert("CMYK"), "JPEG", quality=95)))
    assert np.abs(cmyk.astype(int) - gradient()).mean() < 3


@pytest.mark.parametrize("factor", [257, 256])
def test_16_bits_give_the_8_bit_picture(factor: int) -> None:
    wide = gradient().astype(np.uint16) * factor
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in wide)
    data = png(WIDTH, HEIGHT, 16, 2, (b"IDAT", zlib.compress(rows)))
    np.testing.assert_array_equal(np.asarray(decode_image(data)), gradient())

    grey = wide[..., 0]
    expected = np.repeat(gradient()[..., :1], 3, axis=2)
    pgm = b"P5 %d %d 65535\n" % (WIDTH, HEIGHT) + grey.astype(">u2").tobytes()
    for data in (
        saved(Image.fromarray(grey), "PNG"),
        saved(Image.fromarray(grey), "TIFF"),
        pgm,
    ):
        np.testing.assert_array_equal(np.asarray(decode_image(data)), expected)


def test_transparency_is_composited_on_white(image: Image.Image) -> None:
    alpha = np.full((HEIGHT, WIDTH), 255, np.uint8)
    alpha[:, :20], alpha[:, 20:40] = 0, 102
    data = saved(Image.fromarray(np.dstack([gradient(), alpha])), "PNG")
    decoded = np.asarray(decode_image(data)).astype(int)
    np.testing.assert_array_equal(decoded[:, 40:], gradient()[:, 40:])
    assert (decoded[:, :20] == 255).all()
    blended = gradient()[:, 20:40] * 0.4 + 255 * 0.6
    assert np.abs(decoded[:, 20:40] - blended).max() <= 1

    palette = image.quantize(16)
    palette.info["transparency"] = 3
    decoded = np.asarray(decode_image(saved(palette, "PNG", transparency=3)))
    assert (decoded[np.asarray(palette) == 3] == 255).all()


def test_the_first_frame_of_an_animation_is_taken(image: Image.Image) -> None:
    black = Image.new("RGB", image.size)
    for kind, options in (("PNG", {}), ("WEBP", {"lossless": True}), ("TIFF", {})):
        data = saved(image, kind, save_all=True, append_images=[black], **options)
        np.testing.assert_array_equal(np.asarray(decode_image(data)), gradient())
    gif = saved(image, "GIF", save_all=True, append_images=[black])
    difference = np.asarray(decode_image(gif)).astype(int) - gradient()
    assert np.abs(difference).mean() < 8


@pytest.mark.parametrize("orientation", range(10))
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "TIFF"])
def test_images_are_upright(image: Image.Image, kind: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    lossless = {"lossless": True} if kind == "WEBP" else {}
    plain = np.asarray(Image.open(io.BytesIO(saved(image, kind, **lossless))))
    turns: dict[int, Callable[[np.ndarray], np.ndarray]] = {
        2: lambda a: a[:, ::-1],
        3: lambda a: a[::-1, ::-1],
        4: lambda a: a[::-1],
        5: lambda a: a.swapaxes(0, 1),
        6: lambda a: a.swapaxes(0, 1)[:, ::-1],
        7: lambda a: a[::-1, ::-1].swapaxes(0, 1),
        8: lambda a: a.swapaxes(0, 1)[::-1],
    }
    expected = turns[orientation](plain) if orientation in turns else plain
    data = saved(image, kind, exif=exif, **lossless)
    np.testing.assert_array_equal(np.asarray(decode_image(data)), expected)
    assert image_size(data) == expected.shape[:2]


def test_broken_exif_is_ignored_without_a_word(image: Image.Image) -> None:
    bodies = [
        b"",
        b"junk",
        b"II*\0",
        b"II*\0\xff\xff\xff\xff",
        b"MM\0*\0\0\0\x08\xff\xff",
    ]
    plain = np.asarray(decode_image(saved(image, "JPEG")))
    for body in bodies:
        data = saved(image, "JPEG", exif=b"Exif\0\0" + body)
        start = data.index(b"\xff\xe0")
        length = int.from_bytes(data[start + 2 : start + 4], "big") + 2
        bare = data[:start] + data[start + length :]  # Pillow then reads EXIF for dpi
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            for variant in (data, bare):
                np.testing.assert_array_equal(np.asarray(decode_image(variant)), plain)


def noisy_jpeg(**options: Any) -> bytes:
    noise = np.random.default_rng(0).integers(0, 255, (160, 160, 3), np.uint8)
    return saved(Image.fromarray(noise), "JPEG", **options)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "BMP", "TIFF", "GIF", "PPM", "WEBP"])
def test_images_cut_short_are_refused(image: Image.Image, kind: str) -> None:
    data = saved(image, kind)
    for share in (0.1, 0.5, 0.9):
        with pytest.raises(SampleError) as raised:
            decode_image(data[: int(len(data) * share)])
        assert raised.value.reason in ("truncated", "undecodable")


@pytest.mark.parametrize(
    "options", [{}, {"progressive": True}, {"restart_marker_rows": 1}]
)
@pytest.mark.parametrize("share", [0.5, 0.7, 0.9])
def test_a_cut_jpeg_closed_again_is_not_filled_with_grey(
    options: dict[str, Any], share: float
) -> None:
    data = noisy_jpeg(**options)
    scan = data.index(b"\xff\xda")
    end = data.index(b"\xff\xda", scan + 2) if "progressive" in options else len(data)
    cut = data[: scan + int((end - scan) * share)].rstrip(b"\xff") + b"\xff\xd9"
    with pytest.raises(SampleError, match="truncated"):
        decode_image(cut)
    assert decode_image(data).size == (160, 160)


def test_a_picture_that_is_grey_is_no_cut_picture() -> None:
    grey = Image.new("RGB", (64, 64), (128, 128, 128))
    for options in ({}, {"progressive": True}):
        assert (
            decode_image(saved(grey, "JPEG", **options)).getpixel((63, 63))
            == (128,) * 3
        )


@pytest.mark.parametrize("part", ["IHDR", "IDAT", "IEND"])
def test_wrong_checksums_are_refused_where_pixels_depend_on_them(
    image: Image.Image, part: str
) -> None:
    data = bytearray(saved(image, "PNG"))
    place = data.index(part.encode())
    length = int.from_bytes(data[place - 4 : place], "big")
    data[place + 4 + length] ^= 1
    with pytest.raises(SampleError, match="undecodable"):
        decode_image(bytes(data))


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "RGBA", "I;16"])
@pytest.mark.parametrize("interlaced", [False, True])
def test_a_png_of_too_few_rows_is_not_filled_with_black(
    mode: str, interlaced: bool
) -> None:
    width, height = 21, 13
    depth, color, bits = {
        "1": (1, 0, 1),
        "L": (8, 0, 8),
        "P": (4, 3, 4),
        "RGB": (8, 2, 24),
        "RGBA": (8, 6, 32),
        "I;16": (16, 0, 16),
    }[mode]
    passes = [(0, 0, 1, 1)]
    if interlaced:
        passes = [(0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4)]
        passes += [(0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2)]
    num_bytes = sum(
        len(range(y, height, dy)) * (1 + -(-len(range(x, width, dx)) * bits // 8))
        for x, y, dx, dy in passes
    )
    palette = [(b"PLTE", bytes(range(48)))] if mode == "P" else []
    for missing in (0, 1, num_bytes // 2):
        pixels = (b"IDAT", zlib.compress(bytes(num_bytes - missing)))
        data = png(width, height, depth, color, *palette, pixels, interlaced=interlaced)
        if missing:
            with pytest.raises(SampleError, match="truncated"):
                decode_image(data)
        else:
            assert decode_image(data).size == (width, height)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "empty"),
        (b"this is text", "undecodable"),
        (b"\xff\xd8\xff", "undecodable"),
        (b"RIFF\0\0\0\0WEBPVP8 ", "undecodable"),
        (b"P7\nWIDTH 1", "undecodable"),
        (png(2, 2, 8, 2), "undecodable|truncated"),
        (png(2, 2, 8, 2, (b"IDAT", zlib.compress(b"\0" * 7))), "truncated"),
        (png(0, 2, 8, 2), "undecodable"),
        (png(50_000, 50_000, 8, 2, (b"IDAT", zlib.compress(b""))), "too_large"),
        (png(2**31 - 1, 2**31 - 1, 1, 0, (b"IDAT", b"")), "too_large"),
        (b"P6 60000 60000 255\n", "too_large"),
        (GIF, "too_large|un"),
        (b"RIFF\xff\0\0\0WEBPVP8X\x0a" + bytes(7) + b"\xff" * 6, "too_large"),
        (BMP, "too_large"),
    ],
)
def test_what_is_no_image_has_a_reason(data: bytes, reason: str) -> None:
    for function in (decode_image, image_size):
        if function is image_size and "truncated" in reason:
            continue
        with pytest.raises(SampleError) as raised:
            function(data)
        assert raised.value.reason.startswith(tuple(reason.split("|")))


def test_a_gif_frame_larger_than_its_screen_is_bounded() -> None:
    frame = (
        b"\x2c" + struct.pack("<HHHHB", 0, 0, 65535, 65535, 0) + b"\x02\x02\x4c\x01\0;"
    )
    screen = b"GIF89a" + struct.pack("<HHBBB", 1, 1, 0x80, 0, 0) + bytes(6)
    with pytest.raises(SampleError, match="too_large"):
        decode_image(screen + frame)


def test_large_images_within_the_limit_do_not_warn() -> None:
    data = png(12_000, 10_000, 1, 0, (b"IDAT", zlib.compress(bytes(1501 * 10_000))))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert image_size(data) == (10_000, 12_000)


@settings(max_examples=150, deadline=None)
@given(
    st.sampled_from(["JPEG", "PNG", "BMP", "TIFF", "GIF", "PPM", "WEBP"]),
    st.lists(st.tuples(st.floats(0, 0.999), st.integers(1, 255)), min_size=1),
)
def test_flipped_bytes_give_an_image_or_a_reason(
    kind: str, flips: list[tuple[float, int]]
) -> None:
    data = bytearray(saved(Image.fromarray(gradient()[:20, :20]), kind))
    for place, bits in flips:
        data[int(place * len(data))] ^= bits
    try:
        height, width = image_size(bytes(data))
        if height * width < 2**20:
            decode_image(bytes(data))
        reason = "truncated"
    except SampleError as error:
        reason = error.reason
    assert reason in ("undecodable", "truncated", "too_large")


def test_a_view_is_one_resize_with_a_fractional_box(image: Image.Image) -> None:
    box = (3.25, 1.5, 70.75, 41.0)
    view = resize_view(image, box, False, (24, 32), "bicubic")
    expected = np.asarray(image.resize((32, 24), Image.Resampling.BICUBIC, box=box))
    assert view.dtype == np.uint8
    assert view.flags.c_contiguous
    assert view.flags.writeable
    np.testing.assert_array_equal(view, expected)
    mirrored = resize_view(image, box, True, (24, 32), "bicubic")
    assert mirrored.flags.c_contiguous
    np.testing.assert_array_equal(mirrored, expected[:, ::-1])


def test_a_linear_picture_says_where_a_view_samples(image: Image.Image) -> None:
    """Cell j of W is centred at (j + .5) / W of the box: align_corners=False."""
    view = resize_view(image, (10.5, 4.25, 50.5, 36.25), False, (16, 20), "bilinear")
    x = 10.5 + (np.arange(20) + 0.5) * 2 - 0.5
    y = 4.25 + (np.arange(16) + 0.5) * 2 - 0.5
    assert np.abs(view[:, :, 0] - 3 * x).max() <= 1
    assert np.abs(view[:, :, 1] - 5 * y[:, None]).max() <= 1


@pytest.mark.parametrize("interpolation", ["nearest", "bilinear", "bicubic", "lanczos"])
def test_one_pixel_can_be_viewed(interpolation: Any) -> None:
    one = Image.new("RGB", (1, 1), (255, 0, 7))
    view = resize_view(one, (0.2, 0.1, 0.9, 0.7), True, (8, 8), interpolation)
    assert (view == [255, 0, 7]).all()
