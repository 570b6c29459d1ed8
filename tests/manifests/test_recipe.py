"""Recipes and probes: from YAML to checked documents; errors say what to write."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from pydantic import ValidationError

from manifests.errors import ManifestError
from manifests.recipe import MapLabel, Recipe, RowsConfig, StageConfig
from manifests.recipe_loading import load_probe, load_recipe
from manifests.target import HeadConfig
from manifests.teacher import BevExtent
from manifests.yaml_text import apply_overrides

TARGET = {"from": "proxy/eupe_g/cls", "loss": {"cosine": 1.0}}
STAGE = {"steps": 10, "batch": 8, "lr": 0.1}
MINIMAL = {
    "run": "./run",
    "banks": {"proxy": "./bank"},
    "student": {"model": "timm:test_vit", "input": "image"},
    "targets": {"cls": TARGET},
    "stages": [STAGE],
}
ROWS = {"shards": ["a"]}
PROBE = {
    "banks": {"proxy": "./bank"},
    "students": {"mine": "./run"},
    "splits": {"fit": ROWS, "choose": ROWS, "test": {"shards": ["b"]}},
    "probes": {"classes": {"label": "proxy/labels/class"}},
}
EXAMPLE = """\
run: ./runs/eupe-vits
banks: {proxy: gs://acme-banks/in1k-proxy-v1}
data: {shards: "/mnt/nvme/imagenet/train-{000000..001023}.tar"}
student: {model: timm:vit_small_patch16_dinov3.lvd1689m, input: image}
targets:
  cls:
    from: proxy/eupe_g/cls
    head: {kind: adapter, hidden: 3072}
    loss: {cosine: 1.0}
  patch:
    from: proxy/eupe_g/patch
    head: {kind: adapter, hidden: 3072}
    loss: {cosine: 0.9, smooth_l1: 0.1}
    grid: larger
normalise: standardise
loader: {workers: 8, window_blocks: 8, view: epoch}
optimizer: {kind: adamw, weight_decay: 1.0e-4, clip_norm: 3.0}
stages:
  - name: fixed
    steps: 390000
    batch: 8192
    lr: 2.0e-5
    warmup_steps: 4000
    schedule: cosine
    size: 256
  - {name: pyramid, steps: 100000, batch: 4096, lr: 1.0e-5, size: [256, 384, 512]}
precision: bfloat16
seed: 0
"""


def write(folder: Path, document, text: str | None = None) -> str:
    path = folder / "document.yaml"
    path.write_text(text if text is not None else yaml.safe_dump(document))
    return str(path)


def with_target(**fields):
    return {"targets": {"cls": {**TARGET, **fields}}}


def with_stage(**fields):
    return {"stages": [{**STAGE, **fields}]}


def with_map(**fields):
    return {"data": {"labels": {"seg": {"member": "seg.png", **fields}}}}


def test_the_example_of_the_design(tmp_path):
    recipe = load_recipe(write(tmp_path, None, EXAMPLE))
    assert recipe.run == f"{tmp_path}/runs/eupe-vits"
    assert recipe.banks == {"proxy": "gs://acme-banks/in1k-proxy-v1"}
    assert recipe.data.shards == ["/mnt/nvme/imagenet/train-{000000..001023}.tar"]
    patch = recipe.targets["patch"]
    assert patch.source == "proxy/eupe_g/patch"
    assert {name: one.weight for name, one in patch.loss.items()} == {
        "cosine": 0.9,
        "smooth_l1": 0.1,
    }
    assert (patch.head.kind, patch.head.hidden) == ("adapter", 3072)
    assert (recipe.loader.workers, recipe.loader.view) == (8, "epoch")
    assert (recipe.optimizer.weight_decay, recipe.optimizer.clip_norm) == (1e-4, 3.0)
    fixed, pyramid = recipe.stages
    assert (fixed.steps, fixed.warmup_steps, fixed.lr) == (390_000, 4000, 2e-5)
    assert (fixed.sizes, pyramid.sizes) == ([256], [256, 384, 512])
    assert recipe.precision == "bfloat16"


def test_defaults(tmp_path):
    recipe = load_recipe(write(tmp_path, MINIMAL))
    assert recipe.normalise == "standardise"
    assert recipe.data.rows == RowsConfig()
    assert recipe.data.shards is None
    assert recipe.stages[0].sizes == []
    assert recipe.student.weights is None
    assert recipe.precision == "float32"
    assert (recipe.loader.window_blocks, recipe.loader.prefetch) == (8, 3)


def test_what_is_stored_comes_back(tmp_path):
    """The resolved document is kept with what it made, as JSON."""
    fields = {
        **MINIMAL,
        **with_stage(size=[[96, 192], 256]),
        **with_map(input="image", num_classes=3),
    }
    for recipe in (
        load_recipe(write(tmp_path, None, EXAMPLE)),
        load_recipe(write(tmp_path, fields)),
    ):
        text = recipe.model_dump_json(by_alias=True)
        again = Recipe.model_validate_json(text)
        assert again == recipe
        assert [stage.sizes for stage in again.stages] == [
            stage.sizes for stage in recipe.stages
        ]


def test_paths_start_at_the_yaml(tmp_path, monkeypatch):
    monkeypatch.chdir("/")
    data = {"shards": ["../data/*.tar", "s3://acme/b.tar"], "rows": {"keys": "k.txt"}}
    fields = {**MINIMAL, "data": data}

    def student(**changes):
        given = {**fields, "student": {**MINIMAL["student"], **changes}}
        return load_recipe(write(tmp_path, given))

    recipe = student(model="module:./nets.py:Net", weights="./w.safetensors")
    assert recipe.run == f"{tmp_path}/run"
    assert recipe.banks == {"proxy": f"{tmp_path}/bank"}
    assert recipe.data.shards == [f"{tmp_path.parent}/data/*.tar", "s3://acme/b.tar"]
    assert recipe.data.rows.keys == f"{tmp_path}/k.txt"
    assert recipe.student.model == f"module:{tmp_path}/nets.py:Net"
    assert recipe.student.weights == f"{tmp_path}/w.safetensors"
    for weights in ("pretrained", "random", "random:3"):
        assert student(weights=weights).student.weights == weights


def test_paths_of_a_probe(tmp_path, monkeypatch):
    monkeypatch.chdir("/")
    keys = {"keys": "lists/fit.txt"}
    fields = {
        **PROBE,
        "splits": {**PROBE["splits"], "fit": keys},
        "data": {"shards": "./data/*.tar"},
        "result": "scores.json",
        "students": {"mine": "runs/a", "other": "gs://acme/runs/b"},
    }
    probe = load_probe(write(tmp_path, fields))
    assert probe.banks == {"proxy": f"{tmp_path}/bank"}
    assert probe.splits.fit.keys == f"{tmp_path}/lists/fit.txt"
    assert probe.splits.test.keys is None
    assert probe.data.shards == [f"{tmp_path}/data/*.tar"]
    assert probe.result == f"{tmp_path}/scores.json"
    assert probe.students == {"mine": f"{tmp_path}/runs/a", "other": "gs://acme/runs/b"}
    plain = load_probe(write(tmp_path, PROBE))
    assert plain.result is None
    assert plain.teachers is None


@pytest.mark.parametrize(
    ("size", "sizes"),
    [
        (None, []),
        (256, [256]),
        ([256], [256]),
        ([256, 384], [256, 384]),
        ([256, 384, 512], [256, 384, 512]),
        ([[96, 192]], [(96, 192)]),
        ([[96, 192], [128, 256]], [(96, 192), (128, 256)]),
        ([[96, 192], 256], [(96, 192), 256]),
    ],
)
def test_sizes(tmp_path, size, sizes):
    stage = load_recipe(write(tmp_path, {**MINIMAL, **with_stage(size=size)})).stages[0]
    assert stage.sizes == sizes
    assert StageConfig.model_validate(stage.model_dump()).sizes == sizes


def test_a_loss_is_its_weight_or_more(tmp_path):
    loss = {"cosine": 1, "kl": {"weight": 2, "temperature": 4}, "smooth_l1": {}}
    recipe = load_recipe(write(tmp_path, {**MINIMAL, **with_target(loss=loss)}))
    found = recipe.targets["cls"].loss
    assert {name: one.weight for name, one in found.items()} == {
        "cosine": 1.0,
        "kl": 2.0,
        "smooth_l1": 1.0,
    }
    assert found["kl"].temperature == 4.0


def test_overrides_reach_into_lists(tmp_path):
    path = write(tmp_path, None, EXAMPLE)
    recipe = load_recipe(
        path,
        [
            "stages.0.steps=5",
            "stages.0.warmup_steps=1",
            "stages.1.size=[128, [96, 192]]",
            "targets.patch.loss.cosine=0.5",
            "targets.patch.head.hidden=7",
            "loader.view=0",
            "optimizer.clip_norm=null",
        ],
    )
    assert [stage.steps for stage in recipe.stages] == [5, 100_000]
    assert recipe.stages[1].sizes == [128, (96, 192)]
    assert recipe.targets["patch"].loss["cosine"].weight == 0.5
    assert recipe.targets["patch"].head.hidden == 7
    assert recipe.loader.view == 0
    assert recipe.optimizer.clip_norm is None
    whole = load_recipe(path, ["stages.1={name: x, epochs: 2, batch: 4, lr: 1}"])
    assert (whole.stages[1].name, whole.stages[1].epochs) == ("x", 2)


def test_places_in_lists_of_lists():
    data = {"a": [{"b": [1, 2]}, [3, 4]]}
    apply_overrides(data, ["a.0.b.1=9", "a.1.0=[7]", "a.0.c=x"])
    assert data == {"a": [{"b": [1, 9], "c": "x"}, [[7], 4]]}


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("stages.2.steps=5", "stages.2.steps=5': 2 must be a place in a list of 2, co"),
        (
            "stages.first.steps=5",
            "first must be a place in a list of 2, counted from 0",
        ),
        ("stages.-1.steps=5", "-1 must be a place in a list of 2"),
        ("stages.7={}", "7 must be a place in a list of 2"),
        ("stages.0.steps.x=5", "steps is a value, not a mapping; give the whole of it"),
        ("stages..steps=5", "override must be key=value"),
    ],
)
def test_places_that_are_not_there(tmp_path, override, message):
    with pytest.raises(ManifestError) as caught:
        load_recipe(write(tmp_path, None, EXAMPLE), [override])
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"sead": 1}, "sead: no such field; did you mean seed?"),
        ({"banks": {}}, "banks: dictionary should have at least 1 item"),
        ({"banks": {"a": "x", "b": "y"}}, "banks: dictionary should have at most 1"),
        ({"banks": {"data": "x"}}, "name of bank must not be data: labels are called"),
        ({"banks": {"In1k": "x"}}, "name of bank must be lower-case letters"),
        ({"targets": {}}, "targets: dictionary should have at least 1 item"),
        (
            {"targets": {"A b": TARGET}},
            "name of target must be lower-case letters, dig",
        ),
        ({"stages": []}, "stages: list should have at least 1 item"),
        ({"stages": [STAGE, STAGE]}, "must have different names, got ['train', 'train"),
        ({"normalise": "pca"}, "normalise: must be 'none', 'standardise', 'phi_s' or "),
        ({"balance": {"kind": "drop"}}, "balance.kind: must be 'fixed' or 'drop_tea"),
        ({"balance": {"p": 0.5}}, "balance: `p` is of `kind: drop_teachers`"),
        (
            {"balance": {"kind": "drop_teachers", "p": 1}},
            "balance.p: input should be less than 1",
        ),
        (
            with_target(normalise="standardize"),
            "targets.cls.normalise: must be 'none', 'standardise', 'phi_s' or 'whiten'",
        ),
        (with_target(grid="same"), "targets.cls.grid: must be 'larger', 'smaller', "),
        ({"precision": "float64"}, "precision: must be 'float32', 'bfloat16' or "),
        ({"seed": -1}, "seed: input should be greater than or equal to 0"),
        ({"seed": 2**63}, "seed: input should be less than 9223372036854775808"),
        ({"student": {"model": "timm:x"}}, "student.input: missing, it must be given"),
        (
            {"student": {"model": "vit", "input": "image"}},
            "student.model: must be timm:NAME or module:FILE.py:CLASS, got vit",
        ),
        (
            {"student": {"model": "timm:", "input": "image"}},
            "must be timm:NAME or module:FILE.py:CLASS, got timm:",
        ),
        (
            {"student": {"model": "module:nets.py", "input": "image"}},
            "student.model must be module:FILE.py:CLASS, got 'module:nets.py'",
        ),
        (
            {"student": {**MINIMAL["student"], "interpolation": "bicubik"}},
            "student.interpolation: must be 'bilinear', 'bicubic', 'lanczos' or 'near",
        ),
        (with_target(loss={}), "targets.cls.loss: dictionary should have at least 1"),
        (with_target(loss=3), "targets.cls.loss: input should be a valid dictionary"),
        (
            with_target(loss={"cosine": -1}),
            "targets.cls.loss.cosine: input should be greater than or equal to 0",
        ),
        (
            with_target(loss={"kl": {"temprature": 4}}),
            "targets.cls.loss.kl.temprature: no such field; did you mean temperature?",
        ),
        (
            with_target(loss={"kl": {"temperature": 0}}),
            "targets.cls.loss.kl.temperature: input should be greater than 0",
        ),
        (
            with_target(loss={"smooth_l1": {"beta": 0}}),
            "loss.smooth_l1.beta: input should be greater than 0",
        ),
        (
            with_target(loss={"cross_entropy": {"label_smoothing": 1}}),
            "label_smoothing: input should be less than 1",
        ),
        (
            with_target(head={"hidden": 0}),
            "head.hidden: input should be greater than o",
        ),
        (with_target(head={"kind": "bev", "heights_m": []}), "head.heights_m: "),
        (
            with_target(grid="both"),
            "targets.cls.grid: must be 'larger', 'smaller', 'st",
        ),
        (
            with_target(tokens="all"),
            "targets.cls.tokens: must be 'cls', 'pooled' or 'p",
        ),
        (
            {"targets": {"cls": {"loss": {"cosine": 1}}}},
            "targets.cls.from: missing, it must be given",
        ),
        (
            with_target(head={"same_as": "patch"}),
            "targets.cls.head.same_as must be a target with a head of its own, got 'p",
        ),
        (with_stage(steps=None), "give `steps` or `epochs`, one of them"),
        (with_stage(epochs=3), "stages.0: give `steps` or `epochs`, one of them"),
        (
            with_stage(warmup_steps=10),
            "warmup_steps must be fewer than steps (10), got 1",
        ),
        (with_stage(batch=0), "stages.0.batch: input should be greater than or equal"),
        (with_stage(lr=0), "stages.0.lr: input should be greater than 0"),
        (
            with_stage(final_lr=1.5),
            "stages.0.final_lr: input should be less than or eq",
        ),
        (
            with_stage(schedule="step"),
            "stages.0.schedule: must be 'cosine', 'constant'",
        ),
        (
            with_stage(size=[]),
            "stages.0.size: must be 256, [256, 384] or [[96, 192]], ",
        ),
        (
            with_stage(size="256x256"),
            "must be 256, [256, 384] or [[96, 192]], got '256x",
        ),
        (with_stage(size=0), "stages.0.size"),
        (with_stage(size=[[96]]), "stages.0.size.0"),
        (with_stage(size=[[96, 192, 3]]), "stages.0.size.0"),
        ({"loader": {"view": "random"}}, "loader.view: "),
        ({"loader": {"view": -1}}, "loader.view: "),
        (
            {"loader": {"window_blocks": 0}},
            "loader.window_blocks: input should be grea",
        ),
        ({"loader": {"workers": -1}}, "loader.workers: input should be greater than o"),
        ({"optimizer": {"kind": "adam"}}, "optimizer.kind: must be 'adamw' or 'sgd'"),
        ({"optimizer": {"clip_norm": 0}}, "optimizer.clip_norm: input should be grea"),
        (
            {"data": {"rows": {"share": [0.5, 0.5]}}},
            "data.rows.share: must be 0 <= low < high <= 1, got [0.5, 0.5]",
        ),
        ({"data": {"rows": {"share": [0, 1.1]}}}, "must be 0 <= low < high <= 1"),
        ({"data": {"rows": {"limit": 0}}}, "data.rows.limit: input should be greater "),
        (
            {"data": {"rows": {"shards": []}}},
            "data.rows.shards: list should have at le",
        ),
        (with_map(), "data.labels.seg: give `input` (labels its pixels) or `extent`"),
        (
            with_map(input="image", extent={"x_m": [0, 1], "y_m": [0, 1]}),
            "give `input` (labels its pixels) or `extent`, not both",
        ),
        (
            with_map(input="image", num_classes=3, scale=0.1),
            "`scale` and `log` are of numbers, not of classes",
        ),
        (
            with_map(input="image", num_classes=3, log=True),
            "`scale` and `log` are of nu",
        ),
        (with_map(input="image", scale=0), "seg.scale: input should be greater than 0"),
        (
            with_map(extent={"x_m": [1, 1], "y_m": [0, 1]}),
            "data.labels.seg.extent.x_m: must be low < high, got [1.0, 1.0]",
        ),
        (
            with_map(extent={"x_m": [0, 1], "y_m": [2, 1]}),
            "data.labels.seg.extent.y_m: must be low < high, got [2.0, 1.0]",
        ),
        (
            with_map(extent={"x_m": [0, 1], "y_m": [0, 1], "row_0": "top"}),
            "extent.row_0: must be 'x_max' or 'x_min'",
        ),
        (
            {"data": {"labels": {"Seg": {"member": "x", "input": "image"}}}},
            "name of label must be lower-case",
        ),
    ],
)
def test_rules_of_a_recipe(tmp_path, fields, message):
    with pytest.raises(ManifestError) as caught:
        load_recipe(write(tmp_path, {**MINIMAL, **fields}))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def with_future(**fields):
    future = {"waypoints": [["x1", "y1"]], "step_s": 0.5, "speed": "v"}
    return {"trajectories": {"far": {**future, **fields}}}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"students": {}, "teachers": {}},
            "give `students` or `teachers`: there is nothing to score",
        ),
        ({"probes": {}}, "probes: dictionary should have at least 1 item"),
        ({"splits": {"fit": ROWS, "choose": ROWS}}, "splits.test: missing, it must be"),
        (
            {"splits": {**PROBE["splits"], "tset": ROWS}},
            "splits.tset: no such field; d",
        ),
        (
            {"probes": {"a": {"label": "x", "kinds": ["svm"]}}},
            "probes.a.kinds.0: must be 'knn', 'linear' or 'dense'",
        ),
        ({"probes": {"a": {"label": "x", "grid": [3]}}}, "probes.a.grid.1: missing"),
        (
            {"probes": {"a": {"label": "x", "classifier": "c", "kinds": ["knn"]}}},
            "probes.a: `classifier` is a way of asking by itself: leave out `kinds`",
        ),
        ({"batch": 0}, "batch: input should be greater than or equal to 1"),
        ({"banks": {"data": "x"}}, "name of bank must not be data"),
        ({"banks": {"trajectories": "x"}}, "name of bank must not be trajectories"),
        (
            with_future(waypoints=[["x1", "y1"], ["x2", "y1"]]),
            "trajectories.far: `waypoints` must name each label once, got y1",
        ),
        (
            with_future(ego=["x1"]),
            "the state must tell nothing of the future, got x1 in both",
        ),
        (with_future(step_s=0), "trajectories.far.step_s: input should be greater"),
        ({"banks": {}}, "banks: dictionary should have at least 1 item"),
    ],
)
def test_rules_of_a_probe(tmp_path, fields, message):
    with pytest.raises(ManifestError) as caught:
        load_probe(write(tmp_path, {**PROBE, **fields}))
    assert message in str(caught.value)


def test_teachers_alone_can_be_probed(tmp_path):
    probe = load_probe(write(tmp_path, {**PROBE, "students": {}}))
    assert probe.students == {}
    chosen = {**PROBE, "students": {}, "teachers": {"dino": ["dino/cls"]}}
    assert load_probe(write(tmp_path, chosen)).teachers == {"dino": ["dino/cls"]}


def test_a_head_may_be_anothers(tmp_path):
    targets = {"cls": TARGET, "class": {**TARGET, "head": {"same_as": "cls"}}}
    recipe = load_recipe(write(tmp_path, {**MINIMAL, "targets": targets}))
    assert recipe.targets["class"].head.same_as == "cls"
    targets["cls"] = {**TARGET, "head": {"same_as": "class"}}
    with pytest.raises(ManifestError, match="must be a target with a head of its own"):
        load_recipe(write(tmp_path, {**MINIMAL, "targets": targets}))


def test_documents_are_named_when_they_are_missing(tmp_path):
    for load, what in ((load_recipe, "recipe"), (load_probe, "probe")):
        with pytest.raises(
            ManifestError, match=f"cannot read the {what}: .*nothing is"
        ):
            load(str(tmp_path / "none.yaml"))


def test_documents_are_frozen():
    extent = BevExtent(x_m=(0, 40), y_m=(-20, 20))
    assert (extent.row_0, extent.column_0) == ("x_max", "y_max")
    for model, name in (
        (extent, "x_m"),
        (MapLabel(member="x", input="image"), "member"),
        (HeadConfig(), "kind"),
    ):
        with pytest.raises(ValidationError, match="frozen"):
            setattr(model, name, "other")


def test_the_state_of_a_future_has_each_label_once(tmp_path):
    fields = {**PROBE, **with_future(yaw_rate="w", ego=["a", "v", "w"])}
    future = load_probe(write(tmp_path, fields)).trajectories["far"]
    assert future.state == ["v", "w", "a"]
    assert (future.turn_m, future.sequence) == (2.0, None)
