"""Voxelisation point by point, as the published code does it, for every test here."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

Table = list[tuple[tuple[int, int], NDArray[np.float32]]]


def _voxelise(
    points: NDArray[np.float32],
    voxel_size: Any,
    point_range: Any,
    max_points: int,
    max_pillars: int,
) -> Table:
    """Returns ((ix, iy), its points) in the order in which pillars are opened."""
    low = np.array(point_range[:3], np.float32)
    high = np.array(point_range[3:], np.float32)
    size = np.array(voxel_size, np.float32)
    number = np.round((high - low) / size)
    pillars: dict[tuple[int, int], list[NDArray[np.float32]]] = {}
    for point in points:
        if not np.isfinite(point).all():
            continue
        x, y, z = (math.floor(step) for step in (point[:3] - low) / size)
        cells = (x, y, z)
        if any(not 0 <= c < n for c, n in zip(cells, number, strict=True)):
            continue
        if (x, y) not in pillars:
            if len(pillars) >= max_pillars:
                continue
            pillars[x, y] = []
        if len(pillars[x, y]) < max_points:
            pillars[x, y].append(point)
    return [(cell, np.stack(kept)) for cell, kept in pillars.items()]


@pytest.fixture(scope="session")
def reference_voxelise() -> Callable[..., Table]:
    """Returns a loop over points; see `_voxelise`."""
    return _voxelise
