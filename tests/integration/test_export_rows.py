"""Parts of chosen rows: the same values, the same joins, and nothing of other rows."""

from __future__ import annotations

import gzip
import hashlib
import json
import re

import fsspec
import numpy as np
import pyarrow.parquet as pq
import pytest
import tensorstore

from manifests.exported import Selection
from manifests.loading import load_job
from pipeline.bank.blocks import read_block
from pipeline.bank.export import export
from pipeline.bank.open import open_bank
from pipeline.bank.record import open_record
from pipeline.bank.row_names import KeyList
from pipeline.precompute import precompute
from pipeline.recheck_rows import recheck
from pipeline.samples.errors import ShardError
from student_train import BankDataset, Reading
from teachonce.cli import main
from tests.conftest import bank_identity, jpeg, write_job, write_shards, write_tar
from tests.exporting import check_sound, key_file
from tests.training import write_recipe

PATCH, LAYER = "net/image/16x16/patch", "net/image/16x16/layer1"
SUFFIXES = ("", "_scale", "_mean", "_std")
CHOSEN = ["s0-0001", "s0-0004", "s0-0009", "s1-0000", "s1-0002", "s1-0005"]


def index_of(bank):
    return {
        (line["shard"], line["key"]): line
        for part in sorted((bank / "index").glob("*.parquet"))
        for line in pq.read_table(part).to_pylist()
    }


def values_by_key(bank, path, view):
    """Stored bits of every array of an output by (shard, key), read by tensorstore."""
    record = open_record(str(bank))[1]
    output = next(
        output
        for entry in record.passes
        for output in entry.outputs
        if f"{entry.teacher}/{entry.group}/{output.size}/{output.name}" == path
    )
    lines = index_of(bank)
    found = {name: [] for name in lines}
    for data in output.arrays:
        url = f"file://{bank}/features.zarr/{data['path']}/"
        array = tensorstore.open({"driver": "zarr3", "kvstore": url}).result()
        stored = array[:, view].read().result()
        for name, line in lines.items():
            found[name].append(stored[line["row"]].tobytes())
    return found


@pytest.fixture(scope="module")
def part(full, tmp_path_factory):
    """Six samples of two shards, by key; not to be written to."""
    folder = tmp_path_factory.mktemp("rows")
    keys = key_file(folder, [*CHOSEN[:5], f"train-00001.tar\t{CHOSEN[5]}"])
    place = folder / "part"
    assert main(["export", str(full.bank), str(place), "--keys", str(keys)]) == 0
    return place


def test_rows_by_key_have_the_same_bits_views_labels_and_reasons(full, part):
    check_sound(part)
    mine, theirs = index_of(part), index_of(full.bank)
    assert [key for _, key in mine] == CHOSEN
    for name, line in mine.items():
        moved = {"row", "block", "offset"}
        assert {k: v for k, v in line.items() if k not in moved} == {
            k: v for k, v in theirs[name].items() if k not in moved
        }
    ours, whole = open_bank(str(part)), open_bank(str(full.bank))
    assert ours.outputs == whole.outputs
    for path in ours.outputs:
        for view in (0, 1):
            kept = values_by_key(part, path, view)
            before = values_by_key(full.bank, path, view)
            assert kept == {name: before[name] for name in kept}
    rows = [theirs[name]["row"] for name in mine]
    here = [line["row"] for line in mine.values()]
    for array in ("key", "labels/class", "views/flip", "views/image_box", "views/yaw"):
        np.testing.assert_array_equal(
            ours.whole_array(array)[here], whole.whole_array(array)[rows]
        )
    # No row of the axis is there for nothing.
    assert (ours.record.block_rows, ours.record.num_rows) == (3, 6)


