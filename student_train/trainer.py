"""The training loop: a recipe in, a student out, the same whatever stopped it between.

Wires dataset, student, objective, optimiser, checkpoints and logs; what each does is
its own file's. On a CPU, stopping after any step and going on gives the same weights
bit for bit: order, augmentation and dropout are functions of what a checkpoint holds.
"""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Callable, Generator, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch.optim import Optimizer

from manifests.loading import digest
from manifests.recipe import Recipe, StageConfig
from pipeline.bank.open import Bank, open_bank
from student_train.batches import Batch
from student_train.checkpoints import (
    Position,
    latest_checkpoint,
    load_checkpoint,
    random_state,
    read_learning,
    read_position,
    save_checkpoint,
    save_heads,
)
from student_train.dataset import BankDataset, bank_loader
from student_train.devices import choose_device
from student_train.errors import TrainingError
from student_train.export import export_student
from student_train.features import Student
from student_train.inputs import Size
from student_train.learning import Learner, Modules, Step
from student_train.licences import (
    check_licences,
    licence_facts,
    student_licences,
)
from student_train.model_modes import (
    compile_features,
    forget_activations,
    share_batch_norms,
)
from student_train.objective import Objective
from student_train.optimizers import make_optimizer
from student_train.order import rank_seed
from student_train.outcome import Outcome, Progress
from student_train.ranks import Ranks
from student_train.run_facts import run_facts
from student_train.run_folder import RunFolder
from student_train.run_log import Meter, RunLog
from student_train.schedules import lr_at
from student_train.selection import select_rows
from student_train.stage_sizes import StageSizes
from student_train.students import make_student, seeded
from student_train.tasks import Task, reading_of, resolve_tasks


