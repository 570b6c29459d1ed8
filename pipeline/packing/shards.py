"""Writing shards: where they lie, when one is full, and that none looks whole too soon.

Shards are written under temporary names and take their own when all are whole, so that
a run that was killed leaves none that a pattern matches. Equal samples give equal
bytes: members carry no times, owners or machine.
"""

from __future__ import annotations

import glob
import os
import re
import uuid
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, BinaryIO, cast

from webdataset.writer import TarWriter

from manifests.storage import explain, glob_url, is_local, split_url
from pipeline.errors import PipelineError
from pipeline.samples.tar import BLOCK, padded

_FIELD = re.compile(r"\{(?::(\d*)d?)?\}|%(\d*)d")
_PART = ".part"
# Names of up to 100 characters; a longer one has an extension header of two blocks.
_SHORT_NAME = 100


@dataclass(frozen=True)
class ShardNames:
    """Names of numbered shards on any fsspec URL.

    Attributes:
        before: everything before the number.
        digits: at least so many, with zeros in front.
        after: everything behind it.
    """

    before: str
    digits: int
    after: str

    @classmethod
    def parse(cls, destination: str, prefix: str) -> ShardNames:
        """Returns the names of a pattern, or of a folder and a prefix.

        Args:
            destination: ``out/train-{:05d}.tar``, ``out/train-%05d.tar``, or a folder.
            prefix: of names in a folder.

        Raises:
            PipelineError: a name of a shard without a number, or with several.
        """
        fields = list(_FIELD.finditer(destination))
        if not fields and not destination.lower().endswith(".tar"):
            folder = destination.rstrip("/")
            return cls(f"{folder}/{prefix}-", 5, ".tar")
        if len(fields) != 1 or not destination.endswith(".tar"):
            raise PipelineError(
                "DEST must be a folder, or a name with one number such as "
                f"out/train-{{:05d}}.tar, got {destination}; write it so"
            )
        (found,) = fields
        digits = found[1] or found[2] or "1"
        before, after = destination[: found.start()], destination[found.end() :]
        if "/" in after:
            raise PipelineError(
                f"the number of a shard must stand in its name, got {destination}; "
                "keep all shards in one folder"
            )
        return cls(before, int(digits), after)

    @property
    def folder(self) -> str:
        """Where they lie."""
        return self.before.rpartition("/")[0] or "."

    def url(self, number: int) -> str:
        """Returns the URL of one shard."""
        return f"{self.before}{number:0{self.digits}d}{self.after}"

    def pattern(self, count: int) -> str:
        """Returns the pattern that so many shards have in a job."""
        if count == 1:
            return self.url(0)
        digits = max(self.digits, len(str(count - 1)))
        if digits > self.digits:
            return f"{self.before}{{0..{count - 1}}}{self.after}"
        numbers = f"{0:0{digits}d}..{count - 1:0{digits}d}"
        return f"{self.before}{{{numbers}}}{self.after}"

    def existing(self) -> list[str]:
        """Returns the URLs of shards of such names that are there."""
        return [url for url in self._matches("") if self._is_shard(url)]

    def leftovers(self) -> list[str]:
        """Returns temporary files of runs that were killed, or are still at work."""
        return self._matches(f".*{_PART}")

    def _matches(self, behind: str) -> list[str]:
        return glob_url(f"{glob.escape(self.before)}*{glob.escape(self.after)}{behind}")

    def _is_shard(self, url: str) -> bool:
        start = self.before.rpartition("/")[2]
        name = url.rpartition("/")[2]
        number = name.removeprefix(start).removesuffix(self.after)
        return name.startswith(start) and number.isdecimal()


@dataclass(frozen=True)
class ShardLimit:
    """When a shard is full; at least one sample is in each.

    Attributes:
        samples: of a shard; None for as many as there is room for.
        num_bytes: of a shard; None for any number.
    """

    samples: int | None = None
    num_bytes: int | None = None

    def __post_init__(self) -> None:
        if any(one is not None and one < 1 for one in (self.samples, self.num_bytes)):
            raise PipelineError(
                f"a shard must hold at least 1 sample or byte, got {self.samples} "
                f"samples, {self.num_bytes} bytes; give more"
            )

    def is_full(self, samples: int, num_bytes: int, more_bytes: int) -> bool:
        """Returns whether a sample of so many bytes more goes into the next shard."""
        too_many = self.samples is not None and samples >= self.samples
        too_large = (
            self.num_bytes is not None and num_bytes + more_bytes > self.num_bytes
        )
        return samples > 0 and (too_many or too_large)


