"""Losses against float64 NumPy, and the laws they keep: masks, dtypes, invariances."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.overrides import TorchFunctionMode

from student_train.loss_terms import LOSSES
from student_train.losses import (
    cosine,
    cross_entropy,
    kl,
    mse,
    reduce,
    smooth_l1,
    valid_images,
)

FLOAT_LOSSES = sorted(name for name in LOSSES if name != "cross_entropy")
VECTOR, GRID = (5,), (5, 3, 4)
CHANNELS = 7


def np_log_softmax(x):
    shifted = x - x.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def np_cosine(p, t):
    lengths = np.linalg.norm(p, axis=-1) * np.linalg.norm(t, axis=-1)
    return 1 - (p * t).sum(-1) / lengths


def np_smooth_l1(p, t, beta=1.0):
    d = np.abs(p - t)
    return np.where(d < beta, d**2 / (2 * beta), d - beta / 2).mean(-1)


def np_kl(p, t, temperature=4.0):
    log_t, log_p = np_log_softmax(t / temperature), np_log_softmax(p / temperature)
    return temperature**2 * (np.exp(log_t) * (log_t - log_p)).sum(-1)


def np_cross_entropy(p, t, label_smoothing=0.0):
    wanted = (1 - label_smoothing) * np.eye(p.shape[-1])[t]
    wanted = wanted + label_smoothing / p.shape[-1]
    return -(wanted * np_log_softmax(p)).sum(-1)


def np_angle(p, t, dispersion=0.3):
    return np.arccos(1 - np_cosine(p, t)) ** 2 / dispersion


def np_unit_l2(p, t):
    units = (x / np.linalg.norm(x, axis=-1, keepdims=True) for x in (p, t))
    return np.linalg.norm(np.subtract(*units), axis=-1)


def np_map_cosine(p, t, mask):
    """Per image, of its valid tokens strung together; 0 where there is none."""
    rows = zip(p, t, mask, strict=True)
    return np.array(
        [np_cosine(x[m].ravel(), y[m].ravel()) if m.any() else 0.0 for x, y, m in rows]
    )


# Of each cell; "map_cosine" has none.
REFERENCES = {
    "cosine": np_cosine,
    "angle": np_angle,
    "unit_l2": np_unit_l2,
    "smooth_l1": np_smooth_l1,
    "mse": lambda p, t: ((p - t) ** 2).mean(-1),
    "l1": lambda p, t: np.abs(p - t).mean(-1),
    "kl": np_kl,
    "cross_entropy": np_cross_entropy,
}


def np_per_image(cells, mask):
    rows = zip(cells, mask, strict=True)
    return np.array([row[keep].mean() if keep.any() else 0.0 for row, keep in rows])


def np_loss(name, prediction, target, mask, **parameters):
    if name == "map_cosine":
        return np_map_cosine(prediction, target, mask)
    return np_per_image(REFERENCES[name](prediction, target, **parameters), mask)


def call(name, prediction, target, mask, **parameters):
    """A loss, with what the trainer takes from the bank's statistics."""
    held = {"dispersion": torch.tensor(0.3)}
    asked = {key: held[key] for key in LOSSES[name].statistics}
    return LOSSES[name](prediction, target, mask, **parameters, **asked)


def draw(name, shape, seed=0):
    """Prediction, target and a mask with one image that has no valid cell."""
    rng = np.random.default_rng(seed)
    prediction = 2 * rng.normal(size=(*shape, CHANNELS))
    if name == "cross_entropy":
        target = rng.integers(0, CHANNELS, shape)
    else:
        target = 2 * rng.normal(size=(*shape, CHANNELS))
    mask = rng.random(shape) < 0.6
    mask[1] = False
    mask[2] = True
    return prediction, target, mask


def tensors(prediction, target, mask):
    kind = torch.float32 if target.dtype.kind == "f" else torch.int64
    return (
        torch.tensor(prediction, dtype=torch.float32, requires_grad=True),
        torch.tensor(target, dtype=kind),
        torch.tensor(mask),
    )


