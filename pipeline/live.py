"""Passes ready to run: their teachers loaded, their specs and encodings at hand.

The one place of the engine that touches torch; imported when work begins.
"""

from __future__ import annotations

import platform
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from manifests.bank import BankRecord, PassEntry
from manifests.loading import digest
from manifests.teacher import TeacherConfig
from pipeline.bank.arrays import ArraySpec
from pipeline.bank.encoding import Encoding
from pipeline.bank.encodings import encoding_from_json
from pipeline.errors import PipelineError
from pipeline.group_teachers import parse_size, request_of
from pipeline.stored_spec import stored_specs
from teachers import registry
from teachers.inputs.spec import InputSpec
from teachers.interface import Teacher, WeightsRecord

PreparedKey = tuple[str, Hashable]


@dataclass(frozen=True)
class StoredOutput:
    """One output at one size of a pass: how it is encoded and where it goes."""

    size: str
    name: str
    kind: str
    encoding: Encoding
    arrays: tuple[ArraySpec, ...]
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    pool: tuple[int, int] = (1, 1)


@dataclass(frozen=True)
class Prepared:
    """One array of prepared inputs, shared by every pass that takes the same rows.

    Attributes:
        input: name of the input in the job.
        spec: of the first teacher that asked for it.
    """

    input: str
    spec: InputSpec

    @property
    def key(self) -> PreparedKey:
        """What teachers that can share the array agree on."""
        return self.input, self.spec.geometry


@dataclass(frozen=True)
class LivePass:
    """A pass whose teacher is loaded; row facts and copies of inputs have none."""

    entry: PassEntry
    teacher: Teacher | None
    outputs: tuple[StoredOutput, ...]
    specs: Mapping[str, Mapping[str, InputSpec]]
    device: str

    @property
    def sizes(self) -> tuple[str, ...]:
        """Names of the sizes it runs at."""
        return tuple(self.specs)

    def prepared(self) -> list[tuple[str, Prepared]]:
        """Returns (size, prepared input) for everything its teacher takes."""
        return [
            (size, Prepared(name, spec))
            for size, specs in self.specs.items()
            for name, spec in specs.items()
        ]

    def forward(
        self, size: str, arrays: Mapping[str, np.ndarray]
    ) -> dict[str, np.ndarray]:
        """Runs the teacher on one batch.

        Args:
            size: name of the size.
            arrays: prepared inputs by input name, (B, *row_shape).

        Returns:
            Outputs by name, (B, *shape); bfloat16 as its bits in uint16.
        """
        assert self.teacher is not None
        dtype = getattr(torch, self.teacher.request.config.precision)
        # A teacher shared between groups knows its inputs by the first group's names.
        names = [one.name for one in self.teacher.request.group]
        batch = {
            theirs: self.specs[size][ours].to_tensor(arrays[ours], self.device, dtype)
            for theirs, ours in zip(names, self.entry.inputs, strict=True)
        }
        with torch.inference_mode():
            found = self.teacher.forward(batch, parse_size(size))
            # What was encoded anew from rounded values is float32, whatever the
            # teacher computes in.
            wide = {o.name for o in self.outputs if o.encoding.dtype == "float32"}
            values = {
                name: _to_numpy(tensor.float() if name in wide else tensor)
                for name, tensor in found.items()
            }
        for output in self.outputs:
            if output.size != size or output.kind == "index":
                continue
            shape = values[output.name].shape[1:]
            if shape != output.shape:
                name = f"teachers.{self.entry.teacher}.outputs.{output.name}"
                raise PipelineError(
                    f"{name} must have the shape {list(output.shape)} per row, as "
                    f"planned, got {list(shape)}; the model's shapes depend on more "
                    "than the size of its input, take another output"
                )
        return values


def _to_numpy(tensor: torch.Tensor) -> np.ndarray:
    tensor = tensor.cpu()
    if tensor.dtype == torch.bfloat16:
        tensor = tensor.view(torch.uint16)
    return tensor.numpy()


def pick_device(name: str) -> str:
    """Returns the device to run on; ``auto`` is the accelerator where there is one.

    Raises:
        PipelineError: the device that was asked for is not there.
    """
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise PipelineError(
            f"engine.device {name!r} cannot be used: {reason}; use auto or cpu"
        ) from error
    return name


