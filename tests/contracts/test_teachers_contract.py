"""What every teacher keeps, whatever its family.

Small models stand for their kinds: transformers with a class token, with registers and
of one size only; convolutional nets, NCHW and NHWC; hierarchies whose own order is not
raster; contrastive towers; pillars, range images and rasters of sweeps; modules on
images, sweeps, clips and a rig of several. Weights are random, so that what is tested
is ours and not the training.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import open_clip.transform
import pytest
import timm.data.config
import timm.data.transforms_factory
import timm.models
import torch
from PIL import Image, ImageDraw

from manifests.teacher import TeacherConfig
from pipeline.samples.views import View
from teachers.errors import TeacherError
from teachers.interface import GroupInput, Size, Teacher, TeacherRequest
from teachers.registry import find_weights, open_teacher
from tests.contracts import made_elsewhere

CODE = """
from torch import nn


class Grid(nn.Module):
    def __init__(self):
        super().__init__()
        stem = nn.Conv2d(3, 8, 3, 2, 1)
        self.encoder = nn.Sequential(
            stem, nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 4, 4)
        )
        self.head = nn.Linear(8, 5)

    def forward(self, image):
        return self.head(self.encoder(image).mean((2, 3)))


class Points(nn.Module):
    def __init__(self):
        super().__init__()
        self.each = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 16))

    def forward(self, sweep):
        return self.each(sweep).amax(1)


class PerPoint(Points):
    def forward(self, sweep):
        return self.each(sweep)


