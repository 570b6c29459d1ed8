"""A trained student as a folder that timm loads in one line.

``timm.create_model("local-dir:FOLDER", pretrained=True)`` gives the same model with the
same weights, bit for bit; that is tried before the folder appears under its name. Owns
the folder's files (``config.json`` as timm reads it, ``model.safetensors``,
``README.md``), not what is in a student.
"""

from __future__ import annotations

import contextlib
import copy
import json
import shutil
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import timm
import torch
from torch import Tensor, nn

from manifests.recipe import StudentConfig
from student_train.errors import TrainingError, reason_of
from student_train.students import Student, seeded

CONFIG_NAME = "config.json"
WEIGHTS_NAME = "model.safetensors"
README_NAME = "README.md"

# What timm needs to build the model again; the rest of its record describes weights
# that these are not.
_KEPT_CFG = (
    "fixed_input_size",
    "min_input_size",
    "first_conv",
    "classifier",
    "global_pool",
)


def export_student(
    student: Student,
    config: StudentConfig,
    folder: str | Path,
    facts: Mapping[str, Any],
) -> Path:
    """Returns the folder, which is whole and loads as the student it came from.

    Args:
        student: on any device; it is not changed.
        config: the recipe's ``student``.
        folder: local; an earlier export there is replaced.
        facts: what to say of its making, by name: bank, recipe's digest, steps.

    Raises:
        TrainingError: something else is in the folder, or timm does not give the same
            model back.
    """
    target = Path(folder)
    taken = target.exists() and not (target / WEIGHTS_NAME).is_file()
    if taken and not (target.is_dir() and not any(target.iterdir())):
        raise TrainingError(
            f"a student must be exported to a folder of its own, got {target}, which "
            "holds something else; name another"
        )
    state = {
        # timm and safetensors want plain memory that no two tensors share.
        key: value.detach().cpu().clone(memory_format=torch.contiguous_format)
        for key, value in student.model.state_dict().items()
    }
    with _appearing(target) as made:
        safetensors.torch.save_file(state, made / WEIGHTS_NAME, {"format": "pt"})
        if student.architecture is not None:
            document = _timm_config(student, config, facts)
            text = json.dumps(document, indent=2, default=str)
            (made / CONFIG_NAME).write_text(text + "\n", encoding="utf-8")
            _check(student, state, made)
        (made / README_NAME).write_text(
            _readme(student, config, target, facts), encoding="utf-8"
        )
    return target


def load_student(folder: str | Path) -> Student:
    """Returns an exported student, on the CPU, in train mode.

    Raises:
        TrainingError: a file is missing, or timm cannot load the folder.
    """
    place = Path(folder)
    if not place.is_dir():
        raise TrainingError(
            f"a student must be a folder that an export made, got {place}, which is "
            f"{'a file' if place.exists() else 'not there'}; correct the path"
        )
    missing = [
        name for name in (CONFIG_NAME, WEIGHTS_NAME) if not (place / name).is_file()
    ]
    if missing == [CONFIG_NAME]:
        raise TrainingError(
            f"a student's folder must have {CONFIG_NAME}, got weights alone ({place}); "
            "those of a module: student are loaded by `student.weights: "
            f"{place / WEIGHTS_NAME}` beside its model and args"
        )
    if missing:
        raise TrainingError(
            f"a student's folder must have {CONFIG_NAME} and {WEIGHTS_NAME}, got none "
            f"of {', '.join(missing)} ({place}); export it again"
        )
    model = _load(place)
    try:
        document = json.loads((place / CONFIG_NAME).read_text(encoding="utf-8"))
        record = document["pretrained_cfg"]
        height, width = record["input_size"][1:]
        return Student(
            model,
            native_size=(height, width),
            size=(height, width),
            mean=record["mean"],
            std=record["std"],
            architecture=document["architecture"],
            args=document.get("model_args", {}),
        )
    except (KeyError, ValueError, TypeError) as error:
        raise TrainingError(
            f"{place / CONFIG_NAME} must say architecture, pretrained_cfg.input_size, "
            f"mean and std, got {reason_of(error)}; export it again"
        ) from error


