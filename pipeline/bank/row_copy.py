"""Rows of a bank's blocks into a block of another: moved as stored, or encoded anew.

What is stored of a row decodes it wherever it lies, so rows are moved without being
decoded and decode to the same values; only an output that is to be stored otherwise is
decoded. Every object that is read is compared with its commit first. Nothing but the
chosen rows is written: padding is fill, chunks hold no other row, and row facts are a
new table of these rows alone.

Memory per call: one block of the part as stored, one object of the source; where an
output is encoded anew, its values of one view as well.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from manifests.bank import Commit, CommitContent, OutputEntry
from manifests.storage import Store
from pipeline.bank.arrays import ArraySpec, object_name
from pipeline.bank.block_copy import BlockCopied, SourceBlock
from pipeline.bank.commits import commit_path, encode_commit, read_commit
from pipeline.bank.encoding import (
    BFLOAT16_MISSING,
    STORED_DTYPE,
    Array,
    Encoding,
)
from pipeline.bank.encodings import encoding_from_json
from pipeline.bank.layout import block_objects
from pipeline.bank.objects import (
    decode_object,
    encode_object,
    object_crc32c,
    object_size,
)
from pipeline.bank.pass_parts import PassPart
from pipeline.bank.record import FEATURES
from pipeline.bank.row_index import decode_table, encode_table
from pipeline.bank.selection import PartBlock, Piece

Bools = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class RowsTask:
    """A block to make of rows of others.

    Attributes:
        part: its pass in both banks.
        block: of the part, and where its rows come from.
        is_committed: whether the destination has its commit already.
    """

    part: PassPart
    block: PartBlock
    is_committed: bool


def copy_rows(
    source: Store, destination: Store, task: RowsTask, held: Mapping[str, int]
) -> BlockCopied:
    """Makes one block of rows of others; its commit comes last.

    Only for the holder of the destination's lock: what is there is replaced.

    Args:
        source: the bank to copy from.
        destination: the one to copy to.
        task: the block.
        held: size of every object that the destination has.

    Raises:
        DamagedBlock: a block of the source is not what was committed.
        StorageError: a store failed.
    """
    entry, number = task.part.target, task.block.block
    if task.is_committed:
        content = read_commit(destination, entry.id, number).content
        if content.fingerprint == entry.fingerprint and all(
            held.get(path) == size for path, (size, _) in content.objects.items()
        ):
            return BlockCopied(held_objects=len(content.objects))
    return _RowCopy(source, destination, task).run()


@dataclass
class _RowCopy:
    """One block in the making."""

    source: Store
    destination: Store
    task: RowsTask
    _commits: dict[int, Commit] = field(default_factory=dict)
    _objects: dict[str, tuple[int, int]] = field(default_factory=dict)

    def run(self) -> BlockCopied:
        """Writes objects and commit."""
        entry, block = self.task.part.target, self.task.block
        for piece in block.pieces:
            held = SourceBlock(self.source, self.task.part.source, piece.block)
            _, self._commits[piece.block] = held.read_commit()
        invalid = self._invalid()
        if entry.outputs:
            self._write_outputs(invalid)
        else:
            self._write_tables()
        devices = {one.device for one in self._commits.values()}
        is_invalid = {row for rows in invalid.values() for row in rows}
        content = CommitContent(
            pass_id=entry.id,
            fingerprint=entry.fingerprint,
            block=block.block,
            shard=block.shard,
            rows=block.num_rows,
            valid=block.num_rows - len(is_invalid),
            invalid={code: tuple(sorted(invalid[code])) for code in sorted(invalid)},
            objects=self._objects,
        )
        device = devices.pop() if len(devices) == 1 else ""
        commit = Commit(content=content, device=device)
        path = commit_path(entry.id, block.block)
        self.destination.replace(path, encode_commit(commit))
        num_bytes = sum(size for size, _ in self._objects.values())
        return BlockCopied(len(self._objects), num_bytes)

    def _invalid(self) -> dict[str, list[int]]:
        """Returns reason codes and the rows of the new block that they hold for."""
        found: dict[str, list[int]] = {}
        for piece in self.task.block.pieces:
            for code, rows in self._commits[piece.block].content.invalid.items():
                places = np.flatnonzero(np.isin(piece.rows, rows)) + piece.first
                if len(places):
                    found.setdefault(code, []).extend(places.tolist())
        return found

    def _read(self, piece: Piece, path: str) -> bytes:
        held = SourceBlock(self.source, self.task.part.source, piece.block)
        content = self._commits[piece.block].content
        held.check_names(content, [path])
        return held.read(content, path)

    def _write(self, path: str, data: bytes) -> None:
        self.destination.replace(path, data)
        self._objects[path] = (len(data), object_crc32c([data]))

    # Facts of rows.

    def _write_tables(self) -> None:
        """Writes what is a line per row: the lines of these rows, of no others."""
        block, entry = self.task.block, self.task.part.source
        for number, path in enumerate(
            block_objects(self.task.part.target, block.block)
        ):
            tables = []
            for piece in block.pieces:
                name = block_objects(entry, piece.block)[number]
                where = self.source.url_of(name)
                table = decode_table(self._read(piece, name), where, "restore it")
                tables.append(table.take(pa.array(piece.rows)))
            self._write(path, encode_table(pa.concat_tables(tables).combine_chunks()))

    # Outputs.

    def _write_outputs(self, invalid: dict[str, list[int]]) -> None:
        """Writes every object; rows that an encoding refuses become invalid."""
        part, block = self.task.part, self.task.block
        usable = np.zeros(self._block_rows, np.bool_)
        usable[: block.num_rows] = True
        usable[[row for rows in invalid.values() for row in rows]] = False
        while True:
            # A row that one output refuses is missing in all: until none is new.
            refused: set[tuple[int, str]] = set()
            for output in part.target.outputs:
                for view in part.target.views:
                    refused |= self._write_output(output, view, usable)
            if not refused:
                return
            for row, code in sorted(refused):
                usable[row] = False
                invalid.setdefault(code, []).append(row)

    @property
    def _block_rows(self) -> int:
        output = self.task.part.target.outputs[0]
        return ArraySpec.from_json(output.arrays[0]).block_rows

    def _write_output(
        self, output: OutputEntry, view: int, usable: Bools
    ) -> set[tuple[int, str]]:
        """Writes an output's objects of one view; returns rows that were refused."""
        part = self.task.part
        before = part.source_output(output)
        held = encoding_from_json(before.encoding)
        specs = [ArraySpec.from_json(data) for data in output.arrays]
        encoding = part.encodings.get((output.size, output.name))
        sources = [ArraySpec.from_json(data) for data in before.arrays]
        if encoding is None:
            for old, spec in zip(sources, specs, strict=True):
                rows = self._gather(old, view)
                rows[~usable] = spec.fill_value
                self._write_object(spec, view, rows)
            return set()
        stored = {
            suffix: self._gather(old, view)
            for suffix, old in zip(held.suffixes, sources, strict=True)
        }
        values = _values(held, encoding, stored)
        cells = None
        if part.target.pads(output.size) and output.kind in ("grid", "frames"):
            cells = _is_missing(values, encoding)[..., 0]
            # An encoding looks at the numbers in cells before it leaves them out.
            values[cells] = 0
        encoded = encoding.encode(values, usable, missing_cells=cells, reuse=True)
        for suffix, spec in zip(encoding.suffixes, specs, strict=True):
            self._write_object(spec, view, encoded.arrays[suffix])
        return {
            (row, f"{output.name}:{reason}") for row, reason in encoded.refused.items()
        }

    def _write_object(self, spec: ArraySpec, view: int, rows: Array) -> None:
        block = self.task.block
        parts = encode_object(rows, spec, block.num_rows)
        path = f"{FEATURES}/{object_name(spec, block.block, view)}"
        self.destination.replace(path, b"".join(bytes(part) for part in parts))
        self._objects[path] = (object_size(parts), object_crc32c(parts))

    def _gather(self, spec: ArraySpec, view: int) -> Array:
        """Returns (block_rows, *row_shape) of the new block as the source stores it."""
        shape = (self._block_rows, *spec.row_shape)
        out = np.full(shape, spec.fill_value, spec.numpy_dtype)
        for piece in self.task.block.pieces:
            name = f"{FEATURES}/{object_name(spec, piece.block, view)}"
            data = self._read(piece, name)
            chunks, starts = np.unique(piece.rows // spec.chunk_rows, return_index=True)
            place = piece.first
            for chunk, rows in zip(
                chunks.tolist(), np.split(piece.rows, starts[1:]), strict=True
            ):
                first = chunk * spec.chunk_rows
                span = slice(first, first + spec.chunk_rows)
                held = decode_object(data, spec, rows=span)
                out[place : place + len(rows)] = held[rows - first]
                place += len(rows)
        return out


def _values(held: Encoding, made: Encoding, stored: Mapping[str, Array]) -> Array:
    """Returns stored rows as the values that another encoding takes."""
    if held.is_exact:
        return stored[""]
    return held.decode(stored).astype(STORED_DTYPE[made.dtype], copy=False)


def _is_missing(values: Array, encoding: Encoding) -> Bools:
    if encoding.dtype == "bfloat16":
        return np.equal(values, BFLOAT16_MISSING)
    return np.isnan(values)


def task_bytes(parts: Sequence[PassPart], source_rows: int, part_rows: int) -> int:
    """Returns the memory that making the largest block of the part takes at most.

    Args:
        parts: passes.
        source_rows: rows of a block of the source.
        part_rows: rows of a block of the part.
    """
    most = 0
    for part in parts:
        for output in part.target.outputs:
            before = part.source_output(output)
            held = [ArraySpec.from_json(data).row_bytes for data in before.arrays]
            made = [ArraySpec.from_json(data).row_bytes for data in output.arrays]
            size = max(held) * source_rows + 2 * max(held) * part_rows
            if (output.size, output.name) in part.encodings:
                values = 4 * int(np.prod(output.shape))
                size += (sum(held) + 2 * values + 2 * sum(made)) * part_rows
            most = max(most, size)
    return most
