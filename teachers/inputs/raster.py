"""Sweeps as images: drawn by `pipeline.samples.rasters`, normalised per channel.

Owns what a job may say in ``preprocess.raster`` and the arithmetic after the drawing.

Pixels without a point are exactly 0 in what the model takes, in every channel, whatever
mean and std are: what RangeNet++ and those after it train with.

Shape suffixes: B batch, H and W rows and columns of the image, C channels.
"""

from __future__ import annotations

import dataclasses
import math
from abc import abstractmethod
from collections.abc import Hashable, Iterable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from manifests.teacher import BevExtent, RasterConfig
from pipeline.samples.decoded import Decoded
from pipeline.samples.errors import SampleError
from pipeline.samples.points import Sweep
from pipeline.samples.rasters import MADE_CHANNELS, bev_image, range_image
from pipeline.samples.views import View
from teachers.errors import TeacherError
from teachers.inputs.spec import InputSpec, as_tensor
from teachers.interface import GroupInput, Size

Pair = tuple[float, float]

RANGE_CHANNELS = ("range", "x", "y", "z", "intensity")
"""Of RangeNet++, SalsaNext and RangeViT."""
BEV_CHANNELS = ("occupied", "z", "intensity", "density")
"""Height, intensity and density of MV3D; occupied, since a height of 0 is one too."""

_FULL_TURN: Pair = (-180.0, 180.0)
_FULL_TURN_DEG = 360.0
_NO_VALUE = float("nan")
_KNOWN_ELEVATIONS = (
    "HDL-64E (KITTI) [-25, 3], HDL-32E (nuScenes) [-30.67, 10.67], VLP-32C "
    "(Argoverse 2) [-25, 15], the top one of Waymo [-17.6, 2.4]"
)
_RANGE_FIELDS = frozenset({"elevation_deg", "azimuth_deg", "range_m"})
_BEV_FIELDS = frozenset({"x_m", "y_m", "z_m"})


@dataclass(frozen=True, kw_only=True)
class RasterSpec(InputSpec):
    """How a teacher takes a sweep that is drawn as an image.

    Attributes:
        height: rows of the image.
        width: columns of it.
        channels: in order: columns of the sweep or made ones.
        mean: subtracted, per channel.
        std: divides after that.
    """

    height: int
    width: int
    channels: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    kind: Literal["raster"] = "raster"

    @abstractmethod
    def draw(self, sweep: Sweep) -> NDArray[np.float32]:
        """Returns the image (H, W, C) float32, NaN in pixels without a point."""

    @property
    def row_shape(self) -> tuple[int, ...]:
        """(H, W, C)."""
        return self.height, self.width, len(self.channels)

    @property
    def row_dtype(self) -> np.dtype[Any]:
        """float32: metres, before mean and std."""
        return np.dtype(np.float32)

    @property
    def geometry(self) -> Hashable:
        """Teachers that differ only in mean and std share their images."""
        return dataclasses.replace(self, mean=(), std=())

    def prepare(self, value: Decoded, view: View, name: str) -> NDArray[np.generic]:
        """Returns float32 (H, W, C), NaN where no point is; see `InputSpec.prepare`.

        Raises:
            SampleError: no point of the sweep falls into the image.
        """
        assert isinstance(value, Sweep)
        image_HWC = self.draw(value)
        if np.isnan(image_HWC[..., 0]).all():
            raise SampleError(
                "empty", f"no point of {name} falls into the image that it is drawn as"
            )
        return image_HWC

    def to_tensor(
        self,
        batch: NDArray[np.generic],
        device: torch.device | str,
        dtype: torch.dtype,
    ) -> Tensor:
        """Returns (B, C, H, W) as ``(value - mean) / std``; see `InputSpec.to_tensor`.

        The arithmetic is in float32 and rounds to ``dtype`` once, at its end: bfloat16
        would move a coordinate of 50 m by up to 0.25 m. Pixels without a point are 0.
        Channels stay last in memory.
        """
        values_BHWC = as_tensor(batch, device)
        mean, std = (
            torch.tensor(numbers, dtype=torch.float32, device=device)
            for numbers in (self.mean, self.std)
        )
        normalised = values_BHWC.sub(mean).div_(std)
        normalised.nan_to_num_(nan=0.0, posinf=math.inf, neginf=-math.inf)
        return normalised.to(dtype).permute(0, 3, 1, 2)

    def blank(self, device: torch.device | str) -> Tensor:
        """Returns zeros (1, C, H, W)."""
        shape = (1, len(self.channels), self.height, self.width)
        return torch.zeros(shape, device=device)


@dataclass(frozen=True, kw_only=True)
class RangeViewSpec(RasterSpec):
    """A sweep as its sensor sees it; see `pipeline.samples.rasters.range_image`."""

    elevation_deg: Pair
    azimuth_deg: Pair = _FULL_TURN
    range_m: Pair | None = None

    def draw(self, sweep: Sweep) -> NDArray[np.float32]:
        """Returns the image; see `RasterSpec.draw`."""
        return range_image(
            sweep.points,
            sweep.columns,
            (self.height, self.width),
            self.elevation_deg,
            self.azimuth_deg,
            self.channels,
            range_m=self.range_m,
            empty=_NO_VALUE,
        )


