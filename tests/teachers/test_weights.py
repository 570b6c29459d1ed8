"""Weights: the words of a job, digests, safe reading, strict loading, the hub."""

from __future__ import annotations

import hashlib
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fsspec
import huggingface_hub.constants
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from teachers import weights
from teachers.errors import TeacherError
from teachers.interface import TeacherRequest, WeightsRecord

Make = Callable[..., TeacherRequest]


@pytest.mark.parametrize(
    ("text", "kind", "detail"),
    [
        (None, "pretrained", None),
        ("webli", "pretrained", "webli"),
        ("random", "random", 0),
        ("random:17", "random", 17),
        ("w.safetensors", "file", "BASE/w.safetensors"),
        ("./a/../w.pth", "file", "BASE/w.pth"),
        ("/abs/w.pt", "file", "/abs/w.pt"),
        ("gs://bucket/w.pt", "file", "gs://bucket/w.pt"),
    ],
)
def test_what_weights_means(
    make_request: Make, tmp_path: Path, text: str | None, kind: str, detail: Any
) -> None:
    wanted = weights.parse_wanted(make_request("timm:a", ["cls"], weights=text))
    assert wanted.kind == kind
    found = {"pretrained": wanted.tag, "random": wanted.seed, "file": wanted.url}[kind]
    if isinstance(detail, str):
        detail = detail.replace("BASE", str(tmp_path))
    assert found == detail


def test_relative_to_a_remote_job() -> None:
    assert weights.resolve("gs://b/jobs", "../w.pt") == "gs://b/w.pt"


def test_bad_seed(make_request: Make) -> None:
    with pytest.raises(TeacherError, match="whole number, got 'random:x'"):
        weights.parse_wanted(make_request("timm:a", ["cls"], weights="random:x"))


def test_missing_file_says_where_it_was_looked_for(
    make_request: Make, tmp_path: Path
) -> None:
    request = make_request("timm:a", ["cls"], weights="./gone.pt")
    with pytest.raises(TeacherError, match=rf"'./gone.pt'.*{tmp_path}/gone.pt.*random"):
        weights.find_file(request, f"{tmp_path}/gone.pt", None)


def test_digest_reads_all_pieces(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = os.urandom(100_001)
    (tmp_path / "w").write_bytes(data)
    monkeypatch.setattr(weights, "_PIECE_BYTES", 1000)
    assert weights.digest(f"{tmp_path}/w") == hashlib.sha256(data).hexdigest()


STATE = {"a.weight": torch.arange(6.0).reshape(2, 3), "b": torch.ones(2)}


def _equal(found: dict[str, torch.Tensor]) -> bool:
    return found.keys() == STATE.keys() and all(
        torch.equal(found[key], STATE[key]) for key in STATE
    )


@pytest.mark.parametrize(
    "wrap",
    [
        lambda state: state,
        lambda state: {"state_dict": state, "epoch": 3},
        lambda state: {"model": state, "optimizer": {"lr": 1.0}},
        lambda state: {
            "model_state_dict": {f"module.{k}": v for k, v in state.items()}
        },
        lambda state: {f"_orig_mod.{key}": value for key, value in state.items()},
        lambda state: {f"module._orig_mod.{k}": v for k, v in state.items()},
    ],
)
def test_containers_and_prefixes(tmp_path: Path, wrap: Callable[..., Any]) -> None:
    torch.save(wrap(STATE), tmp_path / "w.bin")
    assert _equal(weights.read_state_dict(f"{tmp_path}/w.bin", "w"))


def test_safetensors_whatever_the_suffix(tmp_path: Path) -> None:
    save_file(STATE, tmp_path / "w.pt")
    assert _equal(weights.read_state_dict(f"{tmp_path}/w.pt", "w"))


class _Code:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.path,))


def test_code_in_a_file_never_runs(tmp_path: Path) -> None:
    ran = tmp_path / "ran"
    torch.save({"a": _Code(ran)}, tmp_path / "new.pt")
    (tmp_path / "old.pt").write_bytes(pickle.dumps({"a": _Code(ran)}, protocol=2))
    for name in ("new.pt", "old.pt"):
        with pytest.raises(TeacherError, match="run code to be read"):
            weights.read_state_dict(f"{tmp_path}/{name}", name)
    assert not ran.exists()


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "cannot be read"),
        (b"PK\x03\x04 but not a zip", "cannot be read"),
        (b"\x08\0\0\0\0\0\0\0{broken}", "cannot be read"),
        (b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
    ],
)
def test_files_that_are_no_weights(tmp_path: Path, data: bytes, message: str) -> None:
    (tmp_path / "w.pt").write_bytes(data)
    with pytest.raises(TeacherError, match=message):
        weights.read_state_dict(f"{tmp_path}/w.pt", "w.pt")


