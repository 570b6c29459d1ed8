"""Files that are no sweep: a reason comes out, never anything else, nor much memory."""

from __future__ import annotations

import contextlib
import io
import pickle
import struct
import tracemalloc
import zipfile
from collections.abc import Callable

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.samples import point_columns, point_formats
from pipeline.samples.errors import SampleError
from pipeline.samples.points import decode_sweep
from tests.pipeline.samples.point_files import (
    FILES,
    HEADER,
    LZF,
    NAMES,
    declare,
    expected,
    feather,
    npy,
    npz,
    pcd_binary,
    pcd_compressed,
    pcd_text,
)


def zip_bomb(member: bytes, declared: int | None = None) -> bytes:
    """An archive whose array says that it is large; or whose member truly is."""
    sink = io.BytesIO()
    with zipfile.ZipFile(sink, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("points.npy", member)
    data = sink.getvalue()
    if declared is not None:
        size = struct.pack("<I", len(member))
        data = data.replace(size, struct.pack("<I", declared))
    return data


def npy_header(descr: object, shape: object, order: object = False) -> bytes:
    text = repr({"descr": descr, "fortran_order": order, "shape": shape}).encode()
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text


def feather_bomb() -> bytes:
    """Real columns of zeros, 3 GiB of them, compressed to a small file."""
    zeros = np.zeros(2**14, np.float64)
    small = feather(dict.fromkeys("xyz", zeros), compression="zstd")
    size = struct.pack("<q", zeros.nbytes)
    assert small.count(size) >= 3
    return small.replace(size, struct.pack("<q", 2**30))


HUGE = 2**24 + 1
REFUSED: dict[str, tuple[str, Callable[[], bytes], str]] = {
    "npy pickled": ("npy", lambda: npy(np.array([{}, 1], object)), "bad_type"),
    "npy of pickle": ("npy", lambda: pickle.dumps(expected()), "bad_npy"),
    "npy field of objects": (
        "npy",
        lambda: npy_header([("x", "<f4"), ("y", "|O")], (1,)) + bytes(12),
        "bad_type",
    ),
    "npy nested": (
        "npy",
        lambda: npy(np.zeros(4, [("x", "f4"), ("y", "f4"), ("z", [("a", "f4")])])),
        "bad_type",
    ),
    "npy field of vectors": (
        "npy",
        lambda: npy(np.zeros(4, [("x", "f4"), ("y", "f4"), ("z", "f4", 2)])),
        "bad_type",
    ),
    "npy 1-D": ("npy", lambda: npy(np.zeros(12)), "bad_size"),
    "npy 3-D": ("npy", lambda: npy(np.zeros((2, 2, 3))), "bad_size"),
    "npy scalar": ("npy", lambda: npy(np.array(3.0)), "bad_size"),
    "npy 4 columns": ("npy", lambda: npy(np.zeros((2, 4))), "bad_size"),
    "npy complex": ("npy", lambda: npy(np.zeros((2, 3), complex)), "bad_type"),
    "npy bool": ("npy", lambda: npy(np.zeros((2, 3), bool)), "bad_type"),
    "npy text": ("npy", lambda: npy(np.zeros((2, 3), "U4")), "bad_type"),
    "npy times": ("npy", lambda: npy(np.zeros((2, 3), "M8[ns]")), "bad_type"),
    "npy empty": ("npy", lambda: npy(np.zeros((0, 3))), "empty"),
    "npy cut": ("npy", lambda: npy(np.ones((9, 3)))[:-1], "bad_size"),
    "npy more": ("npy", lambda: npy(np.ones((9, 3))) + b"1", "bad_size"),
    "npy negative": ("npy", lambda: npy_header("<f4", (-1, 3)), "bad_size"),
    "npy negative twice": ("npy", lambda: npy_header("<f4", (-1, -3)), "bad_size"),
    "npy of bools": ("npy", lambda: npy_header("<f4", (True, 3)), "bad_size"),
    "npy huge": ("npy", lambda: npy_header("<f4", (HUGE, 3)), "too_large"),
    "npy wide": ("npy", lambda: npy_header("<f8", (3, 2**60)), "too_large"),
    "npy deep": ("npy", lambda: npy_header("(" * 5000, (1, 3)), "bad_type"),
    "npy code": ("npy", lambda: npy(np.ones((9, 3))).replace(b"(9", b"f("), "bad_npy"),
    "npy brackets": (
        "npy",
        lambda: b"\x93NUMPY\x01\x00" + struct.pack("<H", 9000) + b"(" * 9000,
        "bad_npy",
    ),
    "npy long header": ("npy", lambda: b"\x93NUMPY\x02\0\xff\xff\xff\xff", "bad_npy"),
    "npy version 9": ("npy", lambda: b"\x93NUMPY\x09\0" + bytes(20), "bad_npy"),
    "npy keys": (
        "npy",
        lambda: npy(np.ones((9, 3))).replace(b"shape", b"shame"),
        "bad_npy",
    ),
    "npz no archive": ("npz", lambda: npy(np.ones((9, 3))), "bad_npz"),
    "npz nothing in it": ("npz", lambda: npz(), "missing_column"),
    "npz two arrays": (
        "npz",
        lambda: npz(a=np.ones((9, 3)), b=np.ones((9, 3))),
        "missing_column",
    ),
    "npz columns of two lengths": (
        "npz",
        lambda: npz(x=np.ones(9), y=np.ones(9), z=np.ones(8)),
        "bad_size",
    ),
    "npz columns of columns": (
        "npz",
        lambda: npz(x=np.ones((9, 1)), y=np.ones(9), z=np.ones(9)),
        "bad_type",
    ),
    "npz objects": ("npz", lambda: npz(p=np.array([[{}] * 3], object)), "bad_type"),
    "npz damaged": (
        "npz",
        lambda: npz(p=np.ones((9, 3))).replace(bytes([0xF0, 0x3F]), b"\xf0\x40", 1),
        "bad_npz",
    ),
    "npz huge": ("npz", lambda: zip_bomb(npy_header("<f4", (HUGE, 3))), "too_large"),
    "npz says it is huge": (
        "npz",
        lambda: zip_bomb(npy(np.ones((9, 3))), 2**30),
        "too_large",
    ),
    "npz bzip2": (
        "npz",
        lambda: _archive(npy(np.ones((9, 3))), zipfile.ZIP_BZIP2),
        "bad_npz",
    ),
    "feather version 1": ("feather", lambda: b"FEA1" + bytes(40), "bad_feather"),
    "feather stream": ("feather", lambda: b"\xff\xff\xff\xff" * 9, "bad_feather"),
    "feather magic alone": ("feather", lambda: b"ARROW1\0\0", "bad_feather"),
    "feather without points": (
        "feather",
        lambda: feather({name: np.zeros(0) for name in "xyz"}),
        "empty",
    ),
    "feather text": (
        "feather",
        lambda: feather({"x": [1.0], "y": [1.0], "z": ["a"]}),
        "bad_type",
    ),
    "feather lists": (
        "feather",
        lambda: feather({"x": [1.0], "y": [1.0], "z": [[1.0]]}),
        "bad_type",
    ),
    "feather dictionary": (
        "feather",
        lambda: feather(
            {name: [1.0] for name in "xyz"} | {"s": pa.array(["a"]).dictionary_encode()}
        ),
        "bad_feather",
    ),
    "feather cut": (
        "feather",
        lambda: feather(dict.fromkeys("xyz", np.ones(900)))[:700],
        "bad_feather",
    ),
    "feather bomb": ("feather", feather_bomb, "too_large"),
    "pcd without header": ("pcd", lambda: b"x y z\n1 2 3\n", "bad_pcd"),
    "pcd long header": ("pcd", lambda: b"# no\n" * 9999 + pcd_binary(), "bad_pcd"),
    "pcd cut": ("pcd", lambda: pcd_binary()[:-1], "bad_size"),
    "pcd a point more": ("pcd", lambda: pcd_binary() + bytes(21), "bad_size"),
    "pcd text cut": ("pcd", lambda: pcd_text()[:-30], "bad_size|bad_pcd"),
    "pcd no text": ("pcd", lambda: HEADER.format("ascii").encode(), "bad_size"),
    "pcd words": (
        "pcd",
        lambda: pcd_text().replace(b"3.0", b"three"),
        "bad_pcd",
    ),
    "pcd unknown data": ("pcd", lambda: HEADER.format("zip").encode(), "bad_pcd"),
    "pcd type": ("pcd", lambda: pcd_binary().replace(b"F F F", b"F F X"), "bad_pcd"),
    "pcd size": ("pcd", lambda: pcd_binary().replace(b"SIZE 4", b"SIZE 3"), "bad_pcd"),
    "pcd lengths": ("pcd", lambda: pcd_binary().replace(b"SIZE 4", b"SIZE"), "bad_pcd"),
    "pcd no type": ("pcd", lambda: pcd_binary().replace(b"TYPE", b"TIPE"), "bad_pcd"),
    "pcd no number": (
        "pcd",
        lambda: pcd_binary().replace(b"WIDTH 64", b"WIDTH"),
        "bad",
    ),
    "pcd two of a name": (
        "pcd",
        lambda: pcd_binary().replace(b"intensity t", b"x t", 1),
        "bad_pcd",
    ),
    "pcd negative": (
        "pcd",
        lambda: pcd_binary().replace(b"POINTS 64", b"POINTS -64"),
        "bad_size",
    ),
    "pcd counts differ": (
        "pcd",
        lambda: pcd_binary().replace(b"POINTS 64", b"POINTS 63"),
        "bad_size",
    ),
    "pcd no points": (
        "pcd",
        lambda: pcd_binary().replace(b" 64\n", b" 0\n"),
        "empty",
    ),
    "pcd huge": (
        "pcd",
        lambda: pcd_compressed().replace(b" 64\n", b" 99999999999\n"),
        "too_large",
    ),
    "pcd wide": (
        "pcd",
        lambda: pcd_binary().replace(b"COUNT 1 1 1 1 1", b"COUNT 1 1 1 1 99999999"),
        "too_large",
    ),
    "pcd compressed cut": ("pcd", lambda: pcd_compressed()[:-1], "bad_size"),
    "pcd compressed less": ("pcd", lambda: pcd_compressed(LZF[:-3]), "bad_pcd"),
    "pcd compressed ends early": ("pcd", lambda: pcd_compressed(b"\x20"), "bad_pcd"),
    "pcd compressed before": ("pcd", lambda: pcd_compressed(b"\x20\0"), "bad_pcd"),
    "pcd compressed bomb": (
        "pcd",
        lambda: pcd_compressed(b"\0\0" + b"\xe0\xff\0" * 999_999),
        "bad_pcd",
    ),
    "pcd compressed size": ("pcd", lambda: pcd_compressed(size=2**31), "bad_size"),
    "bin huge": ("bin", lambda: bytes(12 * HUGE), "too_large"),
}


def _archive(member: bytes, compression: int) -> bytes:
    sink = io.BytesIO()
    with zipfile.ZipFile(sink, "w", compression) as archive:
        archive.writestr("points.npy", member)
    return sink.getvalue()


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_sweep_has_a_reason_and_takes_no_memory(name: str) -> None:
    member, make, reason = REFUSED[name]
    data = make()
    config = declare(member, "xyz")
    tracemalloc.start()
    arrow_before = pa.total_allocated_bytes()
    with pytest.raises(SampleError) as raised:
        decode_sweep(data, config)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert any(raised.value.reason.startswith(one) for one in reason.split("|")), str(
        raised.value
    )
    assert len(str(raised.value)) < 400
    assert peak < 8 * 2**20
    assert pa.total_allocated_bytes() - arrow_before < 8 * 2**20


def test_a_bomb_whose_header_is_honest_is_bounded(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    zeros = npz(compressed=True, points=np.zeros((2**17, 3)))
    assert len(zeros) < 2**14
    assert len(decode_sweep(zeros, declare("npz", "xyz")).points) == 2**17
    monkeypatch.setattr(point_columns, "MAX_STORED_BYTES", 2**20)
    with pytest.raises(SampleError, match=r"too_large: 31\d{5} bytes, at most 1048576"):
        decode_sweep(zeros, declare("npz", "xyz"))
    table = feather(dict.fromkeys("xyz", np.zeros(2**17)), compression="zstd")
    with pytest.raises(SampleError, match=r"too_large: 1572864 bytes, at most 1048576"):
        decode_sweep(table, declare("feather", "xyz"))
    monkeypatch.setattr(point_columns, "MAX_POINTS", 2**16)
    raw = feather(dict.fromkeys("xyz", np.zeros(2**17)), compression="uncompressed")
    with pytest.raises(SampleError, match=r"too_large: \d+ points, at most 65536"):
        decode_sweep(raw, declare("feather", "xyz"))


def decode_or_reason(data: bytes, member: str) -> None:
    """Nothing but a sweep or a reason comes out."""
    for columns in (NAMES, ("x", "y", "z")):
        with contextlib.suppress(SampleError):
            sweep = decode_sweep(data, declare(member, columns))
            assert np.isfinite(sweep.points).all()
            assert sweep.points.shape[1] == len(columns)


@pytest.mark.parametrize("member", point_formats.FORMATS)
@given(data=st.binary(max_size=400))
def test_noise_has_a_reason(member: str, data: bytes) -> None:
    starts = {
        "npy": b"\x93NUMPY\x01\0",
        "npz": b"PK\3\4",
        "feather": b"ARROW1\0\0",
        "pcd": b"FIELDS x y z\nSIZE 4 4 4\nTYPE F F F\nWIDTH 9\n"
        b"DATA binary_compressed\n",
    }
    decode_or_reason(data, member)
    decode_or_reason(starts.get(member, b"") + data, member)


@pytest.mark.parametrize("name", FILES)
@given(draw=st.data())
def test_a_damaged_file_has_a_reason_or_other_points(
    name: str, draw: st.DataObject
) -> None:
    member, data = FILES[name]()
    # Damage lies in the header, the body or the end with equal chance.
    places = st.one_of(
        st.integers(0, min(300, len(data) - 1)),
        st.integers(0, len(data) - 1),
        st.integers(max(0, len(data) - 300), len(data) - 1),
    )
    damaged = bytearray(data)
    for _ in range(draw.draw(st.integers(0, 4))):
        damaged[draw.draw(places)] = draw.draw(
            st.one_of(
                st.sampled_from([0, 1, 127, 128, 255, 48, 57]), st.integers(0, 255)
            )
        )
    how = draw.draw(st.sampled_from(["as it is", "cut", "gap", "more"]))
    at, size = draw.draw(places), draw.draw(st.integers(1, 40))
    if how == "cut":
        del damaged[at:]
    elif how == "gap":
        del damaged[at : at + size]
    elif how == "more":
        damaged[at:at] = bytes(size)
    decode_or_reason(bytes(damaged), member)
