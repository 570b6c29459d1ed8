"""Hadamard matrices by their definition, and equal variances for any size."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from student_train.rotations import equalising_rotation, hadamard, plane_rotations

# Widths of encoders, and cores of either of Paley's constructions.
WIDTHS = (1, 2, 4, 8, 12, 20, 28, 36, 44, 48, 72, 96, 192, 320, 384, 768, 1152, 1408)
WITHOUT = (3, 5, 6, 10, 22, 52, 92)


@pytest.mark.parametrize("order", WIDTHS)
def test_rows_are_orthogonal_and_entries_are_one_in_size(order):
    found = hadamard(order)
    assert found.shape == (order, order)
    assert (np.abs(found) == 1).all()
    np.testing.assert_array_equal(found @ found.T, order * np.eye(order))


def test_orders_of_two_and_of_twelve_are_those_of_the_books():
    """scipy's are the same: Sylvester's, rows and columns in the usual order."""
    expected = [[1, 1, 1, 1], [1, -1, 1, -1], [1, 1, -1, -1], [1, -1, -1, 1]]
    np.testing.assert_array_equal(hadamard(4), expected)
    # Paley over 11: the squares are 1, 3, 4, 5, 9.
    second = [-1, 1, -1, 1, -1, -1, -1, 1, 1, 1, -1, 1]
    np.testing.assert_array_equal(hadamard(12)[1], second)


@pytest.mark.parametrize("order", WITHOUT)
def test_there_is_none_of_other_orders(order):
    assert hadamard(order) is None


@settings(max_examples=40)
@given(st.integers(1, 40), st.integers(0, 2**32 - 1), st.floats(0, 6))
def test_any_variances_become_equal(num_channels, seed, spread):
    """The law: orthogonal, and the diagonal of R diag(v) R^T is constant."""
    rng = np.random.default_rng(seed)
    variances = np.exp(spread * rng.normal(size=num_channels))
    variances[rng.random(num_channels) < 0.2] = 0
    for make in (equalising_rotation, plane_rotations):
        rotation = make(variances)
        np.testing.assert_allclose(
            rotation @ rotation.T, np.eye(num_channels), atol=1e-12
        )
        diagonal = (rotation**2) @ variances
        np.testing.assert_allclose(
            diagonal, variances.mean(), rtol=1e-9, atol=1e-300 + 1e-12 * variances.max()
        )


def test_equal_variances_are_left_alone():
    np.testing.assert_array_equal(plane_rotations(np.ones(5)), np.eye(5))
    np.testing.assert_array_equal(plane_rotations(np.zeros(5)), np.eye(5))
