"""What each encoding costs and loses on a teacher's own tokens, and what was asked.

    python benchmarks/encodings.py --tokens FILE.npy [--dtype bfloat16] [--rounds 5]

FILE holds (rows, tokens, channels) or (rows, y, x, channels): one block. Each encoding
is measured on the tokens as they are and with what breaks simpler quantisers put in:
channels of constant 100 and 400 times the median deviation, channels that vary so much,
and one token in a hundred a hundred times as large.

- ``bytes``: per value, with all arrays, chunk checksums and indexes.
- ``1 - cos``: mean over tokens, of values standardised by the file's own statistics,
  as a loss sees them; ``worst``: largest mean squared error of a live channel over its
  variance.
- MB/s of the values given, one thread, fastest round; from values to an object's bytes,
  and from those to float32. Beside them what a ViT-S of timm gives on the same thread
  in the same run, and what share of its time the encoding of its tokens takes.

Ends with what was asked of bytes, loss and speed beside what was found; exit 1 where
one does not hold.
"""

from __future__ import annotations

import argparse
import datetime
import os
import platform
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import timm
import torch

from manifests.teacher import OutputConfig
from pipeline.bank.encoding import Encoding, to_float32
from pipeline.bank.encodings import make_encoding
from pipeline.bank.objects import decode_object, encode_object
from pipeline.bank.statistics import dead_channels, floored_std

PRESETS = ("raw", "lossless", "half", "compact", "tiny")
TEACHER, TEACHER_BATCH = "vit_small_patch16_224", 16
Floats = npt.NDArray[np.float32]


def constant_channels(tokens_RNC: Floats, scale: float) -> None:
    """Makes one channel a constant of ``scale`` median deviations, but for noise."""
    unit = float(np.median(tokens_RNC.std(axis=(0, 1))))
    noise = np.random.default_rng(0).normal(0, 0.1 * unit, tokens_RNC.shape[:2])
    tokens_RNC[:, :, 7] = scale * unit + noise


def wide_channels(tokens_RNC: Floats, scale: float) -> None:
    """Makes one channel vary by ``scale`` median deviations."""
    unit = float(np.median(tokens_RNC.std(axis=(0, 1))))
    noise = np.random.default_rng(0).normal(0, unit, tokens_RNC.shape[:2])
    tokens_RNC[:, :, 7] = scale * noise


def large_tokens(tokens_RNC: Floats, scale: float) -> None:
    """Makes one token in a hundred ``scale`` times as large."""
    chosen = np.random.default_rng(0).random(tokens_RNC.shape[:2]) < 0.01
    tokens_RNC[chosen] *= scale


CASES: dict[str, Callable[[Floats], object]] = {
    "as they are": lambda tokens: None,
    "constant channel 100x": lambda tokens: constant_channels(tokens, 100),
    "constant channel 400x": lambda tokens: constant_channels(tokens, 400),
    "wide channel 100x": lambda tokens: wide_channels(tokens, 100),
    "wide channel 400x": lambda tokens: wide_channels(tokens, 400),
    "1 % tokens 100x": lambda tokens: large_tokens(tokens, 100),
}


def as_given(tokens_RNC: Floats, dtype: str) -> npt.NDArray[Any]:
    """Returns values as a teacher gives them; bfloat16 as bit patterns."""
    tensor = torch.from_numpy(tokens_RNC).to(getattr(torch, dtype))
    return (tensor.view(torch.uint16) if dtype == "bfloat16" else tensor).numpy()


def to_objects(encoding: Encoding, values: npt.NDArray[Any]) -> dict[str, bytes]:
    """Returns the block objects of values by suffix."""
    encoded = encoding.encode(values, np.ones(len(values), np.bool_))
    if encoded.refused:
        raise SystemExit(f"{encoding.preset} refuses {len(encoded.refused)} rows")
    specs = encoding.arrays("teacher/image/native", len(values))
    return {
        suffix: b"".join(encode_object(encoded.arrays[suffix], spec, len(values)))
        for suffix, spec in zip(encoding.suffixes, specs, strict=True)
    }


def to_values(
    encoding: Encoding, objects: Mapping[str, bytes], num_rows: int
) -> Floats:
    """Returns the float32 values of block objects."""
    specs = encoding.arrays("teacher/image/native", num_rows)
    return encoding.decode(
        {
            suffix: decode_object(objects[suffix], spec)
            for suffix, spec in zip(encoding.suffixes, specs, strict=True)
        }
    )


def loss_of(exact_TC: Floats, found_TC: Floats) -> tuple[float, float]:
    """Returns (mean of 1 - cosine, worst live channel) of standardised tokens."""
    mean_C = exact_TC.mean(axis=0, dtype=np.float64)
    variance_C = exact_TC.var(axis=0, dtype=np.float64)
    std_C = floored_std(variance_C)
    a, b = (exact_TC - mean_C) / std_C, (found_TC - mean_C) / std_C
    lengths = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    cosine = (a * b).sum(axis=1) / lengths
    error_C = np.delete(((a - b) ** 2).mean(axis=0), dead_channels(variance_C))
    live_C = np.delete(a.var(axis=0), dead_channels(variance_C))
    return float(1 - cosine.mean()), float((error_C / live_C).max())


