"""A Triton server of our own: explicit model control, private backend directory, nothing left behind."""

from __future__ import annotations

import contextlib
import http.client
import os
import re
import secrets
import shutil
import signal
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from dstack_sched.adapters.kept_process import KeptProcess
from dstack_sched.adapters.ports_free import choose_ports
from dstack_sched.adapters.server_install import (
    ServerInstall,
    build_backend_dir,
    find_server,
    server_environment,
)
from dstack_sched.errors import InputError, MachineError

__all__ = ["ServerInstall", "TritonProcess", "find_server"]

READY_POLL_S = 0.05
EXIT_TIMEOUT_S = 10  # Triton's own limit for requests in flight at shutdown
WITHOUT_STUBS_S = 2.0  # at its end Triton looks once a second whether all is done
START_ATTEMPTS = 3  # a port that we chose may be taken before Triton binds it
# Requests of some 100 KB and more are given back to the system by glibc's malloc each time, and come as fresh
# pages again: 9 to 12 page faults a request of 150 KB in Triton, 0.1 to 1.5 with these (decision 0121).
KEEP_MEMORY = {"MALLOC_MMAP_THRESHOLD_": str(8 << 20), "MALLOC_TRIM_THRESHOLD_": str(64 << 20)}
LOG_LINE = re.compile(r"^[EF]\d{4} [\d:.]+ \d+ \S+\] (?P<message>.*)$")
OTHER_ERROR = re.compile(r"^error:|tritonserver: |error while loading", re.IGNORECASE)
PORT_TAKEN = re.compile(r"address already in use|failed to listen|socket .*unavailable", re.IGNORECASE)


