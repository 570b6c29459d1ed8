"""Functions run by several real processes that train together, joined by gloo.

Processes are forked from one that has imported everything: a rank costs no seconds of
imports. ``torchrun`` itself is started by one test of the command line.
"""

from __future__ import annotations

import multiprocessing
import os
import socket
from collections.abc import Callable
from typing import Any

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["student_train.trainer", "tests.training"])
_TIMEOUT_S = 120


def run_ranks(count: int, function: Callable[..., Any], *args: Any) -> list[Any]:
    """Returns what a function of a module gave on each rank, or the error it raised.

    Args:
        count: ranks.
        function: called with ``args`` in each, with the environment of a launcher.
        args: that can be pickled.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    pipes = [_CONTEXT.Pipe(duplex=False) for _ in range(count)]
    processes = [
        _CONTEXT.Process(target=_rank, args=(n, count, port, sink, function, args))
        for n, (_, sink) in enumerate(pipes)
    ]
    for process in processes:
        process.start()
    try:
        found = []
        for source, sink in pipes:
            sink.close()
            assert source.poll(_TIMEOUT_S), "a rank hangs"
            found.append(source.recv())
        return found
    finally:
        for process in processes:
            process.kill()
            process.join()


def _rank(
    number: int,
    count: int,
    port: int,
    sink: Any,
    function: Callable[..., Any],
    args: tuple[Any, ...],
) -> None:
    told = {
        "RANK": number,
        "WORLD_SIZE": count,
        "LOCAL_RANK": number,
        "LOCAL_WORLD_SIZE": count,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
    }
    os.environ.update({name: str(value) for name, value in told.items()})
    try:
        sink.send(function(*args))
    except Exception as error:
        sink.send(f"{type(error).__name__}: {error}")
