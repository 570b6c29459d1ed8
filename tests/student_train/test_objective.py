"""The whole objective against NumPy: heads, standardising, grids, masks, losses."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from pipeline.bank.open import open_bank
from student_train.features import StudentFeatures
from tests.training import (
    BEV_CELLS,
    BROKEN_LABELS,
    BROKEN_SWEEPS,
    EXTENT,
    IMAGE_HW,
    once,
    street_bank,
    street_keys,
    street_sample,
    trainer_for,
)

SIZE = (16, 32)
HEIGHTS = (-1.0, 0.5)
ALL = [{"steps": 1, "batch": 11, "lr": 1e-3, "size": [list(SIZE)]}]
SEG = {"member": "seg.png", "input": "image", "num_classes": 4, "ignore": [4]}
DEPTH = {"member": "depth.png", "input": "image", "scale": 0.01, "log": True}
METRES = {"member": "depth.png", "input": "image", "scale": 0.01, "ignore": [0]}
GROUND = {"member": "ground.png", "extent": EXTENT, "num_classes": 4}
LINEAR = {"kind": "linear"}


@pytest.fixture(scope="module")
def bank(tmp_path_factory):
    return once(tmp_path_factory, "street", street_bank)


class Step:
    """All rows of the bank in one batch of view 0, seen by a student."""

    def __init__(self, bank, tmp_path, targets, labels=None):
        self.bank = open_bank(str(bank))
        self.trainer = trainer_for(
            bank,
            tmp_path / "run",
            targets=targets,
            stages=ALL,
            data={"labels": labels or {}},
        )
        self.batch = next(self.trainer.datasets[0].stream())
        self.trainer.modules.eval()
        with torch.no_grad():
            self.features = self.trainer.student(self.batch.inputs["image"])
            total, shares = self.trainer.modules.objective(
                self.features, self.batch, "image"
            )
        self.total = float(total)
        self.shares = {name: float(share) for name, share in shares.items()}

    @property
    def keys(self):
        return list(self.batch.keys)

    @property
    def samples(self):
        return [street_sample(street_keys()[key]) for key in self.keys]

    def weights(self, name):
        head = self.trainer.modules.objective.heads[name]
        return {k: v.numpy().astype(np.float64) for k, v in head.state_dict().items()}

    def tokens(self, kind):
        return getattr(self.features, kind).numpy().astype(np.float64)

    def linear(self, name, kind):
        weights = self.weights(name)
        return self.tokens(kind) @ weights["linear.weight"].T + weights["linear.bias"]

    def adapter(self, name, kind):
        """EUPE's head of two layers, from its formula."""
        weights = self.weights(name)
        hidden = self.tokens(kind) @ weights["expand.weight"].T
        mean, var = hidden.mean(-1, keepdims=True), hidden.var(-1, keepdims=True)
        hidden = (hidden - mean) / np.sqrt(var + 1e-5)
        hidden = hidden * weights["norm.weight"] + weights["norm.bias"]
        erf = np.vectorize(math.erf)
        hidden = hidden * (1 + erf(hidden / math.sqrt(2))) / 2
        return hidden @ weights["contract.weight"].T

    def cached(self, path, standardise=True):
        """What the bank holds of the batch's rows, standardised by its statistics."""
        size = self.bank.record.block_rows
        rows = self.batch.rows
        blocks = {b: self.bank.read(path, b) for b in np.unique(rows // size).tolist()}
        values = np.stack([blocks[row // size][row % size] for row in rows.tolist()])
        values = values.astype(np.float64)
        if standardise:
            found = self.bank.statistics(path)
            std = np.sqrt(found["variance"])
            values = (values - found["mean"]) / np.maximum(std, 0.01 * np.median(std))
        return values


def cubic(x):
    """Keys' cubic with a = -0.75, by which torch interpolates."""
    x, a = abs(x), -0.75
    if x <= 1:
        return (a + 2) * x**3 - (a + 3) * x**2 + 1
    return a * (x**3 - 5 * x**2 + 8 * x - 4) if x < 2 else 0.0


def grown(grid_BHWC, size):
    """Bicubic, half-pixel centres, the border repeated."""
    for axis, new in ((1, size[0]), (2, size[1])):
        old = grid_BHWC.shape[axis]
        weights = np.zeros((new, old))
        for place in range(new):
            centre = (place + 0.5) * old / new - 0.5
            for near in range(math.floor(centre) - 1, math.floor(centre) + 3):
                weights[place, min(max(near, 0), old - 1)] += cubic(centre - near)
        grid_BHWC = np.moveaxis(
            np.tensordot(weights, grid_BHWC, axes=(1, axis)), 0, axis
        )
    return grid_BHWC


def cosine(prediction, target):
    dot = (prediction * target).sum(-1)
    lengths = np.linalg.norm(prediction, axis=-1) * np.linalg.norm(target, axis=-1)
    return 1 - dot / lengths


def smooth_l1(prediction, target, beta=1.0):
    distance = np.abs(prediction - target)
    return np.where(
        distance < beta, distance**2 / (2 * beta), distance - beta / 2
    ).mean(-1)


def log_softmax(logits):
    shifted = logits - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def per_image(cells, mask):
    """The mean over each image's valid cells, then over images that have one."""
    axes = tuple(range(1, cells.ndim))
    count = mask.sum(axes)
    summed = np.where(mask, cells, 0).sum(axes)
    return (summed[count > 0] / count[count > 0]).mean()


def test_cosine_and_smooth_l1_on_the_larger_grid(bank, tmp_path):
    """Teachers of 4 x 8 and 8 x 16 cells, a student of 4 x 8, and a vector."""
    loss = {"cosine": 0.9, "smooth_l1": {"weight": 0.1, "beta": 0.5}}
    head = {"kind": "adapter", "hidden": 20}
    targets = {
        "same": {"from": "main/net/patch", "head": head, "loss": loss},
        "fine": {
            "from": "main/fine/image/32x64/patch",
            "head": head,
            "loss": loss,
            "weight": 3.0,
        },
        "points": {"from": "main/points/pooled", "head": head, "loss": loss},
    }
    step = Step(bank, tmp_path, targets)
    assert len(step.keys) == 11
    expected = {}
    for name, path in (
        ("same", "net/image/16x32/patch"),
        ("fine", "fine/image/32x64/patch"),
    ):
        target = step.cached(path)
        prediction = grown(step.adapter(name, "patch"), target.shape[1:3])
        cells = 0.9 * cosine(prediction, target)
        cells += 0.1 * smooth_l1(prediction, target, 0.5)
        expected[name] = per_image(cells, np.ones(cells.shape, bool))
    target = step.cached("points/lidar/native/pooled")
    has_sweep = np.array([key not in BROKEN_SWEEPS for key in step.keys])
    np.testing.assert_array_equal(~np.isnan(target).any(-1), has_sweep)
    # A vector of a teacher is learned from the class token where there is one.
    prediction = step.adapter("points", "cls")[has_sweep]
    target = target[has_sweep]
    expected["points"] = (
        0.9 * cosine(prediction, target) + 0.1 * smooth_l1(prediction, target, 0.5)
    ).mean()
    assert step.shares == pytest.approx(expected, abs=1e-5)
    total = expected["same"] + 3 * expected["fine"] + expected["points"]
    assert step.total == pytest.approx(total, abs=1e-5)


def test_the_smaller_grid_and_no_standardising(bank, tmp_path):
    """Antialiased downwards: against torch's own, in float64, outside of ours."""
    targets = {
        "fine": {
            "from": "main/fine/image/32x64/patch",
            "head": LINEAR,
            "loss": {"mse": 1.0},
            "grid": "smaller",
        }
    }
    step = Step(bank, tmp_path, targets)
    target_BCHW = torch.from_numpy(step.cached("fine/image/32x64/patch"))
    target = torch.nn.functional.interpolate(
        target_BCHW.permute(0, 3, 1, 2), (4, 8), mode="bicubic", antialias=True
    )
    difference = step.linear("fine", "patch") - target.permute(0, 2, 3, 1).numpy()
    assert step.shares["fine"] == pytest.approx((difference**2).mean(), abs=1e-5)


def test_rows_invalid_for_one_teacher_change_nothing_for_it(bank, tmp_path):
    """Whatever stands in them; other targets keep them."""
    loss = {"cosine": 0.9, "smooth_l1": 0.1}
    targets = {
        "points": {"from": "main/points/pooled", "loss": loss},
        "patch": {"from": "main/net/patch", "loss": loss},
    }
    step = Step(bank, tmp_path, targets)
    objective, batch = step.trainer.modules.objective, step.batch
    invalid = ~batch.targets["points"].valid
    assert int(invalid.sum()) == len(BROKEN_SWEEPS)
    changed = {
        name: value.clone().requires_grad_()
        for name, value in vars(step.features).items()
        if name != "layers"
    }
    with torch.no_grad():
        changed["cls"][invalid] = 1e4
    total, shares = objective(StudentFeatures(**changed), batch, "image")
    assert float(shares["points"]) == step.shares["points"]
    assert float(shares["patch"]) == step.shares["patch"]
    total.backward()
    assert changed["cls"].grad[invalid].abs().max() == 0
    assert changed["cls"].grad[~invalid].abs().min(dim=1).values.max() > 0
    # The patch target needs every row.
    assert (changed["patch"].grad.abs().amax((1, 2, 3)) > 0).all()


def test_no_valid_row_at_all_is_no_loss(bank, tmp_path):
    targets = {
        "points": {"from": "main/points/pooled", "loss": {"mse": 1.0}},
        # So that rows without a sweep are rows at all.
        "patch": {"from": "main/net/patch", "loss": {"mse": 1.0}, "weight": 0.0},
    }
    step = Step(bank, tmp_path, targets)
    step.batch.targets["points"].valid[:] = False
    features = step.trainer.student(step.batch.inputs["image"])
    total, _ = step.trainer.modules.objective(features, step.batch, "image")
    total.backward()
    assert float(total.detach()) == 0
    grads = [one.grad for one in step.trainer.modules.parameters()]
    assert all(grad is None or not grad.any() for grad in grads)


def test_labels_and_logits(bank, tmp_path):
    targets = {
        "class": {
            "from": "main/labels/class",
            "head": LINEAR,
            "loss": {"cross_entropy": {"weight": 2.0, "label_smoothing": 0.1}},
        },
        "distance": {
            "from": "main/labels/distance",
            "head": LINEAR,
            "loss": {"l1": 1.0},
            "tokens": "cls",
        },
        "logits": {
            "from": "main/net/logits",
            "head": LINEAR,
            "loss": {"kl": {"temperature": 2.0}},
        },
    }
    step = Step(bank, tmp_path, targets)
    has_label = np.array([key not in BROKEN_LABELS for key in step.keys])
    assert not has_label.all()
    classes = np.array([sample["class"] for sample in step.samples])
    log = log_softmax(step.linear("class", "pooled"))
    hard = -log[np.arange(len(log)), classes]
    expected = {"class": 2 * (0.9 * hard - 0.1 * log.mean(-1))[has_label].mean()}
    distances = np.array([sample["distance"] for sample in step.samples])
    off = step.linear("distance", "cls")[:, 0] - distances
    expected["distance"] = np.abs(off).mean()
    teacher = log_softmax(step.cached("net/image/16x32/logits", False) / 2)
    student = log_softmax(step.linear("logits", "cls") / 2)
    expected["logits"] = 4 * (np.exp(teacher) * (teacher - student)).sum(-1).mean()
    assert step.shares == pytest.approx(expected, abs=1e-5)


def nearest(values_HW):
    """A map of the image's size at the student's: pixels under its pixels' centres."""
    rows = ((np.arange(SIZE[0]) + 0.5) * IMAGE_HW[0] / SIZE[0]).astype(int)
    columns = ((np.arange(SIZE[1]) + 0.5) * IMAGE_HW[1] / SIZE[1]).astype(int)
    return values_HW[np.ix_(rows, columns)]


def bilinear(grid_BHWC, size):
    """Half-pixel centres, the border repeated."""
    for axis, new in ((1, size[0]), (2, size[1])):
        old = grid_BHWC.shape[axis]
        centres = (np.arange(new) + 0.5) * old / new - 0.5
        low = np.floor(centres)
        shape = [1, 1, 1, 1]
        shape[axis] = new
        share = (centres - low).reshape(shape)
        before = np.take(grid_BHWC, low.clip(0, old - 1).astype(int), axis)
        after = np.take(grid_BHWC, (low + 1).clip(0, old - 1).astype(int), axis)
        grid_BHWC = before * (1 - share) + after * share
    return grid_BHWC


def test_label_maps(bank, tmp_path):
    labels = {"seg": SEG, "depth": DEPTH, "metres": METRES}
    targets = {
        "seg": {"from": "data/seg", "head": LINEAR, "loss": {"cross_entropy": 1.0}},
        "depth": {"from": "data/depth", "head": LINEAR, "loss": {"l1": 1.0}},
        "metres": {"from": "data/metres", "head": LINEAR, "loss": {"mse": 1.0}},
    }
    step = Step(bank, tmp_path, targets, labels)
    seg = np.stack([nearest(sample["seg"]) for sample in step.samples]).astype(int)
    mask = seg != 4
    assert 0 < mask.mean() < 1
    log = log_softmax(bilinear(step.linear("seg", "patch"), SIZE))
    cells = -np.take_along_axis(log, np.where(mask, seg, 0)[..., None], -1)[..., 0]
    expected = {"seg": per_image(cells, mask)}
    depth = np.stack([nearest(sample["depth"]) for sample in step.samples])
    metres, mask = depth * 0.01, depth > 0
    found = {
        name: bilinear(step.linear(name, "patch"), SIZE)[..., 0]
        for name in ("depth", "metres")
    }
    log_metres = np.log(np.where(mask, metres, 1))
    expected["depth"] = per_image(np.abs(found["depth"] - log_metres), mask)
    expected["metres"] = per_image((found["metres"] - metres) ** 2, mask)
    assert step.shares == pytest.approx(expected, rel=1e-5)


def seen(sample, cells):
    """Which cells of the bird's-eye grid the camera sees at any height, view 0."""
    intrinsics = np.array(sample["intrinsics"])
    intrinsics[0] *= SIZE[1] / IMAGE_HW[1]
    intrinsics[1] *= SIZE[0] / IMAGE_HW[0]
    found = np.zeros(cells, bool)
    for row in range(cells[0]):
        for column in range(cells[1]):
            x = 8 - (row + 0.5) * 16 / cells[0]
            y = 10 - (column + 0.5) * 20 / cells[1]
            for z in HEIGHTS:
                camera = np.array(sample["lidar2cam"]) @ [x, y, z, 1]
                if camera[2] <= 0.1:
                    continue
                u, v, _ = intrinsics @ (camera[:3] / camera[2])
                found[row, column] |= 0 <= u < SIZE[1] and 0 <= v < SIZE[0]
    return found


def test_a_birds_eye_grid_of_a_sweeps_teacher(bank, tmp_path):
    """Loss only where the camera sees and the sweep is sound."""
    head = {"kind": "bev", "hidden": 12, "heights_m": list(HEIGHTS)}
    targets = {
        "bev": {
            "from": "main/ground/bev",
            "head": head,
            "loss": {"cosine": 0.9, "smooth_l1": 0.1},
        },
        "ground": {
            "from": "data/ground",
            "head": {**head, "cells": [8, 10]},
            "loss": {"cross_entropy": 1.0},
        },
    }
    step = Step(bank, tmp_path, targets, {"ground": GROUND})
    camera = step.batch.cameras["image"]
    with torch.no_grad():
        found = {
            name: one(step.features.patch, camera.intrinsics, camera.lidar2cam, SIZE)[
                0
            ].numpy()
            for name, one in step.trainer.modules.objective.heads.items()
        }
    assert found["bev"].shape == (11, *BEV_CELLS, 6)
    target = step.cached("ground/lidar/native/bev")
    has_sweep = np.array([key not in BROKEN_SWEEPS for key in step.keys])
    visible = np.stack([seen(sample, BEV_CELLS) for sample in step.samples])
    assert 0.1 < visible.mean() < 0.9
    mask = visible & has_sweep[:, None, None]
    target = np.where(mask[..., None], target, 1.0)
    cells = 0.9 * cosine(found["bev"], target) + 0.1 * smooth_l1(found["bev"], target)
    expected = {"bev": per_image(cells, mask)}
    ground = np.stack([sample["ground"] for sample in step.samples]).astype(int)
    log = log_softmax(found["ground"].astype(np.float64))
    cells = -np.take_along_axis(log, ground[..., None], -1)[..., 0]
    visible = np.stack([seen(sample, (8, 10)) for sample in step.samples])
    expected["ground"] = per_image(cells, visible)
    assert step.shares == pytest.approx(expected, abs=1e-5)


def test_labels_alone_need_no_teacher(bank, tmp_path):
    label = {"from": "main/labels/class", "loss": {"cross_entropy": 1.0}}
    stages = [{**ALL[0], "batch": 5}]
    trainer = trainer_for(
        bank, tmp_path / "run", targets={"class": label}, stages=stages
    )
    # The row without a label has nothing to learn from.
    assert trainer.datasets[0].num_rows == 11 - len(BROKEN_LABELS)
    assert next(trainer.datasets[0].stream()).targets == {}
    assert trainer.run().is_done
