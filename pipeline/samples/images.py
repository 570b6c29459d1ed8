"""Images: bytes to upright RGB, and a view of them to an array, the same for everyone.

Rules, so that teachers and students see the same pixels:

- The format is told by the first bytes: JPEG, PNG, WebP, BMP, TIFF, GIF, PPM family.
  Of animations and pages the first is taken.
- EXIF orientation is applied.
- Transparency is composited on white: hidden colours under it are not data.
- 16 bits become 8 by dropping the low byte; 1 bit becomes 0 or 255; palettes are looked
  up; CMYK JPEGs are read as Adobe writes them (inverted).
- A file that is not whole is refused: a JPEG that libjpeg would fill with grey, a PNG
  with fewer rows than it declares or a wrong checksum in a chunk pixels depend on.

Size is bounded from the header, before any pixel is decoded. Pillow's plugins are
called directly, since its own bomb check is a setting of the whole process.
"""

from __future__ import annotations

import io
import re
import struct
import warnings
import zlib
from collections.abc import Iterator
from typing import Literal

import numpy as np
from PIL import Image
from PIL.BmpImagePlugin import BmpImageFile
from PIL.GifImagePlugin import GifImageFile
from PIL.ImageFile import ImageFile
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile
from PIL.PpmImagePlugin import PpmImageFile
from PIL.TiffImagePlugin import TiffImageFile
from PIL.WebPImagePlugin import WebPImageFile

from pipeline.samples.errors import SampleError
from pipeline.samples.photometric import Photometric, change_colours

MAX_PIXELS = 128 * 2**20
"""Most pixels of an image, by its header."""

Interpolation = Literal["bilinear", "bicubic", "lanczos", "nearest"]

_PLUGINS: dict[bytes, type[ImageFile]] = {
    b"\xff\xd8\xff": JpegImageFile,
    b"\x89PNG\r\n\x1a\n": PngImageFile,
    b"BM": BmpImageFile,
    b"II*\0": TiffImageFile,
    b"MM\0*": TiffImageFile,
    b"II+\0": TiffImageFile,
    b"MM\0+": TiffImageFile,
    b"GIF87a": GifImageFile,
    b"GIF89a": GifImageFile,
} | {b"P%d" % kind: PpmImageFile for kind in range(1, 7)}

# What Pillow's plugins raise at bytes that are not what they should be.
_FAULTS = (
    OSError,
    SyntaxError,
    ValueError,
    LookupError,
    TypeError,
    AttributeError,
    ArithmeticError,
    EOFError,
    AssertionError,
    NotImplementedError,
    struct.error,
    zlib.error,
)
# x, y, step in x, step in y of the passes of an interlaced PNG.
_ADAM7 = (
    (0, 0, 8, 8),
    (4, 0, 8, 8),
    (0, 4, 4, 8),
    (2, 0, 4, 4),
    (0, 2, 2, 4),
    (1, 0, 2, 2),
    (0, 1, 1, 2),
)
_QUIET = ("ignore", None, Warning, re.compile(r"PIL(\.|$)"), 0)
_ORIENTATION_TAG = 0x0112
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_FILTERS = {
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
    "nearest": Image.Resampling.NEAREST,
}


def image_size(data: bytes) -> tuple[int, int]:
    """Returns (height, width) of the upright image, from its header alone.

    Raises:
        SampleError: ``empty``, ``undecodable`` or ``too_large``.
    """
    image = _open(data)
    width, height = image.size
    if _orientation(image, data) >= 5:
        width, height = height, width
    return height, width


def load_image(data: bytes) -> ImageFile:
    """Returns the image in ``data`` as it is stored: its own mode, not yet upright.

    Raises:
        SampleError: as ``decode_image``, but for JPEGs that end before their last rows.
    """
    image = _open(data)
    if isinstance(image, PngImageFile):
        _check_png(data)
    try:
        image.load()
        if isinstance(image, PngImageFile) and _is_black_filled(image, data):
            raise SampleError("truncated", "the PNG holds fewer rows than it declares")
    except SampleError:
        raise
    except _FAULTS as error:
        raise _fault(error) from error
    return image


def decode_image(data: bytes) -> Image.Image:
    """Returns the upright RGB image in ``data``, by the rules of this module.

    Raises:
        SampleError: ``empty``, ``undecodable``, ``too_large`` (more than `MAX_PIXELS`,
            known before anything is decoded) or ``truncated``.
    """
    image = load_image(data)
    orientation = _orientation(image, data)
    try:
        rgb = _to_rgb(image)
    except _FAULTS as error:
        raise _fault(error) from error
    if isinstance(image, JpegImageFile) and _is_grey_filled(image, data):
        raise SampleError("truncated", "the JPEG ends before its last rows")
    if orientation in _UPRIGHT:
        rgb = rgb.transpose(_UPRIGHT[orientation])
    return rgb


