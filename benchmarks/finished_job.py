"""A finished job run again: seconds, and whether torch or Beam were imported.

    python benchmarks/finished_job.py [JOB.yaml]

Without a job, one of 1,000 small images is made and run first. Goal: 4 s, neither torch
nor Beam imported.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

PROBE = """
import sys
from teachonce.cli import main
code = main(["precompute", sys.argv[1]])
print("imported:", [name for name in ("torch", "apache_beam") if name in sys.modules])
sys.exit(code)
"""


def write_job(folder: Path) -> Path:
    sys.path.insert(0, str(Path(__file__).parent))
    import precompute as bench

    shards = bench.make_shards(folder, 256)
    path = folder / "job.yaml"
    path.write_text(
        f"""\
bank: ./bank
dataset: {{shards: "{shards}"}}
inputs: {{image: {{kind: image, member: jpg}}}}
teachers:
  vit: {{model: "timm:vit_tiny_patch16_224", weights: random, outputs: {{cls: {{}}}}}}
"""
    )
    subprocess.run(
        [sys.executable, "-m", "teachonce", "precompute", str(path)], check=True
    )
    return path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("job", nargs="?", help="a job whose bank is complete")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        path = Path(args.job) if args.job else write_job(Path(name))
        seconds = []
        for _ in range(5):
            started = time.perf_counter()
            done = subprocess.run(
                [sys.executable, "-c", PROBE, str(path)],
                stdout=subprocess.PIPE,
                text=True,
                check=True,
            )
            seconds.append(time.perf_counter() - started)
        print(done.stdout.splitlines()[-1])
        print(
            f"median of 5: {statistics.median(seconds):.2f} s, all "
            f"{[round(one, 2) for one in seconds]} (goal 4 s)"
        )


if __name__ == "__main__":
    main()
