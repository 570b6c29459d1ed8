"""``files.parquet``: size and checksum of every file that no commit names.

Metadata, row arrays, statistics and index: finalise writes them, then this table of
them, whose own size and checksum stand in ``bank.json``. For `verify` alone: readers
check what they read by itself. A bank that grows says nothing of them until it is
finalised again. The card is not among them: people edit it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import cast

import pyarrow as pa

from manifests.bank import BankRecord
from manifests.storage import Buffer, Store
from pipeline.bank import layout
from pipeline.bank.classifiers import classifier_arrays
from pipeline.bank.dataset_index import part_path
from pipeline.bank.objects import object_crc32c
from pipeline.bank.places import FEATURES
from pipeline.bank.row_index import decode_table, encode_checked_table

FILES_PATH = "files.parquet"
Told = tuple[int, int]
_SCHEMA = pa.schema(
    [("path", pa.string()), ("size_bytes", pa.int64()), ("crc32c", pa.int64())]
)


class NotingStore(Store):
    """A store that notes size and crc32c, last byte first, of what is written to it."""

    def __init__(self, url: str) -> None:
        super().__init__(url)
        self.noted: dict[str, Told] = {}

    def replace(self, path: str, data: bytes) -> None:
        """Writes an object over whatever is there, and notes it."""
        super().replace(path, data)
        self.noted[path] = _tell(data)


def write_files(store: NotingStore, record: BankRecord) -> Told:
    """Writes the table of all files that no commit names; returns what is told of it.

    Args:
        store: the bank's, to which finalise has written.
        record: its record.
    """
    told = dict(store.noted)
    for path in frame_paths(record):
        if path not in told:
            told[path] = _tell(store.read(path))
    columns = {
        "path": sorted(told),
        "size_bytes": [told[path][0] for path in sorted(told)],
        "crc32c": [told[path][1] for path in sorted(told)],
    }
    data = encode_checked_table(pa.table(columns, schema=_SCHEMA))
    store.replace(FILES_PATH, data)
    return store.noted[FILES_PATH]


def damaged_files(
    store: Store, record: BankRecord, full: bool
) -> Iterator[tuple[str, str]]:
    """Yields (path, what is wrong) of files that are not what finalise wrote.

    Args:
        store: the bank's.
        record: its record.
        full: read them and compare their checksums.
    """
    if record.state is None or record.state.files is None:
        return
    data = store.read_or_none(FILES_PATH)
    if data is None:
        yield FILES_PATH, "is missing"
        return
    if _tell(data) != record.state.files:
        yield FILES_PATH, "is not what bank.json says"
        return
    told = _decode(store, data)
    sizes = _sizes(store, told)
    for path, (size, crc) in told.items():
        held = sizes.get(path)
        if held is None:
            yield path, "is missing"
        elif held != size:
            yield path, f"has {held} bytes, {FILES_PATH} says {size}"
        elif full and object_crc32c([store.read(path)]) != crc:
            yield path, f"has another crc32c than {FILES_PATH} says"


def _tell(data: Buffer) -> Told:
    return len(data), object_crc32c([data])


def _decode(store: Store, data: bytes) -> dict[str, Told]:
    hint = "make it anew with `teachonce finalise BANK`"
    columns = decode_table(data, store.url_of(FILES_PATH), hint).to_pydict()
    told = zip(columns["size_bytes"], columns["crc32c"], strict=True)
    return dict(zip(columns["path"], cast(Iterator[Told], told), strict=True))


def frame_paths(record: BankRecord) -> Iterator[str]:
    """Yields what a bank has before its first block, and finalise leaves as it is."""
    for path in layout.group_paths(record):
        yield f"{FEATURES}/{path}/zarr.json" if path else f"{FEATURES}/zarr.json"
    for spec in layout.feature_arrays(record):
        yield f"{FEATURES}/{spec.path}/zarr.json"
    for array in layout.row_arrays(record):
        yield f"{FEATURES}/{array.path}/zarr.json"
    for classifier in classifier_arrays(record):
        yield classifier.metadata_path
        yield classifier.object_path
    for part in dict.fromkeys(shard.part for shard in record.shards):
        yield part_path(part)
        yield part_path(part).removesuffix("parquet") + "json"


def _sizes(store: Store, paths: dict[str, Told]) -> dict[str, int | None]:
    """Returns sizes of files: objects from listings of their folders, else one each."""
    folders = {path.rpartition("/")[0] for path in paths if _is_object(path)}
    listed = {path: size for one in folders for path, size in store.list(one)}
    return {
        path: listed.get(path) if _is_object(path) else store.size(path)
        for path in paths
    }


def _is_object(path: str) -> bool:
    return path.startswith(f"{FEATURES}/") and not path.endswith("zarr.json")
