"""A bank and a sweep give the point table: times, views, and what is missing."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest

from manifests.errors import BankError
from manifests.inputs import PointsInput
from manifests.loading import load_job
from manifests.storage import Store
from pipeline.bank.open import open_bank
from pipeline.bank.record import open_record
from pipeline.bank.row_geometry import RowGeometry, point_table
from pipeline.info import bank_facts
from pipeline.precompute import precompute
from pipeline.samples.calibration import Calibration, calibration_for_view
from pipeline.samples.points import Sweep, decode_sweep, points_in_view
from pipeline.samples.projection import Camera, ZBuffer, project_sweep
from teachonce.verbs.info import print_facts
from tests.conftest import POINTS_INPUT, POINTS_TEACHER, jpeg, write_job, write_tar

INTRINSICS = [[20.0, 0, 16], [0, 20.0, 12], [0, 0, 1]]
FORWARD = [[0.0, -1, 0, 0.1], [0, 0, -1, 0], [1, 0, 0, 0.2], [0, 0, 0, 1]]
BACK = [[0.0, 1, 0, 0], [0, 0, -1, 0], [-1, 0, 0, 0.2], [0, 0, 0, 1]]
XYZI = ("x", "y", "z", "intensity")
SHARD = "train-00000.tar"


def points(row: int) -> np.ndarray:
    rng = np.random.default_rng(row)
    rows = rng.uniform([-30, -30, -2, 0], [30, 30, 6, 1], (400, 4)).astype("<f4")
    rows[: 3 * row, 2] = np.nan
    return rows


def metadata(row: int) -> dict[str, object]:
    front: dict[str, object] = {"intrinsics": INTRINSICS, "lidar2cam": FORWARD}
    back: dict[str, object] = {"intrinsics": INTRINSICS, "lidar2cam": BACK}
    if row != 1:
        front["time"] = 100.5 + row
    if row == 2:
        back["lidar2cam"] = None
    return {"front": front, "back": back, "sweep": {"time": 100.0 + row}}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four rows; row 1 lacks a time, row 2 a calibration, row 3 an image."""
    folder = tmp_path_factory.mktemp("geometry")
    members = []
    for row in range(4):
        members += [
            (f"k{row}.jpg", jpeg(row, height=24, width=32)),
            (f"k{row}.back.jpg", b"no image" if row == 3 else jpeg(row, 24, 32)),
            (f"k{row}.bin", points(row).tobytes()),
            (f"k{row}.json", json.dumps(metadata(row)).encode()),
        ]
    write_tar(folder / "data" / SHARD, members)
    job = write_job(
        folder,
        metadata="json",
        inputs={
            "front": {
                "kind": "image",
                "member": "jpg",
                "calibration": "front",
                "timestamp": "front.time",
            },
            "back": {"kind": "image", "member": "back.jpg", "calibration": "back"},
            "lidar": {**POINTS_INPUT, "timestamp": "sweep.time"},
        },
        labels={},
        views={"random": 2, "flip": True, "yaw_deg": 30, "point_scale": [0.9, 1.1]},
        teachers={"points": {**POINTS_TEACHER, "on": ["lidar"]}},
        limits={"max_invalid_fraction": 1},
    )
    precompute(load_job(str(job)), quiet=True)
    return folder / "bank"


def sweep_of(row: int) -> Sweep:
    config = PointsInput(kind="points", member="bin")
    return decode_sweep(points(row).tobytes(), config)


def test_the_table_of_a_row_in_upright_pixels(made: Path) -> None:
    table = point_table(open_bank(str(made)), 0, sweep_of(0))
    assert table.cameras == ("front", "back")
    cameras: dict[str, Camera | None] = {
        name: Camera(Calibration(np.array(INTRINSICS), np.array(matrix)), (24, 32))
        for name, matrix in (("front", FORWARD), ("back", BACK))
    }
    expected = project_sweep(points(0), cameras)
    for column in ("index", "camera", "u", "v", "depth"):
        mine, theirs = getattr(table, column), getattr(expected, column)
        np.testing.assert_array_equal(mine, theirs, err_msg=column)
    assert len(table) > 40
    np.testing.assert_array_equal(table.dt[table.camera == 0], 0.5)
    assert np.isnan(table.dt[table.camera == 1]).all()


