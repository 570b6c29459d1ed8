"""Features of a model on rows: a student's by running it, a teacher's from the bank.

One pass over a model's rows serves all probes: each asks for its own form of the
tokens. What is asked is held in memory, float32. Everything is of view 0, in the bank's
order, in batches that depend on the rows alone.

Shape suffixes: B rows, H and W grid, C channels.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from pipeline.bank.open import Bank
from student_train.dataset import BankDataset
from student_train.features import StudentFeatures
from student_train.grids import resize_grid
from student_train.inputs import Size
from student_train.probes.models import ScoredStudent
from student_train.reading import Reading
from student_train.targets import TargetSource

Bools = npt.NDArray[np.bool_]
Int64s = npt.NDArray[np.int64]
Shape = tuple[int, ...]
SplitRows = Mapping[str, Int64s]
"""Rows of the bank by split, ascending."""

VALUES = "values"
"""Name of the only tokens of a teacher, and of a student behind a head."""


class Source(Protocol):
    """A model that gives tokens of rows."""

    @property
    def usable(self) -> Bools:
        """(num_rows,) which rows it has features of."""
        ...

    def row_shape(self, tokens: str) -> Shape:
        """Returns the shape of some tokens of one row."""
        ...

    def batches(self, rows: Bools) -> Iterator[tuple[Int64s, Mapping[str, Tensor]]]:
        """Yields rows, ascending, and their tokens by name, (B, *row_shape)."""
        ...


class Form(Protocol):
    """What a probe makes of tokens, row by row."""

    def row_shape(self, shape: Shape) -> Shape:
        """Returns the shape of one row's result."""
        ...

    def __call__(self, values: Tensor, rows: Int64s) -> Tensor:
        """Returns the result of (B, *shape) tokens of rows of the bank."""
        ...


@dataclass(frozen=True)
class AsItIs:
    """Vectors, unchanged."""

    def row_shape(self, shape: Shape) -> Shape:
        """Returns the shape it is given."""
        return shape

    def __call__(self, values: Tensor, rows: Int64s) -> Tensor:
        """Returns (B, C) as they are."""
        return values


@dataclass(frozen=True)
class CellMean:
    """The mean over a grid's cells: of a model that has no vector."""

    def row_shape(self, shape: Shape) -> Shape:
        """Returns (C,)."""
        return shape[-1:]

    def __call__(self, values: Tensor, rows: Int64s) -> Tensor:
        """Returns (B, C) of (B, H, W, C)."""
        return values.float().mean((1, 2))


@dataclass(frozen=True)
class Resized:
    """A grid on other cells of the same view, antialiased bilinear.

    Attributes:
        grid: rows and columns.
    """

    grid: Size

    def row_shape(self, shape: Shape) -> Shape:
        """Returns (rows, columns, C)."""
        return *self.grid, shape[-1]

    def __call__(self, values: Tensor, rows: Int64s) -> Tensor:
        """Returns (B, rows, columns, C) float32 of (B, H, W, C)."""
        if tuple(values.shape[1:3]) == self.grid:
            return values
        return resize_grid(values, self.grid, "bilinear")


@dataclass(frozen=True, eq=False)
class Ask:
    """What one probe wants of a model.

    Attributes:
        tokens: which.
        form: what is made of them.
        rows: of which rows.
    """

    tokens: str
    form: Form
    rows: SplitRows

    def same_as(self, other: Ask) -> bool:
        """Returns whether another ask wants the same of the same rows."""
        return (
            self.tokens == other.tokens
            and self.form == other.form
            and self.rows.keys() == other.rows.keys()
            and all(
                np.array_equal(rows, other.rows[split])
                for split, rows in self.rows.items()
            )
        )

    def row_shape(self, source: Source) -> Shape:
        """Returns the shape of one row's features."""
        return self.form.row_shape(source.row_shape(self.tokens))

    def size_bytes(self, source: Source) -> int:
        """Returns the memory that its features take."""
        num_rows = sum(len(rows) for rows in self.rows.values())
        return 4 * num_rows * math.prod(self.row_shape(source))


class Head(Protocol):
    """What a student's features are looked at through."""

    @property
    def width(self) -> int:
        """Channels of what it gives."""
        ...

    @property
    def needs_layers(self) -> bool:
        """Whether it looks at the student's layers."""
        ...

    def to(self, device: torch.device) -> object:
        """Moves it to a device."""
        ...

    def __call__(self, features: StudentFeatures, size: Size) -> Tensor:
        """Returns (B, width) of features at an input size."""
        ...


