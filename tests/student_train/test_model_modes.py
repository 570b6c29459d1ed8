"""Averaged weights, half precision, less memory, compiled: the same training."""

from __future__ import annotations

import functools
import itertools
import math

import pytest
import safetensors.torch
import timm
import torch

from student_train.checkpoints import latest_checkpoint, read_learning
from student_train.optimizers import make_optimizer
from tests.training import (
    LOGITS,
    NOISY,
    PATCH,
    once,
    plain_bank,
    trainer_for,
)

FIELDS = {
    "student": NOISY,
    "targets": {"patch": PATCH, "logits": LOGITS},
    "stages": [
        {"name": "one", "steps": 3, "batch": 4, "lr": 1.0e-2, "size": [[16, 16]]},
        {"name": "two", "steps": 2, "batch": 4, "lr": 1.0e-2, "size": [16, 24]},
    ],
    "checkpoints": {"every_steps": 2, "log_steps": 1},
}
MODULE = """\
from torch import nn


class Map(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Conv2d(3, 8, 4, 4)

    def forward_features(self, x):
        return self.body(x)
"""


@pytest.fixture(scope="module")
def bank(tmp_path_factory):
    return once(tmp_path_factory, "plain", plain_bank)


def tensors_of(run):
    return {
        f"{path.relative_to(run)}:{name}": one
        for path in sorted(run.rglob("*.safetensors"))
        for name, one in safetensors.torch.load_file(path).items()
    }


def assert_same_when_stopped(bank, tmp_path, fields):
    """Stopping after every step changes no bit; returns the undisturbed trainer."""
    whole = trainer_for(bank, tmp_path / "whole", **fields)
    assert whole.run().is_done
    parts = trainer_for(bank, tmp_path / "parts", **fields)
    while not parts.run(should_stop=lambda: True).is_done:
        torch.manual_seed(9)
    mine, theirs = tensors_of(tmp_path / "parts"), tensors_of(tmp_path / "whole")
    assert mine.keys() == theirs.keys()
    assert [name for name in mine if not torch.equal(mine[name], theirs[name])] == []
    return whole


def test_averaged_weights_are_their_formula(bank, tmp_path):
    fields = {**FIELDS, "ema": {"decay": 0.7}}
    trainer = trainer_for(bank, tmp_path / "run", **fields)
    model = trainer.student.model
    expected = {name: one.double() for name, one in model.state_dict().items()}

    def on_step(_):
        for name, one in model.state_dict().items():
            expected[name] = 0.7 * expected[name] + 0.3 * one.double()

    assert trainer.run(on_step).is_done
    folder = tmp_path / "run" / "student-ema"
    averaged = timm.create_model(f"local-dir:{folder}", pretrained=True).state_dict()
    assert averaged.keys() == expected.keys()
    for name, one in expected.items():
        torch.testing.assert_close(averaged[name].double(), one, rtol=1e-5, atol=1e-7)
    last = safetensors.torch.load_file(tmp_path / "run/student/model.safetensors")
    assert not torch.equal(last["norm.weight"], averaged["norm.weight"])
    assert "averaged over steps, decay 0.7" in (folder / "README.md").read_text()


def test_averaged_weights_go_on(bank, tmp_path):
    assert_same_when_stopped(bank, tmp_path, {**FIELDS, "ema": {"decay": 0.7}})


def test_float16_goes_on(bank, tmp_path):
    whole = assert_same_when_stopped(bank, tmp_path, {**FIELDS, "precision": "float16"})
    held = read_learning(latest_checkpoint(whole.folder.checkpoints))
    assert held.keys() == {"scale", "_growth_tracker"}


def test_float16_is_near_float32(bank, tmp_path):
    """The first step's loss and gradient, whose norm is told unscaled."""

    def first(precision):
        trainer = trainer_for(
            bank, tmp_path / precision, **{**FIELDS, "precision": precision}
        )
        batch = next(trainer.datasets[0].stream())
        optimizer = make_optimizer(trainer.recipe.optimizer, trainer.modules)
        trainer.modules.eval()
        step = trainer.step(batch, optimizer, 0.0)
        while step.is_skipped:
            step = trainer.step(batch, optimizer, 0.0)
        return float(step.loss), float(step.norm)

    loss, norm = first("float32")
    assert first("float16") == (
        pytest.approx(loss, rel=5e-3),
        pytest.approx(norm, rel=3e-2),
    )


