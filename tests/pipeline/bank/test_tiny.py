"""The encoding `tiny` against its definition, written out; what it costs and loses."""

from __future__ import annotations

import numpy as np
import pytest

from manifests.errors import BankError
from pipeline.bank.encodings import encoding_from_json
from tests.pipeline.bank.test_compact import DTYPES, as_given, loss_of, make, tokens


def told_by_hand(stored, channels):
    """Values of one stored cell, a nibble at a time in plain Python."""
    found = []
    for channel in range(channels):
        byte = int(stored[""][channel // 2])
        nibble = byte >> 4 if channel % 2 else byte & 15
        code = nibble - 16 if nibble > 7 else nibble
        scale = float(stored["_scale"][channel // 32])
        std, mean = (float(stored[name][channel]) for name in ("_std", "_mean"))
        found.append(np.nan if code == -8 else code * scale * std + mean)
    return np.array(found)


@pytest.mark.parametrize("channels", [1, 2, 7, 32, 33, 64, 95])
@pytest.mark.parametrize("dtype", DTYPES)
def test_it_is_what_the_definition_says(channels, dtype):
    rng = np.random.default_rng(channels)
    values = rng.normal(0, 1, (5, 2, 3, channels)) * rng.lognormal(0, 1, channels) + 2
    given = as_given(values, dtype)
    exact = given.view(DTYPES[dtype]).astype(np.float64)
    encoding = make((2, 3, channels), dtype, preset="tiny")
    usable = np.arange(5) != 3
    stored = encoding.encode(given, usable).arrays
    decoded = encoding.decode(stored)
    assert stored[""].shape == (5, 2, 3, -(-channels // 2))
    assert stored["_scale"].shape == (5, 2, 3, -(-channels // 32))
    mean = exact[usable].mean((0, 1, 2))
    std = exact[usable].std((0, 1, 2))
    std = np.maximum(std, 0.01 * np.median(std))
    standard = (exact - mean) / std
    for row, y, x in np.ndindex(5, 2, 3):
        if row == 3:
            continue
        cell = {
            suffix: array[row, y, x] if suffix in ("", "_scale") else array[row]
            for suffix, array in stored.items()
        }
        for group in range(-(-channels // 32)):
            peak = abs(standard[row, y, x, 32 * group : 32 * group + 32]).max()
            scale = float(cell["_scale"][group])
            # Never smaller, and at most the next float16 larger.
            assert peak / 7 * (1 - 1e-4) <= scale <= peak / 7 * (1 + 2.0**-10 + 1e-4)
        by_hand = told_by_hand(cell, channels)
        np.testing.assert_allclose(decoded[row, y, x], by_hand, rtol=1e-5, atol=1e-6)
        if channels % 2:
            assert cell[""][-1] >> 4 == 0
    assert (stored[""][3] == 0x88).all()
    for suffix in ("_scale", "_mean", "_std"):
        assert np.isnan(stored[suffix][3]).all()
    # No nibble of a row that is there means that it is missing.
    held = stored[""][usable]
    assert ((held & 15) != 8).all()
    assert ((held >> 4) != 8).all()


def test_codes_that_are_gone_are_missing_though_their_scales_are_there():
    values = tokens(4, (3, 3, 8))
    encoding = make((3, 3, 8), preset="tiny")
    stored = encoding.encode(values, np.ones(4, np.bool_)).arrays
    stored[""][1] = 0x88
    assert np.isnan(encoding.decode(stored)[1]).all()
    stored["_scale"][2] = np.nan
    assert np.isnan(encoding.decode(stored)[2]).all()
    assert np.isfinite(encoding.decode(stored)[[0, 3]]).all()


@pytest.mark.parametrize(
    "outlier",
    ["none", "constant 100", "constant 400", "wide 100", "wide 400", "tokens"],
)
def test_outliers_cost_the_others_nothing(outlier):
    values = tokens()
    unit, rng = np.median(values.std((0, 1, 2))), np.random.default_rng(1)
    kind, _, size = outlier.partition(" ")
    if kind == "constant":
        values[..., 7] = float(size) * unit
        values[..., 7] += 0.05 * unit * rng.normal(size=values.shape[:-1])
    elif kind == "wide":
        values[..., 7] = float(size) * unit * rng.normal(size=values.shape[:-1])
    elif kind == "tokens":
        values[rng.random(values.shape[:-1]) < 0.01] *= 50
    encoding = make(values.shape[1:], preset="tiny")
    encoded = encoding.encode(values, np.ones(len(values), np.bool_))
    apart, worst = loss_of(values, encoding.decode(encoded.arrays))
    assert apart <= 7e-3
    assert worst <= 2e-2


def test_real_tokens(shared_data):
    (path,) = (shared_data / "tokens").glob("*.npy")
    values = np.load(path)[:16]
    values = values.reshape(len(values), 14, 14, -1)
    encoding = make(values.shape[1:], "float16", preset="tiny")
    stored = encoding.encode(values, np.ones(len(values), np.bool_)).arrays
    apart, worst = loss_of(values, encoding.decode(stored))
    assert 3e-3 <= apart <= 5e-3
    assert worst <= 1.5e-2
    dense = stored[""].nbytes + stored["_scale"].nbytes
    assert dense == values.size * (1 / 2 + 2 / 32)


def test_a_bank_says_the_length_of_its_groups():
    encoding = make((2, 2, 40), preset="tiny")
    assert encoding.to_json()["group"] == 32
    other = encoding_from_json({**encoding.to_json(), "group": 8})
    values = tokens(2, (2, 2, 40))
    stored = other.encode(values, np.ones(2, np.bool_)).arrays
    assert stored["_scale"].shape == (2, 2, 2, 5)
    loss = [
        loss_of(values, one.decode(one.encode(values, np.ones(2, np.bool_)).arrays))[0]
        for one in (other, encoding)
    ]
    assert loss[0] < loss[1]
    with pytest.raises(BankError, match="group must be at least 1, got 0"):
        encoding_from_json({**encoding.to_json(), "group": 0})
