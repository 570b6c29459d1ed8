"""Clips: frames of a sequence to samples with numbered members.

A clip is frames ``start + k * stride`` of one sequence; it reaches over no border: a
sequence is one folder, or one value of a list's column ``clip``.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from pipeline.errors import PipelineError
from pipeline.packing.sample import PackedSample, Part, safe_key

MAX_FRAMES = 1000
"""Members are numbered with three digits."""


@dataclass(frozen=True)
class Frame:
    """One frame of a sequence.

    Attributes:
        name: where it comes from, kept with the clip.
        members: by extension, without the number.
        time_s: when it was taken, seconds; None where that is not known.
        label: of the clip as its frame has it; None where there is none.
    """

    name: str
    members: Mapping[str, Part]
    time_s: float | None = None
    label: bytes | None = None


@dataclass(frozen=True)
class FrameSequence:
    """Frames in their order.

    Attributes:
        name: of the folder, or as a list calls it; '' for the folder that is packed.
        frames: at least one.
    """

    name: str
    frames: tuple[Frame, ...]


@dataclass(frozen=True)
class ClipCut:
    """How sequences are cut into clips.

    Attributes:
        frames: T, of a clip.
        stride: from one frame of a clip to the next.
        every: from the start of one clip to that of the next; T * stride where clips
            are to share no frame.
    """

    frames: int
    stride: int
    every: int

    def __post_init__(self) -> None:
        if not 1 <= self.frames <= MAX_FRAMES or min(self.stride, self.every) < 1:
            raise PipelineError(
                f"--clip must be 1 to {MAX_FRAMES}, --stride and --every at least 1, "
                f"got {self.frames}, {self.stride} and {self.every}"
            )

    @property
    def span(self) -> int:
        """Frames from the first of a clip to its last."""
        return (self.frames - 1) * self.stride + 1

    def starts(self, num_frames: int) -> range:
        """Returns where the clips of so many frames start."""
        return range(0, max(0, num_frames - self.span + 1), self.every)


def cut_clips(sequence: FrameSequence, cut: ClipCut) -> list[PackedSample]:
    """Returns the clips of a sequence; none where it has too few frames.

    A clip's key is the sequence's name and the number of its first frame there. Its
    ``json`` holds the names of its frames and, where they are known, their times since
    the first, in seconds.

    Raises:
        PipelineError: the frames of a clip have several labels.
    """
    clips = []
    for start in cut.starts(len(sequence.frames)):
        frames = sequence.frames[start : start + cut.span : cut.stride]
        members: dict[str, Part] = {
            f"{number:03d}.{extension}": part
            for number, frame in enumerate(frames)
            for extension, part in frame.members.items()
        }
        labels = {frame.label for frame in frames}
        source = f"{sequence.name or '.'} from {frames[0].name}"
        if len(labels) > 1:
            shown = ", ".join(
                repr((one or b"").decode())
                for one in sorted(labels, key=lambda label: label or b"")
            )
            raise PipelineError(
                f"cls must be the same in all frames of a clip, got {shown} "
                f"({source}); cut the sequence there with column `clip`, or leave cls "
                "out"
            )
        (label,) = labels
        if label is not None:
            members["cls"] = label
        members["json"] = _facts(frames)
        key = safe_key(f"{sequence.name}/{start:06d}")
        clips.append(PackedSample(key, members, source))
    return clips


def _facts(frames: Sequence[Frame]) -> bytes:
    facts: dict[str, object] = {"frames": [frame.name for frame in frames]}
    times = [frame.time_s for frame in frames if frame.time_s is not None]
    if len(times) == len(frames):
        # To the nanosecond: finer digits are those of the subtraction.
        facts["times_s"] = [round(time - times[0], 9) for time in times]
    return json.dumps(facts, ensure_ascii=False).encode()
