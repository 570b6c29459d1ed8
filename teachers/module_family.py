"""Teachers from a file of yours: any torch module, tapped where the job says.

``module:./file.py:CLASS`` is code that runs because the job names it, as
`manifests.code` says; its SHA-256 goes into the teacher's facts.

An output says where it is taken, in ``from``: ``output`` (the default) is what the
called method returns, anything else the path of a submodule whose output is meant.
Indices and keys in brackets lead into tuples and dicts: ``encoder[2]``,
``output[logits]``.

Shape suffixes: B batch, N tokens, H and W grid, C channels.
"""

from __future__ import annotations

import contextlib
import inspect
import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from manifests.code import Code, explained, load_code
from manifests.errors import ManifestError
from manifests.suggestions import close_matches
from manifests.teacher import OutputConfig
from teachers.cost import building_on
from teachers.errors import TeacherError
from teachers.inputs.clip import ClipSpec
from teachers.inputs.image import image_spec
from teachers.inputs.points import points_spec
from teachers.inputs.spec import InputSpec
from teachers.interface import Size, TeacherRequest, WeightsRecord
from teachers.torch_teacher import (
    Tap,
    TorchTeacher,
    channels_last,
    freeze,
    recording,
    seeded,
)
from teachers.weights import (
    load_strict,
    local_path,
    parse_wanted,
    read_state_dict,
)

_SOURCE = re.compile(r"(?P<path>\w+(?:\.\w+)*)(?P<indices>(?:\[[^\[\]]+\])*)")
_RETURNED = "output"
_POINTS = "points"
_LAYOUT_OF_RANK = {2: "nc", 4: "nchw", 5: "ntchw"}
_RANK_OF_LAYOUT = {"nc": 2, "nchw": 4, "nhwc": 4, "nlc": 3, "ncl": 3, "ntchw": 5}
_SHOWN = 8


@contextlib.contextmanager
def _as_teacher_error() -> Iterator[None]:
    """Raises what is wrong with a document's code as this package's error."""
    try:
        yield
    except ManifestError as error:
        raise TeacherError(str(error)) from error.__cause__


def _load(name: str, base: str, where: str) -> Code:
    with _as_teacher_error():
        return load_code(name, base, where, nn.Module)


def find_weights(request: TeacherRequest) -> WeightsRecord:
    """Raises TeacherError: a module has no weights of its own to find."""
    tag = parse_wanted(request).tag
    given = "nothing" if tag is None else repr(tag)
    raise TeacherError(
        f"teachers.{request.name}.weights must be a path, a URL, `random` or "
        f"`random:SEED` for module: teachers, got {given}"
    )


def open_teacher(
    request: TeacherRequest, weights: WeightsRecord, device: str
) -> ModuleTeacher:
    """Returns a module as a teacher; see `teachers.registry.open_teacher`."""
    return ModuleTeacher(request, weights, device)


