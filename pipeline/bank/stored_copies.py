"""The bank's own copies of inputs, read as a reader's shards are: sample by sample.

Whole blocks through ``read_block``, one request for each input; of a block only the
bytes of the images that are asked for are held.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

from manifests.bank import ShardEntry
from manifests.errors import BankError
from pipeline.bank.blocks import read_block
from pipeline.bank.open import Bank
from pipeline.bank.shard_copies import shards_of
from pipeline.bank.stored_jpeg import START, jpeg_of
from pipeline.samples.shards import Sample

Int64s = npt.NDArray[np.int64]


class StoredCopies:
    """Samples made of a bank's copies; members are called as their inputs are."""

    def __init__(self, bank: Bank, names: Sequence[str], rows: Int64s) -> None:
        """Finds the copies.

        Args:
            bank: an open bank.
            names: of the inputs.
            rows: rows of the bank that will be read.

        Raises:
            BankError: the bank holds no copies of an input.
        """
        self._arrays = {name: bank.array(bank.stored_path(name)) for name in names}
        self._url = bank.url
        self._keys = bank.keys()
        self._block_rows = bank.record.block_rows
        self._shard_of = {
            block: shard
            for shard in shards_of(bank, rows)
            for block in shard.block_numbers
        }
        # Fresh memory costs more than what is read into it.
        self._free: dict[str, list[npt.NDArray[np.uint8]]] = {n: [] for n in names}
        self._lock = threading.Lock()

    def shard_of(self, block: int) -> ShardEntry:
        """Returns the shard that a block is of."""
        return self._shard_of[block]

    def url_of(self, block: int) -> str:
        """Returns where a block's copies lie, for messages."""
        return f"{self._url}, block {block}"

    def first_row(self, block: int) -> int:
        """Returns the row of the bank that a block starts with."""
        return block * self._block_rows

    def open(self, block: int, rows: Int64s, wanted: frozenset[str]) -> StoredRows:
        """Returns a reader of some rows of a block.

        Args:
            block: number of the block.
            rows: rows of the bank that will be asked for.
            wanted: the inputs to read.

        Raises:
            BankError: the block is not committed, or an object is missing or damaged.
            StorageError: the store cannot be read.
        """
        first = self.first_row(block)
        images = {}
        for name in sorted(wanted):
            held = read_block(self._arrays[name], block, out=self._take(name))
            images[name] = {row: jpeg_of(held[row - first]) for row in rows.tolist()}
            with self._lock:
                self._free[name].append(held)
        return StoredRows(self._keys, images, self.url_of(block))

    def _take(self, name: str) -> npt.NDArray[np.uint8]:
        with self._lock:
            if self._free[name]:
                return self._free[name].pop()
        spec = self._arrays[name].spec
        return np.empty((spec.block_rows, *spec.row_shape), np.uint8)


class StoredRows:
    """Copies of some rows of one block, in memory."""

    def __init__(
        self,
        keys: npt.NDArray[np.object_],
        images: Mapping[str, Mapping[int, bytes]],
        where: str,
    ) -> None:
        """Takes the JPEGs of each input by row of the bank."""
        self._keys, self._images, self._where = keys, dict(images), where

    def read(self, row: int) -> Sample:
        """Returns the sample of a row of the bank.

        Raises:
            BankError: a copy is missing.
        """
        members = {name: found[row] for name, found in self._images.items()}
        for name, data in members.items():
            if not data.startswith(START):
                raise BankError(
                    f"copy of input {name} must be a JPEG, got {data[:8]!r} (row "
                    f"{row}, {self._where}); run precompute --repair"
                )
        return Sample(str(self._keys[row]), members, {})

    def close(self) -> None:
        """Lets go of the bytes."""
        self._images = {}