def resize_view(
    image: Image.Image,
    box: tuple[float, float, float, float],
    flip: bool,
    size: tuple[int, int],
    interpolation: Interpolation,
    photometric: Photometric | None = None,
) -> np.ndarray:
    """Returns a view of an image at one size: a resize, colour changes, the mirror.

    Args:
        image: upright RGB image.
        box: x0, y0, x1, y1 in pixels of ``image``, fractional; Pillow takes it in
            float32. Filters of its border pixels reach a little beyond it, as they do
            where an image is resized and then cropped.
        flip: whether to mirror left and right.
        size: (height, width) of the result.
        interpolation: name of the filter, antialiased when shrinking.
        photometric: colour changes of the view, if it has any.

    Returns:
        uint8 array (height, width, 3), C-contiguous.
    """
    height, width = size
    resized = image.resize((width, height), _FILTERS[interpolation], box=box)
    if photometric is not None:
        resized = change_colours(resized, photometric)
    pixels_HW3 = np.asarray(resized)
    if flip:
        pixels_HW3 = pixels_HW3[:, ::-1]
    return np.array(pixels_HW3, dtype=np.uint8, order="C")


def _open(data: bytes) -> ImageFile:
    """Returns the image with only its header read, of a size that may be decoded."""
    if not data:
        raise SampleError("empty", "the image has 0 bytes")
    make: type[ImageFile] | None
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        make = WebPImageFile
        # Its decoder takes memory for the whole canvas as soon as it is made.
        _check_pixels(*_webp_size(data))
    else:
        make = next(
            (made for magic, made in _PLUGINS.items() if data.startswith(magic)), None
        )
    if make is None:
        raise SampleError(
            "undecodable", f"starts with {data[:8]!r}, no image format known"
        )
    # Pillow warns about metadata, which is not used. The filter is for Pillow alone and
    # stays: taking it back would be a race between threads.
    if warnings.filters[:1] != [_QUIET]:
        warnings.filterwarnings("ignore", module=_QUIET[3].pattern)
    try:
        image = make(io.BytesIO(data))
    except Image.DecompressionBombError as error:
        raise SampleError("too_large", str(error)) from error
    except _FAULTS as error:
        raise _fault(error) from error
    _check_pixels(*image.size)
    return image


def _check_pixels(width: int, height: int) -> None:
    if width * height > MAX_PIXELS:
        raise SampleError(
            "too_large", f"{width} x {height} pixels, at most {MAX_PIXELS} in all"
        )


def _fault(error: BaseException) -> SampleError:
    text = str(error) or type(error).__name__
    is_short = isinstance(error, EOFError) or any(
        word in text.lower() for word in ("truncated", "not enough", "end of")
    )
    return SampleError("truncated" if is_short else "undecodable", text)


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I;16") or (
        image.mode == "I" and isinstance(image, PpmImageFile)
    ):
        high_byte = (np.asarray(image).astype(np.uint32) >> 8).astype(np.uint8)
        return Image.fromarray(high_byte).convert("RGB")
    if image.mode in ("I", "F"):
        raise SampleError("undecodable", f"mode {image.mode} has no agreed white")
    if image.mode in ("RGBA", "LA", "PA", "RGBa") or "transparency" in image.info:
        rgba = image.convert("RGBA")
        white = Image.new("RGBA", rgba.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, rgba).convert("RGB")
    return image.convert("RGB")


def _orientation(image: ImageFile, data: bytes) -> int:
    """Returns the EXIF orientation, 1 to 8; 1 where there is none or it is broken."""
    if isinstance(image, TiffImageFile):
        return 1  # Pillow turns a TIFF itself, and gives its size upright.
    if isinstance(image, PngImageFile):
        # It may stand behind the pixels, where Pillow has not been yet.
        found = [part for kind, part, _ in _png_chunks(data) if kind == b"eXIf"]
        return _exif_orientation(bytes(found[0])) if found else 1
    exif = image.info.get("exif")
    return _exif_orientation(exif) if isinstance(exif, bytes) else 1


def _exif_orientation(exif: bytes) -> int:
    tiff = exif.removeprefix(b"Exif\0\0")
    order = {b"II": "<", b"MM": ">"}.get(tiff[:2])
    if order is None:
        return 1
    try:
        (start,) = struct.unpack_from(order + "I", tiff, 4)
        (num_entries,) = struct.unpack_from(order + "H", tiff, start)
        for number in range(num_entries):
            entry = struct.unpack_from(order + "HHIH", tiff, start + 2 + 12 * number)
            if entry[0] == _ORIENTATION_TAG:
                return entry[3] if 1 <= entry[3] <= 8 else 1
    except struct.error:
        pass
    return 1


