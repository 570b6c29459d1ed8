"""Hard voxelisation against a loop over points."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from teachers.pointpillars.voxels import (
    PillarGrid,
    cells_of,
    is_whole,
    mean_of_pillars,
    voxelise,
)

LOW, HIGH, SIZE = (-1.0, -0.5, -2.0), (1.0, 1.0, 2.0), (0.5, 0.5, 4.0)
COORDINATE = st.sampled_from([k * 0.125 for k in range(-12, 13)])
POINT = st.one_of(
    st.tuples(COORDINATE, COORDINATE, st.sampled_from([-3.0, -2.0, 0.5, 2.0])),
    st.just((np.nan, np.nan, np.nan)),
)


def _found(points: np.ndarray, grid: PillarGrid) -> list[list[Any]]:
    """Returns, per sweep, ((ix, iy), its points) by slot."""
    pillars = voxelise(torch.from_numpy(points), grid)
    rows: list[list[Any]] = []
    for row in range(len(points)):
        sweep = []
        for slot in range(pillars.num_slots):
            count = int(pillars.count_BK[row, slot])
            cell = int(pillars.cell_BK[row, slot])
            assert (count == 0) == (cell == grid.num_cells)
            if count:
                mine = pillars.slot_BP[row] == slot
                order = pillars.rank_BP[row][mine].argsort()
                kept = pillars.points_BPC[row][mine][order].numpy()
                assert len(kept) == count
                sweep.append(((cell % grid.cells[0], cell // grid.cells[0]), kept))
        rows.append(sweep)
    return rows


@settings(max_examples=150, deadline=None)
@given(
    sweeps=st.integers(1, 24).flatmap(
        lambda n: st.lists(
            st.lists(POINT, min_size=n, max_size=n), min_size=1, max_size=3
        )
    ),
    max_points=st.integers(1, 4),
    max_pillars=st.integers(1, 13),
)
def test_the_same_points_in_the_same_pillars_as_a_loop(
    reference_voxelise: Callable[..., Any],
    sweeps: list[list[tuple[float, float, float]]],
    max_points: int,
    max_pillars: int,
) -> None:
    points = np.array(sweeps, np.float32)
    # A fourth column tells points of one place apart.
    number = np.broadcast_to(np.arange(points.shape[1]), points.shape[:2])
    points = np.concatenate([points, number[..., None]], -1).astype(np.float32)
    grid = PillarGrid(SIZE, LOW, HIGH, max_points, max_pillars)
    found = _found(points, grid)
    for row, sweep in zip(points, found, strict=True):
        expected = reference_voxelise(row, SIZE, LOW + HIGH, max_points, max_pillars)
        assert [cell for cell, _ in sweep] == [cell for cell, _ in expected]
        for (_, mine), (_, theirs) in zip(sweep, expected, strict=True):
            np.testing.assert_array_equal(mine, theirs)


@pytest.mark.parametrize(
    ("size", "low", "high"),
    [
        ((0.16, 0.16, 4), (0, -39.68, -3), (69.12, 39.68, 1)),
        ((0.25, 0.25, 8), (-50, -50, -5), (50, 50, 3)),
        ((0.32, 0.32, 6), (-74.88, -74.88, -2), (74.88, 74.88, 4)),
    ],
)
def test_cells_are_those_of_float32_division(size: Any, low: Any, high: Any) -> None:
    """Also of points that lie on borders, where another rounding would differ."""
    rng = np.random.default_rng(0)
    corner, edge = np.array(low, np.float32), np.array(size, np.float32)
    steps = rng.integers(-3, 700, (20_000, 3))
    on_borders = (corner + steps * edge).astype(np.float32)
    beside = np.nextafter(on_borders, np.float32(rng.choice([-1e9, 1e9])))
    points = np.concatenate([on_borders, beside.astype(np.float32)])
    points[:, 2] = low[2] + 1
    grid = PillarGrid(size, low, high, 5, 5)
    found = cells_of(torch.from_numpy(points)[None], grid)[0].numpy()
    cell = np.floor((points - corner) / edge)
    nx, ny, _ = grid.cells
    inside = ((cell >= 0) & (cell < [nx, ny, 1])).all(1)
    expected = np.where(inside, cell[:, 1] * nx + cell[:, 0], nx * ny)
    np.testing.assert_array_equal(found, expected)
    assert inside.any()
    assert not inside.all()


def test_means_are_over_the_points_kept() -> None:
    grid = PillarGrid(SIZE, LOW, HIGH, 2, 3)
    points = np.array(
        [[[0.1, 0.1, 1], [0.2, 0.3, 0], [0.4, 0.4, -1], [-0.9, 0.9, 1]]], np.float32
    )
    pillars = voxelise(torch.from_numpy(points), grid)
    mean = mean_of_pillars(pillars, grid.max_points)[0].numpy()
    # The third point is one too many for its pillar.
    np.testing.assert_allclose(mean[0], [0.15, 0.2, 0.5], atol=1e-7)
    np.testing.assert_allclose(mean[1], [-0.9, 0.9, 1], atol=1e-7)
    assert (mean[2] == 0).all()


def test_no_shape_depends_on_values() -> None:
    grid = PillarGrid(SIZE, LOW, HIGH, 2, 3)
    meta = voxelise(torch.zeros(2, 50, 5, device="meta"), grid)
    full = voxelise(torch.rand(2, 50, 5), grid)
    none = voxelise(torch.full((2, 50, 5), torch.nan), grid)
    for one in (full, none):
        for name in vars(meta):
            assert getattr(one, name).shape == getattr(meta, name).shape
    assert (none.cell_BK == grid.num_cells).all()
    assert (none.points_BPC == 0).all()


def test_a_side_is_a_whole_number_of_cells() -> None:
    assert is_whole(-39.68, 39.68, 0.16)
    assert not is_whole(0, 1, 0.3)
    assert not is_whole(1, 1, 0.3)
