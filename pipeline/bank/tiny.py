"""The preset ``tiny``: a grid in four bits per value, and a scale per 32 channels.

Fifteen levels are few: a scale of its own for every 32 channels of a cell makes the
angle to the exact values half of what one scale per cell does, for an eighth more
bytes. Which scale was measured to be best, and what was not, is in decision 0020.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from pipeline.bank.arrays import ArraySpec
from pipeline.bank.encoding import Array, register
from pipeline.bank.standardised import (
    Floats,
    Standardised,
    inverse,
    up_to_float16,
)

LARGEST_CODE = 7
MISSING_BYTE = 0x88
"""Two codes of -8, which no value has."""

# The codes of each byte: channel 2i in its lower, 2i + 1 in its upper four bits, both
# as two's complements.
_NIBBLES = np.arange(256)[:, None] >> np.array([0, 4]) & 15
CODES_OF_BYTE = np.where(_NIBBLES == 8, np.nan, (_NIBBLES ^ 8) - 8).astype(np.float32)


@register("tiny")
@dataclass(frozen=True, kw_only=True)
class Tiny(Standardised):
    """4-bit codes of standardised cells, -7..7, and a float16 scale for each group.

    The scale of a group of channels of a cell is the largest magnitude of its
    standardised values / 7, rounded upwards. With an odd number of channels the upper
    half of a cell's last byte is 0.

    Attributes:
        group: neighbouring channels that share a scale; the last group may have fewer.
    """

    group: int = 32

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.group < 1:
            self._refuse("group", "be at least 1", self.group)

    def to_json(self) -> dict[str, Any]:
        """Returns JSON values, the length of a group among them."""
        return {**super().to_json(), "group": self.group}

    @property
    def _num_groups(self) -> int:
        return -(-self.shape[-1] // self.group)

    def arrays(self, path: str, block_rows: int) -> tuple[ArraySpec, ...]:
        """Returns codes, a scale per cell and group, mean and deviation per row."""
        cells, num_channels = self._axes[:-1], self.shape[-1]
        attributes = {
            "channels": num_channels,
            "group": self.group,
            "decode": "float32: code * scale (per cell and group of channels) * std + "
            "mean (per row and channel); code 2i is in the lower, 2i + 1 in the upper "
            "4 bits of byte i, a two's complement each; code -8 and fill are missing",
        }
        codes = (*cells, ("byte", (num_channels + 1) // 2))
        return self._specs(
            path,
            block_rows,
            ("uint8", codes, MISSING_BYTE),
            (*cells, ("group", self._num_groups)),
            attributes,
        )

    def _quantise(self, z_NC: Floats) -> tuple[Array, npt.NDArray[np.float16]]:
        """Returns pairs of codes, (N, ceil(C / 2)) uint8, and scales, (N, groups)."""
        num_channels = self.shape[-1]
        # Zeros behind the last channel are never a group's largest magnitude.
        z_NC = self._padded(z_NC, self._num_groups * self.group)
        z_NGg = z_NC.reshape(len(z_NC), self._num_groups, self.group)
        # Without their signs, floats are in the order of their bits: half the time.
        bits_NGg = z_NGg.view(np.uint32) & np.uint32(0x7FFFFFFF)
        peak_NG = bits_NGg.max(axis=2).view(np.float32)
        scale_NG = up_to_float16(peak_NG / np.float32(LARGEST_CODE))
        z_NGg *= inverse(scale_NG)[..., None]
        codes_NC = np.rint(z_NC, z_NC).astype(np.int8).view(np.uint8)
        num_nibbles = num_channels + num_channels % 2
        codes_NC = self._padded(codes_NC[:, :num_channels], num_nibbles)
        pairs = codes_NC.view("<u2")
        return (pairs & 15 | pairs >> 4 & 0xF0).astype(np.uint8), scale_NG

    def _padded(self, values_NC: Array, length: int) -> Array:
        """Returns (N, length), zeros behind what there is; itself where nothing is."""
        if values_NC.shape[1] >= length:
            return values_NC
        found = np.zeros((len(values_NC), length), values_NC.dtype)
        found[:, : values_NC.shape[1]] = values_NC
        return found

    def _restore(self, codes: Array, scale: npt.NDArray[np.float16]) -> Floats:
        """Returns codes * scale, (..., C)."""
        values = CODES_OF_BYTE.take(codes, axis=0)
        values = values.reshape(*codes.shape[:-1], -1)[..., : self.shape[-1]]
        return values * self._steps(scale)

    def _steps(self, scale: npt.NDArray[np.float16]) -> Floats:
        """Returns (..., C)."""
        steps = scale.astype(np.float32).repeat(self.group, axis=-1)
        return steps[..., : self.shape[-1]]
