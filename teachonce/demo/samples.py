"""A scene as its sensors and its truth, and as the members of a WebDataset sample."""

from __future__ import annotations

import io
import json
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from teachonce.demo.lidar import COLUMNS, project, sweep_points
from teachonce.demo.objects import CLASSES, Floats
from teachonce.demo.raycast import CameraGrid, cast
from teachonce.demo.scenes import WAYPOINT_S, Scene, SceneOptions, draw_scene
from teachonce.demo.shading import FARTHEST_M, seen_labels, shade
from teachonce.demo.streets import SCENE_CLASSES
from teachonce.demo.truth import (
    BEV_CELL_M,
    BEV_CLASSES,
    BEV_X_M,
    BEV_Y_M,
    depth_map,
    occupancy,
)


@dataclass(frozen=True)
class DemoSample:
    """One scene, sensed.

    Attributes:
        scene: what it shows.
        image_HW3: uint8 RGB.
        points_P5: float32 sweep, ``lidar.COLUMNS``.
        point_label_P: uint8 number in ``CLASSES`` of each point; not stored.
        seg_HW: uint8 number in ``CLASSES`` of each pixel.
        depth_HW: uint16 depth along the optical axis, centimetres, 0 for the sky.
        bev_XY: uint8 number in ``BEV_CLASSES`` of each cell, (64, 64).
    """

    scene: Scene
    image_HW3: NDArray[np.uint8]
    points_P5: Floats
    point_label_P: NDArray[np.uint8]
    seg_HW: NDArray[np.uint8]
    depth_HW: NDArray[np.uint16]
    bev_XY: NDArray[np.uint8]

    def metadata(self) -> dict[str, Any]:
        """Returns ``KEY.json``: calibration, conditions, where the car goes."""
        scene, options = self.scene, self.scene.options
        rig, street = scene.rig, scene.street
        _, is_in = project(
            self.points_P5,
            rig.intrinsics_33,
            rig.lidar2cam_44,
            options.height,
            options.width,
        )
        light = None if street.is_red is None else "red" if street.is_red else "green"
        return {
            "sensor": "demo",
            "source": {
                "sensor": "demo",
                "seed": scene.seed,
                "index": scene.index,
                "textures": options.textures,
            },
            "lidar": {
                "columns": list(COLUMNS),
                "dtype": "<f4",
                "points": len(self.points_P5),
            },
            "camera": {
                "name": "CAM_FRONT",
                "width": options.width,
                "height": options.height,
                "intrinsics": rig.intrinsics_33.tolist(),
                "lidar2cam": rig.lidar2cam_44.tolist(),
            },
            "expected": {"points_in_image": int(is_in.sum())},
            "class": SCENE_CLASSES[scene.cls],
            "night": scene.is_night,
            "fog": scene.fog_m is not None,
            "fog_visibility_m": scene.fog_m,
            "lidar_range_m": options.lidar_range_m,
            "ego": {"speed_mps": street.speed_mps},
            "road": {
                "curvature_per_m": scene.road.curvature_per_m,
                "lanes_per_direction": scene.road.lanes,
                "lane_m": scene.road.lane_m,
            },
            "traffic": {
                "lead_x_m": street.lead_x_m,
                "light": light,
                "has_crosser": street.has_crosser,
            },
            "waypoints": {
                "time_s": list(WAYPOINT_S),
                "xy_m": scene.waypoints_W2.tolist(),
            },
            "seg": {"classes": list(CLASSES)},
            "depth": {"unit_m": 0.01, "nothing": 0, "axis": "optical"},
            "bev": {
                "classes": list(BEV_CLASSES),
                "x_m": list(BEV_X_M),
                "y_m": list(BEV_Y_M),
                "cell_m": BEV_CELL_M,
                "row_0": "x_max",
                "column_0": "y_max",
            },
        }

    def members(self) -> dict[str, bytes]:
        """Returns the members by extension, in the order in which they are stored."""
        return {
            "jpg": _encode(self.image_HW3, "JPEG", quality=self.scene.options.quality),
            "bin": self.points_P5.astype("<f4").tobytes(),
            "json": (json.dumps(self.metadata(), indent=1) + "\n").encode(),
            "cls": str(self.scene.cls).encode(),
            "seg.png": _encode(self.seg_HW, "PNG"),
            "depth.png": _encode(self.depth_HW, "PNG", compress_level=3),
            "bev.png": _encode(self.bev_XY, "PNG"),
        }


def _encode(array: NDArray[Any], kind: str, **options: int) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(array).save(stream, kind, **options)
    return stream.getvalue()


def sense(scene: Scene) -> DemoSample:
    """Returns the scene as camera and LiDAR see it, with its truth."""
    options, rig = scene.options, scene.rig
    grid = CameraGrid(rig.intrinsics_33, rig.ego2cam_44, options.height, options.width)
    hits = cast(grid, scene.objects, FARTHEST_M)
    seg_HW = seen_labels(scene, grid, hits)
    points_P5, point_label_P = sweep_points(scene)
    return DemoSample(
        scene=scene,
        image_HW3=shade(scene, grid, hits, seg_HW),
        points_P5=points_P5,
        point_label_P=point_label_P,
        seg_HW=seg_HW,
        depth_HW=depth_map(grid, hits),
        bev_XY=occupancy(scene),
    )


def make_sample(
    seed: int, index: int, options: SceneOptions | None = None
) -> DemoSample:
    """Returns sample ``index`` of ``seed``, a pure function of its arguments.

    Raises:
        DemoError: seed or index is negative or too large.
    """
    return sense(draw_scene(seed, index, options))
