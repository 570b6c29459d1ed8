"""Peak memory above imports and models against the budget, at 2 and at 50 shards.

    python benchmarks/memory.py

Each arm is a process of its own. The baseline is its memory once the teachers are
loaded; the peak is the kernel's high-water mark from there to the end of the job, what
models take inside and finalise included. Goal: at most 1.3 times ``engine.memory``,
whatever the number of shards. Linux only.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

BUDGET = 512 * 2**20
BLOCK_ROWS = 128


def resident(name: str) -> int:
    """Returns VmRSS or VmHWM of this process, in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise LookupError(name)


def arm(shards: str, bank: str) -> dict[str, int]:
    """Runs one job; returns its baseline and peak."""
    sys.path.insert(0, str(Path(__file__).parent))
    import precompute as bench

    from manifests.job import Job
    from pipeline import engine
    from pipeline.precompute import precompute

    fields = bench.job_fields(
        bank, shards, {name: bench.TEACHERS[name] for name in ("vit", "convnext")}
    )
    fields["engine"] |= {"memory": BUDGET}
    fields["block_rows"] = BLOCK_ROWS
    found: dict[str, int] = {}
    make = engine.Engine.__init__

    def measured(self: engine.Engine, *args: object) -> None:
        make(self, *args)
        Path("/proc/self/clear_refs").write_text("5")
        found["baseline"] = resident("VmRSS")
        keep.append(self)

    keep: list[engine.Engine] = []
    engine.Engine.__init__ = measured  # type: ignore[method-assign]
    precompute(Job.model_validate(fields), quiet=True)
    return {
        "baseline": found["baseline"],
        "peak": resident("VmHWM"),
        "budget_peak": keep[0].budget.peak_bytes,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--arm", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.arm:
        print(json.dumps(arm(*args.arm)))
        return
    sys.path.insert(0, str(Path(__file__).parent))
    import precompute as bench

    for count in (2, 50):
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            shards = bench.make_shards(folder, count * 128)
            done = subprocess.run(
                [sys.executable, __file__, "--arm", shards, str(folder / "bank")],
                stdout=subprocess.PIPE,
                text=True,
                check=True,
            )
        found = json.loads(done.stdout.splitlines()[-1])
        above = found["peak"] - found["baseline"]
        in_flight = found["budget_peak"] / 2**20
        print(
            f"{count:3} shards: {above / 2**20:.0f} MiB above imports and models, "
            f"{above / BUDGET:.2f} of the budget of {BUDGET / 2**20:.0f} MiB "
            f"(goal 1.30); blocks in flight peaked at {in_flight:.0f} MiB",
            flush=True,
        )


if __name__ == "__main__":
    main()
