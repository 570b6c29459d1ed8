"""Teachers that draw a sweep as an image and look at it with any timm model.

``range_view:NAME`` sees it as its sensor does, ``bev_raster:NAME`` from above. Owns
what differs from `teachers.timm_family`: the model's input channels, sizes that the job
must give, and what a grid seen from above covers. `teachers.inputs.raster` draws.

Outputs are those of `teachers.timm_family`; the ``patch`` of bev_raster is called
``bev``, and it and every layer and level carry their extent in metres.

Weights trained with the job's channels load as they are. timm turns the first
convolution of a model of 3 channels into one of C: repeated along the channels, cut at
C and multiplied by 3 / C; summed where C is 1. That keeps the scale of what it gives
for equal channels; what it sees is still to be trained. The teacher's facts say so.

Shape suffixes: B batch, C channels, H and W image rows and columns.
"""

from __future__ import annotations

import dataclasses
from abc import abstractmethod
from collections.abc import Mapping
from typing import Any

from timm.models import get_model_traits
from torch import Tensor, nn

from manifests.teacher import BevExtent
from teachers import timm_family
from teachers.errors import TeacherError
from teachers.inputs.raster import (
    BEV_CHANNELS,
    RANGE_CHANNELS,
    BevRasterSpec,
    RasterSpec,
    bev_raster_spec,
    range_view_spec,
    raster_channels,
)
from teachers.inputs.spec import InputSpec
from teachers.interface import Size, TeacherRequest, WeightsRecord
from teachers.timm_family import TimmTeacher
from teachers.torch_teacher import Tap

find_weights = timm_family.find_weights

_BEV_RASTER = "bev_raster"
_VECTORS = ("cls", "pooled", "logits")
_OWN_CHANNELS = 3


def open_teacher(
    request: TeacherRequest, weights: WeightsRecord, device: str
) -> RasterTeacher:
    """Returns a timm model on a sweep; see `teachers.registry.open_teacher`."""
    is_bev = request.config.family == _BEV_RASTER
    return (BevRasterTeacher if is_bev else RangeViewTeacher)(request, weights, device)


class RasterTeacher(TimmTeacher):
    """A timm model that looks at one sweep drawn as an image."""

    own_channels: tuple[str, ...] = ()
    """Channels where the job names none."""
    example = ""
    """Of a job's `sizes`, and why there are no others."""

    def __init__(
        self, request: TeacherRequest, weights: WeightsRecord, device: str
    ) -> None:
        super().__init__(request, weights, device)
        for size in self._sizes:
            self._spec_at(size)
        self.facts = dataclasses.replace(self.facts, notes=self._notes())

    @abstractmethod
    def _spec_at(self, size: Size) -> RasterSpec:
        """Returns how the sweep is taken at a size."""

    @property
    def _channels(self) -> tuple[str, ...]:
        return raster_channels(self.request.config.preprocess.raster, self.own_channels)

    @property
    def _arguments(self) -> dict[str, Any]:
        """Arguments of the constructor: those of the job, and the channels."""
        given = self.request.config.args
        if "in_chans" in given:
            raise TeacherError(
                f"{self.where}.args.in_chans is set by preprocess.raster.channels; "
                "leave it out"
            )
        return {**given, "in_chans": len(self._channels)}

    def _choose_sizes(
        self, native: Size, stride: int, patch: Size, own_fit: str = "tokens"
    ) -> None:
        """Takes the job's sizes; see `ImageTeacher._choose_sizes`.

        Raises:
            TeacherError: there are none, or one that cells do not cover exactly.
        """
        if not self.request.config.sizes:
            raise TeacherError(
                f"{self.where}.sizes must be given, [height, width] of the image that "
                f"the sweep is drawn as: {self.example}"
            )
        # A transformer with one grid has cells of its patch, whatever that is; of other
        # models the coarsest grid decides, since a cell more would lie outside.
        unit = patch if max(patch) == stride else (stride, stride)
        super()._choose_sizes(native, stride, unit, own_fit)

    def inputs(self, size: Size | None) -> dict[str, InputSpec]:
        """Returns how the sweep is taken; see `Teacher.inputs`."""
        assert size is not None, "an image has a size"
        return {self._input.name: self._spec_at(size)}

    def _variants_to_try(self, size: Size) -> list[dict[str, Any]]:
        """Returns constructor arguments that may make the model run at ``size``.

        A checkpoint trained on such images has position embeddings of their grid, which
        fit only a model that is made for their size.
        """
        variants = super()._variants_to_try(size)
        probe = self._create_empty("meta", {})
        has_positions = getattr(probe, "pos_embed", None) is not None
        return variants[::-1] if has_positions else variants

    def _source_of(self, model: nn.Module) -> dict[str, Any]:
        """Returns a model's own weights, which have the channels of the image."""
        shape = (len(self._channels), *self._native)
        return {**super()._source_of(model), "input_size": shape}

    def _notes(self) -> tuple[str, ...]:
        """Returns what becomes of the first convolution of weights for pictures.

        Raises:
            TeacherError: timm would leave that of its pretrained weights at random.
        """
        num = len(self._channels)
        if self._weights.kind == "random" or num == _OWN_CHANNELS:
            return ()
        probe = self._create_empty("meta", {})
        known = get_model_traits(probe).get("first_conv", self._config.first_conv)
        paths = [known] if isinstance(known, str) else list(known or ())
        weights: list[Any] = [probe.get_submodule(path).weight for path in paths]
        seen = f"input channels {', '.join(self._channels)}; weights"
        if paths and all(one.ndim == 4 and one.shape[1] == num for one in weights):
            how = "summed" if num == 1 else f"repeated and multiplied by 3 / {num}"
            return (
                f"{seen} of a model of {_OWN_CHANNELS} channels: "
                f"{', '.join(paths)} {how} by timm",
            )
        if self._weights.kind == "pretrained":
            raise TeacherError(
                f"{self.where}.preprocess.raster.channels must be {_OWN_CHANNELS} for "
                f"the pretrained weights of {self._name}, got {num}: timm cannot take "
                "its first layer to other channels; choose as many, give `weights:` "
                "trained with these, or take another model"
            )
        return (f"{seen} must have been trained with them",)


