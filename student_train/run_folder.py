"""The folder of a run: what it was made from, its checkpoints, its results.

``run.json`` holds the resolved recipe and what it found in the bank. The same recipe
goes on in its folder; one that would learn something else is refused.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from manifests.recipe import Recipe
from manifests.storage import explain
from student_train.errors import TrainingError

_RECORD = "run.json"
_LOCK = "run.lock"
# Fields of a recipe that change how fast it runs, not what it learns.
_FREE = ("run", "banks", "checkpoints", "engine", "require_license")
_FREE_OF = {
    "data": ("shards",),
    "loader": ("threads", "workers", "prefetch"),
    "student": ("checkpointing",),
}
_FREE_OF_STAGES = ("accumulate",)
# Fields that came later, and what was meant before: runs begun then go on.
_LATER = {"data": {"inputs": "shards"}}


class RunFolder:
    """One run's folder."""

    def __init__(self, path: str) -> None:
        """Names the folder; nothing is written yet.

        Raises:
            TrainingError: it is not on this machine.
        """
        if "://" in path:
            raise TrainingError(
                f"run must be a folder on this machine, got {path}; train into a local "
                "folder and copy it when it is done"
            )
        self.path = Path(path)

    @property
    def checkpoints(self) -> Path:
        """Folder of the checkpoints."""
        return self.path / "checkpoints"

    @property
    def student(self) -> Path:
        """Folder of the student when training is done."""
        return self.path / "student"

    @property
    def averaged(self) -> Path:
        """Folder of the student with averaged weights, where the recipe has `ema`."""
        return self.path / "student-ema"

    @property
    def heads(self) -> Path:
        """File of the heads when training is done; the student has none."""
        return self.path / "heads.safetensors"

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        """Keeps other processes out; however this one ends, the system lets them in.

        Raises:
            TrainingError: another process trains in the folder.
            StorageError: it cannot be written to.
        """
        path = self.path / _LOCK
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            file = path.open("a")
        except OSError as error:
            raise explain(error, "write to run", str(self.path)) from error
        with file:
            try:
                # Not flock, which the loader's processes would inherit and keep.
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                # Some network file systems have no locks at all.
                if error.errno in (errno.EACCES, errno.EAGAIN):
                    raise TrainingError(
                        f"run {self.path} must be trained by one process at a time, "
                        "but another is at it; let it end, or give the recipe another "
                        "`run`"
                    ) from error
            yield

    def claim(self, recipe: Recipe, facts: Mapping[str, Any]) -> bool:
        """Makes the folder this recipe's, or checks that it is; returns if it is new.

        Args:
            recipe: resolved.
            facts: of the bank that the order of rows depends on.

        Raises:
            TrainingError: it is another recipe's, or the bank is not what it was.
            StorageError: it cannot be written to.
        """
        mine = {"recipe": recipe.model_dump(mode="json", by_alias=True), **facts}
        record = self.path / _RECORD
        if not record.exists():
            self._write(record, mine)
            return True
        held = self.read()
        apart = sorted(
            {
                path.removeprefix("recipe.")
                for path in _differences(_essential(held), _essential(mine), "")
            }
        )
        if apart:
            raise TrainingError(
                f"run {self.path} must be of one recipe and one state of its bank, but "
                f"{', '.join(apart[:5])} {'is' if len(apart) == 1 else 'are'} not what "
                "it was started with; give the recipe another `run`, or remove the "
                "folder"
            )
        return False

    def read(self) -> dict[str, Any]:
        """Returns what ``run.json`` says.

        Raises:
            TrainingError: there is none, or it is damaged.
        """
        path = self.path / _RECORD
        try:
            found = json.loads(path.read_text())
            if not isinstance(found, dict) or not isinstance(found["recipe"], dict):
                raise ValueError("it holds no recipe")
        except (OSError, ValueError, KeyError) as error:
            raise TrainingError(
                f"{self.path} must be the folder of a run, but {path.name} is missing "
                f"or damaged ({error}); give the recipe another `run`"
            ) from error
        return found

    def finish(self, result: Mapping[str, Any]) -> None:
        """Adds the result; a run with one is done."""
        self._write(self.path / _RECORD, {**self.read(), "result": dict(result)})

    def _write(self, path: Path, value: Mapping[str, Any]) -> None:
        temporary = path.with_suffix(".tmp")
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            temporary.write_text(json.dumps(value, indent=1) + "\n")
            os.replace(temporary, path)
        except OSError as error:
            raise explain(error, "write", str(path)) from error


def _essential(record: Mapping[str, Any]) -> dict[str, Any]:
    recipe = {k: v for k, v in record["recipe"].items() if k not in _FREE}
    for section, names in _FREE_OF.items():
        held = recipe.get(section) or {}
        later = _LATER.get(section, {})
        recipe[section] = {
            k: v
            for k, v in held.items()
            if k not in names and (k not in later or v != later[k])
        }
    recipe["stages"] = [
        {k: v for k, v in stage.items() if k not in _FREE_OF_STAGES}
        for stage in recipe["stages"]
    ]
    rest = {k: v for k, v in record.items() if k not in ("recipe", "result")}
    return {"recipe": recipe, **rest}


def _differences(held: Any, mine: Any, path: str) -> list[str]:
    """Returns the dotted paths where two JSON values differ."""
    if isinstance(held, dict) and isinstance(mine, dict):
        return [
            found
            for name in sorted({*held, *mine})
            for found in _differences(
                held.get(name), mine.get(name), f"{path}.{name}".lstrip(".")
            )
        ]
    return [] if held == mine else [path]
