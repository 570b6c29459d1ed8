"""How a teacher's output becomes stored arrays, and how those become float32 again.

Owns the presets ``raw``, ``lossless``, ``half`` and ``topk``, their arrays, fill values
and attributes. Does not write, and knows no teacher. A preset is one class, registered
under its name.

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
from manifests.job import OutputConfig
from pipeline.bank.arrays import ArraySpec, Codec, Fill, chunk_rows_for

Array = npt.NDArray[Any]
Kind = Literal["vector", "grid"]
LogicalDtype = Literal["float32", "bfloat16", "float16"]

NON_FINITE = "non_finite"
OVERFLOW_FLOAT16 = "overflow_float16"

BFLOAT16_MISSING = 0x7FC0

_AXES: dict[str, tuple[str, ...]] = {
    "vector": ("channel",),
    "grid": ("y", "x", "channel"),
}
_STORED_DTYPE = {"float32": "float32", "bfloat16": "uint16", "float16": "float16"}
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
        kind: ``vector`` (channel) or ``grid`` (y, x, channel).
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

    def __post_init__(self) -> None:
        if self.kind not in _AXES:
            self._refuse("kind", f"be one of {sorted(_AXES)}", self.kind)
        if self.dtype not in _STORED_DTYPE:
            self._refuse("dtype", f"be one of {sorted(_STORED_DTYPE)}", self.dtype)
        if len(self.shape) != len(_AXES[self.kind]) or min(self.shape) < 1:
            self._refuse("shape", f"be {_AXES[self.kind]}", self.shape)

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

    @abstractmethod
    def encode(
        self, values: Array, usable: npt.NDArray[np.bool_], *, reuse: bool = False
    ) -> Encoded:
        """Returns what is stored of some rows; missing ones hold fill in every array.

        Args:
            values: (rows, *shape), ``dtype``; bfloat16 as bit patterns in uint16.
            usable: (rows,); where False the values are not looked at, the row is
                missing.
            reuse: whether the result may overwrite ``values`` instead of copying them
                where rows are missing.

        Raises:
            BankError: values of another type or shape.
        """

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
        stored = np.dtype(_STORED_DTYPE[self.dtype])
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


ENCODINGS: dict[str, type[Encoding]] = {}
_E = TypeVar("_E", bound=type[Encoding])


def register(name: str) -> Callable[[_E], _E]:
    """Registers a class of encodings under the name that jobs and banks give it."""

    def add(cls: _E) -> _E:
        cls.preset = name
        ENCODINGS[name] = cls
        return cls

    return add


def make_encoding(
    config: OutputConfig, *, name: str, kind: Kind, shape: tuple[int, ...], dtype: str
) -> Encoding:
    """Returns the encoding of one output as a job asks for it.

    Args:
        config: the output's part of the job.
        name: of the output.
        kind: ``vector`` or ``grid``.
        shape: of one row, (C) or (H, W, C).
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

    def arrays(self, path: str, block_rows: int) -> tuple[ArraySpec, ...]:
        """Returns one array of the logical type; bfloat16 lies in uint16."""
        dtype = _STORED_DTYPE[self.dtype]
        attributes: dict[str, Any] = {}
        fill: Fill = "NaN"
        if self.dtype == "bfloat16":
            fill = BFLOAT16_MISSING
            attributes["decode"] = "float32 with these upper 16 bits; fill is missing"
        axes = tuple(zip(_AXES[self.kind], self.shape, strict=True))
        spec = self._spec(
            path, "", block_rows, dtype, axes, self._codec(), fill, attributes
        )
        return (spec,)

    def encode(
        self, values: Array, usable: npt.NDArray[np.bool_], *, reuse: bool = False
    ) -> Encoded:
        """Returns the values themselves, copied only where a row is missing."""
        values, usable = self._checked(values, usable)
        bad = usable & _non_finite_rows(values, self.dtype)
        stored = _with_missing(values, bad | ~usable, self.dtype, reuse)
        return Encoded({"": stored}, dict.fromkeys(_numbers(bad), NON_FINITE))

    def decode(self, arrays: Mapping[str, Array]) -> npt.NDArray[np.float32]:
        """Returns the exact values as float32; missing rows are NaN."""
        return _to_float32(arrays[""], self.dtype)

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
        axes = tuple(zip(_AXES[self.kind], self.shape, strict=True))
        return (self._spec(path, "", block_rows, "float16", axes, "lz4", "NaN", {}),)

    def encode(
        self, values: Array, usable: npt.NDArray[np.bool_], *, reuse: bool = False
    ) -> Encoded:
        """Returns the values rounded; rows that become infinite are refused."""
        values, usable = self._checked(values, usable)
        if self.dtype == "float16":
            stored = values
        else:
            stored = np.empty(values.shape, np.float16)
            with np.errstate(over="ignore", invalid="ignore"):
                for piece in _pieces(values):
                    stored[piece] = _to_float32(values[piece], self.dtype)
            reuse = True
        bad = usable & _non_finite_rows(stored, "float16")
        refused = {
            row: NON_FINITE
            if _non_finite_rows(values[row : row + 1], self.dtype)[0]
            else OVERFLOW_FLOAT16
            for row in _numbers(bad)
        }
        return Encoded(
            {"": _with_missing(stored, bad | ~usable, "float16", reuse)}, refused
        )

    def decode(self, arrays: Mapping[str, Array]) -> npt.NDArray[np.float32]:
        """Returns the rounded values as float32; missing rows are NaN."""
        return _to_float32(arrays[""], "float16")


