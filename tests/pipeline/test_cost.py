"""Hours, prices and break-even, against sums made one epoch at a time."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from manifests.errors import ManifestError
from manifests.prices import GB, StoragePrices, load_prices
from pipeline.cost import (
    Amounts,
    Assumed,
    MachineSeconds,
    Terms,
    break_even,
    break_evens,
    machine_hours,
    price_of,
    student_bandwidth,
)
from pipeline.errors import PipelineError

STORAGE = StoragePrices(
    gb_month=0.02, writes_per_1000=0.005, reads_per_1000=0.0004, egress_gb=0.12
)


def amounts(views: int = 2, is_accelerated: bool = False) -> Amounts:
    return Amounts(
        seconds=MachineSeconds(
            read=100,
            decode=200,
            prepare=300 * views,
            forward=3600 * views,
            encode=50 * views,
            is_accelerated=is_accelerated,
        ),
        views=views,
        feature_bytes=3 * GB,
        record_bytes=GB,
        feature_objects=5000,
        other_objects=1000,
    )


def epochs_until_cheaper(make: float, live: float, cached: float) -> int:
    """The first whole epoch after which the bank has cost less, by adding up."""
    spent_live, spent_bank, epoch = 0.0, make, 0
    while spent_live <= spent_bank and epoch < 100_000:
        epoch += 1
        spent_live += live
        spent_bank += cached
    return epoch


@given(
    st.floats(0.1, 1e4),
    st.floats(0.5, 50.0),
    st.floats(0.0, 0.4, allow_subnormal=False),
)
def test_the_bank_is_cheaper_from_the_break_even_on(make, live, cached):
    found = break_even(make, live, cached)
    counted = epochs_until_cheaper(make, live, cached)
    assert counted - 1 - 1e-6 * counted <= found <= counted + 1e-6 * counted


def test_reading_that_costs_as_much_as_teachers_never_pays():
    assert break_even(10.0, 1.0, 1.0) == math.inf
    assert break_even(10.0, 0.0) == math.inf


def test_views_cost_teachers_and_decoding_is_paid_once():
    # With one view: 300 once, and per view 350 on the cores and 3600 of teachers.
    found = {one.views: one for one in break_evens(amounts(), Assumed(), None, STORAGE)}
    assert list(found) == [1, 2, 4, 8]
    for views, one in found.items():
        by_hand = (300 + views * (350 + 3600)) / 3600
        assert one.epochs == pytest.approx(by_hand)
        assert one.students == pytest.approx(by_hand / 100)


def test_beside_an_accelerator_the_slower_sets_the_pace():
    seconds = amounts(1, is_accelerated=True).seconds
    assert seconds.total == 3600
    assert seconds.with_views(0.01) == 300 + 0.01 * 350


def test_dollars_count_storage_writing_and_reading():
    assumed = Assumed(speedup=4.0, months=6, student_epochs=10)
    per_hour = 2.0
    for one in break_evens(amounts(), assumed, per_hour, STORAGE):
        rate = per_hour / 3600 / 4
        make = (300 + one.views * 3950) * rate
        make += (one.views * 5000 + 1000) / 1000 * 0.005
        make += (3 * one.views + 1) * 0.02 * 6
        live, read = 3600 * rate, 5 * 0.0004
        counted = epochs_until_cheaper(make, live, read)
        assert counted - 1 <= one.epochs <= counted
        assert one.students == pytest.approx(one.epochs / 10)


def test_a_price_is_hours_writing_and_then_storage():
    price = price_of(amounts(), Assumed(speedup=2.0, workers=8), 3.0, STORAGE)
    hours = (300 + 2 * 3950) / 2 / 3600
    assert machine_hours(amounts(), Assumed(speedup=2.0)) == pytest.approx(hours)
    assert price.machines == pytest.approx(hours * 3.0)
    assert price.writes == pytest.approx(11_000 * 0.005 / 1000)
    assert price.making == pytest.approx(price.machines + price.writes)
    assert price.storage_month == pytest.approx(7 * 0.02)
    assert price.egress == pytest.approx(7 * 0.12)
    assert student_bandwidth(152_000, 1000) == 152e6


def test_a_job_that_may_cost_too_much_is_refused():
    terms = Terms(Assumed(machine="g2-standard-8"), load_prices())
    price = terms.price(amounts())
    assert price is not None
    terms.check(price.making, amounts())
    with pytest.raises(
        PipelineError, match=r"max_usd is 1, the job may cost 2\.8.* on"
    ):
        terms.check(1.0, amounts())
    nobody = Terms(Assumed(), load_prices())
    assert nobody.price(amounts()) is None
    with pytest.raises(
        ManifestError, match=r"cannot be judged.*--machine NAME, one of"
    ):
        nobody.check(1.0, amounts())
    with pytest.raises(ManifestError, match="got 'abacus'"):
        Terms(Assumed(machine="abacus"), load_prices())


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("workers", 0),
        ("speedup", -1.0),
        ("speedup", math.nan),
        ("student_rate", 0.0),
        ("student_epochs", 0),
        ("months", math.inf),
    ],
)
def test_what_is_assumed_is_above_zero(field, value):
    with pytest.raises(
        ManifestError, match=f"--{field.replace('_', '-')} must be above"
    ):
        Assumed(**{field: value})
