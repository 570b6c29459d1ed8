"""Teacher dropping against a loop over images; and its draws."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from student_train.balance import TeacherDropping
from student_train.batches import Batch
from student_train.order import row_draws

NUM_ROWS = 400
TARGETS = {"a_cls": "a", "a_patch": "a", "b_cls": "b", "c_patch": "c", "label": None}


def tasks(weight=1.0):
    return [
        SimpleNamespace(
            name=name, teacher=teacher, config=SimpleNamespace(weight=weight)
        )
        for name, teacher in TARGETS.items()
    ]


def batch(rows=None, epoch=0, step=0):
    rows = np.arange(NUM_ROWS) if rows is None else rows
    return Batch(epoch, step, rows, tuple(map(str, rows)))


def losses(seed=0):
    rng = np.random.default_rng(seed)
    per_image = {name: torch.tensor(rng.random(NUM_ROWS)) for name in TARGETS}
    valid = {name: torch.tensor(rng.random(NUM_ROWS) < 0.8) for name in TARGETS}
    valid["a_patch"] = valid["a_cls"]
    return per_image, valid


def test_an_image_keeps_its_worst_teacher_and_others_by_chance():
    per_image, valid = losses()
    kept = TeacherDropping(tasks(), 0.5, seed=3).kept(per_image, valid, batch())
    assert torch.equal(kept["label"], valid["label"])
    chances = []
    for row in range(NUM_ROWS):
        of = {
            teacher: [
                float(per_image[name][row])
                for name, one in TARGETS.items()
                if one == teacher and valid[name][row]
            ]
            for teacher in "abc"
        }
        sums = {teacher: sum(found) for teacher, found in of.items() if found}
        worst = max(sums, key=sums.get) if sums else None
        for name, teacher in TARGETS.items():
            if teacher is None:
                continue
            assert bool(kept[name][row]) <= bool(valid[name][row])
            if teacher == worst:
                assert bool(kept[name][row]) == bool(valid[name][row])
            elif valid[name][row]:
                chances.append(bool(kept[name][row]))
        # All of a teacher's targets together.
        assert kept["a_cls"][row] == kept["a_patch"][row]
    assert np.mean(chances) == pytest.approx(0.5, abs=0.06)


@pytest.mark.parametrize("p", [0.0, 0.2, 0.9])
def test_p_is_the_chance_to_be_dropped(p):
    per_image, valid = losses()
    valid = {name: torch.ones(NUM_ROWS, dtype=torch.bool) for name in valid}
    # Teacher a is always the worst, the others never.
    per_image["a_cls"] = per_image["a_cls"] + 10
    kept = TeacherDropping(tasks(), p, seed=1).kept(per_image, valid, batch())
    assert kept["a_cls"].all()
    shares = [float(kept[name].float().mean()) for name in ("b_cls", "c_patch")]
    assert shares == pytest.approx([1 - p] * 2, abs=0.07)


def test_weights_decide_what_is_worst():
    per_image, valid = losses()
    ones = {name: torch.ones(NUM_ROWS, dtype=torch.bool) for name in valid}
    some = tasks()
    for task in some:
        task.config.weight = 1e-6 if task.teacher != "b" else 1.0
    kept = TeacherDropping(some, 0.9, seed=1).kept(per_image, ones, batch())
    assert kept["b_cls"].all()
    assert not kept["c_patch"].all()


def test_draws_hang_on_the_row_and_the_batch_alone():
    """Not on who holds the row, nor on the weights: a resume draws the same."""
    per_image, valid = losses()
    dropping = TeacherDropping(tasks(), 0.5, seed=3)
    whole = dropping.kept(per_image, valid, batch())
    turned = np.random.default_rng(0).permutation(NUM_ROWS)[:100]
    part = dropping.kept(
        {name: one[turned] for name, one in per_image.items()},
        {name: one[turned] for name, one in valid.items()},
        batch(turned),
    )
    for name in TARGETS:
        assert torch.equal(part[name], whole[name][turned])
    others = [
        dropping.kept(per_image, valid, batch(step=1)),
        dropping.kept(per_image, valid, batch(epoch=1)),
        TeacherDropping(tasks(), 0.5, seed=4).kept(per_image, valid, batch()),
    ]
    for other in others:
        assert not torch.equal(other["b_cls"], whole["b_cls"])


def test_row_draws_are_uniform_and_independent():
    rows = np.arange(20_000)
    draws = row_draws(5, 2, 7, rows, 3)
    assert draws.shape == (3, 20_000)
    assert draws.min() >= 0
    assert draws.max() < 1
    for one in draws:
        counts, _ = np.histogram(one, 20, (0, 1))
        # Chi-squared with 19 degrees of freedom: 43.8 at 0.001.
        assert ((counts - 1000) ** 2 / 1000).sum() < 43.8
    later = row_draws(5, 2, 8, rows, 1)[0]
    pairs = [(draws[0], draws[1]), (draws[1], draws[2]), (draws[0], later)]
    pairs.append((draws[0][:-1], draws[0][1:]))
    for left, right in pairs:
        assert abs(np.corrcoef(left, right)[0, 1]) < 0.03


def test_one_teacher_is_never_dropped_so_it_is_refused():
    one = [task for task in tasks() if task.teacher in ("a", None)]
    with pytest.raises(ValueError, match=r"fewer than two teachers .* for a; leave"):
        TeacherDropping(one, 0.5, seed=0)
