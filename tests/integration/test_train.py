"""Whole runs of training: stopped, killed, gone on with, and refused."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import timm
import torch
from safetensors import safe_open
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from manifests.loading import load_job
from pipeline.bank.open import open_bank
from pipeline.precompute import precompute
from student_train import trainer as trainer_module
from student_train.run_log import read_log
from student_train.trainer import Trainer
from teachonce.cli import main
from tests.conftest import ROOT, write_job, write_shards
from tests.training import (
    CLASS,
    LOGITS,
    NOISY,
    PATCH,
    once,
    plain_bank,
    recipe_for,
    trainer_for,
    write_recipe,
)

# 22 rows: the first stage ends within its second epoch, the second has two of its own.
STAGES = [
    {
        "name": "first",
        "steps": 5,
        "batch": 6,
        "lr": 1.0e-3,
        "warmup_steps": 2,
        "size": [[16, 16]],
    },
    {"name": "second", "epochs": 2, "batch": 4, "lr": 5.0e-4, "size": [16, 24]},
]
NUM_STEPS = 15
KINDS = {
    "adamw": {
        "precision": "bfloat16",
        "optimizer": {"kind": "adamw", "weight_decay": 0.05},
    },
    "sgd": {
        "precision": "float32",
        "optimizer": {"kind": "sgd", "momentum": 0.9, "clip_norm": None},
    },
}
RECIPE = {
    "student": NOISY,
    "targets": {"patch": PATCH, "logits": LOGITS, "class": CLASS},
    "stages": STAGES,
    "checkpoints": {"every_steps": 4, "log_steps": 2},
}
SPEED = {"samples_per_s", "wait_share"}


@pytest.fixture(scope="module")
def bank(tmp_path_factory):
    return once(tmp_path_factory, "plain", plain_bank)


class Undisturbed:
    """A run that nothing stopped: its folder and the loss of every step."""

    def __init__(self, bank: Path, run: Path, kind: str):
        self.run, self.losses = run, {}
        self.trainer = trainer_for(bank, run, **RECIPE, **KINDS[kind])
        outcome = self.trainer.run(losses_into(self.losses))
        assert outcome.is_done
        assert len(self.losses) == NUM_STEPS


@pytest.fixture(scope="module")
def undisturbed(bank, tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed")
    return {kind: Undisturbed(bank, folder / kind, kind) for kind in KINDS}


def losses_into(losses):
    def on_step(progress):
        step = progress.position.step
        # A step that is made again is the step that it was.
        assert losses.setdefault(step, progress.loss) == progress.loss

    return on_step


def tensors_of(run: Path) -> dict[str, torch.Tensor]:
    """Every tensor that a finished run leaves: checkpoint, student and heads."""
    found = {}
    for path in sorted(run.rglob("*.safetensors")):
        for name, tensor in safetensors.torch.load_file(path).items():
            found[f"{path.relative_to(run)}:{name}"] = tensor
    return found


def assert_same_run(run: Path, reference: Path) -> None:
    mine, theirs = tensors_of(run), tensors_of(reference)
    assert mine.keys() == theirs.keys()
    assert any(name.startswith("student/") for name in mine)
    different = [
        name
        for name in mine
        if mine[name].dtype != theirs[name].dtype
        or not torch.equal(mine[name], theirs[name])
    ]
    assert different == []
    (checkpoint,) = (reference / "checkpoints").iterdir()
    for folder in (run, reference):
        with safe_open(folder / "checkpoints" / checkpoint.name, "pt") as file:
            position = json.loads(file.metadata()["position"])
        assert position["step"] == NUM_STEPS or reference.name == "long"
    assert log_of(run) == log_of(reference)
    results = [json.loads((one / "run.json").read_text()) for one in (run, reference)]
    assert results[0]["result"]["losses"] == results[1]["result"]["losses"]
    assert results[0]["result"]["steps"] == results[1]["result"]["steps"]


def log_of(run: Path) -> list[dict]:
    return [
        {name: value for name, value in row.items() if name not in SPEED}
        for row in read_log(run)
    ]


def scramble(trainer: Trainer) -> None:
    """Leaves nothing in a trainer of what a checkpoint must hold."""
    torch.manual_seed(12345)
    with torch.no_grad():
        for parameter in trainer.modules.parameters():
            parameter.normal_()


@pytest.mark.parametrize("kind", KINDS)
def test_stopping_after_every_step_changes_nothing(kind, bank, undisturbed, tmp_path):
    losses = {}
    trainer = trainer_for(bank, tmp_path / "run", **RECIPE, **KINDS[kind])
    for step in range(1, NUM_STEPS + 1):
        outcome = trainer.run(losses_into(losses), lambda: True)
        assert not outcome.is_done
        assert outcome.result["steps"] == step
        assert not (tmp_path / "run" / "student").exists()
        scramble(trainer)
    assert trainer.run(losses_into(losses)).is_done
    assert losses == undisturbed[kind].losses
    assert_same_run(tmp_path / "run", undisturbed[kind].run)


class Crash(Exception):
    pass


# 5 is the end of the first stage; 6 goes on from the checkpoint between the stages.
@pytest.mark.parametrize("step", [1, 5, 6, 11, NUM_STEPS])
def test_a_crash_goes_on_from_the_last_checkpoint(step, bank, undisturbed, tmp_path):
    kind = "sgd" if step == 11 else "adamw"
    losses = {}

    def on_step(progress):
        losses_into(losses)(progress)
        if progress.position.step == step:
            raise Crash

    fields = {**RECIPE, **KINDS[kind]}
    with pytest.raises(Crash):
        trainer_for(bank, tmp_path / "run", **fields).run(on_step)
    again = trainer_for(bank, tmp_path / "run", **fields)
    assert again.run(losses_into(losses)).is_done
    assert losses == undisturbed[kind].losses
    assert_same_run(tmp_path / "run", undisturbed[kind].run)


def test_a_crash_after_the_last_step_exports_what_was_trained(
    bank, undisturbed, tmp_path, monkeypatch
):
    def crash(*_):
        raise Crash

    fields = {**RECIPE, **KINDS["adamw"]}
    with monkeypatch.context() as patch:
        patch.setattr(trainer_module, "export_student", crash)
        with pytest.raises(Crash):
            trainer_for(bank, tmp_path / "run", **fields).run()
    assert "result" not in json.loads((tmp_path / "run" / "run.json").read_text())
    taken = []
    assert trainer_for(bank, tmp_path / "run", **fields).run(taken.append).is_done
    assert taken == []
    assert_same_run(tmp_path / "run", undisturbed["adamw"].run)


def test_how_rows_are_read_may_change_on_the_way(bank, undisturbed, tmp_path):
    fields = {**RECIPE, **KINDS["adamw"]}
    run = tmp_path / "run"
    for stop, loader in (
        (3, ["loader.threads=1", "loader.prefetch=1"]),
        (8, ["loader.workers=2", "checkpoints.every_steps=3"]),
        (99, ["loader.threads=4", "loader.prefetch=5"]),
    ):
        steps = []
        trainer = trainer_for(bank, run, *loader, **fields)
        trainer.run(
            lambda progress, steps=steps: steps.append(progress.position.step),
            lambda steps=steps, stop=stop: steps[-1] == stop,
        )
    assert steps[-1] == NUM_STEPS
    assert_same_run(run, undisturbed["adamw"].run)


def test_what_else_draws_random_numbers_changes_nothing(bank, undisturbed, tmp_path):
    fields = {**RECIPE, **KINDS["adamw"]}
    state = torch.get_rng_state()
    trainer = trainer_for(bank, tmp_path / "run", **fields)
    assert torch.equal(torch.get_rng_state(), state)
    torch.rand(99)
    trainer.run()
    assert_same_run(tmp_path / "run", undisturbed["adamw"].run)


def command(*arguments: str | Path) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-m", "teachonce", *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        # As a terminal does it: its signals go to all processes of the command.
        start_new_session=True,
    )


def wait_for_checkpoint(process: subprocess.Popen, run: Path, step: int) -> None:
    deadline = time.monotonic() + 120
    while not any(
        int(path.stem.removeprefix("step-")) >= step
        for path in (run / "checkpoints").glob("step-*.safetensors")
    ):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_real_processes_killed_and_interrupted(bank, tmp_path):
    fields = {
        **RECIPE,
        **KINDS["adamw"],
        "banks": {"main": str(bank)},
        "stages": [
            {**STAGES[0], "steps": 120},
            {**STAGES[1], "epochs": None, "steps": 60, "size": [[16, 16]]},
        ],
    }
    path = write_recipe(tmp_path, run="./long", **fields)
    assert main(["train", str(path), "--quiet"]) == 0
    run = tmp_path / "run"
    arguments = ("train", path, "run=./run", "checkpoints.every_steps=3", "--quiet")

    process = command(*arguments)
    wait_for_checkpoint(process, run, 3)
    time.sleep(random.Random().uniform(0, 0.3))
    process.kill()
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out, err) == (-signal.SIGKILL, "", "")
    assert not (run / "student").exists()
    assert "result" not in json.loads((run / "run.json").read_text())
    held = max((run / "checkpoints").glob("step-*.safetensors"))

    process = command(*arguments, "loader.workers=2")
    step = int(held.stem.removeprefix("step-"))
    wait_for_checkpoint(process, run, step + 3)
    os.killpg(process.pid, random.Random().choice([signal.SIGINT, signal.SIGTERM]))
    out, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (1, "")
    assert out.startswith("stopped after step ")
    assert out.endswith(" of 180; the same command goes on from there\n")

    assert main(list(map(str, arguments))) == 0
    assert_same_run(run, tmp_path / "long")


def test_the_command_imports_no_teacher_and_no_beam(bank, tmp_path):
    path = write_recipe(tmp_path, banks={"main": str(bank)})
    code = (
        "import sys; from teachonce.cli import main; "
        f"code = main(['train', {str(path)!r}, '--quiet']); "
        "names = {name.partition('.')[0] for name in sys.modules}; "
        "print(code, sorted(names & {'teachers', 'apache_beam', 'open_clip'}))"
    )
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        capture_output=True,
        text=True,
        timeout=180,
        cwd=ROOT,
        check=False,
    )
    assert done.stderr == ""
    run = tmp_path / "run"
    first, second, third, last = done.stdout.splitlines()
    assert first.startswith(f"{run}: 3 steps, ")
    assert second == f"student: {run / 'student'}"
    assert "timm.create_model" in third
    assert last == "0 []"


def test_a_finished_run_again_trains_nothing(bank, tmp_path, capsys):
    path = write_recipe(tmp_path, banks={"main": str(bank)})
    assert main(["train", str(path), "--quiet"]) == 0
    first = capsys.readouterr().out
    files = {
        one: (one.read_bytes(), one.stat().st_mtime_ns)
        for one in (tmp_path / "run").rglob("*")
        if one.is_file() and one.name != "run.lock"
    }
    taken = []
    assert trainer_for(bank, tmp_path / "run").run(taken.append).is_done
    assert taken == []
    assert main(["train", str(path), "--quiet"]) == 0
    assert capsys.readouterr().out == first
    assert files == {
        one: (one.read_bytes(), one.stat().st_mtime_ns)
        for one in (tmp_path / "run").rglob("*")
        if one.is_file() and one.name != "run.lock"
    }


def test_what_a_run_leaves(bank, tmp_path, capsys):
    fields = {
        **RECIPE,
        "banks": {"main": str(bank)},
        "checkpoints": {"log_steps": 2, "every_steps": 4},
    }
    path = write_recipe(tmp_path, **fields)
    capsys.readouterr()
    assert main(["train", str(path), "--quiet", "--json"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    facts = json.loads(out)
    run = tmp_path / "run"
    record = json.loads((run / "run.json").read_text())
    assert record["result"] == {name: facts[name] for name in record["result"]}
    assert facts["steps"] == NUM_STEPS
    assert facts["student"] == str(run / "student")
    log = read_log(run)
    assert list(log[0]) == [
        *("step", "stage", "epoch", "lr", "samples_per_s", "wait_share", "loss"),
        *("loss.patch", "loss.logits", "loss.class"),
    ]
    assert [row["step"] for row in log] == [2, 4, 5, 6, 8, 10, 12, 14, 15]
    assert [row["stage"] for row in log] == ["first"] * 3 + ["second"] * 6
    for row in log:
        shares = [row[f"loss.{name}"] for name in ("patch", "logits", "class")]
        assert row["loss"] == pytest.approx(sum(shares), rel=1e-5)
    assert facts["losses"]["loss"] == log[-1]["loss"]
    board = EventAccumulator(str(run / "tensorboard"))
    board.Reload()
    for tag, column in (("loss", "loss"), ("loss/patch", "loss.patch"), ("lr", "lr")):
        events = board.Scalars(tag)
        assert [event.step for event in events] == [row["step"] for row in log]
        np.testing.assert_allclose(
            [event.value for event in events], [row[column] for row in log], rtol=1e-6
        )
    model = timm.create_model(f"local-dir:{run / 'student'}", pretrained=True)
    held = safetensors.torch.load_file(run / "student" / "model.safetensors")
    assert all(torch.equal(held[k], v) for k, v in model.state_dict().items())


@pytest.mark.parametrize(
    ("override", "field"),
    [
        ("stages.0.lr=0.01", r"stages"),
        ("seed=1", "seed"),
        ("targets.patch.weight=2", r"targets\.patch\.weight"),
        ("student.args.depth=1", r"student\.args\.depth"),
        ("loader.window_blocks=1", r"loader\.window_blocks"),
        ("optimizer.weight_decay=0.1", r"optimizer\.weight_decay"),
        ("data.rows.share=[0.0,0.9]", "data"),
    ],
)
def test_another_recipe_in_the_same_folder(override, field, bank, tmp_path):
    # What can be had may differ from step to step of the checks before the claim.
    run = tmp_path / "run"
    trainer_for(bank, run).run(should_stop=lambda: True)
    before = {one: one.read_bytes() for one in run.rglob("*") if one.is_file()}
    with pytest.raises(ValueError, match=f"run .*/run must be of one recipe.*{field}"):
        trainer_for(bank, run, override).run()
    assert before == {one: one.read_bytes() for one in run.rglob("*") if one.is_file()}


def test_a_bank_that_grew(tmp_path):
    folder = tmp_path / "grown"
    folder.mkdir()
    bank = plain_bank(folder)
    grows = {"whole": [], "part": ["data.rows.shards=[train-00000*]"]}
    for name, overrides in grows.items():
        trainer_for(bank, tmp_path / name, *overrides).run(should_stop=lambda: True)
    trainer_for(bank, tmp_path / "reference", *grows["part"]).run()
    keys = folder / "keys.txt"
    keys.write_text("\n".join(f"s0-{row:04d}" for row in range(8)))
    named = f"data.rows.keys={keys}"
    trainer_for(bank, tmp_path / "keys", named).run(should_stop=lambda: True)
    keys.write_text("\n".join(f"s0-{row:04d}" for row in range(1, 9)))
    with pytest.raises(ValueError, match="one state of its bank, but data is not what"):
        trainer_for(bank, tmp_path / "keys", named).run()

    write_shards(folder, [5], first=2)
    job = write_job(folder, views={"random": 2})
    assert precompute(load_job(str(job)), quiet=True).is_whole
    with pytest.raises(ValueError, match=r"but data, rows are not what"):
        trainer_for(bank, tmp_path / "whole").run()
    # The same rows: it goes on, by the statistics that it began with.
    grown = trainer_for(bank, tmp_path / "part", *grows["part"])
    assert grown.run().is_done
    mine, theirs = tensors_of(tmp_path / "part"), tensors_of(tmp_path / "reference")
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[name], theirs[name]) for name in theirs)
    heads = safetensors.torch.load_file(tmp_path / "part" / "heads.safetensors")
    now = open_bank(str(bank)).statistics("net/image/16x16/patch")["mean"]
    assert not np.allclose(heads["patch.normaliser.mean"], now)


def test_a_bank_that_moved_is_the_same_bank(bank, tmp_path):
    trainer_for(bank, tmp_path / "run").run(should_stop=lambda: True)
    shutil.copytree(bank.parent, tmp_path / "moved")
    moved = tmp_path / "moved"
    shards = f"data.shards={moved / 'data'}/*.tar"
    outcome = trainer_for(moved / "bank", tmp_path / "run", shards).run()
    assert outcome.is_done
    reference = trainer_for(bank, tmp_path / "reference")
    reference.run()
    mine, theirs = tensors_of(tmp_path / "run"), tensors_of(tmp_path / "reference")
    assert all(torch.equal(mine[name], theirs[name]) for name in theirs)


def test_one_process_at_a_time(bank, tmp_path):
    run = tmp_path / "run"
    trainer = trainer_for(bank, run)
    trainer.run(should_stop=lambda: True)
    code = (
        "import fcntl, sys; file = open(sys.argv[1], 'a'); "
        "fcntl.lockf(file, fcntl.LOCK_EX); print('held', flush=True); input()"
    )
    other = subprocess.Popen(
        [sys.executable, "-c", code, str(run / "run.lock")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert other.stdout is not None
    assert other.stdout.readline() == "held\n"
    with pytest.raises(ValueError, match="one process at a time, but another is at it"):
        trainer.run()
    other.communicate("\n", timeout=30)
    assert trainer.run().is_done


def test_a_block_damaged_on_the_way(bank, tmp_path, capsys):
    """It is named, nothing looks finished, and mended the same command goes on."""
    copied = tmp_path / "copy"
    shutil.copytree(bank.parent, copied)
    path = write_recipe(
        copied, targets={"patch": PATCH}, loader={"threads": 1, "window_blocks": 2}
    )
    data = f"data.shards={copied / 'data'}/*.tar"
    objects = sorted(
        (copied / "bank/features.zarr/net/image/16x16/patch").glob("c*.1.*")
    )
    held = {one: one.read_bytes() for one in objects}
    for one in objects:
        one.write_bytes(held[one][:-1] + bytes([held[one][-1] ^ 1]))
    capsys.readouterr()
    code = main(["train", str(path), data, "--quiet"])
    out, err = capsys.readouterr()
    assert (code, out) == (2, "")
    assert len(err.splitlines()) == 1
    assert re.search(r"\(array net/image/16x16/patch, block \d+, view 1\)", err)
    run = copied / "run"
    assert not (run / "student").exists()
    assert "result" not in json.loads((run / "run.json").read_text())
    for one, content in held.items():
        one.write_bytes(content)
    assert main(["train", str(path), data, "--quiet"]) == 0
    reference = Trainer(
        recipe_for(bank, tmp_path / "reference", targets={"patch": PATCH})
    )
    reference.run()
    mine, theirs = tensors_of(run), tensors_of(tmp_path / "reference")
    assert all(torch.equal(mine[name], theirs[name]) for name in theirs)


def test_a_sample_damaged_on_the_way(bank, tmp_path, capsys):
    copied = tmp_path / "copy"
    shutil.copytree(bank.parent, copied)
    path = write_recipe(copied, stages=[{"epochs": 1, "batch": 4, "lr": 1e-3}])
    data = f"data.shards={copied / 'data'}/*.tar"
    shard = sorted((copied / "data").glob("*.tar"))[1]
    content = bytearray(shard.read_bytes())
    place = content.index(b"s1-0003.jpg") + 512
    content[place : place + 200] = bytes(200)
    shard.write_bytes(content)
    capsys.readouterr()
    code = main(["train", str(path), data, "--quiet"])
    out, err = capsys.readouterr()
    assert (code, out) == (2, "")
    assert len(err.splitlines()) == 1
    assert "sample must be readable" in err
    assert "'s1-0003'" in err
    assert str(shard) in err
    assert not (copied / "run" / "student").exists()
    assert "result" not in json.loads((copied / "run" / "run.json").read_text())
