"""The text towers of open_clip's models, run once to make a zero-shot classifier.

Owns how a text tower is found, built without the image tower and fed. Its tokenizer is
open_clip's: in the package for CLIP's vocabulary, from the hub (with ``transformers``)
for SigLIP's and others.

Shape suffixes: N sentences, C channels.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import open_clip
import torch
from open_clip.model import _build_text_tower, convert_to_custom_text_state_dict
from torch import Tensor, nn

from teachers.errors import TeacherError
from teachers.interface import TeacherRequest, WeightsRecord
from teachers.open_clip_family import find_model, has_quick_gelu, tag_config
from teachers.torch_teacher import freeze, seeded
from teachers.weights import load_strict, local_path, read_state_dict
from teachers.zero_shot import Classifier, make_weight, sentences

_TOWER = "text."
_BATCH = 64
_DEFAULT_LOGIT_SCALE = math.log(1 / 0.07)
"""Source: Radford et al. 2021, section 2.5 (the temperature's first value)."""

Tokenizer = Callable[[list[str]], Tensor]


def make_classifier(
    request: TeacherRequest,
    weights: WeightsRecord,
    tokenize: Tokenizer,
    classes: Sequence[str],
    templates: Sequence[str],
    on_batch: Callable[[int], object] = lambda rows: None,
) -> Classifier:
    """Returns the classifier of class names, from one run of the text tower.

    Args:
        request: names the model and its weights.
        weights: as `registry.find_weights` found them.
        tokenize: of the model, from `find_tokenizer`.
        classes: names.
        templates: sentences with ``{}`` for the name.
        on_batch: told how many sentences were read, for a progress bar.

    Raises:
        TeacherError: the text tower cannot be had.
    """
    tower, scale, bias = open_tower(request, weights)
    texts = sentences(classes, templates)
    found: list[npt.NDArray[np.float32]] = []
    with torch.inference_mode():
        for start in range(0, len(texts), _BATCH):
            piece = texts[start : start + _BATCH]
            found.append(tower(tokenize(piece)).to(torch.float32).numpy())
            on_batch(len(piece))
    return Classifier(
        weight=make_weight(np.concatenate(found), len(templates)),
        scale=scale,
        bias=bias,
        classes=tuple(classes),
        templates=tuple(templates),
        model=request.config.model,
        weights_sha256=weights.sha256,
    )


def find_tokenizer(name: str) -> Tokenizer:
    """Returns what turns sentences into a model's tokens, (N, context) int64.

    Raises:
        TeacherError: it lies on the hub and cannot be had from there.
    """
    text = find_model(name)["text_cfg"]
    repo = text.get("hf_tokenizer_name")
    try:
        tokenizer: Tokenizer = open_clip.get_tokenizer(name)
    # What a missing package, network or file raises differs between tokenizers.
    except Exception as error:
        if not repo:
            raise
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise TeacherError(
            f"the tokenizer of open_clip:{name} must be in the hub's cache, got none "
            f"({repo}: {reason}); where there is a network `pip install transformers "
            f"sentencepiece`, fetch it (`hf download {repo} --include '*token*' "
            "'*.model' config.json`) and copy the cache's folder "
            f"models--{repo.replace('/', '--')} here, or make the classifier there: "
            "it is one small file, which jobs take from any path or gs:// URL"
        ) from error
    return tokenizer


def open_tower(
    request: TeacherRequest, weights: WeightsRecord
) -> tuple[nn.Module, float, float]:
    """Returns a text tower on the CPU, and the scale and bias of the model's logits.

    Raises:
        TeacherError: the file has no text tower, or not that of the model.
    """
    config = find_model(request.config.model_name)
    with seeded(weights.seed):
        tower = _build(request, config)
    if weights.kind == "random":
        scale = config.get("init_logit_scale", _DEFAULT_LOGIT_SCALE)
        return tower, math.exp(scale), float(config.get("init_logit_bias") or 0.0)
    with local_path(request, weights) as path:
        state = read_state_dict(path, weights.url)
    state = convert_to_custom_text_state_dict(state)
    own = {
        key.removeprefix(_TOWER): value
        for key, value in state.items()
        if key.startswith(_TOWER)
    }
    if not own or "logit_scale" not in state:
        raise TeacherError(
            f"weights must hold the text tower and logit_scale too, got "
            f"{', '.join(sorted({key.partition('.')[0] for key in state}))} "
            f"({weights.url}); name the file of the whole model"
        )
    # A buffer that older checkpoints of Hugging Face's towers have.
    own.pop("transformer.embeddings.position_ids", None)
    load_strict(tower, own, weights.url)
    bias = state.get("logit_bias")
    return (
        tower,
        math.exp(float(state["logit_scale"].reshape(()))),
        0.0 if bias is None else float(bias.reshape(())),
    )


def _build(request: TeacherRequest, config: Mapping[str, Any]) -> nn.Module:
    name = request.config.model_name
    text = {**config["text_cfg"], "hf_model_pretrained": False}
    quick_gelu = has_quick_gelu(config, tag_config(request))
    try:
        tower: Any = _build_text_tower(config["embed_dim"], text, quick_gelu)
    # As for tokenizers: towers of Hugging Face need its package and its hub.
    except Exception as error:
        if not text.get("hf_model_name"):
            raise
        raise TeacherError(
            f"the text tower of open_clip:{name} must be built by transformers, got "
            f"{type(error).__name__}: {error} ({text['hf_model_name']}); where there "
            "is a network `pip install transformers` and make the classifier there"
        ) from error
    tower.output_tokens = False
    return freeze(tower)
