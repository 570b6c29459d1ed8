"""The names by which recipes call losses, their parameters and weights.

A loss is a line of `LOSSES`, or an entry point of the group ``teachonce.losses`` in
another package (``name = "module:LOSS"``) that leads to a `LossFunction`.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Literal

from torch import Tensor

from manifests.errors import ManifestError
from student_train.extensions import load_part
from student_train.losses import (
    angle,
    cosine,
    cross_entropy,
    kl,
    l1,
    map_cosine,
    mse,
    smooth_l1,
    unit_l2,
)

ENTRY_POINTS = "teachonce.losses"

TargetKind = Literal["features", "logits", "classes", "numbers"]


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
        function: the formula; its value per image is (B,) float32.
        targets: the kinds of target it takes: ``features`` and ``numbers`` are float
            values, ``logits`` a teacher's logits, ``classes`` class numbers.
        parameters: name and rule of each; their defaults are the function's own.
        statistics: of the bank's statistics of an output, what it is called with by
            keyword: ``dispersion``. They are of values as the teacher gave them.
    """

    function: Callable[..., Tensor]
    targets: tuple[TargetKind, ...]
    parameters: Mapping[str, Parameter] = field(default_factory=dict)
    statistics: tuple[str, ...] = ()

    def __call__(
        self,
        prediction: Tensor,
        target: Tensor,
        mask: Tensor,
        **parameters: Tensor | float,
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
        "map_cosine": LossFunction(map_cosine, ("features",)),
        "angle": LossFunction(angle, ("features",), statistics=("dispersion",)),
        "unit_l2": LossFunction(unit_l2, ("features",)),
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
        name: in the recipe.
        weight: what the trainer multiplies it by; the call does not, so that logs show
            losses that compare across weights.
        parameters: all of the loss's parameters, defaults filled in.
        loss: what it is called by.
    """

    name: str
    weight: float
    parameters: Mapping[str, float]
    loss: LossFunction

    def __call__(
        self,
        prediction: Tensor,
        target: Tensor,
        mask: Tensor,
        statistics: Mapping[str, Tensor] | None = None,
    ) -> Tensor:
        """Returns the unweighted loss per image: (B,) float32.

        Args:
            prediction: (..., C).
            target: (..., C), or (...) for classes.
            mask: (...) bool.
            statistics: what `LossFunction.statistics` names.
        """
        held = statistics or {}
        asked = {name: held[name] for name in self.loss.statistics}
        return self.loss(prediction, target, mask, **self.parameters, **asked)


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
    loss = _find(name, where)
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
        loss,
    )


def _find(name: str, where: str) -> LossFunction:
    if name in LOSSES:
        return LOSSES[name]
    found = load_part(ENTRY_POINTS, name, LOSSES, "a loss", where)
    if not isinstance(found, LossFunction):
        raise ManifestError(
            f"a loss of another package must be a LossFunction of "
            f"{__name__}, got {type(found).__name__} ({where})"
        )
    return found


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
