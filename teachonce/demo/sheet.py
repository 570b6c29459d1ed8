"""A contact sheet: what the sensors see and what is true, side by side."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from teachonce.demo.lidar import project
from teachonce.demo.objects import CLASSES
from teachonce.demo.samples import DemoSample
from teachonce.demo.streets import SCENE_CLASSES
from teachonce.demo.truth import BEV_CELL_M, BEV_CLASSES, BEV_X_M, BEV_Y_M, DEPTH_PER_M

#: Colours of ``CLASSES``, after Cityscapes where it has the class.
SEG_COLOURS = np.array(
    [
        (70, 130, 180),
        (128, 64, 128),
        (255, 255, 255),
        (244, 35, 232),
        (152, 251, 152),
        (90, 80, 80),
        (190, 153, 120),
        (0, 0, 180),
        (220, 20, 60),
        (107, 142, 35),
        (153, 153, 153),
        (220, 220, 0),
    ],
    np.uint8,
)
#: Colours of ``BEV_CLASSES``.
BEV_COLOURS = np.array(
    [(245, 245, 245), (110, 100, 100), (0, 0, 200), (220, 20, 60), (90, 140, 40)],
    np.uint8,
)

_FARTHEST_M = 60.0
_LINE_PX, _GAP_PX = 14, 4


def ramp(distance_m: NDArray[np.float64]) -> NDArray[np.uint8]:
    """Returns colours (..., 3) for distances: red near, over green, to blue at 60 m."""
    share = np.clip(np.sqrt(distance_m / _FARTHEST_M), 0, 1)[..., None]
    shifted = 1.5 - np.abs(4 * share - np.array([1.0, 2.0, 3.0]))
    colour: NDArray[np.uint8] = (255 * np.clip(shifted, 0, 1)).astype(np.uint8)
    return colour


def draw_overlay(sample: DemoSample) -> NDArray[np.uint8]:
    """Returns the image with the LiDAR's points in the colour of their depth."""
    height, width = sample.seg_HW.shape
    rig = sample.scene.rig
    places_P3, is_in = project(
        sample.points_P5, rig.intrinsics_33, rig.lidar2cam_44, height, width
    )
    picture = (sample.image_HW3 * 0.6).astype(np.uint8)
    seen_P3 = places_P3[is_in]
    seen_P3 = seen_P3[np.argsort(-seen_P3[:, 2])]
    row, column = seen_P3[:, 1].astype(int), seen_P3[:, 0].astype(int)
    picture[row, column] = ramp(seen_P3[:, 2])
    picture[row, np.minimum(column + 1, width - 1)] = ramp(seen_P3[:, 2])
    return picture


def draw_map(sample: DemoSample, size_px: int) -> NDArray[np.uint8]:
    """Returns the map from above, points in red, the way ahead in orange."""
    picture = Image.fromarray(BEV_COLOURS[sample.bev_XY])
    picture = picture.resize((size_px, size_px), Image.Resampling.NEAREST)
    pen = ImageDraw.Draw(picture)
    scale = size_px / (BEV_CELL_M * sample.bev_XY.shape[0])

    def place(x: float, y: float) -> tuple[float, float]:
        return (BEV_Y_M[1] - y) * scale, (BEV_X_M[1] - x) * scale

    high = sample.points_P5[
        sample.points_P5[:, 2] > 0.3 - sample.scene.rig.lidar_height_m
    ]
    inside = (high[:, 0] > BEV_X_M[0]) & (high[:, 0] < BEV_X_M[1])
    pen.point([place(x, y) for x, y in high[inside, :2].tolist()], fill=(230, 60, 60))
    way = [(0.0, 0.0), *sample.scene.waypoints_W2.tolist()]
    pen.line([place(x, y) for x, y in way], fill=(255, 140, 0), width=2)
    return np.asarray(picture)


def draw_contact_sheet(
    samples: Iterable[DemoSample], path: str | Path | None = None
) -> Image.Image:
    """Returns, and writes if ``path`` is given, one row of pictures per sample.

    A row shows the image, its classes, its depth, the LiDAR on the image and the map.
    """
    rows = [_draw_row(sample) for sample in samples]
    width = max(row.width for row in rows)
    sheet = Image.new("RGB", (width, sum(row.height for row in rows) + 16), "white")
    top = 0
    for row in rows:
        sheet.paste(row, (0, top))
        top += row.height
    _draw_legend(sheet, top)
    if path is not None:
        sheet.save(path)
    return sheet


def _draw_row(sample: DemoSample) -> Image.Image:
    scene = sample.scene
    height, width = sample.seg_HW.shape
    depth_m = sample.depth_HW / DEPTH_PER_M
    shown_depth = np.where(depth_m[..., None] > 0, ramp(depth_m), np.uint8(255))
    tiles = [
        sample.image_HW3,
        SEG_COLOURS[sample.seg_HW],
        shown_depth,
        draw_overlay(sample),
        draw_map(sample, height),
    ]
    total = sum(tile.shape[1] + _GAP_PX for tile in tiles)
    row = Image.new("RGB", (total, height + _LINE_PX + _GAP_PX), "white")
    left = 0
    for tile in tiles:
        row.paste(Image.fromarray(np.ascontiguousarray(tile)), (left, _LINE_PX))
        left += tile.shape[1] + _GAP_PX
    fog = "" if scene.fog_m is None else f"  fog {scene.fog_m:.0f} m"
    night = "  night" if scene.is_night else ""
    text = (
        f"{scene.key}  {SCENE_CLASSES[scene.cls]}{night}{fog}"
        f"  {scene.street.speed_mps:.0f} m/s  {len(sample.points_P5)} points"
    )
    pen = ImageDraw.Draw(row)
    pen.text((2, 1), text, fill="black")
    pen.text((3 * (width + _GAP_PX) + 2, 1), "LiDAR by depth, 0 to 60 m", fill="black")
    pen.text((4 * (width + _GAP_PX) + 2, 1), "map 48 x 48 m, way", fill="black")
    return row


def _draw_legend(sheet: Image.Image, top: int) -> None:
    pen = ImageDraw.Draw(sheet)
    left = 2
    named = [*zip(CLASSES, SEG_COLOURS, strict=True), ("| map:", None)]
    for name, colour in [*named, *zip(BEV_CLASSES, BEV_COLOURS, strict=True)]:
        if colour is not None:
            box = (left, top + 3, left + 10, top + 13)
            pen.rectangle(box, tuple(colour.tolist()), "black")
            left += 13
        pen.text((left, top + 2), name, fill="black")
        left += 7 * len(name) + 8
