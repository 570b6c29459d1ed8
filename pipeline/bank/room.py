"""Whether an export fits where it is to go, known before its first byte is written."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

from manifests.bank import BankRecord
from manifests.errors import BankError
from manifests.storage import Store
from pipeline.bank.arrays import ArraySpec
from pipeline.bank.commits import read_blocks
from pipeline.bank.pass_parts import PassPart
from pipeline.bank.record import FEATURES
from pipeline.bank.selection import BankPart


def check_room(
    source: Store, record: BankRecord, destination: Store, part: BankPart
) -> None:
    """Raises BankError where a destination has less room than the part still takes.

    Of a store that does not say what is free nothing is known, and nothing is refused.

    Args:
        source: the bank's.
        record: its record.
        destination: where it is to go; what it has already takes no more room.
        part: what goes there.
    """
    free = destination.free_bytes()
    if free is None or record.state is None:
        return
    needed = part_bytes(source, record, part)
    needed -= sum(size for _, size in destination.list(""))
    if needed > free:
        raise BankError(
            f"destination {destination.url} must have room for about "
            f"{needed / 2**20:,.0f} MiB, got {free / 2**20:,.0f} MiB free; free some, "
            "choose another place, or export less"
        )


def part_bytes(source: Store, record: BankRecord, part: BankPart) -> int:
    """Returns the bytes of a part's objects: exact where they are copied whole.

    Chosen rows take their share of their blocks; an output that is encoded anew counts
    as if nothing were compressed. Blocks that are newer than the last finalise are not
    counted.
    """
    rows = Counter[int]()
    for block in part.blocks(record.block_rows):
        for piece in block.pieces:
            rows[piece.block] += len(piece.rows)
    sizes = {one.source.id: _Sizes(one) for one in part.passes}
    table = read_blocks(source)
    total = 0.0
    columns = (table[c].to_pylist() for c in ("pass", "block", "rows"))
    lists = (table[c].to_pylist() for c in ("objects", "size_bytes"))
    for name, block, held, paths, lengths in zip(*columns, *lists, strict=True):
        if name in sizes and rows[block]:
            stored = dict(zip(paths, lengths, strict=True))
            total += sizes[name].of_block(stored, rows[block], held)
    return round(total)


class _Sizes:
    """Bytes that the blocks of a pass take in the part."""

    def __init__(self, part: PassPart) -> None:
        self._views = part.target.views
        self._has_outputs = bool(part.target.outputs)
        self._copied: dict[str, bool] = {}
        self._row_bytes = 0
        for output in part.target.outputs:
            specs = [ArraySpec.from_json(data) for data in output.arrays]
            if (output.size, output.name) in part.encodings:
                self._row_bytes += sum(spec.row_bytes for spec in specs)
            else:
                self._copied |= {f"{FEATURES}/{s.path}": s.has_view for s in specs}

    def of_block(self, stored: Mapping[str, int], rows: int, held: int) -> float:
        """Returns the bytes of some rows of a block with these objects."""
        share = rows / held
        if not self._has_outputs:
            return share * sum(stored.values())
        found = self._row_bytes * rows * len(self._views)
        return found + share * sum(
            size for path, size in stored.items() if self._is_kept(path)
        )

    def _is_kept(self, path: str) -> bool:
        array, _, numbers = path.rpartition("/c.")
        if not self._copied.get(array):
            return array in self._copied
        return int(numbers.split(".")[1]) in self._views
