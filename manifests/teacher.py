"""A teacher of a job: its model, its preprocessing and its outputs."""

from __future__ import annotations

import re
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from manifests.document import ImageSize, Strict


class RasterConfig(Strict):
    """How a sweep becomes an image: seen from the sensor, or from above."""

    channels: tuple[str, ...] | None = Field(
        None,
        description="per pixel: columns of the sweep, `range` (metres), `occupied` "
        "(0 or 1), `density` (log(1 + points)); omitted: the family's own",
    )
    elevation_deg: tuple[float, float] | None = Field(
        None, description="range_view: lowest and highest angle of the rows"
    )
    azimuth_deg: tuple[float, float] | None = Field(
        None, description="range_view: rightmost and leftmost angle of the columns"
    )
    range_m: tuple[float, float] | None = Field(
        None, description="range_view: points nearer or farther are left out"
    )
    x_m: tuple[float, float] | None = Field(
        None, description="bev_raster: lowest and highest x"
    )
    y_m: tuple[float, float] | None = Field(
        None, description="bev_raster: lowest and highest y"
    )
    z_m: tuple[float, float] | None = Field(
        None, description="bev_raster: points outside are left out"
    )
    mean: tuple[float, ...] | None = Field(None, description="per channel")
    std: tuple[float, ...] | None = Field(None, description="per channel")

    @field_validator("elevation_deg", "azimuth_deg", "range_m", "x_m", "y_m", "z_m")
    @classmethod
    def _ordered(cls, pair: tuple[float, float] | None) -> tuple[float, float] | None:
        if pair is not None and not pair[0] < pair[1]:
            raise ValueError(f"must be low < high, got {list(pair)}")
        return pair


class PreprocessConfig(Strict):
    """What a teacher does to its view of an input; omitted fields are its family's."""

    channels: Literal["rgb", "bgr"] | None = Field(None, description="colour order")
    range: float | None = Field(
        None, gt=0, description="value of white before mean and std (1 or 255)"
    )
    mean: tuple[float, ...] | None = Field(None, description="per channel, in `range`")
    std: tuple[float, ...] | None = Field(None, description="per channel, in `range`")
    divide: float | None = Field(
        None, gt=0, description="divides after mean and std, for models trained so"
    )
    interpolation: Literal["bilinear", "bicubic", "lanczos", "nearest"] | None = Field(
        None, description="filter of the one resize"
    )
    fit: Literal["tokens", "pad", "squash"] | None = Field(
        None, description="how the model's own size meets a box of another aspect"
    )
    geometry: Literal["view", "teacher"] | None = Field(
        None,
        description="teacher: the family's own resize and crop, bit for bit; its grids "
        "then do not lie on the views of the others",
    )
    raster: RasterConfig | None = Field(
        None, description="range_view and bev_raster: how a sweep becomes an image"
    )
    points: int | None = Field(
        None,
        ge=1,
        description="most points given to the model; more are thinned out evenly",
    )
    columns: tuple[str, ...] | None = Field(None, description="point columns given")
    centre: bool | None = Field(None, description="subtract the mean of x, y, z")
    unit_sphere: bool | None = Field(None, description="divide x, y, z by the radius")


class BevExtent(Strict):
    """Where a bird's-eye grid lies: rows run along x, columns along y of the LiDAR."""

    x_m: tuple[float, float] = Field(description="lowest and highest x, metres")
    y_m: tuple[float, float] = Field(description="lowest and highest y, metres")
    row_0: Literal["x_max", "x_min"] = Field("x_max", description="what row 0 is")
    column_0: Literal["y_max", "y_min"] = Field("y_max", description="what column 0 is")

    @field_validator("x_m", "y_m")
    @classmethod
    def _ordered(cls, pair: tuple[float, float]) -> tuple[float, float]:
        if not pair[0] < pair[1]:
            raise ValueError(f"must be low < high, got {list(pair)}")
        return pair


