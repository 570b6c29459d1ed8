"""A student's folder: ``config.json`` and ``model.safetensors``, whoever wrote them.

``config.json`` is one of two documents. In timm's hub form (`train` writes it) it names
an architecture that timm builds. With a ``loader`` it names a Python file of the folder
that builds the model, and says what the model takes and gives:

```json
{
  "loader": "model.py:make_model",
  "args": {"width": 384},
  "inputs": {
    "image": {"size": [256, 704], "mean": [0.5, 0.5, 0.5], "std": [0.2, 0.2, 0.2]},
    "points": {"points": 40000, "columns": ["x", "y", "z", "intensity"]}
  },
  "outputs": {
    "tokens": {"from": "output[tokens]", "layout": "nlc", "grid": [16, 44]},
    "pooled": {"from": "output[pooled]"}
  }
}
```

The loader is called with the path of a folder that holds ``config.json``, its own file
and ``files``, and nothing else: what decides the model is what is digested. It returns
a `torch.nn.Module` without its weights, which are then loaded from
``model.safetensors``, strictly. One input is given by position, several by the names
that the job gives them.

Owns both documents and their reading. Knows no model and imports no library of models.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from manifests.document import ImageSize, Strict
from manifests.errors import ManifestError, StorageError
from manifests.loading import canonical_json, digest, parse_document
from manifests.storage import read_url

CONFIG_NAME = "config.json"
WEIGHTS_NAME = "model.safetensors"

_FILE = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")
# What timm takes from a record when it builds a model; the rest is preprocessing, or
# says where weights come from. Source: timm.models.build_model_with_cfg.
_BUILDING = ("num_classes", "global_pool", "input_size", "fixed_input_size")


class TimmFolder(BaseModel):
    """``config.json`` in timm's hub form; fields that timm adds are let be."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    architecture: str = Field(description="timm's name, without a tag")
    num_classes: int | None = Field(
        None, ge=0, description="of the classifier; omitted: pretrained_cfg's"
    )
    model_args: dict[str, Any] = Field(
        default_factory=dict, description="keyword arguments of the constructor"
    )
    pretrained_cfg: dict[str, Any] = Field(
        description="input, normalisation and licence, as timm keeps them"
    )
    license: str | None = Field(None, description="licence of the weights")
    teachonce: dict[str, Any] = Field(
        default_factory=dict, description="how it was made, in words"
    )


class FolderImage(Strict):
    """How a student takes an image, or each frame of a clip."""

    size: ImageSize = Field(description="[height, width]; a job may ask for others")
    interpolation: Literal["bilinear", "bicubic", "lanczos", "nearest"] = Field(
        "bicubic", description="filter of the one resize"
    )
    mean: tuple[float, float, float] = Field(
        (0.0, 0.0, 0.0), description="of red, green, blue where white is 1"
    )
    std: tuple[float, float, float] = Field(
        (1.0, 1.0, 1.0), description="of red, green, blue where white is 1"
    )

    @field_validator("std")
    @classmethod
    def _positive(cls, std: tuple[float, float, float]) -> tuple[float, float, float]:
        if min(std) <= 0:
            raise ValueError(f"must be three positive numbers, got {list(std)}")
        return std


class FolderPoints(Strict):
    """How a student takes a sweep."""

    points: int = Field(ge=1, description="number of points it takes")
    columns: tuple[str, ...] = Field(
        ("x", "y", "z"), min_length=1, description="columns of a point, in order"
    )
    centre: bool = Field(False, description="subtract the mean of x, y, z")
    unit_sphere: bool = Field(False, description="divide x, y, z by the radius")


class FolderInputs(Strict):
    """What a student takes, by kind of input: all cameras are taken alike."""

    image: FolderImage | None = Field(None, description="every camera image")
    clip: FolderImage | None = Field(None, description="every frame of a clip")
    points: FolderPoints | None = Field(None, description="every sweep")

    @model_validator(mode="after")
    def _agrees(self) -> FolderInputs:
        if not self.kinds:
            raise ValueError("give at least one of image, clip, points")
        if self.image and self.clip and self.image.size != self.clip.size:
            raise ValueError("image.size and clip.size must be the same")
        return self

    @property
    def kinds(self) -> tuple[str, ...]:
        """The kinds of input that it takes."""
        return tuple(name for name in type(self).model_fields if getattr(self, name))


class FolderOutput(Strict):
    """Where an output lies, in the words of a job."""

    source: str | None = Field(
        None,
        alias="from",
        description="submodule path or `output`, then [index]",
    )
    layout: Literal["nc", "nchw", "nhwc", "nlc", "ncl", "ntchw"] | None = Field(
        None, description="axes of what is taken; omitted: by rank"
    )
    grid: tuple[int, int] | tuple[int, int, int] | None = Field(
        None, description="grid of an nlc output, (y, x) or (t, y, x)"
    )


