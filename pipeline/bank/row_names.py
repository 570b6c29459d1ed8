"""What names a row in any bank of the same data: its shard and key.

Owns lists of keys, and the hash of (shard, key) by which shares of rows are drawn, for
training and for exporting alike: a share of the rows is the same samples in both.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Sequence

import numpy as np
import numpy.typing as npt

from manifests.errors import BankError
from manifests.storage import read_url

_END = 2**64

Keys = Sequence[str] | npt.NDArray[np.object_]


def row_places(shard: str, keys: Keys, seed: int = 0) -> npt.NDArray[np.uint64]:
    """Returns (n,) where in [0, 2**64) the hash of each row puts it.

    Args:
        shard: name of the shard that the rows come from.
        keys: of each row.
        seed: another one gives other places.
    """
    lead = f"{shard}\0" if not seed else f"{seed}\0{shard}\0"
    found = np.empty(len(keys), np.uint64)
    for number, key in enumerate(keys):
        word = hashlib.blake2b(f"{lead}{key}".encode(), digest_size=8).digest()
        found[number] = int.from_bytes(word, "little")
    return found


def lies_in(
    places: npt.NDArray[np.uint64], low: float, high: float
) -> npt.NDArray[np.bool_]:
    """Returns (n,) which places lie in [low, high), shares of 1."""
    first, end = round(low * _END), round(high * _END)
    inside = places >= np.uint64(first)
    return inside & (places < np.uint64(end)) if end < _END else inside


class KeyList:
    """Keys, one a line, as KEY or SHARD<tab>KEY.

    Attributes:
        lines: without empty ones and repeats.
        where: it was read from.
    """

    def __init__(self, lines: Collection[str], where: str) -> None:
        self.lines = frozenset(line.strip() for line in lines) - {""}
        self.where = where
        self._met: dict[str, set[str]] = {}

    @classmethod
    def read(cls, url: str) -> KeyList:
        """Returns the list in a file.

        Raises:
            BankError: it is not text.
            StorageError: it cannot be read.
        """
        try:
            return cls(read_url(url).decode("utf-8-sig").splitlines(), url)
        except UnicodeDecodeError as error:
            raise BankError(
                f"keys must be UTF-8 text, a key a line, got other bytes ({url}: "
                f"{error}); write the list anew"
            ) from error

    @property
    def sha256(self) -> str:
        """Digest of the lines, whatever their order."""
        return hashlib.sha256("\n".join(sorted(self.lines)).encode()).hexdigest()

    def matches(self, shard: str, keys: Keys) -> npt.NDArray[np.bool_]:
        """Returns (n,) which rows of a shard it names, and remembers what it met."""
        found = np.zeros(len(keys), np.bool_)
        for number, key in enumerate(keys):
            for line in {str(key), f"{shard}\t{key}"} & self.lines:
                found[number] = True
                self._met.setdefault(line, set()).add(shard)
        return found

    def unmet(self) -> list[str]:
        """Returns the lines that named no row so far, sorted."""
        return sorted(self.lines - self._met.keys())

    def ambiguous(self) -> list[tuple[str, list[str]]]:
        """Returns bare keys that named rows of several shards, with those shards."""
        return sorted(
            (line, sorted(shards))
            for line, shards in self._met.items()
            if len(shards) > 1
        )
