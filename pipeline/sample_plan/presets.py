"""One output in every encoding that fits it: bytes, quality and speed on a sample.

Quality is judged where a loss sees it: values standardised by the sample's channels.
Bytes are those of real chunks (``object_bytes``). Speed is of one thread.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
from pydantic import ValidationError

from manifests.errors import BankError
from manifests.teacher import OutputConfig
from pipeline.bank.arrays import ArraySpec
from pipeline.bank.encoding import ENCODINGS, Encoding, to_float32
from pipeline.bank.encodings import make_encoding
from pipeline.bank.objects import decode_object, encode_object, object_crc32c
from pipeline.bank.statistics import Moments, dead_channels, floored_std
from pipeline.bank.topk import TopK
from pipeline.sample_plan.object_bytes import ChunkModel, chunk_sizes

Bools = npt.NDArray[np.bool_]
Floats = npt.NDArray[np.float64]
_T = TypeVar("_T")
_PIECE_VALUES = 2**21


def label_of(encoding: Encoding) -> str:
    """Returns an encoding's name for people: ``lossless zstd``, ``topk 5``."""
    told = [str(v) for k, v in encoding.to_json().items() if k in ("codec", "topk")]
    return " ".join([encoding.preset, *told])


def candidates(own: Encoding, config: OutputConfig) -> list[Encoding]:
    """Returns every encoding that fits an output, in the order of their registry.

    Args:
        own: the job's choice, always among them.
        config: of the output in the job; its ``topk`` is tried where it has one.
    """
    found = []
    shared: dict[str, Any] = {
        "name": own.name,
        "kind": own.kind,
        "shape": own.shape,
        "dtype": own.dtype,
    }
    for name in ENCODINGS if own.holds_features else ():
        asked = [{"encoding": name}]
        if name == "lossless":
            asked = [{"encoding": name, "codec": codec} for codec in ("lz4", "zstd")]
        for fields in asked:
            try:
                tried = OutputConfig.model_validate(fields)
                encoding = make_encoding(tried, **shared)
            except (ValidationError, BankError):
                # Not of this kind of output, or it needs what only a job can say.
                continue
            found.append(encoding)
    if config.topk and own.preset != "topk":
        found.append(make_encoding(config, **shared))
    return found if own in found else [own, *found]


