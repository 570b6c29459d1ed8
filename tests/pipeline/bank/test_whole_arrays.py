"""Keys, validity, labels and statistics: damage is refused by name."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path

import numpy as np
import pytest

from manifests.errors import BankError
from pipeline.bank.open import Bank, open_bank
from tests.fuzz.targets import BANKS

VALID = "net/image/16x32/valid"
MEAN = "half/image/16x32/stats/patch_mean"


@pytest.fixture
def bank(tmp_path: Path) -> Bank:
    with zipfile.ZipFile(BANKS / "schema-1.zip") as stored:
        stored.extractall(tmp_path)
    return open_bank(str(tmp_path / "bank"))


def place(bank: Bank, path: str) -> Path:
    return Path(bank.url) / "features.zarr" / path


@pytest.mark.parametrize(
    ("path", "name"),
    [("key", "c.0"), (VALID, "c.0"), ("labels/class", "c.0"), (MEAN, "c.0")],
)
def test_a_flipped_bit_and_a_lost_object_are_refused(bank, path, name):
    held = bank.whole_array(path)
    target = place(bank, f"{path}/{name}")
    data = bytearray(target.read_bytes())
    data[len(data) // 2] ^= 1
    target.write_bytes(data)
    with pytest.raises(BankError, match=rf"{path}\S* is damaged \(.*--repair"):
        bank.whole_array(path)
    target.unlink()
    with pytest.raises(BankError, match=rf"{path}/{name} is missing; .*--repair"):
        bank.whole_array(path)
    data[len(data) // 2] ^= 1
    target.write_bytes(data)
    np.testing.assert_array_equal(bank.whole_array(path), held)


@pytest.mark.parametrize("path", ["key", VALID, "views/image_box", MEAN])
@pytest.mark.parametrize(
    "change",
    [
        {"shape": [10**12, 2, 5]},
        {"shape": [1]},
        {"shape": []},
        {"data_type": "complex128"},
        {"data_type": "int-128"},
        {"codecs": []},
        {"chunk_grid": 3},
        {"node_type": "group"},
        {"zarr_format": 2},
        None,
        "[" * 5000,
    ],
)
def test_metadata_of_another_array_is_refused(bank, path, change):
    target = place(bank, f"{path}/zarr.json")
    if isinstance(change, dict):
        document = {**json.loads(target.read_bytes()), **change}
        target.write_text(json.dumps(document))
    else:
        target.write_text(change or "{")
    with pytest.raises(BankError, match=path):
        bank.whole_array(path)


def test_what_is_no_array(bank):
    with pytest.raises(BankError, match=r"no array 'nothing/there' in .*features.zarr"):
        bank.whole_array("nothing/there")
    with pytest.raises(BankError, match="net/image is a group, not an array"):
        bank.whole_array("net/image")
    with pytest.raises(BankError, match=r"no array '\.\./bank.json'"):
        bank.whole_array("../bank.json")


def test_an_array_that_was_grown_is_read_as_far_as_the_record_says(bank):
    """Another run grows the bank: longer metadata, no objects yet."""
    held = bank.whole_array(VALID)
    target = place(bank, f"{VALID}/zarr.json")
    document = json.loads(target.read_bytes())
    document["shape"] = [200_000]
    target.write_text(json.dumps(document))
    np.testing.assert_array_equal(bank.whole_array(VALID), held)
