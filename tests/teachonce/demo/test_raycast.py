"""Ray casting against an independent float64 march along each ray, without windows."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from teachonce.demo.lidar import sweep_grid
from teachonce.demo.objects import Objects, Shape
from teachonce.demo.raycast import GROUND, SKY, CameraGrid, RayGrid, SunGrid, cast
from teachonce.demo.samples import DemoSample
from teachonce.demo.shading import FARTHEST_M

_PLANES = {
    Shape.BOX: [
        ((1, 0, 0), 1), ((-1, 0, 0), 1), ((0, 1, 0), 1),
        ((0, -1, 0), 1), ((0, 0, 1), 1), ((0, 0, -1), 1),
    ],
    Shape.GABLE: [
        ((1, 0, 0), 1), ((-1, 0, 0), 1), ((0, 0, -1), 1),
        ((0, 2, 1), 1), ((0, -2, 1), 1),
    ],
}  # fmt: skip


def _inside(shape: int, at: NDArray[np.float64]) -> NDArray[np.bool_]:
    """Returns which points (P, 3) in unit axes lie in the unit shape."""
    x, y, z = at.T
    if shape in _PLANES:
        tests = [
            at @ np.array(normal) <= limit for normal, limit in _PLANES[Shape(shape)]
        ]
        return np.asarray(np.logical_and.reduce(tests))
    if shape == Shape.ELLIPSOID:
        return np.asarray(x**2 + y**2 + z**2 <= 1)
    if shape == Shape.CYLINDER:
        return np.asarray((x**2 + y**2 <= 1) & (np.abs(z) <= 1))
    return np.asarray((x**2 + y**2 <= ((1 - z) / 2) ** 2) & (np.abs(z) <= 1))


def _unit(
    objects: Objects, number: int, at: NDArray[np.float64]
) -> NDArray[np.float64]:
    yaw = float(objects.yaw_N[number])
    turn = np.array(
        [[np.cos(yaw), np.sin(yaw), 0], [-np.sin(yaw), np.cos(yaw), 0], [0, 0, 1]]
    )
    moved = at - objects.center_N3[number].astype(np.float64)
    return np.asarray(moved @ turn.T / objects.half_N3[number])


def _march(
    objects: Objects,
    start: NDArray[np.float64],
    way: NDArray[np.float64],
    farthest_m: float,
) -> float:
    """Returns the first distance at which a ray is in anything, to about 1 cm."""
    best = np.inf
    if way[2] < 0:
        best = -start[2] / way[2]
    best = best if best < farthest_m else np.inf
    radius_N = np.linalg.norm(objects.half_N3.astype(np.float64), axis=1)
    middle_N = (objects.center_N3 - start) @ way
    miss_N = np.linalg.norm(start + middle_N[:, None] * way - objects.center_N3, axis=1)
    for number in np.flatnonzero(miss_N <= radius_N).tolist():
        low = max(middle_N[number] - radius_N[number], 0.0)
        high = min(middle_N[number] + radius_N[number], farthest_m, best)
        if high <= low:
            continue
        steps = np.linspace(low, high, max(2, int((high - low) / 0.01)))
        at = start + steps[:, None] * way
        is_in = _inside(int(objects.shape_N[number]), _unit(objects, number, at))
        if is_in.any():
            best = min(best, steps[np.argmax(is_in)])
    return float(best)


def _grazes(objects: Objects, number: int, at: NDArray[np.float64]) -> bool:
    """Returns whether a point lies on a primitive's surface, to 0.2 % of its size."""
    shape, unit = int(objects.shape_N[number]), _unit(objects, number, at[None])
    return bool(_inside(shape, unit / 1.002)[0] and not _inside(shape, unit / 0.998)[0])


def _camera(sample: DemoSample) -> CameraGrid:
    rig = sample.scene.rig
    return CameraGrid(rig.intrinsics_33, rig.ego2cam_44, *sample.seg_HW.shape)


def _check(grid: RayGrid, objects: Objects, farthest_m: float, seed: int) -> None:
    hits = cast(grid, objects, farthest_m)
    rng = np.random.default_rng(seed)
    height, width = grid.shape
    num_grazing = 0
    for _ in range(60):
        row, column = int(rng.integers(height)), int(rng.integers(width))
        start, way = (
            np.array(
                [np.broadcast_to(axis, grid.shape)[row, column] for axis in vector]
            )
            for vector in (grid.origin, grid.direction)
        )
        found = float(hits.range_HW[row, column])
        wanted = _march(objects, start.astype(float), way.astype(float), farthest_m)
        number = int(hits.object_HW[row, column])
        assert (number == SKY) == np.isinf(found)
        if found == wanted or abs(found - wanted) < 0.02 + 1e-4 * found:
            continue
        # A ray that only cuts a corner may slip between the steps of the march.
        assert found < wanted
        assert number >= 0
        assert _grazes(objects, number, start + found * way)
        num_grazing += 1
    assert num_grazing <= 2


