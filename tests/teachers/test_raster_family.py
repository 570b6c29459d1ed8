"""Any timm model on a sweep drawn as an image, against timm itself and geometry."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch

from manifests.teacher import BevExtent
from pipeline.samples.points import Sweep
from pipeline.samples.views import View
from teachers import registry
from teachers.errors import TeacherError
from teachers.interface import GroupInput, Size, Teacher, TeacherRequest, WeightsRecord

Open = Callable[..., Teacher]
Make = Callable[..., TeacherRequest]

COLUMNS = ("x", "y", "z", "intensity")
LIDAR = (GroupInput("lidar", "points", columns=COLUMNS),)
VIEW = View(0, False, 0.0, 1.0, {})
RANGE: dict[str, Any] = {
    "group": LIDAR,
    "sizes": [(64, 512)],
    "preprocess": {"raster": {"elevation_deg": (-25, 3)}},
}
ABOVE: dict[str, Any] = {
    "group": LIDAR,
    "sizes": [(96, 160)],
    "preprocess": {"raster": {"x_m": (0, 48), "y_m": (-40, 40)}},
}


def _raster(base: dict[str, Any], **fields: Any) -> dict[str, Any]:
    return {"raster": {**base["preprocess"]["raster"], **fields}}


def _cloud(num: int = 3000, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    low, high = (1, -39, -2, 0), (47, 39, 1, 1)
    return rng.uniform(low, high, (num, 4)).astype(np.float32)


def _batch(teacher: Teacher, size: Size | None, *clouds: np.ndarray) -> Any:
    spec = teacher.inputs(size)["lidar"]
    rows = [spec.prepare(Sweep(cloud, COLUMNS), VIEW, "lidar") for cloud in clouds]
    return {"lidar": spec.to_tensor(np.stack(rows), "cpu", torch.float32)}


def test_it_is_timms_model_on_the_image(open_one: Open, tmp_path: Path) -> None:
    """A checkpoint trained with these channels loads as it is."""
    torch.manual_seed(5)
    model = timm.create_model("test_vit", in_chans=5, img_size=(64, 512)).eval()
    torch.save(model.state_dict(), tmp_path / "own.pt")
    teacher = open_one(
        "range_view:test_vit", ["cls", "patch", "layer1"], weights="./own.pt", **RANGE
    )
    batch = _batch(teacher, (64, 512), _cloud(), _cloud(seed=1))
    found = teacher.forward(batch, (64, 512))
    with torch.inference_mode():
        tokens = model.forward_features(batch["lidar"])
    assert torch.equal(found["cls"], tokens[:, 0])
    assert torch.equal(found["patch"], tokens[:, 1:].reshape(2, 4, 32, -1))
    assert found["layer1"].shape == (2, 4, 32, 64)
    assert not torch.equal(found["cls"][0], found["cls"][1])


@pytest.mark.parametrize(
    ("channels", "expected"),
    [
        (("range", "x", "y", "z", "intensity"), ([0, 1, 2, 0, 1], 3 / 5)),
        (("range", "z"), ([0, 1], 3 / 2)),
        (("x", "y", "z"), ([0, 1, 2], 1.0)),
    ],
)
def test_weights_of_three_channels_are_repeated(
    open_one: Open,
    tmp_path: Path,
    channels: tuple[str, ...],
    expected: tuple[list[int], float],
) -> None:
    torch.manual_seed(5)
    state = timm.create_model("test_vit").state_dict()
    torch.save(state, tmp_path / "rgb.pt")
    config = {**RANGE, "preprocess": _raster(RANGE, channels=channels)}
    teacher = open_one("range_view:test_vit", ["cls"], weights="./rgb.pt", **config)
    taken, factor = expected
    stem: Any = teacher.model((64, 512)).get_submodule("patch_embed.proj")  # type: ignore[attr-defined]
    assert torch.allclose(
        stem.weight, state["patch_embed.proj.weight"][:, taken] * factor, atol=1e-7
    )
    said = " ".join(teacher.facts.notes)
    if len(channels) == 3:
        assert said == ""
    else:
        assert (
            f"patch_embed.proj repeated and multiplied by 3 / {len(channels)}" in said
        )
    declared = open_one(
        "range_view:test_vit", ["cls"], weights="./rgb.pt", device="meta", **config
    )
    assert declared.facts == teacher.facts
    assert declared.facts.to_json()["notes"] == list(teacher.facts.notes)


def test_one_channel_is_the_sum(open_one: Open, tmp_path: Path) -> None:
    state = timm.create_model("test_resnet").state_dict()
    torch.save(state, tmp_path / "rgb.pt")
    config = {**ABOVE, "preprocess": _raster(ABOVE, channels=("density",))}
    teacher = open_one("bev_raster:test_resnet", ["bev"], weights="./rgb.pt", **config)
    loaded = dict(teacher.model((96, 160)).named_parameters())  # type: ignore[attr-defined]
    name = next(key for key, value in state.items() if value.ndim == 4)
    assert torch.allclose(loaded[name], state[name].sum(1, keepdim=True), atol=1e-6)
    assert "summed" in teacher.facts.notes[0]


def test_a_model_whose_stem_cannot_be_taken_over_is_refused(
    make_request: Make,
) -> None:
    request = make_request(
        "range_view:naflexvit_base_patch16_gap", ["pooled"], weights=None, **RANGE
    )
    with pytest.raises(TeacherError, match=r"channels must be 3.*got 5: timm cannot"):
        registry.open_teacher(request, WeightsRecord("pretrained"), "meta")
    teacher = registry.open_teacher(request, WeightsRecord("file"), "meta")
    assert "must have been trained with them" in teacher.facts.notes[0]


@pytest.mark.parametrize(
    ("model", "outputs", "args"),
    [
        ("test_vit", ["bev", "layer0", "pooled", "cls"], {"patch_size": [8, 16]}),
        ("test_resnet", ["bev", "level1", "pooled", "logits"], {}),
    ],
)
def test_grids_from_above_say_what_they_cover(
    open_one: Open, model: str, outputs: list[str], args: dict[str, Any]
) -> None:
    wanted = {name: {"pool": [1, 1]} if name == "bev" else {} for name in outputs}
    teacher = open_one(f"bev_raster:{model}", wanted, args=args, **ABOVE)
    specs = teacher.outputs((96, 160))
    assert list(specs) == outputs
    extent = BevExtent(x_m=(0, 48), y_m=(-40, 40), row_0="x_max", column_0="y_max")
    for name, spec in specs.items():
        assert spec.extent == (extent if spec.kind == "grid" else None), name
    found = teacher.forward(_batch(teacher, (96, 160), _cloud()), (96, 160))
    assert {name: tuple(value.shape[1:]) for name, value in found.items()} == {
        name: spec.shape for name, spec in specs.items()
    }


def test_a_range_view_covers_no_area(open_one: Open) -> None:
    teacher = open_one("range_view:test_vit", ["patch"], device="meta", **RANGE)
    assert teacher.outputs((64, 512))["patch"].extent is None


@pytest.mark.parametrize(
    ("model", "config", "message"),
    [
        ("range_view:test_vit", {"sizes": None}, r"sizes must be given.*64, 2048"),
        ("bev_raster:test_vit", {"sizes": None}, r"sizes must be given.*512, 512"),
        ("range_view:test_vit", {"sizes": [(60, 512)]}, r"the nearest is \[64, 512\]"),
        (
            "bev_raster:test_resnet",
            {"sizes": [(100, 160)]},
            r"multiples of the patch 32 x 32.*the nearest is \[96, 160\]",
        ),
        ("range_view:test_vit", {"args": {"in_chans": 4}}, "in_chans is set by"),
        ("range_view:test_vit", {"preprocess": {}}, "elevation_deg must be given"),
        ("bev_raster:test_vit", {"preprocess": {}}, "x_m must be given"),
        (
            "range_view:test_vit",
            {"preprocess": {"points": 9}},
            "points has no effect: the teacher is given no sweep as points",
        ),
        (
            "range_view:test_vit",
            {"preprocess": {"mean": (0, 0, 0)}},
            "mean has no effect: the teacher looks at no input of kind image",
        ),
        (
            "timm:test_vit",
            {"group": None, "sizes": [(160, 160)]},
            "raster has no effect: the teacher draws no sweep",
        ),
        ("range_view:test_vit", {"group": (GroupInput("a", "image"),)}, "kind points"),
        ("range_view:no_such_vit", {}, "must be one of timm"),
    ],
)
def test_refused(
    open_one: Open, model: str, config: dict[str, Any], message: str
) -> None:
    base = ABOVE if model.startswith("bev") else RANGE
    with pytest.raises(TeacherError, match=message):
        open_one(model, ["pooled"], device="meta", **{**base, **config})


def test_outputs_have_the_familys_names(open_one: Open) -> None:
    with pytest.raises(TeacherError, match=r"outputs\.patch must be one of"):
        open_one("bev_raster:test_vit", ["patch"], **ABOVE)
    with pytest.raises(TeacherError, match=r"outputs\.bev must be one of"):
        open_one("range_view:test_vit", ["bev"], **RANGE)


def test_random_weights_are_drawn_once_for_all_sizes(open_one: Open) -> None:
    config = {**ABOVE, "sizes": [(96, 160), (160, 96)]}
    teacher: Any = open_one("bev_raster:test_vit", ["bev"], **config)
    one, other = (
        teacher.model(size).get_submodule("patch_embed.proj").weight
        for size in teacher.sizes
    )
    assert one.data_ptr() == other.data_ptr()
    assert one.shape[1] == 4


def test_describe() -> None:
    facts = registry.describe("range_view:test_vit")
    assert "bev" in facts["outputs"]
    assert "native_size" not in facts
    assert facts["range_view"]["channels"][0] == "range"
    assert facts["license"] == "apache-2.0"


def _cluster(model: str, shape: Size, centre: tuple[float, float]) -> np.ndarray:
    """Points that fill a cell around (row, column), above or before all others."""
    rng = np.random.default_rng(1)
    v, u = (
        (at + rng.uniform(-0.5, 0.5, 4000)) / cells
        for at, cells in zip(centre, shape, strict=True)
    )
    if model.startswith("bev"):
        place = np.stack([48 - v * 48, 40 - u * 80, np.full_like(u, 2)], -1)
    else:
        elevation, azimuth = np.radians(3 - v * 28), np.radians(180 - u * 360)
        flat = np.cos(elevation)
        ahead = [flat * np.cos(azimuth), flat * np.sin(azimuth), np.sin(elevation)]
        place = 6 * np.stack(ahead, -1)
    bright = np.full(len(place), 0.9)
    return np.column_stack([place, bright]).astype(np.float32)


def _ground(model: str) -> np.ndarray:
    """Points everywhere, farther or lower than any cluster."""
    rng = np.random.default_rng(2)
    if model.startswith("bev"):
        low, high = (0, -40, -1.9, 0), (48, 40, -1.5, 0.3)
        return rng.uniform(low, high, (6000, 4)).astype(np.float32)
    elevation = np.radians(rng.uniform(-24, 2, 6000))
    azimuth, radius = rng.uniform(-np.pi, np.pi, 6000), rng.uniform(20, 60, 6000)
    flat = radius * np.cos(elevation)
    columns = [flat * np.cos(azimuth), flat * np.sin(azimuth)]
    columns += [radius * np.sin(elevation), rng.uniform(0, 0.3, 6000)]
    return np.column_stack(columns).astype(np.float32)


@pytest.mark.parametrize("model", ["range_view:test_vit", "bev_raster:test_vit"])
@pytest.mark.parametrize("output", ["layer0", "own"])
def test_cells_are_where_their_points_are(
    model: str, output: str, open_one: Open
) -> None:
    """The response to a moving cluster is where the cluster is."""
    is_bev = model.startswith("bev")
    base: dict[str, Any] = ABOVE if is_bev else RANGE
    scale = {} if is_bev else {"mean": (20, 0, 0, -1, 0.2), "std": (20, 20, 20, 1, 0.2)}
    config = {**base, "preprocess": _raster(base, **scale)}
    name = {"own": "bev" if is_bev else "patch"}.get(output, output)
    teacher = open_one(model, [name], args={"patch_size": [8, 16]}, **config)
    (size,) = teacher.sizes
    rows, columns, _ = teacher.outputs(size)[name].shape
    errors = []
    for row in np.arange(2.0, rows - 1.9, 0.25):
        centre = (float(row), 2.5 + float(4 * row % (columns - 5)))
        cluster = _cluster(model, (rows, columns), centre)
        ground = _ground(model)
        batch = _batch(teacher, size, ground, np.concatenate([ground, cluster]))
        grid = teacher.forward(batch, size)[name].double()
        response = (grid[1] - grid[0]).square().sum(-1)
        # Attention carries a little everywhere.
        response = torch.where(response > 0.2 * response.max(), response, 0)
        weight = response / response.sum()
        found = (
            float(weight.sum(1) @ (torch.arange(rows) + 0.5).double()),
            float(weight.sum(0) @ (torch.arange(columns) + 0.5).double()),
        )
        errors.append(np.subtract(found, centre))
    assert len(errors) > 10
    assert np.abs(np.mean(errors, axis=0)).max() < 0.1
    assert np.abs(errors).mean(axis=0).max() < 0.25
    assert np.abs(errors).max() < 0.6


@pytest.mark.parametrize("model", ["range_view:test_vit", "bev_raster:test_resnet"])
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_rows_do_not_depend_on_each_other_nor_on_the_run(
    model: str, precision: str, open_one: Open
) -> None:
    base = ABOVE if model.startswith("bev") else RANGE
    first, second = (
        open_one(model, ["pooled", "logits"], precision=precision, **base)
        for _ in range(2)
    )
    (size,) = first.sizes
    spec = first.inputs(size)["lidar"]
    dtype = getattr(torch, precision)
    rows = [spec.prepare(Sweep(_cloud(seed=n), COLUMNS), VIEW, "x") for n in range(4)]
    whole, mixed = (
        {"lidar": spec.to_tensor(np.stack(chosen), "cpu", dtype)}
        for chosen in (rows[:3], [rows[0], rows[3], rows[3]])
    )
    found, again = first.forward(whole, size), second.forward(whole, size)
    beside = first.forward(mixed, size)
    for name, value in found.items():
        assert value.dtype == dtype
        assert torch.equal(value, again[name])
        assert torch.equal(value[0], beside[name][0])
        assert not torch.equal(value[1], beside[name][1])
