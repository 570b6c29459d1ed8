"""At which input size a model looks at a box of some aspect: the same for all models.

Owns the arithmetic of sizes; which sizes a model can take is the model's.
"""

from __future__ import annotations

import math

from pipeline.samples.views import Box

_SAME_ASPECT = 1e-3


def fit_size(
    native: tuple[int, int], stride: int, aspect: float, fit: str
) -> tuple[int, int]:
    """Returns the input size at which a model looks at a box of some aspect.

    Args:
        native: the model's own (height, width).
        stride: pixels of one cell of its coarsest grid.
        aspect: width over height of the box.
        fit: ``squash`` and ``pad`` are the native size whatever the box, which is
            distorted or padded to fit; ``tokens`` the multiples of
            ``stride`` nearest the box's aspect that have about the native number of
            cells (a box of the native aspect has the native size itself).
    """
    height, width = native
    if fit != "tokens" or abs(math.log(aspect * height / width)) < _SAME_ASPECT:
        return native
    cells = height * width / stride**2
    best, best_cost = (1, 1), math.inf
    for rows in range(1, math.ceil(4 * math.sqrt(cells / aspect)) + 1):
        for columns in {math.floor(rows * aspect), math.ceil(rows * aspect)} - {0}:
            distortion = abs(math.log(columns / rows / aspect))
            # A wrong aspect changes what is seen; a few cells more or less only cost.
            cost = 2 * distortion + abs(math.log(rows * columns / cells))
            if cost < best_cost:
                best, best_cost = (rows, columns), cost
    return best[0] * stride, best[1] * stride


def padded_size(box: Box, size: tuple[int, int]) -> tuple[int, int]:
    """Returns the rows and columns of an input, from its top left, that a box fills.

    Args:
        box: what the view sees.
        size: (height, width) of the input.

    Source: Segment Anything's ResizeLongestSide: the shorter side is rounded.
    """
    width, height = box[2] - box[0], box[3] - box[1]
    scale = min(size[0] / height, size[1] / width)
    rows, columns = (int(side * scale + 0.5) for side in (height, width))
    return min(max(rows, 1), size[0]), min(max(columns, 1), size[1])
