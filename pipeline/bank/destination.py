"""Where an export may go: nowhere in the source, and never over another bank.

A destination is empty, or holds an earlier state of the same export: then its frame is
the beginning of what is to be made, and only what it lacks is added.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from manifests.bank import BankRecord, ShardEntry
from manifests.errors import BankError
from manifests.storage import Store
from pipeline.bank.lock import LOCK_PATH
from pipeline.bank.record import UNFINISHED_PATH, parse_record, read_record

_UNSAID = {"seed": 0, "encodings": "as stored", "inputs": "none"}


def place_of(store: Store) -> str:
    """Returns a store's URL, absolute where it is a path."""
    root = store.local_root
    return store.url if root is None else str(root.absolute())


def check_apart(source: Store, destination: Store) -> None:
    """Raises BankError where one bank would lie in the other."""
    a, b = (f"{place_of(store)}/" for store in (source, destination))
    if a.startswith(b) or b.startswith(a):
        raise BankError(
            f"destination must lie outside the bank, got {destination.url} (bank "
            f"{source.url}); choose another place"
        )


def is_unfinished(store: Store) -> bool:
    """Whether an export to there began or grew and did not end."""
    return store.size(UNFINISHED_PATH) is not None


def held_record(store: Store) -> BankRecord | None:
    """Returns the frame that a destination has already, None where it is empty.

    Raises:
        BankError: it holds something that is no bank.
    """
    text = store.read_or_none(UNFINISHED_PATH)
    if text is not None:
        return parse_record(store, text, UNFINISHED_PATH)
    record = read_record(store)
    if record is not None:
        return record
    for path, _ in store.list(""):
        if path != LOCK_PATH:
            raise BankError(
                "destination must be empty or hold this export, got "
                f"{store.url_of(path)}; choose another place"
            )
    return None


def check_continues(store: Store, held: BankRecord, planned: BankRecord) -> None:
    """Raises BankError where a destination does not hold the beginning of ``planned``.

    Args:
        store: the destination.
        held: its record.
        planned: the record it is to get.
    """
    differences = list(_differences(held, planned))
    if differences:
        raise BankError(
            f"destination {store.url} must be empty or hold this export, got another "
            f"bank ({'; '.join(differences)}); choose another place, or remove it"
        )


def _differences(held: BankRecord, planned: BankRecord) -> Iterator[str]:
    if not held.exported_from:
        yield "it was not exported from anywhere"
        return
    before, now = held.exported_from[-1], planned.exported_from[-1]
    if before.bank != now.bank:
        yield f"exported from {before.bank}, not {now.bank}"
    if before.selection != now.selection:
        old, new = before.selection.model_dump(), now.selection.model_dump()
        for name in old:
            if old[name] != new[name]:
                empty = _UNSAID.get(name, "all")
                yield f"{name}: {old[name] or empty} there, {new[name] or empty} now"
    if held.block_rows != planned.block_rows:
        yield "other blocks"
    if held.num_views > planned.num_views:
        yield f"it has {held.num_views} views, {planned.num_views} now"
    elif held.num_views > 1 and held.views != planned.views:
        yield "other views"
    for what in ("inputs", "labels"):
        entries = getattr(planned, what)
        if any(entries.get(name) != one for name, one in getattr(held, what).items()):
            yield f"other {what}"
    mine = [_identity(shard) for shard in held.shards]
    theirs = [_identity(shard) for shard in planned.shards]
    if mine != theirs[: len(mine)]:
        yield "other shards: it, or the bank, has changed since"
    passes = {entry.id: entry for entry in planned.passes}
    for entry in held.passes:
        found = passes.get(entry.id)
        if found is None:
            yield f"it has pass {entry.id}"
        elif (found.fingerprint, found.outputs) != (entry.fingerprint, entry.outputs):
            yield f"pass {entry.id} is another one"


def _identity(shard: ShardEntry) -> dict[str, Any]:
    """Returns what tells a shard from any other, wherever it lies now."""
    return shard.model_dump(exclude={"url", "tag", "modified"})


def is_same_frame(held: BankRecord, planned: BankRecord) -> bool:
    """Whether a destination that continues already has every shard, pass and view."""
    a, b = (
        (one.num_views, *map(len, (one.shards, one.passes, one.inputs, one.labels)))
        for one in (held, planned)
    )
    return a == b
