"""Heads against NumPy; the bird's-eye geometry against NumPy and pipeline.samples."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from manifests.errors import ManifestError
from pipeline.samples.calibration import Calibration, calibration_in_view, project
from student_train.heads import (
    Adapter,
    BevGrid,
    BevHead,
    LinearHead,
    bev_cell_centres,
    project_cells,
)

EXTENT = BevGrid((0.0, 48.0), (-24.0, 24.0), (6, 8))
HEIGHTS = (-3.0, 0.0, 1.0)
SIZE = (60, 100)


def camera(yaw=0.1, focal=50.0, offset=(0.3, -0.2, 0.5)):
    """A camera that looks along x of the LiDAR, turned by a yaw."""
    cosine, sine = math.cos(yaw), math.sin(yaw)
    turn = np.array([[cosine, sine, 0], [-sine, cosine, 0], [0, 0, 1]])
    axes = np.array([[0, -1, 0], [0, 0, -1], [1, 0, 0]])
    lidar2cam = np.eye(4)
    lidar2cam[:3, :3] = axes @ turn
    lidar2cam[:3, 3] = offset
    intrinsics = np.array([[focal, 0.4, 51.0], [0, focal * 1.1, 29.0], [0, 0, 1.0]])
    return Calibration(intrinsics, lidar2cam)


def batch(*calibrations):
    return (
        torch.tensor(np.stack([c.intrinsics for c in calibrations])).float(),
        torch.tensor(np.stack([c.lidar2cam for c in calibrations])).float(),
    )


def count(module):
    return sum(parameter.numel() for parameter in module.parameters())


def np_linear(values, layer):
    found = values @ layer.weight.detach().numpy().T.astype(np.float64)
    return found if layer.bias is None else found + layer.bias.detach().numpy()


def np_layer_norm(values, layer):
    centred = values - values.mean(-1, keepdims=True)
    unit = centred / np.sqrt(values.var(-1, keepdims=True) + layer.eps)
    return unit * layer.weight.detach().numpy() + layer.bias.detach().numpy()


def np_gelu(values):
    return values * 0.5 * (1 + np.vectorize(math.erf)(values / math.sqrt(2)))


@pytest.mark.parametrize("shape", [(2,), (2, 3, 4)])
def test_adapter_equals_its_formula(shape):
    adapter = Adapter(5, 7, 11)
    torch.nn.init.normal_(adapter.norm.weight)
    torch.nn.init.normal_(adapter.norm.bias)
    tokens = np.random.default_rng(0).normal(size=(*shape, 5))
    inner = np_gelu(np_layer_norm(np_linear(tokens, adapter.expand), adapter.norm))
    expected = np_linear(inner, adapter.contract)
    found = adapter(torch.tensor(tokens, dtype=torch.float32))
    np.testing.assert_allclose(found.detach(), expected, atol=1e-5)


def test_parameter_counts():
    # EUPE's: no bias in either linear layer, weight and bias in the norm.
    assert count(Adapter(384, 1536, 3072)) == 3072 * (384 + 1536 + 2)
    assert count(LinearHead(384, 1000)) == 384 * 1000 + 1000
    head = BevHead(12, 5, 10, EXTENT, HEIGHTS, lifted=4)
    mix = (3 * 4 + 3 + 3) * 10 + 10 + 10 * 10 + 10
    blocks = 2 * (2 * 10 + 9 * 10 * 10 + 10)
    assert count(head) == (12 * 4 + 4) + mix + blocks + 2 * 10 + (10 * 5 + 5)


def test_linear_head_equals_its_formula():
    head = LinearHead(5, 3)
    tokens = np.random.default_rng(0).normal(size=(4, 2, 5))
    found = head(torch.tensor(tokens, dtype=torch.float32))
    np.testing.assert_allclose(
        found.detach(), np_linear(tokens, head.linear), atol=1e-6
    )


@pytest.mark.parametrize(
    "make",
    [
        lambda: Adapter(4, 3, 5),
        lambda: LinearHead(4, 3),
        lambda: BevHead(4, 3, 5, EXTENT, HEIGHTS),
    ],
)
def test_weights_hang_on_the_global_generator_alone(make):
    torch.manual_seed(3)
    first = make().state_dict()
    torch.manual_seed(3)
    second = make().state_dict()
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    other = make().state_dict()
    assert any(not torch.equal(first[name], other[name]) for name in first)


@pytest.mark.parametrize("row_0", ["x_max", "x_min"])
@pytest.mark.parametrize("column_0", ["y_max", "y_min"])
def test_cell_centres(row_0, column_0):
    extent = BevGrid((10.0, 16.0), (-4.0, 4.0), (3, 4), row_0, column_0)
    centres = bev_cell_centres(extent).numpy()
    x = [11.0, 13.0, 15.0] if row_0 == "x_min" else [15.0, 13.0, 11.0]
    y = [-3.0, -1.0, 1.0, 3.0] if column_0 == "y_min" else [3.0, 1.0, -1.0, -3.0]
    assert centres.shape == (3, 4, 2)
    for row in range(3):
        for column in range(4):
            assert centres[row, column].tolist() == [x[row], y[column]]


@given(st.integers(0, 2**32 - 1))
def test_projection_equals_pipeline_samples(seed):
    rng = np.random.default_rng(seed)
    points = rng.uniform(-30, 30, (40, 3)).astype(np.float32)
    cameras = [
        camera(rng.uniform(-3, 3), rng.uniform(20, 90), rng.uniform(-1, 1, 3))
        for _ in range(2)
    ]
    found, visible = project_cells(torch.tensor(points), *batch(*cameras), SIZE)
    assert torch.isfinite(found).all()
    for number, calibration in enumerate(cameras):
        uv, depth = project(points, calibration)
        fractions = uv / [SIZE[1], SIZE[0]]
        margin = np.abs(fractions - np.round(np.clip(fractions, 0, 1))).min(-1)
        # Not where float32 may fall to the other side of a border.
        clear = (np.abs(depth - 0.1) > 1e-3) & ~(margin < 1e-3)
        with np.errstate(invalid="ignore"):
            expected = (depth > 0.1) & ((fractions >= 0) & (fractions < 1)).all(-1)
        np.testing.assert_array_equal(visible[number][clear], expected[clear])
        seen = expected & clear
        np.testing.assert_allclose(found[number][seen], fractions[seen], atol=2e-5)
        assert (found[number][~visible[number]] == 0).all()


def test_projection_by_hand():
    # A camera at the LiDAR that looks along x, 100 px of focal length, 200 x 100 px.
    lidar2cam = torch.tensor(
        [[0, -1, 0, 0], [0, 0, -1, 0], [1, 0, 0, 0], [0, 0, 0, 1.0]]
    )
    intrinsics = torch.tensor([[100, 0, 100], [0, 100, 50], [0, 0, 1.0]])
    points = torch.tensor(
        [
            [10, 0, 0],  # straight ahead: the centre
            [10, 5, 0],  # left: 50 px to the left
            [10, 0, -2],  # below: 20 px down
            [-10, 0, 0],  # behind
            [0.05, 0, 0],  # ahead, but too near
            [10, -10, 0],  # at u = 200, just outside
            [10, 10, 0],  # at u = 0, just inside
        ]
    )
    found, visible = project_cells(
        points, intrinsics[None], lidar2cam[None], (100, 200)
    )
    assert visible[0].tolist() == [True, True, True, False, False, False, True]
    expected = [[0.5, 0.5], [0.25, 0.5], [0.5, 0.7], [0, 0], [0, 0], [0, 0], [0, 0.5]]
    np.testing.assert_allclose(found[0], expected, atol=1e-6)


def test_projection_under_autocast_is_the_same():
    points = torch.rand(50, 3) * 40
    expected = project_cells(points, *batch(camera()), SIZE)
    with torch.autocast("cpu", torch.bfloat16):
        found = project_cells(points, *batch(camera()), SIZE)
    assert torch.equal(found[0], expected[0])
    assert torch.equal(found[1], expected[1])


def test_a_calibration_that_is_nan_sees_nothing():
    head = BevHead(4, 3, 5, EXTENT, HEIGHTS)
    intrinsics, lidar2cam = batch(camera(), camera())
    intrinsics[1], lidar2cam[1] = torch.nan, torch.nan
    prediction, visible = head(torch.randn(2, 3, 5, 4), intrinsics, lidar2cam, SIZE)
    prediction.sum().backward()
    assert visible[0].any()
    assert not visible[1].any()
    assert torch.isfinite(prediction).all()
    assert all(torch.isfinite(p.grad).all() for p in head.parameters())


def np_bilinear(grid_HWC, x, y):
    height, width, _ = grid_HWC.shape
    row = min(max(y * height - 0.5, 0), height - 1)
    column = min(max(x * width - 0.5, 0), width - 1)
    i, j = min(int(row), height - 2), min(int(column), width - 2)
    a, b = row - i, column - j
    upper = (1 - b) * grid_HWC[i, j] + b * grid_HWC[i, j + 1]
    lower = (1 - b) * grid_HWC[i + 1, j] + b * grid_HWC[i + 1, j + 1]
    return (1 - a) * upper + a * lower


def np_lift(grid_BHWC, calibrations):
    """What cells of EXTENT see, cell by cell; (B, 6, 8, Z, C) and (B, 6, 8, Z)."""
    num, channels = len(calibrations), grid_BHWC.shape[-1]
    lifted = np.zeros((num, 6, 8, len(HEIGHTS), channels))
    visible = np.zeros((num, 6, 8, len(HEIGHTS)), bool)
    for place in np.ndindex(visible.shape):
        image, row, column, height = place
        x, y = 48 - (row + 0.5) * 8, 24 - (column + 0.5) * 6
        uv, depth = project(np.array([[x, y, HEIGHTS[height]]]), calibrations[image])
        x, y = uv[0] / [SIZE[1], SIZE[0]]
        if depth[0] > 0.1 and 0 <= x < 1 and 0 <= y < 1:
            visible[place] = True
            lifted[place] = np_bilinear(grid_BHWC[image], x, y)
    return lifted, visible


def test_the_lift_equals_numpy_cell_by_cell():
    head = BevHead(4, 3, 5, EXTENT, HEIGHTS)
    calibrations = [camera(0.1), camera(-0.6, 35.0)]
    grid = np.random.default_rng(0).normal(size=(2, 3, 5, 4))
    expected, expected_visible = np_lift(grid, calibrations)
    found, visible = head.lift(torch.tensor(grid), *batch(*calibrations), SIZE)
    assert 0.1 < expected_visible.mean() < 0.9
    np.testing.assert_array_equal(visible, expected_visible)
    np.testing.assert_allclose(
        found.reshape(expected.shape), expected, atol=1e-4, rtol=1e-4
    )


def np_convolve(grid_BRKC, layer):
    weight = layer.weight.detach().numpy().astype(np.float64)
    rows, columns = grid_BRKC.shape[1:3]
    padded = np.pad(grid_BRKC, ((0, 0), (1, 1), (1, 1), (0, 0)))
    total = layer.bias.detach().numpy()
    for i in range(3):
        for j in range(3):
            part = padded[:, i : i + rows, j : j + columns]
            total = total + part @ weight[:, :, i, j].T
    return total


def test_the_birds_eye_head_equals_its_formula():
    torch.manual_seed(0)
    head = BevHead(4, 3, 5, EXTENT, HEIGHTS, lifted=6)
    calibrations = [camera(0.1), camera(-0.6, 35.0)]
    grid = np.random.default_rng(0).normal(size=(2, 3, 5, 4))
    lifted, visible = np_lift(np_linear(grid, head.reduce), calibrations)
    x, y = np.meshgrid(44 - 8 * np.arange(6), 21 - 6 * np.arange(8), indexing="ij")
    place = np.stack([x, y, np.hypot(x, y)], -1) / np.hypot(44, 21)
    cells = np.concatenate(
        [lifted.reshape(2, 6, 8, -1), visible, np.stack([place, place])], -1
    )
    cells = np_linear(np_gelu(np_linear(cells, head.mix_in)), head.mix_out)
    for block in head.blocks:
        cells = cells + np_convolve(
            np_gelu(np_layer_norm(cells, block.norm)), block.conv
        )
    expected = np_linear(np_layer_norm(cells, head.norm), head.out)
    found, seen = head(torch.tensor(grid).float(), *batch(*calibrations), SIZE)
    np.testing.assert_allclose(found.detach(), expected, atol=1e-4)
    assert (visible.any(-1) & ~visible.all(-1)).any()
    np.testing.assert_array_equal(seen, visible.any(-1))


def test_mirroring_view_and_sweep_mirrors_what_cells_see():
    head = BevHead(4, 3, 5, EXTENT, HEIGHTS)
    calibration = camera(0.2)
    whole = (0.0, 0.0, float(SIZE[1]), float(SIZE[0]))
    mirrored = calibration_in_view(calibration, whole, True, SIZE)
    grid = torch.randn(1, 3, 5, 4)
    plain, plain_visible = head.lift(grid, *batch(calibration), SIZE)
    other, other_visible = head.lift(grid.flip(2), *batch(mirrored), SIZE)
    assert torch.equal(other_visible.flip(2), plain_visible)
    torch.testing.assert_close(other.flip(2), plain, atol=1e-4, rtol=1e-4)


def test_a_camera_of_another_size_of_input_sees_the_same():
    head = BevHead(4, 3, 5, EXTENT, HEIGHTS)
    calibration = camera()
    whole = (0.0, 0.0, float(SIZE[1]), float(SIZE[0]))
    larger = (SIZE[0] * 2, SIZE[1] * 3)
    scaled = calibration_in_view(calibration, whole, False, larger)
    grid = torch.randn(1, 3, 5, 4)
    plain = head.lift(grid, *batch(calibration), SIZE)
    other = head.lift(grid, *batch(scaled), larger)
    assert torch.equal(other[1], plain[1])
    torch.testing.assert_close(other[0], plain[0], atol=1e-4, rtol=1e-4)


def test_inputs_are_left_as_they_are():
    head = BevHead(4, 3, 5, EXTENT, HEIGHTS)
    inputs = [torch.randn(1, 3, 5, 4), *batch(camera())]
    before = [value.clone() for value in inputs]
    head(*inputs, SIZE)
    assert all(torch.equal(a, b) for a, b in zip(inputs, before, strict=True))
    assert not any("centres" in name or "place" in name for name in head.state_dict())


@pytest.mark.parametrize(
    "make",
    [
        lambda: Adapter(4, 3, 5)(torch.randn(2, 4)),
        lambda: BevHead(4, 3, 5, EXTENT, HEIGHTS)(
            torch.randn(1, 3, 5, 4), *batch(camera()), SIZE
        )[0],
    ],
)
def test_heads_run_under_autocast(make):
    with torch.autocast("cpu", torch.bfloat16):
        found = make()
    assert found.dtype == torch.bfloat16
    assert torch.isfinite(found).all()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Adapter(4, 3, 0), r"hidden must be at least 1, got 0 \(head\)"),
        (lambda: LinearHead(4, 0), "dim_out must be at least 1, got 0"),
        (lambda: BevHead(4, 3, 5, EXTENT, ()), r"heights_m must hold .* got \[\] \(bi"),
        (lambda: BevGrid((3, 1), (0, 1), (2, 2)), "x_m must rise .* got 3, 1"),
        (lambda: BevGrid((0, 1), (0, math.nan), (2, 2)), "y_m must rise"),
        (lambda: BevGrid((0, 1), (0, 1), (2, 0)), r"cells must be .* got \(2, 0\)"),
    ],
)
def test_what_cannot_be_is_refused(make, message):
    with pytest.raises(ManifestError, match=message):
        make()
