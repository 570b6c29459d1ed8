"""The dataset record: which shards, how many samples, where each sample begins.

Owns the models and the Parquet schema of the index. Making it is in ``pipeline.index``.
"""

from __future__ import annotations

from pydantic import Field

from manifests.document import Strict
from manifests.own_checksum import Checked

DATASET_SCHEMA = 1
INDEX_COLUMNS = ("shard", "row", "key", "offset", "size", "refused")


class FaultRecord(Strict):
    """Something in a shard that got no row, and why."""

    key: str
    reason: str
    detail: str


class ShardRecord(Strict):
    """One input shard as it was when it was indexed."""

    name: str = Field(description="unique name, part of a sample's identity")
    url: str
    size_bytes: int
    tag: str | None = Field(
        None, description="etag or checksum, where the store has one"
    )
    modified: str | None = Field(None, description="modification time at the store")
    headers_sha256: str = Field(description="digest of the tar headers")
    samples: int
    sequential: bool = Field(description="must be read from its start")
    damage: str | None = Field(
        None, description="why nothing is read after the samples"
    )
    faults: tuple[FaultRecord, ...] = ()


class DatasetRecord(Checked):
    """``dataset.json``: the shards of one index; rows lie in the Parquet beside it."""

    schema_version: int = DATASET_SCHEMA
    shards: tuple[ShardRecord, ...]
