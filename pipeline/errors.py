"""The error of this package."""

from manifests.errors import TeachOnceError


class PipelineError(TeachOnceError, RuntimeError):
    """A run that cannot start or cannot go on; says what to change or to run again."""


class RunStopped(PipelineError):
    """A run that began and was stopped by the machine or the store; what it committed
    stays, the same command goes on.
    """