def test_it_tells_what_it_is(full, part, capsys):
    record = open_record(str(part))[1]
    (origin,) = record.exported_from
    assert (origin.samples, origin.selection.num_keys) == (17, 6)
    assert record.has_chosen_rows
    rows = np.array([1, 4, 9], "<i8").tobytes()
    assert record.shards[0].chosen_sha256 == hashlib.sha256(rows).hexdigest()
    before = open_record(str(full.bank))[1]
    for one, whole in zip(record.passes, before.passes, strict=True):
        assert one.fingerprint != whole.fingerprint
        assert one.provenance["exported_from"]["fingerprint"] == whole.fingerprint
    assert not list(part.glob("runs/*"))
    card = (part / "README.md").read_text()
    assert "**A part** (6 of its 17 samples, by a list of 6 keys) of" in card
    assert "6 samples of 2 shards" in card
    assert main(["info", str(part)]) == 0
    assert ", 6 of its 17 samples\n" in capsys.readouterr().out
    assert main(["diff", str(full.bank), str(part), "--full", "--json"]) == 1
    told = json.loads(capsys.readouterr().out)
    assert told["samples"] == {"shards": 2, "both": 6, "only_a": 11, "only_b": 0}
    values = {one["output"]: one for one in told["values"]}
    assert len(values) == len(open_bank(str(part)).outputs)
    assert all(one["largest_error"] == 0 for one in values.values())
    # Rows of every output in two views, and 16 cells of each row of `patch`.
    assert values[PATCH]["vectors"] == 6 * 2 * 16
    assert (values[PATCH]["only_a"], values[PATCH]["only_b"]) == (0, 0)
    assert main(["diff", str(full.bank), str(part)]) == 1
    assert "samples  6 in both, by key; 11 only in A, 0 only in B" in (
        capsys.readouterr().out
    )


def test_a_student_of_the_part_sees_the_original_shards(full, part):
    """Samples are read where they lie in the whole shard, and joined by row."""
    reading = Reading(
        {"image": (16, 16)}, {"patch": "net/patch"}, normalise=frozenset()
    )
    whole = BankDataset(str(full.bank), reading, batch=1, seed=0, view=1, shuffle=False)
    images = {
        b.keys[0]: (b.inputs["image"], b.targets["patch"].values()) for b in whole
    }
    dataset = BankDataset(str(part), reading, batch=2, seed=0, view=1)
    seen = []
    for batch in dataset.batches(0):
        for number, key in enumerate(batch.keys):
            image, target = images[key]
            assert (batch.inputs["image"][number] == image[0]).all()
            assert (batch.targets["patch"].values()[number] == target[0]).all()
            seen.append(key)
    assert sorted(seen) == CHOSEN


def test_it_trains(full, part, tmp_path):
    recipe = write_recipe(tmp_path, banks={"main": str(part)})
    run = tmp_path / "run"
    assert main(["train", str(recipe), f"run={run}", "--quiet"]) == 0
    assert (run / "student" / "model.safetensors").exists()


def test_its_job_is_refused_and_its_teachers_agree(full, part, capsys):
    before = bank_identity(part)
    assert main(["precompute", str(full.path), f"bank={part}"]) == 2
    said = capsys.readouterr().err
    assert re.search(
        "must hold every sample of its shards .*got rows that an exp", said
    )
    assert bank_identity(part) == before
    found = recheck(str(part), 10, job=load_job(str(full.path)))
    assert found.holds
    assert found.rows == 6
    assert "rows were chosen" in found.notes["net.image"]
    assert [one.failed for one in found.outputs] == [0] * len(found.outputs)


@pytest.mark.parametrize(("fraction", "seed"), [(0.5, 0), (0.25, 0), (0.5, 3)])
def test_a_fraction_is_the_share_of_a_recipe(full, tmp_path, fraction, seed):
    part = tmp_path / "part"
    command = ["export", full.bank, part, "--fraction", fraction, "--seed", seed]
    assert main([*map(str, command), "--outputs", "patch"]) == 0
    expected = set()
    for shard, key in index_of(full.bank):
        lead = f"{seed}\0" if seed else ""
        word = hashlib.blake2b(f"{lead}{shard}\0{key}".encode(), digest_size=8).digest()
        if int.from_bytes(word, "little") < fraction * 2**64:
            expected.add((shard, key))
    assert 0 < len(expected) < 17
    assert set(index_of(part)) == expected
    check_sound(part)
    # All choices at once, and a part of the part.
    again = tmp_path / "again"
    selection = Selection(fraction=fraction / 2, seed=seed, where=("label.class != 0",))
    export(str(part), str(again), selection)
    lines = index_of(again)
    assert set(lines) < expected
    assert all(line["label.class"] != 0 for line in lines.values())
    check_sound(again)
    text = (again / "README.md").read_text()
    assert f"fraction {fraction:g} with seed {seed}" in text
    assert "where `label.class != 0`" in text


