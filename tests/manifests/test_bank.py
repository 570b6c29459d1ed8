"""The bank's documents: runs of rows, sums of results."""

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
