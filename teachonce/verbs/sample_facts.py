"""What ``plan --sample`` is asked and what it tells; measuring is ``sample_plan``.

Imports neither torch nor Beam until something is measured.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from manifests.errors import ManifestError
from manifests.prices import load_prices
from manifests.storage import Store
from pipeline.cost import Assumed, Terms, machine_hours, student_bandwidth
from pipeline.plan import Plan
from pipeline.precompute import rows_lookup

if TYPE_CHECKING:
    from pipeline.sample_plan.whole_job import PresetPlan, SamplePlan

MAX_LOSS = (1e-4, 1e-2)
"""1 - cosine, and error of the worst live channel over its variance: what DESIGN
allows ``compact``."""
WORTH_SAYING = 0.97
_OPTIONS = (
    "machine",
    "workers",
    "speedup",
    "student_rate",
    "student_epochs",
    "months",
)


@dataclass(frozen=True)
class Asked:
    """What the options of ``plan --sample`` say.

    Attributes:
        count: samples.
        terms: that the job is priced by.
    """

    count: int
    terms: Terms

    @classmethod
    def of(cls, args: argparse.Namespace) -> Asked | None:
        """Returns what is asked, None without ``--sample``.

        Raises:
            ManifestError: an option needs another, or is no price, machine or number
                that can be used.
        """
        given = {name: getattr(args, name) for name in _OPTIONS}
        given = {name: value for name, value in given.items() if value is not None}
        if args.sample is None:
            if unused := [*given, *(["prices"] if args.prices else [])]:
                options = ", ".join(f"--{name.replace('_', '-')}" for name in unused)
                raise ManifestError(
                    f"{options}: needs --sample N, whose figures it is about; add it"
                )
            return None
        if args.sample < 1:
            raise ManifestError(f"--sample must be at least 1, got {args.sample}")
        return cls(args.sample, Terms(Assumed(**given), load_prices(args.prices)))

    def measure(self, plan: Plan) -> SamplePlan:
        """Returns what the samples of a plan tell."""
        from pipeline.sample_plan.whole_job import measure_plan

        return measure_plan(plan, self.count, rows_lookup(Store(plan.job.bank), plan))

    def check(self, max_usd: float | None, sampled: SamplePlan) -> None:
        """Raises TeachOnceError where a job may cost more than it is allowed to."""
        if max_usd is not None and sampled.amounts.seconds.total:
            self.terms.check(max_usd, sampled.amounts)

    def to_json(self, sampled: SamplePlan) -> dict[str, Any]:
        """Returns all of it as JSON values."""
        amounts, assumed = sampled.amounts, self.terms.assumed
        prices = self.terms.prices
        facts = asdict(sampled)
        facts["amounts"] |= {
            "bytes": amounts.bytes,
            "objects": amounts.objects,
            "machine_seconds": amounts.seconds.total,
        }
        facts["sample_bytes"] = sampled.sample_bytes
        hours = machine_hours(amounts, assumed)
        facts["assumed"] = asdict(assumed)
        facts["machine_hours"] = hours
        facts["hours"] = hours / assumed.workers
        facts["student_bytes_per_second"] = student_bandwidth(
            sampled.sample_bytes, assumed.student_rate
        )
        facts["break_even"] = [
            asdict(one)
            for one in self.terms.break_evens(amounts)
            if amounts.seconds.total
        ]
        price = self.terms.price(amounts)
        facts["price"] = price and {**asdict(price), "making": price.making}
        facts["prices"] = {
            "date": prices.date.isoformat(),
            "region": prices.region,
            "sources": prices.sources,
        }
        facts["advice"] = advice(sampled)
        return facts

    def print(self, sampled: SamplePlan) -> None:
        """Prints all of it for people."""
        from teachonce.verbs.sample_text import print_sample

        print_sample(self, sampled)


def advice(sampled: SamplePlan) -> list[str]:
    """Returns what the figures say about the job's choice of encodings, a line each.

    An encoding that rounds is named where it loses no more than `MAX_LOSS`.
    """
    lines = []
    for output in sampled.outputs:
        own = output.own
        if own.refused:
            lines.append(
                f"{output.path}: {own.name} cannot store {own.refused} of the sampled "
                "rows; take another encoding"
            )
        elif own.loss is not None and own.loss.divergence is not None:
            lines.append(
                f"{output.path}: {own.name} is {own.loss.divergence:.2g} nats (KL) off "
                "the teacher's probabilities; cosines say little of a tail that is "
                "taken as uniform"
            )
        elif own.loss is not None and not is_near(own):
            lines.append(
                f"{output.path}: {own.name} loses {own.loss.one_minus_cosine:.1e} of "
                f"the cosine (worst channel {own.loss.worst_channel:.1e}); see what it "
                "does to a student, or take a wider encoding"
            )
        exact = [one for one in output.presets if one.name.startswith("lossless")]
        if own in exact:
            lines += _cheaper(output.path, own, exact, "the same bits")
        near = [one for one in output.presets if is_near(one) and one not in exact]
        if own in exact or own in near:
            lines += _cheaper(output.path, own, near, "nearly the same values")
    return lines


def is_near(preset: PresetPlan) -> bool:
    """Returns whether an encoding keeps to the bounds of `MAX_LOSS`, for every row."""
    if preset.loss is None or preset.refused:
        return False
    found = preset.loss.one_minus_cosine, preset.loss.worst_channel
    return all(one <= most for one, most in zip(found, MAX_LOSS, strict=True))


def _cheaper(
    path: str, own: PresetPlan, others: Sequence[PresetPlan], what: str
) -> list[str]:
    """Returns a line where one of the others stores an output in fewer bytes."""
    best = min(others, key=lambda one: one.row_bytes, default=own)
    if best.row_bytes >= WORTH_SAYING * own.row_bytes:
        return []
    encoding, _, codec = best.name.partition(" ")
    saved = 1 - best.row_bytes / own.row_bytes
    said = f"`codec: {codec}`" if codec else f"`encoding: {encoding}`"
    loss = ""
    if best.loss is not None and best.loss.one_minus_cosine:
        loss = f" (1 - cos {best.loss.one_minus_cosine:.1e})"
    return [f"{path}: {said} stores {what}{loss} in {saved:.0%} fewer bytes"]
