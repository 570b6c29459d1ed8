"""Heads that look at more of a student than one token: its layers, or all its tokens.

Expendable as all heads are: trained beside the student and dropped afterwards.

Shape suffixes: B images, H and W grid, N tokens, C channels. ``...`` is B or B, H, W.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from manifests.errors import ManifestError
from student_train.heads import check_widths

#: DUNE's LayerScale at the start.
LAYER_SCALE = 1e-4
#: Channels of an attention head where a recipe does not say.
HEAD_WIDTH = 64


class Ladder(nn.Module):
    """UNIC's ladder: two layers from every layer of the student, summed.

    One sum for one target: layers below reach the loss without passing through those
    above.

    Args:
        dim_in: channels of the student's tokens, in all layers.
        dim_out: channels of the teacher's output.
        num_layers: of the student.
        hidden: channels between, from the last layer; UNIC has 4 x the tokens'.
        rungs: channels between, from each of the others; UNIC has the tokens'.

    Source: UNIC (arXiv 2408.05088), ladder of expendable projectors.
    """

    def __init__(
        self, dim_in: int, dim_out: int, num_layers: int, hidden: int, rungs: int
    ) -> None:
        super().__init__()
        check_widths(
            dim_in=dim_in,
            dim_out=dim_out,
            num_layers=num_layers,
            hidden=hidden,
            rungs=rungs,
        )
        widths = [*[rungs] * (num_layers - 1), hidden]
        self.expand = nn.ModuleList(nn.Linear(dim_in, width) for width in widths)
        self.contract = nn.ModuleList(nn.Linear(width, dim_out) for width in widths)

    def forward(self, layers: Sequence[Tensor]) -> Tensor:
        """Returns (..., dim_out).

        Args:
            layers: (..., dim_in) of each layer, the last one's after the final norm.
        """
        found: Tensor | None = None
        steps = zip(self.expand, self.contract, layers, strict=True)
        for expand, contract, tokens in steps:
            step = contract(F.gelu(expand(tokens)))
            found = step if found is None else found + step
        assert found is not None
        return found

    def last_layers(self) -> tuple[nn.Linear, ...]:
        """Returns the layers whose outputs sum to what it gives."""
        return tuple(self.contract)  # type: ignore[arg-type]


class TransformerHead(nn.Module):
    """One more layer of a transformer over all tokens, and a linear layer, as DUNE's.

    Its tokens see each other, so that a teacher's cells that depend on their
    surroundings need not be in the student's own.

    Args:
        dim_in: channels of the student's tokens.
        dim_out: channels of the teacher's output.
        heads: of its attention; a head for each 64 channels if omitted.

    Raises:
        ManifestError: ``heads`` does not divide the channels.

    Source: DUNE (arXiv 2503.14405), transformer projector.
    """

    def __init__(self, dim_in: int, dim_out: int, heads: int | None = None) -> None:
        super().__init__()
        check_widths(dim_in=dim_in, dim_out=dim_out)
        num_heads = heads or max(1, dim_in // HEAD_WIDTH)
        if dim_in % num_heads:
            raise ManifestError(
                f"heads must divide the tokens' {dim_in} channels, got {num_heads} "
                "(transformer head); set head.heads"
            )
        self.block = Block(dim_in, num_heads, qkv_bias=True, init_values=LAYER_SCALE)
        self.linear = nn.Linear(dim_in, dim_out)

    def forward(
        self, cls_BC: Tensor | None, patch_BHWC: Tensor
    ) -> tuple[Tensor | None, Tensor]:
        """Returns the class token (B, dim_out) and the grid (B, H, W, dim_out).

        Args:
            cls_BC: (B, dim_in); None where the student has none.
            patch_BHWC: (B, H, W, dim_in).
        """
        tokens_BNC = patch_BHWC.flatten(1, 2)
        if cls_BC is not None:
            tokens_BNC = torch.cat([cls_BC.unsqueeze(1), tokens_BNC], 1)
        found_BNC: Tensor = self.linear(self.block(tokens_BNC))
        if cls_BC is None:
            return None, found_BNC.unflatten(1, patch_BHWC.shape[1:3])
        return found_BNC[:, 0], found_BNC[:, 1:].unflatten(1, patch_BHWC.shape[1:3])

    def last_layers(self) -> tuple[nn.Linear, ...]:
        """Returns the layers whose outputs sum to what it gives."""
        return (self.linear,)
