"""The log of a run: ``log.csv`` and TensorBoard, a line each few steps; and its speed.

A run that goes on from a checkpoint drops the lines behind it, for those steps are made
again.
"""

from __future__ import annotations

import contextlib
import csv
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from student_train.checkpoints import Position

_LOG = "log.csv"
_COLUMNS = ("step", "stage", "epoch", "lr", "samples_per_s", "wait_share", "loss")


class RunLog:
    """A run's log, open to go on after a step."""

    def __init__(
        self, folder: Path, targets: Sequence[str], step: int, is_kept: bool = True
    ) -> None:
        """Opens the log, without what it says of steps after ``step``.

        Args:
            folder: of the run.
            targets: their names, a column each.
            step: that the run goes on from.
            is_kept: False for a rank that writes nothing.
        """
        self._is_kept = is_kept
        self._last: dict[str, float] = {}
        if not is_kept:
            return
        columns = [*_COLUMNS, *(f"loss.{name}" for name in targets)]
        kept = [row for row in read_log(folder) if row["step"] <= step]
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / _LOG
        temporary = path.with_suffix(".tmp")
        self._file = temporary.open("w", newline="")
        self._writer = csv.DictWriter(
            self._file, columns, restval="", extrasaction="ignore"
        )
        self._writer.writeheader()
        self._writer.writerows(kept)
        self._file.flush()
        # Now and not before: a run killed meanwhile still has its log.
        temporary.replace(path)
        self._last = {
            name: value
            for name, value in (kept[-1] if kept else {}).items()
            if name.startswith("loss")
        }
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
        if not self._is_kept:
            return
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
        # What a killed run has not written is not made again.
        self._board.flush()

    def last_losses(self) -> dict[str, float]:
        """Returns the losses of the last line, also where an earlier run wrote it."""
        return dict(self._last)

    def close(self) -> None:
        """Closes the files."""
        if not self._is_kept:
            return
        self._file.close()
        self._board.close()


def read_log(folder: Path) -> list[dict[str, Any]]:
    """Returns the lines of a run's log, numbers as numbers; none where it has none."""
    path = folder / _LOG
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return [
            {
                name: value if name == "stage" else _number(value)
                for name, value in row.items()
                if value
            }
            for row in csv.DictReader(file)
            # A run killed while it wrote leaves half a line.
            if (row.get("step") or "").isdecimal() and None not in row.values()
        ]


def _number(text: str) -> int | float:
    return int(text) if text.isdecimal() else float(text)


class Meter:
    """Samples per second, and the share of the time that went by waiting for data."""

    def __init__(self) -> None:
        self._start = self._lap = time.perf_counter()
        self._waited = self._lap_waited = 0.0
        self._samples = self._lap_samples = 0

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Counts the time within as waited."""
        begun = time.perf_counter()
        yield
        seconds = time.perf_counter() - begun
        self._waited += seconds
        self._lap_waited += seconds

    def count(self, samples: int) -> None:
        """Counts samples that were learned from."""
        self._samples += samples
        self._lap_samples += samples

    @property
    def samples_per_s(self) -> float:
        """Since the last lap."""
        return self._lap_samples / max(time.perf_counter() - self._lap, 1e-9)

    @property
    def wait_share(self) -> float:
        """Since the last lap."""
        return self._lap_waited / max(time.perf_counter() - self._lap, 1e-9)

    def lap(self) -> tuple[float, float]:
        """Returns both since the last lap, and begins another."""
        found = self.samples_per_s, self.wait_share
        self._lap, self._lap_waited, self._lap_samples = time.perf_counter(), 0.0, 0
        return found

    def result(self, position: Position) -> dict[str, Any]:
        """Returns steps of the run; seconds, speed and waiting since it was begun."""
        seconds = time.perf_counter() - self._start
        return {
            "steps": position.step,
            "seconds": round(seconds, 3),
            "samples_per_s": round(self._samples / max(seconds, 1e-9), 2),
            "wait_share": round(self._waited / max(seconds, 1e-9), 4),
        }
