"""A bank that holds copies of its images: made, grown, verified, mended, passed on."""

from __future__ import annotations

import io
import json
import shutil

import numpy as np
import pytest
import tensorstore
import zarr
from PIL import Image

from manifests.bank import BankRecord
from manifests.errors import BankError, ManifestError, TeachOnceError
from manifests.exported import Selection
from manifests.loading import load_job
from pipeline.bank.export import export
from pipeline.bank.open import open_bank
from pipeline.bank.record import open_record
from pipeline.bank.verify import verify
from pipeline.plan import make_plan
from pipeline.precompute import precompute, repair
from tests.conftest import POINTS_INPUT, bank_identity, jpeg, write_tar
from tests.storing import BLOCK_ROWS, BROKEN, MAKERS, resized, store_job

ARRAY = "stored_inputs/image/native/jpeg"


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    """A job that stores its images, its bank made; not to be written to."""
    path = store_job(tmp_path_factory.mktemp("stored"))
    precompute(load_job(str(path)), quiet=True)
    return path


@pytest.fixture
def copied(stored, tmp_path):
    """A copy of it to write to."""
    shutil.copytree(stored.parent, tmp_path / "own")
    return tmp_path / "own" / "job.yaml"


def rows_of(bank):
    keys = open_bank(str(bank)).keys()
    return {key: row for row, key in enumerate(keys.tolist()) if key}


def psnr_db(a, b):
    return 10 * np.log10(255**2 / max(np.mean((a - b) ** 2.0), 1e-9))


def test_each_copy_is_the_whole_upright_image_resized_once(stored):
    bank = open_bank(str(stored.parent / "bank"))
    rows = rows_of(stored.parent / "bank")
    assert bank.stored_inputs == {"image": ARRAY}
    assert bank.outputs == ("net/image/16x16/logits", "net/image/16x16/patch")
    for key in MAKERS:
        block, offset = divmod(rows[key], BLOCK_ROWS)
        data = bank.stored_images("image", block)[offset]
        if key == BROKEN:
            assert data == b""
            continue
        copy = Image.open(io.BytesIO(data))
        expected = resized(key)
        assert (copy.format, copy.mode, copy.size) == ("JPEG", "RGB", expected.size)
        found = psnr_db(np.asarray(copy, np.float64), np.asarray(expected, np.float64))
        assert found > 35, key


def test_a_broken_image_is_invalid_for_the_same_reason(stored):
    rows = {row["key"]: row for row in open_bank(str(stored.parent / "bank")).rows()}
    for key, row in rows.items():
        assert row["valid.stored_inputs.image"] == (key != BROKEN)
        assert row["reason.stored_inputs.image"] == row["reason.net.image"]
    assert rows[BROKEN]["reason.net.image"] is not None


def test_stock_readers_read_them(stored):
    root = stored.parent / "bank" / "features.zarr"
    array = zarr.open_group(str(root), mode="r")[ARRAY]
    assert array.metadata.dimension_names == ("sample", "jpeg_byte")
    row = rows_of(stored.parent / "bank")["s1-0002"]
    image = Image.open(io.BytesIO(array[row].tobytes()))
    assert image.size == resized("s1-0002").size
    kvstore = {"driver": "file", "path": f"{root}/{ARRAY}/"}
    other = tensorstore.open({"driver": "zarr3", "kvstore": kvstore}).result()
    assert np.array_equal(other[:].read().result(), array[:])
    quality = zarr.open_group(str(root), mode="r")[f"{ARRAY}_quality"][:]
    assert set(quality.tolist()) == {0, 95}
    assert quality[rows_of(stored.parent / "bank")[BROKEN]] == 0


def test_the_same_job_makes_the_same_bank(stored, tmp_path):
    again = tmp_path / "again"
    precompute(load_job(str(stored), [f"bank={again}"]), quiet=True)
    assert bank_identity(again) == bank_identity(stored.parent / "bank")