@dataclass(frozen=True)
class Values:
    """What a teacher says of the sampled rows, for one output and view.

    Attributes:
        array: (rows, *shape) as the teacher gives them; bfloat16 as bit patterns.
        usable: (rows,).
        cells: (rows, ...) which cells are missing; None where none are.
        moments: of the exact values of channels.
    """

    array: np.ndarray
    usable: Bools
    cells: Bools | None
    moments: Moments

    @classmethod
    def of(
        cls, array: np.ndarray, usable: Bools, cells: Bools | None, encoding: Encoding
    ) -> Values:
        """Returns the values with their moments."""
        moments = Moments(array.shape[-1] if array.ndim > 1 else 1)
        values = cls(array, usable, cells, moments)
        if encoding.holds_features:
            for rows in values.pieces():
                moments.update(
                    values.kept(to_float32(array[rows], encoding.dtype), rows)
                )
        return values

    def pieces(self) -> Iterator[slice]:
        """Yields slices of rows of a bounded size."""
        size = max(1, _PIECE_VALUES // max(1, math.prod(self.array.shape[1:])))
        for start in range(0, len(self.array), size):
            yield slice(start, start + size)

    def kept(self, found: np.ndarray, rows: slice) -> np.ndarray:
        """Returns the cells that are not missing of some rows, (n, channels)."""
        is_kept = np.broadcast_to(
            self.usable[rows].reshape(-1, *[1] * (found.ndim - 2)), found.shape[:-1]
        )
        if self.cells is not None:
            is_kept = is_kept & ~self.cells[rows]
        return found[is_kept]

    def part(self, rows: slice) -> Values:
        """Returns some rows, under the moments of all."""
        cells = None if self.cells is None else self.cells[rows]
        return Values(self.array[rows], self.usable[rows], cells, self.moments)


@dataclass(frozen=True)
class Loss:
    """What an encoding loses.

    Attributes:
        one_minus_cosine: mean over cells, both sides standardised.
        worst_channel: largest mean squared error of a live channel over its variance.
        divergence: of top-k logits, whose tail is an approximation: mean
            Kullback-Leibler divergence of what is decoded from the teacher's
            probabilities, nats, at the first temperature.
    """

    one_minus_cosine: float
    worst_channel: float
    divergence: float | None = None


class LossSums:
    """Sums of a ``Loss`` over pieces of rows."""

    def __init__(self, moments: Moments) -> None:
        """Starts with none."""
        self._mean, self._variance = moments.mean, moments.variance
        self._std = floored_std(self._variance)
        self._apart = 0.0
        self.count = 0
        self._squares = np.zeros(len(self._std))

    def add(self, exact_NC: np.ndarray, found_NC: np.ndarray) -> None:
        """Adds cells; where one side has no length, the cosine is 1 if neither has."""
        exact = (exact_NC - self._mean) / self._std
        found = (found_NC - self._mean) / self._std
        gap = exact - found
        self._squares += np.einsum("nc,nc->c", gap, gap)
        lengths = [np.linalg.norm(one, axis=1) for one in (exact, found)]
        is_long = (lengths[0] > 0) & (lengths[1] > 0)
        both = is_long | (lengths[0] != lengths[1])
        safe = [np.where(one > 0, one, 1)[:, None] for one in lengths]
        # 1 - cos = |a - b|^2 / 2 of unit vectors: no digits lost where they are close.
        apart = exact / safe[0] - found / safe[1]
        halves = np.einsum("nc,nc->n", apart, apart) / 2
        self._apart += float(np.where(is_long, halves, 1.0)[both].sum())
        self.count += len(exact)

    def loss(self) -> Loss:
        """Returns what was lost, of all that was added."""
        live = np.delete(
            self._squares
            / self.count
            * self._std**2
            / np.maximum(self._variance, 1e-300),
            dead_channels(self._variance),
        )
        worst = float(live.max()) if live.size else 0.0
        return Loss(self._apart / self.count, worst)


@dataclass(frozen=True)
class Figures:
    """What an encoding costs and loses, on a sample.

    Attributes:
        models: of the chunks of each of its arrays.
        spread: standard error of the mean bytes of a row over that mean, between
            samples and behind what they fill; None where there are too few to tell.
        refused: usable rows that it cannot store.
        loss: None where no row was stored, or nothing varies.
        encode: seconds a row, to the bytes of objects, on one thread.
        decode: seconds a row, to float32, on one thread.
    """

    models: tuple[ChunkModel, ...]
    spread: float | None
    refused: int
    loss: Loss | None
    encode: float
    decode: float

    def block_bytes(self, used: int) -> float:
        """Returns the bytes of a block's objects for one view."""
        return sum(model.object_bytes(used) for model in self.models)


class _Blocks:
    """Rows of a sample laid out as blocks of a bank."""

    def __init__(
        self, encoding: Encoding, specs: Sequence[ArraySpec], block_rows: int
    ) -> None:
        self._encoding, self._specs, self._block_rows = encoding, specs, block_rows

    def __call__(self, values: Values) -> Iterator[tuple[slice, Mapping[str, Any]]]:
        """Yields the rows that fill a block and its stored arrays, whole."""
        size = self._block_rows
        for start in range(0, len(values.array), size):
            part = values.part(slice(start, start + size))
            rows = len(part.array)
            array = _padded(part.array, size, 0)
            usable = _padded(part.usable, size, False)
            cells = None if part.cells is None else _padded(part.cells, size, True)
            encoded = self._encoding.encode(array, usable, missing_cells=cells)
            yield slice(start, start + rows), encoded.arrays

    def sizes(self, values: Values) -> list[list[int]]:
        """Returns the bytes of the chunks of each array."""
        found: list[list[int]] = [[] for _ in self._specs]
        for rows, arrays in self(values):
            for sizes, spec, stored in zip(
                found, self._specs, arrays.values(), strict=True
            ):
                sizes += chunk_sizes(stored, spec, rows.stop - rows.start)
        return found


def _padded(array: np.ndarray, size: int, fill: Any) -> np.ndarray:
    if len(array) == size:
        return array
    padded = np.full((size, *array.shape[1:]), fill, array.dtype)
    padded[: len(array)] = array
    return padded


def measure(encoding: Encoding, values: Values, block_rows: int) -> Figures:
    """Returns what an encoding costs and loses.

    Args:
        encoding: of the output.
        values: a sample; some of it usable.
        block_rows: of the bank.
    """
    specs = encoding.arrays("sample", block_rows)
    blocks = _Blocks(encoding, specs, block_rows)
    encode, encoded = _timed(
        lambda: encoding.encode(values.array, values.usable, missing_cells=values.cells)
    )
    refused = np.zeros(len(values.array), np.bool_)
    refused[list(encoded.refused)] = True
    stored = Values(
        values.array, values.usable & ~refused, values.cells, values.moments
    )
    sums, decode, divergence = LossSums(values.moments), 0.0, 0.0
    sizes: list[list[int]] = [[] for _ in specs]
    for rows, arrays in blocks(values):
        decoded: dict[str, np.ndarray] = {}
        for own, spec, (suffix, array) in zip(
            sizes, specs, arrays.items(), strict=True
        ):
            used = rows.stop - rows.start
            seconds, parts = _timed(lambda: _to_parts(array, spec, used))  # noqa: B023
            encode += seconds
            own += [memoryview(chunk).nbytes for chunk in parts[:-2:2]]
            data = b"".join(parts)
            seconds, decoded[suffix] = _timed(
                lambda: decode_object(data, spec, rows=slice(0, used))  # noqa: B023
            )
            decode += seconds
        if encoding.holds_features:
            seconds, found = _timed(lambda: encoding.decode(decoded))  # noqa: B023
            decode += seconds
            divergence += _add_loss(sums, stored.part(rows), found, encoding)
    count = len(values.array)
    models, spread = _models(blocks, specs, sizes, values)
    loss = None
    # A single vector has no deviation to be standardised by.
    is_varied = encoding.holds_features and values.moments.variance.any()
    if is_varied and stored.usable.any():
        loss = sums.loss()
        if isinstance(encoding, TopK):
            loss = replace(loss, divergence=divergence / sums.count)
    return Figures(
        models=models,
        spread=spread,
        refused=int(refused.sum()),
        loss=loss,
        encode=encode / count,
        decode=decode / count,
    )


def _models(
    blocks: _Blocks,
    specs: Sequence[ArraySpec],
    sizes: Sequence[Sequence[int]],
    values: Values,
) -> tuple[tuple[ChunkModel, ...], float | None]:
    """Returns the chunks' model of each array, and how sure the bytes of a row are."""
    count = len(values.array)
    if count < 8:
        return tuple(
            ChunkModel.of(spec, own, count)
            for spec, own in zip(specs, sizes, strict=True)
        ), None
    quarters = _parts(blocks, values, 4)
    halves = quarters
    if any(count < spec.chunk_rows for spec in specs):
        halves = _parts(blocks, values, 2)
    models = tuple(
        ChunkModel.of(spec, own, count, quarter, half)
        for spec, own, quarter, half in zip(
            specs,
            sizes,
            np.mean(quarters, axis=0).tolist(),
            np.mean(halves, axis=0).tolist(),
            strict=True,
        )
    )
    totals = np.sum(quarters, axis=1)
    sampling = float(totals.std(ddof=1) / math.sqrt(len(totals)) / totals.mean())
    slope = sum(model.slope for model in models)
    doubt = sum(model.doubt for model in models) / slope if slope > 0 else 0.0
    return models, math.hypot(sampling, doubt)


def _parts(blocks: _Blocks, values: Values, parts: int) -> list[list[float]]:
    """Returns the bytes of each array's chunks, for each of so many equal parts."""
    length = len(values.array) // parts
    return [
        [
            float(sum(sizes))
            for sizes in blocks.sizes(values.part(slice(n * length, (n + 1) * length)))
        ]
        for n in range(parts)
    ]


def _add_loss(
    sums: LossSums, stored: Values, found: np.ndarray, encoding: Encoding
) -> float:
    """Adds a block's cells; returns the sum of divergences of top-k logits, else 0."""
    total = 0.0
    for rows in stored.pieces():
        exact = to_float32(stored.array[rows], encoding.dtype)
        cells = stored.kept(exact, rows), stored.kept(found[rows], rows)
        sums.add(*cells)
        if isinstance(encoding, TopK):
            total += divergence_of(*cells, encoding.temperatures[0])
    return total


def divergence_of(
    exact_NC: np.ndarray, found_NC: np.ndarray, temperature: float
) -> float:
    """Returns the sum over rows of KL(exact || found) of logits, nats.

    Args:
        exact_NC: the teacher's logits.
        found_NC: those that are decoded.
        temperature: that both are divided by.
    """
    logs = []
    for logits_NC in (exact_NC, found_NC):
        scaled = logits_NC.astype(np.float64) / temperature
        scaled -= scaled.max(axis=1, keepdims=True)
        logs.append(scaled - np.log(np.exp(scaled).sum(axis=1, keepdims=True)))
    return float((np.exp(logs[0]) * (logs[0] - logs[1])).sum())


def _to_parts(array: np.ndarray, spec: ArraySpec, used: int) -> list[Any]:
    parts = encode_object(array, spec, used)
    object_crc32c(parts)
    return parts


def _timed(action: Callable[[], _T]) -> tuple[float, _T]:
    """Returns the seconds of the faster of two calls, and what it returned."""
    seconds = []
    for _ in range(2):
        started = time.perf_counter()
        result = action()
        seconds.append(time.perf_counter() - started)
    return min(seconds), result
