"""The recipe: the YAML that trains a student; and the probe: the YAML that scores it.

Owns the models of their fields, with defaults and the rules that need no bank. What
only a bank can tell (whether a target exists, whether its grid can match) is
``student_train``'s to check.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from manifests.document import ImageSize, Strict, check_name
from manifests.target import BalanceConfig, NormaliseRule, TargetConfig
from manifests.teacher import BevExtent
from manifests.trajectory import TrajectoryConfig

DATA = "data"
LABELS = "labels"
TRAJECTORIES = "trajectories"
Interpolation = Literal["bilinear", "bicubic", "lanczos", "nearest"]
Size = Annotated[int, Field(ge=1, le=65535)] | ImageSize


class RowsConfig(Strict):
    """Which rows of a bank: all of its shards' samples, narrowed by each field given.

    ``share`` and ``limit`` go by a hash of (shard, key), so that they mean the same
    rows in every bank of the same data, whatever else lies in it.
    """

    shards: list[str] | None = Field(
        None, min_length=1, description="patterns of shard names, such as train-*"
    )
    keys: str | None = Field(
        None, description="file of keys, one a line, as KEY or SHARD<tab>KEY"
    )
    share: tuple[float, float] | None = Field(
        None, description="[low, high) of the rows, as shares of 1"
    )
    limit: int | None = Field(None, ge=1, description="at most so many rows")

    @field_validator("share")
    @classmethod
    def _is_share(cls, share: tuple[float, float] | None) -> tuple[float, float] | None:
        if share is not None and not 0 <= share[0] < share[1] <= 1:
            raise ValueError(f"must be 0 <= low < high <= 1, got {list(share)}")
        return share


class MapLabel(Strict):
    """A label for every pixel or cell: a PNG member of each sample.

    It follows the view of its image; or it lies on a bird's-eye grid, whose ``extent``
    says where.
    """

    member: str = Field(description="extension of the member, such as seg.png")
    input: str | None = Field(
        None, description="image input whose pixels it labels; omitted with `extent`"
    )
    extent: BevExtent | None = Field(
        None, description="where its bird's-eye grid lies, in metres"
    )
    num_classes: int | None = Field(
        None, ge=1, description="pixels are class indices; omitted: numbers"
    )
    ignore: list[int] = Field(
        default_factory=list, description="pixel values that are no label"
    )
    scale: float = Field(
        1.0, gt=0, description="numbers only: unit of a pixel value, e.g. 0.01 metres"
    )
    log: bool = Field(False, description="numbers only: learn and score the logarithm")

    @model_validator(mode="after")
    def _is_whole(self) -> MapLabel:
        if (self.input is None) == (self.extent is None):
            raise ValueError("give `input` (labels its pixels) or `extent`, not both")
        if self.num_classes is not None and (self.log or self.scale != 1.0):
            raise ValueError("`scale` and `log` are of numbers, not of classes")
        return self


class DataConfig(Strict):
    """The reader's own copy of the raw data, or the bank's, and which rows of it."""

    inputs: Literal["shards", "bank"] = Field(
        "shards",
        description="bank: the copies that it holds (`stored_inputs` of its job), no "
        "shards are read; `data: bank` for short",
    )
    shards: str | list[str] | None = Field(
        None, description="where the shards lie now; omitted: where the bank found them"
    )
    rows: RowsConfig = Field(default_factory=RowsConfig)
    labels: dict[str, MapLabel] = Field(
        default_factory=dict, description="dense labels that the bank does not hold"
    )

    @model_validator(mode="before")
    @classmethod
    def _bank_alone(cls, data: Any) -> Any:
        return {"inputs": "bank"} if data == "bank" else data

    @model_validator(mode="after")
    def _reads_one(self) -> DataConfig:
        if self.inputs == "bank" and self.shards is not None:
            raise ValueError(
                "give `shards`, or `inputs: bank` for the copies that the bank holds, "
                "not both"
            )
        if self.inputs == "bank" and self.labels:
            raise ValueError(
                f"label {next(iter(self.labels))} lies in the shards alone, which "
                "`inputs: bank` does not read; give `shards`, or leave `labels` out"
            )
        return self


class StudentConfig(Strict):
    """The model trained."""

    model: str = Field(description="timm:NAME, or module:FILE.py:CLASS")
    input: str = Field(description="image input of the bank that it looks at")
    weights: str | None = Field(
        None,
        description="a file, `pretrained`, `random` or `random:SEED`; omitted: random "
        "from the recipe's seed",
    )
    args: dict[str, Any] = Field(
        default_factory=dict, description="keyword arguments of its constructor"
    )
    interpolation: Interpolation = Field(
        "bicubic", description="filter of the one resize"
    )
    checkpointing: bool = Field(
        False,
        description="activations are computed again in the backward pass: less memory, "
        "a third more arithmetic",
    )

    @field_validator("model")
    @classmethod
    def _has_family(cls, model: str) -> str:
        family, colon, name = model.partition(":")
        if family not in ("timm", "module") or not colon or not name:
            raise ValueError(f"must be timm:NAME or module:FILE.py:CLASS, got {model}")
        return model


class LoaderConfig(Strict):
    """How rows reach the student; what it learns depends on window_blocks and view."""

    threads: int | None = Field(
        None, ge=1, description="that read and decode; omitted: the cores there are"
    )
    workers: int = Field(
        0, ge=0, description="processes that read and decode; 0: threads alone"
    )
    window_blocks: int = Field(
        8, ge=1, description="blocks that rows are drawn from at a time"
    )
    view: Literal["epoch"] | Annotated[int, Field(ge=0)] = Field(
        "epoch", description="another random view each epoch, or always the same one"
    )
    prefetch: int = Field(3, ge=1, description="batches made ahead")


class OptimizerConfig(Strict):
    """AdamW or SGD with momentum; the learning rate is each stage's."""

    kind: Literal["adamw", "sgd"] = "adamw"
    weight_decay: float = Field(
        1.0e-4, ge=0, description="not on norms, biases and tokens"
    )
    betas: tuple[float, float] = Field((0.9, 0.999), description="adamw")
    eps: float = Field(1.0e-8, gt=0, description="adamw")
    momentum: float = Field(0.9, ge=0, lt=1, description="sgd")
    nesterov: bool = Field(True, description="sgd")
    clip_norm: float | None = Field(
        3.0, gt=0, description="largest norm of the gradient; null: none"
    )