def test_a_bank_grows_by_copies_and_nothing_is_rewritten(stored, tmp_path):
    own = tmp_path / "own"
    first = store_job(own, stored_inputs={})
    precompute(load_job(str(first)), quiet=True)
    before = {
        path: (path.read_bytes(), path.stat().st_mtime_ns)
        for folder in ("features.zarr/net", "commits", "rows")
        for path in sorted((own / "bank" / folder).rglob("*"))
        if path.is_file() and not {"stats", "valid"} & set(path.parts)
    }
    done = precompute(load_job(str(store_job(own))), quiet=True)
    assert set(done.result.valid) == {"stored_inputs.image"}
    assert {p: (p.read_bytes(), p.stat().st_mtime_ns) for p in before} == before
    # What it holds then is what a job makes that asks for all at once.
    grown, made = (bank_identity(one) for one in (own / "bank", stored.parent / "bank"))
    differing = {path for path in made if grown.get(path) != made[path]}
    assert {path.split("/")[0] for path in differing} <= {"index", "blocks.parquet"}
    assert precompute(load_job(str(first)), quiet=True).was_done


def test_more_views_need_no_new_copies(copied):
    done = precompute(load_job(str(copied), ["views.random=3"]), quiet=True)
    assert set(done.result.valid) == {"net.image.2"}


def test_a_shard_of_broken_images_gives_no_copies(tmp_path, make_job):
    members = [
        (f"k{row:02d}.jpg", jpeg(row)[: 90 if row % 5 == 0 else None])
        for row in range(60)
    ]
    write_tar(tmp_path / "data" / "train-0.tar", members)
    job = make_job(limits={"max_invalid_fraction": 1.0}, labels={})
    precompute(load_job(str(job)), quiet=True)
    grown = make_job(stored_inputs={"image": {}}, labels={})
    done = precompute(load_job(str(grown)), quiet=True)
    assert "more than 1.0% of a work item of 60 samples is invalid" in str(
        done.result.failures
    )
    assert not (tmp_path / "bank" / "commits" / "stored_inputs.image").exists()


@pytest.mark.parametrize(
    ("field", "value", "told"),
    [
        ("short_side", 16, "short_side: 20 in the bank, 16 now"),
        ("quality", 80, "quality: 95 in the bank, 80 now"),
    ],
)
def test_copies_of_another_kind_are_refused(stored, field, value, told):
    job = load_job(str(stored), [f"stored_inputs.image.{field}={value}"])
    with pytest.raises(BankError, match=told):
        precompute(job, quiet=True)


