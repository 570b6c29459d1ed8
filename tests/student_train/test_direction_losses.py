"""Losses of directions where directions are hard: zero, equal, opposite vectors."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from student_train.losses import angle, cosine, map_cosine, unit_l2

ALL = torch.tensor([True, True, True, True])
# Equal up to length, at right angles, opposite, and a vector of no direction.
PREDICTION = [[2.0, 0.0], [1.0, 0.0], [1.0, 0.0], [0.0, 0.0]]
TARGET = [[5.0, 0.0], [0.0, 3.0], [-4.0, 0.0], [1.0, 0.0]]


def leaf():
    return torch.tensor(PREDICTION, requires_grad=True)


def test_angles_of_known_vectors():
    found = angle(leaf(), torch.tensor(TARGET), ALL, dispersion=0.5).detach()
    angles = np.array([0, math.pi / 2, math.pi, math.pi / 2])
    np.testing.assert_allclose(found, angles**2 / 0.5, rtol=2e-6, atol=1e-5)


def test_distances_of_known_vectors():
    found = unit_l2(leaf(), torch.tensor(TARGET), ALL).detach()
    np.testing.assert_allclose(found, [0, math.sqrt(2), 2, 1], atol=2e-6)


@pytest.mark.parametrize("name", ["angle", "unit_l2", "cosine", "map_cosine"])
def test_gradients_stay_finite(name):
    prediction, target = leaf(), torch.tensor(TARGET)
    losses = {
        "angle": lambda: angle(prediction, target, ALL, dispersion=0.5),
        "unit_l2": lambda: unit_l2(prediction, target, ALL),
        "cosine": lambda: cosine(prediction, target, ALL),
        "map_cosine": lambda: map_cosine(prediction, target, ALL),
    }
    losses[name]().sum().backward()
    assert torch.isfinite(prediction.grad).all()


@pytest.mark.parametrize("size", [1e-1, 1e-2, 1e-3, 1e-4])
def test_small_angles_keep_their_digits(size):
    """An arc cosine in float32 is 0 below about 3e-4."""
    prediction = torch.tensor([[math.cos(size), math.sin(size)]])
    found = angle(prediction, torch.tensor([[1.0, 0.0]]), ALL[:1], dispersion=1.0)
    assert found.item() == pytest.approx(size**2, rel=1e-3)


def test_teachers_of_narrow_and_wide_cones_count_alike():
    """At a vector as far off as the teacher's are on average, the loss is 1."""
    rng = np.random.default_rng(0)
    for spread in (0.05, 0.5):
        turns = spread * rng.normal(size=2000)
        dispersion = float((turns**2).mean())
        target = torch.tensor(np.stack([np.cos(turns), np.sin(turns)], -1))
        mean = torch.tensor([[1.0, 0.0]]).expand(2000, 2)
        mask = torch.ones(2000, dtype=torch.bool)
        found = angle(mean, target, mask, dispersion=dispersion)
        assert found.mean().item() == pytest.approx(1, rel=1e-4)


def test_a_map_is_one_vector():
    """The long token agrees, the short one is opposite, the third does not count."""
    prediction = torch.tensor([[[[100.0, 0.0], [1.0, 0.0], [9.0, 9.0]]]])
    target = torch.tensor([[[[100.0, 0.0], [-1.0, 0.0], [-9.0, 9.0]]]])
    mask = torch.tensor([[[True, True, False]]])
    expected = 1 - (10_000 - 1) / (10_000 + 1)
    assert map_cosine(prediction, target, mask).item() == pytest.approx(
        expected, rel=1e-3
    )
    assert cosine(prediction, target, mask).item() == pytest.approx(1.0)