def _png_chunks(data: bytes) -> Iterator[tuple[bytes, memoryview, bytes]]:
    """Yields (type, data, stored CRC) of the chunks that are wholly there."""
    view = memoryview(data)
    position = 8
    while position + 12 <= len(data):
        (length,) = struct.unpack_from(">I", data, position)
        kind = data[position + 4 : position + 8]
        end = position + 8 + length
        if end + 4 > len(data):
            return
        yield kind, view[position + 8 : end], data[end : end + 4]
        if kind == b"IEND":
            return
        position = end + 4


def _check_png(data: bytes) -> None:
    """Raises SampleError unless all critical chunks are there and sound."""
    kind = b""
    for kind, part, stored in _png_chunks(data):
        is_critical = not kind[0] & 0x20
        crc = zlib.crc32(part, zlib.crc32(kind))
        if is_critical and stored != crc.to_bytes(4, "big"):
            raise SampleError("undecodable", f"chunk {kind!r} has a wrong checksum")
    if kind != b"IEND":
        raise SampleError("truncated", "the PNG ends before its last chunk")


def _is_black_filled(image: PngImageFile, data: bytes) -> bool:
    """Returns whether a PNG's pixels end early, which Pillow fills with 0 in silence.

    Only where the last row is 0, or rows are interlaced, the pixels are inflated once
    more and counted.
    """
    width, height = image.size
    depth, color, _, _, is_interlaced = data[24:29]
    last_row = image.crop((0, height - 1, width, height))
    if not is_interlaced and any(last_row.tobytes()):
        return False
    bits = depth * {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}[color]
    num_missing = sum(
        len(range(y, height, step_y)) * (1 + -(-columns * bits // 8))
        for x, y, step_x, step_y in (_ADAM7 if is_interlaced else ((0, 0, 1, 1),))
        if (columns := len(range(x, width, step_x)))
    )
    decoder = zlib.decompressobj()
    for kind, part, _ in _png_chunks(data):
        pending: bytes | memoryview = part if kind == b"IDAT" else b""
        while pending and num_missing > 0:
            num_missing -= len(decoder.decompress(pending, 2**18))
            pending = decoder.unconsumed_tail
    return num_missing > 0


def _webp_size(data: bytes) -> tuple[int, int]:
    kind = data[12:16]
    if kind == b"VP8X" and len(data) >= 30:
        width = int.from_bytes(data[24:27], "little") + 1
        return width, int.from_bytes(data[27:30], "little") + 1
    if kind == b"VP8L" and len(data) >= 25:
        bits = int.from_bytes(data[21:25], "little")
        return (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
    if kind == b"VP8 " and len(data) >= 30:
        width, height = struct.unpack_from("<HH", data, 26)
        return width & 0x3FFF, height & 0x3FFF
    raise SampleError("undecodable", "a WebP file without a picture's header")


def _is_grey_filled(image: JpegImageFile, data: bytes) -> bool:
    """Returns whether a JPEG's scan ended early and libjpeg filled up with grey.

    Where a scan ends before its last block (at a marker: a file cut and closed again),
    libjpeg leaves the blocks grey, exactly 128, and only warns, which Pillow drops. If
    the last block is that grey, bytes are put in before the marker: whole scans ignore
    them, short ones decode them.
    """
    width, height = image.size
    corner = image.crop((width - 1 & ~7, height - 1 & ~7, width, height))
    if (np.asarray(corner) != 128).any():
        return False
    end = _scan_end(data)
    if end is None:
        return False
    stuffed = data[:end] + b"\x5a\xc3" * 512 + data[end:]
    try:
        again = JpegImageFile(io.BytesIO(stuffed))
        again.load()
    except _FAULTS:
        return False
    return again.tobytes() != image.tobytes()


def _scan_end(data: bytes) -> int | None:
    """Returns the byte of the marker that ends the first scan of a JPEG."""
    position = 2
    while position + 4 <= len(data) and data[position] == 0xFF:
        marker = data[position + 1]
        if marker == 0xFF:
            position += 1
            continue
        position += 2 + int.from_bytes(data[position + 2 : position + 4], "big")
        if marker == 0xDA:
            while (position := data.find(b"\xff", position)) >= 0:
                following = data[position + 1 : position + 2]
                if following and following[0] not in (0, 0xFF, *range(0xD0, 0xD8)):
                    return position
                position += 1
            return None
    return None
