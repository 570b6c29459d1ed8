"""How far apart the decoded values of two banks are, and whether their bytes are sound.

Reads every byte that is compared, once per bank; outputs that are stored differently
are compared by what they decode to. Four objects of each bank are in memory at a time.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from manifests.errors import BankError
from manifests.storage import Store
from pipeline.bank.arrays import ArraySpec, object_name
from pipeline.bank.diff import (
    Contents,
    Diff,
    ObjectPair,
    Side,
    common_outputs,
    common_shards,
    common_views,
)
from pipeline.bank.objects import has_crc32c
from pipeline.bank.open import Bank
from pipeline.bank.places import FEATURES

_THREADS = 4
_PIECE_VALUES = 2**20


@dataclass
class ValueDifference:
    """How far apart two banks' values of one output are.

    Attributes:
        output: its path.
        blocks: blocks of views that were compared: those whose bytes differ.
        vectors: vectors along the last axis that both have.
        cosine_least: of a vector and its other.
        largest_error: of a value, absolute.
        only_a: vectors that A alone has: missing in B.
        only_b: vectors that B alone has.
    """

    output: str
    blocks: int = 0
    vectors: int = 0
    cosine_least: float = 1.0
    largest_error: float = 0.0
    only_a: int = 0
    only_b: int = 0
    _cosine_sum: float = 0.0

    @property
    def cosine_mean(self) -> float | None:
        """Mean cosine; None where no vector is in both."""
        return self._cosine_sum / self.vectors if self.vectors else None

    def to_json(self) -> dict[str, Any]:
        """Returns it as JSON values."""
        fields = {k: v for k, v in asdict(self).items() if not k.startswith("_")}
        return {**fields, "cosine_mean": self.cosine_mean}

    def add(self, a: npt.NDArray[np.float32], b: npt.NDArray[np.float32]) -> None:
        """Adds one block of one view.

        Args:
            a: (rows, ..., C) float32 of A; NaN is missing.
            b: the same of B.
        """
        self.blocks += 1
        channels = a.shape[-1]
        rows = max(1, _PIECE_VALUES // channels)
        flat_a, flat_b = a.reshape(-1, channels), b.reshape(-1, channels)
        for start in range(0, len(flat_a), rows):
            piece = slice(start, start + rows)
            self._add_vectors(flat_a[piece], flat_b[piece])

    def _add_vectors(
        self, a_NC: npt.NDArray[np.float32], b_NC: npt.NDArray[np.float32]
    ) -> None:
        has_a, has_b = (~np.isnan(one).any(axis=1) for one in (a_NC, b_NC))
        self.only_a += int((has_a & ~has_b).sum())
        self.only_b += int((has_b & ~has_a).sum())
        both = has_a & has_b
        if not both.any():
            return
        a, b = a_NC[both].astype(np.float64), b_NC[both].astype(np.float64)
        lengths = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
        equal = (a == b).all(axis=1)
        # A vector of zeros has no direction: it is at 1 to itself and at 0 to others.
        safe = np.where(lengths > 0, lengths, 1.0)
        cosine = np.where(equal, 1.0, np.clip((a * b).sum(axis=1) / safe, -1.0, 1.0))
        self.vectors += len(cosine)
        self._cosine_sum += float(cosine.sum())
        self.cosine_least = min(self.cosine_least, float(cosine.min()))
        self.largest_error = max(self.largest_error, float(np.abs(a - b).max()))


@dataclass(frozen=True)
class BytesRead:
    """What reading every byte of two banks showed.

    Attributes:
        different: pairs of objects whose bytes differ, whatever was committed.
        damaged: by bank, objects whose bytes are not those that were committed.
    """

    different: tuple[ObjectPair, ...]
    damaged: Mapping[Side, tuple[str, ...]]

    @property
    def is_same(self) -> bool:
        """Whether all bytes are equal and what was committed."""
        return not self.different and not any(self.damaged.values())


def read_bytes(
    found: Diff, a: tuple[Store, Contents], b: tuple[Store, Contents]
) -> BytesRead:
    """Returns which of the objects that both banks have differ or are damaged.

    Objects that are gone or cut are left out; ``found.missing`` names them.

    Args:
        found: what differs by the records.
        a: store and contents of A.
        b: store and contents of B.
    """
    gone = {side: set(one.objects) for side, one in found.missing.items()}
    pairs = [
        pair
        for pair in found.objects
        if pair.path_a not in gone["A"] and pair.path_b not in gone["B"]
    ]

    def read(pair: ObjectPair) -> tuple[bool, bool, bool]:
        (store_a, in_a), (store_b, in_b) = a, b
        data_a, data_b = store_a.read(pair.path_a), store_b.read(pair.path_b)
        return (
            data_a != data_b,
            not _is_as_committed(data_a, in_a.objects[pair.path_a]),
            not _is_as_committed(data_b, in_b.objects[pair.path_b]),
        )

    different: list[ObjectPair] = []
    damaged: dict[Side, list[str]] = {"A": [], "B": []}
    with ThreadPoolExecutor(_THREADS) as pool:
        for pair, (differs, is_bad_a, is_bad_b) in zip(
            pairs, pool.map(read, pairs), strict=True
        ):
            if differs:
                different.append(pair)
            if is_bad_a:
                damaged["A"].append(pair.path_a)
            if is_bad_b:
                damaged["B"].append(pair.path_b)
    return BytesRead(
        tuple(different), {side: tuple(paths) for side, paths in damaged.items()}
    )


def _is_as_committed(data: bytes, told: tuple[int, int]) -> bool:
    return len(data) == told[0] and has_crc32c([data], told[1])


def value_differences(
    found: Diff, read: BytesRead, a: tuple[Store, Contents], b: tuple[Store, Contents]
) -> Iterator[ValueDifference]:
    """Yields how far apart values are, for each output that does not have equal bytes.

    Only outputs of one kind and shape can be compared, and not which points an output
    is of (``points_index``). Objects that cannot be read are left out.

    Args:
        found: what differs by the records.
        read: what reading the bytes showed.
        a: store and contents of A.
        b: store and contents of B.
    """
    (store_a, in_a), (store_b, in_b) = a, b
    banks = Bank(store_a, in_a.record), Bank(store_b, in_b.record)
    different = {pair.path_a for pair in read.different}
    equal = {pair.path_a for pair in found.objects} - different
    for path, mine, theirs in common_outputs(in_a.record, in_b.record):
        if mine.kind in ("index", "image") or (mine.kind, mine.shape) != (
            theirs.kind,
            theirs.shape,
        ):
            continue
        result = ValueDifference(path)
        specs = [ArraySpec.from_json(data) for data in mine.arrays]
        for shard, other in common_shards(in_a.record, in_b.record):
            for number in range(shard.blocks):
                blocks = shard.first_block + number, other.first_block + number
                for view in common_views(in_a.record, in_b.record, path):
                    names = {
                        f"{FEATURES}/{object_name(spec, blocks[0], view)}"
                        for spec in specs
                    }
                    if names <= equal:
                        continue
                    try:
                        values = [
                            bank.read(path, block, view)
                            for bank, block in zip(banks, blocks, strict=True)
                        ]
                    except BankError:
                        continue
                    result.add(*values)
        if result.blocks:
            yield result
