"""PointPillars as a teacher: a sweep to a map seen from above.

``pointpillars:kitti``, ``nuscenes``, ``nuscenes_fpn`` or ``waymo``; ``args`` may say
whose ``layout`` (mmdet3d, the default, or openpcdet) and change any field of
`teachers.pointpillars.presets.PillarsConfig`. Weights are files of those code bases, as
published. Outputs: ``bev``, what the detection head is given, and ``level<k>``, the
stages before the neck. Their extent is the network's own and needs no saying.

Points go to the network as the view has them, in float32 whatever the precision, in the
order of the file, with rows of NaN behind the last one.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from teachers.cost import building_on
from teachers.errors import TeacherError, WeightsNotFound
from teachers.inputs.points import PointsSpec
from teachers.inputs.spec import InputSpec
from teachers.interface import Size, TeacherRequest, WeightsRecord
from teachers.key_maps import map_keys
from teachers.pointpillars.layouts import LAYOUTS, to_ours
from teachers.pointpillars.network import Maps, PointPillars, initialise
from teachers.pointpillars.presets import (
    LAYOUT,
    TIME_LAG,
    PillarsConfig,
    Preset,
    presets_of,
    resolve_preset,
)
from teachers.torch_teacher import Tap, TorchTeacher, freeze, seeded
from teachers.weights import load_strict, local_path, read_state_dict

_CODE_LICENSE = "apache-2.0"


def find_weights(request: TeacherRequest) -> WeightsRecord:
    """Raises WeightsNotFound: says where the published file is and how to name it."""
    where = f"teachers.{request.name}"
    _, preset, _ = resolve_preset(request.config.model_name, request.config.args, where)
    given = request.config.weights
    raise WeightsNotFound(
        f"{where}.weights must be a file or URL for pointpillars:, got "
        f"{'nothing' if given is None else repr(given)}; fetch the published one where "
        f"there is a network ({preset.weights}), put it in reach of the workers and "
        "name it (weights: /path/model.pth or gs://...); `weights: random` tries the "
        "job without it"
    )


def open_teacher(
    request: TeacherRequest, weights: WeightsRecord, device: str
) -> PointPillarsTeacher:
    """Returns PointPillars as a teacher; see `teachers.registry.open_teacher`."""
    return PointPillarsTeacher(request, weights, device)


class PointPillarsTeacher(TorchTeacher):
    """PointPillars on one sweep."""

    def __init__(
        self, request: TeacherRequest, weights: WeightsRecord, device: str
    ) -> None:
        super().__init__(request, device)
        self._weights = weights
        self._item = request.group[0]
        self._layout, preset, self._config = resolve_preset(
            request.config.model_name, request.config.args, self.where
        )
        self._sweep, self._columns = self._make_sweep(preset)
        self._check_outputs()
        self.facts = self._make_facts(
            self._create("meta"),
            license=f"{_CODE_LICENSE}; trained on data under {preset.data_license}",
            source=source_of(preset, self._layout),
        )

    @property
    def sizes(self) -> tuple[Size | None, ...]:
        """A sweep has no size: (None,)."""
        return (None,)

    def inputs(self, size: Size | None) -> dict[str, InputSpec]:
        """Returns how the sweep is taken; see `Teacher.inputs`."""
        del size
        return {self._item.name: self._sweep}

    def _make_sweep(self, preset: Preset) -> tuple[PointsSpec, tuple[str, ...]]:
        """Returns how the sweep is taken, and what the network calls its columns."""
        given = self.request.config.preprocess
        for field in ("centre", "unit_sphere"):
            if getattr(given, field):
                raise TeacherError(
                    f"{self.where}.preprocess.{field} must be left out: pillars stand "
                    "at metres of the LiDAR"
                )
        wanted = self._config.columns
        theirs = given.columns
        if theirs is None:
            # The time lag of a single sweep is 0, so it need not have one.
            theirs = tuple(
                name
                for name in wanted
                if name != TIME_LAG or name in self._item.columns
            )
            ours = theirs
        elif len(theirs) == len(wanted):
            ours = wanted
        else:
            raise TeacherError(
                f"{self.where}.preprocess.columns must name {len(wanted)} columns, for "
                f"{', '.join(wanted)}, got {', '.join(theirs)}"
            )
        if absent := [name for name in theirs if name not in self._item.columns]:
            raise TeacherError(
                f"{self.where} needs the columns {', '.join(theirs)} of "
                f"{self._item.name}, which has {', '.join(self._item.columns)} and not "
                f"{', '.join(absent)}; say which to take with `preprocess.columns`"
            )
        is_single = TIME_LAG not in ours
        number = preset.points if is_single else preset.points_accumulated
        spec = PointsSpec(
            columns=theirs,
            indices=tuple(self._item.columns.index(name) for name in theirs),
            num_points=given.points or number,
            fill="nan",
            exact=True,
        )
        return spec, ours

    def _check_outputs(self) -> None:
        last = len(self._config.stage_layers) - 1
        for name, output in self.request.config.outputs.items():
            entry = f"{self.where}.outputs.{name}"
            level = re.fullmatch(r"level(\d+)", name)
            if level and int(level[1]) > last:
                raise TeacherError(
                    f"{entry} must be one of those of the model: bev, level0 to "
                    f"level{last}"
                )
            if output.norm is not None:
                raise TeacherError(
                    f"{entry}.norm has no effect on pointpillars:; leave it out"
                )

    def _create(self, device: str) -> PointPillars:
        with building_on(device), seeded(self._weights.seed):
            model = PointPillars(self._config, self._columns)
            initialise(model)
        return model

    def _blueprint(self, size: Size | None, device: str) -> nn.Module:
        del size
        return self._create(device)

    def _build(self, size: Size | None) -> nn.Module:
        del size
        model = self._create("cpu")
        if self._weights.kind == "file":
            url = self._weights.url
            with local_path(self.request, self._weights) as path:
                state = read_state_dict(path, url)
            state = map_keys(state, self.request.config.keys, self.where)
            load_strict(model, to_ours(state, self._layout, url, self.where), url)
        return model

    def _taps(
        self, model: nn.Module, batch: Mapping[str, Tensor], size: Size | None
    ) -> dict[str, Tap]:
        del size
        found = taps_of(model(batch[self._item.name]), self._config)
        return {name: found[name] for name in self.request.config.outputs}


def taps_of(maps: Maps, config: PillarsConfig) -> dict[str, Tap]:
    """Returns every output of a forward pass by name."""
    finest = "neck, finest level" if config.neck == "fpn" else "neck, stages joined"
    taps = {"bev": Tap(maps.bev_BXYC, None, finest, config.extent)}
    for number, level_BXYC in enumerate(maps.levels):
        source = f"backbone, stage {number}"
        taps[f"level{number}"] = Tap(level_BXYC, None, source, config.extent)
    return taps


def source_of(preset: Preset, layout: str) -> str:
    """Returns which published model it is, and what of it is left out, in words."""
    return f"{preset.source} (left out: {LAYOUTS[layout].head})"


def describe(name: str, base: str) -> dict[str, Any]:
    """Returns, by layout, outputs, points, parameters, licence and source.

    Raises:
        TeacherError: there is no such preset.
    """
    del base
    layouts = {}
    for layout, preset in presets_of(name).items():
        config = preset.config
        with building_on("meta"):
            model = freeze(PointPillars(config, config.columns))
        points_BPC = torch.zeros(1, 16, len(config.columns), device="meta")
        with torch.inference_mode():
            taps = taps_of(model(points_BPC), config)
        layouts[layout] = {
            "outputs": {name: list(tap.tensor.shape[1:]) for name, tap in taps.items()},
            "num_parameters": sum(item.numel() for item in model.parameters()),
            "points": preset.points,
            "config": config.model_dump(mode="json"),
            "license": f"{_CODE_LICENSE}; trained on data under {preset.data_license}",
            "source": source_of(preset, layout),
            "weights": preset.weights,
        }
    return {"args": [LAYOUT, *PillarsConfig.model_fields], "layouts": layouts}