class StageConfig(Strict):
    """One stretch of training; each stage goes on from the one before."""

    name: str = "train"
    steps: int | None = Field(None, ge=1, description="or epochs")
    epochs: int | None = Field(None, ge=1, description="or steps")
    batch: int = Field(ge=1, description="samples of a step, over all ranks")
    accumulate: int = Field(
        1,
        ge=1,
        description="parts that the batch goes through the student in, to save memory; "
        "the gradient is the whole batch's, but batch norm sees each part alone",
    )
    lr: float = Field(gt=0, description="highest learning rate")
    warmup_steps: int = Field(0, ge=0)
    schedule: Literal["cosine", "constant", "linear"] = "cosine"
    final_lr: float = Field(0.0, ge=0, le=1, description="share of lr at the end")
    size: Size | list[Size] | None = Field(
        None,
        description="of the student's input: side in pixels (fitted to the view's "
        "aspect), or [[height, width]]; of several one is drawn each step; omitted: "
        "what targets with `grid: coincide` ask for, else the student's own",
    )

    @model_validator(mode="after")
    def _has_length(self) -> StageConfig:
        if (self.steps is None) == (self.epochs is None):
            raise ValueError("give `steps` or `epochs`, one of them")
        if self.accumulate > self.batch:
            raise ValueError(
                f"accumulate must be at most batch ({self.batch}), got "
                f"{self.accumulate}"
            )
        if self.steps is not None and self.warmup_steps >= self.steps:
            raise ValueError(
                f"warmup_steps must be fewer than steps ({self.steps}), got "
                f"{self.warmup_steps}"
            )
        return self

    @field_validator("size", mode="before")
    @classmethod
    def _pairs_are_sizes(cls, size: Any) -> Any:
        # [256, 384] are two sizes, as in [256, 384, 512]; one of height and width is
        # written [[256, 384]].
        if isinstance(size, (int, type(None))):
            return size
        if not isinstance(size, (list, tuple)) or not size:
            raise ValueError(f"must be 256, [256, 384] or [[96, 192]], got {size!r}")
        return list(size)

    @property
    def sizes(self) -> list[int | tuple[int, int]]:
        """The sizes to draw from; none where the student's own is meant."""
        if self.size is None:
            return []
        return list(self.size) if isinstance(self.size, list) else [self.size]


