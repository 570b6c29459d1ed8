"""The LiDAR sweep: rays around the car, returns, noise, drop-outs, fog.

Columns are x, y, z (metres, LiDAR frame), intensity (0 to 255) and ring (0 lowest), in
the order in which a turning sensor fires: azimuth by azimuth, rings from below.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from teachonce.demo.ground import ground_label
from teachonce.demo.objects import Floats, Label
from teachonce.demo.raycast import GROUND, SKY, SweepGrid, cast
from teachonce.demo.scenes import Scene, Stream

COLUMNS = ("x", "y", "z", "intensity", "ring")

_LOWEST_DEG, _HIGHEST_DEG = -25.0, 8.0
_NOISE_M = 0.02
_LOST_NEAR, _LOST_FAR = 0.02, 0.1
_GROUND_REFLECTIVITY, _PAINT_REFLECTIVITY = 0.2, 0.8


def sweep_grid(scene: Scene) -> SweepGrid:
    """Returns the rays of the scene's LiDAR, in the ego frame."""
    options = scene.options
    elevations_H = np.radians(np.linspace(_LOWEST_DEG, _HIGHEST_DEG, options.rings))
    place_3 = np.array([0.0, 0.0, scene.rig.lidar_height_m])
    return SweepGrid(place_3, elevations_H, options.azimuths, options.lidar_range_m)


def sweep_points(scene: Scene) -> tuple[Floats, NDArray[np.uint8]]:
    """Returns the sweep, float32 (P, 5) as ``COLUMNS``, and each point's ``Label``.

    Noise is 2 cm along the ray. In fog, returns end at a fraction of a person's sight
    that grows with the surface's reflectivity.
    """
    grid = sweep_grid(scene)
    farthest_m = scene.options.lidar_range_m
    hits = cast(grid, scene.objects, farthest_m)
    is_back = hits.object_HW != SKY
    range_P, object_P = hits.range_HW[is_back], hits.object_HW[is_back]
    way_P3 = np.stack(
        [np.broadcast_to(axis, grid.shape)[is_back] for axis in grid.direction], axis=1
    )
    label_P, bright_P = _surfaces(scene, object_P, way_P3, range_P)

    rng = scene.stream(Stream.LIDAR_NOISE)
    noise_HW = rng.standard_normal(grid.shape, np.float32) * np.float32(_NOISE_M)
    lost_HW, spread_HW, flicker_HW = rng.random((3, *grid.shape), np.float32)
    lost_share_P = _LOST_NEAR + _LOST_FAR * (range_P / farthest_m) ** 2
    measured_P = range_P + noise_HW[is_back]
    is_kept = (lost_HW[is_back] > lost_share_P) & (measured_P <= farthest_m)
    dim_P = bright_P * (0.85 + 0.3 * flicker_HW[is_back])
    if scene.fog_m is not None:
        reach_P = scene.fog_m * (0.35 + 0.4 * bright_P)
        is_kept &= range_P < reach_P * (0.8 + 0.4 * spread_HW[is_back])
        dim_P *= np.exp(-2 * range_P / scene.fog_m)
    ring_P = np.nonzero(is_back)[0]
    points_P5 = np.empty((len(range_P), len(COLUMNS)), np.float32)
    points_P5[:, :3] = way_P3 * measured_P[:, None]
    points_P5[:, 3] = np.clip(np.floor(255 * dim_P), 0, 255)
    points_P5[:, 4] = ring_P
    order_P = np.lexsort((ring_P, np.nonzero(is_back)[1]))
    order_P = order_P[is_kept[order_P]]
    return points_P5[order_P], label_P[order_P]


def _surfaces(
    scene: Scene, object_P: NDArray[np.int32], way_P3: Floats, range_P: Floats
) -> tuple[NDArray[np.uint8], Floats]:
    """Returns label and reflectivity of what the rays met."""
    label_P = np.empty(len(object_P), np.uint8)
    bright_P = np.full(len(object_P), _GROUND_REFLECTIVITY, np.float32)
    is_ground = object_P == GROUND
    at_P3 = way_P3[is_ground] * range_P[is_ground, None]
    label_P[is_ground] = ground_label(scene.road, at_P3[:, 0], at_P3[:, 1])
    label_P[~is_ground] = scene.objects.label_N[object_P[~is_ground]]
    bright_P[~is_ground] = scene.objects.reflectivity_N[object_P[~is_ground]]
    bright_P[is_ground & (label_P == Label.MARKING)] = _PAINT_REFLECTIVITY
    return label_P, bright_P


def project(
    points_PC: Floats,
    intrinsics_33: NDArray[np.float64],
    lidar2cam_44: NDArray[np.float64],
    height: int,
    width: int,
) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """Returns (column, row, depth) of points in pixels and metres, and who is in view.

    Args:
        points_PC: x, y, z first, LiDAR frame, metres.
        intrinsics_33: camera matrix, pixels.
        lidar2cam_44: LiDAR frame to camera frame.
        height: of the image, pixels.
        width: of the image, pixels.

    Returns:
        float64 (P, 3) and bool (P,): in front of the camera and within the image.
    """
    seen_P3 = points_PC[:, :3].astype(np.float64) @ lidar2cam_44[:3, :3].T
    seen_P3 += lidar2cam_44[:3, 3]
    depth_P = seen_P3[:, 2]
    with np.errstate(divide="ignore", invalid="ignore"):
        image_P3 = seen_P3 @ intrinsics_33.T / depth_P[:, None]
    u_P, v_P = image_P3[:, 0], image_P3[:, 1]
    is_in = (depth_P > 0) & (u_P >= 0) & (u_P < width) & (v_P >= 0) & (v_P < height)
    return np.stack([u_P, v_P, depth_P], axis=1), is_in
