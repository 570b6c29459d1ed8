"""Resampling against NumPy and Pillow; masks that do not leak; points in a grid."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from student_train.grids import (
    common_size,
    match_grids,
    resize_grid,
    resize_mask,
    sample_grid,
)

SIZES = st.tuples(st.integers(1, 9), st.integers(1, 9))
MODES = st.sampled_from(["bilinear", "bicubic"])
PILLOW = {
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
}


def np_kernel(distance, mode):
    """The interpolation kernel; for cubics Keys' with a = -0.75, as torch has it."""
    d, a = abs(distance), -0.75
    if mode == "bilinear":
        return max(0.0, 1 - d)
    if d < 1:
        return (a + 2) * d**3 - (a + 3) * d**2 + 1
    return a * (d**3 - 5 * d**2 + 8 * d - 4) if d < 2 else 0.0


def np_enlarge_axis(grid, length, axis, mode):
    """Resizes one axis without antialiasing; beyond the border its cell is repeated."""
    old = grid.shape[axis]
    weights = np.zeros((length, old))
    for row in range(length):
        centre = (row + 0.5) * old / length - 0.5
        for cell in range(math.floor(centre) - 1, math.floor(centre) + 3):
            weights[row, min(max(cell, 0), old - 1)] += np_kernel(centre - cell, mode)
    return np.moveaxis(np.tensordot(weights, grid, (1, axis)), 0, axis)


def pillow_resize(grid_HWC, size_hw, mode):
    planes = [
        Image.fromarray(np.ascontiguousarray(plane, np.float32)).resize(
            size_hw[::-1], PILLOW[mode]
        )
        for plane in np.moveaxis(grid_HWC, -1, 0)
    ]
    return np.stack([np.asarray(plane) for plane in planes], -1)


def random_grid(shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape)


@pytest.mark.parametrize("mode", ["bilinear", "bicubic"])
@pytest.mark.parametrize("size", [(4, 6), (7, 6), (9, 13), (4, 7)])
def test_enlarging_equals_numpy(size, mode):
    grid = random_grid((2, 4, 6, 3))
    expected = np_enlarge_axis(grid, size[0], 1, mode)
    expected = np_enlarge_axis(expected, size[1], 2, mode)
    found = resize_grid(torch.tensor(grid), size, mode)
    assert found.dtype == torch.float32
    np.testing.assert_allclose(found, expected, atol=2e-6)


@pytest.mark.parametrize("mode", ["bilinear", "bicubic"])
@pytest.mark.parametrize("size", [(8, 12), (4, 5), (3, 12), (1, 1)])
def test_reducing_equals_pillow(size, mode):
    grid = random_grid((2, 8, 12, 3))
    found = resize_grid(torch.tensor(grid), size, mode)
    expected = np.stack([pillow_resize(image, size, mode) for image in grid])
    np.testing.assert_allclose(found, expected, atol=2e-6)


@pytest.mark.parametrize("mode", ["bilinear", "bicubic"])
def test_only_the_axis_that_shrinks_is_antialiased(mode):
    grid = random_grid((1, 8, 4, 2))
    wide = np_enlarge_axis(grid, 11, 2, mode)
    expected = pillow_resize(wide[0], (3, 11), mode)
    found = resize_grid(torch.tensor(grid), (3, 11), mode)[0]
    np.testing.assert_allclose(found, expected, atol=2e-6)


@given(SIZES, SIZES, MODES)
def test_weights_sum_to_one(old, new, mode):
    found = resize_grid(torch.full((1, *old, 2), 3.0), new, mode)
    assert found.shape == (1, *new, 2)
    torch.testing.assert_close(found, torch.full((1, *new, 2), 3.0))


@given(SIZES, SIZES, MODES, st.integers(0, 1000))
def test_mirroring_commutes_with_resizing(old, new, mode, seed):
    grid = torch.tensor(random_grid((1, *old, 2), seed), dtype=torch.float32)
    mirrored = resize_grid(grid.flip(2), new, mode)
    expected = resize_grid(grid, new, mode).flip(2)
    torch.testing.assert_close(mirrored, expected, atol=1e-5, rtol=1e-4)


@given(st.sampled_from(["larger", "smaller", "student", "teacher"]), SIZES, SIZES)
def test_rules(rule, student, teacher):
    prediction = torch.tensor(random_grid((2, *student, 3)), dtype=torch.float32)
    target = torch.tensor(random_grid((2, *teacher, 5)), dtype=torch.float32)
    mask = torch.ones(2, *teacher, dtype=torch.bool)
    wanted = {
        "larger": tuple(np.maximum(student, teacher)),
        "smaller": tuple(np.minimum(student, teacher)),
        "student": student,
        "teacher": teacher,
    }[rule]
    assert common_size(student, teacher, rule) == wanted
    found_prediction, found_target, found_mask = match_grids(
        prediction, target, mask, rule
    )
    assert found_prediction.shape == (2, *wanted, 3)
    assert found_target.shape == (2, *wanted, 5)
    assert found_mask.shape == (2, *wanted)
    assert found_mask.dtype == torch.bool
    assert found_mask.all()
    assert (found_prediction is prediction) == (student == wanted)
    assert (found_target is target) == (teacher == wanted)


