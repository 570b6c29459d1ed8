"""Verify what lies around the features: metadata, row arrays and the index.

All of it can be made again from the record and the commits, so damage here costs no
teacher; but a stock reader takes a missing row object for its fill value (no flip, no
label), and an array without metadata is not there.
"""

from __future__ import annotations

import json
from collections.abc import Iterator

from manifests.bank import BankRecord, ShardEntry
from manifests.dataset import DatasetRecord
from manifests.errors import BankError, ManifestError, TeachOnceError
from manifests.loading import load_json
from manifests.own_checksum import parse_checked
from manifests.storage import Store
from pipeline.bank import layout
from pipeline.bank.arrays import metadata
from pipeline.bank.card import CARD_PATH
from pipeline.bank.classifiers import classifier_arrays
from pipeline.bank.croissant import CROISSANT_PATH
from pipeline.bank.dataset_index import part_path, part_record_path, read_part
from pipeline.bank.places import FEATURES
from pipeline.bank.row_arrays import has_own_crc
from pipeline.bank.row_index import index_path, num_index_parts, read_index_part


def damaged_metadata(store: Store, record: BankRecord) -> Iterator[tuple[str, str]]:
    """Yields (path, what is wrong) of every ``zarr.json`` that a reader would miss."""
    expected: dict[str, bytes | None] = {
        f"{FEATURES}/{path}/zarr.json" if path else f"{FEATURES}/zarr.json": None
        for path in layout.group_paths(record)
    }
    rows, views = record.num_rows, record.num_views
    for spec in layout.feature_arrays(record):
        expected[f"{FEATURES}/{spec.path}/zarr.json"] = metadata(spec, rows, views)
    for array in layout.row_arrays(record):
        path = f"{FEATURES}/{array.path}/zarr.json"
        expected[path] = array.metadata(rows, views)
    for path, fresh in expected.items():
        held = store.read_or_none(path)
        if held is None:
            yield path, "is missing"
        elif not _agrees(held, fresh):
            yield path, "is damaged"


def damaged_classifiers(
    store: Store, record: BankRecord, full: bool
) -> Iterator[tuple[str, str]]:
    """Yields (path, what is wrong) of zero-shot classifiers, to be written again.

    Args:
        store: the bank's.
        record: its record.
        full: read them and compare their checksums.
    """
    for array in classifier_arrays(record):
        held = store.read_or_none(array.metadata_path)
        if held is None:
            yield array.metadata_path, "is missing"
        elif not _agrees(held, array.metadata()):
            yield array.metadata_path, "is damaged"
        if store.size(array.object_path) is None:
            yield array.object_path, "is missing"
        elif full and not has_own_crc(store.read(array.object_path)):
            yield array.object_path, "does not match its own crc32c"


def _agrees(held: bytes, fresh: bytes | None) -> bool:
    try:
        document = json.loads(held)
    except (ValueError, RecursionError):
        return False
    if not isinstance(document, dict):
        return False
    if fresh is None:
        return document.get("node_type") == "group"
    # Attributes are words for people; what decodes the bytes is everything else.
    wanted = json.loads(fresh)
    return {**document, "attributes": {}} == {**wanted, "attributes": {}}


def damaged_rows(
    store: Store, record: BankRecord, full: bool
) -> Iterator[tuple[str, str]]:
    """Yields (path, what is wrong) of objects of row arrays, statistics and index.

    Only for a bank that was finalised after its last block.

    Args:
        store: the bank's.
        record: its record.
        full: read them and compare their checksums.
    """
    expected = {
        f"{FEATURES}/{path}"
        for array in layout.row_arrays(record)
        for path in array.object_paths(record.num_rows, record.num_views)
    }
    for path in sorted(expected):
        if not store.size(path):
            yield path, "is missing or empty"
        elif full and not has_own_crc(store.read(path)):
            yield path, "does not match its own crc32c"
    if full:
        for level in layout.levels(record):
            for path, _ in store.list(f"{FEATURES}/{level}/stats"):
                if path.endswith("zarr.json"):
                    continue
                if not has_own_crc(store.read(path)):
                    yield path, "does not match its own crc32c"
    yield from _damaged_index(store, record, full)


def _damaged_index(
    store: Store, record: BankRecord, full: bool
) -> Iterator[tuple[str, str]]:
    num_lines = 0
    for part in range(num_index_parts(record)):
        path = index_path(part)
        if store.size(path) is None:
            yield path, "is missing"
            return
        if full:
            try:
                num_lines += read_index_part(store, part).num_rows
            except BankError as error:
                yield path, str(error)
                return
    samples = sum(shard.samples for shard in record.shards)
    if full and num_lines != samples:
        yield "index", f"has {num_lines} lines, the bank has {samples} samples"


def damaged_parts(
    store: Store, record: BankRecord, full: bool
) -> Iterator[tuple[str, str]]:
    """Yields (path, what is wrong) of the dataset's index, which shards make anew.

    Args:
        store: the bank's.
        record: its record.
        full: read them and compare them with the record.
    """
    shards: dict[str, list[ShardEntry]] = {}
    for shard in record.shards:
        shards.setdefault(shard.part, []).append(shard)
    for part, entries in shards.items():
        samples = {shard.name: shard.samples for shard in entries if shard.samples}
        for path in (part_path(part), part_record_path(part)):
            if not store.size(path):
                yield path, "is missing or empty"
                continue
            if not full:
                continue
            try:
                if path == part_path(part):
                    rows = read_part(store, part)
                    found = {name: len(one) for name, one in rows}
                else:
                    document = load_json(DatasetRecord, store.read(path), path)
                    held = {shard.name: shard.samples for shard in document.shards}
                    found = {name: held[name] for name in samples if name in held}
            except TeachOnceError as error:
                yield path, f"cannot be read: {error}"
                continue
            if found != samples:
                yield path, "does not agree with bank.json about its shards' samples"


def damaged_runs(store: Store) -> Iterator[tuple[str, str]]:
    """Yields (path, what is wrong) of records of runs, which the bank does not need."""
    for path, _ in store.list("runs"):
        if path.endswith(".json"):
            try:
                parse_checked(store.read(path), path)
            except ManifestError:
                yield path, "is damaged; nothing needs it, --repair removes it"


def damaged_card(store: Store, record: BankRecord) -> Iterator[tuple[str, str]]:
    """Yields (path, what is wrong) of the card, whose words nobody can vouch for.

    Early banks have none, or not all of it.
    """
    if record.state is None or record.state.files is None:
        return
    if not store.size(CARD_PATH):
        yield CARD_PATH, "is missing or empty"
    try:
        json.loads(store.read_or_none(CROISSANT_PATH) or b"")
    except ValueError:
        yield CROISSANT_PATH, "is missing or no JSON"