@register("topk")
@dataclass(frozen=True, kw_only=True)
class TopK(Encoding):
    """The k largest logits of the last axis, and the log-sum-exp of all others.

    Stored are ids and raw logits, largest first and ties by lower id, and per
    temperature T the log-sum-exp of the others' logits / T (minus infinity where there
    are none).

    Decoding gives the k logits exactly and each of the C - k others
    ``T * (rest[T] - log(C - k))``: their total mass at T is kept, its spread over them
    is taken as uniform. That is an approximation, and at another temperature not even
    the mass is known; with k = C every temperature is exact.

    Attributes:
        topk: k.
        temperatures: at which the mass of the others is kept.
    """

    topk: int
    temperatures: tuple[float, ...] = (1.0,)

    suffixes: ClassVar[tuple[str, ...]] = ("_index", "_value", "_rest")

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 1 <= self.topk <= self.num_classes:
            self._refuse("topk", f"lie in [1, {self.num_classes}]", self.topk)
        if not self.temperatures or not all(
            0 < t < math.inf for t in self.temperatures
        ):
            self._refuse("temperatures", "be positive numbers", self.temperatures)

    @classmethod
    def from_config(cls, config: OutputConfig, **common: Any) -> Encoding:
        """Returns what a job asks for, with its k and temperatures."""
        return cls(topk=config.topk or 0, temperatures=config.temperatures, **common)

    def to_json(self) -> dict[str, Any]:
        """Returns JSON values, k and the temperatures among them."""
        own = {"topk": self.topk, "temperatures": list(self.temperatures)}
        return {**super().to_json(), **own}

    @property
    def num_classes(self) -> int:
        """Length of the last axis, C."""
        return self.shape[-1]

    @property
    def _index_dtype(self) -> str:
        # Ids end below num_classes, so the type's largest value is free to be the fill.
        return "uint16" if self.num_classes <= 0xFFFF else "uint32"

    @property
    def _index_missing(self) -> int:
        return int(np.iinfo(self._index_dtype).max)

    def arrays(self, path: str, block_rows: int) -> tuple[ArraySpec, ...]:
        """Returns ids, logits and the log-sum-exp of the others."""
        lead = tuple(zip(_AXES[self.kind][:-1], self.shape[:-1], strict=True))
        top = (*lead, ("k", self.topk))
        rest = (*lead, ("temperature", len(self.temperatures)))
        attributes = {
            "num_classes": self.num_classes,
            "temperatures": list(self.temperatures),
            "decode": "logits[index] = value; all others T * (rest[T] - "
            "log(num_classes - k)), T of temperatures; fill is missing",
        }
        stored = _STORED_DTYPE[self.dtype]
        fill = BFLOAT16_MISSING if self.dtype == "bfloat16" else "NaN"
        return tuple(
            self._spec(
                path, suffix, block_rows, dtype, axes, "lz4", missing, attributes
            )
            for suffix, dtype, axes, missing in (
                ("_index", self._index_dtype, top, self._index_missing),
                ("_value", stored, top, fill),
                ("_rest", "float32", rest, "NaN"),
            )
        )

    def encode(
        self, values: Array, usable: npt.NDArray[np.bool_], *, reuse: bool = False
    ) -> Encoded:
        """Returns ids, logits and the log-sum-exp of the others."""
        values, usable = self._checked(values, usable)
        lead = values.shape[:-1]
        index = np.empty((*lead, self.topk), self._index_dtype)
        value = np.empty((*lead, self.topk), values.dtype)
        rest = np.empty((*lead, len(self.temperatures)), np.float32)
        # Rows that are not finite compute nonsense here and are filled below.
        with np.errstate(all="ignore"):
            for piece in _pieces(values):
                index[piece], value[piece], rest[piece] = self._split(values[piece])
        bad = _non_finite_rows(values, self.dtype)
        if self.topk < self.num_classes:
            # Logits near the end of float32 over a small temperature.
            bad |= ~np.isfinite(rest).all(axis=tuple(range(1, rest.ndim)))
        bad &= usable
        missing = bad | ~usable
        index[missing] = self._index_missing
        stored = {
            "_index": index,
            "_value": _with_missing(value, missing, self.dtype, reuse=True),
            "_rest": _with_missing(rest, missing, "float32", reuse=True),
        }
        return Encoded(stored, dict.fromkeys(_numbers(bad), NON_FINITE))

    def _split(self, values: Array) -> tuple[Array, Array, Array]:
        # One 64-bit key per logit, the complement of its ordered bits above its id,
        # makes all keys distinct: the result does not hang on how a partition breaks
        # ties.
        logits = _to_float32(values, self.dtype) + np.float32(0)  # -0.0 ties with 0.0
        bits = logits.view(np.uint32)
        negative = (logits.view(np.int32) >> 31).view(np.uint32)
        keys = (~(bits ^ (negative | np.uint32(0x80000000)))).astype(np.uint64) << 32
        keys |= np.arange(self.num_classes, dtype=np.uint64)
        if self.topk < self.num_classes:
            keys.partition(self.topk - 1, axis=-1)
        top = np.sort(keys[..., : self.topk], axis=-1)
        index = (top & np.uint64(0xFFFFFFFF)).astype(np.intp)
        value = np.take_along_axis(values, index, axis=-1)
        np.put_along_axis(logits, index, -np.inf, axis=-1)
        return index, value, self._log_sum_exp(logits)

    def _log_sum_exp(self, logits: Array) -> Array:
        """Returns (..., temperatures) float64 over the last axis of float32 logits."""
        if self.topk == self.num_classes:
            return np.full((*logits.shape[:-1], len(self.temperatures)), -np.inf)
        largest = logits.max(axis=-1, keepdims=True)
        logits -= largest
        rest = np.empty((*logits.shape[:-1], len(self.temperatures)))
        for column, temperature in enumerate(self.temperatures):
            terms = np.exp(logits / np.float32(temperature))
            rest[..., column] = np.log(terms.sum(axis=-1, dtype=np.float64))
            rest[..., column] += largest[..., 0].astype(np.float64) / temperature
        return rest

    def decode(
        self, arrays: Mapping[str, Array], temperature: float | None = None
    ) -> npt.NDArray[np.float32]:
        """Returns float32 (rows, *shape) of dense logits; missing rows are NaN.

        Args:
            arrays: from each suffix to the stored rows.
            temperature: at which the others' mass is kept; the first where omitted.

        Raises:
            BankError: nothing is stored for that temperature, or an id is out of range.
        """
        index, value = arrays["_index"], _to_float32(arrays["_value"], self.dtype)
        missing = index[..., 0] == self._index_missing
        index = np.where(missing[..., None], 0, index.astype(np.intp))
        if index.size and index.max() >= self.num_classes:
            raise BankError(
                f"ids of {self.name} must be below {self.num_classes}, got "
                f"{index.max()}; verify the bank"
            )
        out = np.empty((*index.shape[:-1], self.num_classes), np.float32)
        if self.topk < self.num_classes:
            out[...] = self._tail(arrays["_rest"], value, temperature)[..., None]
        np.put_along_axis(out, index, value, axis=-1)
        out[missing] = np.nan
        return out

    def _tail(self, rest: Array, value: Array, temperature: float | None) -> Array:
        wanted = self.temperatures[0] if temperature is None else temperature
        if wanted not in self.temperatures:
            raise BankError(
                f"temperature of {self.name} must be one of {list(self.temperatures)}, "
                f"got {wanted}; only there is the mass of the others known"
            )
        column = rest[..., self.temperatures.index(wanted)].astype(np.float64)
        tail = wanted * (column - math.log(self.num_classes - self.topk))
        # Rounding must not lift the others above the smallest logit that is kept.
        return np.minimum(tail, value[..., -1]).astype(np.float32)


