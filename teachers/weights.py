"""Which weights a teacher has: finding, digesting, reading and loading them strictly.

Owns the words of a job's ``weights:``, the record that provenance keeps, and everything
between a URL and a state dict. Knows no model. Only tensors are ever read: safetensors,
and torch files with ``weights_only=True``. Imports torch only when tensors are read, so
that weights can be found and recognised without it.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import pickle
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from manifests.errors import StorageError
from manifests.loading import is_weights_file
from manifests.storage import open_url, stat_url
from teachers.errors import TeacherError, WeightsNotFound
from teachers.interface import TeacherRequest, WeightsRecord
from teachers.key_maps import explain_difference, listed
from teachers.key_maps import map_keys as map_keys

if TYPE_CHECKING:
    from torch import Tensor, nn

_PIECE_BYTES = 8 * 2**20
_CONTAINERS = ("state_dict", "model", "model_state_dict", "model_state")
_PREFIXES = ("module.", "_orig_mod.")
_HUB_TIMEOUT_S = 10.0
_SIZE_MISMATCH = re.compile(
    r"size mismatch for (?P<name>\S+): .*?Size\(\[(?P<given>[\d, ]*)\]\) from .*?"
    r"Size\(\[(?P<wanted>[\d, ]*)\]\)"
)
_HUB_URL = re.compile(
    r"hf://(?P<repo>[^/]+/[^/@]+)(@(?P<revision>[^/]+))?/(?P<file>.+)"
)


@dataclass(frozen=True)
class Wanted:
    """What ``weights:`` of a job says.

    Attributes:
        kind: ``random``, ``file`` or ``pretrained``.
        asked: model and weights in one string; what `WeightsRecord.asked` keeps.
        url: of a file, absolute or with a scheme.
        seed: of random weights.
        tag: of pretrained weights, where the job gives one.
    """

    kind: str
    asked: str
    url: str = ""
    seed: int = 0
    tag: str | None = None


def parse_wanted(request: TeacherRequest) -> Wanted:
    """Returns what the job's ``weights:`` means, without looking for it.

    ``random`` and ``random:SEED`` are random; what has a slash, a scheme or the suffix
    of a weights file is a file; anything else is the tag of pretrained weights.

    Raises:
        TeacherError: the seed is not a whole number.
    """
    text = request.config.weights
    asked = f"{request.config.model} {text or 'pretrained'}"
    if text is None:
        return Wanted("pretrained", asked)
    if text == "random" or text.startswith("random:"):
        seed = text.partition(":")[2] if ":" in text else "0"
        if not re.fullmatch(r"\d{1,18}", seed):
            raise TeacherError(
                f"teachers.{request.name}.weights must be `random` or `random:SEED` "
                f"with a whole number, got {text!r}"
            )
        return Wanted("random", asked, seed=int(seed))
    if is_weights_file(text):
        return Wanted("file", asked, url=resolve(request.base, text))
    return Wanted("pretrained", asked, tag=text)


def resolve(base: str, path: str) -> str:
    """Returns ``path`` as a URL or absolute path; relative ones start from ``base``."""
    if "://" in path:
        return path
    path = os.path.expanduser(path)
    if "://" in base and not os.path.isabs(path):
        scheme, _, rest = base.partition("://")
        return f"{scheme}://{os.path.normpath(os.path.join(rest, path))}"
    return os.path.abspath(os.path.join(base, path))


def random_record(request: TeacherRequest, seed: int) -> WeightsRecord:
    """Returns the record of random weights."""
    return WeightsRecord("random", seed=seed, asked=parse_wanted(request).asked)


def find_file(
    request: TeacherRequest, url: str, known: WeightsRecord | None
) -> WeightsRecord:
    """Returns the record of a weights file; ``known`` itself where that still holds.

    Raises:
        TeacherError: nothing is there, or it cannot be read.
    """
    try:
        stat = stat_url(url)
        tag = stat.tag or stat.modified or ""
        if (
            known is not None
            and known.kind == "file"
            and (known.url, known.size_bytes, known.tag) == (url, stat.size_bytes, tag)
            and tag
        ):
            return known
        return WeightsRecord(
            "file",
            url=url,
            size_bytes=stat.size_bytes,
            tag=tag,
            sha256=digest(url),
            asked=parse_wanted(request).asked,
        )
    except StorageError as error:
        raise WeightsNotFound(
            f"teachers.{request.name}.weights must be a file that can be read, got "
            f"{request.config.weights!r} ({error}; relative paths start from "
            f"{request.base}); correct the path, or try the job with "
            "`weights: random`"
        ) from error


def digest(url: str) -> str:
    """Returns the SHA-256 of a file's bytes, read in pieces of 8 MiB."""
    hasher = hashlib.sha256()
    with open_url(url) as file:
        while piece := file.read(_PIECE_BYTES):
            hasher.update(piece)
    return hasher.hexdigest()


