"""The whole of packing: a folder or a list in, shards and a summary out."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field

from manifests.errors import StorageError
from manifests.storage import Store, read_url
from pipeline.errors import PipelineError
from pipeline.packing.clips import ClipCut, FrameSequence, cut_clips
from pipeline.packing.folder import folder_samples, folder_sequences, list_images
from pipeline.packing.lists import is_list, list_samples, list_sequences, read_list
from pipeline.packing.sample import PackedSample, check_unique, shuffled
from pipeline.packing.shards import ShardLimit, ShardNames, ShardsWriter
from pipeline.packing.sweeps import SweepJoin, join_sweeps

CLASSES = "classes.txt"
"""Beside the shards: names of class folders, a line each, in order of their numbers."""

_THREADS = 8


@dataclass(frozen=True)
class PackRequest:
    """What is packed, and how.

    Attributes:
        source: absolute path or URL of a folder or a list.
        names: of the shards.
        limit: when a shard is full.
        shuffle: seed of the order; None for that of the list, or of keys.
        clip: how frames become clips; None where every image is a sample.
        sweeps: how sweeps become one; None where each stays what it is.
        labels: whether class folders become labels.
        classes: URL of a classes.txt that numbers them; None to make one.
        overwrite: whether what is there is replaced.
    """

    source: str
    names: ShardNames
    limit: ShardLimit
    shuffle: int | None = None
    clip: ClipCut | None = None
    sweeps: SweepJoin | None = None
    labels: bool = True
    classes: str | None = None
    overwrite: bool = False


@dataclass
class Packed:
    """What was packed.

    Attributes:
        shards: URL to number of samples, in order.
        num_bytes: of all shards.
        members: extension to number of samples that have it.
        classes: names of class folders in order of their numbers.
        unreadable: file to why; their samples were left out.
        num_left_out: samples that were.
        num_others: files of the folder that are no images.
        short: sequence to its number of frames, where they are too few for a clip.
        leftovers: temporary files of runs that were killed.
    """

    shards: dict[str, int] = field(default_factory=dict)
    num_bytes: int = 0
    members: dict[str, int] = field(default_factory=dict)
    classes: tuple[str, ...] = ()
    unreadable: dict[str, str] = field(default_factory=dict)
    num_left_out: int = 0
    num_others: int = 0
    short: dict[str, int] = field(default_factory=dict)
    leftovers: tuple[str, ...] = ()

    @property
    def num_samples(self) -> int:
        """Samples in all shards."""
        return sum(self.shards.values())


def pack(
    request: PackRequest,
    on_start: Callable[[int], object] = lambda total: None,
    on_done: Callable[[], object] = lambda: None,
) -> Packed:
    """Writes the shards and returns what they hold.

    A sample with a file that cannot be read is left out, and the file is named.

    Args:
        request: what is packed.
        on_start: called once with the number of samples.
        on_done: called after each.

    Raises:
        PipelineError: nothing can be packed so; no shard was written.
        StorageError: the store cannot be read or written; no shard has its name yet.
    """
    packed = Packed()
    samples = _samples(request, packed)
    if not samples:
        assert request.clip is not None, "a folder and a list have a sample each"
        raise PipelineError(
            f"a sequence must have {request.clip.span} frames for a clip, got "
            f"{_few(packed.short)}; take fewer frames or a smaller stride"
        )
    check_unique(samples)
    if request.shuffle is not None:
        samples = shuffled(samples, request.shuffle)
    writer = ShardsWriter(request.names, request.limit, request.overwrite)
    writer.check_free()
    packed.leftovers = tuple(request.names.leftovers())
    text = "".join(f"{name}\n" for name in packed.classes).encode()
    if packed.classes:
        _check_classes(Store(request.names.folder), text, request.overwrite)
    on_start(len(samples))
    with writer:
        for sample, members, faults in _read_ahead(samples):
            if faults:
                packed.unreadable |= faults
                packed.num_left_out += 1
            else:
                writer.write(sample.key, members)
            on_done()
        if not writer.samples:
            raise PipelineError(
                f"files must be readable, got none that is: {_few(packed.unreadable)}; "
                "check the paths"
            )
        if packed.classes:
            writer.add_file(CLASSES, text)
    urls = (request.names.url(number) for number in range(len(writer.samples)))
    packed.shards = dict(zip(urls, writer.samples, strict=True))
    packed.num_bytes = sum(writer.num_bytes)
    packed.members = dict(sorted(writer.num_members.items()))
    return packed


def _samples(request: PackRequest, packed: Packed) -> list[PackedSample]:
    if is_list(request.source):
        if request.classes is not None:
            raise PipelineError(
                "--classes is for folders; in a list give a column `cls` of numbers"
            )
        rows = read_list(request.source)
        if request.sweeps is not None:
            return join_sweeps(rows, request.sweeps)
        if request.clip is None:
            return list_samples(rows)
        return _clips(list_sequences(rows), request.clip, packed)
    if request.sweeps is not None:
        raise PipelineError(
            f"--sweeps is for lists, got the folder {request.source}; give a list with "
            "columns clip, time, pose and bin"
        )
    folder = list_images(request.source)
    packed.num_others = folder.num_others
    if request.clip is not None:
        if request.classes is not None:
            raise PipelineError(
                "--classes has no effect with --clip: folders are sequences there; "
                "give labels in a list with columns `clip` and `cls`"
            )
        return _clips(folder_sequences(folder), request.clip, packed)
    if request.classes is not None:
        packed.classes = _read_classes(request.classes)
    elif request.labels:
        packed.classes = folder.class_folders
    return folder_samples(folder, packed.classes)


def _clips(
    sequences: Sequence[FrameSequence], cut: ClipCut, packed: Packed
) -> list[PackedSample]:
    clips = []
    for sequence in sequences:
        found = cut_clips(sequence, cut)
        if not found:
            packed.short[sequence.name or "."] = len(sequence.frames)
        clips += found
    return clips


def _read_classes(url: str) -> tuple[str, ...]:
    names = tuple(read_url(url).decode().rstrip("\n").split("\n"))
    if not names or "" in names or len(set(names)) < len(names):
        raise PipelineError(
            f"--classes must be a file with a different name in each line, got "
            f"{len(names)} lines ({url}); mend it"
        )
    return names


def _check_classes(store: Store, text: bytes, overwrite: bool) -> None:
    held = store.read_or_none(CLASSES)
    if held is not None and held != text and not overwrite:
        url = store.url_of(CLASSES)
        raise PipelineError(
            f"classes must be those of {url}, got others; --classes {url} numbers them "
            "alike, or choose another folder, or --overwrite"
        )


def _read_ahead(
    samples: Sequence[PackedSample],
) -> Iterator[tuple[PackedSample, dict[str, bytes], dict[str, str]]]:
    """Yields samples in order with their members and, by file, what cannot be read."""
    pending: deque[tuple[PackedSample, Future[tuple[dict[str, bytes], dict[str, str]]]]]
    pending = deque()
    waiting = iter(samples)
    with ThreadPoolExecutor(_THREADS) as pool:
        while True:
            while len(pending) < 2 * _THREADS:
                sample = next(waiting, None)
                if sample is None:
                    break
                pending.append((sample, pool.submit(_read, sample)))
            if not pending:
                return
            sample, future = pending.popleft()
            members, faults = future.result()
            yield sample, members, faults


def _read(sample: PackedSample) -> tuple[dict[str, bytes], dict[str, str]]:
    members, faults = {}, {}
    for name, part in sample.members.items():
        try:
            if isinstance(part, bytes):
                members[name] = part
            else:
                members[name] = read_url(part) if isinstance(part, str) else part.read()
        except StorageError as error:
            faults[part if isinstance(part, str) else sample.source] = str(error)
    return members, faults


def _few(named: Mapping[str, object]) -> str:
    shown = [f"{name}: {what}" for name, what in list(named.items())[:3]]
    return ", ".join(shown) + (", ..." if len(named) > 3 else "")
