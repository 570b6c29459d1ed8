"""Rates, decay, clipping, what is refused on the way, and students of every kind."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import safetensors.torch
import torch
from torch import nn

from manifests.recipe import OptimizerConfig
from student_train import trainer as trainer_module
from student_train.optimizers import make_optimizer
from student_train.run_log import read_log
from tests.training import (
    PATCH,
    STUDENT,
    once,
    plain_bank,
    street_bank,
    trainer_for,
)

MODULES = '''\
"""Students from a file: one with a map, one with a vector alone, one with ties."""
import torch
from torch import nn


class Map(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Conv2d(3, 8, 4, 4)

    def forward_features(self, x):
        return self.body(x)


class Vector(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Linear(3, 8)

    def forward_features(self, x):
        return self.body(x.mean((2, 3)))

    def forward_head(self, x, pre_logits=False):
        return x


class Tied(Map):
    def __init__(self):
        super().__init__()
        self.again = self.body


class Shared(Map):
    def __init__(self):
        super().__init__()
        self.more = nn.Conv2d(8, 8, 1)
        self.other = nn.Conv2d(8, 8, 1)
        self.other.weight = self.more.weight

    def forward_features(self, x):
        return self.other(torch.relu(self.more(self.body(x))))
'''


@pytest.fixture(scope="module")
def bank(tmp_path_factory):
    return once(tmp_path_factory, "plain", plain_bank)


@pytest.fixture(scope="module")
def street(tmp_path_factory):
    return once(tmp_path_factory, "street", street_bank)


def stage(**fields):
    return {"steps": 3, "batch": 4, "lr": 1e-3, "size": [[16, 16]], **fields}


def module(tmp_path, name):
    (tmp_path / "students.py").write_text(MODULES)
    return {"model": f"module:{tmp_path / 'students.py'}:{name}", "input": "image"}


def test_rates_are_the_schedules(bank, tmp_path):
    stages = [
        stage(name="one", steps=6, warmup_steps=2, schedule="cosine", final_lr=0.1),
        stage(name="two", steps=3, lr=2e-3, schedule="linear"),
    ]
    trainer = trainer_for(
        bank, tmp_path / "run", "checkpoints.log_steps=1", stages=stages
    )
    trainer.run()
    expected = [1e-3 / 2, 1e-3]
    for step in range(4):
        share = (1 + math.cos(math.pi * step / 4)) / 2
        expected.append(1e-3 * (0.1 + 0.9 * share))
    expected += [2e-3, 2e-3 * 2 / 3, 2e-3 / 3]
    rates = [row["lr"] for row in read_log(tmp_path / "run")]
    assert rates == pytest.approx(expected)


def test_a_step_of_sgd_is_its_formula(bank, tmp_path):
    """One step: w - lr (g + decay w), g clipped to the norm."""
    decay, limit, rate = 0.5, 0.05, 0.25
    optimizer = {
        "kind": "sgd",
        "momentum": 0.0,
        "weight_decay": decay,
        "clip_norm": limit,
    }
    fields = {
        "optimizer": optimizer,
        "stages": [stage(steps=1, lr=rate, schedule="constant")],
    }
    trainer = trainer_for(bank, tmp_path / "run", **fields)
    names = dict(trainer.modules.named_parameters())
    before = {name: one.detach().clone() for name, one in names.items()}
    batch = next(trainer.datasets[0].stream())
    trainer.modules.train()
    features = trainer.student(batch.inputs["image"])
    loss, _ = trainer.modules.objective(features, batch, "image")
    grads = dict(
        zip(
            names,
            torch.autograd.grad(loss, names.values(), allow_unused=True),
            strict=True,
        )
    )
    norm = math.sqrt(
        sum(float(g.double().square().sum()) for g in grads.values() if g is not None)
    )
    assert norm > limit
    trainer.run()
    for name, one in trainer.modules.named_parameters():
        if grads[name] is None:
            assert torch.equal(one, before[name])
            continue
        spared = before[name].ndim < 2 or name.endswith(("cls_token", "pos_embed"))
        step = grads[name] * limit / norm + (0 if spared else decay) * before[name]
        torch.testing.assert_close(
            one.detach(), before[name] - rate * step, rtol=1e-4, atol=1e-6
        )


def test_what_weight_decay_spares():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 1)
            self.norm = nn.LayerNorm(4)
            self.cls_token = nn.Parameter(torch.zeros(1, 1, 4))
            self.register_tokens = nn.Parameter(torch.zeros(1, 2, 4))
            self.pos_embed = nn.Parameter(torch.zeros(1, 9, 4))
            self.patch_embed = nn.Linear(4, 4)
            self.frozen = nn.Linear(4, 4).requires_grad_(False)

    net = Net()
    names = {id(one): name for name, one in net.named_parameters()}
    for kind in ("adamw", "sgd"):
        config = OptimizerConfig(kind=kind, weight_decay=0.3)
        groups = make_optimizer(config, net).param_groups
        found = {
            group["weight_decay"]: {names[id(one)] for one in group["params"]}
            for group in groups
        }
        assert found[0.3] == {"conv.weight", "patch_embed.weight"}
        assert found[0.0] == {
            *("conv.bias", "norm.weight", "norm.bias", "patch_embed.bias"),
            *("cls_token", "register_tokens", "pos_embed"),
        }


def test_a_loss_of_weight_0_is_logged_and_moves_nothing(bank, tmp_path):
    class_ = {
        "from": "main/labels/class",
        "head": {"kind": "linear"},
        "loss": {"cross_entropy": 1.0},
    }
    targets = {"patch": {**PATCH, "weight": 0.0}, "class": class_}
    fields = {"targets": targets, "optimizer": {"weight_decay": 0.0}}
    trainer = trainer_for(bank, tmp_path / "run", **fields)
    head = trainer.modules.objective.heads["patch"]
    before = {name: one.clone() for name, one in head.state_dict().items()}
    trainer.run()
    for name, one in head.state_dict().items():
        assert torch.equal(one, before[name])
    (row,) = read_log(tmp_path / "run")
    assert row["loss.patch"] > 0
    assert row["loss"] == pytest.approx(row["loss.class"])
    zero = {**PATCH, "loss": {"cosine": 1.0, "smooth_l1": 0.0}}
    alone = {**PATCH, "loss": {"cosine": 1.0}}
    for name, target in (("zero", zero), ("alone", alone)):
        trainer_for(bank, tmp_path / name, targets={"patch": target}).run()
    losses = [read_log(tmp_path / name)[-1]["loss"] for name in ("zero", "alone")]
    assert losses[0] == losses[1]


def spoil(monkeypatch, at, how):
    """Spoils one step: its loss, or its gradient alone."""
    step, count = trainer_module.Trainer.step, []

    def spoiled(self, *arguments):
        count.append(1)
        found = step(self, *arguments)
        if len(count) == at:
            bad = torch.tensor(math.nan)
            spoiled = {"loss": bad} if how == "loss" else {"norm": bad + math.inf}
            found = replace(found, **spoiled)
        return found

    monkeypatch.setattr(trainer_module.Trainer, "step", spoiled)


@pytest.mark.parametrize("how", ["loss", "gradient"])
def test_what_is_not_finite_is_refused(how, bank, tmp_path, monkeypatch):
    run = tmp_path / "run"
    overrides = ["checkpoints.every_steps=1"]
    trainer = trainer_for(bank, run, *overrides)
    spoil(monkeypatch, 2, how)
    line = r"loss and gradient must be finite, .* at step 2 \(patch .*rows \[\d+"
    with pytest.raises(ValueError, match=line):
        trainer.run()
    assert not (run / "student").exists()
    # The checkpoint is of the step before: what is mended goes on from there.
    steps = []
    trainer.run(lambda progress: steps.append(progress.position.step))
    assert steps == [2, 3]
    undisturbed = tmp_path / "undisturbed"
    trainer_for(bank, undisturbed, *overrides).run()
    for name in ("student/model.safetensors", "heads.safetensors"):
        mine, theirs = (
            safetensors.torch.load_file(one / name) for one in (run, undisturbed)
        )
        assert all(torch.equal(mine[key], theirs[key]) for key in theirs)


def test_a_gradient_that_overflows_is_found(bank, tmp_path, monkeypatch):
    """A finite loss whose gradient is not, from real arithmetic."""
    trainer = trainer_for(bank, tmp_path / "run", "checkpoints.every_steps=1")
    weight = trainer.modules.objective.heads["patch"].contract.weight
    weight.register_hook(lambda grad: grad * math.inf)
    with pytest.raises(ValueError, match=r"must be finite, got 0.* at step 1"):
        trainer.run()
    assert not (tmp_path / "run" / "checkpoints").exists()
    # Weights in memory are spoiled, and no checkpoint has better ones.
    with pytest.raises(ValueError, match="from weights that are not trained"):
        trainer.run()


@pytest.mark.parametrize("name", ["Map", "Vector", "Tied", "Shared"])
def test_students_from_a_file(name, bank, tmp_path):
    source = "main/net/logits" if name == "Vector" else "main/net/patch"
    targets = {"it": {"from": source, "loss": {"mse": 1.0}}}
    fields = {"student": module(tmp_path, name), "targets": targets}
    # A number is fitted to the view; a pair is taken as it is.
    for size in (16, [[16, 20]]):
        run = tmp_path / f"run{len(str(size))}"
        stages = [stage(steps=4, size=size)]
        whole = trainer_for(bank, run, stages=stages, **fields)
        assert whole.run().is_done
        parts = trainer_for(bank, tmp_path / f"{run.name}b", stages=stages, **fields)
        while not parts.run(should_stop=lambda: True).is_done:
            torch.manual_seed(9)
        mine, theirs = (
            safetensors.torch.load_file(one.folder.student / "model.safetensors")
            for one in (parts, whole)
        )
        assert all(torch.equal(mine[key], theirs[key]) for key in theirs)


def test_a_student_without_a_grid_learns_no_grid(bank, tmp_path):
    with pytest.raises(ValueError, match="tokens that the student has, got patch"):
        trainer_for(bank, tmp_path / "run", student=module(tmp_path, "Vector"))


def test_sizes_take_the_views_aspect(street, tmp_path):
    """The view of a camera is all of its 20 x 40 pixels."""
    targets = {"patch": {"from": "main/net/patch", "loss": {"mse": 1.0}}}

    def sizes(**fields):
        trainer = trainer_for(
            street, tmp_path / "run", targets=targets, stages=[stage(**fields)]
        )
        (dataset,) = trainer.datasets
        return dataset.reading.inputs["image"]

    height, width = sizes(size=16)
    assert (width / height, height % 4, width % 4) == (2, 0, 0)
    assert sizes(size=[[16, 24]]) == (16, 24)
    assert sizes(size=None) == (height, width)
    assert len(sizes(size=[16, 24, [20, 20]])) == 3


def test_stages_of_several_sizes_and_batches(bank, tmp_path):
    stages = [
        stage(name="one", steps=4, batch=5),
        stage(name="two", steps=None, epochs=1, batch=11, size=[16, 24, 32]),
    ]
    trainer = trainer_for(bank, tmp_path / "run", stages=stages)
    assert trainer.stage_steps == [4, 2]
    found = []
    trainer.run(lambda progress: found.append(progress.position))
    assert [one.epoch_step for one in found] == [1, 2, 3, 0, 1, 0]
    assert [one.epoch for one in found] == [0, 0, 0, 1, 1, 2]


def test_pretrained_is_not_asked_for_a_size(bank, tmp_path, monkeypatch):
    """The weights of a file are read once, not to learn a model's own size."""
    weights = tmp_path / "weights.safetensors"
    trainer = trainer_for(bank, tmp_path / "first")
    safetensors.torch.save_file(trainer.student.model.state_dict(), weights)
    student = {**STUDENT, "weights": str(weights)}
    stages = [stage(size=None)]
    again = trainer_for(bank, tmp_path / "run", student=student, stages=stages)
    held = trainer.student.model.state_dict()
    for name, one in again.student.model.state_dict().items():
        assert torch.equal(one, held[name])