class StudentSource:
    """Features of a student, in eval mode and float32, at its own input size.

    Attributes:
        model: the student.
        head: if any, `VALUES` is all that there is: what it makes of the student.
    """

    def __init__(
        self,
        model: ScoredStudent,
        bank: Bank,
        shards: Sequence[str] | None,
        batch: int,
        device: torch.device,
        stored: bool = False,
        head: Head | None = None,
    ) -> None:
        """Keeps what it works with; nothing is read yet."""
        self.model, self.head = model, head
        self._bank, self._shards, self._stored = bank, shards, stored
        self._batch, self._device = batch, device

    def behind(self, head: Head) -> StudentSource:
        """Returns the same student, looked at through a head."""
        return StudentSource(
            self.model,
            self._bank,
            self._shards,
            self._batch,
            self._device,
            self._stored,
            head,
        )

    @cached_property
    def usable(self) -> Bools:
        """Which rows have its image."""
        if self._stored:
            return self._bank.validity(self._bank.stored_path(self.model.input))
        return has_image(self._bank, self.model.input)

    def row_shape(self, tokens: str) -> Shape:
        """Returns the shape of ``cls``, ``pooled`` or ``patch``; or of the head's."""
        if self.head is not None:
            return (self.head.width,)
        student = self.model.student
        width = int(getattr(student, f"{tokens}_dim"))
        return (
            (*student.grid_of(student.size), width) if tokens == "patch" else (width,)
        )

    def batches(self, rows: Bools) -> Iterator[tuple[Int64s, Mapping[str, Tensor]]]:
        """Yields the rows' tokens, those that the student has."""
        name = self.model.input
        dataset = BankDataset(
            self._bank,
            Reading(
                inputs={name: self.model.student.size},
                interpolation=self.model.config.interpolation,
                stored=self._stored,
            ),
            batch=self._batch,
            rows=rows,
            shards=self._shards,
            view=0,
            shuffle=False,
            keep_rest=True,
        )
        student = self.model.student.to(self._device).eval()
        if self.head is not None:
            self.head.to(self._device)
        try:
            for batch in dataset:
                with torch.inference_mode():
                    tokens = self._tokens(batch.inputs[name].to(self._device))
                yield batch.rows, tokens
        finally:
            student.to("cpu")

    def _tokens(self, pixels: Tensor) -> dict[str, Tensor]:
        if self.head is not None:
            layers = self.head.needs_layers
            features = self.model.student(pixels, layers=layers)
            return {VALUES: self.head(features, (pixels.shape[1], pixels.shape[2]))}
        found = self.model.student(pixels)
        tokens = {"pooled": found.pooled, "cls": found.cls, "patch": found.patch}
        return {name: one for name, one in tokens.items() if one is not None}


class TeacherSource:
    """Features of one output of a teacher, as the bank holds them, not normalised.

    Attributes:
        path: of the output.
    """

    def __init__(self, path: str, bank: Bank, batch: int, device: torch.device) -> None:
        """Keeps what it works with; nothing is read yet."""
        self.path = path
        self._bank, self._batch, self._device = bank, batch, device
        self._source = TargetSource.open(bank, path, normalise=False)

    @cached_property
    def usable(self) -> Bools:
        """Which rows are valid."""
        return self._bank.validity(self.path)

    def row_shape(self, tokens: str) -> Shape:
        """Returns the output's shape."""
        return self._source.row_shape

    def batches(self, rows: Bools) -> Iterator[tuple[Int64s, Mapping[str, Tensor]]]:
        """Yields the rows' values, decoded on the device."""
        dataset = BankDataset(
            self._bank,
            Reading(targets={VALUES: self.path}, normalise=frozenset()),
            batch=self._batch,
            rows=rows,
            view=0,
            shuffle=False,
            keep_rest=True,
        )
        for batch in dataset:
            target = batch.targets[VALUES].to(self._device)
            yield batch.rows, {VALUES: target.values()}


def has_image(bank: Bank, name: str) -> Bools:
    """Returns (num_rows,) which rows' image of an input could be decoded."""
    sizes = bank.whole_array(f"views/{name}_size")
    return np.asarray((sizes > 0).all(axis=1), np.bool_)


def collect(
    source: Source,
    asks: Sequence[Ask],
    on_rows: Callable[[int, int], object] = lambda done, total: None,
) -> list[dict[str, Tensor]]:
    """Returns what each ask wants, by split: (rows, *row_shape) float32 on the CPU.

    Args:
        source: the model; it is run, or read, once over all rows asked.
        asks: what is wanted; at least one row in all.
        on_rows: told how many rows are done, of how many.

    Raises:
        TrainingError: a sample cannot be read.
        BankError: a block is missing or damaged.
    """
    rows = np.zeros(len(source.usable), np.bool_)
    for ask in asks:
        for wanted in ask.rows.values():
            rows[wanted] = True
    found = [
        {
            split: torch.empty((len(wanted), *ask.row_shape(source)))
            for split, wanted in ask.rows.items()
        }
        for ask in asks
    ]
    done, total = 0, int(rows.sum())
    for numbers, tokens in source.batches(rows):
        for ask, arrays in zip(asks, found, strict=True):
            for split, wanted in ask.rows.items():
                here = np.flatnonzero(np.isin(numbers, wanted, assume_unique=True))
                if len(here):
                    values = tokens[ask.tokens][torch.from_numpy(here)]
                    places = torch.from_numpy(np.searchsorted(wanted, numbers[here]))
                    made = ask.form(values, numbers[here])
                    arrays[split][places] = made.to("cpu", torch.float32)
        done += len(numbers)
        on_rows(done, total)
    return found
