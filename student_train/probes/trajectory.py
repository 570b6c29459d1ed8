"""The trajectory probe: what features add to what the vehicle's state tells, open loop.

Owns the three baselines without features, the readouts and their grid, and the
measures. A future is predicted in steps, each of which learns what the one before left
over: constant speed and yaw rate; a readout of the state; a readout of features and
state. So what the state tells already is no merit of the features. It is no measure of
driving: nothing reacts to what is predicted.

Shape suffixes: N rows, T waypoints, E numbers of the state, D inputs of a readout,
P = 2 T coordinates, G drives, S resamples.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from student_train.errors import TrainingError
from student_train.probes.linear import RIDGE_PENALTIES
from student_train.probes.regression import Basis, ridge_path
from student_train.probes.scores import ProbeScore
from student_train.probes.splits import vector_tensors

Floats = npt.NDArray[np.float64]
Tensors = Mapping[str, Tensor]
"""By split."""

WEIGHT_DECAYS = (1.0, 0.1, 0.01)
"""The grid of MLPs, beside ``linear.RIDGE_PENALTIES``: decoupled, as AdamW has it."""

HIDDEN = 64
MLP_STEPS = 300
MLP_RATE = 1e-2
RESAMPLES = 2000
MEAN, CONSTANT, EGO = "mean trajectory", "constant motion", "ego state"


@dataclass(frozen=True, eq=False)
class Futures:
    """Rows of a bank with a future and a state.

    Attributes:
        waypoints_NT2: (N, T, 2) float64, x ahead and y to the left, metres.
        state_NE: (N, E) float64, the speed (m/s) first.
        yaw_rate_N: (N,) float64, rad/s to the left.
        drives_N: (N,) the drive of each row; None where it is not known.
    """

    waypoints_NT2: Floats
    state_NE: Floats
    yaw_rate_N: Floats
    drives_N: npt.NDArray[np.generic] | None = None

    @property
    def known(self) -> npt.NDArray[np.bool_]:
        """(N,) which rows have all of it."""
        flat = self.waypoints_NT2.reshape(len(self.state_NE), -1)
        numbers = np.concatenate([flat, self.state_NE, self.yaw_rate_N[:, None]], 1)
        return np.asarray(np.isfinite(numbers).all(1), np.bool_)

    def of(self, rows: npt.NDArray[np.int64]) -> Futures:
        """Returns some of the rows."""
        return Futures(
            self.waypoints_NT2[rows],
            self.state_NE[rows],
            self.yaw_rate_N[rows],
            None if self.drives_N is None else self.drives_N[rows],
        )


def constant_motion(futures: Futures, step_s: float) -> Floats:
    """Returns (N, T, 2): where constant speed and yaw rate lead, in metres.

    Args:
        futures: of which the state now is used.
        step_s: seconds to the first waypoint, and from each to the next.

    Source: Schubert, Richter and Wanielik, "Comparison and evaluation of advanced
        motion models for vehicle tracking" (2008), the CTRV model.
    """
    times_T = step_s * np.arange(1, futures.waypoints_NT2.shape[1] + 1)
    length_NT = futures.state_NE[:, :1] * times_T
    half_NT = futures.yaw_rate_N[:, None] * times_T / 2
    # An arc's chord, along half its turn; NumPy's sinc is sin(pi x) / (pi x).
    chord_NT = length_NT * np.sinc(half_NT / np.pi)
    return np.stack([chord_NT * np.cos(half_NT), chord_NT * np.sin(half_NT)], -1)


class TrajectoryProbe:
    """One question of trajectories: baselines are fitted once, features one by one.

    Attributes:
        baselines: score by name, without features.
    """

    def __init__(
        self,
        splits: Mapping[str, Futures],
        step_s: float,
        turn_m: float,
        device: str | torch.device = "cpu",
    ) -> None:
        """Fits the baselines on ``fit``, with settings from ``choose``.

        Args:
            splits: ``fit``, ``choose`` and ``test``, without unknown rows.
            step_s: seconds between waypoints.
            turn_m: a row is not straight whose |y| at the last is so much or more.
            device: where to compute.

        Raises:
            TrainingError: a split without rows.
        """
        self._device = torch.device(device)
        self._splits = splits
        self._state = vector_tensors(
            {name: one.state_NE for name, one in splits.items()}, self._device
        )
        self._truth = {
            name: torch.from_numpy(one.waypoints_NT2).flatten(1).to(self._device)
            for name, one in splits.items()
        }
        self._turns_N = np.abs(splits["test"].waypoints_NT2[:, -1, 1]) >= turn_m
        moved = {
            name: torch.from_numpy(constant_motion(one, step_s)).flatten(1)
            for name, one in splits.items()
        }
        moved = {name: one.to(self._device) for name, one in moved.items()}
        mean_P = self._truth["fit"].mean(0)
        means = {name: mean_P.expand_as(one) for name, one in self._truth.items()}
        ego = self._fit(self._state, moved)
        self._ego = ego.predicted
        self.baselines = {
            MEAN: self._score(_Fitted({}, means, {})),
            CONSTANT: self._score(_Fitted({}, moved, {})),
            EGO: self._score(ego),
        }

    def score(self, features: Mapping[str, Tensor]) -> ProbeScore:
        """Returns by what share features lower the error that the state leaves.

        The value is 1 - ADE / ADE of the state alone, on ``test``. ADE is the mean
        distance over all waypoints, FDE that of the last. ``details`` has both in
        metres, and on rows that are not straight (``turning_``). With drives,
        ``reduction_low`` and ``_high`` are the 95 % interval of the value over
        resampled drives of ``test``; the fits stay as they are.

        Args:
            features: (N, D) float32, finite, by split.

        Raises:
            TrainingError: features that cannot be used.
        """
        inputs = vector_tensors(features, self._device)
        for name, one in inputs.items():
            if len(one) != len(self._state[name]):
                raise TrainingError(
                    f"features must be one for each of {len(self._state[name])} rows, "
                    f"got {len(one)} (split {name})"
                )
        both = {
            name: torch.cat([one, self._state[name]], 1) for name, one in inputs.items()
        }
        return self._score(self._fit(both, self._ego))

    def _fit(self, inputs: Tensors, base: Tensors) -> _Fitted:
        """Returns the readout that is best on ``choose``, added to a prediction."""
        left_NP = self._truth["fit"] - base["fit"]
        best: _Fitted | None = None
        curve: dict[str, float] = {}
        for setting, offsets in _readouts(inputs, left_NP):
            predicted = {name: base[name] + one for name, one in offsets.items()}
            found = _Fitted(setting, predicted, curve)
            ((name, number),) = setting.items()
            error = float(self._distances(found, "choose").mean())
            if not curve or error < min(curve.values()):
                best = found
            curve[f"{name}_{number:g}"] = error
        assert best is not None
        return best

    def _distances(self, fitted: _Fitted, split: str) -> Floats:
        """Returns (N, T) distances in metres."""
        error_NP = fitted.predicted[split] - self._truth[split]
        found: Floats = error_NP.unflatten(1, (-1, 2)).norm(dim=-1).cpu().numpy()
        return found

    def _score(self, fitted: _Fitted) -> ProbeScore:
        ego = _Fitted({}, self._ego, {})
        mine_NT, ego_NT = (self._distances(one, "test") for one in (fitted, ego))
        choose = float(self._distances(ego, "choose").mean())
        turns_N = self._turns_N
        details = {
            "ade": float(mine_NT.mean()),
            "fde": float(mine_NT[:, -1].mean()),
            "fde_reduction": _reduction(mine_NT[:, -1], ego_NT[:, -1]),
            "turning_reduction": _reduction(mine_NT[turns_N], ego_NT[turns_N]),
            "turning_ade": _mean(mine_NT[turns_N]),
            "turning_fde": _mean(mine_NT[turns_N, -1]),
            "num_turning": float(turns_N.sum()),
        }
        drives_N = self._splits["test"].drives_N
        if drives_N is not None:
            low, high = _interval(mine_NT.mean(1), ego_NT.mean(1), drives_N)
            details |= {"reduction_low": low, "reduction_high": high}
        details |= {
            f"choose_{name}": _share(error, choose)
            for name, error in fitted.curve.items()
        }
        details |= {f"num_{name}": float(len(one)) for name, one in self._truth.items()}
        return ProbeScore(
            value=_reduction(mine_NT, ego_NT),
            metric="ade_reduction",
            higher_is_better=True,
            setting=dict(fitted.setting),
            choose_value=_reduction(
                self._distances(fitted, "choose"), self._distances(ego, "choose")
            ),
            details=details,
        )


@dataclass(frozen=True, eq=False)
class _Fitted:
    """A prediction by split (N, P), its setting, and ADE on ``choose`` of all."""

    setting: Mapping[str, float]
    predicted: Tensors
    curve: Mapping[str, float]


def _readouts(
    inputs: Tensors, targets_NP: Tensor
) -> Iterator[tuple[dict[str, float], Tensors]]:
    """Yields each setting of the grid and what it predicts, (N, P) by split."""
    basis = Basis.of(inputs["fit"])
    rotated = {name: basis.rotate(one) for name, one in inputs.items()}
    for found in ridge_path(
        rotated["fit"], basis.spectrum_R, targets_NP, RIDGE_PENALTIES
    ):
        yield (
            {"l2": found.penalty},
            {name: found(one) for name, one in rotated.items()},
        )
    scaled = {
        name: ((one - basis.mean_D) / basis.std_D).float()
        for name, one in inputs.items()
    }
    for decay in WEIGHT_DECAYS:
        network = _fit_mlp(scaled["fit"], targets_NP, decay)
        yield (
            {"weight_decay": decay},
            {name: network(one) for name, one in scaled.items()},
        )


class _Mlp(nn.Module):
    """One hidden layer; its outputs are in the unit and around the mean of targets."""

    def __init__(self, num_inputs: int, targets_NP: Tensor) -> None:
        super().__init__()
        self._mean_P = targets_NP.mean(0)
        # One unit for all coordinates: a metre counts as much in each.
        self._unit = float((targets_NP - self._mean_P).square().mean().sqrt()) or 1.0
        self.layers = nn.Sequential(
            nn.Linear(num_inputs, HIDDEN),
            nn.GELU(),
            nn.Linear(HIDDEN, targets_NP.shape[1]),
        )

    def scaled(self, targets_NP: Tensor) -> Tensor:
        """Returns (N, P) float32 targets, as its layers are to give them."""
        return ((targets_NP - self._mean_P) / self._unit).float()

    @torch.no_grad()
    def forward(self, inputs_ND: Tensor) -> Tensor:
        """Returns (N, P) float64 in the targets' own unit, without gradient."""
        found: Tensor = self.layers(inputs_ND).double() * self._unit + self._mean_P
        return found


