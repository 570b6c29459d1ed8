"""Camera and LiDAR see one world: checked with a projection written here."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from teachonce.demo.lidar import project
from teachonce.demo.objects import CLASSES, Label, Shape
from teachonce.demo.samples import DemoSample, make_sample
from teachonce.demo.scenes import SceneOptions
from teachonce.demo.truth import BEV_CELL_M, BEV_CELLS, BEV_X_M, BEV_Y_M

#: What the fixture ``samples`` is drawn from.
SEED = 7


def _project(
    points: NDArray[np.float64], camera: dict[str, Any]
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
    """Returns u, v, depth, from the stored calibration alone."""
    homogeneous = np.concatenate([points[:, :3], np.ones((len(points), 1))], axis=1)
    x, y, z = (homogeneous @ np.array(camera["lidar2cam"]).T)[:, :3].T
    k = camera["intrinsics"]
    return k[0][0] * x / z + k[0][2], k[1][1] * y / z + k[1][2], z


def _in_image(
    sample: DemoSample,
) -> tuple[
    NDArray[np.float64], NDArray[np.float64], NDArray[np.float64], NDArray[np.intp]
]:
    """Returns u, v, depth and number of the stored points that fall into the image."""
    members = sample.members()
    record = json.loads(members["json"])
    points = np.frombuffer(members["bin"], "<f4").reshape(-1, 5).astype(np.float64)
    assert record["lidar"]["points"] == len(points)
    with np.errstate(divide="ignore", invalid="ignore"):
        u, v, z = _project(points, record["camera"])
    width, height = record["camera"]["width"], record["camera"]["height"]
    kept = np.flatnonzero((z > 0) & (u >= 0) & (u < width) & (v >= 0) & (v < height))
    assert record["expected"]["points_in_image"] == len(kept)
    return u[kept], v[kept], z[kept], kept


def test_lidar_agrees_with_the_depth_map(samples: list[DemoSample]) -> None:
    """At least 97 % of the points, where a pixel may be off by one at edges."""
    agreeing, total = 0, 0
    for sample in samples:
        u, v, z, _ = _in_image(sample)
        depth = np.pad(sample.depth_HW.astype(np.float64) / 100, 1, mode="edge")
        depth[depth == 0] = np.inf
        row, column = v.astype(int), u.astype(int)
        near = np.stack(
            [depth[row + i, column + j] for i in range(3) for j in range(3)]
        )
        slack = 0.08
        agrees = (z > near.min(axis=0) - slack) & (z < near.max(axis=0) + slack)
        agreeing, total = agreeing + int(agrees.sum()), total + len(z)
        assert agrees.mean() > 0.93
    assert agreeing / total >= 0.97


def test_lidar_noise_is_two_centimetres_on_the_ground(
    samples: list[DemoSample],
) -> None:
    sample = samples[5]
    ground = np.isin(sample.point_label_P, [1, 2, 3, 4])
    points = sample.points_P5[ground].astype(np.float64)
    exact = -sample.scene.rig.lidar_height_m / points[:, 2]
    error = np.linalg.norm(points[:, :3], axis=1) * (1 - exact)
    assert 0.018 < error.std() < 0.022
    assert abs(error.mean()) < 0.002


def test_point_labels_match_the_image(samples: list[DemoSample]) -> None:
    agreeing, total = 0, 0
    for sample in samples:
        u, v, _, number = _in_image(sample)
        seg = np.pad(sample.seg_HW, 1, mode="edge")
        row, column = v.astype(int), u.astype(int)
        label = sample.point_label_P[number]
        near = [seg[row + i, column + j] == label for i in range(3) for j in range(3)]
        agreeing += int(np.logical_or.reduce(near).sum())
        total += len(label)
    assert agreeing / total >= 0.97


def test_project_is_the_projection_of_the_record(samples: list[DemoSample]) -> None:
    sample = samples[0]
    u, v, z, kept = _in_image(sample)
    rig = sample.scene.rig
    places, is_in = project(
        sample.points_P5, rig.intrinsics_33, rig.lidar2cam_44, *sample.seg_HW.shape
    )
    assert np.array_equal(np.flatnonzero(is_in), kept)
    np.testing.assert_allclose(places[is_in], np.stack([u, v, z], axis=1), rtol=1e-9)


def test_calibration_is_rigid_and_looks_ahead(samples: list[DemoSample]) -> None:
    transforms = [np.array(s.metadata()["camera"]["lidar2cam"]) for s in samples]
    for transform in transforms:
        turn = transform[:3, :3]
        np.testing.assert_allclose(turn @ turn.T, np.eye(3), atol=1e-12)
        assert math.isclose(np.linalg.det(turn), 1.0)
        place = -turn.T @ transform[:3, 3]
        np.testing.assert_allclose(place, [0.3, 0.0, -0.15], atol=0.07)
        # 20 m ahead lies near the middle of the image, left is left, up is up.
        ahead, left, up = (
            turn @ np.array(p) for p in ([20, 0, 0], [20, 5, 0], [20, 0, 5])
        )
        assert ahead[2] > 19.5
        assert left[0] < ahead[0]
        assert up[1] < ahead[1]
    assert len({transform.tobytes() for transform in transforms}) == len(transforms)


def test_sweep_is_a_full_turn_of_all_rings(samples: list[DemoSample]) -> None:
    for sample in samples:
        points = sample.points_P5
        assert points.dtype == np.float32
        assert np.isfinite(points).all()
        assert len(points) <= 32 * 512
        azimuth = np.degrees(np.arctan2(points[:, 1], points[:, 0]))
        assert set(np.floor(azimuth / 45).astype(int)) == set(range(-4, 4))
        assert set(points[:, 4]) >= set(range(20))
        assert points[:, 3].min() >= 0
        assert points[:, 3].max() <= 255
        # The ring's elevation is what the point's own coordinates say.
        rise = np.degrees(
            np.arctan2(points[:, 2], np.hypot(points[:, 0], points[:, 1]))
        )
        np.testing.assert_allclose(rise, -25 + points[:, 4] * 33 / 31, atol=0.01)


def test_ground_materials_have_one_reflectivity_but_paint(
    samples: list[DemoSample],
) -> None:
    bright: dict[int, list[float]] = {}
    for sample in samples:
        for label in (Label.ROAD, Label.PAVEMENT, Label.TERRAIN, Label.MARKING):
            chosen = sample.point_label_P == label
            bright.setdefault(label, []).extend(sample.points_P5[chosen, 3].tolist())
    means = {label: float(np.mean(values)) for label, values in bright.items()}
    plain = [means[label] for label in (Label.ROAD, Label.PAVEMENT, Label.TERRAIN)]
    assert max(plain) - min(plain) < 1.0
    assert means[Label.MARKING] > 2 * max(plain)


def test_map_is_the_outline_of_what_stands_there(samples: list[DemoSample]) -> None:
    """Every LiDAR point on a low thing lies in an occupied cell, or beside one."""
    exactly = []
    standing = [CLASSES.index(name) for name in ("building", "vehicle", "pedestrian")]
    for sample in samples:
        points = sample.points_P5
        chosen = np.isin(sample.point_label_P, standing)
        chosen &= (points[:, 0] > BEV_X_M[0]) & (points[:, 0] < BEV_X_M[1])
        chosen &= (points[:, 1] > BEV_Y_M[0]) & (points[:, 1] < BEV_Y_M[1])
        row = ((BEV_X_M[1] - points[chosen, 0]) / BEV_CELL_M).astype(int)
        column = ((BEV_Y_M[1] - points[chosen, 1]) / BEV_CELL_M).astype(int)
        occupied = np.pad(sample.bev_XY > 0, 1)
        beside = [occupied[row + i, column + j] for i in range(3) for j in range(3)]
        assert np.logical_or.reduce(beside).all()
        exactly.append(occupied[row + 1, column + 1])
    # The rest lies on outlines that run along a cell's border.
    assert np.concatenate(exactly).mean() > 0.9


def test_map_cells_against_the_outlines(samples: list[DemoSample]) -> None:
    """A cell whose middle lies in a car's outline is not free, for every car."""
    step = np.arange(BEV_CELLS) + 0.5
    x, y = np.meshgrid(
        BEV_X_M[1] - step * BEV_CELL_M, BEV_Y_M[1] - step * BEV_CELL_M, indexing="ij"
    )
    num_cells = 0
    for sample in samples:
        objects = sample.scene.objects
        wanted = np.zeros(x.shape, bool)
        for number in np.flatnonzero(objects.label_N == Label.VEHICLE):
            assert objects.shape_N[number] == Shape.BOX
            place = complex(*objects.center_N3[number, :2].tolist())
            own = (x + 1j * y - place) * np.exp(-1j * float(objects.yaw_N[number]))
            half = objects.half_N3[number]
            wanted |= (np.abs(own.real) < half[0]) & (np.abs(own.imag) < half[1])
        num_cells += int(wanted.sum())
        assert np.isin(sample.bev_XY[wanted], [2, 3, 4]).all()
    assert num_cells > 100


@pytest.mark.parametrize("size", [(96, 192), (64, 320)])
def test_other_sizes_show_the_same_world(size: tuple[int, int]) -> None:
    sample = make_sample(SEED, 1, SceneOptions(height=size[0], width=size[1]))
    assert sample.image_HW3.shape == (*size, 3)
    u, v, z, _ = _in_image(sample)
    depth = sample.depth_HW[v.astype(int), u.astype(int)] / 100
    assert np.median(np.abs(depth - z) / z) < 0.02