def test_rows_by_what_the_index_says(full, tmp_path):
    part = tmp_path / "part"
    conditions = ["label.class in [1, 2]", 'shard == "train-00000.tar"']
    assert main(["export", str(full.bank), str(part), "--where", *conditions]) == 0
    expected = {
        name
        for name, line in index_of(full.bank).items()
        if line["label.class"] in (1, 2) and name[0] == "train-00000.tar"
    }
    assert set(index_of(part)) == expected
    record = open_record(str(part))[1]
    assert [shard.name for shard in record.shards] == ["train-00000.tar"]
    check_sound(part)


def write_hidden(folder, secret):
    """A bank of two shards whose odd samples, and broken ones, depend on a secret."""
    for number in range(2):
        members = []
        for row in range(9):
            seed = 100 * number + row + (secret if row % 2 else 0)
            data = b"no picture" if row == 3 and secret else jpeg(seed)
            members.append((f"sample-{row}.jpg", data))
            members.append((f"sample-{row}.cls", str(seed % 5).encode()))
        # Something that gets no row, and is named where all of a shard is told of.
        members.append((f"lost-{secret}.jpg/../x", b""))
        write_tar(folder / "data" / f"train-{number:05d}.tar", members)
    outputs = {
        "patch": {"from": "body"},
        "layer1": {"from": "stem", "encoding": "compact"},
        "logits": {},
    }
    net = {
        "model": "module:./nets.py:Net",
        "weights": "random:1",
        "sizes": [[16, 16]],
        "batch": 4,
        "outputs": outputs,
    }
    job = write_job(folder, teachers={"net": net})
    precompute(load_job(str(job)), quiet=True)
    return folder / "bank"


def test_nothing_of_other_samples_is_in_the_part(tmp_path):
    """Two banks that differ in the samples left behind alone give the same part."""
    keys = KeyList(
        [f"train-0000{n}.tar\tsample-{row}" for n in range(2) for row in (0, 2, 4, 8)],
        "list",
    )
    selections = {
        "exact": Selection(outputs=("patch", "logits"), encodings={"patch": "compact"}),
        "moved": Selection(outputs=("layer1",)),
        "anew": Selection(outputs=("layer1",), encodings={"layer1": "compact"}),
    }
    parts = {name: [] for name in selections}
    for secret in (0, 1000):
        folder = tmp_path / str(secret)
        folder.mkdir()
        bank = write_hidden(folder, secret)
        for name, selection in selections.items():
            part = folder / name
            found = export(str(bank), str(part), selection, keys=keys)
            assert found.mixed_rows == ([LAYER] if name == "moved" else [])
            check_sound(part)
            assert all(not one.faults for one in open_record(str(part))[1].shards)
            parts[name].append(bank_identity(part))
            for path in part.rglob("*"):
                if path.is_file():
                    assert not {b"lost", b"sample-3"} & set(
                        re.findall(b"lost|sample-3", path.read_bytes())
                    ), path
            for path in (part / "dataset").glob("*.parquet"):
                rows = pq.read_table(path).to_pydict()["key"]
                assert rows == [f"sample-{row}" for row in (0, 2, 4, 8)] * 2
    assert parts["exact"][0] == parts["exact"][1]
    # What was rounded beside the others is so still; its mean and deviation are told,
    # and those of an encoding anew are of the rows that are there.
    first, second = parts["moved"]
    differ = {path.split("/c.")[0] for path in first if first[path] != second[path]}
    stats = "features.zarr/net/image/16x16/stats/layer1_"
    stored = {f"features.zarr/{LAYER}{suffix}" for suffix in SUFFIXES}
    assert f"features.zarr/{LAYER}_mean" in differ
    assert all(
        path in stored or path.startswith((stats, "commits/net", "blocks.parquet"))
        for path in differ
    )
    bank = open_bank(str(tmp_path / "0" / "moved"))
    values = bank.read(LAYER, 0)[:4].reshape(-1, 8)
    means = [
        read_block(open_bank(str(tmp_path / "0" / name)).array(LAYER, "_mean"), 0)[0]
        for name in ("moved", "anew")
    ]
    np.testing.assert_allclose(means[1], values.mean(axis=0), rtol=1e-4, atol=1e-6)
    assert abs(means[0] - values.mean(axis=0)).max() > 1e-3
    cards = [(tmp_path / "0" / name / "README.md").read_text() for name in selections]
    assert ["these means alone can be known" in card for card in cards] == [0, 1, 0]
    assert ["**rounded before**" in card for card in cards] == [0, 0, 1]
    assert "held as lossless (no loss)" in cards[0]


