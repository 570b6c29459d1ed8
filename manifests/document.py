"""What all documents share: strict models, names, sizes in bytes.

Imports nothing of ours.
"""

from __future__ import annotations

import re
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

NAME = re.compile(r"^[a-z][a-z0-9_]*$")
RESERVED_NAMES = frozenset({"key", "views", "labels", "calibration", "rows"})
_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_UNITS |= {"PB": 10**15, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}

ImageSize = tuple[
    Annotated[int, Field(ge=1, le=65535)], Annotated[int, Field(ge=1, le=65535)]
]


class Strict(BaseModel):
    """Base of all documents: frozen, and a field that is not declared is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", populate_by_name=True)


def parse_bytes(text: int | str) -> int:
    """Returns a number of bytes from ``2000``, ``"64 MiB"`` or ``"1.2 TB"``."""
    if isinstance(text, int):
        return text
    match = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([A-Za-z]*)\s*", text)
    if not match or match[2].upper() not in _UNITS:
        raise ValueError(f"must be a size like '64 MiB' or '1.2 TB', got {text!r}")
    return int(float(match[1]) * _UNITS[match[2].upper()])


def check_name(name: str, what: str) -> str:
    """Returns ``name`` if it can name a group of the bank; raises ValueError else."""
    if not NAME.fullmatch(name) or name in RESERVED_NAMES:
        raise ValueError(
            f"{what} must be lower-case letters, digits and _ and none of "
            f"{sorted(RESERVED_NAMES)}, got {name!r}"
        )
    return name
