"""Scenes and their truth as arrays: what the experts learn from and are scored on.

Shape suffixes: N scenes, H and W pixels, P points, X and Y cells of the map.
"""

from __future__ import annotations

import io
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from tqdm import tqdm

from teachonce.demo.samples import DemoSample, make_sample
from teachonce.demo.scenes import SceneOptions

#: Points kept of a sweep, as the demo's job keeps them.
POINTS = 8192
#: Of x, y, z (metres) and of the intensity, which a job's ``intensity_max`` divides by.
FULL_SCALE = np.array([1, 1, 1, 255], np.float32)


@dataclass(frozen=True)
class Drawn:
    """N scenes.

    Attributes:
        image_NHW3: uint8 RGB, as read back from the JPEG.
        seg_NHW: uint8 numbers in ``objects.CLASSES``.
        depth_NHW: uint16 centimetres, 0 for the sky.
        points_NP4: float16 x, y, z in metres and intensity 0..1.
        bev_NXY: uint8 numbers in ``truth.BEV_CLASSES``.
    """

    image_NHW3: NDArray[np.uint8]
    seg_NHW: NDArray[np.uint8]
    depth_NHW: NDArray[np.uint16]
    points_NP4: NDArray[np.float16]
    bev_NXY: NDArray[np.uint8]

    def __len__(self) -> int:
        return len(self.image_NHW3)


def draw(seed: int, num_scenes: int, options: SceneOptions) -> Drawn:
    """Returns the first ``num_scenes`` scenes of ``seed``."""
    height, width = options.height, options.width
    drawn = Drawn(
        image_NHW3=np.empty((num_scenes, height, width, 3), np.uint8),
        seg_NHW=np.empty((num_scenes, height, width), np.uint8),
        depth_NHW=np.empty((num_scenes, height, width), np.uint16),
        points_NP4=np.empty((num_scenes, POINTS, 4), np.float16),
        bev_NXY=np.empty((num_scenes, 64, 64), np.uint8),
    )
    what = f"textures {options.textures}, seed {seed}"
    for index in tqdm(range(num_scenes), what, unit="scene", disable=None):
        sample = make_sample(seed, index, options)
        drawn.image_NHW3[index] = _as_stored(sample)
        drawn.seg_NHW[index] = sample.seg_HW
        drawn.depth_NHW[index] = sample.depth_HW
        drawn.points_NP4[index] = take_points(sample.points_P5[:, :4] / FULL_SCALE)
        drawn.bev_NXY[index] = sample.bev_XY
    return drawn


def _as_stored(sample: DemoSample) -> NDArray[Any]:
    stream = io.BytesIO()
    quality = sample.scene.options.quality
    Image.fromarray(sample.image_HW3).save(stream, "JPEG", quality=quality)
    return np.asarray(Image.open(stream))


def take_points(points_P4: NDArray[np.float32]) -> NDArray[np.float32]:
    """Returns ``POINTS`` points, evenly chosen as a job's ``points`` does, (POINTS, 4).

    A sweep that has fewer is begun again.
    """
    num, steps = len(points_P4), np.arange(POINTS)
    return points_P4[steps * num // POINTS if num >= POINTS else steps % num]
