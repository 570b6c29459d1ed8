"""Targets of a recipe, resolved against a bank; what is refused is said elsewhere."""

from __future__ import annotations

import pytest

from manifests.loading import load_job
from pipeline.bank.open import open_bank
from pipeline.precompute import precompute
from student_train.tasks import reading_of, resolve_tasks
from tests.conftest import POINTS_INPUT, write_job, write_shards
from tests.training import BEV_CELLS, EXTENT, once, recipe_for, street_bank

LABELS = {
    "seg": {"member": "seg.png", "input": "image", "num_classes": 4},
    "depth": {"member": "depth.png", "input": "image"},
    "ground": {"member": "ground.png", "extent": EXTENT, "num_classes": 4},
}
MSE, BEV = {"mse": 1.0}, {"kind": "bev"}


@pytest.fixture(scope="module")
def street(tmp_path_factory):
    return once(tmp_path_factory, "street", street_bank)


def resolve(bank, tmp_path, targets, *overrides, **fields):
    data = {"labels": LABELS}
    recipe = recipe_for(
        bank, tmp_path / "run", *overrides, targets=targets, data=data, **fields
    )
    tasks = resolve_tasks(recipe, open_bank(str(bank)))
    return recipe, {task.name: task for task in tasks}


@pytest.mark.parametrize(
    ("target", "expected"),
    [
        (
            {"from": "main/net/patch", "loss": MSE},
            ("features", "grid", 16, "net/image/16x32/patch", (4, 8)),
        ),
        (
            {"from": "main/fine/image/32x64/patch", "loss": {"cosine": 1.0}},
            ("features", "grid", 16, "fine/image/32x64/patch", (8, 16)),
        ),
        (
            {"from": "main/net/image/logits", "loss": {"kl": 1.0}},
            ("logits", "vector", 5, "net/image/16x32/logits", None),
        ),
        (
            {"from": "main/net/logits", "loss": MSE},
            ("logits", "vector", 5, "net/image/16x32/logits", None),
        ),
        (
            {"from": "main/points/pooled", "loss": MSE},
            ("features", "vector", 8, "points/lidar/native/pooled", None),
        ),
        (
            {"from": "main/ground/bev", "loss": MSE, "head": BEV},
            ("features", "bev", 6, "ground/lidar/native/bev", BEV_CELLS),
        ),
        (
            {"from": "main/labels/class", "loss": {"cross_entropy": 1.0}},
            ("classes", "vector", 5, None, None),
        ),
        (
            {"from": "main/labels/distance", "loss": {"l1": 1.0}},
            ("numbers", "vector", 1, None, None),
        ),
        (
            {"from": "data/seg", "loss": {"cross_entropy": 1.0}},
            ("classes", "grid", 4, None, None),
        ),
        (
            {"from": "data/depth", "loss": {"smooth_l1": 1.0}},
            ("numbers", "grid", 1, None, None),
        ),
        (
            {"from": "data/ground", "loss": {"cross_entropy": 1.0}, "head": BEV},
            ("classes", "bev", 4, None, None),
        ),
    ],
)
def test_kinds_and_shapes(target, expected, street, tmp_path):
    _, tasks = resolve(street, tmp_path, {"it": target})
    it = tasks["it"]
    assert (it.kind, it.shape, it.width, it.path, it.grid) == expected
    assert [term.name for term in it.terms] == list(target["loss"])


def test_what_a_batch_must_hold(street, tmp_path):
    targets = {
        "patch": {"from": "main/net/patch", "loss": MSE},
        "logits": {"from": "main/net/logits", "loss": MSE},
        "one": {"from": "main/labels/class", "loss": {"cross_entropy": 1.0}},
        "two": {"from": "main/labels/class", "loss": {"cross_entropy": 2.0}},
        "seg": {"from": "data/seg", "loss": {"cross_entropy": 1.0}},
    }
    recipe, tasks = resolve(street, tmp_path, targets)
    reading = reading_of(recipe, tuple(tasks.values()), [(16, 32)])
    assert reading.inputs == {"image": (16, 32)}
    assert reading.targets == {
        "patch": "net/image/16x32/patch",
        "logits": "net/image/16x32/logits",
    }
    # The objective normalises, by what a checkpoint holds; logits nobody.
    assert reading.normalise == frozenset()
    assert tasks["patch"].normalise == "standardise"
    assert tasks["logits"].normalise == "none"
    assert reading.labels == ("class",)
    assert list(reading.maps) == ["seg"]
    assert reading.cameras == ()
    recipe, tasks = resolve(street, tmp_path, targets, "normalise=none")
    sizes = [(16, 32), (24, 48)]
    reading = reading_of(recipe, tuple(tasks.values()), sizes)
    assert tasks["patch"].normalise == "none"
    assert reading.inputs == {"image": sizes}
    bev = {"it": {"from": "main/ground/bev", "loss": MSE, "head": BEV}}
    recipe, tasks = resolve(street, tmp_path, bev)
    assert reading_of(recipe, tuple(tasks.values()), sizes).cameras == ("image",)


def test_a_birds_eye_label_stays_where_sweeps_are_turned(tmp_path):
    """It does not follow a view's turns; in view 0 there are none."""
    folder = tmp_path / "turned"
    write_shards(folder, [5], with_points=True)
    job = write_job(
        folder,
        inputs={"image": {"kind": "image", "member": "jpg"}, "lidar": POINTS_INPUT},
        views={"random": 1, "yaw_deg": 10.0},
        teachers={
            "net": {
                "model": "module:./nets.py:Net",
                "weights": "random:1",
                "on": ["image"],
                "sizes": [[16, 16]],
                "outputs": {"logits": {}},
            }
        },
    )
    assert precompute(load_job(str(job)), quiet=True).is_whole
    target = {"from": "data/ground", "loss": {"cross_entropy": 1.0}, "head": BEV}
    with pytest.raises(ValueError, match=r"does not follow .*set loader\.view to 0"):
        resolve(folder / "bank", tmp_path, {"it": target})
    _, tasks = resolve(folder / "bank", tmp_path, {"it": target}, "loader.view=0")
    assert tasks["it"].shape == "bev"


CLASS = {"from": "main/labels/class", "loss": {"cross_entropy": 1.0}}
SAME_NAME = {
    "class": {"member": "seg.png", "input": "image", "num_classes": 4},
    **LABELS,
}


def test_a_map_called_as_a_label_of_the_bank(street, tmp_path):
    recipe = recipe_for(
        street, tmp_path / "run", targets={"class": CLASS}, data={"labels": SAME_NAME}
    )
    reading = reading_of(
        recipe, resolve_tasks(recipe, open_bank(str(street))), [(16, 32)]
    )
    assert (reading.labels, dict(reading.maps)) == (("class",), {})
    both = {"class": CLASS, "map": {**CLASS, "from": "data/class"}}
    recipe = recipe_for(
        street, tmp_path / "run", targets=both, data={"labels": SAME_NAME}
    )
    with pytest.raises(ValueError, match=r"data\.labels\.class must not be called as"):
        resolve_tasks(recipe, open_bank(str(street)))
