"""PointPillars as a teacher: its input, its outputs, where they lie, its messages."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from manifests.errors import ManifestError
from manifests.teacher import BevExtent, OutputConfig
from pipeline.resolve import output_entry
from pipeline.samples.points import Sweep
from pipeline.samples.views import View
from teachers.errors import TeacherError, WeightsNotFound
from teachers.inputs.points import PointsSpec
from teachers.interface import GroupInput, OutputSpec, Teacher
from teachers.registry import describe, find_weights

KITTI = ("x", "y", "z", "intensity")
NUSCENES = ("x", "y", "z", "intensity", "ring")
SMALL = {"point_range": [-6.4, -6.4, -3, 6.4, 6.4, 1], "max_pillars": 900}


def lidar(*columns: str) -> tuple[GroupInput, ...]:
    return (GroupInput("lidar", "points", columns=columns),)


def spec_of(teacher: Teacher) -> PointsSpec:
    spec = teacher.inputs(None)["lidar"]
    assert isinstance(spec, PointsSpec)
    return spec


def points(number: int, columns: int, seed: int = 0) -> np.ndarray:
    """Returns (number, columns) points, most of them in `SMALL`."""
    rng = np.random.default_rng(seed)
    found = rng.uniform(-1, 1, (number, columns)) * 7
    found[:, 2] = rng.uniform(-3, 1, number)
    found[:, 3:] = rng.uniform(0, 1, (number, columns - 3))
    return found.astype(np.float32)


def batch_of(teacher: Teacher, *sweeps: np.ndarray, dtype: Any = torch.float32) -> Any:
    spec, view = spec_of(teacher), View(0, False, 0.0, 1.0, {})
    item = teacher.request.group[0]
    rows = [spec.prepare(Sweep(one, item.columns), view, "lidar") for one in sweeps]
    return {"lidar": spec.to_tensor(np.stack(rows), "cpu", dtype)}


@pytest.mark.parametrize(
    ("model", "columns", "expected", "number"),
    [
        ("kitti", KITTI, KITTI, 150_000),
        ("nuscenes", NUSCENES, ("x", "y", "z"), 40_000),
        ("nuscenes", (*NUSCENES, "time_lag"), ("x", "y", "z", "time_lag"), 400_000),
        ("waymo", (*KITTI, "elongation"), (*KITTI, "elongation"), 250_000),
    ],
)
def test_a_sweep_is_given_by_the_names_of_its_columns(
    open_one: Callable[..., Teacher],
    model: str,
    columns: tuple[str, ...],
    expected: tuple[str, ...],
    number: int,
) -> None:
    teacher = open_one(
        f"pointpillars:{model}", ["bev"], device="meta", group=lidar(*columns)
    )
    spec = spec_of(teacher)
    assert spec.columns == expected
    assert spec.indices == tuple(columns.index(name) for name in expected)
    assert (spec.num_points, spec.fill, spec.exact) == (number, "nan", True)
    assert not spec.centre
    assert not spec.unit_sphere
    assert teacher.sizes == (None,)


def test_intensity_is_what_the_published_model_saw(
    open_one: Callable[..., Teacher],
) -> None:
    """Decoding divides nuScenes' whole numbers by 255; here they come back exactly."""
    teacher = open_one(
        "pointpillars:nuscenes",
        ["bev"],
        group=lidar(*NUSCENES),
        args={"layout": "openpcdet"},
    )
    decoded = np.arange(256, dtype=np.float32) / np.float32(255)
    raw = torch.zeros(1, 256, 4)
    raw[0, :, 3] = torch.from_numpy(decoded)
    model: Any = teacher.model(None)  # type: ignore[attr-defined]
    taken = model._features(raw)[0]
    assert taken.shape == (256, 5)
    assert torch.equal(taken[:, 3], torch.arange(256.0))
    assert (taken[:, 4] == 0).all(), "the lag of a single sweep"


def test_columns_of_another_name_can_be_taken(
    open_one: Callable[..., Teacher],
) -> None:
    ours, theirs = points(200, 4), ("x", "y", "z", "reflectance")
    plain = open_one("pointpillars:kitti", ["bev"], group=lidar(*KITTI), args=SMALL)
    renamed = open_one(
        "pointpillars:kitti",
        ["bev"],
        group=lidar(*theirs),
        args=SMALL,
        preprocess={"columns": theirs},
    )
    one, two = (t.forward(batch_of(t, ours), None)["bev"] for t in (plain, renamed))
    assert torch.equal(one, two)


def symmetric(teacher: Any) -> None:
    """Makes every kernel the mean of itself and its mirror images.

    What is left of a response is centred on its cell; what one of random kernels leans
    to one side is no fault of ours.
    """
    for module in teacher.model(None).modules():
        if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)):
            weight = module.weight.data
            weight.copy_(weight + weight.flip(2) + weight.flip(3) + weight.flip(2, 3))


