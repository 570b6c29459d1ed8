"""Teachers that are programs: what `torch.export.save` wrote, run as it was exported.

``exported:./file.pt2`` is code and weights in one file: it runs because the job names
it, is never taken from a bank, and its SHA-256 is recorded as both. Inputs are given by
position, in the order of the group; an output says where it is in what the program
returns: ``from: output[...]``, as `teachers.module_outputs` reads it.

A program keeps what it was exported with: precision, sizes, number of points. Its batch
may be fixed; the job's ``batch`` must then be that number, and a smaller batch is
filled up with its last row. One that draws random numbers, or norms by the batch it
sees (exported without ``model.eval()``), is refused: its rows would not be the same
twice.
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import math
from collections.abc import Iterator, Mapping
from os import PathLike
from typing import IO, Any

import torch
from torch import Tensor, nn
from torch._ops import OpOverload
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind, TensorArgument
from torch.export.passes import move_to_device_pass
from torch.fx import GraphModule, Node
from torch.utils._pytree import tree_unflatten

from manifests.errors import StorageError
from manifests.storage import read_url
from teachers.code_teacher import CodeTeacher
from teachers.errors import TeacherError
from teachers.inputs.points import PointsSpec
from teachers.inputs.spec import InputSpec
from teachers.interface import Cost, Size, TeacherRequest, WeightsRecord
from teachers.module_outputs import RETURNED
from teachers.torch_teacher import DTYPES, Tap
from teachers.weights import local_path, resolve

_IDENTITY = "exported program"
_PRECISIONS = {dtype: name for name, dtype in DTYPES.items()}
_OWN_BATCH = 32
"""Rows per forward where a job does not say: at most so many."""


@dataclasses.dataclass(frozen=True)
class ProgramInput:
    """One input of a program, as it was exported.

    Attributes:
        name: of the argument.
        shape: of a row; None where the length is free.
        dtype: of its values.
        batch: fewest and most rows at once.
    """

    name: str
    shape: tuple[int | None, ...]
    dtype: torch.dtype
    batch: tuple[int, float]

    def __str__(self) -> str:
        """Its name, shape and type, for people."""
        sides = ("any" if side is None else str(side) for side in self.shape)
        return f"{self.name} ({', '.join(['batch', *sides])}) {self.dtype}"


def open_teacher(
    request: TeacherRequest, weights: WeightsRecord, device: str
) -> ProgramTeacher:
    """Returns a program as a teacher; see `teachers.registry.open_teacher`."""
    return ProgramTeacher(request, weights, device)


class _Program(nn.Module):
    """A program as a module, of the mode and types that it was exported with."""

    def __init__(self, program: nn.Module) -> None:
        super().__init__()
        self.program = program

    def train(self, mode: bool = True) -> _Program:
        """Returns itself: a program has no modes, and refuses to be asked for one."""
        del mode
        return self

    def _apply(self, fn: Any, recurse: bool = True) -> _Program:
        # Types are part of its operators; torch's own pass has moved it to its device.
        del fn, recurse
        return self

    def forward(self, *inputs: Tensor) -> Any:
        return self.program(*inputs)


class ProgramTeacher(CodeTeacher):
    """An exported program that looks at one input or several together."""

    def __init__(
        self, request: TeacherRequest, weights: WeightsRecord, device: str
    ) -> None:
        super().__init__(request, device)
        self._weights = weights
        self._place = f"{self.where}.model {request.config.model!r}"
        self._check_words()
        program = self._read()
        # Whoever builds it first takes this one; a program can be moved only once.
        self._unused: ExportedProgram | None = program
        self._given = _inputs_of(program, self._place)
        _check_repeatable(program, self._place)
        self._check_types()
        for size in self.sizes:
            self._check_shapes(size)
        self._fewest = max(item.batch[0] for item in self._given)
        self._check_batch()
        parameters = list(program.parameters())
        facts = self._make_facts(
            nn.ParameterList(parameters),
            source=request.config.model_name,
            code_sha256=weights.sha256,
        )
        self.facts = dataclasses.replace(
            facts,
            parameter_bytes=sum(item.nbytes for item in parameters),
            model=_IDENTITY,
        )

    def _check_words(self) -> None:
        for name, (path, _) in self._sources.items():
            if path != RETURNED:
                raise TeacherError(
                    f"{self.where}.outputs.{name}.from must be `output`, then [index] "
                    f"or [key]: a program has no submodules, got {path!r}; export one "
                    "that returns it"
                )
        if self.request.config.method != "forward":
            raise TeacherError(
                f"{self.where}.method has no effect on a program; leave it out"
            )

    def _check_types(self) -> None:
        group = self.request.group
        if len(self._given) != len(group):
            raise TeacherError(
                f"{self.where}.on must give the program its {len(self._given)} inputs "
                f"({'; '.join(map(str, self._given))}) in order, got {len(group)} "
                f"({', '.join(item.name for item in group)}); name the group: "
                "`on: {NAME: [INPUT, ...]}`"
            )
        pairs = list(zip(group, self._given, strict=True))
        leading = next((it for item, it in pairs if item.kind != "points"), pairs[0][1])
        own = _PRECISIONS.get(leading.dtype)
        if own != self.request.config.precision:
            wanted = f"precision: {own}" if own else "a program that takes floats"
            raise TeacherError(
                f"{self.where}.precision must be the program's own, got "
                f"{self.request.config.precision} for {leading}; give {wanted}"
            )
        for item, it in pairs:
            may_differ = item.kind == "points" and it.dtype == torch.float32
            if it.dtype != leading.dtype and not may_differ:
                raise TeacherError(
                    f"{self._place} must take {item.name} in {leading.dtype}, as its "
                    f"other inputs, got {it}; export it so"
                )

    def _check_shapes(self, size: Size | None) -> None:
        specs = self.inputs(size)
        for it, (name, spec) in zip(self._given, specs.items(), strict=True):
            shape = tuple(spec.blank("meta").shape[1:])
            agree = len(shape) == len(it.shape) and all(
                theirs in (None, ours)
                for theirs, ours in zip(it.shape, shape, strict=True)
            )
            if not agree:
                is_points = isinstance(spec, PointsSpec)
                field = "preprocess.points and columns" if is_points else "sizes"
                raise TeacherError(
                    f"{self.where}.{field} must be those that the program was exported "
                    f"with, got {name} {('batch', *shape)} for {it}"
                )

    def _check_batch(self) -> None:
        most = min(item.batch[1] for item in self._given)
        batch = self.request.config.batch
        if self._fewest == most and batch != most:
            raise TeacherError(
                f"{self.where}.batch must be {most}, the fixed batch that the program "
                f"was exported with, got {batch}; give `batch: {most}`, or export it "
                "with a dynamic one"
            )
        if (_OWN_BATCH if batch is None else batch) > most:
            raise TeacherError(
                f"{self.where}.batch must be at most {most}, the largest that the "
                f"program was exported for, got {batch}; give `batch: {most}`"
            )

    def inputs(self, size: Size | None) -> dict[str, InputSpec]:
        """Returns how each input is taken; see `Teacher.inputs`."""
        specs = super().inputs(size)
        for it, (name, spec) in zip(self._given, specs.items(), strict=True):
            if isinstance(spec, PointsSpec):
                is_exact = it.dtype != self.dtype
                specs[name] = dataclasses.replace(spec, exact=is_exact)
        return specs

    def cost(self, size: Size | None) -> Cost:
        """Returns what a row costs, counted in the program's own types."""
        self.outputs(size)
        cost = self._costs[size]
        rows = self._fewest
        return Cost(cost.flops / rows, int(cost.working_bytes / rows))

    def _read(self) -> ExportedProgram:
        with local_path(self.request, self._weights) as path:
            return _load(path, self._place)

    def _on(self, device: str) -> nn.Module:
        program, self._unused = self._unused or self._read(), None
        if device != "cpu":
            program = move_to_device_pass(program, device)
        return _Program(program.module())

    def _blueprint(self, size: Size | None, device: str) -> nn.Module:
        del size
        return self._on(device)

    def _build(self, size: Size | None) -> nn.Module:
        del size
        for built in self._models.values():
            return built
        return self._on(str(self.device))

    def _call(self, model: nn.Module, inputs: Mapping[str, Tensor]) -> Any:
        return model(*inputs.values())

    def _taps(
        self, model: nn.Module, batch: Mapping[str, Tensor], size: Size | None
    ) -> dict[str, Tap]:
        rows = len(next(iter(batch.values())))
        lacking = max(0, self._fewest - rows)
        filled = {}
        for item, it in zip(self.request.group, self._given, strict=True):
            value = batch[item.name].to(it.dtype)
            if lacking:
                value = torch.cat([value, *[value[-1:]] * lacking])
            filled[item.name] = value
        taps = super()._taps(model, filled, size)
        for name, tap in taps.items():
            if len(tap.tensor) != rows + lacking:
                raise TeacherError(
                    f"{self.where}.outputs.{name} must have a row for each of the "
                    f"{rows + lacking} of the batch, got {list(tap.tensor.shape)}; "
                    "take another tensor"
                )
            taps[name] = dataclasses.replace(tap, tensor=tap.tensor[:rows])
        return taps


