"""The bank record (``bank.json``), commits and work items.

Owns their fields and nothing else: what they mean on disk is written down in
``docs/architecture.md``; ``pipeline.bank`` reads and writes them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from pydantic import Field, field_serializer, field_validator, model_validator

from manifests.document import Strict
from manifests.exported import ExportedFrom
from manifests.own_checksum import Checked
from manifests.teacher import BevExtent

BANK_SCHEMA = 1
# The sum of all results crosses a shuffle: it stays small however much fails.
MAX_FAILURES = 1000
ROWS_TEACHER = "rows"
MAX_BLOCK_ROWS = 2**22
"""Most rows of a block: then 16 bytes a row fill an object's 64 MiB."""


class ShardEntry(Strict):
    """A shard in the bank's append-only table: its identity and the blocks it owns."""

    name: str
    url: str
    size_bytes: int
    tag: str | None = None
    modified: str | None = None
    headers_sha256: str
    samples: int
    sequential: bool = False
    damage: str | None = None
    faults: int = Field(0, description="things in it that got no row")
    part: str = Field(description="dataset/<part>.parquet holds its rows")
    first_block: int
    blocks: int
    retired: bool = Field(
        False, description="its bytes changed; a later entry holds them"
    )
    chosen_sha256: str | None = Field(
        None,
        description="digest of which of its samples an export chose: numbers in the "
        "bank that they came from, as little-endian int64; None where all are here",
    )

    @property
    def block_numbers(self) -> range:
        """Numbers of the blocks it owns in the bank."""
        return range(self.first_block, self.first_block + self.blocks)


class InputEntry(Strict):
    """An input as the bank knows it: its job entry and what was decided about it."""

    config: dict[str, Any]
    metadata: str | None = None
    view0: Literal["full", "square"] | None = Field(
        None, description="box of the evaluation view of an image"
    )
    aspect: float = Field(1.0, description="width over height of view 0's box, typical")


class OutputEntry(Strict):
    """One output at one size in one group, as stored."""

    name: str
    size: str
    kind: Literal["vector", "grid", "frames", "points", "index", "image"]
    shape: tuple[int, ...]
    dtype: str
    norm: str | None = None
    source: str = ""
    definition: dict[str, Any] = Field(description="what of the job defines its values")
    encoding: dict[str, Any]
    arrays: tuple[dict[str, Any], ...]

    @property
    def extent(self) -> BevExtent | None:
        """Where its bird's-eye grid lies, None for any other output."""
        found = self.definition.get("extent")
        return None if found is None else BevExtent.model_validate(found)


def is_logits(output: str) -> bool:
    """Returns whether an output's values are logits: ``logits``, ``logits_<part>``."""
    return output == "logits" or output.startswith("logits_")


class PassEntry(Strict):
    """One teacher on one group for a range of views: the unit of provenance.

    The pass of ``rows`` holds what is known of every sample: sizes, labels,
    calibration.
    """

    id: str
    teacher: str
    group: str = ""
    inputs: tuple[str, ...]
    labels: tuple[str, ...] = ()
    first_view: int = 0
    last_view: int = 0
    batch: int = 0
    outputs: tuple[OutputEntry, ...] = ()
    teacher_fingerprint: str
    fingerprint: str
    request: dict[str, Any] = Field(
        default_factory=dict,
        description="resolved job entry that a worker rebuilds from",
    )
    provenance: dict[str, Any] = Field(default_factory=dict)

    @property
    def holds_inputs(self) -> bool:
        """Whether it holds copies of an input, and no teacher's outputs."""
        return any(output.kind == "image" for output in self.outputs)

    @property
    def model(self) -> str:
        """The teacher's model without the folder that a module's file lay in."""
        identity = self.provenance.get("identity", {})
        if self.holds_inputs:
            return "copies of the input"
        if "model" not in identity:
            return "row facts"
        return f"{identity['family']}:{identity['model']}"

    @property
    def views(self) -> range:
        """Numbers of the views it covers."""
        return range(self.first_view, self.last_view + 1)

    def has_own_geometry(self, size: str) -> bool:
        """Whether its teacher resized and cropped by itself at a size.

        Its grids then do not lie on the boxes of the views.
        """
        taken = self.provenance.get("preprocess", {}).get(size, {})
        return any(spec.get("own") is not None for spec in taken.values())

    def pads(self, size: str) -> bool:
        """Whether boxes are padded at a size: cells of grids on padding are missing."""
        taken = self.provenance.get("preprocess", {}).get(size, {})
        return any(spec.get("frame", spec).get("pad", False) for spec in taken.values())

    @property
    def flops_per_row(self) -> float:
        """Operations that a row costs in all its views, 0 where they are not known."""
        cost = self.provenance.get("cost_per_row", {})
        return float(cost.get("flops", 0.0)) * len(self.views)

    @property
    def input_bytes(self) -> int:
        """Bytes of one row and view of everything its teacher is given."""
        return int(self.provenance.get("cost_per_row", {}).get("input_bytes", 0))

    @property
    def working_bytes(self) -> int:
        """Memory of one forward's intermediate values, 0 where it is not known."""
        cost = self.provenance.get("cost_per_row", {})
        return int(cost.get("working_bytes", 0)) * self.batch


