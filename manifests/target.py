"""What a student learns: the entry of a target, and how targets are weighed.

Owns the models of these fields and what can be checked without a bank. Which losses and
heads there are beyond the fields here is ``student_train``'s to say.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from manifests.document import Strict

NormaliseRule = Literal["none", "standardise", "phi_s", "whiten"]


class HeadConfig(Strict):
    """From the student's tokens to one target."""

    kind: str = Field(
        "adapter",
        description="adapter: EUPE's two layers; linear; ladder: UNIC's sum over all "
        "layers of the student; transformer: one more layer, as DUNE's; bev: camera "
        "tokens to a bird's-eye grid; or one that another package brings",
    )
    same_as: str | None = Field(
        None, description="another target, whose very head is used: plain KD has one"
    )
    hidden: int | None = Field(
        None, ge=1, description="width of the hidden layer; omitted: 4 x the tokens'"
    )
    rungs: int | None = Field(
        None,
        ge=1,
        description="ladder: width of the hidden layers below the last; omitted: the "
        "tokens'",
    )
    heads: int | None = Field(
        None,
        ge=1,
        description="transformer: of its attention; omitted: one for 64 channels",
    )
    args: dict[str, Any] = Field(
        default_factory=dict, description="of a head that another package brings"
    )
    cells: tuple[int, int] | None = Field(
        None, description="bev: rows and columns; omitted: the teacher's own grid"
    )
    heights_m: tuple[float, ...] = Field(
        (-1.5, -0.5, 0.5),
        min_length=1,
        description="bev: heights at which a cell looks into the image, LiDAR z",
    )


class LossConfig(Strict):
    """One term of a target's loss."""

    weight: float = Field(1.0, ge=0)
    beta: float | None = Field(None, gt=0, description="smooth_l1: where it bends")
    temperature: float | None = Field(None, gt=0, description="kl: of both softmaxes")
    label_smoothing: float | None = Field(
        None, ge=0, lt=1, description="cross_entropy: share spread over all classes"
    )
    args: dict[str, float] = Field(
        default_factory=dict, description="of a loss that another package brings"
    )


class TargetConfig(Strict):
    """One thing the student learns: a teacher's output, or a label."""

    source: str = Field(
        alias="from",
        description="<bank>/<teacher>/<output> (with /<group> or /<group>/<size> "
        "between where there are several), <bank>/labels/<name>, data/<label>",
    )
    head: HeadConfig = Field(default_factory=HeadConfig)
    loss: dict[str, LossConfig] = Field(
        min_length=1, description="loss to its weight, or to its weight and parameters"
    )
    tokens: Literal["cls", "pooled", "patch"] | None = Field(
        None, description="of the student; omitted: patch for grids, else cls or pooled"
    )
    grid: Literal["larger", "smaller", "student", "teacher", "coincide"] = Field(
        "larger",
        description="grid that the loss is taken on; coincide: the student's input has "
        "the size at which its grid is the teacher's",
    )
    normalise: NormaliseRule | None = Field(
        None, description="of this target; omitted: the recipe's"
    )
    weight: float = Field(1.0, ge=0, description="of the whole target")

    @field_validator("loss", mode="before")
    @classmethod
    def _weights_alone(cls, loss: Any) -> Any:
        if not isinstance(loss, dict):
            return loss
        return {
            name: {"weight": value}
            if isinstance(value, (int, float)) and not isinstance(value, bool)
            else value
            for name, value in loss.items()
        }


class BalanceConfig(Strict):
    """How teachers are weighed against each other, beside targets' own weights."""

    kind: Literal["fixed", "drop_teachers"] = Field(
        "fixed",
        description="drop_teachers: UNIC's, by chance for each image, never the one "
        "with the highest loss",
    )
    p: float | None = Field(
        None,
        ge=0,
        lt=1,
        description="drop_teachers: chance of each of the others; omitted: UNIC's 0.5",
    )

    @model_validator(mode="after")
    def _has_use(self) -> BalanceConfig:
        if self.kind == "fixed" and self.p is not None:
            raise ValueError("`p` is of `kind: drop_teachers`, leave it out")
        return self