CENTRES = [(7.7, 9.3), (-12.6, 6.1), (11.2, -8.3), (-7.9, -11.8)]


@pytest.mark.parametrize("pool", [None, (2, 2)])
@pytest.mark.parametrize("model", ["nuscenes", "waymo"])
def test_a_cluster_is_seen_where_it_is(
    open_one: Callable[..., Teacher], model: str, pool: Any
) -> None:
    """In all quadrants: the centroid of the response, to a quarter of a cell.

    A cell of a stage of stride s is centred on voxel s * i, not on the middle of the s
    voxels it stands for: a convolution with stride and padding has that phase, which
    the extent (the authors' own for their anchors) does not say and training absorbs.
    The cluster fills one pillar, so that its own shape moves nothing.
    """
    low_z, high_z = (-5, 3) if model == "nuscenes" else (-2, 4)
    half = {"nuscenes": 24.0, "waymo": 23.04}[model]
    names = ["bev", "level0", "level1", "level2"]
    teacher: Any = open_one(
        f"pointpillars:{model}",
        {name: {"pool": pool} for name in names},
        group=lidar(*KITTI, "time_lag", "elongation"),
        args={"point_range": [-half, -half, low_z, half, half, high_z]},
        preprocess={"points": 300},
    )
    symmetric(teacher)
    voxel = teacher.model(None).config.voxel_size[0]
    first = teacher.model(None).config.stage_strides[0]
    strides = [first, 2 * first, 4 * first]
    specs = teacher.outputs(None)
    rng = np.random.default_rng(5)
    for x, y in CENTRES:
        cluster = np.zeros((250, 6), np.float32)
        pillar = (np.floor((np.array([x, y]) + half) / voxel) + 0.5) * voxel - half
        cluster[:, :2] = rng.uniform(-0.4, 0.4, (250, 2)) * voxel + pillar
        cluster[:, 2] = rng.normal(size=250) * 0.2
        found = teacher.forward(batch_of(teacher, cluster), None)
        parts = {
            f"level{k}": (found[f"level{k}"], stride)
            for k, stride in enumerate(strides)
        }
        for k, stride in enumerate(strides):
            share = found["bev"][..., 128 * k : 128 * (k + 1)]
            parts[f"bev, of stage {k}"] = (share, stride)
        for name, (map_BXYC, stride) in parts.items():
            extent = specs[name.partition(",")[0]].extent
            assert extent.row_0 == "x_max"
            assert extent.column_0 == "y_max"
            energy = map_BXYC[0].square().sum(-1).double()
            rows, columns = energy.shape
            cell = (extent.x_m[1] - extent.x_m[0]) / rows
            assert cell == pytest.approx((extent.y_m[1] - extent.y_m[0]) / columns)
            at_x = extent.x_m[1] - (torch.arange(rows) + 0.5) * cell
            at_y = extent.y_m[1] - (torch.arange(columns) + 0.5) * cell
            seen_x = float((energy.sum(1) * at_x).sum() / energy.sum())
            seen_y = float((energy.sum(0) * at_y).sum() / energy.sum())
            phase = (stride - 1) / 2 * voxel
            own_cell = max(cell, stride * voxel)
            assert abs(seen_x - phase - pillar[0]) < own_cell / 4, (name, x, y)
            assert abs(seen_y - phase - pillar[1]) < own_cell / 4, (name, x, y)


def test_a_bigger_x_is_a_smaller_row_and_a_bigger_y_a_smaller_column(
    open_one: Callable[..., Teacher],
) -> None:
    teacher = open_one(
        "pointpillars:kitti", ["bev"], group=lidar(*KITTI), preprocess={"points": 64}
    )
    near = np.tile(np.array([[8.0, 30.0, 0, 0.5]], np.float32), (60, 1))
    far = np.tile(np.array([[60.0, -30.0, 0, 0.5]], np.float32), (60, 1))
    maps = teacher.forward(batch_of(teacher, near, far), None)["bev"]
    rows, columns = maps.shape[1:3]
    assert (rows, columns) == (216, 248)
    for map_XYC, x, y in ((maps[0], 8.0, 30.0), (maps[1], 60.0, -30.0)):
        row, column = divmod(int(map_XYC.square().sum(-1).argmax()), columns)
        assert abs(row - (69.12 - x) / 69.12 * rows) < 4
        assert abs(column - (39.68 - y) / 79.36 * columns) < 4


