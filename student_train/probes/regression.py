"""Penalised logistic and ridge regression, solved to their optimum for every penalty.

Owns the two fits that ``linear`` and ``dense`` share, in the features' own principal
axes: there the ridge is a division, and the logistic fit needs tens of evaluations
where it needed a thousand. Chooses nothing.

Weights, sums over pieces and all that decides are float64. Products with features are
too, unless the caller asks for no more than float32 can tell. 20,000 x 128 features, 12
classes and seven penalties from 1 to 1e-6, to a gradient of 1e-4: 519 evaluations of
2.5 ms in float32 on one core. Memory is two copies of the features as they are
multiplied. No random numbers: starts are zero, batches are whole, so that equal input
gives equal output.

Shape suffixes: N rows, D features, R principal axes, K classes.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pipeline.bank.statistics import floored_std

PIECE_ROWS = 16_384
"""Rows upcast or classified at a time: bounds temporaries, changes no result's law."""

RANK = 1e-12
"""Axes whose share of the largest variance is less are rounding; they get no weight."""

GRADIENT = 1e-5
"""Largest gradient component, in preconditioned coordinates, of a solved fit.

There the Hessian's diagonal is 1, so the loss is within about 1e-10 of its least.
"""

FLOAT32_GRADIENT = 1e-4
"""From this tolerance on products are float32: half the time.

Rows that are classified for certain leave differences of probabilities near 1, and with
them float32 gradients stop falling at about 5e-5 (100 x 128 features, separable).
"""

MAX_STEPS = 1_000
MAX_TRIALS = 30
HISTORY = 20

SLOPE_LEFT = 0.9
"""A step is taken if the slope along it shrinks to this share: as L-BFGS is used."""

LOSS_ROUNDING = 1e-7
"""Share by which float32 products may make an equal loss look larger."""

LEAST_CURVATURE = 1e-9
"""Of a class that is never in doubt, and so has none: bounds the steps it takes."""

ABSENT_LOGIT = -1e30
"""Logit of a class that the fit split never shows: finite, so that it interpolates."""


@dataclass(frozen=True)
class Basis:
    """Standardisation by the fit split, then rotation onto its principal axes.

    An orthogonal rotation leaves an L2 penalty as it is, so a fit in these coordinates
    is the fit of the standardised features.

    Attributes:
        mean_D: (D,) float64 of the fit split.
        std_D: (D,) float64, floored at 0.01 of the median.
        axes_DR: (D, R) float64, orthonormal columns.
        spectrum_R: (R,) float64 variance of the fit split along each axis.
    """

    mean_D: Tensor
    std_D: Tensor
    axes_DR: Tensor
    spectrum_R: Tensor

    @classmethod
    def of(cls, features_ND: Tensor) -> Basis:
        """Returns the basis of a fit split.

        Args:
            features_ND: (N, D) float32, finite, N at least 1.
        """
        num_rows, width = features_ND.shape
        pieces = features_ND.split(PIECE_ROWS)
        zeros_D = torch.zeros(width, dtype=torch.float64, device=features_ND.device)
        mean_D = sum((piece.double().sum(0) for piece in pieces), zeros_D) / num_rows
        gram_DD = torch.diag(zeros_D)
        for piece in pieces:
            centred = piece.double() - mean_D
            gram_DD += centred.T @ centred
        gram_DD /= num_rows
        std_D = torch.from_numpy(floored_std(gram_DD.diagonal().cpu().numpy()))
        std_D = std_D.to(features_ND.device)
        spectrum, axes = torch.linalg.eigh(gram_DD / torch.outer(std_D, std_D))
        kept = spectrum > RANK * spectrum[-1]
        if spectrum[-1] <= 0:
            kept = torch.zeros_like(kept)
        return cls(mean_D, std_D, axes[:, kept], spectrum[kept])

    def rotate(self, features_ND: Tensor) -> Tensor:
        """Returns (N, R) float64 coordinates of (N, D) float32 features."""
        return torch.cat(
            [
                ((piece.double() - self.mean_D) / self.std_D) @ self.axes_DR
                for piece in features_ND.split(PIECE_ROWS)
            ]
        )


@dataclass(frozen=True)
class LinearMap:
    """A fitted map from rotated features to logits or numbers.

    Attributes:
        penalty: L2 penalty it was fitted with.
        weight_RK: (R, K) float64.
        bias_K: (K,) float64; not penalised.
        gradient: largest preconditioned gradient component left; 0 in closed form.
    """

    penalty: float
    weight_RK: Tensor
    bias_K: Tensor
    gradient: float

    def __call__(self, rotated_NR: Tensor) -> Tensor:
        """Returns (N, K) float64."""
        return rotated_NR @ self.weight_RK + self.bias_K


