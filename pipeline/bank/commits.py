"""Commits, the small records that make blocks exist, and ``blocks.parquet``."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import pyarrow as pa
import pyarrow.compute as pc

from manifests.bank import Commit, CommitContent
from manifests.errors import BankError
from manifests.loading import load_json
from manifests.own_checksum import with_own_checksum
from manifests.storage import Store
from pipeline.bank.row_index import decode_table, encode_checked_table

BLOCKS_PATH = "blocks.parquet"
_READERS = 16
_BLOCK_NAME = re.compile(r"[0-9]{8,12}\.json")
_SCHEMA = pa.schema(
    [
        ("pass", pa.string()),
        ("block", pa.int64()),
        ("shard", pa.string()),
        ("rows", pa.int32()),
        ("valid", pa.int32()),
        ("objects", pa.list_(pa.string())),
        ("size_bytes", pa.list_(pa.int64())),
        ("crc32c", pa.list_(pa.int64())),
    ]
)


def commit_path(pass_id: str, block: int) -> str:
    """Returns where the commit of one block of one pass lies in the bank."""
    return f"commits/{pass_id}/{block:08d}.json"


def encode_commit(commit: Commit) -> bytes:
    """Returns the bytes of a commit, which end in their own crc32c."""
    text = json.dumps(commit.model_dump(mode="json"), separators=(",", ":"))
    return with_own_checksum(text.encode())


def write_commit(store: Store, commit: Commit) -> bool:
    """Writes a commit create-only; returns False where there was one already."""
    content = commit.content
    path = commit_path(content.pass_id, content.block)
    return store.create(path, encode_commit(commit))


def list_commits(store: Store, pass_id: str) -> set[int]:
    """Returns the blocks of a pass that are committed, by listing their names."""
    blocks: set[int] = set()
    for path, _ in store.list(f"commits/{pass_id}"):
        blocks |= block_of(path.rsplit("/", 1)[-1])
    return blocks


def block_of(name: str) -> set[int]:
    """Returns the block that a file in a folder of commits is of; none if it is not."""
    return {int(name[:-5])} if _BLOCK_NAME.fullmatch(name) else set()


def read_commit(store: Store, pass_id: str, block: int) -> Commit:
    """Returns the commit of one block of one pass.

    Raises:
        BankError: it is unreadable or speaks of another block.
        StorageError: there is none.
    """
    path = commit_path(pass_id, block)
    commit = load_json(Commit, store.read(path), store.url_of(path))
    content = commit.content
    if (content.pass_id, content.block) != (pass_id, block):
        raise BankError(
            f"{store.url_of(path)} speaks of {content.pass_id} block "
            f"{content.block}; it was moved or edited, restore it or run "
            "`precompute --repair`"
        )
    return commit


def read_commits(
    store: Store, pass_id: str, blocks: Sequence[int]
) -> Iterator[CommitContent]:
    """Yields the content of commits in the order of ``blocks``.

    Raises:
        BankError: a commit is unreadable or speaks of another block.
    """

    def read(block: int) -> CommitContent:
        return read_commit(store, pass_id, block).content

    with ThreadPoolExecutor(_READERS) as pool:
        for start in range(0, len(blocks), 1024):
            yield from pool.map(read, blocks[start : start + 1024])


def encode_blocks(contents: Iterable[CommitContent]) -> bytes:
    """Returns ``blocks.parquet`` for commits given in order of pass and block."""
    columns: dict[str, list[object]] = {name: [] for name in _SCHEMA.names}
    for content in contents:
        paths = sorted(content.objects)
        columns["pass"].append(content.pass_id)
        columns["block"].append(content.block)
        columns["shard"].append(content.shard)
        columns["rows"].append(content.rows)
        columns["valid"].append(content.valid)
        columns["objects"].append(paths)
        columns["size_bytes"].append([content.objects[path][0] for path in paths])
        columns["crc32c"].append([content.objects[path][1] for path in paths])
    return encode_checked_table(pa.table(columns, schema=_SCHEMA))


def read_blocks(store: Store) -> pa.Table:
    """Returns ``blocks.parquet``: a line per (pass, block) with its objects.

    Raises:
        BankError: the bank was never finalised.
    """
    data = store.read_or_none(BLOCKS_PATH)
    if data is None:
        raise BankError(
            f"bank {store.url} has no {BLOCKS_PATH}: it was never finalised, or it is "
            "lost; run `teachonce finalise BANK`, or the same precompute with --repair"
        )
    hint = (
        "run the same `teachonce precompute` again with --repair, it is made anew from "
        "the commits"
    )
    where = store.url_of(BLOCKS_PATH)
    table = decode_table(data, where, hint, _SCHEMA)
    lists = ("objects", "size_bytes", "crc32c")
    first, *others = (pc.list_value_length(table[name]) for name in lists)
    is_whole = all(one.equals(first) for one in others)
    is_whole &= not any(table[name].null_count for name in _SCHEMA.names)
    is_whole &= not any(pc.list_flatten(table[name]).null_count for name in lists)
    if not is_whole:
        raise BankError(f"{where} is damaged (values are missing); {hint}")
    return table
