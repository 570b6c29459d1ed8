"""State dicts of published shapes, and the numbers that they lead to.

Names and shapes are written down from the configurations and modules of OpenPCDet and
mmdetection3d; the forward pass beside ours runs on their names and on their tables of
padded pillars. Files themselves cannot be had here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from teachers.errors import TeacherError
from teachers.interface import GroupInput, Teacher

Shapes = dict[str, tuple[int, ...]]
COLUMNS = ("x", "y", "z", "intensity", "time_lag", "elongation")
LIDAR = (GroupInput("lidar", "points", columns=COLUMNS),)


def norm(name: str, width: int) -> Shapes:
    """A batch norm."""
    parts = ("weight", "bias", "running_mean", "running_var")
    return {f"{name}.{part}": (width,) for part in parts} | {
        f"{name}.num_batches_tracked": ()
    }


def stages(name: str, first: int) -> Shapes:
    """[3, 5, 5] layers of 64, 128, 256; ``first`` is the index of a convolution."""
    shapes: Shapes = {}
    for k, (layers, width, into) in enumerate(
        [(3, 64, 64), (5, 128, 64), (5, 256, 128)]
    ):
        for layer in range(layers + 1):
            place = f"{name}.{k}.{first + 3 * layer}"
            before = into if layer == 0 else width
            shapes[f"{place}.weight"] = (width, before, 3, 3)
            shapes |= norm(f"{name}.{k}.{first + 3 * layer + 1}", width)
    return shapes


def deconvs(name: str, *steps: int) -> Shapes:
    """Three of 128; a negative step is a convolution that reduces."""
    shapes: Shapes = {}
    for k, (width, step) in enumerate(zip((64, 128, 256), steps, strict=True)):
        side = (abs(step), abs(step))
        ends = (width, 128) if step > 0 else (128, width)
        shapes[f"{name}.{k}.0.weight"] = (*ends, *side)
        shapes |= norm(f"{name}.{k}.1", 128)
    return shapes


def point_layers(name: str, *pairs: tuple[int, int]) -> Shapes:
    """Linear layers (in, out) and their norms."""
    shapes: Shapes = {}
    for k, (into, width) in enumerate(pairs):
        shapes[f"{name}.{k}.linear.weight"] = (width, into)
        shapes |= norm(f"{name}.{k}.norm", width)
    return shapes


def convolution(name: str, width: int, into: int, side: int = 1) -> Shapes:
    """A convolution with a bias, as heads have them."""
    return {f"{name}.weight": (width, into, side, side), f"{name}.bias": (width,)}


def anchor_head(name: str, into: int, classes: int, box: int, ways: int) -> Shapes:
    """Both code bases' single anchor head."""
    return (
        convolution(f"{name}.conv_cls", classes, into)
        | convolution(
            f"{name}.{'conv_box' if name == 'dense_head' else 'conv_reg'}", box, into
        )
        | convolution(f"{name}.conv_dir_cls", ways, into)
    )


def pyramid(name: str) -> Shapes:
    """mmdetection's FPN with norms, 256 wide."""
    shapes: Shapes = {}
    for k, width in enumerate((64, 128, 256)):
        shapes[f"{name}.lateral_convs.{k}.conv.weight"] = (256, width, 1, 1)
        shapes |= norm(f"{name}.lateral_convs.{k}.bn", 256)
        shapes[f"{name}.fpn_convs.{k}.conv.weight"] = (256, 256, 3, 3)
        shapes |= norm(f"{name}.fpn_convs.{k}.bn", 256)
    return shapes


def multi_head() -> Shapes:
    """The start of OpenPCDet's heads of nuScenes."""
    name = "dense_head.rpn_heads.0"
    return {
        "dense_head.shared_conv.0.weight": (64, 384, 3, 3),
        **norm("dense_head.shared_conv.1", 64),
        f"{name}.head_label_indices": (1,),
        f"{name}.conv_cls.0.weight": (64, 64, 3, 3),
        **norm(f"{name}.conv_cls.1", 64),
        **convolution(f"{name}.conv_cls.3", 2, 64, 3),
        f"{name}.conv_box.conv_reg.0.weight": (64, 64, 3, 3),
        **norm(f"{name}.conv_box.conv_reg.1", 64),
        **convolution(f"{name}.conv_box.conv_reg.3", 4, 64, 3),
    }


