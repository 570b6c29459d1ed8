"""Which rows of a bank an export takes: by key, by fraction, by condition.

Read from the bank's index, a part of 2**20 rows at a time; what is kept is the numbers
of the rows that were chosen.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from manifests.bank import BankRecord, ShardEntry
from manifests.errors import BankError
from manifests.exported import Selection
from manifests.storage import Store
from pipeline.bank import layout
from pipeline.bank.row_filter import Condition
from pipeline.bank.row_index import num_index_parts, read_index_part
from pipeline.bank.row_names import KeyList, lies_in, row_places
from pipeline.sizing import MAX_PADDING, padding

Int64s = npt.NDArray[np.int64]

# With many blocks for one of the source, its objects would be read as many times.
_LEAST_SHARE = 4


def choose_rows(
    store: Store,
    record: BankRecord,
    shards: Sequence[ShardEntry],
    selection: Selection,
    keys: KeyList | None,
    conditions: Sequence[Condition],
) -> dict[str, Int64s]:
    """Returns the rows within each shard that a selection means, ascending.

    Args:
        store: the bank's.
        record: its record.
        shards: those whose rows are asked for.
        selection: its fraction and seed.
        keys: the list of keys, if there is one.
        conditions: that each row meets.

    Raises:
        BankError: the bank was not finalised with all its shards; a key is in none of
            them, or in several; or no row is left.
    """
    if record.state is None:
        raise _not_finalised(store)
    starts = np.asarray([one.first_block for one in record.shards if one.blocks])
    owners = [one for one in record.shards if one.blocks]
    wanted = {one.name for one in shards}
    chosen: dict[str, list[Int64s]] = {}
    num_seen = 0
    for part in range(num_index_parts(record)):
        table = read_index_part(store, part)
        expressions = [one.expression(table.schema) for one in conditions]
        meets = _meets(table, expressions)
        blocks = table["block"].to_numpy()
        places = np.searchsorted(starts, blocks, side="right") - 1
        # Lines are in row order: those of a shard follow each other.
        for place, first, count in zip(
            *(one.tolist() for one in np.unique(places, True, return_counts=True)),
            strict=True,
        ):
            shard = owners[place]
            if shard.name not in wanted:
                continue
            num_seen += count
            held = table.select(["key", "row"]).slice(first, count)
            found = held["row"].to_numpy() - shard.first_block * record.block_rows
            is_kept = meets[first : first + count]
            is_kept &= _named(shard.name, held["key"].to_pylist(), selection, keys)
            chosen.setdefault(shard.name, []).append(found[is_kept])
    if num_seen != sum(one.samples for one in shards):
        raise _not_finalised(store)
    if keys is not None:
        _check_keys(keys)
    rows = {name: np.concatenate(found) for name, found in chosen.items()}
    rows = {name: one for name, one in rows.items() if len(one)}
    if not rows:
        raise BankError(
            "selection must leave a row, got none; widen the keys, the fraction or "
            "the conditions"
        )
    return rows


def _not_finalised(store: Store) -> BankError:
    return BankError(
        f"bank {store.url} must be finalised for rows to be chosen from its index; "
        "run `teachonce finalise` on it, or its job again"
    )


def _meets(table: pa.Table, expressions: Sequence[object]) -> npt.NDArray[np.bool_]:
    """Returns (n,) which lines of the index meet every expression."""
    numbered = table.append_column("line", pa.array(np.arange(table.num_rows)))
    for expression in expressions:
        numbered = numbered.filter(expression)
    found = np.zeros(table.num_rows, np.bool_)
    found[numbered["line"].to_numpy()] = True
    return found


def _named(
    shard: str, names: Sequence[str], selection: Selection, keys: KeyList | None
) -> npt.NDArray[np.bool_]:
    found = np.ones(len(names), np.bool_)
    if keys is not None:
        found &= keys.matches(shard, names)
    if selection.fraction is not None:
        places = row_places(shard, names, selection.seed)
        found &= lies_in(places, 0.0, selection.fraction)
    return found


def _check_keys(keys: KeyList) -> None:
    if unmet := keys.unmet():
        more = f" and {len(unmet) - 1:,} more" if len(unmet) > 1 else ""
        raise BankError(
            f"keys must be keys of the bank's shards that are exported, got "
            f"{unmet[0]!r}{more} ({keys.where})"
        )
    if ambiguous := keys.ambiguous():
        key, shards = ambiguous[0]
        raise BankError(
            f"keys must name one sample each, got {key!r}, which is in "
            f"{', '.join(shards[:3])} ({keys.where}); write SHARD<tab>KEY, a line for "
            "each that is meant"
        )


def rows_digest(rows: Int64s) -> str:
    """Returns the digest of numbers of rows that a part's record keeps."""
    return hashlib.sha256(rows.astype("<i8").tobytes()).hexdigest()


def part_block_rows(record: BankRecord, rows: Mapping[str, Int64s]) -> int:
    """Returns the rows of a block of a part that holds some rows of each shard.

    At most the source's and what the largest shard needs; the largest that pads at most
    15 %, or the one that pads least, of those down to a quarter of that: with smaller
    ones each object of the source would be read many times. Whole chunks of the source
    where a block has several, so that those of the part are as large.

    Args:
        record: the source's.
        rows: chosen rows by shard.
    """
    sizes = [len(one) for one in rows.values()]
    most = min(record.block_rows, max(sizes))
    chunks = {spec.chunk_rows for spec in layout.feature_arrays(record)}
    unit = math.lcm(*(chunks - {record.block_rows}))
    if unit > most:
        unit = 1
    last = -(-most // unit) * unit
    least = max(unit, last // _LEAST_SHARE // unit * unit)
    candidates = range(last, least - 1, -unit)
    for size in candidates:
        if padding(size, sizes) <= MAX_PADDING + 1e-9:
            return size
    return min(candidates, key=lambda size: (padding(size, sizes), -size))