@dataclass(frozen=True, kw_only=True)
class BevRasterSpec(RasterSpec):
    """A sweep from above; see `pipeline.samples.rasters.bev_image`."""

    x_m: Pair
    y_m: Pair
    z_m: Pair | None = None

    @property
    def extent(self) -> BevExtent:
        """What the image covers, in metres of the view's LiDAR frame."""
        return BevExtent(x_m=self.x_m, y_m=self.y_m, row_0="x_max", column_0="y_max")

    def draw(self, sweep: Sweep) -> NDArray[np.float32]:
        """Returns the image; see `RasterSpec.draw`."""
        return bev_image(
            sweep.points,
            sweep.columns,
            (self.height, self.width),
            self.x_m,
            self.y_m,
            self.z_m,
            self.channels,
            empty=_NO_VALUE,
        )


def range_view_spec(
    config: RasterConfig | None, item: GroupInput, size: Size, where: str
) -> RangeViewSpec:
    """Returns how a sweep is taken as its sensor sees it.

    Args:
        config: ``preprocess.raster`` of the job.
        item: the sweep.
        size: (height, width) of the image.
        where: the teacher's entry in the job, for messages.

    Raises:
        TeacherError: the elevation is not given, or a field is wrong.
    """
    config = config or RasterConfig()
    entry = f"{where}.preprocess.raster"
    _refuse(config, _BEV_FIELDS, f"{entry}", "bev_raster")
    elevation = config.elevation_deg
    if elevation is None:
        raise TeacherError(
            f"{entry}.elevation_deg must be given, the angles of the lowest and the "
            f"highest beam of the sensor; {_KNOWN_ELEVATIONS}"
        )
    if elevation[0] < -90 or elevation[1] > 90:
        raise TeacherError(
            f"{entry}.elevation_deg must lie in -90 to 90, got {list(elevation)}"
        )
    azimuth = config.azimuth_deg or _FULL_TURN
    if azimuth[1] - azimuth[0] > _FULL_TURN_DEG:
        raise TeacherError(
            f"{entry}.azimuth_deg must span at most 360, got {list(azimuth)}"
        )
    channels, mean, std = _channels(config, RANGE_CHANNELS, item, entry)
    return RangeViewSpec(
        height=size[0],
        width=size[1],
        channels=channels,
        mean=mean,
        std=std,
        elevation_deg=elevation,
        azimuth_deg=azimuth,
        range_m=config.range_m,
    )


def bev_raster_spec(
    config: RasterConfig | None, item: GroupInput, size: Size, where: str
) -> BevRasterSpec:
    """Returns how a sweep is taken from above; see `range_view_spec`.

    Raises:
        TeacherError: the area is not given, or a field is wrong.
    """
    config = config or RasterConfig()
    entry = f"{where}.preprocess.raster"
    _refuse(config, _RANGE_FIELDS, entry, "range_view")
    if config.x_m is None or config.y_m is None:
        raise TeacherError(
            f"{entry}.{'y_m' if config.x_m else 'x_m'} must be given, the lowest and "
            "the highest coordinate of the image in metres; such as x_m: [-51.2, 51.2]"
        )
    channels, mean, std = _channels(config, BEV_CHANNELS, item, entry)
    return BevRasterSpec(
        height=size[0],
        width=size[1],
        channels=channels,
        mean=mean,
        std=std,
        x_m=config.x_m,
        y_m=config.y_m,
        z_m=config.z_m,
    )


def raster_channels(
    config: RasterConfig | None, own: tuple[str, ...]
) -> tuple[str, ...]:
    """Returns the channels of an image: the job's, or the family's own."""
    return (config.channels if config else None) or own


def _refuse(
    config: RasterConfig, fields: Iterable[str], entry: str, family: str
) -> None:
    for field in sorted(config.model_fields_set.intersection(fields)):
        raise TeacherError(
            f"{entry}.{field} has no effect: it is for {family}: teachers; leave it out"
        )


def _channels(
    config: RasterConfig, own: tuple[str, ...], item: GroupInput, entry: str
) -> tuple[tuple[str, ...], tuple[float, ...], tuple[float, ...]]:
    """Returns the channels and their mean and std: 0 and 1 where the job has none."""
    channels = raster_channels(config, own)
    known = dict.fromkeys((*item.columns, *MADE_CHANNELS))
    if absent := [name for name in channels if name not in known]:
        raise TeacherError(
            f"{entry}.channels must be columns of {item.name} or made ones "
            f"({', '.join(known)}), got {', '.join(absent)}"
        )
    mean = config.mean or (0.0,) * len(channels)
    std = config.std or (1.0,) * len(channels)
    for field, values in (("mean", mean), ("std", std)):
        if len(values) != len(channels) or (field == "std" and min(values) <= 0):
            raise TeacherError(
                f"{entry}.{field} must be {len(channels)} numbers, one per channel "
                f"({', '.join(channels)}){' and positive' if field == 'std' else ''}, "
                f"got {list(values)}"
            )
    return channels, mean, std
