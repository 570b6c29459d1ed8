"""What every registered encoding keeps, whatever it stores."""

import json

import ml_dtypes
import numpy as np
import pytest

from manifests.errors import BankError
from manifests.teacher import OutputConfig
from pipeline.bank.encoding import ENCODINGS
from pipeline.bank.encodings import encoding_from_json, make_encoding
from pipeline.bank.objects import decode_object, encode_object

SHAPES = {"vector": (13,), "grid": (2, 3, 13)}
DTYPES = ["float32", "bfloat16", "float16"]
LARGEST_CODES = {"compact": 127, "tiny": 7}


def as_stored(values, dtype):
    if dtype == "bfloat16":
        return values.astype(ml_dtypes.bfloat16).view(np.uint16)
    return values.astype(dtype)


def as_float32(stored, dtype):
    if dtype == "bfloat16":
        stored = stored.view(ml_dtypes.bfloat16)
    return stored.astype(np.float32)


CASES = [
    (preset, kind)
    for preset in sorted(set(ENCODINGS) - {"index", "jpeg"})
    for kind in sorted(SHAPES)
    if (preset, kind) not in {("compact", "vector"), ("tiny", "vector")}
]


@pytest.fixture(params=CASES, ids="-".join)
def case(request):
    return request.param


@pytest.fixture
def preset(case):
    return case[0]


@pytest.fixture
def kind(case):
    return case[1]


@pytest.fixture(params=DTYPES)
def dtype(request):
    return request.param


@pytest.fixture
def encoding(preset, kind, dtype):
    # All classes are kept, so that what is decoded can be compared.
    config = OutputConfig(encoding=preset, topk=13 if preset == "topk" else None)
    return make_encoding(config, name="out", kind=kind, shape=SHAPES[kind], dtype=dtype)


@pytest.fixture
def values(kind, dtype):
    rng = np.random.default_rng(0)
    return as_stored(rng.normal(size=(8, *SHAPES[kind])), dtype)


ALL = np.ones(8, np.bool_)


def error_bound(preset, exact, is_kept):
    """What a decoded value may be off by: (8, *shape), of rows or cells that are kept.

    Of compact and tiny, half a step: the cell's largest standardised magnitude (its 13
    channels share a scale) over the largest code, which float16 rounds by at most one
    part in 1024, times the channel's deviation.
    """
    if preset not in LARGEST_CODES:
        return abs(exact) * 2.0**-11
    kept = exact[is_kept].astype(np.float64)
    std = np.maximum(kept.std(axis=0), 0.01 * np.median(kept.std(axis=0)))
    peak = abs((exact - kept.mean(axis=0)) / std).max(axis=-1, keepdims=True)
    return (0.5 * peak / LARGEST_CODES[preset] * (1 + 2.0**-9) + 1e-5) * std


def test_it_survives_json(encoding):
    data = json.loads(json.dumps(encoding.to_json()))
    assert data["encoding"] == encoding.preset
    assert encoding_from_json(data) == encoding


def test_its_arrays_are_named_and_describe_themselves(encoding, preset, kind, dtype):
    specs = encoding.arrays("dinov3/image/256x256", 8)
    assert [spec.path for spec in specs] == [
        f"dinov3/image/256x256/out{suffix}" for suffix in encoding.suffixes
    ]
    for spec in specs:
        assert spec.block_rows == 8
        assert spec.has_view
        assert all(name.startswith("out_") for name in spec.dimension_names)
        assert spec.attributes["encoding"] == preset
        # uint16 that say bfloat16 are bits of it, and no others: ids are numbers.
        own = spec.path.endswith(("_index", "_rest"))
        assert spec.attributes["logical_dtype"] == (spec.dtype if own else dtype)
        assert json.loads(json.dumps(spec.to_json())) == spec.to_json()
    lengths = {}
    for spec in specs:
        for name, length in zip(spec.dimension_names, spec.row_shape, strict=True):
            assert lengths.setdefault(name, length) == length


def test_what_is_encoded_fits_the_arrays_and_comes_back(
    encoding, values, preset, dtype
):
    encoded = encoding.encode(values, ALL)
    assert encoded.refused == {}
    stored = {}
    for suffix, spec in zip(encoding.suffixes, encoding.arrays("t", 8), strict=True):
        parts = encode_object(encoded.arrays[suffix], spec, 8)
        stored[suffix] = decode_object(b"".join(map(bytes, parts)), spec)
    decoded = encoding.decode(stored)
    assert decoded.dtype == np.float32
    assert decoded.shape == values.shape
    exact = as_float32(values, dtype)
    is_kept = np.ones(exact.shape[:-1], np.bool_)
    assert (abs(decoded - exact) <= error_bound(preset, exact, is_kept)).all()


def test_missing_rows_are_fill_in_every_array_and_only_they(encoding, values):
    usable = np.array([1, 0, 1, 1, 0, 1, 1, 0], np.bool_)
    before = values.copy()
    encoded = encoding.encode(values, usable)
    np.testing.assert_array_equal(values, before)
    assert encoded.refused == {}
    for spec, array in zip(
        encoding.arrays("t", 8), encoded.arrays.values(), strict=True
    ):
        fill = np.full_like(array, spec.fill_value)
        same = (array.view(np.uint8) == fill.view(np.uint8)).reshape(8, -1).all(axis=1)
        np.testing.assert_array_equal(same, ~usable)
    decoded = encoding.decode(encoded.arrays)
    np.testing.assert_array_equal(np.isnan(decoded).reshape(8, -1).all(axis=1), ~usable)
    np.testing.assert_array_equal(np.isnan(decoded).reshape(8, -1).any(axis=1), ~usable)


