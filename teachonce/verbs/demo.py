"""``teachonce demo``: the main job on an embedded driving dataset.

Draws street scenes, writes a job beside them, and runs plan, precompute, verify, info
as a user would.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

from tqdm import tqdm

from manifests.loading import load_job
from pipeline.bank.record import open_record
from pipeline.bank.verify import verify
from pipeline.estimate import estimate
from pipeline.info import bank_facts
from pipeline.precompute import plan_with_progress, precompute
from teachonce.demo import nets
from teachonce.demo.samples import make_sample
from teachonce.demo.scenes import SceneOptions
from teachonce.demo.shards import write_shards
from teachonce.demo.sheet import draw_contact_sheet
from teachonce.demo.streets import SCENE_CLASSES
from teachonce.verbs.info import print_facts
from teachonce.verbs.plan import print_plan
from teachonce.verbs.precompute import print_outcome
from teachonce.verbs.verify import print_report

SCENES_PER_SHARD = 24
SHOWN_SCENES = 6

JOB = """\
# The demo's job: two image teachers and a LiDAR teacher, every expert run once.
# The teachers have random weights: nothing is downloaded, the pipeline is the real one.
bank: ./bank
dataset: {{shards: "./scenes/scenes-*.tar", license: cc0-1.0}}
metadata: json
inputs:
  cam: {{kind: image, member: jpg, calibration: camera}}
  lidar: {{kind: points, member: bin, columns: [x, y, z, intensity, ring]}}
labels:
  scene: {{member: cls, num_classes: {classes}}}
views: {{random: 1, yaw_deg: 20}}
teachers:
  vit:
    model: timm:vit_tiny_patch16_224
    weights: random
    precision: bfloat16
    on: [cam]
    outputs: {{cls: {{}}, patch: {{}}}}
  convnext:
    model: timm:convnext_atto
    weights: random
    on: [cam]
    outputs: {{pooled: {{encoding: half}}, patch: {{}}}}
  birdseye:
    model: module:{nets}:BirdsEyeNet
    weights: random
    on: [lidar]
    preprocess: {{points: 8192, columns: [x, y, z, intensity]}}
    outputs: {{bev: {{from: map, encoding: half}}}}
"""


def _title(text: str) -> None:
    print(f"\n== {text}", flush=True)


def run(args: argparse.Namespace) -> int:
    """Runs the demo; exit 0 where the bank is whole and sound."""
    folder = Path(args.folder)
    options = SceneOptions(
        night=args.night, fog=args.fog, lidar_range_m=args.lidar_range
    )
    _title(f"draw {args.scenes} street scenes from seed {args.seed}")
    started = time.perf_counter()
    (folder / "scenes").mkdir(parents=True, exist_ok=True)
    for old in (folder / "scenes").glob("scenes-*.tar"):
        old.unlink()
    with tqdm(
        total=-(-args.scenes // SCENES_PER_SHARD), unit="shard", disable=None
    ) as bar:
        paths = write_shards(
            folder / "scenes",
            args.scenes,
            SCENES_PER_SHARD,
            args.seed,
            options,
            on_shard=lambda _: bar.update(),
        )
    sheet = folder / "scenes.png"
    shown = range(min(SHOWN_SCENES, args.scenes))
    draw_contact_sheet((make_sample(args.seed, i, options) for i in shown), sheet)
    seconds = time.perf_counter() - started
    print(f"{len(paths)} shards in {seconds:.1f} s; look at {sheet}")
    path = folder / "job.yaml"
    path.write_text(JOB.format(classes=len(SCENE_CLASSES), nets=nets.__file__))
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
    store, record = open_record(job.bank)
    report = verify(store, record, full=True)
    print_report(report, full=True)
    _title(f"teachonce info {job.bank}")
    print_facts(bank_facts(store, record))
    return 0 if outcome.is_whole and report.is_sound else 1
