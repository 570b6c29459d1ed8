"""Whether two arms of an experiment are the same for all that matters, from pairs.

Owns the statistics of ``compression.py``: paired two one-sided tests, how many pairs
they want, and what a number of pairs could have found. Nothing here reads or trains.

Source: Schuirmann (1987), A comparison of the two one-sided tests procedure and the
power approach: both tests at 5 % pass where the 90 % interval lies within the margin.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from scipy.stats import chi2
from scipy.stats import t as student_t

#: Of each of the two tests; the interval then covers 1 - 2 x ALPHA.
ALPHA = 0.05
#: Fewer pairs say too little of their own spread.
FEWEST_PAIRS = 8

Verdict = Literal["equivalent", "not equivalent", "too small to tell"]


@dataclass(frozen=True)
class Comparison:
    """What paired differences say about a margin.

    Attributes:
        pairs: how many.
        mean: of the differences.
        deviation: of the differences, with pairs - 1.
        low: end of the 90 % interval of the mean.
        high: its other end.
        margin: what matters, either way.
    """

    pairs: int
    mean: float
    deviation: float
    low: float
    high: float
    margin: float

    @property
    def verdict(self) -> Verdict:
        """Where the interval lies: within the margin, beyond it, or across its edge."""
        if self.pairs < FEWEST_PAIRS:
            return "too small to tell"
        if -self.margin < self.low and self.high < self.margin:
            return "equivalent"
        if self.low > self.margin or self.high < -self.margin:
            return "not equivalent"
        return "too small to tell"

    @property
    def detectable(self) -> float:
        """The true difference that a test against zero finds with 80 % power.

        One-sided at 5 %, as one of the two tests is; to the approximation of a shifted
        t for the noncentral one.
        """
        degrees = self.pairs - 1
        quantiles = student_t.ppf(1 - ALPHA, degrees) + student_t.ppf(0.8, degrees)
        return float(quantiles) * self.deviation / math.sqrt(self.pairs)


def compare(
    arm: Sequence[float], reference: Sequence[float], margin: float
) -> Comparison:
    """Returns what pairs say about ``arm - reference``.

    Args:
        arm: a score per pair.
        reference: the other's, in the same order.
        margin: the difference that matters, in units of the scores.

    Raises:
        ValueError: fewer than two pairs, or a score without its partner.
    """
    if len(arm) != len(reference) or len(arm) < 2:
        raise ValueError(
            f"scores must be at least two pairs, got {len(arm)} and {len(reference)}"
        )
    differences = [a - b for a, b in zip(arm, reference, strict=True)]
    mean, deviation = statistics.fmean(differences), statistics.stdev(differences)
    quantile = float(student_t.ppf(1 - ALPHA, len(differences) - 1))
    half = quantile * deviation / math.sqrt(len(differences))
    return Comparison(
        len(differences), mean, deviation, mean - half, mean + half, margin
    )


def pairs_wanted(
    pilot_deviation: float, pilot_pairs: int, margin: float, power: float = 0.9
) -> int:
    """Returns the pairs that show equivalence with ``power`` where nothing differs.

    A pilot's deviation is too small half of the time; its one-sided 80 % upper bound is
    planned with.

    Args:
        pilot_deviation: of the pilot's paired differences.
        pilot_pairs: that it is of.
        margin: in the same unit.
        power: share of experiments that come out equivalent.

    Source: Julious (2004), Sample sizes for clinical trials with normal data, section
    5.1, shifted t; Browne (1995), On the use of a pilot sample, for the bound.
    """
    degrees = pilot_pairs - 1
    deviation = pilot_deviation * math.sqrt(degrees / chi2.ppf(0.2, degrees))
    pairs = FEWEST_PAIRS
    while True:
        distance = margin * math.sqrt(pairs) / max(deviation, 1e-12)
        shifted = distance - student_t.ppf(1 - ALPHA, pairs - 1)
        if 2 * student_t.cdf(shifted, pairs - 1) - 1 >= power:
            return pairs
        pairs += 1