def test_rows_do_not_see_their_neighbours(open_one: Callable[..., Teacher]) -> None:
    teacher = open_one(
        "pointpillars:kitti",
        ["bev", "level1"],
        group=lidar(*KITTI),
        args=SMALL,
        preprocess={"points": 400},
    )
    sweeps = [points(n, 4, seed) for seed, n in enumerate((350, 20, 400, 90))]
    others = [sweeps[0], *(points(200, 4, seed) for seed in (7, 8, 9))]
    whole = teacher.forward(batch_of(teacher, *sweeps), None)
    again = teacher.forward(batch_of(teacher, *sweeps), None)
    mixed = teacher.forward(batch_of(teacher, *others), None)
    alone = teacher.forward(batch_of(teacher, sweeps[0]), None)
    for name in whole:
        assert torch.equal(whole[name], again[name])
        assert torch.equal(whole[name][0], mixed[name][0])
        assert torch.allclose(whole[name][0], alone[name][0], atol=1e-5, rtol=1e-5)


def test_room_for_more_points_changes_nothing(
    open_one: Callable[..., Teacher],
) -> None:
    common: dict[str, Any] = {"group": lidar(*KITTI), "args": SMALL}
    sweep = points(300, 4)
    found = [
        teacher.forward(batch_of(teacher, sweep), None)["bev"]
        for teacher in (
            open_one(
                "pointpillars:kitti", ["bev"], preprocess={"points": room}, **common
            )
            for room in (300, 301, 5000)
        )
    ]
    for one in found[1:]:
        assert torch.allclose(one, found[0], atol=1e-6, rtol=1e-5)


def test_a_sweep_without_a_point_in_the_box_is_empty(
    open_one: Callable[..., Teacher],
) -> None:
    teacher = open_one(
        "pointpillars:kitti",
        ["bev", "level0", "level1", "level2"],
        group=lidar(*KITTI),
        args=SMALL,
        preprocess={"points": 50},
    )
    outside = points(50, 4) + np.float32(100)
    for name, found in teacher.forward(batch_of(teacher, outside), None).items():
        assert (found == 0).all(), name


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_points_stay_exact_in_a_narrow_type(
    open_one: Callable[..., Teacher], precision: str
) -> None:
    common: dict[str, Any] = {
        "group": lidar(*KITTI),
        "args": {**SMALL, "point_range": [50, -6.4, -3, 62.8, 6.4, 1]},
        "preprocess": {"points": 400},
    }
    sweep = points(400, 4) + np.float32([56, 0, 0, 0])
    full = open_one("pointpillars:kitti", ["level0"], **common)
    narrow = open_one("pointpillars:kitti", ["level0"], precision=precision, **common)
    dtype = getattr(torch, precision)
    batch = batch_of(narrow, sweep, dtype=dtype)
    assert batch["lidar"].dtype == torch.float32
    found = narrow.forward(batch, None)["level0"]
    expected = full.forward(batch_of(full, sweep), None)["level0"]
    assert found.dtype == dtype
    flat = found.float().flatten(), expected.flatten()
    # A point moved by a rounding of 0.25 m would be in another pillar.
    assert torch.cosine_similarity(*flat, dim=0) > 0.999


def test_shapes_cost_and_extent_are_told_without_weights(
    open_one: Callable[..., Teacher],
) -> None:
    names = ["bev", "level0", "level1", "level2"]
    outputs = {name: {} for name in names} | {"bev": {"pool": [2, 2]}}
    teacher = open_one(
        "pointpillars:kitti", outputs, device="meta", group=lidar(*KITTI)
    )
    specs = teacher.outputs(None)
    assert {name: spec.shape for name, spec in specs.items()} == {
        "bev": (108, 124, 384),
        "level0": (216, 248, 64),
        "level1": (108, 124, 128),
        "level2": (54, 62, 256),
    }
    # Kernels of 3 x 3, two operations for each of their products.
    layers = [(248 * 216, 64, 64, 4), (124 * 108, 64, 128, 1), (124 * 108, 128, 128, 5)]
    layers += [(62 * 54, 128, 256, 1), (62 * 54, 256, 256, 5)]
    flops = sum(18 * cells * i * o * n for cells, i, o, n in layers)
    assert 1.0 < teacher.cost(None).flops / flops < 1.2
    assert teacher.cost(None).working_bytes > 4 * 64 * 496 * 432
    extent = BevExtent(x_m=(0, 69.12), y_m=(-39.68, 39.68))
    assert {spec.extent for spec in specs.values()} == {extent}


