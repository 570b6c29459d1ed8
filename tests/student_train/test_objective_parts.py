"""Parts of recipes in the whole objective, against NumPy."""

from __future__ import annotations

import numpy as np
import pytest
import safetensors.torch
import torch

from pipeline.bank.open import open_bank
from student_train.folding import fold
from student_train.order import row_draws
from tests.training import PAIR_TOPK, once, pair_bank, trainer_for

BATCH = 40
LINEAR = {"kind": "linear"}
STAGE = {"steps": 1, "batch": BATCH, "lr": 1e-3, "size": [[16, 16]]}
LEVEL = "{}/image/16x16/{}"


@pytest.fixture(scope="module")
def bank(tmp_path_factory):
    return once(tmp_path_factory, "pair", pair_bank)


class Step:
    """All rows of the bank in one batch, seen by a student."""

    def __init__(self, bank, tmp_path, targets, **fields):
        self.bank = open_bank(str(bank))
        self.trainer = trainer_for(
            bank, tmp_path / "run", targets=targets, stages=[STAGE], **fields
        )
        self.objective = self.trainer.modules.objective
        self.batch = next(self.trainer.datasets[0].stream())
        self.trainer.modules.eval()
        with torch.no_grad():
            self.features = self.trainer.student(
                self.batch.inputs["image"], layers=True
            )
            total, shares = self.objective(self.features, self.batch, "image")
        self.total = float(total)
        self.shares = {name: float(share) for name, share in shares.items()}

    def stored(self, path, suffix=""):
        """Of the batch's rows in the views they were shown in."""
        values = self.bank.whole_array(path + suffix)
        dataset, size = self.trainer.datasets[0], self.bank.record.block_rows
        views = [dataset.view_at(row // size, 0) for row in self.batch.rows.tolist()]
        return values[self.batch.rows, views].astype(np.float64)

    def linear(self, name, kind):
        weights = self.objective.heads[name].linear
        tokens = getattr(self.features, kind).double().numpy()
        weight, bias = (one.detach().double().numpy() for one in weights.parameters())
        return tokens @ weight.T + bias


def log_softmax(logits):
    shifted = logits - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_top_k_logits_and_the_rest_at_a_temperature_of_the_bank(
    temperature, bank, tmp_path
):
    """The k largest exactly, the others' mass exactly and evenly."""
    loss = {"kl": {"temperature": temperature}}
    targets = {"it": {"from": "main/first/logits", "head": LINEAR, "loss": loss}}
    step = Step(bank, tmp_path, targets)
    path = LEVEL.format("first", "logits")
    index = step.stored(path, "_index").astype(int)
    value, rest = step.stored(path, "_value"), step.stored(path, "_rest")
    mass = np.exp(value / temperature)
    others = np.exp(rest[:, [1.0, 3.0].index(temperature)])
    whole = mass.sum(1) + others
    teacher = np.repeat((others / whole / (9 - PAIR_TOPK))[:, None], 9, axis=1)
    np.put_along_axis(teacher, index, mass / whole[:, None], 1)
    np.testing.assert_allclose(teacher.sum(1), 1)
    student = log_softmax(step.linear("it", "cls") / temperature)
    expected = temperature**2 * (teacher * (np.log(teacher) - student)).sum(1).mean()
    assert step.shares["it"] == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("rule", ["none", "standardise", "phi_s", "whiten"])
@pytest.mark.parametrize("teacher", ["first", "second"])
def test_normalisations_of_stored_grids(rule, teacher, bank, tmp_path):
    """One is int8 and travels so; the rule of the target overrides the recipe's."""
    targets = {
        "it": {
            "from": f"main/{teacher}/patch",
            "head": LINEAR,
            "loss": {"mse": 1.0},
            "normalise": rule,
        }
    }
    step = Step(bank, tmp_path, targets, normalise="none")
    path = LEVEL.format(teacher, "patch")
    dataset, size = step.trainer.datasets[0], step.bank.record.block_rows
    target = np.stack(
        [
            step.bank.read(path, row // size, view=dataset.view_at(row // size, 0))[
                row % size
            ]
            for row in step.batch.rows.tolist()
        ]
    ).astype(np.float64)
    found = step.bank.statistics(path)
    level, _, name = path.rpartition("/")
    covariance = step.bank.whole_array(f"{level}/stats/{name}_covariance")
    centred = target - found["mean"]
    if rule == "standardise":
        target = centred / np.sqrt(found["variance"])
    elif rule == "whiten":
        variances, axes = np.linalg.eigh(covariance)
        target = centred @ (axes / np.sqrt(variances)) @ axes.T
    elif rule == "phi_s":
        space = step.objective.spaces["it"].normaliser
        matrix = space.matrix.double().numpy()
        scale = covariance.trace() / len(covariance)
        # One scale, a rotation, and equal variances: that is PHI-S.
        np.testing.assert_allclose(
            matrix @ matrix.T * scale, np.eye(len(matrix)), atol=1e-5
        )
        np.testing.assert_allclose(
            np.diag(matrix @ covariance @ matrix.T), 1, rtol=1e-4
        )
        target = centred @ matrix.T
    difference = step.linear("it", "patch") - target
    assert step.shares["it"] == pytest.approx((difference**2).mean(), rel=1e-4)


def test_the_angle_is_in_units_of_the_banks_dispersion(bank, tmp_path):
    loss = {"angle": 1.0}
    targets = {
        name: {
            "from": f"main/{name}/cls",
            "head": LINEAR,
            "loss": loss,
            "normalise": "none",
        }
        for name in ("first", "second")
    }
    step = Step(bank, tmp_path, targets)
    for name in targets:
        path = LEVEL.format(name, "cls")
        target, prediction = step.stored(path), step.linear(name, "cls")
        cosine = (target * prediction).sum(1) / (
            np.linalg.norm(target, axis=1) * np.linalg.norm(prediction, axis=1)
        )
        dispersion = float(step.bank.statistics(path)["dispersion"])
        expected = (np.arccos(cosine) ** 2 / dispersion).mean()
        assert step.shares[name] == pytest.approx(expected, rel=1e-4)


def test_ladders_and_a_layer_for_both_kinds_of_tokens(bank, tmp_path):
    loss = {"mse": 1.0}
    ladder = {"kind": "ladder", "hidden": 10, "rungs": 6}
    one = {"loss": loss, "normalise": "none"}
    targets = {
        "rungs_cls": {"from": "main/second/cls", "head": ladder, **one},
        "rungs_patch": {"from": "main/second/patch", "head": ladder, **one},
        "patch": {
            "from": "main/second/patch",
            "head": {"kind": "transformer", "heads": 2},
            **one,
        },
        "cls": {"from": "main/second/cls", "head": {"same_as": "patch"}, **one},
    }
    step = Step(bank, tmp_path, targets)
    assert step.objective.needs_layers
    assert set(step.objective.heads) == {"rungs_cls", "rungs_patch", "patch"}
    heads, features = step.objective.heads, step.features
    with torch.no_grad():
        cls, patch = heads["patch"](features.cls, features.patch)
        found = {
            "patch": patch,
            "cls": cls,
            "rungs_cls": heads["rungs_cls"]([features.layers[0].cls, features.cls]),
            "rungs_patch": heads["rungs_patch"](
                [features.layers[0].patch, features.patch]
            ),
        }
    for name, prediction in found.items():
        kind = name.rpartition("_")[2]
        target = step.stored(LEVEL.format("second", kind))
        expected = ((prediction.double().numpy() - target) ** 2).mean()
        assert step.shares[name] == pytest.approx(expected, rel=1e-5)


def test_ranks_with_unequal_images_give_the_gradient_of_all(bank, tmp_path):
    """The seam for several ranks: sums over what counts, divided by the mean count."""
    head = {"kind": "adapter", "hidden": 8}
    targets = {
        name: {"from": f"main/{name}/cls", "head": head, "loss": {"mse": 1.0}}
        for name in ("first", "second")
    }
    step = Step(bank, tmp_path, targets, balance={"kind": "drop_teachers", "p": 0.6})
    whole = step.total
    objective = step.objective
    counts = {}
    totals = []
    for rank, span in enumerate((slice(0, 8), slice(8, BATCH))):
        batch = part(step.batch, span)
        features = step.trainer.student(batch.inputs["image"])
        objective.total_of = lambda found, rank=rank: counts.setdefault(rank, found)
        objective(features, batch, "image")
    mean = (counts[0] + counts[1]) / 2
    assert not torch.equal(counts[0] * 4, counts[1])
    for span in (slice(0, 8), slice(8, BATCH)):
        batch = part(step.batch, span)
        features = step.trainer.student(batch.inputs["image"])
        objective.total_of = lambda _: mean
        totals.append(float(objective(features, batch, "image")[0].detach()))
    assert sum(totals) / 2 == pytest.approx(whole, rel=1e-5)


def part(batch, span):
    """Some rows of a batch, as a rank would hold them."""
    return type(batch)(
        batch.epoch,
        batch.step,
        batch.rows[span],
        batch.keys[span],
        {name: one[span] for name, one in batch.inputs.items()},
        {
            name: type(one)(
                one.source,
                {key: value[span] for key, value in one.arrays.items()},
                one.valid[span],
            )
            for name, one in batch.targets.items()
        },
    )


def test_heads_leave_with_their_normalisation(bank, tmp_path):
    """What a run leaves leads back to the teacher's own features."""
    targets = {
        "it": {"from": "main/first/patch", "loss": {"mse": 1.0}, "normalise": "phi_s"}
    }
    trainer = trainer_for(bank, tmp_path / "run", targets=targets)
    trainer.run()
    state = safetensors.torch.load_file(tmp_path / "run" / "heads.safetensors")
    names = {name for name in state if ".normaliser." in name}
    assert names == {f"it.normaliser.{one}" for one in ("mean", "matrix", "inverse")}
    other = trainer_for(bank, tmp_path / "other", "seed=5", targets=targets)
    objective = other.modules.objective
    objective.load_head_state(state)
    task = objective.tasks[0]
    tokens = torch.randn(2, 4, 4, 48)
    prediction = trainer.modules.objective.heads["it"](tokens)
    folded = fold(objective.heads["it"], objective.spaces["it"].normaliser)
    raw = objective.undo(task, prediction)
    torch.testing.assert_close(folded(tokens), raw, rtol=1e-4, atol=1e-4)
    covariance = open_bank(str(bank)).whole_array(
        f"{LEVEL.format('first', 'stats')}/patch_covariance"
    )
    scale = covariance.trace() / 12
    moved = raw - state["it.normaliser.mean"]
    np.testing.assert_allclose(
        moved.detach().square().sum(), prediction.detach().square().sum() * scale, 1e-4
    )


def test_the_loss_with_teachers_dropped_is_the_mean_over_kept_images(bank, tmp_path):
    """Sum of kept losses over their number, by teacher; shares are over all images."""
    targets = {
        name: {
            "from": f"main/{name}/cls",
            "head": LINEAR,
            "loss": {"mse": 1.0},
            "normalise": "none",
            "weight": weight,
        }
        for name, weight in (("first", 0.5), ("second", 2.0))
    }
    step = Step(bank, tmp_path, targets, balance={"kind": "drop_teachers", "p": 0.7})
    losses = {}
    for name in targets:
        target = step.stored(LEVEL.format(name, "cls"))
        losses[name] = ((step.linear(name, "cls") - target) ** 2).mean(1)
        assert step.shares[name] == pytest.approx(losses[name].mean(), rel=1e-4)
    draws = row_draws(0, 0, 0, step.batch.rows, 2)
    is_first_worst = 0.5 * losses["first"] > 2 * losses["second"]
    kept = {
        "first": is_first_worst | (draws[0] >= 0.7),
        "second": ~is_first_worst | (draws[1] >= 0.7),
    }
    assert 0 < min(one.mean() for one in kept.values()) < 1
    expected = sum(
        weight * losses[name][kept[name]].mean()
        for name, weight in (("first", 0.5), ("second", 2.0))
    )
    assert step.total == pytest.approx(expected, rel=1e-4)
