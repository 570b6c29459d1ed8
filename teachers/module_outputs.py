"""What leaves a model that is somebody's own, and where the job says it lies in it.

Owns the words of an output's ``from``, ``layout`` and ``grid``. ``from`` is ``output``
(the default) for what the model returns, or the path of a submodule whose output is
meant; indices and keys in brackets lead into tuples and dicts: ``encoder[2]``,
``output[logits]``.

Shape suffixes: B batch, T frames, P points, H and W grid, C channels.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from manifests.teacher import OutputConfig
from teachers.errors import TeacherError
from teachers.torch_teacher import channels_last

RETURNED = "output"
"""In a ``from``: what the model returns."""

_SOURCE = re.compile(r"(?P<path>\w+(?:\.\w+)*)(?P<indices>(?:\[[^\[\]]+\])*)")
_LAYOUT_OF_RANK = {2: "nc", 4: "nchw", 5: "ntchw"}
_RANK_OF_LAYOUT = {"nc": 2, "nchw": 4, "nhwc": 4, "nlc": 3, "ncl": 3, "ntchw": 5}
_SHOWN = 8


def parse_source(config: OutputConfig, entry: str) -> tuple[str, tuple[str, ...]]:
    """Returns the submodule's path, or ``output``, and the indices of a ``from``.

    Raises:
        TeacherError: it is written differently.
    """
    text = config.source or RETURNED
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