def logistic_path(
    rotated_NR: Tensor,
    targets_NK: Tensor,
    penalties: Sequence[float],
    *,
    tolerance: float = GRADIENT,
) -> Iterator[LinearMap]:
    """Yields the minimiser of penalised cross-entropy for each penalty, in turn.

    The loss is mean over rows of cross-entropy + penalty / 2 x sum of squared weights
    (scikit-learn's ``C`` is 1 / (N penalty)); biases are free. Each fit starts where
    the last ended, so penalties go from strong to weak; nothing is computed for those
    that are not asked for. A class that no target has any share of would have its bias
    fall without end: it takes no part and is never predicted.

    Args:
        rotated_NR: (N, R) float64, of the fit split.
        targets_NK: (N, K) float shares, each row sums to 1 (one-hot or soft).
        penalties: positive, descending.
        tolerance: largest preconditioned gradient component at which a fit is done;
            with ``FLOAT32_GRADIENT`` or more, products are float32.
    """
    present_K = targets_NK.sum(0) > 0
    dtype = torch.float32 if tolerance >= FLOAT32_GRADIENT else torch.float64
    loss = _CrossEntropy.of(rotated_NR, targets_NK[:, present_K], dtype)
    # Where the caller holds none either, the float64 rows are let go of here.
    del rotated_NR, targets_NK
    weight = torch.zeros_like(loss.drawn)
    for penalty in penalties:
        weight, gradient = _minimise(loss, penalty, weight, tolerance)
        full_KR = weight.new_zeros((len(present_K), weight.shape[1] - 1))
        full_KR[present_K] = weight[:, :-1]
        bias_K = weight.new_full((len(present_K),), ABSENT_LOGIT)
        bias_K[present_K] = weight[:, -1]
        yield LinearMap(penalty, full_KR.T, bias_K, gradient)