class LoaderFolder(Strict):
    """``config.json`` of a student that a Python file of its folder builds."""

    loader: str = Field(description="FILE.py:NAME, a callable in a file of the folder")
    files: tuple[str, ...] = Field(
        (), description="further files of the folder that the loader reads"
    )
    args: dict[str, Any] = Field(
        default_factory=dict, description="the loader's own; it reads them here"
    )
    inputs: FolderInputs = Field(description="what it takes, by kind of input")
    outputs: dict[str, FolderOutput] = Field(
        min_length=1, description="what it gives; a job may say otherwise"
    )
    license: str | None = Field(None, description="licence of the weights")
    teachonce: dict[str, Any] = Field(
        default_factory=dict, description="how it was made, in words"
    )

    @field_validator("loader")
    @classmethod
    def _names_a_file(cls, loader: str) -> str:
        file, _, name = loader.rpartition(":")
        if not (_FILE.fullmatch(file) and file.endswith(".py") and name.isidentifier()):
            raise ValueError(f"must be FILE.py:NAME in the folder, got {loader!r}")
        return loader

    @field_validator("files")
    @classmethod
    def _are_beside_it(cls, files: tuple[str, ...]) -> tuple[str, ...]:
        for file in files:
            if not _FILE.fullmatch(file) or file in (CONFIG_NAME, WEIGHTS_NAME):
                raise ValueError(f"must be names of files beside it, got {file!r}")
        return files

    @property
    def loader_file(self) -> str:
        """The name of the file that the loader is in."""
        return self.loader.rpartition(":")[0]


@dataclass(frozen=True)
class StudentFolder:
    """A student's folder as read.

    Attributes:
        url: of the folder, without a slash at its end.
        document: its ``config.json``.
        files: what decides the model beside its weights: bytes by name.
    """

    url: str
    document: TimmFolder | LoaderFolder
    files: dict[str, bytes]

    @property
    def digest(self) -> str:
        """The sha256 over all files but the weights."""
        return digest({name: _sha256(data) for name, data in self.files.items()})

    @property
    def identity(self) -> str:
        """What the model is, beside its weights, the loader's code and preprocessing.

        JSON text; a folder that was moved, or made by the same recipe, has the same.
        """
        if isinstance(self.document, TimmFolder):
            record = self.document.pretrained_cfg
            num_classes = self.document.num_classes
            kept = {name: record[name] for name in _BUILDING if name in record}
            if num_classes is not None:
                kept["num_classes"] = num_classes
            return canonical_json(
                {
                    "architecture": self.document.architecture,
                    "model_args": self.document.model_args,
                    **kept,
                }
            )
        fields = self.document.model_dump(
            mode="json", by_alias=True, include={"loader", "args", "outputs"}
        )
        fields["files"] = {
            name: _sha256(self.files[name]) for name in self.document.files
        }
        return canonical_json(fields)

    @contextlib.contextmanager
    def copied(self) -> Iterator[str]:
        """Yields a local folder with `files` alone, for the while."""
        with tempfile.TemporaryDirectory() as folder:
            for name, data in self.files.items():
                (Path(folder) / name).write_bytes(data)
            yield folder


def read_student_folder(url: str, where: str) -> StudentFolder:
    """Returns the folder at ``url`` without its weights.

    Args:
        url: absolute path or URL.
        where: what names it, for messages.

    Raises:
        ManifestError: there is none, or its ``config.json`` is not one of the two.
    """
    url = url.rstrip("/")
    try:
        text = read_url(f"{url}/{CONFIG_NAME}")
    except StorageError as error:
        raise ManifestError(
            f"{where} must be a student's folder, with {CONFIG_NAME} and "
            f"{WEIGHTS_NAME} ({error}); weights alone are those of a module: name its "
            "file (module:FILE:CLASS) and them (`weights:`)"
        ) from error
    place = f"{where} ({url}/{CONFIG_NAME})"
    try:
        data = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ManifestError(f"{place} must be JSON: {error}") from error
    if not isinstance(data, dict) or not {"loader", "architecture"} & data.keys():
        raise ManifestError(
            f"{place} must have `architecture` (a model of timm) or `loader` (a file "
            "of the folder); is it a student's?"
        )
    files = {CONFIG_NAME: text}
    if "loader" not in data:
        return StudentFolder(url, parse_document(TimmFolder, data, place), files)
    document = parse_document(LoaderFolder, data, place)
    for name in dict.fromkeys((document.loader_file, *document.files)):
        try:
            files[name] = read_url(f"{url}/{name}")
        except StorageError as error:
            raise ManifestError(f"{place} names {name}: {error}") from error
    return StudentFolder(url, document, files)


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
