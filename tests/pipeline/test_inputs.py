"""What is decided once about an input: view 0's box, its aspect, from a few headers."""

from __future__ import annotations

import math

import pytest

from manifests.errors import ManifestError
from manifests.job import Job
from pipeline.errors import PipelineError
from pipeline.inputs import PROBED_SHARDS, ProbedShard, resolve_input, view_policy
from pipeline.samples.shards import index_shard
from tests.conftest import jpeg, sweep, write_tar

IMAGE = {"kind": "image", "member": "jpg"}
LIDAR = {"kind": "points", "member": "bin"}


def job(**fields: object) -> Job:
    data = {
        "bank": "b",
        "dataset": {"shards": "a.tar"},
        "metadata": "json",
        "inputs": {"image": IMAGE},
        "teachers": {"net": {"model": "timm:test_vit", "outputs": {"cls": {}}}},
        **fields,
    }
    return Job.model_validate(data)


@pytest.fixture
def shards(tmp_path):
    def make(*sizes: tuple[int, int] | None, per_shard: int = 4) -> list[ProbedShard]:
        """Shards of images of these sizes; None is a sample without one."""
        found = []
        for start in range(0, len(sizes), per_shard):
            members = []
            for number, size in enumerate(sizes[start : start + per_shard], start):
                if size is not None:
                    members.append((f"{number}.jpg", jpeg(number, *size)))
                members.append((f"{number}.bin", sweep(number)))
            path = write_tar(tmp_path / f"{start:05d}.tar", members)
            index = index_shard(str(path))
            found.append((str(path), index.sequential, index.rows))
        return found

    return make


@pytest.mark.parametrize(
    ("size", "config", "others", "view0", "aspect"),
    [
        ((20, 30), {}, {}, "square", 1.0),
        ((20, 31), {}, {}, "full", 1.55),
        ((31, 20), {}, {}, "full", 20 / 31),
        ((20, 20), {"calibration": "cam"}, {}, "full", 1.0),
        ((20, 25), {}, {"lidar": LIDAR}, "full", 1.25),
        ((20, 25), {"view0": "full"}, {}, "full", 1.25),
        ((20, 60), {"view0": "square"}, {}, "square", 1.0),
    ],
)
def test_view_0(shards, size, config, others, view0, aspect):
    made = job(inputs={"image": {**IMAGE, **config}, **others})
    entry = resolve_input("image", made, shards(*[size] * 3))
    assert entry.view0 == view0
    assert entry.aspect == pytest.approx(aspect)
    assert entry.metadata == "json"
    assert entry.config["member"] == "jpg"


def test_the_middle_of_the_first_sixteen_counts(shards):
    sizes = [(20, 60)] * 2 + [None] * 3 + [(20, 40)] * 12 + [(20, 20)] * 100
    entry = resolve_input("image", job(), shards(*sizes))
    assert (entry.view0, entry.aspect) == ("full", 2.0)


def test_points_have_no_box(shards):
    made = job(inputs={"lidar": LIDAR})
    entry = resolve_input("lidar", made, iter(()))
    assert entry.view0 is None


def test_a_sweep_of_an_unknown_format_is_refused():
    made = job(inputs={"lidar": {**LIDAR, "member": ["bin", "laz"]}})
    with pytest.raises(ManifestError, match=r"^inputs.lidar.format must be .* 'laz'"):
        resolve_input("lidar", made, iter(()))


def test_no_image_at_all_is_refused_after_a_few_shards(shards):
    looked_at = []

    def watched():
        for shard in shards(*[None] * (4 * PROBED_SHARDS + 40)):
            looked_at.append(shard[0])
            yield shard

    with pytest.raises(PipelineError, match=r"inputs.image: none of the first samples"):
        resolve_input("image", job(), watched())
    assert len(looked_at) == PROBED_SHARDS


def test_without_samples_nothing_is_decided_by_them():
    entry = resolve_input("image", job(), [("empty.tar", False, [])])
    assert (entry.view0, entry.aspect) == ("square", 1.0)


def test_an_unreadable_header_is_passed_over(tmp_path):
    members = [("a.jpg", b"nonsense"), ("b.jpg", jpeg(1, 10, 40))]
    path = write_tar(tmp_path / "a.tar", members)
    index = index_shard(str(path))
    entry = resolve_input("image", job(), [(str(path), False, index.rows)])
    assert entry.aspect == 4.0


def test_the_policy_is_the_jobs(shards):
    views = {"random": 2, "seed": 4, "scale": [0.5, 1], "yaw_deg": 90, "flip": False}
    made = job(views=views)
    entry = resolve_input("image", made, shards((20, 60)))
    policy = view_policy(made, {"image": entry})
    assert policy.view0 == {"image": "full"}
    assert (policy.seed, policy.scale, policy.flips) == (4, (0.5, 1.0), False)
    assert policy.yaw_rad == pytest.approx(math.pi / 2)
