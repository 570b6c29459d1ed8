"""Features of models on rows: students by hand, teachers from the bank, bird's eye."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from manifests.recipe import ProbeConfig, StudentConfig
from manifests.teacher import BevExtent
from pipeline.bank.open import Bank
from student_train.export import export_student
from student_train.grids import resize_grid
from student_train.heads import BevGrid
from student_train.probes.bird_eye import CameraCells, MetricCells
from student_train.probes.features import (
    VALUES,
    AsItIs,
    Ask,
    CellMean,
    Resized,
    StudentSource,
    TeacherSource,
    collect,
)
from student_train.probes.lines import Lines
from student_train.probes.models import ScoredTeacher, open_students
from student_train.students import make_student
from tests import probing

CPU = torch.device("cpu")
POOLED, PATCH = "blocks/image/32x64/pooled", "blocks/image/32x64/patch"
# Not in order of the splits, not whole blocks, across shards.
ROWS = {
    "fit": np.array([1, 4, 33, 50], np.int64),
    "choose": np.array([0, 5, 32], np.int64),
    "test": np.array([2, 20], np.int64),
}


@pytest.fixture(scope="module")
def bank(known_bank) -> Bank:
    return known_bank


def drawn_at(bank: Bank, rows: np.ndarray) -> list[probing.Drawn]:
    seeds = probing.seeds()
    return [probing.draw(seeds[str(key)]) for key in bank.keys()[rows]]


def test_a_teachers_rows_are_those_of_the_bank_whatever_the_batch(bank):
    for batch in (2, 100):
        source = TeacherSource(POOLED, bank, batch, CPU)
        (found,) = collect(source, [Ask(VALUES, AsItIs(), ROWS)])
        for split, rows in ROWS.items():
            expected = [one.image.mean((0, 1)) / 255 for one in drawn_at(bank, rows)]
            np.testing.assert_allclose(found[split], expected, atol=1e-6)
            assert found[split].dtype == torch.float32


def test_one_pass_gives_every_form(bank):
    source = TeacherSource(PATCH, bank, 5, CPU)
    some = {"fit": ROWS["fit"]}
    heard: list[tuple[int, int]] = []
    mean, small, same = collect(
        source,
        [
            Ask(VALUES, CellMean(), ROWS),
            Ask(VALUES, Resized((2, 3)), some),
            Ask(VALUES, Resized((4, 8)), ROWS),
        ],
        lambda done, total: heard.append((done, total)),
    )
    assert heard[-1] == (9, 9)
    for split, rows in ROWS.items():
        blocks = np.stack(
            [one.image[::8, ::8] / 255 for one in drawn_at(bank, rows)]
        ).astype(np.float32)
        np.testing.assert_allclose(same[split], blocks, atol=1e-6)
        np.testing.assert_allclose(mean[split], blocks.mean((1, 2)), atol=1e-6)
    assert set(small) == {"fit"}
    for place, drawn in enumerate(drawn_at(bank, ROWS["fit"])):
        for channel in range(3):
            # Pillow's bilinear is antialiased too, and knows nothing of torch.
            image = Image.fromarray((drawn.image[::8, ::8, channel] / 255).astype("f4"))
            expected = np.asarray(image.resize((3, 2), Image.Resampling.BILINEAR))
            got = small["fit"][place, ..., channel]
            np.testing.assert_allclose(got, expected, atol=1e-5)


def test_a_students_rows_are_the_model_run_by_hand(url, bank, run, tmp_path):
    probe = probing.probe_of(tmp_path, url, students={"mine": str(run)}, random=False)
    (model,) = open_students(probe, bank)
    assert model.student.training
    source = StudentSource(model, bank, None, 4, CPU)
    assert source.row_shape("patch") == (2, 4, 24)
    asks = [Ask("cls", AsItIs(), ROWS), Ask("patch", Resized((2, 4)), ROWS)]
    cls, patch = collect(source, asks)

    by_hand = timm.create_model(f"local-dir:{run / 'student'}", pretrained=True).eval()
    mean, std = by_hand.pretrained_cfg["mean"], by_hand.pretrained_cfg["std"]
    for split, rows in ROWS.items():
        pixels = np.stack([one.image for one in drawn_at(bank, rows)]) / 255
        image = torch.from_numpy((pixels - mean) / std).float().permute(0, 3, 1, 2)
        with torch.no_grad():
            tokens = by_hand.forward_features(image)
        torch.testing.assert_close(cls[split], tokens[:, 0], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(
            patch[split].flatten(1, 2), tokens[:, 1:], rtol=1e-4, atol=1e-4
        )
    assert not source.usable[bank.keys() == probing.NO_IMAGE].any()
    assert not source.usable[bank.keys() == ""].any()


def test_a_random_student_has_nothing_of_the_trained_one(url, bank, tmp_path):
    config = StudentConfig(model="timm:test_resnet", input="image")
    trained = make_student(config, probing.IMAGE_HW, seed=1)
    with torch.no_grad():
        trained(torch.randint(0, 256, (4, *probing.IMAGE_HW, 3), dtype=torch.uint8))
    export_student(trained, config, tmp_path / "out", {})
    probe = probing.probe_of(
        tmp_path, url, students={"mine": str(tmp_path / "out")}, seed=7
    )
    mine, drawn = open_students(probe, bank)
    assert (mine.role, drawn.role) == ("student", "random")
    assert (drawn.name, drawn.input) == ("random:test_resnet", "image")
    assert drawn.student.mean == mine.student.mean
    expected = make_student(config, probing.IMAGE_HW, seed=7).state_dict()
    held, own = drawn.student.state_dict(), mine.student.state_dict()
    for name, value in held.items():
        torch.testing.assert_close(value, expected[name], rtol=0, atol=0)
        if name.endswith("running_mean"):
            assert not value.any()
            assert own[name].any()
        if name.endswith("running_var"):
            assert (value == 1).all()


def test_one_random_student_for_each_architecture_and_size(url, bank, tmp_path):
    runs = {
        "first": probing.make_run(url, tmp_path / "first", seed=1),
        "second": probing.make_run(url, tmp_path / "second", seed=2),
        "wide": probing.make_run(
            url, tmp_path / "wide", args={**probing.STUDENT["args"], "num_heads": 3}
        ),
    }
    students = {name: str(path) for name, path in runs.items()}
    # A run's own folder of its student is the same thing.
    students["second"] += "/student"
    probe = probing.probe_of(tmp_path, url, students=students)
    found = open_students(probe, bank)
    assert [(one.name, one.role) for one in found] == [
        ("first", "student"),
        ("random:vit_tiny_patch16_224", "random"),
        ("second", "student"),
        ("wide", "student"),
        ("random:vit_tiny_patch16_224#2", "random"),
    ]
    assert found[4].student.args["num_heads"] == 3
    without = probe.model_copy(update={"random": False})
    assert [one.name for one in open_students(without, bank)] == list(runs)


def test_a_module_student_is_built_by_its_file(url, bank, tmp_path):
    (tmp_path / "mine.py").write_text(
        "from torch import nn\n\n\n"
        "class Map(nn.Module):\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        self.stem = nn.Conv2d(3, 4, 8, 8)\n\n"
        "    def forward_features(self, image):\n"
        "        return self.stem(image)\n"
    )
    name = f"module:{tmp_path / 'mine.py'}:Map"
    # 64 pixels a side are 8 x 8 cells of 8: at the bank's 2 : 1 nearest to 6 x 12.
    for size, expected in (([[32, 64]], (32, 64)), ([64], (48, 96))):
        run = probing.make_run(
            url,
            tmp_path / f"run{expected[1]}",
            {"steps": 1, "batch": 4, "lr": 1.0e-3, "size": size},
            model=name,
            args={},
        )
        probe = probing.probe_of(tmp_path, url, students={"mine": str(run)}, seed=3)
        mine, drawn = open_students(probe, bank)
        assert (mine.student.size, drawn.name) == (expected, "random:Map")
        made = make_student(mine.config, probing.IMAGE_HW, seed=5)
        weight = made.model.stem.weight
        torch.testing.assert_close(mine.student.model.stem.weight, weight)
        assert not torch.equal(drawn.student.model.stem.weight, weight)
        source = StudentSource(mine, bank, None, 4, CPU)
        assert source.row_shape("patch") == (expected[0] // 8, expected[1] // 8, 4)


def test_a_cameras_cells_are_projected_as_by_hand(bank):
    grid = BevGrid(x_m=(2.0, 10.0), y_m=(-8.0, 8.0), cells=(8, 8))
    heights = (probing.HEIGHT_M, 60.0)
    one = CameraCells.open(bank, "image", grid, heights[:1])
    rows = ROWS["fit"]
    at, sees = probing.cell_views()
    assert (one.sees(rows).numpy() == sees).all()
    values = torch.from_numpy(
        np.stack([d.image[::8, ::8] for d in drawn_at(bank, rows)]).astype("f4")
    )
    found = one(values, rows).numpy()
    assert found.shape == (4, *one.row_shape((4, 8, 3))) == (4, 8, 8, 3)
    for row, column in np.argwhere(sees):
        x, y = np.clip(at[row, column] - 0.5, 0, (7, 3))
        x0, y0 = min(int(x), 6), min(int(y), 2)
        expected = sum(
            (1 - abs(x - x0 - dx))
            * (1 - abs(y - y0 - dy))
            * values[:, y0 + dy, x0 + dx]
            for dy in (0, 1)
            for dx in (0, 1)
        )
        np.testing.assert_allclose(found[:, row, column], expected, atol=0.01)
    assert not found[:, ~sees].any()

    # High above, nothing is seen, so no cell is seen at all heights.
    two = CameraCells.open(bank, "image", grid, heights)
    assert not two.sees(rows).any()
    both = two(values, rows).numpy().reshape(4, 8, 8, 2, 3)
    np.testing.assert_array_equal(both[..., 0, :], found)
    assert not both[..., 1, :].any()


@settings(max_examples=30)
@given(
    teacher=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    probe=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    ends=st.tuples(*[st.sampled_from(["x_max", "x_min"])] * 2),
    sides=st.tuples(*[st.sampled_from(["y_max", "y_min"])] * 2),
)
def test_equal_extents_are_a_plain_resize(teacher, probe, ends, sides):
    area = {"x_m": (-3.0, 5.0), "y_m": (-2.0, 11.0)}
    theirs = BevGrid(**area, cells=teacher, row_0=ends[0], column_0=sides[0])
    ours = BevGrid(**area, cells=probe, row_0=ends[1], column_0=sides[1])
    cells = MetricCells.between(theirs, ours)
    values = torch.randn(2, *teacher, 3, generator=torch.Generator().manual_seed(0))
    axes = [1] * (ends[0] != ends[1]) + [2] * (sides[0] != sides[1])
    expected = resize_grid(values.flip(axes), probe, "bilinear")
    found = cells(values, np.arange(2))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert cells.covered_RK.all()


def test_other_extents_meet_by_metres():
    theirs = BevGrid(x_m=(0.0, 12.0), y_m=(-6.0, 6.0), cells=(24, 24), row_0="x_min")
    ours = BevGrid(x_m=(-4.0, 8.0), y_m=(-3.0, 3.0), cells=(6, 3))
    # A field linear in metres comes back exactly wherever nothing is cut off.
    x = 0.25 + 0.5 * np.arange(24)
    y = 5.75 - 0.5 * np.arange(24)
    field = np.stack(np.meshgrid(x, y, indexing="ij"), -1).astype("f4")
    cells = MetricCells.between(theirs, ours)
    found = cells(torch.from_numpy(field)[None], np.arange(1))[0].numpy()
    centres = np.array([7.0, 5.0, 3.0, 1.0, -1.0, -3.0])
    covered = centres > 0
    assert (cells.covered_RK.numpy() == covered[:, None].repeat(3, 1)).all()
    inner = slice(0, 3)
    np.testing.assert_allclose(found[inner, :, 0], centres[inner, None].repeat(3, 1))
    np.testing.assert_allclose(
        found[inner, :, 1], np.array([[2.0, 0, -2]]).repeat(3, 0), atol=1e-5
    )
    assert not found[4:].any()


def test_teachers_look_through_the_students_camera_or_the_first(monkeypatch):
    inputs = {
        "a/front/1/patch": ("front",),
        "a/back/1/patch": ("back",),
        "b/dashboard/1/patch": ("dashboard",),
        "c/rig/1/patch": ("front", "back"),
    }
    calibrated = SimpleNamespace(config={"calibration": "cam"})
    bank = SimpleNamespace(
        output=lambda _: SimpleNamespace(
            name="patch", kind="grid", size="1", definition={}, extent=None
        ),
        views_of=lambda _: {0},
        pass_of=lambda path: SimpleNamespace(
            inputs=inputs[path], has_own_geometry=lambda size: False
        ),
        record=SimpleNamespace(
            inputs={
                "front": calibrated,
                "back": calibrated,
                "dashboard": SimpleNamespace(config={}),
            }
        ),
    )
    monkeypatch.setattr(CameraCells, "open", lambda bank, name, grid, heights: name)
    teachers = [
        ScoredTeacher(name, tuple(p for p in inputs if p[0] == name), False)
        for name in "abc"
    ]
    outputs = dict.fromkeys(inputs)
    config = ProbeConfig(label="data/ground")
    extent = BevExtent(x_m=(0, 1), y_m=(0, 1))

    def scored(camera: str | None) -> dict[str, str | None]:
        model = SimpleNamespace(
            input=camera, role="student", student=SimpleNamespace(patch_dim=3)
        )
        students = {"mine": SimpleNamespace(model=model)} if camera else {}
        lines = Lines(bank, students, teachers, outputs).of_cells(
            config, extent, (2, 2)
        )
        return {line.model: line.features or line.reason for line in lines}

    assert scored(None)["a"] == "a/front/1/patch"
    found = scored("back")
    assert (found["mine"], found["a"]) == ("patch", "a/back/1/patch")
    reason = "it has no grid in view 0 that has an `extent` or lies on back"
    assert (found["b"], found["c"]) == (reason, reason)
    assert scored("dashboard")["mine"] == "dashboard has no calibration in the bank"
