"""Does compression hurt students? CIFAR-10, learned from a grid stored in several ways.

    python benchmarks/compression.py DATA OUT               # 8 seeds an arm, the tables
    python benchmarks/compression.py DATA OUT --seeds 16    # goes on with what is there

DATA is that of ``cifar10.py``. A student learns resnet56's last feature map (64
channels on 8 x 8 cells) of 10,000 images, and nothing else; no label reaches it. It is
scored by a linear probe of its own pooled features: fitted on 4,000 other images,
its penalty chosen on 1,000 more, accuracy on the 10,000 test images.

* The floor: the recipe's own loss of decoded against exact targets, as a share of the
  loss that a student ends with. No training, every preset for grids.
* The equivalence test: arms differ in what the bank stores and in nothing else. Seeds
  are paired: the same initial weights, the same images in the same order. An arm is
  equivalent to ``lossless`` where the 90 % interval of the mean difference lies within
  0.5 points of accuracy. ``naive_1`` to ``naive_3`` are what nobody should store (one
  scale for an image, 1 to 3 bits): one of them has to fail.

Each result is a file in OUT/results, named by arm, seed and settings; the same command
goes on where it was stopped, in the middle of a run too.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from compression_arms import (
    ARMS,
    MARGIN,
    NAIVE,
    PATH,
    PILOT,
    PRESETS,
    REFERENCE,
    make_bank,
    probe,
    recipe_of,
    settings_digest,
)
from compression_floor import floor_table
from equivalence import compare, pairs_wanted

from pipeline.bank.open import open_bank
from student_train.trainer import Trainer

Results = dict[str, dict[int, dict[str, Any]]]


def write_json(path: Path, value: object) -> None:
    """Writes a file that is there whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(value, indent=1) + "\n")
    temporary.replace(path)


def run_of(out: Path, arm: str, seed: int) -> Path:
    """Returns the folder of a run."""
    return out / "runs" / f"{arm}-{seed}-{settings_digest()}"


def result_of(bank: str, out: Path, arm: str, seed: int) -> dict[str, Any]:
    """Returns what an arm came to with a seed, trained and scored where it was not.

    Of a run that was stopped and went on, seconds are those of the last go.
    """
    run = run_of(out, arm, seed)
    path = out / "results" / f"{run.name}.json"
    if path.exists():
        found: dict[str, Any] = json.loads(path.read_text())
        return found
    wall, processor = time.perf_counter(), time.process_time()
    outcome = Trainer(recipe_of(bank, arm, seed, run)).run()
    accuracy = round(probe(bank, run)["student"], 3)
    found = {
        "arm": arm,
        "seed": seed,
        "settings": settings_digest(),
        "accuracy": accuracy,
        "loss": outcome.result["losses"]["loss"],
        "wall_s": round(time.perf_counter() - wall, 1),
        "cpu_s": round(time.process_time() - processor, 1),
    }
    write_json(path, found)
    print(f"{time.strftime('%H:%M')} {json.dumps(found)}", flush=True)
    return found


def random_accuracy(bank: str, out: Path, seed: int) -> float:
    """Returns what the untrained student scores: what an arm's accuracy is above."""
    path = out / "results" / f"random-{seed}-{settings_digest()}.json"
    if not path.exists():
        found = probe(bank, run_of(out, REFERENCE, seed), random=True, seed=seed)
        (accuracy,) = (one for name, one in found.items() if name.startswith("random"))
        write_json(path, {"accuracy": accuracy})
    return float(json.loads(path.read_text())["accuracy"])


def results_in(out: Path, pilot: bool) -> Results:
    """Returns all results of these settings, by arm and seed: the pilot's or others."""
    found: Results = {}
    for path in sorted((out / "results").glob(f"*-{settings_digest()}.json")):
        held = json.loads(path.read_text())
        if "arm" in held and (held["seed"] >= PILOT) == pilot:
            found.setdefault(held["arm"], {})[held["seed"]] = held
    return found


def test_table(results: Results) -> list[str]:
    """Returns lines of Markdown: each arm against the reference, by pairs of seeds."""
    lines = [
        f"| stored as | seeds | accuracy | minus `{REFERENCE}` | 90 % interval | "
        "deviation of a pair | could have found | verdict | CPU s a run |",
        "| --- " * 9 + "|",
    ]
    exact = results[REFERENCE]
    for arm in (one for one in (*PRESETS, *NAIVE) if one in results):
        held = results[arm]
        seconds = statistics.fmean(one["cpu_s"] for one in held.values())
        accuracy = statistics.fmean(one["accuracy"] for one in held.values())
        line = f"| `{arm}` | {len(held)} | {accuracy:.2f} |"
        seeds = sorted(held.keys() & exact.keys())
        if arm == REFERENCE or len(seeds) < 2:
            lines.append(f"{line} | | | | | {seconds:.0f} |")
            continue
        found = compare(
            [held[seed]["accuracy"] for seed in seeds],
            [exact[seed]["accuracy"] for seed in seeds],
            MARGIN,
        )
        lines.append(
            f"{line} {found.mean:+.2f} | {found.low:+.2f} to {found.high:+.2f} | "
            f"{found.deviation:.2f} | {found.detectable:.2f} | {found.verdict} | "
            f"{seconds:.0f} |"
        )
    return lines


def each_seed(results: Results) -> list[str]:
    """Returns a line per arm with the accuracy of every seed."""
    return [
        f"{arm}: " + ", ".join(f"{held[seed]['accuracy']:.2f}" for seed in sorted(held))
        for arm, held in results.items()
    ]


def plan_lines(results: Results) -> list[str]:
    """Returns a line per arm with the seeds that a pilot's spread asks for."""
    lines = []
    exact = results[REFERENCE]
    for arm, held in results.items():
        seeds = sorted(held.keys() & exact.keys())
        if arm == REFERENCE or len(seeds) < 3:
            continue
        found = compare(
            [held[seed]["accuracy"] for seed in seeds],
            [exact[seed]["accuracy"] for seed in seeds],
            MARGIN,
        )
        wanted = pairs_wanted(found.deviation, len(seeds), MARGIN)
        lines.append(f"{arm}: {wanted} seeds show equivalence in 9 of 10 such tests")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("data", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--arms", nargs="+", choices=(*PRESETS, *NAIVE), default=ARMS)
    parser.add_argument("--seeds", type=int, default=8, help="of each arm")
    parser.add_argument(
        "--pilot",
        action="store_true",
        help="seeds of its own, that the test leaves out",
    )
    args = parser.parse_args()
    torch.set_num_threads(1)
    out = args.out.resolve()
    arms = list(dict.fromkeys([REFERENCE, *args.arms]))
    bank = make_bank(args.data.resolve(), out, arms)
    first = PILOT if args.pilot else 0
    for seed in range(first, first + args.seeds):
        for arm in arms:
            result_of(bank, out, arm, seed)
    results = results_in(out, args.pilot)
    opened = open_bank(bank)
    naive = [name for name in NAIVE if f"{PATH}_{name}" in opened.outputs]
    untrained = [
        random_accuracy(bank, out, seed) for seed in sorted(results[REFERENCE])[:3]
    ]
    lines = [
        f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores",
        "",
        *floor_table(opened, run_of(out, REFERENCE, first), naive),
        "",
        *test_table(results),
        "",
        f"untrained: {', '.join(f'{one:.2f}' for one in untrained)}",
        *each_seed(results),
        *(plan_lines(results) if args.pilot else []),
    ]
    print("\n".join(lines))


if __name__ == "__main__":
    main()