class Trainer:
    """One run of a recipe."""

    def __init__(
        self, recipe: Recipe, bank: Bank | None = None, ranks: Ranks | None = None
    ) -> None:
        """Checks the recipe against bank and shards and builds everything but batches.

        Args:
            recipe: with absolute paths.
            bank: opened already, or None.
            ranks: that train together, joined; alone if omitted.

        Raises:
            TrainingError: what the recipe asks cannot be had; nothing was written.
            BankError, StorageError: bank or shards cannot be read.
        """
        self.recipe = recipe
        (url,) = recipe.banks.values()
        self.bank = bank or open_bank(url)
        self.ranks = ranks or Ranks()
        self.device = choose_device(recipe.engine.device, self.ranks)
        self.tasks: tuple[Task, ...] = resolve_tasks(recipe, self.bank)
        self.licences = student_licences(self.bank, self.tasks)
        if recipe.require_license is not None:
            check_licences(self.licences, recipe.require_license)
        self.folder = RunFolder(recipe.run)
        if recipe.engine.threads is not None:
            torch.set_num_threads(recipe.engine.threads)
        stage_sizes = StageSizes(recipe, self.bank, self.tasks)
        self._sizes = stage_sizes.all()
        student = make_student(
            recipe.student, self._sizes[0][0], seed=recipe.seed, base=""
        )
        stage_sizes.check(student, self._sizes)
        with seeded(recipe.seed):
            objective = Objective(self.tasks, student, recipe.balance, recipe.seed)
            self.modules = Modules(student, objective)
            # Where dropout starts; another run in this process may be drawing too.
            self._random = torch.get_rng_state()
        # A run that goes on has the statistics that it began with in its checkpoint.
        if latest_checkpoint(self.folder.checkpoints) is None:
            objective.fit(self.bank)
        self._has_begun = False
        share_batch_norms(self.modules, self.device, self.ranks)
        self.modules.to(self.device)
        if recipe.student.checkpointing:
            forget_activations(student)
        if recipe.engine.compile:
            compile_features(student, objective)
        self._learner: Learner | None = None
        self._rows = select_rows(self.bank, recipe.data.rows, "data.rows")
        self.datasets = [
            self._dataset(stage, sizes)
            for stage, sizes in zip(recipe.stages, self._sizes, strict=True)
        ]
        self.stage_steps = [
            stage.steps or (stage.epochs or 0) * dataset.num_steps
            for stage, dataset in zip(recipe.stages, self.datasets, strict=True)
        ]
        for dataset in self.datasets:
            lanes = dataset.order(0).num_lanes
            count, workers = self.ranks.count, recipe.loader.workers
            if lanes % (count * max(1, workers)):
                raise TrainingError(
                    "loader.window_blocks (or the batch, if smaller) must be a "
                    f"multiple of ranks x loader.workers, got {lanes} for {count} "
                    f"ranks and {workers} workers"
                )
        for stage, steps in zip(recipe.stages, self.stage_steps, strict=True):
            if stage.warmup_steps >= steps:
                raise TrainingError(
                    f"warmup_steps of stage {stage.name} must be fewer than its steps "
                    f"({steps}), got {stage.warmup_steps}"
                )

    @property
    def student(self) -> Student:
        """The student."""
        return self.modules.student

    def _dataset(self, stage: StageConfig, sizes: list[Size]) -> BankDataset:
        recipe = self.recipe
        shards = recipe.data.shards
        patterns = [shards] if isinstance(shards, str) else shards
        return BankDataset(
            self.bank,
            reading_of(recipe, self.tasks, sizes),
            batch=stage.batch,
            rows=self._rows,
            shards=patterns,
            view=recipe.loader.view,
            window_blocks=recipe.loader.window_blocks,
            seed=recipe.seed,
            rank=self.ranks.number,
            world_size=self.ranks.count,
            threads=recipe.loader.threads or self._fair_threads(),
            prefetch=recipe.loader.prefetch,
            pin_memory=self.device.type == "cuda",
        )

    def _fair_threads(self) -> int:
        """Returns this rank's part of the machine's cores."""
        return max(1, len(os.sched_getaffinity(0)) // self.ranks.local_count)

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
            TrainingError: the folder is another recipe's or another process's, or a
                loss is not finite.
            BankError: a block is missing or damaged.
            StorageError: the folder cannot be written to.
        """
        with self._claimed() as held:
            if held is not None:
                return Outcome(self.folder.path, True, held)
            optimizer = make_optimizer(self.recipe.optimizer, self.modules)
            with self.ranks.as_one():
                position = self._begin(optimizer)
            self._learner = self._make_learner(position)
            columns = [task.name for task in self.tasks]
            log = RunLog(self.folder.path, columns, position.step, self.ranks.is_first)
            meter = Meter()
            with contextlib.closing(log):
                while position.stage < len(self.recipe.stages):
                    steps = self._run_stage(position, optimizer, log, meter)
                    with contextlib.closing(steps):
                        for progress in steps:
                            position = progress.position
                            on_step(progress)
                            if self.ranks.any(should_stop()):
                                self._save(position, optimizer)
                                result = meter.result(position)
                                return Outcome(self.folder.path, False, result)
                    position = self._next_stage(position)
                    # Each stage has an optimiser of its own, also after a resume here.
                    optimizer = make_optimizer(self.recipe.optimizer, self.modules)
                    self._save(position, optimizer)
            with self.ranks.as_one():
                return self._finish(position, meter, log)

    @contextlib.contextmanager
    def _claimed(self) -> Iterator[dict[str, Any] | None]:
        """Keeps the folder for this run; yields the result that it holds, if any."""
        held: dict[str, Any] | None = None
        with contextlib.ExitStack() as stack:
            with self.ranks.as_one():
                if self.ranks.is_first:
                    stack.enter_context(self.folder.alone())
                    self.folder.claim(self.recipe, self._facts())
                    held = self.folder.read().get("result")
            yield self.ranks.gather(held)[0]

    def _begin(self, optimizer: Optimizer) -> Position:
        """Returns where training stands, with everything as it was there."""
        checkpoint = latest_checkpoint(self.folder.checkpoints)
        number = self.ranks.number
        if checkpoint is not None:
            if number:
                # Where fewer ranks trained, there is no state for this one.
                step = read_position(checkpoint).step
                torch.manual_seed(rank_seed(self.recipe.seed, step, number))
            return load_checkpoint(checkpoint, self.modules, optimizer, number)
        if self._has_begun:
            raise TrainingError(
                f"run {self.folder.path} must start from weights that are not trained, "
                "but it failed before its first checkpoint; make another Trainer"
            )
        self._has_begun = True
        torch.manual_seed(self.recipe.seed)
        torch.set_rng_state(self._random)
        if number:
            torch.manual_seed(rank_seed(self.recipe.seed, 0, number))
        return Position()

    def _make_learner(self, position: Position) -> Learner:
        """Returns what makes steps, as it was at a position that is loaded."""
        learner = Learner(self.recipe, self.modules, self.device, self.ranks)
        checkpoint = latest_checkpoint(self.folder.checkpoints)
        if position.step and checkpoint is not None:
            with self.ranks.as_one():
                learner.load_state(read_learning(checkpoint))
        return learner

    def _save(self, position: Position, optimizer: Optimizer) -> None:
        random = self.ranks.gather(random_state(self.modules))
        with self.ranks.as_one():
            if self.ranks.is_first:
                assert self._learner is not None
                save_checkpoint(
                    self.folder.checkpoints,
                    position,
                    self.modules,
                    optimizer,
                    random,
                    self._learner.state(),
                    self._made_from(),
                )

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
        self, position: Position, optimizer: Optimizer, log: RunLog, meter: Meter
    ) -> Generator[Progress, None, None]:
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
                with meter.waiting(), self.ranks.as_one():
                    batch = next(batches)
                step = self.step(batch, optimizer, rate, stage.accumulate)
                position = _after(position, dataset.num_steps)
                meter.count(stage.batch)
                value = self._check(step, position, batch)
                is_last = position.stage_step == total
                # Before the checkpoint: what is not logged by then is never made again.
                if position.step % recipe.checkpoints.log_steps == 0 or is_last:
                    speed, share = meter.lap()
                    log.write(
                        position, stage.name, rate, value, step.shares, speed, share
                    )
                if position.step % recipe.checkpoints.every_steps == 0:
                    self._save(position, optimizer)
                yield Progress(
                    position,
                    stage.name,
                    value,
                    meter.samples_per_s,
                    meter.wait_share,
                )

    def step(
        self, batch: Batch, optimizer: Optimizer, rate: float, parts: int = 1
    ) -> Step:
        """Makes one step; returns loss, norm of its gradient and shares before it."""
        if self._learner is None:
            self._learner = self._make_learner(Position())
        return self._learner.step(batch, optimizer, rate, parts)

    def _check(self, step: Step, position: Position, batch: Batch) -> float:
        """Returns the loss of a step that went well."""
        value = float(step.loss)
        # A gradient may overflow while its loss does not: no checkpoint of it.
        if math.isfinite(value) and (step.is_skipped or torch.isfinite(step.norm)):
            return value
        raise TrainingError(
            f"loss and gradient must be finite, got {value} and a norm of "
            f"{float(step.norm)} at step {position.step} "
            f"({', '.join(f'{k} {float(v)}' for k, v in step.shares.items())});"
            " lower the learning rate or look at the rows "
            f"{batch.rows[:8].tolist()} ..."
        )

    # What is kept.

    def _facts(self) -> dict[str, Any]:
        """Returns what the weights depend on besides the recipe: the bank's state."""
        return {
            "rows": [dataset.num_rows for dataset in self.datasets],
            "steps": self.stage_steps,
            **run_facts(self.recipe, self.bank, self.tasks, self._rows),
        }

    def _made_from(self) -> dict[str, Any]:
        """Returns what tells these weights from others, and whose they are."""
        return {
            "recipe": digest(self.recipe.model_dump(mode="json", by_alias=True)),
            "bank": self.bank.url,
            "bank_state": digest(self._facts()),
            **licence_facts(self.licences),
        }

    def _finish(self, position: Position, meter: Meter, log: RunLog) -> Outcome:
        result = meter.result(position) | {"losses": log.last_losses()}
        if not self.ranks.is_first:
            return Outcome(self.folder.path, True, result)
        facts = {
            **self._made_from(),
            "input": self.recipe.student.input,
            "steps": position.step,
            "targets": {task.name: task.config.source for task in self.tasks},
        }
        save_heads(self.folder.heads, self.modules.objective.head_state())
        export_student(self.student, self.recipe.student, self.folder.student, facts)
        if self.recipe.ema is not None:
            assert self._learner is not None
            averaged = self._learner.averaged()
            facts["weights"] = f"averaged over steps, decay {self.recipe.ema.decay}"
            export_student(averaged, self.recipe.student, self.folder.averaged, facts)
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
