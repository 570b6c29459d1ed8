"""The bank's lock: one writer of metadata at a time.

Held for seconds while arrays are made, grown, finalised or repaired; never while
teachers run. Created create-only, kept alive by a heartbeat. A lock whose process died
on this machine is taken over at once; one from elsewhere is waited for, and broken only
by ``--break-lock``.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import platform
import tempfile
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from manifests.errors import BankError, StorageError
from manifests.storage import Store

LOCK_PATH = "lock.json"
HEARTBEAT_S = 15.0
STALE_S = 120.0


def _process_start(pid: int) -> str | None:
    """Returns what tells a process from a later one of the same number, or None."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    return text.rsplit(")", 1)[1].split()[19]


def _boot_id() -> str:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""


def make_owner(purpose: str) -> dict[str, Any]:
    """Returns who this process is, so that others can tell whether it still runs."""
    return {
        "id": uuid.uuid4().hex,
        "purpose": purpose,
        "host": platform.node(),
        "boot": _boot_id(),
        "pid": os.getpid(),
        "process_start": _process_start(os.getpid()),
        "heartbeat": time.time(),
    }


def died_here(owner: dict[str, Any]) -> bool:
    """Whether the owner was a process of this machine that no longer runs."""
    if owner.get("host") != platform.node() or not isinstance(owner.get("pid"), int):
        return False
    if owner.get("boot") != _boot_id():
        return bool(owner.get("boot"))
    started = _process_start(owner["pid"])
    if started is None and not Path("/proc").exists():
        return False
    return started is None or started != owner.get("process_start")


def read_lock(store: Store) -> dict[str, Any] | None:
    """Returns who holds the lock, or None."""
    text = store.read_or_none(LOCK_PATH)
    if text is None:
        return None
    try:
        owner = json.loads(text)
        return owner if isinstance(owner, dict) else {}
    except (ValueError, RecursionError):
        return {}


def break_lock(store: Store) -> None:
    """Removes the lock, whoever holds it."""
    store.delete(LOCK_PATH)


def clear_dead_lock(store: Store) -> bool:
    """Removes the lock of a process that died on this machine, if there is one.

    Returns:
        Whether it did.
    """
    holder = read_lock(store)
    if holder is None or not died_here(holder):
        return False
    # Only one process of this machine may look and remove at a time: a second one would
    # remove the lock that the first has taken in the meantime.
    name = hashlib.sha256(store.url.encode()).hexdigest()[:16]
    guard = Path(tempfile.gettempdir()) / f"teachonce-{os.getuid()}-{name}.guard"
    with open(guard, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        again = read_lock(store)
        if again is None or again.get("id") != holder.get("id"):
            return False
        break_lock(store)
        return True


def _describe(owner: dict[str, Any]) -> str:
    age = time.time() - float(owner.get("heartbeat", 0) or 0)
    return (
        f"{owner.get('purpose', 'an unknown run')} of process {owner.get('pid', '?')} "
        f"on {owner.get('host', '?')}, last heard of {age:.0f} s ago"
    )


@contextmanager
def bank_lock(store: Store, purpose: str, wait_s: float = 60.0) -> Iterator[None]:
    """Holds the bank's lock for the length of the block.

    Args:
        store: the bank's.
        purpose: what for, shown to whoever waits.
        wait_s: how long to wait for another live owner.

    Raises:
        BankError: another run holds it, named with what to do.
    """
    owner = make_owner(purpose)
    deadline = time.monotonic() + wait_s
    while not store.create(LOCK_PATH, json.dumps(owner).encode()):
        if clear_dead_lock(store):
            continue
        holder = read_lock(store)
        if holder is not None and holder.get("id") == owner["id"]:
            # A store's client tried again what it had done, and found it done.
            break
        if time.monotonic() > deadline:
            if holder is None:
                continue
            stale = time.time() - float(holder.get("heartbeat", 0) or 0) > STALE_S
            hint = (
                "it looks dead: run again with --break-lock if you are sure"
                if stale
                else "wait for it to end and run the same command again"
            )
            raise BankError(
                f"bank {store.url} is locked by {_describe(holder)}; {hint}"
            )
        time.sleep(0.2)
    stop = threading.Event()

    def beat() -> None:
        while not stop.wait(HEARTBEAT_S):
            owner["heartbeat"] = time.time()
            try:
                holder = read_lock(store)
                if holder is None or holder.get("id") != owner["id"]:
                    return
                store.replace(LOCK_PATH, json.dumps(owner).encode())
            except StorageError:
                continue

    heart = threading.Thread(target=beat, name="bank-lock-heartbeat", daemon=True)
    heart.start()
    try:
        yield
    finally:
        stop.set()
        heart.join()
        holder = read_lock(store)
        if holder is not None and holder.get("id") == owner["id"]:
            break_lock(store)
