"""Grids of inputs that were padded: brought back onto the view's box.

A teacher with ``fit: pad`` looks at a frame that the picture fills from the top left;
its cells on padding are missing in the bank. A student, and every other teacher, sees
the picture alone. Here the picture's cells are spread over a grid of their own, so that
cell (i, j) is centred at ((j + .5)/W, (i + .5)/H) of the view's box, as everywhere.

Shape suffixes: B rows of a batch, H and W grid, C channels.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from manifests.bank import OutputEntry
from pipeline.bank.open import Bank
from pipeline.samples.fitting import padded_size


@dataclass(frozen=True)
class Padding:
    """How an output's input was padded.

    Attributes:
        input: the image.
        frame: (height, width) of the teacher's input in pixels.
        grid: rows and columns that the picture is spread over: those that it fills in
            the frame where its aspect is the bank's typical one.
    """

    input: str
    frame: tuple[int, int]
    grid: tuple[int, int]

    @classmethod
    def of(cls, bank: Bank, path: str) -> Padding | None:
        """Returns how an output's input was padded, None where it was not."""
        entry, made = bank.output(path), bank.pass_of(path)
        taken = made.provenance["preprocess"][entry.size]
        padded = [name for name in made.inputs if taken[name].get("pad")]
        if entry.kind != "grid" or not padded:
            return None
        (name,) = padded
        frame = (int(taken[name]["height"]), int(taken[name]["width"]))
        box = (0.0, 0.0, bank.record.inputs[name].aspect, 1.0)
        return cls(name, frame, _filled(entry, frame, padded_size(box, frame)))

    def shares(self, boxes_B4: npt.NDArray[np.float64]) -> npt.NDArray[np.float32]:
        """Returns the share of the frame that each picture fills: (B, 2) of y and x.

        Args:
            boxes_B4: of the rows' views, upright pixels; NaN where a row has none.
        """
        shares_B2 = np.ones((len(boxes_B4), 2), np.float32)
        for number, box in enumerate(boxes_B4.tolist()):
            if np.isfinite(box).all():
                filled = padded_size((box[0], box[1], box[2], box[3]), self.frame)
                shares_B2[number] = np.divide(filled, self.frame)
        return shares_B2


def _filled(entry: OutputEntry, frame: tuple[int, int], part: Any) -> tuple[int, int]:
    rows, columns = (
        max(1, round(cells * filled / whole))
        for cells, filled, whole in zip(entry.shape[:2], part, frame, strict=True)
    )
    return rows, columns


def spread_picture(
    frame_BHWC: Tensor, shares_B2: Tensor, grid: tuple[int, int]
) -> Tensor:
    """Returns the picture's part of a frame on a grid of its own: (B, *grid, C).

    Bilinear between the centres of the picture's own cells; nearer to its border than
    half a cell the outermost of them holds. Missing cells are never drawn on; rows
    without any cell of the picture are NaN.

    Args:
        frame_BHWC: (B, H, W, C) float32 on the frame's grid; cells on padding are NaN.
        shares_B2: (B, 2) how much of the frame the picture fills, y and x.
        grid: rows and columns wanted.
    """
    height, width = frame_BHWC.shape[1:3]
    is_cell_BHW = ~frame_BHWC[..., 0].isnan()
    places = []
    for axis, (length, wanted) in enumerate(zip((height, width), grid, strict=True)):
        centres = (torch.arange(wanted, device=frame_BHWC.device) + 0.5) / wanted
        share_B1 = shares_B2[:, axis : axis + 1].to(frame_BHWC.device)
        place_BN = centres * share_B1 * length - 0.5
        # The picture's cells of a row or column are the first ones.
        num_B1 = is_cell_BHW.any(2 - axis).sum(1, keepdim=True).clamp(min=1)
        place_BN = place_BN.clamp(min=0).minimum((num_B1 - 1).to(place_BN.dtype))
        places.append((2 * place_BN + 1) / length - 1)
    y_BHW = places[0][:, :, None].expand(-1, *grid)
    x_BHW = places[1][:, None, :].expand(-1, *grid)
    sampled_BCHW = F.grid_sample(
        frame_BHWC.nan_to_num(nan=0.0).permute(0, 3, 1, 2),
        torch.stack([x_BHW, y_BHW], -1),
        mode="bilinear",
        padding_mode="border",
        align_corners=False,
    )
    picture_BHWC = sampled_BCHW.permute(0, 2, 3, 1)
    is_row_B = is_cell_BHW.flatten(1).any(1)
    return picture_BHWC.masked_fill(~is_row_B[:, None, None, None], torch.nan)
