"""Learning rates as a function of the step.

Owns the formula alone: no state, so that a resumed run has the rate of an undisturbed
one by construction.
"""

from __future__ import annotations

import math
from typing import Literal

from manifests.errors import ManifestError

ScheduleKind = Literal["cosine", "constant", "linear"]


def lr_at(
    step: int,
    total_steps: int,
    peak: float,
    warmup_steps: int,
    kind: ScheduleKind,
    final_fraction: float = 0.0,
) -> float:
    """Returns the learning rate of one step.

    Rises linearly to ``peak``: ``peak (step + 1) / warmup_steps`` while
    ``step < warmup_steps``, so no step is spent at 0. Then, with p running from 0 at
    ``warmup_steps`` to 1 at ``total_steps``, it is ``peak (f + (1 - f) s(p))`` with
    ``s = (1 + cos(pi p)) / 2`` for ``cosine``, ``1 - p`` for ``linear`` and 1 for
    ``constant``. The last step, ``total_steps - 1``, is thus just above the final rate;
    later ones have it.

    Args:
        step: from 0.
        total_steps: of the stage.
        peak: the rate after the warm-up.
        warmup_steps: 0 to ``total_steps``.
        kind: of the decay.
        final_fraction: f, the final rate as a share of the peak; ``constant`` has none.

    Raises:
        ManifestError: a number outside its range.

    Source: Loshchilov and Hutter 2017 (SGDR, arXiv 1608.03983) equation 5 without
    restarts; Goyal et al. 2017 (arXiv 1706.02677) section 2.2 for the warm-up.
    """
    _check("step", step, step >= 0, "be at least 0")
    _check("steps", total_steps, total_steps >= 1, "be at least 1")
    in_range = 0 <= warmup_steps <= total_steps
    _check("warmup_steps", warmup_steps, in_range, f"lie in 0..{total_steps} (steps)")
    _check("final_fraction", final_fraction, 0 <= final_fraction <= 1, "lie in 0..1")
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    if kind == "constant":
        return peak
    if step >= total_steps:
        return peak * final_fraction
    progress = (step - warmup_steps) / (total_steps - warmup_steps)
    falling = 1 - progress
    share = (1 + math.cos(math.pi * progress)) / 2 if kind == "cosine" else falling
    return peak * (final_fraction + (1 - final_fraction) * share)


def _check(name: str, value: float, holds: bool, rule: str) -> None:
    if not holds:
        raise ManifestError(
            f"{name} must {rule}, got {value} (learning-rate schedule); correct it"
        )