@pytest.mark.parametrize("shape", [VECTOR, GRID], ids=["vector", "grid"])
@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        *((name, {}) for name in LOSSES),
        ("smooth_l1", {"beta": 0.3}),
        ("smooth_l1", {"beta": 2.0}),
        ("kl", {"temperature": 1.0}),
        ("cross_entropy", {"label_smoothing": 0.1}),
    ],
)
def test_equals_numpy(name, parameters, shape):
    prediction, target, mask = draw(name, shape)
    expected = np_loss(name, prediction, target, mask, **parameters)
    found = call(name, *tensors(prediction, target, mask), **parameters)
    assert found.dtype == torch.float32
    np.testing.assert_allclose(found.detach(), expected, rtol=2e-5, atol=1e-6)
    assert found[1] == 0


@pytest.mark.parametrize("shape", [VECTOR, GRID], ids=["vector", "grid"])
@pytest.mark.parametrize("name", LOSSES)
def test_masked_cells_have_no_influence(name, shape):
    prediction, target, mask = draw(name, shape)
    clean, *rest = tensors(prediction, target, mask)
    expected = call(name, clean, *rest)
    expected.sum().backward()
    target[~mask] = -100 if name == "cross_entropy" else np.nan
    prediction[~mask] = np.inf
    dirty, *rest = tensors(prediction, target, mask)
    found = call(name, dirty, *rest)
    found.sum().backward()
    assert torch.equal(found, expected)
    assert torch.equal(dirty.grad, clean.grad)
    assert torch.isfinite(dirty.grad).all()
    assert (dirty.grad[~torch.tensor(mask)] == 0).all()
    assert (dirty.grad[torch.tensor(mask)] != 0).any()


@given(st.integers(0, 2**32 - 1), st.sampled_from(FLOAT_LOSSES), st.floats(0, 1))
def test_masks_of_any_kind_leave_the_mean_of_the_rest(seed, name, share):
    rng = np.random.default_rng(seed)
    prediction, target = rng.normal(size=(2, 3, 2, 4, CHANNELS))
    mask = rng.random((3, 2, 4)) < share
    expected = np_loss(name, prediction, target, mask)
    target[~mask] = rng.choice([np.nan, np.inf, 1e30])
    leaf, *rest = tensors(prediction, target, mask)
    found = call(name, leaf, *rest)
    found.sum().backward()
    np.testing.assert_allclose(found.detach(), expected, rtol=1e-4, atol=2e-6)
    assert torch.isfinite(leaf.grad).all()


@pytest.mark.parametrize("name", LOSSES)
def test_autocast_changes_nothing(name):
    inputs = tensors(*draw(name, GRID))
    expected = call(name, *inputs)
    with torch.autocast("cpu", torch.bfloat16):
        found = call(name, *inputs)
        assert torch.is_autocast_enabled("cpu")
    assert found.dtype == torch.float32
    assert torch.equal(found, expected)


class AutocastSeen(TorchFunctionMode):
    """Records, for each arithmetic call, whether autocast was on."""

    def __init__(self):
        super().__init__()
        self.states = {}

    def __torch_function__(self, function, types, args=(), kwargs=None):
        name = getattr(function, "__name__", "")
        self.states.setdefault(name, set()).add(torch.is_autocast_enabled("cpu"))
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", LOSSES)
def test_no_arithmetic_is_under_autocast(name):
    # What autocast rounds hangs on device and release: nothing may be left to it.
    inputs = tensors(*draw(name, GRID))
    with torch.autocast("cpu", torch.bfloat16), AutocastSeen() as seen:
        call(name, *inputs)
    assert seen.states["sum"] == {False}
    assert seen.states["where"] == {False}


@pytest.mark.parametrize("name", FLOAT_LOSSES)
def test_no_gradient_on_the_way_is_nan(name):
    prediction, target, mask = draw(name, GRID)
    target[~mask] = np.nan
    leaf, *rest = tensors(prediction, target, mask)
    torch.autograd.set_detect_anomaly(True)
    try:
        call(name, leaf, *rest).sum().backward()
    finally:
        torch.autograd.set_detect_anomaly(False)


@pytest.mark.parametrize("name", LOSSES)
def test_half_inputs_are_computed_in_float32(name):
    prediction, target, mask = tensors(*draw(name, GRID))
    half = prediction.detach().bfloat16()
    half_target = target.bfloat16() if target.is_floating_point() else target
    found = call(name, half, half_target, mask)
    widened = half_target.float() if target.is_floating_point() else target
    assert found.dtype == torch.float32
    assert torch.equal(found, call(name, half.float(), widened, mask))


