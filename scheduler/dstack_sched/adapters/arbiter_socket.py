"""The arbiter's socket: one epoll loop, one thread, SOCK_SEQPACKET, nothing that blocks.

A client costs the others nothing: each gets a bounded number of messages a round, what it does not read is
queued up to a bound and then the client is dropped, a packet that does not decode drops its sender, and so
does a flood. Only the same user (or root) may connect. Timers have microseconds: select() on the epoll
descriptor, whose timeout is finer than epoll's own milliseconds.
"""

from __future__ import annotations

import contextlib
import fcntl
import gc
import logging
import os
import select
import socket
import stat
import struct
import threading
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from time import monotonic_ns
from typing import Any, Protocol

from dstack_backend import wire
from dstack_sched.errors import InputError, MachineError

log = logging.getLogger("dstack.arbiter")

MAX_CLIENTS = 256
MESSAGES_A_ROUND = 8  # of one client, before the next has its turn
FLOOD_MESSAGES_PER_S = 10_000  # a backend of half-millisecond batches sends about 4,000
MAX_QUEUED_PACKETS = 256  # unsent, beyond what the kernel holds; a backend has 2 grants outstanding
FIRST_MESSAGE_WITHIN_US = 10_000_000
HOUSEKEEPING_US = 1_000_000
_PEER = struct.Struct("3i")


class Service(Protocol):
    """What the loop serves: messages of numbered connections in, messages to send out.

    `received` may raise wire.WireError: the client is refused with its text and dropped.
    """

    def received(
        self, connection: int, message: wire.Message, now_us: int
    ) -> Sequence[tuple[int, wire.Message]]: ...
    def disconnected(self, connection: int, now_us: int) -> Sequence[tuple[int, wire.Message]]: ...
    def timer(self, now_us: int) -> Sequence[tuple[int, wire.Message]]: ...
    def next_timer_us(self) -> int | None: ...
    def housekeep(self, now_us: int) -> None: ...


def monotonic_us() -> int:
    """CLOCK_MONOTONIC, which all processes of the host share."""
    return monotonic_ns() // 1000


@contextlib.contextmanager
def listening(path: Path) -> Iterator[socket.socket]:
    """Listen at `path` (0600), in a directory that nobody else can write; unlink it at the end.

    A socket left by a dead arbiter is replaced. Errors: MachineError where a live arbiter answers there,
    InputError where the place cannot be used.
    """
    directory = _private_directory(path.parent)
    try:
        # Held only for check, unlink, bind: two arbiters starting at once cannot both find a stale socket.
        fcntl.flock(directory, fcntl.LOCK_EX)
        _remove_stale(path)
        server = _bind(path)
        identity = path.stat()
    finally:
        os.close(directory)
    try:
        yield server
    finally:
        server.close()
        with contextlib.suppress(FileNotFoundError):
            found = path.stat()
            if (found.st_dev, found.st_ino) == (identity.st_dev, identity.st_ino):
                path.unlink()


def _private_directory(path: Path) -> int:
    """Make it (0700) or check it; an open descriptor. Errors: InputError."""
    try:
        path.mkdir(parents=True, exist_ok=True, mode=0o700)
        directory = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    except OSError as error:
        raise InputError(f"socket directory {path}: {error.strerror}; choose another with --socket") from None
    found = os.fstat(directory)
    if found.st_uid != os.geteuid() or stat.S_IMODE(found.st_mode) & 0o022:
        os.close(directory)
        raise InputError(
            f"socket directory {path}: must belong to you and be writable by nobody else (chmod 700), "
            "or choose another with --socket"
        )
    return directory


def _remove_stale(path: Path) -> None:
    try:
        mode = os.lstat(path).st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(mode):
        raise InputError(f"{path}: is there and is not a socket; remove it or choose another with --socket")
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as probe:
        probe.setblocking(False)
        try:
            probe.connect(os.fspath(path))
        except ConnectionRefusedError:
            path.unlink()
            return
        except OSError:
            pass  # a full backlog or another kind of socket: somebody is there
    raise MachineError(f"an arbiter already answers at {path}; stop it or choose another place with --socket")


def _bind(path: Path) -> socket.socket:
    server = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_NONBLOCK)
    before = os.umask(0o177)
    try:
        server.bind(os.fspath(path))
        server.listen(MAX_CLIENTS)
    except OSError as error:
        server.close()
        raise InputError(f"{path}: {error.strerror or error}; choose another with --socket") from None
    finally:
        os.umask(before)
    return server


