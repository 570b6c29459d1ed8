"""Trajectories: worlds whose answer is known, and the same sums by NumPy."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from student_train.errors import TrainingError
from student_train.probes import trajectory
from student_train.probes.linear import RIDGE_PENALTIES
from student_train.probes.trajectory import (
    CONSTANT,
    EGO,
    MEAN,
    Futures,
    TrajectoryProbe,
    constant_motion,
)

STEP_S, NUM_STEPS = 0.5, 4
SIZES = {"fit": 240, "choose": 120, "test": 150}
TIMES = STEP_S * np.arange(1, NUM_STEPS + 1)


@pytest.fixture(autouse=True)
def short_fits(monkeypatch):
    monkeypatch.setattr(trajectory, "MLP_STEPS", 150)


def make_world(rule, seed: int = 0, **fields) -> dict[str, tuple[Futures, np.ndarray]]:
    """Rows at random speeds; ``rule(rng, speed, times)`` gives y and features."""
    rng = np.random.default_rng(seed)
    found = {}
    for name, size in SIZES.items():
        speed = rng.uniform(3, 12, size)
        y, features = rule(rng, speed, TIMES)
        x = speed[:, None] * TIMES + rng.normal(0, 0.1, (size, NUM_STEPS))
        state = np.stack([speed, rng.normal(size=size)], 1)
        waypoints = np.stack([x, y], -1)
        drives = rng.integers(0, 9, size) if fields.get("drives") else None
        futures = Futures(waypoints, state, np.zeros(size), drives)
        found[name] = (futures, features.astype(np.float32))
    return found


def ask(world, turn_m: float = 2.0) -> tuple[TrajectoryProbe, dict[str, np.ndarray]]:
    splits = {name: futures for name, (futures, _) in world.items()}
    features = {name: values for name, (_, values) in world.items()}
    return TrajectoryProbe(splits, STEP_S, turn_m), features


def bends(rng, speed, times):
    """How far a row bends is seen in its features, and the speed says nothing of it."""
    bend = rng.normal(0, 1, len(speed))
    seen = np.stack([3 * bend + 7, rng.normal(size=len(speed))], 1)
    return bend[:, None] * times**2, seen


def blind(rng, speed, times):
    y, _ = bends(rng, speed, times)
    return y, rng.normal(size=(len(speed), 6))


def roads(rng, speed, times):
    """Curvature is seen; how far that leads to a side goes with the squared speed."""
    curvature = rng.normal(0, 0.04, len(speed))
    y = curvature[:, None] * (speed[:, None] * times) ** 2 / 2
    return y, curvature[:, None] * 50


def test_constant_motion_is_what_driving_so_leads_to():
    rng = np.random.default_rng(1)
    speed = rng.uniform(0, 20, 7)
    yaw_rate = np.array([0, 1e-9, -1e-4, 0.1, -0.7, 2.0, -3.5])
    futures = Futures(np.zeros((7, 3, 2)), speed[:, None], yaw_rate)
    found = constant_motion(futures, 0.4)
    place, heading = np.zeros((7, 2)), np.zeros(7)
    for step in range(1, 12_001):
        middle = heading + yaw_rate * 5e-5
        place += 1e-4 * speed[:, None] * np.stack([np.cos(middle), np.sin(middle)], 1)
        heading += yaw_rate * 1e-4
        if step % 4000 == 0:
            np.testing.assert_allclose(found[:, step // 4000 - 1], place, atol=1e-5)


def test_features_that_see_the_bend_and_features_that_do_not():
    probe, features = ask(make_world(bends))
    seen = probe.score(features)
    assert seen.metric == "ade_reduction"
    assert seen.higher_is_better
    assert seen.value > 0.8
    assert seen.details["turning_reduction"] > seen.value
    probe, features = ask(make_world(blind))
    unseen = probe.score(features)
    assert abs(unseen.value) < 0.06
    # What the state leaves over is the bend: no baseline has it.
    assert probe.baselines[EGO].value == 0
    assert probe.baselines[CONSTANT].details["ade"] == pytest.approx(
        probe.baselines[EGO].details["ade"], rel=0.1
    )
    assert probe.baselines[MEAN].value < -1


def test_many_channels_of_noise_cost_nothing_of_what_the_state_tells():
    def noise(rng, speed, times):
        y = rng.normal(0, 0.1, (len(speed), NUM_STEPS))
        return y + (speed[:, None] * times) ** 2 / 50, rng.normal(
            size=(len(speed), 400)
        )

    probe, features = ask(make_world(noise))
    assert probe.baselines[CONSTANT].value < -5
    assert abs(probe.score(features).value) < 0.05


def test_what_the_state_tells_is_no_merit_of_features():
    def told(rng, speed, times):
        y = 0.2 * (speed - 8)[:, None] * times + rng.normal(0, 0.1, (len(speed), 4))
        return y, np.stack([speed, speed**2], 1)

    probe, features = ask(make_world(told))
    assert probe.baselines[EGO].details["ade"] < 0.3
    assert probe.baselines[CONSTANT].value < -1
    assert abs(probe.score(features).value) < 0.05


def test_features_and_state_are_looked_at_together():
    """No linear readout multiplies curvature and squared speed: the MLP is chosen."""
    probe, features = ask(make_world(roads))
    score = probe.score(features)
    assert list(score.setting) == ["weight_decay"]
    curve = {k: v for k, v in score.details.items() if k.startswith("choose_")}
    assert set(curve) == {
        *(f"choose_l2_{penalty:g}" for penalty in RIDGE_PENALTIES),
        *(f"choose_weight_decay_{decay:g}" for decay in trajectory.WEIGHT_DECAYS),
    }
    linear = max(v for k, v in curve.items() if "l2" in k)
    assert score.value > 0.75 > linear + 0.05
    assert score.choose_value == max(curve.values())


def ridge_by_hand(inputs, wanted, truth):
    """The best of the ridges on ``choose``, by normal equations."""
    fit = inputs["fit"].astype(np.float64)
    mean, std = fit.mean(0), fit.std(0)
    design = {name: (one - mean) / std for name, one in inputs.items()}
    offset = wanted["fit"].mean(0)
    best = None
    for penalty in RIDGE_PENALTIES:
        gram = design["fit"].T @ design["fit"] / len(fit)
        moment = design["fit"].T @ (wanted["fit"] - offset) / len(fit)
        weight = np.linalg.solve(gram + penalty * np.eye(len(gram)), moment)
        made = {
            name: truth[name] - wanted[name] + one @ weight + offset
            for name, one in design.items()
        }
        error = distances(made["choose"], truth["choose"]).mean()
        if best is None or error < best[0]:
            best = (error, penalty, made)
    return best[1:]


def distances(made: np.ndarray, truth: np.ndarray) -> np.ndarray:
    error = (made - truth).reshape(len(made), -1, 2)
    return np.sqrt((error**2).sum(-1))


def test_linear_readouts_are_numpys(monkeypatch):
    monkeypatch.setattr(trajectory, "WEIGHT_DECAYS", ())
    world = make_world(roads, seed=3)
    probe, features = ask(world, turn_m=1.5)
    score = probe.score(features)
    truth = {k: one.waypoints_NT2.reshape(-1, 8) for k, (one, _) in world.items()}
    speed = {k: one.state_NE[:, :1] for k, (one, _) in world.items()}
    moved = {
        k: np.stack([one * TIMES, 0 * one * TIMES], -1).reshape(-1, 8)
        for k, one in speed.items()
    }
    state = {k: one.state_NE for k, (one, _) in world.items()}
    left = {k: truth[k] - moved[k] for k in truth}
    penalty, ego = ridge_by_hand(state, left, truth)
    assert probe.baselines[EGO].setting == {"l2": penalty}
    both = {k: np.c_[features[k], state[k]] for k in truth}
    left = {k: truth[k] - ego[k] for k in truth}
    penalty, mine = ridge_by_hand(both, left, truth)
    assert score.setting == {"l2": penalty}
    far = {
        name: distances(made["test"], truth["test"])
        for name, made in (("mine", mine), ("ego", ego), ("moved", moved))
    }
    turning = np.abs(truth["test"][:, -1]) >= 1.5
    assert 10 < turning.sum() < 140
    expected = {
        "ade": far["mine"].mean(),
        "fde": far["mine"][:, -1].mean(),
        "fde_reduction": 1 - far["mine"][:, -1].mean() / far["ego"][:, -1].mean(),
        "turning_reduction": 1
        - far["mine"][turning].mean() / far["ego"][turning].mean(),
        "turning_ade": far["mine"][turning].mean(),
        "turning_fde": far["mine"][turning, -1].mean(),
        "num_turning": turning.sum(),
        "num_test": 150,
    }
    for name, value in expected.items():
        assert score.details[name] == pytest.approx(value, rel=1e-4), name
    assert score.value == pytest.approx(
        1 - far["mine"].mean() / far["ego"].mean(), 1e-4
    )
    constant = probe.baselines[CONSTANT]
    assert constant.details["ade"] == pytest.approx(far["moved"].mean(), rel=1e-9)
    mean = np.broadcast_to(truth["fit"].mean(0), truth["test"].shape)
    expected = distances(mean, truth["test"]).mean()
    assert probe.baselines[MEAN].details["ade"] == pytest.approx(expected, rel=1e-9)
    assert constant.setting == {}
    assert "reduction_low" not in score.details


def test_intervals_are_over_drives():
    probe, features = ask(make_world(bends, drives=True))
    score = probe.score(features)
    low, high = score.details["reduction_low"], score.details["reduction_high"]
    assert low < score.value < high < 1
    # The state against itself: nothing to resample.
    ego = probe.baselines[EGO].details
    assert (ego["reduction_low"], ego["reduction_high"]) == (0, 0)

    rng = np.random.default_rng(5)
    drives = np.repeat(np.arange(12), 25)
    ego_N = rng.uniform(1, 3, 300)
    mine_N = ego_N * np.repeat(rng.uniform(0.2, 1.2, 12), 25)
    found = trajectory._interval(mine_N, ego_N, drives)
    drawn = []
    for _ in range(2000):
        rows = np.concatenate(
            [np.flatnonzero(drives == one) for one in rng.integers(0, 12, 12)]
        )
        drawn.append(1 - mine_N[rows].mean() / ego_N[rows].mean())
    np.testing.assert_allclose(found, np.quantile(drawn, (0.025, 0.975)), atol=0.02)
    # As if rows were drives of their own: far narrower.
    alone = trajectory._interval(mine_N, ego_N, np.arange(300))
    assert alone[1] - alone[0] < 0.6 * (found[1] - found[0])


def test_twice_the_same_whatever_was_drawn_before():
    world = make_world(roads)
    first = [ask(world)[0].score(ask(world)[1])]
    torch.manual_seed(7)
    state = torch.random.get_rng_state()
    probe, features = ask(world)
    assert probe.score(features) == first[0]
    assert torch.equal(torch.random.get_rng_state(), state)


def test_without_a_turn_there_is_nothing_to_say_of_turns():
    probe, features = ask(make_world(bends), turn_m=1e6)
    details = probe.score(features).details
    assert details["num_turning"] == 0
    assert np.isnan([details["turning_reduction"], details["turning_ade"]]).all()


def test_what_is_refused():
    world = make_world(bends)
    probe, features = ask(world)
    short = {**features, "choose": features["choose"][:-1]}
    with pytest.raises(TrainingError, match=r"of 120 rows, got 119 \(split choose\)"):
        probe.score(short)
    with pytest.raises(TrainingError, match="features must be finite"):
        probe.score({**features, "test": features["test"] * np.nan})
    none = {**world, "choose": (world["choose"][0].of(np.empty(0, np.int64)), None)}
    with pytest.raises(TrainingError, match="split choose must have at least one row"):
        ask(none)
