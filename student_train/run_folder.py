"""The folder of a run: what it was made from, its checkpoints, its results.

``run.json`` holds the resolved recipe and what it found in the bank. The same recipe
goes on in its folder; one that would learn something else is refused.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from manifests.recipe import Recipe
from student_train.errors import TrainingError

_RECORD = "run.json"
# Fields of a recipe that change how fast it runs, not what it learns.
_FREE = ("run", "banks", "checkpoints", "engine")
_FREE_OF = {"data": ("shards",), "loader": ("threads", "workers", "prefetch")}


class RunFolder:
    """One run's folder."""

    def __init__(self, path: str) -> None:
        """Names the folder; nothing is written yet."""
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
    def heads(self) -> Path:
        """File of the heads when training is done; the student has none."""
        return self.path / "heads.safetensors"

    def claim(self, recipe: Recipe, facts: Mapping[str, Any]) -> bool:
        """Makes the folder this recipe's, or checks that it is; returns if it is new.

        Args:
            recipe: resolved.
            facts: of the bank that the order of rows depends on.

        Raises:
            TrainingError: it is another recipe's, or the bank is not what it was.
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
                f"run {self.path} must be of one recipe, but {', '.join(apart[:5])} "
                f"{'is' if len(apart) == 1 else 'are'} not what it was started with; "
                "give the recipe another `run`, or remove the folder"
            )
        return False

    def read(self) -> dict[str, Any]:
        """Returns what ``run.json`` says.

        Raises:
            TrainingError: there is none, or it is damaged.
        """
        path = self.path / _RECORD
        try:
            found: dict[str, Any] = json.loads(path.read_text())
        except (OSError, ValueError) as error:
            raise TrainingError(
                f"{self.path} must be the folder of a run: {path.name} {error}"
            ) from error
        return found

    def finish(self, result: Mapping[str, Any]) -> None:
        """Adds the result; a run with one is done."""
        self._write(self.path / _RECORD, {**self.read(), "result": dict(result)})

    def _write(self, path: Path, value: Mapping[str, Any]) -> None:
        self.path.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(".tmp")
        temporary.write_text(json.dumps(value, indent=1) + "\n")
        os.replace(temporary, path)


def _essential(record: Mapping[str, Any]) -> dict[str, Any]:
    recipe = {k: v for k, v in record["recipe"].items() if k not in _FREE}
    for section, names in _FREE_OF.items():
        recipe[section] = {k: v for k, v in recipe[section].items() if k not in names}
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