@dataclass(frozen=True)
class _CrossEntropy:
    """Mean cross-entropy of a fit split as a function of (K, R + 1) weights, bias last.

    Attributes:
        rows: pieces (n, R), and the same as (R, n): each product then reads memory in
            order, which on a CPU is up to ten times as fast.
        drawn: (K, R + 1) float64: the part of the gradient that is the targets', the
            same for all weights.
        num_rows: N.
    """

    rows: list[tuple[Tensor, Tensor]]
    drawn: Tensor
    num_rows: int

    @classmethod
    def of(
        cls, rotated_NR: Tensor, shares_NK: Tensor, dtype: torch.dtype
    ) -> _CrossEntropy:
        """Returns the loss of (N, R) rows with (N, K) shares, multiplied in a dtype."""
        shares_KN = shares_NK.T.double()
        drawn = torch.cat(
            [shares_KN @ rotated_NR, shares_KN.sum(1, keepdim=True)], dim=1
        )
        rows = [
            (piece_NR.to(dtype), piece_NR.T.to(dtype).contiguous())
            for piece_NR in rotated_NR.split(PIECE_ROWS)
        ]
        return cls(rows, drawn / len(rotated_NR), len(rotated_NR))

    def __call__(self, weight: Tensor) -> tuple[float, Tensor]:
        """Returns the loss and its (K, R + 1) float64 gradient."""
        slope = torch.zeros_like(weight)
        total = weight.new_zeros(())
        for piece_NR, logits_KN in self._logits(weight):
            norm_N = logits_KN.logsumexp(0)
            total += norm_N.sum(dtype=torch.float64)
            chance_KN = logits_KN.sub_(norm_N).exp_()
            slope[:, :-1] += chance_KN @ piece_NR
            slope[:, -1] += chance_KN.sum(1)
        slope = slope / self.num_rows - self.drawn
        loss = total / self.num_rows - (self.drawn * weight).sum()
        return float(loss), slope

    def curvature(self, weight: Tensor) -> Tensor:
        """Returns the (K, R + 1) float64 diagonal of the Hessian."""
        found = torch.zeros_like(weight)
        for piece_NR, logits_KN in self._logits(weight):
            chance_KN = logits_KN.softmax(0)
            spread_KN = chance_KN * (1 - chance_KN)
            found[:, :-1] += spread_KN @ piece_NR.square()
            found[:, -1] += spread_KN.sum(1)
        return found / self.num_rows

    def _logits(self, weight: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Yields each piece's (n, R) rows and new (K, n) logits."""
        for piece_NR, piece_RN in self.rows:
            weight_KR = weight[:, :-1].to(piece_RN.dtype)
            bias_K1 = weight[:, -1:].to(piece_RN.dtype)
            yield piece_NR, torch.addmm(bias_K1, weight_KR, piece_RN)


def _minimise(
    cross_entropy: _CrossEntropy, penalty: float, start: Tensor, tolerance: float
) -> tuple[Tensor, float]:
    """Returns the (K, R + 1) weights and their largest preconditioned gradient.

    Steps are tried at full length. One is taken where the loss has not risen and the
    slope along it has shrunk; for a convex loss that is near enough to the least.

    Source: Nocedal and Wright, "Numerical optimization" (2006), algorithm 7.4, started
        from the Hessian's diagonal.
    """
    hessian = cross_entropy.curvature(start)
    hessian[:, :-1] += penalty
    scale = hessian.clamp_min(LEAST_CURVATURE).rsqrt()

    def evaluate(scaled: Tensor) -> tuple[float, Tensor]:
        weight = scaled * scale
        loss, slope = cross_entropy(weight)
        slope[:, :-1] += penalty * weight[:, :-1]
        loss += penalty / 2 * float(weight[:, :-1].square().sum())
        return loss, slope * scale

    at = start / scale
    loss, gradient = evaluate(at)
    pairs: deque[tuple[Tensor, Tensor, float]] = deque(maxlen=HISTORY)
    for _ in range(MAX_STEPS):
        if float(gradient.abs().max()) <= tolerance:
            break
        direction = _direction(gradient, pairs)
        slope = _dot(gradient, direction)
        length, low, high = 1.0, 0.0, math.inf
        for _ in range(MAX_TRIALS):
            new = at + length * direction
            new_loss, new_gradient = evaluate(new)
            new_slope = _dot(new_gradient, direction)
            if (
                new_loss > loss + LOSS_ROUNDING * abs(loss)
                or new_slope > -SLOPE_LEFT * slope
            ):
                high = length
            elif new_slope < SLOPE_LEFT * slope:
                low = length
            else:
                break
            length = 2 * length if math.isinf(high) else (low + high) / 2
        else:
            break
        step, change = new - at, new_gradient - gradient
        pairs.append((step, change, 1 / _dot(step, change)))
        at, loss, gradient = new, new_loss, new_gradient
    return at * scale, float(gradient.abs().max())


def _direction(
    gradient: Tensor, pairs: Sequence[tuple[Tensor, Tensor, float]]
) -> Tensor:
    """Returns minus the gradient times the inverse Hessian that ``pairs`` tell of."""
    direction = -gradient
    shares = []
    for step, change, inverse in reversed(pairs):
        shares.append(inverse * _dot(step, direction))
        direction = direction - shares[-1] * change
    if pairs:
        _, change, inverse = pairs[-1]
        direction = direction / (inverse * _dot(change, change))
    for (step, change, inverse), share in zip(pairs, reversed(shares), strict=True):
        direction = direction + (share - inverse * _dot(change, direction)) * step
    return direction


def _dot(a: Tensor, b: Tensor) -> float:
    return float(torch.dot(a.flatten(), b.flatten()))


def ridge_path(
    rotated_NR: Tensor,
    spectrum_R: Tensor,
    numbers: Tensor,
    penalties: Sequence[float],
) -> Iterator[LinearMap]:
    """Yields the minimiser of penalised squared error for each penalty, in turn.

    The loss is half the mean over rows of squared error + penalty / 2 x sum of squared
    weights (scikit-learn's ``alpha`` is N x penalty); the bias is free. In principal
    axes every penalty is one division.

    Args:
        rotated_NR: (N, R) float64, of the fit split, of mean 0.
        spectrum_R: (R,) float64, the basis's.
        numbers: (N,) or (N, K) float64.
        penalties: positive.

    Source: Hastie, Tibshirani and Friedman, "The elements of statistical learning"
        (2009), equation 3.47.
    """
    numbers_NK = numbers.reshape(len(numbers), -1)
    mean_K = numbers_NK.mean(0)
    along_RK = rotated_NR.T @ (numbers_NK - mean_K) / len(numbers)
    for penalty in penalties:
        weight_RK = along_RK / (spectrum_R + penalty).unsqueeze(1)
        yield LinearMap(penalty, weight_RK, mean_K, 0.0)
