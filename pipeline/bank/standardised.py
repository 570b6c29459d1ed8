"""What ``compact`` and ``tiny`` share: cells standardised by the chunk they lie in.

Each chunk is standardised by its own channels' mean and deviation, so no calibration is
needed (a block stays a pure function of its shard) and a channel a hundred times wider
than the others costs them nothing, which it does where channels share a scale as they
are. Mean and deviation are kept with every row of their chunk: rows can be read, moved
and mixed one by one, and the codec makes one copy of them.

How a standardised cell becomes codes and scales, and back, is the presets' own.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import numpy.typing as npt

from manifests.bank import is_logits
from manifests.errors import BankError
from pipeline.bank.arrays import ArraySpec, Fill, chunk_rows_for
from pipeline.bank.encoding import (
    AXES,
    NON_FINITE,
    Array,
    Encoded,
    Encoding,
    LogicalDtype,
    non_finite_rows,
    pieces,
    row_numbers,
    rows_beyond,
    to_float32,
)
from pipeline.bank.statistics import floored_std

# Sums of squares stay in float32 below this, with any number of cells.
_MAX_EXPONENT = 48
_KINDS = ("grid", "frames", "points")

Axes = tuple[tuple[str, int], ...]
Floats = npt.NDArray[np.float32]
Bools = npt.NDArray[np.bool_]


@dataclass(frozen=True, kw_only=True)
class Standardised(Encoding):
    """Codes of cells standardised by their chunk's channels, and their scales.

    With mean and floored deviation of a channel over the valid cells of a chunk,
    z = (x - mean) / std. Codes are z / scale, rounded, and nothing clips. So x comes
    back to within 0.5 * scale * std, and the rounding of float32. A row with a
    magnitude of 2**48 or more is refused, as ``overflow_<preset>``.

    Source: standardisation with the floor of DESIGN section 3, rule 11.
    """

    suffixes: ClassVar[tuple[str, ...]] = ("", "_scale", "_mean", "_std")
    mixes_rows: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.kind not in _KINDS or is_logits(self.name):
            raise BankError(
                f"encoding {self.preset} must be of a grid of features, got a "
                f"{self.kind} (output {self.name}); vectors and logits keep 16 bits or "
                "more, and are few of a bank's bytes: take lossless or half"
            )

    @property
    def _axes(self) -> Axes:
        return tuple(zip(AXES[self.kind], self.shape, strict=True))

    def _specs(
        self,
        path: str,
        block_rows: int,
        codes: tuple[str, Axes, Fill],
        scale: Axes,
        attributes: Mapping[str, object],
    ) -> tuple[ArraySpec, ...]:
        """Returns the arrays: type, axes and fill of codes, axes of scales are told."""
        dtype, axes, fill = codes
        channels = self._axes[-1:]
        return tuple(
            self._spec(path, suffix, block_rows, kind, own, "zstd", missing, attributes)
            for suffix, kind, own, missing in (
                ("", dtype, axes, fill),
                ("_scale", "float16", scale, "NaN"),
                ("_mean", "float32", channels, "NaN"),
                ("_std", "float32", channels, "NaN"),
            )
        )

    @abstractmethod
    def _quantise(self, z_NC: Floats) -> tuple[Array, npt.NDArray[np.float16]]:
        """Returns codes and scales of standardised cells, (N, ...) as stored.

        Args:
            z_NC: (N, C), finite; may be overwritten.
        """

    @abstractmethod
    def _restore(self, codes: Array, scale: npt.NDArray[np.float16]) -> Floats:
        """Returns what `_quantise` was given, to within half a scale, (..., C)."""

    @abstractmethod
    def _steps(self, scale: npt.NDArray[np.float16]) -> Floats:
        """Returns the scale of each value: something that (..., C) broadcasts with."""

    def _encode(
        self, values: Array, usable: Bools, missing_cells: Bools | None, reuse: bool
    ) -> Encoded:
        """Returns codes, scales, mean and deviation, a chunk of rows at a time."""
        is_kept, refused = self._kept(values, usable, missing_cells)
        stored = self._nothing(len(values))
        chunk_rows = chunk_rows_for(stored[""][:1].nbytes, len(values))
        for start in range(0, len(values), chunk_rows):
            chunk = slice(start, start + chunk_rows)
            values_NC = values[chunk].reshape(-1, self.shape[-1])
            if is_kept[chunk].any():
                moments = _moments(values_NC, is_kept[chunk].reshape(-1), self.dtype)
                self._encode_rows(values, is_kept, stored, chunk, moments)
        return Encoded(stored, refused)

    def encode_again(
        self,
        values: Array,
        stored: Mapping[str, Array],
        *,
        missing_cells: Bools | None = None,
    ) -> Encoded:
        """Returns what is stored of rows by the mean and deviation stored of each.

        Those are of whole chunks; rows of which none is stored come out missing.
        """
        values, usable = self._checked(values, np.ones(len(values), np.bool_))
        is_kept, refused = self._kept(values, usable, missing_cells)
        again = self._nothing(len(values))
        known = np.isfinite(stored["_mean"]) & (stored["_std"] > 0)
        # By another row's moments a scale may be more than float16 holds.
        with np.errstate(all="ignore"):
            for row in np.flatnonzero(known.all(axis=-1)).tolist():
                moments = stored["_mean"][row], stored["_std"][row]
                self._encode_rows(values, is_kept, again, slice(row, row + 1), moments)
        encoded = Encoded(again, refused)
        if missing_cells is None:
            return encoded
        return self._mask_cells(encoded, usable, missing_cells)

    def _kept(
        self, values: Array, usable: Bools, missing_cells: Bools | None
    ) -> tuple[Bools, dict[int, str]]:
        """Returns (rows, ...) which cells are encoded, and why rows are refused."""
        bad = usable & rows_beyond(values, self.dtype, _MAX_EXPONENT)
        refused = {
            row: NON_FINITE
            if non_finite_rows(values[row : row + 1], self.dtype)[0]
            else f"overflow_{self.preset}"
            for row in row_numbers(bad)
        }
        is_kept = np.zeros((len(values), *self.shape[:-1]), np.bool_)
        is_kept[usable & ~bad] = True
        if missing_cells is not None:
            is_kept &= ~missing_cells
        return is_kept, refused

    def _nothing(self, num_rows: int) -> dict[str, Array]:
        """Returns arrays in which every row is missing."""
        return {
            suffix: np.full(
                (num_rows, *spec.row_shape), spec.fill_value, spec.numpy_dtype
            )
            for suffix, spec in zip(self.suffixes, self.arrays("", 1), strict=True)
        }

    def _encode_rows(
        self,
        values: Array,
        is_kept: Bools,
        stored: Mapping[str, Array],
        rows: slice,
        moments: tuple[Floats, Floats],
    ) -> None:
        """Fills some rows of ``stored``, by suffix, where cells are kept."""
        mean_C, std_C = moments
        values_NC = values[rows].reshape(-1, self.shape[-1])
        codes, scale = (stored[suffix][rows] for suffix in ("", "_scale"))
        num_lead = 1 + len(self.shape[:-1])
        codes_NX = codes.reshape(-1, *codes.shape[num_lead:])
        scale_NX = scale.reshape(-1, *scale.shape[num_lead:])
        is_kept_N = is_kept[rows].reshape(-1)
        for piece in pieces(values_NC):
            kept = is_kept_N[piece]
            z_NC = to_float32(values_NC[piece][kept], self.dtype)
            z_NC -= mean_C
            z_NC /= std_C
            codes_NX[piece][kept], scale_NX[piece][kept] = self._quantise(z_NC)
        has_cells = is_kept[rows].reshape(len(codes), -1).any(axis=1)
        stored["_mean"][rows][has_cells] = mean_C
        stored["_std"][rows][has_cells] = std_C

    def decode(self, arrays: Mapping[str, Array]) -> Floats:
        """Returns the values to within their scales; missing rows and cells are NaN."""
        codes, scale = arrays[""], arrays["_scale"]
        std, mean = self._by_row(arrays["_std"]), self._by_row(arrays["_mean"])
        out = np.empty((len(codes), *self.shape), np.float32)
        for piece in pieces(out):
            values = self._restore(codes[piece], scale[piece])
            values *= std[piece]
            np.add(values, mean[piece], out=out[piece])
        return out

    def bound(self, arrays: Mapping[str, Array], decoded: Floats) -> Floats:
        """Returns half a step of each value, and the rounding of float32."""
        steps = self._steps(arrays["_scale"]) * self._by_row(arrays["_std"])
        size = abs(decoded) + abs(self._by_row(arrays["_mean"]))
        found: Floats = steps * np.float32(0.5 + 2**-15) + size * np.float32(2**-21)
        return found

    def _by_row(self, values: Floats) -> Floats:
        """Returns (rows, channels) with the axes of a row between them."""
        between = [1] * (len(self.shape) - 1)
        return values.reshape(len(values), *between, self.shape[-1])


def up_to_float16(exact: Floats) -> npt.NDArray[np.float16]:
    """Returns float16 that are not less: by such a scale nothing clips."""
    rounded = exact.astype(np.float16)
    is_less = rounded < exact
    rounded[is_less] = np.nextafter(rounded[is_less], np.float16(np.inf))
    return rounded


def inverse(scale: npt.NDArray[np.float16]) -> Floats:
    """Returns 1 / scale; 0 where values at their chunk's mean have no scale."""
    found = np.zeros(scale.shape, np.float32)
    np.divide(1, scale, found, where=scale > 0, dtype=np.float32)
    return found


def _moments(
    values_NC: Array, is_kept_N: Bools, dtype: LogicalDtype
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
