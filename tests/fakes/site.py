"""A deployment as a user has it: `dstackctl serve`, and `dstackctl run` beside it. Each can be killed."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil

from dstack_backend.endpoint import SOCKET_VARIABLE
from dstack_sched.adapters.arbiter_client import SocketArbiterClient
from dstack_sched.adapters.repository import DiskRepository
from dstack_sched.adapters.triton_client import TritonClient
from dstack_sched.errors import DstackError
from fakes.load import wait_until
from fakes.onnx_models import SlowSum, add_model

END_WITHIN_S = 60.0
SHM = Path("/dev/shm")


def dstackctl(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "dstack_sched", *map(str, arguments)]


class Running:
    """A `dstackctl` process; what it says on stderr is in `errors`."""

    def __init__(self, command: Sequence[str], errors: Path, env: Mapping[str, str] | None = None) -> None:
        self.errors = errors
        with errors.open("ab") as stderr:
            self.process = subprocess.Popen(
                command, stdout=subprocess.PIPE, stderr=stderr, text=True, env={**os.environ, **(env or {})}
            )

    def said(self) -> str:
        return self.errors.read_text()

    def printed_json(self) -> dict[str, Any]:
        """The first JSON document that it prints. Fails with what it said where it ends before."""
        assert self.process.stdout is not None
        lines: list[str] = []
        while not lines or lines[-1] != "}\n":
            lines.append(self.process.stdout.readline())
            assert lines[-1], f"it ended: {self.said()}"
        return json.loads("".join(lines))

    def stop(self, number: int = signal.SIGINT) -> int:
        """Its exit status. Safe to repeat."""
        if self.process.poll() is None:
            self.process.send_signal(number)
        try:
            return self.process.wait(END_WITHIN_S)
        finally:
            assert self.process.stdout is not None
            self.process.stdout.close()


class Served(Running):
    """`dstackctl serve --json` on free ports, up when this returns. `printed` is what it printed."""

    def __init__(
        self, repository: Path, folder: Path, *options: object, env: Mapping[str, str] | None = None
    ) -> None:
        command = serve_command(repository, folder, "--json", *options)
        super().__init__(command, folder / "serve.err", env)
        self.printed = self.printed_json()

    @property
    def url(self) -> str:
        """HOST:PORT of Triton's gRPC."""
        return self.printed["urls"]["grpc"]

    def descendants(self) -> list[psutil.Process]:
        return psutil.Process(self.process.pid).children(recursive=True)

    def triton(self) -> psutil.Process | None:
        """The present tritonserver, if there is one."""
        return next((p for p in self.descendants() if words(p)[:1] and "tritonserver" in words(p)[0]), None)

    def arbiter(self) -> psutil.Process | None:
        return next((p for p in self.descendants() if "arbiter" in words(p)[3:4]), None)

    def stub(self, model: str) -> psutil.Process | None:
        """One of the model's stub processes that live."""
        return next((p for p in self.descendants() if is_stub_of(p, model)), None)


