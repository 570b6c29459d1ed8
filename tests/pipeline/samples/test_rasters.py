"""Sweeps as images, against plain loops, the published formula and symmetry."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.samples.points import points_in_view
from pipeline.samples.rasters import bev_image, range_image
from pipeline.samples.views import View

COLUMNS = ("x", "y", "z", "intensity")
CHANNELS = ("range", "x", "y", "z", "intensity", "occupied", "density")
FULL = (-180.0, 180.0)
Points = np.ndarray[Any, np.dtype[np.float32]]


def _direction(elevation_deg: float, azimuth_deg: float, radius: float) -> list[float]:
    elevation, azimuth = math.radians(elevation_deg), math.radians(azimuth_deg)
    return [
        radius * math.cos(elevation) * math.cos(azimuth),
        radius * math.cos(elevation) * math.sin(azimuth),
        radius * math.sin(elevation),
    ]


def _sweep(points: list[list[float]]) -> Points:
    """Each point gets its number as intensity."""
    rows = [[*point, float(number)] for number, point in enumerate(points)]
    return np.array(rows, np.float32).reshape(-1, 4)


def _pixel(image: np.ndarray) -> list[tuple[int, int]]:
    """Where there are points, with the channels of `CHANNELS`."""
    rows, columns = np.nonzero(image[..., CHANNELS.index("occupied")])
    return list(zip(rows.tolist(), columns.tolist(), strict=True))


def _draw_slowly(
    sweep: Points,
    pixels: list[tuple[int, int] | None],
    ranks: list[float],
    size: tuple[int, int],
) -> np.ndarray:
    """One point after the other; of equal ranks the first stays."""
    image = np.zeros((*size, len(CHANNELS)))
    best: dict[tuple[int, int], float] = {}
    for point, pixel, rank in zip(sweep.tolist(), pixels, ranks, strict=True):
        if pixel is None:
            continue
        count = round(math.expm1(image[pixel][6])) + 1
        if pixel not in best or rank < best[pixel]:
            best[pixel] = rank
            radius = math.sqrt(sum(value * value for value in point[:3]))
            image[pixel][:6] = [radius, *point, 1]
        image[pixel][6] = math.log(1 + count)
    return image


# Away from the borders of pixels, where the last bit of an arc tangent would decide.
_inner = st.floats(0.05, 0.95)


@st.composite
def _scans(draw: Any) -> tuple[tuple[int, int], tuple[float, float], Points]:
    size = draw(st.tuples(st.integers(1, 6), st.integers(1, 9)))
    azimuth = draw(st.sampled_from([FULL, (-45.0, 45.0), (90.0, 270.0), (-60.0, 0.0)]))
    points = []
    for _ in range(draw(st.integers(1, 30))):
        if points and draw(st.booleans()):
            points.append(list(draw(st.sampled_from(points))))
            continue
        row = draw(st.integers(-3, size[0] + 2)) + draw(_inner)
        column = draw(st.integers(0, size[1] - 1)) + draw(_inner)
        elevation = 10.0 - row * 40.0 / size[0]
        turn = azimuth[1] - column * (azimuth[1] - azimuth[0]) / size[1]
        if not draw(st.integers(0, 4)):
            turn += 180.0
        radius = draw(st.integers(0, 3))
        points.append(_direction(max(-89, min(89, elevation)), turn, radius))
    return size, azimuth, _sweep(points)


@given(_scans())
def test_range_image_is_that_of_a_plain_loop(scan: Any) -> None:
    size, azimuth, sweep = scan
    pixels: list[tuple[int, int] | None] = []
    ranks = []
    for x, y, z, _ in sweep.tolist():
        radius = math.sqrt(x * x + y * y + z * z)
        ranks.append(radius)
        pixels.append(None)
        if radius == 0:
            continue
        row = (10 - math.degrees(math.asin(z / radius))) / 40 * size[0]
        column = -1.0
        for turn in (-360, 0, 360):
            angle = math.degrees(math.atan2(y, x)) + turn
            share = (azimuth[1] - angle) / (azimuth[1] - azimuth[0])
            if 0 <= share <= 1:
                column = share * size[1]
        if column >= 0 and -1 <= row <= size[0] + 1:
            place = min(max(math.floor(row), 0), size[0] - 1), math.floor(column)
            pixels[-1] = place
    expected = _draw_slowly(sweep, pixels, ranks, size)
    found = range_image(sweep, COLUMNS, size, (-30, 10), azimuth, CHANNELS)
    assert found.dtype == np.float32
    assert np.array_equal(found[..., 1:6], expected[..., 1:6])
    assert np.allclose(found, expected, rtol=1e-6, atol=0)


# Quarters of a metre are exact, so that points lie on borders too.
_quarters = st.integers(-20, 20).map(lambda value: value / 4)


@given(
    st.lists(st.tuples(_quarters, _quarters, _quarters), min_size=1, max_size=40),
    st.sampled_from([None, (-2.0, 2.5)]),
)
def test_bev_image_is_that_of_a_plain_loop(
    points: list[tuple[float, float, float]], z_m: tuple[float, float] | None
) -> None:
    sweep = _sweep([list(point) for point in points])
    pixels: list[tuple[int, int] | None] = []
    for x, y, z in points:
        inside = -2 <= x <= 4 and -4 <= y <= 4
        inside = inside and (z_m is None or z_m[0] <= z <= z_m[1])
        row = next((i for i in range(12) if 4 - (i + 1) / 2 < x), 11)
        column = next((j for j in range(8) if 4 - (j + 1) < y), 7)
        pixels.append((row, column) if inside else None)
    expected = _draw_slowly(sweep, pixels, [-z for _, _, z in points], (12, 8))
    found = bev_image(sweep, COLUMNS, (12, 8), (-2, 4), (-4, 4), z_m, CHANNELS)
    assert np.array_equal(found[..., 1:6], expected[..., 1:6])
    assert np.allclose(found, expected, rtol=1e-6, atol=0)


def _scan(seed: int = 0, num: int = 4000) -> Points:
    rng = np.random.default_rng(seed)
    angles = zip(rng.uniform(-24, 2, num), rng.uniform(-180, 180, num), strict=True)
    radii = rng.uniform(1, 60, num)
    return _sweep([_direction(*pair, r) for pair, r in zip(angles, radii, strict=True)])


def test_range_image_is_rangenets_where_the_sensor_looks() -> None:
    """Equation 1 of RangeNet++: floor, clamp, farther points first."""
    sweep = _scan()
    height, width, up, down = 64, 512, math.radians(3), math.radians(-25)
    xyz = sweep[:, :3].astype(np.float64)
    depth = np.linalg.norm(xyz, axis=1)
    u = 0.5 * (1 - np.arctan2(xyz[:, 1], xyz[:, 0]) / np.pi) * width
    v = (1 - (np.arcsin(xyz[:, 2] / depth) - down) / (up - down)) * height
    u, v = (np.clip(np.floor(at), 0, end - 1) for at, end in ((u, width), (v, height)))
    order = np.argsort(depth)[::-1]
    expected = np.zeros((height, width, 5))
    values = np.column_stack([depth, sweep])
    expected[v[order].astype(int), u[order].astype(int)] = values[order]
    found = range_image(sweep, COLUMNS, (64, 512), (-25, 3), FULL, CHANNELS[:5])
    assert np.allclose(found, expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    ("point", "pixel"),
    [
        ([5, 0.01, 0], (4, 9)),
        ([5, -0.01, 0], (4, 10)),
        ([0, 5, 0.01], (3, 5)),
        ([0, -5, -1.5], (7, 15)),
        ([-5, 0.01, 1.5], (0, 0)),
        ([-5, -0.01, 1.5], (0, 19)),
    ],
)
def test_range_image_looks_ahead(point: list[float], pixel: tuple[int, int]) -> None:
    """Ahead is in the middle, left is left, up is up, behind is at both sides."""
    sweep = _sweep([[point[0], point[1], point[2] - 0.001]])
    found = range_image(sweep, COLUMNS, (8, 20), (-20, 20), FULL, CHANNELS)
    assert _pixel(found) == [pixel]


def test_range_image_may_look_back() -> None:
    sweep = _sweep([[-5, -0.1, 0.1], [5, 0.1, 0.1], [-0.1, 5, 0.1]])
    found = range_image(sweep, COLUMNS, (2, 20), (-20, 20), (90, 270), CHANNELS)
    # To one who looks back, -y is left.
    assert _pixel(found) == [(0, 9), (0, 19)]


def test_points_beyond_the_elevations() -> None:
    """Up to a row beyond go to the border row, farther ones nowhere."""
    elevations = (11.0, 8.9, 14.1, -14.0, -16.0)
    steps = [0.25 + 0.5 * at for at in range(len(elevations))]
    pairs = zip(elevations, steps, strict=True)
    sweep = _sweep([_direction(up, left, 5) for up, left in pairs])
    found = range_image(sweep, COLUMNS, (4, 720), (-10, 10), FULL, CHANNELS)
    assert _pixel(found) == [(0, 357), (0, 358), (0, 359), (3, 356)]


def test_range_m_leaves_points_out() -> None:
    sweep = _sweep([[0.5, 0, 0], [5, 0, 0], [50, 0, 0]])
    near, far = (
        range_image(
            sweep, COLUMNS, (1, 4), (-1, 1), FULL, ("range", "density"), range_m=limits
        )
        for limits in ((1, 60), (10, 60))
    )
    assert near.max(axis=(0, 1)).tolist() == pytest.approx([5, math.log(3)])
    assert far.max(axis=(0, 1)).tolist() == pytest.approx([50, math.log(2)])


def test_a_point_at_the_sensor_has_no_direction() -> None:
    found = range_image(
        _sweep([[0, 0, 0]]), COLUMNS, (2, 2), (-1, 1), FULL, ("occupied",)
    )
    assert not found.any()


def test_made_channels_come_before_columns_of_their_name() -> None:
    sweep = np.array([[3, 4, 0, -7]], np.float32)
    columns = ("x", "y", "z", "range")
    channels = ("range", "occupied")
    from_sensor = range_image(sweep, columns, (1, 1), (-1, 1), FULL, channels)
    from_above = bev_image(sweep, columns, (1, 1), (0, 9), (0, 9), None, channels)
    assert from_sensor.tolist() == from_above.tolist() == [[[5, 1]]]


def test_empty_pixels_have_the_value_asked_for() -> None:
    sweep = _sweep([[1, 1, 0]])
    channels = ("z", "occupied")
    found = bev_image(
        sweep, COLUMNS, (2, 2), (-2, 2), (-2, 2), None, channels, empty=np.nan
    )
    assert found[0, 0].tolist() == [0, 1]
    assert np.isnan(found).sum() == 3 * 2


def _seen(sweep: Points, **view: Any) -> Points:
    plain = {"index": 1, "flip": False, "yaw": 0.0, "scale": 1.0, "boxes": {}}
    moved: Points = points_in_view(sweep, COLUMNS, View(**{**plain, **view}))
    return moved


def _place(sweep: Points, from_above: bool) -> np.ndarray:
    """Channels that turns and mirroring leave as they are."""
    channels = ("range", "z", "intensity", "density")
    if from_above:
        extent = (-60, 60)
        return bev_image(sweep, COLUMNS, (50, 50), extent, extent, None, channels)
    return range_image(sweep, COLUMNS, (16, 360), (-25, 3), FULL, channels)


@pytest.mark.parametrize("from_above", [False, True])
def test_a_mirrored_view_has_the_mirrored_image(from_above: bool) -> None:
    sweep = _scan()
    plain = _place(sweep, from_above)
    flipped = _place(_seen(sweep, flip=True), from_above)
    assert plain[..., 0].any()
    assert np.array_equal(flipped, plain[:, ::-1])


def test_a_turn_shifts_a_range_image() -> None:
    sweep = _scan()
    turned = _place(_seen(sweep, yaw=math.radians(30)), from_above=False)
    # To the left, as the points go, and around: 30 of 360 columns.
    assert np.allclose(turned, np.roll(_place(sweep, False), -30, axis=1), rtol=1e-6)


def test_a_turn_turns_an_image_from_above() -> None:
    sweep = _scan()
    turned = _place(_seen(sweep, yaw=math.pi / 2), from_above=True)
    # Seen from above, from x (up) towards y (left) is counter-clockwise.
    assert np.allclose(turned, np.rot90(_place(sweep, True)), rtol=1e-6)


def test_a_scaled_view_changes_ranges_and_no_pixel() -> None:
    sweep = _scan()
    plain = _place(sweep, from_above=False)
    scaled = _place(_seen(sweep, scale=1.25), from_above=False)
    assert np.allclose(scaled[..., :2], 1.25 * plain[..., :2], rtol=1e-6)
    assert np.array_equal(scaled[..., 2:], plain[..., 2:])
