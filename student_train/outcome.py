"""What a trainer says while it runs, and when it is done."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from student_train.checkpoints import Position


@dataclass(frozen=True)
class Progress:
    """What is said of a step while training runs.

    Attributes:
        position: after the step.
        stage: name of the stage.
        loss: of the step's batch.
        samples_per_s: since the last report.
        wait_share: of the time since then that went by waiting for data.
    """

    position: Position
    stage: str
    loss: float
    samples_per_s: float
    wait_share: float


@dataclass(frozen=True)
class Outcome:
    """What a run came to.

    Attributes:
        folder: of the run.
        is_done: whether all stages are done.
        result: steps, seconds, samples per second, share of waiting, last losses.
    """

    folder: Path
    is_done: bool
    result: dict[str, Any]
