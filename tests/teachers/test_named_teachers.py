"""Every encoder that a job can name by its timm name, without weights.

Channels, grids and parameter counts are those that the authors publish, written down
here; large models are on the meta device and take no memory.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest

from teachers import registry
from teachers.errors import TeacherError
from teachers.torch_teacher import TorchTeacher

Open = Callable[..., TorchTeacher]

HUB = "https://huggingface.co/timm/"
RADIO = "https://github.com/NVlabs/RADIO"
DINOV3, EUPE = "dinov3-license", "fair-noncommercial-research-license"
NVIDIA = "nvidia-open-model-license"
CLIP_MEAN = 0.48145466


class Row(NamedTuple):
    """One model as its authors describe it.

    Attributes:
        model: timm's name with its tag.
        millions: of parameters.
        grid: of ``patch`` at the model's own size.
        channels: of ``patch``.
        cls: channels of it; 0 where there is none.
        end: the name and channels of what the head gives; () where there is no head.
        last: the name of the last layer or level.
        norm: of ``patch``.
        prefix: tokens that are no cells.
        license: of the weights.
        mean: of the first colour channel.
        source: of the weights; '' is timm's place on the hub.
    """

    model: str
    millions: float
    grid: int
    channels: int
    cls: int
    end: tuple[()] | tuple[str, int] = ()
    last: str = "layer11"
    norm: str = "post"
    prefix: int = 1
    license: str = "apache-2.0"
    mean: float = 0.485
    source: str = ""


def _clip(
    name: str, millions: float, grid: int, channels: int, embed: int, **more: Any
) -> Row:
    mean = more.pop("mean", CLIP_MEAN)
    end = ("embed", embed)
    return Row(name, millions, grid, channels, channels, end, mean=mean, **more)


def _siglip(name: str, millions: float, grid: int, channels: int, last: str) -> Row:
    end = ("embed", channels)
    return Row(name, millions, grid, channels, 0, end, last, prefix=0, mean=0.5)


def _pe(name: str, millions: float, grid: int, channels: int, **more: Any) -> Row:
    given = {"cls": channels, "mean": 0.5, **more}
    return Row(name, millions, grid, channels, **given)


def _radio(name: str, millions: float, channels: int, summary: int, last: str) -> Row:
    prefix = 10 if "_v4" in name else 8
    return Row(
        *(f"naflexvit_{name}.c_radio", millions, 32, channels, summary * channels),
        *((), last, "pre", prefix, NVIDIA, CLIP_MEAN, RADIO),
    )


def _levels(name: str, millions: float, grid: int, channels: int, **more: Any) -> Row:
    given = {"last": "level3", "prefix": 0, **more}
    return Row(name, millions, grid, channels, 0, **given)


def _dinov3(name: str, millions: float, channels: int, last: str, **more: Any) -> Row:
    given = {"license": DINOV3, "prefix": 5, "last": last, **more}
    return Row(name, millions, 16, channels, channels, **given)


CC_NC = "cc-by-nc-4.0"
ROWS = [
    Row("vit_small_patch14_dinov2.lvd142m", 22.1, 37, 384, 384),
    Row("vit_base_patch14_dinov2.lvd142m", 86.6, 37, 768, 768),
    Row("vit_large_patch14_dinov2.lvd142m", 304, 37, 1024, 1024, last="layer23"),
    Row("vit_giant_patch14_dinov2.lvd142m", 1136, 37, 1536, 1536, last="layer39"),
    Row("vit_base_patch14_reg4_dinov2.lvd142m", 86.6, 37, 768, 768, prefix=5),
    Row(
        "vit_giant_patch14_reg4_dinov2.lvd142m",
        *(1136, 37, 1536, 1536),
        last="layer39",
        prefix=5,
    ),
    _dinov3("vit_small_patch16_dinov3.lvd1689m", 21.6, 384, "layer11"),
    _dinov3("vit_small_plus_patch16_dinov3.lvd1689m", 28.7, 384, "layer11"),
    _dinov3("vit_base_patch16_dinov3.lvd1689m", 85.7, 768, "layer11"),
    _dinov3("vit_large_patch16_dinov3.lvd1689m", 303.1, 1024, "layer23"),
    _dinov3("vit_large_patch16_dinov3.sat493m", 303.1, 1024, "layer23", mean=0.43),
    _dinov3("vit_huge_plus_patch16_dinov3.lvd1689m", 840.5, 1280, "layer31"),
    _dinov3("vit_7b_patch16_dinov3.lvd1689m", 6716, 4096, "layer39"),
    _levels("convnext_tiny.dinov3_lvd1689m", 27.8, 7, 768, license=DINOV3),
    _levels("convnext_small.dinov3_lvd1689m", 49.5, 7, 768, license=DINOV3),
    _levels("convnext_base.dinov3_lvd1689m", 87.6, 7, 1024, license=DINOV3),
    _levels("convnext_large.dinov3_lvd1689m", 196.2, 7, 1536, license=DINOV3),
    _siglip("vit_base_patch16_siglip_224.webli", 92.9, 14, 768, "layer11"),
    _siglip("vit_so400m_patch14_siglip_384.webli", 428.2, 27, 1152, "layer26"),
    _siglip("vit_base_patch16_siglip_256.v2_webli", 92.9, 16, 768, "layer11"),
    _siglip("vit_large_patch16_siglip_512.v2_webli", 316.7, 32, 1024, "layer23"),
    _siglip("vit_so400m_patch16_siglip_512.v2_webli", 428.8, 32, 1152, "layer26"),
    _siglip("vit_giantopt_patch16_siglip_384.v2_webli", 1163.7, 24, 1536, "layer39"),
    _clip("vit_base_patch16_clip_quickgelu_224.openai", 86.2, 14, 768, 512),
    _clip(
        "vit_large_patch14_clip_quickgelu_336.openai",
        *(304.3, 24, 1024, 768),
        last="layer23",
    ),
    _clip(
        "vit_huge_patch14_clip_quickgelu_224.metaclip_2pt5b",
        *(632.1, 16, 1280, 1024),
        last="layer31",
        license=CC_NC,
    ),
    _clip(
        "vit_huge_patch14_clip_quickgelu_378.dfn5b",
        *(632.7, 27, 1280, 1024),
        last="layer31",
        license="apple-ascl",
    ),
    _clip("eva02_base_patch16_clip_224.merged2b", 86.3, 14, 768, 512, license="mit"),
    _clip(
        "eva02_large_patch14_clip_336.merged2b",
        *(304.4, 24, 1024, 768),
        last="layer23",
        license="mit",
    ),
    _clip(
        "eva_giant_patch14_clip_224.merged2b",
        *(1012.6, 16, 1408, 1024),
        last="layer39",
        license="mit",
    ),
    _pe("vit_pe_core_base_patch16_224.fb", 93.7, 14, 768, end=("embed", 1024)),
    _pe(
        "vit_pe_core_large_patch14_336.fb",
        *(317.2, 24, 1024),
        end=("embed", 1024),
        last="layer23",
    ),
    _pe(
        "vit_pe_core_gigantic_patch14_448.fb",
        *(1882, 32, 1536),
        cls=0,
        end=("embed", 1280),
        last="layer49",
        prefix=0,
    ),
    _pe(
        "vit_pe_lang_large_patch14_448.fb",
        *(291.4, 32, 1024),
        last="layer22",
        norm="pre",
    ),
    _pe(
        "vit_pe_lang_gigantic_patch14_448.fb",
        *(1740.9, 32, 1536),
        cls=0,
        last="layer46",
        norm="pre",
        prefix=0,
    ),
    _pe("vit_pe_spatial_base_patch16_512.fb", 86.4, 32, 768, norm="pre"),
    _pe(
        "vit_pe_spatial_gigantic_patch14_448.fb",
        *(1851.9, 32, 1536),
        cls=0,
        last="layer49",
        norm="pre",
        prefix=0,
    ),
    Row("samvit_base_patch16.sa1b", 89.7, 64, 256, 0, prefix=0),
    Row("samvit_large_patch16.sa1b", 308.3, 64, 256, 0, last="layer23", prefix=0),
    Row("samvit_huge_patch16.sa1b", 637, 64, 256, 0, last="layer31", prefix=0),
    _levels("sam2_hiera_tiny.fb_r896_2pt1", 26.9, 28, 768, norm="pre"),
    _levels("sam2_hiera_base_plus.fb_r896_2pt1", 68.7, 28, 896, norm="pre"),
    _levels("sam2_hiera_large.fb_r1024_2pt1", 212.2, 32, 1152, norm="pre"),
    _levels("hiera_base_224.mae", 50.8, 7, 768, license=CC_NC),
    Row("vit_base_patch16_224.mae", 85.8, 14, 768, 768, license=CC_NC),
    Row(
        "vit_huge_patch14_224.mae", 630.8, 16, 1280, 1280, (), "layer31", license=CC_NC
    ),
    Row(
        "vit_base_patch16_224.augreg2_in21k_ft_in1k",
        *(86.6, 14, 768, 768, ("logits", 1000)),
        mean=0.5,
    ),
    _levels("convnext_base.fb_in22k_ft_in1k", 88.6, 7, 1024, end=("logits", 1000)),
    _levels("tiny_vit_21m_224.dist_in22k_ft_in1k", 21.2, 7, 576, end=("logits", 1000)),
    _levels("tiny_vit_21m_224.dist_in22k", 33.2, 7, 576, end=("logits", 21841)),
    _levels(
        "swin_base_patch4_window7_224.ms_in22k_ft_in1k",
        *(87.8, 7, 1024),
        end=("logits", 1000),
        license="mit",
    ),
    _radio("base_patch16_radio_v3", 98.3, 768, 3, "layer11"),
    _radio("large_patch16_radio_v3", 319.9, 1024, 3, "layer23"),
    _radio("huge_patch16_radio_v3", 651.6, 1280, 3, "layer31"),
    _radio("giant_patch16_radio_v3", 1159.6, 1536, 3, "layer39"),
    _radio("so400m_patch16_radio_v4", 431.2, 1152, 2, "layer26"),
    _radio("huge_patch16_radio_v4", 651.6, 1280, 2, "layer31"),
    _dinov3(
        "vit_tiny_patch16_dinov3_qkvb.eupe_lvd1689m", 5.5, 192, "layer11", license=EUPE
    ),
    _dinov3(
        "vit_small_patch16_dinov3_qkvb.eupe_lvd1689m",
        21.6,
        384,
        "layer11",
        license=EUPE,
    ),
    _dinov3(
        "vit_base_patch16_dinov3_qkvb.eupe_lvd1689m", 85.7, 768, "layer11", license=EUPE
    ),
    _levels("convnext_tiny.eupe_lvd1689m", 27.8, 8, 768, license=EUPE),
    _levels("convnext_base.eupe_lvd1689m", 87.6, 8, 1024, license=EUPE),
]


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.model)
def test_a_teacher_can_be_named(row: Row, open_one: Open) -> None:
    """Its outputs, their shapes and norms, its bytes, licence and source."""
    names = ["pooled", "patch", row.last]
    names += ["cls"] if row.cls else []
    names += [row.end[0]] if row.end else []
    teacher = open_one(f"timm:{row.model}", names, device="meta", precision="bfloat16")
    [size] = teacher.sizes
    specs = teacher.outputs(size)
    assert specs["patch"].shape == (row.grid, row.grid, row.channels)
    assert specs["patch"].norm == row.norm
    assert specs[row.last].shape[:2] == (row.grid, row.grid)
    if row.cls:
        assert specs["cls"].shape == (row.cls,)
        assert specs["cls"].norm == row.norm
    if row.end:
        assert specs[row.end[0]].shape == (row.end[1],)
    facts = teacher.facts
    assert facts.num_parameters / 1e6 == pytest.approx(row.millions, rel=3e-3)
    assert facts.parameter_bytes == 2 * facts.num_parameters
    assert facts.license == row.license
    name = row.model
    assert facts.source == (row.source or HUB + _stored_as(name))
    spec: Any = teacher.inputs(size)["image"]
    assert spec.mean[0] == row.mean


def _stored_as(name: str) -> str:
    """timm keeps one set of weights for both activations."""
    return name.replace("_quickgelu", "")


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.model)
def test_a_teacher_is_described(row: Row) -> None:
    facts = registry.describe(f"timm:{row.model}")
    outputs = facts["outputs"]
    assert ("cls" in outputs) == bool(row.cls)
    ends = {"embed", "logits"} & set(outputs)
    assert ends == ({row.end[0]} if row.end else set())
    assert [name for name in outputs if name[-1].isdigit()][-1] == row.last
    assert facts["grid"] == [row.grid, row.grid]
    assert facts["prefix_tokens"] == row.prefix
    assert facts["norms"]["patch"] == row.norm
    assert facts["license"] == row.license
    assert facts["pretrained"]


@pytest.mark.parametrize(
    ("model", "sizes"),
    [
        ("naflexvit_huge_patch16_radio_v4.c_radio", [[432, 768], [1152, 640]]),
        ("vit_7b_patch16_dinov3.lvd1689m", [[256, 448], [768, 1024]]),
        ("samvit_base_patch16.sa1b", [[512, 512], [640, 1024]]),
        ("convnext_base.dinov3_lvd1689m", [[256, 448], [512, 512]]),
        ("vit_base_patch16_dinov3_qkvb.eupe_lvd1689m", [[256, 256], [384, 384]]),
        ("sam2_hiera_tiny.fb_r896_2pt1", [[1024, 1024], [512, 896]]),
        ("vit_base_patch14_reg4_dinov2.lvd142m", [[224, 392]]),
        ("vit_pe_spatial_base_patch16_512.fb", [[256, 448]]),
        ("vit_base_patch16_siglip_256.v2_webli", [[256, 448]]),
        ("vit_base_patch16_224.mae", [[224, 448]]),
        ("eva02_base_patch16_clip_224.merged2b", [[224, 448]]),
        ("swin_base_patch4_window7_224.ms_in22k_ft_in1k", [[224, 448]]),
        ("tiny_vit_21m_224.dist_in22k_ft_in1k", [[224, 448]]),
        ("hiera_base_abswin_256", [[256, 512]]),
    ],
)
@pytest.mark.filterwarnings("ignore::UserWarning")  # timm's, as it resizes a Swin
def test_other_sizes(model: str, sizes: list[list[int]], open_one: Open) -> None:
    teacher = open_one(f"timm:{model}", ["patch"], sizes=sizes, device="meta")
    stride = registry.describe(f"timm:{model}")["stride"]
    for size in teacher.sizes:
        assert size is not None
        grid = teacher.outputs(size)["patch"].shape[:2]
        assert grid == (size[0] / stride, size[1] / stride)


@pytest.mark.parametrize(
    ("model", "size", "message"),
    [
        ("hiera_tiny_224", [448, 448], "must be the model's own .224, 224.*pos_embed"),
        ("hiera_tiny_224", [448, 112], r"multiples of the patch 32 x 32"),
        ("convnext_tiny", [240, 240], r"multiples of the patch 32 x 32.*\[256, 256\]"),
        ("sam2_hiera_tiny", [900, 900], "multiples of the patch 32 x 32"),
        ("naflexvit_base_patch16_radio_v3", [500, 500], "patch 16 x 16"),
        ("vit_7b_patch16_dinov3", [250, 250], r"patch 16 x 16.*\[256, 256\]"),
    ],
)
def test_sizes_that_a_model_cannot_take(
    model: str, size: list[int], message: str, open_one: Open
) -> None:
    with pytest.raises(TeacherError, match=message):
        open_one(f"timm:{model}", ["patch"], sizes=[size], device="meta").outputs(
            (size[0], size[1])
        )


def _attention_flops(tokens: int, width: int) -> float:
    """Of queries against keys, and of weights against values."""
    return 2 * 2.0 * tokens * tokens * width


def _linear_flops(tokens: int, width: int, hidden: float, matrices: int) -> float:
    """Of qkv and projection, and of an MLP of so many matrices."""
    return 2.0 * tokens * (4 * width * width + matrices * width * hidden)


def test_a_forward_of_dinov3_7b_costs_what_its_sums_say(open_one: Open) -> None:
    teacher = open_one(
        "timm:vit_7b_patch16_dinov3", ["cls"], device="meta", precision="bfloat16"
    )
    cost = teacher.cost((256, 256))
    tokens, width = 16 * 16 + 5, 4096
    # A gated MLP has three matrices.
    blocks = 40 * (
        _linear_flops(tokens, width, 8192, 3) + _attention_flops(tokens, width)
    )
    embed = 2.0 * 256 * 3 * 256 * width
    assert cost.flops == pytest.approx(blocks + embed, rel=0.01)
    # No more at once than a few copies of the widest layer, in two bytes.
    widest = 2 * tokens * 3 * 8192
    assert widest / 3 < cost.working_bytes < 10 * widest


def test_a_forward_of_sam_costs_what_its_sums_say(open_one: Open) -> None:
    teacher = open_one("timm:samvit_base_patch16", ["patch"], device="meta")
    cost = teacher.cost((1024, 1024))
    width, cells, head = 768, 64 * 64, 64
    padded = 70 * 70  # to windows of 14
    windows, window = 25, 14 * 14

    def mlp(tokens: int) -> float:
        return 2.0 * tokens * 2 * width * 4 * width

    def block(tokens: int, groups: int, side: int) -> float:
        per_group = side * side
        linear = 2.0 * tokens * 4 * width * width
        attention = groups * _attention_flops(per_group, width)
        # Relative positions: each query against those of its rows and its columns.
        relative = groups * 2.0 * (width // head) * per_group * 2 * side * head
        return linear + attention + relative + mlp(cells)

    assert padded == windows * window
    blocks = 8 * block(padded, windows, 14) + 4 * block(cells, 1, 64)
    neck = 2.0 * cells * (width * 256 + 9 * 256 * 256)
    embed = 2.0 * cells * 3 * 256 * width
    assert cost.flops == pytest.approx(blocks + neck + embed, rel=0.02)
    # The positions of one global layer: 12 heads, 4096 by 4096, in float32.
    scores = 12 * cells * cells * 4
    assert scores < cost.working_bytes < 4 * scores


@pytest.mark.parametrize(
    ("model", "twin"),
    [
        (
            "vit_base_patch16_clip_224.openai",
            "vit_base_patch16_clip_quickgelu_224.openai",
        ),
        (
            "vit_huge_patch14_clip_378.dfn5b",
            "vit_huge_patch14_clip_quickgelu_378.dfn5b",
        ),
        (
            "vit_large_patch14_clip_224.metaclip_400m",
            "vit_large_patch14_clip_quickgelu_224.metaclip_400m",
        ),
    ],
)
def test_weights_that_want_another_activation_are_refused(
    model: str, twin: str, open_one: Open, tmp_path: Any
) -> None:
    (tmp_path / "staged.safetensors").write_bytes(b"as yet unread")
    for weights in (None, "./staged.safetensors"):
        with pytest.raises(TeacherError, match=f"write model: timm:{twin}"):
            open_one(f"timm:{model}", ["embed"], weights=weights, device="meta")
    open_one(f"timm:{twin}", ["embed"], weights="./staged.safetensors", device="meta")
