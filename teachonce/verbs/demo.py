"""``demo``: the whole story on a small driving dataset, drawn on the spot.

Draws street scenes, runs three trained experts on them once, trains a student from
the bank without a label and without an expert, trains the same student on a few labels
alone, and asks both, random weights and each expert the same four questions. Every
document it runs lies in the folder, to be changed and run again.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

from tqdm import tqdm

from manifests.errors import TeachOnceError
from manifests.loading import load_job
from manifests.recipe_loading import load_probe, load_recipe
from pipeline.bank.open import Bank, open_bank
from pipeline.bank.record import open_record
from pipeline.bank.verify import verify
from pipeline.estimate import estimate
from pipeline.precompute import plan_with_progress, precompute
from student_train.probes.protocol import ProbeRun
from student_train.probes.result import ProbeResult, write_result
from student_train.trainer import Trainer
from teachonce.demo import documents
from teachonce.demo.samples import make_sample
from teachonce.demo.scenes import SceneOptions
from teachonce.demo.shards import write_shards
from teachonce.demo.sheet import draw_contact_sheet
from teachonce.report import write_report
from teachonce.report.facts import array_bytes, float32_bytes, teacher_seconds
from teachonce.report.score_facts import score_table
from teachonce.verbs import text
from teachonce.verbs.plan import print_plan
from teachonce.verbs.precompute import print_outcome
from teachonce.verbs.probe import probe as run_probe
from teachonce.verbs.train import print_outcome as print_run
from teachonce.verbs.train import train
from teachonce.verbs.verify import print_report

SCENES_PER_SHARD = 40
TESTED_SHARE = 4
SHOWN_SCENES = 6


def run(args: argparse.Namespace) -> int:
    """Runs the demo; exit 0 where the bank is whole and sound and both runs are done.

    Raises:
        TeachOnceError: the folder holds a demo with other options.
    """
    folder = Path(args.folder)
    _claim(folder, args)
    _draw(folder, args)
    _write_documents(folder, args)
    bank = _make_bank(folder)
    if bank is None:
        return 1
    for name in ("bank", "labels"):
        if not _train(folder / f"recipe-{name}.yaml"):
            return 1
    result = _probe(folder / "probe.yaml")
    _title("what came out")
    _print_scores(result)
    _print_costs(bank, folder)
    page = _report(folder, bank, result)
    print(f"\nlook at {page} and {folder / 'scenes.png'}")
    return 0


def _title(words: str) -> None:
    print(f"\n== {words}", flush=True)


def _claim(folder: Path, args: argparse.Namespace) -> None:
    """Refuses a folder that holds a demo with other options, and too few scenes."""
    if args.scenes < documents.MIN_SCENES or args.steps < 1:
        raise TeachOnceError(
            f"--scenes must be at least {documents.MIN_SCENES} and --steps 1, got "
            f"{args.scenes} and {args.steps}"
        )
    options = {
        name: getattr(args, name)
        for name in ("scenes", "steps", "seed", "night", "fog", "lidar_range")
    }
    record = folder / "demo.json"
    folder.mkdir(parents=True, exist_ok=True)
    if record.exists() and json.loads(record.read_text()) != options:
        raise TeachOnceError(
            f"folder must be new or hold this demo, got {folder}, which holds one with "
            "other options (demo.json); choose another folder, or remove it"
        )
    record.write_text(json.dumps(options) + "\n")


def _draw(folder: Path, args: argparse.Namespace) -> None:
    options = SceneOptions(
        night=args.night, fog=args.fog, lidar_range_m=args.lidar_range
    )
    num_test = max(1, args.scenes // TESTED_SHARE)
    parts = {"train": (args.scenes, 0), "test": (num_test, args.scenes)}
    total = args.scenes + num_test
    _title(f"draw {total} street scenes from seed {args.seed}")
    started = time.perf_counter()
    with tqdm(total=total, unit="scene", disable=None) as bar:
        for name, (count, first) in parts.items():
            target = folder / "scenes" / name
            size = min(SCENES_PER_SHARD, count)
            wanted = -(-count // size)
            if len(list(target.glob("scenes-*.tar"))) == wanted:
                bar.update(count)
                continue
            write_shards(
                target,
                count,
                size,
                args.seed,
                options,
                first_index=first,
                on_shard=lambda _: bar.update(SCENES_PER_SHARD),
            )
    sheet = folder / "scenes.png"
    shown = range(min(SHOWN_SCENES, args.scenes))
    draw_contact_sheet((make_sample(args.seed, i, options) for i in shown), sheet)
    print(f"{time.perf_counter() - started:.1f} s; look at {sheet}")


def _write_documents(folder: Path, args: argparse.Namespace) -> None:
    (folder / "job.yaml").write_text(documents.job())
    for name, make in (
        ("bank", documents.bank_recipe),
        ("labels", documents.labels_recipe),
    ):
        batch = min(documents.BATCH, args.scenes // 4)
        (folder / f"recipe-{name}.yaml").write_text(make(args.steps, args.seed, batch))
    (folder / "probe.yaml").write_text(documents.probe())


def _make_bank(folder: Path) -> Bank | None:
    """Returns the bank; None where it is not whole and sound, which was said."""
    path = folder / "job.yaml"
    job = load_job(str(path))
    _title(f"teachonce plan {path}")
    plan = plan_with_progress(job)
    print_plan(job, plan, estimate(plan))
    _title(f"teachonce precompute {path}")
    started = time.perf_counter()
    outcome = precompute(job)
    print_outcome(job.bank, outcome)
    print(f"{time.perf_counter() - started:.1f} s")
    _title(f"teachonce verify {job.bank} --full")
    report = verify(*open_record(job.bank), full=True)
    print_report(report, full=True)
    return open_bank(job.bank) if outcome.is_whole and report.is_sound else None


def _train(path: Path) -> bool:
    """Trains a recipe to its end; returns whether it got there."""
    _title(f"teachonce train {path}")
    trainer = Trainer(load_recipe(str(path)))
    outcome = train(trainer, quiet=False)
    print_run(trainer, outcome)
    return outcome.is_done


def _probe(path: Path) -> ProbeResult:
    _title(f"teachonce probe {path}")
    document = load_probe(str(path))
    started = time.perf_counter()
    result = run_probe(ProbeRun(document), quiet=False)
    print(f"{time.perf_counter() - started:.1f} s")
    assert document.result is not None
    write_result(result, document.result)
    return result


def _print_scores(result: ProbeResult) -> None:
    table = score_table(result.to_json())
    assert table is not None
    print(text.table(table.head, table.rows))
    print(
        f"\nfit on {documents.NUM_LABELLED} labelled scenes, settings chosen on "
        f"{documents.NUM_CHOOSE} others, scored on scenes that nobody learned from"
    )


def _print_costs(bank: Bank, folder: Path) -> None:
    """Prints bytes, and what the experts took once against live in the loop."""
    store, record = open_record(bank.url)
    stored = sum(array_bytes(store, record).values())
    plain = sum(float32_bytes(store, record).values())
    once = sum(teacher_seconds(store).values())
    rows = record.state.rows if record.state else 0
    recipe = load_recipe(str(folder / "recipe-bank.yaml"))
    seen = sum((stage.steps or 0) * stage.batch for stage in recipe.stages)
    live = once / max(rows * record.num_views, 1) * seen
    print(
        f"bank: {text.size(stored)} of features ({text.size(plain)} as float32)\n"
        f"experts: {once:.1f} s once, for every student; live in the loop of this "
        f"one they would have taken {live:.1f} s ({seen} samples): "
        f"{live - once:.1f} s saved"
    )


def _report(folder: Path, bank: Bank, result: ProbeResult) -> Path:
    _title("report.html")
    size = bank.record.block_rows
    tested = [
        row
        for shard in bank.record.shards
        if shard.name.startswith("test/")
        for row in range(
            shard.first_block * size, shard.first_block * size + shard.samples
        )
    ]
    runs = {name: folder / "runs" / name for name in ("bank", "labels")}
    scores: dict[str, Any] = result.to_json()
    return write_report(
        folder / "report.html",
        bank,
        runs,
        scores,
        title="TeachOnce: three experts, one bank, one student",
        rows=tested,
    )
