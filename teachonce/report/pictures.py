"""From arrays to pictures: features in colours, sweeps on images and from above.

Pure functions of NumPy arrays; knows neither banks nor pages. Pictures are uint8 RGB.

The colours of features are their first three principal components, over all cells that
are shown together, so that equal colours mean alike features in every picture of one
basis. Their signs are fixed and their ends are percentiles: one odd cell changes
nothing else.

Shape suffixes: N cells or points, H and W a grid or picture, C channels, K components
(at most 3).
"""

from __future__ import annotations

import base64
import io
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from PIL import Image

Floats = npt.NDArray[np.float64]
Picture = npt.NDArray[np.uint8]

NUM_COMPONENTS = 3
#: Ends of each component's colours, percent of the cells.
PERCENTILES = (2.0, 98.0)
#: Cells that hold nothing.
MISSING_COLOUR = 128

# A component of a smaller share of the first one's variance is rounding: amplified to
# full colour it would be noise.
_SMALLEST_SHARE = 1e-9
_UNSEEN_SHARE = 0.3
_DIMMED = 0.45
_BACKGROUND = (20, 22, 26)


@dataclass(frozen=True, eq=False)
class Basis:
    """What the colours of features mean.

    Attributes:
        mean_C: what is subtracted.
        components_KC: rows of length 1; the largest loading of each is positive.
        low_K, high_K: values that become 0 and 255; equal where a component says
            nothing.
        share: of the variance, that the components hold together; NaN without variance.
    """

    mean_C: Floats
    components_KC: Floats
    low_K: Floats
    high_K: Floats
    share: float

    def colours(self, grid_HWC: npt.NDArray[np.floating]) -> Picture:
        """Returns (H, W, 3): components as red, green and blue.

        One component alone is grey; cells that are not finite are mid-grey.

        Args:
            grid_HWC: in the space that the basis was fitted in.
        """
        values_HWC = grid_HWC.astype(np.float64)
        is_known_HW = _is_finite(values_HWC)
        values_HWC = np.where(is_known_HW[..., None], values_HWC, self.mean_C)
        found_HWK = (values_HWC - self.mean_C) @ self.components_KC.T
        width_K = self.high_K - self.low_K
        share_HWK = np.full(found_HWK.shape, 0.5)
        np.divide(found_HWK - self.low_K, width_K, out=share_HWK, where=width_K > 0)
        rgb_HW3 = np.full((*is_known_HW.shape, NUM_COMPONENTS), 0.5)
        # One component is spread over all three colours; two leave blue at its middle.
        num_components = len(self.components_KC)
        used = NUM_COMPONENTS if num_components == 1 else num_components
        rgb_HW3[..., :used] = np.clip(share_HWK, 0, 1)
        picture_HW3: Picture = np.rint(255 * rgb_HW3).astype(np.uint8)
        picture_HW3[~is_known_HW] = MISSING_COLOUR
        return picture_HW3


def class_colours(logits_HWC: npt.NDArray[np.floating]) -> Picture:
    """Returns (H, W, 3): each cell in the colour of its largest logit.

    Colours go round the circle by the golden ratio: neighbours in number differ. Cells
    that are not finite are mid-grey.
    """
    is_known_HW = _is_finite(logits_HWC)
    classes_HW = np.where(is_known_HW[..., None], logits_HWC, 0).argmax(-1)
    hue_HW = classes_HW * 0.6180339887 % 1
    value_HW = np.where(classes_HW % 2, 0.95, 0.7)
    sector_HW3 = (hue_HW[..., None] * 6 + np.array([0, 4, 2])) % 6
    share_HW3 = np.clip(np.abs(sector_HW3 - 3) - 1, 0, 1)
    rgb_HW3 = value_HW[..., None] * (1 - 0.65 * (1 - share_HW3))
    picture_HW3: Picture = np.rint(255 * rgb_HW3).astype(np.uint8)
    picture_HW3[~is_known_HW] = MISSING_COLOUR
    return picture_HW3