def device_kind(device: str) -> str:
    """Returns the kind of a device, on which equal work gives equal bits.

    Of a CPU that is its model and the vector instructions that torch uses.
    """
    if device.startswith("cuda"):
        return torch.cuda.get_device_name(device)
    return f"{_cpu_model()}, {torch.backends.cpu.get_cpu_capability()}"


def _cpu_model() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as file:
            for line in file:
                name, _, value = line.partition(":")
                if name.strip() == "model name":
                    return value.strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def set_lane_threads(threads: int) -> None:
    """Sets the calling thread's share of the cores."""
    torch.set_num_threads(threads)


def _outputs(entry: PassEntry) -> tuple[StoredOutput, ...]:
    stored = []
    for output in entry.outputs:
        encoding = encoding_from_json(output.encoding)
        dtype = {"bfloat16": "uint16"}.get(output.dtype, output.dtype)
        arrays = tuple(ArraySpec.from_json(data) for data in output.arrays)
        stored.append(
            StoredOutput(
                output.size,
                output.name,
                output.kind,
                encoding,
                arrays,
                output.shape,
                np.dtype(dtype),
                tuple(output.definition.get("pool") or (1, 1)),
            )
        )
    return tuple(stored)


def load_passes(
    record: BankRecord, pass_ids: Sequence[str], device: str
) -> dict[str, LivePass]:
    """Returns passes with their teachers loaded.

    Groups that differ only in the names of their inputs share one teacher, so that six
    cameras cost one set of weights.

    Raises:
        TeacherError: a teacher cannot be loaded, or is no longer what was planned.
    """
    loaded: dict[str, Teacher] = {}
    passes: dict[str, LivePass] = {}
    for name in pass_ids:
        entry = record.pass_by_id(name)
        if not entry.outputs:
            passes[name] = LivePass(entry, None, (), {}, device)
            continue
        if entry.holds_inputs:
            passes[name] = LivePass(
                entry, None, _outputs(entry), stored_specs(entry), device
            )
            continue
        config = TeacherConfig.model_validate(entry.request)
        request = request_of(entry.teacher, config, entry.inputs, record.inputs)
        weights = WeightsRecord(**entry.provenance["weights"])
        anonymous = [
            {**vars(one), "name": str(number)}
            for number, one in enumerate(request.group)
        ]
        weights_of = [entry.provenance["weights"], config.key_rules]
        key = digest([entry.request, weights_of, anonymous])
        if key not in loaded:
            loaded[key] = registry.open_teacher(request, weights, device)
            # Here, and not in the first forward: several lanes would build it at once,
            # and random weights are drawn from a generator that all threads share.
            loaded[key].load()
        teacher = loaded[key]
        _check_classifiers(entry, teacher)
        theirs = [one.name for one in teacher.request.group]
        sizes = dict.fromkeys(output.size for output in entry.outputs)
        specs = {}
        for size in sizes:
            given = teacher.inputs(parse_size(size))
            specs[size] = {
                ours: given[name]
                for ours, name in zip(entry.inputs, theirs, strict=True)
            }
        passes[name] = LivePass(entry, teacher, _outputs(entry), specs, device)
    return passes


def _check_classifiers(entry: PassEntry, teacher: Teacher) -> None:
    """Raises PipelineError where a classifier is not the file that was planned."""
    for output in entry.outputs:
        planned = output.definition.get("classifier")
        held = teacher.facts.classifiers.get(output.name, {}).get("sha256")
        if held != planned:
            raise PipelineError(
                f"teachers.{entry.teacher}.outputs.{output.name}.classifier must be "
                f"the file that was planned, of sha256 {planned}, got {held}; put that "
                "file back"
            )


def explain_failure(live: LivePass, error: BaseException, rows: int) -> BaseException:
    """Returns what to raise for a failed forward: out of memory says what to set."""
    if isinstance(error, torch.OutOfMemoryError):
        name = live.entry.teacher
        return PipelineError(
            f"teacher {name}: out of accelerator memory with {rows} rows per forward; "
            f"set teachers.{name}.batch={max(1, rows // 2)} and make the bank anew "
            "(rows per forward are part of what a bank is)"
        )
    return error
