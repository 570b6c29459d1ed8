"""Sweeps drawn as images: as the sensor sees them, and from above.

Owns which pixel a point falls into, which point a pixel shows, and the channels that
are made of points; knows no model. Both drawings keep the cell convention of all grids:
cell (i, j) is centred (i + .5) / H and (j + .5) / W of the way from the upper left.

A channel is a column of the sweep, taken from the point that the pixel shows, or one of
`MADE_CHANNELS`, which come first where a sweep has a column of that name.

Nothing here sorts: a sweep of 35,000 points takes a few milliseconds.

Shape suffixes: N points, C columns of the sweep, H and W rows and columns of the image.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Pair = tuple[float, float]
Float64s = NDArray[np.float64]

MADE_CHANNELS = ("range", "occupied", "density")
"""``range``: metres from the sensor to the point that is shown; ``occupied``: 1 where
there is a point; ``density``: log(1 + points that fall into the pixel)."""

SLACK_ROWS = 1
"""Rows beyond the elevations that still go into the border row."""

_TURN_DEG = 360.0


class _Fallen(NamedTuple):
    """Points that fall into an image.

    Attributes:
        point: (K,) int64, ascending, which of the sweep's points.
        pixel: (K,) int64, row * W + column.
        rank: (K,) float64; of a pixel's points that of lowest rank is shown, of equal
            ones the first.
    """

    point: NDArray[np.int64]
    pixel: NDArray[np.int64]
    rank: Float64s


def range_image(
    points: NDArray[np.float32],
    columns: Sequence[str],
    size: tuple[int, int],
    elevation_deg: Pair,
    azimuth_deg: Pair,
    channels: Sequence[str],
    *,
    range_m: Pair | None = None,
    empty: float = 0.0,
) -> NDArray[np.float32]:
    """Returns a sweep as its sensor sees it; the nearest point of a pixel is shown.

    Row 0 is the highest elevation, column 0 the leftmost azimuth for one who faces +x,
    where +y is left. A full turn therefore has straight ahead in the middle and wraps
    around at its sides.

    Published elevations are those of the outermost beams, which scatter about the
    border of the image: a point up to a row beyond goes into the border row. Farther
    ones are left out: the car below a nuScenes sensor (5 % of its points) would cover
    the last row. A point at the sensor's origin has no direction and is left out too.

    Args:
        points: (N, C), finite, metres.
        columns: what each of the C is; holds x, y, z.
        size: (H, W).
        elevation_deg: lowest and highest angle above the sensor's plane.
        azimuth_deg: rightmost and leftmost angle from +x towards +y, at most 360 apart;
            [90, 270] looks back.
        channels: columns or `MADE_CHANNELS`.
        range_m: points nearer or farther are left out; None: none are.
        empty: value of every channel where there is no point.

    Returns:
        float32 (H, W, channels).

    Source: Milioto et al., RangeNet++ (IROS 2019), equation 1, with the elevation as
    arctan2(z, hypot(x, y)). There all points beyond the elevations go into the border
    rows.
    """
    height, width = size
    x_N, y_N, z_N = _coordinates(points, columns)
    flat_N = np.hypot(x_N, y_N)
    range_N = np.hypot(flat_N, z_N)
    low, high = elevation_deg
    right, left = azimuth_deg
    row_N = (high - np.degrees(np.arctan2(z_N, flat_N))) * (height / (high - low))
    turned_N = np.mod(left - np.degrees(np.arctan2(y_N, x_N)), _TURN_DEG)
    column_N = turned_N * (width / (left - right))
    inside_N = (row_N >= -SLACK_ROWS) & (row_N <= height + SLACK_ROWS)
    inside_N &= (column_N <= width) & (range_N > 0)
    if range_m is not None:
        inside_N &= (range_N >= range_m[0]) & (range_N <= range_m[1])
    fallen = _fall(size, row_N, column_N, inside_N, range_N)
    return _draw(points, columns, size, channels, fallen, range_N, empty)


def bev_image(
    points: NDArray[np.float32],
    columns: Sequence[str],
    size: tuple[int, int],
    x_m: Pair,
    y_m: Pair,
    z_m: Pair | None,
    channels: Sequence[str],
    *,
    empty: float = 0.0,
) -> NDArray[np.float32]:
    """Returns a sweep from above; the highest point of a pixel is shown.

    Rows run along x, row 0 at the highest x; columns along y, column 0 at the highest
    y: what is ahead is up, what is left is left. Points on its border are in it.

    Args:
        points: (N, C), finite, metres.
        columns: what each of the C is; holds x, y, z.
        size: (H, W).
        x_m: lowest and highest x of the image.
        y_m: lowest and highest y.
        z_m: points below or above are left out; None: none are.
        channels: columns or `MADE_CHANNELS`.
        empty: value of every channel where there is no point.

    Returns:
        float32 (H, W, channels).

    Source: Chen et al., MV3D (CVPR 2017), section 3.1: height and intensity of a cell
    are those of its highest point; its density is log(1 + points), there divided by
    log(64) and capped at 1.
    """
    height, width = size
    x_N, y_N, z_N = _coordinates(points, columns)
    row_N = (x_m[1] - x_N) * (height / (x_m[1] - x_m[0]))
    column_N = (y_m[1] - y_N) * (width / (y_m[1] - y_m[0]))
    inside_N = (row_N >= 0) & (row_N <= height) & (column_N >= 0) & (column_N <= width)
    if z_m is not None:
        inside_N &= (z_N >= z_m[0]) & (z_N <= z_m[1])
    fallen = _fall(size, row_N, column_N, inside_N, -z_N)
    range_N = np.hypot(np.hypot(x_N, y_N), z_N) if "range" in channels else None
    return _draw(points, columns, size, channels, fallen, range_N, empty)


def _coordinates(
    points: NDArray[np.float32], columns: Sequence[str]
) -> tuple[Float64s, Float64s, Float64s]:
    names = list(columns)
    x_N, y_N, z_N = (
        points[:, names.index(name)].astype(np.float64) for name in ("x", "y", "z")
    )
    return x_N, y_N, z_N


def _fall(
    size: tuple[int, int],
    row_N: Float64s,
    column_N: Float64s,
    inside_N: NDArray[np.bool_],
    rank_N: Float64s,
) -> _Fallen:
    """Returns the points inside and their pixels; those on a border go to its cells."""
    height, width = size
    point = np.flatnonzero(inside_N)
    row = np.clip(np.floor(row_N[point]).astype(np.int64), 0, height - 1)
    column = np.clip(np.floor(column_N[point]).astype(np.int64), 0, width - 1)
    return _Fallen(point, row * width + column, rank_N[point])


def _draw(
    points: NDArray[np.float32],
    columns: Sequence[str],
    size: tuple[int, int],
    channels: Sequence[str],
    fallen: _Fallen,
    range_N: Float64s | None,
    empty: float,
) -> NDArray[np.float32]:
    """Returns the image (H, W, channels) of points that know their pixels."""
    num_pixels = size[0] * size[1]
    names = list(columns)
    lowest = np.full(num_pixels, np.inf)
    np.minimum.at(lowest, fallen.pixel, fallen.rank)
    is_lowest = fallen.rank == lowest[fallen.pixel]
    shown = np.full(num_pixels, len(points), np.int64)
    np.minimum.at(shown, fallen.pixel[is_lowest], fallen.point[is_lowest])
    filled = np.flatnonzero(shown < len(points))
    shown = shown[filled]
    image = np.full((num_pixels, len(channels)), empty, np.float32)
    for number, channel in enumerate(channels):
        if channel == "occupied":
            image[filled, number] = 1
        elif channel == "density":
            count = np.bincount(fallen.pixel, minlength=num_pixels)[filled]
            image[filled, number] = np.log1p(count)
        elif channel == "range":
            assert range_N is not None, "asked for with the channel"
            image[filled, number] = range_N[shown]
        else:
            image[filled, number] = points[shown, names.index(channel)]
    return image.reshape(*size, len(channels))
