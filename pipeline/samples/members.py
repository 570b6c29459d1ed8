"""Which member of a sample is which input, and why one cannot be had."""

from __future__ import annotations

from collections.abc import Sequence

from manifests.inputs import ClipInput, InputConfig
from pipeline.samples.errors import SampleError
from pipeline.samples.shards import Sample


def members_of(config: InputConfig) -> tuple[str, ...]:
    """Returns the extensions an input may have, in order of preference.

    Those of a clip are all that its frames may have.
    """
    if isinstance(config, ClipInput):
        return tuple(name for names in frames_of(config) for name in names)
    names = (config.member,) if isinstance(config.member, str) else config.member
    return tuple(name.lower() for name in names)


def frames_of(config: ClipInput) -> list[tuple[str, ...]]:
    """Returns the extensions that each frame of a clip may have."""
    names = (config.member,) if isinstance(config.member, str) else config.member
    return [
        tuple(f"{number:03d}.{name.lower()}" for name in names)
        for number in range(config.frames)
    ]


def find_member(sample: Sample, names: Sequence[str]) -> bytes:
    """Returns the first of ``names`` that the sample has.

    Raises:
        SampleError: it has none, or only one that was not read; it says why.
    """
    for name in names:
        if name in sample.members:
            return sample.members[name]
    for name in names:
        if name in sample.faults:
            code, _, detail = sample.faults[name].partition(": ")
            raise SampleError(code, detail or f"member .{name}")
    raise SampleError("missing", f"no member .{' or .'.join(names)}")
