"""The reader's own copy of the shards: matched to the bank's, checked, read by row.

A copy is the bank's shard if it has its name and its bytes: the size is compared before
anything is read, a plain tar's headers are compared when a local copy is first opened,
and every sample's key with the bank's. Only the bytes of the rows asked for are read: a
row at a time from a local disk, a block's rows in one request from anywhere else. The
padding of the last row may be missing: some writers leave it out.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from manifests.bank import ShardEntry
from manifests.errors import BankError, StorageError
from manifests.storage import is_local, open_url, read_range
from pipeline.bank.open import Bank
from pipeline.bank.sample_table import SampleTable
from pipeline.samples.errors import ShardError
from pipeline.samples.shards import (
    RowSpan,
    Sample,
    index_shard,
    parse_sample,
    read_samples,
)
from pipeline.samples.sources import expand_shards, name_shards, stat_shards
from pipeline.samples.tar import padded

Int64s = npt.NDArray[np.int64]


def shards_of(bank: Bank, rows: Int64s) -> list[ShardEntry]:
    """Returns the shards that some rows come from, in the bank's order."""
    blocks = set(np.unique(rows // bank.record.block_rows).tolist())
    return [
        shard
        for shard in bank.record.shards
        if not blocks.isdisjoint(shard.block_numbers)
    ]


class RowReader(Protocol):
    """Reads samples of one block, from any thread."""

    def read(self, row: int) -> Sample:
        """Returns the sample of a row of the shard."""
        ...

    def close(self) -> None:
        """Lets go of files and bytes; nothing is read afterwards."""
        ...


class Copies(Protocol):
    """Samples of a bank's rows, wherever they come from."""

    def shard_of(self, block: int) -> ShardEntry:
        """Returns the shard that a block is of."""
        ...

    def url_of(self, block: int) -> str:
        """Returns where a block's samples are read from, for messages."""
        ...

    def first_row(self, block: int) -> int:
        """Returns the number, as a reader takes it, of a block's first row."""
        ...

    def open(self, block: int, rows: Int64s, wanted: frozenset[str]) -> RowReader:
        """Returns a reader of some rows of a block."""
        ...


class ShardCopies:
    """Where a bank's shards lie for this reader."""

    def __init__(
        self,
        bank: Bank,
        patterns: Sequence[str] | None,
        rows: Int64s,
        field: str = "data.shards",
    ) -> None:
        """Matches and checks the copies of the shards that ``rows`` come from.

        Args:
            bank: an open bank.
            patterns: absolute paths or URLs; None for where the bank found them.
            rows: rows of the bank that will be read.
            field: that the patterns stand in, for messages.

        Raises:
            BankError: a shard has no copy, or the copy has another size.
            StorageError: a copy cannot be read.
        """
        wanted = shards_of(bank, rows)
        if patterns is None:
            self._urls = {shard.name: shard.url for shard in wanted}
        else:
            self._urls = _match(wanted, expand_shards(patterns, field), field)
        urls = [self._urls[shard.name] for shard in wanted]
        for shard, stat in zip(wanted, stat_shards(urls, field), strict=True):
            if stat.size_bytes != shard.size_bytes:
                raise BankError(
                    f"{field}: {self._urls[shard.name]} must be the bank's "
                    f"{shard.name} of {shard.size_bytes} bytes, got {stat.size_bytes}; "
                    "give the shards that the bank was made from"
                )
        self._field = field
        self._shard_of = {
            block: shard for shard in wanted for block in shard.block_numbers
        }
        self._block_rows = bank.record.block_rows
        self._table: SampleTable = bank.sample_table
        self._lock = threading.Lock()
        self._checked: dict[str, threading.Lock | None] = {}
        self._walks: dict[str, threading.Lock] = {}
        self._found: dict[str, dict[str, int]] = {}
        self._keys = bank.keys()

    def shard_of(self, block: int) -> ShardEntry:
        """Returns the shard that owns a block."""
        return self._shard_of[block]

    def url_of(self, block: int) -> str:
        """Returns where the copy of a block's shard lies."""
        return self._urls[self._shard_of[block].name]

    def first_row(self, block: int) -> int:
        """Returns the row within its shard that a block starts with."""
        return (block - self._shard_of[block].first_block) * self._block_rows

    def open(self, block: int, rows: Int64s, wanted: frozenset[str]) -> RowReader:
        """Returns a reader of some rows of a block.

        Args:
            block: number of the block.
            rows: rows within the shard that will be asked for.
            wanted: extensions to read.

        Raises:
            ShardError: the copy is not the shard that the bank was made from.
            StorageError: it cannot be read.
        """
        shard, url = self._shard_of[block], self.url_of(block)
        if shard.sequential:
            start = shard.first_block * self._block_rows
            keys = self._keys[start : start + shard.samples]
            places = None
            if shard.chosen_sha256 is not None:
                places = self._places(url, shard)
            return _HeldRows(url, shard, keys, places, rows, wanted)
        spans = self._table.spans(shard)
        if is_local(url):
            self._check_headers(shard, url)
            return _LocalRows(url, spans.offset, spans.size, wanted)
        return _FetchedRows(url, spans.offset, spans.size, rows, wanted)

    def _places(self, url: str, shard: ShardEntry) -> dict[str, int]:
        """Returns where in its shard each key lies, of a shard whose rows were chosen.

        Its headers are walked and compared once.
        """
        with self._lock:
            guard = self._walks.setdefault(url, threading.Lock())
        with guard:
            if url not in self._found:
                found = index_shard(url)
                self._compare(found.headers_sha256, shard, url)
                self._found[url] = {row.key: n for n, row in enumerate(found.rows)}
            return self._found[url]

    def _compare(self, headers_sha256: str, shard: ShardEntry, url: str) -> None:
        if headers_sha256 != shard.headers_sha256:
            raise ShardError(
                f"{self._field}: {url} must be the bank's {shard.name}, but its "
                "members differ; give the shards that the bank was made from"
            )

    def _check_headers(self, shard: ShardEntry, url: str) -> None:
        """Compares a local copy's headers with the bank's, once."""
        with self._lock:
            guard = self._checked.setdefault(url, threading.Lock())
        if guard is None:
            return
        with guard:
            if self._checked[url] is None:
                return
            self._compare(index_shard(url).headers_sha256, shard, url)
            self._checked[url] = None


def _match(
    wanted: Sequence[ShardEntry], urls: Sequence[str], field: str
) -> dict[str, str]:
    """Returns the URL of each shard's copy: the one whose path ends in its name."""
    by_name = dict(zip(name_shards(urls), urls, strict=True))
    by_base: dict[str, list[str]] = {}
    for url in urls:
        by_base.setdefault(url.rstrip("/").rsplit("/", 1)[-1], []).append(url)
    found = {}
    for shard in wanted:
        # The bank's name may have folders (the names repeat) or a version (@2).
        path = shard.url.rstrip("/")
        near = by_base.get(path.rsplit("/", 1)[-1], [])
        if len(near) > 1:
            near = [url for url in near if url.endswith("/" + shard.name)]
        copy = by_name.get(shard.name) or (near[0] if len(near) == 1 else None)
        if copy is None:
            raise BankError(
                f"{field} must have a copy of the bank's {shard.name}, got none "
                f"among {len(urls)} shards ({urls[0]}, ...); add it (a copy keeps its "
                "name: rename or link it), or ask for rows of other shards alone"
            )
        found[shard.name] = copy
    return found


class _LocalRows:
    """Rows of a plain tar on this machine, one positioned read each."""

    def __init__(
        self, url: str, offset: Int64s, size: Int64s, wanted: frozenset[str]
    ) -> None:
        self._url, self._offset, self._size = url, offset, size
        self._wanted = wanted
        self._file = open_url(url)

    def read(self, row: int) -> Sample:
        """Returns the sample of a row of the shard."""
        size, offset = int(self._size[row]), int(self._offset[row])
        try:
            data = os.pread(self._file.fileno(), size, offset)
        except OSError as error:
            raise StorageError(f"cannot read {self._url}: {error}") from error
        if padded(len(data)) < size:
            raise ShardError(
                f"shard {self._url} ends before byte {offset + size}, within row {row}"
            )
        return parse_sample(data, self._wanted, self._url)

    def close(self) -> None:
        """Closes the file."""
        self._file.close()


class _FetchedRows:
    """Rows of a plain tar anywhere, fetched in one range."""

    def __init__(
        self,
        url: str,
        offset: Int64s,
        size: Int64s,
        rows: Int64s,
        wanted: frozenset[str],
    ) -> None:
        self._url, self._offset, self._size = url, offset, size
        self._wanted = wanted
        self._start = int(offset[rows].min())
        end = int((offset[rows] + size[rows]).max())
        data = read_range(url, self._start, end)
        if padded(len(data)) < end - self._start:
            raise ShardError(f"shard {url} ends before byte {end}")
        self._data = memoryview(data)

    def read(self, row: int) -> Sample:
        """Returns the sample of a row of the shard."""
        start = int(self._offset[row]) - self._start
        data = self._data[start : start + int(self._size[row])]
        return parse_sample(data, self._wanted, self._url)

    def close(self) -> None:
        """Lets go of the bytes."""
        self._data = memoryview(b"")


class _HeldRows:
    """Rows of a shard that must be read from its start: its wanted members are held.

    Each block walks the shard anew: for training, shards are better plain tars.
    """

    def __init__(
        self,
        url: str,
        shard: ShardEntry,
        keys: npt.NDArray[Any],
        places: Mapping[str, int] | None,
        rows: Int64s,
        wanted: frozenset[str],
    ) -> None:
        """Reads them.

        Args:
            url: of the copy.
            shard: the bank's entry.
            keys: of its rows in the bank.
            places: where each key lies in the shard; None where its rows are all of it.
            rows: that will be asked for.
            wanted: extensions to read.
        """
        place_of = {row: row for row in rows.tolist()}
        count, first_key = shard.samples, str(keys[0])
        if places is not None:
            place_of = {row: places[str(keys[row])] for row in rows.tolist()}
            count, first_key = len(places), next(iter(places))
        span = RowSpan(0, count, 0, shard.size_bytes, first_key)
        rows_at = {place: row for row, place in place_of.items()}
        self._samples = {
            rows_at[place]: sample
            for place, sample in read_samples(url, span, wanted, sequential=True)
            if place in rows_at
        }

    def read(self, row: int) -> Sample:
        """Returns the sample of a row of the shard."""
        return self._samples[row]

    def close(self) -> None:
        """Lets go of the samples."""
        self._samples = {}
