"""Runs a target over its corpus and mutants of it, within a deadline and a memory.

Meant for a process of its own: it limits its address space, and an input that takes
longer than the deadline ends it. The input at work always lies in a file, so that
whatever happens can be run again. A name may have folders.
"""

from __future__ import annotations

import faulthandler
import random
import re
import resource
import shutil
import sys
import time
import traceback
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from manifests.errors import TeachOnceError
from tests.fuzz.mutation import mutate
from tests.fuzz.targets import Target

CORPUS = Path(__file__).parents[1] / "data" / "corpus"


@dataclass
class Campaign:
    """What became of the inputs.

    Attributes:
        inputs: how many were run.
        accepted: how many gave a result.
        refused: how many our errors refused.
        found: input's file to the last line of what went wrong.
    """

    inputs: int = 0
    accepted: int = 0
    refused: int = 0
    found: dict[str, str] = field(default_factory=dict)


def seeds_of(target: Target) -> dict[str, bytes]:
    """Returns the seeds of a target: path in its folder to bytes, sorted."""
    folder = CORPUS / target.folder
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    found = {str(path.relative_to(folder)): path.read_bytes() for path in paths}
    return {**target.seeds(), **found}


def mutants(seeds: dict[str, bytes], seed: int) -> Iterator[tuple[str, bytes]]:
    """Yields (seed's name, mutant) without end; the same for the same seed."""
    names = list(seeds)
    others = list(seeds.values())
    number = 0
    while True:
        draw = random.Random(f"{seed}/{number}")
        name = draw.choice(names)
        yield name, mutate(name, seeds[name], draw, others)
        number += 1


def run_campaign(
    target: Target, seed: int, rounds: int | None, until: float, keep: Path
) -> Campaign:
    """Runs the corpus as it is and then mutants of it; keeps what breaks the law.

    Args:
        target: what is given them.
        seed: of the mutants.
        rounds: how many mutants; None for as long as there is time.
        until: `time.monotonic` at which it ends.
        keep: folder for inputs that do harm.
    """
    keep.mkdir(parents=True, exist_ok=True)
    seeds = seeds_of(target)
    target.make_small()
    _limit_memory(target.memory)
    campaign = Campaign()
    for name, data in seeds.items():
        _run_one(target, name, data, keep, campaign)
    for number, (name, data) in enumerate(mutants(seeds, seed)):
        if number == rounds or time.monotonic() > until:
            break
        _run_one(target, name, data, keep, campaign)
    return campaign


def _run_one(
    target: Target, name: str, data: bytes, keep: Path, campaign: Campaign
) -> None:
    _keep(keep / "at-work", name, data)
    peak = _peak_bytes()
    faulthandler.dump_traceback_later(target.deadline_s, exit=True)
    campaign.inputs += 1
    try:
        target.run(name, data)
        campaign.accepted += 1
        error = None
    except TeachOnceError as refusal:
        campaign.refused += 1
        error = refusal if _lacked_memory(refusal) else None
    except Exception as unexpected:  # the law is that there is none
        error = unexpected
    finally:
        faulthandler.cancel_dump_traceback_later()
    grown = _peak_bytes() - peak
    if error is None and grown <= target.memory:
        return
    kind = "memory" if error is None else type(error).__name__
    what = f"{grown} bytes of memory" if error is None else _last_lines(error)
    kept = _keep(keep / f"{kind}-{campaign.inputs}", name, data)
    campaign.found[str(kept)] = what
    print(f"{kept}: {what}", file=sys.stderr)


def _keep(folder: Path, name: str, data: bytes) -> Path:
    """Writes an input under its seed's name, which tells a target what it is."""
    shutil.rmtree(folder, ignore_errors=True)
    path = folder / name
    path.parent.mkdir(parents=True)
    path.write_bytes(data)
    return path


def _lacked_memory(error: BaseException | None) -> bool:
    while error is not None:
        if isinstance(error, MemoryError):
            return True
        error = error.__cause__
    return False


def _last_lines(error: BaseException) -> str:
    frames = traceback.extract_tb(error.__traceback__)
    places = " < ".join(f"{Path(f.filename).name}:{f.lineno}" for f in frames[::-1][:5])
    return f"{type(error).__name__}: {str(error)[:300]} at {places}"


def _peak_bytes() -> int:
    # On Linux ru_maxrss begins with what the parent held when it started this process.
    status = Path("/proc/self/status")
    if status.exists():
        found = re.search(r"VmHWM:\s+(\d+) kB", status.read_text())
        if found:
            return int(found[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _limit_memory(size_bytes: int) -> None:
    """Lets the process take so much address space more than it has now."""
    status = Path("/proc/self/statm")
    if not status.exists():
        return
    held = int(status.read_text().split()[0]) * resource.getpagesize()
    # Threads' stacks and allocators' arenas are reserved whole, used in part.
    limit = held + size_bytes + 256 * 2**20
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
