"""What goes into a shard as one sample, what it may be called, and in which order.

Keys and members follow WebDataset: a member's name is the key, a dot and the extension,
cut at the first dot of the base name.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from pipeline.errors import PipelineError
from pipeline.samples.names import refuse_name


class MadePart(Protocol):
    """A member that is made when it is written."""

    def read(self) -> bytes:
        """Returns its bytes; raises StorageError where they cannot be had."""


Part = bytes | str | MadePart
"""The bytes of a member, the URL of the file that is copied, or what makes it."""

_MEMBER = re.compile(r"[a-z0-9][a-z0-9_-]*(\.[a-z0-9_-]+)*")
_DRIVE = re.compile(r"^[A-Za-z]:(?=/)")
_SHOWN = 3


@dataclass(frozen=True)
class PackedSample:
    """One sample before it is written.

    Attributes:
        key: unique, no dot in its base name.
        members: by extension, in lower case.
        source: where it comes from, for messages.
    """

    key: str
    members: Mapping[str, Part]
    source: str


def safe_key(name: str) -> str:
    """Returns a name as a key: a relative path without dots in its base name.

    A dot there would end the key, so it becomes ``_``. Roots, ``.`` and ``..`` are left
    out: ``../a/b.0.c`` gives ``a/b_0_c``.

    Raises:
        PipelineError: nothing is left, or it can be no key.
    """
    scheme, found, rest = name.partition("://")
    path = _DRIVE.sub("", (rest if found and "/" not in scheme else name))
    parts = [part for part in re.split(r"[/\\]", path) if part not in ("", ".", "..")]
    key = "/".join([*parts[:-1], parts[-1].replace(".", "_")]) if parts else ""
    refused = refuse_name(f"{key}.x")
    if refused is not None:
        raise PipelineError(
            f"a key must be a relative path in UTF-8, got {name!r} ({refused[2]}); "
            "rename it, or give a column `key` in a list"
        )
    return key


def check_member(name: str, where: str) -> str:
    """Returns an extension in lower case.

    Raises:
        PipelineError: it cannot be the extension of a member.
    """
    if not _MEMBER.fullmatch(name.lower()):
        raise PipelineError(
            f"a member must be an extension such as jpg or cam_front.jpg, of letters, "
            f"digits, _ and -, got {name!r} ({where}); rename it"
        )
    return name.lower()


def check_unique(samples: Iterable[PackedSample]) -> None:
    """Checks that no two samples have one key.

    Raises:
        PipelineError: some do; the message names them and where they come from.
    """
    first: dict[str, str] = {}
    twice: list[str] = []
    for sample in samples:
        if sample.key in first:
            sources = f"{first[sample.key]} and {sample.source}"
            twice.append(f"{sample.key!r} ({sources})")
        first.setdefault(sample.key, sample.source)
    if twice:
        more = f", and {len(twice) - _SHOWN} more" if len(twice) > _SHOWN else ""
        raise PipelineError(
            f"keys must be unique, got twice: {', '.join(twice[:_SHOWN])}{more}; "
            "rename the files (a key has no extension, and dots become _), or give a "
            "column `key` in a list"
        )


def shuffled(samples: Sequence[PackedSample], seed: int) -> list[PackedSample]:
    """Returns samples in an order that depends on the seed and their keys alone.

    A sample that is added later moves no other before or behind its neighbour.
    """

    def place(sample: PackedSample) -> bytes:
        text = f"{seed}\0{sample.key}".encode()
        return hashlib.blake2b(text, digest_size=16).digest()

    return sorted(samples, key=place)