PCDET_STAGES = stages("backbone_2d.blocks", 1) | {"global_step": (1,)}
MMDET_NUSCENES = stages("pts_backbone.blocks", 0) | point_layers(
    "pts_voxel_encoder.vfe_layers", (10, 64), (128, 64)
)

# Per case: preset, arguments, shapes, and the numbers of its forward pass.
CASES: dict[str, tuple[str, dict[str, Any], Shapes, dict[str, Any]]] = {
    "OpenPCDet KITTI": (
        "kitti",
        {"layout": "openpcdet"},
        point_layers("vfe.pfn_layers", (10, 64))
        | PCDET_STAGES
        | deconvs("backbone_2d.deblocks", 1, 2, 4)
        | anchor_head("dense_head", 384, 18, 42, 12),
        {"voxel": (0.16, 0.16, 4), "points": 32, "columns": "xyzi"},
    ),
    "OpenPCDet nuScenes": (
        "nuscenes",
        {"layout": "openpcdet"},
        point_layers("vfe.pfn_layers", (11, 64))
        | PCDET_STAGES
        | deconvs("backbone_2d.deblocks", -2, 1, 2)
        | multi_head(),
        {"voxel": (0.2, 0.2, 8), "points": 20, "columns": "xyzIt"},
    ),
    "OpenPCDet Waymo": (
        "waymo",
        {"layout": "openpcdet"},
        point_layers("vfe.pfn_layers", (11, 32), (64, 64))
        | PCDET_STAGES
        | deconvs("backbone_2d.deblocks", 1, 2, 4)
        | anchor_head("dense_head", 384, 18, 42, 12),
        {"voxel": (0.32, 0.32, 6), "points": 20, "columns": "xyzTe", "stride": 1},
    ),
    "mmdetection3d KITTI, 2022": (
        "kitti",
        {},
        point_layers("voxel_encoder.pfn_layers", (10, 64))
        | stages("backbone.blocks", 0)
        | deconvs("neck.deblocks", 1, 2, 4)
        | anchor_head("bbox_head", 384, 18, 42, 12),
        {"voxel": (0.16, 0.16, 4), "points": 32, "columns": "xyzi", "legacy": 3},
    ),
    "mmdetection3d KITTI, 2020": (
        "kitti",
        {"centre": "xy"},
        point_layers("voxel_encoder.pfn_layers", (9, 64))
        | stages("backbone.blocks", 0)
        | deconvs("neck.deblocks", 1, 2, 4)
        | anchor_head("bbox_head", 384, 2, 14, 4),
        {
            "voxel": (0.16, 0.16, 4),
            "points": 32,
            "columns": "xyzi",
            "legacy": 2,
            "centre": 2,
        },
    ),
    "mmdetection3d nuScenes": (
        "nuscenes",
        {},
        MMDET_NUSCENES
        | deconvs("pts_neck.deblocks", 1, 2, 4)
        | anchor_head("pts_bbox_head", 384, 140, 126, 28),
        {"voxel": (0.25, 0.25, 8), "points": 64, "columns": "xyzt"},
    ),
    "mmdetection3d nuScenes, FPN": (
        "nuscenes_fpn",
        {},
        MMDET_NUSCENES
        | pyramid("pts_neck")
        | anchor_head("pts_bbox_head", 256, 80, 72, 16),
        {"voxel": (0.25, 0.25, 8), "points": 64, "columns": "xyzt"},
    ),
    "mmdetection3d Waymo": (
        "waymo",
        {},
        point_layers("pts_voxel_encoder.vfe_layers", (11, 64))
        | stages("pts_backbone.blocks", 0)
        | deconvs("pts_neck.deblocks", 1, 2, 4)
        | anchor_head("pts_bbox_head", 384, 18, 42, 12),
        {"voxel": (0.32, 0.32, 6), "points": 20, "columns": "xyzie", "stride": 1},
    ),
}
every_case = pytest.mark.parametrize("case", list(CASES))