class Site:
    """A repository of small models with their configs, one state directory, `serve` and `run`."""

    def __init__(
        self,
        folder: Path,
        models: Iterable[SlowSum],
        *,
        slo_ms: float = 250.0,
        rates: Mapping[str, float] | None = None,
        env: Mapping[str, str] | None = None,
    ) -> None:
        self.folder = folder
        self.repository = folder / "models"
        self.state = folder / "state"
        self.socket = folder / "arbiter.sock"
        self.models = {model.name: model for model in models}
        self.env = {SOCKET_VARIABLE: str(self.socket), "OPENBLAS_NUM_THREADS": "1", **(env or {})}
        for model in self.models.values():
            add_model(self.repository, model, gpu_percent=50, slo_ms=slo_ms)
        self.workload = folder / "workload.yaml"
        self.write_workload(slo_ms, rates or {})
        self.serve: Served | None = None
        self.run: Running | None = None

    def write_workload(self, slo_ms: float, rates: Mapping[str, float]) -> None:
        rows = [
            f"  - {{name: {name}, slo_ms: {slo_ms:g}, rate_per_s: {rates.get(name, 5.0):g}}}"
            for name in self.models
        ]
        self.workload.write_text("\n".join(["models:", *rows]) + "\n")

    def start_serve(self, *options: object) -> Served:
        self.serve = Served(self.repository, self.folder, *options, env=self.env)
        return self.serve

    @property
    def url(self) -> str:
        assert self.serve is not None
        return self.serve.url

    def start_run(self, *options: object, url: str | None = None) -> Running:
        """The controller; returns when its first plan is in force."""
        known = len(self.decisions("applied", "kept"))
        places = ("--state", self.state, "--socket", self.socket, "--url", url or self.url)
        command = dstackctl(
            "run", self.repository, *places, "--workload", self.workload, "--time-budget-s", 4, *options
        )
        self.run = run = Running(command, self.folder / "run.err", self.env)

        def planned() -> bool:
            assert run.process.poll() is None, run.said()
            return len(self.decisions("applied", "kept")) > known

        wait_until("the first plan", planned, within_s=120.0)
        return run

    def stop(self) -> None:
        for running in (self.run, self.serve):
            if running is not None:
                running.stop()
        if self.serve is not None:
            left = list(SHM.glob(f"dstack_{self.serve.process.pid}_*"))
            assert not left, f"shared memory left behind: {left}"

    # -- what an operator sees ------------------------------------------------------------------------

    def decisions(self, *what: str) -> list[dict[str, Any]]:
        """The decision log, oldest first; only these kinds of entries where any are named."""
        path = self.state / "decisions.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        return [entry for entry in map(json.loads, lines) if not what or entry["what"] in what]

    def status(self, url: str | None = None) -> dict[str, Any]:
        """`dstackctl status --json`."""
        places = ("--state", self.state, "--socket", self.socket, "--url", url or self.url)
        command = dstackctl("status", *places, "--json")
        return json.loads(subprocess.run(command, capture_output=True, check=True, timeout=60).stdout)

    def arbiter_status(self) -> dict[str, Any]:
        """Empty where none answers."""
        client = SocketArbiterClient(self.socket)
        try:
            return client.request("status")
        except DstackError:
            return {}
        finally:
            client.close()

    def granted_rows(self) -> dict[str, int]:
        """Rows that ran by grants, by model; zeros where no arbiter answers."""
        models = self.arbiter_status().get("models", {})
        return {name: models.get(name, {}).get("rows", 0) for name in self.models}

    def in_force(self) -> dict[str, dict[str, str]]:
        """Model -> our parameters as Triton has them."""
        with TritonClient(self.url) as client:
            found = {name: client.config(name)["parameters"] for name in self.models}
        return {
            name: {key: value["string_value"] for key, value in parameters.items()}
            for name, parameters in found.items()
        }

    def stated(self) -> dict[str, dict[str, str]]:
        """Model -> our parameters as the files have them."""
        repository = DiskRepository(self.repository)
        return {name: dict(repository.config(name).parameters) for name in self.models}

    def tree(self) -> dict[str, str]:
        """File -> hash of its content."""
        return {
            str(path.relative_to(self.repository)): hashlib.sha256(path.read_bytes()).hexdigest()
            for path in sorted(self.repository.rglob("*"))
            if path.is_file()
        }


def serve_command(repository: Path, folder: Path, *options: object) -> list[str]:
    ports = ("--http-port", 0, "--grpc-port", 0, "--metrics-port", 0)
    places = ("--state", folder / "state", "--socket", folder / "arbiter.sock")
    return dstackctl("serve", repository, *ports, *places, *options)


def words(process: psutil.Process) -> list[str]:
    """Its command line; empty for one that has ended."""
    try:
        return process.cmdline()
    except psutil.Error:
        return []


def is_stub_of(process: psutil.Process, model: str) -> bool:
    argv = words(process)
    return len(argv) > 1 and argv[0].endswith("_stub") and Path(argv[1]).parts[-3:-2] == (model,)


def gone(process: psutil.Process) -> bool:
    """Ended, or a zombie that nobody has buried yet."""
    try:
        return process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True
