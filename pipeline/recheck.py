"""Recheck: what a bank says of some rows beside what its live teachers say now.

The pure core: which rows are looked at, how near two rows are, what verdict that gives.
Runs nothing and reads nothing; that is ``recheck_rows``.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from manifests.loading import canonical_json
from pipeline.bank.encoding import Array, Encoding, to_float32
from pipeline.bank.statistics import floored_std
from pipeline.bank.topk import TopK

Bools = npt.NDArray[np.bool_]
Floats = npt.NDArray[np.float64]

LEAST_COSINE = {"float32": 0.9999, "bfloat16": 0.999, "float16": 0.999}
"""Of a row by the precision of its teacher, where another kind of device or version may
round otherwise. Measured between AVX512 and AVX2, the worst of 40 rows: 1 - 3e-8 of
ResNet-56 in float32, 0.99977 of a ViT in bfloat16, standardised.
"""

TOLERANCE = (
    "a row's cosine, plain and standardised, must be at least "
    f"{LEAST_COSINE['float32']} ({LEAST_COSINE['bfloat16']} where the teacher computes "
    "in 16 bits), what its encoding rounds off taken away"
)
"""What is asked of rows whose bits need not be the same, in words."""


def choose_rows(
    candidates: npt.NDArray[np.int64],
    count: int,
    seed: int,
    identity: Sequence[str],
) -> npt.NDArray[np.int64]:
    """Returns up to ``count`` of the candidates, ascending, drawn without order.

    A row's chance is a word of Philox, a function of (seed, identity, row): the same
    rows on every machine, and among fewer candidates those that are left.

    Args:
        candidates: (n,) rows of the bank, ascending.
        count: how many are wanted.
        seed: another one draws others.
        identity: what makes the bank the bank.
    """
    if not len(candidates):
        return candidates
    text = canonical_json([seed, list(identity)])
    key = hashlib.blake2b(text.encode(), digest_size=16).digest()
    bits = np.random.Philox(key=int.from_bytes(key, "little"))
    words = bits.random_raw(int(candidates[-1]) + 1)[candidates]
    return np.sort(candidates[np.argsort(words, kind="stable")[:count]])


@dataclass(frozen=True)
class Moments:
    """What an output is standardised by.

    Attributes:
        mean: (C,).
        std: (C,), floored, so that dead channels are not amplified.
    """

    mean: Floats
    std: Floats

    @classmethod
    def of(cls, statistics: Mapping[str, Floats]) -> Moments | None:
        """Returns those of a bank's statistics; None where no row was valid."""
        if not np.isfinite(statistics["mean"]).all():
            return None
        return cls(statistics["mean"], floored_std(statistics["variance"]))

    def standardise(self, values: Floats) -> Floats:
        """Returns (..., C) values standardised."""
        return (values - self.mean) / self.std


@dataclass(frozen=True)
class Nearness:
    """How near rows of a bank are to what their teacher says.

    Attributes:
        cosine: (n,) of the whole row; 1 where both are zero, 0 where one is, or where
            other values are missing.
        standardised: (n,) the same after standardising; None without moments.
        error: (n,) largest absolute difference.
        excess: (n,) how far a value is beyond what its encoding may have rounded off,
            the largest.
        allowed: (n,) the lesser cosine, plain or standardised, after that much of every
            difference was taken away.
        identical: (n,) whether every stored bit is the same.
        least: what ``allowed`` must be of a row that is near.
    """

    cosine: Floats
    standardised: Floats | None
    error: Floats
    excess: Floats
    allowed: Floats
    identical: Bools
    least: float

    def take(self, rows: Bools) -> Nearness:
        """Returns that of some rows."""
        standardised = None if self.standardised is None else self.standardised[rows]
        return Nearness(
            self.cosine[rows],
            standardised,
            self.error[rows],
            self.excess[rows],
            self.allowed[rows],
            self.identical[rows],
            self.least,
        )

    def put(self, rows: npt.NDArray[np.intp], other: Nearness) -> None:
        """Replaces that of some rows."""
        self.cosine[rows], self.error[rows] = other.cosine, other.error
        self.excess[rows], self.allowed[rows] = other.excess, other.allowed
        self.identical[rows] = other.identical
        if self.standardised is not None and other.standardised is not None:
            self.standardised[rows] = other.standardised

    def holds(self, bits: Bools) -> Bools:
        """Returns (n,) which rows are what is expected of them.

        Args:
            bits: (n,) whether a row's bits must be the same. Of others the cosines
                must be at least `least`, the encoding's own rounding taken away.
        """
        return np.where(bits, self.identical, self.allowed >= self.least)


