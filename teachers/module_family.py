"""Teachers from a file of yours: any torch module, tapped where the job says.

``module:./file.py:CLASS`` is code that runs because the job names it, as
`manifests.code` says; its SHA-256 goes into the teacher's facts.

An output says where it is taken, in ``from``: `teachers.module_outputs`.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from manifests.code import Code, explained, load_code
from teachers.code_teacher import CodeTeacher
from teachers.cost import building_on
from teachers.errors import TeacherError, as_teacher_error
from teachers.interface import Size, TeacherRequest, WeightsRecord
from teachers.torch_teacher import (
    freeze,
    seeded,
)
from teachers.weights import (
    load_strict,
    local_path,
    map_keys,
    parse_wanted,
    read_state_dict,
)


def _load(name: str, base: str, where: str) -> Code:
    with as_teacher_error():
        return load_code(name, base, where, nn.Module)


def find_weights(request: TeacherRequest) -> WeightsRecord:
    """Raises TeacherError: a module has no weights of its own to find."""
    tag = parse_wanted(request).tag
    given = "nothing" if tag is None else repr(tag)
    raise TeacherError(
        f"teachers.{request.name}.weights must be a path, a URL, `random` or "
        f"`random:SEED` for module: teachers, got {given}"
    )


def open_teacher(
    request: TeacherRequest, weights: WeightsRecord, device: str
) -> ModuleTeacher:
    """Returns a module as a teacher; see `teachers.registry.open_teacher`."""
    return ModuleTeacher(request, weights, device)


class ModuleTeacher(CodeTeacher):
    """A module of somebody's that looks at one input or several together."""

    def __init__(
        self, request: TeacherRequest, weights: WeightsRecord, device: str
    ) -> None:
        super().__init__(request, device)
        self._weights = weights
        self._code = self._load_code()
        try:
            probe = self._create("meta")
        # What cannot be built on meta may well be built on a CPU.
        except TeacherError:
            probe = self._create("cpu")
        self.facts = self._make_facts(
            probe, source=request.config.model_name, code_sha256=self._code.sha256
        )

    def _load_code(self) -> Code:
        """Returns the code that the model is made by."""
        return _load(self.request.config.model_name, self.request.base, self.where)

    @property
    def _asked(self) -> str:
        """What is asked of the code, for messages."""
        return f"{self.request.config.model_name}(**args) must be built"

    def _construct(self) -> Any:
        """Returns what the code makes."""
        return self._code.make(**self.request.config.args)

    def _create(self, device: str) -> nn.Module:
        config = self.request.config
        with (
            as_teacher_error(),
            explained(f"{self.where}.model: {self._asked}"),
            building_on(device),
            seeded(self._weights.seed),
        ):
            model = self._construct()
        if not isinstance(model, nn.Module):
            raise TeacherError(
                f"{self.where}.model must be a torch.nn.Module, got "
                f"{type(model).__name__} from {config.model_name}"
            )
        if not callable(getattr(model, config.method, None)):
            methods = [
                name
                for name, value in inspect.getmembers(type(model), callable)
                if name not in dir(nn.Module)
            ]
            raise TeacherError(
                f"{self.where}.method must be a method of {type(model).__name__}, got "
                f"{config.method!r} (its own: forward, {', '.join(methods)})"
            )
        return model

    def _blueprint(self, size: Size | None, device: str) -> nn.Module:
        del size
        return self._create(device)

    def _build(self, size: Size | None) -> nn.Module:
        del size
        for built in self._models.values():
            return built
        model = self._create("cpu")
        if self._weights.kind == "file":
            with local_path(self.request, self._weights) as path:
                state = read_state_dict(path, self._weights.url)
                state = map_keys(state, self.request.config.keys, self.where)
                load_strict(model, state, self._weights.url)
        return model

    def _call(self, model: nn.Module, inputs: Mapping[str, Tensor]) -> Any:
        method = self.request.config.method
        call = model if method == "forward" else getattr(model, method)
        return call(*inputs.values()) if len(inputs) == 1 else call(**inputs)


def describe(name: str, base: str) -> dict[str, Any]:
    """Returns the class's arguments and, where it can be built without any, its parts.

    Raises:
        TeacherError: the file or the class is not there.
    """
    code = _load(name, base, "teachers")
    facts: dict[str, Any] = {
        "code_sha256": code.sha256,
        "arguments": str(inspect.signature(code.make)),
        "summary": (code.make.__doc__ or "").strip().partition("\n")[0],
    }
    # Without its arguments a class may well refuse to be built; then that is all.
    with contextlib.suppress(Exception), building_on("meta"):
        model = freeze(code.make())
        facts["num_parameters"] = sum(item.numel() for item in model.parameters())
        facts["submodules"] = [path for path, _ in model.named_modules() if path]
    return facts