class Video(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv3d(3, 8, (1, 8, 8), (1, 8, 8))
        self.time = nn.Conv3d(8, 8, (3, 1, 1), padding=(1, 0, 0))

    def forward(self, clip):
        found = self.time(self.stem(clip.transpose(1, 2)))
        return {"cls": found.mean((2, 3, 4)), "patch": found.transpose(1, 2)}


class Rig(nn.Module):
    def __init__(self):
        super().__init__()
        self.camera = nn.Conv2d(3, 8, 16, 16)
        self.each = nn.Linear(4, 8)

    def forward(self, *, front, back, lidar):
        seen = self.camera(front).mean((2, 3)) + self.camera(back).amax((2, 3))
        return seen + self.each(lidar).amax(1)
"""
SWEEP = GroupInput("lidar", "points", columns=("x", "y", "z", "intensity"))
CLIP = GroupInput("clip", "clip", frames=3)
IMAGE = GroupInput("image", "image")
# Not one image: what each case looks at.
GROUPS: dict[str, tuple[GroupInput, ...]] = {
    "module on sweeps": (SWEEP,),
    "student on sweeps": (SWEEP,),
    "program on sweeps": (SWEEP,),
    "module of points": (SWEEP,),
    "module on clips": (CLIP,),
    "module on a rig": (
        GroupInput("front", "image"),
        GroupInput("back", "image"),
        SWEEP,
    ),
    "pillars": (SWEEP,),
    "range view": (SWEEP,),
    "bev raster": (SWEEP,),
}
CLS_AND_PATCH: dict[str, Any] = {"cls": {}, "pooled": {}, "patch": {}, "layer1": {}}
MAPS: dict[str, Any] = {"pooled": {}, "logits": {}, "patch": {}, "level1": {}}
CASES: dict[str, dict[str, Any]] = {
    "class token": {
        "model": "timm:test_vit",
        "outputs": {**CLS_AND_PATCH, "cls": {"norm": "pre"}, "patch": {"pool": (2, 2)}},
        "sizes": [(96, 160), (160, 160)],
    },
    "registers, one size": {
        "model": "timm:vit_small_patch14_reg4_dinov2",
        "args": {"embed_dim": 48, "depth": 3, "num_heads": 2},
        "outputs": CLS_AND_PATCH,
        "sizes": [(70, 112)],
    },
    "rotary positions": {
        "model": "timm:vit_small_patch16_dinov3",
        "args": {"embed_dim": 64, "depth": 3, "num_heads": 2},
        "outputs": CLS_AND_PATCH,
        "sizes": [(96, 160)],
    },
    "convnext": {"model": "timm:test_convnext", "outputs": MAPS, "sizes": [(96, 160)]},
    "resnet": {"model": "timm:test_resnet", "outputs": MAPS, "sizes": [(96, 160)]},
    "byobnet": {"model": "timm:test_byobnet", "outputs": MAPS, "sizes": [(96, 160)]},
    "channels last": {
        "model": "timm:swin_tiny_patch4_window7_224",
        "args": {"embed_dim": 24, "depths": (1, 1, 1, 1), "num_heads": (1, 2, 4, 8)},
        "outputs": MAPS,
        "sizes": [(224, 224)],
    },
    "sam, padded": {
        "model": "timm:samvit_base_patch16_224",
        "args": {"embed_dim": 48, "depth": 2, "num_heads": 3},
        "outputs": {"patch": {}, "pooled": {}, "layer1": {}},
        "sizes": [(224, 224)],
        "preprocess": {"fit": "pad"},
    },
    "sam 2": {
        "model": "timm:sam2_hiera_tiny",
        "args": {"embed_dim": 24, "stages": (1, 1, 2, 1)},
        "outputs": {"pooled": {}, "patch": {}, "level0": {}, "level1": {}},
        "sizes": [(128, 256)],
    },
    "hiera": {
        "model": "timm:hiera_tiny_224",
        "args": {"embed_dim": 24, "stages": (1, 1, 2, 1)},
        "outputs": {"pooled": {}, "patch": {}, "level0": {}, "level1": {}},
        "sizes": [(224, 224)],
    },
    "radio": {
        "model": "timm:vit_base_patch16_radio_v3",
        "args": {"embed_dim": 48, "depth": 2, "num_heads": 3},
        "outputs": {"cls": {}, "patch": {}},
        "sizes": [(96, 160)],
    },
    "clip": {
        "model": "open_clip:ViT-S-32-alt",
        "outputs": {"embed": {}, "pooled": {}, "patch": {}, "layer0": {"norm": "pre"}},
        "sizes": [(96, 160)],
    },
    "module on images": {
        "model": "module:./code.py:Grid",
        "outputs": {"patch": {"from": "encoder"}, "logits": {}},
        "sizes": [(64, 128)],
        "preprocess": {"channels": "bgr", "range": 255, "mean": (9, 8, 7)},
    },
    "module on sweeps": {
        "model": "module:./code.py:Points",
        "outputs": {"pooled": {}},
        "preprocess": {"points": 32, "columns": ("x", "y", "z", "intensity")},
    },
    "module of points": {
        "model": "module:./code.py:PerPoint",
        "outputs": {"points": {}},
        "preprocess": {"points": 32, "columns": ("x", "y", "z", "intensity")},
    },
    "module on clips": {
        "model": "module:./code.py:Video",
        "outputs": {"cls": {"from": "output[cls]"}, "patch": {"from": "output[patch]"}},
        "sizes": [(64, 96)],
    },
    "module on a rig": {
        "model": "module:./code.py:Rig",
        "outputs": {"pooled": {}},
        "sizes": [(64, 96)],
        "preprocess": {"points": 32, "columns": ("x", "y", "z", "intensity")},
    },
    "pillars": {
        "model": "pointpillars:nuscenes",
        "args": {
            "voxel_size": [1.0, 1.0, 8.0],
            "point_range": [-16, -32, -5, 16, 32, 3],
        },
        "outputs": {"bev": {"pool": (2, 2)}, "level1": {}},
        "preprocess": {"points": 400},
    },
    "range view": {
        "model": "range_view:test_vit",
        "args": {"patch_size": [8, 16]},
        "outputs": {"cls": {}, "pooled": {}, "patch": {"pool": (2, 2)}, "layer1": {}},
        "sizes": [(64, 512)],
        "preprocess": {
            "raster": {
                "elevation_deg": (-25, 3),
                "mean": (20, 0, 0, -1, 0.2),
                "std": (20, 20, 20, 1, 0.2),
            }
        },
    },
    "bev raster": {
        "model": "bev_raster:test_convnext",
        "outputs": {"bev": {}, "pooled": {}, "level1": {}},
        "sizes": [(96, 160)],
        "preprocess": {"raster": {"x_m": (0, 48), "y_m": (-40, 40)}},
    },
}


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Two cores are shared with other test processes."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns a folder with the modules of `CODE`."""
    path = tmp_path_factory.mktemp("teachers")
    (path / "code.py").write_text(CODE)
    made_elsewhere.write_files(path)
    return path


def _open(case: str, folder: Path, device: str = "cpu", **changes: Any) -> Teacher:
    config = TeacherConfig(**{"weights": "random", **CASES[case], **changes})
    request = TeacherRequest("t", config, GROUPS.get(case, (IMAGE,)), str(folder))
    return open_teacher(request, find_weights(request), device)


def _batch(
    teacher: Teacher, size: Size | None, rows: int, seed: int = 0
) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    dtype = getattr(torch, teacher.request.config.precision)
    batch = {}
    for name, spec in teacher.inputs(size).items():
        shape = (rows, *spec.row_shape)
        if spec.row_dtype == np.uint8:
            raw: Any = rng.integers(0, 256, shape, dtype=np.uint8)
        else:
            raw = rng.normal(size=shape).astype(np.float32)
        batch[name] = spec.to_tensor(raw, "cpu", dtype)
    return batch


CASES |= made_elsewhere.CASES
every_case = pytest.mark.parametrize("case", list(CASES))


@every_case
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_shapes_are_those_declared_without_weights(
    case: str, precision: str, folder: Path
) -> None:
    if case in made_elsewhere.FLOAT32_ONLY and precision != "float32":
        with pytest.raises(TeacherError, match="precision"):
            _open(case, folder, precision=precision).outputs(None)
        return
    teacher = _open(case, folder, precision=precision)
    declared = _open(case, folder, device="meta", precision=precision)
    assert declared.sizes == teacher.sizes
    assert declared.facts == teacher.facts
    assert declared.facts.num_parameters > 0
    for size in teacher.sizes:
        specs = declared.outputs(size)
        assert specs == teacher.outputs(size)
        assert set(specs) == set(CASES[case]["outputs"])
        found = teacher.forward(_batch(teacher, size, 3), size)
        for name, spec in specs.items():
            assert found[name].shape == (3, *spec.shape)
            assert found[name].dtype == getattr(torch, spec.dtype)
            assert spec.dtype == precision
            assert found[name].is_contiguous()
            assert not found[name].requires_grad
            assert torch.isfinite(found[name]).all()


@every_case
def test_a_teacher_opened_again_gives_the_same_bits(case: str, folder: Path) -> None:
    first, second = _open(case, folder), _open(case, folder)
    for size in first.sizes:
        batch = _batch(first, size, 2)
        one, two = first.forward(batch, size), second.forward(batch, size)
        again = first.forward(batch, size)
        for name in one:
            assert torch.equal(one[name], two[name])
            assert torch.equal(one[name], again[name])


@every_case
def test_a_row_does_not_depend_on_its_neighbours(case: str, folder: Path) -> None:
    teacher = _open(case, folder)
    size = teacher.sizes[0]
    batch, others = _batch(teacher, size, 4), _batch(teacher, size, 4, seed=1)
    mixed = {key: torch.cat([batch[key][:1], others[key][1:]]) for key in batch}
    alone = {key: value[:1] for key, value in batch.items()}
    whole, beside, single = (
        teacher.forward(item, size) for item in (batch, mixed, alone)
    )
    for name in whole:
        assert torch.equal(whole[name][0], beside[name][0]), name
        assert torch.allclose(whole[name][0], single[name][0], atol=1e-5, rtol=1e-5)


@every_case
def test_threads_do_not_see_each_other(case: str, folder: Path) -> None:
    teacher = _open(case, folder)
    size = teacher.sizes[0]
    batches = [_batch(teacher, size, 2, seed) for seed in range(12)]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda item: teacher.forward(item, size), batches))
    for batch, found in zip(batches, together, strict=True):
        alone = teacher.forward(batch, size)
        for name in alone:
            assert torch.equal(found[name], alone[name]), name


