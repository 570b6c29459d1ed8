"""The command line: ``teachonce VERB``.

Owns exit codes and one-line errors; arguments are in ``arguments``. A verb's work is
imported when it runs. Exit 0: done. 1: it ran, but something is wrong and was said. 2:
unusable input, nothing was done.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Sequence

from teachonce.arguments import make_parser
from teachonce.environment import (
    ForeignPackageError,
    check_packages,
    explain_missing,
)

DONE, WRONG, UNUSABLE = 0, 1, 2


def _parse(given: Sequence[str]) -> argparse.Namespace:
    """Returns the arguments; overrides may stand before and behind options."""
    parser = make_parser()
    args, rest = parser.parse_known_args(given)
    overrides = getattr(args, "overrides", None)
    if rest and (overrides is None or any(text.startswith("-") for text in rest)):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if overrides is not None:
        args.overrides = [*overrides, *rest]
    if args.verb is None and not args.version:
        parser.print_help()
    return args


def _say(verb: str, error: object) -> None:
    """Prints an error as one line, whatever it holds."""
    text = " ".join(line.strip() for line in str(error).splitlines() if line.strip())
    print(f"teachonce {verb}: {text}", file=sys.stderr)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one verb; returns the exit code."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    beam_options: list[str] = []
    if "--" in given:
        cut = given.index("--")
        given, beam_options = given[:cut], given[cut + 1 :]
    args = _parse(given)
    if args.version:
        from teachonce import __version__

        print(f"teachonce {__version__}")
        return DONE
    if args.verb is None:
        return UNUSABLE
    args.beam_options = beam_options
    # Threads of torch spin while they wait for each other; beside another program two
    # are then slower than one (measured: 13 images/s instead of 84). Whoever sets it
    # otherwise is heard.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    try:
        check_packages()
    except ForeignPackageError as error:
        _say(args.verb, error)
        return UNUSABLE
    return _run(args)


def _run(args: argparse.Namespace) -> int:
    """Runs the verb of ``args``; returns the exit code, and says what went wrong."""
    from manifests.errors import TeachOnceError

    try:
        if args.beam_options and args.verb not in ("precompute", "plan"):
            raise TeachOnceError(f"{args.verb} takes no Beam options after `--`")
        module = importlib.import_module(f"teachonce.verbs.{args.verb}")
        code: int = module.run(args)
        return code
    except KeyboardInterrupt:
        again = "starts anew" if args.verb == "pack" else "goes on from here"
        print(f"teachonce: stopped; the same command {again}", file=sys.stderr)
        sys.stdout.flush()
        sys.stderr.flush()
        # Teachers' threads may be deep in a kernel; commits are whole by construction.
        os._exit(WRONG)
    except BrokenPipeError:
        return WRONG
    except ImportError as error:
        missing = explain_missing(error, args.verb)
        if missing is None:
            raise
        _say(args.verb, missing)
        return UNUSABLE
    except TeachOnceError as error:
        _say(args.verb, error)
        return WRONG if type(error).__name__ == "RunStopped" else UNUSABLE
    except OSError as error:
        _say(args.verb, error)
        return WRONG
