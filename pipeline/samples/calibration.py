"""Calibration: from points of a sweep to pixels of an image, also within a view; times.

Pixel coordinates are continuous: an image of width W spans [0, W), the first pixel is
[0, 1) and its centre 0.5, as for boxes and for resizing. Intrinsics are taken in these
coordinates as they stand. KITTI and nuScenes do not say where a pixel's centre lies;
their own tools test 0 <= u < W without a shift, and so does this. A rig whose
intrinsics put the first centre at 0 (OpenCV) adds 0.5 to its principal point when it is
packed; left out, points lie half a pixel of the full image off.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from pipeline.samples.errors import SampleError
from pipeline.samples.labels import lookup
from pipeline.samples.views import Box, View

MAX_TIME_S = 1e11
"""No time in seconds is so large; milli- and nanoseconds since 1970 are."""


@dataclass(frozen=True)
class Calibration:
    """A pinhole camera and where the LiDAR is.

    Attributes:
        intrinsics: float64 (3, 3), camera to pixels; x right, y down, z forward.
        lidar2cam: float64 (4, 4), LiDAR to camera coordinates, metres.
    """

    intrinsics: np.ndarray
    lidar2cam: np.ndarray


def parse_calibration(metadata: object, path: str) -> Calibration:
    """Returns the calibration at a dotted path of a sample's metadata.

    Args:
        metadata: parsed JSON.
        path: leads to an object with ``intrinsics`` and ``lidar2cam``.

    Raises:
        SampleError: ``missing`` or ``bad_calibration`` (shape, not finite, a last row
            other than 0 0 1 or 0 0 0 1, a focal length that is not positive, a
            singular ``lidar2cam``).
    """
    intrinsics = _matrix(lookup(metadata, f"{path}.intrinsics"), 3, "intrinsics")
    lidar2cam = _matrix(lookup(metadata, f"{path}.lidar2cam"), 4, "lidar2cam")
    if intrinsics[0, 0] <= 0 or intrinsics[1, 1] <= 0:
        raise SampleError("bad_calibration", "focal lengths must be positive")
    if abs(np.linalg.det(lidar2cam[:3, :3])) < 1e-6:
        raise SampleError("bad_calibration", "lidar2cam must not be singular")
    return Calibration(intrinsics, lidar2cam)


def parse_time(metadata: object, path: str) -> float:
    """Returns the time in seconds at a dotted path of a sample's metadata.

    Raises:
        SampleError: ``missing``, ``not_a_number`` or ``out_of_range`` (not finite, or
            not seconds).
    """
    value = lookup(metadata, path)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise SampleError("not_a_number", f"{repr(value)[:80]} is no time")
    # Not an int as a float, which may be too large for one.
    if not -MAX_TIME_S < value < MAX_TIME_S:
        raise SampleError(
            "out_of_range", f"a time of {repr(value)[:80]} s; it must be in seconds"
        )
    return float(value)


def project(
    points_xyz: np.ndarray, calibration: Calibration
) -> tuple[np.ndarray, np.ndarray]:
    """Returns where points of a sweep fall in the image.

    Args:
        points_xyz: (N, 3) or more columns of which the first three are used; metres.
        calibration: of the full image, or of a view with its sweep.

    Returns:
        uv (N, 2) float64 in pixels, and depth (N,) float64 in metres along the camera's
        axis. Where depth is not positive the point is behind the camera and uv is NaN.
        In the image are those with 0 <= u < width and 0 <= v < height.
    """
    xyz_N3 = np.asarray(points_xyz, np.float64)[:, :3]
    rotation, translation = calibration.lidar2cam[:3, :3], calibration.lidar2cam[:3, 3]
    camera_N3 = xyz_N3 @ rotation.T + translation
    depth_N = camera_N3[:, 2]
    uvw_N3 = camera_N3 @ calibration.intrinsics.T
    uv_N2 = np.full((len(xyz_N3), 2), np.nan)
    # A point on the camera's plane may fall infinitely far outside.
    with np.errstate(over="ignore"):
        is_front_N1 = (depth_N > 0)[:, None]
        np.divide(uvw_N3[:, :2], depth_N[:, None], out=uv_N2, where=is_front_N1)
    return uv_N2, depth_N


def calibration_in_view(
    calibration: Calibration, box: Box, flip: bool, size: tuple[int, int]
) -> Calibration:
    """Returns the calibration of a view of the image, with its sweep mirrored too.

    Where ``flip``, the image is mirrored left-right and the sweep in y. Both mirrors
    together are one change of the camera's coordinates (x to -x), so that the result is
    an ordinary calibration: positive focal lengths, and a rotation if it was one.

    Args:
        calibration: of the full upright image.
        box: what the view sees of it, in its pixels.
        flip: whether the view is mirrored.
        size: (height, width) that the box is resized to.
    """
    height, width = size
    x0, y0, x1, y1 = box
    to_view = np.array(
        [
            [width / (x1 - x0), 0.0, -x0 * width / (x1 - x0)],
            [0.0, height / (y1 - y0), -y0 * height / (y1 - y0)],
            [0.0, 0.0, 1.0],
        ]
    )
    intrinsics = to_view @ calibration.intrinsics
    lidar2cam = calibration.lidar2cam
    if flip:
        mirror_pixels = np.array([[-1.0, 0.0, width], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]])
        intrinsics = mirror_pixels @ intrinsics @ np.diag([-1.0, 1.0, 1.0])
        mirror_camera = np.diag([-1.0, 1.0, 1.0, 1.0])
        lidar2cam = mirror_camera @ lidar2cam @ np.diag([1.0, -1.0, 1.0, 1.0])
    return Calibration(intrinsics, lidar2cam)


def calibration_for_view(
    calibration: Calibration, view: View, input_name: str, size: tuple[int, int]
) -> Calibration:
    """Returns the calibration between a view's sweep and its image of one input.

    Projecting `points_in_view` with it gives pixels of `resize_view`. The camera's
    coordinates are scaled with the sweep, so depth is in the sweep's scaled metres.

    Args:
        calibration: of the full upright image.
        view: flip, yaw, scale and the input's box.
        input_name: which image.
        size: (height, width) that its box is resized to.
    """
    mirrored = calibration_in_view(calibration, view.boxes[input_name], view.flip, size)
    cosine, sine = math.cos(view.yaw), math.sin(view.yaw)
    turn_back = np.eye(4)
    turn_back[:2, :2] = [[cosine, sine], [-sine, cosine]]
    lidar2cam = mirrored.lidar2cam @ turn_back
    lidar2cam[:3, 3] *= view.scale
    return Calibration(mirrored.intrinsics, lidar2cam)


def _matrix(value: object, side: int, name: str) -> np.ndarray:
    try:
        matrix = np.asarray(value, np.float64)
    except (TypeError, ValueError, OverflowError) as error:
        raise SampleError("bad_calibration", f"{name} must hold numbers") from error
    if matrix.shape != (side, side):
        raise SampleError(
            "bad_calibration", f"{name} must be {side} x {side}, got {matrix.shape}"
        )
    if not np.isfinite(matrix).all():
        raise SampleError("bad_calibration", f"{name} must be finite")
    if not np.array_equal(matrix[-1], np.eye(side)[-1]):
        raise SampleError(
            "bad_calibration", f"the last row of {name} must be that of the identity"
        )
    return matrix
