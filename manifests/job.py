"""The job: the YAML that makes a bank.

Owns the models of every field a job may have, with defaults and the rules that need no
file, no model and no network. Loading and overrides are in ``manifests.loading``.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    field_validator,
    model_validator,
)

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


class DatasetConfig(Strict):
    """The input shards."""

    shards: str | list[str] = Field(
        description="URL or path of the .tar shards; braces ({000..127}) and * expand"
    )
    license: str | None = Field(
        None, description="licence of the data, kept in the bank"
    )


class ImageInput(Strict):
    """A camera image: one member of each sample."""

    kind: Literal["image"]
    member: str | list[str] = Field(
        description="extension of the member, or several in order of preference"
    )
    calibration: str | None = Field(
        None, description="dotted path in `metadata` to {intrinsics, lidar2cam}"
    )
    view0: Literal["auto", "full", "square"] = Field(
        "auto", description="box of the evaluation view: whole image or centred square"
    )


class PointsInput(Strict):
    """A LiDAR sweep: little-endian float32 rows, one member of each sample."""

    kind: Literal["points"]
    member: str | list[str] = Field(description="extension of the member")
    columns: tuple[str, ...] = Field(
        ("x", "y", "z", "intensity"), description="what each float32 of a row is"
    )
    intensity_max: float = Field(
        1.0, gt=0, description="value of full intensity; intensity is divided by it"
    )

    @field_validator("columns")
    @classmethod
    def _has_xyz(cls, columns: tuple[str, ...]) -> tuple[str, ...]:
        if len(set(columns)) != len(columns) or not {"x", "y", "z"} <= set(columns):
            raise ValueError(f"must hold x, y, z once each, got {list(columns)}")
        return columns


InputConfig = Annotated[ImageInput | PointsInput, Field(discriminator="kind")]


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


class ViewsConfig(Strict):
    """How views 1..random are drawn; view 0 has no random geometry."""

    random: int = Field(0, ge=0, le=10_000, description="number of random views")
    seed: int = Field(0, ge=0, description="seed of the counter-based generator")
    scale: tuple[float, float] = Field(
        (0.4, 1.0), description="area of a random crop as a share of view 0's box"
    )
    ratio: tuple[float, float] = Field(
        (3 / 4, 4 / 3), description="aspect of a crop relative to view 0's box"
    )
    flip: bool | None = Field(
        None, description="mirror half of the views; omitted: only with a single input"
    )
    yaw_deg: float = Field(
        0.0, ge=0, le=180, description="largest rotation of a sweep about z, degrees"
    )
    point_scale: tuple[float, float] = Field(
        (1.0, 1.0), description="range of the factor on a sweep's coordinates"
    )

    @field_validator("scale", "ratio", "point_scale")
    @classmethod
    def _ordered(cls, pair: tuple[float, float]) -> tuple[float, float]:
        if not 0 < pair[0] <= pair[1]:
            raise ValueError(f"must be 0 < low <= high, got {list(pair)}")
        return pair

    @field_validator("scale")
    @classmethod
    def _within_box(cls, pair: tuple[float, float]) -> tuple[float, float]:
        if pair[1] > 1:
            raise ValueError(f"must be at most 1 (the whole box), got {list(pair)}")
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
    fit: Literal["tokens", "squash"] | None = Field(
        None, description="how the model's own size meets a box of another aspect"
    )
    points: int | None = Field(
        None, ge=1, description="number of points given to the model, evenly chosen"
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

    encoding: Literal["raw", "lossless", "half", "topk"] = Field(
        "lossless", description="how it is stored"
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
        description="module family: submodule path or `output`, then [index or key]",
    )
    layout: Literal["nc", "nchw", "nhwc", "nlc"] | None = Field(
        None, description="module family: axes of what it takes; omitted: by rank"
    )
    grid: tuple[int, int] | None = Field(
        None, description="module family: grid of an nlc output, (y, x)"
    )
    extent: BevExtent | None = Field(
        None, description="of a bird's-eye grid: what it covers, in metres"
    )

    @model_validator(mode="before")
    @classmethod
    def _topk_implies_encoding(cls, data: Any) -> Any:
        if isinstance(data, dict) and data.get("topk") and "encoding" not in data:
            return {**data, "encoding": "topk"}
        return data

    @model_validator(mode="after")
    def _topk_agrees(self) -> OutputConfig:
        if (self.topk is not None) != (self.encoding == "topk"):
            raise ValueError(
                "`topk: K` and `encoding: topk` go together; give both, or topk alone"
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

    @field_validator("model")
    @classmethod
    def _has_family(cls, model: str) -> str:
        if not re.fullmatch(r"[a-z_]+:.+", model):
            raise ValueError(f"must be FAMILY:NAME (timm:vit_base...), got {model!r}")
        return model

    @property
    def family(self) -> str:
        """What stands before the first colon of ``model``."""
        return self.model.split(":", 1)[0]

    @property
    def model_name(self) -> str:
        """What stands after the first colon of ``model``."""
        return self.model.split(":", 1)[1]


class LimitsConfig(Strict):
    """What the run must not exceed."""

    max_bytes: int | None = Field(
        None, description="refuse a job whose features may take more, e.g. 1.2 TB"
    )
    max_invalid_fraction: float = Field(
        0.01, ge=0, le=1, description="of a work item of 50 samples or more"
    )

    @field_validator("max_bytes", mode="before")
    @classmethod
    def _bytes(cls, value: Any) -> Any:
        return parse_bytes(value) if isinstance(value, str) else value


class EngineConfig(Strict):
    """Where and with what the work is done; on one device it changes no byte."""

    device: str = Field("auto", description="auto, cpu, cuda or cuda:N")
    threads: int | None = Field(None, ge=1, description="omitted: the cores there are")
    memory: int = Field(
        2 * 2**30, ge=2**20, description="budget of blocks in flight, e.g. 2 GiB"
    )

    @field_validator("memory", mode="before")
    @classmethod
    def _bytes(cls, value: Any) -> Any:
        return parse_bytes(value) if isinstance(value, str) else value


class Job(Strict):
    """Everything a bank is made from."""

    bank: str = Field(description="where the bank lies: a path or any fsspec URL")
    dataset: DatasetConfig
    metadata: str | None = Field(
        None, description="extension of the JSON member that dotted paths are read from"
    )
    inputs: dict[str, InputConfig] = Field(min_length=1)
    labels: dict[str, LabelConfig] = Field(default_factory=dict)
    views: ViewsConfig = Field(default_factory=ViewsConfig)
    teachers: dict[str, TeacherConfig] = Field(min_length=1)
    limits: LimitsConfig = Field(default_factory=LimitsConfig)
    engine: EngineConfig = Field(default_factory=EngineConfig)
    block_rows: int | None = Field(
        None, ge=1, description="rows of a block; omitted: chosen once, when it is made"
    )

    @model_validator(mode="after")
    def _names(self) -> Job:
        for what, names in (
            ("input", self.inputs),
            ("label", self.labels),
            ("teacher", self.teachers),
        ):
            for name in names:
                check_name(name, f"name of {what}")
        for name, config in self.inputs.items():
            is_calibrated = isinstance(config, ImageInput) and config.calibration
            if is_calibrated and self.metadata is None:
                raise ValueError(
                    f"inputs.{name}.calibration needs `metadata: EXT`, the JSON "
                    "member that its path is read from"
                )
        return self

    @property
    def flips(self) -> bool:
        """Whether random views are mirrored: by default only with a single input."""
        return len(self.inputs) == 1 if self.views.flip is None else self.views.flip
