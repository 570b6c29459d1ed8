"""One interface of features for every student, and the shapes of what it gives.

Owns a student's normalisation and where its outputs lie; `students` owns how it is
built. Nothing is decided by a model's name, but by what the model says of itself: its
class token, ``output_fmt``, ``num_prefix_tokens``, ``forward_intermediates``.

Shape suffixes: B batch, N tokens, H and W grid or image, C channels.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from student_train.errors import TrainingError, reason_of

Size = tuple[int, int]

_DEFAULT_STRIDE = 32


@dataclass(frozen=True)
class LayerTokens:
    """What one layer of a student gives, before any final norm.

    Attributes:
        cls: (B, C) class token; None where the model has none.
        patch: (B, H, W, C) tokens in raster order.
    """

    cls: Tensor | None
    patch: Tensor


@dataclass(frozen=True)
class StudentFeatures:
    """What a student gives for a batch.

    Attributes:
        cls: (B, C) class token after the final norm; None where the model has none.
        pooled: (B, C') what the model's own classifier would see.
        patch: (B, H, W, C) what ``forward_features`` gives: tokens in raster order
            without prefix tokens, or the final map; None where there is no grid.
        layers: of every layer but the last, whose tokens are those above; empty where
            they were not asked for.
    """

    cls: Tensor | None
    pooled: Tensor
    patch: Tensor | None
    layers: tuple[LayerTokens, ...] = ()


@dataclass(frozen=True)
class Shapes:
    """Shapes of one row at one input size, found without computing anything."""

    cls_dim: int | None
    pooled_dim: int
    grid: Size | None
    patch_dim: int | None


class Student(nn.Module):
    """A model with its normalisation and one interface of features.

    Attributes:
        model: as its library built it; the only submodule, so that its parameters are
            the student's.
        architecture: timm's name for it; None for a module from a file.
        args: keyword arguments it was built with, those for its size included.
        native_size: (height, width) that the model was made for.
        size: (height, width) that this one was built for.
        mean: per channel R, G, B of pixels in 0..1.
        std: the same.
        cls_dim: channels of `StudentFeatures.cls`, or None.
        pooled_dim: channels of `StudentFeatures.pooled`.
        patch_dim: channels of `StudentFeatures.patch`, or None.
        stride: pixels of one cell of its grid.
    """

    _shift: Tensor
    _scale: Tensor

    def __init__(
        self,
        model: nn.Module,
        *,
        native_size: Size,
        size: Size,
        mean: Sequence[float],
        std: Sequence[float],
        architecture: str | None = None,
        args: Mapping[str, Any] | None = None,
    ) -> None:
        """Takes a model that is built already.

        Raises:
            TrainingError: the model does not run at ``size``.
        """
        super().__init__()
        self.model = model
        self.architecture = architecture
        self.args = dict(args or {})
        self.native_size, self.size = native_size, size
        self.mean, self.std = tuple(mean), tuple(std)
        # As one subtraction and one multiplication on bytes; not part of the weights.
        shift = torch.tensor(self.mean, dtype=torch.float64) * 255
        scale = 1 / (torch.tensor(self.std, dtype=torch.float64) * 255)
        self.register_buffer("_shift", shift.to(torch.float32), persistent=False)
        self.register_buffer("_scale", scale.to(torch.float32), persistent=False)
        self._shapes: dict[Size, Shapes] = {}
        self._compiled: Callable[[Tensor], Any] | None = None
        shapes = self._shapes_at(size)
        self.cls_dim, self.pooled_dim = shapes.cls_dim, shapes.pooled_dim
        self.patch_dim = shapes.patch_dim
        self.stride = _stride(model, size, shapes.grid)

    def forward(self, pixels_BHW3: Tensor, layers: bool = False) -> StudentFeatures:
        """Returns the features of images.

        Args:
            pixels_BHW3: uint8 in R, G, B, of a view at any size that the model takes.
            layers: whether tokens of the layers between are kept; see `has_layers`.

        Raises:
            TrainingError: other pixels, or a size that the model refuses.
        """
        shapes = self._shapes_at((pixels_BHW3.shape[1], pixels_BHW3.shape[2]))
        model: Any = self.model
        image_B3HW = self.normalise(pixels_BHW3)
        if not layers:
            features = (self._compiled or model.forward_features)(image_B3HW)
            return _finish(model, features, shapes.grid)
        assert shapes.grid is not None
        features, between = _with_layers(model, image_B3HW, shapes.grid)
        return replace(_finish(model, features, shapes.grid), layers=between)

    def compile_features(self) -> None:
        """Lets torch compile the model; at the first forward of each input size."""
        model: Any = self.model
        self._compiled = torch.compile(model.forward_features)

    @property
    def has_layers(self) -> bool:
        """Whether it can give tokens of every layer, on one grid: a plain ViT can."""
        forward: Any = getattr(self.model, "forward_intermediates", None)
        return (
            self.patch_dim is not None
            and forward is not None
            and hasattr(self.model, "blocks")
            and "return_prefix_tokens" in inspect.signature(forward).parameters
        )

    @property
    def num_layers(self) -> int:
        """Number of its layers, where it `has_layers`."""
        model: Any = self.model
        return len(model.blocks)

    def normalise(self, pixels_BHW3: Tensor) -> Tensor:
        """Returns ``(pixels / 255 - mean) / std`` as (B, 3, H, W).

        Channels stay last in memory, as the pixels came.

        Raises:
            TrainingError: the pixels are not uint8 (B, H, W, 3).
        """
        if pixels_BHW3.dtype != torch.uint8 or pixels_BHW3.shape[3:] != (3,):
            raise TrainingError(
                "a student's pixels must be uint8 (batch, height, width, 3), got "
                f"{pixels_BHW3.dtype} {tuple(pixels_BHW3.shape)}; it normalises them "
                "itself"
            )
        values = pixels_BHW3.to(torch.float32)
        return values.sub_(self._shift).mul_(self._scale).permute(0, 3, 1, 2)

    def grid_of(self, size_hw: Size) -> Size:
        """Returns (rows, columns) of the grid at an input size; nothing is computed.

        Raises:
            TrainingError: the model has no grid, or refuses the size.
        """
        grid = self._shapes_at(size_hw).grid
        if grid is None:
            raise TrainingError(
                f"{_name(self)} has no grid: its final features are no map; take "
                "pooled, or another student"
            )
        return grid

    def _shapes_at(self, size: Size) -> Shapes:
        if size not in self._shapes:
            try:
                self._shapes[size] = measure(self.model, size)
            except TrainingError:
                raise
            # What a model raises at a size that it does not take is not agreed upon.
            except Exception as error:
                raise refused(_name(self), size, error) from error
        return self._shapes[size]


def measure(model: nn.Module, size: Size) -> Shapes:
    """Returns the shapes of what a model gives at a size, computing nothing.

    The model's own tensors are replaced by ones without data for the while, so that it
    costs no memory; a model that cannot run so runs once on zeros.

    Raises:
        TrainingError: the model would drop pixels at the border, or pools to no vector.
        Exception: whatever the model raises at a size that it does not take.
    """
    _check_covered(model, size)
    probe = _Probe(model)
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        tensors = dict([*probe.named_parameters(), *probe.named_buffers()])
        empty = {key: value.detach().to("meta") for key, value in tensors.items()}
        shapes: Shapes
        with torch.no_grad():
            try:
                image = torch.zeros(1, 3, *size, device="meta")
                # Ties followed, a submodule in two places would stay without data.
                shapes = functional_call(probe, empty, (image,), tie_weights=False)
            except (NotImplementedError, RuntimeError):
                device = next(iter(tensors.values())).device if tensors else "cpu"
                shapes = probe(torch.zeros(1, 3, *size, device=device))
        return shapes
    finally:
        for module, was_training in modes:
            module.training = was_training


def _check_covered(model: nn.Module, size: Size) -> None:
    """Checks that no pixel is left over, which a model would drop without a word."""
    embed = getattr(model, "patch_embed", None)
    patch = getattr(embed, "patch_size", None)
    if not isinstance(patch, tuple) or getattr(embed, "dynamic_img_pad", False):
        return
    if size[0] % patch[0] or size[1] % patch[1]:
        pairs = zip(size, patch, strict=True)
        nearest = [max(1, round(side / unit)) * unit for side, unit in pairs]
        raise TrainingError(
            f"a student's size must be a multiple of its patch {patch[0]} x {patch[1]},"
            f" got {size[0]} x {size[1]}; the nearest is {nearest}"
        )


def _with_layers(
    model: Any, image_BCHW: Tensor, grid: Size
) -> tuple[Tensor, tuple[LayerTokens, ...]]:
    """Returns what ``forward_features`` gives, and tokens of layers but the last."""
    last = len(model.blocks) - 1
    if last == 0:
        return model.forward_features(image_BCHW), ()
    features, found = model.forward_intermediates(
        image_BCHW,
        indices=list(range(last)),
        return_prefix_tokens=True,
        norm=False,
        output_fmt="NLC",
    )
    layers = []
    for one in found:
        tokens_BNC, prefix_BPC = one if isinstance(one, tuple) else (one, None)
        patch_BHWC = tokens_BNC.reshape(len(tokens_BNC), *grid, -1)
        has_cls = prefix_BPC is not None and _has_class_token(model)
        layers.append(LayerTokens(prefix_BPC[:, 0] if has_cls else None, patch_BHWC))
    return features, tuple(layers)


class _Probe(nn.Module):
    """What `functional_call` calls in place of a model's own forward."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, image_BCHW: Tensor) -> Shapes:
        model: Any = self.model
        features = model.forward_features(image_BCHW)
        grid = _token_grid(model, image_BCHW, features)
        found = _finish(model, features, grid)
        patch = found.patch
        return Shapes(
            None if found.cls is None else found.cls.shape[1],
            found.pooled.shape[1],
            None if patch is None else (patch.shape[1], patch.shape[2]),
            None if patch is None else patch.shape[3],
        )


def _token_grid(model: Any, image_BCHW: Tensor, features: Any) -> Size | None:
    """Returns (rows, columns) of the tokens that ``forward_features`` gave, if any."""
    if not isinstance(features, Tensor) or features.ndim != 3:
        return None
    declared = getattr(model, "num_prefix_tokens", None)
    if hasattr(model, "forward_intermediates"):
        maps = model.forward_intermediates(
            image_BCHW, indices=1, intermediates_only=True, output_fmt="NCHW"
        )
        rows, columns = maps[-1].shape[2:]
        num_prefix = features.shape[1] - rows * columns
        is_grid = num_prefix >= 0 and declared in (None, num_prefix)
        return (rows, columns) if is_grid else None
    height, width = image_BCHW.shape[2:]
    num_cells = features.shape[1] - (declared or 0)
    # Cells are square: there is but one side with so many of them.
    rows = round(math.sqrt(num_cells * height / width)) if num_cells > 0 else 0
    if rows == 0 or num_cells % rows or height * (num_cells // rows) != width * rows:
        return None
    return rows, num_cells // rows


def _finish(model: Any, features: Any, grid: Size | None) -> StudentFeatures:
    patch = _patch(model, features, grid)
    if hasattr(model, "forward_head"):
        pooled = model.forward_head(features, pre_logits=True)
    else:
        pooled = None if patch is None else patch.mean((1, 2))
    if not isinstance(pooled, Tensor) or pooled.ndim != 2:
        raise TrainingError(
            "a student must pool to one vector per image, got "
            f"{_shape(features)} from forward_features and {_shape(pooled)} pooled; "
            "leave global_pool out of student.args, or give forward_features "
            "(B, C, H, W) or (B, N, C) over a grid"
        )
    return StudentFeatures(_cls(model, features), pooled, patch)


def _shape(value: Any) -> str:
    return (
        str(tuple(value.shape)) if isinstance(value, Tensor) else type(value).__name__
    )


def _patch(model: Any, features: Any, grid: Size | None) -> Tensor | None:
    if isinstance(features, Tensor) and features.ndim == 4:
        is_last = getattr(model, "output_fmt", "NCHW") == "NHWC"
        map_BHWC: Tensor = features if is_last else features.permute(0, 2, 3, 1)
        return map_BHWC
    if grid is None:
        return None
    tokens_BNC: Tensor = features
    num_prefix = getattr(model, "num_prefix_tokens", None)
    if num_prefix is None:
        num_prefix = tokens_BNC.shape[1] - grid[0] * grid[1]
    if tokens_BNC.shape[1] != num_prefix + grid[0] * grid[1]:
        raise TrainingError(
            f"a student must give {grid[0]} x {grid[1]} tokens, got "
            f"{tokens_BNC.shape[1] - num_prefix} while training; does it drop some "
            "(student.args.patch_drop_rate)?"
        )
    return tokens_BNC[:, num_prefix:].reshape(len(tokens_BNC), *grid, -1)


def _cls(model: Any, features: Any) -> Tensor | None:
    is_tokens = isinstance(features, Tensor) and features.ndim == 3
    if not is_tokens or not _has_class_token(model):
        return None
    token_BC: Tensor = features[:, 0]
    # Models that average their tokens norm only what they have pooled.
    if _is_norm(getattr(model, "fc_norm", None)) and not _is_norm(
        getattr(model, "norm", None)
    ):
        token_BC = model.fc_norm(token_BC)
    return token_BC


def _has_class_token(model: Any) -> bool:
    declared = getattr(model, "has_class_token", None)
    if declared is None:
        return getattr(model, "cls_token", None) is not None
    return bool(declared)


def _is_norm(module: Any) -> bool:
    return isinstance(module, nn.Module) and not isinstance(module, nn.Identity)


def _stride(model: Any, size: Size, grid: Size | None) -> int:
    """Returns the pixels of one cell, by what the model says where that is so."""
    info = getattr(model, "feature_info", None) or []
    said = [item["reduction"] for item in info if isinstance(item["reduction"], int)]
    if grid is None:
        return max(said, default=_DEFAULT_STRIDE)
    for stride in sorted(said, reverse=True):
        if all(
            cells in (side // stride, -(-side // stride))
            for side, cells in zip(size, grid, strict=True)
        ):
            return int(stride)
    return max(1, round(math.sqrt(size[0] * size[1] / (grid[0] * grid[1]))))


def _name(student: Student) -> str:
    return repr(student.architecture or type(student.model).__name__)


def refused(name: str, size: Size, error: Exception) -> TrainingError:
    """Returns the error that says which size a model refused, and why."""
    return TrainingError(
        f"a student's size must be one that its model takes, got {size[0]} x {size[1]} "
        f"(height x width) for {name} ({reason_of(error)}); choose another size, or "
        "student.args that allow it"
    )