def _fit_mlp(inputs_ND: Tensor, targets_NP: Tensor, decay: float) -> _Mlp:
    """Returns an MLP of squared error: AdamW on all rows at once, from one start."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = _Mlp(inputs_ND.shape[1], targets_NP)
    network = network.to(inputs_ND.device)
    wanted_NP = network.scaled(targets_NP)
    optimiser = torch.optim.AdamW(network.parameters(), lr=MLP_RATE, weight_decay=decay)
    for step in range(MLP_STEPS):
        rate = MLP_RATE * (1 + math.cos(math.pi * step / MLP_STEPS)) / 2
        group: dict[str, Any] = optimiser.param_groups[0]
        group["lr"] = rate
        loss = (network.layers(inputs_ND) - wanted_NP).square().mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    return network


def _share(mine: float, ego: float) -> float:
    return 1 - mine / ego if ego else math.nan


def _reduction(mine: Floats, ego: Floats) -> float:
    """Returns by what share the mean of errors is lower; NaN of nothing, or of 0."""
    return _share(float(mine.mean()), float(ego.mean())) if mine.size else math.nan


def _mean(values: Floats) -> float:
    return float(values.mean()) if values.size else math.nan


def _interval(
    mine_N: Floats, ego_N: Floats, drives_N: npt.NDArray[np.generic]
) -> tuple[float, float]:
    """Returns the 95 % interval of the reduction over resampled drives.

    Source: Efron and Tibshirani, "An introduction to the bootstrap" (1993), section
        13.3, the percentile interval.
    """
    _, places_N = np.unique(drives_N, return_inverse=True)
    mine_G, ego_G = np.bincount(places_N, mine_N), np.bincount(places_N, ego_N)
    chances_G = np.full(len(mine_G), 1 / len(mine_G))
    rng = np.random.default_rng(0)
    counts_SG = rng.multinomial(len(mine_G), chances_G, RESAMPLES)
    lowered_S = 1 - (counts_SG @ mine_G) / (counts_SG @ ego_G)
    low, high = np.quantile(lowered_S, (0.025, 0.975))
    return float(low), float(high)