def test_rows_of_a_compressed_shard_are_found_by_key(tmp_path):
    (plain,) = write_shards(tmp_path, [9])
    packed = plain.with_suffix(".tar.gz")
    packed.write_bytes(gzip.compress(plain.read_bytes()))
    plain.unlink()
    job = write_job(tmp_path, dataset={"shards": str(packed)})
    precompute(load_job(str(job)), quiet=True)
    part = tmp_path / "part"
    keys = KeyList(["s0-0007", "s0-0002", "s0-0003"], "list")
    assert export(str(tmp_path / "bank"), str(part), keys=keys).is_whole
    reading = Reading({"image": (16, 16)}, {"patch": "net/patch"})
    batches = [
        {
            key: image
            for batch in BankDataset(str(one), reading, batch=1, seed=0, view=0)
            for key, image in zip(batch.keys, batch.inputs["image"], strict=True)
        }
        for one in (tmp_path / "bank", part)
    ]
    assert sorted(batches[1]) == ["s0-0002", "s0-0003", "s0-0007"]
    for key, image in batches[1].items():
        assert (image == batches[0][key]).all()
    # Another shard of that name and length is refused, by its headers.
    size = packed.stat().st_size
    data = gzip.compress(b"\0" * 10240)
    packed.write_bytes(data + b"\0" * (size - len(data)))
    with pytest.raises(ShardError, match="members differ"):
        list(BankDataset(str(part), reading, batch=1, seed=0, view=0))


def test_two_parts_are_compared_by_key_however_many_rows_they_have(
    full, tmp_path, capsys
):
    """As many samples of the same shard, in blocks as long: others all the same."""
    parts = [tmp_path / name for name in ("first", "second")]
    for part, rows in zip(parts, ((1, 3), (3, 5)), strict=True):
        keys = KeyList([f"s0-{row:04d}" for row in rows], "list")
        export(str(full.bank), str(part), Selection(outputs=("patch",)), keys=keys)
    records = [open_record(str(part))[1] for part in parts]
    assert records[0].block_rows == records[1].block_rows
    assert main(["diff", *map(str, parts), "--full", "--json"]) == 1
    told = json.loads(capsys.readouterr().out)
    assert told["samples"] == {"shards": 1, "both": 1, "only_a": 1, "only_b": 1}
    (values,) = told["values"]
    assert (values["vectors"], values["largest_error"]) == (2 * 16, 0)


def test_through_a_store_that_is_no_disk(full, tmp_path):
    url = f"memory://rows-{tmp_path.name}/bank"
    export(str(full.bank), url, Selection(fraction=0.5))
    check_sound(url)
    back, direct = tmp_path / "back", tmp_path / "direct"
    export(url, str(back), Selection(where=("label.class != 1",)))
    check_sound(back)
    both = Selection(fraction=0.5, where=("label.class != 1",))
    export(str(full.bank), str(direct), both)
    # The same samples, by whatever way; only their passes say which it was.
    assert set(index_of(back)) == set(index_of(direct))
    values = [values_by_key(one, PATCH, 1) for one in (back, direct)]
    assert values[0] == values[1]
    fsspec.filesystem("memory").rm(url.rpartition("/")[0], recursive=True)
