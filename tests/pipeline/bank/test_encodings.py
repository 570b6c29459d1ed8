"""Each preset's own bounds, against NumPy in float64."""

import json
import math

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from manifests.errors import BankError
from manifests.teacher import OutputConfig
from pipeline.bank import encoding as encoding_module
from pipeline.bank.encodings import encoding_from_json, make_encoding


def make(encoding="raw", *, name="out", kind="vector", shape, dtype, **config):
    return make_encoding(
        OutputConfig(encoding=encoding, **config),
        name=name,
        kind=kind,
        shape=shape,
        dtype=dtype,
    )


def everything(rows):
    return np.ones(len(rows), np.bool_)


def bits_of(dtype):
    """Rows of any finite bit pattern, -0.0 and denormals among them."""
    size, infinity = {
        "float32": (4, 0x7F800000),
        "bfloat16": (2, 0x7F80),
        "float16": (2, 0x7C00),
    }[dtype]
    magnitude = st.integers(0, infinity - 1) | st.sampled_from([0, 1, infinity - 1])
    sign = st.sampled_from([0, 1 << (8 * size - 1)])
    elements = st.builds(int.__or__, magnitude, sign)
    return hnp.arrays(
        f"u{size}", st.tuples(st.integers(1, 6), st.just(5)), elements=elements
    )