class OutputConfig(Strict):
    """One output of a teacher and how it is stored."""

    encoding: Literal["raw", "lossless", "half", "compact", "tiny", "topk"] = Field(
        "lossless",
        description="how it is stored; compact (8 bits a value) and tiny (4) take "
        "grids alone",
    )
    codec: Literal["lz4", "zstd"] | None = Field(
        None,
        description="of lossless: zstd is smaller where many values are zero, as "
        "`plan --sample` tells; omitted: lz4",
    )
    topk: int | None = Field(
        None, ge=1, description="keep the k largest logits (implies encoding topk)"
    )
    temperatures: tuple[float, ...] = Field(
        (1.0,), description="at which topk keeps the log-sum-exp of the rest"
    )
    pool: tuple[int, int] | None = Field(
        None, description="average pooling of a grid, (y, x); part of the definition"
    )
    norm: Literal["post", "pre"] | None = Field(
        None, description="tokens after or before the final norm; omitted: post"
    )
    source: str | None = Field(
        None,
        alias="from",
        description="module, student and exported families: `output` or a submodule's "
        "path, then [index or key]",
    )
    layout: Literal["nc", "nchw", "nhwc", "nlc", "ncl", "ntchw"] | None = Field(
        None, description="of what `from` takes: its axes; omitted: by rank"
    )
    grid: tuple[int, int] | tuple[int, int, int] | None = Field(
        None, description="of an nlc output: its grid, (y, x) or (t, y, x)"
    )
    extent: BevExtent | None = Field(
        None, description="of a bird's-eye grid: what it covers, in metres"
    )
    classifier: str | None = Field(
        None,
        description="file of a zero-shot classifier (`teachonce teachers MODEL "
        "--classes FILE` makes it): logits of its classes from the embedding",
    )

    @model_validator(mode="before")
    @classmethod
    def _topk_implies_encoding(cls, data: Any) -> Any:
        if isinstance(data, dict) and data.get("topk") and "encoding" not in data:
            return {**data, "encoding": "topk"}
        return data

    @model_validator(mode="after")
    def _encoding_agrees(self) -> OutputConfig:
        if (self.topk is not None) != (self.encoding == "topk"):
            raise ValueError(
                "`topk: K` and `encoding: topk` go together; give both, or topk alone"
            )
        if self.codec is not None and self.encoding != "lossless":
            raise ValueError(
                f"codec is of lossless alone, encoding {self.encoding} has its own; "
                "leave codec out"
            )
        if not self.temperatures or min(self.temperatures) <= 0:
            raise ValueError("temperatures must be a list of positive numbers")
        return self


class TeacherConfig(Strict):
    """A frozen model, its preprocessing and the outputs wanted of it."""

    model: str = Field(description="FAMILY:NAME, such as timm:vit_small_patch16_224")
    weights: str | None = Field(
        None,
        description="file or URL; `random` or `random:SEED`; omitted: the family's own",
    )
    keys: dict[str, str | None] = Field(
        default_factory=dict,
        description="renames the checkpoint's parameters: regular expression to "
        "replacement, in order; null leaves them out",
    )
    args: dict[str, Any] = Field(
        default_factory=dict, description="keyword arguments of the model's constructor"
    )
    method: str = Field(
        "forward", description="module family: the method that is called"
    )
    on: list[str] | dict[str, list[str]] | None = Field(
        None,
        description="inputs it runs on, each on its own (cam_*), or named groups",
    )
    sizes: list[ImageSize] | None = Field(
        None, min_length=1, description="[height, width] each; omitted: the model's own"
    )
    precision: Literal["float32", "bfloat16", "float16"] = Field(
        "float32", description="arithmetic of the forward pass"
    )
    batch: int | None = Field(
        None, ge=1, description="rows per forward; omitted: about 32, by shard sizes"
    )
    preprocess: PreprocessConfig = Field(
        default_factory=PreprocessConfig, description="overrides of the family's own"
    )
    outputs: dict[str, OutputConfig] = Field(
        min_length=1, description="output name to how it is taken and stored"
    )
    license: str | None = Field(None, description="licence of the weights")

    @field_validator("keys")
    @classmethod
    def _are_expressions(cls, keys: dict[str, str | None]) -> dict[str, str | None]:
        for pattern, replacement in keys.items():
            try:
                # Python reads the replacement too, whether or not the pattern is found.
                re.compile(pattern).sub(replacement or "", "")
            except (re.error, IndexError) as error:
                raise ValueError(
                    "must be a regular expression and its replacement, got "
                    f"{pattern!r}: {replacement!r} ({error})"
                ) from error
        return keys

    @field_validator("model")
    @classmethod
    def _has_family(cls, model: str) -> str:
        if not re.fullmatch(r"[a-z_]+:.+", model):
            raise ValueError(f"must be FAMILY:NAME (timm:vit_base...), got {model!r}")
        return model

    @property
    def key_rules(self) -> list[list[str | None]]:
        """The pairs of ``keys`` in order, which a digest of a mapping loses."""
        return [[pattern, new] for pattern, new in self.keys.items()]

    @property
    def family(self) -> str:
        """What stands before the first colon of ``model``."""
        return self.model.split(":", 1)[0]

    @property
    def model_name(self) -> str:
        """What stands after the first colon of ``model``."""
        return self.model.split(":", 1)[1]