class BankState(Strict):
    """What finalise found."""

    complete: bool = Field(description="whether every pass has every block")
    complete_passes: tuple[str, ...] = Field(
        (), description="passes that have every block and were finalised with them"
    )
    rows: int = Field(description="samples with a row, retired shards left out")
    committed_blocks: dict[str, int]
    valid: dict[str, int]
    invalid: dict[str, dict[str, int]]
    points: dict[str, int] = Field(
        default_factory=dict, description="points that can be used, by input"
    )
    dropped_points: dict[str, int] = Field(
        default_factory=dict, description="points that were not finite, by input"
    )
    damaged_shards: dict[str, str] = Field(default_factory=dict)
    files: tuple[int, int] | None = Field(
        None, description="size in bytes and crc32c, last byte first, of files.parquet"
    )


class BankRecord(Checked):
    """``bank.json``."""

    schema_version: int = BANK_SCHEMA
    created_by: str
    dataset: dict[str, Any]
    job: dict[str, Any] = Field(description="the job that last touched it, resolved")
    inputs: dict[str, InputEntry]
    labels: dict[str, dict[str, Any]]
    views: dict[str, Any] = Field(description="the policy that draws views")
    num_views: int
    block_rows: int
    shards: tuple[ShardEntry, ...]
    passes: tuple[PassEntry, ...]
    requests: dict[str, tuple[str, ...]] = Field(
        default_factory=dict, description="digest of a teacher's request to its passes"
    )
    exported_from: tuple[ExportedFrom, ...] = Field(
        (),
        description="banks it was copied from, one from the other",
    )
    state: BankState | None = None

    @property
    def live_blocks(self) -> list[int]:
        """Numbers of the blocks of shards that are not retired, ascending."""
        return [
            block
            for shard in self.shards
            if not shard.retired
            for block in shard.block_numbers
        ]

    @property
    def num_blocks(self) -> int:
        """Number of blocks, retired shards included: rows are never given twice."""
        return sum(shard.blocks for shard in self.shards)

    @property
    def num_rows(self) -> int:
        """Length of the sample axis, padding included."""
        return self.num_blocks * self.block_rows

    @property
    def has_chosen_rows(self) -> bool:
        """Whether an export left samples of its shards behind."""
        return any(one.selection.chooses_rows for one in self.exported_from)

    def pass_by_id(self, pass_id: str) -> PassEntry:
        """Returns one pass; KeyError where there is none of that id."""
        return next(entry for entry in self.passes if entry.id == pass_id)


def format_runs(rows: Sequence[int]) -> str:
    """Returns ascending numbers as runs, ``0-4,7``: whole blocks stay small."""
    runs: list[list[int]] = []
    for row in rows:
        if runs and row == runs[-1][1] + 1:
            runs[-1][1] = row
        else:
            runs.append([row, row])
    return ",".join(f"{a}" if a == b else f"{a}-{b}" for a, b in runs)


