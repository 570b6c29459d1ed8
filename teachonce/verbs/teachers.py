"""``teachonce teachers``: which families there are, what a model gives, its classifier.

With ``--classes`` the text tower of a contrastive model runs once and leaves a file
that jobs name: `teachers.zero_shot`.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Mapping, Sequence
from typing import Any

import yaml
from tqdm import tqdm

from manifests.loading import folder_of, parse_document
from manifests.storage import Store, read_url
from manifests.teacher import TeacherConfig
from teachers import registry
from teachers.errors import TeacherError
from teachers.interface import GroupInput, TeacherRequest
from teachers.zero_shot import (
    CIFAR_TEMPLATES,
    check_names,
    check_templates,
    read_classifier,
    to_text,
)
from teachonce.verbs import text

_OF_CLASSIFIER = ("weights", "templates", "to")


def run(args: argparse.Namespace) -> int:
    """Lists families, describes one model, or makes its zero-shot classifier."""
    if args.classes is not None:
        return _make_classifier(args)
    for name in _OF_CLASSIFIER:
        if getattr(args, name) is not None:
            raise TeacherError(f"--{name} must come with --classes FILE; leave it out")
    if args.name is None:
        found = registry.families()
        if args.json:
            text.print_json(dict(found))
        else:
            print(text.table(("family", "what"), found))
        return 0
    facts = registry.describe(args.name)
    if args.json:
        text.print_json(facts)
    else:
        _print(facts)
    return 0


def _print(facts: Mapping[str, Any]) -> None:
    # By way of JSON: YAML has no tuples.
    plain = json.loads(json.dumps(facts, default=str))
    shown = yaml.safe_dump(
        plain, sort_keys=False, default_flow_style=None, width=88, allow_unicode=True
    )
    print(shown.rstrip())


def _make_classifier(args: argparse.Namespace) -> int:
    if args.name is None or args.to is None:
        raise TeacherError(
            "--classes must come with a model and --to FILE: teachonce teachers "
            "open_clip:NAME --weights TAG --classes classes.txt --to zero.safetensors"
        )
    family, _, _ = args.name.partition(":")
    if family != "open_clip":
        raise TeacherError(
            f"a classifier must be made by an open_clip: model, got {args.name}; it "
            "serves timm: models of the same weights too"
        )
    classes = check_names(_lines(args.classes), args.classes)
    templates: Sequence[str] = CIFAR_TEMPLATES
    if args.templates is not None:
        templates = check_templates(_lines(args.templates), args.templates)
    asked = {"model": args.name, "weights": args.weights, "outputs": {"embed": {}}}
    config = parse_document(TeacherConfig, asked, args.name)
    request = TeacherRequest(
        "classifier", config, (GroupInput("image", "image"),), os.getcwd()
    )
    from teachers.text_tower import find_tokenizer, make_classifier

    # Before the weights, which may be gigabytes to fetch.
    tokenize = find_tokenizer(config.model_name)
    weights = registry.find_weights(request)
    total = len(classes) * len(templates)
    with tqdm(total=total, unit="sentence", disable=None, leave=False) as bar:
        made = make_classifier(
            request, weights, tokenize, classes, templates, lambda n: bar.update(n)
        )
    folder, name = folder_of(args.to), args.to.rpartition("/")[2]
    Store(folder).replace(name, made.to_bytes())
    facts = read_classifier(args.to, args.to).to_json()
    if args.json:
        text.print_json(facts)
    else:
        print(f"{args.to}: {to_text(facts)}")
    return 0


def _lines(path: str) -> list[str]:
    try:
        return read_url(path).decode().splitlines()
    except UnicodeDecodeError as error:
        raise TeacherError(f"{path} must be UTF-8 text, got {error}") from error
