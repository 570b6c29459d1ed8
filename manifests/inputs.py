"""What a sample holds, as a job names it: images, sweeps, clips, labels."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, TypeAdapter, field_validator

from manifests.document import Strict, parse_bytes


class ImageInput(Strict):
    """A camera image: one member of each sample."""

    kind: Literal["image"]
    member: str | list[str] = Field(
        description="extension of the member, or several in order of preference"
    )
    calibration: str | None = Field(
        None, description="dotted path in `metadata` to {intrinsics, lidar2cam}"
    )
    timestamp: str | None = Field(
        None, description="dotted path in `metadata` to its time, seconds"
    )
    view0: Literal["auto", "full", "square"] = Field(
        "auto", description="box of the evaluation view: whole image or centred square"
    )


class PointsInput(Strict):
    """A LiDAR sweep: one member of each sample, its points' columns declared."""

    kind: Literal["points"]
    member: str | list[str] = Field(
        description="extension of the member, or several in order of preference"
    )
    format: str | None = Field(
        None,
        description="bin, npy, npz, feather, pcd, or one that a package adds; omitted: "
        "by the member's extension",
    )
    columns: tuple[str, ...] = Field(
        ("x", "y", "z", "intensity"),
        description="the columns that are read; bin and plain arrays: all, in order",
    )
    intensity_max: float = Field(
        1.0, gt=0, description="value of full intensity; intensity is divided by it"
    )
    timestamp: str | None = Field(
        None, description="dotted path in `metadata` to its time, seconds"
    )

    @field_validator("columns")
    @classmethod
    def _has_xyz(cls, columns: tuple[str, ...]) -> tuple[str, ...]:
        if len(set(columns)) != len(columns) or not {"x", "y", "z"} <= set(columns):
            raise ValueError(f"must hold x, y, z once each, got {list(columns)}")
        return columns


class ClipInput(Strict):
    """A clip: members ``000.<member>``, ``001.<member>`` ... are its frames.

    `teachonce pack --clip` makes them; no clip reaches over a sample's border.
    """

    kind: Literal["clip"]
    member: str | list[str] = Field(
        description="extension of a frame behind its number, or several"
    )
    frames: int = Field(ge=1, le=1000, description="number of frames")
    view0: Literal["auto", "full", "square"] = Field(
        "auto", description="box of the evaluation view, the same for all frames"
    )


InputConfig = Annotated[
    ImageInput | PointsInput | ClipInput, Field(discriminator="kind")
]
INPUT: TypeAdapter[InputConfig] = TypeAdapter(InputConfig)
"""Reads an input as a job, or a bank's record, has it."""


class LabelConfig(Strict):
    """A label kept per row; an absent or broken one leaves the row valid."""

    member: str = Field(description="extension of the member that holds it")
    path: str | None = Field(
        None,
        description="dotted path inside a JSON member; else the member is the value",
    )
    num_classes: int | None = Field(
        None, ge=1, description="class index in [0, num_classes); omitted: a number"
    )


class StoredInputConfig(Strict):
    """How a bank keeps copies of an image input: upright, whole, as JPEG."""

    short_side: int = Field(
        256,
        ge=8,
        le=8192,
        description="pixels of the shorter side; smaller images stay as they are",
    )
    quality: int = Field(
        90,
        ge=30,
        le=100,
        description="of the JPEG, Pillow's scale; lowered, and noted, where an image "
        "would take more than `max_bytes`",
    )
    max_bytes: int | None = Field(
        None,
        ge=1024,
        description="most that one image may take, e.g. 96 KiB; omitted: chosen from "
        "size and quality",
    )

    @field_validator("max_bytes", mode="before")
    @classmethod
    def _bytes(cls, value: Any) -> Any:
        return parse_bytes(value) if isinstance(value, str) else value
