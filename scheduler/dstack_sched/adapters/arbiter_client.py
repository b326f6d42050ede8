"""The controller's line to the arbiter: one Control out, one Reply back, within a timeout."""

from __future__ import annotations

import os
import socket
from pathlib import Path
from typing import Any

from dstack_backend import wire
from dstack_sched.errors import InputError, MachineError

DEFAULT_TIMEOUT_S = 2.0


class SocketArbiterClient:
    """ports.ArbiterClient over the arbiter's socket. Connects at the first request and again after a failure.

    Raises MachineError when nobody answers within `timeout_s`, InputError when the request is refused.
    """

    def __init__(self, path: Path, *, timeout_s: float = DEFAULT_TIMEOUT_S) -> None:
        self.path = path
        self._timeout_s = timeout_s
        self._socket: socket.socket | None = None

    def request(self, verb: str, **fields: Any) -> dict[str, Any]:
        """The reply's fields, without "ok"."""
        try:
            packet = wire.encode(wire.Control({"verb": verb, **fields}))
        except wire.WireError as error:
            raise InputError(f"arbiter request {verb!r}: {error}") from None
        answer = self._exchange(packet)
        if answer is None:  # it restarted since the last request: ask the new one
            answer = self._exchange(packet)
        if answer is None:
            raise MachineError(f"arbiter at {self.path}: closed the connection")
        return self._fields(verb, answer)

    def close(self) -> None:
        """Close the connection; the next request opens a new one."""
        if self._socket is not None:
            self._socket.close()
            self._socket = None

    def _exchange(self, packet: bytes) -> wire.Message | None:
        """The answer; None where the connection broke."""
        connection = self._connected()
        try:
            connection.send(packet)
            data = connection.recv(wire.MAX_MESSAGE_BYTES + 1)
        except TimeoutError:
            self.close()
            raise MachineError(f"arbiter at {self.path}: no answer in {self._timeout_s:g} s") from None
        except OSError:
            data = b""
        if not data:
            self.close()
            return None
        try:
            return wire.decode(data)
        except wire.WireError as error:
            self.close()
            raise MachineError(f"arbiter at {self.path}: {error}") from None

    def _connected(self) -> socket.socket:
        if self._socket is None:
            connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            connection.settimeout(self._timeout_s)
            try:
                connection.connect(os.fspath(self.path))
            except OSError as error:
                connection.close()
                raise MachineError(
                    f"no arbiter answers at {self.path} ({error.strerror or error}); start one with "
                    "`dstackctl arbiter` or `dstackctl serve`"
                ) from None
            self._socket = connection
        return self._socket

    def _fields(self, verb: str, answer: wire.Message) -> dict[str, Any]:
        match answer:
            case wire.Reply(body) if body.get("ok") is True:
                return {key: value for key, value in body.items() if key != "ok"}
            case wire.Reply(body):
                raise InputError(f"arbiter: {verb}: {body.get('error', 'refused')}")
            case wire.Refuse(reason):
                self.close()
                raise MachineError(f"arbiter at {self.path}: refused: {reason}")
        self.close()
        raise MachineError(f"arbiter at {self.path}: answered with {type(answer).__name__}")