def _response(
    teacher: Teacher, spec: Any, centre: tuple[float, float], half: int
) -> dict[str, np.ndarray]:
    """How much each cell of every grid changes with a bright patch at (x, y) pixels."""
    height, width = spec.height, spec.width
    ground = np.random.default_rng(3).integers(90, 120, (height, width, 3), np.uint8)
    patched = ground.copy()
    left, top = (max(0, round(place - half)) for place in centre)
    patched[top : top + 2 * half, left : left + 2 * half] = 250
    view = View(0, False, 0.0, 1.0, {"image": (0.0, 0.0, width, height)})
    rows = [
        spec.prepare(Image.fromarray(pixels), view, "image")
        for pixels in (ground, patched)
    ]
    # A program may have been exported for a batch of four.
    batch = spec.to_tensor(np.stack([*rows, *rows]), "cpu", torch.float32)
    found = teacher.forward({"image": batch}, (height, width))
    return {
        name: (grid[1] - grid[0]).square().sum(-1).sqrt().numpy()
        for name, grid in found.items()
        if grid.ndim == 4
    }


def _centroid(change: np.ndarray, row: int, column: int) -> np.ndarray:
    """Where the change around a cell lies, (y, x) in cells from its centre."""
    y, x = (slice(max(0, place - 1), place + 2) for place in (row, column))
    weights = np.clip(change[y, x] - np.median(change), 0, None)
    places = np.mgrid[y, x][:, : weights.shape[0], : weights.shape[1]]
    assert weights.sum() > 0, (row, column)
    mean = (weights * places).sum((1, 2)) / weights.sum()
    return np.asarray(mean - [row, column])


# A cell of a convolution with stride s and an odd kernel is centred on a pixel, up to
# (s - 1) / 2 pixels before its middle: near the input that is the model's own phase.
OWN_PHASE = 0.5


