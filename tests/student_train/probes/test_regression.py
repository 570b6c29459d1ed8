"""Fits against Newton's method and linear algebra in NumPy, in the original axes."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from student_train.probes import regression
from student_train.probes.regression import (
    FLOAT32_GRADIENT,
    GRADIENT,
    Basis,
    logistic_path,
    ridge_path,
)

PENALTIES = (1.0, 1e-2, 1e-4)


def problem(seed, num=150, width=5, num_classes=3):
    rng = np.random.default_rng(seed)
    mixing = rng.normal(size=(width, width)) * np.logspace(0, -2, width)
    features = (rng.normal(size=(num, width)) @ mixing + 3).astype(np.float32)
    shares = rng.dirichlet(np.ones(num_classes) * 0.5, num)
    return features, shares


def standardised(features):
    features = features.astype(np.float64)
    return (features - features.mean(0)) / features.std(0)


def gradient_and_hessian(design, shares, weights, penalty):
    """Of the penalised loss, for weights (D + 1, K) with the bias last, in NumPy."""
    num, width = design.shape
    num_classes = shares.shape[1]
    logits = design @ weights
    chance = np.exp(logits - logits.max(1, keepdims=True))
    chance /= chance.sum(1, keepdims=True)
    penalties = np.full((width, num_classes), penalty)
    penalties[-1] = 0
    gradient = design.T @ (chance - shares) / num + penalties * weights
    hessian = np.zeros((width, num_classes, width, num_classes))
    for a in range(num_classes):
        for b in range(num_classes):
            cross = chance[:, a] * ((a == b) - chance[:, b])
            hessian[:, a, :, b] = (design * cross[:, None]).T @ design / num
    size = width * num_classes
    return gradient, hessian.reshape(size, size) + np.diag(penalties.ravel())


def newton(design, shares, penalty):
    weights = np.zeros((design.shape[1], shares.shape[1]))
    for _ in range(50):
        gradient, hessian = gradient_and_hessian(design, shares, weights, penalty)
        step = np.linalg.lstsq(hessian, gradient.ravel(), rcond=1e-13)[0]
        weights -= step.reshape(weights.shape)
    return weights


def in_original_axes(basis, found):
    return np.concatenate([basis.axes_DR @ found.weight_RK, found.bias_K[None]])


@pytest.mark.parametrize("piece_rows", [16_384, 37])
@pytest.mark.parametrize("seed", [0, 1])
def test_logistic_fit_is_newtons(monkeypatch, seed, piece_rows):
    monkeypatch.setattr(regression, "PIECE_ROWS", piece_rows)
    features, shares = problem(seed)
    design = np.concatenate([standardised(features), np.ones((150, 1))], axis=1)
    basis = Basis.of(torch.from_numpy(features))
    rotated = basis.rotate(torch.from_numpy(features))
    path = logistic_path(rotated, torch.from_numpy(shares), PENALTIES)
    for found, penalty in zip(path, PENALTIES, strict=True):
        weights = in_original_axes(basis, found)
        gradient, _ = gradient_and_hessian(design, shares, weights, penalty)
        assert found.penalty == penalty
        assert np.abs(gradient).max() < 2e-5
        expected = design @ newton(design, shares, penalty)
        logits = found(rotated).numpy()
        np.testing.assert_allclose(
            logits - logits.mean(1, keepdims=True),
            expected - expected.mean(1, keepdims=True),
            atol=2e-3,
        )


def test_float32_products_still_give_newtons_probabilities():
    features, shares = problem(5, num=600, width=12)
    design = np.concatenate([standardised(features), np.ones((600, 1))], axis=1)
    basis = Basis.of(torch.from_numpy(features))
    rotated = basis.rotate(torch.from_numpy(features))
    path = logistic_path(
        rotated, torch.from_numpy(shares), PENALTIES, tolerance=FLOAT32_GRADIENT
    )
    for found, penalty in zip(path, PENALTIES, strict=True):
        logits = design @ newton(design, shares, penalty)
        chance = np.exp(logits - logits.max(1, keepdims=True))
        chance /= chance.sum(1, keepdims=True)
        assert found.gradient <= FLOAT32_GRADIENT
        np.testing.assert_allclose(found(rotated).softmax(1), chance, atol=1e-3)


def test_separable_rows_end_with_finite_weights():
    # No weight is large enough for them, and the products' rounding shows.
    features = np.repeat(np.eye(4, dtype=np.float32), 50, axis=0)
    basis = Basis.of(torch.from_numpy(features))
    rotated = basis.rotate(torch.from_numpy(features))
    for tolerance in (GRADIENT, FLOAT32_GRADIENT):
        *_, found = logistic_path(
            rotated,
            torch.from_numpy(features),
            (1.0, 1e-3, 1e-6, 1e-9),
            tolerance=tolerance,
        )
        assert bool(found.weight_RK.isfinite().all())
        assert found.gradient < 1e-3
        expected = features.argmax(1)
        np.testing.assert_array_equal(found(rotated).argmax(1), expected)


def test_what_is_not_asked_for_is_not_fitted():
    features, shares = problem(6)
    rotated = torch.from_numpy(standardised(features))
    path = logistic_path(rotated, torch.from_numpy(shares), (1.0, math.nan))
    assert next(path).penalty == 1.0


def test_a_dead_channel_is_floored_not_amplified():
    features, _ = problem(2)
    features[:, 1] = 7
    features[0, 1] += 1e-3
    basis = Basis.of(torch.from_numpy(features))
    std = features.astype(np.float64).std(0)
    np.testing.assert_allclose(
        basis.std_D, np.maximum(std, 0.01 * np.median(std)), rtol=1e-9
    )


def test_axes_are_those_of_the_correlation_and_ranks_are_cut():
    features, _ = problem(3)
    doubled = np.concatenate([features, features], axis=1)
    basis = Basis.of(torch.from_numpy(doubled))
    assert basis.axes_DR.shape == (10, 5)
    correlation = np.corrcoef(doubled.astype(np.float64).T)
    np.testing.assert_allclose(
        basis.axes_DR @ torch.diag(basis.spectrum_R) @ basis.axes_DR.T,
        correlation,
        atol=1e-9,
    )
    # Twice the same features at twice the penalty are the same fit.
    numbers = torch.from_numpy(features[:, 0] ** 2).double()
    single = Basis.of(torch.from_numpy(features))
    once = single.rotate(torch.from_numpy(features))
    twice = basis.rotate(torch.from_numpy(doubled))
    (a,) = ridge_path(once, single.spectrum_R, numbers, [0.1])
    (b,) = ridge_path(twice, basis.spectrum_R, numbers, [0.2])
    np.testing.assert_allclose(a(once), b(twice), atol=1e-9)


@settings(max_examples=20)
@given(st.integers(0, 2**32 - 1), st.floats(1e-5, 10))
def test_ridge_is_the_normal_equations(seed, penalty):
    features, shares = problem(seed, num=40)
    numbers = shares[:, 0] * 5 + 2
    basis = Basis.of(torch.from_numpy(features))
    rotated = basis.rotate(torch.from_numpy(features))
    (found,) = ridge_path(
        rotated, basis.spectrum_R, torch.from_numpy(numbers), [penalty]
    )
    design = standardised(features)
    expected = np.linalg.solve(
        design.T @ design / 40 + penalty * np.eye(5),
        design.T @ (numbers - numbers.mean()) / 40,
    )
    np.testing.assert_allclose(
        found(rotated)[:, 0], design @ expected + numbers.mean(), atol=1e-7
    )


def test_an_absent_class_is_never_predicted_and_finite():
    features, shares = problem(4)
    with_absent = np.insert(shares, 1, 0.0, axis=1)
    basis = Basis.of(torch.from_numpy(features))
    rotated = basis.rotate(torch.from_numpy(features))
    (three,) = logistic_path(rotated, torch.from_numpy(shares), [1e-3])
    (four,) = logistic_path(rotated, torch.from_numpy(with_absent), [1e-3])
    np.testing.assert_array_equal(four(rotated)[:, [0, 2, 3]], three(rotated))
    assert float(four(rotated)[:, 1].max()) == regression.ABSENT_LOGIT
