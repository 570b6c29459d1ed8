"""``teachonce plan``: what a job will do, from shapes and headers or from samples."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import asdict

from manifests.job import Job
from manifests.loading import load_job
from manifests.storage import Store
from pipeline.bank.layout import level_path
from pipeline.beam_options import check_options, complete_options
from pipeline.estimate import Estimate, check_limits, estimate
from pipeline.fits import Fit, fits_of
from pipeline.plan import Plan
from pipeline.precompute import plan_with_progress
from teachonce.verbs import text
from teachonce.verbs.sample_facts import Asked


def run(args: argparse.Namespace) -> int:
    """Prints the plan of a job; exit 1 where weights are missing. Writes nothing."""
    job = load_job(args.job, args.overrides)
    if args.beam_options:
        check_options(complete_options(args.beam_options))
    asked = Asked.of(args)
    plan = plan_with_progress(job, needs_weights=asked is not None)
    numbers = estimate(plan)
    check_limits(plan, numbers, Store(job.bank))
    fits = fits_of(plan)
    sampled = None if asked is None else asked.measure(plan)
    if args.json:
        facts = asdict(numbers)
        facts["bank"] = job.bank
        facts["done"] = plan.is_done
        facts["memory_bytes"] = job.engine.memory + numbers.parameter_bytes
        facts["passes"] = {
            entry.id: {
                "inputs": list(entry.inputs),
                "views": list(entry.views),
                "batch": entry.batch,
                "outputs": {
                    f"{output.size}/{output.name}": list(output.shape)
                    for output in entry.outputs
                },
            }
            for entry in plan.record.passes
        }
        facts["fits"] = [asdict(fit) for fit in fits]
        facts["missing_weights"] = dict(plan.missing_weights)
        if asked is not None and sampled is not None:
            facts["sample"] = asked.to_json(sampled)
        text.print_json(facts)
    else:
        print_plan(job, plan, numbers, fits)
        if asked is not None and sampled is not None:
            asked.print(sampled)
    limit = job.limits.max_usd
    if asked is not None and sampled is not None:
        asked.check(limit, sampled)
    elif limit is not None and not plan.is_done:
        print(
            f"limit    limits.max_usd is {limit:,g}: not judged, a price needs "
            "samples; add --sample N --machine NAME",
            file=sys.stderr,
        )
    for message in plan.missing_weights.values():
        print(f"missing  {message}", file=sys.stderr)
    return 1 if plan.missing_weights else 0


def print_plan(
    job: Job, plan: Plan, numbers: Estimate, fits: Sequence[Fit] = ()
) -> None:
    """Prints a plan for people."""
    print(f"bank     {job.bank}" + ("" if plan.existing else " (new)"))
    print(
        f"samples  {numbers.samples:,} in {numbers.shards:,} shards; "
        f"{numbers.rows:,} rows in blocks of {numbers.block_rows} "
        f"({numbers.padding:.1%} padding), {plan.record.num_views} view(s)"
    )
    for name, one in plan.record.inputs.items():
        box = f", view 0: {one.view0} (aspect {one.aspect:.2f})" if one.view0 else ""
        print(f"input    {name}: {one.config['kind']}{box}")
    rows = []
    for entry in plan.record.passes:
        for output in entry.outputs:
            path = f"{level_path(entry, output.size)}/{output.name}"
            todo = numbers.bytes_by_output.get(path, 0)
            rows.append(
                (
                    path,
                    " x ".join(map(str, output.shape)),
                    output.dtype,
                    output.encoding["encoding"],
                    f"{entry.first_view}..{entry.last_view}",
                    str(entry.batch),
                    text.size(todo) if entry.id in plan.wanted else "kept",
                )
            )
    head = (
        "output",
        "row",
        "dtype",
        "encoding",
        "views",
        "batch",
        "bytes at most each",
    )
    print("\n" + text.table(head, _merged(rows)) + "\n")
    if fits:
        print_fits(fits)
    if plan.is_done:
        print("nothing to do: the bank has all of it")
        return
    print(
        f"to do    {numbers.blocks_to_do:,} blocks of passes, "
        f"{numbers.objects_to_do:,} objects, at most {text.size(numbers.bytes_to_do)} "
        f"before compression, {numbers.flops / 1e12:.2f} TFLOP"
    )
    budget = job.engine.memory
    print(
        f"memory   budget {text.size(budget)}: {text.size(numbers.working_bytes)} "
        f"inside models, the rest for blocks of {text.size(numbers.block_bytes)} each; "
        f"weights {text.size(numbers.parameter_bytes)} beside it"
    )
    if numbers.working_bytes > budget:
        print(
            "         a single forward takes more than the budget: set a smaller batch "
            "for the teacher, or raise engine.memory"
        )
    elif numbers.block_bytes * 2 + numbers.working_bytes > budget:
        print(
            "         two blocks do not fit the budget, so reading and running "
            "teachers cannot overlap: raise engine.memory or set block_rows lower"
        )


def _merged(rows: Sequence[tuple[str, ...]]) -> list[tuple[str, ...]]:
    """Returns rows of paths, those that differ in the group alone as one.

    Six cameras under one teacher are one line: ``street/cam_front (+5)/512x896/patch``.
    """
    alike: dict[tuple[str, ...], list[str]] = {}
    for path, *rest in rows:
        teacher, group, last = path.split("/", 2)
        alike.setdefault((teacher, last, *rest), []).append(group)
    return [
        (f"{teacher}/{_several(groups)}/{last}", *rest)
        for (teacher, last, *rest), groups in alike.items()
    ]


def _several(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} (+{len(names) - 1})"


def print_fits(fits: Sequence[Fit]) -> None:
    """Prints how inputs fit the boxes of views, and what was not asked for."""
    alike: dict[tuple[str, ...], list[Fit]] = {}
    for one in fits:
        teacher, group, size = one.level.split("/")
        # A group of one is called as its input.
        level = f"{teacher}/{size}" if group == one.input else one.level
        alike.setdefault((level, *_shown(one)), []).append(one)
    rows = [
        (level, _several([one.input for one in found]), *shown)
        for (level, *shown), found in alike.items()
    ]
    head = ("level", "input", "size", "grid", "fit", "distorted", "enlarged")
    print(text.table((*head, "random enlarged", "padding"), rows) + "\n")
    for one in fits:
        if one.is_unasked:
            print(
                f"warning  {one.level} distorts {one.input} by "
                f"{text.share(one.distortion)} (at most 5.0 % unless asked for): give "
                "the teacher other `sizes`, or say `preprocess: {fit: squash}` or pad"
            )


def _shown(one: Fit) -> tuple[str, ...]:
    return (
        " x ".join(map(str, one.size)),
        ", ".join(f"{rows} x {columns}" for rows, columns in one.grids),
        one.fit,
        text.share(one.distortion),
        text.share(one.upsampled),
        text.share(one.upsampled_random),
        text.share(one.padding),
    )
