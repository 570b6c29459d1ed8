"""Lists: the same samples from CSV, TSV and JSON lines, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pipeline.errors import PipelineError
from pipeline.packing.lists import list_samples, list_sequences, read_list
from pipeline.packing.sample import safe_key

COLUMNS = ("key", "jpg", "cam_back.jpg", "bin", "cls", "json")
ROWS = [
    ("s/0", "img/0.jpg", "/data/0b.jpg", "gs://b/0.bin", "3", '{"t": [1, "ü,"]}'),
    ("s/1", "img/1.jpg", "", "x.bin", "x.cls", "meta/1.json"),
]


def write(path: Path, columns, rows) -> str:
    if path.suffix == ".jsonl":
        lines = [json.dumps(dict(zip(columns, row, strict=True))) for row in rows]
    else:
        mark = "," if path.suffix == ".csv" else "\t"
        quoted = [
            ['"' + str(cell).replace('"', '""') + '"' for cell in row] for row in rows
        ]
        lines = [mark.join(one) for one in [columns, *quoted]]
    path.write_text("\n".join(lines) + "\n")
    return str(path)


@pytest.mark.parametrize("suffix", ["csv", "tsv", "jsonl"])
def test_a_row_is_a_sample(tmp_path, suffix):
    url = write(tmp_path / f"list.{suffix}", COLUMNS, ROWS)
    first, second = list_samples(read_list(url))
    assert (first.key, second.key) == ("s/0", "s/1")
    literal = first.members.pop("json")
    assert json.loads(literal) == {"t": [1, "ü,"]}
    assert first.members == {
        "jpg": str(tmp_path / "img/0.jpg"),
        "cam_back.jpg": "/data/0b.jpg",
        "bin": "gs://b/0.bin",
        "cls": b"3",
    }
    assert second.members == {
        "jpg": str(tmp_path / "img/1.jpg"),
        "bin": str(tmp_path / "x.bin"),
        "cls": str(tmp_path / "x.cls"),
        "json": str(tmp_path / "meta/1.json"),
    }


def test_json_lines_hold_json(tmp_path):
    path = tmp_path / "l.jsonl"
    path.write_text(
        '{"key": 7, "jpg": "a.jpg", "cls": 2, "json": {"a": [1]}}\n\n'
        '{"jpg": "b.jpg", "json": null}\n'
    )
    first, second = list_samples(read_list(str(path)))
    assert first.key == "7"
    assert first.members["cls"] == b"2"
    assert json.loads(first.members["json"]) == {"a": [1]}
    assert list(second.members) == ["jpg"]


@pytest.mark.parametrize(
    ("cell", "key"),
    [
        ("img/a.b.jpg", "img/a_b"),
        ("../up/./a.jpg", "up/a"),
        ("/abs/a.jpg", "abs/a"),
        ("gs://bucket/x/a.jpg", "bucket/x/a"),
        ("noext", "noext"),
    ],
)
def test_without_a_key_the_first_path_is_one(tmp_path, cell, key):
    url = write(tmp_path / "l.csv", ("cls", "jpg", "bin"), [("1", cell, "z.bin")])
    (sample,) = list_samples(read_list(url))
    assert sample.key == key


def test_rows_without_a_path_are_numbered(tmp_path):
    url = write(tmp_path / "l.csv", ("cls",), [(str(n),) for n in range(11)])
    keys = [one.key for one in list_samples(read_list(url))]
    assert keys[:2] == ["00", "01"]
    assert len(set(keys)) == 11


@pytest.mark.parametrize(
    ("name", "text", "match"),
    [
        ("l.csv", "", "must have a line per sample"),
        ("l.csv", "jpg\n", "must have a line per sample"),
        ("l.csv", "jpg,jpg\na,b\n", "header of different names"),
        ("l.csv", "jpg,bin\na\n", r"must have 2 cells, got 1 \(.*line 2\)"),
        ("l.csv", "jpg,bin\na,b,c\n", r"must have 2 cells, got 3 \(.*line 2\)"),
        ("l.csv", 'jpg\n"a\n', r"line \d: unexpected end of data"),
        ("l.csv", "jpg,JPG\na,b\n", "column 'JPG' comes twice"),
        ("l.csv", "_jpg\na\n", "a member must be an extension"),
        ("l.csv", "a/b\na\n", "a member must be an extension"),
        ("l.csv", "key,jpg\na,\n", r"a line must name a member.*line 2"),
        ("l.csv", "jpg,json\na,{1\n", r"must hold JSON or a path"),
        ("l.csv", "jpg,time\na,1\n", "column 'time' is for --clip or --sweeps"),
        ("l.jsonl", "{\n", r"a line must be JSON.*line 1"),
        ("l.jsonl", "[1]\n", r"a line must be a JSON object"),
        ("l.jsonl", '{"jpg": 5}\n', "column 'jpg' must hold a path, got 5"),
        ("l.jsonl", '{"cls": true}\n', "column 'cls' must hold a path, got True"),
    ],
)
def test_a_broken_list_is_refused_by_line(tmp_path, name, text, match):
    (tmp_path / name).write_text(text)
    with pytest.raises(PipelineError, match=match):
        list_samples(read_list(str(tmp_path / name)))


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("jpg\na\n", "need a column `clip`"),
        ("clip,key,jpg\nx,k,a\n", "'key' has no effect"),
        ("clip,time,jpg\nx,1,a\nx,,b\n", "must each have one"),
        ("clip,time,jpg\nx,1,a\nx,1.0,b\n", "must differ"),
        ("clip,time,jpg\nx,soon,a\n", "must be seconds, got 'soon'"),
        ("clip,time,jpg\nx,nan,a\n", "must be seconds, got 'nan'"),
    ],
)
def test_a_list_that_is_no_sequence_is_refused(tmp_path, text, match):
    (tmp_path / "l.csv").write_text(text)
    with pytest.raises(PipelineError, match=match):
        list_sequences(read_list(str(tmp_path / "l.csv")))


def test_labels_that_change_within_a_clip_are_refused(tmp_path):
    from pipeline.packing.clips import ClipCut, cut_clips

    (tmp_path / "l.csv").write_text("clip,jpg,cls\nx,a,0\nx,b,1\nx,c,1\nx,d,1\n")
    (sequence,) = list_sequences(read_list(str(tmp_path / "l.csv")))
    with pytest.raises(PipelineError, match=r"must be the same .*, got '0', '1'"):
        cut_clips(sequence, ClipCut(2, 1, 2))


@pytest.mark.parametrize("name", ["", "/", "..", "a\0b", "__MACOSX/a", "\udcff"])
def test_names_that_can_be_no_key_are_refused(name):
    with pytest.raises(PipelineError, match="a key must be"):
        safe_key(name)
