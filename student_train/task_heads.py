"""Which head a target gets, and what of the student it looks at.

A kind of head is a line of `HEADS`, or an entry point of the group ``teachonce.heads``
in another package (``name = "module:CLASS"``), called as ``CLASS(dim_in, dim_out,
**args)`` with the recipe's ``head.args`` and giving a module from (..., dim_in) to
(..., dim_out). With ``last_layers()`` as ours have it can be folded.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Literal

from torch import Tensor, nn

from manifests.errors import ManifestError
from manifests.target import HeadConfig
from student_train.deep_heads import Ladder, TransformerHead
from student_train.errors import TrainingError, reason_of
from student_train.extensions import load_part
from student_train.features import Student, StudentFeatures
from student_train.heads import Adapter, BevGrid, BevHead, LinearHead
from student_train.tasks import Task

ENTRY_POINTS = "teachonce.heads"

TokenKind = Literal["cls", "pooled", "patch"]

# Cells of a bird's-eye head for a label, where the recipe does not say.
_BEV_CELLS = (32, 32)
# Channels that a camera's cells are brought to before they are lifted, at most.
_BEV_LIFTED = 64


@dataclass(frozen=True)
class Wanted:
    """What a head is made for.

    Attributes:
        task: the target.
        tokens: which of the student's it is learned from.
        student: whose they are.
    """

    task: Task
    tokens: TokenKind
    student: Student

    @property
    def config(self) -> HeadConfig:
        """The head's entry in the recipe."""
        return self.task.config.head

    @property
    def dim_in(self) -> int:
        """Channels of the tokens."""
        return int(getattr(self.student, f"{self.tokens}_dim"))

    @property
    def hidden(self) -> int:
        """Width of the hidden layer."""
        return self.config.hidden or 4 * self.dim_in


@dataclass(frozen=True)
class HeadKind:
    """A kind of head.

    Attributes:
        make: gives the head, from torch's global generator.
        run: gives what it makes of a kind of the student's tokens, by that kind.
        fields: of `HeadConfig` that mean something to it.
        gives_all: whether it makes something of all kinds at once, so that one head can
            serve targets of the class token and of the grid.
        needs_layers: whether it looks at the student's layers.
    """

    make: Callable[[Wanted], nn.Module]
    run: Callable[[Any, StudentFeatures, TokenKind], dict[TokenKind, Tensor]]
    fields: tuple[str, ...] = ()
    gives_all: bool = False
    needs_layers: bool = False


def _of_tokens(
    head: Any, features: StudentFeatures, tokens: TokenKind
) -> dict[TokenKind, Tensor]:
    return {tokens: head(getattr(features, tokens))}


def _of_layers(
    head: Any, features: StudentFeatures, tokens: TokenKind
) -> dict[TokenKind, Tensor]:
    below = [getattr(layer, tokens) for layer in features.layers]
    return {tokens: head([*below, getattr(features, tokens)])}


def _of_all(
    head: Any, features: StudentFeatures, tokens: TokenKind
) -> dict[TokenKind, Tensor]:
    cls, patch = head(features.cls, features.patch)
    return {"cls": cls, "patch": patch}


def _make_adapter(wanted: Wanted) -> nn.Module:
    return Adapter(wanted.dim_in, wanted.task.width, wanted.hidden)


def _make_linear(wanted: Wanted) -> nn.Module:
    return LinearHead(wanted.dim_in, wanted.task.width)


def _make_ladder(wanted: Wanted) -> nn.Module:
    _refuse_pooled(wanted)
    if not wanted.student.has_layers:
        raise TrainingError(
            f"targets.{wanted.task.name}.head must be another than ladder for a student"
            " whose layers do not lie on one grid as a plain ViT's do; take adapter"
        )
    rungs = wanted.config.rungs or wanted.dim_in
    num_layers = wanted.student.num_layers
    return Ladder(wanted.dim_in, wanted.task.width, num_layers, wanted.hidden, rungs)