class RangeViewTeacher(RasterTeacher):
    """A timm model on a sweep as its sensor sees it."""

    own_channels = RANGE_CHANNELS
    example = (
        "its rows are the sensor's beams and its columns the steps of a turn; such as "
        "[[64, 2048]] for 64 beams"
    )

    def _spec_at(self, size: Size) -> RasterSpec:
        raster = self.request.config.preprocess.raster
        return range_view_spec(raster, self._input, size, self.where)


class BevRasterTeacher(RasterTeacher):
    """A timm model on a sweep as seen from above."""

    own_channels = BEV_CHANNELS
    example = (
        "with x_m and y_m it decides the metres of a pixel; such as [[512, 512]] for "
        "0.2 m over 102.4 m"
    )

    def _spec_at(self, size: Size) -> BevRasterSpec:
        raster = self.request.config.preprocess.raster
        return bev_raster_spec(raster, self._input, size, self.where)

    def _tap(
        self, model: nn.Module, image_BCHW: Tensor, wanted: Mapping[str, str | None]
    ) -> dict[str, Tap]:
        named = {"patch" if name == "bev" else name: it for name, it in wanted.items()}
        taps = super()._tap(model, image_BCHW, named)
        height, width = image_BCHW.shape[2:]
        extent = self._spec_at((height, width)).extent
        return {
            "bev" if name == "patch" else name: _covering(tap, name, extent)
            for name, tap in taps.items()
        }


def _covering(tap: Tap, name: str, extent: BevExtent) -> Tap:
    return tap if name in _VECTORS else dataclasses.replace(tap, extent=extent)


def describe(name: str, base: str) -> dict[str, Any]:
    """Returns what timm says of the model, with what a sweep's image changes.

    Raises:
        TeacherError: timm has no such model.
    """
    facts = timm_family.describe(name, base)
    del facts["preprocess"], facts["native_size"]
    shapes = facts.pop("outputs")
    return {
        **facts,
        "outputs": [*shapes, *(["bev"] if "patch" in shapes else [])],
        "sizes": "must be given",
        "range_view": {
            "channels": list(RANGE_CHANNELS),
            "must be given": ["elevation_deg"],
        },
        "bev_raster": {
            "channels": list(BEV_CHANNELS),
            "must be given": ["x_m", "y_m"],
            "bev": "its name for patch",
        },
    }