@pytest.mark.parametrize("preset", ["raw", "lossless"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@settings(deadline=None)
@given(data=st.data())
def test_raw_and_lossless_keep_every_bit(preset, dtype, data):
    bits = data.draw(bits_of(dtype))
    values = bits if dtype == "bfloat16" else bits.view(dtype)
    encoding = make(preset, shape=(5,), dtype=dtype)
    encoded = encoding.encode(values, everything(values))
    assert encoded.refused == {}
    (stored,) = encoded.arrays.values()
    np.testing.assert_array_equal(stored.view(bits.dtype), bits)
    logical = {"bfloat16": ml_dtypes.bfloat16}.get(dtype, dtype)
    expected = bits.view(logical).astype(np.float32)
    np.testing.assert_array_equal(
        encoding.decode(encoded.arrays).view(np.uint32), expected.view(np.uint32)
    )


@settings(deadline=None)
@given(bits=bits_of("float32"))
def test_half_keeps_its_bound_and_refuses_overflow(bits):
    values = bits.view(np.float32)
    encoding = make("half", shape=(5,), dtype="float32")
    encoded = encoding.encode(values, everything(values))
    exact = values.astype(np.float64)
    # 65520 is half way to what would be the next float16: it rounds to infinity.
    overflow = (np.abs(exact) >= 65520).any(axis=1)
    assert encoded.refused == {
        int(row): "overflow_float16" for row in np.flatnonzero(overflow)
    }
    decoded = encoding.decode(encoded.arrays).astype(np.float64)
    assert np.isnan(decoded[overflow]).all()
    error = np.abs(decoded - exact)[~overflow]
    bound = np.maximum(2.0**-11 * np.abs(exact[~overflow]), 2.0**-25)
    assert (error <= bound).all()


def test_half_says_which_rows_were_not_finite_and_which_overflowed():
    values = np.zeros((4, 2), np.float32)
    values[1, 0], values[2, 1], values[3] = 1e5, np.inf, (1e5, np.nan)
    encoded = make("half", shape=(2,), dtype="float32").encode(
        values, everything(values)
    )
    assert encoded.refused == {
        1: "overflow_float16",
        2: "non_finite",
        3: "non_finite",
    }


def test_a_copy_is_made_only_where_a_row_is_missing():
    values = np.ones((4, 2), np.float32)
    encoding = make("raw", shape=(2,), dtype="float32")
    assert encoding.encode(values, everything(values)).arrays[""] is values
    usable = np.array([True, False, True, True])
    assert encoding.encode(values, usable).arrays[""] is not values
    assert encoding.encode(values, usable, reuse=True).arrays[""] is values


@pytest.mark.parametrize("preset", ["raw", "lossless", "half", "topk"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_pieces_change_nothing(monkeypatch, preset, dtype):
    rng = np.random.default_rng(0)
    exact = rng.normal(size=(9, 20)).astype(np.float32)
    exact[5, 3] = np.inf
    values = exact
    if dtype == "bfloat16":
        values = exact.astype(ml_dtypes.bfloat16).view(np.uint16)
    topk = {"topk": 4} if preset == "topk" else {}
    encoding = make(preset, shape=(20,), dtype=dtype, **topk)
    whole = encoding.encode(values, everything(values))
    monkeypatch.setattr(encoding_module, "_PIECE_BYTES", 200)
    pieces = encoding.encode(values, everything(values))
    assert whole.refused == pieces.refused == {5: "non_finite"}
    for suffix in encoding.suffixes:
        np.testing.assert_array_equal(whole.arrays[suffix], pieces.arrays[suffix])


def log_sum_exp(values, temperature):
    scaled = np.asarray(values, np.float64) / temperature
    largest = scaled.max(axis=-1, keepdims=True)
    return np.log(np.exp(scaled - largest).sum(axis=-1)) + largest[..., 0]


logits = hnp.arrays(
    np.float32,
    st.tuples(st.integers(1, 4), st.just(9)),
    # Quarters make ties; both zeros must tie.
    elements=st.integers(-80, 80).map(lambda n: n / 4) | st.sampled_from([0.0, -0.0]),
)


@settings(deadline=None)
@given(values=logits, k=st.integers(1, 9), temperature=st.sampled_from([1.0, 2.0, 4.0]))
def test_topk_is_exact_on_the_k_and_in_total_mass(values, k, temperature):
    temperatures = (3.0, temperature)
    encoding = make(
        "topk", shape=(9,), dtype="float32", topk=k, temperatures=temperatures
    )
    encoded = encoding.encode(values, everything(values))
    # By value, largest first, ties by lower id: what a stable sort gives.
    order = np.argsort(-values, axis=1, kind="stable")[:, :k]
    np.testing.assert_array_equal(encoded.arrays["_index"], order)
    top = np.take_along_axis(values, order, axis=1)
    np.testing.assert_array_equal(
        encoded.arrays["_value"].view(np.uint32), top.view(np.uint32)
    )
    for chosen in temperatures:
        decoded = encoding.decode(encoded.arrays, chosen)
        np.testing.assert_array_equal(np.take_along_axis(decoded, order, axis=1), top)
        np.testing.assert_allclose(
            log_sum_exp(decoded, chosen), log_sum_exp(values, chosen), atol=1e-5
        )
        others = decoded.copy()
        np.put_along_axis(others, order, np.nan, axis=1)
        if k < 9:
            assert (np.nanmax(others, axis=1) <= top[:, -1]).all()
            assert (np.nanmax(others, axis=1) == np.nanmin(others, axis=1)).all()
    default = encoding.decode(encoded.arrays)
    np.testing.assert_array_equal(default, encoding.decode(encoded.arrays, 3.0))


def test_topk_of_a_grid_works_on_the_last_axis():
    rng = np.random.default_rng(0)
    values = rng.normal(size=(3, 2, 4, 50)).astype(np.float32)
    config = {"topk": 5, "temperatures": (1.0, 2.0)}
    grid = make("topk", kind="grid", shape=(2, 4, 50), dtype="float32", **config)
    flat = make("topk", shape=(50,), dtype="float32", **config)
    ours = grid.encode(values, everything(values)).arrays
    theirs = flat.encode(values.reshape(-1, 50), np.ones(24, np.bool_)).arrays
    for suffix, length in (("_index", 5), ("_value", 5), ("_rest", 2)):
        assert ours[suffix].shape == (3, 2, 4, length)
        np.testing.assert_array_equal(ours[suffix].reshape(24, length), theirs[suffix])
    names = [spec.dimension_names for spec in grid.arrays("t/image/native", 4)]
    assert names == [
        ("out_y", "out_x", "out_k"),
        ("out_y", "out_x", "out_k"),
        ("out_y", "out_x", "out_temperature"),
    ]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_topk_keeps_the_teachers_own_bits(dtype):
    logical = ml_dtypes.bfloat16 if dtype == "bfloat16" else np.float16
    exact = np.random.default_rng(0).normal(size=(4, 30)).astype(logical)
    values = exact.view(np.uint16) if dtype == "bfloat16" else exact
    encoding = make("topk", shape=(30,), dtype=dtype, topk=3)
    encoded = encoding.encode(values, everything(values))
    order = np.argsort(-exact.astype(np.float32), axis=1, kind="stable")[:, :3]
    np.testing.assert_array_equal(
        encoded.arrays["_value"], np.take_along_axis(values, order, axis=1)
    )


@pytest.mark.parametrize(
    ("num_classes", "dtype"), [(65535, "uint16"), (65536, "uint32"), (70000, "uint32")]
)
def test_ids_never_equal_their_fill(num_classes, dtype):
    encoding = make("topk", shape=(num_classes,), dtype="float32", topk=1)
    index = encoding.arrays("t", 2)[0]
    assert index.dtype == dtype
    assert index.fill == np.iinfo(dtype).max
    values = np.zeros((1, num_classes), np.float32)
    values[0, -1] = 1
    assert (
        encoding.encode(values, everything(values)).arrays["_index"] == num_classes - 1
    )
    assert num_classes - 1 < index.fill


def test_all_classes_leave_no_rest_and_any_temperature_is_exact():
    values = np.random.default_rng(0).normal(size=(4, 6)).astype(np.float32)
    encoding = make("topk", shape=(6,), dtype="float32", topk=6)
    encoded = encoding.encode(values, everything(values))
    assert (encoded.arrays["_rest"] == -np.inf).all()
    np.testing.assert_array_equal(encoding.decode(encoded.arrays, 7.0), values)


def test_an_unknown_temperature_is_refused():
    values = np.zeros((1, 6), np.float32)
    encoding = make("topk", shape=(6,), dtype="float32", topk=2)
    encoded = encoding.encode(values, everything(values))
    with pytest.raises(BankError, match=r"must be one of \[1.0\], got 4.0"):
        encoding.decode(encoded.arrays, 4.0)


def test_a_rest_beyond_float32_is_refused():
    values = np.array([[3e38, 2e38, 2e38], [3, 2, 2]], np.float32)
    encoding = make("topk", shape=(3,), dtype="float32", topk=1, temperatures=(0.01,))
    encoded = encoding.encode(values, everything(values))
    assert encoded.refused == {0: "non_finite"}
    assert encoded.arrays["_index"][0] == 65535
    assert np.isfinite(encoding.decode(encoded.arrays)[1]).all()


def test_ids_out_of_range_are_damage():
    encoding = make("topk", shape=(6,), dtype="float32", topk=2)
    values = np.zeros((1, 6), np.float32)
    arrays = encoding.encode(values, everything(values)).arrays
    arrays["_index"][0, 1] = 6
    with pytest.raises(BankError, match="ids of out must be below 6, got 6"):
        encoding.decode(arrays)


def test_bfloat16_arrays_say_how_to_read_them():
    (spec,) = make("lossless", kind="grid", shape=(2, 2, 8), dtype="bfloat16").arrays(
        "dinov3/image/256x256", 64
    )
    assert (spec.dtype, spec.fill, spec.codec) == ("uint16", 0x7FC0, "lz4")
    assert spec.dimension_names == ("out_y", "out_x", "out_channel")
    assert spec.attributes["logical_dtype"] == "bfloat16"
    assert json.dumps(dict(spec.attributes))


def test_lossless_may_use_zstd():
    encoding = make("lossless", shape=(4,), dtype="float32")
    changed = encoding_from_json({**encoding.to_json(), "codec": "zstd"})
    assert changed.arrays("t", 8)[0].codec == "zstd"
    assert encoding_from_json(changed.to_json()) == changed


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"kind": "grid", "shape": (4,), "dtype": "float32"}, "shape must be"),
        ({"shape": (4, 4), "dtype": "float32"}, "shape must be"),
        ({"shape": (0,), "dtype": "float32"}, "shape must be"),
        ({"kind": "cloud", "shape": (4,), "dtype": "float32"}, "kind must be one of"),
        ({"shape": (4,), "dtype": "float64"}, "dtype must be one of"),
        (
            {"shape": (4,), "dtype": "float32", "encoding": "topk", "topk": 5},
            r"topk must lie in \[1, 4\], got 5 \(output out\)",
        ),
    ],
)
def test_what_cannot_be_stored_is_refused(arguments, match):
    with pytest.raises(BankError, match=match):
        make(**arguments)


@pytest.mark.parametrize(
    ("data", "match"),
    [
        ({"encoding": "fp4"}, "encoding must be one of .* got 'fp4'"),
        ({}, "encoding must be one of"),
        ({"encoding": "raw", "name": "a"}, "raw must have its fields"),
    ],
)
def test_json_of_another_version_is_refused(data, match):
    with pytest.raises(BankError, match=match):
        encoding_from_json(data)


def test_temperatures_from_json_are_checked():
    encoding = make("topk", shape=(6,), dtype="float32", topk=2)
    with pytest.raises(BankError, match="temperatures must be positive"):
        encoding_from_json({**encoding.to_json(), "temperatures": [math.inf]})
