"""Input sizes: known ones, and the law that aspect and number of tokens are kept."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.samples.fitting import fit_size


@pytest.mark.parametrize(
    ("native", "stride", "aspect", "fit", "expected"),
    [
        ((518, 518), 14, 1.0, "tokens", (518, 518)),
        ((224, 224), 16, 16 / 9, "squash", (224, 224)),
        ((256, 256), 16, 16 / 9, "tokens", (192, 336)),
        ((256, 256), 16, 9 / 16, "tokens", (336, 192)),
        ((224, 224), 32, 2.0, "tokens", (160, 320)),
        ((256, 192), 16, 0.75, "tokens", (256, 192)),
        ((224, 224), 16, 1242 / 375, "tokens", (128, 416)),
    ],
)
def test_fit_size(
    native: tuple[int, int],
    stride: int,
    aspect: float,
    fit: str,
    expected: tuple[int, int],
) -> None:
    assert fit_size(native, stride, aspect, fit) == expected


@given(st.sampled_from([14, 16]), st.integers(12, 40), st.floats(0.25, 4.0))
def test_fit_size_keeps_aspect_and_tokens(
    stride: int, side: int, aspect: float
) -> None:
    native = (side * stride, side * stride)
    height, width = fit_size(native, stride, aspect, "tokens")
    assert height % stride == width % stride == 0
    assert abs(math.log(width / height / aspect)) < 0.08
    tokens = height * width / stride**2
    assert abs(math.log(tokens / side**2)) < 0.2
