"""Which failures of a store may pass, and how often it is asked."""

from __future__ import annotations

import errno

import pytest

from manifests import retrying
from manifests.retrying import may_pass


class Answered(Exception):
    def __init__(self, **facts):
        super().__init__(str(facts))
        vars(self).update(facts)


class HTTPClientError(Exception):
    """Of botocore, by its name."""


PASSES = [
    TimeoutError(),
    ConnectionResetError(errno.ECONNRESET, "reset"),
    OSError(errno.EIO, "what s3fs makes of a code it does not know"),
    OSError(errno.EBUSY, "slow down"),
    OSError("what gcsfs makes of it"),
    Answered(status=503),
    Answered(code=429),
    Answered(status_code=500),
    HTTPClientError(),
]
LASTS = [
    FileNotFoundError("x"),
    FileExistsError("x"),
    PermissionError("x"),
    OSError("Forbidden: gs://a/b"),
    OSError(errno.ENOSPC, "full"),
    OSError(errno.EROFS, "read-only"),
    Answered(status=400),
    Answered(code=401),
    ValueError("x"),
    KeyError("x"),
]


@pytest.mark.parametrize("error", PASSES, ids=repr)
def test_what_may_pass(error):
    assert may_pass(error)


@pytest.mark.parametrize("error", LASTS, ids=repr)
def test_what_lasts(error):
    assert not may_pass(error)


def failing(times, error):
    calls = []

    def call():
        calls.append(1)
        if len(calls) <= times:
            raise error
        return len(calls)

    return call, calls


def test_waits_grow_and_are_spread(monkeypatch):
    waited = []
    monkeypatch.setattr(retrying.time, "sleep", waited.append)
    call, calls = failing(9, TimeoutError())
    with pytest.raises(TimeoutError):
        retrying.retrying(call)
    assert len(calls) == len(retrying.WAITS_S) + 1
    for wait, told in zip(waited, retrying.WAITS_S, strict=True):
        assert 0.5 * told <= wait <= 1.5 * told
    assert 10 < sum(retrying.WAITS_S) < 30


def test_it_ends_when_it_passes(monkeypatch):
    monkeypatch.setattr(retrying.time, "sleep", lambda wait: None)
    call, calls = failing(2, OSError(errno.EIO, "x"))
    assert retrying.retrying(call) == 3
    assert len(calls) == 3


def test_what_lasts_is_asked_once():
    call, calls = failing(1, PermissionError("x"))
    with pytest.raises(PermissionError):
        retrying.retrying(call)
    assert len(calls) == 1
