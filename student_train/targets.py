"""A teacher's output as a target: found in a bank, stored values, float32 in torch.

Targets travel as they are stored (bfloat16 as 2 bytes) and are decoded where the
student is. ``decode`` gives the numbers of ``pipeline.bank``'s own decoding; a test
holds both together.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from manifests.bank import OutputEntry
from pipeline.bank.encoding import Encoding
from pipeline.bank.encodings import encoding_from_json
from pipeline.bank.open import Bank
from pipeline.bank.tiny import Tiny
from pipeline.bank.topk import TopK
from student_train.errors import TrainingError
from student_train.normalisation import Normaliser
from student_train.padding import Padding, spread_picture


@dataclass(frozen=True, eq=False)
class TargetSource:
    """One output of a bank, as a target.

    Attributes:
        path: ``<teacher>/<group>/<size>/<output>``.
        entry: what the bank says of it.
        normaliser: None where it is not normalised.
        padding: how the teacher's input was padded; None where it was not.
    """

    path: str
    entry: OutputEntry
    normaliser: Normaliser | None
    padding: Padding | None = None

    @classmethod
    def open(cls, bank: Bank, path: str, normalise: bool) -> TargetSource:
        """Returns the target of an output.

        Raises:
            BankError: the bank has no such output, or no statistics of it.
        """
        normaliser = None
        if normalise:
            normaliser = Normaliser.of("standardise", bank.statistics(path))
        return cls(path, bank.output(path), normaliser, Padding.of(bank, path))

    @property
    def row_shape(self) -> tuple[int, ...]:
        """Shape of a row of `Target.values`."""
        if self.padding is None:
            return self.entry.shape
        return (*self.padding.grid, self.entry.shape[-1])

    @cached_property
    def encoding(self) -> Encoding:
        """How it is stored."""
        return encoding_from_json(self.entry.encoding)


@dataclass(frozen=True, eq=False)
class Target:
    """A batch of one target.

    Attributes:
        source: which output of the bank.
        arrays: from each suffix of its encoding to (B, ...) as stored; bfloat16 are
            ``torch.bfloat16``.
        valid: (B,) bool; other rows hold *missing*.
        shares: (B, 2) how much of a padded input the picture fills, y and x; None
            where nothing was padded.
    """

    source: TargetSource
    arrays: dict[str, Tensor]
    valid: Tensor
    shares: Tensor | None = None

    def values(self, temperature: float | None = None) -> Tensor:
        """Returns (B, *source.row_shape) float32, normalised; invalid rows are NaN.

        A grid lies on the view's box, also where the teacher's input was padded.

        Args:
            temperature: at which the mass of top-k's other logits is kept; the first
                that is stored where omitted.
        """
        decoded = decode(self.source.encoding, self.arrays, temperature)
        normaliser = self.source.normaliser
        values = (
            decoded if normaliser is None else normaliser.to(decoded.device)(decoded)
        )
        padding = self.source.padding
        if padding is None or self.shares is None:
            return values
        return spread_picture(values, self.shares, padding.grid)

    def to(self, device: torch.device | str) -> Target:
        """Returns it on a device, still encoded."""
        arrays = {
            suffix: one.to(device, non_blocking=True)
            for suffix, one in self.arrays.items()
        }
        shares = self.shares
        return Target(
            self.source,
            arrays,
            self.valid.to(device, non_blocking=True),
            None if shares is None else shares.to(device, non_blocking=True),
        )


def as_stored(
    values: npt.NDArray[np.generic], encoding: Encoding, suffix: str
) -> Tensor:
    """Returns stored values as a tensor of the same memory, bfloat16 by their type.

    Args:
        values: (B, ...), the stored type.
        encoding: of the output.
        suffix: which of its arrays.
    """
    tensor = torch.from_numpy(values)
    # Ids of top-k are uint16 too, but they are numbers.
    if encoding.dtype == "bfloat16" and suffix != "_index":
        return tensor.view(torch.bfloat16) if tensor.dtype == torch.uint16 else tensor
    return tensor


def decode(
    encoding: Encoding, arrays: Mapping[str, Tensor], temperature: float | None = None
) -> Tensor:
    """Returns float32 (B, *shape) of stored values; missing rows are NaN.

    Args:
        encoding: how they are stored.
        arrays: from each of its suffixes to the stored rows, on any device.
        temperature: one of those of top-k; the first where omitted.

    Raises:
        TrainingError: no decoding of that encoding is known here.
    """
    if isinstance(encoding, TopK):
        return _decode_topk(encoding, arrays, temperature)
    decoder = _DECODERS.get(encoding.preset)
    if decoder is None:
        raise TrainingError(
            f"encoding of a target must be one of {sorted([*_DECODERS, 'topk'])}, got "
            f"{encoding.preset!r} (output {encoding.name})"
        )
    return decoder(encoding, arrays)


def _decode_plain(encoding: Encoding, arrays: Mapping[str, Tensor]) -> Tensor:
    return arrays[""].to(torch.float32)


def _decode_topk(
    encoding: TopK, arrays: Mapping[str, Tensor], wanted: float | None
) -> Tensor:
    """Returns dense logits: the k largest, the others alike with their mass kept."""
    value = arrays["_value"].to(torch.float32)
    index = arrays["_index"].to(torch.int64)
    missing = value[..., :1].isnan()
    index = torch.where(missing, 0, index)
    shape = (*index.shape[:-1], encoding.num_classes)
    num_others = encoding.num_classes - encoding.topk
    if num_others:
        temperature = encoding.temperatures[0] if wanted is None else wanted
        column = encoding.temperatures.index(temperature)
        rest = arrays["_rest"][..., column : column + 1].to(torch.float64)
        tail = temperature * (rest - math.log(num_others))
        # Rounding must not lift the others above the smallest logit that is kept.
        tail = torch.minimum(tail.to(torch.float32), value[..., -1:])
        dense = tail.expand(shape).clone()
    else:
        dense = value.new_empty(shape)
    dense.scatter_(-1, index, value)
    return dense.masked_fill_(missing, math.nan)


def _decode_compact(encoding: Encoding, arrays: Mapping[str, Tensor]) -> Tensor:
    """Returns codes * scale * std + mean; missing cells have a scale of NaN."""
    scale = arrays["_scale"].to(torch.float32).unsqueeze(-1)
    return _unstandardised(arrays[""].to(torch.float32).mul_(scale), arrays)


def _decode_tiny(encoding: Encoding, arrays: Mapping[str, Tensor]) -> Tensor:
    """Returns codes * scale * std + mean of codes of 4 bits, scales of groups."""
    assert isinstance(encoding, Tiny)
    pairs, scale = arrays[""], arrays["_scale"].to(torch.float32)
    nibbles = torch.stack((pairs & 15, pairs >> 4), -1).flatten(-2)
    # Two's complements of 4 bits: the sign is extended to 8.
    codes = nibbles.bitwise_xor_(8).sub_(8).view(torch.int8)
    values = codes[..., : encoding.shape[-1]].to(torch.float32)
    # In place, without a scale for each value: half the time on a CPU.
    whole, rest = divmod(encoding.shape[-1], encoding.group)
    last = whole * encoding.group
    grouped = values[..., :last].unflatten(-1, (whole, encoding.group))
    grouped.mul_(scale[..., :whole, None])
    if rest:
        values[..., last:].mul_(scale[..., whole:])
    return _unstandardised(values, arrays)


def _unstandardised(values: Tensor, arrays: Mapping[str, Tensor]) -> Tensor:
    """Returns values * std + mean of their rows; overwrites them."""
    one_per_row = (-1, *[1] * (values.ndim - 2), values.shape[-1])
    # In place and one operation at a time, each rounded as NumPy rounds it.
    values.mul_(arrays["_std"].view(one_per_row))
    return values.add_(arrays["_mean"].view(one_per_row))


_DECODERS: dict[str, Callable[[Encoding, Mapping[str, Tensor]], Tensor]] = {
    "raw": _decode_plain,
    "lossless": _decode_plain,
    "half": _decode_plain,
    "compact": _decode_compact,
    "tiny": _decode_tiny,
}


def find_output(bank: Bank, source: str, student_input: str, where: str) -> str:
    """Returns the path in the bank of what a recipe calls ``<teacher>/<output>``.

    Args:
        bank: an open bank.
        source: ``<teacher>/<output>``, ``<teacher>/<group>/<output>`` or
            ``<teacher>/<group>/<size>/<output>``.
        student_input: the input that a group of one is preferred for.
        where: its entry in the recipe, for messages.

    Raises:
        TrainingError: the bank has none such, or several.
    """
    steps = source.split("/")
    teachers = {path.split("/")[0] for path in bank.outputs}
    if steps[0] not in teachers:
        raise TrainingError(
            f"{where}: teacher must be one of the bank's "
            f"({', '.join(sorted(teachers))}), got {steps[0]!r}"
        )
    matches = [path for path in bank.outputs if _matches(path.split("/"), steps)]
    if len(matches) > 1:
        own = [
            path for path in matches if bank.pass_of(path).inputs == (student_input,)
        ]
        matches = own or matches
    if not matches:
        held = [path for path in bank.outputs if path.startswith(steps[0] + "/")]
        raise TrainingError(
            f"{where}: the bank must have the output, got {source!r}; of {steps[0]} it "
            f"has {', '.join(held)}"
        )
    if len(matches) > 1:
        raise TrainingError(
            f"{where}: {source!r} must name one output, it could be any of "
            f"{', '.join(matches)}; write it whole"
        )
    return matches[0]


def _matches(path: list[str], steps: list[str]) -> bool:
    teacher, group, size, output = path
    return steps in (
        [teacher, output],
        [teacher, group, output],
        [teacher, group, size, output],
    )
