"""Several processes that train one student: as one process does, and none hangs."""

from __future__ import annotations

import contextlib
import json

import numpy as np
import pytest
import safetensors.torch
import torch

from student_train.checkpoints import latest_checkpoint
from student_train.devices import choose_device
from student_train.optimizers import make_optimizer
from student_train.order import rank_seed
from student_train.ranks import Ranks, joined
from student_train.run_log import read_log
from student_train.trainer import Trainer
from tests.ranks import run_ranks
from tests.training import (
    CLASS,
    LOGITS,
    NOISY,
    PATCH,
    once,
    pair_bank,
    plain_bank,
    recipe_for,
    street_bank,
    trainer_for,
)

STAGES = [
    {"name": "one", "steps": 4, "batch": 6, "lr": 1.0e-3, "size": [[16, 16]]},
    {"name": "two", "steps": 3, "batch": 5, "lr": 1.0e-3, "size": [16, 24]},
]
RUN = {
    "targets": {"patch": PATCH, "logits": LOGITS, "class": CLASS},
    "stages": STAGES,
    "checkpoints": {"every_steps": 2, "log_steps": 1},
}
# Rows that lack a sweep or a label count for some targets alone.
UNEVEN = {
    "targets": {
        "points": {"from": "main/points/pooled", "loss": {"mse": 1.0}, "weight": 3.0},
        "class": CLASS,
        "patch": {"from": "main/net/patch", "loss": {"mse": 1.0}},
    },
    "stages": [{"steps": 1, "batch": 9, "lr": 1.0, "size": [[16, 32]]}],
    "optimizer": {"clip_norm": None},
}
DROPPED = {
    "targets": {
        name: {"from": f"main/{name}/patch", "loss": {"mse": 1.0}}
        for name in ("first", "second")
    },
    "balance": {"kind": "drop_teachers"},
    "stages": [{"steps": 1, "batch": 12, "lr": 1.0, "size": [[16, 16]]}],
    "optimizer": {"clip_norm": None},
}


@pytest.fixture(scope="module")
def bank(tmp_path_factory):
    return once(tmp_path_factory, "plain", plain_bank)


def first_gradient(recipe):
    """The loss, shares and gradient of a recipe's first step, and which rows it had."""
    with joined("cpu") as ranks:
        trainer = Trainer(recipe, ranks=ranks)
        with contextlib.closing(trainer.datasets[0].stream()) as batches:
            batch = next(batches)
        trainer.modules.train()
        optimizer = make_optimizer(recipe.optimizer, trainer.modules)
        step = trainer.step(batch, optimizer, 0.0)
    parameters = trainer.modules.named_parameters()
    gradient = {
        name: one.grad.numpy() for name, one in parameters if one.grad is not None
    }
    shares = {name: float(one) for name, one in step.shares.items()}
    return float(step.loss), float(step.norm), shares, gradient, batch.rows


@pytest.mark.parametrize(
    ("make", "fields"), [(street_bank, UNEVEN), (pair_bank, DROPPED)]
)
def test_ranks_have_the_gradient_of_one(make, fields, tmp_path_factory, tmp_path):
    bank = once(tmp_path_factory, make.__name__.partition("_")[0], make)
    recipe = recipe_for(bank, tmp_path / "run", **fields)
    loss, norm, shares, gradient, rows = first_gradient(recipe)
    found = run_ranks(2, first_gradient, recipe)
    assert np.concatenate([one[4] for one in found]).tolist() == rows.tolist()
    for other_loss, other_norm, other_shares, other, _ in found:
        assert other_loss == pytest.approx(loss, rel=1e-5)
        assert other_norm == pytest.approx(norm, rel=1e-4)
        assert other_shares == pytest.approx(shares, rel=1e-5)
        assert other.keys() == gradient.keys()
        for name, expected in gradient.items():
            limit = 1e-5 * max(1.0, float(np.abs(expected).max()))
            np.testing.assert_allclose(other[name], expected, rtol=1e-4, atol=limit)


def train(recipe, stop=None, stopper=1):
    """Trains; returns the rows of each step. One rank alone is asked to stop."""
    rows = []
    with joined("cpu") as ranks:
        trainer = Trainer(recipe, ranks=ranks)
        make = trainer.step

        def noted(batch, *arguments):
            rows.append((batch.epoch, batch.step, batch.rows.tolist()))
            return make(batch, *arguments)

        trainer.step = noted
        outcome = trainer.run(
            should_stop=lambda: ranks.number == stopper and len(rows) == stop
        )
    return outcome.is_done, rows


def together(found):
    """Rows of each step of all ranks, in their order."""
    return [
        (*at[0][:2], [row for one in at for row in one[2]])
        for at in zip(*(rows for _, rows in found), strict=True)
    ]


def weights(run):
    return safetensors.torch.load_file(run / "student" / "model.safetensors")


def test_another_number_of_ranks_goes_on(bank, tmp_path):
    # Adam would make much of the last digits of small gradients.
    fields = {**RUN, "optimizer": {"kind": "sgd"}}

    def recipe(run):
        return recipe_for(bank, tmp_path / run, **fields)

    done, rows = train(recipe("alone"))
    assert done
    first = run_ranks(2, train, recipe("run"), 3)
    # Only the second was asked to: both stop, after the same step.
    assert [one[0] for one in first] == [False, False]
    assert latest_checkpoint(tmp_path / "run" / "checkpoints").stem == "step-000000003"
    done, more = train(recipe("run"), 2, 0)
    assert not done
    last = run_ranks(2, train, recipe("run"))
    assert [one[0] for one in last] == [True, True]
    assert together(first) + more + together(last) == rows
    mine, theirs = weights(tmp_path / "run"), weights(tmp_path / "alone")
    for name, one in theirs.items():
        torch.testing.assert_close(mine[name], one, rtol=1e-4, atol=1e-6)
    logs = [read_log(tmp_path / run) for run in ("run", "alone")]
    for row, other in zip(*logs, strict=True):
        for name in ("step", "lr", "loss", "loss.patch", "loss.logits", "loss.class"):
            assert row[name] == pytest.approx(other[name], rel=1e-3)
    found = json.loads((tmp_path / "run" / "run.json").read_text())
    assert found["result"]["steps"] == 7


