"""The plan of a new bank: passes, block sizes and costs from shapes alone."""

from __future__ import annotations

import pytest

from manifests.errors import BankError, ManifestError
from manifests.loading import load_job
from pipeline.bank.arrays import ArraySpec
from pipeline.errors import PipelineError
from pipeline.estimate import check_limits, estimate
from pipeline.plan import Plan, make_plan
from pipeline.work_items import work_items
from tests.conftest import POINTS_INPUT, POINTS_TEACHER, write_tar

NET = {
    "model": "module:./nets.py:Net",
    "weights": "random:1",
    "sizes": [[16, 16]],
    "batch": 4,
    "outputs": {"logits": {}, "patch": {"from": "body"}},
}


def plan_of(path: object, *overrides: str) -> Plan:
    return make_plan(load_job(str(path), overrides))


def test_every_teacher_and_group_is_a_pass(make_shards, make_job):
    make_shards([3], with_points=True)
    image = {"kind": "image", "member": "jpg"}
    job = make_job(
        inputs={"cam_a": image, "cam_b": image, "lidar": POINTS_INPUT},
        teachers={
            "net": {**NET, "on": ["cam_*"], "sizes": [[16, 16], [24, 24]]},
            "points": POINTS_TEACHER,
        },
        views={"random": 2},
    )
    plan = plan_of(job)
    assert plan.wanted == ("rows", "net.cam_a", "net.cam_b", "points.lidar")
    assert plan.wanted == tuple(entry.id for entry in plan.new_passes)
    assert plan.record.num_views == 3
    for entry in plan.new_passes[1:]:
        assert (entry.first_view, entry.last_view, entry.batch) == (0, 2, 4)
    sizes = [
        (out.size, out.name) for out in plan.record.pass_by_id("net.cam_b").outputs
    ]
    assert sizes == [
        *(("16x16", "logits"), ("16x16", "patch")),
        *(("24x24", "logits"), ("24x24", "patch")),
    ]
    rows = plan.record.pass_by_id("rows")
    assert (rows.inputs, rows.labels) == (("cam_a", "cam_b", "lidar"), ("class",))
    fingerprints = {entry.fingerprint for entry in plan.new_passes}
    assert len(fingerprints) == 4
    paths = [
        data["path"] for e in plan.new_passes for o in e.outputs for data in o.arrays
    ]
    assert len(paths) == len(set(paths)) == 2 * 4 + 2


def test_equal_jobs_have_equal_plans_and_others_other_fingerprints(
    make_shards, make_job
):
    make_shards([3])

    def fingerprint(**changes: object) -> str:
        teachers = {"net": {**NET, **changes}}
        return (
            plan_of(make_job(teachers=teachers))
            .record.pass_by_id("net.image")
            .fingerprint
        )

    assert fingerprint() == fingerprint()
    others = [
        fingerprint(weights="random:2"),
        fingerprint(batch=8),
        fingerprint(precision="bfloat16"),
        fingerprint(sizes=[[24, 24]]),
        fingerprint(outputs={"logits": {}}),
        fingerprint(preprocess={"channels": "bgr"}),
        fingerprint(args={"width": 4}),
    ]
    assert len({fingerprint(), *others}) == 8
    rules = [("^a", "b"), ("^c", "d")]
    others += [fingerprint(keys=dict(pairs)) for pairs in (rules, rules[::-1])]
    assert len({fingerprint(), *others}) == 10
    # What says nothing about the numbers says nothing here.
    assert fingerprint(license="cc0-1.0") == fingerprint()


def test_block_rows_are_chosen_from_shapes_and_shards(make_shards, make_job):
    make_shards([40, 40, 17])
    job = make_job(block_rows=None)
    plan = plan_of(job)
    assert plan.record.block_rows == 20
    for output in plan.record.pass_by_id("net.image").outputs:
        spec = ArraySpec.from_json(output.arrays[0])
        assert spec.block_rows == 20
    assert plan_of(job, "block_rows=16").record.block_rows == 16
    default = plan_of(job, "teachers.net.batch=null")
    assert default.record.pass_by_id("net.image").batch == 20


def test_a_batch_is_never_more_than_a_block(make_shards, make_job):
    make_shards([5])
    plan = plan_of(make_job(), "teachers.net.batch=64")
    assert plan.record.pass_by_id("net.image").batch == plan.record.block_rows == 8