def random_state(shapes: Shapes) -> dict[str, Tensor]:
    """Returns tensors of these shapes, of sizes as trained ones have them."""
    generator = torch.Generator().manual_seed(7)
    state = {}
    for name, shape in shapes.items():
        noise = torch.randn(shape, generator=generator)
        if name.endswith(("num_batches_tracked", "global_step", "indices")):
            state[name] = torch.ones(shape, dtype=torch.int64)
        elif name.endswith("running_var"):
            state[name] = 0.5 + noise.abs()
        elif len(shape) < 2:
            state[name] = noise * 0.3 + (1 if "weight" in name else 0)
        else:
            fan = int(np.prod(shape[1:]))
            state[name] = noise * (2 / fan) ** 0.5
    return state


def save(case: str, path: Path) -> dict[str, Tensor]:
    """Writes a checkpoint as the code base does; returns its state dict."""
    state = random_state(CASES[case][2])
    if case.startswith("OpenPCDet"):
        whole: dict[str, Any] = {
            "epoch": 80,
            "it": 37_120,
            "model_state": state,
            "optimizer_state": {"state": {0: {"step": 3}}, "param_groups": []},
            "version": "pcdet+0.3.0",
        }
    else:
        whole = {
            "meta": {"config": "model = dict(...)", "CLASSES": ("Car",), "epoch": 80},
            "state_dict": state,
            "optimizer": {"state": {}, "param_groups": []},
        }
    torch.save(whole, path)
    return state


def small_range(voxel: tuple[float, ...], cells: int = 48) -> list[float]:
    """Returns a box of so many pillars, not in the middle."""
    x, y, z = -10 * voxel[0], -30 * voxel[1], -2.0
    high = [x + cells * voxel[0], y + (cells - 8) * voxel[1], z + voxel[2]]
    return [x, y, z, *high]


def sweep(voxel: tuple[float, ...], seed: int = 0) -> np.ndarray:
    """Returns (3000, 6) points as in `COLUMNS`, some crowded, some outside."""
    rng = np.random.default_rng(seed)
    box = np.array(small_range(voxel))
    points = rng.uniform(size=(3000, 6)).astype(np.float32)
    span = box[3:] - box[:3]
    points[:, :3] = box[:3] - 0.1 * span + points[:, :3] * 1.2 * span
    crowd = rng.normal(size=(1200, 3)) * 0.4 + box[:3] + span / 3
    points[:1200, :3] = crowd.astype(np.float32)
    rng.shuffle(points)
    return points


