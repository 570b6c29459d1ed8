"""The encoding `compact` against its definition, and what it shares with `tiny`."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from manifests.errors import BankError
from manifests.teacher import OutputConfig
from pipeline.bank.encodings import make_encoding

# Its codes fill 1.4 MB a row, so that two rows make a chunk.
WIDE = (16, 16, 5500)
DTYPES = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}


BOTH = pytest.mark.parametrize("preset", ["compact", "tiny"])


def make(shape, dtype="float32", kind="grid", name="patch", preset="compact"):
    config = OutputConfig(encoding=preset)
    return make_encoding(config, name=name, kind=kind, shape=shape, dtype=dtype)


def as_given(values, dtype):
    given = values.astype(DTYPES[dtype])
    return given.view(np.uint16) if dtype == "bfloat16" else given


def expected(exact):
    """Mean, floored deviation, scales and codes of one chunk's cells, (N, C)."""
    mean = exact.astype(np.float64).mean(axis=0)
    std = exact.astype(np.float64).std(axis=0)
    std = np.maximum(std, 0.01 * np.median(std))
    standard = (exact - mean) / std
    peak = abs(standard).max(axis=1, keepdims=True)
    return mean, std, peak / 127, standard / (peak / 127)


def loss_of(exact, found):
    """(mean of 1 - cosine, worst live channel), standardised over all tokens."""
    exact, found = (
        x.reshape(-1, x.shape[-1]).astype(np.float64) for x in (exact, found)
    )
    std = exact.std(axis=0)
    floor = 0.01 * np.median(std)
    mean, divisor = exact.mean(axis=0), np.maximum(std, floor)
    a, b = (exact - mean) / divisor, (found - mean) / divisor
    cosine = (a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)
    error = ((exact - found) ** 2).mean(axis=0)[std >= floor]
    return 1 - cosine.mean(), (error / std[std >= floor] ** 2).max()


def tokens(rows=16, shape=(14, 14, 192), seed=0):
    """Tokens whose channels differ in mean and deviation, two of them constant."""
    rng = np.random.default_rng(seed)
    values = rng.normal(0, 1, (rows, *shape)) * rng.lognormal(0, 1, shape[-1])
    values += rng.normal(0, 2, shape[-1])
    values[..., 3], values[..., 5] = 0, 1.5
    return values.astype(np.float32)


@pytest.mark.parametrize("dtype", DTYPES)
def test_each_chunk_is_what_the_definition_says(dtype):
    rng = np.random.default_rng(0)
    values = rng.normal(0, 1, (6, *WIDE)) * rng.lognormal(0, 1, WIDE[-1])
    values[3:] = 7 * values[3:] + 20
    given_values = as_given(values, dtype)
    usable = np.array([1, 1, 0, 1, 1, 1], np.bool_)
    encoding = make(WIDE, dtype)
    assert encoding.arrays("t", 6)[0].chunk_rows == 2
    exact = given_values.view(DTYPES[dtype]).astype(np.float32)
    stored = encoding.encode(given_values, usable).arrays
    for chunk in (slice(0, 2), slice(2, 4), slice(4, 6)):
        kept = usable[chunk]
        cells = exact[chunk][kept].reshape(-1, WIDE[-1])
        mean, std, scale, codes = expected(cells)
        for row in range(kept.sum()):
            found = stored["_mean"][chunk][kept][row]
            np.testing.assert_allclose(found, mean, atol=1e-6 * std.max())
            found = stored["_std"][chunk][kept][row]
            np.testing.assert_allclose(found, std, rtol=1e-4)
        found = stored["_scale"][chunk][kept].reshape(-1, 1).astype(np.float64)
        # Never smaller, and at most the next float16 larger.
        assert (found >= scale * (1 - 1e-5)).all()
        assert (found <= scale * (1 + 2.0**-10 + 1e-5)).all()
        found_codes = stored[""][chunk][kept].reshape(-1, WIDE[-1])
        np.testing.assert_allclose(found_codes, codes * scale / found, atol=0.51)
        assert abs(found_codes.astype(int)).max() == 127
    assert (stored[""][2] == -128).all()
    for suffix in ("_scale", "_mean", "_std"):
        assert np.isnan(stored[suffix][2]).all()


@BOTH
def test_a_chunk_hangs_on_nothing_outside_it(preset):
    # Of the same bytes: two rows to a chunk either way.
    shape = WIDE if preset == "compact" else (32, *WIDE[1:])
    values = np.random.default_rng(0).normal(0, 1, (4, *shape)).astype(np.float32)
    encoding = make(shape, preset=preset)
    before = encoding.encode(values, np.ones(4, np.bool_)).arrays
    values[2:] *= 100
    after = encoding.encode(values, np.ones(4, np.bool_)).arrays
    for suffix in encoding.suffixes:
        np.testing.assert_array_equal(before[suffix][:2], after[suffix][:2])
    assert not np.array_equal(before["_std"][2:], after["_std"][2:])