@pytest.mark.parametrize("name", FLOAT_LOSSES)
def test_gradient_equals_finite_differences_of_numpy(name):
    prediction, target, mask = draw(name, VECTOR, seed=4)
    leaf, *rest = tensors(prediction, target, mask)
    call(name, leaf, *rest).sum().backward()
    numeric = np.zeros_like(prediction)
    for place in np.ndindex(prediction.shape):
        step = np.zeros_like(prediction)
        step[place] = 1e-6
        upper = np_loss(name, prediction + step, target, mask)
        lower = np_loss(name, prediction - step, target, mask)
        numeric[place] = (upper - lower).sum() / 2e-6
    np.testing.assert_allclose(leaf.grad, numeric, rtol=1e-3, atol=1e-5)


def test_cross_entropy_equals_torchs_own():
    prediction, target, _ = tensors(*draw("cross_entropy", VECTOR))
    found = cross_entropy(
        prediction, target, torch.ones(5, dtype=torch.bool), label_smoothing=0.2
    )
    expected = torch.nn.functional.cross_entropy(
        prediction, target, reduction="none", label_smoothing=0.2
    )
    torch.testing.assert_close(found, expected)


def test_kl_equals_torchs_own():
    prediction, target, mask = tensors(*draw("kl", VECTOR))
    expected = 9 * torch.nn.functional.kl_div(
        (prediction / 3).log_softmax(-1),
        (target / 3).log_softmax(-1),
        reduction="none",
        log_target=True,
    ).sum(-1)
    found = kl(prediction, target, mask, temperature=3.0)
    torch.testing.assert_close(found[mask], expected[mask])


@given(
    st.integers(0, 2**32 - 1), st.floats(1e-3, 1e4), st.floats(1e-3, 1e4), st.booleans()
)
def test_cosine_is_scale_invariant(seed, scale, other_scale, as_grid):
    shape = (2, 3, 2) if as_grid else (2,)
    torch.manual_seed(seed)
    prediction, target = torch.randn(2, *shape, CHANNELS)
    mask = torch.ones(shape, dtype=torch.bool)
    found = cosine(scale * prediction, other_scale * target, mask)
    torch.testing.assert_close(
        found, cosine(prediction, target, mask), rtol=1e-4, atol=1e-5
    )


def test_cosine_is_per_token_not_over_the_map():
    # The long token agrees and the short one is opposite: over the flattened map the
    # cosine would be (10000 - 1) / 10001, per token it is (1 - 1) / 2.
    prediction = torch.tensor([[[[100.0, 0.0], [1.0, 0.0]]]])
    target = torch.tensor([[[[100.0, 0.0], [-1.0, 0.0]]]])
    mask = torch.ones(1, 1, 2, dtype=torch.bool)
    assert cosine(prediction, target, mask).item() == pytest.approx(1.0)


def test_cosine_of_a_zero_vector_is_finite():
    prediction = torch.zeros(1, 4, requires_grad=True)
    found = cosine(prediction, torch.ones(1, 4), torch.tensor([True]))
    found.sum().backward()
    assert found.item() == 1
    assert torch.isfinite(prediction.grad).all()


@given(st.integers(0, 2**32 - 1), st.floats(-50, 50), st.floats(0.5, 20))
def test_kl_is_zero_at_equal_logits_and_shift_invariant(seed, shift, temperature):
    torch.manual_seed(seed)
    prediction, target = 3 * torch.randn(2, 4, CHANNELS)
    mask = torch.ones(4, dtype=torch.bool)
    assert (kl(target, target, mask, temperature=temperature) == 0).all()
    found = kl(prediction + shift, target - shift, mask, temperature=temperature)
    expected = kl(prediction, target, mask, temperature=temperature)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)
    assert (expected > -1e-4).all()


def test_kl_takes_classes_that_a_teacher_excludes():
    prediction, target, _ = draw("kl", VECTOR)
    expected = np_kl(prediction, np.where(np.arange(CHANNELS) < 2, -1e9, target))
    target[:, :2] = -np.inf
    leaf, *rest = tensors(prediction, target, np.ones(5, bool))
    found = kl(leaf, *rest)
    found.sum().backward()
    np.testing.assert_allclose(found.detach(), expected, rtol=1e-5)
    assert torch.isfinite(leaf.grad).all()


