"""Pixels and cells against loops over pixels."""

import numpy as np
import pytest
import torch

from student_train.probes import cells


def overlap(cell, num_cells, pixel, num_pixels):
    start = max(cell / num_cells, pixel / num_pixels)
    end = min((cell + 1) / num_cells, (pixel + 1) / num_pixels)
    return max(0.0, end - start)


SHAPES = [((6, 8), (3, 2)), ((4, 4), (4, 4)), ((5, 7), (3, 4)), ((9, 6), (2, 5))]


@pytest.mark.parametrize(("pixels", "grid"), SHAPES)
def test_shares_against_brute_force(monkeypatch, pixels, grid):
    monkeypatch.setattr(cells, "PIECE_ELEMENTS", 100)
    labels = np.random.default_rng(0).integers(-1, 3, (4, *pixels))
    labels[0, :, : pixels[1] // 2] = -1
    found = cells.class_shares(torch.from_numpy(labels), grid, 3)
    for image, i, j in np.ndindex(4, *grid):
        areas = np.zeros(3)
        for y, x in np.ndindex(*pixels):
            if labels[image, y, x] >= 0:
                areas[labels[image, y, x]] += overlap(
                    i, grid[0], y, pixels[0]
                ) * overlap(j, grid[1], x, pixels[1])
        expected = areas / areas.sum() if areas.sum() > 1e-12 else np.zeros(3)
        np.testing.assert_allclose(found[image, i, j], expected, atol=1e-6)


@pytest.mark.parametrize(("pixels", "grid"), SHAPES)
def test_means_against_brute_force(pixels, grid):
    rng = np.random.default_rng(1)
    numbers = rng.normal(size=(2, *pixels))
    numbers[rng.random(numbers.shape) < 0.5] = np.nan
    found = cells.cell_means(torch.from_numpy(numbers), grid)
    for image, i, j in np.ndindex(2, *grid):
        area = total = 0.0
        for y, x in np.ndindex(*pixels):
            if not np.isnan(numbers[image, y, x]):
                part = overlap(i, grid[0], y, pixels[0])
                part *= overlap(j, grid[1], x, pixels[1])
                area, total = area + part, total + part * numbers[image, y, x]
        expected = total / area if area > 1e-12 else np.nan
        np.testing.assert_allclose(found[image, i, j], expected, atol=1e-9)


def test_upsampling_puts_centres_on_centres():
    # A ramp sampled at cells' centres is, at pixels' centres, the ramp; flat beyond
    # the outermost centres.
    ramp = (torch.arange(4) + 0.5) / 4
    grid = ramp.reshape(1, 1, 4, 1).expand(1, 2, 4, 1)
    found = cells.upsample(grid, torch.zeros(1, 6, 12))[0, 0]
    centres = ((np.arange(12) + 0.5) / 12).clip(0.125, 0.875)
    np.testing.assert_allclose(found, np.tile(centres, (6, 1)), atol=1e-6)


def test_valid_pixels_are_those_whose_centre_lies_in_a_valid_cell():
    valid = torch.tensor([[[True, False, True]]])
    found = cells.valid_pixels(valid, torch.zeros(1, 2, 7))
    inside = [valid[0, 0, int((x + 0.5) / 7 * 3)].item() for x in range(7)]
    assert found.tolist() == [[inside, inside]]