@given(
    st.sampled_from(["compact", "tiny"]),
    st.integers(1, 5),
    st.sampled_from([("grid", (2, 3)), ("frames", (2, 2, 3)), ("points", (5,))]),
    st.sampled_from([1, 2, 5, 9, 31, 32, 33, 64, 71]),
    st.sampled_from(sorted(DTYPES)),
    st.floats(-6, 6),
    st.integers(0, 2**32),
)
def test_an_error_is_at_most_half_a_step(
    preset, rows, cells, channels, dtype, size, seed
):
    kind, lead = cells
    rng = np.random.default_rng(seed)
    values = rng.normal(0, 1, (rows, *lead, channels))
    values *= 10.0 ** (rng.normal(0, 1, channels) + min(size, 2))
    values += rng.normal(0, 1, channels) * (rng.random(channels) < 0.5)
    values[..., rng.random(channels) < 0.3] = 1.25
    given_values = as_given(values.clip(-60_000, 60_000), dtype)
    exact = given_values.view(DTYPES[dtype]).astype(np.float32)
    encoding = make((*lead, channels), dtype, kind, preset=preset)
    usable = rng.random(rows) < 0.8
    encoded = encoding.encode(given_values, usable)
    assert encoded.refused == {}
    found = encoding.decode(encoded.arrays)
    assert np.isnan(found[~usable]).all()
    step = encoded.arrays["_scale"].astype(np.float64)
    step = np.repeat(step.reshape(rows, *lead, -1), 32 if preset == "tiny" else 99, -1)
    step = step[..., :channels]
    std = encoded.arrays["_std"].reshape(rows, *[1] * len(lead), channels)
    rounding = 1e-6 * abs(exact).max(initial=0)
    off = abs(found - exact)[usable]
    assert (off <= (0.5001 * step * std)[usable] + rounding).all()
    # What a recheck allows is that, and hardly more.
    told = np.broadcast_to(encoding.bound(encoded.arrays, found), found.shape)[usable]
    assert (off <= told).all()
    assert (told <= (0.5001 * step * std)[usable] + 4 * rounding).all()


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize(
    "outlier",
    ["none", "constant 100", "constant 400", "wide 100", "wide 400", "tokens"],
)
def test_outliers_cost_the_others_nothing(outlier, dtype):
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
    given_values = as_given(values, dtype)
    exact = given_values.view(DTYPES[dtype]).astype(np.float32)
    encoding = make(values.shape[1:], dtype)
    encoded = encoding.encode(given_values, np.ones(len(values), np.bool_))
    apart, worst = loss_of(exact, encoding.decode(encoded.arrays))
    assert apart <= 1e-4
    assert worst <= 1e-2


def test_real_tokens_are_close(shared_data):
    (path,) = (shared_data / "tokens").glob("*.npy")
    values = np.load(path)[:16]
    values = values.reshape(len(values), 14, 14, -1)
    encoding = make(values.shape[1:], "float16")
    stored = encoding.encode(values, np.ones(len(values), np.bool_)).arrays
    apart, worst = loss_of(values, encoding.decode(stored))
    assert apart <= 5e-5
    assert worst <= 1e-3


@pytest.mark.parametrize("value", [0.0, -3.7, 0.1, 1e-30, 1e14])
@BOTH
def test_a_constant_grid_is_exact(value, preset):
    values = np.full((3, 2, 2, 4), value, np.float32)
    encoding = make((2, 2, 4), preset=preset)
    stored = encoding.encode(values, np.ones(3, np.bool_)).arrays
    np.testing.assert_array_equal(encoding.decode(stored), values)


def test_sparse_maps_keep_their_few_values():
    """More than half of the channels never fire: their floor is that of the others."""
    rng = np.random.default_rng(0)
    values = np.zeros((4, 5, 5, 16), np.float32)
    values[..., :3] = np.maximum(0, rng.normal(-1, 1, (4, 5, 5, 3)))
    encoding = make((5, 5, 16))
    stored = encoding.encode(values, np.ones(4, np.bool_)).arrays
    found = encoding.decode(stored)
    assert (found[..., 3:] == 0).all()
    assert abs(found - values).max() < values.max() / 100


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@BOTH
def test_rows_that_are_too_large_are_refused_and_leave_the_others(dtype, preset):
    values = tokens(4, (3, 3, 8))
    encoding = make((3, 3, 8), dtype, preset=preset)
    below = np.nextafter(np.float32(2.0**48), np.float32(0))
    values[0, 0, 0, 0], values[1, 2, 2, 7] = 2.0**48, -(2.0**48)
    values[2, 1, 1, 1] = np.inf
    encoded = encoding.encode(as_given(values, dtype), np.ones(4, np.bool_))
    assert encoded.refused == {
        0: f"overflow_{preset}",
        1: f"overflow_{preset}",
        2: "non_finite",
    }
    alone = encoding.encode(as_given(values, dtype), np.arange(4) == 3)
    for suffix in encoding.suffixes:
        np.testing.assert_array_equal(encoded.arrays[suffix], alone.arrays[suffix])
    values[:3], values[0, 0, 0, 0] = values[3], below if dtype == "float32" else 2.0**47
    encoded = encoding.encode(as_given(values, dtype), np.ones(4, np.bool_))
    assert encoded.refused == {}
    assert np.isfinite(encoding.decode(encoded.arrays)).all()


@pytest.mark.parametrize(
    ("kind", "name", "shape"),
    [
        ("vector", "cls", (8,)),
        ("vector", "embed", (8,)),
        ("grid", "logits", (2, 2, 8)),
        ("grid", "logits_road", (2, 2, 8)),
    ],
)
@BOTH
def test_what_must_stay_wider_is_refused(kind, name, shape, preset):
    message = (
        rf"{preset} must be of a grid of features, got a {kind} \(output {name}\); .* "
        "take lossless or half"
    )
    with pytest.raises(BankError, match=message):
        make(shape, kind=kind, name=name, preset=preset)
