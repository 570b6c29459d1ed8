"""A model's own evaluation transform: told as data, made again by its own library.

What runs is the library's function with the arguments that are kept in a bank's
provenance, on the upright RGB image: resize, crop, arithmetic and all, bit for bit.
"""

from __future__ import annotations

import functools
import importlib
import json
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from teachers.errors import TeacherError

TIMM = "timm.data.create_transform"
OPEN_CLIP = "open_clip.image_transform"
_CALLS = (TIMM, OPEN_CLIP)

Transform = Callable[[Image.Image], Any]


def tell_transform(call: str, arguments: Mapping[str, Any]) -> str:
    """Returns the JSON from which `run_transform` makes the transform.

    Args:
        call: `TIMM` or `OPEN_CLIP`.
        arguments: of the call; JSON values, tuples taken for lists.
    """
    return json.dumps({"call": call, "arguments": dict(arguments)}, sort_keys=True)


def run_transform(told: str, image: Image.Image) -> NDArray[np.float32]:
    """Returns what a model takes of an image: (3, H, W) float32.

    Args:
        told: by `tell_transform`.
        image: upright RGB, whole.

    Raises:
        TeacherError: no such call is known, or its library does not take the arguments.
    """
    pixels: NDArray[np.float32] = make_transform(told)(image).numpy()
    return pixels


@functools.cache
def make_transform(told: str) -> Transform:
    """Returns the library's own transform; the same one for equal arguments.

    Raises:
        TeacherError: no such call is known, or its library does not take the arguments.
    """
    data = json.loads(told)
    call, given = data["call"], data["arguments"]
    if call not in _CALLS:
        raise TeacherError(
            f"a model's own transform must be made by one of {', '.join(_CALLS)}, got "
            f"{call!r}; it was written by another version, use that one"
        )
    module, _, name = call.rpartition(".")
    arguments = {
        key: tuple(value) if isinstance(value, list) else value
        for key, value in given.items()
    }
    try:
        made: Transform = getattr(importlib.import_module(module), name)(**arguments)
    # open_clip checks what it takes with assert.
    except (AssertionError, TypeError, ValueError, KeyError) as error:
        raise TeacherError(
            f"{call} must take {given}, got {type(error).__name__}: {error}; leave "
            "`preprocess.geometry` out, or change what overrides the model's own"
        ) from error
    return made
