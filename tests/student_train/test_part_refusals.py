"""Parts of recipes that do not fit: grids that cannot coincide, refusals by name."""

from __future__ import annotations

import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from pipeline.bank.open import open_bank
from student_train import extensions
from student_train.folding import fold
from tests.student_train.test_trainer import module
from tests.training import (
    STUDENT,
    once,
    pair_bank,
    recipe_for,
    street_bank,
    trainer_for,
)

STAGE = {"steps": 1, "batch": 4, "lr": 1e-3, "size": [[16, 16]]}
LEVEL = "{}/image/16x16/{}"


@pytest.fixture(scope="module")
def bank(tmp_path_factory):
    return once(tmp_path_factory, "pair", pair_bank)


@pytest.fixture(scope="module")
def street(tmp_path_factory):
    return once(tmp_path_factory, "street", street_bank)


PATCH, CLS = {"from": "main/net/patch"}, {"from": "main/first/cls"}
MSE = {"mse": 1.0}


@pytest.mark.parametrize(
    ("target", "expected"),
    [("main/net/patch", (16, 32)), ("main/fine/image/32x64/patch", (32, 64))],
)
def test_the_students_size_is_that_at_which_grids_coincide(
    target, expected, street, tmp_path
):
    """Its cells are 4 pixels wide, whatever the teacher's."""
    targets = {"it": {"from": target, "loss": MSE, "grid": "coincide"}}
    stages = [{"steps": 1, "batch": 4, "lr": 1e-3}]
    trainer = trainer_for(street, tmp_path / "run", targets=targets, stages=stages)
    assert trainer.datasets[0].reading.inputs == {"image": expected}
    assert trainer.run().is_done


@pytest.mark.parametrize(
    ("targets", "fields", "message"),
    [
        (
            {
                "one": {**PATCH, "grid": "coincide"},
                "two": {"from": "main/fine/image/32x64/patch", "grid": "coincide"},
            },
            {},
            "grids of one size, got one 4 x 8, two 8 x 16; let one coincide",
        ),
        (
            {"it": {**PATCH, "grid": "coincide"}},
            {"size": [[16, 16]]},
            r"it\.grid: the student's grid must be 4 x 8 .* got 4 x 4 at an input of "
            r"16 x 16; set the stage's size to \[\[16, 32\]\]",
        ),
        (
            {"it": {**PATCH, "grid": "coincide"}},
            {"size": [16, 24]},
            r"it\.grid: the student's grid must be 4 x 8 to coincide",
        ),
        (
            {"it": {"from": "main/points/pooled", "grid": "coincide"}},
            {},
            r"it\.grid must be larger, smaller, student or teacher for what is no grid",
        ),
        (
            {
                "it": {
                    "from": "main/ground/bev",
                    "grid": "coincide",
                    "head": {"kind": "bev"},
                }
            },
            {},
            r"it\.grid must be larger, smaller, student or teacher for what is no grid",
        ),
    ],
)
def test_grids_that_cannot_coincide(targets, fields, message, street, tmp_path):
    targets = {name: {"loss": MSE, **one} for name, one in targets.items()}
    stages = [{"steps": 1, "batch": 4, "lr": 1e-3, **fields}]
    with pytest.raises(ValueError, match=message):
        trainer_for(street, tmp_path / "run", targets=targets, stages=stages)


def test_a_student_from_a_file_has_no_size_of_its_own(street, tmp_path):
    targets = {"it": {**PATCH, "loss": MSE, "grid": "coincide"}}
    fields = {"student": module(tmp_path, "Map"), "targets": targets}
    stage = {"steps": 1, "batch": 4, "lr": 1e-3}
    with pytest.raises(ValueError, match="size of stage train must be given for a mod"):
        trainer_for(street, tmp_path / "run", stages=[stage], **fields)
    stage["size"] = [[16, 32]]
    assert trainer_for(street, tmp_path / "run", stages=[stage], **fields).run().is_done


CNN = {"model": "timm:resnet10t", "input": "image"}