def reference(
    state: Mapping[str, Tensor],
    points: np.ndarray,
    facts: Mapping[str, Any],
    point_range: list[float],
    voxelise: Callable[..., Any],
    max_pillars: int,
) -> tuple[Tensor, list[Tensor]]:
    """Returns the neck's map and the stages' maps, (C, ny, nx), by published names."""

    def batch_norm(x: Tensor, name: str) -> Tensor:
        mean, variance, weight, bias = (
            state[f"{name}.{part}"]
            for part in ("running_mean", "running_var", "weight", "bias")
        )
        return F.batch_norm(x, mean, variance, weight, bias, eps=1e-3)

    x, y, z, intensity, lag, elongation = points.T
    columns = {
        "x": x,
        "y": y,
        "z": z,
        "i": intensity,
        "I": 255 * intensity,
        "T": np.tanh(intensity),
        "t": lag,
        "e": elongation,
    }
    table = np.stack([columns[name] for name in facts["columns"]], 1)
    table = table.astype(np.float32)
    size, most = facts["voxel"], facts["points"]
    pillars = voxelise(table, size, point_range, most, max_pillars)
    padded = np.zeros((len(pillars), most, table.shape[1]), np.float32)
    for row, (_, kept) in zip(padded, pillars, strict=True):
        row[: len(kept)] = kept
    values = torch.from_numpy(padded)
    counts = torch.tensor([len(kept) for _, kept in pillars])
    cells = torch.tensor([cell for cell, _ in pillars])
    mask = (torch.arange(most) < counts[:, None])[..., None]
    mean = values[..., :3].sum(1, keepdim=True) / counts[:, None, None]
    cluster = values[..., :3] - mean
    axes = facts.get("centre", 3)
    steps = torch.cat([cells, torch.zeros(len(cells), 1)], 1)[:, None, :axes]
    middle = torch.tensor(size)[:axes] / 2 + torch.tensor(point_range)[:axes]
    centre = values[..., :axes] - (steps * torch.tensor(size)[:axes] + middle)
    replaced = facts.get("legacy", 0)
    values = torch.cat([centre[..., :replaced], values[..., replaced:]], -1)
    values = torch.cat([values, cluster, centre], -1) * mask

    linears = sorted(name for name in state if name.endswith("linear.weight"))
    for number, name in enumerate(linears):
        rows = values.flatten(0, 1) @ state[name].T
        rows = F.relu(batch_norm(rows, name.replace("linear.weight", "norm")))
        values = rows.view(len(pillars), most, -1)
        largest = values.max(1, keepdim=True)[0]
        if number < len(linears) - 1:
            values = torch.cat([values, largest.repeat(1, most, 1)], -1)
    nx, ny, _ = (
        round((high - low) / side)
        for low, high, side in zip(point_range[:3], point_range[3:], size, strict=True)
    )
    canvas = torch.zeros(64, ny, nx)
    for (ix, iy), vector in zip(cells.tolist(), largest[:, 0], strict=True):
        canvas[:, iy, ix] = vector

    pcdet = "global_step" in state
    prefix = "pts_" if "pts_backbone.blocks.0.0.weight" in state else ""
    base = "backbone_2d" if pcdet else f"{prefix}backbone"
    value, levels = canvas[None], []
    for k, layers in enumerate((3, 5, 5)):
        for layer in range(layers + 1):
            name = f"{base}.blocks.{k}.{3 * layer + int(pcdet)}"
            stride = (facts.get("stride", 2) if k == 0 else 2) if layer == 0 else 1
            value = F.conv2d(
                F.pad(value, (1, 1, 1, 1)), state[f"{name}.weight"], stride=stride
            )
            after = f"{base}.blocks.{k}.{3 * layer + int(pcdet) + 1}"
            value = F.relu(batch_norm(value, after))
        levels.append(value)

    neck = base if pcdet else base.replace("backbone", "neck")
    if f"{neck}.lateral_convs.0.conv.weight" in state:
        sides = []
        for k, level in enumerate(levels):
            name = f"{neck}.lateral_convs.{k}"
            side = F.conv2d(level, state[f"{name}.conv.weight"])
            sides.append(F.relu(batch_norm(side, f"{name}.bn")))
        for k in (2, 1):
            twice = sides[k].repeat_interleave(2, 2).repeat_interleave(2, 3)
            sides[k - 1] = sides[k - 1] + twice
        name = f"{neck}.fpn_convs.0"
        finest = F.conv2d(sides[0], state[f"{name}.conv.weight"], padding=1)
        return F.relu(batch_norm(finest, f"{name}.bn"))[0], [one[0] for one in levels]
    joined = []
    for k, level in enumerate(levels):
        weight = state[f"{neck}.deblocks.{k}.0.weight"]
        side_length = weight.shape[-1]
        # What enlarges has (in, out), what reduces (out, in).
        if facts["columns"] == "xyzIt" and k == 0:
            up = F.conv2d(level, weight, stride=side_length)
        else:
            up = F.conv_transpose2d(level, weight, stride=side_length)
        joined.append(F.relu(batch_norm(up, f"{neck}.deblocks.{k}.1")))
    return torch.cat(joined, 1)[0], [one[0] for one in levels]


@every_case
def test_a_published_state_dict_gives_its_own_numbers(
    case: str,
    open_one: Callable[..., Teacher],
    reference_voxelise: Callable[..., Any],
    tmp_path: Path,
) -> None:
    preset, args, _, facts = CASES[case]
    state = save(case, tmp_path / "model.pth")
    box, max_pillars = small_range(facts["voxel"]), 500
    teacher = open_one(
        f"pointpillars:{preset}",
        ["bev", "level0", "level1", "level2"],
        group=LIDAR,
        weights="./model.pth",
        args={**args, "point_range": box, "max_pillars": max_pillars},
        preprocess={"points": 3500},
        base=str(tmp_path),
    )
    points = sweep(facts["voxel"])
    names = teacher.inputs(None)["lidar"].columns  # type: ignore[attr-defined]
    given = np.full((1, 3500, len(names)), np.nan, np.float32)
    given[0, :3000] = points[:, [COLUMNS.index(name) for name in names]]
    found = teacher.forward({"lidar": torch.from_numpy(given)}, None)
    bev, levels = reference(state, points, facts, box, reference_voxelise, max_pillars)
    expected = dict(zip(("level0", "level1", "level2"), levels, strict=True))
    for name, map_CHW in {"bev": bev, **expected}.items():
        # Their columns run along x: turned, and the highest of both comes first.
        turned = map_CHW.permute(2, 1, 0).flip(0, 1)
        assert found[name].shape[1:] == turned.shape
        scale = turned.abs().max()
        assert scale > 0.1
        assert (found[name][0] - turned).abs().max() < 2e-5 * scale, name