def _pieces(values: Array) -> Iterator[slice]:
    rows = max(1, _PIECE_BYTES // max(1, values[:1].nbytes))
    for start in range(0, len(values), rows):
        yield slice(start, start + rows)


def _numbers(rows: npt.NDArray[np.bool_]) -> list[int]:
    return np.flatnonzero(rows).tolist()


def _non_finite_rows(values: Array, dtype: LogicalDtype) -> npt.NDArray[np.bool_]:
    """Returns (rows,): whether a row holds an infinity or a not-a-number.

    Read as signed integers the positive ones of these are the largest numbers, read as
    unsigned ones the negative: two maxima per piece, no temporary array, at the speed
    of memory for each of the three types.
    """
    bits = 8 * values.dtype.itemsize
    flat = values.reshape(len(values), math.prod(values.shape[1:]))
    unsigned = flat.view(f"u{bits // 8}")
    signed = unsigned.view(f"i{bits // 8}")
    infinity = _INFINITY_BITS[dtype]
    found = np.zeros(len(values), np.bool_)
    for piece in _pieces(values):
        found[piece] = signed[piece].max(axis=1) >= infinity
        found[piece] |= unsigned[piece].max(axis=1) >= infinity | 1 << (bits - 1)
    return found


def _with_missing(
    values: Array, missing: npt.NDArray[np.bool_], dtype: LogicalDtype, reuse: bool
) -> Array:
    if not missing.any():
        return values
    filled = values if reuse and values.flags.writeable else values.copy()
    filled[missing] = BFLOAT16_MISSING if dtype == "bfloat16" else np.nan
    return filled


def _to_float32(values: Array, dtype: LogicalDtype) -> npt.NDArray[np.float32]:
    if dtype == "bfloat16":
        shift = np.uint32(16)
        return np.left_shift(values, shift, dtype=np.uint32).view(np.float32)
    return values.astype(np.float32, copy=False)
