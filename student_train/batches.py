"""A batch of training: inputs, targets and labels of the same rows, and its memory."""

from __future__ import annotations

import itertools
import sys
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from student_train.targets import Target


@dataclass(frozen=True, eq=False)
class Cameras:
    """Calibration of an image input's view, for each row of a batch.

    Attributes:
        intrinsics: (B, 3, 3) float32, pixels of the input as the student sees it.
        lidar2cam: (B, 4, 4) float32. NaN where a row has no calibration.
    """

    intrinsics: Tensor
    lidar2cam: Tensor

    def to(self, device: torch.device | str) -> Cameras:
        """Returns it on a device."""
        return Cameras(self.intrinsics.to(device), self.lidar2cam.to(device))


@dataclass(frozen=True, eq=False)
class Batch:
    """Rows of a bank, ready to learn from.

    Attributes:
        epoch, step: which batch it is.
        rows: (B,) int64, rows of the bank.
        keys: their keys.
        inputs: by input, uint8 (B, H, W, 3).
        targets: by the name that they were asked by.
        labels: by name: int64 (B,) class, -1 where there is none; float32 (B,) number,
            NaN where there is none; (B, H, W) of either for label maps.
        cameras: by image input whose calibration was asked.
    """

    epoch: int
    step: int
    rows: npt.NDArray[np.int64]
    keys: tuple[str, ...]
    inputs: dict[str, Tensor] = field(default_factory=dict)
    targets: dict[str, Target] = field(default_factory=dict)
    labels: dict[str, Tensor] = field(default_factory=dict)
    cameras: dict[str, Cameras] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.rows)

    def to(self, device: torch.device | str) -> Batch:
        """Returns it on a device; targets stay encoded until their ``values``."""
        if torch.device(device).type == "cpu":
            return self

        def move(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
            return {k: v.to(device, non_blocking=True) for k, v in tensors.items()}

        moved = replace(
            self,
            inputs=move(self.inputs),
            targets={name: one.to(device) for name, one in self.targets.items()},
            labels=move(self.labels),
            cameras={name: one.to(device) for name, one in self.cameras.items()},
        )
        if torch.device(device).type == "cuda":
            # Page-locked memory is used again as soon as this batch is let go of: by
            # then the copies, which wait behind the work in the stream, must be done.
            torch.cuda.current_stream(torch.device(device)).synchronize()
        return moved


def split_batch(batch: Batch, count: int) -> list[Batch]:
    """Returns a batch in ``count`` parts of about as many rows, in their order.

    Parts are views of its memory; those without a row are left out.
    """
    ends = np.linspace(0, len(batch), count + 1).round().astype(int).tolist()
    spans = [slice(*pair) for pair in itertools.pairwise(ends) if pair[0] < pair[1]]
    return [_part(batch, span) for span in spans]


def _part(batch: Batch, rows: slice) -> Batch:
    def part(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: one[rows] for name, one in tensors.items()}

    return replace(
        batch,
        rows=batch.rows[rows],
        keys=batch.keys[rows],
        inputs=part(batch.inputs),
        targets={
            name: replace(
                one,
                arrays=part(one.arrays),
                valid=one.valid[rows],
                shares=None if one.shares is None else one.shares[rows],
            )
            for name, one in batch.targets.items()
        },
        labels=part(batch.labels),
        cameras={
            name: Cameras(one.intrinsics[rows], one.lidar2cam[rows])
            for name, one in batch.cameras.items()
        },
    )


def merge_batches(parts: Sequence[Batch]) -> Batch:
    """Returns one batch of what several workers made of it, in their order."""
    # An epoch's last batch may have no row for some: their label maps have no shape.
    parts = [part for part in parts if len(part)] or parts[:1]
    first = parts[0]
    if len(parts) == 1:
        return first

    def joined(tensors: Sequence[Tensor]) -> Tensor:
        return torch.cat(list(tensors))

    return Batch(
        epoch=first.epoch,
        step=first.step,
        rows=np.concatenate([part.rows for part in parts]),
        keys=tuple(key for part in parts for key in part.keys),
        inputs={k: joined([p.inputs[k] for p in parts]) for k in first.inputs},
        targets={
            name: Target(
                one.source,
                {
                    suffix: joined([p.targets[name].arrays[suffix] for p in parts])
                    for suffix in one.arrays
                },
                joined([p.targets[name].valid for p in parts]),
                _joined_shares([p.targets[name] for p in parts]),
            )
            for name, one in first.targets.items()
        },
        labels={k: joined([p.labels[k] for p in parts]) for k in first.labels},
        cameras={
            k: Cameras(
                joined([p.cameras[k].intrinsics for p in parts]),
                joined([p.cameras[k].lidar2cam for p in parts]),
            )
            for k in first.cameras
        },
    )


def _joined_shares(targets: Sequence[Target]) -> Tensor | None:
    shares = [one.shares for one in targets if one.shares is not None]
    return torch.cat(shares) if shares else None


class BatchMemory:
    """Arrays for batches, used again once nothing looks at them any more.

    Fresh memory costs about as much as filling it. An array counts as free when only
    this pool refers to it: a tensor made of it by ``torch.from_numpy``, and every view
    of that tensor, hold a reference for as long as they live.
    """

    _FREE = 2  # references: the list's and getrefcount's own

    def __init__(self, pinned: bool = False) -> None:
        """Makes an empty pool.

        Args:
            pinned: page-locked memory, from which an accelerator copies on its own.
        """
        self._pinned = pinned
        self._arrays: dict[tuple[tuple[int, ...], str], list[np.ndarray]] = {}
        self._lock = threading.Lock()

    def take(self, shape: tuple[int, ...], dtype: np.dtype[np.generic]) -> np.ndarray:
        """Returns an array with anything in it."""
        with self._lock:
            held = self._arrays.setdefault((shape, dtype.str), [])
            for place in range(len(held)):
                if sys.getrefcount(held[place]) <= self._FREE:
                    return held[place]
            held.append(self._make(shape, dtype))
            return held[-1]

    def _make(self, shape: tuple[int, ...], dtype: np.dtype[np.generic]) -> np.ndarray:
        if not self._pinned:
            return np.empty(shape, dtype)
        count = int(np.prod(shape)) * dtype.itemsize
        memory = torch.empty(count, dtype=torch.uint8, pin_memory=True)
        return memory.numpy().view(dtype).reshape(shape)
