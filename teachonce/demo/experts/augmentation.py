"""Batches to train the experts on: views of scenes, drawn at random.

The truth follows every change of geometry; colour, light and noise change the image
alone, so that an expert outlives the change of textures between its scenes and the
demo's.

Shape suffixes: B batch, H and W pixels, P points, X and Y cells of the map.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from teachonce.demo.experts.drawn import Drawn
from teachonce.demo.truth import BEV_CELL_M, BEV_CELLS, BEV_X_M, BEV_Y_M, DEPTH_PER_M

#: Marks pixels and cells without truth.
IGNORED = 255

#: Of the normalised image, in values from 0 to 1.
MEAN, STD = 0.45, 0.25
_CROPPED_SHARE = 0.5
_AREA, _LOG_ASPECT = (0.4, 1.0), 0.29
_YAW_RAD, _POINT_SCALE = np.radians(20.0), 0.05
_NOISES = 64


@dataclass(frozen=True)
class CameraBatch:
    """Views of B images.

    Attributes:
        image_B3HW: float32, normalised by ``MEAN`` and ``STD``.
        seg_BHW: int64 numbers in ``objects.CLASSES``, at a quarter of the image's size.
        log_depth_BHW: float32 log of metres as `nets.DepthNet` answers; NaN in the sky.
    """

    image_B3HW: Tensor
    seg_BHW: Tensor
    log_depth_BHW: Tensor


class CameraViews:
    """Draws batches of images: crops, mirror images, colours, light and noise.

    Args:
        drawn: the scenes.
        rng: what everything is drawn from.
    """

    def __init__(self, drawn: Drawn, rng: np.random.Generator) -> None:
        self._drawn, self._rng = drawn, rng
        _, self._height, self._width, _ = drawn.image_NHW3.shape
        # Drawing fresh noise would take longer than the network does.
        shape = (_NOISES, self._height, self._width, 3)
        self._noise = torch.from_numpy(rng.standard_normal(shape, np.float32))

    def batch(self, rows_B: NDArray[np.int64]) -> CameraBatch:
        """Returns one view each of the scenes ``rows_B``."""
        views = [self._view(int(row)) for row in rows_B]
        images, segs, depths = zip(*views, strict=True)
        image_BHW3 = self._recoloured(torch.stack(images))
        image_BHW3 = (image_BHW3 - MEAN) / STD
        return CameraBatch(
            image_BHW3.permute(0, 3, 1, 2),
            torch.from_numpy(np.stack(segs).astype(np.int64)),
            torch.from_numpy(np.stack(depths)),
        )

    def _box(self) -> tuple[int, int, int, int]:
        """Returns top, left, height, width of a crop, or of the whole image."""
        if self._rng.random() >= _CROPPED_SHARE:
            return 0, 0, self._height, self._width
        area = self._rng.uniform(*_AREA)
        aspect = np.exp(self._rng.uniform(-_LOG_ASPECT, _LOG_ASPECT))
        height = round(self._height * min(1.0, np.sqrt(area / aspect)))
        width = round(self._width * min(1.0, np.sqrt(area * aspect)))
        top = int(self._rng.integers(self._height - height + 1))
        left = int(self._rng.integers(self._width - width + 1))
        return top, left, height, width

    def _view(self, row: int) -> tuple[Tensor, NDArray[np.uint8], NDArray[np.float32]]:
        """Returns the image in 0..1, and its truth at a quarter of the size."""
        top, left, height, width = self._box()
        bottom, right = top + height, left + width
        cut_HW3 = self._drawn.image_NHW3[row, top:bottom, left:right]
        image_HW3 = torch.from_numpy(cut_HW3.astype(np.float32) / 255)
        if (height, width) != (self._height, self._width):
            image_13HW = F.interpolate(
                image_HW3.permute(2, 0, 1)[None],
                (self._height, self._width),
                mode="bilinear",
            )
            image_HW3 = image_13HW[0].permute(1, 2, 0)
        # The truth of a random place in each cell: its mean is the cell's share.
        down, across = self._rng.random(2)
        steps = (
            np.arange(self._height // 4) + down,
            np.arange(self._width // 4) + across,
        )
        rows = top + (steps[0] * 4 * height / self._height).astype(np.int64)
        columns = left + (steps[1] * 4 * width / self._width).astype(np.int64)
        seg_HW = self._drawn.seg_NHW[row][rows[:, None], columns]
        depth_HW = self._drawn.depth_NHW[row][rows[:, None], columns]
        zoom = np.sqrt(height * width / (self._height * self._width))
        metres_HW = depth_HW.astype(np.float32) * np.float32(zoom / DEPTH_PER_M)
        log_HW = np.log(np.where(depth_HW == 0, np.float32(np.nan), metres_HW))
        if self._rng.random() < 0.5:
            image_HW3 = image_HW3.flip(1)
            seg_HW, log_HW = seg_HW[:, ::-1], log_HW[:, ::-1]
        return image_HW3, seg_HW, log_HW

    def _recoloured(self, image_BHW3: Tensor) -> Tensor:
        """Returns images in another light: one linear map of colours each, and noise.

        The map is hue, saturation, contrast about the image's mean, and exposure.
        """
        rng, num = self._rng, len(image_BHW3)
        maps_B33 = np.empty((num, 3, 3), np.float32)
        for map_33 in maps_B33:
            grey_33 = np.full((3, 3), 1 / 3)
            mixed_33 = np.eye(3) + rng.normal(0, 0.12, (3, 3))
            saturation = rng.uniform(0.2, 1.6)
            map_33[:] = mixed_33 @ (grey_33 + saturation * (np.eye(3) - grey_33))
            map_33[:] *= np.exp(rng.normal(0, 0.3))
        contrast_B = np.exp(rng.normal(0, 0.2, num)).astype(np.float32)
        linear_B33 = torch.from_numpy(maps_B33).transpose(1, 2)
        flat_BN3 = image_BHW3.reshape(num, -1, 3)
        mean_B13 = flat_BN3.mean(1, keepdim=True) @ linear_B33
        contrast_B11 = torch.from_numpy(contrast_B)[:, None, None]
        flat_BN3 = torch.baddbmm(
            mean_B13 * (1 - contrast_B11), flat_BN3, linear_B33 * contrast_B11
        )
        noisy_BHW3 = flat_BN3.view_as(image_BHW3)
        strengths_B = rng.uniform(0, 0.03, num) * (rng.random(num) < 0.5)
        for image_HW3, strength in zip(noisy_BHW3, strengths_B, strict=True):
            if strength > 0:
                noise_HW3 = self._noise[int(rng.integers(_NOISES))]
                image_HW3.add_(noise_HW3, alpha=float(strength))
        return noisy_BHW3.clamp_(0, 1)


class LidarViews:
    """Draws batches of sweeps: mirrored, turned and scaled, their maps with them.

    Args:
        drawn: the scenes.
        rng: what everything is drawn from.
    """

    def __init__(self, drawn: Drawn, rng: np.random.Generator) -> None:
        self._drawn, self._rng = drawn, rng

    def batch(self, rows_B: NDArray[np.int64]) -> tuple[Tensor, Tensor]:
        """Returns points float32 (B, P, 4) and maps int64 (B, X, Y)."""
        points_BP4 = self._drawn.points_NP4[rows_B].astype(np.float32)
        maps = []
        for points_P4, row in zip(points_BP4, rows_B, strict=True):
            turn_22 = np.eye(2)
            if self._rng.random() < 0.5:
                yaw = self._rng.uniform(-_YAW_RAD, _YAW_RAD)
                cos, sin = np.cos(yaw), np.sin(yaw)
                turn_22 = np.array([[cos, -sin], [sin, cos]])
            scale = 1 + self._rng.uniform(-_POINT_SCALE, _POINT_SCALE)
            mirror_2 = np.array([1.0, self._rng.choice((-1.0, 1.0))])
            move_22 = scale * turn_22 * mirror_2
            points_P4[:, :2] = points_P4[:, :2] @ move_22.T
            points_P4[:, 2] *= scale
            maps.append(moved_map(self._drawn.bev_NXY[row], move_22))
        return torch.from_numpy(points_BP4), torch.from_numpy(np.stack(maps))


def moved_map(
    bev_XY: NDArray[np.uint8], move_22: NDArray[np.float64]
) -> NDArray[np.int64]:
    """Returns the map after the ground's points went from p to ``move_22 @ p``.

    What comes from outside the map is ``IGNORED``.
    """
    steps = (np.arange(BEV_CELLS) + 0.5) * BEV_CELL_M
    x_XY, y_XY = np.meshgrid(BEV_X_M[1] - steps, BEV_Y_M[1] - steps, indexing="ij")
    from_2XY = np.einsum("ij,jxy->ixy", np.linalg.inv(move_22), np.stack([x_XY, y_XY]))
    row_XY = np.floor((BEV_X_M[1] - from_2XY[0]) / BEV_CELL_M).astype(np.int64)
    column_XY = np.floor((BEV_Y_M[1] - from_2XY[1]) / BEV_CELL_M).astype(np.int64)
    is_in = (row_XY >= 0) & (row_XY < BEV_CELLS)
    is_in &= (column_XY >= 0) & (column_XY < BEV_CELLS)
    moved_XY = np.full(bev_XY.shape, IGNORED, np.int64)
    moved_XY[is_in] = bev_XY[row_XY[is_in], column_XY[is_in]]
    return moved_XY
