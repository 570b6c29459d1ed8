"""Dense probes: perfection, masks, resolution, and who chooses."""

import dataclasses

import numpy as np
import pytest
import torch

from student_train.errors import TrainingError
from student_train.probes import dense
from student_train.probes.dense import (
    DenseSplit,
    dense_class_probe,
    dense_number_probe,
)
from student_train.probes.linear import RIDGE_PENALTIES


def upsampled(grid_nhw, size):
    """Bilinear with align_corners=False, by weights written out."""

    def weights(num_cells, num_pixels):
        table = np.zeros((num_pixels, num_cells))
        for pixel in range(num_pixels):
            at = min(
                max((pixel + 0.5) / num_pixels * num_cells - 0.5, 0), num_cells - 1
            )
            low = min(int(at), num_cells - 1)
            high = min(low + 1, num_cells - 1)
            table[pixel, low] += 1 - (at - low)
            table[pixel, high] += at - low
        return table

    rows = weights(grid_nhw.shape[1], size[0])
    columns = weights(grid_nhw.shape[2], size[1])
    return np.einsum("Hh,nhw,Ww->nHW", rows, grid_nhw, columns)


def linear_scene(rng, num=6, grid=(4, 5), size=(12, 15), num_classes=3):
    """Images whose label is where the upsampled linear logits are largest."""
    mixing = np.random.default_rng(97).normal(size=(8, num_classes))
    features = rng.normal(size=(num, *grid, 8)).astype(np.float32)
    logits = np.stack(
        [upsampled(features @ mixing[:, k], size) for k in range(num_classes)], -1
    )
    return DenseSplit(features, logits.argmax(-1))


def depth_scene(rng, num=6, grid=(4, 5), size=(12, 15), noise=0.0):
    mixing = 0.2 * np.random.default_rng(96).normal(size=8)
    features = rng.normal(size=(num, *grid, 8)).astype(np.float32)
    logs = np.repeat(np.repeat(features @ mixing, 3, 1), 3, 2)
    logs += noise * rng.normal(size=logs.shape)
    return DenseSplit(features, numbers_NHW=np.exp(logs + 1))


def test_cells_that_are_one_class_each_are_perfect():
    rng = np.random.default_rng(0)
    codes = np.eye(3, dtype=np.float32)

    def make():
        labels = rng.integers(0, 3, (5, 4, 4))
        return DenseSplit(codes[labels], labels)

    score = dense_class_probe(make(), make(), make(), 3)
    assert score.value == score.choose_value == 1
    assert score.details["pixel_accuracy"] == 1
    assert (score.metric, score.higher_is_better) == ("mean_iou", True)


def test_linear_scene_is_nearly_solved_at_pixels():
    rng = np.random.default_rng(1)
    scenes = [linear_scene(rng, 30) for _ in range(3)]
    score = dense_class_probe(*scenes, 3)
    assert score.value > 0.8
    assert score.details["num_fit_cells"] == 30 * 20
    assert dense_class_probe(*scenes, 3) == score


def test_score_is_that_of_upsampled_logits_not_of_cells():
    # Two cells side by side, class 0 then 1: pixels between their centres are
    # interpolated, so the border lies in the middle however coarse the grid.
    features = np.float32([[[[-1.0], [1.0]]]])
    fit = DenseSplit(features, np.array([[[0, 1]]]))
    fine = DenseSplit(features, np.array([[[0] * 5 + [1] * 5]]))
    assert dense_class_probe(fit, fine, fine, 2).value == 1
    shifted = DenseSplit(features, np.array([[[0] * 4 + [1] * 6]]))
    score = dense_class_probe(fit, fine, shifted, 2)
    assert score.value == pytest.approx((4 / 5 + 5 / 6) / 2)
    assert score.details["pixel_accuracy"] == pytest.approx(0.9)


def test_classes_absent_from_truth_and_prediction_are_left_out():
    rng = np.random.default_rng(2)
    scenes = [linear_scene(rng) for _ in range(3)]
    three = dense_class_probe(*scenes, 3)
    many = dense_class_probe(*scenes, 20)
    assert many.value == pytest.approx(three.value)
    assert (
        many.details["num_scored_classes"] == three.details["num_scored_classes"] == 3
    )