def fit_basis(cells_NC: npt.NDArray[np.floating]) -> Basis:
    """Returns the principal components of cells, and the ends of their colours.

    Args:
        cells_NC: (N, C), standardised; cells that are not finite do not count.

    Raises:
        ValueError: no cell is finite.
    """
    known_NC = cells_NC[_is_finite(cells_NC)].astype(np.float64)
    if not len(known_NC):
        raise ValueError(f"cells must hold a finite one, got none of {len(cells_NC)}")
    mean_C = known_NC.mean(axis=0)
    centred_NC = known_NC - mean_C
    # Of channels, not of cells: there are thousands of cells.
    variance_C, vectors_CC = np.linalg.eigh(centred_NC.T @ centred_NC / len(known_NC))
    kept = slice(None, -1 - NUM_COMPONENTS, -1)
    components_KC = _with_signs(vectors_CC[:, kept].T)
    variance_K = np.maximum(variance_C[kept], 0)
    low_K, high_K = np.percentile(centred_NC @ components_KC.T, PERCENTILES, axis=0)
    says_nothing_K = variance_K <= _SMALLEST_SHARE * variance_K[0]
    high_K = np.where(says_nothing_K, low_K, high_K)
    total = float(np.maximum(variance_C, 0).sum())
    share = float(variance_K.sum()) / total if total else float("nan")
    return Basis(mean_C, components_KC, low_K, high_K, share)


def _is_finite(values: npt.NDArray[np.floating]) -> npt.NDArray[np.bool_]:
    """Returns which vectors, along the last axis, are finite throughout."""
    found: npt.NDArray[np.bool_] = np.isfinite(values).all(axis=-1)
    return found


def _with_signs(components_KC: Floats) -> Floats:
    """Returns the components turned so that the largest loading of each is positive."""
    places_K = np.abs(components_KC).argmax(axis=1)
    signs_K = np.sign(components_KC[np.arange(len(places_K)), places_K])
    turned_KC: Floats = components_KC * signs_K[:, None]
    return turned_KC


def mean_cosine(
    left_NC: npt.NDArray[np.floating], right_NC: npt.NDArray[np.floating]
) -> float:
    """Returns the mean cosine between rows of two arrays; NaN where there is none.

    Args:
        left_NC: (N, C); rows that are not finite or are zero do not count.
        right_NC: the same.
    """
    left, right = left_NC.astype(np.float64), right_NC.astype(np.float64)
    lengths_N = np.linalg.norm(left, axis=1) * np.linalg.norm(right, axis=1)
    counts_N = np.isfinite(lengths_N) & (lengths_N > 0)
    if not counts_N.any():
        return float("nan")
    dots_N = (left[counts_N] * right[counts_N]).sum(axis=1)
    return float((dots_N / lengths_N[counts_N]).mean())


def enlarge(picture_HWC: Picture, size_hw: tuple[int, int]) -> Picture:
    """Returns the picture at another size, each pixel the cell that it lies in.

    Args:
        picture_HWC: any number of channels.
        size_hw: (height, width) of the result.
    """
    height, width = picture_HWC.shape[:2]
    rows = ((np.arange(size_hw[0]) + 0.5) * height / size_hw[0]).astype(int)
    columns = ((np.arange(size_hw[1]) + 0.5) * width / size_hw[1]).astype(int)
    enlarged: Picture = picture_HWC[rows[:, None], columns]
    return enlarged


def fade(picture_HW3: Picture, seen_HW: npt.NDArray[np.bool_]) -> Picture:
    """Returns the picture with what is not seen near to grey."""
    unseen_HW3 = MISSING_COLOUR + _UNSEEN_SHARE * (picture_HW3 - float(MISSING_COLOUR))
    faded: Picture = np.where(
        seen_HW[..., None], picture_HW3, np.rint(unseen_HW3)
    ).astype(np.uint8)
    return faded


def ahead_up(grid_RK: npt.NDArray, row_0: str, column_0: str) -> npt.NDArray:
    """Returns a bird's-eye grid with x ahead upwards and y to the left.

    Args:
        grid_RK: rows along x, columns along y, any further axes.
        row_0: ``x_max`` or ``x_min``: what the first row is.
        column_0: ``y_max`` or ``y_min``: what the first column is.
    """
    if row_0 == "x_min":
        grid_RK = grid_RK[::-1]
    return grid_RK[:, ::-1] if column_0 == "y_min" else grid_RK


def ramp(share: npt.NDArray[np.floating]) -> Picture:
    """Returns colours (..., 3) for shares: 0 is red, over yellow and green to blue, 1.

    Args:
        share: any shape; beyond 0 and 1 they are cut.
    """
    place = 0.5 + 3 * np.clip(share, 0, 1)[..., None]
    colour = 1.5 - np.abs(place - np.array([1.0, 2.0, 3.0]))
    whole: Picture = np.rint(255 * np.clip(colour, 0, 1)).astype(np.uint8)
    return whole


