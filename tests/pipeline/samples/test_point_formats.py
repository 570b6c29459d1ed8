"""Formats of sweeps: what other libraries wrote is read back, and who may add one."""

from __future__ import annotations

import zlib
from importlib.metadata import EntryPoint
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from manifests.errors import ManifestError
from manifests.inputs import PointsInput
from pipeline.samples import point_formats
from pipeline.samples.errors import SampleError
from pipeline.samples.pcd_files import decompress_lzf
from pipeline.samples.point_formats import check_formats
from pipeline.samples.points import decode_sweep
from tests.pipeline.samples.point_files import FILES, declare, expected, feather, npy


@pytest.mark.parametrize("name", FILES)
def test_every_format_gives_the_same_points(name: str) -> None:
    member, data = FILES[name]()
    sweep = decode_sweep(data, declare(f"lidar.{member}", intensity_max=255.0))
    np.testing.assert_array_equal(sweep.points, expected(intensity_max=255.0))
    assert sweep.points.dtype == np.float32
    assert sweep.points.flags.writeable
    assert sweep.stored is None
    named = decode_sweep(data, declare("lidar", format=member))
    np.testing.assert_array_equal(named.points, expected())


@pytest.mark.parametrize(
    "name",
    [n for n in FILES if n.startswith(("feather", "pcd")) or "field" in n or "by" in n],
)
def test_named_columns_are_chosen_in_the_declared_order(name: str) -> None:
    member, data = FILES[name]()
    chosen = ("t", "z", "x", "y")
    sweep = decode_sweep(data, declare(member, chosen))
    np.testing.assert_array_equal(sweep.points, expected(chosen))
    with pytest.raises(SampleError, match=r"missing_column: no column 'ring', it has "):
        decode_sweep(data, declare(member, (*chosen, "ring")))


@pytest.mark.parametrize(
    "dtype", ["f2", "f4", "f8", "i1", "i2", "i4", "i8", "u1", "u8"]
)
def test_any_float_and_int_is_read(dtype: str) -> None:
    rows = np.arange(12).reshape(4, 3).astype(dtype)
    config = declare("npy", ("x", "y", "z"))
    np.testing.assert_array_equal(decode_sweep(npy(rows), config).points, rows)


def test_argoverse_2_as_it_is_published() -> None:
    """Half-float coordinates, a byte of intensity: the types of the dataset's files."""
    rng = np.random.default_rng(0)
    table = {name: rng.normal(0, 30, 500).astype(np.float16) for name in "xyz"}
    table["intensity"] = rng.integers(0, 256, 500, dtype=np.uint8)
    table["laser_number"] = rng.integers(0, 64, 500, dtype=np.uint8)
    table["offset_ns"] = rng.integers(0, 10**8, 500, dtype=np.int32)
    config = declare("feather", tuple(table), intensity_max=255.0)
    sweep = decode_sweep(feather(table, compression="lz4"), config)
    for number, name in enumerate(table):
        wanted = table[name].astype(np.float32) / (255 if name == "intensity" else 1)
        np.testing.assert_array_equal(sweep.points[:, number], wanted)


def test_nulls_and_what_float32_cannot_hold_are_dropped_and_counted() -> None:
    x = [1.0, None, 3.0, 1e300, 5.0]
    table = {"x": x, "y": [1.0] * 5, "z": [2.0] * 5, "ring": [0, 1, None, 3, 4]}
    sweep = decode_sweep(feather(table), declare("feather", tuple(table)))
    np.testing.assert_array_equal(sweep.points[:, 0], [1, 5])
    np.testing.assert_array_equal(sweep.points[:, 3], [0, 4])
    assert sweep.num_dropped == 3
    np.testing.assert_array_equal(sweep.stored, [0, 4])


