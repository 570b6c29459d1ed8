"""Linear probes: chance, perfection, invariances, and who chooses."""

import numpy as np
import pytest
import torch

from student_train.errors import TrainingError
from student_train.probes.linear import (
    PENALTIES,
    RIDGE_PENALTIES,
    linear_probe,
    ridge_probe,
)
from student_train.probes.splits import ClassSplit, NumberSplit


def blobs(rng, num, spread=1.0, width=6, num_classes=4):
    centres = 3 * np.random.default_rng(98).normal(size=(num_classes, width))
    labels = rng.integers(0, num_classes, num)
    features = centres[labels] + spread * rng.normal(size=(num, width))
    return ClassSplit(features.astype(np.float32), labels)


def numbers(rng, num, noise=0.1, width=6):
    features = rng.normal(size=(num, width)).astype(np.float32)
    return NumberSplit(
        features,
        features @ np.arange(1.0, width + 1) + 4 + noise * rng.normal(size=num),
    )


def test_separable_is_perfect():
    rng = np.random.default_rng(0)
    score = linear_probe(*(blobs(rng, 100, 0.05) for _ in range(3)), 4)
    assert score.value == score.choose_value == 1
    # All penalties tie: the strongest is taken.
    assert score.setting == {"l2": PENALTIES[0]}
    assert score.details["gradient"] < 1e-4


def test_random_labels_give_chance():
    rng = np.random.default_rng(1)
    splits = [
        ClassSplit(blobs(rng, 800).features_ND, rng.integers(0, 4, 800))
        for _ in range(3)
    ]
    assert linear_probe(*splits, 4).value == pytest.approx(0.25, abs=0.07)


def test_scale_and_shift_of_channels_do_not_matter():
    rng = np.random.default_rng(2)
    splits = [blobs(rng, 150, 3.0) for _ in range(3)]
    # Powers of two, and none so small that the floor takes its channel for dead.
    scale = np.float32([0.25, 1, 2, 8, 16, 0.5])
    moved = [
        ClassSplit((split.features_ND + 2) * scale, split.labels_N) for split in splits
    ]
    here, there = linear_probe(*splits, 4), linear_probe(*moved, 4)
    assert here == linear_probe(*splits, 4)
    assert here.value == there.value
    assert here.setting == there.setting
    assert here.choose_value == there.choose_value


def test_choose_decides_the_penalty():
    # One feature tells the true class; noise columns let a weak penalty learn the fit
    # split's flipped labels by heart.
    rng = np.random.default_rng(3)

    def make(num, flips):
        truth = rng.integers(0, 2, num)
        noise = rng.normal(size=(num, 60))
        features = np.concatenate([(truth - 0.5)[:, None] * 4, noise], axis=1)
        labels = np.where(rng.random(num) < flips, 1 - truth, truth)
        return ClassSplit(features.astype(np.float32), labels)

    fit, choose, test = make(120, 0.3), make(400, 0), make(400, 0)
    strong = linear_probe(fit, choose, test, 2)
    weak = linear_probe(fit, fit, test, 2)
    # Chosen on what it was fitted to, the weak penalty looks best and is not.
    assert weak.choose_value == 1
    assert weak.setting["l2"] < strong.setting["l2"]
    assert weak.value < strong.value
    # Test has no say.
    assert linear_probe(fit, choose, fit, 2).setting == strong.setting
    curve = [strong.details[f"choose_l2_{penalty:g}"] for penalty in PENALTIES]
    assert strong.choose_value == max(curve)
    assert strong.setting["l2"] == PENALTIES[curve.index(max(curve))]


def test_constant_features_answer_the_majority():
    labels = np.array([0, 1, 1, 2])
    split = ClassSplit(np.ones((4, 3), np.float32), labels)
    score = linear_probe(split, split, split, 3)
    assert score.value == score.details["majority_accuracy"] == 0.5


def test_one_class_in_fit_is_always_answered():
    rng = np.random.default_rng(4)
    fit = ClassSplit(blobs(rng, 10).features_ND, np.full(10, 2))
    test = blobs(rng, 50)
    expected = (test.labels_N == 2).mean()
    assert linear_probe(fit, test, test, 4).value == pytest.approx(expected)


def test_tensors_and_inference_mode():
    rng = np.random.default_rng(5)
    splits = [blobs(rng, 60) for _ in range(3)]
    tensors = [
        ClassSplit(
            torch.from_numpy(split.features_ND).requires_grad_(),
            torch.from_numpy(split.labels_N),
        )
        for split in splits
    ]
    with torch.inference_mode():
        assert linear_probe(*tensors, 4) == linear_probe(*splits, 4)


def test_refusals():
    rng = np.random.default_rng(6)
    good = blobs(rng, 20)
    empty = ClassSplit(np.zeros((0, 6), np.float32), np.zeros(0, np.int64))
    wrong = ClassSplit(good.features_ND, np.full(20, 9))
    with pytest.raises(TrainingError, match="split fit must have at least one row"):
        linear_probe(empty, good, good, 4)
    with pytest.raises(
        TrainingError, match=r"below num_classes 4, got 9 \(split choose\)"
    ):
        linear_probe(good, wrong, good, 4)
    with pytest.raises(TrainingError, match=r"at least 0.*got -1 \(split test\)"):
        linear_probe(good, good, ClassSplit(good.features_ND, np.full(20, -1)), 4)
    with pytest.raises(TrainingError, match="same width in all splits"):
        linear_probe(good, blobs(rng, 20, width=5), good, 4)
    with pytest.raises(TrainingError, match=r"\(N, D\), got \(20,\) \(split fit\)"):
        linear_probe(ClassSplit(good.features_ND[:, 0], good.labels_N), good, good, 4)


def test_ridge_probe_against_normal_equations():
    rng = np.random.default_rng(7)
    fit, choose, test = numbers(rng, 50, 3), numbers(rng, 40, 3), numbers(rng, 60, 3)
    score = ridge_probe(fit, choose, test)
    mean, std = fit.features_ND.mean(0), fit.features_ND.std(0)

    def errors(split, penalty):
        design = (fit.features_ND - mean) / std
        weights = np.linalg.solve(
            design.T @ design / 50 + penalty * np.eye(6),
            design.T @ (fit.numbers_N - fit.numbers_N.mean()) / 50,
        )
        found = (split.features_ND - mean) / std @ weights + fit.numbers_N.mean()
        return found - split.numbers_N

    curve = {p: np.sqrt((errors(choose, p) ** 2).mean()) for p in RIDGE_PENALTIES}
    best = min(curve, key=curve.get)
    assert score.setting == {"l2": best}
    assert score.choose_value == pytest.approx(curve[best], rel=1e-5)
    left = errors(test, best)
    assert score.value == pytest.approx(np.sqrt((left**2).mean()), rel=1e-5)
    assert score.details["r_squared"] == pytest.approx(
        1 - (left**2).mean() / test.numbers_N.var(), rel=1e-5
    )
    assert (score.metric, score.higher_is_better) == ("rmse", False)


def test_ridge_refuses_numbers_that_are_not_finite():
    rng = np.random.default_rng(8)
    good = numbers(rng, 10)
    broken = NumberSplit(good.features_ND, good.numbers_N * np.nan)
    with pytest.raises(TrainingError, match=r"numbers must be finite.*split choose"):
        ridge_probe(good, broken, good)
