"""How good the experts are: IoU of classes, and the share of near-right depths.

Shape suffixes: B batch, H and W pixels, C classes.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from teachonce.demo.experts.augmentation import MEAN, STD
from teachonce.demo.experts.drawn import Drawn
from teachonce.demo.objects import CLASSES
from teachonce.demo.truth import BEV_CLASSES, DEPTH_PER_M

_BATCH = 16
_NEAR_RATIO = 1.25


def as_images(image_BHW3: NDArray[np.uint8]) -> Tensor:
    """Returns the images as the experts take them, float32 (B, 3, H, W)."""
    unit_BHW3 = image_BHW3.astype(np.float32) / 255
    return torch.from_numpy((unit_BHW3 - MEAN) / STD).permute(0, 3, 1, 2).float()


def confusion(
    truth: NDArray[np.integer], guess: NDArray[np.integer], classes: int
) -> NDArray[np.int64]:
    """Returns how often each class (row) was called which (column), (C, C)."""
    pairs = truth.astype(np.int64).ravel() * classes + guess.astype(np.int64).ravel()
    counts: NDArray[np.int64] = np.bincount(pairs, minlength=classes**2)
    return counts.reshape(classes, classes)


def class_iou(confusion_CC: NDArray[np.int64]) -> NDArray[np.float64]:
    """Returns intersection over union of each class, NaN where there is none of it."""
    hits_C = np.diag(confusion_CC).astype(np.float64)
    union_C = confusion_CC.sum(0) + confusion_CC.sum(1) - hits_C
    iou_C = np.full(len(hits_C), np.nan)
    np.divide(hits_C, union_C, out=iou_C, where=union_C > 0)
    return iou_C


def _iou_scores(
    confusion_CC: NDArray[np.int64], names: Sequence[str]
) -> dict[str, float]:
    iou_C = class_iou(confusion_CC)
    scores = {"miou": float(np.nanmean(iou_C))}
    for name, iou in zip(names, iou_C, strict=True):
        scores[f"iou_{name}"] = float(iou)
    return scores


@torch.inference_mode()
def semantics_scores(model: nn.Module, drawn: Drawn) -> dict[str, float]:
    """Returns ``miou`` and ``iou_<class>`` over all pixels, enlarged to them."""
    total_CC = np.zeros((len(CLASSES), len(CLASSES)), np.int64)
    for start in range(0, len(drawn), _BATCH):
        rows = slice(start, start + _BATCH)
        truth_BHW = drawn.seg_NHW[rows]
        logits = model(as_images(drawn.image_NHW3[rows]))
        logits = F.interpolate(logits, truth_BHW.shape[1:], mode="bilinear")
        total_CC += confusion(truth_BHW, logits.argmax(1).numpy(), len(CLASSES))
    return _iou_scores(total_CC, CLASSES)


@torch.inference_mode()
def depth_scores(model: nn.Module, drawn: Drawn) -> dict[str, float]:
    """Returns ``delta1``, ``abs_rel`` and ``median_ratio`` over all but the sky.

    ``delta1`` is the share of pixels where neither of truth and answer is more than
    1.25 times the other.

    Source: Eigen et al., Depth Map Prediction from a Single Image (2014), section 4.
    """
    ratios = []
    for start in range(0, len(drawn), _BATCH):
        rows = slice(start, start + _BATCH)
        truth_BHW = drawn.depth_NHW[rows]
        log_B1HW = model(as_images(drawn.image_NHW3[rows]))
        log_B1HW = F.interpolate(log_B1HW, truth_BHW.shape[1:], mode="bilinear")
        is_seen = truth_BHW > 0
        metres = truth_BHW[is_seen].astype(np.float64) / DEPTH_PER_M
        ratios.append(np.exp(log_B1HW[:, 0].numpy()[is_seen]) / metres)
    ratio = np.concatenate(ratios)
    return {
        "delta1": float((np.maximum(ratio, 1 / ratio) < _NEAR_RATIO).mean()),
        "abs_rel": float(np.abs(ratio - 1).mean()),
        "median_ratio": float(np.median(ratio)),
    }


@torch.inference_mode()
def occupancy_scores(model: nn.Module, drawn: Drawn) -> dict[str, float]:
    """Returns ``occupied_iou``, ``miou`` and ``iou_<class>`` over all cells."""
    total_CC = np.zeros((len(BEV_CLASSES), len(BEV_CLASSES)), np.int64)
    for start in range(0, len(drawn), _BATCH):
        rows = slice(start, start + _BATCH)
        points = torch.from_numpy(drawn.points_NP4[rows].astype(np.float32))
        guess = model(points).argmax(1).numpy()
        total_CC += confusion(drawn.bev_NXY[rows], guess, len(BEV_CLASSES))
    hits = total_CC[1:, 1:].sum()
    return {
        "occupied_iou": float(hits / (total_CC.sum() - total_CC[0, 0])),
        **_iou_scores(total_CC, BEV_CLASSES),
    }
