"""The floor of ``compression.py``: what storing costs a loss, without any student."""

from __future__ import annotations

import statistics
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from compression_arms import LOSS, PATH, PRESETS, REFERENCE, SHARDS, recipe_of
from safetensors.torch import load_file

from manifests.recipe import RowsConfig
from manifests.teacher import OutputConfig
from pipeline.bank.encodings import make_encoding
from pipeline.bank.objects import decode_object, encode_object
from pipeline.bank.open import Bank
from student_train import BankDataset, Reading
from student_train.losses import LOSSES, reduce, valid_images
from student_train.students import make_student
from student_train.targets import Normaliser

Floats = npt.NDArray[np.float32]


def losses_of(prediction: torch.Tensor, target: torch.Tensor) -> dict[str, float]:
    """Returns the mean of each loss, and of the recipe's own, over rows of a grid.

    A block's rows behind the end of its shard are missing in both, and left out.
    """
    mask = ~target.isnan().any(-1)
    found = {}
    for name in ("cosine", "smooth_l1", "mse"):
        per_row = LOSSES[name](prediction, target, mask)
        found[name] = float(reduce(per_row, valid_images(mask)))
    found["recipe"] = sum(weight * found[name] for name, weight in LOSS.items())
    return found


def stored_as(preset: str, values: Floats) -> tuple[Floats, float]:
    """Returns a block as a preset gives it back, and its bytes per value."""
    encoding = make_encoding(
        OutputConfig.model_validate({"encoding": preset}),
        name="patch",
        kind="grid",
        shape=values.shape[1:],
        dtype="float32",
    )
    has_values = np.asarray(np.isfinite(values).all(axis=(1, 2, 3)), np.bool_)
    encoded = encoding.encode(values, has_values)
    size, decoded = 0, {}
    specs = encoding.arrays("resnet56/image/32x32/patch", len(values))
    for suffix, spec in zip(encoding.suffixes, specs, strict=True):
        data = b"".join(encode_object(encoded.arrays[suffix], spec, len(values)))
        size += len(data)
        decoded[suffix] = decode_object(data, spec)
    return encoding.decode(decoded), size / values.size


def student_losses(bank: Bank, run: Path, rows: RowsConfig) -> dict[str, float]:
    """Returns the losses that a trained student is left with, on rows it has seen."""
    student_config = recipe_of(bank.url, REFERENCE, 0, run).student
    weights = str(run / "student" / "model.safetensors")
    student_config = student_config.model_copy(update={"weights": weights})
    student = make_student(student_config, (32, 32), seed=0).eval()
    head = load_file(run / "heads.safetensors")
    reading = Reading(
        inputs={"image": (32, 32)},
        targets={"patch": f"{PATH}_{REFERENCE}"},
        normalise=frozenset({"patch"}),
    )
    dataset = BankDataset(
        bank, reading, batch=250, rows=rows, shuffle=False, keep_rest=True
    )
    predictions, targets = [], []
    with torch.no_grad():
        for batch in dataset.batches(0):
            grid = student(batch.inputs["image"]).patch
            weight, bias = head["patch.linear.weight"], head["patch.linear.bias"]
            predictions.append(grid @ weight.T + bias)
            targets.append(batch.targets["patch"].values())
    return losses_of(torch.cat(predictions), torch.cat(targets))


def floor_table(bank: Bank, run: Path, naive: list[str]) -> list[str]:
    """Returns lines of Markdown: what storing alone costs, without any student."""
    statistics_of = bank.statistics(f"{PATH}_{REFERENCE}")
    normalise = Normaliser.of(statistics_of["mean"], statistics_of["variance"])
    (shard,) = (one for one in bank.record.shards if one.name == SHARDS[0])
    exact = [bank.read(f"{PATH}_{REFERENCE}", one) for one in shard.block_numbers]
    target = normalise(torch.from_numpy(np.concatenate(exact)))
    left = student_losses(bank, run, RowsConfig(shards=[SHARDS[0]]))
    lines = [
        "| stored as | bytes a value | recipe's loss | share of the student's | "
        "1 - cosine | smooth L1 | MSE | its share |",
        "| --- " * 8 + "|",
    ]
    for name in (*PRESETS, *naive):
        if name in naive:
            path = f"{PATH}_{name}"
            found = [bank.read(path, one) for one in shard.block_numbers]
            size = "|"
        else:
            pairs = [stored_as(name, values) for values in exact]
            found = [values for values, _ in pairs]
            size = f"{statistics.fmean(one for _, one in pairs):.3f} |"
        loss = losses_of(normalise(torch.from_numpy(np.concatenate(found))), target)
        lines.append(
            f"| `{name}` | {size} {loss['recipe']:.1e} | "
            f"{100 * loss['recipe'] / left['recipe']:.3g} % | {loss['cosine']:.1e} | "
            f"{loss['smooth_l1']:.1e} | {loss['mse']:.1e} | "
            f"{100 * loss['mse'] / left['mse']:.3g} % |"
        )
    lines.append(
        f"| *a trained student* | | {left['recipe']:.3f} | | {left['cosine']:.3f} | "
        f"{left['smooth_l1']:.3f} | {left['mse']:.3f} | |"
    )
    return lines
