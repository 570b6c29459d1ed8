"""One block of a pass from bank to bank: its objects, each checked, then its commit.

Nothing is decoded. Bytes are compared with the commit before they are written, so that
damage never travels; what lies at the destination is read before it is believed, unless
its block is committed there: that was written after its objects were checked.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from manifests.bank import Commit, CommitContent, PassEntry
from manifests.errors import BankError
from manifests.loading import load_json
from manifests.storage import Store
from pipeline.bank.commits import commit_path, encode_commit
from pipeline.bank.layout import block_objects
from pipeline.bank.objects import has_crc32c
from pipeline.bank.pass_parts import PassPart


class DamagedBlock(BankError):
    """A block of the source that is not what was committed; others can be copied."""


@dataclass(frozen=True)
class SourceBlock:
    """A committed block of a pass, read with every byte compared with its commit.

    Attributes:
        store: of the bank that it lies in.
        entry: its pass there.
        block: its number there.
    """

    store: Store
    entry: PassEntry
    block: int

    def read_commit(self) -> tuple[bytes, Commit]:
        """Returns the bytes of its commit, and what they say.

        Raises:
            DamagedBlock: they cannot be read, or speak of another block or job.
        """
        path = commit_path(self.entry.id, self.block)
        raw = self.store.read(path)
        try:
            commit = load_json(Commit, raw, self.store.url_of(path))
        except ValueError as error:
            raise self.damaged(path, f"cannot be read: {error}") from error
        content: CommitContent = commit.content
        told = (content.pass_id, content.block, content.fingerprint)
        if told != (self.entry.id, self.block, self.entry.fingerprint):
            raise self.damaged(path, "speaks of another block or job")
        return raw, commit

    def check_names(self, content: CommitContent, paths: Iterable[str]) -> None:
        """Raises DamagedBlock where the commit does not name an object."""
        for path in paths:
            if path not in content.objects:
                raise self.damaged(path, "is not in its commit")

    def read(self, content: CommitContent, path: str) -> bytes:
        """Returns an object's bytes, which are those that were committed.

        Raises:
            DamagedBlock: they are not.
        """
        size, crc = content.objects[path]
        data = self.store.read_or_none(path, size)
        if data is None:
            raise self.damaged(path, "is missing")
        if len(data) != size:
            raise self.damaged(path, f"has {len(data)} bytes, its commit says {size}")
        if not has_crc32c([data], crc):
            raise self.damaged(path, "has another crc32c than its commit says")
        return data

    def damaged(self, path: str, why: str) -> DamagedBlock:
        """Returns the error for an object of it that is not what was committed."""
        return DamagedBlock(
            f"pass {self.entry.id} block {self.block}: {self.store.url_of(path)} {why}"
        )


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
    block = SourceBlock(source, task.part.source, task.source)
    raw, commit = block.read_commit()
    there = block_objects(entry, task.target)
    paths = dict(zip(there, block_objects(entry, task.source), strict=True))
    content = commit.content
    block.check_names(content, paths.values())
    objects = {path: content.objects[paths[path]] for path in there}
    if task.is_committed and all(
        held.get(path) == size for path, (size, _) in objects.items()
    ):
        return BlockCopied(held_objects=len(objects))
    num_copied = num_bytes = 0
    for path, (size, crc) in objects.items():
        if _is_held(destination, path, size, crc, held):
            continue
        destination.replace(path, block.read(content, paths[path]))
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