def test_ranks_go_on_bit_for_bit(bank, tmp_path):
    """Each rank's dropout too, and no two ranks draw the same."""
    fields = {**RUN, "student": NOISY}
    whole = recipe_for(bank, tmp_path / "whole", **fields)
    parts = recipe_for(bank, tmp_path / "parts", **fields)
    for stop in (3, None):
        assert run_ranks(2, train, parts, stop)[0][0] == (stop is None)
    assert run_ranks(2, train, whole)[0][0]
    mine, theirs = weights(tmp_path / "parts"), weights(tmp_path / "whole")
    assert all(torch.equal(mine[name], one) for name, one in theirs.items())
    held = safetensors.torch.load_file(
        latest_checkpoint(tmp_path / "whole" / "checkpoints")
    )
    assert not torch.equal(held["random/cpu"], held["random/1/cpu"])


def fails_to_read(recipe):
    """Rank 1 cannot read its second batch."""
    with joined("cpu") as ranks:
        trainer = Trainer(recipe, ranks=ranks)
        dataset = trainer.datasets[0]
        stream = dataset.stream

        def broken(*arguments):
            for number, batch in enumerate(stream(*arguments)):
                if number == 1 and ranks.number == 1:
                    raise OSError("block 3 is damaged")
                yield batch

        dataset.stream = broken
        trainer.run()


def fails_to_learn(recipe):
    """Rank 1 ends in the middle of a step, for which the other waits."""
    with joined("cpu") as ranks:
        trainer = Trainer(recipe, ranks=ranks)
        if ranks.number == 1:

            def broken(*arguments, **more):
                raise RuntimeError("out of memory")

            trainer.modules.student.forward = broken
        trainer.run()


def fails_to_write(recipe):
    """Rank 0 cannot write its checkpoint."""
    with joined("cpu") as ranks:
        trainer = Trainer(recipe, ranks=ranks)
        if ranks.is_first:
            trainer.folder.checkpoints.parent.mkdir(parents=True)
            trainer.folder.checkpoints.write_text("no folder")
        trainer.run()


def test_one_that_fails_ends_all(bank, tmp_path):
    def messages(job, run):
        return run_ranks(2, job, recipe_for(bank, tmp_path / run, **RUN))

    assert messages(fails_to_read, "read") == [
        "TrainingError: rank 1 of 2: block 3 is damaged",
        "OSError: block 3 is damaged",
    ]
    gone, own = messages(fails_to_learn, "learn")
    assert own == "RuntimeError: out of memory"
    assert gone.startswith("TrainingError: rank 0 of 2 must have all others, but one")
    own, other = messages(fails_to_write, "write")
    assert own.startswith(("StorageError: ", "FileExistsError: ", "NotADirectory"))
    assert other == f"TrainingError: rank 0 of 2: {own.partition(': ')[2]}"


def test_what_ranks_cannot_share(bank, tmp_path):
    two = Ranks(1, 2, 1, 2)

    def refused(line, *overrides, **fields):
        recipe = recipe_for(bank, tmp_path / "run", *overrides, **fields)
        with pytest.raises(ValueError, match=line):
            Trainer(recipe, ranks=two)

    refused(
        r"multiple of ranks x loader.workers, got 3 for 2", "loader.window_blocks=3"
    )
    student = {"model": "timm:test_resnet", "input": "image"}
    logits = {"logits": {**LOGITS, "from": "main/net/logits"}}
    refused(
        r"batch norm \(\d+ layers\) must be trained by one process on a CPU, got 2",
        student=student,
        targets=logits,
        stages=[{"steps": 1, "batch": 4, "lr": 0.1, "size": 32}],
    )
    assert not (tmp_path / "run").exists()
    # The same student alone is none of ranks' business.
    trainer_for(
        bank,
        tmp_path / "run",
        student=student,
        targets=logits,
        stages=[{"steps": 1, "batch": 4, "lr": 0.1, "size": 32}],
    )


def test_devices_of_ranks(monkeypatch):
    ranks = Ranks(5, 8, 1, 4)
    assert choose_device("cpu", ranks).type == "cpu"
    with pytest.raises(ValueError, match=r"auto, cpu or cuda where .* got cuda:1"):
        choose_device("cuda:1", ranks)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    for name in ("auto", "cuda"):
        assert choose_device(name, ranks) == torch.device("cuda", 1)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(ValueError, match=r"must be a device of this machine, got cuda"):
        choose_device("auto", ranks)


def test_the_launchers_word(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    with joined("cpu") as ranks:
        assert ranks == Ranks()
        assert ranks.gather("x") == ["x"]
        with pytest.raises(KeyError), ranks.as_one():
            raise KeyError
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(ValueError, match=r"one launcher, got .*WORLD_SIZE=''"):
        joined("cpu").__enter__()


def test_no_two_ranks_draw_alike():
    seeds = {rank_seed(0, step, rank) for step in range(9) for rank in range(8)}
    assert len(seeds) == 72
    assert max(seeds) < 2**63
