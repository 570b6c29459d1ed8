"""The log goes on where a checkpoint does; the meter counts."""

from __future__ import annotations

import csv

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from student_train import run_log
from student_train.checkpoints import Position
from student_train.run_log import Meter, RunLog, read_log


def write(folder, steps, after=0, stage="1e3"):
    """Lines of steps, as a run that goes on after a step writes them."""
    log = RunLog(folder, ["a", "b.c"], after)
    for step in steps:
        shares = {"a": torch.tensor(step / 3), "b.c": torch.tensor(1.0)}
        position = Position(step=step, epoch=step // 4)
        log.write(position, stage, 1e-7 * step, step / 7, shares, 12.345, 0.25)
    return log


def test_lines_behind_the_checkpoint_are_dropped(tmp_path):
    write(tmp_path / "one", range(1, 8)).close()
    write(tmp_path / "two", range(1, 7)).close()
    write(tmp_path / "two", range(5, 8), after=4).close()
    log = tmp_path / "one" / "log.csv"
    assert log.read_bytes() == (tmp_path / "two" / "log.csv").read_bytes()
    with log.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [int(row["step"]) for row in rows] == list(range(1, 8))
    assert {row["stage"] for row in rows} == {"1e3"}
    assert [float(row["loss"]) for row in rows] == [step / 7 for step in range(1, 8)]
    board = EventAccumulator(str(tmp_path / "two" / "tensorboard"))
    board.Reload()
    for tag in ("loss", "loss/a", "loss/b/c", "lr", "wait_share", "samples_per_s"):
        assert [event.step for event in board.Scalars(tag)] == list(range(1, 8))


def test_the_last_losses_outlive_a_process(tmp_path):
    log = write(tmp_path, [3])
    held = log.last_losses()
    assert held == {
        "loss": 3 / 7,
        "loss.a": pytest.approx(1.0),
        "loss.b.c": 1.0,
    }
    log.close()
    again = RunLog(tmp_path, ["a", "b.c"], 3)
    assert again.last_losses() == held
    again.close()
    nothing = RunLog(tmp_path, ["a", "b.c"], 0)
    assert nothing.last_losses() == {}
    nothing.close()
    assert read_log(tmp_path) == []


def test_half_a_line_is_no_line(tmp_path):
    write(tmp_path, [1, 2, 3]).close()
    path = tmp_path / "log.csv"
    whole = path.read_bytes()
    last = whole.rstrip().rindex(b"\n") + 1
    for end in range(last, len(whole.rstrip())):
        path.write_bytes(whole[:end])
        steps = [row["step"] for row in read_log(tmp_path)]
        assert steps[:2] == [1, 2]
    path.write_bytes(b"")
    assert read_log(tmp_path) == []
    assert read_log(tmp_path / "none") == []


def test_a_run_killed_while_it_opens_its_log_keeps_it(tmp_path, monkeypatch):
    write(tmp_path, [1, 2, 3]).close()
    before = (tmp_path / "log.csv").read_bytes()

    class Killed(run_log.csv.DictWriter):
        def __init__(self, file, *arguments, **named):
            super().__init__(file, *arguments, **named)
            self.file = file

        def writerows(self, rows):
            self.file.close()
            raise KeyboardInterrupt

    monkeypatch.setattr(run_log.csv, "DictWriter", Killed)
    with pytest.raises(KeyboardInterrupt):
        RunLog(tmp_path, ["a", "b.c"], 2)
    assert (tmp_path / "log.csv").read_bytes() == before


def test_what_a_killed_run_wrote_can_be_read(tmp_path):
    """Nothing waits in memory: a process that is killed has its events on disk."""
    log = write(tmp_path, [1, 2])
    board = EventAccumulator(str(tmp_path / "tensorboard"))
    board.Reload()
    assert [event.step for event in board.Scalars("loss")] == [1, 2]
    assert len(read_log(tmp_path)) == 2
    log.close()


def test_the_meter(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(run_log.time, "perf_counter", lambda: now[0])
    meter = Meter()
    with meter.waiting():
        now[0] += 1
    now[0] += 3
    meter.count(8)
    assert (meter.samples_per_s, meter.wait_share) == (2.0, 0.25)
    assert meter.lap() == (2.0, 0.25)
    now[0] += 4
    meter.count(4)
    assert meter.lap() == (1.0, 0.0)
    assert meter.result(Position(step=3)) == {
        "steps": 3,
        "seconds": 8.0,
        "samples_per_s": 1.5,
        "wait_share": 0.125,
    }
