"""Losses between what a head predicts and what a bank or a label says.

Owns the formulas, the masking and the averaging; `student_train.loss_terms` owns the
names by which a recipe calls them. Targets come standardised (or not) and on the
prediction's grid: see `student_train.grids` for the order.

All of them compute in float32 whatever the inputs' dtype and with autocast off (a
cosine of bfloat16 products is good to two digits only). Cells outside the mask are
replaced before the arithmetic, so that NaN there reaches neither value nor gradient.

Shape suffixes: B images, H and W grid, C channels or classes. ``...`` is B or B, H, W.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from student_train.devices import without_autocast

#: Vectors shorter than this are treated as having this length in a cosine.
COSINE_EPS = 1e-6

# Squared lengths below this have no gradient: that of a root is without bound at 0.
_LEAST_SQUARE = 1e-12


def cosine(prediction: Tensor, target: Tensor, mask: Tensor) -> Tensor:
    """Returns 1 - cos over the channels of each token, averaged per image: (B,).

    The cosine is per token, not over the flattened map, so that a token weighs the same
    whatever its length.

    Args:
        prediction: (..., C), any float dtype.
        target: (..., C), any float dtype.
        mask: (...) bool, which tokens count.

    Source: EUPE (arXiv 2603.22387) equations 4 and 5.
    """
    return _per_image(_cosine_cells, prediction, target, mask)


def map_cosine(prediction: Tensor, target: Tensor, mask: Tensor) -> Tensor:
    """Returns 1 - cos of each image's whole map as one vector: (B,).

    Long tokens weigh more than short ones, unlike in `cosine`. Tokens that do not count
    are no part of the vector.

    Args:
        prediction: (..., C), any float dtype.
        target: (..., C), any float dtype.
        mask: (...) bool, which tokens count.

    Source: Theia (arXiv 2407.20179), as its released code takes the cosine.
    """
    _check_shapes(prediction, target, mask, True)
    with without_autocast(prediction.device):
        mask_1 = mask.unsqueeze(-1)
        maps = (
            torch.where(mask_1, one.float(), 0.0).flatten(1)
            for one in (prediction, target)
        )
        return torch.where(valid_images(mask), _cosine_cells(*maps), 0.0)


def angle(
    prediction: Tensor, target: Tensor, mask: Tensor, *, dispersion: Tensor | float
) -> Tensor:
    """Returns the squared angle over the teacher's dispersion, per image: (B,).

    1 is as far off as the teacher's own vectors are from their mean direction, so that
    teachers of narrow and of wide cones count alike. A vector of length 0 is at a right
    angle to all.

    Args:
        prediction: (..., C), any float dtype.
        target: (..., C), any float dtype, as the teacher gave it.
        mask: (...) bool, which vectors count.
        dispersion: mean squared angle of the teacher's vectors to their mean direction,
            radians squared, above 0.

    Source: C-RADIOv4 (2026), its summary loss theta(x, y)^2 / Disp(theta_y).
    """
    cells = partial(_angle_cells, dispersion=dispersion)
    return _per_image(cells, prediction, target, mask)


def unit_l2(prediction: Tensor, target: Tensor, mask: Tensor) -> Tensor:
    """Returns the distance between unit vectors, averaged per image: (B,).

    The distance itself, not its square: between 0 and 2.

    Args:
        prediction: (..., C), any float dtype.
        target: (..., C), any float dtype.
        mask: (...) bool, which vectors count.

    Source: Puy et al., ScaLR (CVPR 2024, arXiv 2310.17504), its distillation loss.
    """
    return _per_image(_unit_l2_cells, prediction, target, mask)


def smooth_l1(
    prediction: Tensor, target: Tensor, mask: Tensor, *, beta: float = 1.0
) -> Tensor:
    """Returns the smooth L1 distance, averaged over channels and per image: (B,).

    ``d^2 / (2 beta)`` where |d| < beta, else ``|d| - beta / 2``.

    Args:
        prediction: (..., C), any float dtype.
        target: (..., C), any float dtype.
        mask: (...) bool, which tokens count.
        beta: where the parabola ends, in units of the target. EUPE gives no value; 1 is
            UNIC's.

    Source: Girshick 2015 (Fast R-CNN) equation 3; EUPE equation 5.
    """
    return _per_image(partial(_smooth_l1_cells, beta=beta), prediction, target, mask)


def mse(prediction: Tensor, target: Tensor, mask: Tensor) -> Tensor:
    """Returns the squared distance, averaged over channels and per image: (B,).

    Args:
        prediction: (..., C), any float dtype.
        target: (..., C), any float dtype.
        mask: (...) bool, which tokens count.
    """
    return _per_image(_mse_cells, prediction, target, mask)


def l1(prediction: Tensor, target: Tensor, mask: Tensor) -> Tensor:
    """Returns the absolute distance, averaged over channels and per image: (B,).

    Args:
        prediction: (..., C), any float dtype; C is 1 for a depth.
        target: (..., C), any float dtype.
        mask: (...) bool, which tokens count.
    """
    return _per_image(_l1_cells, prediction, target, mask)


def kl(
    prediction: Tensor, target: Tensor, mask: Tensor, *, temperature: float = 4.0
) -> Tensor:
    """Returns T^2 KL(softmax(target / T) || softmax(prediction / T)) per image: (B,).

    T^2 keeps the gradient's size whatever the temperature. Summed over classes,
    averaged over cells.

    Args:
        prediction: (..., C) logits, any float dtype.
        target: (..., C) the teacher's logits; -inf is a class of probability 0.
        mask: (...) bool, which cells count.
        temperature: T.

    Source: Hinton, Vinyals and Dean 2015 (arXiv 1503.02531) section 2.
    """
    cells = partial(_kl_cells, temperature=temperature)
    return _per_image(cells, prediction, target, mask)


def cross_entropy(
    prediction: Tensor, target: Tensor, mask: Tensor, *, label_smoothing: float = 0.0
) -> Tensor:
    """Returns the cross-entropy to class numbers, averaged per image: (B,).

    Args:
        prediction: (..., C) logits, any float dtype.
        target: (...) int64 in 0..C-1 where the mask holds, anything elsewhere. No
            number means "ignore": that is the mask's part.
        mask: (...) bool, which cells count.
        label_smoothing: share of the target's mass spread over all classes.

    Source: Szegedy et al. 2016 (arXiv 1512.00567) section 7 for the smoothing.
    """
    cells = partial(_cross_entropy_cells, label_smoothing=label_smoothing)
    return _per_image(cells, prediction, target, mask, target_has_channels=False)


def valid_images(mask: Tensor) -> Tensor:
    """Returns which images have a cell that counts: (B,) bool.

    Args:
        mask: (B,) or (B, H, W) bool.
    """
    return mask.reshape(len(mask), math.prod(mask.shape[1:])).any(1)


def reduce(
    per_image_B: Tensor, valid_B: Tensor, num_valid: Tensor | float | None = None
) -> Tensor:
    """Returns the mean over valid images as a scalar, 0 (gradient 0) where none is.

    Args:
        per_image_B: (B,) float32.
        valid_B: (B,) bool.
        num_valid: divides the sum instead of this batch's own count. With several ranks
            a mean of the ranks' means would weigh images unequally: pass the
            all-reduced count divided by the number of ranks, as data-parallel training
            averages gradients over ranks (or the count itself where it sums them).
    """
    total = torch.where(valid_B, per_image_B, 0.0).sum()
    count = valid_B.sum() if num_valid is None else num_valid
    count = torch.as_tensor(count, dtype=total.dtype, device=total.device)
    return total / torch.where(count > 0, count, 1.0)


def _per_image(
    cells: Callable[[Tensor, Tensor], Tensor],
    prediction: Tensor,
    target: Tensor,
    mask: Tensor,
    target_has_channels: bool = True,
) -> Tensor:
    """Returns the mean of ``cells`` over each image's valid cells, 0 where none: (B,).

    Args:
        cells: from float32 prediction and target, zero where masked, to a loss (...).
        prediction: (..., C).
        target: (..., C), or (...) where it has no channels.
        mask: (...) bool.
        target_has_channels: whether the target is floats per channel.
    """
    _check_shapes(prediction, target, mask, target_has_channels)
    mask_1 = mask.unsqueeze(-1)
    with without_autocast(prediction.device):
        # Before the arithmetic: NaN times 0 is NaN, in values and in gradients.
        prediction = torch.where(mask_1, prediction.float(), 0.0)
        if target_has_channels:
            target = torch.where(mask_1, target.float(), 0.0)
        else:
            target = torch.where(mask, target, 0)
        loss = torch.where(mask, cells(prediction, target), 0.0)
        num_cells = math.prod(mask.shape[1:])
        total_B = loss.reshape(len(loss), num_cells).sum(1)
        count_B = mask.reshape(len(mask), num_cells).sum(1)
        return total_B / count_B.clamp(min=1)


def _check_shapes(
    prediction: Tensor, target: Tensor, mask: Tensor, target_has_channels: bool
) -> None:
    """Refuses what broadcasting would make a plausible number of."""
    expected = prediction.shape if target_has_channels else prediction.shape[:-1]
    if target.shape != expected:
        raise ValueError(
            f"a loss's target must have shape {tuple(expected)}, got "
            f"{tuple(target.shape)} (prediction is {tuple(prediction.shape)}); bring "
            "both onto one grid first"
        )
    if mask.shape != prediction.shape[:-1] or mask.dtype != torch.bool:
        raise ValueError(
            f"a loss's mask must be bool {tuple(prediction.shape[:-1])}, got "
            f"{mask.dtype} {tuple(mask.shape)}; give one truth value per vector"
        )


def _cosine_cells(prediction: Tensor, target: Tensor) -> Tensor:
    unit_prediction = F.normalize(prediction, dim=-1, eps=COSINE_EPS)
    unit_target = F.normalize(target, dim=-1, eps=COSINE_EPS)
    return 1 - (unit_prediction * unit_target).sum(-1)


def _angle_cells(
    prediction: Tensor, target: Tensor, dispersion: Tensor | float
) -> Tensor:
    # Kahan's form: the arc cosine has no gradient at 0 and loses half the digits there.
    apart = _distance(prediction, target)
    along = _distance(prediction, -target)
    return (2 * torch.atan2(apart, along)).square() / dispersion


def _unit_l2_cells(prediction: Tensor, target: Tensor) -> Tensor:
    return _distance(prediction, target)


def _distance(prediction: Tensor, target: Tensor) -> Tensor:
    """Returns the distance between the directions of two vectors: (...)."""
    unit_prediction = F.normalize(prediction, dim=-1, eps=COSINE_EPS)
    unit_target = F.normalize(target, dim=-1, eps=COSINE_EPS)
    squared = (unit_prediction - unit_target).square().sum(-1)
    return squared.clamp(min=_LEAST_SQUARE).sqrt()


def _smooth_l1_cells(prediction: Tensor, target: Tensor, beta: float) -> Tensor:
    return F.smooth_l1_loss(prediction, target, beta=beta, reduction="none").mean(-1)


def _mse_cells(prediction: Tensor, target: Tensor) -> Tensor:
    return (prediction - target).square().mean(-1)


def _l1_cells(prediction: Tensor, target: Tensor) -> Tensor:
    return (prediction - target).abs().mean(-1)


def _kl_cells(prediction: Tensor, target: Tensor, temperature: float) -> Tensor:
    log_student = (prediction / temperature).log_softmax(-1)
    log_teacher = (target / temperature).log_softmax(-1)
    teacher = log_teacher.exp()
    # The limit of p log p at 0 is 0; as written it is 0 times -inf.
    difference = torch.where(teacher > 0, log_teacher - log_student, 0.0)
    return temperature**2 * (teacher * difference).sum(-1)


def _cross_entropy_cells(
    prediction: Tensor, target: Tensor, label_smoothing: float
) -> Tensor:
    # Not F.cross_entropy: it takes a class of -100 for "ignore" and says nothing.
    log_student = prediction.log_softmax(-1)
    hard = -log_student.gather(-1, target.unsqueeze(-1)).squeeze(-1)
    return (1 - label_smoothing) * hard - label_smoothing * log_student.mean(-1)
