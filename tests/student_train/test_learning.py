"""A step in parts is the step of the whole batch."""

from __future__ import annotations

import contextlib

import numpy as np
import pytest
import safetensors.torch
import torch

from student_train.batches import merge_batches, split_batch
from student_train.optimizers import make_optimizer
from tests.student_train.conftest import assert_equal, contents
from tests.training import (
    CLASS,
    EXTENT,
    NUM_MAP_CLASSES,
    once,
    pair_bank,
    recipe_for,
    street_bank,
    trainer_for,
)

# Each counts other rows, or the same ones by another way.
FIELDS = {
    "data": {
        "labels": {
            "seg": {
                "member": "seg.png",
                "input": "image",
                "num_classes": NUM_MAP_CLASSES,
                "ignore": [NUM_MAP_CLASSES],
            },
            "ground": {
                "member": "ground.png",
                "extent": EXTENT,
                "num_classes": NUM_MAP_CLASSES,
            },
        }
    },
    "targets": {
        "points": {"from": "main/points/pooled", "loss": {"mse": 1.0}, "weight": 3.0},
        "class": CLASS,
        "patch": {"from": "main/net/patch", "loss": {"mse": 1.0}},
        "bev": {"from": "main/ground/bev", "head": {"kind": "bev"}, "loss": {"mse": 1}},
        "seg": {
            "from": "data/seg",
            "head": {"kind": "linear"},
            "loss": {"cross_entropy": 1.0},
        },
        "ground": {
            "from": "data/ground",
            "head": {"kind": "bev"},
            "loss": {"cross_entropy": 1.0},
        },
    },
    "stages": [{"steps": 1, "batch": 9, "lr": 1.0, "size": [[16, 32]]}],
    "optimizer": {"clip_norm": None},
}


@pytest.fixture(scope="module")
def trainer(tmp_path_factory):
    bank = once(tmp_path_factory, "street", street_bank)
    return trainer_for(bank, tmp_path_factory.mktemp("learning") / "run", **FIELDS)


@pytest.fixture(scope="module")
def batch(trainer):
    with contextlib.closing(trainer.datasets[0].stream()) as batches:
        return next(batches)


def gradient(trainer, batch, parts):
    trainer.modules.train()
    optimizer = make_optimizer(trainer.recipe.optimizer, trainer.modules)
    step = trainer.step(batch, optimizer, 0.0, parts)
    parameters = trainer.modules.named_parameters()
    return step, {name: one.grad for name, one in parameters if one.grad is not None}


@pytest.mark.parametrize("parts", [2, 4, 9])
def test_parts_have_the_gradient_of_the_whole(parts, trainer, batch):
    valid = [one.valid.sum() for one in batch.targets.values()]
    assert len({int(one) for one in valid}) > 1
    whole, expected = gradient(trainer, batch, 1)
    step, found = gradient(trainer, batch, parts)
    assert float(step.loss) == pytest.approx(float(whole.loss), rel=1e-5)
    assert {k: float(v) for k, v in step.shares.items()} == pytest.approx(
        {k: float(v) for k, v in whole.shares.items()}, rel=1e-5
    )
    assert found.keys() == expected.keys()
    for name, one in expected.items():
        limit = 1e-5 * max(1.0, float(one.abs().max()))
        torch.testing.assert_close(found[name], one, rtol=1e-4, atol=limit)


@pytest.mark.parametrize("parts", [1, 2, 4, 9, 20])
def test_parts_are_the_batch(parts, batch):
    pieces = split_batch(batch, parts)
    sizes = [len(piece) for piece in pieces]
    assert len(pieces) == min(parts, 9)
    assert max(sizes) - min(sizes) <= 1
    assert_equal([contents(merge_batches(pieces))], [contents(batch)])
    assert np.concatenate([one.rows for one in pieces]).tolist() == batch.rows.tolist()


def test_a_run_in_parts_goes_on_in_others(tmp_path_factory, tmp_path):
    bank = once(tmp_path_factory, "street", street_bank)
    stage = {"steps": 3, "batch": 6, "lr": 0.05, "size": [[16, 32]]}
    fields = {**FIELDS, "optimizer": {"kind": "sgd"}}

    def at(run, accumulate):
        stages = [{**stage, "accumulate": accumulate}]
        return trainer_for(bank, tmp_path / run, **{**fields, "stages": stages})

    assert at("whole", 1).run().is_done
    assert not at("parts", 3).run(should_stop=lambda: True).is_done
    assert at("parts", 2).run().is_done
    mine, theirs = (
        safetensors.torch.load_file(tmp_path / run / "heads.safetensors")
        for run in ("parts", "whole")
    )
    for name, one in theirs.items():
        torch.testing.assert_close(mine[name], one, rtol=1e-3, atol=1e-5)


def test_what_parts_cannot_be(tmp_path_factory, tmp_path):
    bank = once(tmp_path_factory, "pair", pair_bank)
    targets = {
        name: {"from": f"main/{name}/patch", "loss": {"mse": 1.0}}
        for name in ("first", "second")
    }

    def refused(line, accumulate, **fields):
        stages = [{"steps": 1, "batch": 4, "lr": 0.1, "accumulate": accumulate}]
        with pytest.raises(ValueError, match=line):
            recipe_for(bank, tmp_path / "run", targets=targets, stages=stages, **fields)

    refused(r"accumulate must be at most batch \(4\), got 5", 5)
    refused(
        "accumulate must be 1 with `balance: drop_teachers`",
        2,
        balance={"kind": "drop_teachers"},
    )
