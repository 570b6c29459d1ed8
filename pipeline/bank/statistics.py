"""Statistics of an output's vectors: which rows are read, and what is kept of them.

Owns the deterministic choice of chunks and cells, moments that merge, and the floored
standard deviation. All sums are float64. Does not read: finalise reads the chosen
chunks twice, once for ``Moments`` and once, the mean direction known, for
``angle_dispersion``.

Rows come in bank order whatever runner made the bank, so equal banks give equal bytes.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from manifests.errors import BankError

Array = npt.NDArray[np.float64]

FLOOR = 0.01
"""Share of the output's median deviation below which a channel counts as dead."""

NUM_VECTORS = 200_000
NUM_GRID_ROWS = 4_096
NUM_CELLS = 64


class Moments:
    """Count, mean, second moments and direction of vectors of D channels; they merge.

    Source: Chan, Golub and LeVeque, "Updating formulae and a pairwise algorithm for
    computing sample variances" (1979), equation 2.1, for ``update`` and ``merge``.
    """

    def __init__(self, num_channels: int, *, covariance: bool = False) -> None:
        """Starts with no vectors.

        Args:
            num_channels: D.
            covariance: whether all D x D second moments are kept, not only the
                diagonal.
        """
        self.num_channels = num_channels
        self.count = 0
        self._mean = np.zeros(num_channels)
        shape = (num_channels, num_channels) if covariance else (num_channels,)
        self._squares = np.zeros(shape)
        self._directions = np.zeros(num_channels)

    @property
    def has_covariance(self) -> bool:
        """Whether all D x D second moments are kept."""
        return self._squares.ndim == 2

    def update(self, values: npt.NDArray[np.floating]) -> None:
        """Adds vectors.

        Args:
            values: (n, D), finite.

        Raises:
            BankError: another number of channels, or a value that is not finite: one
                would make every statistic not-a-number.
        """
        if values.ndim != 2 or values.shape[1] != self.num_channels:
            raise BankError(
                f"values must be (n, {self.num_channels}), got {values.shape}"
            )
        if len(values) == 0:
            return
        vectors = values.astype(np.float64)
        mean = vectors.mean(axis=0)
        if not np.isfinite(mean).all():
            raise BankError(
                "values must be finite, got some that are not; leave out missing rows"
            )
        added = Moments(self.num_channels, covariance=self.has_covariance)
        added.count = len(vectors)
        added._mean = mean
        added._directions = _unit(vectors).sum(axis=0)
        vectors -= mean
        added._squares = (
            vectors.T @ vectors
            if self.has_covariance
            else np.einsum("nd,nd->d", vectors, vectors)
        )
        self.merge(added)

    def merge(self, other: Moments) -> None:
        """Adds all vectors that ``other`` has seen; ``other`` stays as it is.

        Raises:
            BankError: it has other channels, or only one of both has the covariance.
        """
        if other._squares.shape != self._squares.shape:
            raise BankError(
                f"moments must have the same channels to be merged, got "
                f"{self._squares.shape} and {other._squares.shape}"
            )
        total = self.count + other.count
        if total == 0:
            return
        delta = other._mean - self._mean
        product = np.outer(delta, delta) if self.has_covariance else delta * delta
        self._squares += other._squares + product * (self.count * other.count / total)
        self._mean += delta * (other.count / total)
        self._directions += other._directions
        self.count = total

    @property
    def mean(self) -> Array:
        """(D,); NaN where there are no vectors."""
        return self._mean.copy() if self.count else np.full(self.num_channels, np.nan)

    @property
    def variance(self) -> Array:
        """(D,), divided by the count; NaN where there are no vectors."""
        squares = self._squares.diagonal() if self.has_covariance else self._squares
        return squares / (self.count or math.nan)

    @property
    def covariance(self) -> Array:
        """(D, D), divided by the count; NaN where there are no vectors.

        Raises:
            BankError: it was not kept.
        """
        if not self.has_covariance:
            raise BankError("covariance must be asked for when moments are made")
        return self._squares / (self.count or math.nan)

    @property
    def mean_direction(self) -> Array:
        """(D,), of length 1: the mean of all vectors' directions, made a direction.

        NaN where it is not defined: no vectors, or directions that cancel.
        """
        length = float(np.linalg.norm(self._directions))
        return self._directions / (length or math.nan)

    def to_arrays(
        self, dispersion: float = math.nan
    ) -> dict[str, npt.NDArray[np.generic]]:
        """Returns what the bank keeps under ``stats/``.

        Args:
            dispersion: mean squared angle to ``mean_direction``, radians squared, from
                ``angle_dispersion`` over the same vectors.

        Returns:
            float64 ``mean``, ``variance``, ``mean_direction`` (D,), ``covariance`` (D,
            D) where kept, ``dispersion`` (), and int64 ``count`` ().
        """
        arrays: dict[str, npt.NDArray[np.generic]] = {
            "mean": self.mean,
            "variance": self.variance,
            "mean_direction": self.mean_direction,
            "dispersion": np.asarray(dispersion, np.float64),
            "count": np.asarray(self.count, np.int64),
        }
        if self.has_covariance:
            arrays["covariance"] = self.covariance
        return arrays