def find_on_hub(
    request: TeacherRequest, repo: str, filenames: Sequence[str], note: str = ""
) -> WeightsRecord:
    """Returns the record of pretrained weights on the Hugging Face hub.

    The local cache is looked at first and then used without asking the network.

    Args:
        request: for messages.
        repo: ``ORGANISATION/NAME``.
        filenames: the first that exists is taken.
        note: what else a job has to say that names the file itself, for messages.

    Raises:
        TeacherError: they are neither in the cache nor to be had.
    """
    path = hub_file(request, repo, filenames, None, note)
    revision = path.parent.name
    return WeightsRecord(
        "pretrained",
        url=f"hf://{repo}@{revision}/{path.name}",
        size_bytes=path.stat().st_size,
        tag=revision,
        sha256=digest(str(path)),
        asked=parse_wanted(request).asked,
    )


def hub_file(
    request: TeacherRequest,
    repo: str,
    filenames: Sequence[str],
    revision: str | None,
    note: str = "",
) -> Path:
    """Returns the path in the local cache of one file of a hub repository.

    Args:
        request: for messages.
        repo: ``ORGANISATION/NAME``.
        filenames: the first that exists is taken.
        revision: a commit, None for the newest.
        note: what else a job has to say that names the file itself, for messages.

    Raises:
        TeacherError: it is not in the cache and cannot be downloaded. Without a network
            that takes one attempt, not a series of retries.
    """
    from huggingface_hub import (
        get_session,
        hf_hub_download,
        hf_hub_url,
        try_to_load_from_cache,
    )
    from huggingface_hub.errors import EntryNotFoundError, GatedRepoError

    for filename in filenames:
        cached = try_to_load_from_cache(repo, filename, revision=revision)
        if isinstance(cached, str):
            return Path(cached)
    hint = (
        f"fetch them where there is a network (`hf download {repo} {filenames[0]}`); "
        "for workers without one put that file where they can read it (`gcloud storage "
        f"cp {filenames[0]} gs://BUCKET/{repo}/`) and write `weights: "
        f"gs://BUCKET/{repo}/{filenames[0]}`, or a path{f' ({note})' if note else ''}; "
        "`weights: random` tries the job without them"
    )
    where = f"teachers.{request.name}: pretrained weights {repo}"
    try:
        # hf_hub_download alone would spend 23 s on retries where no network is.
        get_session().head(hf_hub_url(repo, filenames[0]), timeout=_HUB_TIMEOUT_S)
        for filename in filenames:
            with contextlib.suppress(EntryNotFoundError):
                return Path(hf_hub_download(repo, filename, revision=revision))
    except GatedRepoError as error:
        raise WeightsNotFound(
            f"{where} are gated; accept their licence at https://huggingface.co/{repo} "
            "and log in with `hf auth login`"
        ) from error
    except Exception as error:
        raise WeightsNotFound(
            f"{where} are not in the local cache and cannot be downloaded "
            f"({type(error).__name__}: {_first_line(error)}); {hint}"
        ) from error
    raise WeightsNotFound(f"{where} have none of {', '.join(filenames)}; {hint}")


@contextlib.contextmanager
def local_path(request: TeacherRequest, record: WeightsRecord) -> Iterator[str]:
    """Yields a local path of the weights' file; a remote one is copied for the while.

    Raises:
        TeacherError: the file is gone, or its size is not the recorded one.
    """
    hub = _HUB_URL.fullmatch(record.url) if record.kind == "pretrained" else None
    if hub:
        path = hub_file(request, hub["repo"], [hub["file"]], hub["revision"])
        _check_size(request, record, path)
        yield str(path)
        return
    if "://" not in record.url:
        _check_size(request, record, Path(record.url))
        yield record.url
        return
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / os.path.basename(record.url)
        try:
            with open_url(record.url) as source, copy.open("wb") as target:
                shutil.copyfileobj(source, target, _PIECE_BYTES)
        except StorageError as error:
            raise TeacherError(f"teachers.{request.name}.weights: {error}") from error
        _check_size(request, record, copy)
        yield str(copy)


def _check_size(request: TeacherRequest, record: WeightsRecord, path: Path) -> None:
    try:
        size = path.stat().st_size
    except OSError as error:
        raise TeacherError(
            f"teachers.{request.name}.weights must still be at {record.url} "
            f"({error.strerror}); put them back, or correct the job"
        ) from error
    if record.size_bytes and size != record.size_bytes:
        raise TeacherError(
            f"teachers.{request.name}.weights must be the file that was digested, of "
            f"{record.size_bytes} bytes, got {size} bytes ({record.url}); it changed: "
            "run again to digest it anew"
        )


