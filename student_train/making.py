"""From blocks and samples to batches: what the loader's threads do.

A batch is begun (its memory taken, its rows known), filled by tasks of a few rows each,
and finished. Which rows those are is ``order``'s business, when is ``dataset``'s.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor, Future
from dataclasses import dataclass, field, replace

import numpy as np
import numpy.typing as npt
import torch

from pipeline.bank.blocks import BankArray, BlockMaps, read_block
from pipeline.bank.open import Bank
from pipeline.bank.shard_copies import Copies, RowReader
from pipeline.samples.calibration import Calibration
from pipeline.samples.errors import SampleError
from student_train.batches import Batch, BatchMemory, Cameras
from student_train.errors import TrainingError
from student_train.inputs import SampleInView, Size
from student_train.parts import (
    BlockMemory,
    HeldRows,
    LoadedPart,
    PartKey,
    PartQueue,
    StoredRows,
)
from student_train.reading import OpenedReading
from student_train.targets import Target, as_stored

Int64s = npt.NDArray[np.int64]

# Rows that one task copies and decodes: small enough to spread over the threads.
_TASK_ROWS = 8


@dataclass(frozen=True)
class Piece:
    """Rows of a part that go into one place of a batch.

    Attributes:
        key: of the part.
        view: that the block shows.
        offsets: rows within the block.
        slot: place of the first of them in the batch.
    """

    key: PartKey
    view: int
    offsets: Int64s
    slot: int


@dataclass(eq=False)
class Making:
    """A batch that is being filled."""

    epoch: int
    step: int
    rows: Int64s
    sizes: dict[str, Size]
    views: Int64s
    arrays: dict[tuple[str, str], np.ndarray] = field(default_factory=dict)
    images: dict[str, np.ndarray] = field(default_factory=dict)
    in_view: list[SampleInView] = field(default_factory=list)
    tasks: list[Future[None]] = field(default_factory=list)


class BatchMaker:
    """Makes batches of one bank and its samples."""

    def __init__(
        self,
        bank: Bank,
        opened: OpenedReading,
        copies: Copies | None,
        offsets: Mapping[int, Int64s],
        pin_memory: bool,
    ) -> None:
        """Keeps what it works with.

        Args:
            bank: an open bank.
            opened: what is read of it.
            copies: give the samples; None where nothing of them is read.
            offsets: usable rows of each block.
            pin_memory: whether batches lie in page-locked memory.
        """
        self._opened, self._copies = opened, copies
        self._offsets = offsets
        self._block_rows = bank.record.block_rows
        self._keys = bank.keys()
        self._arrays = {
            (name, suffix): bank.array(source.path, suffix)
            for name, source in opened.sources.items()
            for suffix in source.encoding.suffixes
        }
        self._maps = BlockMaps()
        self._blocks_memory = BlockMemory()
        self._batch_memory = BatchMemory(pin_memory)

    def load(self, block: int, view: int) -> LoadedPart:
        """Returns a block: every target's objects, and a reader of its samples.

        Raises:
            BankError: an object is missing or damaged.
            ShardError, StorageError: the shard is not the bank's, or cannot be read.
        """
        arrays: dict[tuple[str, str], StoredRows] = {}
        for name, array in self._arrays.items():
            mapped = self._maps.get(array, block, view)
            arrays[name] = mapped or self._read(array, block, view)
        rows = None
        if self._opened.reader is not None and self._copies is not None:
            within = self._copies.first_row(block) + self._offsets[block]
            rows = self._copies.open(block, within, self._opened.reader.wanted)
        return LoadedPart(arrays, rows)

    def _read(self, array: BankArray, block: int, view: int) -> HeldRows:
        shape = (array.spec.block_rows, *array.spec.row_shape)
        out = self._blocks_memory.take(shape, array.spec.numpy_dtype)
        return HeldRows(read_block(array, block, view, out=out), self._blocks_memory)

    def unload(self, part: LoadedPart) -> None:
        """Takes a block back when nobody looks at it any more."""
        for array in part.arrays.values():
            array.close()
        if part.rows is not None:
            part.rows.close()

    def begin(
        self,
        epoch: int,
        step: int,
        sizes: dict[str, Size],
        pieces: Sequence[Piece],
        parts: PartQueue,
        pool: Executor,
    ) -> Making:
        """Returns a batch with room for all its rows, and with tasks that fill it.

        Args:
            epoch, step: which batch.
            sizes: (height, width) of each image input.
            pieces: where its rows come from.
            parts: gives the blocks.
            pool: runs the tasks.
        """
        rows = np.concatenate(
            [np.empty(0, np.int64)]
            + [piece.key.block * self._block_rows + piece.offsets for piece in pieces]
        )
        views = np.concatenate(
            [np.empty(0, np.int64)]
            + [np.full(len(piece.offsets), piece.view) for piece in pieces]
        )
        making = Making(epoch, step, rows, sizes, views)
        take = self._batch_memory.take
        for name, array in self._arrays.items():
            shape = (len(rows), *array.spec.row_shape)
            making.arrays[name] = take(shape, array.spec.numpy_dtype)
        for image, (height, width) in sizes.items():
            making.images[image] = take(
                (len(rows), height, width, 3), np.dtype(np.uint8)
            )
        making.in_view = [SampleInView()] * len(rows)
        fill: Callable[[Piece, Making, PartQueue], None] = self._fill
        # Without a sample to decode a task is a few copies.
        size = max(1, len(rows)) if self._copies is None else _TASK_ROWS
        for piece in pieces:
            for first in range(0, len(piece.offsets), size):
                offsets = piece.offsets[first : first + size]
                task = replace(piece, offsets=offsets, slot=piece.slot + first)
                making.tasks.append(pool.submit(fill, task, making, parts))
        return making

    def _fill(self, piece: Piece, making: Making, parts: PartQueue) -> None:
        part = parts.take(piece.key)
        span = slice(piece.slot, piece.slot + len(piece.offsets))
        for name, array in part.arrays.items():
            array.take(piece.offsets, making.arrays[name][span])
        if part.rows is not None:
            for slot, offset in enumerate(piece.offsets.tolist(), piece.slot):
                found = self._read_row(piece, offset, part.rows, making.sizes)
                for image, pixels in found.images.items():
                    making.images[image][slot] = pixels
                making.in_view[slot] = replace(found, images={})
        parts.give_back(piece.key, len(piece.offsets))

    def _read_row(
        self, piece: Piece, offset: int, rows: RowReader, sizes: Mapping[str, Size]
    ) -> SampleInView:
        """Returns a row's sample in its view; raises where it is not the bank's."""
        assert self._opened.reader is not None
        assert self._copies is not None
        block = piece.key.block
        row = block * self._block_rows + offset
        url = self._copies.url_of(block)
        sample = rows.read(self._copies.first_row(block) + offset)
        if sample.key != self._keys[row]:
            raise TrainingError(
                f"key must be the bank's {self._keys[row]!r}, got {sample.key!r} "
                f"(row {row}, {url}); give the shards that the bank was made from"
            )
        calibration = {
            name: Calibration(intrinsics[row], lidar2cam[row])
            for name, (intrinsics, lidar2cam) in self._opened.calibration.items()
        }
        shard = self._copies.shard_of(block).name
        full = self._opened.full_sizes(row)
        try:
            return self._opened.reader.read(
                sample, shard, piece.view, sizes, calibration, full
            )
        except SampleError as error:
            what = (
                "check data.shards and data.labels"
                if full is None
                else "run `teachonce verify --full`"
            )
            raise TrainingError(
                f"sample must be readable, got {error} (row {row}, {sample.key!r} of "
                f"{url}); {what}"
            ) from error

    def finish(self, making: Making) -> Batch:
        """Returns the batch once its tasks are done; raises what one of them raised."""
        for task in making.tasks:
            task.result()
        rows = making.rows
        labels = {
            name: torch.from_numpy(values[rows])
            for name, values in self._opened.labels.items()
        }
        for name in self._opened.map_names:
            labels[name] = _stack(name, [one.maps[name] for one in making.in_view])
        cameras = {}
        for name in self._opened.calibration:
            found = [one.calibration[name] for one in making.in_view]
            cameras[name] = Cameras(
                _matrices([one.intrinsics for one in found], 3),
                _matrices([one.lidar2cam for one in found], 4),
            )
        targets = {}
        for name, source in self._opened.sources.items():
            arrays = {
                suffix: as_stored(making.arrays[name, suffix], source.encoding, suffix)
                for suffix in source.encoding.suffixes
            }
            valid = torch.from_numpy(self._opened.valid[name][rows])
            shares = None
            if source.padding is not None:
                boxes = self._opened.boxes[source.padding.input]
                found_B2 = source.padding.shares(boxes[rows, making.views])
                shares = torch.from_numpy(found_B2)
            targets[name] = Target(source, arrays, valid, shares)
        return Batch(
            epoch=making.epoch,
            step=making.step,
            rows=rows,
            keys=tuple(self._keys[rows].tolist()),
            inputs={name: torch.from_numpy(a) for name, a in making.images.items()},
            targets=targets,
            labels=labels,
            cameras=cameras,
        )


def _matrices(found: Sequence[np.ndarray], side: int) -> torch.Tensor:
    stacked = np.asarray(found, np.float32).reshape(len(found), side, side)
    return torch.from_numpy(stacked)


def _stack(name: str, maps: Sequence[np.ndarray]) -> torch.Tensor:
    """Returns label maps as one tensor: classes as int64, numbers as float32."""
    shapes = {one.shape for one in maps}
    if len(shapes) > 1:
        raise TrainingError(
            f"maps of label {name} must be of one size, got {sorted(shapes)[:3]}; read "
            "the input that they label too, then they take its size"
        )
    if not maps:
        return torch.empty(0)
    stacked = torch.from_numpy(np.stack(maps))
    return stacked.long() if stacked.dtype == torch.int32 else stacked
