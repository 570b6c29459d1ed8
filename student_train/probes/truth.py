"""What probes ask for: labels of the bank, and label maps of the shards, in view 0.

Maps are read at one resolution for all rows, that of the label itself where all images
are of one size: scores are of pixels, so it is part of the question.

Shape suffixes: N rows, H and W pixels or cells of a map.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from manifests.recipe import MapLabel
from manifests.trajectory import TrajectoryConfig
from pipeline.bank.open import Bank
from student_train.dataset import BankDataset
from student_train.errors import TrainingError
from student_train.inputs import Size
from student_train.probes.features import Bools, SplitRows
from student_train.probes.trajectory import Futures
from student_train.reading import Reading
from student_train.tasks import num_label_classes

_LABEL = "label"
_LARGEST_INT16 = 2**15


def bank_label(bank: Bank, name: str) -> tuple[npt.NDArray[np.generic], Bools]:
    """Returns a label of the bank for every row, and which rows have one.

    Returns:
        (num_rows,) int64 classes or float64 numbers; (num_rows,) bool.
    """
    values = bank.whole_array(f"labels/{name}")
    if np.issubdtype(values.dtype, np.integer):
        return values.astype(np.int64), values >= 0
    return values.astype(np.float64), np.isfinite(values)


def read_futures(bank: Bank, config: TrajectoryConfig, where: str) -> Futures:
    """Returns every row's future and state; not-a-number where a label is missing.

    Raises:
        TrainingError: the bank lacks a label, or one is of classes.
    """

    def column(name: str, field: str) -> npt.NDArray[np.float64]:
        num_classes = num_label_classes(bank, name, f"{where}.{field}")
        if num_classes is not None:
            raise TrainingError(
                f"{where}.{field} must be a number label, got {name} of {num_classes} "
                "classes; leave `num_classes` out of the job's label"
            )
        return bank_label(bank, name)[0].astype(np.float64)

    waypoints = [
        np.stack([column(x, "waypoints"), column(y, "waypoints")], -1)
        for x, y in config.waypoints
    ]
    fields = {config.speed: "speed", config.yaw_rate: "yaw_rate"}
    state = [column(name, fields.get(name, "ego")) for name in config.state]
    if config.yaw_rate is None:
        yaw_rate_N = np.zeros(bank.record.num_rows)
    else:
        yaw_rate_N = state[config.state.index(config.yaw_rate)]
    drives_N = None
    if config.sequence is not None:
        num_label_classes(bank, config.sequence, f"{where}.sequence")
        drives_N = bank_label(bank, config.sequence)[0]
    return Futures(np.stack(waypoints, 1), np.stack(state, 1), yaw_rate_N, drives_N)


def map_size(
    bank: Bank,
    shards: Sequence[str] | None,
    label: MapLabel,
    rows: Bools,
    fallback: Size | None,
) -> Size:
    """Returns (height, width) at which a label map is read: its own, if there is one.

    That of the first row, as its view 0 cuts it, if all images are of one size; else
    ``fallback``, for there is no one resolution. Labels on a bird's-eye grid are not
    cut.

    Args:
        bank: an open bank.
        shards: the reader's own copy.
        label: a map.
        rows: (num_rows,) which rows are asked for, at least one.
        fallback: the largest input of a student; None where there is none.

    Raises:
        TrainingError: the first row's map cannot be read.
    """
    first = np.zeros_like(rows)
    first[np.flatnonzero(rows)[0]] = True
    dataset = BankDataset(
        bank,
        Reading(maps={_LABEL: label}),
        batch=1,
        rows=first,
        shards=shards,
        view=0,
        shuffle=False,
        keep_rest=True,
        threads=1,
    )
    (batch,) = dataset
    height, width = batch.labels[_LABEL].shape[1:]
    if label.input is None:
        return height, width
    images = bank.whole_array(f"views/{label.input}_size")[rows]
    if fallback is not None and (images != images[0]).any():
        return fallback
    x0, y0, x1, y1 = bank.whole_array(f"views/{label.input}_box")[first, 0][0].tolist()
    image_height, image_width = images[0].tolist()
    return (
        max(1, round((y1 - y0) * height / image_height)),
        max(1, round((x1 - x0) * width / image_width)),
    )


def read_maps(
    bank: Bank,
    shards: Sequence[str] | None,
    label: MapLabel,
    size: Size,
    rows: SplitRows,
    batch: int,
) -> dict[str, Tensor]:
    """Returns a label map of rows by split, in view 0.

    Args:
        bank: an open bank.
        shards: the reader's own copy.
        label: a map; of numbers whose logarithm is learned the numbers are read.
        size: (height, width) wanted, from ``map_size``.
        rows: of each split.
        batch: rows read at a time.

    Returns:
        (N, *size) by split: int16 or int32 classes, -1 where there is none; or float32
        numbers, NaN where there is none, or no positive one where ``log``.

    Raises:
        TrainingError: a map is missing, of another size or out of range.
    """
    asked = np.zeros(bank.record.num_rows, np.bool_)
    for one in rows.values():
        asked[one] = True
    # The image is read for the geometry alone, so by the cheapest filter.
    inputs = {} if label.input is None else {label.input: size}
    dataset = BankDataset(
        bank,
        Reading(
            inputs=inputs,
            maps={_LABEL: label.model_copy(update={"log": False})},
            interpolation="nearest",
        ),
        batch=batch,
        rows=asked,
        shards=shards,
        view=0,
        shuffle=False,
        keep_rest=True,
    )
    found = {
        split: torch.empty((len(one), *size), dtype=map_dtype(label))
        for split, one in rows.items()
    }
    for values in dataset:
        maps_NHW = values.labels[_LABEL]
        if tuple(maps_NHW.shape[1:]) != size:
            raise TrainingError(
                f"maps of a bird's-eye label must be of one size, got {list(size)} and "
                f"{list(maps_NHW.shape[1:])} (row {values.rows[0]}); pack them alike"
            )
        if label.log:
            maps_NHW = maps_NHW.where(maps_NHW > 0, math.nan)
        for split, wanted in rows.items():
            here = np.flatnonzero(np.isin(values.rows, wanted, assume_unique=True))
            places = np.searchsorted(wanted, values.rows[here])
            taken_NHW = maps_NHW[torch.from_numpy(here)]
            found[split][torch.from_numpy(places)] = taken_NHW.to(map_dtype(label))
    return found


def map_dtype(label: MapLabel) -> torch.dtype:
    """Returns the type that a label's maps are held in."""
    if label.num_classes is None:
        return torch.float32
    return torch.int16 if label.num_classes <= _LARGEST_INT16 else torch.int32
