"""The bank's side of a recheck: which rows there are, and what it says of them.

Stored rows, why a row is invalid, whether its bits must come out the same here and now.
Runs no teacher.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from manifests.bank import BankRecord, Commit, PassEntry
from manifests.errors import BankError, StorageError
from manifests.storage import Store
from pipeline.bank.blocks import read_block
from pipeline.bank.commits import read_commit
from pipeline.bank.encodings import encoding_from_json
from pipeline.bank.finalise import NOT_COMPUTED, RETIRED
from pipeline.bank.layout import level_path
from pipeline.bank.open import Bank
from pipeline.bank.row_index import num_index_parts, read_index_part
from pipeline.live import StoredOutput
from pipeline.recheck import Moments, Place
from pipeline.resolve import installed_versions

Rows = npt.NDArray[np.int64]
Codes = frozenset[str]


class BankSide:
    """What a bank says of its rows.

    Attributes:
        bank: it.
        damaged: lines about objects that could not be read, each once, in order.
        differences: why a pass's bits need not be the same, by pass.
    """

    def __init__(self, store: Store, record: BankRecord, device: str) -> None:
        """Opens it for a recheck on a kind of device."""
        self.bank = Bank(store, record)
        self.damaged: dict[str, None] = {}
        self.differences: dict[str, str] = {}
        self.keys = self.bank.keys()
        self._store, self._device = store, device
        self._commits: dict[tuple[str, int], Commit | None] = {}
        self._moments: dict[str, Moments | None] = {}
        self._versions = installed_versions()
        self._shards = {
            block: shard.name
            for shard in record.shards
            for block in shard.block_numbers
        }

    def place(self, row: int, view: int) -> Place:
        """Returns what a row and view are called."""
        shard = self._shards[row // self.bank.record.block_rows]
        return Place(row, view, shard, str(self.keys[row]))

    def codes(self, entry: PassEntry, row: int) -> Codes | None:
        """Returns why a row is invalid for a pass; None where it was not computed."""
        commit = self._commit(entry, row)
        if commit is None:
            return None
        offset = row % self.bank.record.block_rows
        found = commit.content.invalid.items()
        return frozenset(code for code, rows in found if offset in rows)

    def has_same_bits(self, entry: PassEntry, row: int) -> bool:
        """Returns whether a row's bits must be the same here and now."""
        commit = self._commit(entry, row)
        assert commit is not None
        then, now = entry.provenance.get("versions", {}), self._versions
        why = [
            f"{name} {then.get(name, 'none')} then, {now.get(name, 'none')} now"
            for name in sorted({*then, *now})
            if then.get(name) != now.get(name)
        ]
        if self.bank.record.has_chosen_rows:
            why.append("rows were chosen from the batches that they were in")
        if self._was_rounded(entry):
            why.append("values were rounded before they were stored as they are")
        if commit.device != self._device:
            why.append(f"made on {commit.device or 'a device that it does not name'}")
        if why:
            self.differences.setdefault(entry.id, ", ".join(why))
        return not why

    @staticmethod
    def _was_rounded(entry: PassEntry) -> bool:
        """Whether an export encoded anew what was not exact."""
        decoded = entry.provenance.get("decoded_from", {}).values()
        held = (encoding_from_json(data) for one in decoded for data in one)
        return any(not encoding.is_exact for encoding in held)

    def stored(
        self, entry: PassEntry, output: StoredOutput, view: int, rows: Rows
    ) -> tuple[dict[str, np.ndarray], npt.NDArray[np.bool_]]:
        """Returns rows as stored, by suffix, and which of them could be read."""
        suffixes, path = output.encoding.suffixes, path_of(entry, output)
        stored = {
            suffix: np.zeros((len(rows), *spec.row_shape), spec.numpy_dtype)
            for suffix, spec in zip(suffixes, output.arrays, strict=True)
        }
        is_read = np.ones(len(rows), np.bool_)
        size = self.bank.record.block_rows
        for block in np.unique(rows // size).tolist():
            here = rows // size == block
            for suffix in suffixes:
                try:
                    held = read_block(self.bank.array(path, suffix), block, view)
                except BankError as error:
                    is_read &= ~here
                    self.damaged[f"pass {entry.id}: {error}"] = None
                else:
                    stored[suffix][here] = held[rows[here] % size]
        return stored, is_read

    def moments(self, entry: PassEntry, output: StoredOutput) -> Moments | None:
        """Returns what an output is standardised by; None where there is nothing."""
        path = path_of(entry, output)
        if path not in self._moments:
            has_none = output.encoding.preset in ("topk", "index")
            self._moments[path] = (
                None if has_none else Moments.of(self.bank.statistics(path))
            )
        return self._moments[path]

    def _commit(self, entry: PassEntry, row: int) -> Commit | None:
        key = entry.id, row // self.bank.record.block_rows
        if key not in self._commits:
            try:
                self._commits[key] = read_commit(self._store, *key)
            except StorageError:
                self._commits[key] = None
        return self._commits[key]


def path_of(entry: PassEntry, output: StoredOutput) -> str:
    """Returns the path of an output in the bank."""
    return f"{level_path(entry, output.size)}/{output.name}"


def candidates(
    store: Store, record: BankRecord, passes: list[PassEntry]
) -> tuple[Rows, Rows]:
    """Returns rows that are valid for some pass, and those that some pass refused.

    Raises:
        BankError: a part of the index is missing or damaged.
    """
    valid, refused = [], []
    gone = pa.array([RETIRED, NOT_COMPUTED])
    for part in range(num_index_parts(record)):
        table: pa.Table = read_index_part(store, part)
        rows = table["row"].to_numpy()
        is_valid, is_refused = np.zeros((2, len(rows)), np.bool_)
        for entry in passes:
            held = table[f"valid.{entry.id}"].to_numpy()
            left_out = pc.is_in(table[f"reason.{entry.id}"], value_set=gone).to_numpy()
            is_valid |= held
            is_refused |= ~held & ~left_out
        valid.append(rows[is_valid])
        refused.append(rows[is_refused])
    return np.concatenate(valid), np.concatenate(refused)
