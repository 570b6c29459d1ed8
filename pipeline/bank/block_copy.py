"""One block of a pass from bank to bank: its objects, each checked, then its commit.

Nothing is decoded. Bytes are compared with the commit before they are written, so that
damage never travels; what lies at the destination is read before it is believed, unless
its block is committed there: that was written after its objects were checked.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from manifests.bank import Commit, CommitContent
from manifests.errors import BankError
from manifests.loading import load_json
from manifests.storage import Store
from pipeline.bank.commits import commit_path, encode_commit
from pipeline.bank.layout import block_objects
from pipeline.bank.objects import has_crc32c
from pipeline.bank.selection import PassPart


class DamagedBlock(BankError):
    """A block of the source that is not what was committed; others can be copied."""


@dataclass(frozen=True)
class BlockTask:
    """A block to copy.

    Attributes:
        part: its pass in both banks.
        source: its number in the source.
        target: its number in the destination.
        is_committed: whether the destination has its commit already.
    """

    part: PassPart
    source: int
    target: int
    is_committed: bool


@dataclass(frozen=True)
class BlockCopied:
    """What a task did: objects and bytes copied, objects that were there already."""

    objects: int = 0
    bytes: int = 0
    held_objects: int = 0


def copy_block(
    source: Store, destination: Store, task: BlockTask, held: Mapping[str, int]
) -> BlockCopied:
    """Copies what the destination lacks of one block; its commit comes last.

    Only for the holder of the destination's lock: what is there and is not what was
    committed is replaced.

    Args:
        source: the bank to copy from.
        destination: the one to copy to.
        task: the block.
        held: size of every object that the destination has.

    Raises:
        DamagedBlock: the source's block is not what was committed; nothing that is
            wrong was written.
        StorageError: a store failed.
    """
    entry = task.part.target
    raw, commit = _read_commit(source, task)
    there = block_objects(entry, task.target)
    paths = dict(zip(there, block_objects(entry, task.source), strict=True))
    content = commit.content
    lacking = [path for path in paths.values() if path not in content.objects]
    if lacking:
        raise _damaged(source, task, lacking[0], "is not in its commit")
    objects = {path: content.objects[paths[path]] for path in there}
    if task.is_committed and all(
        held.get(path) == size for path, (size, _) in objects.items()
    ):
        return BlockCopied(held_objects=len(objects))
    num_copied = num_bytes = 0
    for path, (size, crc) in objects.items():
        if _is_held(destination, path, size, crc, held):
            continue
        data = source.read_or_none(paths[path], size)
        if data is None:
            raise _damaged(source, task, paths[path], "is missing")
        if len(data) != size:
            why = f"has {len(data)} bytes, its commit says {size}"
            raise _damaged(source, task, paths[path], why)
        if not has_crc32c([data], crc):
            why = "has another crc32c than its commit says"
            raise _damaged(source, task, paths[path], why)
        destination.replace(path, data)
        num_copied, num_bytes = num_copied + 1, num_bytes + size
    fields = {"fingerprint": entry.fingerprint, "block": task.target}
    moved = content.model_copy(update={**fields, "objects": objects})
    if moved != content:
        raw = encode_commit(commit.model_copy(update={"content": moved}))
    destination.replace(commit_path(entry.id, task.target), raw)
    return BlockCopied(num_copied, num_bytes, len(objects) - num_copied)


def _is_held(
    store: Store, path: str, size: int, crc: int, held: Mapping[str, int]
) -> bool:
    return held.get(path) == size and has_crc32c([store.read(path, size)], crc)


def _read_commit(source: Store, task: BlockTask) -> tuple[bytes, Commit]:
    entry = task.part.source
    path = commit_path(entry.id, task.source)
    raw = source.read(path)
    try:
        commit = load_json(Commit, raw, source.url_of(path))
    except ValueError as error:
        raise _damaged(source, task, path, f"cannot be read: {error}") from error
    content: CommitContent = commit.content
    told = (content.pass_id, content.block, content.fingerprint)
    if told != (entry.id, task.source, entry.fingerprint):
        raise _damaged(source, task, path, "speaks of another block or job")
    return raw, commit


def _damaged(source: Store, task: BlockTask, path: str, why: str) -> DamagedBlock:
    return DamagedBlock(
        f"pass {task.part.source.id} block {task.source}: {source.url_of(path)} {why}"
    )
