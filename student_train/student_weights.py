"""What a student starts from: the words of a recipe's ``weights:``, and files of them.

Owns reading and strict loading. Only tensors are ever read: safetensors, and torch
files with ``weights_only=True``. timm's own pretrained weights are `students`'.
"""

from __future__ import annotations

import io
import pickle
import re
from collections.abc import Collection, Mapping
from typing import Any, Literal, NamedTuple

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from manifests.errors import StorageError
from manifests.loading import is_weights_file, resolve_path
from manifests.storage import read_url
from student_train.errors import TrainingError, reason_of

_CONTAINERS = ("state_dict", "model", "model_state_dict")
# Of DistributedDataParallel, torch.compile, and a whole `Student`.
_PREFIXES = ("module.", "_orig_mod.", "model.")
_SHOWN = 5


class Start(NamedTuple):
    """What a student starts from: drawn from ``seed``, then replaced by what it says.

    Attributes:
        kind: of ``weights:``.
        seed: of the drawing, which precedes any loading.
        url: of a file.
    """

    kind: Literal["random", "pretrained", "file"]
    seed: int
    url: str = ""


def parse_start(weights: str | None, seed: int, base: str) -> Start:
    """Returns what ``weights:`` means.

    Args:
        weights: None, ``random``, ``random:SEED``, ``pretrained`` or a file.
        seed: the recipe's, for all that names none.
        base: folder that a relative path starts from.

    Raises:
        TrainingError: it is none of these.
    """
    if weights in (None, "random"):
        return Start("random", seed)
    assert weights is not None
    if weights == "pretrained":
        return Start("pretrained", seed)
    if match := re.fullmatch(r"random:(\d{1,18})", weights):
        return Start("random", int(match[1]))
    if is_weights_file(weights):
        return Start("file", seed, resolve_path(weights, base))
    raise TrainingError(
        "student.weights must be a file (.safetensors, .pt), `pretrained`, `random` or "
        f"`random:SEED` with a whole number, got {weights!r}; a tag is part of timm's "
        "name, timm:NAME.TAG"
    )


def read_weights(url: str) -> dict[str, Tensor]:
    """Returns the tensors of a file by parameter name, on the CPU.

    Containers (``state_dict``, ``model``, ``model_state_dict``) are unwrapped and the
    prefixes of wrappers (``module.``, ``_orig_mod.``, ``model.``) removed.

    Raises:
        TrainingError: there is no such file, or it holds something else than tensors.
    """
    try:
        data = read_url(url)
    except StorageError as error:
        raise TrainingError(
            f"student.weights must be a file that can be read, got {url} ({error}); "
            "correct the path"
        ) from error
    try:
        # A safetensors file is a length of eight bytes, then JSON.
        if data[8:9] == b"{":
            return _strip(safetensors.torch.load(data))
        loaded = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except (
        SafetensorError,
        pickle.UnpicklingError,
        RuntimeError,
        EOFError,
        ValueError,
        KeyError,
    ) as error:
        raise TrainingError(
            "student.weights must hold tensors and nothing else, got a file that "
            f"cannot be read so ({url}: {reason_of(error)}); save model.state_dict(), "
            "best as safetensors"
        ) from error
    return _strip(_unwrap(loaded, url))


def _unwrap(loaded: Any, url: str) -> dict[str, Tensor]:
    if isinstance(loaded, Mapping):
        for key in _CONTAINERS:
            if isinstance(loaded.get(key), Mapping):
                return _unwrap(loaded[key], url)
        if loaded and all(isinstance(value, Tensor) for value in loaded.values()):
            return dict(loaded)
    raise TrainingError(
        "student.weights must hold a mapping of names to tensors, alone or under "
        f"{', '.join(_CONTAINERS)}, got a {type(loaded).__name__} of other things "
        f"({url}); save model.state_dict()"
    )


def _strip(state: dict[str, Tensor]) -> dict[str, Tensor]:
    for prefix in (*_PREFIXES, *_PREFIXES):
        if state and all(key.startswith(prefix) for key in state):
            state = {key.removeprefix(prefix): item for key, item in state.items()}
    return state


def load_strict(
    model: nn.Module,
    state: Mapping[str, Tensor],
    name: str,
    unused: Collection[str] = (),
) -> None:
    """Loads every tensor of ``state``, and only if the model has exactly those.

    Args:
        model: changed in place.
        state: by parameter and buffer name.
        name: what to call its source in messages.
        unused: paths of submodules that the source may have and a student never has:
            classifiers.

    Raises:
        TrainingError: with the names that are missing, unexpected or of another shape.
    """
    own = model.state_dict()
    given = {
        key: value
        for key, value in state.items()
        if key in own or key.rpartition(".")[0] not in unused
    }
    # A counter that only training reads; checkpoints from before it existed lack it.
    for key, value in own.items():
        if key.endswith("num_batches_tracked"):
            given.setdefault(key, value)
    wrong = {
        "missing": [key for key in own if key not in given],
        "unexpected": [key for key in given if key not in own],
        "of another shape": [
            f"{key} {tuple(given[key].shape)} for {tuple(value.shape)}"
            for key, value in own.items()
            if key in given and given[key].shape != value.shape
        ],
    }
    if any(wrong.values()):
        parts = [
            f"{len(keys)} {what} ({', '.join(keys[:_SHOWN])}"
            f"{', ...' if len(keys) > _SHOWN else ''})"
            for what, keys in wrong.items()
            if keys
        ]
        raise TrainingError(
            "student.weights must have exactly the student's parameters, got "
            f"{', '.join(parts)} ({name}); are they of this model, with these "
            "student.args (img_size among them)?"
        )
    model.load_state_dict(given, strict=True)
