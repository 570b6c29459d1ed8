"""Contract cases of teachers: one small model of each kind, and what it looks at.

Those whose model is a folder or file made elsewhere are in ``made_elsewhere``.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from teachers.interface import GroupInput
from tests.contracts import made_elsewhere

CODE = """
from torch import nn


class Grid(nn.Module):
    def __init__(self):
        super().__init__()
        stem = nn.Conv2d(3, 8, 3, 2, 1)
        self.encoder = nn.Sequential(
            stem, nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 4, 4)
        )
        self.head = nn.Linear(8, 5)

    def forward(self, image):
        return self.head(self.encoder(image).mean((2, 3)))


class Points(nn.Module):
    def __init__(self):
        super().__init__()
        self.each = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 16))

    def forward(self, sweep):
        return self.each(sweep).amax(1)


class PerPoint(Points):
    def forward(self, sweep):
        return self.each(sweep)


class Video(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv3d(3, 8, (1, 8, 8), (1, 8, 8))
        self.time = nn.Conv3d(8, 8, (3, 1, 1), padding=(1, 0, 0))

    def forward(self, clip):
        found = self.time(self.stem(clip.transpose(1, 2)))
        return {"cls": found.mean((2, 3, 4)), "patch": found.transpose(1, 2)}


class Rig(nn.Module):
    def __init__(self):
        super().__init__()
        self.camera = nn.Conv2d(3, 8, 16, 16)
        self.each = nn.Linear(4, 8)

    def forward(self, *, front, back, lidar):
        seen = self.camera(front).mean((2, 3)) + self.camera(back).amax((2, 3))
        return seen + self.each(lidar).amax(1)
"""
SWEEP = GroupInput("lidar", "points", columns=("x", "y", "z", "intensity"))
CLIP = GroupInput("clip", "clip", frames=3)
IMAGE = GroupInput("image", "image")
# Not one image: what each case looks at.
GROUPS: dict[str, tuple[GroupInput, ...]] = {
    "module on sweeps": (SWEEP,),
    "student on sweeps": (SWEEP,),
    "program on sweeps": (SWEEP,),
    "module of points": (SWEEP,),
    "module on clips": (CLIP,),
    "module on a rig": (
        GroupInput("front", "image"),
        GroupInput("back", "image"),
        SWEEP,
    ),
    "pillars": (SWEEP,),
    "range view": (SWEEP,),
    "bev raster": (SWEEP,),
}
CLS_AND_PATCH: dict[str, Any] = {"cls": {}, "pooled": {}, "patch": {}, "layer1": {}}
MAPS: dict[str, Any] = {"pooled": {}, "logits": {}, "patch": {}, "level1": {}}
CASES: dict[str, dict[str, Any]] = {
    "class token": {
        "model": "timm:test_vit",
        "outputs": {**CLS_AND_PATCH, "cls": {"norm": "pre"}, "patch": {"pool": (2, 2)}},
        "sizes": [(96, 160), (160, 160)],
    },
    "registers, one size": {
        "model": "timm:vit_small_patch14_reg4_dinov2",
        "args": {"embed_dim": 48, "depth": 3, "num_heads": 2},
        "outputs": CLS_AND_PATCH,
        "sizes": [(70, 112)],
    },
    "rotary positions": {
        "model": "timm:vit_small_patch16_dinov3",
        "args": {"embed_dim": 64, "depth": 3, "num_heads": 2},
        "outputs": CLS_AND_PATCH,
        "sizes": [(96, 160)],
    },
    "convnext": {"model": "timm:test_convnext", "outputs": MAPS, "sizes": [(96, 160)]},
    "resnet": {"model": "timm:test_resnet", "outputs": MAPS, "sizes": [(96, 160)]},
    "byobnet": {"model": "timm:test_byobnet", "outputs": MAPS, "sizes": [(96, 160)]},
    "channels last": {
        "model": "timm:swin_tiny_patch4_window7_224",
        "args": {"embed_dim": 24, "depths": (1, 1, 1, 1), "num_heads": (1, 2, 4, 8)},
        "outputs": MAPS,
        "sizes": [(224, 224)],
    },
    "sam, padded": {
        "model": "timm:samvit_base_patch16_224",
        "args": {"embed_dim": 48, "depth": 2, "num_heads": 3},
        "outputs": {"patch": {}, "pooled": {}, "layer1": {}},
        "sizes": [(224, 224)],
        "preprocess": {"fit": "pad"},
    },
    "sam 2": {
        "model": "timm:sam2_hiera_tiny",
        "args": {"embed_dim": 24, "stages": (1, 1, 2, 1)},
        "outputs": {"pooled": {}, "patch": {}, "level0": {}, "level1": {}},
        "sizes": [(128, 256)],
    },
    "hiera": {
        "model": "timm:hiera_tiny_224",
        "args": {"embed_dim": 24, "stages": (1, 1, 2, 1)},
        "outputs": {"pooled": {}, "patch": {}, "level0": {}, "level1": {}},
        "sizes": [(224, 224)],
    },
    "radio": {
        "model": "timm:vit_base_patch16_radio_v3",
        "args": {"embed_dim": 48, "depth": 2, "num_heads": 3},
        "outputs": {"cls": {}, "patch": {}},
        "sizes": [(96, 160)],
    },
    "clip": {
        "model": "open_clip:ViT-S-32-alt",
        "outputs": {"embed": {}, "pooled": {}, "patch": {}, "layer0": {"norm": "pre"}},
        "sizes": [(96, 160)],
    },
    "module on images": {
        "model": "module:./code.py:Grid",
        "outputs": {"patch": {"from": "encoder"}, "logits": {}},
        "sizes": [(64, 128)],
        "preprocess": {"channels": "bgr", "range": 255, "mean": (9, 8, 7)},
    },
    "module on sweeps": {
        "model": "module:./code.py:Points",
        "outputs": {"pooled": {}},
        "preprocess": {"points": 32, "columns": ("x", "y", "z", "intensity")},
    },
    "module of points": {
        "model": "module:./code.py:PerPoint",
        "outputs": {"points": {}},
        "preprocess": {"points": 32, "columns": ("x", "y", "z", "intensity")},
    },
    "module on clips": {
        "model": "module:./code.py:Video",
        "outputs": {"cls": {"from": "output[cls]"}, "patch": {"from": "output[patch]"}},
        "sizes": [(64, 96)],
    },
    "module on a rig": {
        "model": "module:./code.py:Rig",
        "outputs": {"pooled": {}},
        "sizes": [(64, 96)],
        "preprocess": {"points": 32, "columns": ("x", "y", "z", "intensity")},
    },
    "pillars": {
        "model": "pointpillars:nuscenes",
        "args": {
            "voxel_size": [1.0, 1.0, 8.0],
            "point_range": [-16, -32, -5, 16, 32, 3],
        },
        "outputs": {"bev": {"pool": (2, 2)}, "level1": {}},
        "preprocess": {"points": 400},
    },
    "range view": {
        "model": "range_view:test_vit",
        "args": {"patch_size": [8, 16]},
        "outputs": {"cls": {}, "pooled": {}, "patch": {"pool": (2, 2)}, "layer1": {}},
        "sizes": [(64, 512)],
        "preprocess": {
            "raster": {
                "elevation_deg": (-25, 3),
                "mean": (20, 0, 0, -1, 0.2),
                "std": (20, 20, 20, 1, 0.2),
            }
        },
    },
    "bev raster": {
        "model": "bev_raster:test_convnext",
        "outputs": {"bev": {}, "pooled": {}, "level1": {}},
        "sizes": [(96, 160)],
        "preprocess": {"raster": {"x_m": (0, 48), "y_m": (-40, 40)}},
    },
}


CASES |= made_elsewhere.CASES


def write_files(folder: Path) -> None:
    """Writes the code, folders and programs that cases name."""
    (folder / "code.py").write_text(CODE)
    made_elsewhere.write_files(folder)
