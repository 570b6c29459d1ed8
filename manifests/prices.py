"""Prices: what a machine costs an hour, and storage a month; a dated YAML.

Owns the document and which machine a name means. What a job costs is ``pipeline.cost``.
The list that comes with the package is `OWN_PRICES`; a user's own takes its place
whole, so that no price of one provider stands beside those of another.
"""

from __future__ import annotations

import datetime
from pathlib import Path
from typing import Annotated

from pydantic import Field, model_validator

from manifests.document import Strict
from manifests.errors import ManifestError
from manifests.loading import load_yaml

OWN_PRICES = str(Path(__file__).parent / "prices.yaml")
GB = 2**30
"""Providers bill binary gigabytes, whatever they call them."""

Price = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=1)]


class HourlyPrices(Strict):
    """What the parts of a machine cost an hour."""

    vcpu: Price = Field(description="of one virtual processor")
    memory_gb: Price = Field(description="of one GB of memory")
    disk_gb: Price = Field(0.0, description="of one GB of a worker's disk")
    accelerators: dict[str, Price] = Field(
        default_factory=dict, description="of one accelerator, by type"
    )


class MachineType(Strict):
    """A machine by its parts, or by its price."""

    vcpus: Count | None = Field(None, description="virtual processors")
    memory_gb: Price | None = Field(None, description="memory")
    disk_gb: Price = Field(0.0, description="disk of a worker")
    accelerators: dict[str, Count] = Field(
        default_factory=dict, description="how many, by type"
    )
    hourly: Price | None = Field(
        None, description="of the whole machine; stands for its parts"
    )

    @model_validator(mode="after")
    def _is_told_once(self) -> MachineType:
        parts = self.vcpus is not None and self.memory_gb is not None
        if parts == (self.hourly is not None):
            raise ValueError(
                "must have either `vcpus` and `memory_gb`, or `hourly` for all of it"
            )
        return self


class StoragePrices(Strict):
    """What an object store costs; GB are binary."""

    gb_month: Price = Field(description="of one GB kept for a month")
    writes_per_1000: Price = Field(description="of 1,000 objects written")
    reads_per_1000: Price = Field(description="of 1,000 objects read")
    egress_gb: Price = Field(description="of one GB read from outside the provider")


class Prices(Strict):
    """A price list, of one day and region."""

    date: datetime.date = Field(description="the day it was read")
    currency: str = Field("USD", pattern="^USD$", description="limits are in dollars")
    region: str
    sources: list[str] = Field(min_length=1, description="where the prices stand")
    hourly: HourlyPrices | None = Field(
        None, description="of parts, for machines that are told by theirs"
    )
    machines: dict[str, MachineType] = Field(min_length=1)
    storage: StoragePrices

    @model_validator(mode="after")
    def _parts_have_prices(self) -> Prices:
        for name, machine in self.machines.items():
            if machine.hourly is not None:
                continue
            if self.hourly is None:
                raise ValueError(f"machines.{name} needs `hourly`: prices of its parts")
            for kind in machine.accelerators:
                if kind not in self.hourly.accelerators:
                    raise ValueError(
                        f"machines.{name} needs hourly.accelerators.{kind}: its price"
                    )
        return self

    def per_hour(self, name: str) -> float:
        """Returns what a machine costs an hour, accelerators and disk included.

        Raises:
            ManifestError: there is no machine of that name.
        """
        machine = self.machines.get(name)
        if machine is None:
            raise ManifestError(
                f"machine must be one of {', '.join(self.machines)}, got {name!r} "
                f"(prices of {self.date}); add it to a list of your own, --prices FILE"
            )
        if machine.hourly is not None:
            return machine.hourly
        # The validators saw to it.
        assert self.hourly is not None
        assert machine.vcpus is not None
        assert machine.memory_gb is not None
        return (
            machine.vcpus * self.hourly.vcpu
            + machine.memory_gb * self.hourly.memory_gb
            + machine.disk_gb * self.hourly.disk_gb
            + sum(
                count * self.hourly.accelerators[kind]
                for kind, count in machine.accelerators.items()
            )
        )


def load_prices(path: str | None = None) -> Prices:
    """Returns a price list; the package's own where no path is given.

    Raises:
        ManifestError: the file is missing, is not YAML or has a wrong field.
    """
    return load_yaml(Prices, path or OWN_PRICES, (), "prices")