@pytest.mark.parametrize("quality_too", [False, True])
@pytest.mark.parametrize("how", ["deleted", "cut", "altered"])
def test_damage_is_named_refused_and_mended(copied, how, quality_too):
    bank = copied.parent / "bank"
    whole = bank_identity(bank)
    name = "jpeg_quality/c.1" if quality_too else "jpeg/c.1.0"
    path = bank / "features.zarr/stored_inputs/image/native" / name
    data = path.read_bytes()
    if how == "deleted":
        path.unlink()
    else:
        bad = bytearray(data if how == "altered" else data[:-5])
        bad[len(bad) // 3] ^= 4
        path.write_bytes(bytes(bad))
    report = verify(*open_record(str(bank)), full=True)
    assert report.damaged_blocks == [("stored_inputs.image", 1)]
    if not quality_too:
        with pytest.raises(BankError, match=r"jpeg, block 1"):
            open_bank(str(bank)).stored_images("image", 1)
    done = precompute(load_job(str(copied)), quiet=True, do_repair=True)
    assert done.removed == [("stored_inputs.image", 1)]
    assert bank_identity(bank) == whole


def test_an_image_that_does_not_fit_is_of_less_quality_or_invalid(tmp_path):
    tight = {"image": {"short_side": 40, "quality": 95, "max_bytes": 1100}}
    path = store_job(tmp_path, stored_inputs=tight)
    precompute(load_job(str(path)), quiet=True)
    bank = open_bank(str(tmp_path / "bank"))
    quality = bank.whole_array(f"{ARRAY}_quality")
    reasons = {r["key"]: r["reason.stored_inputs.image"] for r in bank.rows()}
    over = {key for key, why in reasons.items() if why == "jpeg:over_capacity"}
    assert over
    lowered = {key for key, row in rows_of(tmp_path / "bank").items() if quality[row]}
    assert {int(quality[rows_of(tmp_path / "bank")[key]]) for key in lowered} - {95}
    assert over | lowered | {BROKEN} == set(MAKERS)
    for key in over:
        row = rows_of(tmp_path / "bank")[key]
        assert bank.stored_images("image", row // BLOCK_ROWS)[row % BLOCK_ROWS] == b""
    assert verify(*open_record(str(tmp_path / "bank")), full=True).is_sound
    assert repair(bank._store) == []


def test_export_leaves_copies_out_unless_they_are_named(stored, tmp_path):
    bank = str(stored.parent / "bank")
    without = export(bank, str(tmp_path / "without"))
    assert without.is_whole
    assert without.left_out_inputs == ["image"]
    assert not list((tmp_path / "without").rglob("*stored_inputs*"))
    assert open_bank(without.bank).outputs == open_bank(bank).outputs
    card = (tmp_path / "without" / "README.md").read_text()
    assert "copies of the data itself" not in card
    assert f"without {ARRAY}" in card
    again = export(
        bank, str(tmp_path / "along"), Selection(outputs=("logits",), inputs=("im*",))
    )
    assert again.left_out_inputs == []
    part = open_bank(again.bank)
    assert part.outputs == ("net/image/16x16/logits",)
    for block in range(part.record.num_blocks):
        theirs = open_bank(bank).stored_images("image", block)
        assert part.stored_images("image", block) == theirs
    assert verify(*open_record(again.bank), full=True).is_sound
    with pytest.raises(BankError, match=r"inputs must be in the bank, got 'lidar'"):
        export(bank, str(tmp_path / "none"), Selection(inputs=("lidar",)))
    with pytest.raises(BankError, match=r"teachers must be in the bank"):
        export(bank, str(tmp_path / "none"), Selection(teachers=("stored_inputs",)))


def test_rows_take_their_own_copies_along_as_they_are(stored, tmp_path):
    bank = open_bank(str(stored.parent / "bank"))
    chosen = Selection(inputs=("*",), where=("label.class in [1, 3]",))
    part = open_bank(export(bank.url, str(tmp_path / "part"), chosen).bank)
    assert verify(*open_record(part.url), full=True).is_sound

    def copies(one):
        found = {}
        size = one.record.block_rows
        for block in one.record.live_blocks:
            keys = one.keys()[block * size : (block + 1) * size]
            found |= dict(zip(keys, one.stored_images("image", block), strict=True))
        return {key: jpeg for key, jpeg in found.items() if key and jpeg}

    numbers = {key: number % 5 for number, key in enumerate(MAKERS)}
    theirs = copies(bank)
    expected = {key: theirs[key] for key in theirs if numbers[key] in (1, 3)}
    assert len(expected) == 4
    assert copies(part) == expected
    for pattern in ("stored_inputs/jpeg", "stored_inputs/jpeg_quality"):
        otherwise = Selection(inputs=("*",), encodings={pattern: "half"})
        with pytest.raises(BankError, match=r"jpeg"):
            export(bank.url, str(tmp_path / "none"), otherwise)


def test_copies_are_not_exported_once_the_licence_forbids_it(copied, tmp_path):
    path = copied.parent / "bank" / "bank.json"
    record = BankRecord.model_validate_json(path.read_bytes())
    told = {**record.dataset, "license": "imagenet-noncommercial"}
    path.write_text(record.model_copy(update={"dataset": told}).model_dump_json())
    bank = str(copied.parent / "bank")
    with pytest.raises(BankError, match=r"--inputs must be left out: the licence"):
        export(bank, str(tmp_path / "part"), Selection(inputs=("*",)))
    assert export(bank, str(tmp_path / "part")).is_whole


def test_the_card_says_that_there_are_images_and_who_allows_them(tmp_path):
    path = store_job(
        tmp_path,
        dataset={
            "shards": "./data/s?.tar",
            "license": "acme-internal",
            "copies_allowed": "ACME, letter of 2 October",
        },
    )
    precompute(load_job(str(path)), quiet=True)
    card = (tmp_path / "bank" / "README.md").read_text()
    assert "**This bank holds copies of the data itself**" in card
    assert "acme-internal. Copies allowed by: ACME, letter of 2 October." in card
    croissant = json.loads((tmp_path / "bank" / "croissant.json").read_text())
    assert f"With copies of the images, as JPEG: {ARRAY}." in croissant["description"]
    assert "stored_inputs" not in croissant["description"].split("With copies")[0]


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"license": "imagenet-noncommercial"}, r"imagenet-noncommercial, does not"),
        ({"license": "cc-by-4.0; CC-BY-NC-ND-4.0"}, r"cc-by-nc-nd-4.0, does not allow"),
        ({"license": "cityscapes-license", "copies_allowed": "me"}, r"does not allow"),
        ({"license": None}, r"got not stated; state it as dataset.license"),
        ({"license": "acme-internal"}, r"got acme-internal; state it"),
        ({"license": "dinov3-license"}, r"got dinov3-license; state it"),
    ],
)
def test_data_that_may_not_be_copied_is_refused_before_anything(tmp_path, fields, told):
    path = store_job(tmp_path, dataset={"shards": "./data/s?.tar", **fields})
    with pytest.raises(TeachOnceError, match=told):
        precompute(load_job(str(path)), quiet=True)
    assert not (tmp_path / "bank").exists()


