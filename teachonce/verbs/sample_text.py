"""How ``plan --sample`` looks to people: at most 100 columns."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from pipeline.cost import machine_hours, student_bandwidth
from teachonce.verbs import text
from teachonce.verbs.sample_facts import Asked, advice

if TYPE_CHECKING:
    from pipeline.sample_plan.whole_job import OutputPlan, SamplePlan

_COLUMNS = 100


def print_sample(asked: Asked, sampled: SamplePlan) -> None:
    """Prints what samples told of a job."""
    bad = ", ".join(f"{count} {why}" for why, count in sampled.invalid.items())
    _say(
        "sample",
        f"{sampled.rows:,} sample(s) through the live teachers on {sampled.cores} "
        f"cores, {sampled.device}; "
        + (f"invalid: {bad}" if bad else "all of them valid"),
    )
    print()
    _print_presets(sampled.outputs)
    print(
        "* the job's; -n: rows it cannot store. Bytes are of one view; 1 - cos and the "
        "worst live channel's\nerror are of standardised values; encode and decode: "
        "MB/s of the teacher's values, one thread.\n"
    )
    for line in advice(sampled):
        _say("advice", line)
    if not sampled.amounts.seconds.total:
        return
    for topic, line in _whole(asked, sampled):
        _say(topic, line)
    print()
    _print_break_even(asked, sampled)


_HEAD = (
    "encoding",
    "B/value",
    "B/row",
    "1 - cos",
    "worst",
    "encode",
    "decode",
)


def _print_presets(outputs: Sequence[OutputPlan]) -> None:
    """Prints one table, each output's path on a line of its own: paths are long."""
    rows = [list(_presets(output)) for output in outputs]
    lines = iter(text.table(_HEAD, [row for own in rows for row in own]).splitlines())
    print(f"  {next(lines)}\n  {next(lines)}")
    for output, own in zip(outputs, rows, strict=True):
        print(output.path)
        for _ in own:
            print(f"  {next(lines)}")


def _presets(output: OutputPlan) -> Iterator[tuple[str, ...]]:
    width = {"float32": 4, "uint32": 4}.get(output.dtype, 2)
    row_mb = math.prod(output.shape) * width / 1e6
    for one in output.presets:
        loss = ("", "")
        if one.loss is not None:
            loss = (_tiny(one.loss.one_minus_cosine), _tiny(one.loss.worst_channel))
        refused = f" -{one.refused}" if one.refused else ""
        yield (
            f"{one.name}{'*' if one.is_own else ''}{refused}",
            f"{one.value_bytes:.3f}",
            f"{one.row_bytes:,.0f}",
            *loss,
            f"{row_mb / one.encode:,.0f}",
            f"{row_mb / one.decode:,.0f}",
        )


def _whole(asked: Asked, sampled: SamplePlan) -> Iterator[tuple[str, str]]:
    """Yields lines about the whole job."""
    amounts, assumed = sampled.amounts, asked.terms.assumed
    features = amounts.views * amounts.feature_bytes
    spread = "" if sampled.spread is None else f" +- {2 * sampled.spread:.1%}"
    yield (
        "bytes",
        f"{text.size(amounts.bytes)}: {text.size(features)}{spread} of features, "
        f"{text.size(amounts.record_bytes)} beside them ("
        + ", ".join(
            f"{kind} {text.size(size)}"
            for kind, size in sorted(
                sampled.records.bytes.items(), key=lambda item: -item[1]
            )
        )
        + "), before padding to a disk's blocks",
    )
    yield "objects", f"{amounts.objects:,.0f}, commits and records among them"
    seconds = amounts.seconds
    stages = ", ".join(
        f"{name} {_duration(getattr(seconds, name))}"
        for name in ("read", "decode", "prepare", "forward", "encode")
    )
    how = "the slower of both" if seconds.is_accelerated else "added up"
    yield (
        "rate",
        f"of this machine: {stages}, {how}; writing to the bank is not in it",
    )
    hours = machine_hours(amounts, assumed)
    speed = (
        f"{assumed.speedup:g} times as fast as this one, as --speedup says"
        if assumed.speedup
        else "as fast as this one (no --speedup was given)"
    )
    machine = assumed.machine or "machine"
    yield (
        "time",
        f"{_duration(3600 * hours / assumed.workers)} on {assumed.workers} {machine}"
        f"{'s' if assumed.workers > 1 else ''}, each {speed}; start-up and idle "
        "machines are not in it",
    )
    price, prices = asked.terms.price(amounts), asked.terms.prices
    if price is None:
        storage = amounts.bytes / 2**30 * prices.storage.gb_month
        yield (
            "price",
            f"of storage {_usd(storage)} a month; of the job: add --machine NAME, one "
            f"of {', '.join(prices.machines)}",
        )
    else:
        yield (
            "price",
            f"{_usd(price.making)}: {_duration(3600 * hours)} of {machine} at "
            f"{_usd(price.per_hour)} an hour, writing objects {_usd(price.writes)}; "
            f"then storage {_usd(price.storage_month)} a month, {_usd(price.egress)} "
            "each time the bank leaves the provider",
        )
    yield "", f"prices of {prices.date}, {prices.region}: {', '.join(prices.sources)}"
    rate = student_bandwidth(sampled.sample_bytes, assumed.student_rate)
    yield (
        "student",
        f"of {assumed.student_rate:,.0f} samples/s reads {text.size(rate)}/s, "
        f"{text.size(sampled.sample_bytes)} each: one view in all outputs above",
    )


def _print_break_even(asked: Asked, sampled: SamplePlan) -> None:
    assumed, priced = asked.terms.assumed, asked.terms.per_hour is not None
    found = asked.terms.break_evens(sampled.amounts)
    kept = (
        f"dollars, {assumed.months:g} month(s) of storage among them"
        if priced
        else "machine time, storage left out"
    )
    _say(
        "even",
        f"after so many epochs the bank has paid for itself against the same teachers "
        f"run live ({kept})",
    )
    rows = [
        (
            str(one.views),
            f"{one.epochs:,.2f}" if math.isfinite(one.epochs) else "never",
            f"{one.students:,.2f}" if math.isfinite(one.students) else "never",
        )
        for one in found
    ]
    each = f"students or ablations of {assumed.student_epochs} epochs"
    head = ("views", "epochs", each)
    print(text.table(head, rows))


def _tiny(number: float) -> str:
    return f"{number:.1e}" if number else "0"


def _duration(seconds: float) -> str:
    """Returns a time for people: ``12.3 s``, ``4.5 min``, ``1,234 h``."""
    for unit, length in (("h", 3600), ("min", 60)):
        if seconds >= length:
            number = seconds / length
            return f"{number:,.0f} {unit}" if number >= 100 else f"{number:.3g} {unit}"
    return f"{seconds:.3g} s"


def _usd(number: float) -> str:
    return f"${number:,.2f}" if number >= 0.01 or not number else f"${number:.2g}"


def _say(topic: str, line: str) -> None:
    """Prints a line under its topic, wrapped."""
    lead = f"{topic:8} "
    print(
        textwrap.fill(
            line,
            _COLUMNS,
            initial_indent=lead,
            subsequent_indent=" " * len(lead),
            break_long_words=False,
            break_on_hyphens=False,
        )
    )
