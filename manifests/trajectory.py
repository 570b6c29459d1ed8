"""What a trajectory probe asks for: where a vehicle will be, and its state now.

Owns the fields; what the bank's labels hold is ``student_train``'s to check.
"""

from __future__ import annotations

from pydantic import Field, model_validator

from manifests.document import Strict


class TrajectoryConfig(Strict):
    """Waypoints of the vehicle itself, from number labels of the bank, open loop.

    All are names of the bank's labels. x is ahead and y to the left, in metres, in the
    vehicle's frame at the time of the sample.
    """

    waypoints: list[tuple[str, str]] = Field(
        min_length=1, description="labels of x and y of each, the nearest first"
    )
    step_s: float = Field(
        gt=0, description="seconds to the first waypoint, and from each to the next"
    )
    speed: str = Field(description="label of the speed ahead, m/s")
    yaw_rate: str | None = Field(
        None, description="label of the turn to the left, rad/s; omitted: taken as 0"
    )
    ego: list[str] = Field(
        default_factory=list,
        description="further labels of the state: acceleration, steering angle, ...",
    )
    turn_m: float = Field(
        2.0,
        gt=0,
        description="a row is not straight whose last waypoint lies so many metres or "
        "more to a side",
    )
    sequence: str | None = Field(
        None,
        description="label of the drive that a row is of: intervals are over drives; "
        "omitted: none are given",
    )

    @model_validator(mode="after")
    def _names_each_once(self) -> TrajectoryConfig:
        names = [name for pair in self.waypoints for name in pair]
        twice = sorted({one for one in names if names.count(one) > 1})
        if twice:
            raise ValueError(f"`waypoints` must name each label once, got {twice[0]}")
        if told := sorted(set(names) & set(self.state)):
            raise ValueError(
                f"the state must tell nothing of the future, got {told[0]} in both"
            )
        return self

    @property
    def state(self) -> list[str]:
        """The labels of the vehicle's state, in order."""
        turn = [] if self.yaw_rate is None else [self.yaw_rate]
        return list(dict.fromkeys([self.speed, *turn, *self.ego]))
