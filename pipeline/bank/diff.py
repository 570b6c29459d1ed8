"""What differs between two banks: their records and what their commits tell.

Owns what counts as a difference of content: features, row facts and commits'
content, and the record's provenance; places (URLs, etags), times
and ``runs/`` do not count. Blocks are matched by shard and number in it, so that banks
that grew in another order are compared all the same. Pure: values in, values out;
comparing decoded values is ``diff_values``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from manifests.bank import BankRecord, BankState, OutputEntry, PassEntry, ShardEntry
from manifests.storage import Store
from pipeline.bank import layout
from pipeline.bank.arrays import ArraySpec, object_name
from pipeline.bank.commits import read_commits
from pipeline.bank.holdings import Missing, read_holdings
from pipeline.bank.places import FEATURES
from pipeline.bank.rows import object_path

Side = Literal["A", "B"]

# Kept with a pass for people and for the next run; not what made its values.
_NOT_CONTENT = frozenset({"cost_per_row", "facts", "identity", "weights"})
_SHARD_FIELDS = ("size_bytes", "headers_sha256")
_CUT = frozenset({"block_rows", "chunk_rows"})
_ROW_FIELDS = ("samples", "chosen_sha256")


@dataclass(frozen=True)
class Contents:
    """What is compared of one bank.

    Attributes:
        record: of the bank.
        blocks: by pass, the blocks that are committed.
        objects: from the path of a committed object to its (size in bytes, crc32c).
        missing: what the bank should hold and does not.
    """

    record: BankRecord
    blocks: Mapping[str, frozenset[int]]
    objects: Mapping[str, tuple[int, int]]
    missing: Missing


@dataclass(frozen=True)
class Difference:
    """One field that differs.

    Attributes:
        section: ``dataset``, ``shards``, ``inputs``, ``labels``, ``views``, ``passes``,
            ``outputs``, ``rows`` or ``blocks``.
        what: which shard, input, pass or output.
        field: dotted name of the field; '' where the thing itself is only in one.
        a: its value in A.
        b: its value in B.
        only: the bank that alone has it.
    """

    section: str
    what: str
    field: str
    a: Any = None
    b: Any = None
    only: Side | None = None


@dataclass(frozen=True)
class ObjectPair:
    """The objects of two banks that hold the same part of the same array.

    Attributes:
        path_a: path in A.
        path_b: path in B.
        differs: whether their committed sizes or crc32c differ.
    """

    path_a: str
    path_b: str
    differs: bool


@dataclass(frozen=True)
class Diff:
    """What differs between banks A and B.

    Attributes:
        differences: field by field.
        objects: the objects that both have of what is stored alike.
        missing: what each bank lacks of what it should hold.
    """

    differences: tuple[Difference, ...]
    objects: tuple[ObjectPair, ...]
    missing: Mapping[Side, Missing]

    @property
    def different_objects(self) -> tuple[ObjectPair, ...]:
        """The objects whose bytes differ by what was committed."""
        return tuple(pair for pair in self.objects if pair.differs)

    @property
    def is_same(self) -> bool:
        """Whether both hold the same, and neither lost anything it once held."""
        return not (
            self.differences
            or self.different_objects
            or any(one.is_damaged for one in self.missing.values())
        )


def read_contents(store: Store, record: BankRecord) -> Contents:
    """Returns what is compared of a bank: a listing, and the commits since finalise.

    Raises:
        BankError: a commit is damaged.
        StorageError: the store cannot be read.
    """
    holdings = read_holdings(store, record)
    objects = {
        path: facts for told in holdings.table.values() for path, facts in told.items()
    }
    blocks = {}
    for name, committed in holdings.committed().items():
        told = {block for one, block in holdings.table if one == name}
        for content in read_commits(store, name, sorted(committed - told)):
            objects |= content.objects
        blocks[name] = frozenset(told | committed)
    return Contents(record, blocks, objects, holdings.missing())


def diff(a: Contents, b: Contents) -> Diff:
    """Returns what differs between two banks by their records and commits."""
    found = [
        *_fields("dataset", "", dict(a.record.dataset), dict(b.record.dataset)),
        *_shards(a.record, b.record),
        *_named("inputs", _dumped(a.record.inputs), _dumped(b.record.inputs)),
        *_named("labels", a.record.labels, b.record.labels),
        *_fields("views", "", _views(a.record), _views(b.record)),
        *_named("passes", _passes(a.record), _passes(b.record)),
        *_named("outputs", _outputs(a.record), _outputs(b.record)),
        *_arrays(a.record, b.record),
    ]
    if not found:
        # Whatever is not compared field by field is at least in the fingerprint.
        found += _named("passes", _fingerprints(a.record), _fingerprints(b.record))
    found += _rows(a.record, b.record)
    found += _blocks(a, b)
    missing: dict[Side, Missing] = {"A": a.missing, "B": b.missing}
    return Diff(tuple(found), tuple(_object_pairs(a, b)), missing)


def common_shards(
    a: BankRecord, b: BankRecord
) -> Iterator[tuple[ShardEntry, ShardEntry]]:
    """Yields the shards in use that both banks have, of the same bytes and blocks."""
    theirs = {shard.name: shard for shard in b.shards if not shard.retired}
    for shard in a.shards:
        other = theirs.get(shard.name)
        if (
            other is not None
            and not shard.retired
            and a.block_rows == b.block_rows
            and all(
                getattr(shard, field) == getattr(other, field)
                for field in (*_SHARD_FIELDS, *_ROW_FIELDS)
            )
        ):
            yield shard, other


def shards_by_key(
    a: BankRecord, b: BankRecord
) -> Iterator[tuple[ShardEntry, ShardEntry]]:
    """Yields the shards in use that both banks have, whose rows lie otherwise in each.

    Rows of one of them were chosen, or blocks have other lengths.
    """
    alike = {shard.name for shard, _ in common_shards(a, b)}
    theirs = {shard.name: shard for shard in b.shards if not shard.retired}
    for shard in a.shards:
        other = theirs.get(shard.name)
        if (
            other is not None
            and not shard.retired
            and shard.name not in alike
            and all(getattr(shard, f) == getattr(other, f) for f in _SHARD_FIELDS)
        ):
            yield shard, other


def common_views(a: BankRecord, b: BankRecord, path: str) -> list[int]:
    """Returns the views that both banks have of an output, ascending."""
    return sorted(set(_views_of(a, path)) & set(_views_of(b, path)))


def _fields(
    section: str, what: str, a: Any, b: Any, path: str = ""
) -> list[Difference]:
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        found = []
        for name in sorted({*a, *b}):
            inner = f"{path}.{name}" if path else name
            if name not in b:
                found.append(Difference(section, what, inner, a=a[name], only="A"))
            elif name not in a:
                found.append(Difference(section, what, inner, b=b[name], only="B"))
            else:
                found += _fields(section, what, a[name], b[name], inner)
        return found
    return [] if a == b else [Difference(section, what, path, a, b)]


def _named(
    section: str, a: Mapping[str, Any], b: Mapping[str, Any]
) -> Iterator[Difference]:
    """Yields what differs between things that have names, in A's order, then B's."""
    for name in dict.fromkeys([*a, *b]):
        if name not in b:
            yield Difference(section, name, "", only="A")
        elif name not in a:
            yield Difference(section, name, "", only="B")
        else:
            yield from _fields(section, name, a[name], b[name])


def _dumped(models: Mapping[str, Any]) -> dict[str, Any]:
    return {name: one.model_dump(mode="json") for name, one in models.items()}


def _shards(a: BankRecord, b: BankRecord) -> Iterator[Difference]:
    chosen = {s.name for s in (*a.shards, *b.shards) if s.chosen_sha256 is not None}

    def facts(record: BankRecord) -> dict[str, dict[str, Any]]:
        found = {}
        for shard in record.shards:
            names = [*_SHARD_FIELDS, "retired"]
            if shard.name not in chosen:
                # Of chosen rows it is said which ones both have, by their keys.
                names += ["samples", "faults", "damage", "first_block"]
            # Named once: a retired shard's successor has a name of its own.
            found[shard.name] = {name: getattr(shard, name) for name in names}
        return found

    yield from _named("shards", facts(a), facts(b))


def _views(record: BankRecord) -> dict[str, Any]:
    own = {"block_rows": record.block_rows, "num_views": record.num_views}
    return {**record.views, **own}


def _passes(record: BankRecord) -> dict[str, dict[str, Any]]:
    found = {}
    for entry in record.passes:
        made = entry.provenance
        found[entry.id] = {
            "inputs": list(entry.inputs),
            "labels": list(entry.labels),
            "views": [entry.first_view, entry.last_view],
            "batch": entry.batch,
            **made.get("identity", {}),
            **{name: made[name] for name in made if name not in _NOT_CONTENT},
            "family_versions": made.get("facts", {}).get("versions", {}),
        }
    return found


def _fingerprints(record: BankRecord) -> dict[str, dict[str, str]]:
    return {entry.id: {"fingerprint": entry.fingerprint} for entry in record.passes}


def _views_of(record: BankRecord, path: str) -> list[int]:
    return sorted(
        {
            view
            for entry in record.passes
            for output in entry.outputs
            if f"{layout.level_path(entry, output.size)}/{output.name}" == path
            for view in entry.views
        }
    )


def _outputs(record: BankRecord) -> dict[str, dict[str, Any]]:
    found = {}
    for path, _, output in layout.outputs(record):
        facts = output.model_dump(mode="json", exclude={"name", "size", "arrays"})
        found[path] = {**facts, "views": _views_of(record, path)}
    return found


def _arrays(a: BankRecord, b: BankRecord) -> Iterator[Difference]:
    """Yields arrays of one encoding that lie otherwise; other encodings say enough."""
    for path, mine, theirs in common_outputs(a, b):
        if mine.encoding == theirs.encoding:
            # Other blocks have other chunks: `block_rows` of the banks says enough.
            left_out = _CUT if a.block_rows != b.block_rows else frozenset()
            told = [
                {
                    one["path"]: {
                        k: v for k, v in _stored(one).items() if k not in left_out
                    }
                    for one in output.arrays
                }
                for output in (mine, theirs)
            ]
            yield from _fields("outputs", path, told[0], told[1], "arrays")


def _stored(array: Mapping[str, Any]) -> dict[str, Any]:
    # Attributes are words for people; what decodes the bytes is everything else.
    return {k: v for k, v in array.items() if k not in ("path", "attributes")}


def _rows(a: BankRecord, b: BankRecord) -> Iterator[Difference]:
    """Yields counts of valid and invalid rows that differ, of passes both have."""
    if a.state is None or b.state is None:
        if a.state is not b.state:
            only: Side = "B" if a.state is None else "A"
            yield Difference("rows", "", "finalised", only=only)
        return
    for entry in a.passes:
        if entry.id in b.state.valid and entry.id in a.state.valid:
            mine, theirs = (_counts(state, entry.id) for state in (a.state, b.state))
            yield from _fields("rows", entry.id, mine, theirs)


def _counts(state: BankState, pass_id: str) -> dict[str, Any]:
    return {
        "valid": state.valid[pass_id],
        "invalid": state.invalid.get(pass_id, {}),
    }


def _blocks(a: Contents, b: Contents) -> Iterator[Difference]:
    """Yields passes of which other blocks are committed, of shards that both have."""
    shards = list(common_shards(a.record, b.record))
    total = sum(shard.blocks for shard, _ in shards)
    for name in a.blocks:
        if name not in b.blocks:
            continue
        held = [
            (
                shard.first_block + k in a.blocks[name],
                other.first_block + k in b.blocks[name],
            )
            for shard, other in shards
            for k in range(shard.blocks)
        ]
        if any(mine != theirs for mine, theirs in held):
            count_a, count_b = (
                f"{sum(side)} of {total}" for side in zip(*held, strict=True)
            )
            yield Difference("blocks", name, "committed", count_a, count_b)


def _object_pairs(a: Contents, b: Contents) -> Iterator[ObjectPair]:
    """Yields the objects that both have, of arrays and row facts stored alike."""

    def pair(path_a: str, path_b: str) -> Iterator[ObjectPair]:
        if path_a in a.objects and path_b in b.objects:
            differs = a.objects[path_a] != b.objects[path_b]
            yield ObjectPair(path_a, path_b, differs)

    shards = list(common_shards(a.record, b.record))
    blocks = [
        (shard.first_block + k, other.first_block + k)
        for shard, other in shards
        for k in range(shard.blocks)
    ]
    for name in _same_row_passes(a.record, b.record):
        for mine, theirs in blocks:
            yield from pair(object_path(name, mine), object_path(name, theirs))
    for path, entry_a, entry_b in common_outputs(a.record, b.record):
        for data_a, data_b in zip(entry_a.arrays, entry_b.arrays, strict=False):
            if _stored(data_a) != _stored(data_b):
                continue
            specs = ArraySpec.from_json(data_a), ArraySpec.from_json(data_b)
            for mine, theirs in blocks:
                for view in common_views(a.record, b.record, path):
                    paths = (
                        f"{FEATURES}/{object_name(spec, block, view)}"
                        for spec, block in zip(specs, (mine, theirs), strict=True)
                    )
                    yield from pair(*paths)


def common_outputs(
    a: BankRecord, b: BankRecord
) -> Iterator[tuple[str, OutputEntry, OutputEntry]]:
    """Yields (path, entry in A, entry in B) of the outputs that both banks have."""
    theirs = {path: output for path, _, output in layout.outputs(b)}
    for path, _, output in layout.outputs(a):
        if path in theirs:
            yield path, output, theirs[path]


def _same_row_passes(a: BankRecord, b: BankRecord) -> list[str]:
    def facts(entry: PassEntry) -> tuple[object, ...]:
        return entry.inputs, entry.labels

    theirs = {entry.id: facts(entry) for entry in b.passes if not entry.outputs}
    return [
        entry.id
        for entry in a.passes
        if not entry.outputs and theirs.get(entry.id) == facts(entry)
    ]
