"""What of a bank was exported, and from which: parts of the bank record.

Owns the fields; what a selection does to a bank is in ``pipeline.bank.selection``.
"""

from __future__ import annotations

from pydantic import Field

from manifests.document import Strict


class Selection(Strict):
    """What of a bank to copy, and how; what is empty or None selects all, as it is.

    Whole objects go by teacher, output, group, view and shard; rows by key, fraction
    and condition, all that are given holding at once.

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
    num_keys: int | None = Field(None, description="length of the list of keys")
    keys_sha256: str | None = Field(
        None,
        description="of the list of keys, which may name samples that are not chosen",
    )
    fraction: float | None = Field(
        None, gt=0, le=1, description="share of the rows, by a hash of shard and key"
    )
    seed: int = Field(0, ge=0, description="of that hash")
    where: tuple[str, ...] = Field(
        (), description="conditions, such as `label.class in [3, 5]`"
    )
    encodings: dict[str, str] = Field(
        default_factory=dict,
        description="pattern of outputs to how they are stored anew",
    )

    @property
    def chooses_rows(self) -> bool:
        """Whether some samples of a shard may be left behind."""
        return bool(self.keys_sha256 or self.where) or self.fraction is not None


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
    samples: int | None = Field(
        None, description="samples it had, retired shards left out"
    )
