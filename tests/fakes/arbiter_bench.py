"""A real arbiter in a thread of the test, and clients that speak the wire over its real socket."""

from __future__ import annotations

import contextlib
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from dstack_backend import wire
from dstack_sched.adapters.arbiter_client import SocketArbiterClient
from dstack_sched.adapters.arbiter_plan_file import ArbiterPlanFile
from dstack_sched.adapters.arbiter_socket import ArbiterLoop, listening
from dstack_sched.app.arbiter import ArbiterService, Observer
from dstack_sched.domain.event import EngineModel, PlanChanged
from dstack_sched.domain.workload import OnLate
from dstack_sched.engine.interface import Engine
from dstack_sched.engine.registry import make_engine
from dstack_sched.errors import MachineError

PATIENCE_S = 20.0  # a bound on waiting, not a speed that is asked for


class Client:
    """One connection. `receive` gives None when the arbiter has closed it."""

    def __init__(self, path: Path) -> None:
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.socket.settimeout(PATIENCE_S)
        self.socket.connect(str(path))

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        self.socket.close()

    def send(self, message: wire.Message) -> None:
        self.socket.send(wire.encode(message))

    def receive(self, timeout_s: float = PATIENCE_S) -> wire.Message | None:
        self.socket.settimeout(timeout_s)
        try:
            packet = self.socket.recv(wire.MAX_MESSAGE_BYTES)
        except ConnectionResetError:
            return None
        return wire.decode(packet) if packet else None

    def ask(self, message: wire.Message) -> wire.Message | None:
        self.send(message)
        return self.receive()

    def is_dropped(self) -> bool:
        """True once the arbiter closed the connection, whatever it said before."""
        while True:
            answer = self.receive()
            if answer is None:
                return True
            if not isinstance(answer, wire.Refuse | wire.Pong):
                return False


class Backend(Client):
    """A joined client with a queue of its own: `run` takes a grant and answers it."""

    def __init__(
        self,
        path: Path,
        model: str,
        *,
        gpu: int = 0,
        gpu_percent: float = 40.0,
        batch: int = 8,
        levels: tuple[float, ...] = (),
    ) -> None:
        super().__init__(path)
        self.model = model
        join = wire.Join(model, f"{model}_{gpu}", 1, gpu, gpu_percent, batch, batch, 100_000, False, levels)
        welcome = self.ask(join)
        if not isinstance(welcome, wire.Welcome):
            self.close()
            raise AssertionError(f"not welcome: {welcome}")
        self.capacity_percent = welcome.capacity_percent

    def granted(self, timeout_s: float = PATIENCE_S) -> wire.Grant:
        message = self.receive(timeout_s)
        assert isinstance(message, wire.Grant), message
        return message

    def finish(self, grant: wire.Grant, *, waiting: int = 0, deadline_us: int = 0, run_us: int = 500) -> None:
        self.send(wire.Done(grant.grant_id, grant.batch_size, 0, run_us, waiting, deadline_us))


class Arbiter:
    """The loop in a thread; `engines` are those it made, oldest first."""

    def __init__(self, path: Path, *, observe: Observer | None = None, **loop_options: int) -> None:
        self.path = path
        self.engines: list[Engine] = []
        self._listening = listening(path)
        server = self._listening.__enter__()
        self.service = ArbiterService(
            self._make, "dstack", ArbiterPlanFile(path.with_suffix(".plan.json")), epoch=3, observe=observe
        )
        self.loop = ArbiterLoop(server, self.service, **loop_options)
        self.service.also_report(self.loop.status)
        self._thread = threading.Thread(target=self.loop.run, name="arbiter")
        self._thread.start()

    def _make(self, policy: str) -> Engine:
        engine = make_engine(policy)
        self.engines.append(engine)
        return engine

    def stop(self) -> None:
        self.loop.stop()
        self._thread.join(PATIENCE_S)
        assert not self._thread.is_alive(), "the arbiter does not stop"
        self._listening.__exit__(None, None, None)
        for engine in self.engines:
            engine.check_invariants()


@contextlib.contextmanager
def arbiter(path: Path, *, observe: Observer | None = None, **loop_options: int) -> Iterator[Arbiter]:
    """An arbiter at `path` while the block runs; its engines' invariants are checked at the end."""
    running = Arbiter(path, observe=observe, **loop_options)
    try:
        yield running
    finally:
        running.stop()


def deadline_us(in_ms: float = 80.0) -> int:
    """A deadline that far from now."""
    return time.monotonic_ns() // 1000 + int(in_ms * 1000)


def works(path: Path, rounds: int = 20, model: str = "witness") -> None:
    """A backend gets and ends `rounds` grants: the arbiter serves others."""
    with Backend(path, model) as backend:
        backend.send(wire.Work(8, deadline_us()))
        for left in range(rounds, 0, -1):
            grant = backend.granted()
            backend.finish(grant, waiting=8 if left > 1 else 0, deadline_us=deadline_us() if left > 1 else 0)


def model_plan(
    name: str, *, gpu_percent: float = 40.0, batch_size: int = 8, latency_ms: float = 5.0
) -> EngineModel:
    """A plan with a flat latency table, so that leases are short and known."""
    return EngineModel(
        name, gpu_percent, batch_size, 100_000, 1.0, OnLate.SERVE, gpu_percent,
        (gpu_percent, 100.0), (1, batch_size), ((latency_ms, latency_ms), (latency_ms, latency_ms)),
    )  # fmt: skip


def plan_of(*models: EngineModel, capacity_percent: float = 100.0) -> dict[int, PlanChanged]:
    return {0: PlanChanged(capacity_percent, models)}


def in_threads(count: int, work: Callable[[int], None]) -> None:
    """Run `work(i)` in `count` threads and raise what any of them raised."""
    failures: list[BaseException] = []

    def guarded(i: int) -> None:
        try:
            work(i)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=guarded, args=(i,)) for i in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    if failures:
        raise failures[0]
    assert not any(thread.is_alive() for thread in threads)


class ArbiterProcess:
    """`dstackctl arbiter` as its own process; `client` talks to it."""

    def __init__(self, path: Path, log: Path) -> None:
        with log.open("a") as stderr:
            self.popen = subprocess.Popen(
                [sys.executable, "-m", "dstack_sched", "arbiter", "--socket", str(path)], stderr=stderr
            )
        self.client = SocketArbiterClient(path, timeout_s=PATIENCE_S)
        give_up = time.monotonic() + PATIENCE_S
        while True:
            try:
                assert self.client.request("ping")["pid"] == self.popen.pid
                return
            except MachineError:
                assert self.popen.poll() is None, log.read_text()
                assert time.monotonic() < give_up
                time.sleep(0.02)

    def end(self, how: signal.Signals) -> int:
        """Send the signal and wait; the exit status."""
        self.client.close()
        self.popen.send_signal(how)
        return self.popen.wait(PATIENCE_S)
