"""All of a host, started and stopped as one: MPS where there is a GPU, the arbiter, Triton."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

from dstack_backend.endpoint import SOCKET_VARIABLE, socket_path
from dstack_sched.adapters.arbiter_process import ArbiterProcess
from dstack_sched.adapters.clock import SystemClock
from dstack_sched.adapters.logs import LogOptions, bound
from dstack_sched.adapters.mps import MpsDaemon
from dstack_sched.adapters.ports_free import choose_ports
from dstack_sched.adapters.repository_check import check_repository
from dstack_sched.adapters.triton_client import TritonClient
from dstack_sched.adapters.triton_process import TritonProcess, find_server
from dstack_sched.app.backoff import BackoffSettings
from dstack_sched.app.supervise import A_FEW_TIMES, ALWAYS, Service, Supervisor
from dstack_sched.cli.common import say
from dstack_sched.cli.host_gpus import triton_gpu_environment
from dstack_sched.errors import ServerError

LOG_LIMIT_BYTES = 10 << 20
LOOK_AGAIN_S = 0.5


@dataclass(frozen=True)
class HostOptions:
    """What to start. Ports of 0 mean any free one; socket None means the host's usual place."""

    repository: Path
    log_dir: Path
    tritonserver: Path | None = None
    address: str = "127.0.0.1"
    http_port: int = 8000
    grpc_port: int = 8001
    metrics_port: int = 8002
    socket: Path | None = None
    policy: str = "dstack"
    capacity_percent: float = 100.0
    mps: bool = True
    log: LogOptions = field(default_factory=LogOptions)
    env: Mapping[str, str] = field(default_factory=dict)
    triton_arguments: tuple[str, ...] = ()

    @property
    def arbiter_socket(self) -> Path:
        return (self.socket or socket_path()).absolute()


class Host:
    """The running services of one host. Made by `open_host`."""

    def __init__(self, options: HostOptions, restarted: Callable[[str], None] = lambda name: None) -> None:
        """Look at what is asked for before anything starts. Errors: InputError, MachineError.

        restarted is told the name of each service that was started again."""
        self.options = options
        self._restarted = restarted
        self.models = check_repository(options.repository)
        self._install = find_server(options.tritonserver)
        choose_ports(options.address, self._ports())
        self._logs = prepare_logs(options.log_dir, "triton", "arbiter", "mps")
        self.socket = options.arbiter_socket
        self.mps = MpsDaemon(self._logs["mps"])
        self.arbiter = ArbiterProcess(
            self.socket,
            self._logs["arbiter"],
            policy=options.policy,
            capacity=options.capacity_percent,
            log=options.log,
        )
        self.triton = self._triton({})
        self._supervisor = Supervisor([], SystemClock(), say)

    def start(self) -> None:
        """Start all in order. Errors: MachineError, InputError; nothing is left running then."""
        services: list[tuple[Service, BackoffSettings]] = [(self.arbiter, ALWAYS)]
        try:
            self.triton = self._triton(self.mps.start() if self.options.mps else {})
            if self.mps.owned:
                services.append((self.mps, ALWAYS))
            self._supervisor = Supervisor(
                [*services, (self.triton, A_FEW_TIMES)], SystemClock(), say, self._restarted
            )
            self._supervisor.start()
        except BaseException:
            self.stop()
            raise

    def _ports(self) -> dict[str, int]:
        options = self.options
        return {"http": options.http_port, "grpc": options.grpc_port, "metrics": options.metrics_port}

    def _triton(self, mps_environment: Mapping[str, str]) -> TritonProcess:
        options = self.options
        return TritonProcess(
            self._install,
            options.repository,
            address=options.address,
            http_port=options.http_port,
            grpc_port=options.grpc_port,
            metrics_port=options.metrics_port,
            log_path=self._logs["triton"],
            env={
                **triton_gpu_environment(),
                **options.env,
                **mps_environment,
                SOCKET_VARIABLE: str(self.socket),
            },
            extra_args=options.triton_arguments,
        )

    def load_models(self) -> dict[str, str | None]:
        """Load every model of the repository: name -> None, or why it did not load. The rest still loads."""
        outcome: dict[str, str | None] = {}
        with TritonClient(self.triton.grpc_url) as client:
            for model in self.models:
                try:
                    client.load(model)
                    outcome[model] = None
                except ServerError as error:
                    outcome[model] = str(error)
        return outcome

    def check(self) -> None:
        """Look after the services and their logs' size once. Errors: MachineError when Triton is down."""
        bound(self._logs.values(), LOG_LIMIT_BYTES)
        self._supervisor.check()

    def stop(self) -> None:
        """Stop all, last first. Safe to repeat."""
        self._supervisor.stop()
        self.mps.stop()


@contextmanager
def open_host(options: HostOptions, restarted: Callable[[str], None] = lambda name: None) -> Iterator[Host]:
    """A started host; whatever happens inside, all of it is stopped, undisturbed by further signals."""
    with signals_interrupt():
        host = Host(options, restarted)
        try:
            host.start()
            yield host
        finally:
            for number in STOP_SIGNALS:
                signal.signal(number, signal.SIG_IGN)
            host.stop()


STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@contextmanager
def signals_interrupt() -> Iterator[None]:
    """SIGTERM and SIGHUP stop us as Ctrl-C does: KeyboardInterrupt. The old handlers return afterwards.

    A SIGHUP that is ignored stays so: `nohup dstackctl serve` outlives its terminal.
    """

    def interrupt(signum: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    under_nohup = signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    stops = [number for number in STOP_SIGNALS if not (under_nohup and number == signal.SIGHUP)]
    before = {number: signal.signal(number, interrupt) for number in stops}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def prepare_logs(directory: Path, *names: str) -> dict[str, Path]:
    """NAME.log of each in the directory, appended to and kept within 10 MiB; older lines: NAME.log.1."""
    directory.mkdir(parents=True, exist_ok=True)
    logs = {name: directory / f"{name}.log" for name in names}
    bound(logs.values(), LOG_LIMIT_BYTES)
    return logs
