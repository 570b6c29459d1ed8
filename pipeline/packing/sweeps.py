"""Accumulated sweeps: the last sweeps of a sequence as one, where the sensor is now.

Points of earlier sweeps are moved by what the sensor moved since, and get a further
column ``time_lag``. What moved by itself leaves a trail: that is what the column is
for.

Shape suffixes: N points, C columns.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from manifests.errors import StorageError
from manifests.loading import resolve_path
from manifests.storage import read_url
from pipeline.errors import PipelineError
from pipeline.packing.lists import ListRow, name_row, sequences_of
from pipeline.packing.sample import PackedSample, Part

TIME_LAG = "time_lag"
_MEMBER = "bin"
_RIGID = 1e-3
_ROW_KEY, _POSE = "key", "pose"

Pose = npt.NDArray[np.float64]
"""4 x 4, from the sensor's coordinates to those of the world."""


@dataclass(frozen=True)
class SweepJoin:
    """How sweeps are accumulated.

    Attributes:
        count: sweeps that become one, the latest among them.
        columns: of a row of float32 in the files; hold x, y, z in metres.
    """

    count: int
    columns: tuple[str, ...]

    def __post_init__(self) -> None:
        known = set(self.columns)
        if len(known) < len(self.columns) or not {"x", "y", "z"} <= known:
            raise PipelineError(
                f"--columns must hold x, y, z once each, got {','.join(self.columns)}"
            )
        if self.count < 1 or TIME_LAG in known:
            raise PipelineError(
                f"--sweeps must be at least 1 and make the column {TIME_LAG}, got "
                f"{self.count} of columns {','.join(self.columns)}"
            )


@dataclass(frozen=True)
class _Sweep:
    url: str
    time_s: float
    pose: Pose


@dataclass(frozen=True)
class JoinedSweeps:
    """A member that is made of several files when it is written.

    Attributes:
        sweeps: in order, the one of the sample last.
        columns: of their rows.
    """

    sweeps: tuple[_Sweep, ...]
    columns: tuple[str, ...]

    def read(self) -> bytes:
        """Returns little-endian float32 rows: the columns, then the time lag in s.

        The sample's own points come first, then older ones.

        Raises:
            StorageError: a file cannot be read, or has no whole number of rows.
        """
        now = self.sweeps[-1]
        parts = []
        for sweep in reversed(self.sweeps):
            points_NC = self._points(sweep.url)
            if sweep is not now:
                # One step between two sweeps: world coordinates may be millions of
                # metres, of which float32 would keep half a metre.
                step = np.linalg.solve(now.pose, sweep.pose)
                self._move(points_NC, step.astype(np.float64))
            lag_N1 = np.full((len(points_NC), 1), now.time_s - sweep.time_s, "<f4")
            parts.append(np.concatenate([points_NC, lag_N1], axis=1))
        return np.concatenate(parts).astype("<f4").tobytes()

    def _points(self, url: str) -> npt.NDArray[np.float32]:
        data = read_url(url)
        if len(data) % (4 * len(self.columns)):
            raise StorageError(
                f"{url} must have whole rows of {len(self.columns)} float32 "
                f"({','.join(self.columns)}), got {len(data)} bytes; give --columns"
            )
        points_NC = np.frombuffer(data, "<f4").reshape(-1, len(self.columns))
        return points_NC.astype(np.float32)

    def _move(self, points_NC: npt.NDArray[np.float32], step: Pose) -> None:
        xyz = [self.columns.index(name) for name in ("x", "y", "z")]
        # Points without a number stay so, and are dropped when they are read.
        with np.errstate(invalid="ignore"):
            moved_N3 = points_NC[:, xyz].astype(np.float64) @ step[:3, :3].T
        points_NC[:, xyz] = moved_N3 + step[:3, 3]


def join_sweeps(rows: Sequence[ListRow], join: SweepJoin) -> list[PackedSample]:
    """Returns a sample per line, whose ``bin`` holds the last sweeps of its sequence.

    Lines without a key, in a list that has keys, are there for the others alone. The
    first of a sequence have fewer sweeps. Samples are in the order of the list's
    sequences, and there of their times.

    Raises:
        PipelineError: a line lacks its sequence, time, pose or sweep.
    """
    has_keys = any(_ROW_KEY in row.fields for row in rows)
    samples: list[PackedSample] = []
    for name, timed in sequences_of(rows).items():
        before: list[_Sweep] = []
        for row, time_s in timed:
            url = row.members.get(_MEMBER)
            if not isinstance(url, str) or time_s is None:
                raise PipelineError(
                    "--sweeps needs columns clip, time, pose and bin in each line, got "
                    f"none of {'time' if time_s is None else 'bin'} ({row.where}); add "
                    "it"
                )
            before = [*before, _Sweep(url, time_s, _pose(row))][-join.count :]
            if has_keys and _ROW_KEY not in row.fields:
                continue
            members: Mapping[str, Part] = {
                **row.members,
                _MEMBER: JoinedSweeps(tuple(before), join.columns),
            }
            key = name_row(row, f"{name}/{len(samples):06d}")
            samples.append(PackedSample(key, members, row.where))
    return samples


def _pose(row: ListRow) -> Pose:
    value = row.fields.get(_POSE)
    try:
        if isinstance(value, str):
            text = value.strip()
            is_literal = text.startswith("[")
            value = json.loads(
                text if is_literal else read_url(resolve_path(text, row.base))
            )
        pose = np.asarray(value, np.float64)
    except (ValueError, TypeError, RecursionError):
        pose = np.empty(0)
    is_rigid = (
        pose.shape == (4, 4)
        and np.isfinite(pose).all()
        and (pose[3] == [0, 0, 0, 1]).all()
        and np.abs(pose[:3, :3] @ pose[:3, :3].T - np.eye(3)).max() < _RIGID
        and np.linalg.det(pose[:3, :3]) > 0
    )
    if not is_rigid:
        raise PipelineError(
            "pose must be a 4 x 4 matrix from lidar to world, a rotation and a shift, "
            f"got {str(value)[:120]} ({row.where}); mend column `pose`"
        )
    return pose
