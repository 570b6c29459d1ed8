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
from teachers.interface import Size, Teacher, TeacherRequest
from teachers.registry import find_weights, open_teacher
from tests.contracts.made_elsewhere import FLOAT32_ONLY
from tests.contracts.teacher_cases import CASES, GROUPS, IMAGE, write_files


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Two cores are shared with other test processes."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns a folder with all that cases name."""
    path = tmp_path_factory.mktemp("teachers")
    write_files(path)
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


every_case = pytest.mark.parametrize("case", list(CASES))


@every_case
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_shapes_are_those_declared_without_weights(
    case: str, precision: str, folder: Path
) -> None:
    if case in FLOAT32_ONLY and precision != "float32":
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
