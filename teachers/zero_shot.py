"""Zero-shot classifiers: class names as directions in a contrastive model's embedding.

Owns the file, its templates and the logits it gives; `teachers.text_tower` makes it,
once, so that no text tower runs beside a teacher. Reading one needs no torch.

The file is safetensors, equal bytes for equal content (its sha256 is part of what an
output is): ``weight`` (class, channel) float32 of unit rows, ``scale`` and ``bias``
float32 scalars; metadata ``classes`` and ``templates`` (JSON lists), ``model`` and
``weights_sha256``. With ``e`` the embedding divided by its length:

    logits = scale * e @ weight.T + bias

Source: Radford et al. 2021, section 3.1.4 (templates are averaged in the embedding);
Zhai et al. 2023, section 3.2 (scale and bias; CLIP has no bias, here 0).

Shape suffixes: B batch, C channels, K classes.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from manifests.errors import StorageError
from manifests.storage import read_url
from teachers.errors import TeacherError
from teachers.interface import TeacherRequest
from teachers.weights import digest, resolve

if TYPE_CHECKING:
    from torch import Tensor

CIFAR_TEMPLATES = tuple(
    f"a {kind}photo of {article} {size}{{}}."
    for article in ("a", "the")
    for kind, size in (
        ("", ""),
        ("blurry ", ""),
        ("black and white ", ""),
        ("low contrast ", ""),
        ("high contrast ", ""),
        ("bad ", ""),
        ("good ", ""),
        ("", "small "),
        ("", "big "),
    )
)
"""The templates where none are given: CLIP's own for CIFAR-10 and CIFAR-100, which suit
any photograph.

Source: data/prompts.md of openai/CLIP.
"""

_BLANK = "{}"
_ALIGNMENT = 8


@dataclass(frozen=True, eq=False)
class Classifier:
    """A zero-shot classifier.

    Attributes:
        weight: (K, C) float32, each row of length 1.
        scale: the exponential of the model's ``logit_scale``.
        bias: added to every logit; 0 where the model has none.
        classes: names, one per row.
        templates: sentences in which ``{}`` stood for a name.
        model: ``FAMILY:NAME`` of the text tower.
        weights_sha256: of the file that held it ('' for random weights).
        sha256: of the classifier's own file.
    """

    weight: npt.NDArray[np.float32]
    scale: float
    bias: float
    classes: tuple[str, ...]
    templates: tuple[str, ...]
    model: str
    weights_sha256: str
    sha256: str = ""
    _on_device: dict[Any, Tensor] = field(default_factory=dict, repr=False)

    def logits(self, embed_BC: Tensor) -> Tensor:
        """Returns float32 logits (B, K) of embeddings of any type, on their device."""
        import torch
        import torch.nn.functional as F

        device = embed_BC.device
        if device not in self._on_device:
            self._on_device[device] = torch.from_numpy(self.weight).to(device)
        unit_BC = F.normalize(embed_BC.to(torch.float32), dim=-1)
        return self.scale * unit_BC @ self._on_device[device].T + self.bias

    def to_json(self) -> dict[str, Any]:
        """Returns everything but the weights as plain JSON values, for provenance."""
        return {
            "classes": list(self.classes),
            "channels": int(self.weight.shape[1]),
            "scale": self.scale,
            "bias": self.bias,
            "templates": list(self.templates),
            "model": self.model,
            "weights_sha256": self.weights_sha256,
            "sha256": self.sha256,
        }

    def to_bytes(self) -> bytes:
        """Returns the file's bytes.

        Written here because safetensors' own writer shuffles metadata with every run.
        """
        tensors = {
            "bias": np.asarray(self.bias, "<f4"),
            "scale": np.asarray(self.scale, "<f4"),
            "weight": np.ascontiguousarray(self.weight, "<f4"),
        }
        header: dict[str, Any] = {
            "__metadata__": {
                "classes": json.dumps(self.classes, ensure_ascii=False),
                "model": self.model,
                "templates": json.dumps(self.templates, ensure_ascii=False),
                "weights_sha256": self.weights_sha256,
            }
        }
        start = 0
        for name, values in tensors.items():
            end = start + values.nbytes
            shape = list(values.shape)
            header[name] = {
                "dtype": "F32",
                "shape": shape,
                "data_offsets": [start, end],
            }
            start = end
        text = json.dumps(header, sort_keys=True, separators=(",", ":")).encode()
        text += b" " * (-len(text) % _ALIGNMENT)
        parts = [len(text).to_bytes(8, "little"), text]
        return b"".join([*parts, *(values.tobytes() for values in tensors.values())])


def read_classifier(url: str, where: str) -> Classifier:
    """Returns the classifier in a file.

    Args:
        url: path or URL.
        where: the output's entry in the job, for messages.

    Raises:
        TeacherError: there is none, or it contradicts itself.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import load

    data = _read(url, where)
    try:
        tensors = load(data)
        size = int.from_bytes(data[:8], "little")
        told = json.loads(data[8 : 8 + size]).get("__metadata__", {})
        found = Classifier(
            weight=tensors["weight"],
            scale=float(tensors["scale"].reshape(())),
            bias=float(tensors["bias"].reshape(())),
            classes=tuple(json.loads(told["classes"])),
            templates=tuple(json.loads(told["templates"])),
            model=told["model"],
            weights_sha256=told["weights_sha256"],
            sha256=hashlib.sha256(data).hexdigest(),
        )
    except (SafetensorError, KeyError, ValueError, TypeError, IndexError) as error:
        raise TeacherError(
            f"{where}.classifier must be a file that `teachonce teachers MODEL "
            f"--classes` made, got {url} ({type(error).__name__}: {error}); make it "
            "anew"
        ) from error
    is_matrix = found.weight.ndim == 2 and found.weight.dtype == np.float32
    if not is_matrix or len(found.weight) != len(found.classes) or not found.classes:
        raise TeacherError(
            f"{where}.classifier must hold a float32 row of weights per class, got "
            f"{found.weight.dtype} {list(found.weight.shape)} for "
            f"{len(found.classes)} classes ({url}); make it anew"
        )
    numbers = (found.scale, found.bias, float(np.abs(found.weight).max(initial=0)))
    if not all(math.isfinite(number) for number in numbers):
        raise TeacherError(
            f"{where}.classifier must be finite, got scale, bias and largest weight "
            f"{numbers} ({url}); make it anew"
        )
    return found


