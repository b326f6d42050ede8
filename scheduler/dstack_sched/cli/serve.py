"""`dstackctl serve`: Triton with the dstack backend, the arbiter, and MPS where there is a GPU."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from dstack_sched.adapters.clock import SystemClock
from dstack_sched.adapters.controller_board import SERVE_BOARD, FileStatusBoard
from dstack_sched.adapters.logs import LogOptions, NewText, logging_to
from dstack_sched.adapters.prometheus import PrometheusMetrics
from dstack_sched.adapters.repository import DiskRepository
from dstack_sched.adapters.triton_client import TritonClient
from dstack_sched.app.server_gpu_guard import ServerGpuGuard
from dstack_sched.app.telemetry import HealthBoard, HealthTelemetry
from dstack_sched.cli import app
from dstack_sched.cli.common import (
    JsonOption,
    StateOption,
    TritonServerOption,
    print_json,
    print_table,
    say,
    state_dir,
)
from dstack_sched.cli.endpoint import EndpointOptions, arbiter_samples, served
from dstack_sched.cli.healing import HealthThread, host_guards, make_health, model_guards
from dstack_sched.cli.host import LOOK_AGAIN_S, Host, HostOptions, open_host
from dstack_sched.cli.host_gpus import local_view
from dstack_sched.cli.options import logs
from dstack_sched.domain.metrics import HEALTH
from dstack_sched.errors import ServerError


@app.command()
@logs
def serve(
    repository: Annotated[Path, typer.Argument(metavar="REPOSITORY", help="Model repository.")],
    state: StateOption,
    log: LogOptions,
    tritonserver: TritonServerOption = None,
    address: Annotated[
        str, typer.Option("--address", help="Address to listen at; 0.0.0.0 for all.")
    ] = "127.0.0.1",
    http_port: Annotated[int, typer.Option("--http-port", help="0: any free one.")] = 8000,
    grpc_port: Annotated[int, typer.Option("--grpc-port", help="0: any free one.")] = 8001,
    metrics_port: Annotated[int, typer.Option("--metrics-port", help="0: any free one.")] = 8002,
    socket: Annotated[
        Path | None, typer.Option("--socket", metavar="PATH", help="The arbiter's socket.")
    ] = None,
    policy: Annotated[str, typer.Option("--policy", metavar="NAME", help="The arbiter's policy.")] = "dstack",
    capacity: Annotated[
        float, typer.Option("--capacity", metavar="PERCENT", help="Sum of GPU% granted, until a plan says.")
    ] = 100.0,
    mps: Annotated[bool, typer.Option(help="Use MPS where there is a GPU.")] = True,
    arbiter_metrics_port: Annotated[
        int | None,
        typer.Option("--arbiter-metrics-port", help="Metrics of the arbiter and of faults; 0: any free one."),
    ] = None,
    json_output: JsonOption = False,
) -> None:
    """Serve a model repository until Ctrl-C, which stops everything and leaves nothing behind.

    Triton runs in explicit model control; all models of the repository are loaded. What dies comes back by
    itself: the arbiter (requests go on meanwhile), MPS, Triton, the processes of a model. What keeps dying is
    given up with one line; the rest is served on. Faults: dstackctl status --why.

    Example: dstackctl serve model_repository --grpc-port 9001
    """
    options = HostOptions(
        repository=repository,
        log_dir=state_dir(state) / "logs",
        tritonserver=tritonserver,
        address=address,
        http_port=http_port,
        grpc_port=grpc_port,
        metrics_port=metrics_port,
        socket=socket,
        policy=policy,
        capacity_percent=capacity,
        mps=mps,
        log=log,
    )
    metrics = PrometheusMetrics(HEALTH)
    telemetry = HealthTelemetry(metrics, SystemClock())
    listen = EndpointOptions(arbiter_metrics_port, address)
    with logging_to("serve", log):
        try:
            with (
                served(metrics, listen, arbiter_samples(options.arbiter_socket)) as metrics_url,
                open_host(options, telemetry.restarted) as host,
            ):
                outcome, urls = host.load_models(), urls_of(host, metrics_url)
                show(host, outcome, urls, json_output)
                with TritonClient(host.triton.grpc_url) as server:
                    stay_up(host, server, state, telemetry, urls)
        except KeyboardInterrupt:
            say("stopped")


def stay_up(
    host: Host, server: TritonClient, state: Path, telemetry: HealthTelemetry, urls: dict[str, str]
) -> None:
    """Until it is interrupted. Errors: MachineError when Triton is down for good."""
    about = {"url": host.triton.grpc_url, "repository": str(host.options.repository.absolute()), "urls": urls}
    board = HealthBoard(telemetry, FileStatusBoard(state, SERVE_BOARD), SystemClock(), about)
    with looked_after(server, host, state, telemetry, board):
        while True:
            time.sleep(LOOK_AGAIN_S)
            host.check()


@contextmanager
def looked_after(
    server: TritonClient, host: Host, state: Path, telemetry: HealthTelemetry, board: HealthBoard
) -> Iterator[None]:
    """Models whose processes die, or that a restarted Triton has not loaded, come back by themselves."""
    repository = DiskRepository(host.options.repository)
    triton = host.triton
    guards = [
        *host_guards(local_view(server.url, state), server.url),
        ServerGpuGuard(NewText(triton.log_path), lambda: triton.pid, triton.end),
        *model_guards(server, repository),
    ]
    health = make_health(guards, state, repository, telemetry, not_now=host.mps.starting_again)

    def check() -> None:
        health.check()
        board.publish()

    thread = HealthThread(check)
    thread.start()
    try:
        yield
    finally:
        thread.stop()


def urls_of(host: Host, metrics_url: str | None) -> dict[str, str]:
    """Where everything listens."""
    triton = host.triton
    urls = {"grpc": triton.grpc_url, "http": triton.http_url, "metrics": triton.metrics_url}
    return urls | ({"arbiter_metrics": metrics_url} if metrics_url else {})


def show(host: Host, outcome: dict[str, str | None], urls: dict[str, str], as_json: bool) -> None:
    """What is served, and where. Errors: ServerError when no model at all could be loaded."""
    for model, error in outcome.items():
        if error is not None:
            say(f"{model}: not served: {error}")
    if all(error is not None for error in outcome.values()):
        raise ServerError(f"no model of {host.options.repository} could be loaded; see the lines above")
    if as_json:
        print_json({"version": 1, "urls": urls, "socket": str(host.socket), "pid": host.triton.pid,
                    "log": str(host.triton.log_path),
                    "models": {model: error is None for model, error in outcome.items()}})  # fmt: skip
        return
    print_table(
        f"serving {host.options.repository}",
        ["model", "state"],
        [[model, "ready" if error is None else "failed"] for model, error in outcome.items()],
    )
    mps = "own daemon" if host.mps.owned else "existing daemon" if host.mps.running() else "none"
    say(f"gRPC {urls['grpc']}, HTTP {urls['http']}, metrics {urls['metrics']}; MPS: {mps}")
    if "arbiter_metrics" in urls:
        say(f"metrics of the arbiter and of faults: {urls['arbiter_metrics']}")
    say(f"log: {host.triton.log_path}; Ctrl-C stops all")
