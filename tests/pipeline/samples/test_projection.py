"""The point table: against points projected one by one, views, and counts of others."""

from __future__ import annotations

import json
import math
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from manifests.inputs import PointsInput
from pipeline.samples.calibration import (
    Calibration,
    calibration_for_view,
    parse_calibration,
    project,
)
from pipeline.samples.points import decode_sweep, points_in_view
from pipeline.samples.projection import (
    Camera,
    PointTable,
    ZBuffer,
    project_sweep,
)
from pipeline.samples.views import View

HEIGHT, WIDTH = 90, 160
INTRINSICS = np.array([[80.0, 1.5, 81.0], [0, 75.0, 44.0], [0, 0, 1]])


def looking(yaw: float) -> Calibration:
    """A camera at the LiDAR's place, a little lower, that looks along a heading."""
    cosine, sine = math.cos(yaw), math.sin(yaw)
    axes = [[sine, -cosine, 0], [0, 0, -1], [cosine, sine, 0]]
    lidar2cam = np.eye(4)
    lidar2cam[:3, :3] = axes
    lidar2cam[:3, 3] = [0.1, -0.3, 0.2]
    return Calibration(INTRINSICS, lidar2cam)


@pytest.fixture
def points_N4() -> np.ndarray:
    rng = np.random.default_rng(0)
    low, high = [-40, -40, -3, 0], [40, 40, 8, 1]
    return rng.uniform(low, high, (2000, 4)).astype(np.float32)


@pytest.fixture
def rig() -> dict[str, Camera | None]:
    return {
        "front": Camera(looking(0.0), (HEIGHT, WIDTH), 10.25),
        "absent": None,
        "left": Camera(looking(1.2), (HEIGHT, WIDTH)),
    }


def by_hand(
    points: np.ndarray, camera: Camera, min_depth: float = 0.0
) -> dict[int, tuple[float, float, float]]:
    """Index to (u, v, depth) of the points a camera sees, one by one."""
    found = {}
    for number, point in enumerate(points[:, :3].tolist()):
        x, y, z = (
            sum(a * b for a, b in zip(row[:3], point, strict=True)) + row[3]
            for row in camera.calibration.lidar2cam[:3].tolist()
        )
        if z <= min_depth:
            continue
        (fx, skew, cx), (_, fy, cy), _ = camera.calibration.intrinsics.tolist()
        u, v = (fx * x + skew * y) / z + cx, fy * y / z + cy
        if 0 <= u < camera.size[1] and 0 <= v < camera.size[0]:
            found[number] = (u, v, z)
    return found


@pytest.mark.parametrize("min_depth", [0.0, 12.0])
def test_the_table_has_what_each_camera_sees(
    points_N4: np.ndarray, rig: dict[str, Camera | None], min_depth: float
) -> None:
    table = project_sweep(points_N4, rig, time=10.0, min_depth_m=min_depth)
    assert table.cameras == ("front", "absent", "left")
    assert table.hidden is None
    assert set(table.camera.tolist()) == {0, 2}
    num_lines = 0
    for number, camera in ((0, rig["front"]), (2, rig["left"])):
        assert camera is not None
        expected = by_hand(points_N4, camera, min_depth)
        one = table.where(table.camera == number)
        assert one.index.tolist() == list(expected)
        seen = np.column_stack([one.u, one.v, one.depth])
        np.testing.assert_allclose(seen, list(expected.values()), rtol=1e-9)
        num_lines += len(expected)
    assert len(table) == num_lines > 200
    np.testing.assert_array_equal(table.dt[table.camera == 0], 0.25)
    assert np.isnan(table.dt[table.camera == 2]).all()
    unknown = project_sweep(points_N4, rig)
    assert np.isnan(unknown.dt).all()


def test_the_border_belongs_to_the_first_pixel_only() -> None:
    camera = Camera(Calibration(np.eye(3), np.eye(4)), (2, 4))
    points = np.array(
        [[0, 0, 1], [4, 0, 1], [0, 2, 1], [3.999, 1.999, 1], [-1e-9, 0, 1], [1, 1, -1]]
    )
    assert project_sweep(points, {"cam": camera}).index.tolist() == [0, 3]


