"""What a selection makes of a bank: the record of its part, and where each block goes.

A pure function of the record. Blocks of kept shards are numbered anew, without holes:
the part is then the bank that the same job makes of those shards alone, its sample axis
is no longer than it must be, and a shard that was left out can be added later under its
own name, by which its random views are drawn. Passes that lose outputs or views are no
longer what their fingerprint says and get one of their own.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from braceexpand import braceexpand

from manifests.bank import BankRecord, OutputEntry, PassEntry, ShardEntry
from manifests.errors import BankError
from manifests.exported import Selection
from manifests.loading import digest
from manifests.suggestions import close_matches
from pipeline.bank import layout
from pipeline.bank.licences import check_copies


@dataclass(frozen=True)
class PassPart:
    """A pass of the source and what it is in the part, under the same id."""

    source: PassEntry
    target: PassEntry

    @property
    def is_whole(self) -> bool:
        """Whether it keeps every output and view."""
        return self.source == self.target


@dataclass(frozen=True)
class BankPart:
    """What of a bank is copied.

    Attributes:
        record: of the part, without state.
        passes: what each of its passes was.
        blocks: number of a block in the source to its number in the part, ascending.
        dataset_parts: stem of an index part in the source to its stem in the part.
    """

    record: BankRecord
    passes: tuple[PassPart, ...]
    blocks: Mapping[int, int]
    dataset_parts: Mapping[str, str]

    def keeps_rows_of(self, source: BankRecord) -> bool:
        """Whether every block of the source is in it, under its own number."""
        return len(self.blocks) == source.num_blocks


def select(record: BankRecord, selection: Selection) -> BankPart:
    """Returns what a selection leaves of a bank; row facts stay whole.

    Retired shards are left out. Requests that the part answers as the bank did stay.

    Raises:
        BankError: a pattern matches nothing, or no output is left.
    """
    kept = _kept_outputs(record, selection)
    num_views = _num_views(record, selection)
    found = (_pass_part(entry, kept, num_views) for entry in record.passes)
    passes = tuple(one for one in found if one is not None)
    has_outputs = any(entry.outputs for entry in record.passes)
    if has_outputs and not any(one.target.outputs for one in passes):
        raise BankError("selection must leave an output, got none; widen the patterns")
    shards, blocks, parts = _kept_shards(record, selection)
    whole = {one.target.id for one in passes if one.is_whole}
    part = record.model_copy(
        update={
            "num_views": num_views,
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
    return BankPart(part, passes, blocks, parts)


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


def _pass_part(
    entry: PassEntry, kept: Collection[str], num_views: int
) -> PassPart | None:
    """Returns what is left of a pass, None for nothing."""
    if not entry.outputs:
        return PassPart(entry, entry)
    outputs = tuple(
        output
        for output in entry.outputs
        if f"{layout.level_path(entry, output.size)}/{output.name}" in kept
    )
    last_view = min(entry.last_view, num_views - 1)
    if not outputs or entry.first_view > last_view:
        return None
    if outputs == entry.outputs and last_view == entry.last_view:
        return PassPart(entry, entry)
    return PassPart(entry, _cut_pass(entry, outputs, last_view))


def _cut_pass(
    entry: PassEntry, outputs: tuple[OutputEntry, ...], last_view: int
) -> PassEntry:
    """Returns a pass with fewer outputs or views, which says what it was."""
    held = entry.provenance.get("exported_from")
    whole = held or {
        "fingerprint": entry.fingerprint,
        "outputs": [f"{output.size}/{output.name}" for output in entry.outputs],
        "views": [entry.first_view, entry.last_view],
    }
    identity = {
        "exported_from": whole["fingerprint"],
        "outputs": [f"{output.size}/{output.name}" for output in outputs],
        "views": [entry.first_view, last_view],
    }
    return entry.model_copy(
        update={
            "outputs": outputs,
            "last_view": last_view,
            "fingerprint": digest(identity),
            "provenance": {**entry.provenance, "exported_from": whole},
        }
    )


def _kept_shards(
    record: BankRecord, selection: Selection
) -> tuple[tuple[ShardEntry, ...], dict[int, int], dict[str, str]]:
    """Returns kept shards at their new places, and where blocks and parts go."""
    live = [shard for shard in record.shards if not shard.retired]
    names = _choose("shards", selection.shards, [shard.name for shard in live])
    kept = [shard for shard in live if shard.name in names]
    stems = dict.fromkeys(shard.part for shard in kept)
    parts = {stem: f"part-{number:05d}" for number, stem in enumerate(stems)}
    shards: list[ShardEntry] = []
    blocks: dict[int, int] = {}
    for shard in kept:
        moved = {"first_block": len(blocks), "part": parts[shard.part]}
        shards.append(shard.model_copy(update=moved))
        for block in shard.block_numbers:
            blocks[block] = len(blocks)
    return tuple(shards), blocks, parts
