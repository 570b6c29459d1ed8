"""Row facts: what decoding a sample tells besides its pixels, one small object a block.

Sizes, point counts, labels, calibration, times, and per input the reason why it is
unusable.
Workers write a Parquet object per block; finalise turns them into row arrays.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa

from manifests.bank import InputEntry
from pipeline.bank.row_index import decode_table, encode_table

MAX_REASON_LENGTH = 300


@dataclass
class RowFacts:
    """What is known of one sample.

    Attributes:
        sizes: (height, width) of the upright image, by input.
        points: number of points of the sweep that can be used, by input.
        dropped: number of points of the sweep that cannot, by input.
        reasons: ``code: detail`` of inputs that cannot be used.
        labels: value by label, for those that are there and sound.
        label_reasons: ``code: detail`` of those that are not.
        intrinsics: (3, 3) by input; lidar2cam: (4, 4) by input.
        calibration_reasons: ``code: detail`` where calibration is asked and absent.
        times: seconds, by input; time_reasons: ``code: detail`` where it is asked and
            absent.
    """

    sizes: dict[str, tuple[int, int]] = field(default_factory=dict)
    points: dict[str, int] = field(default_factory=dict)
    dropped: dict[str, int] = field(default_factory=dict)
    reasons: dict[str, str] = field(default_factory=dict)
    labels: dict[str, int | float] = field(default_factory=dict)
    label_reasons: dict[str, str] = field(default_factory=dict)
    intrinsics: dict[str, np.ndarray] = field(default_factory=dict)
    lidar2cam: dict[str, np.ndarray] = field(default_factory=dict)
    calibration_reasons: dict[str, str] = field(default_factory=dict)
    times: dict[str, float] = field(default_factory=dict)
    time_reasons: dict[str, str] = field(default_factory=dict)


def object_path(pass_id: str, block: int) -> str:
    """Returns where the row facts of one block lie in the bank."""
    return f"rows/{pass_id}/{block:08d}.parquet"


def _columns(
    inputs: Mapping[str, InputEntry], labels: Mapping[str, Mapping[str, Any]]
) -> list[tuple[str, pa.DataType]]:
    columns: list[tuple[str, pa.DataType]] = []
    for name, entry in inputs.items():
        if entry.config["kind"] != "points":
            columns += [(f"{name}.height", pa.int32()), (f"{name}.width", pa.int32())]
            if entry.config.get("calibration"):
                # Not lists of a fixed size: Parquet's reader fails on a null in those.
                columns += [
                    (f"{name}.intrinsics", pa.list_(pa.float64())),
                    (f"{name}.lidar2cam", pa.list_(pa.float64())),
                    (f"{name}.calibration_reason", pa.string()),
                ]
        else:
            columns += [(f"{name}.points", pa.int32()), (f"{name}.dropped", pa.int32())]
        if entry.config.get("timestamp"):
            columns.append((f"{name}.time", pa.float64()))
            columns.append((f"{name}.time_reason", pa.string()))
        columns.append((f"{name}.reason", pa.string()))
    for name, config in labels.items():
        is_class = config.get("num_classes") is not None
        columns.append((f"label.{name}", pa.int64() if is_class else pa.float64()))
        columns.append((f"label.{name}.reason", pa.string()))
    return columns


def _cut(text: str | None) -> str | None:
    return None if text is None else text[:MAX_REASON_LENGTH]


def _flat(matrix: np.ndarray | None) -> list[float] | None:
    return None if matrix is None else [float(x) for x in matrix.ravel()]


def encode_rows(
    facts: Sequence[RowFacts],
    inputs: Mapping[str, InputEntry],
    labels: Mapping[str, Mapping[str, Any]],
) -> bytes:
    """Returns the Parquet bytes of a block's row facts; equal for equal facts."""
    columns = _columns(inputs, labels)
    values: dict[str, list[object]] = {name: [] for name, _ in columns}
    for row in facts:
        for name, entry in inputs.items():
            values[f"{name}.reason"].append(_cut(row.reasons.get(name)))
            if entry.config["kind"] != "points":
                height, width = row.sizes.get(name, (None, None))
                values[f"{name}.height"].append(height)
                values[f"{name}.width"].append(width)
                if entry.config.get("calibration"):
                    values[f"{name}.intrinsics"].append(_flat(row.intrinsics.get(name)))
                    values[f"{name}.lidar2cam"].append(_flat(row.lidar2cam.get(name)))
                    reason = row.calibration_reasons.get(name)
                    values[f"{name}.calibration_reason"].append(_cut(reason))
            else:
                values[f"{name}.points"].append(row.points.get(name))
                values[f"{name}.dropped"].append(row.dropped.get(name))
            if entry.config.get("timestamp"):
                values[f"{name}.time"].append(row.times.get(name))
                values[f"{name}.time_reason"].append(_cut(row.time_reasons.get(name)))
        for name in labels:
            values[f"label.{name}"].append(row.labels.get(name))
            values[f"label.{name}.reason"].append(_cut(row.label_reasons.get(name)))
    return encode_table(pa.table(values, schema=pa.schema(columns)))


def decode_rows(data: bytes, where: str) -> dict[str, list[Any]]:
    """Returns the columns of a block's row facts.

    Raises:
        BankError: the object is damaged.
    """
    hint = "run `teachonce precompute JOB --repair`"
    columns: dict[str, list[Any]] = decode_table(data, where, hint).to_pydict()
    return columns