def test_other_inputs_and_names_are_refused_by_name(tmp_path):
    def job(**fields):
        return load_job(str(store_job(tmp_path, **fields)))

    with pytest.raises(ManifestError, match=r"stored_inputs.cam must be one of the"):
        job(stored_inputs={"cam": {}})
    inputs = {"image": {"kind": "image", "member": "jpg"}, "lidar": POINTS_INPUT}
    with pytest.raises(ManifestError, match=r"stored_inputs.lidar must be an image"):
        job(inputs=inputs, stored_inputs={"lidar": {}})
    clip = {"kind": "clip", "member": "jpg", "frames": 2}
    with pytest.raises(ManifestError, match=r"got an input of kind clip"):
        job(inputs={"film": clip}, stored_inputs={"film": {}})
    net = {"model": "module:./nets.py:Net", "outputs": {"logits": {}}}
    with pytest.raises(ManifestError, match=r"teachers.stored_inputs: that is where"):
        job(teachers={"stored_inputs": net})


def test_copies_that_no_block_has_room_for_are_refused(tmp_path):
    path = store_job(
        tmp_path, block_rows=2**16, stored_inputs={"image": {"short_side": 44}}
    )
    with pytest.raises(ManifestError, match=r"an image may take [\d,]+ bytes, and bl"):
        precompute(load_job(str(path)), quiet=True)


def test_copies_have_the_room_of_a_block_where_that_is_nearly_ample(tmp_path):
    path = store_job(
        tmp_path, block_rows=2**13, stored_inputs={"image": {"short_side": 44}}
    )
    plan = make_plan(load_job(str(path)))
    (entry,) = [one for one in plan.record.passes if one.holds_inputs]
    # The widest of the images is 200 x 31: at 1.1 bytes a pixel 8,960 would be ample.
    assert entry.request["args"]["max_bytes"] == 2**26 // 2**13 == 8192
    roomy = make_plan(load_job(str(path), ["block_rows=2048"]))
    (entry,) = [one for one in roomy.record.passes if one.holds_inputs]
    assert entry.request["args"]["max_bytes"] == 8960
