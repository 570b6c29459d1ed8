"""The presets ``raw``, ``lossless`` and ``half``, and making any encoding by its name.

A preset is one class, registered under the name that jobs and banks give it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from manifests.errors import BankError
from manifests.teacher import OutputConfig
from pipeline.bank import compact as compact  # registers its preset
from pipeline.bank import point_index as point_index
from pipeline.bank import stored_jpeg as stored_jpeg
from pipeline.bank import tiny as tiny
from pipeline.bank import topk as topk
from pipeline.bank.arrays import ArraySpec, Codec, Fill
from pipeline.bank.encoding import (
    AXES,
    BFLOAT16_MISSING,
    ENCODINGS,
    NON_FINITE,
    OVERFLOW_FLOAT16,
    STORED_DTYPE,
    Array,
    Encoded,
    Encoding,
    Kind,
    non_finite_rows,
    pieces,
    register,
    row_numbers,
    to_float32,
    with_missing,
)


def make_encoding(
    config: OutputConfig, *, name: str, kind: Kind, shape: tuple[int, ...], dtype: str
) -> Encoding:
    """Returns the encoding of one output as a job asks for it.

    Args:
        config: the output's part of the job.
        name: of the output.
        kind: see `Encoding`.
        shape: of one row, channels last.
        dtype: ``float32``, ``bfloat16`` or ``float16``: what the teacher computes in.

    Raises:
        BankError: the output cannot be stored so.
    """
    cls = ENCODINGS[config.encoding]
    return cls.from_config(
        config, name=name, kind=kind, shape=tuple(shape), dtype=dtype
    )


def encoding_from_json(data: Mapping[str, Any]) -> Encoding:
    """Returns the encoding that ``to_json`` wrote.

    Raises:
        BankError: it is of a newer version, or damaged.
    """
    fields = dict(data)
    preset = fields.pop("encoding", None)
    if preset not in ENCODINGS:
        raise BankError(
            f"encoding must be one of {sorted(ENCODINGS)}, got {preset!r}; the bank "
            "may come from a newer version"
        )
    lists = {key: tuple(v) for key, v in fields.items() if isinstance(v, list)}
    try:
        return ENCODINGS[preset](**(fields | lists))
    except TypeError as error:
        raise BankError(f"encoding {preset} must have its fields: {error}") from error


@register("raw")
@dataclass(frozen=True, kw_only=True)
class Raw(Encoding):
    """The teacher's own bits, uncompressed: for banks in memory or page cache."""

    is_exact: ClassVar[bool] = True

    def arrays(self, path: str, block_rows: int) -> tuple[ArraySpec, ...]:
        """Returns one array of the logical type; bfloat16 lies in uint16."""
        dtype = STORED_DTYPE[self.dtype]
        attributes: dict[str, Any] = {}
        fill: Fill = "NaN"
        if self.dtype == "bfloat16":
            fill = BFLOAT16_MISSING
            attributes["decode"] = "float32 with these upper 16 bits; fill is missing"
        axes = tuple(zip(AXES[self.kind], self.shape, strict=True))
        spec = self._spec(
            path, "", block_rows, dtype, axes, self._codec(), fill, attributes
        )
        return (spec,)

    def _encode(
        self,
        values: Array,
        usable: npt.NDArray[np.bool_],
        missing_cells: npt.NDArray[np.bool_] | None,
        reuse: bool,
    ) -> Encoded:
        """Returns the values themselves, copied only where a row is missing."""
        bad = usable & non_finite_rows(values, self.dtype)
        stored = with_missing(values, bad | ~usable, self.dtype, reuse)
        return Encoded({"": stored}, dict.fromkeys(row_numbers(bad), NON_FINITE))

    def decode(self, arrays: Mapping[str, Array]) -> npt.NDArray[np.float32]:
        """Returns the exact values as float32; missing rows are NaN."""
        return to_float32(arrays[""], self.dtype)

    def _codec(self) -> Codec:
        return "none"


@register("lossless")
@dataclass(frozen=True, kw_only=True)
class Lossless(Raw):
    """The teacher's own bits, compressed.

    Attributes:
        codec: ``lz4`` (with bitshuffle; dense tokens) or ``zstd`` (sparse maps).
    """

    codec: Codec = "lz4"

    @classmethod
    def from_config(cls, config: OutputConfig, **common: Any) -> Encoding:
        """Returns what a job asks for, with its codec."""
        return cls(codec=config.codec or "lz4", **common)

    def to_json(self) -> dict[str, Any]:
        """Returns JSON values, the codec among them."""
        return {**super().to_json(), "codec": self.codec}

    def _codec(self) -> Codec:
        return self.codec


@register("half")
@dataclass(frozen=True, kw_only=True)
class Half(Encoding):
    """float16, rounded to nearest even; a row that overflows is refused.

    Relative error at most 2**-11 for magnitudes from 2**-14 to 65504, and absolute
    error at most 2**-25 below.
    """

    def arrays(self, path: str, block_rows: int) -> tuple[ArraySpec, ...]:
        """Returns one float16 array."""
        axes = tuple(zip(AXES[self.kind], self.shape, strict=True))
        return (self._spec(path, "", block_rows, "float16", axes, "lz4", "NaN", {}),)

    def _encode(
        self,
        values: Array,
        usable: npt.NDArray[np.bool_],
        missing_cells: npt.NDArray[np.bool_] | None,
        reuse: bool,
    ) -> Encoded:
        """Returns the values rounded; rows that become infinite are refused."""
        if self.dtype == "float16":
            stored = values
        else:
            stored = np.empty(values.shape, np.float16)
            with np.errstate(over="ignore", invalid="ignore"):
                for piece in pieces(values):
                    stored[piece] = to_float32(values[piece], self.dtype)
            reuse = True
        bad = usable & non_finite_rows(stored, "float16")
        refused = {
            row: NON_FINITE
            if non_finite_rows(values[row : row + 1], self.dtype)[0]
            else OVERFLOW_FLOAT16
            for row in row_numbers(bad)
        }
        return Encoded(
            {"": with_missing(stored, bad | ~usable, "float16", reuse)}, refused
        )

    def bound(
        self, arrays: Mapping[str, Array], decoded: npt.NDArray[np.float32]
    ) -> npt.NDArray[np.float32]:
        """Returns half a unit in the last place of each."""
        del arrays
        relative: npt.NDArray[np.float32] = abs(decoded) * np.float32(2**-11)
        return np.maximum(relative, np.float32(2**-25))

    def decode(self, arrays: Mapping[str, Array]) -> npt.NDArray[np.float32]:
        """Returns the rounded values as float32; missing rows are NaN."""
        return to_float32(arrays[""], "float16")
