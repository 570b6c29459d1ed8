"""Learning rates against their closed forms."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from manifests.errors import ManifestError
from student_train.schedules import lr_at


@pytest.mark.parametrize("kind", ["cosine", "constant", "linear"])
def test_warm_up_is_linear_and_never_zero(kind):
    rates = [lr_at(step, 100, 0.4, 8, kind) for step in range(9)]
    np.testing.assert_allclose(rates[:8], 0.4 * np.arange(1, 9) / 8)
    assert rates[8] == 0.4


def test_cosine_at_its_known_points():
    def at(step):
        return lr_at(step, 120, 2.0, 20, "cosine", final_fraction=0.1)

    assert at(20) == 2.0
    assert at(70) == pytest.approx(2.0 * 0.55)
    assert at(20 + 25) == pytest.approx(2.0 * (0.1 + 0.9 * (1 + math.sqrt(0.5)) / 2))
    assert at(120) == at(500) == pytest.approx(0.2)


def test_cosine_is_half_a_period_of_numpys():
    steps = np.arange(300)
    expected = 0.5 * 3e-4 * (1 + np.cos(np.pi * steps / 300))
    found = [lr_at(int(step), 300, 3e-4, 0, "cosine") for step in steps]
    np.testing.assert_allclose(found, expected, rtol=1e-9)


def test_linear_and_constant():
    assert lr_at(55, 100, 1.0, 10, "linear") == pytest.approx(0.5)
    assert lr_at(55, 100, 1.0, 10, "linear", 0.2) == pytest.approx(0.2 + 0.8 * 0.5)
    assert lr_at(100, 100, 1.0, 10, "linear", 0.2) == pytest.approx(0.2)
    assert lr_at(99, 100, 1.0, 10, "constant") == 1.0
    assert lr_at(500, 100, 1.0, 10, "constant") == 1.0


def test_a_stage_that_is_all_warm_up():
    assert lr_at(9, 10, 1.0, 10, "cosine") == 1.0
    assert lr_at(10, 10, 1.0, 10, "cosine", 0.5) == 0.5


@given(
    st.integers(1, 500),
    st.data(),
    st.sampled_from(["cosine", "linear", "constant"]),
    st.floats(0, 1),
)
def test_rises_to_the_peak_then_never_rises(total, data, kind, final):
    warmup = data.draw(st.integers(0, total))
    rates = np.array([lr_at(s, total, 1.0, warmup, kind, final) for s in range(total)])
    assert (rates <= 1 + 1e-12).all()
    assert (np.diff(rates[:warmup]) > 0).all()
    assert (np.diff(rates[warmup:]) <= 1e-12).all()
    assert (rates[warmup:] >= final - 1e-12).all()


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"step": -1}, "step must be at least 0, got -1"),
        ({"total_steps": 0}, "steps must be at least 1, got 0"),
        ({"warmup_steps": 11}, r"warmup_steps must lie in 0..10 \(steps\), got 11"),
        ({"final_fraction": 1.5}, "final_fraction must lie in 0..1, got 1.5"),
    ],
)
def test_what_cannot_be_is_refused(changed, message):
    arguments = {"step": 0, "total_steps": 10, "peak": 1.0, "warmup_steps": 0}
    with pytest.raises(ManifestError, match=message):
        lr_at(**{**arguments, "kind": "cosine", **changed})
