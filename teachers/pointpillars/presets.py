"""Published PointPillars: what each of them is, in numbers, and where it comes from.

Owns the configuration of a network, what a job's ``args`` may change of it, and the
table of presets: a data set's name and whose layout. Knows no torch.

Source of every number: the configuration named in a preset's ``config``, in
open-mmlab/mmdetection3d and open-mmlab/OpenPCDet (both Apache-2.0).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import Field, model_validator

from manifests.document import Strict
from manifests.errors import ManifestError
from manifests.loading import parse_document
from manifests.suggestions import close_matches
from manifests.teacher import BevExtent
from teachers.errors import TeacherError
from teachers.pointpillars.voxels import PillarGrid, is_whole

MMDET3D, OPENPCDET = "mmdet3d", "openpcdet"
LAYOUT = "layout"
TIME_LAG = "time_lag"
"""Column: seconds from a point's sweep to the newest one; 0 in a single sweep."""

_XYZ = ("x", "y", "z")
_OPENMMLAB = "https://download.openmmlab.com/mmdetection3d"
_PCDET_ZOO = "https://github.com/open-mmlab/OpenPCDet#model-zoo"


class PillarsConfig(Strict):
    """A PointPillars network without its head; a job's ``args`` change its fields."""

    voxel_size: tuple[float, float, float] = Field(description="x, y, z in metres")
    point_range: tuple[float, float, float, float, float, float] = Field(
        description="lowest x, y, z, then highest x, y, z, metres"
    )
    max_points: int = Field(ge=1, description="most points of a pillar")
    max_pillars: int = Field(ge=1, description="most pillars of a sweep")
    columns: tuple[str, ...] = Field(description="point columns, in order")
    intensity_scale: float = Field(
        1.0, gt=0, description="what decoded intensity is multiplied by"
    )
    intensity_tanh: bool = Field(False, description="then its hyperbolic tangent")
    encoder: Literal["pfn", "vfe"] = Field(
        "pfn", description="pfn: all point layers but the last have half their channels"
    )
    encoder_channels: tuple[int, ...] = Field(
        (64,), min_length=1, description="of the point layers"
    )
    centre: Literal["xyz", "xy"] = Field(
        "xyz", description="axes of the offset from the pillar's centre"
    )
    legacy: bool = Field(
        False, description="that offset stands in the place of the coordinates too"
    )
    stage_layers: tuple[int, ...] = Field((3, 5, 5), min_length=1)
    stage_strides: tuple[int, ...] = Field((2, 2, 2), min_length=1)
    stage_channels: tuple[int, ...] = Field((64, 128, 256), min_length=1)
    neck: Literal["deconv", "fpn"] = Field(
        "deconv", description="deconv: stages side by side; fpn: added from the top"
    )
    neck_strides: tuple[float, ...] = Field(
        (1, 2, 4), description="deconv: enlargement of each stage; 0.5 halves it"
    )
    neck_channels: tuple[int, ...] = Field(
        (128, 128, 128), min_length=1, description="deconv: of each stage; fpn: one"
    )

    @model_validator(mode="after")
    def _agrees(self) -> PillarsConfig:
        if self.columns[:3] != _XYZ or len(set(self.columns)) != len(self.columns):
            raise ValueError("columns must begin with x, y, z, each name once")
        num = len(self.stage_layers)
        lists = [self.stage_strides, self.stage_channels]
        if self.neck == "deconv":
            lists += [self.neck_strides, self.neck_channels]  # type: ignore[list-item]
        if any(len(one) != num for one in lists):
            raise ValueError(
                "stage_layers, stage_strides, stage_channels and, for neck deconv, "
                "neck_strides and neck_channels must be equally many"
            )
        if self.neck == "fpn" and len(self.neck_channels) != 1:
            raise ValueError("neck_channels must be one number for neck fpn")
        sides = zip(
            self.point_range[:3], self.point_range[3:], self.voxel_size, strict=True
        )
        if not all(size > 0 and is_whole(low, high, size) for low, high, size in sides):
            raise ValueError(
                "point_range must be a whole number of voxel_size along each axis"
            )
        if self.grid.cells[2] != 1:
            raise ValueError("voxel_size must be as high as point_range: pillars")
        stride = math.prod(self.stage_strides)
        if self.grid.cells[0] % stride or self.grid.cells[1] % stride:
            raise ValueError(
                f"point_range must be a multiple of {stride} voxels along x and y, the "
                f"product of stage_strides; it is {self.grid.cells[:2]}"
            )
        if self.neck == "deconv":
            self._check_neck()
        return self

    def _check_neck(self) -> None:
        reached, scales = 1.0, set()
        for stride, up in zip(self.stage_strides, self.neck_strides, strict=True):
            reached *= stride
            scales.add(reached / up)
            factor = up if up >= 1 else 1 / max(up, 1e-9)
            if factor != round(factor):
                raise ValueError("neck_strides must be whole numbers, or one over one")
        if len(scales) != 1:
            raise ValueError("neck_strides must bring all stages to one size")

    @property
    def grid(self) -> PillarGrid:
        """Where its pillars stand."""
        lowest, highest = self.point_range[:3], self.point_range[3:]
        return PillarGrid(
            self.voxel_size, lowest, highest, self.max_points, self.max_pillars
        )

    @property
    def extent(self) -> BevExtent:
        """What its maps cover: rows from the highest x, columns from the highest y."""
        x_low, y_low, _, x_high, y_high, _ = self.point_range
        return BevExtent(x_m=(x_low, x_high), y_m=(y_low, y_high))


