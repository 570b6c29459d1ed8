"""Recipes and probes from YAML, every path absolute, from the folder of the YAML."""

from __future__ import annotations

from collections.abc import Sequence

from manifests.errors import ManifestError
from manifests.loading import (
    folder_of,
    is_weights_file,
    load_yaml,
    resolve_path,
    resolve_patterns,
)
from manifests.recipe import (
    DataConfig,
    Probe,
    Recipe,
    RowsConfig,
    SplitsConfig,
    StudentConfig,
)


def load_recipe(path: str, overrides: Sequence[str] = ()) -> Recipe:
    """Returns the recipe at ``path`` with overrides applied and every path absolute.

    Raises:
        ManifestError: the file is missing, is not YAML or has a wrong field.
    """
    recipe = load_yaml(Recipe, path, overrides, "recipe")
    base = folder_of(path)
    return recipe.model_copy(
        update={
            "run": resolve_path(recipe.run, base),
            "banks": _resolve_all(recipe.banks, base),
            "data": _resolve_data(recipe.data, base),
            "student": resolve_student(recipe.student, base),
        }
    )


def load_probe(path: str, overrides: Sequence[str] = ()) -> Probe:
    """Returns the probe at ``path`` with overrides applied and every path absolute.

    Raises:
        ManifestError: the file is missing, is not YAML or has a wrong field.
    """
    probe = load_yaml(Probe, path, overrides, "probe")
    base = folder_of(path)
    splits = SplitsConfig(
        fit=_resolve_rows(probe.splits.fit, base),
        choose=_resolve_rows(probe.splits.choose, base),
        test=_resolve_rows(probe.splits.test, base),
    )
    result = probe.result and resolve_path(probe.result, base)
    return probe.model_copy(
        update={
            "banks": _resolve_all(probe.banks, base),
            "data": _resolve_data(probe.data, base),
            "students": _resolve_all(probe.students, base),
            "splits": splits,
            "result": result,
        }
    )


def resolve_student(config: StudentConfig, base: str) -> StudentConfig:
    """Returns a student whose file of code and of weights have absolute paths.

    Raises:
        ManifestError: a ``module:`` student that names no class.
    """
    changes = {}
    if config.weights is not None and is_weights_file(config.weights):
        changes["weights"] = resolve_path(config.weights, base)
    family, _, name = config.model.partition(":")
    if family == "module":
        file, colon, attribute = name.rpartition(":")
        if not colon:
            raise ManifestError(
                f"student.model must be module:FILE.py:CLASS, got {config.model!r}"
            )
        changes["model"] = f"module:{resolve_path(file, base)}:{attribute}"
    return config.model_copy(update=changes)


def _resolve_all(paths: dict[str, str], base: str) -> dict[str, str]:
    return {name: resolve_path(path, base) for name, path in paths.items()}


def _resolve_rows(rows: RowsConfig, base: str) -> RowsConfig:
    if rows.keys is None:
        return rows
    return rows.model_copy(update={"keys": resolve_path(rows.keys, base)})


def _resolve_data(data: DataConfig, base: str) -> DataConfig:
    shards = data.shards and resolve_patterns(data.shards, base)
    return data.model_copy(
        update={"shards": shards, "rows": _resolve_rows(data.rows, base)}
    )
