"""``train RECIPE``: a student from a bank; the same command goes on."""

from __future__ import annotations

import argparse
import signal
import threading
from types import FrameType
from typing import Any

from tqdm import tqdm

from manifests.errors import ManifestError
from manifests.recipe_loading import load_recipe
from student_train.outcome import Outcome, Progress
from student_train.ranks import joined
from student_train.trainer import Trainer
from teachonce.verbs import text


class _Stop:
    """Asked to stop by Ctrl-C or a scheduler's signal; the step is finished first."""

    def __init__(self) -> None:
        self.is_asked = False

    def __enter__(self) -> _Stop:
        if threading.current_thread() is threading.main_thread():
            self._held = {
                one: signal.signal(one, self._ask)
                for one in (signal.SIGINT, signal.SIGTERM)
            }
        return self

    def __exit__(self, *_: object) -> None:
        for one, handler in getattr(self, "_held", {}).items():
            signal.signal(one, handler)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        del frame
        if self.is_asked:
            # The second time is meant: whatever is running ends.
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        self.is_asked = True


def train(trainer: Trainer, quiet: bool) -> Outcome:
    """Runs a trainer with a progress bar; returns what came out."""
    total = sum(trainer.stage_steps)
    with _Stop() as stop, tqdm(total=total, unit="step", disable=quiet or None) as bar:

        def on_step(progress: Progress) -> None:
            bar.update(progress.position.step - bar.n)
            bar.set_description(progress.stage, refresh=False)
            bar.set_postfix_str(
                f"loss {progress.loss:.4f}, {progress.samples_per_s:.0f} samples/s, "
                f"waiting {progress.wait_share:.0%}",
                refresh=False,
            )

        return trainer.run(on_step, lambda: stop.is_asked)


def facts_of(trainer: Trainer, outcome: Outcome) -> dict[str, Any]:
    """Returns what ``train --json`` prints."""
    return {
        "run": str(outcome.folder),
        "student": str(trainer.folder.student) if outcome.is_done else None,
        "done": outcome.is_done,
        **outcome.result,
    }


def print_outcome(trainer: Trainer, outcome: Outcome) -> None:
    """Prints what came out, for people."""
    result = outcome.result
    losses = ", ".join(f"{k} {v:.4f}" for k, v in result.get("losses", {}).items())
    if outcome.is_done:
        print(
            f"{outcome.folder}: {result['steps']} steps, "
            f"{result['samples_per_s']:.0f} samples/s, waiting "
            f"{result['wait_share']:.1%} of the time; {losses}"
        )
        print(f"student: {trainer.folder.student}")
        if trainer.student.architecture is not None:
            print(
                f'  timm.create_model("local-dir:{trainer.folder.student}", '
                "pretrained=True)"
            )
    else:
        print(
            f"stopped after step {result['steps']} of {sum(trainer.stage_steps)}; the "
            "same command goes on from there"
        )


def run(args: argparse.Namespace) -> int:
    """Trains; exit 1 where it was stopped before the end."""
    recipe = load_recipe(args.recipe, args.overrides)
    if args.require_license:
        if taken := [name for name in args.require_license if "=" in name]:
            raise ManifestError(
                f"--require-license must be names of licences, got {taken[0]}; write "
                "overrides before it"
            )
        recipe = recipe.model_copy(update={"require_license": args.require_license})
    with joined(recipe.engine.device) as ranks:
        with ranks.as_one():
            trainer = Trainer(recipe, ranks=ranks)
        outcome = train(trainer, args.quiet or args.json or not ranks.is_first)
    if not ranks.is_first:
        return 0 if outcome.is_done else 1
    if args.json:
        text.print_json(facts_of(trainer, outcome))
    else:
        print_outcome(trainer, outcome)
    return 0 if outcome.is_done else 1
