"""How the views of a bank are drawn, as a job says it."""

from __future__ import annotations

from pydantic import Field, field_validator

from manifests.document import Strict


class PhotometricConfig(Strict):
    """Colour changes of random views, the same for all teachers and the student.

    In the order of the fields. A factor f is drawn uniformly from [1 - f, 1 + f].
    """

    brightness: float = Field(0.0, ge=0, le=1, description="largest change of factor")
    contrast: float = Field(0.0, ge=0, le=1, description="largest change of factor")
    saturation: float = Field(0.0, ge=0, le=1, description="largest change of factor")
    hue: float = Field(
        0.0, ge=0, le=0.5, description="largest turn, as a share of the circle"
    )
    grey: float = Field(0.0, ge=0, le=1, description="share of views without colour")
    blur: float = Field(0.0, ge=0, le=1, description="share of views that are blurred")
    blur_sigma: tuple[float, float] = Field(
        (0.0005, 0.01), description="of the blur, as a share of the view's longer side"
    )
    solarize: float = Field(0.0, ge=0, le=1, description="share of views solarized")
    solarize_above: int = Field(
        128, ge=0, le=255, description="values from here on are inverted"
    )

    @field_validator("blur_sigma")
    @classmethod
    def _ordered(cls, pair: tuple[float, float]) -> tuple[float, float]:
        if not 0 < pair[0] <= pair[1] <= 0.1:
            raise ValueError(f"must be 0 < low <= high <= 0.1, got {list(pair)}")
        return pair


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
    photometric: PhotometricConfig | None = Field(
        None, description="colour changes of random views; omitted: none"
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