class _Client:
    """One connection: what it has not read yet, and how fast it talks."""

    __slots__ = ("connection", "count", "introduced", "opened_us", "socket", "unsent", "window_us")

    def __init__(self, connection: int, sock: socket.socket, now_us: int) -> None:
        self.connection = connection
        self.socket = sock
        self.unsent: deque[bytes] = deque()
        self.opened_us = now_us
        self.introduced = False
        self.window_us = now_us
        self.count = 0

    def floods(self, now_us: int) -> bool:
        """Called once it used up its round; true where it sent more than the limit within a second."""
        self.count += MESSAGES_A_ROUND
        if now_us - self.window_us > 1_000_000:
            self.window_us, self.count = now_us, 0
        return self.count > FLOOD_MESSAGES_PER_S


class ArbiterLoop:
    """Serves `service` on a listening socket until `stop`. Not thread-safe, save `stop`.

    housekeep is called about once a second while nothing is urgent.
    """

    def __init__(
        self,
        server: socket.socket,
        service: Service,
        *,
        now_us: Callable[[], int] = monotonic_us,
        max_clients: int = MAX_CLIENTS,
        first_message_within_us: int = FIRST_MESSAGE_WITHIN_US,
    ) -> None:
        self._server = server
        self._service = service
        self._now_us = now_us
        self._max_clients = max_clients
        self._first_message_within_us = first_message_within_us
        self._epoll = select.epoll()
        self._wake_read, self._wake_write = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self._clients: dict[int, _Client] = {}
        self._buffer = bytearray(wire.MAX_MESSAGE_BYTES + 1)
        self._view = memoryview(self._buffer)
        self._running = True
        self._ending = threading.RLock()  # reentrant: a signal handler may stop the loop while it closes
        self._closed = False
        self._doomed: list[tuple[_Client, str, str]] = []
        self._next_housekeeping_us = 0
        self.dropped: Counter[str] = Counter()

    def status(self) -> dict[str, Any]:
        """{"clients": connected now, "dropped": {why: count since the start}}."""
        return {"clients": len(self._clients), "dropped": dict(self.dropped)}

    def stop(self) -> None:
        """End `run`; from any thread or a signal handler."""
        with self._ending:
            self._running = False
            if not self._closed:
                with contextlib.suppress(BlockingIOError):
                    os.write(self._wake_write, b"x")

    def run(self) -> None:
        """Serve until `stop`, then close every connection: backends run ungated until they find another."""
        listener = self._server.fileno()
        self._epoll.register(listener, select.EPOLLIN)
        self._epoll.register(self._wake_read, select.EPOLLIN)
        try:
            while self._running:
                for descriptor, events in self._wait():
                    if descriptor == listener:
                        self._accept()
                    elif descriptor == self._wake_read:
                        os.read(self._wake_read, 512)
                    elif client := self._clients.get(descriptor):
                        self._serve(client, events)
                self._run_timers()
        finally:
            self._close()

    def _close(self) -> None:
        for client in self._clients.values():
            client.socket.close()
        self._clients.clear()
        self._epoll.close()
        with self._ending:
            self._closed = True
            os.close(self._wake_read)
            os.close(self._wake_write)

    def _wait(self) -> list[tuple[int, int]]:
        """Events that are there, or that come before the next timer. Epoll waits for whole milliseconds only,
        so it is asked for those that fit; select() waits for the rest."""
        due_us = self._service.next_timer_us()
        wake_us = self._next_housekeeping_us if due_us is None else min(due_us, self._next_housekeeping_us)
        left_us = wake_us - self._now_us()
        if left_us >= 1000:
            return self._epoll.poll(left_us // 1000 / 1000)
        if left_us > 0:
            ready, _, _ = select.select((self._epoll.fileno(),), (), (), left_us / 1e6)
            if not ready:
                return []
        return self._epoll.poll(0)

    def _run_timers(self) -> None:
        now_us = self._now_us()
        due_us = self._service.next_timer_us()
        if due_us is not None and due_us <= now_us:
            self._send_all(self._service.timer(now_us))
        if now_us >= self._next_housekeeping_us:
            self._next_housekeeping_us = now_us + HOUSEKEEPING_US
            self._housekeep(now_us)

    def _housekeep(self, now_us: int) -> None:
        """Collect garbage (the collector is off on the hot path), let the service do what can wait, and drop
        those that never said a word."""
        gc.collect(1)
        self._service.housekeep(now_us)
        for client in list(self._clients.values()):
            if not client.introduced and now_us - client.opened_us > self._first_message_within_us:
                self._drop(client, "silent", f"no message in {self._first_message_within_us / 1e6:g} s")

    def _accept(self) -> None:
        while True:
            try:
                sock, _ = self._server.accept()
            except BlockingIOError:
                return
            except OSError as error:  # out of descriptors, or it hung up before we came
                log.warning("accept: %s", error)
                return
            sock.setblocking(False)
            reason = self._unwelcome(sock)
            if reason:
                self.dropped["refused"] += 1
                with contextlib.suppress(OSError):
                    sock.send(wire.encode(wire.Refuse(reason)))
                sock.close()
                continue
            descriptor = sock.fileno()
            self._clients[descriptor] = _Client(descriptor, sock, self._now_us())
            self._epoll.register(descriptor, select.EPOLLIN)

    def _unwelcome(self, sock: socket.socket) -> str | None:
        _, uid, _ = _PEER.unpack(sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _PEER.size))
        if uid not in (0, os.geteuid()):
            return f"user {uid} may not connect"
        if len(self._clients) >= self._max_clients:
            return f"{self._max_clients} clients are connected already"
        return None

    def _serve(self, client: _Client, events: int) -> None:
        if events & select.EPOLLOUT and not self._flush(client):
            return
        if not events & ~select.EPOLLOUT:
            return
        for _ in range(MESSAGES_A_ROUND):
            if not self._receive_one(client):
                return
        if client.floods(self._now_us()):
            self._drop(client, "flood", f"more than {FLOOD_MESSAGES_PER_S} messages a second")

    def _receive_one(self, client: _Client) -> bool:
        """Take one message in; False where there is none left or the client is gone."""
        try:
            size = client.socket.recv_into(self._buffer)
        except BlockingIOError:
            return False
        except OSError:  # it died with messages unread
            size = 0
        if size == 0:
            self._drop(client, "closed", "")
            return False
        try:
            message = wire.decode(bytes(self._view[:size]))
            answers = self._service.received(client.connection, message, self._now_us())
        except wire.WireError as error:
            self._drop(client, "malformed", str(error))
            return False
        client.introduced = True
        self._send_all(answers)
        return client.connection in self._clients

    def _send_all(self, answers: Sequence[tuple[int, wire.Message]]) -> None:
        """Send in order. Clients that cannot be sent to are dropped afterwards: that may grant to others."""
        for connection, message in answers:
            client = self._clients.get(connection)
            if client is not None:
                self._send(client, message)
        while self._doomed:
            client, why, detail = self._doomed.pop()
            self._drop(client, why, detail)

    def _send(self, client: _Client, message: wire.Message) -> None:
        packet = _packet(message)
        if not client.unsent:
            try:
                client.socket.send(packet)
                return
            except BlockingIOError:
                self._epoll.modify(client.connection, select.EPOLLIN | select.EPOLLOUT)
            except OSError:
                self._doomed.append((client, "closed", ""))
                return
        client.unsent.append(packet)
        if len(client.unsent) == MAX_QUEUED_PACKETS:
            self._doomed.append((client, "slow", f"{MAX_QUEUED_PACKETS} messages unread"))

    def _flush(self, client: _Client) -> bool:
        """Send what the client can take now; False where it is gone."""
        while client.unsent:
            try:
                client.socket.send(client.unsent[0])
            except BlockingIOError:
                return True
            except OSError:
                self._drop(client, "closed", "")
                return False
            client.unsent.popleft()
        self._epoll.modify(client.connection, select.EPOLLIN)
        return True

    def _drop(self, client: _Client, why: str, detail: str) -> None:
        """Forget a client and tell the service; a client that can still read learns the reason."""
        if self._clients.get(client.connection) is not client:
            return
        self.dropped[why] += 1
        del self._clients[client.connection]
        self._epoll.unregister(client.connection)
        if detail:
            log.warning("client dropped (%s): %s", why, detail)
            with contextlib.suppress(OSError):
                client.socket.send(wire.encode(wire.Refuse(detail)))
        client.socket.close()
        self._send_all(self._service.disconnected(client.connection, self._now_us()))


def _packet(message: wire.Message) -> bytes:
    """Encoded; a reply that is too large says so instead. Any other failure is a defect of ours."""
    try:
        return wire.encode(message)
    except wire.WireError as error:
        if not isinstance(message, wire.Reply):
            raise
        return wire.encode(wire.Reply({"ok": False, "error": f"the answer is too large: {error}"}))
