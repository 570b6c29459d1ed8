"""What a selection makes of a bank: the record of its part, and where each block goes.

A pure function of the record. Blocks of kept shards are numbered anew, without holes:
the part is then the bank that the same job makes of those shards alone, its sample axis
is no longer than it must be, and a shard that was left out can be added later under its
own name, by which its random views are drawn. Where rows are chosen, those of a shard
move together into as few blocks as hold them; what is left of a pass is ``pass_parts``.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import numpy as np
import numpy.typing as npt
from braceexpand import braceexpand

from manifests.bank import BankRecord, ShardEntry
from manifests.errors import BankError
from manifests.exported import Selection
from manifests.suggestions import close_matches
from pipeline.bank import layout
from pipeline.bank.licences import check_copies
from pipeline.bank.pass_parts import PassPart, RowChange, part_of_pass
from pipeline.bank.row_choice import rows_digest

Int64s = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Piece:
    """Rows of one block of the source that lie side by side in one of the part.

    Attributes:
        block: number of the block in the source.
        rows: (n,) rows of it, ascending.
        first: row of the part's block that the first of them becomes.
    """

    block: int
    rows: Int64s
    first: int


@dataclass(frozen=True)
class PartBlock:
    """A block of the part and where its rows come from.

    Attributes:
        block: its number in the part.
        shard: name of its shard.
        num_rows: rows that are not padding.
        pieces: where they come from, in order.
    """

    block: int
    shard: str
    num_rows: int
    pieces: tuple[Piece, ...]


@dataclass(frozen=True)
class BankPart:
    """What of a bank is copied.

    Attributes:
        record: of the part, without state.
        passes: what each of its passes was.
        source_shards: the source's entry of each of its shards, in order.
        dataset_parts: stem of an index part in the source to its stem in the part.
        rows: by shard, which of its rows were chosen; None for all.
    """

    record: BankRecord
    passes: tuple[PassPart, ...]
    source_shards: tuple[ShardEntry, ...]
    dataset_parts: Mapping[str, str]
    rows: Mapping[str, Int64s] | None

    def keeps_rows_of(self, source: BankRecord) -> bool:
        """Whether every block of the source is in it, under its own number."""
        return self.rows is None and self.record.num_blocks == source.num_blocks

    def blocks(self, source_rows: int) -> Iterator[PartBlock]:
        """Yields its blocks in order.

        Args:
            source_rows: rows of a block of the source.
        """
        size = self.record.block_rows
        for shard, before in zip(self.record.shards, self.source_shards, strict=True):
            chosen = None if self.rows is None else self.rows[shard.name]
            for number, block in enumerate(shard.block_numbers):
                first, last = number * size, min((number + 1) * size, shard.samples)
                rows = np.arange(first, last) if chosen is None else chosen[first:last]
                owners, starts = np.unique(rows // source_rows, return_index=True)
                pieces = tuple(
                    Piece(before.first_block + owner, piece - owner * source_rows, at)
                    for owner, piece, at in zip(
                        owners.tolist(),
                        np.split(rows, starts[1:]),
                        starts.tolist(),
                        strict=True,
                    )
                )
                yield PartBlock(block, shard.name, last - first, pieces)


def select(
    record: BankRecord,
    selection: Selection,
    rows: Mapping[str, Int64s] | None = None,
    block_rows: int | None = None,
) -> BankPart:
    """Returns what a selection leaves of a bank; row facts stay whole.

    Retired shards are left out. Requests that the part answers as the bank did stay.

    Args:
        record: of the bank.
        selection: what is copied.
        rows: by shard, which of its rows are chosen, ascending; shards that are not in
            it are left out. None for all rows.
        block_rows: rows of a block of the part, where rows are chosen.

    Raises:
        BankError: a pattern matches nothing, no output is left, or one cannot be
            encoded as asked.
    """
    kept = _kept_outputs(record, selection)
    num_views = _num_views(record, selection)
    size = block_rows or record.block_rows
    change = None if rows is None else RowChange(selection, size)
    presets = _presets(kept, selection)
    found = (
        part_of_pass(entry, kept, num_views, presets, change) for entry in record.passes
    )
    passes = tuple(one for one in found if one is not None)
    has_outputs = any(entry.outputs for entry in record.passes)
    if has_outputs and not any(one.target.outputs for one in passes):
        raise BankError("selection must leave an output, got none; widen the patterns")
    before = [
        shard
        for shard in selected_shards(record, selection)
        if rows is None or shard.name in rows
    ]
    shards, parts = _moved_shards(before, rows, size)
    whole = {one.target.id for one in passes if one.is_whole}
    part = record.model_copy(
        update={
            "num_views": num_views,
            "block_rows": size,
            "shards": shards,
            "passes": tuple(one.target for one in passes),
            "requests": {
                request: answers
                for request, answers in record.requests.items()
                if set(answers) <= whole
            },
            "state": None,
        }
    )
    return BankPart(part, passes, tuple(before), parts, rows)


def selected_shards(record: BankRecord, selection: Selection) -> list[ShardEntry]:
    """Returns the shards in use that a selection names, in the bank's order.

    Raises:
        BankError: a pattern matches none.
    """
    live = [shard for shard in record.shards if not shard.retired]
    names = _choose("shards", selection.shards, [shard.name for shard in live])
    return [shard for shard in live if shard.name in names]


def _check_each(
    what: str, patterns: Iterable[str], matched: Collection[str], known: Sequence[str]
) -> None:
    """Raises BankError for the first pattern that matched nothing."""
    for pattern in patterns:
        if pattern not in matched:
            shown = ", ".join(known[:8]) + (", ..." if len(known) > 8 else "")
            raise BankError(
                f"{what} must be in the bank, got {pattern!r} (there are "
                f"{shown or 'none'}){close_matches(pattern, known)}"
            )


def _expanded(patterns: Iterable[str]) -> list[tuple[str, str]]:
    """Returns (pattern as given, without braces) of every pattern."""
    try:
        return [(given, one) for given in patterns for one in braceexpand(given)]
    except ValueError as error:
        raise BankError(f"pattern must have closed braces: {error}") from error


def _choose(what: str, patterns: Sequence[str], known: Sequence[str]) -> set[str]:
    """Returns the names that patterns match, all where there is no pattern."""
    if not patterns:
        return set(known)
    chosen: set[str] = set()
    matched: set[str] = set()
    names = set(known)
    for given, pattern in _expanded(patterns):
        # A brace of many shards: no look at every name for each of them.
        found = {pattern} & names or {n for n in known if fnmatchcase(n, pattern)}
        chosen |= found
        matched |= {given} if found else set()
    _check_each(what, patterns, matched, known)
    return chosen


def _kept_outputs(record: BankRecord, selection: Selection) -> set[str]:
    """Returns paths of the outputs that are kept."""
    copies = _kept_copies(record, selection)
    entries = {
        path: entry
        for path, entry, _ in layout.outputs(record)
        if not entry.holds_inputs
    }
    kinds = {path: output.kind for path, _, output in layout.outputs(record)}
    teachers = _choose(
        "teachers",
        selection.teachers,
        list(dict.fromkeys(entry.teacher for entry in entries.values())),
    )
    groups = _choose(
        "groups",
        selection.groups,
        list(dict.fromkeys(entry.group for entry in entries.values())),
    )
    left = [
        path
        for path, entry in entries.items()
        if entry.teacher in teachers and entry.group in groups
    ]
    if not selection.outputs:
        return {*left, *copies}
    chosen: set[str] = set()
    matched: set[str] = set()
    for given, pattern in _expanded(selection.outputs):
        found = {path for path in left if _is_named(path, pattern)}
        chosen |= found
        matched |= {given} if found else set()
    _check_each("outputs", selection.outputs, matched, left)
    # Points without the index that says which ones they are would be of no use.
    return (
        chosen
        | copies
        | {
            path
            for path in left
            if kinds[path] == "index" and path.removesuffix("_index") in chosen
        }
    )


def _kept_copies(record: BankRecord, selection: Selection) -> set[str]:
    """Returns paths of the copies of inputs that are kept: those that are named.

    Raises:
        BankError: there are none such, or the data may not be copied.
    """
    held = {
        entry.inputs[0]: path
        for path, entry, _ in layout.outputs(record)
        if entry.holds_inputs
    }
    if not selection.inputs:
        return set()
    dataset = record.dataset
    check_copies(dataset.get("license"), dataset.get("copies_allowed"), "--inputs")
    return {held[name] for name in _choose("inputs", selection.inputs, list(held))}


def _is_named(path: str, pattern: str) -> bool:
    teacher, group, size, name = path.split("/")
    wanted = pattern.split("/")
    parts = {1: [name], 2: [teacher, name], 4: [teacher, group, size, name]}
    if len(wanted) not in parts:
        raise BankError(
            "outputs must be OUTPUT, TEACHER/OUTPUT or TEACHER/GROUP/SIZE/OUTPUT, got "
            f"{pattern!r}"
        )
    pairs = zip(parts[len(wanted)], wanted, strict=True)
    return all(fnmatchcase(part, want) for part, want in pairs)


def _num_views(record: BankRecord, selection: Selection) -> int:
    wanted = selection.num_views or record.num_views
    if wanted > record.num_views:
        raise BankError(
            f"views must be in the bank, got 0 to {wanted - 1} (it has 0 to "
            f"{record.num_views - 1})"
        )
    return wanted


def _presets(kept: Collection[str], selection: Selection) -> dict[str, str]:
    """Returns how outputs are to be encoded anew, by path."""
    found: dict[str, str] = {}
    for pattern, preset in selection.encodings.items():
        paths = {path for path in kept if _is_named(path, pattern)}
        _check_each("encodings", [pattern], [pattern] if paths else [], sorted(kept))
        if taken := sorted(paths & found.keys()):
            raise BankError(
                f"encodings must name an output once, got {taken[0]} by {pattern!r} "
                "and by another pattern"
            )
        found |= dict.fromkeys(paths, preset)
    return found


def _moved_shards(
    kept: Sequence[ShardEntry], rows: Mapping[str, Int64s] | None, block_rows: int
) -> tuple[tuple[ShardEntry, ...], dict[str, str]]:
    """Returns kept shards at their new places, and where index parts go.

    Of a shard of which rows are chosen nothing is said but of these: not what was
    damaged, nor how much got no row.
    """
    stems = dict.fromkeys(shard.part for shard in kept)
    parts = {stem: f"part-{number:05d}" for number, stem in enumerate(stems)}
    shards: list[ShardEntry] = []
    next_block = 0
    for shard in kept:
        moved: dict[str, Any] = {
            "first_block": next_block,
            "part": parts[shard.part],
        }
        if rows is not None:
            chosen = rows[shard.name]
            moved |= {
                "samples": len(chosen),
                "blocks": -(-len(chosen) // block_rows),
                "chosen_sha256": rows_digest(chosen),
                "faults": 0,
                "damage": None,
            }
        shards.append(shard.model_copy(update=moved))
        next_block += shards[-1].blocks
    return tuple(shards), parts
