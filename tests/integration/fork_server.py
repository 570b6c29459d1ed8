"""A process that has imported everything and runs the command line in forked children.

Each child is a real process that really dies, without three seconds of imports each. A
child can be made to end itself at a chosen write to the bank: writes are counted where
they become visible, at ``os.link``, ``os.replace`` and ``os.unlink``.

Speaks one line of JSON each way; run as a script by ``ForkServer``.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


class ForkServer:
    """The pytest side: runs one command line after the other."""

    def __init__(self):
        self._process = subprocess.Popen(
            [sys.executable, __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        )

    def run(self, *commands, kill=None, log=None, timeout=120):
        """Runs command lines at the same time; returns what became of each.

        Args:
            commands: lists of arguments of ``teachonce``.
            kill: where the process kills itself: ``{"write": n}`` for the n-th write,
                or ``{"match": regex, "nth": k}``; with ``"when"`` before or after it. A
                list has one for each command.
            log: file that gets a line per write.
            timeout: seconds after which a child is killed; it then has code None.

        Returns:
            A dict with code, output, seconds and ``calls`` (lines that teachers wrote
            to the file in the environment variable CALLS) for each; one dict for one
            command.
        """
        request = {
            "commands": [[str(part) for part in one] for one in commands],
            "kills": kill if isinstance(kill, list) else [kill] * len(commands),
            "log": str(log) if log else None,
            "timeout": timeout,
        }
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        answers = json.loads(self._process.stdout.readline())
        return answers[0] if len(commands) == 1 else answers

    def close(self):
        self._process.stdin.close()
        self._process.stdout.close()
        self._process.wait(timeout=30)


def _watch_writes(kill, log):
    """Counts writes to banks; ends the process at the chosen one."""
    import threading

    lock = threading.Lock()
    count = {"writes": 0, "matches": 0}
    link, replace, unlink = os.link, os.replace, os.unlink

    def visible(path):
        with lock:
            number = count["writes"]
            count["writes"] += 1
            if log:
                with open(log, "a") as file:
                    file.write(f"{path}\n")
            if kill is None:
                return False
            if "write" in kill:
                return number == kill["write"]
            if not re.search(kill["match"], path):
                return False
            count["matches"] += 1
            return count["matches"] - 1 == kill.get("nth", 0)

    def wrapped(call):
        def write(*arguments, **named):
            path = str(arguments[-1])
            # A link into a folder that is not there yet fails and is tried again.
            counts = "/.tmp/" not in path and os.path.isdir(os.path.dirname(path))
            is_chosen = counts and visible(path)
            if is_chosen and kill["when"] == "before":
                os.kill(os.getpid(), signal.SIGKILL)
            done = call(*arguments, **named)
            if is_chosen:
                os.kill(os.getpid(), signal.SIGKILL)
            return done

        return write

    os.link, os.replace, os.unlink = wrapped(link), wrapped(replace), wrapped(unlink)


def _calls(output):
    return output.with_suffix(".calls")


def _child(arguments, output, kill, log):
    os.environ["CALLS"] = str(_calls(output))
    sink = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    os.dup2(sink, 1)
    os.dup2(sink, 2)
    _watch_writes(kill, log)
    from teachonce.cli import main

    code = main(arguments)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _num_lines(path):
    return len(path.read_text().splitlines()) if path.exists() else 0


def _answer(request, folder):
    started = time.monotonic()
    children = {}
    for number, arguments in enumerate(request["commands"]):
        output = folder / f"output-{number}"
        _calls(output).unlink(missing_ok=True)
        pid = os.fork()
        if pid == 0:
            try:
                _child(arguments, output, request["kills"][number], request["log"])
            except BaseException:
                import traceback

                traceback.print_exc()
                sys.stderr.flush()
            os._exit(99)
        children[pid] = (number, output)
    answers = [{} for _ in children]
    while children:
        pid, status = os.waitpid(-1, os.WNOHANG)
        if pid == 0:
            if time.monotonic() - started > request["timeout"]:
                for late in children:
                    os.kill(late, signal.SIGKILL)
                request["timeout"] = float("inf")
            time.sleep(0.01)
            continue
        number, output = children.pop(pid)
        answers[number] = {
            "code": os.waitstatus_to_exitcode(status),
            "output": output.read_text(),
            "seconds": time.monotonic() - started,
            "calls": _num_lines(_calls(output)),
        }
    return answers


def _serve():
    import gc
    import logging
    import tempfile

    logging.disable(logging.WARNING)
    import apache_beam
    import apache_beam.runners.portability.fn_api_runner
    import torch

    logging.disable(logging.NOTSET)
    import pipeline.bank.export
    import pipeline.engine
    import pipeline.precompute
    import pipeline.transform
    import teachers.module_family
    import teachonce.cli
    import teachonce.verbs.export
    import teachonce.verbs.finalise
    import teachonce.verbs.precompute

    assert all((apache_beam, pipeline.transform, teachonce.verbs, teachers))
    # Shapes come from the meta device, whose first use imports another 2 s of torch.
    torch.relu(torch.empty(2, device="meta"))
    # What a child's collector would look through, and so copy, page by page.
    gc.freeze()
    with tempfile.TemporaryDirectory() as folder:
        for line in sys.stdin:
            answers = _answer(json.loads(line), Path(folder))
            sys.stdout.write(json.dumps(answers) + "\n")
            sys.stdout.flush()


if __name__ == "__main__":
    _serve()
