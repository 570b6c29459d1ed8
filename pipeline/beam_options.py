"""Beam's options: the defaults, and the refusal of what Beam would ignore.

Imports Beam only to check, so that a finished job needs none.
"""

from __future__ import annotations

import argparse
import contextlib
import difflib
import io
import logging
import re
from collections.abc import Sequence

from pipeline.errors import PipelineError

DEFAULT_RUNNER = "FnApiRunner"


def complete_options(given: Sequence[str]) -> list[str]:
    """Returns the options with a runner: FnApiRunner where none is named.

    Beam's own default, DirectRunner, first tries to download another one.
    """
    is_named = any(option.split("=")[0] == "--runner" for option in given)
    return [*([] if is_named else [f"--runner={DEFAULT_RUNNER}"]), *given]


def run_here(options: Sequence[str]) -> bool:
    """Whether the workers are threads of this process."""
    return f"--runner={DEFAULT_RUNNER}" in options and not any(
        "multi_processing" in option for option in options
    )


def check_options(options: Sequence[str]) -> None:
    """Checks what Beam itself would print usage for, ignore, or notice in mid-run.

    Options that are unknown here may be known to a portable runner's service, so they
    are refused only where the workers are threads of this process.

    Raises:
        PipelineError: an option or the runner is unknown, or a value of a wrong type.
    """
    # Beam warns at import about Google's optional libraries, which not every run needs,
    # and of unknown options, which are errors here.
    logging.disable(logging.WARNING)
    try:
        _check(options)
    finally:
        logging.disable(logging.NOTSET)


def _check(options: Sequence[str]) -> None:
    from apache_beam.options.pipeline_options import PipelineOptions, StandardOptions
    from apache_beam.runners.runner import create_runner

    parsers: list[argparse.ArgumentParser] = []
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            parsed = PipelineOptions(list(options))
            parsed.get_all_options(add_extra_args_fn=parsers.append)
            runner = parsed.view_as(StandardOptions).runner
    except SystemExit as error:
        reason = said.getvalue().strip().rpartition("error: ")[2]
        raise PipelineError(
            f"Beam options after `--`: {reason}; see Beam's pipeline options"
        ) from error
    _, unknown = parsers[0].parse_known_args(list(options))
    if unknown and run_here(options):
        names = re.findall(r"--[a-z][a-z0-9_]*", parsers[0].format_help())
        near = difflib.get_close_matches(unknown[0].split("=")[0], names, n=1)
        raise PipelineError(
            f"Beam options after `--`: Beam has no {unknown[0]}"
            + (f"; did you mean {near[0]}?" if near else "; correct or remove it")
        )
    try:
        create_runner(runner)
    except (ValueError, ImportError, AttributeError) as error:
        raise PipelineError(
            f"Beam options after `--`: runner {runner!r} cannot be had ({error})"
        ) from error
