"""Row facts of a block: what goes in comes out, also where there is little of it."""

from __future__ import annotations

import io

import numpy as np
import pyarrow.parquet
import pytest

from manifests.bank import InputEntry
from manifests.errors import BankError
from pipeline.bank.rows import MAX_REASON_LENGTH, RowFacts, decode_rows, encode_rows

INPUTS = {
    "cam": InputEntry(
        config={
            "kind": "image",
            "member": "jpg",
            "calibration": "cam",
            "timestamp": "cam.t",
        }
    ),
    "plain": InputEntry(config={"kind": "image", "member": "png"}),
    "lidar": InputEntry(config={"kind": "points", "member": "bin", "timestamp": "t"}),
    "radar": InputEntry(config={"kind": "points", "member": "npy"}),
}
LABELS = {"class": {"num_classes": 3}, "rain": {}}


def facts() -> list[RowFacts]:
    return [
        RowFacts(
            sizes={"cam": (9, 16), "plain": (3, 4)},
            points={"lidar": 34_676, "radar": 9},
            dropped={"lidar": 12, "radar": 0},
            labels={"class": 2, "rain": 0.5},
            intrinsics={"cam": np.arange(9.0).reshape(3, 3)},
            lidar2cam={"cam": np.arange(16.0).reshape(4, 4)},
            times={"cam": 1532402927.647951},
            time_reasons={"lidar": "missing: no t"},
        ),
        RowFacts(reasons={"lidar": "x" * 999}, calibration_reasons={"cam": "missing"}),
    ]


def test_facts_come_back_column_by_column():
    columns = decode_rows(encode_rows(facts(), INPUTS, LABELS), "here")
    assert columns["lidar.points"] == [34_676, None]
    assert columns["lidar.dropped"] == [12, None]
    assert columns["radar.dropped"] == [0, None]
    assert columns["cam.time"] == [1532402927.647951, None]
    assert columns["lidar.time"] == [None, None]
    assert columns["lidar.time_reason"] == ["missing: no t", None]
    assert columns["cam.intrinsics"] == [list(range(9)), None]
    assert columns["cam.calibration_reason"] == [None, "missing"]
    assert columns["cam.height"] == [9, None]
    assert columns["label.class"] == [2, None]
    assert columns["lidar.reason"] == [None, "x" * MAX_REASON_LENGTH]
    asked = [name for name in columns if name.endswith((".time", ".dropped"))]
    assert asked == ["cam.time", "lidar.dropped", "lidar.time", "radar.dropped"]


def test_equal_facts_are_equal_bytes_that_any_reader_reads():
    data = encode_rows(facts(), INPUTS, LABELS)
    assert data == encode_rows(facts(), INPUTS, LABELS)
    table = pyarrow.parquet.read_table(io.BytesIO(data))
    assert table.schema.field("cam.time").type == "double"
    assert table.schema.field("lidar.dropped").type == "int32"
    assert table.num_rows == 2


def test_damage_is_named():
    data = encode_rows(facts(), INPUTS, LABELS)
    with pytest.raises(BankError, match=r"rows/7 .*--repair"):
        decode_rows(data[:-40], "rows/7")
