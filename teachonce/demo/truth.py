"""What is true whatever the sensors see: depth in the image, and the map ahead.

Neither night, fog nor the LiDAR's range changes anything here.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from teachonce.demo.objects import CLASSES, Shape
from teachonce.demo.raycast import CameraGrid, Hits
from teachonce.demo.scenes import Scene

#: Cells of ``bev.png``; everything above 0 is occupied.
BEV_CLASSES = ("free", "structure", "vehicle", "pedestrian", "vegetation")
#: The map covers these ego (= LiDAR) coordinates. Row 0 is farthest ahead, column 0
#: farthest left: cell (i, j) is centred at x = 48 - (i + .5) * .75 and
#: y = 24 - (j + .5) * .75.
BEV_X_M, BEV_Y_M = (0.0, 48.0), (-24.0, 24.0)
BEV_CELLS = 64
BEV_CELL_M = (BEV_X_M[1] - BEV_X_M[0]) / BEV_CELLS

#: Depth is stored in whole centimetres; 0 is the sky.
DEPTH_PER_M = 100

_SAMPLES = 4
_OVERHEAD_M = 2.2
_BEV_OF = {
    "building": 1,
    "barrier": 1,
    "pole": 1,
    "sign": 1,
    "vehicle": 2,
    "pedestrian": 3,
    "vegetation": 4,
}
_BEV_OF_LABEL = np.array([_BEV_OF.get(name, 0) for name in CLASSES], np.uint8)


def depth_map(grid: CameraGrid, hits: Hits) -> NDArray[np.uint16]:
    """Returns depth along the optical axis, uint16 (H, W), centimetres, sky 0."""
    depth_HW = hits.range_HW * grid.cosine_HW * DEPTH_PER_M
    depth_HW = np.where(np.isfinite(depth_HW), np.rint(depth_HW), 0)
    whole_HW: NDArray[np.uint16] = np.clip(depth_HW, 0, 65535).astype(np.uint16)
    return whole_HW


def occupancy(scene: Scene) -> NDArray[np.uint8]:
    """Returns what stands in each cell of the ground, ``BEV_CLASSES`` (64, 64).

    A cell is occupied where any of 4 x 4 points in it lies in the outline of a thing
    that reaches below 2.2 m; of several the later class counts. Tree crowns and signs
    overhead are free space.
    """
    objects = scene.objects
    fine = BEV_CELLS * _SAMPLES
    step = BEV_CELL_M / _SAMPLES
    x_F = BEV_X_M[1] - (np.arange(fine) + 0.5) * step
    y_F = BEV_Y_M[1] - (np.arange(fine) + 0.5) * step
    map_FF = np.zeros((fine, fine), np.uint8)
    bottom_N = objects.center_N3[:, 2] - objects.half_N3[:, 2]
    corners_N83 = objects.corners()
    low_N2, high_N2 = corners_N83[..., :2].min(axis=1), corners_N83[..., :2].max(axis=1)
    rank_N = _BEV_OF_LABEL[objects.label_N]
    chosen = np.flatnonzero((bottom_N < _OVERHEAD_M) & (rank_N > 0))
    for number in chosen[np.argsort(rank_N[chosen], kind="stable")].tolist():
        # Half a step more on each side: a pole is thinner than the sampling.
        low, high = low_N2[number] - step / 2, high_N2[number] + step / 2
        rows = np.flatnonzero((x_F >= low[0]) & (x_F <= high[0]))
        columns = np.flatnonzero((y_F >= low[1]) & (y_F <= high[1]))
        if not len(rows) or not len(columns):
            continue
        window = (slice(rows[0], rows[-1] + 1), slice(columns[0], columns[-1] + 1))
        x = x_F[window[0], None] - objects.center_N3[number, 0]
        y = y_F[None, window[1]] - objects.center_N3[number, 1]
        cos, sin = np.cos(objects.yaw_N[number]), np.sin(objects.yaw_N[number])
        half = np.maximum(objects.half_N3[number], step / 2)
        along, across = (cos * x + sin * y) / half[0], (cos * y - sin * x) / half[1]
        if objects.shape_N[number] in (Shape.BOX, Shape.GABLE):
            is_in = (np.abs(along) <= 1) & (np.abs(across) <= 1)
        else:
            is_in = along**2 + across**2 <= 1
        map_FF[window][is_in] = rank_N[number]
    cells = map_FF.reshape(BEV_CELLS, _SAMPLES, BEV_CELLS, _SAMPLES)
    largest: NDArray[np.uint8] = cells.max(axis=(1, 3))
    return largest
