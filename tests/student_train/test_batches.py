"""Batches: put together again, and memory that is not used while it is looked at."""

from __future__ import annotations

import gc

import numpy as np
import pytest
import torch

from student_train import BankDataset
from student_train.batches import BatchMemory, merge_batches
from tests.student_train.conftest import READING, assert_equal, contents

FLOAT = np.dtype(np.float32)


def test_shares_become_one_batch(joined):
    """What two ranks made, side by side, is what one would have made."""
    bank = joined.open()
    options = {"batch": 8, "window_blocks": 4, "seed": 1}
    whole = BankDataset(bank, READING, **options).batches(0)
    ranks = [
        BankDataset(bank, READING, rank=rank, world_size=2, **options).batches(0)
        for rank in range(2)
    ]
    for batch, *shares in zip(whole, *ranks, strict=True):
        merged = merge_batches(shares)
        assert len(merged) == len(batch) == 8
        assert_equal([contents(merged)], [contents(batch)])
        assert merge_batches([batch]) is batch
        assert batch.to("cpu") is batch
        assert batch.to(torch.device("cpu")) is batch


def test_a_batch_on_another_device(joined):
    """All of it goes; `meta` stands for an accelerator, which has no numbers here."""
    dataset = BankDataset(joined.open(), READING, batch=8, view=0)
    batch = next(dataset.batches(0))
    moved = batch.to("meta")
    tensors = [*moved.inputs.values(), *moved.labels.values()]
    for target in moved.targets.values():
        tensors += [*target.arrays.values(), target.valid]
    for camera in moved.cameras.values():
        tensors += [camera.intrinsics, camera.lidar2cam]
    assert {tensor.device.type for tensor in tensors} == {"meta"}
    assert moved.targets["brain"].values().device.type == "meta"
    assert moved.rows is batch.rows


@pytest.mark.parametrize(
    "look",
    [
        lambda array: array,
        lambda array: array[1:],
        torch.from_numpy,
        lambda array: torch.from_numpy(array)[1:].view(torch.int32),
        lambda array: torch.from_numpy(array).view(torch.bfloat16)[..., 0],
        lambda array: torch.from_numpy(array).flatten().numpy()[3:],
        lambda array: [torch.from_numpy(array).split(1)[1]],
    ],
)
def test_memory_is_free_once_nothing_looks_at_it(look):
    memory = BatchMemory()
    array = memory.take((3, 4), FLOAT)
    place = array.ctypes.data
    seen = look(array)
    del array
    other = memory.take((3, 4), FLOAT)
    assert other.ctypes.data != place
    del seen
    gc.collect()
    again = memory.take((3, 4), FLOAT)
    assert again.ctypes.data == place
    assert memory.take((3, 4), FLOAT).ctypes.data not in (place, other.ctypes.data)


def test_memory_goes_by_shape_and_type():
    memory = BatchMemory()
    for shape, dtype in (
        ((3, 4), "f4"),
        ((4, 3), "f4"),
        ((3, 4), "i4"),
        ((0, 4), "u2"),
    ):
        array = memory.take(shape, np.dtype(dtype))
        assert (array.shape, array.dtype) == (shape, np.dtype(dtype))
        assert array.flags.c_contiguous