def parse_runs(text: str) -> tuple[int, ...]:
    """Returns the numbers that `format_runs` wrote; raises ValueError else."""
    found: list[int] = []
    for run in text.split(",") if text else []:
        first, _, last = run.partition("-")
        rows = range(int(first), int(last or first) + 1)
        # A few letters may ask for any amount of memory.
        if not rows or rows[-1] >= MAX_BLOCK_ROWS:
            raise ValueError(f"{run[:40]!r} must be ascending rows of a block")
        if found and rows[0] <= found[-1]:
            raise ValueError(f"{run[:40]!r} must follow row {found[-1]}")
        found += rows
    return tuple(found)


class CommitContent(Strict):
    """What a block of a pass is; equal for equal attempts."""

    pass_id: str
    fingerprint: str
    block: int = Field(ge=0)
    shard: str
    rows: int = Field(ge=0, le=MAX_BLOCK_ROWS)
    valid: int = Field(ge=0)
    invalid: dict[str, tuple[int, ...]] = Field(
        description="reason code to the rows of the block it holds for"
    )
    objects: dict[str, tuple[int, int]] = Field(
        description="path in the bank to (size in bytes, crc32c, last byte first)"
    )

    @field_validator("invalid", mode="before")
    @classmethod
    def _read_runs(cls, value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        return {
            code: parse_runs(rows) if isinstance(rows, str) else rows
            for code, rows in value.items()
        }

    @model_validator(mode="after")
    def _check_rows(self) -> CommitContent:
        for code, rows in self.invalid.items():
            if any(not 0 <= row < self.rows for row in rows):
                raise ValueError(f"invalid.{code[:40]} must be rows below {self.rows}")
        if self.valid > self.rows:
            raise ValueError(f"valid must be at most {self.rows}, got {self.valid}")
        return self

    @field_serializer("invalid")
    def _write_runs(self, value: dict[str, tuple[int, ...]]) -> dict[str, str]:
        return {code: format_runs(rows) for code, rows in value.items()}


class Commit(Checked):
    """``commits/<pass>/<block>.json``: the small record that makes a block exist."""

    content: CommitContent
    device: str = Field("", description="kind of device that its teacher ran on")
    timing: dict[str, float] = Field(default_factory=dict)


class BlockSpan(Strict):
    """One block of a work item: which rows of the shard, and where they lie in it."""

    block: int
    first_row: int
    num_rows: int
    start: int
    end: int
    first_key: str


class WorkItem(Strict):
    """A run of consecutive blocks of one shard and the passes they still lack."""

    shard: str
    url: str
    sequential: bool
    passes: tuple[str, ...]
    blocks: tuple[BlockSpan, ...]
    refused: dict[int, str] = Field(
        default_factory=dict, description="row of the shard to why it is refused"
    )

    @property
    def num_rows(self) -> int:
        """Samples in it."""
        return sum(span.num_rows for span in self.blocks)


class WorkResult(Strict):
    """What one work item did: small, summable, and all that crosses a shuffle."""

    items: int = 0
    blocks: int = 0
    samples: int = 0
    valid: dict[str, int] = Field(default_factory=dict)
    invalid: dict[str, int] = Field(default_factory=dict)
    bytes_read: int = 0
    bytes_written: int = 0
    objects: int = 0
    seconds: dict[str, float] = Field(default_factory=dict)
    failed_items: int = Field(0, description="work items that failed")
    failures: tuple[str, ...] = Field(
        (), description="what failed, sorted; the first 1,000"
    )

    def plus(self, other: WorkResult) -> WorkResult:
        """Returns the sum of two results; the same failure is kept once."""

        def add(a: dict[str, Any], b: dict[str, Any]) -> dict[str, Any]:
            return {key: a.get(key, 0) + b.get(key, 0) for key in sorted({*a, *b})}

        return WorkResult(
            items=self.items + other.items,
            blocks=self.blocks + other.blocks,
            samples=self.samples + other.samples,
            valid=add(self.valid, other.valid),
            invalid=add(self.invalid, other.invalid),
            bytes_read=self.bytes_read + other.bytes_read,
            bytes_written=self.bytes_written + other.bytes_written,
            objects=self.objects + other.objects,
            seconds=add(self.seconds, other.seconds),
            failed_items=self.failed_items + other.failed_items,
            failures=tuple(sorted({*self.failures, *other.failures}))[:MAX_FAILURES],
        )