def _timm_config(
    student: Student, config: StudentConfig, facts: Mapping[str, Any]
) -> dict[str, Any]:
    model: Any = student.model
    own = model.pretrained_cfg
    kept = {key: own[key] for key in _KEPT_CFG if own.get(key) is not None}
    if student.args.get("dynamic_img_size"):
        kept["fixed_input_size"] = False
    return {
        "architecture": student.architecture,
        "num_classes": 0,
        "num_features": model.num_features,
        "pretrained_cfg": {
            **kept,
            "custom_load": False,
            "input_size": [3, *student.size],
            "interpolation": config.interpolation,
            # A view is resized as a whole: nothing is cropped from it.
            "crop_pct": 1.0,
            "crop_mode": "center",
            "mean": list(student.mean),
            "std": list(student.std),
            "num_classes": 0,
        },
        "model_args": student.args,
        **({"license": facts["license"]} if "license" in facts else {}),
        "teachonce": dict(facts),
    }


def _load(folder: Path) -> nn.Module:
    try:
        with seeded(0):
            model: nn.Module = timm.create_model(f"local-dir:{folder}", pretrained=True)
    # Whatever is wrong with the files, timm has no error of its own for it.
    except Exception as error:
        raise TrainingError(
            f"a student's folder must be one that timm {timm.__version__} loads, got "
            f"{reason_of(error)} ({folder}); export it again, with the timm it was "
            "trained with"
        ) from error
    return model


def _check(student: Student, state: Mapping[str, Tensor], folder: Path) -> None:
    """Checks that timm gives the model back: every tensor, and what it computes."""
    loaded: Any = _load(folder).eval()
    found = loaded.state_dict()
    wrong = [
        key
        for key in {**state, **found}
        if key not in state or key not in found or not _same(found[key], state[key])
    ]
    if not wrong:
        own: Any = copy.deepcopy(student.model).cpu().eval()
        # Other kernels, other last digits.
        own.to(memory_format=torch.contiguous_format)
        generator = torch.Generator().manual_seed(0)
        image_BCHW = torch.randn(1, 3, *student.size, generator=generator)
        with torch.inference_mode():
            if not torch.allclose(
                loaded(image_BCHW),
                own(image_BCHW),
                rtol=1e-4,
                atol=1e-6,
                equal_nan=True,
            ):
                wrong = ["what it computes"]
    if wrong:
        raise TrainingError(
            f"a student must come back from timm {timm.__version__} as it went, got "
            f"{', '.join(wrong[:5])} different; export with `student.args` that timm "
            "keeps, or save its weights alone"
        )


def _same(left: Tensor, right: Tensor) -> bool:
    if left.dtype != right.dtype or left.shape != right.shape:
        return False
    # A diverged student is a student: what it is worth is not the export's business.
    return bool(((left == right) | (left.isnan() & right.isnan())).all())


@contextlib.contextmanager
def _appearing(target: Path) -> Iterator[Path]:
    """Yields a new folder that becomes ``target`` when all went well, else nothing."""
    target.parent.mkdir(parents=True, exist_ok=True)
    name = f".{target.name}.{uuid.uuid4().hex}"
    made, replaced = target.parent / name, target.parent / f"{name}.old"
    made.mkdir()
    try:
        yield made
        # A folder cannot be renamed over another that is not empty.
        if target.exists():
            target.rename(replaced)
        try:
            made.rename(target)
        except OSError:
            if replaced.exists():
                replaced.rename(target)
            raise
    finally:
        shutil.rmtree(made, ignore_errors=True)
        shutil.rmtree(replaced, ignore_errors=True)


def _readme(
    student: Student, config: StudentConfig, target: Path, facts: Mapping[str, Any]
) -> str:
    height, width = student.size
    rows = {
        "model": config.model,
        "input": f"{height} x {width} (height x width), {config.interpolation}, RGB",
        "mean, std": f"{list(student.mean)}, {list(student.std)} for pixels in 0..1",
        **facts,
    }
    lines = [f"# {target.name}", "", "A student trained from a feature bank.", ""]
    if student.architecture is not None:
        lines += [
            "```python",
            f'model = timm.create_model("local-dir:{target}", pretrained=True).eval()',
            "```",
            "",
            "gives the encoder, without a classifier: `model(image)` is its pooled "
            "vector, `model.forward_features(image)` its tokens or map.",
        ]
    else:
        lines += [
            f"`{WEIGHTS_NAME}` holds the weights alone: the model is a class of a file "
            "of yours, which timm does not know and cannot build. Build it from that "
            "file and load them, or name them in a recipe:",
            "",
            "```yaml",
            "student:",
            f"  model: {config.model}",
            f"  args: {json.dumps(student.args, default=str)}",
            f"  weights: {target / WEIGHTS_NAME}",
            "```",
        ]
    table = [f"| {name} | {value} |" for name, value in rows.items()]
    return "\n".join([*lines, "", "| what | value |", "| --- | --- |", *table, ""])