def test_invalid_cells_neither_train_nor_count_nor_leak():
    rng = np.random.default_rng(3)
    scenes, poisoned, blanked = [], [], []
    for _ in range(3):
        scene = linear_scene(rng, 8)
        valid = rng.random((8, 4, 5)) > 0.3
        features = scene.grids_NHWC.copy()
        features[~valid] = np.nan
        labels = scene.labels_NHW.copy()
        labels[~valid.repeat(3, 1).repeat(3, 2)] = 2
        other = np.where(valid[..., None], scene.grids_NHWC, 1e6).astype(np.float32)
        scenes.append(DenseSplit(scene.grids_NHWC, scene.labels_NHW, None, valid))
        poisoned.append(DenseSplit(features, labels, None, valid))
        blanked.append(DenseSplit(other, labels, None, valid))
    expected = dense_class_probe(*scenes, 3)
    assert dense_class_probe(*poisoned, 3) == expected
    assert dense_class_probe(*blanked, 3) == expected
    assert expected.details["num_fit_cells"] == scenes[0].valid_NHW.sum()


def test_unlabelled_cells_are_left_out():
    rng = np.random.default_rng(4)
    scenes = [linear_scene(rng) for _ in range(3)]
    labels = scenes[0].labels_NHW.copy()
    labels[:, :3] = -1
    fit = dataclasses.replace(scenes[0], labels_NHW=labels)
    score = dense_class_probe(fit, *scenes[1:], 3)
    assert score.details["num_fit_cells"] == 6 * 3 * 5


def test_choose_decides_the_penalty():
    rng = np.random.default_rng(5)

    def make(num, flips):
        truth = rng.integers(0, 2, (num, 4, 4))
        noise = rng.normal(size=(num, 4, 4, 60))
        features = np.concatenate([(truth - 0.5)[..., None] * 4, noise], axis=-1)
        labels = np.where(rng.random(truth.shape) < flips, 1 - truth, truth)
        return DenseSplit(features.astype(np.float32), labels)

    fit, choose, test = make(5, 0.25), make(25, 0), make(25, 0)
    strong = dense_class_probe(fit, choose, test, 2)
    weak = dense_class_probe(fit, fit, test, 2)
    assert weak.setting["l2"] < strong.setting["l2"]
    assert weak.value < strong.value
    assert dense_class_probe(fit, choose, fit, 2).setting == strong.setting


def test_the_tolerance_of_cells_costs_less_than_a_tenth_of_a_point(monkeypatch):
    # Correlated channels, overlapping and rare classes, borders within cells.
    rng = np.random.default_rng(10)
    centres = 0.6 * rng.normal(size=(6, 32))
    mixing = rng.normal(size=(32, 32)) * np.logspace(0, -2.5, 32)
    frequency = [0.4, 0.3, 0.15, 0.1, 0.04, 0.01]

    def make(num):
        cells = rng.choice(6, size=(num, 8, 8), p=frequency)
        noise = rng.normal(size=(num, 8, 8, 32))
        features = (centres[cells] + noise) @ mixing
        labels = np.roll(cells.repeat(4, 1).repeat(4, 2), (1, 2), (1, 2))
        return DenseSplit(features.astype(np.float32), labels)

    splits = make(40), make(20), make(40)
    found = dense_class_probe(*splits, 6)
    monkeypatch.setattr(dense, "CELLS_GRADIENT", 1e-7)
    converged = dense_class_probe(*splits, 6)
    assert converged.details["gradient"] < 1e-7 < found.details["gradient"]
    assert found.setting == converged.setting
    assert found.value == pytest.approx(converged.value, abs=1e-3)
    for name, value in converged.details.items():
        if name.startswith("choose") or name == "pixel_accuracy":
            assert found.details[name] == pytest.approx(value, abs=1e-3)


def test_numbers_of_a_log_linear_scene():
    rng = np.random.default_rng(6)
    scenes = [depth_scene(rng, 20) for _ in range(3)]
    # Labels as fine as the grid: nothing is interpolated, so the fit is exact.
    coarse = [
        dataclasses.replace(scene, numbers_NHW=scene.numbers_NHW[:, 1::3, 1::3])
        for scene in scenes
    ]
    score = dense_number_probe(*coarse)
    assert score.value == 1
    # Ties go to the strongest of the penalties with which all are within the factor.
    perfect = [p for p in RIDGE_PENALTIES if score.details[f"choose_l2_{p:g}"] == 1]
    assert score.setting == {"l2": perfect[0]}
    assert (score.metric, score.higher_is_better) == ("delta1", True)
    fine = dense_number_probe(*scenes)
    assert 0.3 < fine.value < 1


