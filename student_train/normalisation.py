"""Normalisation of a teacher's features, and the way back.

Owns the four rules (``none`` needs no object) and their numbers, computed once from a
bank's statistics when a run begins. They are buffers: a checkpoint holds them, a run
that goes on uses those it began with, and the file of heads carries them. Eigenvectors
are not the same on every machine, hence they are never computed again.

Shape suffixes: C channels. ``...`` is any leading axes.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from manifests.target import NormaliseRule
from pipeline.bank.statistics import floored_std
from student_train.devices import without_autocast
from student_train.rotations import equalising_rotation

Array = npt.NDArray[np.float64]

#: Rules that mix channels, for which the bank must have a covariance.
MIXING: tuple[NormaliseRule, ...] = ("phi_s", "whiten")


class Normaliser(nn.Module):
    """An affine map of features that has an inverse; not-a-number until fitted.

    * ``standardise``: (x - mean) / std per channel, std floored as the bank says.
    * ``phi_s``: PHI-S. The principal axes, turned so that all channels have the same
      variance, and one scale that makes it 1: distances and angles of centred features
      keep their proportions.
    * ``whiten``: the symmetric inverse root of the covariance (ZCA), which of all
      whitenings moves features least and hangs on no sign of an eigenvector.

    Attributes:
        rule: which.
        mean: (C,) float32.
        std: (C,) float32; ``standardise``.
        matrix, inverse: (C, C) float32; the rules that mix channels.

    Source: ``standardise``: EUPE (arXiv 2603.22387) section 3.3, floor by the bank;
        ``phi_s``: Ranzinger et al., PHI-S (arXiv 2410.01680); ``whiten``: Kessy et
        al., "Optimal whitening and decorrelation" (2018).
    """

    mean: Tensor
    std: Tensor
    matrix: Tensor
    inverse: Tensor

    def __init__(self, rule: NormaliseRule, channels: int) -> None:
        super().__init__()
        self.rule = rule
        self.register_buffer("mean", torch.full((channels,), torch.nan))
        if rule in MIXING:
            for name in ("matrix", "inverse"):
                empty = torch.full((channels, channels), torch.nan)
                self.register_buffer(name, empty)
        else:
            self.register_buffer("std", torch.full((channels,), torch.nan))

    @classmethod
    def of(cls, rule: NormaliseRule, statistics: Mapping[str, Array]) -> Normaliser:
        """Returns the normaliser of an output's statistics; see `fit`."""
        found = cls(rule, len(statistics["mean"]))
        found.fit(statistics)
        return found

    def fit(self, statistics: Mapping[str, Array]) -> None:
        """Takes its numbers from an output's statistics.

        Args:
            statistics: float64 ``mean`` and ``variance`` (C,), and ``covariance``
                (C, C) for rules that mix channels.
        """
        self.mean.copy_(torch.from_numpy(statistics["mean"]))
        if self.rule in MIXING:
            make = phi_s if self.rule == "phi_s" else whitening
            matrix, inverse = make(statistics["covariance"])
            self.matrix.copy_(torch.from_numpy(matrix))
            self.inverse.copy_(torch.from_numpy(inverse))
        else:
            self.std.copy_(torch.from_numpy(floored_std(statistics["variance"])))

    def forward(self, values: Tensor) -> Tensor:
        """Returns float32 (..., C), normalised; a missing vector stays missing.

        In float32 also under autocast.

        Args:
            values: (..., C), features as the teacher gave them.
        """
        with without_autocast(values.device):
            centred = values.float() - self.mean
            if self.rule in MIXING:
                return F.linear(centred, self.matrix)
            return centred.div_(self.std)

    def undo(self, values: Tensor) -> Tensor:
        """Returns float32 (..., C) as the teacher gave them.

        Args:
            values: (..., C), normalised.
        """
        with without_autocast(values.device):
            if self.rule in MIXING:
                return F.linear(values.float(), self.inverse, self.mean)
            return values.float() * self.std + self.mean

    def undoing(self) -> tuple[Tensor, Tensor]:
        """Returns (C, C) and (C,) float64 with ``undo(x) = matrix x + offset``."""
        matrix = self.inverse if self.rule in MIXING else torch.diag(self.std)
        return matrix.double(), self.mean.double()


def phi_s(covariance: Array) -> tuple[Array, Array]:
    """Returns the matrix of PHI-S and its inverse, (C, C) each.

    ``W = R U^T / sqrt(mean(lambda))`` for the covariance ``U diag(lambda) U^T`` and an
    orthogonal R that gives all channels one variance: a Hadamard matrix where there is
    one. An eigenvector's largest component is positive.

    Args:
        covariance: (C, C), symmetric.

    Source: Ranzinger et al., PHI-S (arXiv 2410.01680), section on PCA-Hadamard
        isotropic standardisation.
    """
    variances, axes = _principal(covariance)
    scale = float(np.sqrt(variances.mean())) or 1.0
    turned = equalising_rotation(variances) @ axes.T
    return turned / scale, turned.T * scale


def whitening(covariance: Array) -> tuple[Array, Array]:
    """Returns the symmetric whitening matrix and its inverse, (C, C) each.

    Deviations along the principal axes are floored as those of channels are: an axis
    with next to no variance would be amplified noise.

    Args:
        covariance: (C, C), symmetric.

    Source: Kessy, Lewin and Strimmer, "Optimal whitening and decorrelation" (2018),
        section 3.1 (ZCA).
    """
    variances, axes = _principal(covariance)
    std = floored_std(variances)
    return (axes / std) @ axes.T, (axes * std) @ axes.T


def _principal(covariance: Array) -> tuple[Array, Array]:
    """Returns variances along the principal axes, and the axes as columns."""
    variances, axes = np.linalg.eigh((covariance + covariance.T) / 2)
    largest = np.abs(axes).argmax(axis=0)
    signs = np.sign(axes[largest, np.arange(len(axes))])
    # Rounding makes variances of 0 a little negative.
    return np.clip(variances, 0.0, None), axes * signs
