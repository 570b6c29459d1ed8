"""Images: one resize of the view's box, then the model's own arithmetic.

Owns the pixel arithmetic; the input size is `pipeline.samples.fitting.fit_size`, the
resize `pipeline.samples.images.resize_view`: the ones that students use too.

Shape suffixes: B batch, H and W rows and columns, C channels.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, cast, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from manifests.teacher import PreprocessConfig
from pipeline.samples.decoded import Decoded
from pipeline.samples.fitting import padded_size
from pipeline.samples.images import Interpolation, resize_view
from pipeline.samples.views import View
from teachers.errors import TeacherError
from teachers.inputs.own_transform import run_transform
from teachers.inputs.spec import InputSpec, as_tensor
from teachers.interface import Size, TeacherRequest

_INTERPOLATIONS = get_args(Interpolation)


@dataclass(frozen=True)
class ImageSpec(InputSpec):
    """How a teacher takes an image: one resize of the view's box, then arithmetic.

    The pixel arithmetic is ``((pixel / 255 * range) - mean) / std / divide`` in
    float32, per channel in the order of ``channels``.

    With ``pad`` the longer side of the box fills the input, the rest of it, right or
    below, is 0 after that arithmetic, and a fourth channel of a prepared row is 255
    where there is picture.

    With ``own`` it is the model's own evaluation transform instead, told as
    `teachers.inputs.own_transform` does, of the whole image and for view 0 alone;
    ``interpolation``, ``mean`` and ``std`` then say what that one was given.

    Source: Kirillov et al., Segment Anything (2023), appendix A, for ``pad``.
    """

    height: int
    width: int
    interpolation: str = "bicubic"
    channels: str = "rgb"
    range: float = 1.0
    mean: tuple[float, ...] = (0.0, 0.0, 0.0)
    std: tuple[float, ...] = (1.0, 1.0, 1.0)
    divide: float = 1.0
    kind: Literal["image"] = "image"
    pad: bool = False
    own: str | None = None

    omitted: ClassVar[dict[str, Any]] = {"pad": False, "own": None}

    @property
    def row_shape(self) -> tuple[int, ...]:
        """(H, W, 3); with padding (H, W, 4); of an own transform (3, H, W)."""
        if self.own is not None:
            return 3, self.height, self.width
        return self.height, self.width, 4 if self.pad else 3

    @property
    def row_dtype(self) -> np.dtype[Any]:
        """Bytes: colour arithmetic comes later; float32 of an own transform."""
        return np.dtype(np.uint8 if self.own is None else np.float32)

    @property
    def geometry(self) -> Hashable:
        """Teachers that differ only in colour arithmetic share their pixels."""
        if self.own is not None:
            return ("image", self.own)
        shape = (self.height, self.width, self.pad)
        return ("image", *shape, self.interpolation)

    def prepare(self, value: Decoded, view: View, name: str) -> NDArray[np.generic]:
        """Returns a row in R, G, B; see `InputSpec.prepare`."""
        assert isinstance(value, Image.Image)
        if self.own is not None:
            assert view.index == 0, "an own transform has no random views"
            return run_transform(self.own, value)
        interpolation = cast(Interpolation, self.interpolation)
        size, box = (self.height, self.width), view.boxes[name]
        if not self.pad:
            return resize_view(
                value, box, view.flip, size, interpolation, view.photometric
            )
        rows, columns = padded_size(box, size)
        picture = resize_view(
            value, box, view.flip, (rows, columns), interpolation, view.photometric
        )
        row_HW4 = np.zeros((*size, 4), np.uint8)
        row_HW4[:rows, :columns, :3] = picture
        row_HW4[:rows, :columns, 3] = 255
        return row_HW4

    def missing_cells(
        self,
        batch: NDArray[np.generic],
        shape: tuple[int, ...],
        pool: tuple[int, int],
    ) -> NDArray[np.bool_] | None:
        """Returns which cells lie on padding; see `InputSpec.missing_cells`.

        A cell does if its centre does; a pooled one if any of its cells does.
        """
        if not self.pad:
            return None
        (rows, columns), (y, x) = shape[-3:-1], pool
        at_y = ((np.arange(rows * y) + 0.5) * self.height / (rows * y)).astype(int)
        at_x = ((np.arange(columns * x) + 0.5) * self.width / (columns * x)).astype(int)
        is_padding = batch[..., 3][:, at_y[:, None], at_x] == 0
        cells = is_padding.reshape(len(batch), rows, y, columns, x)
        found: NDArray[np.bool_] = cells.any(axis=(2, 4))
        return found

    def to_tensor(
        self,
        batch: NDArray[np.generic],
        device: torch.device | str,
        dtype: torch.dtype,
    ) -> Tensor:
        """Returns (B, 3, H, W) in the order of ``channels``; see `InputSpec.to_tensor`.

        Images go to the device as bytes and become ``((pixel / 255 * range) - mean) /
        std / divide`` there, as one subtraction and one multiplication per value in
        float32, and keep their channels last in memory (a third of the time of
        channels-first on a CPU: the arithmetic then runs along whole rows of pixels).
        """
        if self.own is not None:
            return as_tensor(batch, device).to(dtype)
        pixels_BHWC = as_tensor(batch, device)
        picture_BHW1 = pixels_BHWC[..., 3:] != 0
        pixels_BHWC = pixels_BHWC[..., :3]
        if self.channels == "bgr":
            pixels_BHWC = pixels_BHWC.flip(-1)
        num, height, width, channels = pixels_BHWC.shape
        mean = np.asarray(self.mean, np.float64) * 255 / self.range
        scale = self.range / 255 / np.asarray(self.std, np.float64) / self.divide
        row_mean, row_scale = (
            torch.from_numpy(np.tile(values.astype(np.float32), width)).to(device)
            for values in (mean, scale)
        )
        rows = pixels_BHWC.reshape(num * height, width * channels).to(torch.float32)
        rows = rows.sub_(row_mean).mul_(row_scale).to(dtype)
        values_BHWC = rows.view(num, height, width, channels)
        if self.pad:
            values_BHWC = values_BHWC.masked_fill(~picture_BHW1, 0)
        return values_BHWC.permute(0, 3, 1, 2)

    def blank(self, device: torch.device | str) -> Tensor:
        """Returns zeros (1, 3, H, W)."""
        return torch.zeros(1, 3, self.height, self.width, device=device)


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
        pad=config.fit == "pad",
    )


def check_views_of_images(
    request: TeacherRequest, specs: Mapping[str, InputSpec]
) -> None:
    """Checks that `fit: pad` and `geometry: teacher` mean what they say to a teacher.

    Args:
        request: of the teacher.
        specs: how it takes each of its inputs at one size.

    Raises:
        TeacherError: padding that outputs of the teacher cannot be told of, or a family
            that has no transform of its own.
    """
    config, where = request.config, f"teachers.{request.name}"
    frames = [
        frame
        for spec in specs.values()
        if isinstance(frame := getattr(spec, "frame", spec), ImageSpec)
    ]
    if any(frame.pad for frame in frames):
        if len(specs) > 1:
            raise TeacherError(
                f"{where}.preprocess.fit must not be pad with several inputs "
                f"({', '.join(specs)}): which cells lie on whose padding is not known; "
                "use tokens or squash"
            )
        for name, output in config.outputs.items():
            if output.extent is not None:
                raise TeacherError(
                    f"{where}.preprocess.fit must not be pad with the bird's-eye grid "
                    f"{name}: its cells are not those of the image; use tokens or "
                    "squash"
                )
    is_own = bool(frames) and all(frame.own is not None for frame in frames)
    if config.preprocess.geometry == "teacher" and not is_own:
        raise TeacherError(
            f"{where}.preprocess.geometry must be view for {config.family}: only "
            "single images of timm and open_clip models have a transform of their "
            "own; leave it out"
        )
