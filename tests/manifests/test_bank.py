"""The bank's documents: runs of rows, sums of results."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from manifests.bank import CommitContent, WorkResult, format_runs, parse_runs


@given(st.sets(st.integers(0, 5000)))
def test_runs_give_the_rows_back(rows):
    ascending = tuple(sorted(rows))
    assert parse_runs(format_runs(ascending)) == ascending


def test_runs_are_short():
    assert format_runs([0, 1, 2, 3, 7, 9, 10]) == "0-3,7,9-10"
    assert format_runs(range(4096)) == "0-4095"
    assert format_runs([]) == ""


@pytest.mark.parametrize(
    "text", ["0-99999999999", "5-3", "-1", "1,1", "3,2", "0-4,4", "x", ",", "4194304"]
)
def test_runs_that_no_block_has_are_refused(text):
    """Whatever they ask for, no memory is taken for it."""
    with pytest.raises(ValueError, match=r"must be|must follow|invalid literal"):
        parse_runs(text)


def test_a_commit_survives_json():
    content = CommitContent(
        pass_id="net.image",
        fingerprint="f",
        block=3,
        shard="a.tar",
        rows=8,
        valid=5,
        invalid={"image:missing": (1, 2), "logits:non_finite": (7,)},
        objects={"x": (10, 20)},
    )
    again = CommitContent.model_validate_json(content.model_dump_json())
    assert again == content
    assert '"1-2"' in content.model_dump_json()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"rows": -1}, "greater than or equal to 0"),
        ({"rows": 2**40}, "less than or equal to"),
        ({"valid": 9}, "valid must be at most 8, got 9"),
        ({"invalid": {"x": "6-8"}}, "invalid.x must be rows below 8"),
        ({"invalid": {"x": (0, -1)}}, "invalid.x must be rows below 8"),
    ],
)
def test_a_commit_speaks_of_its_own_rows(fields, message):
    given = {"pass_id": "p", "fingerprint": "f", "block": 0, "shard": "a", "rows": 8}
    given |= {"valid": 8, "invalid": {}, "objects": {}}
    CommitContent.model_validate(given)
    with pytest.raises(ValueError, match=message):
        CommitContent.model_validate(given | fields)


def test_results_add_up_in_any_order():
    one = WorkResult(items=1, valid={"a": 2}, seconds={"read": 1.5}, failures=("x",))
    two = WorkResult(items=2, valid={"a": 1, "b": 4}, failures=("w", "x"))
    total = one.plus(two)
    assert total == two.plus(one)
    assert (total.items, total.valid) == (3, {"a": 3, "b": 4})
    assert total.failures == ("w", "x")


def test_a_sum_stays_small_however_much_fails():
    total = WorkResult()
    for number in range(1500):
        total = total.plus(WorkResult(failed_items=1, failures=(f"{number:05d}",)))
    assert total.failed_items == 1500
    assert len(total.failures) == 1000
