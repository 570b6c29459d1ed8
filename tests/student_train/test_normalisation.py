"""Normalisations by their laws, against NumPy; and heads that undo them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from student_train.deep_heads import Ladder, TransformerHead
from student_train.folding import fold
from student_train.heads import Adapter, BevGrid, BevHead, LinearHead
from student_train.normalisation import Normaliser, phi_s, whitening

RULES = ("standardise", "phi_s", "whiten")


def features(channels=12, count=4000, seed=0):
    """Correlated, off centre, of standard deviations about 20 times apart."""
    rng = np.random.default_rng(seed)
    mixing = np.eye(channels) + 0.2 * rng.normal(size=(channels, channels))
    scales = np.geomspace(0.2, 4, channels)
    return rng.normal(size=(count, channels)) @ mixing * scales + 5 * scales


def statistics_of(values):
    return {
        "mean": values.mean(0),
        "variance": values.var(0),
        "covariance": np.cov(values.T, bias=True),
    }


def normalised(rule, values):
    normaliser = Normaliser.of(rule, statistics_of(values))
    return normaliser(torch.from_numpy(values)).double().numpy(), normaliser


@pytest.mark.parametrize("channels", [12, 10, 7])
@pytest.mark.parametrize("rule", RULES)
def test_mean_0_and_variance_1_in_every_channel(rule, channels):
    """Also where there is no Hadamard matrix of the size."""
    found, _ = normalised(rule, features(channels))
    np.testing.assert_allclose(found.mean(0), 0, atol=2e-4)
    np.testing.assert_allclose(found.var(0), 1, rtol=1e-3)


def test_standardise_is_its_formula():
    values = features()
    found, _ = normalised("standardise", values)
    expected = (values - values.mean(0)) / values.std(0)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("channels", [12, 10])
def test_phi_s_keeps_proportions(channels):
    """One scale for all: distances and angles of centred features as they were."""
    values = features(channels)
    found, normaliser = normalised("phi_s", values)
    centred = values - values.mean(0)
    scale = np.sqrt(values.var(0).mean())
    np.testing.assert_allclose(
        np.linalg.norm(found, axis=1),
        np.linalg.norm(centred, axis=1) / scale,
        rtol=1e-4,
    )
    np.testing.assert_allclose(
        found[:50] @ found[:50].T, centred[:50] @ centred[:50].T / scale**2, atol=1e-2
    )
    matrix = normaliser.matrix.double().numpy()
    np.testing.assert_allclose(
        matrix @ matrix.T, np.eye(channels) / scale**2, atol=1e-5
    )


def test_phi_s_by_its_parts():
    """H U^T / sqrt(mean lambda), with U of the features' own singular vectors."""
    values = features(4)
    centred = values - values.mean(0)
    _, singular, rows = np.linalg.svd(centred, full_matrices=False)
    axes = rows[::-1].T
    largest = np.abs(axes).argmax(0)
    axes = axes * np.sign(axes[largest, range(4)])
    variances = singular[::-1] ** 2 / len(values)
    turn = np.array([[1, 1, 1, 1], [1, -1, 1, -1], [1, 1, -1, -1], [1, -1, -1, 1]]) / 2
    expected = turn @ axes.T / np.sqrt(variances.mean())
    matrix, inverse = phi_s(statistics_of(values)["covariance"])
    np.testing.assert_allclose(matrix, expected, atol=1e-10)
    np.testing.assert_allclose(matrix @ inverse, np.eye(4), atol=1e-12)


def test_whitening_decorrelates_and_is_symmetric():
    values = features()
    matrix, inverse = whitening(statistics_of(values)["covariance"])
    np.testing.assert_allclose(matrix, matrix.T, atol=1e-12)
    np.testing.assert_allclose(matrix @ inverse, np.eye(12), atol=1e-9)
    found, _ = normalised("whiten", values)
    np.testing.assert_allclose(np.cov(found.T, bias=True), np.eye(12), atol=2e-3)


@pytest.mark.parametrize("rule", RULES)
def test_undo_is_the_inverse(rule):
    values = features()
    found, normaliser = normalised(rule, values)
    again = normaliser.undo(torch.from_numpy(found)).double().numpy()
    np.testing.assert_allclose(again, values, rtol=1e-4, atol=1e-4)
    matrix, offset = (one.numpy() for one in normaliser.undoing())
    np.testing.assert_allclose(found @ matrix.T + offset, values, rtol=1e-4, atol=1e-4)


