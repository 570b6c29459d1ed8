"""What a bank holds by its listing, and what it lacks: one that grows, one half copied.

The record says what there should be, ``blocks.parquet`` and the names of commits what
was committed, the listing what is there. Reads no commit and no feature; a listing
costs a request per 1,000 objects.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from manifests.bank import BankRecord
from manifests.errors import BankError
from manifests.storage import Store
from pipeline.bank import layout
from pipeline.bank.commits import BLOCKS_PATH, block_of, commit_path, read_blocks
from pipeline.bank.frame_files import frame_paths
from pipeline.bank.places import FEATURES
from pipeline.bank.row_index import index_path, num_index_parts

Objects = Mapping[str, tuple[int, int]]


@dataclass(frozen=True)
class Missing:
    """What a bank lacks.

    Attributes:
        blocks: by pass, blocks of shards in use that were never committed, or whose
            commit was not copied.
        commits: commits that ``blocks.parquet`` knows and that are gone.
        objects: objects of committed blocks that are gone or of another size.
        files: of the bank as a whole: index, row arrays, Zarr's metadata.
    """

    blocks: Mapping[str, tuple[int, ...]]
    commits: tuple[str, ...]
    objects: tuple[str, ...]
    files: tuple[str, ...]

    def __bool__(self) -> bool:
        return bool(self.blocks) or self.is_damaged

    @property
    def is_damaged(self) -> bool:
        """Whether something that the bank once held is gone."""
        return bool(self.commits or self.objects or self.files)

    def to_json(self) -> dict[str, Any]:
        """Returns it as JSON values."""
        return asdict(self)


@dataclass(frozen=True)
class Holdings:
    """A bank's record, its table of blocks, and the listing of its store.

    Attributes:
        record: of the bank.
        table: from (pass, block) to its objects' (size in bytes, crc32c), as
            ``blocks.parquet`` has them; empty where there is none.
        stored: from the path of every object to its size in bytes.
    """

    record: BankRecord
    table: Mapping[tuple[str, int], Objects]
    stored: Mapping[str, int]

    def committed(self) -> dict[str, set[int]]:
        """Returns, by pass, the blocks whose commits lie there."""
        found: dict[str, set[int]] = {entry.id: set() for entry in self.record.passes}
        for path in self.stored:
            folder, _, rest = path.partition("/")
            pass_id, _, name = rest.partition("/")
            if folder == "commits" and pass_id in found:
                found[pass_id] |= block_of(name)
        return found

    def missing(self) -> Missing:
        """Returns what the bank lacks."""
        live = set(self.record.live_blocks)
        known = self.committed()
        for name, block in self.table:
            known[name].add(block)
        blocks = {
            name: tuple(sorted(live - held))
            for name, held in known.items()
            if live - held
        }
        objects = [
            path
            for entry in self.record.passes
            for block in sorted(known[entry.id])
            for path in sorted(layout.block_objects(entry, block))
            if not self._is_whole(path, self.table.get((entry.id, block), {}))
        ]
        commits = (commit_path(*key) for key in sorted(self.table))
        files = dict.fromkeys(_files(self.record, is_whole=not blocks))
        return Missing(
            blocks,
            tuple(path for path in commits if path not in self.stored),
            tuple(objects),
            tuple(path for path in files if path not in self.stored),
        )

    def _is_whole(self, path: str, told: Objects) -> bool:
        """Whether an object lies there, of the size that the table tells if any."""
        size = self.stored.get(path)
        return size is not None and (path not in told or told[path][0] == size)


def read_holdings(store: Store, record: BankRecord) -> Holdings:
    """Returns what a bank holds; a lost ``blocks.parquet`` reads as an empty table."""
    table: dict[tuple[str, int], Objects] = {}
    known = {entry.id for entry in record.passes}
    stored = dict(store.list(""))
    try:
        columns = read_blocks(store).to_pydict() if BLOCKS_PATH in stored else None
    except BankError:
        # The commits still say it all; `verify` speaks of the damage.
        columns = None
    if columns is not None:
        for name, block, paths, sizes, crcs in zip(
            *(columns[c] for c in ("pass", "block", "objects", "size_bytes", "crc32c")),
            strict=True,
        ):
            if name in known:
                facts = zip(sizes, crcs, strict=True)
                table[name, block] = dict(zip(paths, facts, strict=True))
    return Holdings(record, table, stored)


def _files(record: BankRecord, is_whole: bool) -> Iterator[str]:
    """Yields what there is once in a bank; row arrays only where all was finalised."""
    yield from frame_paths(record)
    if record.state is None:
        return
    yield BLOCKS_PATH
    if is_whole:
        for part in range(num_index_parts(record)):
            yield index_path(part)
        for array in layout.row_arrays(record):
            for path in array.object_paths(record.num_rows, record.num_views):
                yield f"{FEATURES}/{path}"
