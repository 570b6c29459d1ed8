"""What every teacher is: input specs, output specs, and one forward pass.

Shape suffixes: B batch, H and W grid or image rows and columns, C channels, P points.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from manifests.teacher import BevExtent, TeacherConfig

if TYPE_CHECKING:
    from torch import Tensor

    from teachers.inputs.spec import InputSpec

Size = tuple[int, int]
OutputKind = Literal["vector", "grid", "frames", "points", "index", "image"]


@dataclass(frozen=True)
class OutputSpec:
    """One output at one size: what a row of it looks like before it is encoded.

    Attributes:
        name: ``cls``, ``pooled``, ``embed``, ``patch``, ``layer<k>``, ``level<k>``,
            ``logits``, ``bev`` or ``points``.
        kind: ``vector`` is (C,), ``grid`` is (H, W, C) in raster order, ``frames``
            is (T, H, W, C), ``points`` is (P, C) in the order of the points given,
            ``index`` (P,) says which points those are (the engine makes it), ``image``
            (bytes,) is a copy of an input (no teacher makes it).
        shape: of one row and view, channels last.
        dtype: what the forward pass yields: float32, bfloat16 or float16.
        norm: ``post`` or ``pre`` the model's final norm; None where it says nothing.
        source: where in the model it is taken, in words.
        extent: of a bird's-eye grid whose place the model itself decides; None: it has
            none, or only the job knows it.
        classifier: sha256 of the zero-shot classifier it comes from, if any.
    """

    name: str
    kind: OutputKind
    shape: tuple[int, ...]
    dtype: str
    norm: str | None = None
    source: str = ""
    extent: BevExtent | None = None
    classifier: str | None = None


@dataclass(frozen=True)
class GroupInput:
    """One input as a teacher of a group sees it.

    Attributes:
        name: the input's name in the job.
        kind: ``image``, ``clip`` or ``points``.
        aspect: width over height of view 0's box (images and clips; 1.0 else).
        columns: columns of the decoded sweep (points).
        frames: number of frames (clips).
    """

    name: str
    kind: str
    aspect: float = 1.0
    columns: tuple[str, ...] = ()
    frames: int = 0


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
    """What a teacher says of itself, for `plan`, `teachers` and provenance.

    ``notes`` are whatever else somebody who judges its outputs has to know. ``model``
    says which model it is, beside weights and code, where the job gives but its place.
    ``classifiers`` is what `Classifier.to_json` says of each output that has one.
    """

    num_parameters: int
    parameter_bytes: int
    license: str | None = None
    source: str | None = None
    code_sha256: str | None = None
    versions: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    model: str | None = None
    classifiers: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Returns the facts as plain JSON values."""
        plain = {**asdict(self), "versions": dict(self.versions)}
        if not self.classifiers:
            del plain["classifiers"]
        return {**plain, "notes": list(self.notes)}


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
            batch: by input name; images (B, 3, H, W) normalised, clips (B, T, 3, H, W),
                sweeps (B, P, C), on the teacher's device and in its precision.
            size: one of `sizes`.

        Returns:
            By output name, (B, *OutputSpec.shape) in OutputSpec.dtype, channels last,
            contiguous, pooled where the job asks for it.
        """