@dataclass(frozen=True)
class Preset:
    """A published network and what is known of it.

    Attributes:
        config: its numbers.
        points: rows given of a single sweep: more than any has, none is left out.
        points_accumulated: the same of a sweep that has the column `TIME_LAG`.
        source: repository and configuration file.
        weights: where the published file is; what to say where there is none.
        data_license: of the data it was trained on.
    """

    config: PillarsConfig
    points: int
    points_accumulated: int
    source: str
    weights: str
    data_license: str


_KITTI = PillarsConfig(
    voxel_size=(0.16, 0.16, 4),
    point_range=(0, -39.68, -3, 69.12, 39.68, 1),
    max_points=32,
    max_pillars=40_000,
    columns=(*_XYZ, "intensity"),
)
# mmdetection3d drops the intensity of nuScenes: LoadPointsFromMultiSweeps keeps the
# columns [0, 1, 2, 4], and 4 is the time lag.
_NUSCENES = PillarsConfig(
    voxel_size=(0.25, 0.25, 8),
    point_range=(-50, -50, -5, 50, 50, 3),
    max_points=64,
    max_pillars=40_000,
    columns=(*_XYZ, TIME_LAG),
    encoder="vfe",
    encoder_channels=(64, 64),
)
_NUSCENES_PCDET = PillarsConfig(
    voxel_size=(0.2, 0.2, 8),
    point_range=(-51.2, -51.2, -5, 51.2, 51.2, 3),
    max_points=20,
    max_pillars=30_000,
    columns=(*_XYZ, "intensity", TIME_LAG),
    intensity_scale=255,
    neck_strides=(0.5, 1, 2),
)
_WAYMO = PillarsConfig(
    voxel_size=(0.32, 0.32, 6),
    point_range=(-74.88, -74.88, -2, 74.88, 74.88, 4),
    max_points=20,
    max_pillars=32_000,
    columns=(*_XYZ, "intensity", "elongation"),
    encoder="vfe",
    stage_strides=(1, 2, 2),
)


def _changed(config: PillarsConfig, **changes: Any) -> PillarsConfig:
    return PillarsConfig.model_validate({**config.model_dump(), **changes})


def _kitti(config: PillarsConfig, source: str, weights: str) -> Preset:
    # 64 beams at about 2,000 azimuths.
    return Preset(config, 150_000, 1_000_000, source, weights, "cc-by-nc-sa-3.0")


def _nuscenes(config: PillarsConfig, source: str, weights: str) -> Preset:
    # 32 beams at 1,090 azimuths; a key frame and ten sweeps before it.
    return Preset(config, 40_000, 400_000, source, weights, "cc-by-nc-sa-4.0")


def _waymo(config: PillarsConfig, source: str, weights: str) -> Preset:
    # Five LiDARs, two returns: 160,000 to 200,000.
    terms = "Waymo Open Dataset, non-commercial"
    return Preset(config, 250_000, 1_000_000, source, weights, terms)


_MMDET3D_CONFIGS = "open-mmlab/mmdetection3d configs/pointpillars"
_PCDET_CONFIGS = "open-mmlab/OpenPCDet tools/cfgs"

