"""Requests, tiny files of code and one torch thread for all tests of teachers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest
import torch

from manifests.teacher import TeacherConfig
from teachers.interface import GroupInput, Teacher, TeacherRequest
from teachers.registry import find_weights, open_teacher

SHARED = Path(__file__).parents[2].parent / "shared" / "data"


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Two cores are shared with other test processes."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def make_request(tmp_path: Path) -> Callable[..., TeacherRequest]:
    """Returns a request for one image input unless told otherwise."""

    def make(
        model: str,
        outputs: Any,
        *,
        group: tuple[GroupInput, ...] | None = None,
        aspect: float = 1.0,
        base: str | None = None,
        **config: Any,
    ) -> TeacherRequest:
        if not isinstance(outputs, dict):
            outputs = {name: {} for name in outputs}
        if config.get("weights", "") == "":
            config["weights"] = "random"
        return TeacherRequest(
            "t",
            TeacherConfig(model=model, outputs=outputs, **config),
            group or (GroupInput("image", "image", aspect),),
            base or str(tmp_path),
        )

    return make


@pytest.fixture
def open_one(make_request: Callable[..., TeacherRequest]) -> Callable[..., Teacher]:
    """Returns a teacher on the CPU (or ``device``), made from a request's arguments."""

    def open_it(
        model: str, outputs: Any, device: str = "cpu", **config: Any
    ) -> Teacher:
        request = make_request(model, outputs, **config)
        return open_teacher(request, find_weights(request), device)

    return open_it


@pytest.fixture
def shared_data() -> Path:
    """Returns the folder of real data; skips the test where it is not at hand."""
    if not SHARED.is_dir():
        pytest.skip("needs ../shared/data beside the repository")
    return SHARED


MODULE = '''
import torch
from torch import nn


class Net(nn.Module):
    """A small net with a tuple, a dict, tokens and a part that runs twice."""

    def __init__(self, width=4):
        super().__init__()
        self.stem = nn.Conv2d(3, width, 4, 4)
        self.block = nn.Sequential(nn.Conv2d(width, width, 1), nn.ReLU())
        self.twice = nn.Conv2d(width, width, 1)
        self.unused = nn.Linear(2, 2)
        self.head = nn.Linear(width, 5)

    def features(self, image):
        grid = self.block(self.stem(image))
        both = self.twice(self.twice(grid))
        tokens = grid.flatten(2).transpose(1, 2)
        logits = self.head(grid.mean((2, 3)))
        return {"grid": grid, "pair": (both, tokens), "logits": logits}

    def forward(self, image):
        return self.features(image)["logits"]


class Rig(nn.Module):
    """Looks at an image and a sweep together."""

    def __init__(self):
        super().__init__()
        self.points = nn.Linear(3, 4)

    def forward(self, *, front, lidar):
        return front.mean((2, 3)), self.points(lidar).amax(1)


def not_a_module():
    return 3
'''


@pytest.fixture
def net_file(tmp_path: Path) -> Path:
    """Returns a file of code with the modules Net and Rig."""
    path = tmp_path / "net.py"
    path.write_text(MODULE)
    return path


@pytest.fixture
def hub_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[[str, str, bytes], Path]:
    """Returns a function that puts a file into an otherwise empty cache of the hub."""
    root = tmp_path / "hub"
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(root))

    def put(repo: str, name: str, data: bytes) -> Path:
        folder = root / f"models--{repo.replace('/', '--')}"
        revision = "c" * 40
        (folder / "refs").mkdir(parents=True)
        (folder / "refs" / "main").write_text(revision)
        path = folder / "snapshots" / revision / name
        path.parent.mkdir(parents=True)
        path.write_bytes(data)
        return path

    return put
