"""Export: a part of a bank as a bank of its own, without a teacher.

Owns the order of things: the frame, the blocks, what finalise makes of them, and last
of all ``bank.json``; until then ``export.json`` says what is being made, and no reader
takes it for a bank. What a selection leaves is ``selection``; a block is copied whole
by ``block_copy``, or made of rows, or anew, by ``row_copy``. Holds the
destination's lock throughout; the source is only read, and may grow meanwhile. Memory:
an object per thread, or 1 GiB where blocks are made of rows.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

from manifests.bank import BankRecord
from manifests.errors import BankError, TeachOnceError
from manifests.exported import ExportedFrom, Selection
from manifests.storage import Store
from pipeline.bank import layout
from pipeline.bank.block_copy import BlockCopied, DamagedBlock
from pipeline.bank.commits import list_commits
from pipeline.bank.destination import (
    check_apart,
    check_continues,
    held_record,
    is_same_frame,
    is_unfinished,
    place_of,
)
from pipeline.bank.export_tasks import Task, num_threads, run_tasks, tasks_of
from pipeline.bank.finalise import finalise
from pipeline.bank.frame_copy import copy_frame, copy_statistics, has_statistics_of
from pipeline.bank.lock import bank_lock, break_lock
from pipeline.bank.output_statistics import write_statistics
from pipeline.bank.record import (
    RECORD_PATH,
    UNFINISHED_PATH,
    open_record,
    parse_record,
    write_record,
)
from pipeline.bank.room import check_room
from pipeline.bank.row_choice import choose_rows, part_block_rows
from pipeline.bank.row_filter import Condition, parse_condition
from pipeline.bank.row_names import KeyList
from pipeline.bank.selection import BankPart, Int64s, select, selected_shards
from pipeline.bank.verify import list_objects
from pipeline.errors import RunStopped


@dataclass
class ExportReport:
    """What an export did.

    Attributes:
        bank: where the part lies.
        blocks: of passes that it has.
        objects: copied by this run.
        bytes: of them.
        held_objects: that were there already.
        seconds: that it took.
        samples: that it has.
        chosen_of: samples that the bank has, where some of them were chosen.
        missing_blocks: number of blocks per pass that neither bank has.
        mixed_rows: outputs whose stored rows were encoded beside rows that are left
            behind, whose mean and deviation they keep.
        damaged: one line per block of the source that is not what was committed. Where
            there are any, the part is not finished.
        left_out_inputs: inputs whose stored copies the source has and the part has not.
    """

    bank: str
    blocks: int = 0
    objects: int = 0
    bytes: int = 0
    held_objects: int = 0
    seconds: float = 0.0
    samples: int = 0
    chosen_of: int | None = None
    mixed_rows: list[str] = field(default_factory=list)
    missing_blocks: dict[str, int] = field(default_factory=dict)
    damaged: list[str] = field(default_factory=list)
    left_out_inputs: list[str] = field(default_factory=list)

    @property
    def is_whole(self) -> bool:
        """Whether the part has every block of what was selected."""
        return not self.damaged and not any(self.missing_blocks.values())


def export(
    source_url: str,
    destination_url: str,
    selection: Selection | None = None,
    *,
    keys: KeyList | None = None,
    whole: bool = False,
    do_break_lock: bool = False,
    on_blocks: Callable[[int], object] = lambda count: None,
    on_block: Callable[[BlockCopied], object] = lambda copied: None,
) -> ExportReport:
    """Copies a part of a bank; run again, it copies what is still lacking.

    Args:
        source_url: the bank, at any fsspec URL; it may still grow.
        destination_url: an empty place, or an earlier state of the same export.
        selection: what to copy; None for all. Its ``num_keys`` and ``keys_sha256`` are
            those of ``keys``.
        keys: the samples to copy; None for all.
        whole: refuse a bank that lacks a block of what is selected.
        do_break_lock: remove the destination's lock first.
        on_blocks: called once with the number of blocks to look at.
        on_block: called after each of them.

    Raises:
        BankError: it cannot be exported to there, or there is no room for it; nothing
            was written.
        RunStopped: a store failed in the middle; the same call goes on.
    """
    started = time.monotonic()
    source, _ = open_record(source_url)
    text = source.read(RECORD_PATH)
    record = parse_record(source, text)
    destination = Store(destination_url)
    check_apart(source, destination)
    selection, conditions = _resolved(selection or Selection(), keys)
    rows = None
    if selection.chooses_rows:
        shards = selected_shards(record, selection)
        rows = choose_rows(source, record, shards, selection, keys, conditions)
    part = select(record, selection, rows, _block_rows(destination, record, rows))
    origin = _origin(source, text, record, selection)
    planned = part.record.model_copy(
        update={"exported_from": (*record.exported_from, origin)}
    )
    committed = _committed(source, part.record)
    if whole:
        _check_whole(source, part, committed, record.block_rows)
    _held(destination, planned)
    check_room(source, record, destination, part)
    if do_break_lock:
        break_lock(destination)
    report = ExportReport(
        destination.url,
        left_out_inputs=_left_out_inputs(record, part.record),
        samples=sum(shard.samples for shard in part.record.shards),
        chosen_of=origin.samples if rows is not None else None,
        mixed_rows=[
            f"{one.target.teacher}/{one.target.group}/{name}"
            for one in part.passes
            for name in one.target.provenance.get("mixed_rows", ())
        ],
    )
    with bank_lock(destination, "export"):
        held = _held(destination, planned)
        try:
            run = _Export(source, record, destination, part, planned, held)
            tasks = run.tasks(committed)
            on_blocks(len(tasks))
            run.copy(tasks, report, on_block)
            if not report.damaged:
                run.finish()
        except TeachOnceError as error:
            raise RunStopped(f"{error} (the same command goes on)") from error
        report.missing_blocks = run.missing_blocks()
    report.seconds = time.monotonic() - started
    return report


def _resolved(
    selection: Selection, keys: KeyList | None
) -> tuple[Selection, list[Condition]]:
    """Returns a selection as a record keeps it, and its conditions."""
    conditions = [parse_condition(text) for text in selection.where]
    facts = {
        "num_keys": None if keys is None else len(keys.lines),
        "keys_sha256": None if keys is None else keys.sha256,
        "where": tuple(sorted(one.text for one in conditions)),
    }
    if keys is not None and not keys.lines:
        raise BankError(f"keys must be given, a line each, got none ({keys.where})")
    return selection.model_copy(update=facts), conditions


def _block_rows(
    destination: Store, record: BankRecord, rows: Mapping[str, Int64s] | None
) -> int | None:
    """Returns the rows of a block of a part of chosen rows: those that it has already,
    if it was begun.
    """
    if rows is None:
        return None
    held = held_record(destination)
    if held is not None and held.exported_from:
        return held.block_rows
    return part_block_rows(record, rows)


def _committed(store: Store, record: BankRecord) -> dict[str, set[int]]:
    return {entry.id: list_commits(store, entry.id) for entry in record.passes}


def _left_out_inputs(source: BankRecord, part: BankRecord) -> list[str]:
    kept = {entry.inputs for entry in part.passes if entry.holds_inputs}
    return [
        entry.inputs[0]
        for entry in source.passes
        if entry.holds_inputs and entry.inputs not in kept
    ]


def _origin(
    source: Store, text: bytes, record: BankRecord, selection: Selection
) -> ExportedFrom:
    return ExportedFrom(
        bank=place_of(source),
        bank_sha256=hashlib.sha256(text).hexdigest(),
        exported=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        by=f"teachonce {importlib.metadata.version('teachonce')}",
        selection=selection,
        shards=sum(not shard.retired for shard in record.shards),
        outputs=tuple(path for path, _, _ in layout.outputs(record)),
        num_views=record.num_views,
        samples=sum(one.samples for one in record.shards if not one.retired),
    )


def _check_whole(
    source: Store, part: BankPart, committed: Mapping[str, set[int]], source_rows: int
) -> None:
    wanted = {
        piece.block for block in part.blocks(source_rows) for piece in block.pieces
    }
    missing = {name: len(wanted - found) for name, found in committed.items()}
    lacking = ", ".join(f"{n} of {name}" for name, n in missing.items() if n)
    if lacking:
        raise BankError(
            f"bank {source.url} must have every block that is selected, it lacks "
            f"{lacking}; run its job again, or leave out --whole to take what there is"
        )


def _held(destination: Store, planned: BankRecord) -> BankRecord | None:
    """Returns the destination's record; raises BankError where it is another bank's."""
    held = held_record(destination)
    if held is not None:
        check_continues(destination, held, planned)
    return held


class _Export:
    """One run, under the destination's lock."""

    def __init__(
        self,
        source: Store,
        source_record: BankRecord,
        destination: Store,
        part: BankPart,
        planned: BankRecord,
        held: BankRecord | None,
    ) -> None:
        self._source = source
        self._source_record = source_record
        self._destination = destination
        self._part = part
        self._record = _grown(held, planned)
        # A frame that is whole and finalised needs nothing but blocks.
        self._is_framed = (
            held is not None
            and is_same_frame(held, planned)
            and not is_unfinished(destination)
        )

    def tasks(self, committed: Mapping[str, set[int]]) -> list[Task]:
        """Returns the blocks that the source has all rows of."""
        return tasks_of(self._part, self._source_record, self._destination, committed)

    def copy(
        self,
        tasks: Iterable[Task],
        report: ExportReport,
        on_block: Callable[[BlockCopied], object],
    ) -> None:
        """Copies the frame, where it is not there, and what blocks lack."""
        if not self._is_framed:
            self._write_frame()
        sizes = list_objects(self._destination, self._record)

        threads = num_threads(self._part, self._source_record)
        for done in run_tasks(self._source, self._destination, tasks, sizes, threads):
            if isinstance(done, DamagedBlock):
                report.damaged.append(str(done))
                continue
            report.blocks += 1
            report.objects += done.objects
            report.bytes += done.bytes
            report.held_objects += done.held_objects
            on_block(done)

    def _write_frame(self) -> None:
        store = self._destination
        write_record(store, self._record, UNFINISHED_PATH)
        copy_frame(self._source, self._source_record, store, self._part)
        if store.size(RECORD_PATH) is not None:
            # It grows: arrays first, then the record, which no longer says complete.
            layout.write_metadata(store, self._record)
            write_record(store, self._record)

    def finish(self) -> None:
        """Finalises the part, unless it was and has no new block."""
        store = self._destination
        committed = _committed(store, self._record)
        counts = {name: len(blocks) for name, blocks in committed.items()}
        state = self._record.state
        if self._is_framed and state is not None and state.committed_blocks == counts:
            return
        layout.write_metadata(store, self._record)
        is_known = has_statistics_of(self._source_record, self._part, committed)

        def make_statistics(
            store: Store, record: BankRecord, committed: Mapping[str, set[int]]
        ) -> None:
            if is_known:
                copy_statistics(self._source, store, record)
            else:
                write_statistics(store, record, committed)

        finalise(store, self._record, make_statistics)
        store.delete(UNFINISHED_PATH)
        store.clear_temporary(0.0)

    def missing_blocks(self) -> dict[str, int]:
        """Returns the number of blocks that each pass lacks."""
        live = set(self._record.live_blocks)
        committed = _committed(self._destination, self._record)
        return {name: len(live - found) for name, found in committed.items()}


def _grown(held: BankRecord | None, planned: BankRecord) -> BankRecord:
    """Returns the record to write, with what a reader may still trust of its state."""
    if held is None:
        return planned
    state = held.state
    if state is not None and not is_same_frame(held, planned):
        passes = () if len(held.shards) < len(planned.shards) else state.complete_passes
        update = {"complete": False, "complete_passes": passes, "files": None}
        state = state.model_copy(update=update)
    requests = {**held.requests, **planned.requests}
    return planned.model_copy(update={"requests": requests, "state": state})