def test_an_empty_shard_among_others_has_no_block(make_shards, make_job, tmp_path):
    make_shards([3])
    write_tar(tmp_path / "data" / "train-99999.tar", [])
    plan = plan_of(make_job())
    assert [shard.blocks for shard in plan.record.shards] == [1, 0]
    fresh = {shard.record.name: shard.rows for shard in plan.changes.new}
    items = list(work_items(plan, lambda shard: fresh[shard.name], 4))
    assert [item.shard for item in items] == ["train-00000.tar"]


def test_nothing_at_all_is_refused(make_job, tmp_path):
    write_tar(tmp_path / "data" / "train-0.tar", [])
    with pytest.raises(
        ManifestError, match=r"no sample in any of 1 shard\(s\), such as"
    ):
        plan_of(make_job())


def test_what_a_plan_costs(make_shards, make_job):
    make_shards([11, 5])
    outputs = {"patch": {"from": "body", "encoding": "half"}, "logits": {"topk": 2}}
    plan = plan_of(
        make_job(teachers={"net": {**NET, "outputs": outputs}}), "views.random=1"
    )
    numbers = estimate(plan)
    assert (numbers.shards, numbers.samples, numbers.rows) == (2, 16, 24)
    assert numbers.padding == pytest.approx(8 / 24)
    assert numbers.blocks_to_do == 2 * 3
    sizes = numbers.bytes_by_output
    assert sizes["net/image/16x16/patch"] == 16 * 2 * 4 * 4 * 16 * 2
    assert numbers.bytes_to_do == sum(sizes.values())
    # A block in flight holds its inputs, its outputs and their encoded copy.
    row = 2 * (16 * 16 * 3 + 2 * numbers.bytes_to_do // (16 * 2))
    assert numbers.block_bytes >= 8 * row
    multiplications = 8 * 8 * 8 * 27 + 4 * 4 * 16 * 72 + 16 * 5
    assert numbers.flops == pytest.approx(16 * 2 * 2 * multiplications)


def test_what_compact_costs(make_shards, make_job):
    make_shards([11, 5])
    outputs = {"patch": {"from": "body", "encoding": "compact"}}
    plan = plan_of(make_job(teachers={"net": {**NET, "outputs": outputs}}))
    numbers = estimate(plan)
    # A byte a value, two a cell, and a mean and a deviation for each channel.
    row = 4 * 4 * 16 + 2 * 4 * 4 + 2 * 4 * 16
    assert numbers.bytes_to_do == 16 * row
    # Four arrays and the row facts, for each of three blocks.
    assert numbers.objects_to_do == 3 * 5
    # In memory the teacher's own float32 too.
    assert numbers.block_bytes >= 8 * (16 * 16 * 3 + 4 * 4 * 16 * 4 + row)


def test_what_tiny_costs(make_shards, make_job):
    make_shards([11, 5])
    outputs = {"patch": {"from": "body", "encoding": "tiny"}}
    net = {**NET, "outputs": outputs, "args": {"width": 35}}
    numbers = estimate(plan_of(make_job(teachers={"net": net})))
    # Half a byte a value of 70, three scales a cell, a mean and a deviation for each.
    assert numbers.bytes_to_do == 16 * (4 * 4 * (35 + 3 * 2) + 2 * 4 * 70)


def test_compact_vectors_are_refused(make_shards, make_job):
    make_shards([8])
    outputs = {"logits": {"encoding": "compact"}}
    path = make_job(teachers={"net": {**NET, "outputs": outputs}})
    message = r"compact must be of a grid of features, got a vector \(output logits\)"
    with pytest.raises(BankError, match=message):
        plan_of(path)


def test_limits(make_shards, make_job, tmp_path):
    class Full:
        url = "/full"

        def __init__(self, free):
            self._free = free

        def free_bytes(self):
            return self._free

    make_shards([8])
    plan = plan_of(make_job())
    numbers = estimate(plan)
    check_limits(plan, numbers, Full(numbers.bytes_to_do))
    check_limits(plan, numbers, Full(None))
    with pytest.raises(PipelineError, match="bank /full: no space: the job may write"):
        check_limits(plan, numbers, Full(numbers.bytes_to_do - 1))
    tight = plan_of(make_job(limits={"max_bytes": numbers.bytes_to_do - 1}))
    with pytest.raises(PipelineError, match=r"limits.max_bytes is"):
        check_limits(tight, numbers, Full(None))
    assert not (tmp_path / "bank").exists()
