"""What is decided once about each input when a bank is made: view 0's box, its aspect.

Looks at the headers of the first images, never at the whole dataset; an array has one
shape, so the decision holds for every sample.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable, Sequence
from itertools import islice
from statistics import median

from manifests.bank import InputEntry
from manifests.inputs import ClipInput, ImageInput, PointsInput
from manifests.job import Job
from pipeline.errors import PipelineError
from pipeline.samples.errors import SampleError
from pipeline.samples.images import image_size
from pipeline.samples.members import members_of
from pipeline.samples.point_formats import check_formats
from pipeline.samples.shards import RowSpan, ShardRow, read_samples
from pipeline.samples.views import ViewPolicy

ProbedShard = tuple[str, bool, Sequence[ShardRow]]
"""URL of a shard, whether it must be read from its start, and its rows."""

PROBED_SAMPLES = 16
PROBED_SHARDS = 16
WIDE_ASPECT = 1.5


def probe_sizes(
    shards: Iterable[ProbedShard], config: ImageInput | ClipInput
) -> list[tuple[int, int]]:
    """Returns (height, width) of the first images that have a readable header."""
    sizes: list[tuple[int, int]] = []
    wanted = frozenset(members_of(config))
    for url, sequential, all_rows in shards:
        rows = all_rows[: PROBED_SAMPLES - len(sizes)]
        end = max(row.offset + row.size for row in rows)
        span = RowSpan(0, len(rows), rows[0].offset, end, rows[0].key)
        for _, sample in read_samples(url, span, wanted, sequential):
            data = next(
                (sample.members[m] for m in members_of(config) if m in sample.members),
                None,
            )
            if data is not None:
                with contextlib.suppress(SampleError):
                    sizes.append(image_size(data))
        if len(sizes) >= PROBED_SAMPLES:
            break
    return sizes


def resolve_input(name: str, job: Job, shards: Iterable[ProbedShard]) -> InputEntry:
    """Returns the bank's entry of an input, probing images where the job says auto.

    View 0 is the whole image where the input has calibration, comes with LiDAR, or is
    wider than 1.5 to 1; else the largest centred square.

    Raises:
        PipelineError: no image among the first samples can be read.
        ManifestError: a sweep's format is not known.
    """
    config = job.inputs[name]
    data = config.model_dump(mode="json")
    if isinstance(config, PointsInput):
        check_formats(name, config)
        return InputEntry(config=data, metadata=job.metadata)
    with_points = any(other.kind == "points" for other in job.inputs.values())
    probed = list(islice((shard for shard in shards if shard[2]), PROBED_SHARDS))
    aspects = [width / height for height, width in probe_sizes(probed, config)]
    if not aspects:
        if probed:
            raise PipelineError(
                f"inputs.{name}: none of the first samples has a readable image in "
                f"member {config.member!r}; check `member` against `tar tf SHARD`"
            )
        aspects = [1.0]
    aspect = median(aspects)
    is_wide = max(aspect, 1 / aspect) > WIDE_ASPECT
    whole = bool(data.get("calibration")) or with_points or is_wide
    view0 = config.view0 if config.view0 != "auto" else ("full" if whole else "square")
    return InputEntry(
        config=data,
        metadata=job.metadata,
        view0=view0,
        aspect=1.0 if view0 == "square" else aspect,
    )


def view_policy(job: Job, inputs: dict[str, InputEntry]) -> ViewPolicy:
    """Returns how views are drawn: the job's numbers and view 0's box per image.

    Raises:
        PipelineError: colour changes are asked for and there is nothing with colour.
    """
    views = job.views
    view0 = {name: entry.view0 for name, entry in inputs.items() if entry.view0}
    if views.photometric is not None and not view0:
        raise PipelineError(
            "views.photometric changes colours of images and the job has no image or "
            "clip; leave it out"
        )
    return ViewPolicy(
        seed=views.seed,
        scale=views.scale,
        ratio=views.ratio,
        flips=job.flips,
        yaw_rad=math.radians(views.yaw_deg),
        point_scale=views.point_scale,
        view0=view0,
        photometric=views.photometric,
    )