def read_state_dict(path: str, name: str) -> dict[str, Tensor]:
    """Returns the tensors of a weights file, by parameter name, on the CPU.

    Containers (`_CONTAINERS`) are unwrapped, whatever lies beside them, and the
    prefixes of wrappers (``module.``, ``_orig_mod.``) removed.

    Args:
        path: local path of a safetensors or torch file; told apart by its first bytes.
        name: what to call the file in messages.

    Raises:
        TeacherError: it holds something else, or would have to run code to be read.
    """
    import torch
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    with open(path, "rb") as file:
        head = file.read(64)
    if head.startswith(b"version https://git-lfs"):
        raise TeacherError(
            f"weights must be a file of tensors, got a git-lfs pointer ({name}); run "
            "`git lfs pull` where it came from"
        )
    try:
        if head[8:9] == b"{":
            return _strip_prefixes(load_file(path))
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise TeacherError(
            f"weights must hold nothing but tensors, got a file that would have to run "
            f"code to be read ({name}: {_first_line(error)}); save model.state_dict() "
            "alone, best as safetensors"
        ) from error
    except (SafetensorError, RuntimeError, EOFError, ValueError, KeyError) as error:
        raise TeacherError(
            f"weights must be a safetensors or torch file, got one that cannot be read "
            f"({name}: {_first_line(error)}); is it whole?"
        ) from error
    return _strip_prefixes(_unwrap(loaded, name))


def _unwrap(loaded: Any, name: str) -> dict[str, Tensor]:
    from torch import Tensor

    if isinstance(loaded, Mapping):
        for key in _CONTAINERS:
            if isinstance(loaded.get(key), Mapping):
                return _unwrap(loaded[key], name)
        if loaded and all(isinstance(value, Tensor) for value in loaded.values()):
            return dict(loaded)
        odd = [str(key) for key, item in loaded.items() if not isinstance(item, Tensor)]
        found = f"keys that are no tensors: {listed(odd)}" if odd else "nothing"
    else:
        found = f"a {type(loaded).__name__}"
    raise TeacherError(
        f"weights must be a mapping of names to tensors, alone or under "
        f"{', '.join(_CONTAINERS)}, got {found} ({name}); save model.state_dict()"
    )


def _strip_prefixes(state: dict[str, Tensor]) -> dict[str, Tensor]:
    for prefix in (*_PREFIXES, _PREFIXES[0]):
        if state and all(key.startswith(prefix) for key in state):
            state = {key[len(prefix) :]: value for key, value in state.items()}
    return state


def load_strict(model: nn.Module, state: Mapping[str, Tensor], name: str) -> None:
    """Loads every tensor of ``state``, and only if the model has exactly those.

    Args:
        model: changed in place.
        state: by parameter and buffer name.
        name: what to call the file in messages.

    Raises:
        TeacherError: with the names that are missing, unexpected or of another shape.
    """
    own = model.state_dict()
    # A counter that only training reads; checkpoints from before it existed lack it.
    counters = {
        key: value
        for key, value in own.items()
        if key.endswith("num_batches_tracked") and key not in state
    }
    state = {**state, **counters}
    difference = explain_difference(
        {key: tuple(value.shape) for key, value in own.items()},
        {key: tuple(value.shape) for key, value in state.items()},
        name,
    )
    if difference is not None:
        raise TeacherError(difference)
    model.load_state_dict(dict(state), strict=True)


def explain_mismatch(error: RuntimeError, name: str) -> TeacherError:
    """Returns the readable form of what ``load_state_dict`` itself complains of."""
    text = str(error)
    missing, unexpected = (
        re.findall(r'"([^"]+)"', match[1])
        if (match := re.search(rf"{what} key\(s\) in state_dict: (.*)", text))
        else []
        for what in ("Missing", "Unexpected")
    )
    differing = {
        found["name"]: (_sizes(found["given"]), _sizes(found["wanted"]))
        for found in _SIZE_MISMATCH.finditer(text)
    }
    difference = explain_difference(
        dict.fromkeys(missing)
        | {key: wanted for key, (_, wanted) in differing.items()},
        dict.fromkeys(unexpected)
        | {key: given for key, (given, _) in differing.items()},
        name,
        is_whole=False,
    )
    return TeacherError(
        difference or f"weights do not fit the model ({name}): {_first_line(error)}"
    )


def _sizes(text: str) -> tuple[int, ...]:
    return tuple(int(size) for size in text.split(",") if size.strip())


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