def test_kl_keeps_the_gradients_size_at_high_temperature():
    # Hinton: for T large the gradient of T^2 KL tends to (z - v) / C, both centred.
    prediction, target, mask = draw("kl", VECTOR)
    leaf, *rest = tensors(prediction, target, np.ones_like(mask))
    kl(leaf, *rest, temperature=1000.0).sum().backward()
    centred = [x - x.mean(-1, keepdims=True) for x in (prediction, target)]
    expected = (centred[0] - centred[1]) / CHANNELS
    np.testing.assert_allclose(leaf.grad, expected, atol=5e-3)


def test_smooth_l1_joins_its_pieces():
    distance = torch.tensor([[0.0], [0.999], [1.0], [1.001], [5.0]])
    found = smooth_l1(distance, torch.zeros(5, 1), torch.ones(5, dtype=torch.bool))
    expected = [0.0, 0.999**2 / 2, 0.5, 0.501, 4.5]
    np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_a_batch_of_none():
    found = mse(torch.zeros(0, 4), torch.zeros(0, 4), torch.zeros(0, dtype=torch.bool))
    assert found.shape == (0,)
    assert reduce(found, torch.zeros(0, dtype=torch.bool)) == 0


def test_broadcasting_is_refused():
    mask = torch.ones(2, 3, 4, dtype=torch.bool)
    grid = torch.zeros(2, 3, 4, 5)
    with pytest.raises(ValueError, match=r"must have shape \(2, 3, 4, 5\), got"):
        mse(grid, grid[:, :1], mask)
    with pytest.raises(ValueError, match=r"must have shape \(2, 3, 4\), got"):
        cross_entropy(grid, torch.zeros(2, 3, dtype=torch.int64), mask)
    with pytest.raises(ValueError, match=r"mask must be bool \(2, 3, 4\), got"):
        mse(grid, grid, mask[:, :, :1])
    with pytest.raises(ValueError, match=r"mask must be bool .* got torch.float32"):
        mse(grid, grid, mask.float())


def test_a_class_number_beyond_the_classes_is_refused():
    for wrong in (CHANNELS, -100):
        with pytest.raises(RuntimeError, match="out of bounds"):
            cross_entropy(
                torch.zeros(1, CHANNELS), torch.tensor([wrong]), torch.tensor([True])
            )


def test_valid_images():
    mask = torch.zeros(3, 2, 2, dtype=torch.bool)
    mask[1, 0, 1] = True
    assert valid_images(mask).tolist() == [False, True, False]
    assert valid_images(torch.tensor([True, False])).tolist() == [True, False]


@given(st.lists(st.booleans(), min_size=1, max_size=8))
def test_reduce_is_the_mean_over_valid_rows(valid):
    values = np.linspace(1, 2, len(valid))
    values[~np.array(valid)] = np.nan
    leaf = torch.tensor(values, dtype=torch.float32, requires_grad=True)
    found = reduce(leaf, torch.tensor(valid))
    found.backward()
    count = sum(valid)
    expected = values[valid].mean() if count else 0.0
    assert found.item() == pytest.approx(expected, rel=1e-6)
    np.testing.assert_allclose(leaf.grad, np.array(valid) / max(count, 1), rtol=1e-6)


def test_reduce_over_ranks_equals_one_rank_with_all():
    torch.manual_seed(0)
    values, valid = torch.rand(12), torch.rand(12) < 0.5
    valid[:4] = False
    whole = reduce(values, valid)
    share = valid.sum() / 3
    ranks = [
        reduce(values[start : start + 4], valid[start : start + 4], share)
        for start in (0, 4, 8)
    ]
    # Data-parallel training averages what the ranks have.
    torch.testing.assert_close(torch.stack(ranks).mean(), whole)
    assert ranks[0] == 0
    assert reduce(values, ~valid & valid, 0) == 0


def test_reduce_takes_less_than_one_row_per_rank():
    # One valid row among four ranks: the rank that has it stands for all.
    found = reduce(torch.tensor([3.0, 5.0]), torch.tensor([True, False]), 0.25)
    assert found == 12
