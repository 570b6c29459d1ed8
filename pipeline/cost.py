"""What a bank costs and when it has paid for itself: arithmetic on measured rates.

Pure functions of seconds, bytes and prices. Rates are measured in ``sample_plan``, on
the machine that plans; prices are a document, ``manifests.prices``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from manifests.errors import ManifestError
from manifests.prices import GB, Prices, StoragePrices
from pipeline.errors import PipelineError

VIEWS = (1, 2, 4, 8)
"""Numbers of views for which the break-even is told."""


@dataclass(frozen=True)
class Assumed:
    """What only the user knows.

    Attributes:
        machine: type in the price list; None: hours alone are told.
        workers: machines that share the work.
        speedup: how many times as fast as this machine one of them is; None: as fast.
        student_rate: samples a second that a student takes.
        student_epochs: epochs that one student is trained for.
        months: for which the bank is kept.
    """

    machine: str | None = None
    workers: int = 1
    speedup: float | None = None
    student_rate: float = 1000.0
    student_epochs: int = 100
    months: float = 1.0

    def __post_init__(self) -> None:
        for what, value in vars(self).items():
            if what != "machine" and value is not None and not 0 < value < math.inf:
                raise ManifestError(
                    f"--{what.replace('_', '-')} must be above 0, got {value}"
                )


@dataclass(frozen=True)
class MachineSeconds:
    """Seconds that one machine, this one, takes for a job, all its cores at work.

    Attributes:
        read: reading shards.
        decode: decoding samples, once each.
        prepare: making what teachers take, for every view.
        forward: the teachers.
        encode: to the bytes of objects, with their checksums.
        is_accelerated: whether teachers run on an accelerator, beside the cores.
    """

    read: float
    decode: float
    prepare: float
    forward: float
    encode: float
    is_accelerated: bool

    @property
    def total(self) -> float:
        """Seconds of the whole."""
        return self.with_views(1.0)

    def with_views(self, factor: float) -> float:
        """Returns the seconds of the same job with ``factor`` times its views.

        What shares the cores is added, what does not is not: without an accelerator
        teachers run on the cores that also decode and encode; with one the slower of
        the two sets the pace. Writing overlaps with both and is not in it.
        """
        cores = self.read + self.decode + factor * (self.prepare + self.encode)
        forward = factor * self.forward
        return max(forward, cores) if self.is_accelerated else forward + cores


@dataclass(frozen=True)
class BreakEven:
    """When a bank has paid for itself against running the teachers live.

    Attributes:
        views: of the bank.
        epochs: of training, over all students, after which the bank is the cheaper;
            infinity where it never is.
        students: of so many epochs as were assumed, the last one begun.
    """

    views: int
    epochs: float
    students: float


def break_even(make: float, live_epoch: float, cached_epoch: float = 0.0) -> float:
    """Returns the epochs after which a bank is cheaper than live teachers.

    Live teachers run once per sample and epoch: E epochs cost ``E * live_epoch``. A
    bank costs ``make`` once, whatever E is, and ``cached_epoch`` each time it is read::

        E * live_epoch = make + E * cached_epoch
        E = make / (live_epoch - cached_epoch)

    With V views ``make`` holds ``V * forward``: V views cost V epochs of live teachers
    and decoding, encoding and storage beside. A student decodes its own images in both
    worlds, so that is in neither epoch.

    Args:
        make: of making and keeping the bank.
        live_epoch: of the teachers' forwards on every sample once.
        cached_epoch: of reading one view of every sample once.

    Returns:
        Epochs, in any one unit of cost; infinity where live is never dearer.
    """
    saved = live_epoch - cached_epoch
    return make / saved if saved > 0 else math.inf


@dataclass(frozen=True)
class Amounts:
    """What a job makes, for all its rows.

    Attributes:
        seconds: this machine's, for what is to do.
        views: that they are for.
        feature_bytes: of one view of all features.
        record_bytes: of all else.
        feature_objects: of one view.
        other_objects: commits, row facts, metadata and the like.
    """

    seconds: MachineSeconds
    views: int
    feature_bytes: float
    record_bytes: float
    feature_objects: float
    other_objects: float

    @property
    def bytes(self) -> float:
        """All of it."""
        return self.bytes_for(self.views)

    @property
    def objects(self) -> float:
        """All of them."""
        return self.views * self.feature_objects + self.other_objects

    def bytes_for(self, views: int) -> float:
        """Returns all bytes with another number of views."""
        return views * self.feature_bytes + self.record_bytes


@dataclass(frozen=True)
class Price:
    """What a job costs in dollars.

    Attributes:
        per_hour: of one machine.
        machines: of the hours of all machines.
        writes: of writing objects.
        storage_month: of keeping the bank for a month.
        egress: of reading the bank once from outside the provider.
    """

    per_hour: float
    machines: float
    writes: float
    storage_month: float
    egress: float

    @property
    def making(self) -> float:
        """What ``limits.max_usd`` is compared with: all until the bank is there."""
        return self.machines + self.writes


def machine_hours(amounts: Amounts, assumed: Assumed) -> float:
    """Returns the hours of all machines together."""
    return amounts.seconds.total / (assumed.speedup or 1.0) / 3600


def price_of(
    amounts: Amounts, assumed: Assumed, per_hour: float, storage: StoragePrices
) -> Price:
    """Returns what a job costs.

    Args:
        amounts: of the job.
        assumed: how much faster the machine is.
        per_hour: of one machine, dollars.
        storage: prices of the object store.
    """
    return Price(
        per_hour=per_hour,
        machines=machine_hours(amounts, assumed) * per_hour,
        writes=amounts.objects / 1000 * storage.writes_per_1000,
        storage_month=amounts.bytes / GB * storage.gb_month,
        egress=amounts.bytes / GB * storage.egress_gb,
    )


def break_evens(
    amounts: Amounts,
    assumed: Assumed,
    per_hour: float | None,
    storage: StoragePrices,
) -> list[BreakEven]:
    """Returns when banks of 1, 2, 4 and 8 views have paid for themselves.

    Args:
        amounts: of the job.
        assumed: months of storage, epochs of a student, how much faster a machine is.
        per_hour: of one machine, dollars. None: only machine time is compared, storage
            is left out.
        storage: prices of the object store.
    """
    seconds = amounts.seconds
    live = seconds.forward / amounts.views
    found = []
    for views in VIEWS:
        make, epoch, read = seconds.with_views(views / amounts.views), live, 0.0
        if per_hour is not None:
            rate = per_hour / 3600 / (assumed.speedup or 1.0)
            objects = views * amounts.feature_objects + amounts.other_objects
            kept = amounts.bytes_for(views) / GB * storage.gb_month * assumed.months
            make = make * rate + objects / 1000 * storage.writes_per_1000 + kept
            epoch = live * rate
            read = amounts.feature_objects / 1000 * storage.reads_per_1000
        epochs = break_even(make, epoch, read)
        found.append(BreakEven(views, epochs, epochs / assumed.student_epochs))
    return found


def student_bandwidth(bytes_per_sample: float, samples_per_second: float) -> float:
    """Returns the bytes a second that a student reads, one view of each sample."""
    return bytes_per_sample * samples_per_second


@dataclass(frozen=True)
class Terms:
    """What a job is priced by.

    Attributes:
        assumed: what only the user knows.
        prices: the list.

    Raises:
        ManifestError: the list has no such machine.
    """

    assumed: Assumed
    prices: Prices

    def __post_init__(self) -> None:
        _ = self.per_hour

    @property
    def per_hour(self) -> float | None:
        """Dollars of one machine; None where none is named."""
        machine = self.assumed.machine
        return None if machine is None else self.prices.per_hour(machine)

    def price(self, amounts: Amounts) -> Price | None:
        """Returns what a job costs, None where no machine is named."""
        if self.per_hour is None:
            return None
        return price_of(amounts, self.assumed, self.per_hour, self.prices.storage)

    def break_evens(self, amounts: Amounts) -> list[BreakEven]:
        """Returns when banks of 1, 2, 4 and 8 views have paid for themselves."""
        return break_evens(amounts, self.assumed, self.per_hour, self.prices.storage)

    def check(self, max_usd: float, amounts: Amounts) -> None:
        """Raises where making a bank may cost more than ``max_usd``.

        Raises:
            PipelineError: it may.
            ManifestError: no machine is named, so that nobody can say.
        """
        price, machine = self.price(amounts), self.assumed.machine
        if price is None:
            raise ManifestError(
                f"limits.max_usd is {max_usd:,g} and cannot be judged without the "
                "type of machine that will run the job; add --machine NAME, one of "
                f"{', '.join(self.prices.machines)}"
            )
        if price.making > max_usd:
            raise PipelineError(
                f"limits.max_usd is {max_usd:,g}, the job may cost "
                f"{price.making:,.3g} on {machine} ({price.machines:,.3g} of machines "
                f"at {price.per_hour:.3f} an hour, {price.writes:,.3g} of writing); "
                "raise it, say how much faster that machine is (--speedup X), pool "
                "grids, or drop teachers or views"
            )