def test_what_is_not_known_of_a_row(made: Path) -> None:
    geometry = RowGeometry(open_bank(str(made)))
    assert math.isnan(geometry.time(1, "front"))
    assert geometry.time(1, "lidar") == 101
    untimed = geometry.point_table(1, sweep_of(1))
    assert np.isnan(untimed.dt).all()
    assert set(untimed.camera.tolist()) == {0, 1}
    for row in (2, 3):
        assert geometry.camera(row, "back") is None
        table = geometry.point_table(row, sweep_of(row))
        assert set(table.camera.tolist()) == {0}
        assert table.index.min() >= 3 * row
    assert "back" not in geometry.view(3, 1).boxes


@pytest.mark.parametrize("view", [0, 1, 2])
def test_the_table_of_a_view_is_that_of_its_pixels(made: Path, view: int) -> None:
    geometry = RowGeometry(open_bank(str(made)))
    sizes = {"back": (48, 64), "front": (8.0, 8.0)}
    table = geometry.point_table(
        0, sweep_of(0), view, sizes=sizes, min_depth_m=2.0, occlusion=ZBuffer()
    )
    drawn = geometry.view(0, view)
    assert (drawn.yaw == 0) == (view == 0)
    moved = points_in_view(points(0), XYZI, drawn)
    cameras: dict[str, Camera | None] = {}
    for name, matrix in (("front", FORWARD), ("back", BACK)):
        height, width = map(int, sizes[name])
        full = Calibration(np.array(INTRINSICS), np.array(matrix))
        mapped = calibration_for_view(full, drawn, name, (height, width))
        cameras[name] = Camera(mapped, (height, width))
    expected = project_sweep(moved, cameras, min_depth_m=2.0 * drawn.scale)
    np.testing.assert_array_equal(table.index, expected.index)
    np.testing.assert_allclose(table.u, expected.u, atol=1e-3)
    np.testing.assert_allclose(table.v, expected.v, atol=1e-3)
    np.testing.assert_allclose(table.depth, expected.depth, rtol=1e-5)
    assert table.hidden is not None
    assert 0 < table.hidden.sum() < len(table)
    one = geometry.point_table(0, sweep_of(0), view, sizes={"back": (48, 64)})
    assert set(one.camera.tolist()) == {1}


def test_what_a_bank_cannot_give_is_refused(made: Path) -> None:
    bank = open_bank(str(made))
    last = bank.record.num_rows - 1
    with pytest.raises(BankError, match=rf"row must be 0 to {last}, got {last + 1}"):
        point_table(bank, last + 1, sweep_of(0))
    with pytest.raises(BankError, match="view must be 0 to 2, got 3"):
        point_table(bank, 0, sweep_of(0), 3)
    with pytest.raises(BankError, match=r"calibration \(front, back\), got lidar"):
        point_table(bank, 0, sweep_of(0), sizes={"lidar": (1, 1)})
    with pytest.raises(BankError, match="sweep_input must be one of lidar, got radar"):
        point_table(bank, 0, sweep_of(0), sweep_input="radar")
    assert len(point_table(bank, last, sweep_of(0))) == 0


def test_dropped_points_are_summed_and_told(
    made: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store, record = open_record(str(made))
    assert record.state is not None
    assert record.state.points == {"lidar": 1600 - 18}
    assert record.state.dropped_points == {"lidar": 18}
    facts = bank_facts(store, record)
    assert facts["points"] == {"lidar": {"usable": 1582, "dropped": 18}}
    print_facts(facts)
    assert "points   lidar: 18 of 1,600 points dropped\n" in capsys.readouterr().out


def test_a_bank_of_before_is_read(made: Path) -> None:
    """One whose state has no counts of points."""
    store, record = open_record(str(made))
    assert record.state is not None
    document = json.loads(record.model_dump_json())
    for name in ("points", "dropped_points"):
        del document["state"][name]
    old = type(record).model_validate(document)
    assert bank_facts(Store(store.url), old)["points"] == {}
