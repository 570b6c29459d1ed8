"""Measures against values worked out by hand and plain NumPy."""

import math

import numpy as np
import pytest
import torch

from student_train.probes import scores


def test_mean_iou_of_a_hand_worked_confusion():
    # True 0: 3 right, 1 as 1. True 1: 2 right. True 2: both as 0. Class 3: nowhere.
    labels = torch.tensor([0, 0, 0, 0, 1, 1, 2, 2, -1])
    predicted = torch.tensor([0, 0, 0, 1, 1, 1, 0, 0, 3])
    confusion = scores.confusion_matrix(predicted, labels, 4)
    assert confusion.tolist() == [[3, 1, 0, 0], [0, 2, 0, 0], [2, 0, 0, 0], [0] * 4]
    np.testing.assert_allclose(
        scores.class_iou(confusion), [3 / 6, 2 / 3, 0, math.nan], rtol=1e-12
    )
    assert scores.mean_iou(confusion) == pytest.approx((1 / 2 + 2 / 3 + 0) / 3)
    assert scores.pixel_accuracy(confusion) == 5 / 8


def test_a_class_that_is_only_predicted_counts_as_zero():
    confusion = scores.confusion_matrix(torch.tensor([0, 1]), torch.tensor([0, 0]), 3)
    assert scores.mean_iou(confusion) == pytest.approx((1 / 2 + 0) / 2)


def test_nothing_counted_is_nan():
    confusion = scores.confusion_matrix(torch.tensor([0]), torch.tensor([-1]), 2)
    assert math.isnan(scores.mean_iou(confusion))
    assert math.isnan(scores.pixel_accuracy(confusion))


def test_majority_is_that_of_the_fit_split():
    fit = torch.tensor([2, 2, 5, 5, 0])
    assert scores.majority_accuracy(fit, torch.tensor([2, 5, 5, 2])) == 0.5
    assert scores.majority_accuracy(fit, torch.tensor([5, 5, 5, 2])) == 0.25


def test_errors_of_numbers():
    true = torch.tensor([1.0, 2.0, 3.0, 6.0])
    predicted = torch.tensor([1.2, 2.0, 2.0, 8.0])
    errors = predicted.double().numpy() - true.numpy()
    assert scores.rmse(predicted, true) == pytest.approx(np.sqrt((errors**2).mean()))
    assert scores.r_squared(predicted, true) == pytest.approx(
        1 - (errors**2).sum() / (4 * true.numpy().var())
    )
    # Factors 1.2, 1, 1.5 and 1.33.
    assert scores.delta1(predicted, true) == 0.5
    assert scores.delta1(true, predicted) == 0.5
    assert math.isnan(scores.r_squared(true, torch.ones(4)))
