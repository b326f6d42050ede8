"""One connection to the arbiter: messages in and out, and a pause that others can end.

A `Wake` is shared by the connections of a gate, one after the other. Errors: OSError where the connection
fails or ends (TimeoutError, ConnectionRefusedError among them), ValueError (WireError) for what is no
message.
"""

from __future__ import annotations

import contextlib
import os
import select
import socket
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from dstack_backend import wire


@dataclass(frozen=True, slots=True)
class Timing:
    """Bounds, microseconds. A hung arbiter costs a waiting batch at most ping_after + pong_within, once."""

    tick_us: int = 25_000
    ping_after_us: int = 50_000  # silence, while work waits, before the arbiter is asked for a sign of life
    idle_ping_after_us: int = 1_000_000  # the same while idle, so that a hang is known before work comes
    pong_within_us: int = 150_000
    welcome_us: int = 150_000
    starved_after_us: int = 10_000_000  # work waits, no grant comes, though the arbiter answers
    first_pause_us: int = 50_000
    longest_pause_us: int = 1_000_000
    telemetry_us: int = 1_000_000


USUAL = Timing()


class Wake:
    """Ends pauses and waits, for good, from another thread."""

    def __init__(self) -> None:
        self._read, self._write = os.pipe()
        self.called = False

    def fileno(self) -> int:
        return self._read

    def call(self) -> None:
        self.called = True
        with contextlib.suppress(OSError):
            os.write(self._write, b"x")

    def pause(self, pause_us: int) -> None:
        poller = select.poll()
        poller.register(self._read, select.POLLIN)
        poller.poll(pause_us / 1000)

    def close(self) -> None:
        os.close(self._write)
        os.close(self._read)


class Line:
    """A connected socket. One thread receives, any may send. now_us: microseconds, monotonic."""

    def __init__(self, wake: Wake, now_us: Callable[[], int]):
        self._wake, self._now_us = wake, now_us
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._poller = select.poll()  # descriptors may be beyond select's 1024

    def connect(self, path: Path) -> None:
        self._socket.setblocking(False)
        self._socket.connect(str(path))
        self._poller.register(self._socket, select.POLLIN)
        self._poller.register(self._wake, select.POLLIN)

    def send(self, message: wire.Message) -> None:
        """OSError also where the other end is so far behind that its buffer is full."""
        self._socket.send(wire.encode(message))

    def is_readable(self, within_us: int) -> bool:
        """Whether there is something to receive, waiting at most within_us, or until the wake is called."""
        ready = self._poller.poll(within_us / 1000)
        return any(descriptor == self._socket.fileno() for descriptor, _ in ready)

    def receive(self) -> wire.Message:
        packet = self._socket.recv(wire.MAX_MESSAGE_BYTES)
        if not packet:
            raise ConnectionResetError("the arbiter closed the connection")
        message = wire.decode(packet)
        if isinstance(message, wire.Refuse):
            raise ConnectionRefusedError(f"refused: {message.reason}")
        return message

    def receive_until(self, wanted: type, within_us: int) -> None:
        """Receive until a message of the wanted type has come."""
        until_us = self._now_us() + within_us
        while True:
            ready = self.is_readable(max(until_us - self._now_us(), 0))
            if self._wake.called:
                raise OSError("closing")
            if not ready:
                raise TimeoutError(f"no {wanted.__name__} within {within_us / 1000:g} ms")
            if isinstance(self.receive(), wanted):
                return

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._socket.close()
