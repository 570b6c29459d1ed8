"""Losses between what a head predicts and what a bank or a label says.

Owns the formulas, the masking and the averaging, and the registry by which a recipe
names losses and their parameters. Targets come standardised (or not) and on the
prediction's grid: see `student_train.grids` for the order.

All of them compute in float32 whatever the inputs' dtype and with autocast off (a
cosine of bfloat16 products is good to two digits only). Cells outside the mask are
replaced before the arithmetic, so that NaN there reaches neither value nor gradient.

Shape suffixes: B images, H and W grid, C channels or classes. ``...`` is B or B, H, W.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from types import MappingProxyType
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from manifests.errors import ManifestError

#: Vectors shorter than this are treated as having this length in a cosine.
COSINE_EPS = 1e-6

TargetKind = Literal["features", "logits", "classes", "numbers"]


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


@dataclass(frozen=True)
class Parameter:
    """What a loss's parameter may be.

    Attributes:
        rule: in words, after "must".
        holds: whether a finite value keeps the rule.
    """

    rule: str
    holds: Callable[[float], bool]


@dataclass(frozen=True)
class LossFunction:
    """A loss as recipes know it; called as (prediction, target, mask, **parameters).

    Attributes:
        function: the formula.
        targets: the kinds of target it takes: ``features`` and ``numbers`` are float
            values, ``logits`` a teacher's logits, ``classes`` class numbers.
        parameters: name and rule of each; their defaults are the function's own.
    """

    function: Callable[..., Tensor]
    targets: tuple[TargetKind, ...]
    parameters: Mapping[str, Parameter] = field(default_factory=dict)

    def __call__(
        self, prediction: Tensor, target: Tensor, mask: Tensor, **parameters: float
    ) -> Tensor:
        """Returns the loss per image: (B,) float32."""
        return self.function(prediction, target, mask, **parameters)

    @property
    def defaults(self) -> dict[str, float]:
        """Each parameter's value where a recipe does not say."""
        signature = inspect.signature(self.function)
        return {name: signature.parameters[name].default for name in self.parameters}


_AT_LEAST_0 = Parameter("be at least 0", lambda value: value >= 0)
_ABOVE_0 = Parameter("be above 0", lambda value: value > 0)
_SHARE = Parameter("be at least 0 and below 1", lambda value: 0 <= value < 1)

#: The losses that a recipe can name.
LOSSES: Mapping[str, LossFunction] = MappingProxyType(
    {
        "cosine": LossFunction(cosine, ("features",)),
        "smooth_l1": LossFunction(
            smooth_l1, ("features", "numbers"), {"beta": _ABOVE_0}
        ),
        "mse": LossFunction(mse, ("features", "logits", "numbers")),
        "l1": LossFunction(l1, ("features", "numbers")),
        "kl": LossFunction(kl, ("logits",), {"temperature": _ABOVE_0}),
        "cross_entropy": LossFunction(
            cross_entropy, ("classes",), {"label_smoothing": _SHARE}
        ),
    }
)


@dataclass(frozen=True)
class LossTerm:
    """One weighted loss of a recipe; called as (prediction, target, mask).

    Attributes:
        name: in `LOSSES`.
        weight: what the trainer multiplies it by; the call does not, so that logs show
            losses that compare across weights.
        parameters: all of the loss's parameters, defaults filled in.
    """

    name: str
    weight: float
    parameters: Mapping[str, float]

    def __call__(self, prediction: Tensor, target: Tensor, mask: Tensor) -> Tensor:
        """Returns the unweighted loss per image: (B,) float32."""
        return LOSSES[self.name](prediction, target, mask, **self.parameters)


def parse_terms(
    losses: Mapping[str, float | Mapping[str, float]],
    target: TargetKind,
    where: str,
) -> tuple[LossTerm, ...]:
    """Returns the terms of a recipe's ``loss``, checked, in its order.

    Args:
        losses: name to weight, or to ``weight`` (1 if left out) and parameters, such as
            ``{cosine: 0.9, smooth_l1: {weight: 0.1, beta: 2.0}}``.
        target: what they are computed against.
        where: of the mapping in the recipe, for messages.

    Raises:
        ManifestError: none named, an unknown loss or parameter, a loss that does not
            take that target, or a value against its rule.
    """
    if not losses:
        raise ManifestError(
            f"a target's loss must name at least one loss, got none ({where}); "
            f"known are {_listed(LOSSES)}"
        )
    return tuple(
        _parse_term(name, given, target, f"{where}.{name}")
        for name, given in losses.items()
    )


def _parse_term(
    name: str, given: float | Mapping[str, float], target: TargetKind, where: str
) -> LossTerm:
    if name not in LOSSES:
        raise ManifestError(
            f"a loss must be one of {_listed(LOSSES)}, got {name} ({where}); "
            "name one of these"
        )
    loss = LOSSES[name]
    if target not in loss.targets:
        fitting = _listed(key for key in LOSSES if target in LOSSES[key].targets)
        raise ManifestError(
            f"the loss of a target of {target} must take {target}, got {name}, which "
            f"takes {_listed(loss.targets)} ({where}); use one of {fitting}"
        )
    values = dict(given) if isinstance(given, Mapping) else {"weight": given}
    allowed = {"weight": _AT_LEAST_0, **loss.parameters}
    for key, value in values.items():
        if key not in allowed:
            raise ManifestError(
                f"a parameter of {name} must be one of {_listed(allowed)}, got {key} "
                f"({where}); remove it or correct its name"
            )
        _check_value(key, value, allowed[key], where)
    weight = values.pop("weight", 1.0)
    parameters = {**loss.defaults, **values}
    return LossTerm(
        name,
        float(weight),
        MappingProxyType({key: float(value) for key, value in parameters.items()}),
    )


def _check_value(key: str, value: object, parameter: Parameter, where: str) -> None:
    if (
        isinstance(value, int | float)
        and not isinstance(value, bool)
        and math.isfinite(value)
        and parameter.holds(value)
    ):
        return
    raise ManifestError(
        f"{key} must {parameter.rule}, got {value!r} ({where}.{key}); correct it"
    )


def _listed(names: Iterable[str]) -> str:
    return ", ".join(names)


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
    with torch.autocast(prediction.device.type, enabled=False):
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