class CheckpointConfig(Strict):
    """What is kept on the way."""

    every_steps: int = Field(500, ge=1, description="a checkpoint each so many steps")
    log_steps: int = Field(10, ge=1, description="a line in the log each so many steps")


class DeviceConfig(Strict):
    """Where the student runs."""

    device: str = Field("auto", description="auto, cpu, cuda or cuda:N")
    threads: int | None = Field(
        None, ge=1, description="torch's own on a CPU; omitted: the cores there are"
    )


class EngineConfig(DeviceConfig):
    """Where and how the student is trained."""

    compile: bool = Field(
        False, description="torch.compile, at the first step of each input size"
    )


class EmaConfig(Strict):
    """A second student whose weights are a running average of the first's."""

    decay: float = Field(
        0.9999, gt=0, lt=1, description="share of the average that each step keeps"
    )


class Recipe(Strict):
    """Everything a student is trained from."""

    run: str = Field(description="folder of checkpoints, logs and the student")
    banks: dict[str, str] = Field(
        min_length=1, max_length=1, description="name to path or URL of the bank"
    )
    data: DataConfig = Field(default_factory=DataConfig)
    student: StudentConfig
    targets: dict[str, TargetConfig] = Field(min_length=1)
    normalise: NormaliseRule = Field(
        "standardise",
        description="of teachers' features, by the bank's statistics of each output: "
        "none; standardise, per channel; phi_s, turned so that one scale will do; "
        "whiten",
    )
    balance: BalanceConfig = Field(
        default_factory=BalanceConfig, description="between teachers"
    )
    loader: LoaderConfig = Field(default_factory=LoaderConfig)
    optimizer: OptimizerConfig = Field(default_factory=OptimizerConfig)
    stages: list[StageConfig] = Field(min_length=1)
    precision: Literal["float32", "bfloat16", "float16"] = Field(
        "float32",
        description="of the student's arithmetic; losses are float32. float16: with a "
        "scaled loss; a step whose gradient overflows is left out",
    )
    ema: EmaConfig | None = Field(
        None, description="averaged weights, exported to student-ema"
    )
    seed: int = Field(0, ge=0, lt=2**63)
    require_license: list[str] | None = Field(
        None,
        min_length=1,
        description="licences that the data and the targets' teachers may have; any "
        "other is refused before training",
    )
    checkpoints: CheckpointConfig = Field(default_factory=CheckpointConfig)
    engine: EngineConfig = Field(default_factory=EngineConfig)

    @model_validator(mode="after")
    def _names(self) -> Recipe:
        _check_names(self.banks, self.data)
        for name, target in self.targets.items():
            check_name(name, "name of target")
            other = target.head.same_as
            if other is not None and (
                other not in self.targets or self.targets[other].head.same_as
            ):
                raise ValueError(
                    f"targets.{name}.head.same_as must be a target with a head of its "
                    f"own, got {other!r}"
                )
        if self.balance.kind != "fixed" and any(s.accumulate > 1 for s in self.stages):
            raise ValueError(
                "accumulate must be 1 with `balance: drop_teachers`, which weighs the "
                "losses of a whole step's images before any is learned from; take a "
                "smaller batch, or more ranks"
            )
        names = [stage.name for stage in self.stages]
        if len(set(names)) != len(names):
            raise ValueError(f"stages must have different names, got {names}")
        return self