def points_on_image(
    image_HW3: Picture, uv_N2: Floats, depth_N: Floats, far_m: float
) -> Picture:
    """Returns the image, darker, with points in the colour of their depth.

    A point is 2 x 2 pixels; of several the nearest is seen.

    Args:
        image_HW3: the image.
        uv_N2: where the points fall, pixels; NaN or outside: not drawn.
        depth_N: metres along the camera's axis.
        far_m: depth of the last colour; a quarter of it has the middle one.
    """
    height, width = image_HW3.shape[:2]
    picture_HW3: Picture = np.rint(image_HW3 * _DIMMED).astype(np.uint8)
    is_in_N = points_in_image(uv_N2, depth_N, (height, width))
    order = np.flatnonzero(is_in_N)
    order = order[np.argsort(-depth_N[order], kind="stable")]
    column_N, row_N = uv_N2[order].astype(int).T
    colour_N3 = ramp(np.sqrt(depth_N[order] / far_m))
    # Far to near over all four pixels of each, or a far point covers a near one's.
    rows = np.stack([row_N, row_N, row_N + 1, row_N + 1], 1).ravel()
    columns = np.stack([column_N, column_N + 1] * 2, 1).ravel()
    rows, columns = np.minimum(rows, height - 1), np.minimum(columns, width - 1)
    picture_HW3[rows, columns] = np.repeat(colour_N3, 4, axis=0)
    return picture_HW3


def points_in_image(
    uv_N2: Floats, depth_N: Floats, size_hw: tuple[int, int]
) -> npt.NDArray[np.bool_]:
    """Returns which points are seen: before the camera and inside the image.

    Args:
        uv_N2: pixels; NaN is outside.
        depth_N: metres.
        size_hw: (height, width) of the image.
    """
    high = np.array([size_hw[1], size_hw[0]])
    inside: npt.NDArray[np.bool_] = (depth_N > 0) & ((uv_N2 >= 0) & (uv_N2 < high)).all(
        axis=1
    )
    return inside


def points_from_above(
    points_N3: npt.NDArray[np.floating],
    x_m: tuple[float, float],
    y_m: tuple[float, float],
    size_hw: tuple[int, int],
) -> Picture:
    """Returns a sweep from above, x ahead upwards and y to the left, highest on top.

    Colours go by height: blue is the 2nd percentile of what is drawn, red the 98th.

    Args:
        points_N3: x, y, z in metres first, further columns do not matter.
        x_m: ends of what is drawn.
        y_m: the same.
        size_hw: (height, width) of the picture.
    """
    picture_HW3 = np.full((*size_hw, 3), _BACKGROUND, np.uint8)
    x_N, y_N, z_N = points_N3[:, :3].astype(np.float64).T
    row_N = np.floor((x_m[1] - x_N) / (x_m[1] - x_m[0]) * size_hw[0])
    column_N = np.floor((y_m[1] - y_N) / (y_m[1] - y_m[0]) * size_hw[1])
    inside_N = (row_N >= 0) & (row_N < size_hw[0])
    inside_N &= (column_N >= 0) & (column_N < size_hw[1])
    order = np.flatnonzero(inside_N)
    if not len(order):
        return picture_HW3
    order = order[np.argsort(z_N[order], kind="stable")]
    low, high = np.percentile(z_N[order], PERCENTILES)
    share_N = 1 - (z_N[order] - low) / max(high - low, 1e-9)
    picture_HW3[row_N[order].astype(int), column_N[order].astype(int)] = ramp(share_N)
    return picture_HW3


def to_png(picture: Picture) -> bytes:
    """Returns the picture as PNG."""
    sink = io.BytesIO()
    Image.fromarray(picture).save(sink, "PNG", optimize=True)
    return sink.getvalue()


def to_jpeg(picture: Picture) -> bytes:
    """Returns the picture as JPEG, its colours at full resolution."""
    sink = io.BytesIO()
    Image.fromarray(picture).save(sink, "JPEG", quality=85, subsampling=0)
    return sink.getvalue()


def data_uri(data: bytes) -> str:
    """Returns what a page embeds a PNG or JPEG by."""
    kind = "png" if data.startswith(b"\x89PNG") else "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"
