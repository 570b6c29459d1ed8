"""The training loop: a recipe in, a student out, the same whatever stopped it between.

Wires dataset, student, objective, optimiser, checkpoints and logs; what each does is
its own file's. On a CPU, stopping after any step and going on gives the same weights
bit for bit: order, augmentation and dropout are functions of what a checkpoint holds.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from manifests.loading import digest
from manifests.recipe import OptimizerConfig, Recipe, StageConfig
from pipeline.bank.open import Bank, open_bank
from pipeline.samples.fitting import fit_size
from student_train.batches import Batch
from student_train.checkpoints import (
    Position,
    latest_checkpoint,
    load_checkpoint,
    read_position,
    save_checkpoint,
    save_heads,
)
from student_train.dataset import BankDataset, bank_loader
from student_train.errors import TrainingError
from student_train.export import export_student
from student_train.features import Student
from student_train.inputs import Size
from student_train.objective import Objective
from student_train.run_folder import RunFolder
from student_train.run_log import RunLog
from student_train.schedules import lr_at
from student_train.students import make_student
from student_train.tasks import Task, reading_of, resolve_tasks


@dataclass(frozen=True)
class Progress:
    """What is said of a step while training runs.

    Attributes:
        position: after the step.
        num_steps: of the whole run.
        stage: name of the stage.
        loss: of the step's batch.
        samples_per_s: since the last report.
        wait_share: of the time since then that went by waiting for data.
    """

    position: Position
    num_steps: int
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


class Modules(nn.Module):
    """Student and heads as one module: what a checkpoint holds."""

    def __init__(self, student: Student, objective: Objective) -> None:
        """Takes both."""
        super().__init__()
        self.student = student
        self.objective = objective


class Trainer:
    """One run of a recipe."""

    def __init__(self, recipe: Recipe, bank: Bank | None = None) -> None:
        """Checks the recipe against bank and shards and builds everything but batches.

        Args:
            recipe: with absolute paths.
            bank: opened already, or None.

        Raises:
            TrainingError: what the recipe asks cannot be had; nothing was written.
            BankError, StorageError: bank or shards cannot be read.
        """
        self.recipe = recipe
        (url,) = recipe.banks.values()
        self.bank = bank or open_bank(url)
        self.device = _device(recipe.engine.device)
        self.tasks: tuple[Task, ...] = resolve_tasks(recipe, self.bank)
        torch.manual_seed(recipe.seed)
        if recipe.engine.threads is not None:
            torch.set_num_threads(recipe.engine.threads)
        self._sizes = self._stage_sizes()
        student = make_student(
            recipe.student, self._sizes[0][0], seed=recipe.seed, base=""
        )
        for sizes in self._sizes:
            for size in sizes:
                student.grid_of(size)
        self.modules = Modules(student, Objective(self.tasks, student))
        self.modules.to(self.device)
        self.datasets = [
            self._dataset(stage, sizes)
            for stage, sizes in zip(recipe.stages, self._sizes, strict=True)
        ]
        self.stage_steps = [
            stage.steps or (stage.epochs or 0) * dataset.num_steps
            for stage, dataset in zip(recipe.stages, self.datasets, strict=True)
        ]
        self.folder = RunFolder(recipe.run)

    @property
    def student(self) -> Student:
        """The student."""
        return self.modules.student

    def _stage_sizes(self) -> list[list[Size]]:
        """Returns each stage's input sizes, fitted to the aspect of the view's box."""
        return [
            [
                one if isinstance(one, tuple) else self._fitted(one)
                for one in stage.sizes or [None]
            ]
            for stage in self.recipe.stages
        ]

    def _fitted(self, side: int | None) -> Size:
        """Returns the size of about ``side`` x ``side`` pixels in the view's aspect."""
        student = self.recipe.student
        aspect = self.bank.record.inputs[student.input].aspect
        model = make_student(student, None, seed=self.recipe.seed, base="")
        native = model.native_size if side is None else (side, side)
        return fit_size(native, model.stride, aspect, "tokens")

    def _dataset(self, stage: StageConfig, sizes: list[Size]) -> BankDataset:
        recipe = self.recipe
        shards = recipe.data.shards
        patterns = [shards] if isinstance(shards, str) else shards
        return BankDataset(
            self.bank,
            reading_of(recipe, self.tasks, sizes),
            batch=stage.batch,
            rows=recipe.data.rows,
            shards=patterns,
            view=recipe.loader.view,
            window_blocks=recipe.loader.window_blocks,
            seed=recipe.seed,
            threads=recipe.loader.threads,
            prefetch=recipe.loader.prefetch,
            pin_memory=self.device.type == "cuda",
        )

    # Running.

    def run(
        self,
        on_step: Callable[[Progress], object] = lambda _: None,
        should_stop: Callable[[], bool] = lambda: False,
    ) -> Outcome:
        """Trains to the end, or until told to stop; the same call goes on.

        Args:
            on_step: called after each step.
            should_stop: asked after each step; then a checkpoint is written.

        Raises:
            TrainingError: the folder is another recipe's, or a loss is not finite.
            BankError: a block is missing or damaged.
        """
        self.folder.claim(self.recipe, self._facts())
        held = self.folder.read().get("result")
        if held is not None:
            return Outcome(self.folder.path, True, held)
        checkpoint = latest_checkpoint(self.folder.checkpoints)
        position = Position() if checkpoint is None else read_position(checkpoint)
        columns = [task.name for task in self.tasks]
        log = RunLog(self.folder.path, columns, position.step)
        meter = _Meter()
        try:
            while position.stage < len(self.recipe.stages):
                optimizer = _make_optimizer(self.recipe.optimizer, self.modules)
                if checkpoint is not None:
                    load_checkpoint(checkpoint, self.modules, optimizer)
                    checkpoint = None
                steps = self._run_stage(position, optimizer, log, meter)
                for progress in steps:
                    position = progress.position
                    on_step(progress)
                    if should_stop():
                        save_checkpoint(
                            self.folder.checkpoints, position, self.modules, optimizer
                        )
                        return Outcome(self.folder.path, False, meter.result(position))
                position = self._next_stage(position)
                save_checkpoint(
                    self.folder.checkpoints, position, self.modules, optimizer
                )
        finally:
            log.close()
        return self._finish(position, meter, log)

    def _next_stage(self, position: Position) -> Position:
        """Returns where the next stage starts: an epoch of its own, in its batches."""
        return replace(
            position,
            stage=position.stage + 1,
            stage_step=0,
            epoch=position.epoch + bool(position.epoch_step),
            epoch_step=0,
        )

    def _run_stage(
        self, position: Position, optimizer: Optimizer, log: RunLog, meter: _Meter
    ) -> Iterator[Progress]:
        """Yields after each step of a stage, from where it stands."""
        recipe, number = self.recipe, position.stage
        stage, dataset = recipe.stages[number], self.datasets[number]
        total = self.stage_steps[number]
        batches = bank_loader(
            dataset, recipe.loader.workers, position.epoch, position.epoch_step
        )
        self.modules.train()
        with contextlib.closing(batches):
            while position.stage_step < total:
                rate = lr_at(
                    position.stage_step,
                    total,
                    stage.lr,
                    stage.warmup_steps,
                    stage.schedule,
                    stage.final_lr,
                )
                with meter.waiting():
                    batch = next(batches)
                loss, shares = self._step(batch, optimizer, rate)
                position = _after(position, dataset.num_steps)
                meter.count(len(batch))
                value = float(loss)
                if not torch.isfinite(loss):
                    raise TrainingError(
                        f"loss must be finite, got {value} at step {position.step} "
                        f"({', '.join(f'{k} {float(v)}' for k, v in shares.items())});"
                        " lower the learning rate or look at the rows "
                        f"{batch.rows[:8].tolist()} ..."
                    )
                if position.step % recipe.checkpoints.every_steps == 0:
                    save_checkpoint(
                        self.folder.checkpoints, position, self.modules, optimizer
                    )
                is_last = position.stage_step == total
                if position.step % recipe.checkpoints.log_steps == 0 or is_last:
                    speed, share = meter.lap()
                    log.write(position, stage.name, rate, value, shares, speed, share)
                yield Progress(
                    position,
                    sum(self.stage_steps),
                    stage.name,
                    value,
                    meter.samples_per_s,
                    meter.wait_share,
                )

    def _step(
        self, batch: Batch, optimizer: Optimizer, rate: float
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Makes one step; returns the loss before it."""
        recipe = self.recipe
        for group in optimizer.param_groups:
            group["lr"] = rate
        batch = batch.to(self.device)
        is_half = recipe.precision == "bfloat16"
        with torch.autocast(self.device.type, torch.bfloat16, enabled=is_half):
            features = self.student(batch.inputs[recipe.student.input])
            loss, shares = self.modules.objective(features, batch, recipe.student.input)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        if recipe.optimizer.clip_norm is not None:
            nn.utils.clip_grad_norm_(
                self.modules.parameters(), recipe.optimizer.clip_norm
            )
        optimizer.step()
        return loss.detach(), shares

    # What is kept.

    def _facts(self) -> dict[str, Any]:
        """Returns what the order of rows depends on besides the recipe."""
        return {
            "rows": [dataset.num_rows for dataset in self.datasets],
            "steps": self.stage_steps,
            "sources": {
                task.name: [task.path, self.bank.pass_of(task.path).fingerprint]
                for task in self.tasks
                if task.path is not None
            },
        }

    def _finish(self, position: Position, meter: _Meter, log: RunLog) -> Outcome:
        result = meter.result(position) | {"losses": log.last_losses()}
        facts = {
            "recipe": digest(self.recipe.model_dump(mode="json", by_alias=True)),
            "bank": self.bank.url,
            "steps": position.step,
            "targets": {task.name: task.config.source for task in self.tasks},
        }
        save_heads(self.folder.heads, self.modules.objective.heads)
        export_student(self.student, self.recipe.student, self.folder.student, facts)
        self.folder.finish(result)
        return Outcome(self.folder.path, True, result)


def _after(position: Position, epoch_steps: int) -> Position:
    """Returns the position after one more step."""
    epoch, rest = divmod(position.epoch_step + 1, epoch_steps)
    return Position(
        position.step + 1,
        position.stage,
        position.stage_step + 1,
        position.epoch + epoch,
        rest,
    )


class _Meter:
    """Samples per second, and the share of the time that went by waiting for data."""

    def __init__(self) -> None:
        self._start = self._lap = time.perf_counter()
        self._waited = self._lap_waited = 0.0
        self._samples = self._lap_samples = 0

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        begun = time.perf_counter()
        yield
        seconds = time.perf_counter() - begun
        self._waited += seconds
        self._lap_waited += seconds

    def count(self, samples: int) -> None:
        self._samples += samples
        self._lap_samples += samples

    @property
    def samples_per_s(self) -> float:
        return self._lap_samples / max(time.perf_counter() - self._lap, 1e-9)

    @property
    def wait_share(self) -> float:
        return self._lap_waited / max(time.perf_counter() - self._lap, 1e-9)

    def lap(self) -> tuple[float, float]:
        """Returns both since the last lap, and begins another."""
        found = self.samples_per_s, self.wait_share
        self._lap, self._lap_waited, self._lap_samples = time.perf_counter(), 0.0, 0
        return found

    def result(self, position: Position) -> dict[str, Any]:
        seconds = time.perf_counter() - self._start
        return {
            "steps": position.step,
            "seconds": round(seconds, 3),
            "samples_per_s": round(self._samples / max(seconds, 1e-9), 2),
            "wait_share": round(self._waited / max(seconds, 1e-9), 4),
        }


def _device(name: str) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise TrainingError(
            f"engine.device must be auto, cpu, cuda or cuda:N, got {name!r}"
        ) from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise TrainingError(
            f"engine.device must be a device of this machine, got {name}; torch sees "
            "no accelerator"
        )
    return device


def _make_optimizer(config: OptimizerConfig, modules: nn.Module) -> Optimizer:
    """Returns an optimiser; weight decay spares norms, biases and tokens."""
    decayed: list[Tensor] = []
    spared: list[Tensor] = []
    for name, parameter in modules.named_parameters():
        if not parameter.requires_grad:
            continue
        is_token = name.rpartition(".")[2].endswith(("token", "tokens", "embed"))
        (spared if parameter.ndim < 2 or is_token else decayed).append(parameter)
    groups: list[dict[str, Any]] = [
        {"params": decayed, "weight_decay": config.weight_decay},
        {"params": spared, "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    if config.kind == "adamw":
        return torch.optim.AdamW(groups, betas=config.betas, eps=config.eps)
    return torch.optim.SGD(
        groups,
        lr=0.0,
        momentum=config.momentum,
        nesterov=config.nesterov and config.momentum > 0,
    )