def _load(file: str | PathLike[str] | IO[bytes], place: str) -> ExportedProgram:
    try:
        return torch.export.load(file)
    # A program is anyone's file; what torch raises on it is not agreed upon.
    except Exception as error:
        first = (str(error).strip().splitlines() or [""])[0]
        raise TeacherError(
            f"{place} must be a program that torch.export.save wrote and torch "
            f"{torch.__version__} reads, got {type(error).__name__}: {first}; export "
            "it again with this torch"
        ) from error


def _inputs_of(program: ExportedProgram, place: str) -> tuple[ProgramInput, ...]:
    """Returns what a program takes, in order.

    Raises:
        TeacherError: not by position, or not tensors.
    """
    given = [
        item.arg
        for item in program.graph_signature.input_specs
        if item.kind is InputKind.USER_INPUT
    ]
    numbers = tuple(range(len(given)))
    by_position = tree_unflatten(list(numbers), program.call_spec.in_spec)
    tensors = [item for item in given if isinstance(item, TensorArgument)]
    if by_position != (numbers, {}) or len(tensors) != len(given) or not given:
        raise TeacherError(
            f"{place} must take tensors, each by position, got "
            f"{', '.join(item.name for item in given) or 'nothing'}; export it with "
            "`args` alone"
        )
    nodes = {node.name: node for node in program.graph.nodes}
    return tuple(_input_of(program, nodes[item.name]) for item in tensors)


