"""Price lists: our own, a user's, and what is refused."""

from __future__ import annotations

import datetime

import pytest
import yaml

from manifests.errors import ManifestError
from manifests.prices import load_prices

OWN = {
    "date": "2030-01-02",
    "region": "here",
    "sources": ["an invoice"],
    "hourly": {"vcpu": 0.5, "memory_gb": 0.25, "accelerators": {"card": 2.0}},
    "machines": {
        "parts": {"vcpus": 4, "memory_gb": 8, "accelerators": {"card": 2}},
        "whole": {"hourly": 1.5},
    },
    "storage": {
        "gb_month": 0.1,
        "writes_per_1000": 0.2,
        "reads_per_1000": 0.3,
        "egress_gb": 0.4,
    },
}


def load(tmp_path, **fields):
    path = tmp_path / "prices.yaml"
    path.write_text(yaml.safe_dump(OWN | fields))
    return load_prices(str(path))


def test_our_own_prices_are_dated_and_say_where_they_stand():
    prices = load_prices()
    assert prices.date >= datetime.date(2026, 11, 22)
    assert prices.region == "us-central1"
    assert all(source.startswith("https://") for source in prices.sources)
    # 8 vCPUs, 32 GB, 50 GB of disk and an L4, by Dataflow's list.
    by_hand = 8 * 0.056 + 32 * 0.003557 + 50 * 0.000054 + 0.672
    assert prices.per_hour("g2-standard-8") == pytest.approx(by_hand)


def test_a_machine_is_its_parts_or_its_price(tmp_path):
    prices = load(tmp_path)
    assert prices.per_hour("parts") == 4 * 0.5 + 8 * 0.25 + 2 * 2.0
    assert prices.per_hour("whole") == 1.5
    with pytest.raises(
        ManifestError, match=r"one of parts, whole, got 'tpu'.*--prices"
    ):
        prices.per_hour("tpu")


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"machines": {}}, "machines"),
        ({"machines": {"m": {"vcpus": 4}}}, "either `vcpus` and `memory_gb`"),
        (
            {"machines": {"m": {"vcpus": 4, "memory_gb": 8, "hourly": 1}}},
            "either `vcpus` and `memory_gb`",
        ),
        (
            {"machines": {"m": OWN["machines"]["parts"] | {"accelerators": {"x": 1}}}},
            r"needs hourly\.accelerators\.x",
        ),
        ({"hourly": None}, "needs `hourly`"),
        ({"storage": OWN["storage"] | {"gb_month": -1}}, "greater than or equal to 0"),
        ({"storage": OWN["storage"] | {"egress_gb": ".nan"}}, "egress_gb"),
        ({"currency": "EUR"}, "currency"),
        ({"date": "soon"}, "date"),
        ({"vat": 0.2}, "vat"),
    ],
)
def test_what_is_no_price_list_is_refused(tmp_path, fields, told):
    with pytest.raises(ManifestError, match=told):
        load(tmp_path, **fields)


def test_a_list_that_is_not_there_is_named(tmp_path):
    with pytest.raises(ManifestError, match=r"cannot read the prices: .*gone\.yaml"):
        load_prices(str(tmp_path / "gone.yaml"))
