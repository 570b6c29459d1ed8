"""Calibration: against points projected by hand, within views, and on real sweeps."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from manifests.inputs import PointsInput
from pipeline.samples.calibration import (
    Calibration,
    calibration_for_view,
    calibration_in_view,
    parse_calibration,
    parse_time,
    project,
)
from pipeline.samples.errors import SampleError
from pipeline.samples.images import image_size
from pipeline.samples.labels import parse_metadata
from pipeline.samples.points import decode_sweep, points_in_view
from pipeline.samples.shards import RowSpan, index_shard, read_samples
from pipeline.samples.views import View, ViewPolicy, draw_view

XYZI = ("x", "y", "z", "intensity")
HEIGHT, WIDTH = 375, 1242
INTRINSICS = [[721.5, 2.0, 609.6], [0.0, 700.25, 172.9], [0.0, 0.0, 1.0]]
LIDAR2CAM = [
    [0.0, -1.0, 0.0, 0.06],
    [0.0, 0.0, -1.0, -0.08],
    [1.0, 0.0, 0.0, -0.27],
    [0.0, 0.0, 0.0, 1.0],
]


@pytest.fixture
def calibration() -> Calibration:
    metadata = {"camera": {"intrinsics": INTRINSICS, "lidar2cam": LIDAR2CAM}}
    return parse_calibration(metadata, "camera")


@pytest.fixture
def points_N4() -> np.ndarray:
    rng = np.random.default_rng(0)
    low, high = [2, -20, -3, 0], [60, 20, 3, 1]
    return rng.uniform(low, high, (1000, 4)).astype(np.float32)


def test_a_point_by_hand(calibration: Calibration) -> None:
    uv, depth = project(np.array([[10.27, -2.0, 1.0], [-5.0, 0.0, 0.0]]), calibration)
    # Camera coordinates (2.06, -1.08, 10).
    assert depth == pytest.approx([10.0, -5.27])
    expected = (721.5 * 0.206 + 2 * -0.108 + 609.6, 700.25 * -0.108 + 172.9)
    assert uv[0] == pytest.approx(expected)
    assert np.isnan(uv[1]).all()


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize(("yaw", "scale"), [(0.0, 1.0), (0.7, 1.0), (-1.3, 1.15)])
def test_points_of_a_view_fall_on_the_pixels_of_the_view(
    calibration: Calibration,
    points_N4: np.ndarray,
    flip: bool,
    yaw: float,
    scale: float,
) -> None:
    box = (100.25, 20.5, 1000.75, 350.0)
    height, width = 224, 448
    view = View(1, flip, yaw, scale, {"cam": box})
    uv, depth = project(points_N4, calibration)
    seen = depth > 0
    expected = (uv - box[:2]) * [width / 900.5, height / 329.5]
    if flip:
        expected[:, 0] = width - expected[:, 0]
    mapped = calibration_for_view(calibration, view, "cam", (height, width))
    uv_view, depth_view = project(points_in_view(points_N4, XYZI, view), mapped)
    np.testing.assert_allclose(uv_view[seen], expected[seen], atol=2e-3)
    np.testing.assert_allclose(depth_view, depth * scale, rtol=1e-5, atol=1e-5)
    # What comes out is an ordinary calibration.
    rotation = mapped.lidar2cam[:3, :3]
    np.testing.assert_allclose(rotation @ rotation.T, np.eye(3), atol=1e-12)
    assert np.linalg.det(rotation) == pytest.approx(1)
    assert mapped.intrinsics[0, 0] > 0
    assert mapped.intrinsics[1, 1] > 0
    if (yaw, scale) == (0.0, 1.0):
        plain = calibration_in_view(calibration, box, flip, (height, width))
        np.testing.assert_allclose(plain.lidar2cam, mapped.lidar2cam)
        np.testing.assert_allclose(plain.intrinsics, mapped.intrinsics)


@pytest.mark.parametrize(
    ("part", "value", "reason"),
    [
        ("intrinsics", None, "bad_calibration"),
        ("intrinsics", [[1, 2], [3, 4]], "bad_calibration"),
        ("intrinsics", [[1, 2, 3], [4, 5], [0, 0, 1]], "bad_calibration"),
        ("intrinsics", [[1, 0, "x"], [0, 1, 0], [0, 0, 1]], "bad_calibration"),
        ("intrinsics", [[1, 0, float("nan")], [0, 1, 0], [0, 0, 1]], "bad_calibration"),
        ("intrinsics", [[1, 0, 0], [0, 1, 0], [0, 0, 2]], "bad_calibration"),
        ("intrinsics", [[-1, 0, 0], [0, 1, 0], [0, 0, 1]], "bad_calibration"),
        ("intrinsics", [[10**400, 0, 0], [0, 1, 0], [0, 0, 1]], "bad_calibration"),
        ("lidar2cam", INTRINSICS, "bad_calibration"),
        ("lidar2cam", np.zeros((4, 4)).tolist(), "bad_calibration"),
        ("lidar2cam", np.diag([1, 1, 0, 1]).tolist(), "bad_calibration"),
        ("lidar2cam", {"a": 1}, "bad_calibration"),
    ],
)
def test_bad_calibrations_have_a_reason(part: str, value: object, reason: str) -> None:
    camera = {"intrinsics": INTRINSICS, "lidar2cam": LIDAR2CAM, part: value}
    with pytest.raises(SampleError) as raised:
        parse_calibration({"camera": camera}, "camera")
    assert raised.value.reason == reason
    with pytest.raises(SampleError, match=r"missing: the metadata has no 'cam.intr"):
        parse_calibration({"camera": camera}, "cam")


def test_a_point_on_the_camera_s_plane_falls_nowhere(calibration: Calibration) -> None:
    tiny = np.nextafter(-LIDAR2CAM[2][3], np.inf)
    uv, depth = project(np.array([[tiny, -1e300, 0.0]]), calibration)
    assert 0 < depth[0] < 1e-12
    assert np.isinf(uv[0, 0])


@pytest.mark.parametrize("value", [1532402927.647951, 0, -12, 5])
def test_a_time_is_seconds(value: float) -> None:
    time = parse_time({"lidar": {"t": value}}, "lidar.t")
    assert isinstance(time, float)
    assert time == value


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        ("1532402927.6", "not_a_number"),
        (True, "not_a_number"),
        (None, "not_a_number"),
        ([1], "not_a_number"),
        (float("nan"), "out_of_range"),
        (float("inf"), "out_of_range"),
        (1532402927647951, "out_of_range"),  # nuScenes writes microseconds
        (10**400, "out_of_range"),
    ],
)
def test_what_is_no_time_has_a_reason(value: object, reason: str) -> None:
    with pytest.raises(SampleError, match=f"^{reason}: ") as raised:
        parse_time({"t": value}, "t")
    assert len(str(raised.value)) < 200
    with pytest.raises(SampleError, match=r"missing: the metadata has no 'lidar.t'"):
        parse_time({"t": value}, "lidar.t")


@pytest.mark.parametrize("name", ["kitti", "nuscenes-percam", "nuscenes"])
def test_real_sweeps_fall_into_real_images_as_counted(
    data_folder: Callable[[str], Path], name: str
) -> None:
    url = str(data_folder("driving") / f"driving-{name}-00000.tar")
    rows = index_shard(url).rows
    span = RowSpan(0, len(rows), 0, rows[-1].offset + rows[-1].size, rows[0].key)
    cameras = ["front_right", "front_left", "back", "back_left", "back_right"]
    extensions = {f"CAM_{camera.upper()}": f"cam_{camera}.jpg" for camera in cameras}
    wanted = frozenset({"bin", "json", "png", "jpg", *extensions.values()})
    policy = ViewPolicy(
        0, (0.4, 1.0), (0.75, 4 / 3), True, 0.5, (0.9, 1.1), {"c": "full"}
    )
    num_checked = 0
    for _, sample in read_samples(url, span, wanted, False):
        metadata = json.loads(sample.members["json"])
        assert parse_metadata(sample.members["json"]) == metadata
        columns = metadata["lidar"]["columns"]
        config = PointsInput(kind="points", member="bin", columns=columns)
        points = decode_sweep(sample.members["bin"], config).points
        assert len(points) == metadata["lidar"]["points"]
        for camera in metadata.get("cameras", ["camera"]):
            path = "camera" if camera == "camera" else f"cameras.{camera}"
            expected = metadata["expected"]
            expected = expected.get(camera, expected)["points_in_image"]
            calibration = parse_calibration(metadata, path)
            image = sample.members.get("png") or sample.members["jpg"]
            image = sample.members.get(extensions.get(camera, ""), image)
            height, width = image_size(image)
            uv, depth = project(points, calibration)
            inside = (depth > 0) & ((uv >= 0) & (uv < [width, height])).all(axis=1)
            assert inside.sum() == expected
            for number in range(1, 5):
                view = draw_view(
                    policy, url, sample.key, number, {"c": (height, width)}
                )
                x0, y0, x1, y1 = view.boxes["c"]
                mapped = calibration_for_view(calibration, view, "c", (128, 256))
                moved = points_in_view(points, columns, view)
                uv_view, _ = project(moved, mapped)
                in_box = (uv - [x0, y0]) * [256 / (x1 - x0), 128 / (y1 - y0)]
                if view.flip:
                    in_box[:, 0] = 256 - in_box[:, 0]
                near = inside & (depth > 1)
                np.testing.assert_allclose(uv_view[near], in_box[near], atol=0.02)
            num_checked += 1
    assert num_checked == {"kitti": 3, "nuscenes-percam": 6, "nuscenes": 6}[name]
