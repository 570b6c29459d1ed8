"""Shards as rows: the index of a shard, and reading a span of its samples.

Index and reader group members by one function, so a row means the same to both. The
index walks headers only. The reader streams, holding one sample at a time. What cannot
be a row (junk, an unsafe key, a sample cut by damage) is a `ShardFault`, never silence.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator
from dataclasses import dataclass, field

from manifests.storage import Buffer, stat_url
from pipeline.samples.errors import ShardError
from pipeline.samples.names import refuse_name, split_name
from pipeline.samples.streams import open_shard
from pipeline.samples.tar import (
    BLOCK,
    SCAN_BYTES,
    Member,
    TarDamage,
    TarStream,
    TarWalk,
    find_header,
    padded,
    read_exactly,
    skip_to,
    walk_members,
)

MAX_MEMBER_BYTES = 2**30
"""A larger member is a fault of its sample and is not read."""
MAX_INTERLEAVED_BYTES = 2**30
"""What is held at most while samples of a compressed shard are put together."""

_MAX_LOST_KEYS = 1000
_REFUSED_KINDS = {
    "link": "link: never followed",
    "sparse": "sparse: sparse members are not read",
    "special": "special: not a regular file",
    "directory": "special: not a regular file",
}


@dataclass(frozen=True)
class ShardRow:
    """One sample of a shard.

    Attributes:
        key: its key, unique among the rows of the shard.
        offset: byte of the first header of its first member.
        size: bytes from there to the end of its last member, padding included.
        refused: why no teacher may see it (``"duplicate_key: ..."``), or None.
    """

    key: str
    offset: int
    size: int
    refused: str | None


@dataclass(frozen=True)
class ShardFault:
    """Something in a shard that got no row.

    Attributes:
        key: the sample's key, or the member's name where there is no key.
        reason: ``junk``, ``unsafe_key``, ``key_too_long``, ``not_utf8``,
            ``duplicate_key`` (the second occurrence), ``truncated`` (cut by damage) or
            ``after_damage`` (lies behind it).
        detail: what exactly, for people.
    """

    key: str
    reason: str
    detail: str


@dataclass(frozen=True)
class ShardIndex:
    """What a shard holds.

    Attributes:
        rows: its samples, in order of their first member.
        faults: what got no row.
        damage: what is wrong with the archive, and where; None if it is sound.
        sequential: whether rows can only be read from the start: it is compressed, has
            a global PAX header, interleaves samples or has a key twice.
        headers_sha256: hex digest of all header blocks before the damage.
        size_bytes: of the file as stored.
    """

    rows: list[ShardRow]
    faults: list[ShardFault]
    damage: str | None
    sequential: bool
    headers_sha256: str
    size_bytes: int


@dataclass(frozen=True)
class Sample:
    """The wanted members of one sample.

    Attributes:
        key: its key.
        members: extension to bytes.
        faults: extension to why a wanted member was not read, such as
            ``"link: never followed"``; the reason code stands before the colon.
    """

    key: str
    members: dict[str, bytes]
    faults: dict[str, str]


@dataclass(frozen=True)
class RowSpan:
    """Consecutive rows of a shard.

    Attributes:
        first_row: number of the first row within the shard.
        num_rows: how many.
        start: ``offset`` of the first row.
        end: end (``offset + size``) of the last row.
        first_key: key of the first row.
    """

    first_row: int
    num_rows: int
    start: int
    end: int
    first_key: str


@dataclass
class _Group:
    key: str
    members: dict[str, Member] = field(default_factory=dict)
    refused: str | None = None

    @property
    def offset(self) -> int:
        return next(iter(self.members.values())).header_offset

    @property
    def end(self) -> int:
        return max(member.end for member in self.members.values())


@dataclass
class _Grouped:
    """All samples of an archive, by their headers alone."""

    groups: dict[str, _Group] = field(default_factory=dict)
    faults: dict[tuple[str, str], ShardFault] = field(default_factory=dict)
    damage: str | None = None
    is_contiguous: bool = True
    has_global_header: bool = False
    headers_sha256: str = ""

    def add_fault(self, key: str, reason: str, detail: str) -> None:
        self.faults.setdefault((key, reason), ShardFault(key, reason, detail))

    def drop(self, key: str, detail: str) -> None:
        """Takes away the row of a sample that the damage cut."""
        if key in self.groups:
            if key != next(reversed(self.groups)):
                self.is_contiguous = False
            del self.groups[key]
        self.add_fault(key, "truncated", detail)


def index_shard(url: str) -> ShardIndex:
    """Returns the rows of a shard from its headers, whatever state it is in.

    Data are seeked over, or inflated and thrown away where the shard is compressed. A
    damaged shard keeps every sample that lies wholly before the damage; the sample cut
    by it and those found behind it (up to 64 MiB and 1000 keys) are named as faults. A
    key that occurs twice with one extension is ambiguous: its row is refused and the
    second occurrence is a fault.

    Raises:
        StorageError: the file is missing or the store fails.
    """
    size_bytes = stat_url(url).size_bytes
    try:
        with open_shard(url) as (file, is_compressed):
            grouped = _group_members(file)
    except TarDamage as damage:
        # Raised on opening only: inside, damage is a result.
        return ShardIndex([], [], str(damage), False, "", size_bytes)
    rows = [
        ShardRow(group.key, group.offset, group.end - group.offset, group.refused)
        for group in grouped.groups.values()
    ]
    return ShardIndex(
        rows,
        list(grouped.faults.values()),
        grouped.damage,
        is_compressed or grouped.has_global_header or not grouped.is_contiguous,
        grouped.headers_sha256,
        size_bytes,
    )


def read_samples(
    url: str, span: RowSpan, wanted: frozenset[str], sequential: bool
) -> Iterator[tuple[int, Sample]]:
    """Yields (row within the shard, sample) for the rows of ``span``, in order.

    Holds one sample at a time. A sequential shard is walked from its start first; a
    compressed one is inflated twice, so shards that are read often are better stored as
    plain tar. A refused row yields its first occurrence.

    Args:
        url: the shard.
        span: which rows, from its index.
        wanted: extensions to read, in lower case without the leading dot.
        sequential: as the index says.

    Raises:
        ShardError: the shard is not the one that was indexed, or interleaves samples
            within a compressed stream too far to be put together in 1 GiB.
        StorageError: the store fails.
    """
    try:
        with open_shard(url) as (file, is_compressed):
            if not sequential:
                if is_compressed:
                    raise _changed(url, "it is compressed now")
                yield from _read_span(url, file, span, wanted)
                return
            groups = list(_group_members(file).groups.values())
            chosen = groups[span.first_row : span.first_row + span.num_rows]
            if len(chosen) < span.num_rows:
                raise _changed(url, f"it has {len(groups)} rows")
            if chosen and chosen[0].key != span.first_key:
                raise _changed(url, f"row {span.first_row} is {_shown(chosen[0].key)}")
            if not is_compressed:
                for row, group in enumerate(chosen, span.first_row):
                    yield row, _read_group(file, group, wanted)
                return
        with open_shard(url) as (file, _):
            yield from _read_inflated(url, file, chosen, span.first_row, wanted)
    except TarDamage as damage:
        raise _changed(url, str(damage)) from damage


def parse_sample(data: Buffer, wanted: frozenset[str], where: str) -> Sample:
    """Returns the sample whose bytes, headers and all, are ``data``.

    Args:
        data: bytes ``offset`` to ``offset + size`` of its row, as the index says.
        wanted: extensions to read, in lower case without the leading dot.
        where: the shard, for messages.

    Raises:
        ShardError: they are not one sample: the shard is not the one indexed.
    """
    file = io.BytesIO(data)
    sample: Sample | None = None
    try:
        for member in walk_members(file, 0, len(data)):
            if member.kind == "directory" or refuse_name(member.name) is not None:
                continue
            if sample is None:
                sample = Sample(member.key, {}, {})
            elif member.key != sample.key:
                what = f"{_shown(sample.key)} is followed by {_shown(member.key)}"
                raise _changed(where, what)
            if member.extension in wanted:
                _read_member(file, member, sample)
    except TarDamage as damage:
        raise _changed(where, str(damage)) from damage
    if sample is None:
        raise _changed(where, "there is no sample where a row was")
    return sample


def _group_members(file: TarStream) -> _Grouped:
    """Groups members by key; the one rule of what is a row, for index and reader."""
    grouped = _Grouped()
    walk = TarWalk(file)
    last_key = None
    try:
        for member in walk:
            if member.kind == "directory":
                continue
            refusal = refuse_name(member.name)
            if refusal is not None:
                grouped.add_fault(*refusal)
                continue
            group = grouped.groups.get(member.key)
            if group is None:
                group = grouped.groups[member.key] = _Group(member.key)
            elif last_key != member.key:
                grouped.is_contiguous = False
            last_key = member.key
            if member.extension in group.members and group.refused is None:
                detail = f".{member.extension} again at byte {member.header_offset}"
                group.refused = f"duplicate_key: {detail}"
                grouped.is_contiguous = False
                grouped.add_fault(member.key, "duplicate_key", detail)
            if group.refused is None:
                group.members[member.extension] = member
    except TarDamage as damage:
        grouped.damage = str(damage)
        _name_the_lost(file, damage, grouped)
    grouped.has_global_header = walk.has_global_header
    grouped.headers_sha256 = walk.headers.hexdigest()
    return grouped


def _name_the_lost(file: TarStream, damage: TarDamage, grouped: _Grouped) -> None:
    """Drops the sample that the damage cut and names those behind it as faults."""
    if damage.name is not None and refuse_name(damage.name) is None:
        key = split_name(damage.name)[0]
        grouped.drop(key, str(damage))
    for key in _keys_behind(file, damage):
        if key in grouped.groups:
            grouped.drop(key, f"has members before and behind: {damage}")
        elif (key, "truncated") not in grouped.faults:
            grouped.add_fault(key, "after_damage", f"lies behind: {damage}")


def _keys_behind(file: TarStream, damage: TarDamage) -> list[str]:
    keys: dict[str, None] = {}
    budget = SCAN_BYTES
    position = padded(damage.offset + 1)
    # Damage to the inflated stream itself ends it: nothing behind can be read.
    with contextlib.suppress(TarDamage):
        while budget > 0 and len(keys) < _MAX_LOST_KEYS:
            if not file.seekable():
                position = max(position, padded(file.tell()))
            found = find_header(file, position, budget)
            if found is None:
                break
            offset, block = found
            budget -= offset + BLOCK - position
            try:
                for member in TarWalk(file, offset, first_block=block):
                    usable = refuse_name(member.name) is None
                    if usable and member.kind != "directory":
                        keys[member.key] = None
                    if len(keys) >= _MAX_LOST_KEYS:
                        break
                else:
                    break
            except TarDamage as further:
                if further.offset < offset:
                    break
                if further.name is not None and refuse_name(further.name) is None:
                    keys[split_name(further.name)[0]] = None
                position = padded(further.offset + 1)
    return list(keys)


def _read_span(
    url: str, file: TarStream, span: RowSpan, wanted: frozenset[str]
) -> Iterator[tuple[int, Sample]]:
    sample: Sample | None = None
    row = span.first_row - 1
    last_row = row + span.num_rows
    for member in walk_members(file, span.start, span.end):
        if member.kind == "directory" or refuse_name(member.name) is not None:
            continue
        if sample is None or member.key != sample.key:
            if sample is None and member.key != span.first_key:
                raise _changed(url, f"row {span.first_row} is {_shown(member.key)}")
            if sample is not None:
                yield row, sample
            row += 1
            if row > last_row:
                raise _changed(url, f"it has more rows up to byte {span.end}")
            sample = Sample(member.key, {}, {})
        if member.extension in wanted:
            _read_member(file, member, sample)
    if row != last_row:
        num_read = row - span.first_row + 1
        raise _changed(url, f"it has {num_read} rows in a span of {span.num_rows}")
    if sample is not None:
        yield row, sample


def _read_group(file: TarStream, group: _Group, wanted: frozenset[str]) -> Sample:
    sample = Sample(group.key, {}, {})
    for member in group.members.values():
        if member.extension in wanted:
            _read_member(file, member, sample)
    return sample


def _read_inflated(
    url: str,
    file: TarStream,
    groups: list[_Group],
    first_row: int,
    wanted: frozenset[str],
) -> Iterator[tuple[int, Sample]]:
    """Yields the groups of a stream that only runs forward, holding the unfinished."""
    samples = [Sample(group.key, {}, {}) for group in groups]
    todo = sorted(
        (member.data_offset, number, member)
        for number, group in enumerate(groups)
        for member in group.members.values()
        if member.extension in wanted
    )
    num_missing = [0] * len(groups)
    for _, number, _member in todo:
        num_missing[number] += 1
    num_held = 0
    done = 0
    for _, number, member in todo:
        _read_member(file, member, samples[number])
        num_held += len(samples[number].members.get(member.extension, b""))
        num_missing[number] -= 1
        if num_held > MAX_INTERLEAVED_BYTES + MAX_MEMBER_BYTES * (number == done):
            raise ShardError(
                f"shard {url} must have each sample's members side by side to be read "
                f"compressed, got samples interleaved over more than "
                f"{MAX_INTERLEAVED_BYTES} bytes; repack it, or store it as plain .tar"
            )
        while done < len(groups) and num_missing[done] == 0:
            yield first_row + done, samples[done]
            num_held -= sum(map(len, samples[done].members.values()))
            samples[done] = Sample("", {}, {})
            done += 1
    for number in range(done, len(groups)):
        yield first_row + number, samples[number]


def _read_member(file: TarStream, member: Member, sample: Sample) -> None:
    """Puts a member's bytes, or why they are not read, into the sample."""
    extension = member.extension
    if extension in sample.members or extension in sample.faults:
        raise TarDamage(member.header_offset, "a key twice in a shard that had it once")
    if not member.is_file:
        sample.faults[extension] = _REFUSED_KINDS[member.kind]
    elif member.size > MAX_MEMBER_BYTES:
        text = f"too_large: {member.size} bytes, at most {MAX_MEMBER_BYTES} are read"
        sample.faults[extension] = text
    else:
        if file.seekable():
            file.seek(member.data_offset)
        else:
            skip_to(file, member.data_offset)
        data = read_exactly(file, member.size)
        if len(data) < member.size:
            raise TarDamage(member.header_offset, "a member cut short", member.name)
        sample.members[extension] = data


def _shown(key: str) -> str:
    return repr(key if len(key) <= 100 else f"{key[:100]}...")


def _changed(url: str, what: str) -> ShardError:
    return ShardError(
        f"shard {url} changed since it was indexed: {what}; run index again (or the "
        "same command)"
    )
