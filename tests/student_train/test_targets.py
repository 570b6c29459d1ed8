"""Targets: what a bank stores, in float32, standardised; and which output is meant."""

from __future__ import annotations

import dataclasses

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from manifests.errors import BankError
from manifests.teacher import OutputConfig
from pipeline.bank.blocks import read_block
from pipeline.bank.encodings import make_encoding
from student_train.errors import TrainingError
from student_train.targets import (
    Target,
    TargetSource,
    as_stored,
    decode,
    find_output,
)

DTYPES = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}
GRID, VECTOR = ("grid", (2, 3, 7)), ("vector", (7,))


def stored(config, kind, shape, dtype, values, usable):
    """What a bank holds of (rows, *shape) values, as tensors; and its encoding."""
    encoding = make_encoding(config, name="x", kind=kind, shape=shape, dtype=dtype)
    given = values.astype(DTYPES[dtype])
    if dtype == "bfloat16":
        given = given.view(np.uint16)
    arrays = encoding.encode(given, usable).arrays
    tensors = {
        suffix: as_stored(array, encoding, suffix) for suffix, array in arrays.items()
    }
    return encoding, tensors


@pytest.mark.parametrize("preset", ["raw", "lossless", "half"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("kind", "shape"), [GRID, VECTOR])
def test_plain_values_are_exact(preset, dtype, kind, shape):
    values = np.random.default_rng(0).normal(0, 3, (5, *shape)).astype(np.float32)
    usable = np.array([True, False, True, True, False])
    config = OutputConfig(encoding=preset)
    encoding, tensors = stored(config, kind, shape, dtype, values, usable)
    found = decode(encoding, tensors)
    expected = values.astype(DTYPES[dtype]).astype(np.float32)
    if preset == "half":
        expected = expected.astype(np.float16).astype(np.float32)
    expected[~usable] = np.nan
    assert found.dtype == torch.float32
    np.testing.assert_array_equal(found.numpy(), expected)
    logical = "float16" if preset == "half" else dtype
    assert tensors[""].dtype == getattr(torch, logical)


@given(
    st.integers(2, 30),
    st.data(),
    st.sampled_from(sorted(DTYPES)),
    st.sampled_from([(1.0,), (2.0, 1.0), (0.5, 4.0)]),
    st.booleans(),
    st.integers(0, 2**32),
)
def test_topk_keeps_the_largest_and_the_mass(
    classes, data, dtype, temperatures, is_grid, seed
):
    k = data.draw(st.integers(1, classes))
    shape = (2, 2, classes) if is_grid else (classes,)
    rng = np.random.default_rng(seed)
    values = rng.normal(0, 4, (3, *shape)).astype(np.float32)
    config = OutputConfig(topk=k, temperatures=temperatures)
    kind = "grid" if is_grid else "vector"
    usable = np.array([True, False, True])
    encoding, tensors = stored(config, kind, shape, dtype, values, usable)
    found = decode(encoding, tensors).numpy()
    exact = values.astype(DTYPES[dtype]).astype(np.float64)
    assert found.shape == values.shape
    assert np.isnan(found[1]).all()
    found, exact = (
        found[usable].reshape(-1, classes),
        exact[usable].reshape(-1, classes),
    )
    for shown, true in zip(found, exact, strict=True):
        # Largest first, ties by lower id.
        top = np.lexsort((np.arange(classes), -true))[:k]
        others = np.setdiff1d(np.arange(classes), top)
        np.testing.assert_array_equal(shown[top], true[top])
        if len(others):
            first = temperatures[0]
            assert np.ptp(shown[others]) == 0
            mass = np.exp(true[others] / first).sum()
            uniform = first * np.log(mass / len(others))
            expected = min(uniform, true[top[-1]])
            np.testing.assert_allclose(shown[others], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("kind", "shape"),
    [
        ("grid", (6, 5, 33)),
        ("grid", (3, 3, 64)),
        ("grid", (3, 3, 7)),
        ("frames", (2, 3, 4, 70)),
        ("points", (50, 33)),
    ],
)
@pytest.mark.parametrize("preset", ["compact", "tiny"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_codes_are_decoded_as_numpy_does(kind, shape, preset, dtype):
    rng = np.random.default_rng(0)
    values = rng.normal(0, 1, (7, *shape)) * rng.lognormal(0, 2, shape[-1])
    usable = np.arange(7) != 4
    config = OutputConfig(encoding=preset)
    encoding, tensors = stored(config, kind, shape, dtype, values, usable)
    kept = {suffix: tensor.clone() for suffix, tensor in tensors.items()}
    found = decode(encoding, tensors)
    arrays = {suffix: tensor.numpy() for suffix, tensor in tensors.items()}
    np.testing.assert_array_equal(found.numpy(), encoding.decode(arrays))
    assert found.dtype == torch.float32
    assert found[4].isnan().all()
    assert found[usable].isfinite().all()
    assert all(
        torch.equal(a.nan_to_num(), kept[s].nan_to_num()) for s, a in tensors.items()
    )


def test_many_classes_need_wide_ids():
    shape = (70_000,)
    values = np.random.default_rng(0).normal(size=(2, *shape)).astype(np.float32)
    usable = np.array([True, False])
    config = OutputConfig(topk=2)
    encoding, tensors = stored(config, "vector", shape, "float32", values, usable)
    assert tensors["_index"].dtype == torch.uint32
    found = decode(encoding, tensors).numpy()
    top = np.argsort(-values[0])[:2]
    np.testing.assert_array_equal(found[0, top], values[0, top])
    assert np.isnan(found[1]).all()


def test_decoding_is_that_of_the_bank(joined):
    bank = joined.open()
    for path in bank.outputs:
        source = TargetSource.open(bank, path, normalise=False)
        for view in (0, 2):
            arrays = {
                suffix: as_stored(
                    read(bank, path, suffix, view), source.encoding, suffix
                )
                for suffix in source.encoding.suffixes
            }
            found = Target(source, arrays, torch.ones(4, dtype=torch.bool)).values()
            np.testing.assert_array_equal(found.numpy(), bank.read(path, 0, view))


def read(bank, path, suffix, view):
    return read_block(bank.array(path, suffix), 0, view)


def test_an_encoding_that_is_not_known_here(joined, monkeypatch):
    source = TargetSource.open(joined.open(), "net/image/16x16/patch", False)
    monkeypatch.setattr(type(source.encoding), "preset", "newer")
    known = r"\['compact', 'half', 'lossless', 'raw', 'tiny', 'topk'\]"
    message = rf"of {known}, got 'newer' \(output patch\)"
    with pytest.raises(TrainingError, match=message):
        decode(source.encoding, {})


def test_standardising_leaves_what_is_stored(joined):
    bank = joined.open()
    source = TargetSource.open(bank, "net/image/16x16/patch", normalise=True)
    arrays = {"": as_stored(read(bank, source.path, "", 0), source.encoding, "")}
    before = arrays[""].clone()
    target = Target(source, arrays, torch.ones(4, dtype=torch.bool))
    one, other = target.values(), target.to("cpu").values()
    assert torch.equal(arrays[""].nan_to_num(), before.nan_to_num())
    assert torch.equal(one.nan_to_num(), other.nan_to_num())
    assert not torch.equal(one.nan_to_num(), before.nan_to_num())


def test_topk_has_no_statistics(joined):
    with pytest.raises(BankError, match="no array 'net/image/16x16/stats/logits_mean'"):
        TargetSource.open(joined.open(), "net/image/16x16/logits", normalise=True)


@pytest.mark.parametrize(
    ("source", "path"),
    [
        ("net/patch", "net/image/16x16/patch"),
        ("net/image/patch", "net/image/16x16/patch"),
        ("brain/image/8x16/logits", "brain/image/8x16/logits"),
        ("points/pooled", "points/lidar/native/pooled"),
    ],
)
def test_an_output_is_found(joined, source, path):
    assert find_output(joined.open(), source, "image", "targets.t") == path


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (
            "nett/patch",
            r"t: teacher must be one of the bank's \(brain, net, points\)",
        ),
        ("net/cls", r"t: the bank must have the output, got 'net/cls'; of net it has "),
        ("net/lidar/patch", "the bank must have the output, got 'net/lidar/patch'"),
        ("net/image/16x16/patch/more", "must have the output"),
        ("net", "must have the output, got 'net'"),
        ("brain/patch", "must name one output, it could be any of brain/image/16x16/p"),
        ("brain/image/patch", "brain/image/8x16/patch; write it whole"),
    ],
)
def test_an_output_that_is_not_one(joined, source, message):
    with pytest.raises(TrainingError, match=message):
        find_output(joined.open(), source, "image", "targets.t")


def test_of_several_groups_the_students_own_is_meant(joined):
    """The same teacher on two cameras: the student's input says which."""
    bank = joined.open()
    (entry,) = [one for one in bank.record.passes if one.teacher == "net"]
    other = entry.model_copy(
        update={"group": "back", "inputs": ("back",), "id": "net.back"}
    )
    passes = [*bank.record.passes, other]
    record = bank.record.model_copy(update={"passes": passes})
    two = type(bank)(bank._store, record)
    assert find_output(two, "net/patch", "image", "t") == "net/image/16x16/patch"
    assert find_output(two, "net/patch", "back", "t") == "net/back/16x16/patch"
    with pytest.raises(TrainingError, match="net/image/16x16/patch, net/back/16"):
        find_output(two, "net/patch", "lidar", "t")


def test_where_a_birds_eye_grid_lies(joined):
    source = TargetSource.open(joined.open(), "net/image/16x16/patch", False)
    assert source.entry.extent is None
    extent = {"x_m": [0.0, 40.0], "y_m": [-20.0, 20.0]}
    entry = source.entry.model_copy(
        update={"definition": source.entry.definition | {"extent": extent}}
    )
    found = dataclasses.replace(source, entry=entry).entry.extent
    assert found is not None
    assert (found.x_m, found.y_m, found.row_0) == ((0.0, 40.0), (-20.0, 20.0), "x_max")


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_rounding_never_lifts_the_others_above_what_is_kept(temperature):
    """Equal logits: their common value, found by a logarithm, may round upwards."""
    values = np.random.default_rng(0).normal(0, 30, (500, 1)).astype(np.float32)
    values = np.repeat(values, 11, axis=1)
    config = OutputConfig(topk=3, temperatures=(temperature,))
    usable = np.ones(len(values), np.bool_)
    encoding, tensors = stored(config, "vector", (11,), "float32", values, usable)
    found = decode(encoding, tensors).numpy()
    np.testing.assert_array_equal(found[:, :3], values[:, :3])
    assert (found[:, 3:] <= values[:, 3:]).all()
    np.testing.assert_allclose(found, values, rtol=1e-5, atol=1e-6)
