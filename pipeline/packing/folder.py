"""Folders of images: which files they hold, and what their class folders say."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from manifests.storage import Store
from pipeline.errors import PipelineError
from pipeline.packing.clips import Frame, FrameSequence
from pipeline.packing.sample import PackedSample, Part, safe_key

IMAGE_SUFFIXES = frozenset(
    {"jpg", "jpeg", "png", "webp", "bmp", "tif", "tiff", "gif"}
    | {"ppm", "pgm", "pbm", "pnm"}
)
"""What `pipeline.samples.images` decodes."""

_DIGITS = re.compile(r"(\d+)")


@dataclass(frozen=True)
class ImageFolder:
    """The image files of a folder.

    Attributes:
        root: URL of the folder.
        files: relative paths of its images, sorted; hidden ones are left out.
        num_others: files that are no images.
    """

    root: str
    files: tuple[str, ...]
    num_others: int

    @property
    def class_folders(self) -> tuple[str, ...]:
        """Its class folders by name: there are two or more, and no image beside them.

        Nothing where they are none.
        """
        tops = {path.partition("/")[0] for path in self.files if "/" in path}
        is_plain = len(tops) < 2 or any("/" not in path for path in self.files)
        return () if is_plain else tuple(sorted(tops))

    def url_of(self, path: str) -> str:
        """Returns the URL of one of its files."""
        return f"{self.root}/{path}"


def list_images(root: str) -> ImageFolder:
    """Returns the images under a folder on any fsspec URL; links are followed.

    Raises:
        PipelineError: there is not one.
        StorageError: the folder cannot be listed.
    """
    root = root.rstrip("/")
    store = Store(root)
    local = store.local_root
    found = _walk(str(local)) if local else (path for path, _ in store.list(""))
    files, num_others = [], 0
    for path in found:
        if any(part.startswith(".") for part in path.split("/")):
            continue
        if path.rpartition(".")[2].lower() in IMAGE_SUFFIXES:
            files.append(path)
        else:
            num_others += 1
    if not files:
        raise PipelineError(
            f"SOURCE must be a folder with images ({', '.join(sorted(IMAGE_SUFFIXES))})"
            f" or a list (.csv, .tsv, .jsonl), got {root} with none in it; check the "
            "path"
        )
    return ImageFolder(root, tuple(sorted(files)), num_others)


def folder_samples(
    folder: ImageFolder, classes: Sequence[str] = ()
) -> list[PackedSample]:
    """Returns a sample per image, by key; its class folder's number is member ``cls``.

    Args:
        folder: of images.
        classes: names of class folders in order of their numbers; none: no labels.

    Raises:
        PipelineError: a class folder that is not among them.
    """
    numbers = {name: number for number, name in enumerate(classes)}
    samples = []
    for path in folder.files:
        stem, _, suffix = path.rpartition(".")
        members: dict[str, Part] = {suffix.lower(): folder.url_of(path)}
        if classes:
            top = path.partition("/")[0]
            if "\n" in top:
                raise PipelineError(
                    f"a class folder must have a name of one line, got {top!r} in "
                    f"{folder.root}; rename it"
                )
            if top not in numbers:
                raise PipelineError(
                    f"class folders must be named in --classes, got {top!r} in "
                    f"{folder.root}; add it there at the end"
                )
            members["cls"] = str(numbers[top]).encode()
        samples.append(PackedSample(safe_key(stem), members, path))
    return sorted(samples, key=lambda sample: sample.key)


def folder_sequences(folder: ImageFolder) -> list[FrameSequence]:
    """Returns a sequence per folder that holds images, its frames by name.

    Numbers in names count as numbers: frame_9 comes before frame_10.
    """
    by_folder: dict[str, list[str]] = {}
    for path in folder.files:
        by_folder.setdefault(path.rpartition("/")[0], []).append(path)
    sequences = []
    for name, paths in sorted(by_folder.items()):
        frames = []
        for path in sorted(paths, key=_by_number):
            suffix = path.rpartition(".")[2].lower()
            frames.append(Frame(path, {suffix: folder.url_of(path)}))
        sequences.append(FrameSequence(name, tuple(frames)))
    return sequences


def _by_number(path: str) -> tuple[list[tuple[int, str]], str]:
    """Returns what paths are sorted by: digits as numbers, then as they are."""
    pieces = _DIGITS.split(path)
    numbered = [(int(one) if one.isdecimal() else -1, one) for one in pieces]
    return [(number, "" if number >= 0 else text) for number, text in numbered], path


def _walk(root: str) -> Iterator[str]:
    """Yields relative paths of the files under a local folder; a loop is left out."""
    if not os.path.isdir(root):
        raise PipelineError(
            "SOURCE must be a folder or a list (.csv, .tsv, .jsonl), got "
            f"{root}; check the path"
        )

    def fail(error: OSError) -> None:
        raise PipelineError(
            f"SOURCE must be readable, got {error}; check who owns it"
        ) from error

    for folder, names, files in os.walk(root, followlinks=True, onerror=fail):
        real = os.path.realpath(folder)
        names[:] = [
            name
            for name in names
            if not _is_within(real, os.path.realpath(os.path.join(folder, name)))
        ]
        relative = os.path.relpath(folder, root).replace(os.sep, "/")
        for name in files:
            yield name if relative == "." else f"{relative}/{name}"


def _is_within(path: str, folder: str) -> bool:
    return path == folder or path.startswith(folder.rstrip(os.sep) + os.sep)
