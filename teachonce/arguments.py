"""The arguments of every verb, with an example of each; what they do is the verbs'."""

from __future__ import annotations

import argparse

_COMMON_HELP = "print facts as JSON"


def make_parser() -> argparse.ArgumentParser:
    """Returns the parser of the whole command line; the verb is ``verb``."""
    parser = argparse.ArgumentParser(
        prog="teachonce",
        description="Run each teacher once, keep its features in a bank.",
        epilog="The first hour: plan, precompute, info, train. "
        "`teachonce VERB --help` has an example of each.",
    )
    parser.add_argument("--version", action="store_true", help="print the version")
    verbs = parser.add_subparsers(dest="verb", metavar="VERB")

    def verb(name: str, summary: str, example: str) -> argparse.ArgumentParser:
        return verbs.add_parser(
            name,
            help=summary,
            description=summary,
            epilog=f"example: teachonce {example}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )

    def document_arguments(sub: argparse.ArgumentParser, kind: str) -> None:
        sub.add_argument(kind, help=f"the {kind}'s YAML")
        sub.add_argument(
            "overrides",
            nargs="*",
            metavar="key=value",
            help="fields set over the YAML's",
        )

    pack = verb(
        "pack",
        "Pack images of a folder, or files named in a list, into shards",
        "pack photos/ data/train-{:05d}.tar --shuffle 0",
    )
    _pack_arguments(pack)
    index = verb(
        "index",
        "Index shards: dataset.json and dataset.parquet, which a job may name",
        'index "data/train-{000..127}.tar" index/',
    )
    index.add_argument(
        "shards", nargs="+", help="patterns of shards, and last a folder"
    )
    index.add_argument("--json", action="store_true", help=_COMMON_HELP)
    plan = verb(
        "plan",
        "Say what a job will do: rows, blocks, bytes, objects, memory; with --sample "
        "what it costs, measured; writes nothing",
        "plan job.yaml --sample 64 --machine g2-standard-8 --speedup 20 --workers 8",
    )
    document_arguments(plan, "job")
    _sample_arguments(plan)
    plan.add_argument("--json", action="store_true", help=_COMMON_HELP)
    precompute = verb(
        "precompute",
        "Make the bank of a job, or what it still lacks; the same command resumes",
        "precompute job.yaml -- --runner=FnApiRunner",
    )
    document_arguments(precompute, "job")
    precompute.add_argument(
        "--repair",
        action="store_true",
        help="verify every byte first and compute damaged blocks again; only while no "
        "other run writes to the bank",
    )
    precompute.add_argument(
        "--fail-fast", action="store_true", help="end at the first shard that fails"
    )
    precompute.add_argument(
        "--break-lock", action="store_true", help="remove a dead run's lock"
    )
    precompute.add_argument(
        "--machine",
        metavar="NAME",
        help="type of the machines that will run it; for a job with limits.max_usd, "
        "whose price is judged on samples before anything is written",
    )
    _price_arguments(precompute)
    precompute.add_argument("--quiet", action="store_true", help="no progress bar")
    precompute.add_argument("--json", action="store_true", help=_COMMON_HELP)
    info = verb("info", "Say what a bank holds, also while it grows", "info bank/")
    info.add_argument("bank", help="path or URL of the bank")
    info.add_argument("--json", action="store_true", help=_COMMON_HELP)
    verify = verb(
        "verify",
        "Check that every committed block is what it was",
        "verify bank/ --recheck 64 --job job.yaml",
    )
    _verify_arguments(verify)
    _export_arguments(
        verb(
            "export",
            "Copy a bank, or whole teachers, outputs, views and shards of it, into a "
            "bank of its own; the same command goes on",
            "export gs://acme/bank ./small --outputs cls dinov3/patch --views 0",
        )
    )
    diff = verb(
        "diff",
        "Say what differs between two banks; exit 1 where anything does",
        "diff bank/ gs://acme-banks/in1k-v1 --full",
    )
    diff.add_argument("a", metavar="A", help="path or URL of a bank")
    diff.add_argument("b", metavar="B", help="path or URL of another")
    diff.add_argument(
        "--full",
        action="store_true",
        help="read every byte of what both have; where it differs, say how far apart "
        "the decoded values are",
    )
    diff.add_argument("--json", action="store_true", help=_COMMON_HELP)
    finalise = verb(
        "finalise",
        "Make index, row arrays and statistics from the commits there are",
        "finalise bank/",
    )
    finalise.add_argument("bank", help="path or URL of the bank")
    train = verb(
        "train",
        "Train a student from a bank, with no teacher; the same command goes on",
        "train recipe.yaml seed=1 run=runs/seed1",
    )
    document_arguments(train, "recipe")
    train.add_argument("--quiet", action="store_true", help="no progress bar")
    train.add_argument(
        "--require-license",
        nargs="+",
        metavar="NAME",
        help="refuse data or teachers under any other licence, such as apache-2.0; "
        "behind overrides",
    )
    train.add_argument("--json", action="store_true", help=_COMMON_HELP)
    probe = verb(
        "probe",
        "Score students, random ones, and teachers from their cached features",
        "probe probe.yaml students.mine=runs/seed1",
    )
    document_arguments(probe, "probe")
    probe.add_argument("--quiet", action="store_true", help="no progress bar")
    probe.add_argument("--json", action="store_true", help=_COMMON_HELP)
    report = verb(
        "report",
        "Write a page of pictures: a bank, runs trained from it, their scores",
        "report bank/ --run mine=runs/seed1 --probe probe.json --out report.html",
    )
    report.add_argument("bank", help="path or URL of the bank")
    report.add_argument(
        "--run", action="append", metavar="NAME=FOLDER", help="a run; may come again"
    )
    report.add_argument("--probe", help="JSON that `teachonce probe` wrote")
    report.add_argument("--shards", nargs="+", help="where the shards lie now")
    report.add_argument("--title", help="of the page")
    report.add_argument("--out", default="report.html", help="file to write")
    teachers = verb(
        "teachers",
        "List the teacher families, say what one model gives, make its classifier",
        "teachers timm:vit_small_patch16_224",
    )
    teachers.add_argument("name", nargs="?", help="FAMILY:NAME")
    teachers.add_argument(
        "--classes",
        metavar="FILE",
        help="make a zero-shot classifier of these class names, one per line, with the "
        "text tower of an open_clip model",
    )
    teachers.add_argument(
        "--weights", metavar="TAG_OR_FILE", help="with --classes: the model's weights"
    )
    teachers.add_argument(
        "--templates",
        metavar="FILE",
        help="with --classes: sentences with {}, one per line; omitted: the eighteen "
        "of CLIP for CIFAR, `a photo of a {}.` and others",
    )
    teachers.add_argument(
        "--to", metavar="FILE", help="with --classes: the classifier, path or URL"
    )
    teachers.add_argument("--json", action="store_true", help=_COMMON_HELP)
    demo = verb(
        "demo",
        "Draw a driving dataset, run three experts once, train and score students",
        "demo demo-out --scenes 400 --night 0.3",
    )
    demo.add_argument("folder", nargs="?", default="demo-out", help="where to work")
    demo.add_argument(
        "--scenes", type=int, default=400, help="to learn from; a quarter more to test"
    )
    demo.add_argument("--steps", type=int, default=200, help="of each student")
    demo.add_argument("--seed", type=int, default=0, help="seed of the scenes")
    demo.add_argument("--night", type=float, default=0.2, help="share of night scenes")
    demo.add_argument("--fog", type=float, default=0.2, help="share of foggy scenes")
    demo.add_argument(
        "--lidar-range", type=float, default=60.0, help="range of the LiDAR, metres"
    )
    return parser


def _sample_arguments(plan: argparse.ArgumentParser) -> None:
    plan.add_argument(
        "--sample",
        type=int,
        metavar="N",
        help="run N samples, spread over the shards, through the live teachers: bytes, "
        "quality and speed of every encoding that fits, hours and price of the whole "
        "job; the options below are for it",
    )
    plan.add_argument(
        "--machine",
        metavar="NAME",
        help="type in the price list that will run it, such as g2-standard-8",
    )
    _price_arguments(plan)
    plan.add_argument(
        "--workers", type=int, metavar="K", help="machines that share it; omitted: 1"
    )
    plan.add_argument(
        "--student-rate",
        type=float,
        metavar="S",
        help="samples a second that a student takes; omitted: 1000",
    )
    plan.add_argument(
        "--student-epochs",
        type=int,
        metavar="E",
        help="epochs of one student; omitted: 100",
    )
    plan.add_argument(
        "--months",
        type=float,
        metavar="M",
        help="that the bank is kept for; omitted: 1",
    )


def _price_arguments(sub: argparse.ArgumentParser) -> None:
    sub.add_argument(
        "--speedup",
        type=float,
        metavar="X",
        help="how many times as fast as this machine that one is; it cannot be known "
        "from here; omitted: as fast",
    )
    sub.add_argument(
        "--prices", metavar="FILE", help="a price list (YAML) instead of our own"
    )


def _export_arguments(export: argparse.ArgumentParser) -> None:
    export.add_argument("bank", help="path or URL of the bank")
    export.add_argument("dest", metavar="DEST", help="path or URL of the new bank")
    export.add_argument(
        "--teachers", nargs="+", metavar="NAME", help="such as dinov3; * matches"
    )
    export.add_argument(
        "--outputs",
        nargs="+",
        metavar="NAME",
        help="such as cls, dinov3/patch or dinov3/*/224x224/patch",
    )
    export.add_argument("--groups", nargs="+", metavar="NAME", help="such as cam_front")
    export.add_argument(
        "--views", nargs="+", metavar="N", help="0, or 0-3: all up to some last one"
    )
    export.add_argument(
        "--shards", nargs="+", metavar="NAME", help="such as 'train-{00000..00003}.tar'"
    )
    export.add_argument(
        "--inputs",
        nargs="*",
        metavar="NAME",
        help="take the stored copies of inputs along (all, or those named); else they "
        "are left out",
    )
    export.add_argument(
        "--keys",
        metavar="FILE",
        help="only these samples: a line each, KEY or SHARD<tab>KEY",
    )
    export.add_argument(
        "--fraction",
        type=float,
        metavar="F",
        help="only this share of the samples, the same of every bank of the same data; "
        "a smaller share is part of a larger one",
    )
    export.add_argument(
        "--seed", type=int, metavar="N", help="of --fraction: other samples (default 0)"
    )
    export.add_argument(
        "--where",
        nargs="+",
        default=[],
        metavar="CONDITION",
        help="only samples that meet it, such as 'label.class in [3, 5]' or "
        "'shard == \"train-0.tar\"'; columns of index/, values as JSON",
    )
    export.add_argument(
        "--encoding",
        nargs="+",
        default=[],
        metavar="OUTPUT=PRESET",
        help="store outputs otherwise, from the stored values: '*/patch=compact', "
        "logits=topk:5",
    )
    export.add_argument(
        "--whole",
        action="store_true",
        help="refuse where a block is not computed yet; else what there is is copied",
    )
    export.add_argument(
        "--break-lock", action="store_true", help="remove a dead run's lock at DEST"
    )
    export.add_argument("--quiet", action="store_true", help="no progress bar")
    export.add_argument("--json", action="store_true", help=_COMMON_HELP)


def _pack_arguments(pack: argparse.ArgumentParser) -> None:
    pack.add_argument(
        "source",
        metavar="SOURCE",
        help="folder of images, or a list (.csv, .tsv, .jsonl) with a column per "
        "member (jpg, cam_back.jpg, bin, cls, json): paths, or literals in cls and "
        "json; column `key` is optional",
    )
    pack.add_argument(
        "destination", metavar="DEST", help="out/train-{:05d}.tar, or a folder; any URL"
    )
    pack.add_argument(
        "--prefix", default="shard", help="of names where DEST is a folder"
    )
    full = pack.add_mutually_exclusive_group()
    full.add_argument("--samples-per-shard", type=int, metavar="N")
    full.add_argument(
        "--shard-bytes", metavar="SIZE", help="such as 1 GB; omitted: 256 MB"
    )
    pack.add_argument(
        "--shuffle",
        type=int,
        metavar="SEED",
        help="mix samples; needed by class folders",
    )
    pack.add_argument(
        "--classes", metavar="FILE", help="classes.txt that numbers the class folders"
    )
    pack.add_argument(
        "--no-labels", action="store_true", help="folders are not classes: no cls"
    )
    pack.add_argument(
        "--clip",
        type=int,
        metavar="T",
        help="samples of T frames: of folders, or by a list's columns clip and time",
    )
    pack.add_argument(
        "--stride", type=int, default=1, metavar="S", help="frame to frame of a clip"
    )
    pack.add_argument(
        "--every",
        type=int,
        metavar="E",
        help="clip to clip; omitted: T * S, no overlap",
    )
    pack.add_argument(
        "--sweeps",
        type=int,
        metavar="N",
        help="the last N sweeps as one `bin` with a column time_lag, by a list's "
        "columns clip, time and pose (4 x 4, lidar to world); lines without a key are "
        "history alone",
    )
    pack.add_argument(
        "--columns", help="float32 columns of a sweep; omitted: x,y,z,intensity"
    )
    pack.add_argument(
        "--overwrite", action="store_true", help="replace all shards of that name"
    )
    pack.add_argument("--json", action="store_true", help=_COMMON_HELP)


def _verify_arguments(verify: argparse.ArgumentParser) -> None:
    verify.add_argument("bank", help="path or URL of the bank")
    verify.add_argument("--full", action="store_true", help="read every byte")
    verify.add_argument(
        "--recheck",
        type=int,
        metavar="N",
        help="run N random valid rows, and as many that are not, through the live "
        "teachers again and compare; needs the shards and the weights",
    )
    verify.add_argument(
        "--job",
        metavar="JOB",
        help="with --recheck: the job whose teachers are run. A teacher that is code "
        "(module:, student:, exported:) is never run on a bank's word: it must be in "
        "this job, and its code must have the sha256 that the bank recorded. Other "
        "teachers need no job; those in it have their weights from there",
    )
    verify.add_argument(
        "--teachers", nargs="+", metavar="NAME", help="with --recheck: these alone"
    )
    verify.add_argument(
        "--shards",
        nargs="+",
        metavar="URL",
        help="with --recheck: where the shards lie now; headers and keys are compared",
    )
    verify.add_argument(
        "--seed", type=int, default=0, help="with --recheck: another draws other rows"
    )
    verify.add_argument(
        "--device",
        help="with --recheck: auto, cpu, cuda or cuda:N; omitted: the job's, or auto. "
        "On the kind of device that made the bank bits must be the same, on another "
        "rows must be near",
    )
    verify.add_argument("--json", action="store_true", help=_COMMON_HELP)
