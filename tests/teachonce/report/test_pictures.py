"""Pictures against independent NumPy: SVD, pixel loops, and what Pillow reads back."""

from __future__ import annotations

import base64
import io

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from teachonce.report import pictures
from teachonce.report.pictures import fit_basis


def cells(rng: np.random.Generator, count: int, channels: int) -> np.ndarray:
    """Cells whose channels vary by clearly different amounts, turned at random."""
    turned, _ = np.linalg.qr(rng.normal(size=(channels, channels)))
    spread = 2.0 ** -np.arange(channels)
    found: np.ndarray = (rng.normal(size=(count, channels)) * spread) @ turned + 3
    return found


def test_components_are_those_of_an_svd(rng: np.random.Generator) -> None:
    values = cells(rng, 400, 9)
    basis = fit_basis(values)
    _, sizes, vectors = np.linalg.svd(values - values.mean(0), full_matrices=False)
    for found, expected in zip(basis.components_KC, vectors[:3], strict=True):
        assert abs(found @ expected) == pytest.approx(1, abs=1e-9)
    assert basis.share == pytest.approx((sizes[:3] ** 2).sum() / (sizes**2).sum())


def test_the_largest_loading_is_positive_whatever_comes(
    rng: np.random.Generator,
) -> None:
    values = cells(rng, 300, 6)
    basis = fit_basis(values)
    for component in basis.components_KC:
        assert component[np.abs(component).argmax()] > 0
    # The order of the cells, and how many times each is there, change nothing.
    again = fit_basis(np.concatenate([values[::-1], values]))
    assert np.allclose(again.components_KC, basis.components_KC, atol=1e-9)


def test_colours_are_components_between_their_percentiles(
    rng: np.random.Generator,
) -> None:
    values = cells(rng, 6 * 7, 5)
    basis = fit_basis(values)
    picture = basis.colours(values.reshape(6, 7, 5).astype(np.float32))
    _, _, vectors = np.linalg.svd(values - values.mean(0), full_matrices=False)
    for channel in range(3):
        vector = vectors[channel] * np.sign(
            vectors[channel][np.abs(vectors[channel]).argmax()]
        )
        found = (values - values.mean(0)) @ vector
        low, high = np.quantile(found, 0.02), np.quantile(found, 0.98)
        expected = np.clip((found - low) / (high - low), 0, 1) * 255
        assert np.abs(picture[..., channel].ravel() - expected).max() <= 1
    assert picture.dtype == np.uint8
    assert picture.min() == 0
    assert picture.max() == 255


def test_one_odd_cell_changes_no_ends(rng: np.random.Generator) -> None:
    # All of the variance but the odd cell's lies in one plane: the basis is stable.
    values = cells(rng, 1000, 4)
    basis = fit_basis(values)
    high = basis.high_K.copy()
    odd = np.concatenate([values, values.mean(0)[None] + 5 * basis.components_KC[:1]])
    assert np.allclose(fit_basis(odd).high_K, high, atol=0.1)


def test_one_channel_is_grey_and_two_leave_blue_in_the_middle(
    rng: np.random.Generator,
) -> None:
    one = rng.normal(size=(4, 5, 1))
    picture = fit_basis(one.reshape(-1, 1)).colours(one)
    assert (picture[..., 0] == picture[..., 1]).all()
    assert (picture[..., 0] == picture[..., 2]).all()
    # More of the only channel is brighter.
    order = one[..., 0].ravel().argsort()
    assert (np.diff(picture[..., 0].ravel()[order].astype(int)) >= 0).all()
    two = rng.normal(size=(4, 5, 2))
    assert (fit_basis(two.reshape(-1, 2)).colours(two)[..., 2] == 128).all()


def test_what_says_nothing_is_mid_grey() -> None:
    flat = np.full((3, 4, 6), 7.0)
    basis = fit_basis(flat.reshape(-1, 6))
    assert np.isnan(basis.share)
    assert (basis.colours(flat) == 128).all()
    # Rank 1: the second and third component would be rounding, amplified.
    line = np.arange(12.0)[:, None] * np.array([1.0, -2.0, 0.5, 3.0])
    picture = fit_basis(line).colours(line.reshape(3, 4, 4))
    assert (picture[..., 1:] == 128).all()
    assert len(np.unique(picture[..., 0])) > 6


def test_cells_that_are_not_finite_do_not_count(rng: np.random.Generator) -> None:
    values = cells(rng, 60, 4)
    expected = fit_basis(values[6:])
    values[:6, 1] = np.nan
    basis = fit_basis(values)
    assert np.allclose(basis.components_KC, expected.components_KC)
    picture = basis.colours(values.reshape(6, 10, 4))
    assert (picture[0, :6] == 128).all()
    with pytest.raises(
        ValueError, match=r"cells must hold a finite one, got none of 6"
    ):
        fit_basis(values[:6])


