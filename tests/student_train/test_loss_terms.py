"""What a recipe says of losses: names, weights, parameters; and those of others."""

from __future__ import annotations

import inspect
import math
from importlib.metadata import EntryPoint

import pytest
import torch

from manifests.errors import ManifestError
from student_train import extensions
from student_train.loss_terms import LOSSES, LossFunction, Parameter, parse_terms
from student_train.losses import mse


def scaled(prediction, target, mask, *, by=2.0):
    return by * mse(prediction, target, mask)


SCALED = LossFunction(
    scaled, ("features",), {"by": Parameter("be above 0", lambda value: value > 0)}
)


@pytest.fixture
def brought(monkeypatch):
    """Two losses of another package."""
    points = [
        EntryPoint("scaled", f"{__name__}:SCALED", "teachonce.losses"),
        EntryPoint("wrong", "math:pi", "teachonce.losses"),
        EntryPoint("gone", "no_such_package:LOSS", "teachonce.losses"),
    ]
    monkeypatch.setattr(
        extensions,
        "entry_points",
        lambda group: [one for one in points if one.group == group],
    )
    monkeypatch.setattr(EntryPoint, "load", load)


def load(point):
    values = {"scaled": SCALED, "wrong": math.pi}
    if point.name not in values:
        raise ImportError("No module named 'no_such_package'")
    return values[point.name]


def test_a_loss_of_another_package(brought):
    recipe = {"scaled": {"weight": 0.5, "by": 3.0}, "mse": 1.0}
    (term, _) = parse_terms(recipe, "features", "t.loss")
    vectors = torch.tensor([[3.0, 1.0]]), torch.zeros(1, 2), torch.tensor([True])
    assert term.weight == 0.5
    assert term(*vectors).item() == 3 * 5
    with pytest.raises(
        ManifestError, match=r"by must be above 0, got 0 \(t\.loss\.sca"
    ):
        parse_terms({"scaled": {"by": 0}}, "features", "t.loss")
    with pytest.raises(ManifestError, match="scaled, which takes features"):
        parse_terms({"scaled": 1}, "logits", "t.loss")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("wrong", r"must be a LossFunction of student_train.loss_terms, got float"),
        ("gone", r"must be importable, got gone of no_such_package:LOSS \(No module"),
        ("scale", r"scaled, wrong, got scale \(t\.loss\.scale\); did you mean scaled"),
    ],
)
def test_a_wrong_loss_of_another_package(name, message, brought):
    with pytest.raises(ManifestError, match=message):
        parse_terms({name: 1.0}, "features", "t.loss")


def test_registry_tells_the_functions_own_defaults():
    assert LOSSES["kl"].defaults == {"temperature": 4.0}
    assert LOSSES["smooth_l1"].defaults == {"beta": 1.0}
    assert LOSSES["cross_entropy"].defaults == {"label_smoothing": 0.0}
    for loss in LOSSES.values():
        named = list(inspect.signature(loss.function).parameters)[3:]
        assert named == [*loss.parameters, *loss.statistics]
        for name, value in loss.defaults.items():
            assert loss.parameters[name].holds(value)


def test_terms_of_a_recipe():
    recipe = {"cosine": 0.9, "smooth_l1": {"weight": 0.1, "beta": 2}}
    first, second = parse_terms(recipe, "features", "targets.patch.loss")
    assert (first.name, first.weight, dict(first.parameters)) == ("cosine", 0.9, {})
    assert (second.weight, dict(second.parameters)) == (0.1, {"beta": 2.0})
    (plain,) = parse_terms({"kl": {}}, "logits", "targets.logits.loss")
    assert (plain.weight, dict(plain.parameters)) == (1.0, {"temperature": 4.0})
    prediction, target = torch.tensor([[3.0]]), torch.tensor([[0.0]])
    # |d| - beta / 2 beyond beta.
    assert second(prediction, target, torch.tensor([True])).tolist() == [2.0]


def test_a_term_is_given_the_statistics_it_asks_for():
    (term,) = parse_terms({"angle": 1.0}, "features", "t.loss")
    right = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 2.0]])
    held = {"dispersion": torch.tensor(0.5), "other": torch.tensor(0.0)}
    found = term(*right, torch.tensor([True]), held)
    assert found.item() == pytest.approx((math.pi / 2) ** 2 / 0.5, rel=1e-6)
    assert dict(term.parameters) == {}


@pytest.mark.parametrize(
    ("recipe", "target", "message"),
    [
        ({}, "features", r"at least one loss, got none \(t.loss\); known are cosine, "),
        ({"cosin": 1}, "features", r"must be one of cosine, .*, got cosin \(t.loss.c"),
        ({"kl": 1}, "features", r"must take features, got kl, which takes logits"),
        ({"cosine": 1}, "classes", r"use one of cross_entropy"),
        (
            {"smooth_l1": {"betta": 1}},
            "features",
            r"parameter of smooth_l1 must be one of weight, beta, got betta \(t.loss",
        ),
        ({"smooth_l1": {"beta": 0}}, "features", r"beta must be above 0, got 0 \(t.lo"),
        ({"cosine": -1}, "features", r"weight must be at least 0, got -1"),
        ({"cosine": float("nan")}, "features", r"weight must be at least 0, got nan"),
        ({"cosine": True}, "features", r"weight must be at least 0, got True"),
        (
            {"kl": {"temperature": "4"}},
            "logits",
            r"temperature must be above 0, got '4",
        ),
        (
            {"cross_entropy": {"label_smoothing": 1.0}},
            "classes",
            r"label_smoothing must be at least 0 and below 1, got 1.0",
        ),
    ],
)
def test_a_wrong_recipe_is_refused(recipe, target, message):
    with pytest.raises(ManifestError, match=message):
        parse_terms(recipe, target, "t.loss")