@pytest.mark.parametrize(
    ("target", "fields", "message"),
    [
        (
            {**CLS, "loss": {"angle": 1.0}},
            {},
            r"normalise must be none for the loss angle, whose dispersion .* stand",
        ),
        (
            {"from": "main/first/logits", "loss": {"kl": 1.0}},
            {},
            r"it\.loss\.kl\.temperature must be one of 1, 3, got 4: the bank keeps 4",
        ),
        (
            {
                "from": "main/first/logits",
                "loss": {"kl": {"temperature": 1}},
                "normalise": "phi_s",
            },
            {},
            r"it\.normalise must be left out for logits, .* got phi_s",
        ),
        (
            {"from": "main/first/logits", "loss": MSE},
            {},
            r"loss must be kl where not all logits are stored, got mse \(the bank k",
        ),
        (
            {**CLS, "loss": MSE, "head": {"kind": "mlp"}},
            {},
            r"a head must be one of adapter, linear, ladder, .* got mlp \(targets\.i",
        ),
        (
            {**CLS, "loss": MSE, "head": {"kind": "adapter", "rungs": 4}},
            {},
            r"head\.rungs must be left out for a head of kind adapter, which takes hid",
        ),
        (
            {**CLS, "loss": MSE, "head": {"kind": "linear", "args": {"a": 1}}},
            {},
            r"head\.args must be left out for a head of kind linear, which takes none",
        ),
        (
            {**CLS, "loss": MSE, "head": {"kind": "ladder"}, "tokens": "pooled"},
            {},
            r"head must be adapter or linear for pooled tokens, got ladder",
        ),
        (
            {"from": "main/first/patch", "loss": MSE, "head": {"kind": "ladder"}},
            {"student": CNN},
            r"head must be another than ladder for a student whose layers do not lie",
        ),
        (
            {
                "from": "main/first/patch",
                "loss": MSE,
                "head": {"kind": "transformer", "heads": 5},
            },
            {},
            r"heads must divide the tokens' 48 channels, got 5",
        ),
        (
            {**CLS, "loss": MSE},
            {"balance": {"kind": "drop_teachers"}},
            r"balance must be fixed where fewer than two teachers are learned from",
        ),
    ],
)
def test_what_parts_refuse(target, fields, message, bank, tmp_path):
    fields = {"stages": [STAGE], **fields}
    with pytest.raises(ValueError, match=message):
        trainer_for(bank, tmp_path / "run", targets={"it": target}, **fields)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("rule", ["phi_s", "whiten"])
def test_an_output_without_covariance(rule, bank, tmp_path):
    folder = tmp_path / "bank"
    shutil.copytree(bank, folder)
    stats = folder / "features.zarr" / LEVEL.format("first", "stats")
    shutil.rmtree(stats / "cls_covariance")
    targets = {"it": {**CLS, "loss": MSE}}
    with pytest.raises(
        ValueError,
        match=rf"it\.normalise must be none or standardise for first/image/16x16/cls, "
        rf".* got {rule} .*set `normalise: standardise`",
    ):
        trainer_for(folder, tmp_path / "run", f"normalise={rule}", targets=targets)


def test_a_dispersion_of_0_is_refused(bank, tmp_path, monkeypatch):
    targets = {"it": {**CLS, "loss": {"angle": 1.0}, "normalise": "none"}}
    opened = open_bank(str(bank))
    found = opened.statistics(LEVEL.format("first", "cls"))
    wrong = {**found, "dispersion": np.asarray(0.0)}
    monkeypatch.setattr(type(opened), "statistics", lambda *_: wrong)
    with pytest.raises(ValueError, match=r"a dispersion above 0 of first/.* got 0\.0"):
        trainer_for(bank, tmp_path / "run", targets=targets)


class Mixer(nn.Module):
    """A head of another package."""

    def __init__(self, dim_in, dim_out, depth=1):
        super().__init__()
        widths = [dim_in] * depth
        self.below = nn.Sequential(*(nn.Linear(one, one) for one in widths))
        self.out = nn.Linear(dim_in, dim_out)

    def forward(self, tokens):
        return self.out(self.below(tokens))

    def last_layers(self):
        return (self.out,)


@pytest.fixture
def brought(monkeypatch):
    found = {"mixer": Mixer, "number": lambda *_: 3}
    points = [
        SimpleNamespace(name=name, value="package:it", load=lambda one=one: one)
        for name, one in found.items()
    ]
    held = {"teachonce.heads": points}
    monkeypatch.setattr(extensions, "entry_points", lambda group: held[group])


def test_a_head_of_another_package(brought, bank, tmp_path):
    head = {"kind": "mixer", "args": {"depth": 3}}
    targets = {"it": {**CLS, "loss": MSE, "head": head}}
    trainer = trainer_for(bank, tmp_path / "run", targets=targets)
    objective = trainer.modules.objective
    assert len(objective.heads["it"].below) == 3
    assert trainer.run().is_done
    tokens = torch.randn(2, 48)
    folded = fold(objective.heads["it"], objective.spaces["it"].normaliser)
    raw = objective.undo(objective.tasks[0], objective.heads["it"](tokens))
    torch.testing.assert_close(folded(tokens), raw, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("head", "message"),
    [
        ({"kind": "number"}, r"it\.head must be a torch\.nn\.Module, got int"),
        (
            {"kind": "mixer", "args": {"width": 3}},
            r"it\.head must be built with its args, got TypeError: .*width",
        ),
        (
            {"kind": "mixer", "hidden": 3},
            r"head\.hidden must be left out for a head of kind mixer, which takes args",
        ),
        ({"kind": "mixr"}, r"bev, mixer, number, got mixr .*did you mean mixer"),
    ],
)
def test_a_wrong_head_of_another_package(head, message, brought, bank, tmp_path):
    targets = {"it": {**CLS, "loss": MSE, "head": head}}
    with pytest.raises(ValueError, match=message):
        trainer_for(bank, tmp_path / "run", targets=targets)


def test_a_recipe_that_is_read_again_is_the_same(bank, tmp_path):
    """A run keeps its recipe as JSON, with every default written out."""
    fields = {
        "targets": {"it": {**CLS, "loss": MSE}},
        "student": STUDENT,
    }
    recipe = recipe_for(bank, tmp_path / "run", **fields)
    again = type(recipe).model_validate(recipe.model_dump(mode="json", by_alias=True))
    assert again == recipe
