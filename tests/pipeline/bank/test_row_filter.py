"""Conditions on rows: what they choose, and what is none."""

import json

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from manifests.errors import BankError
from pipeline.bank.row_filter import parse_condition

TABLE = pa.table(
    {
        "shard": ["a.tar", "a.tar", "b.tar", "b.tar"],
        "key": ["k0", "k1", "k2", "k3"],
        "row": [0, 1, 8, 9],
        "label.class": pa.array([3, None, 5, 4], pa.int64()),
        "label.depth": pa.array([0.5, 1.5, None, 2.5], pa.float64()),
        "valid.net.image": [True, False, True, True],
        "reason.net.image": pa.array([None, "image:broken", None, None], pa.string()),
    }
)


def keys_of(text):
    return TABLE.filter(parse_condition(text).expression(TABLE.schema))[
        "key"
    ].to_pylist()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("label.class in [3, 5]", ["k0", "k2"]),
        ("label.class not in [3, 5]", ["k3"]),
        ("  label.class   not   in[3]", ["k2", "k3"]),
        ("label.class != 3", ["k2", "k3"]),
        ("label.class>=4", ["k2", "k3"]),
        ("label.depth < 2", ["k0", "k1"]),
        ("label.depth <= 0.5", ["k0"]),
        ("label.depth > 1.5", ["k3"]),
        ('shard == "b.tar"', ["k2", "k3"]),
        ('key in ["k3", "k0", "elsewhere"]', ["k0", "k3"]),
        ("valid.net.image == true", ["k0", "k2", "k3"]),
        ('reason.net.image == "image:broken"', ["k1"]),
    ],
)
def test_rows_that_meet_it(text, expected):
    assert keys_of(text) == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("label.class", r"must be COLUMN OP VALUE, such as .* got 'label\.class'"),
        ("label.class = 3", "must be COLUMN OP VALUE"),
        ("label.class == dog", "got the value dog in 'label.class == dog'"),
        ("__import__('os') == 1", "must be on columns of the index"),
        ("label.class == (3)", r"got the value \(3\)"),
        ("label.class in 3", "must have a list of values after"),
        ("label.class == [3]", "must have a list of values after"),
        ("label.class in []", "must have a list of values after"),
        ("label.clas == 3", r"got 'label\.clas'.*did you mean label\.class"),
        ("row < 3", r"must be on columns of the index \(shard, key, label\.class"),
        ("label.class == 3.5", r"label\.class must be whole numbers, got 3\.5"),
        ("label.class == true", "must be whole numbers, got true"),
        ("label.class in [3, null]", "must be whole numbers, got null"),
        ('label.depth == "a"', "must be numbers"),
        ("valid.net.image == 1", "must be true or false, got 1"),
        ("key == 3", "must be text in quotes"),
        ('key < "k2"', "conditions on key must be ==, !=, in or not in, got <"),
        ("valid.net.image > false", "must be ==, !=, in or not in, got >"),
    ],
)
def test_what_is_no_condition_is_refused(text, message):
    with pytest.raises(BankError, match=message):
        keys_of(text)


def test_a_condition_on_keys_is_kept_without_them():
    kept = parse_condition('key != "patient-17"').text
    assert "patient" not in kept
    assert kept.startswith("key != sha256:")
    assert kept != parse_condition('key != "patient-18"').text
    assert parse_condition("label.class  in  [3,5]").text == "label.class in [3, 5]"


@settings(max_examples=50)
@given(st.text())
def test_any_text_is_a_condition_or_refused(text):
    try:
        condition = parse_condition(text)
    except BankError:
        return
    json.dumps(condition.value)


@given(
    st.sampled_from(["==", "!=", "<", "<=", ">", ">="]),
    st.integers(-(2**62), 2**62),
)
def test_comparisons_are_those_of_numbers(op, number):
    expected = [
        key
        for key, label in zip(
            TABLE["key"].to_pylist(), TABLE["label.class"].to_pylist(), strict=True
        )
        if label is not None
        and {
            "==": label == number,
            "!=": label != number,
            "<": label < number,
            "<=": label <= number,
            ">": label > number,
            ">=": label >= number,
        }[op]
    ]
    assert keys_of(f"label.class {op} {number}") == expected
