"""The Beam graph: what crosses a shuffle, how large it is, what its counters say."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys

import apache_beam as beam
import pytest
from apache_beam.portability import common_urns
from apache_beam.portability.api import beam_runner_api_pb2
from apache_beam.transforms import environments

from manifests.bank import WorkItem, WorkResult
from manifests.loading import load_job
from manifests.storage import Store
from pipeline.precompute import precompute
from pipeline.transform import (
    NAMESPACE,
    Precompute,
    ReadWorkItems,
    RunWorkItems,
)
from tests.conftest import ROOT, bank_identity

SMALL_RECORD_BYTES = 16_000
STRING_CODER = "beam:coder:string_utf8:v1"


def graph(url="gs://acme/bank", run="20260101T000000Z-abcdef"):
    pipeline = beam.Pipeline(options=beam.options.pipeline_options.PipelineOptions([]))
    _ = pipeline | "Precompute" >> Precompute(url, run)
    image = environments.DockerEnvironment.from_container_image("gcr.io/acme/image:1")
    return pipeline.to_runner_api(default_environment=image)


def leaves(proto):
    return {
        name: transform
        for name, transform in proto.components.transforms.items()
        if not transform.subtransforms
    }


def coder_urns(proto, coder_id):
    """The coder and all that it is made of, depth first."""
    coder = proto.components.coders[coder_id]
    parts = [
        part for one in coder.component_coder_ids for part in coder_urns(proto, one)
    ]
    return [coder.spec.urn, *parts]


def test_only_small_records_cross_a_shuffle():
    """No GroupByKey but the spread of items and the sum of results, both of text."""
    proto = graph()
    grouped = {}
    for transform in leaves(proto).values():
        if transform.spec.urn != common_urns.primitives.GROUP_BY_KEY.urn:
            continue
        (collection,) = transform.inputs.values()
        coder = proto.components.pcollections[collection].coder_id
        grouped[transform.unique_name] = coder_urns(proto, coder)
    assert {name.split("/")[1] for name in grouped} == {"Spread", "SumResults"}
    assert len(grouped) == 2
    for name, urns in grouped.items():
        coder, key, *value = [urn.split(":")[2] for urn in urns]
        assert coder == "kv"
        if "/Spread/" in name:
            # A random number; the text with its time and window.
            assert (key, value[:2]) == ("varint", ["tuple", "string_utf8"])
        else:
            # The key None, the text.
            assert (key, value) == ("pickled_python", ["string_utf8"])


def test_what_workers_yield_is_text():
    proto = graph()
    for transform in leaves(proto).values():
        if transform.unique_name.split("/")[-1] not in (
            "ReadWorkItems",
            "RunWorkItems",
            "Finalise",
        ):
            continue
        (collection,) = transform.outputs.values()
        coder = proto.components.pcollections[collection].coder_id
        assert coder_urns(proto, coder) == [STRING_CODER], transform.unique_name


def test_only_results_reach_the_second_shuffle():
    """Between the teachers and the next GroupByKey lies one partial sum of results."""
    proto = graph()
    transforms = leaves(proto)
    producer = {
        output: name
        for name, transform in transforms.items()
        for output in transform.outputs.values()
    }

    def upstream(name):
        seen, todo = set(), [name]
        while todo:
            for collection in transforms[todo.pop()].inputs.values():
                before = producer[collection]
                if before not in seen:
                    seen.add(before)
                    todo.append(before)
        return seen

    (work,) = (
        n for n, t in transforms.items() if t.unique_name.endswith("RunWorkItems")
    )
    after = [
        transform.unique_name
        for name, transform in transforms.items()
        if transform.spec.urn == common_urns.primitives.GROUP_BY_KEY.urn
        and work in upstream(name)
    ]
    assert after
    assert all(name.startswith("Precompute/SumResults/") for name in after)


def test_the_graph_does_not_grow_with_the_job():
    """It holds two names, whatever they stand for."""
    small = graph("s3://a/b", "one").SerializeToString()
    large = graph("gs://" + "long/" * 20, "another").SerializeToString()
    assert len(small) < len(large) < len(small) + 1000
    assert len(large) < 100_000


def test_every_function_is_found_by_name_in_a_fresh_process():
    """Pickled by reference: a worker needs the package, not this process's code."""
    proto = graph()
    payloads = []
    for transform in leaves(proto).values():
        if transform.spec.urn == common_urns.primitives.PAR_DO.urn:
            payload = beam_runner_api_pb2.ParDoPayload.FromString(
                transform.spec.payload
            )
            if payload.do_fn.payload:
                payloads.append((transform.unique_name, payload.do_fn.payload))
    ours = [
        (name, data)
        for name, data in payloads
        if name.split("/")[1] in ("ReadWorkItems", "RunWorkItems", "Finalise")
    ]
    assert len(ours) == 3
    for name, data in ours:
        assert len(data) < 2000, name
    script = (
        "import json, sys\n"
        "from apache_beam.internal import pickler\n"
        "for name, data in json.load(sys.stdin):\n"
        "    fn = pickler.loads(data.encode('latin1'))[0]\n"
        "    print(name, type(fn).__module__, type(fn).__qualname__)\n"
    )
    given = json.dumps([(name, data.decode("latin1")) for name, data in payloads])
    done = subprocess.run(
        [sys.executable, "-c", script],
        input=given,
        capture_output=True,
        text=True,
        check=False,
        cwd="/",
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count(" pipeline.transform ") == 3
    assert "pipeline.transform RunWorkItems" in done.stdout


def test_records_stay_small_with_many_shards(
    make_shards, make_job, tmp_path, monkeypatch
):
    make_shards([3] * 20)
    items, results = [], []
    read, finish = ReadWorkItems.process, RunWorkItems._finish

    def reading(self, run_id):
        for text in read(self, run_id):
            items.append(text)
            yield text

    def finishing(self, future):
        text = finish(self, future)
        results.append(text)
        return text

    monkeypatch.setattr(ReadWorkItems, "process", reading)
    monkeypatch.setattr(RunWorkItems, "_finish", finishing)
    job = load_job(str(make_job()), [])
    outcome = precompute(job, ["--runner=FnApiRunner"], quiet=True)
    assert outcome.is_whole
    assert len(items) == len(results) == 20
    assert {WorkItem.model_validate_json(text).shard for text in items} == {
        f"train-{number:05d}.tar" for number in range(20)
    }
    total = WorkResult()
    for text in results:
        total = total.plus(WorkResult.model_validate_json(text))
    assert total.blocks == outcome.result.blocks == 40
    assert max(len(text.encode()) for text in items + results) < SMALL_RECORD_BYTES
    # The items are dropped when the run has ended.
    (path,) = (path for path, _ in Store(job.bank).list("runs"))
    assert path.endswith(".json")


def test_the_longest_items_come_first(make_shards, make_job, monkeypatch):
    make_shards([1, 9, 4])
    seen = []
    read = ReadWorkItems.process

    def reading(self, run_id):
        for text in read(self, run_id):
            seen.append(WorkItem.model_validate_json(text).num_rows)
            yield text

    monkeypatch.setattr(ReadWorkItems, "process", reading)
    precompute(load_job(str(make_job()), []), quiet=True)
    assert seen == [9, 4, 1]


def test_counters_equal_the_outcome(make_shards, make_job, tmp_path, monkeypatch):
    """Bad rows included; distributions tell the seconds of every stage."""
    from tests.conftest import jpeg, write_tar

    members = []
    for row in range(20):
        data = b"no picture" if row in (3, 11) else jpeg(row)
        members += [(f"k{row:03d}.jpg", data), (f"k{row:03d}.cls", b"1")]
    write_tar(tmp_path / "data/train-00000.tar", members)
    kept = {}
    import pipeline.transform as transform

    query = transform.query_counters

    def querying(result):
        metrics = result.metrics().query()
        kept["distributions"] = {
            one.key.metric.name: one.result
            for one in metrics["distributions"]
            if one.key.metric.namespace == NAMESPACE
        }
        return query(result)

    monkeypatch.setattr(transform, "query_counters", querying)
    outcome = precompute(load_job(str(make_job()), []), quiet=True)
    result, counters = outcome.result, outcome.counters
    assert counters["samples"] == result.samples == 20
    assert counters["blocks"] == result.blocks == 6
    assert counters["objects"] == result.objects == 9
    assert counters["bytes_written"] == result.bytes_written > 0
    assert counters["bytes_read"] == result.bytes_read > 0
    assert counters["valid/net.image"] == result.valid["net.image"] == 18
    invalid = {
        name: value for name, value in counters.items() if name.startswith("invalid/")
    }
    assert invalid == {f"invalid/{name}": n for name, n in result.invalid.items()}
    assert invalid["invalid/net.image/image:undecodable"] == 2
    sizes = sum(
        size
        for path, size in Store(str(tmp_path / "bank")).list("")
        if re.search(r"^rows/|/16x16/(logits|patch)/c\.", path)
    )
    assert counters["bytes_written"] == sizes
    stages = {"read", "decode", "prepare", "forward.net", "encode", "write"}
    assert stages <= set(result.seconds)
    assert {f"{stage}_ms" for stage in stages} <= set(kept["distributions"])
    for stage in stages:
        assert kept["distributions"][f"{stage}_ms"].count == result.items


@pytest.mark.parametrize(
    "options",
    [
        ["--direct_running_mode=multi_threading", "--direct_num_workers=2"],
        ["--runner=FnApiRunner", "--direct_num_workers=2"],
    ],
)
def test_more_workers_make_the_same_bank(forked, full, tmp_path, options):
    bank = tmp_path / "bank"
    command = ["precompute", full.path, f"bank={bank}", "--quiet", "--", *options]
    done = forked.run(command)
    assert done["code"] == 0, done["output"]
    assert bank_identity(bank) == full.identity
