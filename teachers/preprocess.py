"""From a decoded input and a view's box to the tensor a model takes.

Owns the choice of points and the pixel arithmetic; the input size is
`pipeline.samples.fitting.fit_size`, the resize `pipeline.samples.images.resize_view`:
the ones that students use too.

Shape suffixes: B batch, H and W rows and columns, N points of a sweep, P points given,
C columns or channels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from manifests.job import PreprocessConfig
from pipeline.samples.errors import SampleError
from pipeline.samples.images import Interpolation, resize_view
from teachers.errors import TeacherError
from teachers.interface import GroupInput, ImageSpec, InputSpec, PointsSpec, Size

_INTERPOLATIONS = get_args(Interpolation)
_XYZ = ("x", "y", "z")
_MIN_RADIUS = 1e-6


def image_spec(
    config: PreprocessConfig,
    size: Size,
    *,
    interpolation: str,
    mean: Sequence[float],
    std: Sequence[float],
    where: str,
) -> ImageSpec:
    """Returns the spec of an image: the family's values, overridden by the job's.

    Args:
        config: the job's overrides.
        size: (height, width) in pixels.
        interpolation: the family's filter.
        mean: the family's, per channel in R, G, B order for white = 1.
        std: the same.
        where: the entry in the job, for messages.

    Raises:
        TeacherError: values of the wrong length, or an override of the colour order or
            the range that leaves the family's mean and std in another one.
    """
    own_values = any(mean) or any(value != 1 for value in std)
    for field in ("range", "channels"):
        default = 1.0 if field == "range" else "rgb"
        if getattr(config, field) in (None, default) or not own_values:
            continue
        if config.mean is None or config.std is None:
            raise TeacherError(
                f"{where}.preprocess.{field} must come with mean and std, which the "
                f"model's own ({list(mean)}, {list(std)}) are not in; give all of them"
            )
    chosen = {"mean": config.mean or tuple(mean), "std": config.std or tuple(std)}
    for field, values in chosen.items():
        if len(values) != 3 or (field == "std" and min(values) <= 0):
            raise TeacherError(
                f"{where}.preprocess.{field} must be three numbers, one per channel"
                f"{' and positive' if field == 'std' else ''}, got {list(values)}"
            )
    filter_name = config.interpolation or interpolation
    if filter_name not in _INTERPOLATIONS:
        raise TeacherError(
            f"{where}.preprocess.interpolation must be given, one of "
            f"{', '.join(_INTERPOLATIONS)}: the model's own is {filter_name!r}"
        )
    return ImageSpec(
        height=size[0],
        width=size[1],
        interpolation=filter_name,
        channels=config.channels or "rgb",
        range=1.0 if config.range is None else config.range,
        mean=chosen["mean"],
        std=chosen["std"],
        divide=1.0 if config.divide is None else config.divide,
    )


def points_spec(config: PreprocessConfig, item: GroupInput, where: str) -> PointsSpec:
    """Returns the spec of a sweep.

    Raises:
        TeacherError: the number of points is not given, or a column does not exist.
    """
    if config.points is None:
        raise TeacherError(
            f"{where}.preprocess.points must be given: the number of points of "
            f"{item.name} that the model takes"
        )
    columns = config.columns or _XYZ
    if absent := [name for name in columns if name not in item.columns]:
        raise TeacherError(
            f"{where}.preprocess.columns must be columns of {item.name} "
            f"({', '.join(item.columns)}), got {', '.join(absent)}"
        )
    centre, unit_sphere = bool(config.centre), bool(config.unit_sphere)
    if (centre or unit_sphere) and not set(_XYZ) <= set(columns):
        raise TeacherError(
            f"{where}.preprocess.columns must hold x, y and z for centre or "
            f"unit_sphere, got {', '.join(columns)}"
        )
    return PointsSpec(
        columns=tuple(columns),
        indices=tuple(item.columns.index(name) for name in columns),
        num_points=config.points,
        centre=centre,
        unit_sphere=unit_sphere,
    )


def prepare(
    decoded: Image.Image | NDArray[np.generic],
    spec: InputSpec,
    box: tuple[float, float, float, float] | None = None,
    flip: bool = False,
) -> NDArray[np.generic]:
    """Returns one input as a row of a batch, still without colour arithmetic.

    Args:
        decoded: an upright RGB image; or a sweep already in its view, float32 (N, C),
            metres.
        spec: of the teacher.
        box: of the image, (left, top, right, bottom) in upright pixels, fractional.
        flip: whether the view mirrors the image.

    Returns:
        uint8 (height, width, 3) in R, G, B; or float32 (P, C).

    Raises:
        SampleError: the sweep has no point.
    """
    if isinstance(spec, PointsSpec):
        return _choose_points(np.asarray(decoded, np.float32), spec)
    assert isinstance(decoded, Image.Image)
    assert box is not None, "an image has a box"
    interpolation = cast(Interpolation, spec.interpolation)
    return resize_view(decoded, box, flip, (spec.height, spec.width), interpolation)


def _choose_points(
    sweep_NC: NDArray[np.float32], spec: PointsSpec
) -> NDArray[np.float32]:
    num, wanted = len(sweep_NC), spec.num_points
    if num == 0:
        raise SampleError("empty", "the sweep has no point")
    steps = np.arange(wanted, dtype=np.int64)
    rows = steps * num // wanted if num >= wanted else steps % num
    points_PC = sweep_NC[rows][:, list(spec.indices)]
    if spec.centre or spec.unit_sphere:
        xyz = [spec.columns.index(name) for name in _XYZ]
        coordinates_P3 = points_PC[:, xyz]
        if spec.centre:
            coordinates_P3 = coordinates_P3 - coordinates_P3.mean(
                axis=0, dtype=np.float32
            )
        if spec.unit_sphere:
            radius = np.sqrt((coordinates_P3**2).sum(axis=1, dtype=np.float32)).max()
            coordinates_P3 = coordinates_P3 / np.maximum(
                radius, np.float32(_MIN_RADIUS)
            )
        points_PC[:, xyz] = coordinates_P3
    return np.ascontiguousarray(points_PC, dtype=np.float32)


def to_tensor(
    batch: NDArray[np.generic],
    spec: InputSpec,
    device: torch.device | str,
    dtype: torch.dtype,
) -> Tensor:
    """Returns a batch as the model takes it.

    Images go to the device as bytes and become ``((pixel / 255 * range) - mean) / std /
    divide`` there, as one subtraction and one multiplication per value in float32, and
    keep their channels last in memory (a third of the time of channels-first on a CPU:
    the arithmetic then runs along whole rows of pixels).

    Args:
        batch: images uint8 (B, H, W, 3) in R, G, B, or sweeps float32 (B, P, C).
        spec: of the teacher.
        device: where the model is.
        dtype: its precision; the arithmetic is float32 whatever it is.

    Returns:
        (B, 3, H, W) in the spec's channel order, or (B, P, C).
    """
    if not batch.flags.writeable:
        batch = batch.copy()
    tensor = torch.from_numpy(np.ascontiguousarray(batch)).to(device, non_blocking=True)
    if isinstance(spec, PointsSpec):
        return tensor.to(dtype)
    pixels_BHWC = tensor.flip(-1) if spec.channels == "bgr" else tensor
    num, height, width, channels = pixels_BHWC.shape
    mean = np.asarray(spec.mean, np.float64) * 255 / spec.range
    scale = spec.range / 255 / np.asarray(spec.std, np.float64) / spec.divide
    row_mean, row_scale = (
        torch.from_numpy(np.tile(values.astype(np.float32), width)).to(device)
        for values in (mean, scale)
    )
    rows = pixels_BHWC.reshape(num * height, width * channels).to(torch.float32)
    rows = rows.sub_(row_mean).mul_(row_scale).to(dtype)
    return rows.view(num, height, width, channels).permute(0, 3, 1, 2)
