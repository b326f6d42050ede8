"""What an MPS control daemon tells: its servers, and the clients of each."""

from __future__ import annotations

from dataclasses import dataclass, field

FAULT = "FAULT"


@dataclass(frozen=True, slots=True)
class MpsClient:
    """A process with a context under MPS. device: the beginning of the GPU's UUID, "" if not told."""

    pid: int
    device: str = ""
    command: str = ""


@dataclass(frozen=True, slots=True)
class MpsServer:
    """One nvidia-cuda-mps-server. status: ACTIVE, INITIALIZING, FAULT, or "" where it is not told.

    FAULT: a client made a fatal error. The clients on that GPU fail too, and until all of them have ended
    the server takes no new ones.
    """

    pid: int
    status: str = ""
    clients: tuple[MpsClient, ...] = field(default=())


def clients_by_gpu(servers: tuple[MpsServer, ...], uuids: tuple[str, ...]) -> dict[int, frozenset[int]]:
    """GPU index -> process ids of its clients. uuids: of the GPUs by index. A client whose GPU is not told
    counts on every GPU: the limit is checked on the safe side."""
    return {
        index: frozenset(
            client.pid
            for server in servers
            for client in server.clients
            if not client.device or uuid.startswith(client.device)
        )
        for index, uuid in enumerate(uuids)
    }
