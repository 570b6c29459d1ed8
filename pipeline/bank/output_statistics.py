"""Statistics of every output, from a deterministic sample of rows read back.

No extra pass of a teacher and nothing in the data flow: equal banks give equal bytes,
whatever ran them. Taken from view 0, valid rows only.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping

import numpy as np

from manifests.bank import BankRecord, OutputEntry, PassEntry
from manifests.storage import Store
from pipeline.bank import layout, statistics
from pipeline.bank.arrays import ArraySpec, object_name
from pipeline.bank.commits import read_commits
from pipeline.bank.encodings import encoding_from_json
from pipeline.bank.objects import decode_object
from pipeline.bank.places import FEATURES
from pipeline.bank.statistic_arrays import statistic_objects, statistics_of

# A small sample is kept for its second look; a large one is read again.
KEPT_BYTES = 64 * 2**20


class OutputSample:
    """The vectors of one output that its statistics are made of; iterated as often as
    needed, in row order.
    """

    def __init__(
        self,
        store: Store,
        output: OutputEntry,
        view: int,
        blocks: np.ndarray,
        valid: np.ndarray,
    ) -> None:
        """Takes (blocks,) committed blocks and their (blocks, block_rows) validity."""
        self._store = store
        self._encoding = encoding_from_json(output.encoding)
        self._specs = [ArraySpec.from_json(data) for data in output.arrays]
        self._output = output
        self._view = view
        self._blocks = blocks
        self._valid = valid
        is_vector = output.kind == "vector"
        limit = statistics.NUM_VECTORS if is_vector else statistics.NUM_GRID_ROWS
        rows = min(spec.chunk_rows for spec in self._specs)
        self._chunk_rows = rows
        self._chunks = statistics.choose_chunks(valid, rows, limit)

    def __iter__(self) -> Iterator[np.ndarray]:
        """Yields (n, channels) float32, a chunk of rows at a time."""
        data: dict[str, bytes] = {}
        current = -1
        for position, chunk in self._chunks:
            block = int(self._blocks[position])
            if position != current:
                data = {
                    spec.path: self._store.read(
                        f"{FEATURES}/{object_name(spec, block, self._view)}"
                    )
                    for spec in self._specs
                }
                current = position
            rows = slice(chunk * self._chunk_rows, (chunk + 1) * self._chunk_rows)
            stored = {
                suffix: decode_object(data[spec.path], spec, rows=rows)
                for suffix, spec in zip(
                    self._encoding.suffixes, self._specs, strict=True
                )
            }
            keep = self._valid[position][rows]
            values = self._encoding.decode(stored)[keep]
            if self._output.kind != "vector":
                numbers = (
                    block * self._valid.shape[1] + rows.start + np.flatnonzero(keep)
                )
                yield _cells(values, numbers)
            else:
                yield values


def _cells(values: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Returns the chosen cells of (n, ..., C) as (n * cells, C), missing ones left out.

    Cells of a grid, of all frames, or points.
    """
    count, channels = values.shape[0], values.shape[-1]
    flat = values.reshape(count, -1, channels)
    chosen = statistics.choose_cells(rows.astype(np.int64), flat.shape[1])
    picked: np.ndarray = np.take_along_axis(flat, chosen[:, :, None], axis=1)
    cells = picked.reshape(-1, channels)
    is_missing = np.isnan(cells[:, 0])
    return cells[~is_missing] if is_missing.any() else cells


def compute(
    sample: Iterable[np.ndarray], channels: int, covariance: bool
) -> dict[str, np.ndarray]:
    """Returns mean, variance, covariance, mean direction, dispersion and count.

    Args:
        sample: (n, channels) float32 each; gone through twice.
        channels: of the output.
        covariance: whether all second moments are kept.
    """
    moments = statistics.Moments(channels, covariance=covariance)
    kept: list[np.ndarray] | None = []
    kept_bytes = 0
    for vectors in sample:
        moments.update(vectors)
        kept_bytes += vectors.nbytes
        if kept is not None:
            kept.append(vectors)
            if kept_bytes > KEPT_BYTES:
                kept = None
    total, count = 0.0, 0
    direction = moments.mean_direction
    if np.isfinite(direction).all():
        for vectors in sample if kept is None else kept:
            angles, num = statistics.angle_dispersion(vectors, direction)
            total, count = total + angles, count + num
    dispersion = total / count if count else math.nan
    return dict(moments.to_arrays(dispersion))


def write_statistics(
    store: Store, record: BankRecord, committed: Mapping[str, set[int]]
) -> None:
    """Writes ``<level>/stats/<output>_<what>`` for outputs that decode to vectors.

    Only for the holder of the bank's lock.
    """
    live = set(record.live_blocks)
    masks: dict[str, tuple[np.ndarray, np.ndarray]] = {}
    for path, entry, output in layout.outputs(record):
        if not statistics_of(output):
            continue
        if entry.id not in masks:
            masks[entry.id] = _valid_rows(store, record, entry, committed, live)
        blocks, valid = masks[entry.id]
        sample = OutputSample(store, output, entry.first_view, blocks, valid)
        write_statistics_of(store, path, output, sample)


def write_statistics_of(
    store: Store, path: str, output: OutputEntry, sample: Iterable[np.ndarray]
) -> None:
    """Writes the statistics of one output.

    Args:
        store: the bank's.
        path: of the output inside ``features.zarr``.
        output: its entry.
        sample: (n, channels) float32 each; gone through twice.
    """
    level, _, name = path.rpartition("/")
    covariance = "covariance" in statistics_of(output)
    found = compute(sample, output.shape[-1], covariance)
    for what, values in found.items():
        for key, data in statistic_objects(name, values).items():
            store.replace(f"{FEATURES}/{level}/stats/{name}_{what}/{key}", data)


def _valid_rows(
    store: Store,
    record: BankRecord,
    entry: PassEntry,
    committed: Mapping[str, set[int]],
    live: set[int],
) -> tuple[np.ndarray, np.ndarray]:
    blocks = sorted(committed[entry.id] & live)
    valid = np.zeros((len(blocks), record.block_rows), np.bool_)
    for number, content in enumerate(read_commits(store, entry.id, blocks)):
        valid[number, : content.rows] = True
        for rows in content.invalid.values():
            valid[number, list(rows)] = False
    return np.asarray(blocks, np.int64), valid
