"""The log of a run: ``log.csv`` and TensorBoard, a line each few steps.

A run that goes on from a checkpoint drops the lines behind it, for those steps are made
again.
"""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from student_train.checkpoints import Position

_LOG = "log.csv"
_COLUMNS = ("step", "stage", "epoch", "lr", "samples_per_s", "wait_share", "loss")


class RunLog:
    """A run's log, open to go on after a step."""

    def __init__(self, folder: Path, targets: Sequence[str], step: int) -> None:
        """Opens the log, without what it says of steps after ``step``."""
        self._columns = [*_COLUMNS, *(f"loss.{name}" for name in targets)]
        kept = [row for row in read_log(folder) if row["step"] <= step]
        folder.mkdir(parents=True, exist_ok=True)
        self._file = (folder / _LOG).open("w", newline="")
        self._writer = csv.DictWriter(self._file, self._columns, restval="")
        self._writer.writeheader()
        for row in kept:
            self._writer.writerow({k: row[k] for k in self._columns if k in row})
        self._file.flush()
        self._last: dict[str, float] = {}
        self._board: Any = SummaryWriter(
            str(folder / "tensorboard"), purge_step=step + 1
        )

    def write(
        self,
        position: Position,
        stage: str,
        rate: float,
        loss: float,
        shares: Mapping[str, Tensor],
        samples_per_s: float,
        wait_share: float,
    ) -> None:
        """Adds a line about a step."""
        self._last = {"loss": loss} | {
            f"loss.{name}": float(share) for name, share in shares.items()
        }
        numbers = {
            "lr": rate,
            "samples_per_s": round(samples_per_s, 2),
            "wait_share": round(wait_share, 4),
            **self._last,
        }
        self._writer.writerow(
            {"step": position.step, "stage": stage, "epoch": position.epoch, **numbers}
        )
        self._file.flush()
        for name, value in numbers.items():
            self._board.add_scalar(name.replace(".", "/"), value, position.step)

    def last_losses(self) -> dict[str, float]:
        """Returns the losses of the last line."""
        return dict(self._last)

    def close(self) -> None:
        """Closes the files."""
        self._file.close()
        self._board.close()


def read_log(folder: Path) -> list[dict[str, Any]]:
    """Returns the lines of a run's log, numbers as numbers; none where it has none."""
    path = folder / _LOG
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return [
            {name: _number(value) for name, value in row.items() if value}
            for row in csv.DictReader(file)
            # A run killed while it wrote leaves half a line.
            if row.get("step", "").isdigit() and None not in row.values()
        ]


def _number(text: str) -> Any:
    if text.isdigit():
        return int(text)
    try:
        return float(text)
    except ValueError:
        return text
