"""Encodings on a sample: which fit, what they lose, and how many bytes they will be."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from manifests.teacher import OutputConfig
from pipeline.bank.encodings import make_encoding
from pipeline.bank.objects import encode_object, object_size
from pipeline.bank.point_index import PointIndex
from pipeline.bank.statistics import Moments
from pipeline.sample_plan.presets import (
    LossSums,
    Values,
    candidates,
    divergence_of,
    label_of,
    measure,
)


def encoding_of(kind="grid", shape=(4, 4, 32), dtype="float32", name="patch", **config):
    config = OutputConfig.model_validate(config)
    return make_encoding(config, name=name, kind=kind, shape=shape, dtype=dtype)


def labels(own, **config):
    return [label_of(one) for one in candidates(own, OutputConfig(**config))]


def draw(rows, shape, seed=0, is_sparse=False):
    rng = np.random.default_rng(seed)
    mean, std = rng.normal(0, 2, shape[-1]), rng.uniform(0.1, 3, shape[-1])
    values = rng.normal(mean, std, (rows, *shape)).astype(np.float32)
    return np.maximum(values, 0) if is_sparse else values


def of_values(values, encoding, usable=None, cells=None):
    usable = np.ones(len(values), np.bool_) if usable is None else usable
    return Values.of(values, usable, cells, encoding)


def test_every_encoding_that_fits_is_tried():
    grid = {"raw", "lossless lz4", "lossless zstd", "half", "compact"}
    assert grid <= set(labels(encoding_of()))
    vector = labels(encoding_of("vector", (10,), name="logits"))
    assert "compact" not in vector
    assert not any(name.startswith("topk") for name in vector)
    topk = encoding_of("vector", (10,), name="logits", topk=3)
    assert "topk 3" in labels(topk, topk=3, encoding="topk")
    assert "lossless zstd" in labels(encoding_of(codec="zstd"))


def test_the_codec_of_a_job_is_the_one_that_is_stored():
    chosen = encoding_of(codec="zstd")
    assert chosen.arrays("a", 8)[0].codec == "zstd"
    assert encoding_of().arrays("a", 8)[0].codec == "lz4"
    with pytest.raises(ValueError, match="codec is of lossless alone, encoding half"):
        OutputConfig.model_validate({"encoding": "half", "codec": "zstd"})


def test_loss_is_that_of_standardised_cells():
    exact = draw(1, (500, 16))[0]
    exact[:, 3] = 7.0  # a dead channel
    found = exact + np.random.default_rng(1).normal(0, 0.05, exact.shape)
    moments = Moments(16)
    moments.update(exact)
    sums = LossSums(moments)
    sums.add(exact[:200], found[:200])
    sums.add(exact[200:], found[200:])
    std = exact.std(axis=0, dtype=np.float64)
    floored = np.maximum(std, 0.01 * np.median(std))
    a, b = (
        (one - exact.mean(axis=0, dtype=np.float64)) / floored for one in (exact, found)
    )
    cosine = torch.nn.functional.cosine_similarity(torch.tensor(a), torch.tensor(b))
    assert sums.loss().one_minus_cosine == pytest.approx(1 - cosine.mean().item())
    live = np.arange(16) != 3
    worst = (((found - exact) ** 2).mean(axis=0)[live] / std[live] ** 2).max()
    assert sums.loss().worst_channel == pytest.approx(worst, rel=1e-6)


def test_divergence_is_kullback_leibler():
    rng = np.random.default_rng(0)
    exact, found = rng.normal(0, 3, (2, 40, 12))
    a, b = (torch.tensor(one / 2.0).log_softmax(1) for one in (exact, found))
    by_torch = torch.nn.functional.kl_div(b, a, log_target=True, reduction="sum").item()
    assert divergence_of(exact, found, 2.0) == pytest.approx(by_torch)


def stored_bytes(encoding, values, block_rows):
    """Bytes of the objects of a bank that holds these rows alone."""
    total = 0
    for start in range(0, len(values), block_rows):
        part = values[start : start + block_rows]
        rows = np.zeros((block_rows, *values.shape[1:]), values.dtype)
        rows[: len(part)] = part
        usable = np.arange(block_rows) < len(part)
        encoded = encoding.encode(rows, usable)
        for spec, array in zip(
            encoding.arrays("a", block_rows), encoded.arrays.values(), strict=True
        ):
            total += object_size(encode_object(array, spec, len(part)))
    return total


@pytest.mark.parametrize("is_sparse", [False, True])
@pytest.mark.parametrize(
    ("kind", "shape", "rows", "sampled"),
    [
        ("vector", (256,), 3500, 128),  # a chunk holds far more rows than are sampled
        ("grid", (8, 8, 64), 700, 64),  # more rows in a chunk, a block and a half
        ("grid", (16, 16, 256), 50, 34),  # several whole chunks are sampled
    ],
)
def test_bytes_of_a_few_rows_tell_those_of_whole_blocks(
    kind, shape, rows, sampled, is_sparse
):
    values = draw(rows, shape, is_sparse=is_sparse)
    block_rows = {3500: 2048, 700: 512, 50: 32}[rows]
    chosen = values[np.linspace(0, rows - 1, sampled).astype(int)]
    for encoding in candidates(encoding_of(kind, shape), OutputConfig()):
        figures = measure(encoding, of_values(chosen, encoding), block_rows)
        told = sum(
            figures.block_bytes(min(block_rows, rows - start))
            for start in range(0, rows, block_rows)
        )
        real = stored_bytes(encoding, values, block_rows)
        assert told == pytest.approx(real, rel=0.02), label_of(encoding)


@pytest.mark.parametrize("channels", [10, 48])
def test_where_little_is_sampled_the_doubt_is_told(channels):
    values = draw(3500, (channels,))
    chosen = values[:: 3500 // 64][:64]
    encoding = encoding_of("vector", (channels,))
    figures = measure(encoding, of_values(chosen, encoding), 2048)
    told = figures.block_bytes(2048) + figures.block_bytes(3500 - 2048)
    error = told / stored_bytes(encoding, values, 2048) - 1
    assert abs(error) < 3 * figures.spread < 0.3


def test_exact_encodings_lose_nothing_and_a_row_that_overflows_is_told():
    values = draw(24, (4, 4, 32))
    values[5] = 1e6
    own = encoding_of()
    by_name = {
        label_of(one): measure(one, of_values(values, one), 32)
        for one in candidates(own, OutputConfig())
    }
    for name in ("raw", "lossless lz4", "lossless zstd"):
        loss = by_name[name].loss
        assert (loss.one_minus_cosine, loss.worst_channel) == (0.0, 0.0)
        assert by_name[name].refused == 0
    assert by_name["half"].refused == 1
    assert by_name["half"].loss.worst_channel < 1e-5


def test_which_points_is_stored_in_one_way_and_loses_nothing():
    index = PointIndex(name="points_index", kind="index", shape=(64,), dtype="uint32")
    assert candidates(index, OutputConfig()) == [index]
    values = np.sort(np.random.default_rng(0).integers(0, 900, (16, 64), np.uint32))
    figures = measure(index, of_values(values, index), 16)
    assert figures.loss is None
    assert figures.block_bytes(16) == stored_bytes(index, values, 16)


def test_one_vector_says_nothing_of_loss():
    values = draw(1, (32,))
    encoding = encoding_of("vector", (32,), encoding="half")
    figures = measure(encoding, of_values(values, encoding), 8)
    assert figures.loss is None
    assert figures.spread is None


def test_missing_rows_and_cells_do_not_count():
    values = draw(16, (4, 4, 32))
    encoding = encoding_of(encoding="compact")
    usable = np.arange(16) % 4 != 1
    cells = np.zeros((16, 4, 4), np.bool_)
    cells[:, 2:] = True
    clean = measure(encoding, of_values(values, encoding, usable, cells), 16)
    values[~usable] = 1e9
    values[:, 2:] = -1e9
    again = measure(encoding, of_values(values, encoding, usable, cells), 16)
    assert again.loss == clean.loss
    assert again.refused == 0
    assert [model.points for model in again.models] == [m.points for m in clean.models]
