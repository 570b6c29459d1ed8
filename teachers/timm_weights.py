"""What timm's loaders leave out without an error, found out and refused.

Owns two gaps in an otherwise strict load. Some of timm's models are loaded loosely and
names that found no weights are only logged. And of checkpoints in DINOv3's own layout
(DINOv3, EUPE) the attention's biases are printed and dropped where the model has none:
right for DINOv3's B, L, H and 7B, whose biases are zero, wrong for EUPE's.
"""

from __future__ import annotations

import contextlib
import logging
import pickle
import re
import sys
from collections.abc import Iterator, Mapping

import timm.models
import torch
from safetensors import safe_open
from timm.models.eva import Eva
from torch import Tensor, nn

from teachers.errors import TeacherError

_LOG = logging.getLogger("timm.models._builder")
_BIAS = ".attn.qkv.bias"
_DINOV3_KEY = "storage_tokens"


class _Missing(logging.Handler):
    """Keeps the names that timm says it found no weights for."""

    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self.names: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        """Takes the names from one line of the log."""
        if match := re.match(r"Missing keys \((.+?)\) discovered", record.getMessage()):
            self.names += match[1].split(", ")


@contextlib.contextmanager
def recording_missing() -> Iterator[list[str]]:
    """Yields the list of parameters that timm finds no weights for in this context.

    What timm prints meanwhile goes to stderr. One load at a time, as all of ours are
    (`teachers.torch_teacher.seeded`).
    """
    handler, level = _Missing(), _LOG.level
    _LOG.addHandler(handler)
    _LOG.setLevel(logging.INFO)
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield handler.names
    finally:
        _LOG.setLevel(level)
        _LOG.removeHandler(handler)


def has_attention_biases(model: nn.Module) -> bool:
    """Tells whether a model keeps the attention biases of DINOv3's own layout."""
    if not isinstance(model, Eva):
        return True
    attention = model.blocks[0].attn
    return any(
        getattr(attention, name, None) is not None for name in ("q_bias", "q_proj")
    )


def dinov3_biases(path: str) -> dict[str, Tensor]:
    """Returns the attention biases of a file in DINOv3's own layout, {} of another.

    Nothing else of the file is read into memory.
    """
    with open(path, "rb") as file:
        is_safetensors = file.read(9)[8:] == b"{"
    if is_safetensors:
        with safe_open(path, "pt") as tensors:
            names = list(tensors.keys())
            found = [name for name in names if name.endswith(_BIAS)]
            is_dinov3 = _DINOV3_KEY in names
            return {name: tensors.get_tensor(name) for name in found if is_dinov3}
    try:
        state = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except (RuntimeError, pickle.UnpicklingError):
        # Of before torch 1.6; DINOv3 is younger.
        return {}
    if not isinstance(state, Mapping) or _DINOV3_KEY not in state:
        return {}
    return {name: value for name, value in state.items() if name.endswith(_BIAS)}


def check_no_biases(state: Mapping[str, Tensor], model: str, name: str) -> None:
    """Checks that the attention biases which timm leaves out are zero.

    Those of the keys, the middle third, are masked in DINOv3's own code too.

    Args:
        state: of DINOv3's layout; others have no such names.
        model: timm's name of it.
        name: what to call the file in messages.

    Raises:
        TeacherError: they are not; with the architecture that has them.
    """
    if _DINOV3_KEY not in state and not all(key.endswith(_BIAS) for key in state):
        return
    lost = [
        key
        for key, value in state.items()
        if key.endswith(_BIAS)
        and any(part.any() for part in (value.chunk(3)[0], value.chunk(3)[2]))
    ]
    if lost:
        architecture = timm.models.split_model_name_tag(model)[0]
        other = f"{architecture}_qkvb"
        hint = f"use model: timm:{other}" if timm.models.is_model(other) else "use one"
        raise TeacherError(
            f"weights must have exactly the model's parameters, got {len(lost)} "
            f"attention biases ({lost[0]}, ...) that {architecture} does not have "
            f"({name}); {hint} that has them"
        )