@pytest.mark.parametrize("case", [c for c in CASES if c[1] == "grid"], ids="-".join)
def test_missing_cells_are_fill_and_change_nothing_else(
    encoding, values, preset, dtype
):
    exact = as_float32(values, dtype)
    cells = np.zeros((8, 2, 3), np.bool_)
    cells[:, :, 2], cells[5] = True, True
    values[cells] = as_stored(np.array([50.0]), dtype)
    usable = np.arange(8) != 3
    before = values.copy()
    encoded = encoding.encode(values, usable, missing_cells=cells)
    np.testing.assert_array_equal(values, before)
    # Nothing is left of row 5: it would read as missing, so it has to be.
    assert encoded.refused == {5: "all_padding"}
    decoded = encoding.decode(encoded.arrays)
    is_kept = usable[:, None, None] & ~cells
    missing = np.isnan(decoded)
    np.testing.assert_array_equal(missing.all(axis=-1), ~is_kept)
    np.testing.assert_array_equal(missing.any(axis=-1), ~is_kept)
    off = abs(decoded - exact)[is_kept]
    assert (off <= error_bound(preset, exact, is_kept)[is_kept]).all()


@pytest.mark.parametrize("bad", [np.nan, -np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("row", [0, 7])
def test_rows_that_are_not_finite_are_refused(encoding, values, dtype, bad, row):
    values.reshape(8, -1)[row, -1] = as_stored(np.array([bad]), dtype)[0]
    encoded = encoding.encode(values, ALL)
    assert encoded.refused == {row: "non_finite"}
    missing = np.isnan(encoding.decode(encoded.arrays)).reshape(8, -1).all(axis=1)
    assert missing.tolist() == [number == row for number in range(8)]


def test_rows_that_are_not_usable_are_not_looked_at(encoding, values, dtype):
    values[3] = as_stored(np.array([np.nan]), dtype)[0]
    encoded = encoding.encode(values, np.arange(8) != 3)
    assert encoded.refused == {}


def test_the_largest_finite_numbers_are_not_refused(encoding, values, preset, dtype):
    bits = {"float32": 0x7F7FFFFF, "bfloat16": 0x7F7F, "float16": 0x7BFF}[dtype]
    size = values.dtype.itemsize
    for sign, row in ((0, 0), (1 << (8 * size - 1), 1)):
        values.view(f"u{size}").reshape(8, -1)[row, 0] = bits | sign
    refused = encoding.encode(values, ALL).refused
    limited = {"half": "overflow_float16"}
    limited |= {name: f"overflow_{name}" for name in LARGEST_CODES}
    if preset in limited and dtype != "float16":
        assert refused == dict.fromkeys((0, 1), limited[preset])
    else:
        assert refused == {}


def test_values_may_be_overwritten_only_when_allowed(encoding, values):
    usable = np.arange(8) != 2
    kept = encoding.encode(values.copy(), usable).arrays
    reused = encoding.encode(values, usable, reuse=True).arrays
    for suffix in encoding.suffixes:
        np.testing.assert_array_equal(kept[suffix], reused[suffix])


def test_an_array_that_cannot_be_written_to_is_read(encoding, values):
    values.flags.writeable = False
    encoded = encoding.encode(values, np.arange(8) != 2, reuse=True)
    assert np.isnan(encoding.decode(encoded.arrays)[2]).all()


def test_no_rows_are_no_rows(encoding, values):
    encoded = encoding.encode(values[:0], ALL[:0])
    assert encoding.decode(encoded.arrays).shape == values[:0].shape


def test_values_of_another_type_or_shape_are_refused(encoding, values):
    with pytest.raises(BankError, match="values of out must be"):
        encoding.encode(values.astype(np.float64), ALL)
    with pytest.raises(BankError, match="values of out must be"):
        encoding.encode(values[..., :-1], ALL)
    with pytest.raises(BankError, match="usable of out must be"):
        encoding.encode(values, ALL[:-1])


def test_rows_can_be_moved(encoding, values):
    """What is stored of a row decodes it, wherever and beside what it lies."""
    order = np.array([5, 2, 7, 0])
    stored = encoding.encode(values, np.arange(8) != 2).arrays
    moved = {suffix: array[order] for suffix, array in stored.items()}
    np.testing.assert_array_equal(
        encoding.decode(moved), encoding.decode(stored)[order]
    )


def test_it_says_whether_other_rows_leave_traces(encoding, values):
    others = values.copy()
    others[4:] = values[:4][::-1]
    first, second = (
        {
            suffix: array[:4]
            for suffix, array in encoding.encode(one, ALL).arrays.items()
        }
        for one in (values, others)
    )
    is_alone = all(
        first[suffix].tobytes() == second[suffix].tobytes() for suffix in first
    )
    assert is_alone != encoding.mixes_rows


def test_what_is_exact_is_stored_as_it_came(encoding, values):
    arrays = encoding.encode(values, ALL).arrays
    is_same = list(arrays) == [""] and arrays[""].tobytes() == values.tobytes()
    # Half of float16 is, too, by chance.
    assert is_same or not encoding.is_exact
