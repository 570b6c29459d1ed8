"""Copies of inputs in the bank: what a job asks for as a pass of its own.

A built-in kind of pass beside teachers: its group is its input, its only view is the
sample itself, and no model runs. Owns whether the data may be copied, how many bytes an
image may take, and what stands for a teacher's request and description. Imports no
torch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from PIL import features

from manifests.bank import BankRecord, InputEntry
from manifests.errors import BankError, ManifestError
from manifests.inputs import INPUT, ImageInput, StoredInputConfig
from manifests.job import STORED_INPUTS, Job
from manifests.loading import digest
from manifests.teacher import OutputConfig, TeacherConfig
from pipeline.bank.licences import check_copies
from pipeline.group_teachers import NATIVE, Described, GroupTeacher
from pipeline.inputs import ProbedShard, probe_sizes
from pipeline.samples.stored_images import ample_bytes, stored_size
from pipeline.sizing import MAX_OBJECT_BYTES
from teachers.interface import Cost, OutputSpec, TeacherRequest, WeightsRecord

FAMILY = "stored_input"
JPEG = "jpeg"
# Of an image whose size nobody could probe.
_PHOTO_ASPECT = 1.5


def find_stored_inputs(
    job: Job,
    inputs: Mapping[str, InputEntry],
    record: BankRecord | None,
    probed: Callable[[], Iterable[ProbedShard]],
) -> list[GroupTeacher]:
    """Returns the inputs that a job wants copies of, in the place of teachers.

    Args:
        job: with absolute paths.
        inputs: of the job, as the bank knows them.
        record: of the bank, if there is one.
        probed: gives the shards to look into; their first images' headers tell how many
            pixels a copy has.

    Raises:
        BankError: the licence does not allow copies, or the bank holds other ones.
        ManifestError: an image may not take the bytes that it needs.
    """
    if not job.stored_inputs:
        return []
    held = record.dataset if record else {}
    licence = job.dataset.license or held.get("license")
    allowed = job.dataset.copies_allowed or held.get("copies_allowed")
    check_copies(licence, allowed, STORED_INPUTS)
    block_rows = record.block_rows if record else job.block_rows
    found = []
    for name, config in job.stored_inputs.items():
        args = _held_args(name, config, record)
        if args is None:
            args = {
                "short_side": config.short_side,
                "quality": config.quality,
                "max_bytes": _max_bytes(name, config, inputs, probed, block_rows),
            }
        request = TeacherRequest(
            STORED_INPUTS,
            TeacherConfig(
                model=f"{FAMILY}:{JPEG}",
                args=args,
                outputs={JPEG: OutputConfig()},
                license=licence,
            ),
            (),
        )
        # The licence may be told better later; it changes no copy.
        asked = {"stored": args, "input": inputs[name].model_dump(mode="json")}
        found.append(
            GroupTeacher(
                STORED_INPUTS,
                name,
                (name,),
                request,
                WeightsRecord("none"),
                digest(asked),
            )
        )
    return found


def _held_args(
    name: str, config: StoredInputConfig, record: BankRecord | None
) -> dict[str, Any] | None:
    """Returns how the bank stores an input already; None where it does not.

    Raises:
        BankError: otherwise than the job wants.
    """
    entry = stored_pass(record, name) if record else None
    if entry is None:
        return None
    held: dict[str, Any] = entry.request["args"]
    asked = config.model_dump(exclude_none=True)
    if apart := sorted(field for field in asked if asked[field] != held[field]):
        what = "; ".join(
            f"{field}: {held[field]} in the bank, {asked[field]} now" for field in apart
        )
        raise BankError(
            f"stored_inputs.{name} is stored otherwise in the bank ({what}); keep what "
            "the bank has, or make another bank"
        )
    return held


def _max_bytes(
    name: str,
    config: StoredInputConfig,
    inputs: Mapping[str, InputEntry],
    probed: Callable[[], Iterable[ProbedShard]],
    block_rows: int | None,
) -> int:
    """Returns the bytes that a copy may take: what nearly all need, if a block has it.

    Raises:
        ManifestError: that is more than a block of the bank has room for.
    """
    image = INPUT.validate_python(inputs[name].config)
    assert isinstance(image, ImageInput)
    sizes = probe_sizes((shard for shard in probed() if shard[2]), image)
    side = config.short_side
    if not sizes:
        sizes = [(side, round(side * _PHOTO_ASPECT))]
    copies = [stored_size(size, side) for size in sizes]
    needed = max(
        ample_bytes(height * width, config.quality) for height, width in copies
    )
    room = MAX_OBJECT_BYTES // block_rows if block_rows else needed
    asked = config.max_bytes or min(needed, room)
    # Half of what is ample is still more than an ordinary image takes.
    if asked > room or (config.max_bytes is None and 2 * asked < needed):
        raise ManifestError(
            f"stored_inputs.{name}: an image may take {max(asked, needed):,} bytes, "
            f"and blocks of {block_rows} rows have room for {room:,} each (64 MiB in "
            "all); choose a smaller short_side, quality or max_bytes, or make a bank "
            "with fewer block_rows"
        )
    return asked


def stored_pass(record: BankRecord, name: str) -> Any:
    """Returns the pass that holds copies of an input, None where there is none."""
    return next(
        (
            entry
            for entry in record.passes
            if entry.holds_inputs and entry.inputs == (name,)
        ),
        None,
    )


def is_stored_input(item: GroupTeacher) -> bool:
    """Whether what stands in a plan for a teacher is a copy of an input."""
    return item.request.config.family == FAMILY


def describe_stored_input(item: GroupTeacher) -> Described:
    """Returns what the bank will hold of an input, as of a teacher."""
    config = item.request.config
    max_bytes = int(config.args["max_bytes"])
    spec = OutputSpec(
        JPEG,
        "image",
        (max_bytes,),
        "uint8",
        source="the upright image, whole, resized once",
    )
    return Described(
        outputs={NATIVE: {JPEG: spec}},
        preprocess={
            NATIVE: {item.inputs[0]: {"kind": "image", **config.args, **_ALWAYS}}
        },
        facts={
            "num_parameters": 0,
            "parameter_bytes": 0,
            "license": config.license,
            "versions": library_versions(),
        },
        cost=Cost(),
        # The bytes, and the quality before them.
        input_bytes=max_bytes + 1,
    )


_ALWAYS = {"interpolation": "bicubic", "subsampling": "4:4:4", "colour": "rgb"}


def library_versions() -> dict[str, str]:
    """Returns the version of the library that Pillow makes JPEGs with."""
    found = features.version("libjpeg_turbo") or features.version("jpg")
    return {"libjpeg": str(found)}
