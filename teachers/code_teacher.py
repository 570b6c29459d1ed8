"""A teacher whose model is somebody's code and says nothing of itself.

Owns what the job states instead: sizes, preprocessing, where outputs lie in what the
model returns or in what its submodules do. Families own how the model comes about and
how it is called.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from manifests.suggestions import close_matches
from manifests.teacher import PreprocessConfig
from teachers.errors import TeacherError
from teachers.image_teacher import Pixels
from teachers.inputs.clip import ClipSpec
from teachers.inputs.image import image_spec
from teachers.inputs.points import points_spec
from teachers.inputs.spec import InputSpec
from teachers.interface import GroupInput, Size, TeacherRequest
from teachers.module_outputs import RETURNED, follow, parse_source, to_channels_last
from teachers.torch_teacher import Tap, TorchTeacher, recording

_POINTS = "points"
_SHOWN = 8


class CodeTeacher(TorchTeacher):
    """A model of somebody's that looks at one input or several together."""

    def __init__(self, request: TeacherRequest, device: str) -> None:
        super().__init__(request, device)
        config = request.config
        has_images = any(item.kind != _POINTS for item in request.group)
        if has_images and not config.sizes:
            raise TeacherError(
                f"{self.where}.sizes must be given: {config.family}: does not say at "
                "which [height, width] it looks at images"
            )
        sizes = config.sizes if has_images else None
        self._sizes: tuple[Size | None, ...] = tuple(sizes) if sizes else (None,)
        if config.preprocess.geometry == "teacher":
            raise TeacherError(
                f"{self.where}.preprocess.geometry must be view for {config.family}:, "
                "which has no transform of its own; leave it out"
            )
        self._sources = {
            name: parse_source(item, f"{self.where}.outputs.{name}")
            for name, item in config.outputs.items()
        }
        for name, item in config.outputs.items():
            if item.norm is not None:
                raise TeacherError(
                    f"{self.where}.outputs.{name}.norm has no effect on {config.family}"
                    ": models; name what comes before or after its norm in `from`"
                )

    @abstractmethod
    def _call(self, model: nn.Module, inputs: Mapping[str, Tensor]) -> Any:
        """Returns what ``model`` does of the inputs, by name in the group's order."""

    def _pixels(self, item: GroupInput) -> Pixels:
        """Returns a model's own pixel arithmetic, where it has any."""
        del item
        return Pixels("bilinear", (0.0, 0.0, 0.0), (1.0, 1.0, 1.0))

    def _points(self, item: GroupInput) -> PreprocessConfig:
        """Returns how a sweep is taken: the job's word, where it has one."""
        del item
        return self.request.config.preprocess

    @property
    def sizes(self) -> tuple[Size | None, ...]:
        """Returns the sizes of the job; (None,) where there is no image."""
        return self._sizes

    def inputs(self, size: Size | None) -> dict[str, InputSpec]:
        """Returns how each input is taken; see `Teacher.inputs`."""
        specs: dict[str, InputSpec] = {}
        for item in self.request.group:
            if item.kind == _POINTS:
                specs[item.name] = points_spec(self._points(item), item, self.where)
                continue
            assert size is not None, "an image has a size"
            pixels = self._pixels(item)
            frame = image_spec(
                self.request.config.preprocess,
                size,
                interpolation=pixels.interpolation,
                mean=pixels.mean,
                std=pixels.std,
                where=self.where,
            )
            is_clip = item.kind == "clip"
            specs[item.name] = ClipSpec(frame, item.frames) if is_clip else frame
        return specs

    def _taps(
        self, model: nn.Module, batch: Mapping[str, Tensor], size: Size | None
    ) -> dict[str, Tap]:
        outputs = self.request.config.outputs
        paths = {path for path, _ in self._sources.values()} - {RETURNED}
        self._check_paths(model, paths)
        with recording(model, outputs=paths) as seen:
            inputs = {item.name: batch[item.name] for item in self.request.group}
            returned = self._call(model, inputs)
        taps = {}
        for name, (path, indices) in self._sources.items():
            entry = f"{self.where}.outputs.{name}"
            if path == RETURNED:
                found = returned
            else:
                found = self._only(seen(path, False), path, entry)
            value = follow(found, path, indices, entry)
            taps[name] = Tap(
                to_channels_last(value, outputs[name], entry, name == _POINTS),
                None,
                outputs[name].source or RETURNED,
            )
        return taps

    def _only(self, calls: list[Any], path: str, entry: str) -> Any:
        if len(calls) != 1:
            raise TeacherError(
                f"{entry}.from must be a submodule that {self.request.config.method} "
                f"calls once, got {path!r}, called {len(calls)} times; name another"
            )
        return calls[0]

    def _check_paths(self, model: nn.Module, paths: set[str]) -> None:
        known = [name for name, _ in model.named_modules() if name]
        for path in sorted(paths.difference(known)):
            top = [name for name, _ in model.named_children()]
            raise TeacherError(
                f"{self.where}.outputs: from must be `output` or a submodule, got "
                f"{path!r} (at the top: {', '.join(top[:_SHOWN])}"
                f"{', ...' if len(top) > _SHOWN else ''}){close_matches(path, known)}"
            )