def _read(url: str, where: str) -> bytes:
    try:
        return read_url(url)
    except StorageError as error:
        raise TeacherError(
            f"{where}.classifier must be a file that can be read, got {url} ({error}); "
            "make it with `teachonce teachers MODEL --classes classes.txt --to FILE`, "
            "and where other machines run the job put it where they can read it "
            "(gs://...)"
        ) from error


def classifier_url(request: TeacherRequest, output: str) -> str | None:
    """Returns where the classifier of an output lies, None where it has none."""
    path = request.config.outputs[output].classifier
    return None if path is None else resolve(request.base, path)


def classifier_digests(request: TeacherRequest) -> dict[str, str]:
    """Returns the sha256 of the classifiers of a teacher's outputs by output name.

    Raises:
        TeacherError: one cannot be read.
    """
    found = {}
    for name in request.config.outputs:
        url = classifier_url(request, name)
        if url is not None:
            try:
                found[name] = digest(url)
            except StorageError:
                _read(url, f"teachers.{request.name}.outputs.{name}")
                raise
    return found


def check_names(names: Sequence[str], where: str) -> tuple[str, ...]:
    """Returns class names, one per line of a file that is not blank.

    Raises:
        TeacherError: there are fewer than two, or one comes twice.
    """
    classes = tuple(line.strip() for line in names if line.strip())
    if len(classes) < 2:
        raise TeacherError(
            f"classes must be two or more, one per line, got {len(classes)} ({where})"
        )
    if doubled := [name for name in dict.fromkeys(classes) if classes.count(name) > 1]:
        raise TeacherError(
            f"classes must differ, got {doubled[0]!r} more than once ({where}); leave "
            "one out"
        )
    return classes


def check_templates(lines: Sequence[str], where: str) -> tuple[str, ...]:
    """Returns templates, one per line of a file that is not blank.

    Raises:
        TeacherError: there is none, or one has no place for the name, or several.
    """
    templates = tuple(line.strip() for line in lines if line.strip())
    bad = [line for line in templates if line.count(_BLANK) != 1]
    if bad or not templates:
        raise TeacherError(
            f"templates must hold {_BLANK} once, where the class is named, got "
            f"{bad[0] if bad else 'no template'!r} ({where}); write such as "
            f"{CIFAR_TEMPLATES[0]!r}"
        )
    return templates


def sentences(classes: Sequence[str], templates: Sequence[str]) -> list[str]:
    """Returns every template with every name in it, name by name."""
    return [text.replace(_BLANK, name) for name in classes for text in templates]


def make_weight(
    embed_NC: npt.NDArray[np.float32], num_templates: int
) -> npt.NDArray[np.float32]:
    """Returns (K, C) float32: per class the direction of the mean of its sentences.

    Args:
        embed_NC: embeddings of `sentences`, N = K * num_templates, of any length.
        num_templates: sentences of a class.

    Raises:
        TeacherError: an embedding has no direction.

    Source: Radford et al. 2021, section 3.1.4; open_clip's build_zero_shot_classifier.
    """
    unit_NC = _unit(embed_NC.astype(np.float64))
    mean_KC = unit_NC.reshape(-1, num_templates, embed_NC.shape[1]).mean(axis=1)
    return _unit(mean_KC).astype(np.float32)


def _unit(rows: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    length = np.linalg.norm(rows, axis=1, keepdims=True)
    if not (np.isfinite(length) & (length > 0)).all():
        raise TeacherError(
            "text embeddings must be finite and not zero; are the weights whole?"
        )
    unit: npt.NDArray[np.float64] = rows / length
    return unit


def to_text(facts: Mapping[str, Any]) -> str:
    """Returns one line for people from what `Classifier.to_json` gives."""
    return (
        f"{len(facts['classes'])} classes x {facts['channels']} channels, "
        f"{len(facts['templates'])} templates, scale {facts['scale']:.4g}, bias "
        f"{facts['bias']:.4g}, sha256 {facts['sha256'][:12]}"
    )