class TritonProcess:
    """One tritonserver for one model repository. `start` returns when it is ready; use as a context manager.

    Port 0 means any free port. Without `log_path` the log lives and dies with the server. Models are not
    loaded here: that is the control API's work. `grpc_url` and `http_url` are HOST:PORT.
    """

    name = "Triton"

    def __init__(
        self,
        install: ServerInstall,
        repository: Path,
        *,
        address: str = "127.0.0.1",
        http_port: int = 0,
        grpc_port: int = 0,
        metrics_port: int = 0,
        log_path: Path | None = None,
        env: Mapping[str, str] | None = None,
        extra_args: Sequence[str] = (),
    ) -> None:
        self.install = install
        self.repository = repository
        self.address = address
        self._wanted_ports = {"http": http_port, "grpc": grpc_port, "metrics": metrics_port}
        self.ports: dict[str, int] = {}
        self._wanted_log = log_path
        self.log_path = log_path or Path(os.devnull)
        self._env = dict(env or {})
        self._extra_args = list(extra_args)
        self.shm_prefix = f"dstack_{os.getpid()}_{secrets.token_hex(4)}_"
        self.process: KeptProcess | None = None

    def __enter__(self) -> TritonProcess:
        if self.process is None:
            self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    @property
    def pid(self) -> int:
        """The server's own process id; 0 while none runs."""
        process = self.process
        return process.pid if process is not None else 0

    @property
    def grpc_url(self) -> str:
        return self._url("grpc")

    @property
    def http_url(self) -> str:
        return self._url("http")

    @property
    def metrics_url(self) -> str:
        return self._url("metrics")

    def _url(self, use: str) -> str:
        host = "127.0.0.1" if self.address == "0.0.0.0" else self.address  # noqa: S104 - compared, not bound
        return f"{host}:{self.ports[use]}"

    def start(self, timeout_s: float = 60.0) -> None:
        """Start and wait until ready; again, with the same ports, after its end.

        Errors: InputError (repository), MachineError (ports, no start).
        """
        self.stop()
        if not self.repository.is_dir():
            raise InputError(f"model repository {self.repository} is not a directory")
        for attempt in range(1, START_ATTEMPTS + 1):
            self.ports = choose_ports(self.address, self._wanted_ports)
            work_dir = Path(tempfile.mkdtemp(prefix="dstack-triton-"))
            try:
                self._start_once(work_dir, timeout_s)
                self._wanted_ports = dict(self.ports)
                return
            except MachineError as error:
                message = self._why(error)
                self.stop()
                retry = 0 in self._wanted_ports.values() and PORT_TAKEN.search(message)
                if attempt == START_ATTEMPTS or not retry:
                    raise MachineError(message) from error
            finally:
                if self.process is None:
                    shutil.rmtree(work_dir, ignore_errors=True)

    def _start_once(self, work_dir: Path, timeout_s: float) -> None:
        self.log_path = self._wanted_log or work_dir / "triton.log"
        backends = build_backend_dir(self.install, work_dir / "backends")
        self.process = KeptProcess(
            self.command(backends),
            log_path=self.log_path,
            env={**KEEP_MEMORY, **server_environment(self.install), **self._env},
            grace_s=EXIT_TIMEOUT_S + 5.0,
            childless_s=WITHOUT_STUBS_S,
            shm_prefix=self.shm_prefix,
            remove=[work_dir],
        )
        self._wait_ready(timeout_s)

    def command(self, backends: Path) -> list[str]:
        """The server's command line."""
        ports = [
            argument
            for use, port in self.ports.items()
            for argument in (f"--{use}-address={self.address}", f"--{use}-port={port}")
        ]
        return [
            str(self.install.binary),
            f"--model-repository={self.repository.resolve()}",
            f"--backend-directory={backends}",
            "--model-control-mode=explicit",
            f"--backend-config=python,shm-region-prefix-name={self.shm_prefix}",
            "--backend-config=python,stub-timeout-seconds=120",
            f"--exit-timeout-secs={EXIT_TIMEOUT_S}",
            *ports,
            *self._extra_args,
        ]

    def _wait_ready(self, timeout_s: float) -> None:
        assert self.process is not None
        until = time.monotonic() + timeout_s
        while not http_ready(self.address, self.ports["http"]):
            status = self.process.poll()
            if status is not None:
                raise MachineError(f"Triton ended with status {status} before it was ready")
            if time.monotonic() > until:
                raise MachineError(f"Triton was not ready within {timeout_s:g} s")
            time.sleep(READY_POLL_S)

    def _why(self, error: MachineError) -> str:
        """The error with the log's last word, and where to read on if the log stays."""
        where = f" (log: {self._wanted_log})" if self._wanted_log else ""
        last = last_log_error(self.log_path)
        return f"{error}: {last}{where}" if last else f"{error}{where}"

    def failure(self) -> str | None:
        """Why the server is down, with the last error of its log; None while it runs. One whose last start
        failed is down, too."""
        if self.process is None:
            return "does not run"
        status = self.process.poll()
        return None if status is None else self._why(MachineError(f"ended with status {status}"))

    def end(self) -> None:
        """Ask the server to end, once what it has accepted is answered; returns at once. Any thread."""
        if pid := self.pid:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGTERM)

    def stop(self) -> None:
        """End the server and all it started; remove its shared memory and private files. Safe to repeat."""
        if self.process is not None:
            self.process.stop()
            self.process = None


def http_ready(address: str, port: int, timeout_s: float = 1.0) -> bool:
    """Whether a Triton answers there and is ready."""
    host = "127.0.0.1" if address == "0.0.0.0" else address  # noqa: S104
    connection = http.client.HTTPConnection(host, port, timeout=timeout_s)
    try:
        connection.request("GET", "/v2/health/ready")
        return connection.getresponse().status == 200
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()


def last_log_error(log_path: Path, tail_bytes: int = 65536) -> str:
    """The last error in a Triton log, without its prefix; its last line if there is no error; '' if empty."""
    text = ""
    with contextlib.suppress(OSError), log_path.open("rb") as log:
        log.seek(max(0, log_path.stat().st_size - tail_bytes))
        text = log.read(tail_bytes).decode(errors="replace")
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    for line in reversed(lines):
        match = LOG_LINE.match(line)
        if match:
            return match.group("message").strip('"')
        if OTHER_ERROR.search(line):
            return line
    return lines[-1] if lines else ""