def test_the_bank_is_told_the_extent_and_a_contradiction_refused() -> None:
    extent = BevExtent(x_m=(0, 69.12), y_m=(-39.68, 39.68))
    spec = OutputSpec("bev", "grid", (4, 4, 8), "float32", extent=extent)
    known = extent.model_dump(mode="json")

    def entry(config: OutputConfig, one: OutputSpec = spec) -> Any:
        return output_entry(one, config, "pillars/lidar/native", "native", 8)

    told = entry(OutputConfig())
    assert told.definition["extent"] == known
    assert told.extent == extent
    assert entry(OutputConfig(extent=extent)).definition == told.definition
    other = BevExtent(x_m=(0, 70), y_m=(-39.68, 39.68))
    message = r"extent of pillars/lidar/native/bev must be .*69\.12.*leave it out"
    with pytest.raises(ManifestError, match=message):
        entry(OutputConfig(extent=other))
    unknown = OutputSpec("bev", "grid", (4, 4, 8), "float32")
    assert "extent" not in entry(OutputConfig(), unknown).definition
    assert entry(OutputConfig(extent=other), unknown).extent == other


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "pointpillars:kiti"}, "must be pointpillars: and one of kitti"),
        ({"args": {"layout": "pcdet"}}, "layout must be mmdet3d or openpcdet"),
        (
            {"model": "pointpillars:nuscenes_fpn", "args": {"layout": "openpcdet"}},
            "layout must be mmdet3d for pointpillars:nuscenes_fpn",
        ),
        ({"args": {"voxelsize": [1, 1, 1]}}, "voxelsize.*did you mean.*voxel_size"),
        ({"args": {"max_points": 0}}, "max_points"),
        ({"args": {"voxel_size": [0.17, 0.16, 4]}}, "must be a whole number of voxel"),
        ({"args": {"voxel_size": [0.16, 0.16, 2]}}, "must be as high as point_range"),
        (
            {"args": {"point_range": [0, -39.68, -3, 69.28, 39.68, 1]}},
            "must be a multiple of 8 voxels",
        ),
        ({"args": {"neck_strides": [1, 2, 2]}}, "bring all stages to one size"),
        ({"args": {"neck_strides": [1, 2]}}, "must be equally many"),
        ({"args": {"neck_strides": [1.5, 3, 6]}}, "must be whole numbers"),
        ({"args": {"neck": "fpn"}}, "must be one number for neck fpn"),
        ({"args": {"columns": ["x", "z", "y"]}}, "must begin with x, y, z"),
        ({"columns": ("x", "y", "z")}, "and not intensity; say which"),
        ({"preprocess": {"columns": ["x", "y", "z"]}}, "must name 4 columns"),
        ({"preprocess": {"centre": True}}, "centre must be left out: pillars stand"),
        ({"preprocess": {"unit_sphere": True}}, "unit_sphere must be left out"),
        ({"outputs": {"level3": {}}}, "bev, level0 to level2"),
        ({"outputs": {"cls": {}}}, "must be one of those of pointpillars"),
        ({"outputs": {"bev": {"norm": "pre"}}}, "norm has no effect"),
    ],
)
def test_what_cannot_be_is_refused(
    open_one: Callable[..., Teacher], changes: dict[str, Any], message: str
) -> None:
    fields: dict[str, Any] = {"model": "pointpillars:kitti", "outputs": ["bev"]}
    fields |= changes
    columns = fields.pop("columns", KITTI)
    with pytest.raises(TeacherError, match=message):
        open_one(device="meta", group=lidar(*columns), **fields)


def test_weights_that_are_not_there_say_where_they_are(
    make_request: Callable[..., Any],
) -> None:
    request = make_request(
        "pointpillars:kitti", ["bev"], group=lidar(*KITTI), weights=None
    )
    message = r"download\.openmmlab\.com/.*37dc2420\.pth.*weights: /path/model\.pth"
    with pytest.raises(WeightsNotFound, match=message):
        find_weights(request)
    request = make_request(
        "pointpillars:kitti", ["bev"], group=lidar(*KITTI), weights="best"
    )
    with pytest.raises(WeightsNotFound, match="got 'best'"):
        find_weights(request)


def test_a_preset_is_described() -> None:
    facts = describe("pointpillars:nuscenes")
    assert facts["layouts"]["mmdet3d"]["outputs"]["bev"] == [200, 200, 384]
    assert facts["layouts"]["openpcdet"]["outputs"]["bev"] == [128, 128, 384]
    assert "bbox_head" in facts["layouts"]["mmdet3d"]["source"]
    assert "dense_head" in facts["layouts"]["openpcdet"]["source"]
    assert "cc-by-nc-sa-4.0" in facts["layouts"]["openpcdet"]["license"]
    assert {"layout", "voxel_size", "max_pillars"} <= set(facts["args"])
    with pytest.raises(TeacherError, match="one of kitti"):
        describe("pointpillars:lyft")


def test_random_weights_keep_the_size_of_what_passes(
    open_one: Callable[..., Teacher],
) -> None:
    teacher = open_one(
        "pointpillars:kitti",
        ["bev"],
        group=lidar(*KITTI),
        args={**SMALL, "layout": "openpcdet"},
        preprocess={"points": 3000},
    )
    bev = teacher.forward(batch_of(teacher, points(3000, 4)), None)["bev"]
    assert 1e-3 < float(bev.std()) < 1e3
    assert math.isfinite(float(bev.abs().max()))