@pytest.mark.parametrize("number", range(6))
def test_camera_rays_meet_what_marching_finds(
    samples: list[DemoSample], number: int
) -> None:
    sample = samples[number]
    _check(_camera(sample), sample.scene.objects, FARTHEST_M, number)


@pytest.mark.parametrize("number", range(6))
def test_lidar_rays_meet_what_marching_finds(
    samples: list[DemoSample], number: int
) -> None:
    scene = samples[number].scene
    _check(sweep_grid(scene), scene.objects, 60.0, number)


class _NoWindows:
    """A grid on which every primitive is tried on every ray."""

    def __init__(self, grid: RayGrid) -> None:
        self.origin, self.direction, self.shape = (
            grid.origin,
            grid.direction,
            grid.shape,
        )

    def windows(self, objects: Objects) -> NDArray[np.int64]:
        height, width = self.shape
        rows = [(number, 0, height, 0, width) for number in range(len(objects))]
        return np.array(rows, np.int64)


@pytest.mark.parametrize("number", range(6))
def test_windows_lose_no_ray(samples: list[DemoSample], number: int) -> None:
    scene = samples[number].scene
    rig = scene.rig
    # Turned round, too: boxes on every side of the near plane and of the seam.
    back = rig.ego2cam_44 @ np.diag([-1.0, -1.0, 1.0, 1.0])
    grids: list[tuple[RayGrid, float]] = [
        (
            CameraGrid(rig.intrinsics_33 / [[4], [4], [1]], rig.ego2cam_44, 40, 80),
            250.0,
        ),
        (CameraGrid(rig.intrinsics_33 / [[4], [4], [1]], back, 40, 80), 250.0),
        (sweep_grid(scene), 60.0),
        (SunGrid(scene.sun_3, (-20.0, 40.0), (-30.0, 30.0), 1.0, 40.0), 1000.0),
    ]
    for grid, farthest_m in grids:
        quick = cast(grid, scene.objects, farthest_m)
        slow = cast(_NoWindows(grid), scene.objects, farthest_m)
        assert np.array_equal(quick.range_HW, slow.range_HW), type(grid)
        assert np.array_equal(quick.object_HW, slow.object_HW), type(grid)


def test_sun_rays_meet_what_marching_finds(samples: list[DemoSample]) -> None:
    scene = samples[1].scene
    grid = SunGrid(scene.sun_3, (0.0, 64.0), (-32.0, 32.0), 0.5, 40.0)
    _check(grid, scene.objects, 1000.0, 1)


@pytest.mark.parametrize("shape", list(Shape))
def test_every_shape_alone_is_hit_where_it_is(shape: Shape) -> None:
    one = Objects(
        shape_N=np.array([int(shape)]),
        center_N3=np.array([[9.0, 1.0, 2.0]], np.float32),
        half_N3=np.array([[1.5, 1.0, 2.0]], np.float32),
        yaw_N=np.array([0.4], np.float32),
        label_N=np.array([5]),
        material_N=np.array([0]),
        colour_N3=np.ones((1, 3), np.float32),
        accent_N3=np.ones((1, 3), np.float32),
        reflectivity_N=np.ones(1, np.float32),
    )
    ego2cam = np.array([[0.0, -1, 0, 0], [0, 0, -1, 1.6], [1, 0, 0, 0], [0, 0, 0, 1]])
    intrinsics = np.array([[60.0, 0, 48], [0, 60, 32], [0, 0, 1]])
    grid = CameraGrid(intrinsics, ego2cam, 64, 96)
    hits = cast(grid, one, 100.0)
    num_grazing = 0
    for row in range(0, 64, 3):
        for column in range(0, 96, 3):
            way = np.array([axis[row, column] for axis in grid.direction], np.float64)
            wanted = _march(one, np.array([0.0, 0.0, 1.6]), way, 100.0)
            found = float(hits.range_HW[row, column])
            if not (found == wanted or abs(found - wanted) < 0.02):
                assert found < wanted
                assert _grazes(one, 0, np.array([0.0, 0.0, 1.6]) + found * way)
                num_grazing += 1
    assert num_grazing <= 2
    assert (hits.object_HW == 0).sum() > 50
    assert (hits.object_HW == GROUND).any()
