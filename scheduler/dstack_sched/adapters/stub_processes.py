"""ports.StubProcesses by process inspection: the stubs of a Triton on this host, found by its gRPC port.

A stub is a child of tritonserver, `triton_python_backend_stub REPOSITORY/MODEL/VERSION/model.py ...` (2.51).
"""

from __future__ import annotations

import contextlib
import socket
from itertools import pairwise
from pathlib import Path

import psutil

SERVER_NAME = "tritonserver"
MPS_SERVER_NAME = "nvidia-cuda-mps"  # the kernel cuts names after 15 characters
STUB_NAME = "triton_python_backend_stub"


class LocalStubProcesses:
    """The stubs of the Triton that listens at `url` (HOST:PORT), if it runs on this host and can be seen."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._server: psutil.Process | None = None
        self._blind = ""

    def pids(self, model: str) -> frozenset[int] | None:
        server = self._find_server()
        if server is None:
            return None
        try:
            children = server.children()
        except psutil.Error as error:
            self._blind = f"the processes of Triton at {self._url} cannot be listed ({error})"
            return None
        return frozenset(child.pid for child in children if _is_stub_of(child, model))

    def alive(self, pids: frozenset[int]) -> frozenset[int]:
        return frozenset(pid for pid in pids if _runs(pid))

    def all_pids(self) -> frozenset[int]:
        return frozenset(each.pid for each in self._stubs())

    def kill(self, pids: frozenset[int]) -> None:
        for each in self._stubs():
            if each.pid in pids:
                with contextlib.suppress(psutil.Error):
                    each.kill()

    def _stubs(self) -> list[psutil.Process]:
        server = self._find_server()
        try:
            children = server.children() if server else []
        except psutil.Error:
            return []
        return [each for each in children if _is_stub(each)]

    def server_pid(self) -> int | None:
        """The server's own process; None where it cannot be seen."""
        server = self._find_server()
        return server.pid if server else None

    def server_environment(self) -> dict[str, str]:
        """What the server was started with; {} where that cannot be seen."""
        server = self._find_server()
        try:
            return dict(server.environ()) if server else {}
        except psutil.Error:
            return {}

    def repositories(self) -> tuple[Path, ...]:
        """The model repositories on its command line; empty where it cannot be seen."""
        named = self.options("--model-repository", "--model-store")
        try:
            folder = Path(self._server.cwd()) if named and self._server else Path()
        except psutil.Error:
            folder = Path()
        return tuple(folder / path for path in named)

    def options(self, *names: str) -> tuple[str, ...]:
        """The values of these options on its command line, in order; empty where it cannot be seen."""
        server = self._find_server()
        try:
            argv = server.cmdline() if server else []
        except psutil.Error:
            argv = []
        found = []
        for word, following in pairwise([*argv, ""]):
            option, equals, value = word.partition("=")
            if option in names:
                found.append(value if equals else following)
        return tuple(found)

    def blind_reason(self) -> str:
        return self._blind

    def _find_server(self) -> psutil.Process | None:
        if self._server is not None and _runs(self._server.pid) and self._server.is_running():
            return self._server
        host, _, port = self._url.rpartition(":")
        self._server = None
        if not _is_local(host):
            self._blind = f"Triton at {self._url} is on another host: its old processes cannot be seen"
            return None
        candidates = [
            p for p in psutil.process_iter(["name"]) if (p.info["name"] or "").startswith(SERVER_NAME)
        ]
        self._server = next((p for p in candidates if _listens(p, int(port))), None)
        if self._server is None:
            self._blind = f"no process of this host that we may look at listens at {self._url}"
        return self._server


def all_triton_pids() -> frozenset[int]:
    """Processes of every Triton of this host that we may look at, and MPS servers."""
    found: set[int] = set()
    for each in psutil.process_iter(["name"]):
        name = each.info["name"] or ""
        if name.startswith(MPS_SERVER_NAME):
            found.add(each.pid)
        elif name.startswith(SERVER_NAME):
            with contextlib.suppress(psutil.Error):
                found |= {each.pid, *(child.pid for child in each.children())}
    return frozenset(found)


def _is_stub(process: psutil.Process) -> bool:
    try:
        argv = process.cmdline()
    except psutil.Error:
        return False
    return bool(argv) and argv[0].endswith(STUB_NAME)


def _is_stub_of(process: psutil.Process, model: str) -> bool:
    try:
        argv = process.cmdline()
    except psutil.Error:
        return False
    return len(argv) > 1 and argv[0].endswith(STUB_NAME) and Path(argv[1]).parts[-3:-2] == (model,)


def _listens(process: psutil.Process, port: int) -> bool:
    try:
        connections = process.net_connections("tcp")
    except psutil.Error:
        return False
    return any(c.status == psutil.CONN_LISTEN and c.laddr.port == port for c in connections)


def _runs(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False


def _is_local(host: str) -> bool:
    """Whether a name or address is this host: loopback, or an address of one of its interfaces."""
    try:
        wanted = {str(info[4][0]) for info in socket.getaddrinfo(host.strip("[]") or "localhost", None)}
    except OSError:
        return False
    own = {address.address for addresses in psutil.net_if_addrs().values() for address in addresses}
    return any(address in own or address.startswith("127.") or address == "::1" for address in wanted)