@every_case
def test_the_whole_state_dict_fits_the_published_grid(
    case: str, open_one: Callable[..., Teacher], tmp_path: Path
) -> None:
    """No name is left over, and none is missing, with no arguments but the layout."""
    preset, args, shapes, _ = CASES[case]
    save(case, tmp_path / "model.pth")
    teacher = open_one(
        f"pointpillars:{preset}",
        ["bev"],
        group=LIDAR,
        weights="./model.pth",
        args=args,
        base=str(tmp_path),
    )
    teacher.load()
    counted = sum(
        int(np.prod(shape))
        for name, shape in shapes.items()
        if name.endswith(("weight", "bias")) and "head" not in name
    )
    assert teacher.facts.num_parameters == counted
    declared = teacher.outputs(None)["bev"].shape
    nx, ny, stride, channels = {
        "kitti": (432, 496, 2, 384),
        "nuscenes": (400, 400, 2, 384),
        "nuscenes_fpn": (400, 400, 2, 256),
        "waymo": (468, 468, 1, 384),
    }[preset]
    if case == "OpenPCDet nuScenes":
        nx, ny, stride = 512, 512, 4
    assert declared == (nx // stride, ny // stride, channels)


def test_another_code_bases_file_is_refused_with_the_words_to_write(
    open_one: Callable[..., Teacher], tmp_path: Path
) -> None:
    save("OpenPCDet KITTI", tmp_path / "pcdet.pth")
    save("mmdetection3d KITTI, 2022", tmp_path / "mmdet.pth")
    common: dict[str, Any] = {"group": LIDAR, "base": str(tmp_path)}
    teacher = open_one("pointpillars:kitti", ["bev"], weights="./pcdet.pth", **common)
    with pytest.raises(TeacherError, match=r"write `args: \{layout: openpcdet\}`"):
        teacher.load()
    teacher = open_one(
        "pointpillars:kitti",
        ["bev"],
        weights="./mmdet.pth",
        args={"layout": "openpcdet"},
        **common,
    )
    with pytest.raises(TeacherError, match=r"write `args: \{layout: mmdet3d\}`"):
        teacher.load()


def test_what_does_not_fit_is_named(
    open_one: Callable[..., Teacher], tmp_path: Path
) -> None:
    state = random_state(CASES["mmdetection3d KITTI, 2020"][2])
    del state["neck.deblocks.2.1.bias"]
    state["neck.deblocks.3.0.weight"] = torch.zeros(1)
    torch.save(state, tmp_path / "model.pth")
    teacher = open_one(
        "pointpillars:kitti",
        ["bev"],
        group=LIDAR,
        weights="./model.pth",
        base=str(tmp_path),
    )
    with pytest.raises(TeacherError) as raised:
        teacher.load()
    message = str(raised.value)
    for part in (
        "1 missing (neck.2.1.bias)",
        "1 unexpected (neck.3.0.weight)",
        "encoder.layers.0.linear.weight (64, 9) for (64, 10)",
    ):
        assert part in message


def test_names_of_a_fork_can_be_mapped(
    open_one: Callable[..., Teacher], tmp_path: Path
) -> None:
    state = random_state(CASES["OpenPCDet KITTI"][2])
    renamed = {f"detector.{name}": value for name, value in state.items()}
    torch.save(renamed, tmp_path / "model.pth")
    teacher = open_one(
        "pointpillars:kitti",
        ["bev"],
        group=LIDAR,
        weights="./model.pth",
        args={"layout": "openpcdet"},
        keys={r"^detector\.": ""},
        base=str(tmp_path),
    )
    teacher.load()
