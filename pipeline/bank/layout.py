"""Which groups and arrays a bank has: a pure function of its record.

Owns paths inside ``features.zarr`` and writing their metadata; the values are written
by workers (features) and by finalise (row arrays, statistics).
"""

from __future__ import annotations

import json
from collections.abc import Iterator

from manifests.bank import BankRecord, OutputEntry, PassEntry
from manifests.storage import Store
from pipeline.bank.arrays import (
    ArraySpec,
    group_metadata,
    metadata,
    object_name,
    resized,
)
from pipeline.bank.places import FEATURES
from pipeline.bank.row_arrays import RowArray
from pipeline.bank.rows import object_path
from pipeline.samples.photometric import DEFINITION, PARAMETERS

OWN_GEOMETRY = (
    "the teacher's own resize and crop of the whole image: grids do not lie on the "
    "boxes in views/"
)
KEY = RowArray("key", "str", "")
FLIP = RowArray("views/flip", "bool", False, has_view=True)


def level_path(entry: PassEntry, size: str) -> str:
    """Returns the group of one teacher, group and size."""
    return f"{entry.teacher}/{entry.group}/{size}"


def levels(record: BankRecord) -> dict[str, list[PassEntry]]:
    """Returns every ``<teacher>/<group>/<size>`` with the passes that write there."""
    found: dict[str, list[PassEntry]] = {}
    for entry in record.passes:
        for size in dict.fromkeys(output.size for output in entry.outputs):
            found.setdefault(level_path(entry, size), []).append(entry)
    return found


def outputs(record: BankRecord) -> Iterator[tuple[str, PassEntry, OutputEntry]]:
    """Yields (path of the output, its first pass, entry), each output once."""
    seen = set()
    for entry in record.passes:
        for output in entry.outputs:
            path = f"{level_path(entry, output.size)}/{output.name}"
            if path not in seen:
                seen.add(path)
                yield path, entry, output


def feature_arrays(record: BankRecord) -> Iterator[ArraySpec]:
    """Yields the arrays that workers write."""
    for _, _, output in outputs(record):
        for data in output.arrays:
            yield ArraySpec.from_json(data)


def block_objects(entry: PassEntry, block: int) -> list[str]:
    """Returns the paths in the bank of all objects of one block of a pass.

    In the order of its outputs, arrays and views: the same for every block.
    """
    found = [
        f"{FEATURES}/{object_name(ArraySpec.from_json(data), block, view)}"
        for output in entry.outputs
        for data in output.arrays
        for view in entry.views
    ]
    return found or [object_path(entry.id, block)]


def valid_array(level: str) -> RowArray:
    """Returns the validity of rows at one level."""
    return RowArray(f"{level}/valid", "bool", False)


def box_array(name: str) -> RowArray:
    """Returns the boxes of an image input: x0, y0, x1, y1 in upright pixels."""
    return RowArray(
        f"views/{name}_box",
        "float64",
        "NaN",
        (4,),
        (f"{name}_box_edge",),
        has_view=True,
        attributes={"edges": ["x0", "y0", "x1", "y1"], "unit": "upright pixels"},
    )


def size_array(name: str) -> RowArray:
    """Returns the sizes of an image input: height, width in pixels, upright."""
    return RowArray(f"views/{name}_size", "int32", 0, (2,), (f"{name}_size_axis",))


def label_array(name: str, is_class: bool) -> RowArray:
    """Returns a label: class index (-1 where there is none) or number (NaN)."""
    if is_class:
        return RowArray(f"labels/{name}", "int64", -1)
    return RowArray(f"labels/{name}", "float64", "NaN")


def calibration_arrays(name: str) -> tuple[RowArray, RowArray]:
    """Returns intrinsics (3, 3) in upright pixels and lidar2cam (4, 4) of an input."""
    return (
        RowArray(
            f"calibration/{name}_intrinsics",
            "float64",
            "NaN",
            (3, 3),
            (f"{name}_intrinsics_row", f"{name}_intrinsics_column"),
        ),
        RowArray(
            f"calibration/{name}_lidar2cam",
            "float64",
            "NaN",
            (4, 4),
            (f"{name}_lidar2cam_row", f"{name}_lidar2cam_column"),
        ),
    )


