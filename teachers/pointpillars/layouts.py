"""How OpenPCDet and mmdetection3d name the parameters of a PointPillars network.

Owns the maps from their names to ours. Heads are left out: they come after the features
that a teacher gives. Every other name that a map does not know is kept, so that strict
loading names it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from re import Match

from torch import Tensor

from teachers.errors import TeacherError
from teachers.pointpillars.presets import LAYOUT, MMDET3D, OPENPCDET

Rename = tuple[str, str | Callable[[Match[str]], str]]


@dataclass(frozen=True)
class Layout:
    """A code base's names.

    Attributes:
        mark: prefix that only its state dicts have.
        renames: pattern of a whole name to ours; the first that fits is taken.
        left_out: pattern of the names that are no part of the features.
        head: what is left out, in words.
    """

    mark: str
    renames: tuple[Rename, ...]
    left_out: str
    head: str


def _without_padding(match: Match[str]) -> str:
    # Its stages begin with a ZeroPad2d of their own; ours pad in the convolution.
    return f"stages.{match[1]}.{int(match[2]) - 1}.{match[3]}"


def _pyramid(match: Match[str]) -> str:
    part = {"lateral": "lateral", "fpn": "output"}[match[1]]
    return f"neck.{part}.{match[2]}.{('conv', 'bn').index(match[3])}.{match[4]}"


LAYOUTS: dict[str, Layout] = {
    OPENPCDET: Layout(
        mark=r"(vfe|backbone_2d)\.",
        renames=(
            (r"vfe\.pfn_layers\.(\d+)\.(.+)", r"encoder.layers.\1.\2"),
            (r"backbone_2d\.blocks\.(\d+)\.(\d+)\.(.+)", _without_padding),
            (r"backbone_2d\.deblocks\.(.+)", r"neck.\1"),
        ),
        left_out=r"dense_head\..+|global_step",
        head="dense_head, global_step",
    ),
    MMDET3D: Layout(
        mark=r"(pts_)?(voxel_encoder|backbone)\.",
        renames=(
            (
                r"(?:pts_)?voxel_encoder\.(?:pfn|vfe)_layers\.(\d+)\.(.+)",
                r"encoder.layers.\1.\2",
            ),
            (r"(?:pts_)?backbone\.blocks\.(.+)", r"stages.\1"),
            (r"(?:pts_)?neck\.deblocks\.(.+)", r"neck.\1"),
            (
                r"(?:pts_)?neck\.lateral_convs\.(\d+)\.conv\.(.+)",
                r"neck.lateral.\1.0.\2",
            ),
            (r"(?:pts_)?neck\.lateral_convs\.(\d+)\.bn\.(.+)", r"neck.lateral.\1.1.\2"),
            (r"(?:pts_)?neck\.fpn_convs\.(\d+)\.conv\.(.+)", r"neck.output.\1.0.\2"),
            (r"(?:pts_)?neck\.fpn_convs\.(\d+)\.bn\.(.+)", r"neck.output.\1.1.\2"),
        ),
        left_out=r"(pts_)?bbox_head\..+",
        head="bbox_head",
    ),
}


def rename(name: str, layout: Layout) -> str:
    """Returns our name of a parameter; the name itself where the layout has none."""
    for pattern, ours in layout.renames:
        if match := re.fullmatch(pattern, name):
            return ours(match) if callable(ours) else match.expand(ours)
    return name


def to_ours(
    state: Mapping[str, Tensor], layout: str, url: str, where: str
) -> dict[str, Tensor]:
    """Returns a published state dict under our names, without its head.

    Args:
        state: by the code base's names.
        layout: the code base's.
        url: of the file, for messages.
        where: the teacher's entry in the job, for messages.

    Raises:
        TeacherError: the names are those of another code base.
    """
    for other, known in LAYOUTS.items():
        has_marks = any(re.match(known.mark, name) for name in state)
        if has_marks and other != layout:
            raise TeacherError(
                f"{where}.args.{LAYOUT} must be that of the weights, {other}, got "
                f"{layout} ({url}); write `args: {{{LAYOUT}: {other}}}`"
            )
    chosen = LAYOUTS[layout]
    return {
        rename(name, chosen): value
        for name, value in state.items()
        if not re.fullmatch(chosen.left_out, name)
    }
