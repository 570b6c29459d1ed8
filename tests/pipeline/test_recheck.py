"""The pure core of a recheck: which rows, how near, what verdict; by plain NumPy."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from manifests.teacher import OutputConfig
from pipeline.bank.encodings import make_encoding
from pipeline.recheck import Moments, OutputVerdict, Place, choose_rows, compare
from pipeline.recheck_rows import pack_rows

ROWS, SHAPE = 6, (3, 4, 5)


def encoding_of(shape=SHAPE, kind="grid", dtype="float32", **config):
    return make_encoding(
        OutputConfig(**config), name="patch", kind=kind, shape=shape, dtype=dtype
    )


def values_of(seed=0, shape=SHAPE):
    return np.random.default_rng(seed).normal(1, 2, (ROWS, *shape)).astype(np.float32)


def stored_of(encoding, values):
    return encoding.encode(values, np.ones(len(values), np.bool_)).arrays


def moments_of(seed=1, channels=5):
    rng = np.random.default_rng(seed)
    variance = rng.uniform(0.5, 2, channels)
    variance[0] = 0.0
    return rng.normal(size=channels), variance


def cosine(a, b):
    a, b = a.astype(np.float64).ravel(), b.astype(np.float64).ravel()
    return (a @ b) / np.sqrt((a @ a) * (b @ b))


def near_of(encoding, held, said, moments=None, precision="float32"):
    return compare(
        encoding,
        stored_of(encoding, held),
        stored_of(encoding, said),
        said,
        moments,
        precision,
    )


def test_cosines_and_errors_are_those_of_numpy():
    encoding, held, said = encoding_of(), values_of(0), values_of(0)
    said[2] += 0.1 * values_of(5)[2]
    mean, variance = moments_of()
    moments = Moments.of({"mean": mean, "variance": variance})
    near = near_of(encoding, held, said, moments)
    std = np.sqrt(variance)
    floor = 0.01 * np.median(std)
    assert std[0] < floor
    std[0] = floor
    for row in range(ROWS):
        plain = cosine(held[row], said[row])
        both = cosine((held[row] - mean) / std, (said[row] - mean) / std)
        assert near.cosine[row] == pytest.approx(plain, abs=1e-12)
        assert near.standardised[row] == pytest.approx(both, abs=1e-12)
        assert (
            near.error[row]
            == np.abs(held[row].astype(np.float64) - said[row].astype(np.float64)).max()
        )
    assert near.identical.tolist() == [True, True, False, True, True, True]
    assert near.holds(np.ones(ROWS, np.bool_)).tolist() == near.identical.tolist()
    assert not near.holds(np.zeros(ROWS, np.bool_))[2]


def test_statistics_of_no_row_standardise_nothing():
    nothing = np.full(5, np.nan)
    assert Moments.of({"mean": nothing, "variance": nothing}) is None


@pytest.mark.parametrize("name", ["raw", "lossless", "half"])
def test_the_last_bit_counts_where_bits_must_be_the_same(name):
    encoding, held = encoding_of(encoding=name), values_of()
    said = held.copy()
    step = 2.0**-9 if name == "half" else 2.0**-23
    said[1, 0, 0, 0] *= 1 + step
    near = near_of(encoding, held, said)
    assert near.identical.tolist() == [True, False, True, True, True, True]
    assert near.holds(np.zeros(ROWS, np.bool_)).all()


def test_half_is_within_its_bound():
    """Relative to the value 2**-11, absolute 2**-25 below the least normal number."""
    encoding, exact = encoding_of(encoding="half"), values_of()
    near = near_of(encoding, exact, exact)
    assert near.identical.all()
    bound = np.abs(exact).reshape(ROWS, -1).max(1) * 2.0**-11 + 2.0**-25
    assert (near.error > 0).all()
    assert (near.error <= bound).all()
    assert near.holds(np.zeros(ROWS, np.bool_)).all()


def test_what_is_rounded_is_not_judged_standardised():
    """A mean far from zero: float16 takes a standardised row apart, not the row."""
    moments = Moments(np.full(5, 1000.0), np.full(5, 0.1))
    exact = (1000 + 0.1 * values_of()).astype(np.float32)
    near = near_of(encoding_of(encoding="half"), exact, exact, moments)
    assert (near.standardised < 0.99).all()
    assert near.holds(np.zeros(ROWS, np.bool_)).all()
    other = exact + np.float32(0.2) * np.sign(values_of(7)).astype(np.float32)
    plain = near_of(encoding_of(), exact, other, moments)
    assert (plain.cosine > 0.9999).all()
    assert not plain.holds(np.zeros(ROWS, np.bool_)).any()


def test_top_logits_are_compared_where_the_bank_has_them():
    encoding = encoding_of((9,), "vector", topk=3)
    held = values_of(0, (9,))
    said = held.copy()
    order = np.argsort(-held[4])
    # Two that nearly tie change places: other ids, the same logits.
    held[4, order[3]] = held[4, order[2]] - np.float32(1e-6)
    said[4] = held[4]
    said[4, order[3]] += np.float32(2e-6)
    near = near_of(encoding, held, said)
    assert near.identical.tolist() == [True, True, True, True, False, True]
    assert near.error[4] == 0
    assert near.holds(np.zeros(ROWS, np.bool_)).all()
    # Another row's logits are neither.
    wrong = near_of(encoding, held[::-1].copy(), said)
    classes = np.argsort(-held[::-1], axis=1, kind="stable")[:, :3]
    for row in range(ROWS):
        expected = cosine(held[::-1][row][classes[row]], said[row][classes[row]])
        assert wrong.cosine[row] == pytest.approx(expected, abs=1e-6)
    assert not wrong.holds(np.zeros(ROWS, np.bool_)).any()


def test_cells_that_are_missing_are_left_out_unless_only_one_side_has_them():
    encoding, exact = encoding_of(encoding="raw"), values_of()
    padded = exact.copy()
    padded[:, 0] = np.nan
    stored = {"": padded}
    both = compare(encoding, stored, {"": padded.copy()}, padded, None)
    np.testing.assert_allclose(both.cosine, 1, rtol=1e-12)
    assert both.identical.all()
    assert (both.error == 0).all()
    one = compare(encoding, stored, {"": exact}, exact, None)
    assert (one.cosine == 0).all()
    assert not one.holds(np.zeros(ROWS, np.bool_)).any()


def test_rows_of_zeros():
    encoding, zeros = encoding_of(), np.zeros((ROWS, *SHAPE), np.float32)
    assert near_of(encoding, zeros, zeros).cosine.tolist() == [1.0] * ROWS
    assert near_of(encoding, values_of(), zeros).cosine.tolist() == [0.0] * ROWS


@pytest.mark.parametrize("preset", ["compact", "tiny"])
def test_a_row_of_a_chunk_is_encoded_again_bit_for_bit(preset):
    """Any rows of a chunk, in any order, by the mean and deviation stored of each."""
    encoding, exact = encoding_of(encoding=preset), values_of()
    held = stored_of(encoding, exact)
    for rows in ([4], [5, 0, 3]):
        stored = {suffix: array[rows] for suffix, array in held.items()}
        again = encoding.encode_again(exact[rows], stored)
        assert again.refused == {}
        near = compare(encoding, stored, again.arrays, exact[rows], None)
        assert near.identical.all()
        assert (near.error > 0).all()
        assert (near.excess == 0).all()
        assert near.holds(np.ones(len(rows), np.bool_)).all()


@pytest.mark.parametrize("preset", ["compact", "tiny"])
@pytest.mark.parametrize("suffix", ["", "_scale", "_std", "_mean"])
def test_one_number_of_a_coded_row_that_is_wrong(preset, suffix):
    """Found where bits must be the same; one code alone leaves no cosine too low."""
    encoding, exact = encoding_of(encoding=preset), values_of()
    stored = stored_of(encoding, exact)
    wrong = stored[suffix].reshape(ROWS, -1)
    wrong[2, 4] = wrong[2, 4] ^ 16 if suffix == "" else 1.5 * wrong[2, 4] + 0.5
    again = encoding.encode_again(exact, stored)
    near = compare(encoding, stored, again.arrays, exact, None)
    # A wrong mean or deviation is in its row's codes alone.
    assert near.identical.tolist() == [row != 2 for row in range(ROWS)]
    assert (near.excess > 0).tolist() == [row == 2 for row in range(ROWS)]


@pytest.mark.parametrize("preset", ["half", "compact", "tiny"])
def test_another_device_is_judged_without_the_encodings_rounding(preset):
    """Of tiny the plain cosine is far too low; the teacher's own error is not."""
    encoding, exact = encoding_of(encoding=preset), values_of()
    moments = Moments(exact.mean((0, 1, 2)), exact.std((0, 1, 2)))
    stored = stored_of(encoding, exact)
    none = np.zeros(ROWS, np.bool_)

    def said_to_be(values):
        again = encoding.encode_again(values, stored).arrays
        return compare(encoding, stored, again, values, moments)

    rng = np.random.default_rng(3)
    near = said_to_be((exact * (1 + 1e-3 * rng.normal(size=exact.shape))).astype("f4"))
    assert not near.identical.any()
    assert near.holds(none).all()
    if preset == "tiny":
        assert (near.cosine < 0.9999).all()
    decoded = encoding.decode(stored).astype(np.float64)
    far = (exact + 0.1 * rng.normal(size=exact.shape)).astype("f4")
    found = said_to_be(far)
    # What is left of each difference, a value at a time, in plain Python.
    most = np.zeros(ROWS)
    steps = encoding.bound(stored, decoded.astype("f4"))
    steps = np.broadcast_to(steps, decoded.shape).astype(np.float64)
    for place in np.ndindex(decoded.shape):
        left = abs(float(far[place]) - decoded[place]) - steps[place]
        most[place[0]] = max(most[place[0]], left, 0)
    np.testing.assert_allclose(found.excess, most, atol=1e-12)
    if preset != "tiny":
        assert not found.holds(none).any()
    assert not said_to_be(exact[::-1].copy()).holds(none).any()