PRESETS: dict[str, dict[str, Preset]] = {
    "kitti": {
        MMDET3D: _kitti(
            _changed(_KITTI, legacy=True),
            f"{_MMDET3D_CONFIGS}/hv_pointpillars_secfpn_6x8_160e_kitti-3d-3class.py",
            f"{_OPENMMLAB}/v1.0.0_models/pointpillars/"
            "hv_pointpillars_secfpn_6x8_160e_kitti-3d-3class/"
            "hv_pointpillars_secfpn_6x8_160e_kitti-3d-3class_20220301_150306-"
            "37dc2420.pth",
        ),
        OPENPCDET: _kitti(
            _KITTI, f"{_PCDET_CONFIGS}/kitti_models/pointpillar.yaml", _PCDET_ZOO
        ),
    },
    "nuscenes": {
        MMDET3D: _nuscenes(
            _NUSCENES,
            f"{_MMDET3D_CONFIGS}/hv_pointpillars_secfpn_sbn-all_4x8_2x_nus-3d.py",
            f"{_OPENMMLAB}/v0.1.0_models/pointpillars/"
            "hv_pointpillars_secfpn_sbn-all_4x8_2x_nus-3d/"
            "hv_pointpillars_secfpn_sbn-all_4x8_2x_nus-3d_20200620_230725-"
            "0817d270.pth",
        ),
        OPENPCDET: _nuscenes(
            _NUSCENES_PCDET,
            f"{_PCDET_CONFIGS}/nuscenes_models/cbgs_pp_multihead.yaml",
            _PCDET_ZOO,
        ),
    },
    "nuscenes_fpn": {
        MMDET3D: _nuscenes(
            _changed(_NUSCENES, neck="fpn", neck_channels=(256,)),
            f"{_MMDET3D_CONFIGS}/hv_pointpillars_fpn_sbn-all_4x8_2x_nus-3d.py",
            f"{_OPENMMLAB}/v0.1.0_models/pointpillars/"
            "hv_pointpillars_fpn_sbn-all_4x8_2x_nus-3d/"
            "hv_pointpillars_fpn_sbn-all_4x8_2x_nus-3d_20200620_230405-2fa62f3d.pth",
        ),
    },
    "waymo": {
        MMDET3D: _waymo(
            _WAYMO,
            f"{_MMDET3D_CONFIGS}/hv_pointpillars_secfpn_sbn_2x16_2x_waymoD5-3d-3class.py",
            f"{_OPENMMLAB}/v0.1.0_models/pointpillars/"
            "hv_pointpillars_secfpn_sbn_2x16_2x_waymoD5-3d-3class/"
            "hv_pointpillars_secfpn_sbn_2x16_2x_waymoD5-3d-3class_20200831_204144-"
            "d1a706b1.pth",
        ),
        OPENPCDET: _waymo(
            _changed(
                _WAYMO,
                max_pillars=150_000,
                encoder="pfn",
                encoder_channels=(64, 64),
                intensity_tanh=True,
            ),
            f"{_PCDET_CONFIGS}/waymo_models/pointpillar_1x.yaml",
            "its authors may not publish weights trained on Waymo; train them",
        ),
    },
}


def presets_of(name: str) -> dict[str, Preset]:
    """Returns a data set's presets by layout.

    Raises:
        TeacherError: there is none of that name.
    """
    if name not in PRESETS:
        raise TeacherError(
            f"model must be pointpillars: and one of {', '.join(PRESETS)}, got "
            f"{name!r}{close_matches(name, PRESETS)}"
        )
    return PRESETS[name]


def resolve_preset(
    name: str, args: Mapping[str, Any], where: str
) -> tuple[str, Preset, PillarsConfig]:
    """Returns the layout, the preset and its configuration with ``args`` applied.

    Raises:
        TeacherError: no such preset or layout, or an argument that does not exist or
            contradicts the others.
    """
    known = presets_of(name)
    layout = args.get(LAYOUT, MMDET3D)
    if layout not in known:
        raise TeacherError(
            f"{where}.args.layout must be {' or '.join(known)} for pointpillars:{name},"
            f" got {layout!r}"
        )
    preset = known[layout]
    changes = {key: value for key, value in args.items() if key != LAYOUT}
    fields = {**preset.config.model_dump(), **changes}
    try:
        config = parse_document(PillarsConfig, fields, f"{where}.args")
    except ManifestError as error:
        raise TeacherError(str(error)) from error
    return layout, preset, config