def angle_dispersion(
    values: npt.NDArray[np.floating], mean_direction: Array
) -> tuple[float, int]:
    """Returns the sum of squared angles to a direction, and of how many vectors.

    Sums over several calls divide to the dispersion of them all: the mean squared angle
    that C-RADIOv4's angle loss divides by. Vectors of length 0 have no angle and do not
    count.

    Args:
        values: (n, D), finite.
        mean_direction: (D,), of length 1.

    Returns:
        Sum in radians squared, and the number of vectors in it.

    Source: C-RADIOv4, summary angle loss: theta(x, y)^2 / Disp(theta_y).
    """
    vectors = values.astype(np.float64)
    units = _unit(vectors[vectors.any(axis=1)])
    # Kahan's form: the arc cosine loses half the digits where angles are small.
    apart = np.linalg.norm(units - mean_direction, axis=1)
    along = np.linalg.norm(units + mean_direction, axis=1)
    angles = 2 * np.arctan2(apart, along)
    return float(np.sum(angles * angles)), len(units)


def _unit(vectors: Array) -> Array:
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    return vectors / np.where(lengths > 0, lengths, 1)


def floored_std(variance: Array) -> Array:
    """Returns (D,) standard deviations that are safe to divide by.

    Each is at least 0.01 of the output's median deviation, for a dead channel divided
    by its own deviation is amplified noise (measured: 3 dead channels of 768 took the
    cosine of a standardised target from 1.00 to 0.81). Where more than half are exactly
    constant the median is that of the others, and 1 where all are.

    Args:
        variance: (D,), not negative.
    """
    std = np.sqrt(variance)
    return np.maximum(std, _floor(std))


def dead_channels(variance: Array) -> npt.NDArray[np.int64]:
    """Returns the channels, ascending, that ``floored_std`` lifts."""
    std = np.sqrt(variance)
    return np.flatnonzero(std < _floor(std)).astype(np.int64)


def _floor(std: Array) -> float:
    if not std.any():
        return 1.0
    return FLOOR * float(np.median(std) or np.median(std[std > 0]))


def choose_chunks(
    valid: npt.NDArray[np.bool_], chunk_rows: int, limit: int
) -> npt.NDArray[np.int64]:
    """Returns which inner chunks to read for about ``limit`` valid rows.

    Whole chunks, since a chunk is what a read decodes; spread evenly over the valid
    rows, so that every shard counts by its size. A pure function, in row order.

    Args:
        valid: (blocks, block_rows), bool.
        chunk_rows: rows of an inner chunk; divides ``block_rows``.
        limit: of valid rows, at least 1; all chunks with any where there are no more.

    Returns:
        (n, 2) int64: block and chunk within it, ascending, each with a valid row.

    Raises:
        BankError: ``chunk_rows`` does not divide the rows of a block.
    """
    num_blocks, block_rows = valid.shape
    if chunk_rows < 1 or block_rows % chunk_rows:
        raise BankError(f"chunk_rows must divide {block_rows}, got {chunk_rows}")
    per_block = block_rows // chunk_rows
    counts = valid.reshape(num_blocks * per_block, chunk_rows).sum(axis=1)
    chosen = np.flatnonzero(counts)
    total = int(counts.sum())
    if total > limit:
        # The middle row of each of `num` equal runs of the valid rows; integers only,
        # so that no rounding hangs on the machine.
        num = max(1, round(limit * len(chosen) / total))
        middles = (2 * np.arange(num, dtype=np.int64) + 1) * total // (2 * num)
        chosen = np.unique(np.searchsorted(np.cumsum(counts), middles, side="right"))
    return np.stack(np.divmod(chosen, per_block), axis=1).astype(np.int64)


def choose_cells(
    rows: npt.NDArray[np.int64], num_cells: int, limit: int = NUM_CELLS
) -> npt.NDArray[np.int64]:
    """Returns which cells of a grid count, drawn for each row on its own.

    Args:
        rows: (n,) numbers of rows in the bank.
        num_cells: cells of a grid, in raster order.
        limit: cells of each row; all where there are no more.

    Returns:
        (n, min(limit, num_cells)) int64, ascending in each row, without repeats. A
        row's draw depends on its number alone.
    """
    if num_cells <= limit:
        return np.tile(np.arange(num_cells, dtype=np.int64), (len(rows), 1))
    cells = np.arange(num_cells, dtype=np.uint64)
    id_bits = np.uint64(max(1, (num_cells - 1).bit_length()))
    chosen = np.empty((len(rows), limit), np.int64)
    for number, row in enumerate(rows.astype(np.uint64)):
        draws = mixed_bits(mixed_bits(row[None]) ^ cells)
        # The cell's number in the lowest bits makes all keys distinct.
        keys = (draws >> id_bits) << id_bits | cells
        smallest = np.partition(keys, limit - 1)[:limit]
        chosen[number] = np.sort(smallest & ((np.uint64(1) << id_bits) - np.uint64(1)))
    return chosen


def mixed_bits(counters: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """Returns 64 well-mixed bits of each counter (SplitMix64's finaliser).

    Source: Steele, Lea and Flood, "Fast splittable pseudorandom number generators"
        (2014).
    """
    mixed = counters * np.uint64(0x9E3779B97F4A7C15)
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return mixed ^ (mixed >> np.uint64(31))
