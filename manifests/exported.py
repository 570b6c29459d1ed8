"""What of a bank was exported, and from which: parts of the bank record.

Owns the fields; what a selection does to a bank is in ``pipeline.bank.selection``.
"""

from __future__ import annotations

from pydantic import Field

from manifests.document import Strict


class Selection(Strict):
    """Which whole objects of a bank to copy; what is empty or None selects all.

    Copies of inputs (``stored_inputs``) are the exception: none unless they are named.
    """

    teachers: tuple[str, ...] = Field((), description="patterns of teachers")
    outputs: tuple[str, ...] = Field(
        (),
        description="patterns: OUTPUT, TEACHER/OUTPUT or TEACHER/GROUP/SIZE/OUTPUT",
    )
    groups: tuple[str, ...] = Field((), description="patterns of groups")
    num_views: int | None = Field(None, ge=1, description="views 0 to num_views - 1")
    shards: tuple[str, ...] = Field((), description="patterns of shards' names")
    inputs: tuple[str, ...] = Field(
        (), description="patterns of inputs whose stored copies go along; empty: none"
    )


class ExportedFrom(Strict):
    """The bank that a bank was copied from, whole or in part."""

    bank: str = Field(description="URL it had")
    bank_sha256: str = Field(description="of its bank.json at that time")
    exported: str = Field(description="time, UTC")
    by: str = Field(description="version that copied it")
    selection: Selection
    shards: int = Field(description="shards it had, retired ones left out")
    outputs: tuple[str, ...] = Field(description="paths of the outputs it had")
    num_views: int = Field(description="views it had")
