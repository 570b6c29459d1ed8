"""Checkpoints: everything comes back, whole or not at all."""

from __future__ import annotations

import json
import resource
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from student_train import checkpoints
from student_train.checkpoints import (
    Position,
    latest_checkpoint,
    load_checkpoint,
    read_position,
    save_checkpoint,
    save_heads,
)

HERE = Position(step=7, stage=1, stage_step=3, epoch=2, epoch_step=1)


def make(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(3, 4, 2), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(36, 3)
    )


def optimizer_of(kind, modules):
    if kind == "adamw":
        return torch.optim.AdamW(modules.parameters(), lr=0.01)
    return torch.optim.SGD(modules.parameters(), lr=0.01, momentum=0.9)


def learn(modules, optimizer, steps=2):
    for _ in range(steps):
        optimizer.zero_grad()
        modules(torch.rand(5, 3, 4, 4)).square().mean().backward()
        optimizer.step()


@pytest.mark.parametrize("kind", ["adamw", "sgd"])
def test_everything_comes_back(kind, tmp_path):
    first = make(0)
    optimizer = optimizer_of(kind, first)
    learn(first, optimizer)
    path = save_checkpoint(tmp_path, HERE, first, optimizer)
    drawn = torch.rand(3)
    second = make(1)
    other = optimizer_of(kind, second)
    torch.rand(5)
    assert load_checkpoint(path, second, other) == HERE
    assert torch.equal(torch.rand(3), drawn)
    for name, one in second.state_dict().items():
        assert one.dtype == first.state_dict()[name].dtype
        assert torch.equal(one, first.state_dict()[name])
    mine, theirs = other.state_dict()["state"], optimizer.state_dict()["state"]
    assert mine.keys() == theirs.keys()
    for number, state in theirs.items():
        for name, value in state.items():
            assert torch.equal(mine[number][name], value)
    for modules, chosen in ((first, optimizer), (second, other)):
        torch.manual_seed(5)
        learn(modules, chosen)
    assert torch.equal(first[3].weight, second[3].weight)


def test_the_one_before_goes_and_strangers_stay(tmp_path):
    modules = make(0)
    optimizer = optimizer_of("sgd", modules)
    assert latest_checkpoint(tmp_path / "none") is None
    assert latest_checkpoint(tmp_path) is None
    (tmp_path / "notes.txt").write_text("mine")
    # What a killed run was writing.
    (tmp_path / "step-000000004.tmp").write_text("half")
    for step in (9, 10, 11):
        path = save_checkpoint(tmp_path, Position(step=step), modules, optimizer)
        assert latest_checkpoint(tmp_path) == path
    names = sorted(one.name for one in tmp_path.iterdir())
    assert names == ["notes.txt", "step-000000011.safetensors"]


def test_a_checkpoint_appears_whole_or_not_at_all(tmp_path, monkeypatch):
    modules = make(0)
    optimizer = optimizer_of("sgd", modules)
    held = save_checkpoint(tmp_path, Position(step=1), modules, optimizer)

    def killed(*arguments):
        Path(arguments[1]).write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoints, "save_file", killed)
    with pytest.raises(KeyboardInterrupt):
        save_checkpoint(tmp_path, Position(step=2), modules, optimizer)
    assert latest_checkpoint(tmp_path) == held
    assert read_position(held).step == 1


def test_a_full_disk(tmp_path):
    modules = make(0)
    optimizer = optimizer_of("sgd", modules)
    held = save_checkpoint(tmp_path, Position(step=1), modules, optimizer)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, hard))
    try:
        with pytest.raises(
            OSError, match=r"cannot write .*step-000000002.*goes on fro"
        ):
            save_checkpoint(tmp_path, Position(step=2), modules, optimizer)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert list(tmp_path.iterdir()) == [held]


def test_tied_weights(tmp_path):
    def tied(seed):
        modules = make(seed)
        modules.append(nn.Linear(3, 36, bias=False))
        modules[4].weight = nn.Parameter(modules[3].weight.detach().T)
        modules.append(nn.Linear(36, 3))
        modules[5].weight = modules[3].weight
        return modules

    first = tied(0)
    optimizer = optimizer_of("adamw", first)
    learn(first, optimizer)
    path = save_checkpoint(tmp_path, HERE, first, optimizer)
    second = tied(1)
    load_checkpoint(path, second, optimizer_of("adamw", second))
    assert second[5].weight is second[3].weight
    for name, one in second.state_dict().items():
        assert torch.equal(one, first.state_dict()[name])
    save_heads(tmp_path / "heads.safetensors", first.state_dict())
    assert len(load_file(tmp_path / "heads.safetensors")) == len(first.state_dict())


def test_damage_is_named(tmp_path):
    modules = make(0)
    optimizer = optimizer_of("adamw", modules)
    path = save_checkpoint(tmp_path, HERE, modules, optimizer)
    whole = path.read_bytes()
    for content in (b"", whole[:20], whole[:-1], b"x" * len(whole)):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"step-000000007.*damaged.*; remove it"):
            load_checkpoint(path, make(1), optimizer)
    save_file({"x": torch.zeros(1)}, path, {"position": json.dumps({"steps": 1})})
    with pytest.raises(ValueError, match="must be a checkpoint, but it is damaged"):
        read_position(path)


def test_another_student(tmp_path):
    modules = make(0)
    path = save_checkpoint(tmp_path, HERE, modules, optimizer_of("sgd", modules))
    other = nn.Linear(2, 2)
    with pytest.raises(ValueError, match=r"must be of this recipe's student: .*weight"):
        load_checkpoint(path, other, optimizer_of("sgd", other))
