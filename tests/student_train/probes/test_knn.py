"""Nearest neighbours against plain NumPy, and against what they must not depend on."""

import numpy as np
import pytest

from student_train.errors import TrainingError
from student_train.probes import knn
from student_train.probes.knn import knn_probe
from student_train.probes.splits import ClassSplit


def blobs(rng, num, num_classes=4, spread=1.5, width=6):
    centres = np.random.default_rng(99).normal(size=(num_classes, width))
    labels = rng.integers(0, num_classes, num)
    features = centres[labels] + spread * rng.normal(size=(num, width))
    return ClassSplit(features.astype(np.float32), labels)


def plain_accuracy(fit, queries, k):
    def unit(values):
        values = values.astype(np.float64)
        return values / np.linalg.norm(values, axis=1, keepdims=True)

    cosine = unit(queries.features_ND) @ unit(fit.features_ND).T
    right = 0
    for row, label in zip(cosine, queries.labels_N, strict=True):
        nearest = np.argsort(-row)[:k]
        votes = np.zeros(fit.labels_N.max() + 1)
        for index in nearest:
            votes[fit.labels_N[index]] += np.exp(row[index] / 0.07)
        right += votes.argmax() == label
    return right / len(queries.labels_N)


@pytest.mark.parametrize("pieces", [(128, 32_768), (7, 60)])
def test_equals_plain_numpy(monkeypatch, pieces):
    monkeypatch.setattr(knn, "QUERY_ROWS", pieces[0])
    monkeypatch.setattr(knn, "FIT_ROWS", pieces[1])
    rng = np.random.default_rng(0)
    fit, choose, test = blobs(rng, 300), blobs(rng, 90), blobs(rng, 110)
    score = knn_probe(fit, choose, test)
    curve = {k: plain_accuracy(fit, choose, k) for k in (10, 20, 100, 200)}
    for k, value in curve.items():
        assert score.details[f"choose_k_{k}"] == pytest.approx(value)
    best = max(curve, key=lambda k: (curve[k], -k))
    assert score.setting == {"k": best}
    assert score.choose_value == pytest.approx(curve[best])
    assert score.value == pytest.approx(plain_accuracy(fit, test, best))
    assert (score.metric, score.higher_is_better) == ("accuracy", True)


def test_k_is_limited_to_the_rows_there_are():
    rng = np.random.default_rng(1)
    score = knn_probe(blobs(rng, 15), blobs(rng, 8), blobs(rng, 8))
    curve = {name for name in score.details if name.startswith("choose_k")}
    assert curve == {"choose_k_10", "choose_k_15"}


def test_choose_decides_k():
    # A tight cluster of 12 rows of class 0 within 188 of class 1 around it: ten
    # neighbours say 0, two hundred say 1.
    near = np.tile([[1.0, 0.01]], (12, 1)) + np.linspace(0, 1e-3, 12)[:, None]
    far = np.tile([[1.0, 0.1]], (188, 1)) + np.linspace(0, 1e-3, 188)[:, None]
    fit = ClassSplit(
        np.concatenate([near, far]).astype(np.float32),
        np.repeat([0, 1], [12, 188]),
    )
    query = np.float32([[1.0, 0.01]])
    zero = ClassSplit(query, np.array([0]))
    one = ClassSplit(query, np.array([1]))
    assert knn_probe(fit, zero, zero).setting == {"k": 10}
    assert knn_probe(fit, one, zero).setting["k"] > 20
    assert knn_probe(fit, one, zero).value == 0
    # Test has no say.
    assert knn_probe(fit, zero, one).setting == {"k": 10}


def test_only_directions_count_and_runs_are_equal():
    rng = np.random.default_rng(2)
    splits = [blobs(rng, 120), blobs(rng, 50), blobs(rng, 50)]
    longer = [
        ClassSplit(
            (split.features_ND * rng.uniform(0.1, 9, (len(split.labels_N), 1))).astype(
                np.float32
            ),
            split.labels_N,
        )
        for split in splits
    ]
    assert knn_probe(*splits) == knn_probe(*splits)
    assert knn_probe(*splits).value == knn_probe(*longer).value


def test_separable_is_perfect_and_random_is_chance():
    rng = np.random.default_rng(3)
    easy = [blobs(rng, 200, spread=0.01) for _ in range(3)]
    assert knn_probe(*easy).value == 1
    hopeless = [
        ClassSplit(split.features_ND, rng.integers(0, 4, len(split.labels_N)))
        for split in (blobs(rng, 800) for _ in range(3))
    ]
    # Chance is 0.25 with a deviation of 0.015 over 800 rows.
    assert knn_probe(*hopeless).value == pytest.approx(0.25, abs=0.07)


def test_refusals_name_the_split():
    rng = np.random.default_rng(4)
    good = blobs(rng, 20)
    empty = ClassSplit(np.zeros((0, 6), np.float32), np.zeros(0, np.int64))
    with pytest.raises(TrainingError, match="split choose must have at least one row"):
        knn_probe(good, empty, good)
    with pytest.raises(TrainingError, match=r"same width.*'fit': 6.*'test': 5"):
        knn_probe(good, good, blobs(rng, 20, width=5))
    broken = ClassSplit(good.features_ND * np.nan, good.labels_N)
    with pytest.raises(TrainingError, match=r"features must be finite.*split test"):
        knn_probe(good, good, broken)
    with pytest.raises(TrainingError, match=r"one for each of 20 rows.*split fit"):
        knn_probe(ClassSplit(good.features_ND, good.labels_N[:3]), good, good)
    with pytest.raises(TrainingError, match=r"must be integers, got float64"):
        knn_probe(ClassSplit(good.features_ND, good.labels_N * 1.0), good, good)


def test_reads_memory_that_may_not_be_written():
    split = blobs(np.random.default_rng(5), 20)
    split.features_ND.setflags(write=False)
    split.labels_N.setflags(write=False)
    assert knn_probe(split, split, split).value > 0
