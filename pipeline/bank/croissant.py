"""The bank as Croissant 1.0, the JSON-LD by which catalogues know datasets.

Source: MLCommons Croissant Format Specification 1.0,
https://docs.mlcommons.org/croissant/docs/croissant-spec.html: context, FileObject,
FileSet, RecordSet. ``creator`` and ``datePublished`` belong to whoever publishes a bank
and are left out; a validator warns of that.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pyarrow as pa

from manifests.bank import BankRecord
from pipeline.bank import layout

CROISSANT_PATH = "croissant.json"
_ZARR = "https://zarr-specs.readthedocs.io/en/latest/v3/core/v3.0.html"
_PARQUET = "application/x-parquet"
_CONTEXT: dict[str, Any] = {
    "@language": "en",
    "@vocab": "https://schema.org/",
    "citeAs": "cr:citeAs",
    "column": "cr:column",
    "conformsTo": "dct:conformsTo",
    "cr": "http://mlcommons.org/croissant/",
    "rai": "http://mlcommons.org/croissant/RAI/",
    "data": {"@id": "cr:data", "@type": "@json"},
    "dataType": {"@id": "cr:dataType", "@type": "@vocab"},
    "dct": "http://purl.org/dc/terms/",
    "equivalentProperty": "cr:equivalentProperty",
    "examples": {"@id": "cr:examples", "@type": "@json"},
    "extract": "cr:extract",
    "field": "cr:field",
    "fileProperty": "cr:fileProperty",
    "fileObject": "cr:fileObject",
    "fileSet": "cr:fileSet",
    "format": "cr:format",
    "includes": "cr:includes",
    "isLiveDataset": "cr:isLiveDataset",
    "jsonPath": "cr:jsonPath",
    "key": "cr:key",
    "md5": "cr:md5",
    "parentField": "cr:parentField",
    "path": "cr:path",
    "recordSet": "cr:recordSet",
    "references": "cr:references",
    "regex": "cr:regex",
    "repeated": "cr:repeated",
    "replace": "cr:replace",
    "samplingRate": "cr:samplingRate",
    "sc": "https://schema.org/",
    "separator": "cr:separator",
    "source": "cr:source",
    "subField": "cr:subField",
    "transform": "cr:transform",
}
_DATA_TYPES = {
    "string": "sc:Text",
    "bool": "sc:Boolean",
    "int32": "cr:Int32",
    "int64": "cr:Int64",
    "double": "cr:Float64",
}
_FIELDS = {
    "shard": "Shard (tar file) that holds the sample.",
    "key": "Key of the sample in its shard.",
    "row": "Row of the sample axis of every array in features.zarr.",
    "block": "Block of rows that it lies in.",
    "offset": "Row inside the block.",
}


def croissant(
    url: str,
    record: BankRecord,
    index: pa.Schema,
    files: Mapping[str, tuple[int, str]],
) -> dict[str, Any]:
    """Returns the Croissant document of a finalised bank.

    Args:
        url: where the bank lies.
        record: of the bank.
        index: schema of the parts of its index.
        files: path of each single file to its (size in bytes, sha256).
    """
    state = record.state
    assert state is not None
    name = url.rstrip("/").rsplit("/", 1)[-1]
    passes = [entry for entry in record.passes if entry.outputs]
    teachers = dict.fromkeys(e.teacher for e in passes if not e.holds_inputs)
    held = list(layout.outputs(record))
    outputs = ", ".join(path for path, one, _ in held if not one.holds_inputs)
    copies = ", ".join(path for path, one, _ in held if one.holds_inputs)
    images = f" With copies of the images, as JPEG: {copies}." if copies else ""
    encodings = {".json": "application/json", ".parquet": _PARQUET}
    return {
        "@context": _CONTEXT,
        "@type": "sc:Dataset",
        "conformsTo": "http://mlcommons.org/croissant/1.0",
        "name": name,
        "description": (
            f"Outputs of the frozen models {', '.join(teachers)} for {state.rows:,} "
            f"samples in {record.num_views} view(s), as Zarr v3: {outputs}.{images} "
            "README.md says by which weights and which preprocessing."
        ),
        "url": url,
        "license": _licences(record),
        "distribution": [
            *(
                {
                    "@type": "cr:FileObject",
                    "@id": path,
                    "name": path,
                    "contentUrl": path,
                    "contentSize": f"{size} B",
                    "encodingFormat": encodings[path[path.rindex(".") :]],
                    "sha256": sha256,
                }
                for path, (size, sha256) in files.items()
            ),
            {
                "@type": "cr:FileSet",
                "@id": "index",
                "name": "index",
                "description": "A line per row of the sample axis.",
                "encodingFormat": _PARQUET,
                "includes": "index/*.parquet",
            },
            {
                "@type": "cr:FileSet",
                "@id": "features.zarr",
                "name": "features.zarr",
                "description": "The outputs: a Zarr v3 group.",
                "encodingFormat": _ZARR,
                "includes": "features.zarr/**",
            },
        ],
        "recordSet": [
            {
                "@type": "cr:RecordSet",
                "@id": "rows",
                "name": "rows",
                "description": "The samples, one per row of the arrays.",
                "key": {"@id": "rows/row"},
                "field": [_field(column.name, str(column.type)) for column in index],
            }
        ],
    }


def _licences(record: BankRecord) -> list[str]:
    """Returns licences as they are told: of the data, then of each teacher."""
    told = [record.dataset.get("license")]
    told += [
        e.provenance.get("license")
        for e in record.passes
        if e.outputs and not e.holds_inputs
    ]
    return list(dict.fromkeys(one for one in told if one)) or ["not stated"]


def _field(column: str, kind: str) -> dict[str, Any]:
    what, _, name = column.partition(".")
    described = {
        "label": f"Label {name}.",
        "valid": f"Whether the row can be used from pass {name}.",
        "reason": f"Why it cannot be used from pass {name}; empty where it can.",
    }
    return {
        "@type": "cr:Field",
        "@id": f"rows/{column}",
        "name": column,
        "description": _FIELDS.get(column) or described[what],
        "dataType": _DATA_TYPES[kind],
        "source": {"fileSet": {"@id": "index"}, "extract": {"column": column}},
    }
