"""An endpoint in a process of its own, beside a program whose thread must not wait for another one's."""

from __future__ import annotations

import ctypes
import os
import signal
from collections.abc import Callable

from dstack_sched.errors import DstackError, MachineError

PR_SET_PDEATHSIG = 1


def serve_beside(start: Callable[[], str]) -> str:
    """Fork; the child calls `start`, which serves from threads of its own and returns the URL, and stays
    until we end, however that comes. Returns the URL. To be called before threads, sockets or locks are made.

    Errors: what `start` raised, as MachineError.
    """
    reading, writing = os.pipe()
    parent = os.getpid()
    if os.fork() == 0:
        os.close(reading)
        _child(start, parent, writing)
    os.close(writing)
    with os.fdopen(reading, encoding="utf-8") as answer:
        kind, _, text = answer.read().partition(" ")
    if kind != "url":
        raise MachineError(text or "the metrics endpoint did not start")
    return text


def _child(start: Callable[[], str], parent: int, writing: int) -> None:
    """Never returns: what belongs to the parent (its exit handlers, its stack) is not ours to unwind."""
    try:
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's; we go with it
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        if os.getppid() == parent:
            with os.fdopen(writing, "w", encoding="utf-8") as answer:
                try:
                    answer.write(f"url {start()}")
                except DstackError as error:
                    answer.write(f"error {error}")
                    return
            while True:
                signal.pause()
    finally:
        os._exit(0)
