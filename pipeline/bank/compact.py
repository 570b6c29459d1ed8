"""The preset ``compact``: a grid in one byte per value, and a scale per cell."""

from __future__ import annotations

from dataclasses import dataclass

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

MISSING_CODE = -128
LARGEST_CODE = 127


@register("compact")
@dataclass(frozen=True, kw_only=True)
class Compact(Standardised):
    """int8 codes of standardised cells, -127..127, and a float16 scale for each cell.

    A cell's scale is the largest magnitude of its standardised values / 127, rounded
    upwards.
    """

    def arrays(self, path: str, block_rows: int) -> tuple[ArraySpec, ...]:
        """Returns codes, a scale per cell, and mean and deviation per row."""
        attributes = {
            "decode": "float32: code * scale (per cell) * std + mean (per row and "
            "channel); fill is missing"
        }
        codes = "int8", self._axes, MISSING_CODE
        return self._specs(path, block_rows, codes, self._axes[:-1], attributes)

    def _quantise(self, z_NC: Floats) -> tuple[Array, npt.NDArray[np.float16]]:
        """Returns codes, (N, C) int8, and scales, (N,)."""
        peak_N = np.maximum(z_NC.max(axis=1), -z_NC.min(axis=1))
        scale_N = up_to_float16(peak_N / np.float32(LARGEST_CODE))
        z_NC *= inverse(scale_N)[:, None]
        return np.rint(z_NC, z_NC).astype(np.int8), scale_N

    def _restore(self, codes: Array, scale: npt.NDArray[np.float16]) -> Floats:
        """Returns codes * scale, (..., C)."""
        values = codes.astype(np.float32)
        values *= self._steps(scale)
        return values

    def _steps(self, scale: npt.NDArray[np.float16]) -> Floats:
        """Returns (..., 1)."""
        return scale[..., None].astype(np.float32)