def test_numbers_are_those_of_the_sweep_as_stored(
    points_N4: np.ndarray, rig: dict[str, Camera | None]
) -> None:
    whole = points_N4.copy()
    whole[5:700:3, 1] = np.nan
    config = PointsInput(kind="points", member="bin")
    sweep = decode_sweep(whole.astype("<f4").tobytes(), config)
    assert sweep.num_dropped == len(range(5, 700, 3))
    table = project_sweep(sweep.points, rig, stored=sweep.stored)
    assert np.isfinite(whole[table.index]).all()
    uv, depth = project(whole[table.index], looking(0.0))
    is_front = table.camera == 0
    np.testing.assert_array_equal(table.u[is_front], uv[is_front, 0])
    np.testing.assert_array_equal(table.depth[is_front], depth[is_front])
    left_out = project_sweep(points_N4, rig)
    kept = ~np.isin(left_out.index, np.arange(5, 700, 3))
    np.testing.assert_array_equal(left_out.index[kept], table.index)


BOX = (20.25, 10.5, 140.0, 83.75)


@given(
    flip=st.booleans(),
    yaw=st.floats(-math.pi, math.pi),
    scale=st.floats(0.8, 1.25),
    size=st.sampled_from([(64, 128), (7, 5), (224, 224)]),
)
def test_a_view_of_the_table_is_the_table_of_the_view(
    flip: bool, yaw: float, scale: float, size: tuple[int, int]
) -> None:
    """Moving the table is projecting moved points with the camera of the view."""
    rng = np.random.default_rng(1)
    points = rng.uniform([2, -40, -3], [40, 40, 8], (800, 3)).astype(np.float32)
    camera = Camera(looking(0.1), (HEIGHT, WIDTH), 3.0)
    view = View(1, flip, yaw, scale, {"cam": BOX})
    table = project_sweep(points, {"cam": camera}, time=2.0).in_view(view, "cam", size)
    moved = points_in_view(points, ("x", "y", "z"), view)
    mapped = calibration_for_view(camera.calibration, view, "cam", size)
    expected = project_sweep(moved, {"cam": Camera(mapped, size)})
    # Points move as float32: one at the very edge may fall on its other side.
    common, at, of = np.intersect1d(table.index, expected.index, return_indices=True)
    assert len(common) > 100
    assert len(table) + len(expected) - 2 * len(common) <= 2
    for name, atol in (("u", 2e-2), ("v", 2e-2), ("depth", 1e-4)):
        mine, theirs = getattr(table, name)[at], getattr(expected, name)[of]
        np.testing.assert_allclose(mine, theirs, rtol=1e-5, atol=atol, err_msg=name)
    assert (table.dt == 1).all()


def test_a_view_without_a_size_is_in_upright_pixels(
    points_N4: np.ndarray, rig: dict[str, Camera | None]
) -> None:
    table = project_sweep(points_N4, rig)
    view = View(0, False, 0.0, 1.0, {"front": BOX, "left": (0, 0, WIDTH, HEIGHT)})
    whole = table.in_view(view, "left")
    is_left = table.camera == 2
    np.testing.assert_array_equal(whole.u, table.u[is_left])
    np.testing.assert_array_equal(whole.camera, 2)
    part = table.in_view(view, "front")
    inside = (table.camera == 0) & (table.u >= BOX[0]) & (table.u < BOX[2])
    inside &= (table.v >= BOX[1]) & (table.v < BOX[3])
    np.testing.assert_array_equal(part.index, table.index[inside])
    np.testing.assert_allclose(part.u, table.u[inside] - BOX[0])
    joined = PointTable.joined([part, whole], table.cameras)
    assert len(joined) == len(part) + len(whole)
    assert joined.camera.tolist() == [0] * len(part) + [2] * len(whole)
    for name in ("absent", "nose"):
        with pytest.raises(ValueError, match=rf"camera must be one of .* got {name}"):
            table.in_view(view, name)


