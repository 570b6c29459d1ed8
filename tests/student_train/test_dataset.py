"""BankDataset: what is in each batch, in which order, and what is refused by name."""

from __future__ import annotations

import contextlib
import gzip
import io
import itertools
import math
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import zarr
from PIL import Image

from manifests.loading import load_job
from pipeline.bank.open import Bank, open_bank
from pipeline.precompute import precompute
from student_train import BankDataset, Reading
from student_train.dataset import bank_loader
from tests.conftest import write_job
from tests.student_train.conftest import (
    BLOCK_ROWS,
    LEAN,
    NO_IMAGE,
    NO_LABEL,
    NO_SWEEP,
    READING,
    SEG,
    SIZE,
    assert_equal,
    contents,
    epoch_of,
    our_threads,
)

pytestmark = pytest.mark.usefixtures("no_thread_stays")
TARGETS = Reading(targets={"patch": "net/patch", "points": "points/pooled"})


def joined_rows(batches, name):
    return np.concatenate([batch[name] for batch in batches])


# What is in a batch.


@pytest.fixture(scope="module", params=[0, 1, 3, "epoch"])
def everything(request, bank):
    """Two epochs of all there is, with the view of each row."""
    dataset = BankDataset(
        bank,
        READING,
        batch=7,
        view=request.param,
        window_blocks=3,
        threads=2,
        keep_rest=True,
    )
    batches = epoch_of(dataset, 0) + epoch_of(dataset, 1)
    views = [
        dataset.view_at(int(row) // BLOCK_ROWS, int(batch["at"][0]))
        for batch in batches
        for row in batch["rows"]
    ]
    return batches, np.array(views)


def test_every_row_once_with_its_key(everything, bank):
    batches, views = everything
    keys = bank.keys()
    usable = [row for row, key in enumerate(keys) if key not in ("", NO_IMAGE)]
    for epoch in (0, 1):
        mine = [batch for batch in batches if batch["at"][0] == epoch]
        assert sorted(joined_rows(mine, "rows")) == usable
        assert [len(batch["rows"]) for batch in mine] == [7, 7, 7, 3]
        assert [batch["at"][1] for batch in mine] == [0, 1, 2, 3]
    rows = joined_rows(batches, "rows")
    assert joined_rows(batches, "keys").tolist() == keys[rows].tolist()
    if len(set(views.tolist())) > 1:
        # The two epochs show each block in different random views.
        assert 0 not in views
        shown = dict(zip(zip(rows.tolist(), itertools.cycle([0])), views, strict=False))
        assert set(shown.values()) == {1, 2, 3}


@pytest.mark.parametrize(
    ("name", "path"),
    [
        ("patch", "net/image/16x16/patch"),
        ("half", "net/image/16x16/layer1"),
        ("top", "net/image/16x16/logits"),
        ("brain", "brain/image/16x16/patch"),
        ("all", "brain/image/16x16/logits"),
        ("points", "points/lidar/native/pooled"),
        ("raw_logits", "points/lidar/native/logits"),
    ],
)
def test_targets_are_the_banks_own_decode_standardised(everything, bank, name, path):
    batches, views = everything
    rows = joined_rows(batches, "rows")
    found = joined_rows(batches, f"targets/{name}")
    expected = np.stack(
        [
            bank.read(path, int(row) // BLOCK_ROWS, int(view))[row % BLOCK_ROWS]
            for row, view in zip(rows, views, strict=True)
        ]
    )
    if not path.endswith("logits"):
        level, _, output = path.rpartition("/")
        features = zarr.open_group(f"{bank.url}/features.zarr", mode="r")
        mean = features[f"{level}/stats/{output}_mean"][...]
        std = np.sqrt(features[f"{level}/stats/{output}_variance"][...])
        expected = (expected - mean) / np.maximum(std, 0.01 * np.median(std))
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected, rtol=2e-5, atol=2e-5)
    valid = joined_rows(batches, f"targets/{name}/valid")
    keys = bank.keys()[rows]
    invalid = NO_SWEEP if path.startswith("points") else NO_IMAGE
    np.testing.assert_array_equal(valid, keys != invalid)
    np.testing.assert_array_equal(
        valid, np.isfinite(found).all(axis=tuple(range(1, found.ndim)))
    )
    assert np.isnan(found[~valid]).all()


def boxes_of(bank: Bank, rows, views):
    """What the bank wrote down of each row's view."""
    group = zarr.open_group(f"{bank.url}/features.zarr/views", mode="r")
    box, flip = group["image_box"][...], group["flip"][...]
    return [
        (tuple(box[row, view].tolist()), bool(flip[row, view]))
        for row, view in zip(rows, views, strict=True)
    ]


def test_inputs_are_what_the_recorded_numbers_say(everything, bank, joined):
    batches, views = everything
    rows, keys = joined_rows(batches, "rows"), joined_rows(batches, "keys")
    pixels = joined_rows(batches, "inputs/image")
    assert pixels.dtype == np.uint8
    shown = boxes_of(bank, rows, views)
    for number, (key, (box, flip)) in enumerate(zip(keys, shown, strict=True)):
        image = Image.open(io.BytesIO(joined.samples[key].jpeg)).convert("RGB")
        seen = image.resize(SIZE[::-1], Image.Resampling.BICUBIC, box=box)
        expected = np.asarray(seen)[:, ::-1] if flip else np.asarray(seen)
        np.testing.assert_array_equal(pixels[number], expected, err_msg=key)
    if (views > 0).all():
        assert {flip for _, flip in shown} == {True, False}


def test_label_maps_follow_the_view(everything, bank, joined):
    batches, views = everything
    rows, keys = joined_rows(batches, "rows"), joined_rows(batches, "keys")
    seg = joined_rows(batches, "labels/seg")
    depth = joined_rows(batches, "labels/depth")
    assert (seg.dtype, depth.dtype) == (np.int64, np.float32)
    shown = boxes_of(bank, rows, views)
    for number, (key, (box, flip)) in enumerate(zip(keys, shown, strict=True)):
        sample = joined.samples[key]
        height, width = sample.seg.shape

        def in_view(values, box=box, flip=flip, height=height, width=width):
            down, across = values.shape[0] / height, values.shape[1] / width
            scaled = np.array(box) * [across, down, across, down]
            image = Image.fromarray(values.astype(np.int32))
            seen = image.resize(SIZE[::-1], Image.Resampling.NEAREST, box=tuple(scaled))
            return np.asarray(seen)[:, ::-1] if flip else np.asarray(seen)

        classes = in_view(sample.seg)
        np.testing.assert_array_equal(seg[number], np.where(classes == 3, -1, classes))
        numbers = in_view(sample.depth)
        expected = np.where(numbers == 7, np.nan, numbers * 0.25)
        np.testing.assert_allclose(depth[number], expected, rtol=1e-6)


def test_labels_of_the_bank(everything, joined):
    batches, _ = everything
    keys = joined_rows(batches, "keys")
    classes = joined_rows(batches, "labels/class")
    numbers = joined_rows(batches, "labels/number")
    assert (classes.dtype, numbers.dtype) == (np.int64, np.float32)
    expected = [-1 if key == NO_LABEL else joined.samples[key].label for key in keys]
    assert classes.tolist() == expected
    np.testing.assert_array_equal(
        numbers, [math.nan if label < 0 else label for label in expected]
    )


def test_cameras_see_a_sweep_where_the_view_shows_it(everything, bank, joined):
    """A point through the view's camera lies where its pixel went in the view."""
    batches, views = everything
    rows, keys = joined_rows(batches, "rows"), joined_rows(batches, "keys")
    intrinsics = joined_rows(batches, "cameras/image/intrinsics")
    lidar2cam = joined_rows(batches, "cameras/image/lidar2cam")
    assert intrinsics.dtype == lidar2cam.dtype == np.float32
    group = zarr.open_group(f"{bank.url}/features.zarr/views", mode="r")
    yaws, scales = group["yaw"][...], group["scale"][...]
    points = np.random.default_rng(0).uniform([5, -3, -1], [20, 3, 1], (9, 3))
    shown = boxes_of(bank, rows, views)
    for number, (key, (box, flip)) in enumerate(zip(keys, shown, strict=True)):
        sample = joined.samples[key]
        seen = points @ sample.lidar2cam[:3, :3].T + sample.lidar2cam[:3, 3]
        full = seen @ sample.intrinsics.T
        full = full[:, :2] / full[:, 2:]
        expected = (full - box[:2]) / (np.array(box[2:]) - box[:2]) * SIZE[::-1]
        if flip:
            expected[:, 0] = SIZE[1] - expected[:, 0]
        moved = points * [1, -1 if flip else 1, 1]
        yaw = float(yaws[rows[number], views[number]])
        turn = np.array(
            [[np.cos(yaw), -np.sin(yaw), 0], [np.sin(yaw), np.cos(yaw), 0], [0, 0, 1]]
        )
        moved = moved @ turn.T * float(scales[rows[number], views[number]])
        seen = moved @ lidar2cam[number, :3, :3].T + lidar2cam[number, :3, 3]
        found = seen @ intrinsics[number].T
        np.testing.assert_allclose(found[:, :2] / found[:, 2:], expected, atol=1e-3)


def test_a_row_needs_one_target_or_label_and_its_input(bank):
    keys = bank.keys()

    def used(reading, **options):
        dataset = BankDataset(bank, reading, batch=4, keep_rest=True, view=0, **options)
        rows = joined_rows(epoch_of(dataset), "rows")
        assert len(rows) == dataset.num_rows
        return {str(key) for key in keys if key} - set(keys[rows].tolist())

    assert used(TARGETS) == set()
    assert used(Reading(targets={"p": "points/pooled"})) == {NO_SWEEP}
    assert used(Reading(targets={"p": "net/patch"})) == {NO_IMAGE}
    assert used(Reading(labels=["class"])) == {NO_LABEL}
    assert used(Reading(labels=["number"])) == {NO_LABEL}
    assert used(Reading(inputs={"image": (8, 8)})) == {NO_IMAGE}
    # A map follows the view of its image, which must be known.
    assert used(Reading(inputs={"image": (8, 8)}, maps={"seg": SEG})) == {NO_IMAGE}
    assert BankDataset(bank, Reading(maps={"seg": SEG}), batch=1).num_rows == 24
    both = Reading(inputs={"image": (8, 8)}, targets={"p": "points/pooled"})
    assert used(both) == {NO_IMAGE, NO_SWEEP}


def test_a_batch_has_one_of_several_sizes(bank):
    sizes = [(8, 8), (12, 16), (16, 8)]
    dataset = BankDataset(bank, Reading(inputs={"image": sizes}), batch=2, view=0)
    shapes = [b["inputs/image"].shape[1:3] for b in epoch_of(dataset)]
    assert set(shapes) == set(sizes)
    assert shapes[5:] == [b["inputs/image"].shape[1:3] for b in epoch_of(dataset, 0, 5)]
    assert shapes != [b["inputs/image"].shape[1:3] for b in epoch_of(dataset, 1)]


def test_what_is_normalised_can_be_chosen(bank):
    plain = BankDataset(
        bank,
        Reading(targets=TARGETS.targets, normalise=frozenset({"points"})),
        batch=25,
        view=0,
        shuffle=False,
    )
    (batch,) = plain.batches(0)
    expected = np.concatenate([bank.read("net/image/16x16/patch", b) for b in range(7)])
    found = batch.targets["patch"].values().numpy()
    np.testing.assert_array_equal(found, expected[batch.rows])
    assert plain.sources["patch"].normaliser is None
    assert plain.sources["points"].normaliser is not None


# The same whatever makes it.


@pytest.fixture(scope="module")
def reference(bank):
    """Two epochs of all there is, made in the plainest way."""
    dataset = make(bank, threads=1, prefetch=0)
    return epoch_of(dataset, 0) + epoch_of(dataset, 1)


def make(bank, **options):
    fixed = {"batch": 8, "window_blocks": 4, "seed": 3}
    return BankDataset(bank, READING, **(fixed | options))


@pytest.mark.parametrize("threads", [1, 4, 16])
@pytest.mark.parametrize("prefetch", [0, 1, 7])
def test_threads_and_prefetch_change_nothing(bank, reference, threads, prefetch):
    dataset = make(bank, threads=threads, prefetch=prefetch)
    assert dataset.num_steps == 3
    stream = itertools.islice(dataset.stream(), 6)
    assert_equal([contents(batch) for batch in stream], reference)


@pytest.mark.parametrize("window", [1, 2])
def test_small_blocks_and_many_threads(bank, window):
    """A batch needs more blocks than may lie in memory; nobody waits for ever."""
    plain = make(bank, batch=24, threads=1, prefetch=0, window_blocks=window)
    expected = [batch for epoch in range(4) for batch in epoch_of(plain, epoch)]
    dataset = make(bank, batch=24, threads=16, prefetch=4, window_blocks=window)
    found = [contents(batch) for batch in itertools.islice(dataset.stream(), 4)]
    assert_equal(found, expected)


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
@pytest.mark.parametrize("workers", [1, 2, 4])
def test_workers_change_nothing(bank, reference, workers):
    state = torch.get_rng_state()
    with contextlib.closing(
        bank_loader(make(bank, threads=2), workers, epoch=0, step=1)
    ) as loader:
        found = [contents(batch) for batch in itertools.islice(loader, 5)]
    assert_equal(found, reference[1:])
    # Nor what a student draws: dropout goes on as it would without workers.
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
def test_workers_without_a_row(bank):
    """Of an epoch's last batch there may be fewer rows than workers."""
    options = {"batch": 7, "keep_rest": True}
    expected = epoch_of(make(bank, **options))
    assert [len(batch["rows"]) for batch in expected] == [7, 7, 7, 3]
    with contextlib.closing(bank_loader(make(bank, **options), 4)) as loader:
        found = [contents(batch) for batch in itertools.islice(loader, 4)]
    assert_equal(found, expected)
    lonely = list(make(bank, rank=3, world_size=4, **options).batches(0))
    assert [len(batch) for batch in lonely] == [1, 1, 1, 0]
    assert lonely[-1].inputs["image"].shape == (0, *SIZE, 3)
    assert lonely[-1].targets["patch"].values().shape == (0, 4, 4, 16)


def test_a_loader_of_ones_own(bank, reference):
    """Every worker gives its share of each batch, in turn."""
    dataset = make(bank, threads=1)
    dataset.epoch = 1
    loader = torch.utils.data.DataLoader(dataset, batch_size=None, num_workers=2)
    shares = [share.rows for share in loader]
    rows = [np.concatenate(shares[i : i + 2]) for i in range(0, len(shares), 2)]
    for one, other in zip(rows, reference[3:], strict=True):
        np.testing.assert_array_equal(one, other["rows"])


@pytest.mark.parametrize("world_size", [2, 4])
def test_ranks_share_each_batch(bank, reference, world_size):
    ranks = []
    for rank in range(world_size):
        dataset = make(bank, rank=rank, world_size=world_size, threads=1)
        assert dataset.num_steps == 3
        ranks.append(list(dataset.batches(0)))
    assert {len(batches) for batches in ranks} == {3}
    for step, whole in enumerate(reference[:3]):
        parts = [batches[step] for batches in ranks]
        assert {len(part) for part in parts} == {8 // world_size}
        rows = np.concatenate([part.rows for part in parts])
        np.testing.assert_array_equal(rows, whole["rows"])
        pixels = np.concatenate([part.inputs["image"].numpy() for part in parts])
        np.testing.assert_array_equal(pixels, whole["inputs/image"])


def test_ranks_and_workers_together(bank, reference):
    rows = []
    for rank in range(2):
        dataset = make(bank, rank=rank, world_size=2, threads=1)
        with contextlib.closing(bank_loader(dataset, 2)) as loader:
            rows.append([batch.rows for batch in itertools.islice(loader, 3)])
    for step in range(3):
        found = np.concatenate([rows[0][step], rows[1][step]])
        np.testing.assert_array_equal(found, reference[step]["rows"])


def test_a_resume_gives_the_same_batches(bank, reference):
    dataset = make(bank, threads=2)
    for start in range(6):
        epoch, step = divmod(start, 3)
        stream = itertools.islice(dataset.stream(epoch, step), 6 - start)
        assert_equal([contents(batch) for batch in stream], reference[start:])
        assert_equal(epoch_of(dataset, epoch, step), reference[start : 3 * epoch + 3])
    dataset.epoch = 1
    assert_equal([contents(batch) for batch in dataset], reference[3:])


def test_an_epoch_and_a_seed_have_their_own_order(bank, reference):
    def rows(batches):
        return joined_rows(batches, "rows").tolist()

    assert rows(reference[:3]) != rows(reference[3:])
    assert rows(epoch_of(make(bank, seed=4))) != rows(reference[:3])


def test_the_banks_own_order(bank):
    dataset = make(bank, shuffle=False, keep_rest=True, view=0)
    rows = joined_rows(epoch_of(dataset), "rows")
    assert rows.tolist() == sorted(rows.tolist())
    assert rows.tolist() == joined_rows(epoch_of(dataset, 5), "rows").tolist()


@pytest.mark.parametrize("prefetch", [0, 3])
def test_memory_is_not_used_while_somebody_looks_at_it(bank, reference, prefetch):
    """Batches, and tensors and arrays made of them, keep what they hold."""
    dataset = make(bank, threads=2, prefetch=prefetch)
    kept, pieces = [], []
    for step, batch in enumerate(itertools.islice(dataset.stream(), 6)):
        if step % 2:
            kept.append(batch)
        else:
            # Views of views, with the batch itself let go of.
            stored = batch.targets["brain"].arrays[""]
            pieces.append(
                (batch.inputs["image"][2:].numpy()[1:], stored[3:].flatten(1))
            )
    assert_equal([contents(batch) for batch in kept], reference[1::2])
    for (pixels, stored), expected in zip(pieces, reference[::2], strict=True):
        np.testing.assert_array_equal(pixels, expected["inputs/image"][3:])
        np.testing.assert_array_equal(
            stored.view(torch.int16).numpy(),
            expected["targets/brain:stored"][3:].reshape(5, -1),
        )


def test_memory_is_used_again(bank):
    dataset = make(bank, threads=1, prefetch=0)
    places = set()
    for batch in itertools.islice(dataset.stream(), 30):
        places.add(batch.inputs["image"].data_ptr())
        del batch
    assert len(places) <= 2


def test_a_dataset_travels_to_another_process(bank, reference):
    dataset = make(bank, threads=2)
    dataset.epoch = 1
    list(dataset.batches(0))
    again = pickle.loads(pickle.dumps(dataset))
    assert again.epoch == 1
    assert_equal([contents(batch) for batch in again], reference[3:])


def test_workers_that_are_spawned(bank, reference):
    loader = torch.utils.data.DataLoader(
        make(bank, threads=1),
        batch_size=None,
        num_workers=1,
        multiprocessing_context="spawn",
    )
    assert_equal([contents(batch) for batch in loader], reference[:3])


# Where the shards lie.


def test_a_copy_elsewhere(bank, joined, reference, tmp_path):
    shutil.copytree(joined.folder / "data", tmp_path / "else" / "where")
    for patterns in (
        [f"{tmp_path}/else/where/*.tar"],
        [f"{tmp_path}/else/where/train-{{0..2}}.tar"],
    ):
        assert_equal(epoch_of(make(bank, shards=patterns)), reference[:3])


def test_a_remote_copy_is_read_in_one_range_a_block(
    bank, reference, remote, monkeypatch
):
    asked = []
    plain = type(remote).cat_file

    def cat_file(self, path, start=None, end=None, **options):
        asked.append((path, start, end))
        return plain(self, path, start, end, **options)

    monkeypatch.setattr(type(remote), "cat_file", cat_file)
    monkeypatch.setattr(type(remote), "open", None)
    dataset = make(bank, shards=["memory://copy/*.tar"], threads=4)
    asked.clear()
    assert_equal(epoch_of(dataset), reference[:3])
    order = dataset.order(0)
    parts = [part for lane in range(4) for part in order.parts(lane)]
    assert len(asked) == len(parts)
    assert all(start < end for _, start, end in asked)


def test_shards_that_are_read_from_their_start(tmp_path, joined):
    """A compressed shard gives what the plain one gives."""
    plain, packed = tmp_path / "plain", tmp_path / "packed"
    for folder in (plain, packed):
        shutil.copytree(joined.folder / "data", folder / "data")
    for path in (packed / "data").glob("*.tar"):
        with gzip.open(f"{path}.gz", "wb") as file:
            file.write(path.read_bytes())
        path.unlink()
    found = []
    for folder, suffix in ((plain, "tar"), (packed, "tar.gz")):
        job = write_job(
            folder,
            dataset={"shards": f"./data/*.{suffix}"},
            teachers={
                "net": {
                    "model": "module:./nets.py:Net",
                    "weights": "random:1",
                    "sizes": [[16, 16]],
                    "batch": 4,
                    "outputs": {"patch": {"from": "body"}},
                }
            },
            block_rows=4,
        )
        precompute(load_job(str(job)), quiet=True)
        found.append(
            epoch_of(BankDataset(str(folder / "bank"), LEAN, batch=8, threads=2))
        )
    assert_equal(found[0], found[1])


def test_breaking_off_gives_everything_back(bank, tmp_path):
    """Files and threads: a ResourceWarning would be an error."""
    for threads in (1, 8):
        for _ in range(3):
            dataset = make(bank, threads=threads, prefetch=5)
            for batch in dataset.stream():
                assert len(batch) == 8
                break
            assert our_threads() == []
            stream = dataset.stream()
            next(stream)
            stream.close()
            assert next(iter(stream), None) is None
    open_files = {
        target
        for one in Path("/proc/self/fd").iterdir()
        if (target := _link(one)) and target.endswith(".tar")
    }
    assert not open_files


def _link(path: Path) -> str:
    try:
        return str(path.readlink())
    except OSError:
        return ""


def test_a_bank_by_its_path(joined):
    dataset = BankDataset(joined.url, TARGETS, batch=5, view=0)
    assert dataset.bank.url == open_bank(joined.url).url
    assert dataset.num_rows == 25
    (first, *_) = dataset
    assert first.inputs == {}