def _make_transformer(wanted: Wanted) -> nn.Module:
    _refuse_pooled(wanted)
    if wanted.student.patch_dim is None:
        raise TrainingError(
            f"targets.{wanted.task.name}.head must be another than transformer for a "
            "student without tokens on a grid; take adapter"
        )
    return TransformerHead(wanted.dim_in, wanted.task.width, wanted.config.heads)


def _refuse_pooled(wanted: Wanted) -> None:
    if wanted.tokens == "pooled":
        raise TrainingError(
            f"targets.{wanted.task.name}.head must be adapter or linear for pooled "
            f"tokens, got {wanted.config.kind}, which is for cls and patch; set "
            "`tokens: cls`, or another head"
        )


def _make_bev(wanted: Wanted) -> nn.Module:
    task, config, extent = wanted.task, wanted.config, wanted.task.extent
    assert extent is not None
    grid = BevGrid(
        x_m=extent.x_m,
        y_m=extent.y_m,
        cells=config.cells or task.grid or _BEV_CELLS,
        row_0=extent.row_0,
        column_0=extent.column_0,
    )
    lifted = min(wanted.hidden, _BEV_LIFTED)
    return BevHead(
        wanted.dim_in, task.width, wanted.hidden, grid, config.heights_m, lifted
    )


#: The heads that a recipe can name.
HEADS: Mapping[str, HeadKind] = MappingProxyType(
    {
        "adapter": HeadKind(_make_adapter, _of_tokens, ("hidden",)),
        "linear": HeadKind(_make_linear, _of_tokens),
        "ladder": HeadKind(
            _make_ladder, _of_layers, ("hidden", "rungs"), needs_layers=True
        ),
        "transformer": HeadKind(_make_transformer, _of_all, ("heads",), gives_all=True),
        # Called by the objective, with the camera.
        "bev": HeadKind(_make_bev, _of_tokens, ("hidden", "cells", "heights_m")),
    }
)


def head_kind(config: HeadConfig, where: str) -> HeadKind:
    """Returns the kind of a head.

    Args:
        config: its entry.
        where: it is, for messages.

    Raises:
        ManifestError: there is none of that name, or a field is of another kind.
    """
    kind = HEADS.get(config.kind)
    if kind is None:
        made = load_part(ENTRY_POINTS, config.kind, HEADS, "a head", where)
        kind = HeadKind(_maker(made, where), _of_tokens, ("args",))
    given = config.model_fields_set - {"kind", "same_as"}
    changed = [
        name
        for name in sorted(given)
        if getattr(config, name)
        != type(config).model_fields[name].get_default(call_default_factory=True)
    ]
    if wrong := [name for name in changed if name not in kind.fields]:
        raise ManifestError(
            f"{where}.{wrong[0]} must be left out for a head of kind {config.kind}, "
            f"which takes {', '.join(kind.fields) or 'none'}"
        )
    return kind


def _maker(made: Any, where: str) -> Callable[[Wanted], nn.Module]:
    def make(wanted: Wanted) -> nn.Module:
        try:
            head = made(wanted.dim_in, wanted.task.width, **wanted.config.args)
        # Another package's constructor raises what it likes.
        except Exception as error:
            raise TrainingError(
                f"{where} must be built with its args, got {reason_of(error)}; "
                "correct head.args"
            ) from error
        if not isinstance(head, nn.Module):
            raise TrainingError(
                f"{where} must be a torch.nn.Module, got {type(head).__name__}"
            )
        return head

    return make


def tokens_of(task: Task, student: Student) -> TokenKind:
    """Returns which of a student's tokens a target is learned from.

    Raises:
        TrainingError: the student has none of those.
    """
    chosen = task.config.tokens
    if task.shape != "vector":
        chosen = "patch"
    elif chosen is None:
        chosen = (
            "cls" if student.cls_dim is not None and task.label is None else "pooled"
        )
    if getattr(student, f"{chosen}_dim") is None:
        raise TrainingError(
            f"targets.{task.name} must be learned from tokens that the student has, "
            f"got {chosen}, which it has not; choose another student or `tokens`"
        )
    return chosen