def test_values_that_are_no_tensors(tmp_path: Path) -> None:
    torch.save({"a": torch.ones(1), "epoch": 3}, tmp_path / "w.pt")
    with pytest.raises(TeacherError, match="no tensors: epoch"):
        weights.read_state_dict(f"{tmp_path}/w.pt", "w.pt")
    torch.save([torch.ones(1)], tmp_path / "w.pt")
    with pytest.raises(TeacherError, match="got a list"):
        weights.read_state_dict(f"{tmp_path}/w.pt", "w.pt")


def test_strict_loading_reports_all_three_kinds() -> None:
    first = nn.Linear(2, 3)
    model = nn.Sequential(first, nn.Linear(3, 4))
    state = {"0.weight": torch.zeros(3, 2), "0.bias": torch.zeros(9)}
    state |= {f"extra{k}": torch.zeros(1) for k in range(7)}
    before = first.weight.clone()
    with pytest.raises(TeacherError) as raised:
        weights.load_strict(model, state, "w.pt")
    text = str(raised.value)
    assert "exactly the model's parameters" in text
    assert "2 missing (1.weight, 1.bias)" in text
    assert "7 unexpected (extra0, extra1, extra2, extra3, extra4, ...)" in text
    assert "1 of another shape (0.bias (9,) for (3,))" in text
    assert torch.equal(first.weight, before)


def test_torchs_own_complaint_is_read_the_same() -> None:
    model = nn.Sequential(nn.Linear(2, 3))
    with pytest.raises(RuntimeError) as raised:
        model.load_state_dict({"0.weight": torch.zeros(9, 2), "x": torch.zeros(1)})
    text = str(weights.explain_mismatch(raised.value, "w.pt"))
    assert (
        "1 missing (0.bias), 1 unexpected (x), "
        "1 of another shape (0.weight (9, 2) for (3, 2))" in text
    )
    # Of the names that torch does not tell none may be left out by a suggestion.
    assert "keys:" not in text


def test_remote_file_is_copied_for_the_while(make_request: Make) -> None:
    url = "memory://teachers/w.pt"
    with fsspec.open(url, "wb") as file:
        file.write(b"12345")
    request = make_request("timm:a", ["cls"], weights=url)
    record = weights.find_file(request, url, None)
    assert record.sha256 == hashlib.sha256(b"12345").hexdigest()
    with weights.local_path(request, record) as path:
        assert Path(path).read_bytes() == b"12345"
        assert path.endswith(".pt")
    assert not Path(path).exists()


def test_file_that_changed_or_went_after_it_was_digested(
    make_request: Make, tmp_path: Path
) -> None:
    request = make_request("timm:a", ["cls"])
    (tmp_path / "w.pt").write_bytes(b"123")
    record = WeightsRecord("file", f"{tmp_path}/w.pt", size_bytes=4)
    with pytest.raises(TeacherError, match="4 bytes, got 3 bytes"):
        weights.local_path(request, record).__enter__()
    (tmp_path / "w.pt").unlink()
    with pytest.raises(TeacherError, match="must still be at"):
        weights.local_path(request, record).__enter__()


def test_no_network_is_one_attempt_and_says_what_to_do(
    make_request: Make, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    attempts: list[str] = []

    class Session:
        def head(self, url: str, timeout: float) -> None:
            attempts.append(url)
            raise ConnectionError("no route")

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub, "get_session", Session)
    monkeypatch.setattr(
        huggingface_hub, "hf_hub_download", lambda *_, **__: pytest.fail("retries")
    )
    request = make_request("timm:a", ["cls"], weights=None)
    with pytest.raises(TeacherError) as raised:
        weights.find_on_hub(request, "timm/a", ["model.safetensors"])
    assert len(attempts) == 1
    for part in (
        "timm/a",
        "no route",
        "hf download timm/a model.safetensors",
        "gcloud storage cp model.safetensors gs://BUCKET/timm/a/",
        "weights: gs://BUCKET/timm/a/model.safetensors",
        "weights: random",
    ):
        assert part in str(raised.value)


def test_cached_hub_file_needs_no_network(
    make_request: Make, hub_cache: Callable[[str, str, bytes], Path]
) -> None:
    hub_cache("timm/a", "pytorch_model.bin", b"123")
    request = make_request("timm:a", ["cls"], weights=None)
    record = weights.find_on_hub(
        request, "timm/a", ["model.safetensors", "pytorch_model.bin"]
    )
    assert record.url == f"hf://timm/a@{'c' * 40}/pytorch_model.bin"
    assert record.sha256 == hashlib.sha256(b"123").hexdigest()
    with weights.local_path(request, record) as path:
        assert Path(path).read_bytes() == b"123"
