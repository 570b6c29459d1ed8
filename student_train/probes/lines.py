"""Who answers a probe, and with what: a line per student and per output of a teacher.

Owns the choice of tokens and outputs and the form that they are brought into. A model
that cannot answer has a line too, with the reason.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from manifests.bank import is_logits
from manifests.recipe import ProbeConfig
from manifests.teacher import BevExtent
from pipeline.bank.open import Bank
from student_train.inputs import Size
from student_train.probes.bird_eye import CameraCells, MetricCells, bev_grid
from student_train.probes.features import (
    VALUES,
    AsItIs,
    Ask,
    Bools,
    CellMean,
    Form,
    Resized,
    Source,
    SplitRows,
    StudentSource,
    TeacherSource,
)
from student_train.probes.models import Role, ScoredTeacher
from student_train.probes.trained_heads import open_head


@dataclass(frozen=True, eq=False)
class Line:
    """One model in one probe; without a source, ``reason`` says why it cannot answer.

    Attributes:
        model: its name.
        role: what it is.
        features: what is taken of it.
        source: gives its tokens.
        tokens: which of them.
        form: what is made of them.
        reason: why there is no source.
    """

    model: str
    role: Role
    features: str | None = None
    source: Source | None = None
    tokens: str = VALUES
    form: Form | None = None
    reason: str | None = None

    def usable(self) -> Bools:
        """Returns (num_rows,) which rows it has features of."""
        assert self.source is not None
        usable = self.source.usable
        return (
            usable & self.form.known if isinstance(self.form, CameraCells) else usable
        )

    def ask(self, rows: SplitRows) -> Ask:
        """Returns what it is asked for."""
        assert self.form is not None
        return Ask(self.tokens, self.form, rows)


class Lines:
    """Makes the lines of probes; a model is one source for all of them.

    Attributes:
        students: sources by name.
        teachers: as the document names them.
        outputs: sources by path.
    """

    def __init__(
        self,
        bank: Bank,
        students: Mapping[str, StudentSource],
        teachers: Sequence[ScoredTeacher],
        outputs: Mapping[str, TeacherSource],
    ) -> None:
        """Takes the models."""
        self.students, self.teachers, self.outputs = students, teachers, outputs
        self._bank = bank

    def of_values(self) -> list[Line]:
        """Returns the lines of a label with a value per row: vectors.

        A teacher that has none is taken by the mean over its grid's cells.
        """
        lines = []
        for name, source in self.students.items():
            tokens = "pooled" if source.model.student.cls_dim is None else "cls"
            role = source.model.role
            lines.append(Line(name, role, tokens, source, tokens, AsItIs()))
        for teacher in self.teachers:
            held = [path for path in teacher.paths if self._may_score(teacher, path)]
            vectors = [path for path in held if self._kind(path) == "vector"]
            form: Form = AsItIs() if vectors else CellMean()
            lines += self._teacher_lines(
                teacher,
                dict.fromkeys(vectors or held, form),
                "it has no output but logits of view 0; name them to score them",
            )
        return lines

    def of_embeddings(self, path: str, seed: int) -> list[Line]:
        """Returns the lines of embeddings in the space of one output of a teacher.

        Args:
            path: of the output.
            seed: of random students' heads.

        Raises:
            TrainingError: a run's heads cannot be read.
        """
        lines = []
        for name, source in self.students.items():
            role = source.model.role
            head = open_head(source.model, path, self._bank, seed)
            if isinstance(head, str):
                lines.append(Line(name, role, reason=head))
            else:
                features = f"head {head.task.name}"
                lines.append(
                    Line(name, role, features, source.behind(head), VALUES, AsItIs())
                )
        for teacher in self.teachers:
            may = path in teacher.paths and self._may_score(teacher, path)
            lines += self._teacher_lines(
                teacher,
                {path: AsItIs()} if may else {},
                f"its outputs have no {path} in view 0",
            )
        return lines

    def of_grids(
        self, config: ProbeConfig, image: str, label_size: Size
    ) -> tuple[list[Line], Size]:
        """Returns the lines of a label on an image, and the cells they all get.

        Args:
            config: of the probe.
            image: input that the label lies on.
            label_size: of the label; there are never more cells, unless asked for.
        """
        students = {}
        for name, source in self.students.items():
            students[name] = self._why_no_patch(source, image)
        outputs: dict[str, list[str]] = {}
        for teacher in self.teachers:
            outputs[teacher.name] = [
                path
                for path in teacher.paths
                if self._may_score(teacher, path)
                and self._kind(path) == "grid"
                and self._lies_on_views(path)
                and self._bank.pass_of(path).inputs == (image,)
            ]
        shapes = [
            self.students[name].row_shape("patch")
            for name, reason in students.items()
            if reason is None
        ]
        shapes += [
            self.outputs[path].row_shape(VALUES)
            for paths in outputs.values()
            for path in paths
        ]
        grid = config.grid or (
            min([label_size[0], *(shape[0] for shape in shapes)]),
            min([label_size[1], *(shape[1] for shape in shapes)]),
        )
        form = Resized(grid)
        lines = [
            self._student_line(name, form, reason) for name, reason in students.items()
        ]
        for teacher in self.teachers:
            lines += self._teacher_lines(
                teacher,
                dict.fromkeys(outputs[teacher.name], form),
                f"it has no grid on {image} in view 0",
            )
        return lines, grid

    def of_cells(
        self, config: ProbeConfig, extent: BevExtent, grid: Size
    ) -> list[Line]:
        """Returns the lines of a bird's-eye label.

        Cells count where every camera sees them, so teachers' cameras are those that
        students look at; without students, the first.
        """
        cells = bev_grid(extent, grid)
        looks: dict[str, CameraCells] = {}

        def look(image: str) -> CameraCells:
            if image not in looks:
                heights = config.heights_m
                looks[image] = CameraCells.open(self._bank, image, cells, heights)
            return looks[image]

        lines = []
        for name, source in self.students.items():
            image = source.model.input
            reason = self._why_no_patch(source, image)
            if reason is None and not self._has_calibration(image):
                reason = f"{image} has no calibration in the bank"
            form = None if reason else look(image)
            lines.append(self._student_line(name, form, reason))
        for teacher in self.teachers:
            forms: dict[str, Form] = {}
            for path in teacher.paths:
                inputs = self._bank.pass_of(path).inputs
                if not self._may_score(teacher, path) or self._kind(path) != "grid":
                    continue
                of_teacher = self._extent(path)
                if of_teacher is not None:
                    shape = self.outputs[path].row_shape(VALUES)
                    theirs = bev_grid(of_teacher, (shape[0], shape[1]))
                    forms[path] = MetricCells.between(theirs, cells)
                elif self._lies_on_views(path) and self._may_look(inputs, looks):
                    forms[path] = look(inputs[0])
            lines += self._teacher_lines(
                teacher,
                forms,
                "it has no grid in view 0 that has an `extent` or lies on "
                f"{' or '.join(looks) or 'a camera with calibration'}",
            )
        return lines

    def _lies_on_views(self, path: str) -> bool:
        """Whether a grid covers the boxes of the views: none of a bird's-eye view, nor
        of a teacher that resized and cropped by itself.
        """
        size = self._bank.output(path).size
        is_own = self._bank.pass_of(path).has_own_geometry(size)
        return self._extent(path) is None and not is_own

    def _student_line(self, name: str, form: Form | None, reason: str | None) -> Line:
        source = self.students[name]
        if reason is not None:
            return Line(name, source.model.role, reason=reason)
        return Line(name, source.model.role, "patch", source, "patch", form)

    def _teacher_lines(
        self, teacher: ScoredTeacher, forms: Mapping[str, Form], reason: str
    ) -> list[Line]:
        if not forms:
            return [Line(teacher.name, "teacher", reason=reason)]
        return [
            Line(teacher.name, "teacher", path, self.outputs[path], VALUES, form)
            for path, form in forms.items()
        ]

    def _why_no_patch(self, source: StudentSource, image: str) -> str | None:
        if source.model.input != image:
            return f"it looks at {source.model.input}, the label lies on {image}"
        return "it has no grid" if source.model.student.patch_dim is None else None

    def _may_score(self, teacher: ScoredTeacher, path: str) -> bool:
        has_logits = is_logits(self._bank.output(path).name)
        return 0 in self._bank.views_of(path) and (teacher.is_named or not has_logits)

    def _kind(self, path: str) -> str:
        return self._bank.output(path).kind

    def _extent(self, path: str) -> BevExtent | None:
        return self._bank.output(path).extent

    def _may_look(self, inputs: Sequence[str], looks: Mapping[str, object]) -> bool:
        if len(inputs) != 1 or not self._has_calibration(inputs[0]):
            return False
        return not looks or inputs[0] in looks

    def _has_calibration(self, image: str) -> bool:
        return bool(self._bank.record.inputs[image].config.get("calibration"))