def time_array(name: str) -> RowArray:
    """Returns the times of an input in seconds."""
    attributes = {"unit": "s"}
    return RowArray(f"calibration/{name}_time", "float64", "NaN", attributes=attributes)


YAW = RowArray("views/yaw", "float64", "NaN", has_view=True, attributes={"unit": "rad"})
SCALE = RowArray("views/scale", "float64", "NaN", has_view=True)
PHOTOMETRIC = RowArray(
    "views/photometric",
    "float64",
    "NaN",
    (len(PARAMETERS),),
    ("photometric_parameter",),
    has_view=True,
    attributes={"parameters": list(PARAMETERS), "definition": DEFINITION},
)


def row_arrays(record: BankRecord) -> list[RowArray]:
    """Returns every array that finalise writes per row."""
    found = [KEY, FLIP]
    for name, entry in record.inputs.items():
        if entry.config["kind"] != "points":
            found += [box_array(name), size_array(name)]
            if entry.config.get("calibration"):
                found += calibration_arrays(name)
        if entry.config.get("timestamp"):
            found.append(time_array(name))
    if any(entry.config["kind"] == "points" for entry in record.inputs.values()):
        found += [YAW, SCALE]
    if record.views.get("photometric") is not None:
        found.append(PHOTOMETRIC)
    for name, config in record.labels.items():
        found.append(label_array(name, config.get("num_classes") is not None))
    return found + [valid_array(level) for level in levels(record)]


def _groups(record: BankRecord) -> dict[str, dict[str, object]]:
    root = {
        "teachonce": {
            "bank": "../bank.json",
            "block_rows": record.block_rows,
            "missing": "rows where `valid` is false hold each array's fill value",
        }
    }
    groups: dict[str, dict[str, object]] = {"": dict(root), "views": {}}
    if record.labels:
        groups["labels"] = {}
    configs = [entry.config for entry in record.inputs.values()]
    if any(one.get("calibration") or one.get("timestamp") for one in configs):
        groups["calibration"] = {}
    for entry in record.passes:
        if not entry.outputs:
            continue
        groups[entry.teacher] = {
            "model": entry.model,
            "license": entry.provenance.get("license"),
            "fingerprint": entry.teacher_fingerprint,
        }
        groups[f"{entry.teacher}/{entry.group}"] = {"inputs": list(entry.inputs)}
        for size in dict.fromkeys(output.size for output in entry.outputs):
            level = level_path(entry, size)
            groups[level] = {"preprocess": entry.provenance["preprocess"][size]}
            if entry.has_own_geometry(size):
                groups[level]["geometry"] = OWN_GEOMETRY
            if not entry.holds_inputs:
                groups[f"{level}/stats"] = {}
    return groups


def group_paths(record: BankRecord) -> list[str]:
    """Returns the path of every group; '' is the root."""
    return list(_groups(record))


def write_metadata(store: Store, record: BankRecord) -> None:
    """Makes groups and arrays that are missing and grows those that are there.

    Only for the holder of the bank's lock. Arrays never shrink.
    """
    for path, attributes in _groups(record).items():
        name = f"{FEATURES}/{path}/zarr.json" if path else f"{FEATURES}/zarr.json"
        if store.read_or_none(name) is None:
            store.replace(name, group_metadata(attributes))
    rows, views = record.num_rows, record.num_views
    for spec in feature_arrays(record):
        _write_array(store, spec.path, metadata(spec, rows, views), rows, views)
    for array in row_arrays(record):
        _write_array(store, array.path, array.metadata(rows, views), rows, views)


def _write_array(store: Store, path: str, fresh: bytes, rows: int, views: int) -> None:
    name = f"{FEATURES}/{path}/zarr.json"
    held = store.read_or_none(name)
    if held is None:
        store.replace(name, fresh)
        return
    grown = resized(held, rows, views)
    if json.loads(grown) != json.loads(held):
        store.replace(name, grown)
