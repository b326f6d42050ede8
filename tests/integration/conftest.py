"""A real Triton for integration tests: `triton(repository)` starts one, and it is stopped after the test."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import pytest

from dstack_backend.endpoint import SOCKET_VARIABLE
from dstack_sched.adapters.triton_client import TritonClient
from dstack_sched.adapters.triton_process import TritonProcess, find_server

TritonFactory = Callable[..., TritonProcess]


@pytest.fixture
def triton(tmp_path: Path) -> Iterator[TritonFactory]:
    """`triton(repository, load=[models], env={...}, extra_args=[...])` -> a ready TritonProcess.

    It has .grpc_url .http_url .metrics_url (HOST:PORT), .pid of the server, .process (poll, wait), .log_path
    and .stop(). Unless `env` names one, the arbiter socket is a path where nobody listens, so that tests
    never meet an arbiter of this machine.
    """
    running: list[TritonProcess] = []

    def start(
        repository: Path,
        *,
        load: Sequence[str] | None = None,
        env: Mapping[str, str] | None = None,
        extra_args: Sequence[str] = (),
    ) -> TritonProcess:
        server = TritonProcess(
            find_server(),
            repository,
            log_path=tmp_path / f"triton-{uuid.uuid4().hex[:8]}.log",
            env={SOCKET_VARIABLE: str(tmp_path / "no-arbiter.sock"), **(env or {})},
            extra_args=extra_args,
        )
        running.append(server)
        server.start(timeout_s=60)
        if load:
            with TritonClient(server.grpc_url) as client:
                for model in load:
                    client.load(model)
        return server

    yield start
    for server in running:
        server.stop()
        leftover = list(Path("/dev/shm").glob(f"{server.shm_prefix}*"))
        assert not leftover, f"shared memory left behind: {leftover}"