@given(
    SIZES,
    SIZES,
    MODES,
    st.sampled_from(["larger", "smaller", "student"]),
    st.integers(0, 2**32 - 1),
)
def test_masked_cells_do_not_leak(student, teacher, mode, rule, seed):
    rng = np.random.default_rng(seed)
    mask = rng.random((1, *teacher)) < rng.choice([0.5, 0.9])
    target = rng.normal(size=(1, *teacher, 2)).astype(np.float32)
    other = target.copy()
    target[~mask] = np.nan
    prediction = torch.zeros(1, *student, 2)
    _, holed, valid = match_grids(
        prediction, torch.tensor(target), torch.tensor(mask), rule, mode
    )
    _, whole, _ = match_grids(
        prediction, torch.tensor(other), torch.ones_like(torch.tensor(mask)), rule, mode
    )
    if not valid.any():
        return
    # A valid cell is what it would be had no cell been masked, whatever was masked.
    bound = 1.1e-3 * max(1.0, np.abs(other).max())
    assert (holed[valid] - whole[valid]).abs().max() <= bound


def test_a_masked_cell_takes_its_support_along():
    mask = torch.ones(1, 8, 8, dtype=torch.bool)
    mask[0, 4, 4] = False
    # Twice as many cells: 2 i and 2 i + 1 are centred a quarter cell off cell i.
    # Bilinear, row r draws on floor(r / 2 - .25) and the next: 4 is among them for 7 to
    # 10; cubic, on two to either side: 4 is among them for 5 to 12.
    bilinear = ~resize_mask(mask, (16, 16), "bilinear")[0]
    cubic = ~resize_mask(mask, (16, 16), "bicubic")[0]
    for found, reach in ((bilinear, slice(7, 11)), (cubic, slice(5, 13))):
        expected = torch.zeros(16, 16, dtype=torch.bool)
        expected[reach, reach] = True
        assert torch.equal(found, expected)


def test_cubic_overshoot_does_not_hide_a_masked_cell():
    # Two valid cells, then masked ones: the resized mask itself is above 1 at cells to
    # which masked ones contribute with a negative weight.
    mask = torch.tensor([True, True, True, False, False, False]).reshape(1, 1, 6)
    resized = resize_grid(mask.float()[..., None], (1, 18), "bicubic")[0, 0, :, 0]
    valid = resize_mask(mask, (1, 18), "bicubic")[0, 0]
    assert ((resized > 1 - 1e-3) & ~valid).any()


def test_a_mask_of_the_same_size_is_returned():
    mask = torch.rand(2, 3, 4) < 0.5
    assert resize_mask(mask, (3, 4)) is mask


def test_gradients_through_a_match_are_finite():
    prediction = torch.zeros(1, 4, 4, 2, requires_grad=True)
    target = torch.full((1, 8, 8, 2), torch.nan)
    found, target, mask = match_grids(
        prediction, target, torch.zeros(1, 8, 8, dtype=torch.bool), "smaller"
    )
    assert not mask.any()
    (found - target).square().sum().backward()
    assert torch.isfinite(prediction.grad).all()


def test_a_mask_under_autocast_is_the_same():
    mask = torch.rand(2, 16, 16, generator=torch.Generator().manual_seed(0)) < 0.98
    expected = resize_mask(mask, (11, 23))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(resize_mask(mask, (11, 23)), expected)


def np_sample(grid_HWC, x, y):
    height, width, _ = grid_HWC.shape
    column, row = x * width - 0.5, y * height - 0.5
    total = 0.0
    for i in (math.floor(row), math.floor(row) + 1):
        for j in (math.floor(column), math.floor(column) + 1):
            weight = (1 - abs(row - i)) * (1 - abs(column - j))
            cell = grid_HWC[min(max(i, 0), height - 1), min(max(j, 0), width - 1)]
            total = total + weight * cell
    return total


@given(SIZES, st.integers(0, 2**32 - 1))
def test_sampling_equals_numpy(size, seed):
    rng = np.random.default_rng(seed)
    grid = rng.normal(size=(2, *size, 3))
    points = rng.uniform(-0.3, 1.3, (2, 11, 2))
    values, inside = sample_grid(torch.tensor(grid), torch.tensor(points))
    expected_inside = ((points >= 0) & (points < 1)).all(-1)
    np.testing.assert_array_equal(inside, expected_inside)
    assert values.dtype == torch.float32
    for image in range(2):
        for point, (x, y) in enumerate(points[image]):
            expected = np_sample(grid[image], x, y) if inside[image, point] else 0.0
            np.testing.assert_allclose(values[image, point], expected, atol=2e-5)


def test_sampling_at_cell_centres_returns_the_cells():
    grid = torch.tensor(random_grid((1, 3, 5, 2)), dtype=torch.float32)
    rows, columns = np.mgrid[:3, :5]
    points = np.stack([(columns + 0.5) / 5, (rows + 0.5) / 3], -1).reshape(1, 15, 2)
    values, inside = sample_grid(grid, torch.tensor(points))
    assert inside.all()
    torch.testing.assert_close(values.reshape(1, 3, 5, 2), grid, atol=1e-5, rtol=0)


def test_points_that_are_nan_are_outside_and_harmless():
    grid = torch.ones(1, 2, 2, 1, requires_grad=True)
    points = torch.tensor([[[torch.nan, 0.5], [torch.inf, 0.5], [0.5, 0.5], [1.0, 0]]])
    values, inside = sample_grid(grid, points)
    assert inside.tolist() == [[False, False, True, False]]
    assert values.flatten().tolist() == [0, 0, 1, 0]
    values.sum().backward()
    torch.testing.assert_close(grid.grad, torch.full_like(grid, 0.25))
