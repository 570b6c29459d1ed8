"""What an export has to do, block by block, and doing a few of them at a time."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor

from manifests.bank import BankRecord
from manifests.storage import Store
from pipeline.bank.block_copy import BlockCopied, BlockTask, DamagedBlock, copy_block
from pipeline.bank.commits import list_commits
from pipeline.bank.row_copy import RowsTask, copy_rows, task_bytes
from pipeline.bank.selection import BankPart

_THREADS = 8
_MEMORY = 2**30

Task = BlockTask | RowsTask


def tasks_of(
    part: BankPart,
    source: BankRecord,
    destination: Store,
    committed: Mapping[str, set[int]],
) -> list[Task]:
    """Returns the blocks of a part that the source has all rows of.

    Args:
        part: what is exported.
        source: the source's record.
        destination: where to.
        committed: blocks that the source has, by pass.
    """
    blocks = list(part.blocks(source.block_rows))
    found: list[Task] = []
    for one in part.passes:
        there = list_commits(destination, one.target.id)
        held = committed[one.source.id]
        is_moved_whole = part.rows is None and not one.encodings
        for block in blocks:
            if not all(piece.block in held for piece in block.pieces):
                continue
            is_there = block.block in there
            if is_moved_whole:
                number = block.pieces[0].block
                found.append(BlockTask(one, number, block.block, is_there))
            else:
                found.append(RowsTask(one, block, is_there))
    return found


def num_threads(part: BankPart, source: BankRecord) -> int:
    """Returns how many blocks are made at a time: in 1 GiB where rows are moved."""
    made = [one for one in part.passes if one.encodings or part.rows is not None]
    each = task_bytes(made, source.block_rows, part.record.block_rows)
    return max(1, min(_THREADS, _MEMORY // max(1, each)))


def run_tasks(
    source: Store,
    destination: Store,
    tasks: Iterable[Task],
    held: Mapping[str, int],
    threads: int,
) -> Iterator[BlockCopied | DamagedBlock]:
    """Yields what each task gave, in order; a few are under way at a time.

    Args:
        source: the bank to copy from.
        destination: the one to copy to, locked.
        tasks: blocks.
        held: size of every object that the destination has.
        threads: how many at a time.

    Raises:
        StorageError: a store failed.
    """

    def run(task: Task) -> BlockCopied | DamagedBlock:
        try:
            if isinstance(task, BlockTask):
                return copy_block(source, destination, task, held)
            return copy_rows(source, destination, task, held)
        except DamagedBlock as error:
            return error

    pending: deque[Future[BlockCopied | DamagedBlock]] = deque()
    with ThreadPoolExecutor(threads) as pool:
        try:
            for task in tasks:
                pending.append(pool.submit(run, task))
                if len(pending) == 4 * threads:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:
            for future in pending:
                future.cancel()