def test_a_step_that_overflows_is_left_out(bank, tmp_path):
    fields = {**FIELDS, "precision": "float16"}
    trainer = trainer_for(bank, tmp_path / "run", **fields)
    weight = trainer.modules.objective.heads["patch"].contract.weight
    seen = []

    def spoil(grad):
        seen.append(weight.detach().clone())
        return grad * math.inf if len(seen) == 2 else grad

    weight.register_hook(spoil)
    assert trainer.run().is_done
    moved = [not torch.equal(*pair) for pair in itertools.pairwise(seen)]
    assert moved == [True, False, True, True]
    held = read_learning(latest_checkpoint(trainer.folder.checkpoints))
    assert float(held["scale"]) == 2.0**15


def test_what_overflows_at_every_scale_is_refused(bank, tmp_path):
    stages = [{"steps": 40, "batch": 4, "lr": 1.0e-3, "size": [[16, 16]]}]
    fields = {**FIELDS, "precision": "float16", "stages": stages}
    trainer = trainer_for(bank, tmp_path / "run", **fields)
    weight = trainer.modules.objective.heads["patch"].contract.weight
    weight.register_hook(lambda grad: grad * math.inf)
    with pytest.raises(ValueError, match=r"must be finite, got .* at step 17 "):
        trainer.run()


def test_less_memory_is_the_same_training(bank, tmp_path):
    student = {**NOISY, "checkpointing": True}
    assert trainer_for(bank, tmp_path / "plain", **FIELDS).run().is_done
    lean = trainer_for(bank, tmp_path / "lean", **{**FIELDS, "student": student})
    assert lean.student.model.grad_checkpointing
    assert lean.run().is_done
    mine, theirs = tensors_of(tmp_path / "lean"), tensors_of(tmp_path / "plain")
    for name, one in theirs.items():
        torch.testing.assert_close(mine[name], one, rtol=1e-5, atol=1e-6)
    (tmp_path / "students.py").write_text(MODULE)
    student = {
        "model": f"module:{tmp_path / 'students.py'}:Map",
        "input": "image",
        "checkpointing": True,
    }
    line = r"checkpointing must be of a model that has it .*got Map; leave it out"
    with pytest.raises(ValueError, match=line):
        trainer_for(bank, tmp_path / "map", **{**FIELDS, "student": student})


def test_compiled_is_the_same_training(bank, tmp_path, monkeypatch):
    """Dynamo's part of it; kernels are for a machine with time."""
    fields = {**FIELDS, "engine": {"device": "cpu", "threads": 1, "compile": True}}
    assert trainer_for(bank, tmp_path / "plain", **FIELDS).run().is_done
    eager = functools.partial(torch.compile, backend="eager")
    monkeypatch.setattr(torch, "compile", eager)
    trainer = trainer_for(bank, tmp_path / "run", **fields)
    torch._dynamo.utils.counters.clear()
    assert trainer.run().is_done
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] >= 1
    mine, theirs = tensors_of(tmp_path / "run"), tensors_of(tmp_path / "plain")
    for name, one in theirs.items():
        torch.testing.assert_close(mine[name], one, rtol=1e-5, atol=1e-6)


def test_what_cannot_be_compiled(bank, tmp_path, monkeypatch):
    def fails(graph, inputs):
        raise OSError("no compiler")

    fields = {**FIELDS, "engine": {"device": "cpu", "threads": 1, "compile": True}}
    patch = functools.partial(torch.compile, backend=fails)
    monkeypatch.setattr(torch, "compile", patch)
    trainer = trainer_for(bank, tmp_path / "run", **fields)
    line = r"engine.compile must be false where torch cannot compile timm:.*no c"
    with pytest.raises(ValueError, match=line):
        trainer.run()
    ladder = {"patch": {**PATCH, "head": {"kind": "ladder"}}}
    with pytest.raises(ValueError, match="must be false with heads"):
        trainer_for(bank, tmp_path / "other", **{**fields, "targets": ladder})
