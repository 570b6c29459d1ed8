"""What an encoding is: from a teacher's output to stored arrays and back to float32.

Owns the interface, the registry of presets, and what presets share: finding values that
are not finite, filling missing rows. The presets are in ``encodings``,
``topk``, ``compact`` and ``tiny``.

Values come and go as NumPy: bfloat16 as its bit patterns in uint16. Every stored array
has a fill value that means *missing* and that no valid row holds, so a row with a value
that is not finite is refused, with a reason, and stored as fill.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, TypeVar

import numpy as np
import numpy.typing as npt

from manifests.errors import BankError
from manifests.teacher import OutputConfig
from pipeline.bank.arrays import ArraySpec, Codec, Fill, chunk_rows_for

Array = npt.NDArray[Any]
Kind = Literal["vector", "grid", "frames", "points", "index", "image"]
LogicalDtype = Literal["float32", "bfloat16", "float16", "uint32", "uint8"]

NON_FINITE = "non_finite"
OVERFLOW_FLOAT16 = "overflow_float16"
ALL_PADDING = "all_padding"

BFLOAT16_MISSING = 0x7FC0

AXES: dict[str, tuple[str, ...]] = {
    "vector": ("channel",),
    "grid": ("y", "x", "channel"),
    "frames": ("frame", "y", "x", "channel"),
    "points": ("point", "channel"),
    "index": ("point",),
    "image": ("byte",),
}
STORED_DTYPE = {
    "float32": "float32",
    "bfloat16": "uint16",
    "float16": "float16",
    "uint32": "uint32",
    "uint8": "uint8",
}
# Bits of positive infinity: at or above them a number without its sign is not finite.
_INFINITY_BITS = {"float32": 0x7F800000, "bfloat16": 0x7F80, "float16": 0x7C00}
# Passes over values go by pieces that stay in a core's cache.
_PIECE_BYTES = 2**20


@dataclass(frozen=True)
class Encoded:
    """What is stored of some rows.

    Attributes:
        arrays: from suffix to (rows, ...) of that array's type. May be the values that
            were given, not a copy.
        refused: from row to the reason why a usable row is stored as missing.
    """

    arrays: dict[str, Array]
    refused: dict[int, str]


@dataclass(frozen=True, kw_only=True)
class Encoding(ABC):
    """How one output is stored.

    Attributes:
        name: of the output, such as ``patch``.
        kind: ``vector`` (channel), ``grid`` (y, x, channel), ``frames`` (frame, y, x,
            channel), ``points`` (point, channel), ``index`` (point) or ``image``
            (byte).
        shape: of one row.
        dtype: logical type of the values that come in.

    Raises:
        BankError: kind, shape and dtype contradict each other.
    """

    name: str
    kind: Kind
    shape: tuple[int, ...]
    dtype: LogicalDtype

    preset: ClassVar[str]
    suffixes: ClassVar[tuple[str, ...]] = ("",)
    is_exact: ClassVar[bool] = False
    """Whether its one array holds the very values that came in."""
    holds_features: ClassVar[bool] = True
    """Whether it holds what a teacher says, not numbers of points or images."""
    mixes_rows: ClassVar[bool] = False
    """Whether what is stored of a row depends on the rows it was encoded beside. What
    is stored of a row alone decodes it in either case: rows can be moved."""

    def __post_init__(self) -> None:
        if self.kind not in AXES:
            self._refuse("kind", f"be one of {sorted(AXES)}", self.kind)
        if self.dtype not in STORED_DTYPE:
            self._refuse("dtype", f"be one of {sorted(STORED_DTYPE)}", self.dtype)
        if len(self.shape) != len(AXES[self.kind]) or min(self.shape) < 1:
            self._refuse("shape", f"be {AXES[self.kind]}", self.shape)

    def _refuse(self, what: str, rule: str, got: object) -> None:
        raise BankError(f"{what} must {rule}, got {got!r} (output {self.name})")

    @classmethod
    def from_config(cls, config: OutputConfig, **common: Any) -> Encoding:
        """Returns what a job asks for; ``common`` are the fields of the base."""
        del config
        return cls(**common)

    def to_json(self) -> dict[str, Any]:
        """Returns JSON values from which ``encoding_from_json`` makes an equal one."""
        return {
            "encoding": self.preset,
            "name": self.name,
            "kind": self.kind,
            "shape": list(self.shape),
            "dtype": self.dtype,
        }

    @abstractmethod
    def arrays(self, path: str, block_rows: int) -> tuple[ArraySpec, ...]:
        """Returns the arrays, one per suffix and in that order.

        Args:
            path: the group they lie in, such as ``dinov3/image/256x256``.
            block_rows: rows of a block.
        """

    def encode(
        self,
        values: Array,
        usable: npt.NDArray[np.bool_],
        *,
        missing_cells: npt.NDArray[np.bool_] | None = None,
        reuse: bool = False,
    ) -> Encoded:
        """Returns what is stored of some rows; what is missing is fill in every array.

        A usable row of which no cell is left is refused: it would read as missing.

        Args:
            values: (rows, *shape), ``dtype``; bfloat16 as bit patterns in uint16.
            usable: (rows,); where False the values are not looked at, the row is
                missing.
            missing_cells: (rows, y, x) of a grid or (rows, frame, y, x) of frames,
                which cells are missing though their row is not; none where omitted.
            reuse: whether the result may overwrite ``values`` instead of copying them
                where rows are missing.

        Raises:
            BankError: values of another type or shape.
        """
        values, usable = self._checked(values, usable)
        if missing_cells is None or not missing_cells.any():
            return self._encode(values, usable, None, reuse)
        encoded = self._encode(values, usable, missing_cells, reuse)
        return self._mask_cells(encoded, usable, missing_cells)

    @abstractmethod
    def _encode(
        self,
        values: Array,
        usable: npt.NDArray[np.bool_],
        missing_cells: npt.NDArray[np.bool_] | None,
        reuse: bool,
    ) -> Encoded:
        """Returns what is stored of some rows; missing cells are filled by the caller.

        Args:
            values, usable, missing_cells, reuse: as ``encode`` takes them, checked.
        """

    def encode_again(
        self,
        values: Array,
        stored: Mapping[str, Array],
        *,
        missing_cells: npt.NDArray[np.bool_] | None = None,
    ) -> Encoded:
        """Returns what must be stored of rows, wherever in a bank they lie.

        Args:
            values, missing_cells: as ``encode`` takes them; every row is usable.
            stored: what the bank has of these rows, by suffix: what an encoding takes
                from the rows beside them is taken from there.
        """
        del stored
        usable = np.ones(len(values), np.bool_)
        return self.encode(values, usable, missing_cells=missing_cells)

    def bound(
        self, arrays: Mapping[str, Array], decoded: npt.NDArray[np.float32]
    ) -> npt.NDArray[np.float32]:
        """Returns how far decoded values may be from those that were encoded.

        Args:
            arrays: from each suffix to the stored rows.
            decoded: (rows, *shape), what ``decode`` makes of them.

        Returns:
            Something that broadcasts with ``decoded``.
        """
        del arrays, decoded
        return np.zeros((), np.float32)

    @abstractmethod
    def decode(self, arrays: Mapping[str, Array]) -> npt.NDArray[np.float32]:
        """Returns float32 (rows, *shape); missing rows are NaN.

        Args:
            arrays: from each suffix to the stored rows.

        Raises:
            BankError: the stored values contradict the encoding.
        """

    def _spec(
        self,
        group: str,
        suffix: str,
        block_rows: int,
        dtype: str,
        axes: tuple[tuple[str, int], ...],
        codec: Codec,
        fill: Fill,
        attributes: Mapping[str, Any],
    ) -> ArraySpec:
        row_shape = tuple(length for _, length in axes)
        row_bytes = math.prod(row_shape) * np.dtype(dtype).itemsize
        return ArraySpec(
            path=f"{group}/{self.name}{suffix}",
            dtype=dtype,
            row_shape=row_shape,
            dimension_names=tuple(f"{self.name}_{axis}" for axis, _ in axes),
            block_rows=block_rows,
            chunk_rows=chunk_rows_for(row_bytes, block_rows),
            codec=codec,
            fill=fill,
            attributes={
                "encoding": self.preset,
                "logical_dtype": self.dtype,
                **attributes,
            },
        )

    def _checked(
        self, values: Array, usable: npt.NDArray[np.bool_]
    ) -> tuple[Array, npt.NDArray[np.bool_]]:
        stored = np.dtype(STORED_DTYPE[self.dtype])
        if values.dtype != stored or values.shape[1:] != self.shape:
            raise BankError(
                f"values of {self.name} must be {stored} (rows, *{self.shape}), got "
                f"{values.dtype} {values.shape}"
            )
        if usable.shape != values.shape[:1] or usable.dtype != np.bool_:
            raise BankError(
                f"usable of {self.name} must be bool {values.shape[:1]}, got "
                f"{usable.dtype} {usable.shape}"
            )
        return np.ascontiguousarray(values), usable

    def _mask_cells(
        self,
        encoded: Encoded,
        usable: npt.NDArray[np.bool_],
        cells: npt.NDArray[np.bool_],
    ) -> Encoded:
        """Returns stored rows in which the ``cells`` are missing too."""
        empty = cells.reshape(len(cells), -1).all(axis=1) & usable
        refused = {**dict.fromkeys(row_numbers(empty), ALL_PADDING), **encoded.refused}
        arrays = dict(encoded.arrays)
        for spec, suffix in zip(self.arrays("", 1), self.suffixes, strict=True):
            # Arrays without an axis of cells speak of whole rows.
            if arrays[suffix].shape[: cells.ndim] == cells.shape:
                arrays[suffix] = arrays[suffix].copy()
                arrays[suffix][cells] = spec.fill_value
        return Encoded(arrays, refused)


ENCODINGS: dict[str, type[Encoding]] = {}
_E = TypeVar("_E", bound=type[Encoding])


def register(name: str) -> Callable[[_E], _E]:
    """Registers a class of encodings under the name that jobs and banks give it."""

    def add(cls: _E) -> _E:
        cls.preset = name
        ENCODINGS[name] = cls
        return cls

    return add


def pieces(values: Array) -> Iterator[slice]:
    """Yields slices of rows that stay in a core's cache."""
    rows = max(1, _PIECE_BYTES // max(1, values[:1].nbytes))
    for start in range(0, len(values), rows):
        yield slice(start, start + rows)


def row_numbers(rows: npt.NDArray[np.bool_]) -> list[int]:
    """Returns which entries of (rows,) are true."""
    return np.flatnonzero(rows).tolist()


def non_finite_rows(values: Array, dtype: LogicalDtype) -> npt.NDArray[np.bool_]:
    """Returns (rows,): whether a row holds an infinity or a not-a-number."""
    return _rows_from(values, _INFINITY_BITS[dtype])


def rows_beyond(
    values: Array, dtype: LogicalDtype, exponent: int
) -> npt.NDArray[np.bool_]:
    """Returns (rows,): whether a row holds a magnitude of 2**exponent or more.

    Infinities and not-a-numbers are such. Costs what ``non_finite_rows`` does.
    """
    bits = {"float32": (127 + exponent) << 23, "bfloat16": (127 + exponent) << 7}
    # float16 ends before any exponent that is asked for here.
    return _rows_from(values, bits.get(dtype, _INFINITY_BITS["float16"]))


def _rows_from(values: Array, limit: int) -> npt.NDArray[np.bool_]:
    """Returns (rows,): whether a row holds a number whose bits, unsigned, reach limit.

    Read as signed integers the positive ones of these are the largest numbers, read as
    unsigned ones the negative: two maxima per piece, no temporary array, at the speed
    of memory for each of the three types.
    """
    bits = 8 * values.dtype.itemsize
    flat = values.reshape(len(values), math.prod(values.shape[1:]))
    unsigned = flat.view(f"u{bits // 8}")
    signed = unsigned.view(f"i{bits // 8}")
    found = np.zeros(len(values), np.bool_)
    for piece in pieces(values):
        found[piece] = signed[piece].max(axis=1) >= limit
        found[piece] |= unsigned[piece].max(axis=1) >= limit | 1 << (bits - 1)
    return found


def with_missing(
    values: Array, missing: npt.NDArray[np.bool_], dtype: LogicalDtype, reuse: bool
) -> Array:
    """Returns values whose ``missing`` rows hold the fill value.

    Args:
        values: (rows, ...).
        missing: (rows,).
        dtype: logical type of the values.
        reuse: whether ``values`` may be overwritten instead of copied.
    """
    if not missing.any():
        return values
    filled = values if reuse and values.flags.writeable else values.copy()
    filled[missing] = BFLOAT16_MISSING if dtype == "bfloat16" else np.nan
    return filled


def to_float32(values: Array, dtype: LogicalDtype) -> npt.NDArray[np.float32]:
    """Returns values as float32; may be the values themselves."""
    if dtype == "bfloat16":
        shift = np.uint32(16)
        return np.left_shift(values, shift, dtype=np.uint32).view(np.float32)
    return values.astype(np.float32, copy=False)
