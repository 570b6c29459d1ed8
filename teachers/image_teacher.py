"""A teacher that looks at one image with its model's own pixel arithmetic.

Owns the input's spec and the choice of sizes; families own the model and its outputs.

Shape suffixes: B batch, C channels, H and W image rows and columns.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

from torch import Tensor, nn

from pipeline.samples.fitting import fit_size
from teachers.errors import TeacherError
from teachers.inputs.image import ImageSpec, image_spec
from teachers.inputs.own_transform import make_transform
from teachers.inputs.spec import InputSpec
from teachers.interface import Size, TeacherRequest
from teachers.torch_teacher import Tap, TorchTeacher

EMBEDDING = "embed"
"""The output that zero-shot classifiers take."""


class Pixels(NamedTuple):
    """A model's own pixel arithmetic, before the job's overrides.

    Attributes:
        interpolation: filter of the one resize.
        mean, std: per channel, of pixels in [0, 1].
    """

    interpolation: str
    mean: tuple[float, ...]
    std: tuple[float, ...]


class ImageTeacher(TorchTeacher):
    """A torch module that looks at one image.

    A family's ``__init__`` calls `_choose_sizes` once it knows its model.
    """

    def __init__(self, request: TeacherRequest, device: str) -> None:
        super().__init__(request, device)
        self._input = request.group[0]
        self._sizes: tuple[Size, ...] = ()
        self._pixels = Pixels("bicubic", (0.0, 0.0, 0.0), (1.0, 1.0, 1.0))

    def _choose_sizes(
        self, native: Size, stride: int, patch: Size, own_fit: str = "tokens"
    ) -> None:
        """Takes the job's sizes, or the one that fits the box of view 0.

        A model's own transform crops to the native size whatever the box.

        Args:
            native: the model's own size.
            stride: pixels of a grid cell.
            patch: height and width of which a size must be a multiple.
            own_fit: the model's, where the job says nothing.

        Raises:
            TeacherError: a size of the job is no multiple of the patch.
        """
        config = self.request.config
        fit = config.preprocess.fit or own_fit
        if config.preprocess.geometry == "teacher":
            self._check_own_geometry()
            fit = "squash"
        self._sizes = tuple(config.sizes or ()) or (
            fit_size(native, stride, self._input.aspect, fit),
        )
        check_sizes(self._sizes, patch, self.where)

    @property
    def sizes(self) -> tuple[Size | None, ...]:
        """Returns the sizes of the job, or the one that fits the box."""
        return self._sizes

    def inputs(self, size: Size | None) -> dict[str, InputSpec]:
        """Returns how each input is taken; see `Teacher.inputs`."""
        assert size is not None, "an image has a size"
        preprocess = self.request.config.preprocess
        spec = image_spec(
            preprocess,
            size,
            interpolation=self._pixels.interpolation,
            mean=self._pixels.mean,
            std=self._pixels.std,
            where=self.where,
        )
        if preprocess.geometry == "teacher":
            own = self._own_transform(spec)
            make_transform(own)
            spec = replace(spec, own=own)
        return {self._input.name: spec}

    def _own_transform(self, spec: ImageSpec) -> str:
        """Returns the model's own evaluation transform, as `tell_transform` tells it.

        Args:
            spec: its size, interpolation, mean and std, the job's where it gives any.

        Raises:
            TeacherError: the family has none.
        """
        del spec
        raise TeacherError(
            f"{self.where}.preprocess.geometry must be view for "
            f"{self.request.config.family}:, which has no transform of its own; leave "
            "it out"
        )

    def _check_own_geometry(self) -> None:
        config = self.request.config.preprocess
        for field in ("fit", "channels", "range", "divide"):
            if getattr(config, field) is not None:
                raise TeacherError(
                    f"{self.where}.preprocess.{field} has no effect with `geometry: "
                    "teacher`, which runs the model's own transform; leave one out"
                )

    def _taps(
        self, model: nn.Module, batch: Mapping[str, Tensor], size: Size | None
    ) -> dict[str, Tap]:
        outputs = self.request.config.outputs
        wanted = {name: it.norm for name, it in outputs.items() if not it.classifier}
        if self._classifiers:
            wanted.setdefault(EMBEDDING, None)
        taps = self._tap(model, batch[self._input.name], wanted)
        for name in self._classifiers:
            taps[name] = self._classify(name, taps[EMBEDDING].tensor)
        return {name: taps[name] for name in outputs}

    def _classify(self, name: str, embed_BC: Tensor) -> Tap:
        classifier = self._classifiers[name]
        channels = classifier.weight.shape[1]
        if embed_BC.shape[1] != channels:
            raise TeacherError(
                f"{self.where}.outputs.{name}.classifier must have the "
                f"{embed_BC.shape[1]} channels of this model's {EMBEDDING}, got "
                f"{channels}, made by {classifier.model}; make one with this model's "
                "own text tower"
            )
        return Tap(classifier.logits(embed_BC), None, f"zero-shot, {classifier.model}")

    @abstractmethod
    def _tap(
        self, model: nn.Module, image_BCHW: Tensor, wanted: Mapping[str, str | None]
    ) -> dict[str, Tap]:
        """Runs ``model`` once; ``wanted`` is output name to the job's ``norm``."""


def check_sizes(sizes: Sequence[Size], patch: Size, where: str) -> None:
    """Checks that no pixel is left over, which a model would drop without a word.

    Raises:
        TeacherError: a size is no multiple of the patch.
    """
    for size in sizes:
        if size[0] % patch[0] or size[1] % patch[1]:
            pairs = zip(size, patch, strict=True)
            nearest = [max(1, round(side / unit)) * unit for side, unit in pairs]
            raise TeacherError(
                f"{where}.sizes must be multiples of the patch {patch[0]} x "
                f"{patch[1]}, got {list(size)}; the nearest is {nearest}"
            )
