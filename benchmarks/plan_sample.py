"""How near ``plan --sample`` comes to the bank that a job then makes.

    python benchmarks/plan_sample.py JOB.yaml [JOB.yaml ...] [--sample 16 64]

Each job's bank is made anew in a temporary folder, whatever `bank` it names. Printed
are bytes said over bytes stored, less one: of all features, of the output that is
farthest, of the whole bank; what the plan says its own error is (two standard errors,
of all features); seconds said and taken, the second with reading weights and finalise.
Both are of this machine as it is just then: beside other work, neither means much.
"""

from __future__ import annotations

import argparse
import datetime
import os
import tempfile
import time
from pathlib import Path

from manifests.job import Job
from manifests.loading import load_job
from manifests.storage import Store
from pipeline.bank.commits import read_blocks
from pipeline.precompute import plan_with_progress, precompute, rows_lookup
from pipeline.sample_plan.whole_job import SamplePlan, measure_plan


def measured(job: Job, count: int) -> SamplePlan:
    """Returns what a job's plan says on so many samples."""
    plan = plan_with_progress(job)
    return measure_plan(plan, count, rows_lookup(Store(job.bank), plan))


def stored(bank: str) -> tuple[dict[str, int], int]:
    """Returns bytes by array of ``features.zarr``, and of all files but the runs'."""
    arrays: dict[str, int] = {}
    table = read_blocks(Store(bank)).to_pydict()
    for paths, sizes in zip(table["objects"], table["size_bytes"], strict=True):
        for path, size in zip(paths, sizes, strict=True):
            array = path.rpartition("/c.")[0].removeprefix("features.zarr/")
            arrays[array] = arrays.get(array, 0) + size
    files = (path for path in Path(bank).rglob("*") if path.is_file())
    total = sum(path.stat().st_size for path in files if path.parent.name != "runs")
    return arrays, total


def main() -> None:
    """Prints a line per job and number of samples."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("jobs", nargs="+")
    parser.add_argument("--sample", nargs="+", type=int, default=[16, 64])
    arguments = parser.parse_args()
    load = os.getloadavg()[0]
    print(f"{datetime.date.today()}  {os.cpu_count()} cores, load {load:.1f}")
    print(f"{'':24} samples  features  (said +-)  farthest     whole  seconds")
    for name in arguments.jobs:
        with tempfile.TemporaryDirectory() as folder:
            job = load_job(name).model_copy(update={"bank": f"{folder}/bank"})
            said = {count: measured(job, count) for count in arguments.sample}
            started = time.perf_counter()
            precompute(job, quiet=True)
            took = time.perf_counter() - started
            arrays, total = stored(job.bank)
        for count, plan in said.items():
            own = {output.path: output.own.job_bytes for output in plan.outputs}
            real = {
                path: sum(
                    size
                    for array, size in arrays.items()
                    if array == path or array.startswith(f"{path}_")
                )
                for path in own
            }
            errors = [own[path] / real[path] - 1 for path in own]
            features = sum(own.values()) / sum(real.values()) - 1
            spread = "unknown" if plan.spread is None else f"{2 * plan.spread:.2%}"
            whole = plan.amounts.bytes / total - 1
            print(
                f"{Path(name).stem:24} {count:7}  {features:+8.2%}  {spread:>9}  "
                f"{max(errors, key=abs):+8.2%}  {whole:+8.2%}  "
                f"{plan.amounts.seconds.total:.0f} said, {took:.0f} taken"
            )


if __name__ == "__main__":
    main()
