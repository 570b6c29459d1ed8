"""Paired equivalence: against printed tables, simulation and the law of the margin."""

from __future__ import annotations

import importlib.util
import math
import sys
from types import ModuleType

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.conftest import ROOT

# Student's t, 95 % one-sided, by degrees of freedom: any printed table.
T_95 = {7: 1.8946, 15: 1.7531}


def load() -> ModuleType:
    """The benchmarks are scripts and lie in no package."""
    path = ROOT / "benchmarks" / "equivalence.py"
    spec = importlib.util.spec_from_file_location("equivalence", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


equivalence = load()


@pytest.mark.parametrize("pairs", [8, 16])
def test_the_interval_is_that_of_a_printed_table(pairs: int):
    rng = np.random.default_rng(pairs)
    reference = rng.normal(50, 1, pairs)
    arm = reference + rng.normal(0.1, 0.3, pairs)
    found = equivalence.compare(arm.tolist(), reference.tolist(), 0.5)
    differences = arm - reference
    half = T_95[pairs - 1] * differences.std(ddof=1) / math.sqrt(pairs)
    assert found.mean == pytest.approx(differences.mean())
    assert found.deviation == pytest.approx(differences.std(ddof=1))
    assert found.low == pytest.approx(differences.mean() - half, abs=1e-4)
    assert found.high == pytest.approx(differences.mean() + half, abs=1e-4)


# Differences whose mean is `shift` and whose deviation is `spread`, exactly.
@given(
    shift=st.floats(-3, 3),
    spread=st.floats(0.01, 2),
    pairs=st.sampled_from([8, 16]),
)
def test_the_verdict_is_where_the_interval_lies(
    shift: float, spread: float, pairs: int
):
    unit = np.array([1.0, -1.0] * (pairs // 2)) * math.sqrt((pairs - 1) / pairs)
    arm = shift + spread * unit
    found = equivalence.compare(arm.tolist(), [0.0] * pairs, 0.5)
    half = T_95[pairs - 1] * spread / math.sqrt(pairs)
    low, high = shift - half, shift + half
    if min(abs(abs(low) - 0.5), abs(abs(high) - 0.5)) < 1e-3:
        return
    if low > -0.5 and high < 0.5:
        assert found.verdict == "equivalent"
    elif low > 0.5 or high < -0.5:
        assert found.verdict == "not equivalent"
    else:
        assert found.verdict == "too small to tell"


def test_few_pairs_are_too_small_however_alike_they_are():
    same = [50.0, 51.0, 52.0, 53.0, 54.0, 55.0, 56.0]
    assert equivalence.compare(same, same, 0.5).verdict == "too small to tell"
    assert equivalence.compare([*same, 57], [*same, 57], 0.5).verdict == "equivalent"


def test_what_could_be_found_is_found_four_times_in_five():
    pairs, rounds = 10, 20_000
    rng = np.random.default_rng(0)
    noise = rng.normal(0, 1, (rounds, pairs))
    found = equivalence.Comparison(pairs, 0.0, 1.0, 0.0, 0.0, 0.5)
    shifted = noise + found.detectable
    t = shifted.mean(1) / (shifted.std(1, ddof=1) / math.sqrt(pairs))
    # 1.8331: t of a printed table, 9 degrees. The approximation is good to a percent.
    assert (t > 1.8331).mean() == pytest.approx(0.8, abs=0.02)


def test_the_pairs_wanted_show_equivalence_nine_times_in_ten():
    deviation, margin = 0.7, 0.5
    # A pilot so large that its deviation is the truth.
    pairs = equivalence.pairs_wanted(deviation, 10**6, margin)
    rng = np.random.default_rng(1)

    def power(pairs: int) -> float:
        shown = 0
        for _ in range(1_000):
            noise = rng.normal(0, deviation, pairs).tolist()
            found = equivalence.compare(noise, [0.0] * pairs, margin)
            shown += found.verdict == "equivalent"
        return shown / 1_000

    assert power(pairs) > 0.88
    assert power(pairs - 4) < 0.88


def test_a_small_pilot_asks_for_more():
    wanted = equivalence.pairs_wanted
    assert wanted(0.01, 4, 0.5) == equivalence.FEWEST_PAIRS
    # The 20 % point of chi-squared with 3 degrees is 1.0052 in any printed table.
    bound = 0.5 * math.sqrt(3 / 1.0052)
    assert abs(wanted(0.5, 4, 0.5) - wanted(bound, 10**6, 0.5)) <= 1
    assert wanted(0.5, 4, 0.5) > 2 * wanted(0.5, 10**6, 0.5)


def test_scores_without_a_partner_are_refused():
    with pytest.raises(ValueError, match="at least two pairs, got 2 and 1"):
        equivalence.compare([1.0, 2.0], [1.0], 0.5)
    with pytest.raises(ValueError, match="at least two pairs, got 1 and 1"):
        equivalence.compare([1.0], [1.0], 0.5)
