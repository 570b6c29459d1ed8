"""The job: the YAML that makes a bank.

Owns what a job has beside its inputs, views and teachers, and the rules that need no
file, no model and no network. Loading and overrides are in ``manifests.loading``.
"""

from __future__ import annotations

from typing import Any

from pydantic import Field, field_validator, model_validator

from manifests.bank import MAX_BLOCK_ROWS
from manifests.document import Strict, check_name, parse_bytes
from manifests.inputs import InputConfig, LabelConfig, StoredInputConfig
from manifests.teacher import TeacherConfig
from manifests.views import ViewsConfig

STORED_INPUTS = "stored_inputs"
"""Group of a bank's features that holds copies of its inputs, and key of a job."""


class DatasetConfig(Strict):
    """The input shards."""

    shards: str | list[str] = Field(
        description="URL or path of the .tar shards; braces ({000..127}) and * expand"
    )
    license: str | None = Field(
        None, description="licence of the data, kept in the bank"
    )
    copies_allowed: str | None = Field(
        None,
        min_length=1,
        description="who allows the bank to hold copies of the data (`stored_inputs`), "
        "where the licence is not one that is known to; kept in the bank",
    )


class LimitsConfig(Strict):
    """What the run must not exceed."""

    max_bytes: int | None = Field(
        None, description="refuse a job whose features may take more, e.g. 1.2 TB"
    )
    max_usd: float | None = Field(
        None,
        gt=0,
        allow_inf_nan=False,
        description="refuse a job whose making may cost more, machines and writing; "
        "judged on samples, for the machine type that --machine names",
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
    stored_inputs: dict[str, StoredInputConfig] = Field(
        default_factory=dict,
        description="image inputs that the bank keeps copies of, so that students can "
        "be trained without the shards",
    )
    teachers: dict[str, TeacherConfig] = Field(min_length=1)
    limits: LimitsConfig = Field(default_factory=LimitsConfig)
    engine: EngineConfig = Field(default_factory=EngineConfig)
    block_rows: int | None = Field(
        None,
        ge=1,
        le=MAX_BLOCK_ROWS,
        description="rows of a block; omitted: chosen once, when it is made",
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
            for field in ("calibration", "timestamp"):
                if getattr(config, field, None) and self.metadata is None:
                    raise ValueError(
                        f"inputs.{name}.{field} needs `metadata: EXT`, the JSON "
                        "member that its path is read from"
                    )
        return self

    @model_validator(mode="after")
    def _stored_inputs_are_images(self) -> Job:
        for name in self.stored_inputs:
            where = f"stored_inputs.{name}"
            if name not in self.inputs:
                raise ValueError(
                    f"{where} must be one of the job's inputs "
                    f"({', '.join(self.inputs)}); add it to `inputs`, or leave it out"
                )
            if (kind := self.inputs[name].kind) != "image":
                raise ValueError(
                    f"{where} must be an image, got an input of kind {kind}: a bank "
                    "stores images alone; leave it out, its students read the shards"
                )
        if self.stored_inputs and STORED_INPUTS in self.teachers:
            raise ValueError(
                f"teachers.{STORED_INPUTS}: that is where the bank keeps its "
                "`stored_inputs`; give the teacher another name"
            )
        return self

    @model_validator(mode="after")
    def _own_geometry_has_one_view(self) -> Job:
        for name, config in self.teachers.items():
            if config.preprocess.geometry == "teacher" and self.views.random:
                raise ValueError(
                    f"teachers.{name}.preprocess.geometry must be view where there are "
                    "random views: the model's own transform takes the whole image and "
                    "knows no box; set views.random to 0, or leave geometry out"
                )
        return self

    @property
    def flips(self) -> bool:
        """Whether random views are mirrored: by default only with a single input."""
        return len(self.inputs) == 1 if self.views.flip is None else self.views.flip