@given(
    height=st.integers(1, 7),
    width=st.integers(1, 7),
    size=st.tuples(st.integers(1, 40), st.integers(1, 40)),
)
def test_each_pixel_is_the_cell_it_lies_in(
    height: int, width: int, size: tuple[int, int]
) -> None:
    grid = np.arange(height * width, dtype=np.uint8).reshape(height, width, 1)
    found = pictures.enlarge(grid, size)
    assert found.shape == (*size, 1)
    for row in range(size[0]):
        for column in range(size[1]):
            centre = (row + 0.5) / size[0] * height, (column + 0.5) / size[1] * width
            assert found[row, column, 0] == grid[int(centre[0]), int(centre[1]), 0]


def test_cosine_is_the_mean_over_vectors(rng: np.random.Generator) -> None:
    left, right = rng.normal(size=(2, 8, 5))
    left[2], right[3, 0] = 0, np.nan
    kept = [0, 1, 4, 5, 6, 7]
    expected = np.mean(
        [
            left[i] @ right[i] / np.sqrt((left[i] @ left[i]) * (right[i] @ right[i]))
            for i in kept
        ]
    )
    assert pictures.mean_cosine(left, right) == pytest.approx(expected)
    assert np.isnan(pictures.mean_cosine(left[2:4], right[2:4]))


@pytest.mark.parametrize("row_0", ["x_max", "x_min"])
@pytest.mark.parametrize("column_0", ["y_max", "y_min"])
def test_ahead_is_up_and_left_is_left(row_0: str, column_0: str) -> None:
    x, y = np.array([5.0, 3.0, 1.0]), np.array([2.0, -2.0])
    rows = x if row_0 == "x_max" else x[::-1]
    columns = y if column_0 == "y_max" else y[::-1]
    grid = np.stack(np.meshgrid(rows, columns, indexing="ij"), -1)
    found = pictures.ahead_up(grid, row_0, column_0)
    assert (np.diff(found[..., 0], axis=0) < 0).all()
    assert (np.diff(found[..., 1], axis=1) < 0).all()


def test_points_on_an_image() -> None:
    image = np.full((6, 8, 3), 200, np.uint8)
    uv = np.array([[2.4, 1.6], [2.9, 1.1], [7.9, 5.9], [-1, 2], [np.nan, np.nan]])
    depth = np.array([30.0, 2.0, 4.0, 3.0, -1.0])
    found = pictures.points_on_image(image, uv, depth, 40.0)
    # The nearer of two on a pixel is seen, whichever came first.
    near = pictures.ramp(np.sqrt(np.array([2 / 40, 4 / 40])))
    assert (found[1, 2] == near[0]).all()
    assert (found[2, 3] == near[0]).all()
    assert (found[5, 7] == near[1]).all()
    drawn = (found != 90).any(axis=-1)
    assert drawn.sum() == 4 + 1
    assert pictures.points_in_image(uv, depth, (6, 8)).tolist() == [True] * 3 + [
        False,
        False,
    ]


def test_the_ramp_goes_from_red_to_blue() -> None:
    found = pictures.ramp(np.array([-1.0, 0.0, 0.5, 1.0, 2.0]))
    assert found[0].tolist() == found[1].tolist() == [255, 0, 0]
    assert found[2].tolist() == [128, 255, 128]
    assert found[3].tolist() == found[4].tolist() == [0, 0, 255]


def test_a_sweep_from_above() -> None:
    points = np.array(
        [[9.5, 3.5, 0], [9.6, 3.6, 5], [0.5, -3.5, 1], [-1, 0, 9], [5, 4.5, 9]]
    )
    found = pictures.points_from_above(points, (0, 10), (-4, 4), (10, 8))
    drawn = np.argwhere((found != found[5, 4]).any(axis=-1)).tolist()
    # Ahead is up, left is left; behind and beside are outside.
    assert drawn == [[0, 0], [9, 7]]
    # The higher of two in a cell is seen, and the highest is red.
    assert found[0, 0].tolist() == [255, 0, 0]
    empty = pictures.points_from_above(points[3:4], (0, 10), (-4, 4), (4, 4))
    assert len(np.unique(empty.reshape(-1, 3), axis=0)) == 1


def test_what_is_not_seen_fades() -> None:
    picture = np.array([[[255, 0, 128], [255, 0, 128]]], np.uint8)
    found = pictures.fade(picture, np.array([[True, False]]))
    assert found[0, 0].tolist() == [255, 0, 128]
    assert found[0, 1].tolist() == [166, 90, 128]


@pytest.mark.parametrize("kind", ["png", "jpeg"])
def test_uris_decode(kind: str, rng: np.random.Generator) -> None:
    picture = np.kron(rng.integers(0, 256, (3, 4, 3)), np.ones((8, 8, 1)))
    picture = picture.astype(np.uint8)
    data = (pictures.to_png if kind == "png" else pictures.to_jpeg)(picture)
    head, _, body = pictures.data_uri(data).partition(",")
    assert head == f"data:image/{kind};base64"
    image = Image.open(io.BytesIO(base64.b64decode(body)))
    found = np.asarray(image).astype(int)
    assert found.shape == picture.shape
    assert np.abs(found - picture).mean() <= (0 if kind == "png" else 4)