def test_rows_that_the_bank_does_not_have_come_out_missing():
    encoding, exact = encoding_of(encoding="tiny"), values_of()
    stored = encoding.encode(exact, np.arange(ROWS) != 3).arrays
    exact[0, 0, 0, 0], exact[1, 0, 0, 0] = np.inf, 2.0**50
    again = encoding.encode_again(exact, stored)
    assert again.refused == {0: "non_finite", 1: "overflow_tiny"}
    for suffix, spec in zip(encoding.suffixes, encoding.arrays("", 1), strict=True):
        for row in (0, 1, 3):
            np.testing.assert_array_equal(again.arrays[suffix][row], spec.fill_value)
        np.testing.assert_array_equal(again.arrays[suffix][4:], stored[suffix][4:])


def test_arithmetic_of_16_bits_may_differ_more():
    encoding = encoding_of(dtype="float32")
    exact = values_of()
    other = exact * (1 + 0.03 * np.sign(values_of(3))).astype(np.float32)
    cosines = near_of(encoding, exact, other).cosine
    assert ((cosines > 0.999) & (cosines < 0.9999)).all()
    for precision, holds in (("float32", False), ("bfloat16", True), ("float16", True)):
        near = near_of(encoding, exact, other, precision=precision)
        assert (near.holds(np.zeros(ROWS, np.bool_)) == holds).all()