def test_dead_channels_and_axes_are_floored():
    values = np.array([[1.0, 5.0, 5.0], [3.0, 5.0, 7.0]], np.float32)
    normaliser = Normaliser.of("standardise", statistics_of(values.astype(np.float64)))
    # std is 1, 0, 1: the dead channel is divided by 0.01 times the median, not by 0.
    np.testing.assert_allclose(normaliser.std, [1, 0.01, 1], rtol=1e-6)
    off = values + np.array([[0, 0.1, 0], [0, 0, 0]], np.float32)
    found = normaliser(torch.from_numpy(off))
    np.testing.assert_allclose(found, [[-1, 10, -1], [1, 0, 1]], rtol=1e-4)
    matrix, _ = whitening(np.diag([4.0, 0.0, 4.0]))
    np.testing.assert_allclose(np.diag(matrix), [0.5, 50, 0.5])
    for rule in RULES:
        constant = np.full((5, 3), 7.0)
        assert (normalised(rule, constant)[0] == 0).all()


@pytest.mark.parametrize("rule", RULES)
def test_missing_vectors_stay_missing_and_alone(rule):
    values = features()[:6]
    normaliser = Normaliser.of(rule, statistics_of(features()))
    expected = normaliser(torch.from_numpy(values))
    values[2] = np.nan
    found = normaliser(torch.from_numpy(values))
    assert found[2].isnan().all()
    assert torch.equal(found[[0, 1, 3, 4, 5]], expected[[0, 1, 3, 4, 5]])


@pytest.mark.parametrize("rule", RULES)
def test_autocast_changes_nothing(rule):
    values = torch.from_numpy(features()[:5])
    normaliser = Normaliser.of(rule, statistics_of(features()))
    expected = normaliser(values), normaliser.undo(values)
    with torch.autocast("cpu", torch.bfloat16):
        found = normaliser(values), normaliser.undo(values)
    assert all(map(torch.equal, found, expected))


@pytest.mark.parametrize("rule", RULES)
def test_until_it_is_fitted_it_gives_nothing_plausible(rule):
    assert Normaliser(rule, 12)(torch.ones(2, 12)).isnan().all()


class Plain(nn.Module):
    """A head of another package that says nothing of its layers."""


def heads(channels):
    torch.manual_seed(3)
    grid = BevGrid(x_m=(-8, 8), y_m=(-8, 8), cells=(2, 3))
    tokens, map_ = torch.randn(2, 6), torch.randn(2, 4, 4, 6)
    camera = (
        torch.eye(3).expand(2, 3, 3),
        torch.eye(4).expand(2, 4, 4),
        (16, 16),
    )
    return {
        "adapter": (Adapter(6, channels, 9), (tokens,)),
        "linear": (LinearHead(6, channels), (tokens,)),
        "ladder": (Ladder(6, channels, 3, 9, 4), ([tokens, 2 * tokens, 1 + tokens],)),
        "transformer": (TransformerHead(6, channels, heads=2), (tokens, map_)),
        "bev": (BevHead(6, channels, 9, grid, [0.0]), (map_, *camera)),
    }


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("name", list(heads(1)))
def test_a_folded_head_gives_what_the_teacher_would(name, rule):
    head, inputs = heads(12)[name]
    before = {key: one.clone() for key, one in head.state_dict().items()}
    normaliser = Normaliser.of(rule, statistics_of(features()))
    folded = fold(head, normaliser)
    found, own = folded(*inputs), head(*inputs)
    if isinstance(own, tuple):
        pairs = [*zip(found, own, strict=True)]
    else:
        pairs = [(found, own)]
    pairs = [pair for pair in pairs if pair[1].is_floating_point()]
    assert pairs
    for raw, prediction in pairs:
        torch.testing.assert_close(
            raw, normaliser.undo(prediction), rtol=1e-4, atol=1e-4
        )
    assert all(torch.equal(one, before[key]) for key, one in head.state_dict().items())


def test_what_cannot_be_folded_is_refused():
    normaliser = Normaliser.of("standardise", statistics_of(features()))
    with pytest.raises(ValueError, match=r"must have last_layers\(\) .* got Plain"):
        fold(Plain(), normaliser)
    assert isinstance(fold(Plain(), None), Plain)
