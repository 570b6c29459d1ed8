"""``teachonce teachers``: which families there are, what a model gives."""

from __future__ import annotations

import argparse

from teachers import registry
from teachonce.verbs import text


def run(args: argparse.Namespace) -> int:
    """Lists families, or describes one model."""
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
        for name, value in facts.items():
            if isinstance(value, dict):
                print(f"{name}:")
                for key, one in value.items():
                    print(f"  {key}: {one}")
            else:
                print(f"{name}: {value}")
    return 0
