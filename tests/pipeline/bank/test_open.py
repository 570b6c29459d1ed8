"""Opening a bank: what it says it has, and what it refuses to read."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

from manifests.errors import BankError
from manifests.loading import load_job
from manifests.storage import Store
from pipeline.bank import layout
from pipeline.bank.open import open_bank
from pipeline.bank.record import open_record, read_record, write_record
from pipeline.precompute import precompute
from tests.conftest import write_job, write_shards

PATCH = "net/image/16x16/patch"


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("open")
    write_shards(folder, [11, 5])
    job = load_job(str(write_job(folder)))
    assert precompute(job, quiet=True).is_whole
    return folder / "bank"


def test_outputs_and_values(made):
    bank = open_bank(str(made))
    assert bank.outputs == ("net/image/16x16/logits", PATCH)
    assert bank.output(PATCH).shape == (4, 4, 16)
    values = bank.read(PATCH, 1)
    assert values.dtype == np.float32
    assert np.isnan(values[3:]).all()
    assert np.isfinite(values[:3]).all()
    assert [row["key"] for row in bank.rows()][:2] == ["s0-0000", "s0-0001"]


def test_what_it_does_not_have_is_named(made):
    bank = open_bank(str(made))
    with pytest.raises(
        BankError, match=r"no output 'net/patch'; it has net/image/16x16/"
    ):
        bank.output("net/patch")
    with pytest.raises(BankError, match="has no array with suffix '_scale'"):
        bank.array(PATCH, "_scale")
    with pytest.raises(
        BankError, match=r"must be committed to be read.*block 3, view 0"
    ):
        bank.read(PATCH, 3)
    with pytest.raises(
        BankError, match=r"must be committed to be read.*block 0, view 1"
    ):
        bank.read(PATCH, 0, view=1)
    with pytest.raises(BankError, match="no bank at"):
        open_bank(str(made / "features.zarr"))


def test_a_block_committed_after_the_last_finalise_is_read(made, tmp_path):
    """As a bank that grows looks: commits newer than blocks.parquet."""
    copy = tmp_path / "bank"
    shutil.copytree(made, copy)
    store, record = open_record(str(copy))
    write_record(store, record.model_copy(update={"state": None}))
    bank = open_bank(str(copy))
    np.testing.assert_array_equal(
        bank.read(PATCH, 2), open_bank(str(made)).read(PATCH, 2)
    )
    (copy / "commits" / "net.image" / "00000002.json").unlink()
    with pytest.raises(BankError, match="must be committed"):
        open_bank(str(copy)).read(PATCH, 2)


def test_a_damaged_object_is_refused_by_name(made, tmp_path):
    copy = tmp_path / "bank"
    shutil.copytree(made, copy)
    victim = copy / "features.zarr" / PATCH / "c.1.0.0.0.0"
    victim.write_bytes(victim.read_bytes()[:-1])
    with pytest.raises(
        BankError, match=r"array net/image/16x16/patch, block 1, view 0"
    ):
        open_bank(str(copy)).read(PATCH, 1)
    victim.unlink()
    with pytest.raises(BankError, match="got no object; run precompute --repair"):
        open_bank(str(copy)).read(PATCH, 1)


def test_the_record_comes_back_as_it_was(made, tmp_path):
    record = open_record(str(made))[1]
    store = Store(str(tmp_path / "other"))
    assert read_record(store) is None
    write_record(store, record)
    assert read_record(store) == record


def test_the_layout_is_what_lies_on_disk(made):
    record = open_record(str(made))[1]
    arrays = {spec.path for spec in layout.feature_arrays(record)}
    arrays |= {array.path for array in layout.row_arrays(record)}
    found = {
        str(path.parent.relative_to(made / "features.zarr"))
        for path in (made / "features.zarr").rglob("zarr.json")
        if '"node_type": "array"' in path.read_text() and "stats" not in path.parts
    }
    assert found == arrays
    assert arrays == {
        *("net/image/16x16/logits", PATCH, "net/image/16x16/valid"),
        *("key", "labels/class", "views/flip", "views/image_box", "views/image_size"),
    }
    assert list(layout.levels(record)) == ["net/image/16x16"]


def test_metadata_is_written_once(made):
    store, record = open_record(str(made))
    before = {path: path.stat().st_mtime_ns for path in made.rglob("zarr.json")}
    layout.write_metadata(store, record)
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert set(made.rglob("zarr.json")) == set(before)


def test_what_a_bank_lacks(made, tmp_path):
    """As it is while it grows, and as a copy that was broken off leaves it."""
    assert not open_bank(str(made)).missing()
    copy = tmp_path / "bank"
    shutil.copytree(made, copy)
    objects = [copy / "features.zarr" / PATCH / f"c.{n}.0.0.0.0" for n in (0, 2)]
    objects[0].unlink()
    objects[1].write_bytes(objects[1].read_bytes()[:-1])
    (copy / "commits/net.image/00000001.json").unlink()
    (copy / "index/part-00000.parquet").unlink()
    (copy / "features.zarr" / PATCH / "zarr.json").unlink()
    found = open_bank(str(copy)).missing()
    assert found.is_damaged
    assert found.blocks == {}
    assert found.commits == ("commits/net.image/00000001.json",)
    assert found.objects == tuple(str(path.relative_to(copy)) for path in objects)
    assert found.files == (
        f"features.zarr/{PATCH}/zarr.json",
        "index/part-00000.parquet",
    )
    shutil.rmtree(copy / "commits/net.image")
    (copy / "blocks.parquet").unlink()
    found = open_bank(str(copy)).missing()
    assert found.blocks == {"net.image": (0, 1, 2)}
    assert (found.commits, found.objects) == ((), ())


def test_a_bank_that_only_grows_is_not_damaged(made, tmp_path):
    copy = tmp_path / "bank"
    shutil.copytree(made, copy)
    store, record = open_record(str(copy))
    write_record(store, record.model_copy(update={"state": None}))
    for path in ("blocks.parquet", "commits/net.image/00000002.json"):
        (copy / path).unlink()
    for path in (copy / "features.zarr").rglob("c.2.*"):
        path.unlink()
    found = open_bank(str(copy)).missing()
    assert found
    assert not found.is_damaged
    assert found.blocks == {"net.image": (2,)}
