"""One sample: its members decoded once for all teachers, and what they tell of the row.

Pure functions from bytes to values; a fault of the data becomes a reason, never an
exception.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from manifests.bank import InputEntry
from manifests.inputs import (
    INPUT,
    ClipInput,
    ImageInput,
    InputConfig,
    LabelConfig,
    PointsInput,
)
from pipeline.bank.rows import RowFacts
from pipeline.samples.calibration import parse_calibration, parse_time
from pipeline.samples.clips import decode_clip
from pipeline.samples.decoded import Decoded
from pipeline.samples.errors import SampleError
from pipeline.samples.images import decode_image
from pipeline.samples.labels import parse_label, parse_metadata
from pipeline.samples.members import find_member, members_of
from pipeline.samples.point_formats import check_formats
from pipeline.samples.points import Sweep, read_sweep
from pipeline.samples.shards import Sample


@dataclass(frozen=True)
class SampleSchema:
    """Which members of a sample are what: made once per engine from the bank record."""

    inputs: Mapping[str, InputConfig]
    labels: Mapping[str, LabelConfig]
    metadata: Mapping[str, str | None]

    @classmethod
    def of(
        cls, inputs: Mapping[str, InputEntry], labels: Mapping[str, Mapping[str, Any]]
    ) -> SampleSchema:
        """Returns the schema of a bank's input and label entries.

        Raises:
            ManifestError: a sweep is of a format that this machine cannot read.
        """
        configs = {name: INPUT.validate_python(i.config) for name, i in inputs.items()}
        for name, config in configs.items():
            if isinstance(config, PointsInput):
                check_formats(name, config)
        return cls(
            configs,
            {name: LabelConfig.model_validate(one) for name, one in labels.items()},
            {name: one.metadata for name, one in inputs.items()},
        )

    @property
    def wanted(self) -> frozenset[str]:
        """Every extension that is read."""
        found = {m for config in self.inputs.values() for m in members_of(config)}
        found |= {label.member.lower() for label in self.labels.values()}
        for name, config in self.inputs.items():
            metadata = self.metadata[name]
            if metadata and any(_paths(config)):
                found.add(metadata.lower())
        return frozenset(found)


@dataclass
class DecodedSample:
    """Decoded inputs by name, for those that are sound, and the row's facts."""

    values: dict[str, Decoded] = field(default_factory=dict)
    facts: RowFacts = field(default_factory=RowFacts)


def _paths(config: InputConfig) -> tuple[str | None, str | None]:
    """Returns where in the metadata an input's calibration and time lie."""
    calibration = config.calibration if isinstance(config, ImageInput) else None
    timestamp = None if isinstance(config, ClipInput) else config.timestamp
    return calibration, timestamp


def _decode_input(sample: Sample, config: InputConfig) -> Decoded:
    if isinstance(config, ClipInput):
        return decode_clip(sample, config)
    if isinstance(config, PointsInput):
        return read_sweep(sample, config)
    return decode_image(find_member(sample, members_of(config)))


class _Metadata:
    """JSON members of one sample, each parsed once."""

    def __init__(self, sample: Sample) -> None:
        self._sample = sample
        self._parsed: dict[str, object] = {}

    def read(self, extension: str) -> object:
        """Returns a member's value; raises SampleError where it has none."""
        if extension not in self._parsed:
            member = find_member(self._sample, (extension.lower(),))
            self._parsed[extension] = parse_metadata(member)
        return self._parsed[extension]


def decode_sample(
    sample: Sample, schema: SampleSchema, refused: str | None = None
) -> DecodedSample:
    """Returns a sample's inputs, labels and calibration, and why any is missing.

    Args:
        sample: members in memory.
        schema: what they are.
        refused: the reason why the index refused the row, if it did.
    """
    result = DecodedSample()
    facts = result.facts
    if refused is not None:
        facts.reasons = dict.fromkeys(schema.inputs, refused)
        facts.label_reasons = dict.fromkeys(schema.labels, refused)
        return result
    metadata = _Metadata(sample)
    for name, config in schema.inputs.items():
        try:
            value = _decode_input(sample, config)
        except SampleError as error:
            facts.reasons[name] = str(error)
        else:
            result.values[name] = value
            if isinstance(value, Sweep):
                facts.points[name] = len(value.points)
                facts.dropped[name] = value.num_dropped
            else:
                image = value[0] if isinstance(value, tuple) else value
                facts.sizes[name] = (image.height, image.width)
        extension = schema.metadata[name]
        calibration, timestamp = _paths(config)
        if calibration and extension:
            try:
                found = parse_calibration(metadata.read(extension), calibration)
                facts.intrinsics[name] = found.intrinsics
                facts.lidar2cam[name] = found.lidar2cam
            except SampleError as error:
                facts.calibration_reasons[name] = str(error)
        if timestamp and extension:
            try:
                facts.times[name] = parse_time(metadata.read(extension), timestamp)
            except SampleError as error:
                facts.time_reasons[name] = str(error)
    for name, label in schema.labels.items():
        try:
            member = find_member(sample, (label.member.lower(),))
            facts.labels[name] = parse_label(member, label)
        except SampleError as error:
            facts.label_reasons[name] = str(error)
    return result
