"""What the families have in common: a frozen torch module and taps on it.

Owns shapes on the meta device, precision, pooling, the layout of what leaves a teacher,
and the arithmetic settings of its forward. Families own how a model is built and where
in it an output lies. Several threads may run one teacher at once.

Shape suffixes: B batch, H and W grid, C channels.
"""

from __future__ import annotations

import contextlib
import threading
from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from manifests.teacher import BevExtent, OutputConfig
from teachers.cost import CostMeter
from teachers.errors import TeacherError
from teachers.interface import (
    Cost,
    Facts,
    OutputKind,
    OutputSpec,
    Size,
    Teacher,
    TeacherRequest,
)
from teachers.zero_shot import classifier_url, read_classifier

DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


_KIND_OF_RANK: dict[int, OutputKind] = {
    1: "vector",
    2: "points",
    3: "grid",
    4: "frames",
}


@dataclass(frozen=True)
class Tap:
    """One output as a family found it.

    Attributes:
        tensor: (B, C); channels last and in raster order (B, H, W, C) or, of a clip,
            (B, T, H, W, C); (B, P, C) in the order of the points given.
        norm: ``post`` or ``pre`` the model's final norm; None where it says nothing.
        source: where in the model it is taken, in words.
        extent: of a bird's-eye grid whose place the model decides, rows along x.
    """

    tensor: Tensor
    norm: str | None
    source: str
    extent: BevExtent | None = None