def test_numbers_against_normal_equations_and_written_out_upsampling():
    rng = np.random.default_rng(7)
    fit, choose, test = (depth_scene(rng, 5, noise=0.3) for _ in range(3))
    numbers = fit.numbers_NHW.copy()
    numbers[rng.random(numbers.shape) < 0.3] = np.nan
    fit = dataclasses.replace(fit, numbers_NHW=numbers)
    score = dense_number_probe(fit, choose, test)

    blocks = np.log(numbers).reshape(5, 4, 3, 5, 3)
    targets = np.nanmean(blocks, axis=(2, 4)).reshape(-1)
    features = fit.grids_NHWC.reshape(-1, 8).astype(np.float64)
    mean, std = features.mean(0), features.std(0)
    design = (features - mean) / std
    weights = np.linalg.solve(
        design.T @ design / len(design) + score.setting["l2"] * np.eye(8),
        design.T @ (targets - targets.mean()) / len(design),
    )
    cells = (test.grids_NHWC - mean) / std @ weights + targets.mean()
    logs = upsampled(cells, (12, 15))
    true = np.log(test.numbers_NHW)
    assert score.value == pytest.approx(
        (np.abs(logs - true) < np.log(1.25)).mean(), abs=1 / true.size
    )
    assert score.details["rmse_log"] == pytest.approx(
        np.sqrt(((logs - true) ** 2).mean()), rel=1e-4
    )
    assert score.details["rmse"] == pytest.approx(
        np.sqrt(((np.exp(logs) - test.numbers_NHW) ** 2).mean()), rel=1e-4
    )


def test_a_masked_constant_stays_that_constant():
    # Interpolation beside an invalid cell must not be drawn towards zero.
    rng = np.random.default_rng(8)
    valid = rng.random((4, 4, 5)) > 0.4
    scene = DenseSplit(
        rng.normal(size=(4, 4, 5, 3)).astype(np.float32),
        numbers_NHW=np.full((4, 12, 15), 50.0),
        valid_NHW=valid,
    )
    score = dense_number_probe(scene, scene, scene)
    assert score.value == 1
    assert score.details["rmse"] < 1e-3


def test_refusals():
    rng = np.random.default_rng(9)
    good = linear_scene(rng)
    replace = dataclasses.replace
    with pytest.raises(
        TrainingError, match=r"below num_classes 2, got 2 \(split fit\)"
    ):
        dense_class_probe(good, good, good, 2)
    with pytest.raises(TrainingError, match=r"labels_NHW must be given.*split choose"):
        dense_class_probe(good, replace(good, labels_NHW=None), good, 3)
    ignored = replace(good, labels_NHW=np.full((6, 12, 15), -1))
    with pytest.raises(TrainingError, match="split test must have a labelled pixel"):
        dense_class_probe(good, good, ignored, 3)
    empty = DenseSplit(good.grids_NHWC[:0], good.labels_NHW[:0])
    with pytest.raises(TrainingError, match="split fit must have at least one row"):
        dense_class_probe(empty, good, good, 3)
    narrow = replace(good, grids_NHWC=good.grids_NHWC[..., :5])
    with pytest.raises(TrainingError, match=r"same width.*'choose': 5"):
        dense_class_probe(good, narrow, good, 3)
    coarse = replace(good, labels_NHW=good.labels_NHW[:, :2])
    with pytest.raises(TrainingError, match=r"as fine as the grid \(4, 5\)"):
        dense_class_probe(good, good, coarse, 3)
    with pytest.raises(TrainingError, match=r"of the same images.*split test"):
        dense_class_probe(good, good, replace(good, labels_NHW=good.labels_NHW[:2]), 3)
    with pytest.raises(TrainingError, match=r"valid must be one for each cell"):
        dense_class_probe(good, good, replace(good, valid_NHW=np.ones((6, 2, 2))), 3)
    broken = replace(good, grids_NHWC=torch.full((6, 4, 5, 8), torch.nan))
    with pytest.raises(TrainingError, match=r"finite.*split choose"):
        dense_class_probe(good, broken, good, 3)

    depth = depth_scene(rng)
    zero = replace(depth, numbers_NHW=depth.numbers_NHW * 0)
    with pytest.raises(TrainingError, match=r"positive and finite.*got 0.0 \(split te"):
        dense_number_probe(depth, depth, zero)
    with pytest.raises(TrainingError, match=r"numbers_NHW must be given.*split fit"):
        dense_number_probe(good, depth, depth)
