"""Numbers of points: stored as they are, missing where a row is."""

from __future__ import annotations

import numpy as np

from pipeline.bank.encodings import encoding_from_json
from pipeline.bank.point_index import PointIndex
from pipeline.samples.points import NO_POINT

ENCODING = PointIndex(name="points_index", kind="index", shape=(4,), dtype="uint32")


def test_numbers_come_back_and_missing_rows_are_no_point() -> None:
    values = np.arange(12, dtype=np.uint32).reshape(3, 4)
    values[0, 3] = NO_POINT
    before = values.copy()
    encoded = ENCODING.encode(values, np.array([True, False, True]))
    assert np.array_equal(values, before)
    assert not encoded.refused
    found = ENCODING.decode(encoded.arrays)
    expected = before.astype(np.float32)
    expected[1] = np.nan
    expected[0, 3] = np.nan
    np.testing.assert_array_equal(found, expected)


def test_it_survives_json_and_says_what_its_array_is() -> None:
    assert encoding_from_json(ENCODING.to_json()) == ENCODING
    (spec,) = ENCODING.arrays("t/lidar/native", 8)
    assert spec.path == "t/lidar/native/points_index"
    assert (spec.dtype, spec.fill) == ("uint32", NO_POINT)
    assert spec.dimension_names == ("points_index_point",)
