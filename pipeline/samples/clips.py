"""Clips: numbered frames of one sample to images of one size."""

from __future__ import annotations

from manifests.inputs import ClipInput
from pipeline.samples.decoded import Clip
from pipeline.samples.errors import SampleError
from pipeline.samples.images import decode_image
from pipeline.samples.members import find_member, frames_of
from pipeline.samples.shards import Sample


def decode_clip(sample: Sample, config: ClipInput) -> Clip:
    """Returns the frames of a clip, upright RGB images of one size.

    Raises:
        SampleError: a frame is missing or cannot be decoded (the detail names it), or
            ``frame_sizes``: they are not of one size.
    """
    frames = []
    for number, members in enumerate(frames_of(config)):
        try:
            frames.append(decode_image(find_member(sample, members)))
        except SampleError as error:
            raise SampleError(
                error.reason, f"frame {number}: {error.detail}"
            ) from error
    sizes = {frame.size for frame in frames}
    if len(sizes) > 1:
        shown = ", ".join(f"{width} x {height}" for width, height in sorted(sizes))
        raise SampleError("frame_sizes", f"frames must be of one size, got {shown}")
    return tuple(frames)
