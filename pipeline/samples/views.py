"""Views: what all teachers and the student share, drawn once as numbers: geometry and,
where a job asks for them, colour changes.

The only place where random views are made. A draw is a pure function of (seed, shard,
key, view) and of the input's name: blake2b makes a 128-bit key from them, Philox makes
64-bit words from the key, and their upper 53 bits make a float64 in [0, 1). NumPy's
distributions are not used, since their code may change; Philox is fixed by its paper.

Source: Salmon et al., Parallel Random Numbers: As Easy as 1, 2, 3 (SC 2011).
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from manifests.views import PhotometricConfig
from pipeline.samples.photometric import NUM_DRAWS, Photometric, draw_photometric

Box = tuple[float, float, float, float]
"""x0, y0, x1, y1 in upright pixels; the image spans (0, 0, width, height)."""

View0 = Literal["full", "square"]

_TRIES = 10


@dataclass(frozen=True)
class View:
    """One version of a sample.

    Attributes:
        index: 0 for the evaluation view.
        flip: whether images are mirrored left-right and sweeps in y.
        yaw: turn of sweeps about z in radians, after the flip.
        scale: factor on the coordinates of sweeps, after the turn.
        boxes: what is seen of each image input.
        photometric: colour changes of all images; None in view 0 and where the job has
            none.
    """

    index: int
    flip: bool
    yaw: float
    scale: float
    boxes: dict[str, Box]
    photometric: Photometric | None = None


@dataclass(frozen=True)
class ViewPolicy:
    """How the views of a bank are drawn.

    Attributes:
        seed: of all draws.
        scale: area of a random crop as a share of view 0's box, (low, high).
        ratio: aspect of a crop relative to view 0's box, (low, high), log-uniform.
        flips: whether half of the random views are mirrored.
        yaw_rad: yaw is uniform in [-yaw_rad, yaw_rad).
        point_scale: range of the factor on a sweep's coordinates, uniform.
        view0: for each image input, whether view 0 is all of it or the centred square.
        photometric: how colour changes of random views are drawn, None where there are
            none. Drawn from a stream of its own: the geometry is the same without it.
    """

    seed: int
    scale: tuple[float, float]
    ratio: tuple[float, float]
    flips: bool
    yaw_rad: float
    point_scale: tuple[float, float]
    view0: dict[str, View0]
    photometric: PhotometricConfig | None = None

    def to_json(self) -> dict[str, Any]:
        """Returns a JSON object; numbers come back exactly.

        ``photometric`` is left out where there is none: it came later, and banks that
        are older keep their fingerprints.
        """
        data: dict[str, Any] = {
            "seed": self.seed,
            "scale": list(self.scale),
            "ratio": list(self.ratio),
            "flips": self.flips,
            "yaw_rad": self.yaw_rad,
            "point_scale": list(self.point_scale),
            "view0": dict(self.view0),
        }
        if self.photometric is not None:
            data["photometric"] = self.photometric.model_dump(mode="json")
        return data

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> ViewPolicy:
        """Returns the policy that `to_json` wrote."""
        photometric = data.get("photometric")
        return cls(
            seed=int(data["seed"]),
            scale=_pair(data["scale"]),
            ratio=_pair(data["ratio"]),
            flips=bool(data["flips"]),
            yaw_rad=float(data["yaw_rad"]),
            point_scale=_pair(data["point_scale"]),
            view0=dict(data["view0"]),
            photometric=photometric and PhotometricConfig.model_validate(photometric),
        )


def evaluation_box(size_hw: tuple[int, int], view0: View0) -> Box:
    """Returns view 0's box: the whole image, or its largest centred square.

    Args:
        size_hw: (height, width) of the upright image in pixels.
        view0: which of the two; the square's corners may be half pixels.
    """
    height, width = size_hw
    if height < 1 or width < 1:
        raise ValueError(f"an image must have pixels, got height x width {size_hw}")
    if view0 == "full":
        return (0.0, 0.0, float(width), float(height))
    side = min(height, width)
    x0, y0 = (width - side) / 2, (height - side) / 2
    return (x0, y0, x0 + side, y0 + side)


def draw_view(
    policy: ViewPolicy,
    shard: str,
    key: str,
    view: int,
    sizes: Mapping[str, tuple[int, int]],
) -> View:
    """Returns a view of a sample; view 0 is the evaluation view and has no randomness.

    Args:
        policy: how views are drawn.
        shard: identity of the sample's shard.
        key: its key.
        view: number of the view.
        sizes: (height, width) of each image input that the sample has; the draw of one
            does not depend on the others.

    Raises:
        ValueError: an input that the policy does not know, or an image without pixels.
    """
    unknown = sorted(set(sizes) - set(policy.view0))
    if unknown:
        raise ValueError(
            f"inputs of a sample must be among {sorted(policy.view0)} (view0 of the "
            f"policy), got {unknown}"
        )
    boxes = {name: evaluation_box(hw, policy.view0[name]) for name, hw in sizes.items()}
    if view == 0:
        return View(0, False, 0.0, 1.0, boxes)
    stream = _Stream(policy.seed, shard, key, view, "sample")
    flip, yaw, scale = stream.uniforms(3)
    low, high = policy.point_scale
    return View(
        index=view,
        flip=policy.flips and flip < 0.5,
        yaw=policy.yaw_rad * (2 * yaw - 1),
        scale=low + (high - low) * scale,
        boxes={
            name: _draw_box(
                policy, box, _Stream(policy.seed, shard, key, view, f"box:{name}")
            )
            for name, box in boxes.items()
        },
        photometric=None
        if policy.photometric is None
        else draw_photometric(
            policy.photometric,
            _Stream(policy.seed, shard, key, view, "photometric").uniforms(NUM_DRAWS),
        ),
    )


class _Stream:
    """Uniform float64 in [0, 1), a pure function of what it is made from."""

    def __init__(self, *identity: int | str) -> None:
        text = json.dumps(identity, ensure_ascii=True, separators=(",", ":"))
        digest = hashlib.blake2b(text.encode(), digest_size=16).digest()
        self._bits = np.random.Philox(key=int.from_bytes(digest, "little"))

    def uniforms(self, count: int) -> list[float]:
        words = self._bits.random_raw(count)
        return [int(word >> np.uint64(11)) * 2.0**-53 for word in words]


def _draw_box(policy: ViewPolicy, within: Box, stream: _Stream) -> Box:
    """Returns a random resized crop of ``within``.

    Source: Szegedy et al., Going Deeper with Convolutions (2015), section 6, in the
    form of torchvision's RandomResizedCrop, but fractional and relative to ``within``.
    """
    width, height = within[2] - within[0], within[3] - within[1]
    log_low, log_high = math.log(policy.ratio[0]), math.log(policy.ratio[1])
    for _ in range(_TRIES):
        area, aspect, across, down = stream.uniforms(4)
        share = policy.scale[0] + (policy.scale[1] - policy.scale[0]) * area
        relative = math.exp(log_low + (log_high - log_low) * aspect)
        crop_width = width * math.sqrt(share * relative)
        crop_height = height * math.sqrt(share / relative)
        if crop_width <= width and crop_height <= height:
            return _place(within, crop_width, crop_height, across, down)
    relative = min(max(1.0, policy.ratio[0]), policy.ratio[1])
    share = min(policy.scale[1], relative, 1 / relative)
    crop_width = width * min(math.sqrt(share * relative), 1.0)
    crop_height = height * min(math.sqrt(share / relative), 1.0)
    return _place(within, crop_width, crop_height, 0.5, 0.5)


def _place(within: Box, width: float, height: float, across: float, down: float) -> Box:
    x0 = within[0] + (within[2] - within[0] - width) * across
    y0 = within[1] + (within[3] - within[1] - height) * down
    # Rounding must not carry a corner outside: Pillow refuses such a box.
    return (x0, y0, min(x0 + width, within[2]), min(y0 + height, within[3]))


def _pair(values: Any) -> tuple[float, float]:
    low, high = values
    return float(low), float(high)