class ModuleTeacher(TorchTeacher):
    """A module of somebody's that looks at one input or several together."""

    def __init__(
        self, request: TeacherRequest, weights: WeightsRecord, device: str
    ) -> None:
        super().__init__(request, device)
        self._weights = weights
        self._code = _load(request.config.model_name, request.base, self.where)
        self._has_images = any(item.kind != "points" for item in request.group)
        if self._has_images and not request.config.sizes:
            raise TeacherError(
                f"{self.where}.sizes must be given: a module does not say at which "
                "[height, width] it looks at images"
            )
        sizes = request.config.sizes if self._has_images else None
        self._sizes: tuple[Size | None, ...] = tuple(sizes) if sizes else (None,)
        for name, config in request.config.outputs.items():
            parse_source(config, f"{self.where}.outputs.{name}")
            if config.norm is not None:
                raise TeacherError(
                    f"{self.where}.outputs.{name}.norm has no effect on a module; name "
                    "the submodule before or after its norm in `from`"
                )
        try:
            probe = self._create("meta")
        # What cannot be built on meta may well be built on a CPU.
        except TeacherError:
            probe = self._create("cpu")
        self.facts = self._make_facts(
            probe, source=request.config.model_name, code_sha256=self._code.sha256
        )

    @property
    def sizes(self) -> tuple[Size | None, ...]:
        """Returns the sizes of the job, or the one that fits the box."""
        return self._sizes

    def inputs(self, size: Size | None) -> dict[str, InputSpec]:
        """Returns how each input is taken; see `Teacher.inputs`."""
        specs: dict[str, InputSpec] = {}
        config = self.request.config.preprocess
        for item in self.request.group:
            if item.kind == "points":
                specs[item.name] = points_spec(config, item, self.where)
                continue
            assert size is not None, "an image has a size"
            frame = image_spec(
                config,
                size,
                interpolation="bilinear",
                mean=(0.0, 0.0, 0.0),
                std=(1.0, 1.0, 1.0),
                where=self.where,
            )
            is_clip = item.kind == "clip"
            specs[item.name] = ClipSpec(frame, item.frames) if is_clip else frame
        return specs

    def _create(self, device: str) -> nn.Module:
        config = self.request.config
        what = f"{self.where}.model: {config.model_name}(**args) must be built"
        with (
            _as_teacher_error(),
            explained(what),
            building_on(device),
            seeded(self._weights.seed),
        ):
            model = self._code.make(**config.args)
        if not isinstance(model, nn.Module):
            raise TeacherError(
                f"{self.where}.model must be a torch.nn.Module, got "
                f"{type(model).__name__} from {config.model_name}"
            )
        if not callable(getattr(model, config.method, None)):
            methods = [
                name
                for name, value in inspect.getmembers(type(model), callable)
                if name not in dir(nn.Module)
            ]
            raise TeacherError(
                f"{self.where}.method must be a method of {type(model).__name__}, got "
                f"{config.method!r} (its own: forward, {', '.join(methods)})"
            )
        return model

    def _blueprint(self, size: Size | None, device: str) -> nn.Module:
        del size
        return self._create(device)

    def _build(self, size: Size | None) -> nn.Module:
        del size
        for built in self._models.values():
            return built
        model = self._create("cpu")
        if self._weights.kind == "file":
            with local_path(self.request, self._weights) as path:
                state = read_state_dict(path, self._weights.url)
                load_strict(model, state, self._weights.url)
        return model

    def _taps(
        self, model: nn.Module, batch: Mapping[str, Tensor], size: Size | None
    ) -> dict[str, Tap]:
        config = self.request.config
        sources = {
            name: parse_source(item, f"{self.where}.outputs.{name}")
            for name, item in config.outputs.items()
        }
        paths = {path for path, _ in sources.values()} - {_RETURNED}
        self._check_paths(model, paths)
        with recording(model, outputs=paths) as seen:
            call = (
                model if config.method == "forward" else getattr(model, config.method)
            )
            inputs = {item.name: batch[item.name] for item in self.request.group}
            is_single = len(inputs) == 1
            returned = call(*inputs.values()) if is_single else call(**inputs)
        taps = {}
        for name, (path, indices) in sources.items():
            entry = f"{self.where}.outputs.{name}"
            if path == _RETURNED:
                found = returned
            else:
                found = self._only(seen(path, False), path, entry)
            value = follow(found, path, indices, entry)
            taps[name] = Tap(
                to_channels_last(value, config.outputs[name], entry, name == _POINTS),
                None,
                config.outputs[name].source or _RETURNED,
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


def parse_source(config: OutputConfig, entry: str) -> tuple[str, tuple[str, ...]]:
    """Returns the submodule's path, or ``output``, and the indices of a ``from``.

    Raises:
        TeacherError: it is written differently.
    """
    text = config.source or _RETURNED
    match = _SOURCE.fullmatch(text)
    if match is None:
        raise TeacherError(
            f"{entry}.from must be `output` or a submodule's path, then [index] or "
            f"[key] where it is a tuple or dict, got {text!r}"
        )
    indices = re.findall(r"\[([^\[\]]+)\]", match["indices"])
    return match["path"], tuple(item.strip().strip("'\"") for item in indices)


def follow(value: Any, path: str, indices: tuple[str, ...], entry: str) -> Tensor:
    """Returns the tensor that indices and keys lead to.

    Raises:
        TeacherError: they lead nowhere, or stop at several tensors; the message lists
            what is there, with shapes.
    """
    so_far = path
    for index in indices:
        try:
            if isinstance(value, Mapping):
                value = value[index if index in value else int(index)]
            elif isinstance(value, (tuple, list)):
                value = value[int(index)]
            else:
                value = getattr(value, index)
        except (KeyError, IndexError, ValueError, AttributeError):
            raise TeacherError(
                f"{entry}.from must lead to a tensor, got [{index}] of {so_far}, which "
                f"has {_contents(value)}"
            ) from None
        so_far += f"[{index}]"
    if not isinstance(value, Tensor):
        raise TeacherError(
            f"{entry}.from must say which tensor of {so_far} is meant, it has "
            f"{_contents(value)}; write `from: {so_far}[...]`"
        )
    return value


def _contents(value: Any) -> str:
    if isinstance(value, Mapping):
        items = list(value.items())
    elif isinstance(value, (tuple, list)):
        items = list(enumerate(value))
    elif isinstance(value, Tensor):
        return f"nothing: it is a tensor of shape {list(value.shape)}"
    else:
        return f"no known parts: it is a {type(value).__name__}"
    parts = [
        f"[{key}] {list(it.shape) if isinstance(it, Tensor) else type(it).__name__}"
        for key, it in items[:_SHOWN]
    ]
    return ", ".join(parts) + (", ..." if len(items) > _SHOWN else "")


def to_channels_last(
    tensor: Tensor, config: OutputConfig, entry: str, is_points: bool = False
) -> Tensor:
    """Returns an output as (B, C), (B, H, W, C), (B, T, H, W, C) or (B, P, C).

    Args:
        tensor: as the module gives it.
        config: says its layout and grid.
        entry: in the job, for messages.
        is_points: whether its tokens are the points given, which lie on no grid.

    Raises:
        TeacherError: its rank is not that of its layout, or needs one to be given.
    """
    shape = list(tensor.shape)
    layout = config.layout or _LAYOUT_OF_RANK.get(tensor.ndim)
    if is_points and tensor.ndim == 3:
        layout = config.layout or "nlc"
    if layout is None or _RANK_OF_LAYOUT[layout] != tensor.ndim:
        hint = "give `layout: nlc` and `grid: [H, W]`" if tensor.ndim == 3 else ""
        raise TeacherError(
            f"{entry} must be (batch, channels) or (batch, channels, height, width)"
            f"{f' for layout {layout}' if layout else ''}, got {shape}; "
            f"{hint or 'take another tensor'}"
        )
    if is_points != (tensor.ndim == 3 and config.grid is None):
        raise TeacherError(
            f"{entry} must be (batch, points, channels) without a grid where it is "
            f"named points, and on a grid elsewhere, got {shape}; give it another "
            "name, or `layout: nlc` and `grid: [H, W]`"
        )
    if config.grid is not None and layout not in ("nlc", "ncl"):
        raise TeacherError(
            f"{entry}.grid is for layout nlc, got {layout}; leave it out"
        )
    if layout == "nchw":
        return channels_last(tensor)
    if layout == "ntchw":
        return tensor.permute(0, 1, 3, 4, 2)
    if layout == "ncl":
        tensor = tensor.transpose(1, 2)
    if config.grid is None:
        return tensor
    if math.prod(config.grid) != tensor.shape[1]:
        raise TeacherError(
            f"{entry}.grid must be [H, W] with H x W = {tensor.shape[1]} tokens, or "
            f"[T, H, W], got {list(config.grid)}"
        )
    return tensor.reshape(shape[0], *config.grid, tensor.shape[2])


def describe(name: str, base: str) -> dict[str, Any]:
    """Returns the class's arguments and, where it can be built without any, its parts.

    Raises:
        TeacherError: the file or the class is not there.
    """
    code = _load(name, base, "teachers")
    facts: dict[str, Any] = {
        "code_sha256": code.sha256,
        "arguments": str(inspect.signature(code.make)),
        "summary": (code.make.__doc__ or "").strip().partition("\n")[0],
    }
    # Without its arguments a class may well refuse to be built; then that is all.
    with contextlib.suppress(Exception), building_on("meta"):
        model = freeze(code.make())
        facts["num_parameters"] = sum(item.numel() for item in model.parameters())
        facts["submodules"] = [path for path, _ in model.named_modules() if path]
    return facts