def fastest(action: Callable[[], object], rounds: int) -> float:
    """Returns the seconds of the fastest call."""
    seconds = []
    for _ in range(rounds):
        start = time.perf_counter()
        action()
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def seconds_of(
    encoding: Encoding, values: npt.NDArray[Any], rounds: int
) -> tuple[float, float]:
    """Returns the seconds from values to objects, and from objects to float32."""
    objects = to_objects(encoding, values)
    return (
        fastest(lambda: to_objects(encoding, values), rounds),
        fastest(lambda: to_values(encoding, objects, len(values)), rounds),
    )


def make(preset: str, shape: tuple[int, ...], dtype: str) -> Encoding:
    """Returns the encoding of a grid."""
    config = OutputConfig.model_validate({"encoding": preset})
    return make_encoding(config, name="patch", kind="grid", shape=shape, dtype=dtype)


@dataclass
class Found:
    """What was measured of one preset on one case; MB/s of the tokens as they are."""

    preset: str
    case: str
    size: float
    apart: float
    worst: float
    encode: float = 0.0


def asked(found: list[Found], teacher: float) -> Iterator[tuple[str, float, float]]:
    """Yields (what, at most, found) of what was asked of tokens in bfloat16."""
    plain = {one.preset: one for one in found if one.case == next(iter(CASES))}
    compact = [one for one in found if one.preset == "compact"]
    yield "lossless, bytes a value", 1.52, plain["lossless"].size
    yield "compact, bytes a value, all cases", 0.92, max(x.size for x in compact)
    yield "compact, 1 - cos, all cases", 1e-4, max(x.apart for x in compact)
    yield "compact, worst channel, all cases", 1e-2, max(x.worst for x in compact)
    for preset, one in plain.items():
        yield f"{preset}, share of the teacher's time", 1.0, teacher / one.encode


def teacher_speed(rounds: int, dtype: str) -> float:
    """Returns the MB/s of tokens that a ViT-S gives, in the type of the tokens."""
    model = timm.create_model(TEACHER, pretrained=False).eval()
    pixels = torch.rand(TEACHER_BATCH, 3, 224, 224)
    with torch.inference_mode():
        tokens = model.forward_features(pixels)[:, model.num_prefix_tokens :]
        seconds = fastest(lambda: model.forward_features(pixels), rounds)
    return tokens.numel() * getattr(torch, dtype).itemsize / seconds / 1e6


def main() -> int:
    """Prints a line per case and encoding."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--tokens", required=True, help=".npy, (rows, ..., channels)")
    parser.add_argument(
        "--dtype",
        choices=("float32", "float16", "bfloat16"),
        default="bfloat16",
        help="what the teacher computes in",
    )
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    loaded = np.load(arguments.tokens).astype(np.float32)
    tokens_RNC = loaded.reshape(len(loaded), -1, loaded.shape[-1])
    rows, cells, channels = tokens_RNC.shape
    print(
        f"{datetime.date.today()}  {platform.processor() or platform.machine()}, "
        f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}; {rows} rows of "
        f"{cells} x {channels} {arguments.dtype}"
    )
    torch.set_num_threads(1)
    print(f"{'':32} bytes   1 - cos     worst  encode  decode MB/s")
    measured: list[Found] = []
    for case, change in CASES.items():
        changed = tokens_RNC.copy()
        change(changed)
        values = as_given(changed, arguments.dtype).reshape(rows, 1, cells, channels)
        exact = to_float32(values, arguments.dtype).reshape(-1, channels)
        for preset in PRESETS:
            encoding = make(preset, (1, cells, channels), arguments.dtype)
            objects = to_objects(encoding, values)
            found = to_values(encoding, objects, rows).reshape(-1, channels)
            size = sum(map(len, objects.values())) / values.size
            apart, worst = loss_of(exact, found)
            measured.append(Found(preset, case, size, apart, worst))
            line = f"{case:22} {preset:9} {size:5.3f} {apart:9.1e} {worst:9.1e}"
            if case == "as they are":
                seconds = seconds_of(encoding, values, arguments.rounds)
                encode, decode = (values.nbytes / one / 1e6 for one in seconds)
                line += f" {encode:7.0f} {decode:7.0f}"
                measured[-1].encode = encode
            print(line, flush=True)
    teacher = teacher_speed(arguments.rounds, arguments.dtype)
    print(
        f"{TEACHER}, batch {TEACHER_BATCH}, float32: {teacher:.2f} MB/s of its tokens"
    )
    if arguments.dtype != "bfloat16":
        return 0
    print(f"{'asked of bfloat16':40} at most     found")
    holds = True
    for what, most, value in asked(measured, teacher):
        holds &= value <= most
        print(
            f"{what:40} {most:7.3g} {value:9.3g}  {'' if value <= most else 'MISSED'}"
        )
    return 0 if holds else 1


if __name__ == "__main__":
    raise SystemExit(main())