def test_a_verdict_adds_up_and_names_the_worst():
    encoding, held, said = encoding_of(), values_of(0), values_of(0)
    said[2] += 0.01 * values_of(5)[2]
    said[4] = values_of(6)[4]
    places = [Place(row, 0, "train-0.tar", f"k{row}") for row in range(ROWS)]
    bits = np.ones(ROWS, np.bool_)
    whole, parts = OutputVerdict("a/b/c/d"), OutputVerdict("a/b/c/d")
    moments = Moments(np.zeros(5), np.ones(5))
    near = near_of(encoding, held, said, moments)
    whole.add(near, places, bits)
    for rows in (np.arange(ROWS) < 3, np.arange(ROWS) >= 3, np.zeros(ROWS, np.bool_)):
        chosen = [place for place, is_in in zip(places, rows, strict=True) if is_in]
        parts.add(near.take(rows), chosen, bits[rows])
    for verdict in (whole, parts):
        assert (verdict.compared, verdict.identical, verdict.failed) == (6, 4, 2)
        assert verdict.bits_expected == 6
        assert verdict.worst == places[4]
        assert not verdict.holds
        assert verdict.cosine_mean == pytest.approx(near.cosine.mean(), abs=1e-12)
        assert verdict.cosine_worst == near.cosine.min() == near.cosine[4]
        assert verdict.standardised_mean == pytest.approx(near.standardised.mean())
        assert verdict.largest_error == near.error.max()
        told = verdict.to_json()
        assert told["worst"] == {"row": 4, "view": 0, "shard": "train-0.tar"} | {
            "key": "k4"
        }
        assert told["holds"] is False
    # A row that fails comes before one that is farther but may be.
    mixed = OutputVerdict("a")
    mixed.add(near, places, np.arange(ROWS) == 2)
    assert mixed.failed == 2
    assert mixed.worst == places[4]


