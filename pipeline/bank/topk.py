"""The preset ``topk``: the k largest logits, and the mass of all others."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from manifests.errors import BankError
from manifests.teacher import OutputConfig
from pipeline.bank.arrays import ArraySpec
from pipeline.bank.encoding import (
    AXES,
    BFLOAT16_MISSING,
    NON_FINITE,
    STORED_DTYPE,
    Array,
    Encoded,
    Encoding,
    non_finite_rows,
    pieces,
    register,
    row_numbers,
    to_float32,
    with_missing,
)


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
        lead = tuple(zip(AXES[self.kind][:-1], self.shape[:-1], strict=True))
        top = (*lead, ("k", self.topk))
        rest = (*lead, ("temperature", len(self.temperatures)))
        attributes = {
            "num_classes": self.num_classes,
            "temperatures": list(self.temperatures),
            "decode": "logits[index] = value; all others T * (rest[T] - "
            "log(num_classes - k)), T of temperatures; fill is missing",
        }
        ids, stored = self._index_dtype, STORED_DTYPE[self.dtype]
        fill = BFLOAT16_MISSING if self.dtype == "bfloat16" else "NaN"
        return tuple(
            self._spec(
                path,
                suffix,
                block_rows,
                dtype,
                axes,
                "lz4",
                missing,
                # Ids in uint16 are numbers, beside values in uint16 that are bfloat16.
                {**attributes, "logical_dtype": logical},
            )
            for suffix, dtype, logical, axes, missing in (
                ("_index", ids, ids, top, self._index_missing),
                ("_value", stored, self.dtype, top, fill),
                ("_rest", "float32", "float32", rest, "NaN"),
            )
        )

    def _encode(
        self,
        values: Array,
        usable: npt.NDArray[np.bool_],
        missing_cells: npt.NDArray[np.bool_] | None,
        reuse: bool,
    ) -> Encoded:
        """Returns ids, logits and the log-sum-exp of the others."""
        lead = values.shape[:-1]
        index = np.empty((*lead, self.topk), self._index_dtype)
        value = np.empty((*lead, self.topk), values.dtype)
        rest = np.empty((*lead, len(self.temperatures)), np.float32)
        # Rows that are not finite compute nonsense here and are filled below.
        with np.errstate(all="ignore"):
            for piece in pieces(values):
                index[piece], value[piece], rest[piece] = self._split(values[piece])
        bad = non_finite_rows(values, self.dtype)
        if self.topk < self.num_classes:
            # Logits near the end of float32 over a small temperature.
            bad |= ~np.isfinite(rest).all(axis=tuple(range(1, rest.ndim)))
        bad &= usable
        missing = bad | ~usable
        index[missing] = self._index_missing
        stored = {
            "_index": index,
            "_value": with_missing(value, missing, self.dtype, reuse=True),
            "_rest": with_missing(rest, missing, "float32", reuse=True),
        }
        return Encoded(stored, dict.fromkeys(row_numbers(bad), NON_FINITE))

    def _split(self, values: Array) -> tuple[Array, Array, Array]:
        # One 64-bit key per logit, the complement of its ordered bits above its id,
        # makes all keys distinct: the result does not hang on how a partition breaks
        # ties.
        logits = to_float32(values, self.dtype) + np.float32(0)  # -0.0 ties with 0.0
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
        index, value = arrays["_index"], to_float32(arrays["_value"], self.dtype)
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