# Families of sweeps have such a test of their own, with points instead of pixels.
@pytest.mark.parametrize("case", [name for name in CASES if name not in GROUPS])
def test_cells_are_where_their_pixels_are(case: str, folder: Path) -> None:
    """The response to a patch on a cell's centre lies there, to a quarter of a cell."""
    teacher = _open(case, folder)
    size = teacher.sizes[0]
    assert size is not None
    specs = teacher.outputs(size)
    grids = {name: spec.shape for name, spec in specs.items() if spec.kind == "grid"}
    assert grids
    for name, (rows, columns, _) in grids.items():
        cell = size[0] / rows, size[1] / columns
        half = max(2, round(min(cell) / 4))
        for row, column in (
            (rows // 4, columns // 4),
            (rows // 4, columns - 2),
            (rows - 2, columns // 4),
            (rows - 2, columns - 2),
        ):
            centre = (column + 0.5) * cell[1], (row + 0.5) * cell[0]
            spec = teacher.inputs(size)["image"]
            change = _response(teacher, spec, centre, half)[name]
            found = np.unravel_index(change.argmax(), change.shape)
            limit = OWN_PHASE if name.startswith("level") else 0.25
            assert np.abs(np.subtract(found, (row, column))).max() <= 1, name
            assert np.abs(_centroid(change, row, column)).max() < limit, name


def _picture(width: int, height: int) -> Image.Image:
    """A picture with gradients, edges and fine texture."""
    y, x = np.mgrid[0:height, 0:width].astype(np.float64)
    waves = [
        np.sin(x / a + y / b + c) for a, b, c in ((9, 31, 0), (23, 7, 1), (5, 11, 2))
    ]
    pixels = np.stack([127 + 100 * wave for wave in waves], -1)
    image = Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
    draw = ImageDraw.Draw(image)
    draw.ellipse((width * 0.2, height * 0.3, width * 0.5, height * 0.8), fill="orange")
    draw.rectangle((width * 0.6, height * 0.1, width * 0.7, height * 0.9), fill="navy")
    return image


def _own_transform(case: str) -> tuple[Any, int, int]:
    """Returns the family's evaluation transform, its resize and its crop, in pixels."""
    family, _, name = CASES[case]["model"].partition(":")
    if family == "timm":
        known = timm.models.get_pretrained_cfg(name)
        assert known is not None
        resolve: Any = timm.data.config.resolve_data_config
        config = resolve({}, pretrained_cfg=asdict(known))
        side = config["input_size"][-1]
        make = timm.data.transforms_factory.create_transform
        crop = config["crop_pct"]
        return make(**config, is_training=False), math.floor(side / crop), side
    defaults = open_clip.transform.PreprocessCfg()
    side = open_clip.get_model_config(name)["vision_cfg"]["image_size"]
    transform = open_clip.transform.image_transform(
        side, is_train=False, mean=defaults.mean, std=defaults.std
    )
    return transform, side, side


OWN = ["class token", "registers, one size", "convnext", "channels last", "clip"]


@pytest.mark.parametrize("case", OWN)
def test_colour_is_the_familys_own(case: str, folder: Path) -> None:
    """On pixels that need no resize, to 1e-6."""
    transform, resize, side = _own_transform(case)
    teacher = _open(case, folder, device="meta", sizes=[(side, side)])
    spec = teacher.inputs((side, side))["image"]
    image = _picture(resize, resize)
    offset = round((resize - side) / 2)
    cut = image.crop((offset, offset, offset + side, offset + side))
    found = spec.to_tensor(np.asarray(cut)[None], "cpu", torch.float32)[0]
    assert (found - transform(image)).abs().max() < 1e-6


@pytest.mark.parametrize("case", OWN)
@pytest.mark.parametrize("shape", [(900, 640), (500, 667)])
def test_resize_is_the_familys_own_where_the_box_is(
    case: str, shape: tuple[int, int], folder: Path
) -> None:
    """One resize of the fractional box against resize, then crop of whole pixels."""
    transform, resize, side = _own_transform(case)
    teacher = _open(case, folder, device="meta", sizes=[(side, side)])
    spec: Any = teacher.inputs((side, side))["image"]
    image = _picture(*shape)
    short = min(shape)
    scaled = [resize if edge == short else int(resize * edge / short) for edge in shape]
    left, top = (round((edge - side) / 2) for edge in scaled)
    x, y = (edge / new for edge, new in zip(shape, scaled, strict=True))
    box = (left * x, top * y, (left + side) * x, (top + side) * y)
    prepared = spec.prepare(image, View(0, False, 0.0, 1.0, {"image": box}), "image")
    found = spec.to_tensor(prepared[None], "cpu", torch.float32)[0]
    levels = torch.tensor(spec.std).view(3, 1, 1) * 255
    difference = ((found - transform(image)) * levels).abs()
    assert difference.max() < 2.01
    assert difference.mean() < 0.05
