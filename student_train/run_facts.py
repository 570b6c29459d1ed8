"""What the weights of a run depend on besides its recipe: the state of its bank."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from manifests.loading import digest
from manifests.recipe import Recipe
from pipeline.bank.open import Bank
from pipeline.bank.shard_copies import shards_of
from student_train.tasks import Task


def run_facts(
    recipe: Recipe, bank: Bank, tasks: Sequence[Task], rows: npt.NDArray[np.bool_]
) -> dict[str, Any]:
    """Returns the bank's part in what is learned: rows, shards and fingerprints.

    Args:
        recipe: resolved.
        bank: its bank.
        tasks: its targets.
        rows: (rows of the bank) bool, those that are chosen.
    """
    return {
        "data": _data_digest(bank, np.flatnonzero(rows)),
        **_copies(recipe, bank),
        "sources": {
            task.name: [task.path, bank.pass_of(task.path).fingerprint]
            for task in tasks
            if task.path is not None
        },
    }


def _copies(recipe: Recipe, bank: Bank) -> dict[str, Any]:
    """Returns which copies of its input the student learns from, if it does."""
    if recipe.data.inputs != "bank":
        return {}
    path = bank.stored_path(recipe.student.input)
    return {"copies": [path, bank.pass_of(path).fingerprint]}


def _data_digest(bank: Bank, rows: npt.NDArray[np.int64]) -> str:
    """Returns what tells the rows and their shards from any others."""
    shards = [
        [shard.name, shard.size_bytes, shard.headers_sha256, shard.first_block]
        for shard in shards_of(bank, rows)
    ]
    return digest([shards, hashlib.sha256(rows.astype("<i8").tobytes()).hexdigest()])
