"""Finalise: from commits to row arrays, index, blocks.parquet, statistics and state.

The last stage of the graph and a verb; idempotent, under the bank's lock, in row order
and with memory independent of the bank. What is not committed is said to be missing, so
a bank that is still growing reads as what it has.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa

from manifests.bank import (
    ROWS_TEACHER,
    BankRecord,
    BankState,
    CommitContent,
    ShardEntry,
)
from manifests.errors import BankError
from manifests.storage import Store
from pipeline.bank import layout
from pipeline.bank.card import write_card
from pipeline.bank.commits import (
    BLOCKS_PATH,
    encode_blocks,
    list_commits,
    read_commits,
)
from pipeline.bank.dataset_index import read_part
from pipeline.bank.frame_files import NotingStore, write_files
from pipeline.bank.objects import has_crc32c
from pipeline.bank.output_statistics import write_statistics
from pipeline.bank.places import FEATURES
from pipeline.bank.record import view_policy_of, write_record
from pipeline.bank.row_arrays import CHUNK_ROWS, RowArray
from pipeline.bank.row_index import INDEX_PART_ROWS, encode_checked_table, index_path
from pipeline.bank.rows import decode_rows, object_path
from pipeline.samples.photometric import Photometric
from pipeline.samples.views import ViewPolicy, draw_view

_PREFETCH = 32
NOT_COMPUTED = "not_computed"
RETIRED = "retired"
StatisticsWriter = Callable[[Store, BankRecord, Mapping[str, set[int]]], None]


@dataclass
class BlockFacts:
    """All that is known of one block: its shard, keys, commits and row facts."""

    block: int
    shard: ShardEntry
    keys: list[str]
    commits: dict[str, CommitContent]
    columns: dict[str, list[Any]] = field(default_factory=dict)

    def reasons(self, pass_id: str) -> list[str | None]:
        """Returns per row why it is invalid for a pass, None where it is valid."""
        if self.shard.retired:
            return [RETIRED] * len(self.keys)
        commit = self.commits.get(pass_id)
        if commit is None:
            return [NOT_COMPUTED] * len(self.keys)
        found: list[str | None] = [None] * len(self.keys)
        for code, rows in commit.invalid.items():
            for row in rows:
                found[row] = code if found[row] is None else f"{found[row]},{code}"
        return found


def _iter_blocks(
    store: Store, record: BankRecord, committed: Mapping[str, set[int]]
) -> Iterator[BlockFacts]:
    """Yields every block in row order with its commits, a window at a time."""
    parts = list(dict.fromkeys(shard.part for shard in record.shards))
    keys_of = (
        (name, [row.key for row in rows])
        for part in parts
        for name, rows in read_part(store, part)
    )
    streams = {
        entry.id: read_commits(store, entry.id, sorted(committed[entry.id]))
        for entry in record.passes
    }
    heads = {name: next(stream, None) for name, stream in streams.items()}
    for shard in record.shards:
        if shard.samples == 0:
            continue
        name, keys = next(keys_of)
        if name != shard.name or len(keys) != shard.samples:
            raise BankError(
                f"{store.url_of('dataset/' + shard.part)}.parquet does not agree with "
                f"bank.json about shard {shard.name}; restore it from a copy"
            )
        for number in range(shard.blocks):
            block = shard.first_block + number
            first = number * record.block_rows
            commits = {}
            for pass_id, head in heads.items():
                if head is not None and head.block == block:
                    commits[pass_id] = head
                    heads[pass_id] = next(streams[pass_id], None)
            rows = keys[first : first + record.block_rows]
            yield BlockFacts(block, shard, rows, commits)


def _read_facts(store: Store, commit: CommitContent) -> dict[str, list[Any]]:
    """Returns the row facts of a block; raises BankError where they are not those that
    were committed: Parquet itself does not notice every wrong bit.
    """
    path = object_path(commit.pass_id, commit.block)
    data = store.read_or_none(path)
    size, crc = commit.objects[path]
    if data is None or len(data) != size or not has_crc32c([data], crc):
        state = "is missing" if data is None else "is not what was committed"
        raise BankError(
            f"{store.url_of(path)} (pass {commit.pass_id}, block {commit.block}, shard "
            f"{commit.shard}) {state}; run `teachonce precompute JOB --repair`"
        )
    return decode_rows(data, store.url_of(path))


def _with_columns(
    store: Store, record: BankRecord, blocks: Iterator[BlockFacts]
) -> Iterator[BlockFacts]:
    """Adds row facts, read ahead in parallel."""
    ids = [entry.id for entry in record.passes if entry.teacher == ROWS_TEACHER]

    def load(facts: BlockFacts) -> BlockFacts:
        for name in ids:
            if name in facts.commits:
                facts.columns |= _read_facts(store, facts.commits[name])
        return facts

    with ThreadPoolExecutor(8) as pool:
        window: list[BlockFacts] = []
        for facts in blocks:
            window.append(facts)
            if len(window) == _PREFETCH:
                yield from pool.map(load, window)
                window = []
        yield from pool.map(load, window)


class _RowWriter:
    """Collects row arrays and writes each chunk of 65,536 rows as it fills."""

    def __init__(self, store: Store, record: BankRecord, policy: ViewPolicy) -> None:
        self._store = store
        self._record = record
        self._policy = policy
        self._arrays = layout.row_arrays(record)
        self._levels = layout.levels(record)
        self._chunk = 0
        self._values: dict[str, np.ndarray] = {}

    def _fresh(self) -> None:
        left = self._record.num_rows - self._chunk * CHUNK_ROWS
        rows = min(CHUNK_ROWS, left)
        self._values = {
            array.path: array.empty(rows, self._record.num_views)
            for array in self._arrays
        }

    def _put(self, array: RowArray, row: int, value: Any) -> None:
        self._values[array.path][row] = value

    def add(self, facts: BlockFacts) -> None:
        """Adds one block; blocks come in order."""
        start = facts.block * self._record.block_rows
        reasons = {
            level: [
                facts.reasons(entry.id)
                for entry in entries
                if entry.id in facts.commits or facts.shard.retired
            ]
            for level, entries in self._levels.items()
        }
        for offset, key in enumerate(facts.keys):
            chunk, row = divmod(start + offset, CHUNK_ROWS)
            while chunk > self._chunk or not self._values:
                self._next(chunk)
            self._put(layout.KEY, row, key)
            for level, lists in reasons.items():
                is_valid = bool(lists) and all(one[offset] is None for one in lists)
                self._put(layout.valid_array(level), row, is_valid)
            self._add_row(facts, offset, row, key)

    def _add_row(self, facts: BlockFacts, offset: int, row: int, key: str) -> None:
        columns = facts.columns
        sizes: dict[str, tuple[int, int]] = {}
        has_points = False
        for name, entry in self._record.inputs.items():
            time = columns.get(f"{name}.time", ())
            if time and time[offset] is not None:
                self._put(layout.time_array(name), row, time[offset])
            if entry.config["kind"] == "points":
                has_points = True
                continue
            height = columns.get(f"{name}.height", ())
            if height and height[offset] is not None:
                sizes[name] = (height[offset], columns[f"{name}.width"][offset])
                self._put(layout.size_array(name), row, sizes[name])
            if entry.config.get("calibration"):
                for array in layout.calibration_arrays(name):
                    column = columns.get(f"{name}.{array.path.rpartition('_')[2]}", ())
                    if column and column[offset] is not None:
                        matrix = np.reshape(column[offset], array.row_shape)
                        self._put(array, row, matrix)
        for view in range(self._record.num_views):
            drawn = draw_view(self._policy, facts.shard.name, key, view, sizes)
            self._values[layout.FLIP.path][row, view] = drawn.flip
            for name, box in drawn.boxes.items():
                self._values[layout.box_array(name).path][row, view] = box
            if has_points:
                self._values[layout.YAW.path][row, view] = drawn.yaw
                self._values[layout.SCALE.path][row, view] = drawn.scale
            if self._policy.photometric is not None:
                changes = drawn.photometric or Photometric()
                numbers = changes.to_numbers()
                self._values[layout.PHOTOMETRIC.path][row, view] = numbers
        for name, config in self._record.labels.items():
            column = columns.get(f"label.{name}", ())
            if column and column[offset] is not None:
                is_class = config.get("num_classes") is not None
                self._put(layout.label_array(name, is_class), row, column[offset])

    def _next(self, chunk: int) -> None:
        self.flush()
        if self._values:
            self._chunk += 1
        self._fresh()
        del chunk

    def flush(self) -> None:
        """Writes the chunk that is being filled."""
        for array in self._arrays:
            if array.path in self._values:
                found = array.objects(self._chunk, self._values[array.path])
                for path, data in found.items():
                    self._store.replace(f"{FEATURES}/{path}", data)


class _IndexWriter:
    """Writes ``index/part-*.parquet``: a line per row, 2**20 rows of the axis each."""

    def __init__(self, store: Store, record: BankRecord) -> None:
        self._store = store
        self._record = record
        self._passes = [e.id for e in record.passes if e.teacher != ROWS_TEACHER]
        fields = [
            ("shard", pa.string()),
            ("key", pa.string()),
            ("row", pa.int64()),
            ("block", pa.int64()),
            ("offset", pa.int32()),
        ]
        for name, config in record.labels.items():
            is_class = config.get("num_classes") is not None
            fields.append((f"label.{name}", pa.int64() if is_class else pa.float64()))
        for name in self._passes:
            fields += [(f"valid.{name}", pa.bool_()), (f"reason.{name}", pa.string())]
        self._schema = pa.schema(fields)
        self._part = 0
        self._tables: list[pa.Table] = []

    def add(self, facts: BlockFacts) -> None:
        """Adds one block; blocks come in order."""
        size = self._record.block_rows
        first = facts.block * size
        part = first // INDEX_PART_ROWS
        if part != self._part:
            self.flush()
            self._part = part
        count = len(facts.keys)
        columns: dict[str, Sequence[Any]] = {
            "shard": [facts.shard.name] * count,
            "key": facts.keys,
            "row": range(first, first + count),
            "block": [facts.block] * count,
            "offset": range(count),
        }
        for name in self._record.labels:
            found = facts.columns.get(f"label.{name}")
            columns[f"label.{name}"] = found or [None] * count
        for name in self._passes:
            reasons = facts.reasons(name)
            columns[f"valid.{name}"] = [reason is None for reason in reasons]
            columns[f"reason.{name}"] = reasons
        self._tables.append(pa.table(columns, schema=self._schema))

    def flush(self) -> None:
        """Writes the part that is being filled."""
        tables, self._tables = self._tables, []
        table = pa.concat_tables(tables) if tables else self._schema.empty_table()
        self._store.replace(index_path(self._part), encode_checked_table(table))


def finalise(
    store: Store,
    record: BankRecord,
    make_statistics: StatisticsWriter = write_statistics,
) -> BankRecord:
    """Returns the record with its state, after writing all that commits imply.

    Only for the holder of the bank's lock.

    Args:
        store: the bank's.
        record: its record, which need not be written yet.
        make_statistics: writes the statistics, which may be at hand already.

    Raises:
        BankError: a commit or a row-fact object is damaged.
    """
    store = NotingStore(store.url)
    committed = {entry.id: list_commits(store, entry.id) for entry in record.passes}
    store.replace(
        BLOCKS_PATH,
        encode_blocks(
            content
            for entry in record.passes
            for content in read_commits(store, entry.id, sorted(committed[entry.id]))
        ),
    )
    policy = view_policy_of(record)
    rows = _RowWriter(store, record, policy)
    index = _IndexWriter(store, record)
    valid: Counter[str] = Counter()
    invalid: dict[str, Counter[str]] = {entry.id: Counter() for entry in record.passes}
    points: dict[str, Counter[str]] = {"points": Counter(), "dropped": Counter()}
    num_rows = 0
    for facts in _with_columns(store, record, _iter_blocks(store, record, committed)):
        rows.add(facts)
        index.add(facts)
        if facts.shard.retired:
            continue
        num_rows += len(facts.keys)
        for kind, count in points.items():
            for name in record.inputs:
                found = facts.columns.get(f"{name}.{kind}", ())
                count[name] += sum(number or 0 for number in found)
        for entry in record.passes:
            for reason in facts.reasons(entry.id):
                if reason is None:
                    valid[entry.id] += 1
                else:
                    invalid[entry.id][reason] += 1
    rows.flush()
    index.flush()
    live = set(record.live_blocks)
    whole = tuple(e.id for e in record.passes if live <= committed[e.id])
    state = BankState(
        complete=len(whole) == len(record.passes),
        complete_passes=whole,
        rows=num_rows,
        committed_blocks={name: len(blocks) for name, blocks in committed.items()},
        valid={entry.id: valid[entry.id] for entry in record.passes},
        invalid={name: dict(sorted(one.items())) for name, one in invalid.items()},
        points={name: count for name, count in points["points"].items() if count},
        dropped_points={name: n for name, n in points["dropped"].items() if n},
        damaged_shards={
            shard.name: shard.damage
            for shard in record.shards
            if shard.damage and not shard.retired
        },
    )
    finished = record.model_copy(update={"state": state})
    make_statistics(store, finished, committed)
    told = state.model_copy(update={"files": write_files(store, record)})
    finished = record.model_copy(update={"state": told})
    write_card(store, finished)
    write_record(store, finished)
    return finished
