"""The demo's three trained experts: where they are, and what a job says to use them.

They are small networks (`teachonce.demo.nets`), trained by
`teachonce.demo.experts.train` on scenes of other seeds and other textures than the
demo's; ``experts.json`` says on which, and how well they do. Importing this needs no
torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_HERE = Path(__file__).parent

#: The file of the three classes.
NETS = _HERE.parent / "nets.py"

#: What they were trained on, and their scores.
REPORT = _HERE / "experts.json"

#: What a job's LiDAR input must say in ``intensity_max``: `OccupancyNet` takes 0..1.
INTENSITY_MAX = 255


@dataclass(frozen=True)
class Expert:
    """One expert, in the words of a job.

    Attributes:
        name: of the expert, and of its weights file.
        class_name: in ``nets.py``.
        kind: of the input that it takes, ``image`` or ``points``.
        sizes: [height, width] of images; none for points.
        preprocess: as in a job.
        features: ``from`` of its features, ``channels`` wide on ``grid``.
        channels: of ``features``.
        grid: rows and columns of ``features``.
        answer_shape: channels, rows and columns of ``from: output``.
    """

    name: str
    class_name: str
    kind: str
    sizes: tuple[tuple[int, int], ...]
    preprocess: Mapping[str, Any]
    features: str
    channels: int
    grid: tuple[int, int]
    answer_shape: tuple[int, int, int]

    @property
    def model(self) -> str:
        """Returns what the job's ``model`` says."""
        return f"module:{NETS}:{self.class_name}"

    @property
    def weights(self) -> Path:
        """Returns what the job's ``weights`` says."""
        return _HERE / f"{self.name}.safetensors"


_CAMERA = {"range": 1, "mean": [0.45] * 3, "std": [0.25] * 3}
_LIDAR = {"points": 8192, "columns": ["x", "y", "z", "intensity"]}

#: By name.
EXPERTS = {
    expert.name: expert
    for expert in (
        Expert(
            name="semantics",
            class_name="SemanticsNet",
            kind="image",
            sizes=((160, 320),),
            preprocess=_CAMERA,
            features="pyramid.features",
            channels=64,
            grid=(10, 20),
            answer_shape=(12, 40, 80),
        ),
        Expert(
            name="depth",
            class_name="DepthNet",
            kind="image",
            sizes=((160, 320),),
            preprocess=_CAMERA,
            features="pyramid.features",
            channels=64,
            grid=(10, 20),
            answer_shape=(1, 40, 80),
        ),
        Expert(
            name="occupancy",
            class_name="OccupancyNet",
            kind="points",
            sizes=(),
            preprocess=_LIDAR,
            features="pyramid.features",
            channels=64,
            grid=(16, 16),
            answer_shape=(5, 64, 64),
        ),
    )
}