class TorchTeacher(Teacher):
    """A teacher that is a torch module.

    Attributes:
        device: where its weights are; ``meta`` where there are none.
        dtype: arithmetic of the forward.
    """

    def __init__(self, request: TeacherRequest, device: str) -> None:
        self.request = request
        self.device = torch.device(device)
        self.dtype = DTYPES[request.config.precision]
        self._outputs: dict[Size | None, dict[str, OutputSpec]] = {}
        self._costs: dict[Size | None, Cost] = {}
        self._models: dict[Size | None, nn.Module] = {}
        self._lock = threading.RLock()
        self._classifiers = {
            name: read_classifier(url, f"{self.where}.outputs.{name}")
            for name in request.config.outputs
            if (url := classifier_url(request, name)) is not None
        }

    @property
    def where(self) -> str:
        """The teacher's entry in the job, for messages."""
        return f"teachers.{self.request.name}"

    @abstractmethod
    def _build(self, size: Size | None) -> nn.Module:
        """Returns the model with its weights for inputs of ``size``, on the CPU."""

    @abstractmethod
    def _blueprint(self, size: Size | None, device: str) -> nn.Module:
        """Returns the model without its weights, on ``meta`` or ``cpu``."""

    @abstractmethod
    def _taps(
        self, model: nn.Module, batch: Mapping[str, Tensor], size: Size | None
    ) -> dict[str, Tap]:
        """Runs ``model`` once and returns every output of the job, not yet pooled."""

    def outputs(self, size: Size | None) -> dict[str, OutputSpec]:
        """Returns the outputs at a size, found once on the meta device."""
        with self._lock:
            if size not in self._outputs:
                self._outputs[size] = self._describe(size)
            return self._outputs[size]

    def cost(self, size: Size | None) -> Cost:
        """Returns what a row costs, counted while the outputs were found."""
        self.outputs(size)
        cost = self._costs[size]
        # Counted in float32; a narrower type takes as much less memory.
        width = self.dtype.itemsize / torch.float32.itemsize
        return Cost(cost.flops, int(cost.working_bytes * width))

    def _describe(self, size: Size | None) -> dict[str, OutputSpec]:
        failure: Exception | None = None
        for device in ("meta", "cpu"):
            try:
                model = freeze(self._blueprint(size, device))
                batch = {
                    name: spec.blank(device) for name, spec in self.inputs(size).items()
                }
                with CostMeter() as meter, torch.inference_mode():
                    taps = self._taps(model, batch, size)
                self._costs[size] = meter.cost
                return {
                    name: self._spec(name, config, taps[name], size)
                    for name, config in self.request.config.outputs.items()
                }
            except TeacherError:
                raise
            # A model is anyone's code: whatever it raises, the next device may do.
            except Exception as error:
                failure = error
        shown = "" if size is None else f" at {size[0]} x {size[1]}"
        raise TeacherError(
            f"{self.where}.model {self.request.config.model!r} cannot run{shown}: "
            f"{type(failure).__name__}: {failure}; choose other `sizes`"
        ) from failure

    def _spec(
        self, name: str, config: OutputConfig, tap: Tap, size: Size | None
    ) -> OutputSpec:
        shape = tuple(tap.tensor.shape[1:])
        entry = f"{self.where}.outputs.{name}"
        if len(shape) not in _KIND_OF_RANK:
            raise TeacherError(
                f"{entry} must be a vector (C), points (P, C), a grid (H, W, C) or "
                f"frames (T, H, W, C), got {list(shape)} per row"
            )
        kind = _KIND_OF_RANK[len(shape)]
        if config.pool is not None:
            if kind != "grid":
                raise TeacherError(f"{entry}.pool is for grids; leave it out")
            rows, columns = shape[0] / config.pool[0], shape[1] / config.pool[1]
            if min(config.pool) < 1 or rows % 1 or columns % 1:
                raise TeacherError(
                    f"{entry}.pool must divide the grid {shape[0]} x {shape[1]}, got "
                    f"{list(config.pool)}; choose another pool or other sizes"
                )
            shape = (int(rows), int(columns), shape[2])
        return OutputSpec(
            name,
            kind,
            shape,
            # A classifier's logits are made in float32 whatever the model runs in.
            "float32" if config.classifier else self.request.config.precision,
            tap.norm,
            tap.source,
            tap.extent,
            self._classifiers[name].sha256 if config.classifier else None,
        )

    def model(self, size: Size | None) -> nn.Module:
        """Returns the module that runs at ``size``, built on first use.

        Raises:
            TeacherError: the teacher is on the meta device, or its weights do not fit.
        """
        if self.device.type == "meta":
            raise TeacherError(f"{self.where} has only shapes (device meta)")
        with self._lock:
            if size not in self._models:
                model = freeze(self._build(size)).to(self.device, self.dtype)
                for other in self._models.values():
                    share_parameters(other, model)
                self._models[size] = model
            return self._models[size]

    def load(self) -> None:
        """Builds every size's model and outputs now; see `Teacher.load`."""
        for size in self.sizes:
            self.model(size)

    def forward(
        self, batch: Mapping[str, Tensor], size: Size | None
    ) -> dict[str, Tensor]:
        """Runs the model; see `Teacher.forward`. Any thread may call it."""
        with torch.inference_mode(), _repeatable(self.device):
            taps = self._taps(self.model(size), batch, size)
            return {
                name: self._finish(tap.tensor, self.request.config.outputs[name])
                for name, tap in taps.items()
            }

    def _finish(self, tensor: Tensor, config: OutputConfig) -> Tensor:
        if config.pool is not None:
            num, height, width, channels = tensor.shape
            y, x = config.pool
            cells = tensor.reshape(num, height // y, y, width // x, x, channels)
            tensor = cells.to(torch.float32).mean((2, 4))
        dtype = torch.float32 if config.classifier else self.dtype
        return tensor.to(dtype).contiguous()

    def _make_facts(
        self,
        model: nn.Module,
        *,
        license: str | None = None,
        source: str | None = None,
        code_sha256: str | None = None,
        versions: Mapping[str, str] | None = None,
    ) -> Facts:
        num = sum(parameter.numel() for parameter in model.parameters())
        return Facts(
            num_parameters=num,
            parameter_bytes=num * self.dtype.itemsize,
            license=self.request.config.license or license,
            source=source,
            code_sha256=code_sha256,
            versions={"torch": torch.__version__, **(versions or {})},
            classifiers={k: one.to_json() for k, one in self._classifiers.items()},
        )


def freeze(model: nn.Module) -> nn.Module:
    """Returns ``model`` in eval mode and without gradients."""
    return model.eval().requires_grad_(False)


def share_parameters(source: nn.Module, target: nn.Module) -> None:
    """Lets ``target`` use the memory of the parameters it shares with ``source``.

    Two sizes of one teacher differ in their position embeddings alone.
    """
    own = dict(source.named_parameters())
    for name, parameter in target.named_parameters():
        twin = own.get(name)
        if twin is not None and torch.equal(twin, parameter):
            parameter.data = twin.data


_GENERATOR = threading.RLock()


@contextlib.contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Draws random weights from ``seed``; torch's own generator is left as it was."""
    with _GENERATOR, torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


def channels_last(map_BCHW: Tensor) -> Tensor:
    """Returns a feature map as (B, H, W, C), without a copy."""
    return map_BCHW.permute(0, 2, 3, 1)


class _Recorder:
    """Hooks of one model, set once, that record for the threads that ask for it.

    A hook that came and went with each call would be seen by the other threads.
    """

    def __init__(self) -> None:
        self._local = threading.local()
        self._lock = threading.Lock()
        self._hooked: set[tuple[str, bool]] = set()

    def _hook(self, model: nn.Module, path: str, is_input: bool) -> None:
        def keep(value: Any) -> None:
            calls = getattr(self._local, "calls", None)
            if calls is not None and (path, is_input) in calls:
                calls[path, is_input].append(value)

        module = model.get_submodule(path)
        if is_input:
            module.register_forward_pre_hook(lambda _, values: keep(values[0]))
        else:
            module.register_forward_hook(lambda _, __, value: keep(value))

    @contextlib.contextmanager
    def record(
        self, model: nn.Module, wanted: Iterable[tuple[str, bool]]
    ) -> Iterator[Callable[[str, bool], list[Any]]]:
        calls: dict[tuple[str, bool], list[Any]] = {key: [] for key in wanted}
        with self._lock:
            for path, is_input in calls.keys() - self._hooked:
                self._hook(model, path, is_input)
                self._hooked.add((path, is_input))
        self._local.calls = calls
        try:
            yield lambda path, is_input: calls[path, is_input]
        finally:
            self._local.calls = None


_RECORDERS: WeakKeyDictionary[nn.Module, _Recorder] = WeakKeyDictionary()
_RECORDERS_LOCK = threading.Lock()


@contextlib.contextmanager
def recording(
    model: nn.Module, outputs: Iterable[str] = (), inputs: Iterable[str] = ()
) -> Iterator[Callable[[str, bool], list[Any]]]:
    """Records what submodules return, or take first, in calls made by this thread.

    Args:
        model: that has the submodules.
        outputs: paths of those whose return values are kept.
        inputs: paths of those whose first arguments are kept.

    Yields:
        A function from (path, whether inputs are meant) to the list of values so far.
    """
    with _RECORDERS_LOCK:
        recorder = _RECORDERS.setdefault(model, _Recorder())
    wanted = [*((path, False) for path in outputs), *((path, True) for path in inputs)]
    with recorder.record(model, wanted) as found:
        yield found


@contextlib.contextmanager
def _repeatable(device: torch.device) -> Iterator[None]:
    # On CUDA float32 convolutions would run in TF32 and take whichever algorithm was
    # fastest that time; the same block must give the same bytes.
    if device.type != "cuda":
        yield
        return
    with torch.backends.cudnn.flags(
        enabled=True, benchmark=False, deterministic=True, allow_tf32=False
    ):
        yield