def compare(
    encoding: Encoding,
    stored: Mapping[str, Array],
    again: Mapping[str, Array],
    exact: npt.NDArray[np.float32],
    moments: Moments | None,
    precision: str = "float32",
) -> Nearness:
    """Returns how near stored rows are to a teacher's.

    Args:
        encoding: of the output.
        stored: rows as the bank holds them, by suffix, (n, ...).
        again: rows as the encoding makes them of the teacher's.
        exact: (n, *shape) the teacher's values; NaN where they are missing.
        moments: to standardise by.
        precision: of the teacher's arithmetic.
    """
    held, said = _told(encoding, stored, exact)
    identical = np.ones(len(held), np.bool_)
    for suffix, values in again.items():
        identical &= _equal_bits(values, stored[suffix])
    held64, said64 = held.astype(np.float64), said.astype(np.float64)
    agree = (np.isnan(held64) == np.isnan(said64)).reshape(len(held), -1).all(axis=1)
    bound = encoding.bound(stored, held).astype(np.float64)
    gap = said64 - held64
    # The value nearest to the teacher's of which the same would be stored.
    allowed64 = held64 + np.clip(gap, -bound, bound)
    allowed, standardised = _cosines(allowed64, said64, agree), None
    if moments is not None:
        teachers = moments.standardise(said64)
        standardised = _cosines(moments.standardise(held64), teachers, agree)
        nearest = _cosines(moments.standardise(allowed64), teachers, agree)
        allowed = np.minimum(allowed, nearest)
    return Nearness(
        _cosines(held64, said64, agree),
        standardised,
        _largest(gap),
        _largest(said64 - allowed64),
        allowed,
        identical,
        LEAST_COSINE[precision],
    )