class ShardsWriter:
    """Shards in the making; a context manager, after which they are there or gone.

    Attributes:
        samples: number by shard, in order.
        num_bytes: by shard.
        num_members: by extension.
    """

    def __init__(
        self, names: ShardNames, limit: ShardLimit, overwrite: bool = False
    ) -> None:
        """Takes where shards go, when one is full, and whether others give way."""
        self.samples: list[int] = []
        self.num_bytes: list[int] = []
        self.num_members: dict[str, int] = {}
        self._names = names
        self._limit = limit
        self._overwrite = overwrite
        self._fs, _ = split_url(names.url(0))
        self._is_local = is_local(names.url(0))
        self._files: list[str] = []
        self._token = uuid.uuid4().hex[:8]
        self._file: BinaryIO | None = None
        self._tar: Any = None

    def __enter__(self) -> ShardsWriter:
        self.check_free()
        if self._is_local:
            folder = self._path(self._names.folder)
            try:
                os.makedirs(folder, exist_ok=True)
            except OSError as error:
                raise explain(error, "write", folder) from error
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        is_published = False
        try:
            self._close()
            if kind is None:
                self._publish()
                is_published = True
        finally:
            if not is_published:
                self._remove(self._part_of(url) for url in self._urls())

    def check_free(self) -> None:
        """Checks that nothing is overwritten unasked.

        Raises:
            PipelineError: there are shards of such names.
        """
        there = self._names.existing()
        if there and not self._overwrite:
            raise PipelineError(
                f"DEST must hold no shards of that name, got {len(there)} "
                f"({there[0]}); choose another name, or --overwrite"
            )

    def write(self, key: str, members: Mapping[str, bytes]) -> None:
        """Writes a sample behind the others, in a new shard where the last is full."""
        size = sum(_tar_bytes(f"{key}.{name}", data) for name, data in members.items())
        if self._tar is None or self._limit.is_full(
            self.samples[-1], self.num_bytes[-1], size
        ):
            self._open_next()
        try:
            self._tar.write({"__key__": key, **members})
        except OSError as error:
            raise explain(error, "write", self._part(len(self.samples) - 1)) from error
        self.samples[-1] += 1
        self.num_bytes[-1] += size
        for name in members:
            self.num_members[name] = self.num_members.get(name, 0) + 1

    def add_file(self, name: str, data: bytes) -> None:
        """Lays a file beside the shards; it appears with them, over what is there."""
        url = f"{self._names.folder}/{name}"
        self._files.append(url)
        try:
            self._fs.pipe_file(self._path(self._part_of(url)), data)
        except Exception as error:
            raise explain(error, "write", url) from error

    def _part(self, number: int) -> str:
        return self._part_of(self._names.url(number))

    def _part_of(self, url: str) -> str:
        return f"{url}.{self._token}{_PART}"

    def _open_next(self) -> None:
        self._close()
        self.samples.append(0)
        self.num_bytes.append(0)
        url = self._part(len(self.samples) - 1)
        try:
            self._file = cast(BinaryIO, self._fs.open(self._path(url), "wb"))
        except Exception as error:
            raise explain(error, "write", url) from error
        self._tar = TarWriter(
            self._file, user="", group="", mode=0o644, encoder=False, mtime=0
        )

    def _close(self) -> None:
        if self._tar is None or self._file is None:
            return
        url = self._part(len(self.samples) - 1)
        try:
            self._tar.close()
            self.num_bytes[-1] = self._file.tell()
            self._file.close()
        except Exception as error:
            raise explain(error, "write", url) from error
        finally:
            self._file = self._tar = None

    def _urls(self) -> list[str]:
        """Returns what is being written, shards last."""
        shards = (self._names.url(number) for number in range(len(self.samples)))
        return [*self._files, *shards]

    def _publish(self) -> None:
        self.check_free()
        kept = {self._key(url) for url in self._urls()}
        stale = [one for one in self._names.existing() if self._key(one) not in kept]
        for url in self._urls():
            part = self._part_of(url)
            try:
                if self._is_local:
                    os.replace(self._path(part), self._path(url))
                else:
                    self._fs.mv(self._path(part), self._path(url))
            except Exception as error:
                raise explain(error, "write", url) from error
        # Shards of a larger set that was there before would join this one.
        self._remove(stale)

    def _remove(self, urls: Iterable[str]) -> None:
        for url in urls:
            path = self._path(url)
            try:
                if self._is_local:
                    os.unlink(path)
                elif self._fs.exists(path):
                    self._fs.rm_file(path)
            except FileNotFoundError:
                continue
            except Exception as error:
                raise explain(error, "delete", url) from error

    def _path(self, url: str) -> str:
        return split_url(url)[1]

    def _key(self, url: str) -> str:
        path = self._path(url)
        return os.path.abspath(path) if self._is_local else path


def _tar_bytes(name: str, data: bytes) -> int:
    """Returns what a member takes in a tar, headers and padding included."""
    is_short = name.isascii() and len(name) <= _SHORT_NAME
    return BLOCK * (1 if is_short else 3) + padded(len(data))