@given(
    st.sets(st.integers(0, 300), max_size=60),
    st.integers(0, 70),
    st.integers(0, 3),
)
def test_rows_are_drawn_once_and_the_same_each_time(rows, count, seed):
    candidates = np.array(sorted(rows), np.int64)
    found = choose_rows(candidates, count, seed, ["a"])
    assert len(found) == min(count, len(rows))
    assert set(found.tolist()) <= rows
    assert found.tolist() == sorted(set(found.tolist()))
    assert found.tolist() == choose_rows(candidates, count, seed, ["a"]).tolist()
    # What is left of fewer candidates is drawn again.
    fewer = candidates[candidates != (found[0] if len(found) else -1)]
    assert set(found[1:].tolist()) <= set(
        choose_rows(fewer, count, seed, ["a"]).tolist()
    )


def test_another_seed_or_bank_draws_others():
    rows = np.arange(1000)
    draws = {
        tuple(choose_rows(rows, 50, seed, [bank]).tolist())
        for seed in range(3)
        for bank in "ab"
    }
    assert len(draws) == 6
    counts = np.zeros(1000)
    for seed in range(400):
        counts[choose_rows(rows, 50, seed, ["a"])] += 1
    # 20 expected with a deviation of 4.4: none is left out, none preferred.
    assert counts.min() >= 4
    assert counts.max() <= 45


@given(
    st.lists(st.tuples(st.integers(0, 5), st.booleans()), max_size=40),
)
def test_every_row_is_in_one_forward_and_in_its_slot(rows):
    slots = np.array([slot for slot, _ in rows], np.intp)
    wanted = np.flatnonzero([is_wanted for _, is_wanted in rows]).astype(np.intp)
    packs = pack_rows(slots, wanted)
    held = [row for chosen, _ in packs for row in chosen.tolist()]
    assert sorted(held) == wanted.tolist()
    for chosen, places in packs:
        assert places.tolist() == slots[chosen].tolist()
        assert len(set(places.tolist())) == len(places) > 0
    counts = np.bincount(slots[wanted], minlength=6)
    assert len(packs) == counts.max()