def test_old_and_padded_pcd_headers_are_read() -> None:
    """Without VERSION, COUNT, HEIGHT and POINTS, and with fields of several values."""
    head = (
        "COLUMNS x _ y z normal\nSIZE 4 1 4 4 4\nTYPE F U F F F\nCOUNT 1 3 1 1 2\n"
        "WIDTH 2\nDATA binary\n"
    )
    kinds = [("x", "<f4"), ("pad", "V3"), ("y", "<f4"), ("z", "<f4"), ("n", "<f4", 2)]
    rows = np.zeros(2, kinds)
    rows["x"], rows["y"], rows["z"] = [1, 2], [3, 4], [5, 6]
    config = declare("pcd", ("x", "y", "z"))
    sweep = decode_sweep(head.encode() + rows.tobytes(), config)
    np.testing.assert_array_equal(sweep.points, [[1, 3, 5], [2, 4, 6]])
    text = head.replace("binary", "ascii") + "1 0 0 0 3 5 9 9\n\n2 0 0 0 4 nan 9 9\n"
    sweep = decode_sweep(text.encode(), config)
    np.testing.assert_array_equal(sweep.points, [[1, 3, 5]])
    assert sweep.num_dropped == 1
    with pytest.raises(SampleError, match="bad_type: 'normal' has 2 values"):
        decode_sweep(text.encode(), declare("pcd", ("x", "y", "z", "normal")))


def compress_lzf(data: bytes) -> bytes:
    """An LZF stream of some data: what repeats one of the last 8 KiB is referred to."""
    out, literals, at = bytearray(), bytearray(), 0

    def flush() -> None:
        for start in range(0, len(literals), 32):
            part = literals[start : start + 32]
            out.extend([len(part) - 1, *part])
        literals.clear()

    while at < len(data):
        found = data.rfind(data[at : at + 3], max(0, at - 8192), at + 2)
        if found < 0 or at + 3 > len(data):
            literals.append(data[at])
            at += 1
            continue
        length = 3
        while length < 264 and data[at + length : at + length + 1] == (
            data[found + length : found + length + 1] or None
        ):
            length += 1
        flush()
        back = at - found - 1
        if length < 9:
            out.append((length - 2) << 5 | back >> 8)
        else:
            out.extend([7 << 5 | back >> 8, length - 9])
        out.append(back & 255)
        at += length
    flush()
    return bytes(out)


@given(st.lists(st.sampled_from([b"a", b"ab", b"abc" * 9, b"\0" * 300, b"xyz"])))
def test_compression_is_undone(parts: list[bytes]) -> None:
    data = b"".join(parts)
    assert decompress_lzf(compress_lzf(data), len(data)) == data


def test_another_package_may_add_a_format(monkeypatch: pytest.MonkeyPatch) -> None:
    def read_sum(data: bytes) -> dict[str, np.ndarray]:
        rows = np.frombuffer(zlib.decompress(data), "<i2").reshape(-1, 3)
        return {name: rows[:, i] / 100 for i, name in enumerate("xyz")}

    class Added(EntryPoint):
        def load(self) -> Any:
            if self.value == "absent:read":
                raise ImportError("No module named 'absent'")
            return read_sum

    points = {
        name: Added(name, value, point_formats.ENTRY_POINTS)
        for name, value in (("centi", "added:read"), ("broken", "absent:read"))
    }
    monkeypatch.setattr(point_formats, "_added", lambda: points)
    point_formats._load.cache_clear()
    rows = np.arange(12, dtype="<i2").reshape(4, 3)
    config = declare("lidar.centi", "zyx")
    sweep = decode_sweep(zlib.compress(rows.tobytes()), config)
    np.testing.assert_allclose(sweep.points, rows[:, ::-1] / 100, rtol=1e-6)
    with pytest.raises(SampleError, match="bad_centi: cannot reshape"):
        decode_sweep(zlib.compress(bytes(2)), config)
    with pytest.raises(SampleError, match="missing_column: no column 'ring'"):
        decode_sweep(zlib.compress(bytes(6)), declare("centi", ("x", "y", "z", "ring")))
    with pytest.raises(
        ManifestError, match=r"^inputs.lidar.format 'broken' must be readable by absent"
    ):
        check_formats("lidar", declare("bin", "xyz", format="broken"))
    point_formats._load.cache_clear()


def test_an_unknown_format_is_refused_by_name() -> None:
    check_formats("lidar", declare("velodyne", format="bin"))
    with pytest.raises(
        ManifestError,
        match=r"^inputs.lidar.format must be one of bin, npy, npz, feather, pcd, got "
        r"'fether'; .*entry point of teachonce.points\); did you mean feather\?$",
    ):
        check_formats("lidar", declare("bin", format="fether"))
    either = PointsInput(kind="points", member=["bin", "velodyne"])
    with pytest.raises(
        ManifestError,
        match=r"^inputs.lidar.format must be given .* got member 'velodyne'",
    ):
        check_formats("lidar", either)
