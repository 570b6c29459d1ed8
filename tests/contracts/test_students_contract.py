"""What every student keeps, whatever its model.

Small models stand for their kinds: transformers with a class token, with registers,
with neither; convolutional nets with and without a finer stride; channels last. The
reference is timm's own model, called directly.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from torch import Tensor

from manifests.recipe import StudentConfig
from student_train.export import export_student, load_student
from student_train.students import Student, make_student

SIZE = (96, 160)
VIT: dict[str, Any] = {"embed_dim": 48, "depth": 2, "num_heads": 3}
# timm's name, arguments, prefix tokens (None: a map), cells of SIZE, channels last
CASES: dict[str, tuple[str, dict[str, Any], int | None, tuple[int, int], bool]] = {
    "class token": ("deit_tiny_patch16_224", VIT, 1, (6, 10), False),
    "registers": ("vit_small_patch16_dinov3", VIT, 5, (6, 10), False),
    "no prefix": ("vit_base_patch16_siglip_224", VIT, 0, (6, 10), False),
    "resnet": ("test_resnet", {}, None, (3, 5), False),
    "resnet, fine": ("test_resnet", {"output_stride": 8}, None, (12, 20), False),
    "convnext": ("test_convnext", {}, None, (3, 5), False),
    "channels last": (
        "swin_tiny_patch4_window7_224",
        {"embed_dim": 24, "depths": (1, 1, 1, 1), "num_heads": (1, 2, 4, 8)},
        None,
        (3, 5),
        True,
    ),
}
every_case = pytest.mark.parametrize("case", list(CASES))


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Two cores are shared with other test processes."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def _make(case: str, seed: int = 3, size: tuple[int, int] | None = SIZE) -> Student:
    name, args, *_ = CASES[case]
    config = StudentConfig(model=f"timm:{name}", input="image", args=args)
    return make_student(config, size, seed=seed)


def _config(case: str) -> StudentConfig:
    name, args, *_ = CASES[case]
    return StudentConfig(
        model=f"timm:{name}", input="image", args=args, interpolation="bilinear"
    )


def _pixels(rows: int, size: tuple[int, int] = SIZE) -> Tensor:
    rng = np.random.default_rng(rows)
    return torch.from_numpy(rng.integers(0, 256, (rows, *size, 3), dtype=np.uint8))


@every_case
def test_features_are_timms_own(case: str) -> None:
    _, _, num_prefix, grid, channels_last = CASES[case]
    student = _make(case).eval()
    pixels = _pixels(2)
    with torch.inference_mode():
        found = student(pixels)
        model: Any = student.model
        features = model.forward_features(student.normalise(pixels))
        pooled = model.forward_head(features, pre_logits=True)
        whole = model(student.normalise(pixels))
    own = features.numpy()
    if num_prefix is None:
        patch = own if channels_last else np.moveaxis(own, 1, -1)
    else:
        patch = own[:, num_prefix:].reshape(2, *grid, own.shape[-1])
    assert np.array_equal(found.patch.numpy(), patch)
    assert torch.equal(found.pooled, pooled)
    assert torch.equal(found.pooled, whole)
    assert (found.cls is None) == (num_prefix in (None, 0))
    if found.cls is not None:
        assert np.array_equal(found.cls.numpy(), own[:, 0])


@every_case
def test_shapes_are_those_declared(case: str) -> None:
    student = _make(case).eval()
    grid, stride = CASES[case][3], student.stride
    assert student.grid_of(SIZE) == grid == (SIZE[0] // stride, SIZE[1] // stride)
    assert student.size == SIZE
    record = timm.models.get_pretrained_cfg(CASES[case][0])
    assert student.native_size == record.input_size[1:]
    other = (192, 96)
    for size in (SIZE, other):
        with torch.inference_mode():
            found = student(_pixels(2, size))
        assert found.patch.shape == (2, *student.grid_of(size), student.patch_dim)
        assert found.pooled.shape == (2, student.pooled_dim)
        cls = None if found.cls is None else found.cls.shape[1]
        assert cls == student.cls_dim


@every_case
def test_pixels_are_normalised_as_timm_does(case: str) -> None:
    student = _make(case, size=None)
    record = timm.models.get_pretrained_cfg(CASES[case][0])
    levels = np.arange(256, dtype=np.uint8)
    pixels = np.repeat(levels[None, None, :, None], 3, axis=3)
    found = student.normalise(torch.from_numpy(pixels)).numpy()[0, :, 0]
    scaled = levels.astype(np.float64) / 255
    for channel in range(3):
        expected = (scaled - record.mean[channel]) / record.std[channel]
        assert np.abs(found[channel] - expected).max() < 1e-6
    assert student.size == record.input_size[1:]


@every_case
def test_weights_are_a_function_of_the_seed(case: str) -> None:
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first, again, other = (_make(case, seed).state_dict() for seed in (3, 3, 4))
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert any(not torch.equal(first[key], other[key]) for key in first)


@every_case
def test_gradients_reach_every_parameter(case: str) -> None:
    student = _make(case).train()
    found = student(_pixels(3))
    outputs = [found.pooled, found.patch]
    if found.cls is not None:
        outputs.append(found.cls)
    generator = torch.Generator().manual_seed(0)
    sum(
        (item * torch.randn(item.shape, generator=generator)).sum() for item in outputs
    ).backward()
    for name, parameter in student.named_parameters():
        assert parameter.grad is not None, name
        assert torch.isfinite(parameter.grad).all(), name


@every_case
def test_export_is_loaded_in_one_line(case: str, tmp_path: Path) -> None:
    student = _make(case)
    with torch.no_grad():
        student(_pixels(3))  # running statistics that are not the initial ones
        for parameter in student.parameters():
            parameter.add_(0.01)
    folder = export_student(student, _config(case), tmp_path / "out", {"steps": 7})
    model = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    student.eval()
    image = student.normalise(_pixels(2))
    with torch.inference_mode():
        own: Any = student.model
        assert torch.equal(model.forward_features(image), own.forward_features(image))
        assert torch.equal(model(image), own(image))
    record = timm.data.resolve_data_config({}, model=model)
    assert tuple(record["input_size"]) == (3, *SIZE)
    assert tuple(record["mean"]) == student.mean
    assert tuple(record["std"]) == student.std
    assert record["interpolation"] == "bilinear"
    assert record["crop_pct"] == 1.0
    assert model.num_classes == 0

    loaded = load_student(folder).eval()
    for name in ("mean", "std", "size", "stride", "cls_dim", "pooled_dim", "patch_dim"):
        assert getattr(loaded, name) == getattr(student, name), name
    assert loaded.grid_of((192, 96)) == student.grid_of((192, 96))
    with torch.inference_mode():
        found, expected = loaded(_pixels(2)), student(_pixels(2))
    assert torch.equal(found.patch, expected.patch)
    assert torch.equal(found.pooled, expected.pooled)
