"""What every teacher is: input specs, output specs, and one forward pass.

Shape suffixes: B batch, H and W grid or image rows and columns, C channels, P points.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from manifests.job import TeacherConfig

if TYPE_CHECKING:
    from torch import Tensor

Size = tuple[int, int]


@dataclass(frozen=True)
class ImageSpec:
    """How a teacher takes an image: one resize of the view's box, then arithmetic.

    The pixel arithmetic is ``((pixel / 255 * range) - mean) / std / divide`` in
    float32, per channel in the order of ``channels``.
    """

    height: int
    width: int
    interpolation: str = "bicubic"
    channels: str = "rgb"
    range: float = 1.0
    mean: tuple[float, ...] = (0.0, 0.0, 0.0)
    std: tuple[float, ...] = (1.0, 1.0, 1.0)
    divide: float = 1.0
    kind: Literal["image"] = "image"


@dataclass(frozen=True)
class PointsSpec:
    """How a teacher takes a sweep: a fixed number of evenly chosen points.

    Attributes:
        columns: names of the columns given, in order.
        indices: where each of them stands in the sweep as decoded.
        num_points: rows given; a smaller sweep is repeated from its start.
        centre: subtract the mean of x, y, z over the points given.
        unit_sphere: divide x, y, z by the largest radius (at least 1e-6).
    """

    columns: tuple[str, ...]
    indices: tuple[int, ...]
    num_points: int
    centre: bool = False
    unit_sphere: bool = False
    kind: Literal["points"] = "points"


InputSpec = ImageSpec | PointsSpec


@dataclass(frozen=True)
class OutputSpec:
    """One output at one size: what a row of it looks like before it is encoded.

    Attributes:
        name: ``cls``, ``pooled``, ``embed``, ``patch``, ``layer<k>``, ``level<k>``,
            ``logits``, ``bev`` or ``points``.
        kind: ``vector`` is (C,), ``grid`` is (H, W, C) in raster order.
        shape: of one row and view, channels last.
        dtype: what the forward pass yields: float32, bfloat16 or float16.
        norm: ``post`` or ``pre`` the model's final norm; None where it says nothing.
        source: where in the model it is taken, in words.
    """

    name: str
    kind: Literal["vector", "grid"]
    shape: tuple[int, ...]
    dtype: str
    norm: str | None = None
    source: str = ""

    @property
    def dimension_names(self) -> tuple[str, ...]:
        """Zarr dimension names of a row, prefixed by the output's name."""
        axes = ("channel",) if self.kind == "vector" else ("y", "x", "channel")
        return tuple(f"{self.name}_{axis}" for axis in axes)


@dataclass(frozen=True)
class GroupInput:
    """One input as a teacher of a group sees it.

    Attributes:
        name: the input's name in the job.
        kind: ``image`` or ``points``.
        aspect: width over height of view 0's box (images; 1.0 else).
        columns: columns of the decoded sweep (points).
    """

    name: str
    kind: str
    aspect: float = 1.0
    columns: tuple[str, ...] = ()


@dataclass(frozen=True)
class TeacherRequest:
    """All that decides what a teacher is: its job entry and the group it looks at.

    ``weights_url`` is None where the family's own pretrained weights are meant.
    ``base`` is the folder that relative paths in ``model`` start from.
    """

    name: str
    config: TeacherConfig
    group: tuple[GroupInput, ...]
    base: str = "."


@dataclass(frozen=True)
class WeightsRecord:
    """Which weights: enough to find them again and to tell that they changed.

    Attributes:
        kind: ``random``, ``file`` or ``pretrained``.
        url: where they lie ('' for random).
        seed: of random weights.
        size_bytes: of the file.
        tag: etag or modification time with which `sha256` was taken.
        sha256: of the file's bytes ('' for random).
        asked: the model and weights of the job that led here, so that a record kept
            with a bank can be recognised without importing the family.
    """

    kind: str
    url: str = ""
    seed: int = 0
    size_bytes: int = 0
    tag: str = ""
    sha256: str = ""
    asked: str = ""

    @property
    def identity(self) -> dict[str, Any]:
        """What makes two weights the same: bytes, not places."""
        if self.kind == "random":
            return {"kind": "random", "seed": self.seed}
        return {"sha256": self.sha256}


@dataclass(frozen=True)
class Facts:
    """What a teacher says of itself, for `plan`, `teachers` and provenance."""

    num_parameters: int
    parameter_bytes: int
    license: str | None = None
    source: str | None = None
    code_sha256: str | None = None
    versions: Mapping[str, str] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Returns the facts as plain JSON values."""
        return {**asdict(self), "versions": dict(self.versions)}


@dataclass(frozen=True)
class Cost:
    """What one row costs in one forward.

    Attributes:
        flops: floating point operations; a multiply-add counts as two.
        working_bytes: memory of intermediate values at its peak, weights left out.
    """

    flops: float = 0.0
    working_bytes: int = 0


class Teacher(ABC):
    """A frozen model, ready to run or, on the meta device, ready to be described.

    A teacher is made by its family's ``open_teacher(request, weights, device)``. With
    ``device="meta"`` no weights are read and nothing but shapes can be asked.
    """

    request: TeacherRequest
    facts: Facts

    @property
    @abstractmethod
    def sizes(self) -> tuple[Size | None, ...]:
        """Input sizes (height, width) it runs at; (None,) where there is none."""

    @abstractmethod
    def inputs(self, size: Size | None) -> dict[str, InputSpec]:
        """Returns how each input of the group is taken, by input name."""

    @abstractmethod
    def outputs(self, size: Size | None) -> dict[str, OutputSpec]:
        """Returns every output of the job at ``size``, by output name.

        Raises:
            TeacherError: the model has no such output; the message names those it has.
        """

    def cost(self, size: Size | None) -> Cost:
        """Returns what a row costs at ``size``, from shapes alone.

        A family that cannot tell leaves this: each parameter is then used once.
        """
        del size
        return Cost(flops=2.0 * self.facts.num_parameters)

    def load(self) -> None:  # noqa: B027
        """Makes every size ready to run; `forward` may then be called from any thread.

        Raises:
            TeacherError: the weights do not fit the model.
        """

    @abstractmethod
    def forward(
        self, batch: Mapping[str, Tensor], size: Size | None
    ) -> dict[str, Tensor]:
        """Runs the model once on a batch and returns every output.

        Args:
            batch: by input name; images (B, 3, H, W) normalised, sweeps (B, P, C), in
                the teacher's precision and on its device.
            size: one of `sizes`.

        Returns:
            By output name, (B, *OutputSpec.shape) in OutputSpec.dtype, channels last,
            contiguous, pooled where the job asks for it.
        """