def _told(
    encoding: Encoding, stored: Mapping[str, Array], exact: npt.NDArray[np.float32]
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
    """Returns the values that are compared: the bank's and the teacher's.

    Of top-k logits those of the classes that the bank holds: what is decoded of all
    others is no class's own.
    """
    if not isinstance(encoding, TopK):
        return encoding.decode(stored), exact
    classes = np.minimum(stored["_index"].astype(np.intp), encoding.num_classes - 1)
    said = np.take_along_axis(exact, classes, axis=-1)
    return to_float32(stored["_value"], encoding.dtype), said


def _largest(values: Floats) -> Floats:
    """Returns (n,) largest magnitude of a row, missing values left out."""
    rows = np.nan_to_num(np.abs(values)).reshape(len(values), -1)
    found: Floats = rows.max(axis=1)
    return found


def _equal_bits(a: Array, b: Array) -> Bools:
    rows = [np.ascontiguousarray(one).reshape(len(one), -1) for one in (a, b)]
    if rows[0].dtype != rows[1].dtype or rows[0].shape != rows[1].shape:
        return np.zeros(len(a), np.bool_)
    found: Bools = (rows[0].view(np.uint8) == rows[1].view(np.uint8)).all(axis=1)
    return found


def _cosines(a: Floats, b: Floats, agree: Bools) -> Floats:
    """Returns (n,) cosines of whole rows, missing values left out."""
    a, b = (np.nan_to_num(one).reshape(len(one), -1) for one in (a, b))
    dot = np.einsum("nd,nd->n", a, b)
    lengths = np.linalg.norm(a, axis=1), np.linalg.norm(b, axis=1)
    product = lengths[0] * lengths[1]
    cosine = np.where(product > 0, dot / np.where(product > 0, product, 1), 0.0)
    cosine[(lengths[0] == 0) & (lengths[1] == 0)] = 1.0
    cosine[~agree] = 0.0
    return cosine


@dataclass(frozen=True)
class Place:
    """A row of a bank in one view."""

    row: int
    view: int
    shard: str
    key: str


@dataclass
class OutputVerdict:
    """What became of one output: sums over the rows and views that were compared.

    Attributes:
        output: ``<teacher>/<group>/<size>/<output>``.
        compared: rows times views.
        identical: how many of them are the same in every stored bit.
        bits_expected: how many had to be.
        failed: how many do not hold.
        cosine_mean: of whole rows.
        cosine_worst: the least of them.
        standardised_mean: after standardising by the bank's statistics; None where the
            bank has none of this output.
        standardised_worst: the least of them.
        largest_error: largest absolute difference of a value.
        largest_excess: the same beyond what the encoding may have rounded off; 0 of
            rows whose bits are the same.
        worst: the row that is farthest; one that does not hold, if there is any.
    """

    output: str
    compared: int = 0
    identical: int = 0
    bits_expected: int = 0
    failed: int = 0
    cosine_mean: float = 0.0
    cosine_worst: float = 1.0
    standardised_mean: float | None = None
    standardised_worst: float | None = None
    largest_error: float = 0.0
    largest_excess: float = 0.0
    worst: Place | None = None
    _worst: tuple[bool, float, float] = field(default=(True, 1.0, 0.0), repr=False)

    @property
    def holds(self) -> bool:
        """Whether every row is what was expected of it."""
        return not self.failed

    def to_json(self) -> dict[str, Any]:
        """Returns what is told of it, as JSON values."""
        facts = {k: v for k, v in asdict(self).items() if not k.startswith("_")}
        return {**facts, "holds": self.holds}

    def add(self, near: Nearness, places: Sequence[Place], bits: Bools) -> None:
        """Adds rows.

        Args:
            near: of n rows.
            places: of each.
            bits: (n,) whether its bits must be the same.
        """
        holds = near.holds(bits)
        count = len(places)
        if not count:
            return
        total = self.compared + count
        self.cosine_mean += (near.cosine.sum() - count * self.cosine_mean) / total
        self.cosine_worst = min(self.cosine_worst, float(near.cosine.min()))
        lowest = near.cosine
        if near.standardised is not None:
            before = self.standardised_mean or 0.0
            change = (near.standardised.sum() - count * before) / total
            self.standardised_mean = float(before + change)
            least = 1.0 if self.standardised_worst is None else self.standardised_worst
            self.standardised_worst = min(least, float(near.standardised.min()))
            lowest = np.minimum(lowest, near.standardised)
        self.cosine_mean = float(self.cosine_mean)
        self.compared = total
        self.identical += int(near.identical.sum())
        self.bits_expected += int(bits.sum())
        self.failed += int((~holds).sum())
        self.largest_error = max(self.largest_error, float(near.error.max()))
        self.largest_excess = max(self.largest_excess, float(near.excess.max()))
        for place, rank in zip(
            places,
            zip(holds.tolist(), lowest.tolist(), (-near.error).tolist(), strict=True),
            strict=True,
        ):
            if self.worst is None or rank < self._worst:
                self.worst, self._worst = place, rank


@dataclass
class Recheck:
    """What a recheck found.

    Attributes:
        seed: of the choice of rows.
        device: kind of device that the teachers ran on.
        rows: rows of the bank that are valid and were looked at.
        invalid_rows: rows that are not, and were tried.
        outputs: a verdict each.
        problems: one line each: a row that is valid in one place alone, an object that
            cannot be read, preprocessing that is not what the bank says.
        notes: why bits need not be the same, by pass.
    """

    seed: int
    device: str
    rows: int = 0
    invalid_rows: int = 0
    outputs: list[OutputVerdict] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    notes: dict[str, str] = field(default_factory=dict)

    @property
    def holds(self) -> bool:
        """Whether all that was looked at is what its teachers say."""
        return not self.problems and all(one.holds for one in self.outputs)
