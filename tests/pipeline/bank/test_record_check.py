"""``bank.json`` of a stranger: what contradicts itself is refused at once."""

from __future__ import annotations

import json
import re
import zipfile
from collections.abc import Callable
from typing import Any

import pytest

from manifests.errors import BankError, ManifestError
from manifests.storage import Store
from pipeline.bank.record import encode_record, parse_record
from tests.fuzz.targets import BANKS

Edit = Callable[[dict[str, Any]], object]


@pytest.fixture(scope="module")
def text() -> bytes:
    with zipfile.ZipFile(BANKS / "schema-1.zip") as stored:
        return stored.read("bank/bank.json")


def shard(**fields: object) -> Edit:
    return lambda record: record["shards"][1].update(fields)


def entry(**fields: object) -> Edit:
    return lambda record: record["passes"][1].update(fields)


def output(**fields: object) -> Edit:
    return lambda record: record["passes"][1]["outputs"][0].update(fields)


def array(**fields: object) -> Edit:
    return lambda record: record["passes"][1]["outputs"][0]["arrays"][0].update(fields)


def newer_encoding(path: str) -> Edit:
    def edit(record: dict) -> None:
        output(encoding={"encoding": "new"})(record)
        array(path=path)(record)

    return edit


def test_a_sound_record_is_taken(text):
    record = parse_record(Store("/b"), text)
    again = parse_record(Store("/b"), encode_record(record))
    assert again == record
    assert again.block_rows == json.loads(text)["block_rows"]


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda r: r.update(block_rows=0), "block_rows is 0"),
        (lambda r: r.update(block_rows=2**40), "block_rows is 1099511627776"),
        (lambda r: r.update(num_views=0), "num_views is 0"),
        (lambda r: r.update(num_views=2**30), "num_views is 1073741824"),
        (lambda r: r["inputs"].update({"../x": r["inputs"]["image"]}), "no name of a"),
        (lambda r: r["labels"].update({"a/b": {}}), "'a/b' is no name of a label"),
        (shard(name="train-0.tar"), "shard 'train-0.tar' is there twice"),
        (shard(part="../../part"), "'../../part' is no name of an index part"),
        (shard(first_block=1), "begins at block 1, the shards before it end at 2"),
        (shard(blocks=10**12, samples=10**12), r"has \d+ samples in \d+ blocks"),
        (shard(samples=-1), "has -1 samples in 2 blocks"),
        (shard(samples=100), "has 100 samples in 2 blocks"),
        (entry(id="../../x"), "'../../x' is no name of a pass"),
        (entry(id="rows"), "two passes have one id"),
        (entry(teacher="../net"), "'../net' is no name of a teacher"),
        (entry(group="a/b"), "'a/b' is no name of a group"),
        (entry(first_view=1, last_view=0), "has views 1 to 0 of 2"),
        (entry(last_view=10**15), "has views 0 to 1000000000000000 of 2"),
        (entry(inputs=["radar"]), "looks at 'radar', which is no input"),
        (entry(labels=["colour"]), "reads 'colour', which is no label"),
        (output(name="../x"), r"output '../x' of pass \S+ at \S+ is no name"),
        (output(shape=[3]), "is encoded as another one"),
        (newer_encoding("net/image/16x32/../x"), "has arrays elsewhere"),
        (newer_encoding("net/image/16x32"), "has arrays elsewhere"),
        (output(encoding={"encoding": []}), "what follows from it fails"),
        (array(path="../../x"), "has other arrays than its encoding"),
        (array(row_shape=[9]), "has other arrays than its encoding"),
        (array(chunk_rows=2.0), "2.0 is no length"),
        (array(has_view=1), "has_view a truth value"),
        (array(block_rows=True), "True is no length|chunk_rows must divide"),
        (lambda r: r["views"].pop("seed"), r"what follows from it fails \(KeyError"),
        (lambda r: r["inputs"]["image"]["config"].clear(), "input image is none"),
        (lambda r: r["state"]["valid"].update(x=1), "'x', which is no pass"),
        (entry(provenance={"identity": 0.5}), r"fails \(TypeError"),
        (entry(provenance={}), r"what follows from it fails \(KeyError: 'preprocess'"),
    ],
)
def test_what_contradicts_itself_is_refused(text, edit, message):
    record = json.loads(text)
    edit(record)
    with pytest.raises((BankError, ManifestError)) as caught:
        parse_record(Store("/b"), json.dumps(record).encode())
    assert re.search(message, str(caught.value)), str(caught.value)
    assert str(caught.value).startswith("/b/bank.json")
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize("version", [True, 1.0, 0, -1, "1", None, [1]])
def test_a_version_is_a_number_from_1(text, version):
    record = {**json.loads(text), "schema_version": version}
    with pytest.raises(BankError, match="has schema version"):
        parse_record(Store("/b"), json.dumps(record).encode())


def test_nesting_is_no_record():
    deep = b'{"schema_version": ' + b"[" * 10_000 + b"]" * 10_000 + b"}"
    with pytest.raises(BankError, match="is not a bank record"):
        parse_record(Store("/b"), deep)