def _input_of(program: ExportedProgram, node: Node) -> ProgramInput:
    value = node.meta["val"]
    rows, *sides = value.shape or (1,)
    batch: tuple[int, float] = (1, math.inf)
    if isinstance(rows, int):
        batch = (rows, rows)
    elif rows.node.expr in program.range_constraints:
        allowed = program.range_constraints[rows.node.expr]
        most = allowed.upper
        batch = (
            max(1, int(allowed.lower)),
            int(most) if most.is_Integer else math.inf,
        )
    shape = tuple(side if isinstance(side, int) else None for side in sides)
    return ProgramInput(node.name, shape, value.dtype, batch)


def _check_repeatable(program: ExportedProgram, place: str) -> None:
    """Checks that a row is the same whenever, and beside whomever, it comes.

    Raises:
        TeacherError: the program was exported as it is trained, or draws numbers.
    """
    kept = {
        item.arg.name
        for item in program.graph_signature.input_specs
        if item.kind in (InputKind.BUFFER, InputKind.PARAMETER)
    }
    for operator, node in _calls(program.graph_module):
        arguments = _arguments(operator, node)
        is_training = arguments.get("train") or arguments.get("training")
        changed = [
            value.name
            for item in operator._schema.arguments
            if item.alias_info is not None and item.alias_info.is_write
            if isinstance(value := arguments.get(item.name), Node)
            if value.name in kept
        ]
        is_drawing = torch.Tag.nondeterministic_seeded in operator.tags and not (
            # These draw nothing unless they train.
            {"train", "training"} & arguments.keys() or arguments.get("dropout_p") == 0
        )
        if is_training or changed or is_drawing:
            raise TeacherError(
                f"{place} must give a row the same values whenever it runs, got "
                f"{operator}{f' on {changed[0]}' if changed else ''}; export it after "
                "model.eval(), without random numbers"
            )


def _calls(graph: GraphModule) -> Iterator[tuple[OpOverload[Any, Any], Node]]:
    """Yields every operator that a program calls, those of its branches included."""
    for module in graph.modules():
        if isinstance(module, GraphModule):
            for node in module.graph.nodes:
                if isinstance(node.target, OpOverload):
                    yield node.target, node


def _arguments(operator: OpOverload[Any, Any], node: Node) -> dict[str, Any]:
    """Returns the arguments of a call by name, defaults included."""
    schema = operator._schema.arguments
    found = {item.name: item.default_value for item in schema}
    found |= {item.name: value for item, value in zip(schema, node.args, strict=False)}
    return found | dict(node.kwargs)


def describe(name: str, base: str) -> dict[str, Any]:
    """Returns what a program takes and gives, as it was exported.

    Raises:
        TeacherError: there is no such file, or it is no program.
    """
    url = resolve(base, name)
    try:
        data = read_url(url)
    except StorageError as error:
        raise TeacherError(f"model must be a file that can be read: {error}") from error
    program = _load(io.BytesIO(data), f"model {name!r}")
    inputs = _inputs_of(program, f"model {name!r}")
    fewest = max(item.batch[0] for item in inputs)
    most = min(item.batch[1] for item in inputs)
    returned = next(node for node in program.graph.nodes if node.op == "output").args[0]
    values = [item.meta["val"] if isinstance(item, Node) else item for item in returned]
    tree = tree_unflatten(values, program.call_spec.out_spec)
    return {
        "size_bytes": len(data),
        "code_sha256": hashlib.sha256(data).hexdigest(),
        "inputs": {item.name: str(item) for item in inputs},
        "batch": _shown_batch(fewest, most),
        "outputs": dict(_named(tree, RETURNED)),
        "num_parameters": sum(item.numel() for item in program.parameters()),
    }


def _shown_batch(fewest: int, most: float) -> int | str:
    if fewest == most:
        return fewest
    return "any" if math.isinf(most) else f"{fewest} to {most}"


def _named(value: Any, path: str) -> Iterator[tuple[str, list[int | None]]]:
    """Yields where each tensor is, as `from` says it, and its shape without a batch."""
    if isinstance(value, Tensor):
        sides = value.shape[1:]
        yield path, [side if isinstance(side, int) else None for side in sides]
        return
    items: Iterator[tuple[Any, Any]] = iter(())
    if isinstance(value, Mapping):
        items = iter(value.items())
    elif isinstance(value, (tuple, list)):
        items = enumerate(value)
    for key, one in items:
        yield from _named(one, f"{path}[{key}]")
