"""The errors of this package: faults of the data, which become reasons, not crashes."""

from manifests.errors import TeachOnceError


class SampleError(TeachOnceError, ValueError):
    """One sample, input or label that cannot be used.

    Attributes:
        reason: a short stable code, such as ``missing`` or ``undecodable``; counted.
        detail: what exactly, for people.
    """

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason = reason
        self.detail = detail


class ShardError(TeachOnceError, ValueError):
    """A shard whose bytes are not what the index says, or that cannot be read."""
