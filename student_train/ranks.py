"""The processes that train one student together: who they are and what they agree on.

``torchrun`` starts them and says so in the environment, as other launchers do. Owns
joining, and that all end when one fails; what a rank reads is `order`'s, what it sums
up is `learning`'s. Without a launcher there is one rank and nothing here costs a thing.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from manifests.errors import TeachOnceError
from student_train.errors import TrainingError

_Value = TypeVar("_Value")

# What a launcher tells each process; torch itself reads where they meet.
_TOLD = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
# How gloo and NCCL say that the other end of a connection is gone.
_GONE = ("closed by peer", "reset by peer", "remote process exited", "broken pipe")


@dataclass(frozen=True)
class Ranks:
    """This process among those that train together.

    Attributes:
        number: of this one, from 0 on; 0 writes the run's folder.
        count: of all of them.
        local: number among those of this machine.
        local_count: of those.
    """

    number: int = 0
    count: int = 1
    local: int = 0
    local_count: int = 1

    @property
    def is_first(self) -> bool:
        """Whether this one writes."""
        return self.number == 0

    @property
    def is_alone(self) -> bool:
        """Whether there is no other."""
        return self.count == 1

    @contextlib.contextmanager
    def as_one(self) -> Iterator[None]:
        """Lets all fail when one does: every rank raises what the first failed with.

        All ranks must come here, and must not wait for each other within.

        Raises:
            TrainingError: another rank failed.
        """
        if self.is_alone:
            yield
            return
        error: Exception | None = None
        try:
            yield
        except Exception as caught:
            error = caught
        if self.any(error is not None):
            messages = self.gather(None if error is None else str(error) or repr(error))
            if error is not None:
                raise error
            number = next(n for n, one in enumerate(messages) if one is not None)
            raise TrainingError(f"rank {number} of {self.count}: {messages[number]}")

    def any(self, value: bool) -> bool:
        """Returns whether it holds on any rank."""
        if self.is_alone:
            return value
        flag = torch.tensor(int(value))
        dist.all_reduce(flag, dist.ReduceOp.MAX)
        return bool(flag)

    def gather(self, value: _Value) -> list[_Value]:
        """Returns every rank's value, in their order."""
        if self.is_alone:
            return [value]
        found: list[Any] = [None] * self.count
        dist.all_gather_object(found, value)
        return found

    def copy_first(self, tensor: Tensor) -> None:
        """Overwrites a tensor by the first rank's."""
        if not self.is_alone:
            # NCCL takes no tensor whose channels lie last.
            plain = tensor.contiguous()
            dist.broadcast(plain, 0)
            tensor.copy_(plain)

    def mean(self, tensor: Tensor) -> Tensor:
        """Returns the mean over ranks, on the tensor's device; not differentiable."""
        if self.is_alone:
            return tensor
        total = tensor.detach().clone()
        dist.all_reduce(total)
        return total / self.count


@contextlib.contextmanager
def joined(device: str) -> Iterator[Ranks]:
    """Joins the ranks that a launcher started; one alone where there was none.

    Args:
        device: the recipe's ``engine.device``.

    Raises:
        TrainingError: the launcher's word is not whole, or another rank is gone.
    """
    if not {"RANK", "WORLD_SIZE"} & os.environ.keys():
        yield Ranks()
        return
    ranks = _told()
    is_cpu = device == "cpu" or not torch.cuda.is_available()
    # What ranks tell each other besides gradients stays off the accelerator.
    dist.init_process_group("gloo" if is_cpu else "cpu:gloo,cuda:nccl")
    try:
        yield ranks
    except TeachOnceError:
        raise
    except RuntimeError as error:
        if any(text in str(error).lower() for text in _GONE):
            raise TrainingError(
                f"rank {ranks.number} of {ranks.count} must have all others, but one "
                "is gone; its own message says why, the same command goes on from the "
                "last checkpoint"
            ) from error
        raise
    # Only when all is well: taking leave may wait for a rank that is gone.
    dist.destroy_process_group()


def _told() -> Ranks:
    """Returns what the launcher says of this process."""
    said = {name: os.environ.get(name, "") for name in _TOLD}
    # Some launchers start one process a machine and do not number them there.
    said["LOCAL_RANK"] = said["LOCAL_RANK"] or "0"
    said["LOCAL_WORLD_SIZE"] = said["LOCAL_WORLD_SIZE"] or "1"
    if not all(value.isdecimal() for value in said.values()):
        told = ", ".join(f"{name}={value!r}" for name, value in said.items())
        raise TrainingError(
            f"RANK and WORLD_SIZE must be numbers of one launcher, got {told}; start "
            "with torchrun, or unset both to train in one process"
        )
    return Ranks(*(int(said[name]) for name in _TOLD))
