"""The preset ``compact``: a grid in one byte per value, and what undoes it.

Each chunk is standardised by its own channels' mean and deviation and each cell then
scaled by its own largest value, so no calibration is needed (a block stays a pure
function of its shard) and a channel a hundred times wider than the others costs them
nothing, which it does where neighbouring channels share a scale.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import numpy.typing as npt

from manifests.bank import is_logits
from manifests.errors import BankError
from pipeline.bank.arrays import ArraySpec, chunk_rows_for
from pipeline.bank.encoding import (
    AXES,
    NON_FINITE,
    Array,
    Encoded,
    Encoding,
    LogicalDtype,
    non_finite_rows,
    pieces,
    register,
    row_numbers,
    rows_beyond,
    to_float32,
)
from pipeline.bank.statistics import floored_std

OVERFLOW_COMPACT = "overflow_compact"
MISSING_CODE = -128
LARGEST_CODE = 127
# Sums of squares stay in float32 below this, with any number of cells.
_MAX_EXPONENT = 48

_KINDS = ("grid", "frames", "points")

Floats = npt.NDArray[np.float32]


@register("compact")
@dataclass(frozen=True, kw_only=True)
class Compact(Encoding):
    """int8 codes of cells standardised by their chunk's channels, and their scales.

    With mean and floored deviation of a channel over the valid cells of a chunk,
    z = (x - mean) / std. A cell's scale is the largest magnitude of its z / 127, as
    float16 and rounded upwards so that nothing clips; its codes are z / scale, rounded.
    So x comes back to within 0.5 * scale * std, and the rounding of float32. A row with
    a magnitude of 2**48 or more is refused.

    Mean and deviation are kept with every row of their chunk: rows can be read, moved
    and mixed one by one, and the codec makes one copy of them.

    Source: standardisation with the floor of DESIGN section 3, rule 11.
    """

    suffixes: ClassVar[tuple[str, ...]] = ("", "_scale", "_mean", "_std")
    mixes_rows: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.kind not in _KINDS or is_logits(self.name):
            raise BankError(
                f"encoding compact must be of a grid of features, got a {self.kind} "
                f"(output {self.name}); vectors and logits keep 16 bits or more, and "
                "are few of a bank's bytes: take lossless or half"
            )

    def arrays(self, path: str, block_rows: int) -> tuple[ArraySpec, ...]:
        """Returns codes, a scale per cell, and mean and deviation per row."""
        axes = tuple(zip(AXES[self.kind], self.shape, strict=True))
        attributes = {
            "decode": "float32: code * scale (per cell) * std + mean (per row and "
            "channel); fill is missing"
        }
        return tuple(
            self._spec(path, suffix, block_rows, dtype, own, "zstd", fill, attributes)
            for suffix, dtype, own, fill in (
                ("", "int8", axes, MISSING_CODE),
                ("_scale", "float16", axes[:-1], "NaN"),
                ("_mean", "float32", axes[-1:], "NaN"),
                ("_std", "float32", axes[-1:], "NaN"),
            )
        )

    def _encode(
        self,
        values: Array,
        usable: npt.NDArray[np.bool_],
        missing_cells: npt.NDArray[np.bool_] | None,
        reuse: bool,
    ) -> Encoded:
        """Returns codes, scales, mean and deviation, a chunk of rows at a time."""
        bad = usable & rows_beyond(values, self.dtype, _MAX_EXPONENT)
        refused = {
            row: NON_FINITE
            if non_finite_rows(values[row : row + 1], self.dtype)[0]
            else OVERFLOW_COMPACT
            for row in row_numbers(bad)
        }
        is_kept = np.zeros((len(values), *self.shape[:-1]), np.bool_)
        is_kept[usable & ~bad] = True
        if missing_cells is not None:
            is_kept &= ~missing_cells
        stored = {
            suffix: np.full(
                (len(values), *spec.row_shape), spec.fill_value, spec.numpy_dtype
            )
            for suffix, spec in zip(self.suffixes, self.arrays("", 1), strict=True)
        }
        chunk_rows = chunk_rows_for(math.prod(self.shape), len(values))
        for start in range(0, len(values), chunk_rows):
            chunk = slice(start, start + chunk_rows)
            self._encode_chunk(
                values[chunk],
                is_kept[chunk],
                {suffix: array[chunk] for suffix, array in stored.items()},
            )
        return Encoded(stored, refused)

    def _encode_chunk(
        self, values: Array, is_kept: npt.NDArray[np.bool_], out: Mapping[str, Array]
    ) -> None:
        """Fills ``out``, by suffix, where cells are kept."""
        if not is_kept.any():
            return
        num_channels = self.shape[-1]
        values_NC = values.reshape(-1, num_channels)
        codes_NC = out[""].reshape(-1, num_channels)
        is_kept_N, scale_N = is_kept.reshape(-1), out["_scale"].reshape(-1)
        mean_C, std_C = _moments(values_NC, is_kept_N, self.dtype)
        for piece in pieces(values_NC):
            kept = is_kept_N[piece]
            z_NC = to_float32(values_NC[piece][kept], self.dtype)
            z_NC -= mean_C
            z_NC /= std_C
            codes_NC[piece][kept], scale_N[piece][kept] = _quantise(z_NC)
        has_cells = is_kept.reshape(len(values), -1).any(axis=1)
        out["_mean"][has_cells], out["_std"][has_cells] = mean_C, std_C

    def decode(self, arrays: Mapping[str, Array]) -> Floats:
        """Returns the values to within their scales; missing rows and cells are NaN."""
        codes, scale = arrays[""], arrays["_scale"]
        shape = (len(codes), *[1] * (codes.ndim - 2), codes.shape[-1])
        std, mean = arrays["_std"].reshape(shape), arrays["_mean"].reshape(shape)
        out = np.empty(codes.shape, np.float32)
        for piece in pieces(out):
            values = out[piece]
            values[...] = codes[piece]
            values *= scale[piece][..., None].astype(np.float32)
            values *= std[piece]
            values += mean[piece]
        return out


def _moments(
    values_NC: Array, is_kept_N: npt.NDArray[np.bool_], dtype: LogicalDtype
) -> tuple[Floats, Floats]:
    """Returns mean and floored deviation of the kept cells, (C,) each.

    Source: Chan, Golub and LeVeque (1979), equation 2.1, for putting pieces together.
    """
    num_channels = values_NC.shape[1]
    count, mean_C, squares_C = 0, np.zeros(num_channels), np.zeros(num_channels)
    for piece in pieces(values_NC):
        # A copy, also of float32: what is kept is chosen by a mask.
        x_NC = to_float32(values_NC[piece][is_kept_N[piece]], dtype)
        if not len(x_NC):
            continue
        of_piece_C = x_NC.mean(axis=0, dtype=np.float64)
        x_NC -= of_piece_C.astype(np.float32)
        x_NC *= x_NC
        total = count + len(x_NC)
        apart_C = of_piece_C - mean_C
        squares_C += x_NC.sum(axis=0) + apart_C**2 * (count * len(x_NC) / total)
        mean_C += apart_C * (len(x_NC) / total)
        count = total
    std_C = floored_std(squares_C / count)
    return mean_C.astype(np.float32), std_C.astype(np.float32)


def _quantise(z_NC: Floats) -> tuple[npt.NDArray[np.int8], npt.NDArray[np.float16]]:
    """Returns codes in -127..127 and float16 scales; overwrites ``z_NC``."""
    peak_N = np.maximum(z_NC.max(axis=1), -z_NC.min(axis=1))
    exact_N = peak_N / np.float32(LARGEST_CODE)
    scale_N = exact_N.astype(np.float16)
    is_less = scale_N < exact_N
    scale_N[is_less] = np.nextafter(scale_N[is_less], np.float16(np.inf))
    # A cell at its chunk's mean has no scale, and codes of 0.
    inverse_N = np.zeros_like(exact_N)
    np.divide(1, scale_N, inverse_N, where=scale_N > 0, dtype=np.float32)
    z_NC *= inverse_N[:, None]
    return np.rint(z_NC, z_NC).astype(np.int8), scale_N
