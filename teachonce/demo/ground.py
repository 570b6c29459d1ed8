"""The ground: a road along a curve on one flat plane, and what is painted on it.

Owns the road's geometry (ego frame to road frame and back) and the class of every point
of the ground. Colours are in ``shading``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from teachonce.demo.objects import Label

Floats = NDArray[np.float32]

_LINE_HALF_M = 0.08


@dataclass(frozen=True)
class Road:
    """A road whose middle is y = offset + heading x + curvature x^2 / 2.

    Attributes:
        lanes: lanes in each direction.
        lane_m: width of a lane.
        offset_m, heading, curvature_per_m: of the middle, in the ego frame.
        median_m: half width of the strip between the directions; 0 is none.
        margin_m: parking strip or hard shoulder beyond the lanes.
        pavement_m: width of the pavement; 0 is none.
        verge: what lies beyond.
        centre: how the middle is marked.
        has_edge_line: whether the lanes' outer edge is marked.
        cross_m: x of the crossing road's middle, None where there is none.
        cross_half_m: its half width.
        stop_m: how far before the crossing road the stop line lies.
    """

    lanes: int
    lane_m: float
    offset_m: float = 0.0
    heading: float = 0.0
    curvature_per_m: float = 0.0
    median_m: float = 0.0
    margin_m: float = 0.0
    pavement_m: float = 0.0
    verge: Label = Label.TERRAIN
    centre: Literal["none", "dashed", "solid"] = "dashed"
    has_edge_line: bool = False
    cross_m: float | None = None
    cross_half_m: float = 0.0
    stop_m: float = 5.6

    @property
    def lanes_end_m(self) -> float:
        """Distance of the lanes' outer edge from the middle."""
        return self.median_m + self.lanes * self.lane_m

    @property
    def half_m(self) -> float:
        """Half width of the carriageway, parking strip or shoulder included."""
        return self.lanes_end_m + self.margin_m

    @property
    def edge_m(self) -> float:
        """Distance of the pavement's outer edge from the middle."""
        return self.half_m + self.pavement_m

    def slope(self, x: float) -> float:
        """Returns dy/dx of the middle at ``x``."""
        return self.heading + self.curvature_per_m * x

    def place(self, x: float, left: float) -> tuple[float, float, float]:
        """Returns (x, y, yaw) of the point ``left`` metres left of the middle at x."""
        middle = self.offset_m + self.heading * x + 0.5 * self.curvature_per_m * x * x
        yaw = float(np.arctan(self.slope(x)))
        return (
            float(x - left * np.sin(yaw)),
            float(middle + left * np.cos(yaw)),
            yaw,
        )

    def lane_centre(self, lane: int) -> float:
        """Returns the distance from the middle of lane ``lane`` (0 is innermost)."""
        return self.median_m + (lane + 0.5) * self.lane_m

    def left_of(self, x_P: Floats, y_P: Floats) -> Floats:
        """Returns the signed distance to the middle, left positive, metres."""
        slope_P = self.heading + self.curvature_per_m * x_P
        middle_P = self.offset_m + 0.5 * (self.heading + slope_P) * x_P
        left_P: Floats = (y_P - middle_P) / np.sqrt(1 + slope_P * slope_P)
        return left_P


def ground_label(road: Road, x_P: Floats, y_P: Floats) -> NDArray[np.uint8]:
    """Returns the ``Label`` of ground points, uint8 (P,); x and y in ego metres."""
    left_P = road.left_of(x_P, y_P)
    side_P = np.abs(left_P)
    label_P = np.full(x_P.shape, int(road.verge), np.uint8)
    label_P[side_P < road.edge_m] = Label.PAVEMENT
    label_P[side_P < road.half_m] = Label.ROAD
    if road.median_m:
        label_P[side_P < road.median_m] = Label.TERRAIN
    label_P[_is_marked(road, x_P, left_P, side_P)] = Label.MARKING
    if road.cross_m is not None:
        _cross(road, x_P, left_P, side_P, label_P)
    return label_P


def _is_near(at_P: Floats, where: float) -> NDArray[np.bool_]:
    return np.asarray(np.abs(at_P - np.float32(where)) < _LINE_HALF_M)


def _is_marked(
    road: Road, x_P: Floats, left_P: Floats, side_P: Floats
) -> NDArray[np.bool_]:
    is_dash = np.mod(x_P, np.float32(9.0)) < 4.0
    is_line = np.zeros(x_P.shape, bool)
    if not road.median_m:
        if road.centre == "dashed":
            is_line |= _is_near(left_P, 0.0) & is_dash
        elif road.centre == "solid":
            is_line |= _is_near(side_P, 0.16)
    elif road.has_edge_line:
        is_line |= _is_near(side_P, road.median_m + 0.3)
    for lane in range(1, road.lanes):
        is_line |= _is_near(side_P, road.median_m + lane * road.lane_m) & is_dash
    if road.has_edge_line:
        is_line |= _is_near(side_P, road.lanes_end_m - 0.05)
    return is_line


def _cross(
    road: Road,
    x_P: Floats,
    left_P: Floats,
    side_P: Floats,
    label_P: NDArray[np.uint8],
) -> None:
    """Paints the crossing road, its zebra crossings and the stop line."""
    if road.cross_m is None:
        return
    along_P = x_P - np.float32(road.cross_m)
    away_P = np.abs(along_P)
    is_main = side_P < road.half_m
    label_P[(away_P < road.cross_half_m + road.pavement_m) & ~is_main] = Label.PAVEMENT
    label_P[(away_P < road.cross_half_m) & ~is_main] = Label.ROAD
    near = away_P < road.cross_half_m + road.stop_m + 1.0
    label_P[near & is_main] = Label.ROAD
    is_middle = _is_near(along_P, 0.0) & (side_P > road.half_m + 5.0)
    label_P[is_middle & (np.mod(side_P, np.float32(6.0)) < 3.0)] = Label.MARKING
    beyond_P = away_P - np.float32(road.cross_half_m)
    is_zebra = is_main & (beyond_P > 1.0) & (beyond_P < 4.0)
    label_P[is_zebra & (np.mod(left_P, np.float32(1.0)) < 0.5)] = Label.MARKING
    aside_P = side_P - np.float32(road.half_m)
    is_zebra = (away_P < road.cross_half_m) & (aside_P > 1.0) & (aside_P < 4.0)
    label_P[is_zebra & (np.mod(along_P, np.float32(1.0)) < 0.5)] = Label.MARKING
    is_stop = is_main & (np.abs(beyond_P - np.float32(road.stop_m)) < 0.2)
    label_P[is_stop & ((along_P < 0) == (left_P < 0))] = Label.MARKING