def test_no_camera_sees_nothing() -> None:
    table = project_sweep(np.ones((3, 3)), {"a": None}, occlusion=ZBuffer())
    assert (len(table), table.cameras) == (0, ("a",))
    behind = {"a": Camera(looking(0.0), (HEIGHT, WIDTH))}
    table = project_sweep(np.array([[-5.0, 0, 0]]), behind, occlusion=ZBuffer())
    assert len(table) == 0
    assert table.index.dtype == table.camera.dtype == np.int64


def test_a_point_behind_another_is_hidden() -> None:
    camera = Camera(Calibration(INTRINSICS, np.eye(4)), (HEIGHT, WIDTH))

    def at(u: float, v: float, depth: float) -> list[float]:
        """The point that falls there."""
        y = (v - 44.0) / 75.0
        return [depth * (u - 81.0 - 1.5 * y) / 80.0, depth * y, depth]

    points = [at(20, 20, 5), at(22, 22, 5.4), at(23, 17, 5.6), at(25, 20, 30)]
    points.append(at(60, 60, 50))
    table = project_sweep(np.array(points), {"cam": camera}, occlusion=ZBuffer(8, 0.5))
    assert table.hidden is not None
    assert table.hidden.tolist() == [False, False, True, False, False]
    wide = project_sweep(np.array(points), {"cam": camera}, occlusion=ZBuffer(160, 1))
    assert wide.hidden is not None
    assert wide.hidden.tolist() == [False, False, False, True, True]
    seen = wide.where(~wide.hidden).in_view(View(0, False, 0, 1, {"cam": BOX}), "cam")
    assert seen.index.tolist() == [1, 2]
    assert seen.hidden is not None
    assert not seen.hidden.any()


def test_hidden_points_against_a_search_of_all_pairs(
    points_N4: np.ndarray, rig: dict[str, Camera | None]
) -> None:
    table = project_sweep(points_N4, rig, occlusion=ZBuffer(13.5, 2.0))
    cells = np.stack([table.camera, table.u // 13.5, table.v // 13.5], axis=1)
    same = (cells[:, None] == cells[None]).all(axis=2)
    in_front = table.depth[None] < table.depth[:, None] - 2.0
    np.testing.assert_array_equal(table.hidden, (same & in_front).any(axis=1))
    assert table.hidden is not None
    assert 0.05 < table.hidden.mean() < 0.95


@pytest.mark.parametrize("name", ["kitti", "nuscenes-percam", "nuscenes"])
def test_real_sweeps_are_counted_as_expected(
    data_folder: Callable[[str], Path], name: str
) -> None:
    num_cameras = 0
    with tarfile.open(data_folder("driving") / f"driving-{name}-00000.tar") as tar:
        files = {member.name: member for member in tar.getmembers()}
        for path in [path for path in files if path.endswith(".json")]:
            found = [tar.extractfile(path), tar.extractfile(path[:-4] + "bin")]
            document, data = (one.read() for one in found if one is not None)
            metadata = json.loads(document)
            columns = tuple(metadata["lidar"]["columns"])
            config = PointsInput(kind="points", member="bin", columns=columns)
            sweep = decode_sweep(data, config)
            expected = metadata["expected"]
            rig = metadata.get("cameras") or {"camera": metadata["camera"]}
            cameras: dict[str, Camera | None] = {}
            for camera, known in rig.items():
                where = f"cameras.{camera}" if "cameras" in metadata else camera
                calibration = parse_calibration(metadata, where)
                size = (known["height"], known["width"])
                cameras[camera] = Camera(calibration, size)
            table = project_sweep(sweep.points, cameras, stored=sweep.stored)
            counts = np.bincount(table.camera, minlength=len(cameras)).tolist()
            assert counts == [
                expected.get(camera, expected)["points_in_image"] for camera in cameras
            ]
            num_cameras += len(cameras)
    assert num_cameras == {"kitti": 3, "nuscenes-percam": 6, "nuscenes": 6}[name]
