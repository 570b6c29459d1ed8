"""ArraySpec and the metadata of arrays."""

import dataclasses
import json

import numpy as np
import pytest
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st

from manifests.errors import BankError
from pipeline.bank.arrays import (
    ArraySpec,
    chunk_rows_for,
    group_metadata,
    metadata,
    object_name,
    resized,
)

PATCH = ArraySpec(
    path="dinov3/image/256x256/patch",
    dtype="uint16",
    row_shape=(2, 3, 4),
    dimension_names=("patch_y", "patch_x", "patch_channel"),
    block_rows=8,
    chunk_rows=2,
    codec="lz4",
    fill=0x7FC0,
    attributes={"encoding": "lossless", "logical_dtype": "bfloat16", "sizes": [1, 2]},
)
VALID = ArraySpec(
    path="dinov3/image/256x256/valid",
    dtype="bool",
    row_shape=(),
    dimension_names=(),
    block_rows=8,
    chunk_rows=8,
    codec="zstd",
    fill=False,
    has_view=False,
)


@pytest.mark.parametrize("spec", [PATCH, VALID])
def test_spec_survives_json(spec):
    assert ArraySpec.from_json(json.loads(json.dumps(spec.to_json()))) == spec


def test_metadata_is_zarr_pythons_and_says_what_the_design_asks(tmp_path):
    document = json.loads(metadata(PATCH, 24, 3))
    assert document["shape"] == [24, 3, 2, 3, 4]
    assert document["chunk_grid"]["configuration"]["chunk_shape"] == [8, 1, 2, 3, 4]
    assert document["chunk_key_encoding"]["configuration"] == {"separator": "."}
    assert document["fill_value"] == 0x7FC0
    assert document["dimension_names"] == [
        "sample", "view", "patch_y", "patch_x", "patch_channel"
    ]  # fmt: skip
    assert document["attributes"] == PATCH.attributes
    sharding = document["codecs"][0]["configuration"]
    assert sharding["chunk_shape"] == [2, 1, 2, 3, 4]
    names = [codec["name"] for codec in sharding["codecs"]]
    assert names == ["bytes", "blosc", "crc32c"]
    assert sharding["codecs"][1]["configuration"] == {
        "typesize": 2,
        "cname": "lz4",
        "clevel": 5,
        "shuffle": "bitshuffle",
        "blocksize": 0,
    }
    assert sharding["index_location"] == "end"


def test_metadata_without_view_and_compressor(tmp_path):
    document = json.loads(metadata(VALID, 16, 9))
    assert document["shape"] == [16]
    assert document["dimension_names"] == ["sample"]
    (tmp_path / "zarr.json").write_bytes(metadata(VALID, 16, 9))
    assert zarr.open_array(tmp_path, mode="r").shape == (16,)


def test_metadata_does_not_hang_on_settings_of_the_process():
    expected = metadata(PATCH, 8, 1)
    with zarr.config.set({"json_indent": None}):
        assert metadata(PATCH, 8, 1) == expected


def test_group_metadata_opens_with_its_attributes(tmp_path):
    (tmp_path / "zarr.json").write_bytes(group_metadata({"pass": "a", "n": [1]}))
    assert dict(zarr.open_group(tmp_path, mode="r").attrs) == {"pass": "a", "n": [1]}


def test_growing_equals_making_it_larger():
    assert resized(metadata(PATCH, 8, 1), 24, 3) == metadata(PATCH, 24, 3)
    assert resized(metadata(VALID, 8, 1), 16, 3) == metadata(VALID, 16, 3)


@pytest.mark.parametrize(("rows", "views"), [(16, 3), (24, 2)])
def test_shrinking_is_refused(rows, views):
    with pytest.raises(BankError, match="must not shrink"):
        resized(metadata(PATCH, 24, 3), rows, views)


@pytest.mark.parametrize("garbage", [b"", b"[]", b"{}", b'{"shape": 1}', b"\xff"])
def test_resizing_what_is_no_array_is_refused(garbage):
    with pytest.raises(BankError, match="must describe an array"):
        resized(garbage, 8, 1)


def test_object_names():
    assert object_name(PATCH, 7, 2) == "dinov3/image/256x256/patch/c.7.2.0.0.0"
    assert object_name(VALID, 7) == "dinov3/image/256x256/valid/c.7"


@settings(deadline=None)
@given(row_bytes=st.integers(1, 2**26), block_rows=st.integers(1, 20_000))
def test_chunk_rows_divide_the_block_and_are_the_largest_allowed(row_bytes, block_rows):
    rows = chunk_rows_for(row_bytes, block_rows)
    allowed = [
        divisor
        for divisor in range(1, min(block_rows, 4096) + 1)
        if block_rows % divisor == 0 and divisor * row_bytes <= 4 * 2**20
    ]
    assert rows == max(allowed, default=1)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"dtype": "bfloat16"}, "dtype must be one of"),
        ({"codec": "gzip"}, "codec must be one of"),
        ({"chunk_rows": 3}, "chunk_rows must divide 8, got 3"),
        ({"dimension_names": ("y",)}, "dimension_names must name"),
        ({"row_shape": (0, 1, 1)}, "row_shape must hold"),
        ({"fill": 70_000}, "fill must be a value of uint16"),
        ({"fill": "NaN"}, "fill must be a value of uint16"),
        ({"fill": 0.5}, "fill must be a value of uint16"),
    ],
)
def test_a_spec_that_contradicts_itself_is_refused(change, match):
    with pytest.raises(BankError, match=match):
        dataclasses.replace(PATCH, **change)


def test_json_of_another_version_is_refused():
    with pytest.raises(BankError, match="fields of ArraySpec"):
        ArraySpec.from_json({**PATCH.to_json(), "new": 1})
    with pytest.raises(BankError, match="fields of ArraySpec"):
        ArraySpec.from_json({"path": "a"})


def test_fill_of_a_float_is_the_canonical_nan():
    spec = dataclasses.replace(PATCH, dtype="float32", fill="NaN")
    assert np.asarray(spec.fill_value).view(np.uint32) == 0x7FC00000
    assert json.loads(metadata(spec, 8, 1))["fill_value"] == "NaN"
