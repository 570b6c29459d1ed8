"""Writes generated shards: ``python -m teachonce.demo DEST --scenes 600``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from manifests.errors import TeachOnceError
from teachonce.demo.samples import make_sample
from teachonce.demo.scenes import SceneOptions
from teachonce.demo.shards import write_shards
from teachonce.demo.sheet import draw_contact_sheet


def main(argv: Sequence[str] | None = None) -> int:
    """Writes the shards that ``argv`` asks for; returns 0, or 2 for unusable input."""
    defaults = SceneOptions()
    parser = argparse.ArgumentParser(
        prog="python -m teachonce.demo",
        description="Write street scenes drawn from a seed as WebDataset shards.",
        epilog="example: python -m teachonce.demo ./scenes --scenes 600 --night 0.3",
    )
    add = parser.add_argument
    add("dest", type=Path, help="folder of the shards")
    add("--scenes", type=int, default=600, help="how many scenes (600)")
    add("--per-shard", type=int, default=100, help="scenes in a shard (100)")
    add("--seed", type=int, default=0, help="what they are drawn from (0)")
    add("--first", type=int, default=0, help="index of the first scene (0)")
    add("--night", type=float, default=0.0, help="share at night (0)")
    add("--fog", type=float, default=0.0, help="share in fog (0)")
    add(
        "--lidar-range",
        type=float,
        default=defaults.lidar_range_m,
        help="farthest LiDAR return in metres (60)",
    )
    add(
        "--textures",
        default=defaults.textures,
        help="a for experts, b for the demo (b)",
    )
    add("--workers", type=int, default=0, help="processes (0: this one)")
    add("--sheet", type=Path, help="also draw the first 8 scenes to this PNG")
    arguments = parser.parse_args(argv)
    try:
        options = SceneOptions(
            night=arguments.night,
            fog=arguments.fog,
            lidar_range_m=arguments.lidar_range,
            textures=arguments.textures,
        )
        write_shards(
            arguments.dest,
            arguments.scenes,
            arguments.per_shard,
            arguments.seed,
            options,
            first_index=arguments.first,
            workers=arguments.workers,
            on_shard=print,
        )
        if arguments.sheet is not None:
            first, end = arguments.first, arguments.first + min(8, arguments.scenes)
            draw_contact_sheet(
                (make_sample(arguments.seed, i, options) for i in range(first, end)),
                arguments.sheet,
            )
    except (TeachOnceError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