class ProbeConfig(Strict):
    """One question put to every model."""

    label: str = Field(
        description="<bank>/labels/<name>, data/<label> or trajectories/<name>"
    )
    kinds: list[Literal["knn", "linear", "dense"]] | None = Field(
        None, description="omitted: knn and linear for a value per row, else dense"
    )
    grid: tuple[int, int] | None = Field(
        None,
        description="dense: cells that every model's grid is resampled to; omitted: "
        "the smallest of all, the label's among them; of a bird's-eye label half its "
        "rows and columns, at most 32",
    )
    heights_m: tuple[float, ...] = Field(
        (-1.7, -1.2),
        min_length=1,
        description="bird's-eye labels: heights at which a cell looks into the image, "
        "LiDAR z; omitted: the ground and half a metre above it, under a LiDAR on a "
        "car's roof",
    )
    classifier: str | None = Field(
        None,
        description="zero-shot instead: <teacher>/<output> of the bank that came from "
        "a classifier, whose classes are the label's",
    )

    @field_validator("grid")
    @classmethod
    def _has_cells(cls, grid: tuple[int, int] | None) -> tuple[int, int] | None:
        if grid is not None and min(grid) < 1:
            raise ValueError(f"must have at least 1 row and 1 column, got {list(grid)}")
        return grid

    @model_validator(mode="after")
    def _asks_one_way(self) -> ProbeConfig:
        if self.classifier is not None and (self.kinds or self.grid):
            raise ValueError(
                "`classifier` is a way of asking by itself: leave out `kinds` and "
                "`grid`, or ask twice"
            )
        return self


class SplitsConfig(Strict):
    """Rows to fit on, to choose settings on, and to score on once."""

    fit: RowsConfig
    choose: RowsConfig
    test: RowsConfig


class Probe(Strict):
    """Scores of students, of random ones, and of each teacher from its features."""

    banks: dict[str, str] = Field(min_length=1, max_length=1)
    data: DataConfig = Field(default_factory=DataConfig)
    students: dict[str, str] = Field(
        default_factory=dict, description="name to the folder of a run or of a student"
    )
    random: bool = Field(
        True, description="score each student's architecture with random weights too"
    )
    teachers: dict[str, list[str]] | None = Field(
        None,
        description="name to outputs of the bank, <teacher>/<output>; omitted: all; "
        "{}: none",
    )
    splits: SplitsConfig
    trajectories: dict[str, TrajectoryConfig] = Field(
        default_factory=dict, description="futures that a probe's `label` can name"
    )
    probes: dict[str, ProbeConfig] = Field(min_length=1)
    result: str | None = Field(None, description="JSON file for the scores")
    batch: int = Field(64, ge=1)
    seed: int = Field(0, ge=0, lt=2**63, description="of the random students")
    engine: DeviceConfig = Field(default_factory=DeviceConfig)

    @model_validator(mode="after")
    def _names(self) -> Probe:
        _check_names(self.banks, self.data)
        if TRAJECTORIES in self.banks:
            raise ValueError(
                f"name of bank must not be {TRAJECTORIES}: futures are called that"
            )
        if not self.students and self.teachers == {}:
            raise ValueError("give `students` or `teachers`: there is nothing to score")
        return self


def _check_names(banks: dict[str, str], data: DataConfig) -> None:
    for name in banks:
        check_name(name, "name of bank")
        if name == DATA:
            raise ValueError(f"name of bank must not be {DATA}: labels are called that")
    for name in data.labels:
        check_name(name, "name of label")
