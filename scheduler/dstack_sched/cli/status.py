"""`dstackctl status`: what is going on now, and why."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.live import Live

from dstack_backend.endpoint import socket_path
from dstack_sched.adapters.arbiter_client import SocketArbiterClient
from dstack_sched.adapters.clock import SystemClock
from dstack_sched.adapters.controller_board import CONTROLLER_BOARD, SERVE_BOARD, read_board
from dstack_sched.adapters.decision_log import FileDecisionLog
from dstack_sched.adapters.triton_client import TritonClient
from dstack_sched.adapters.triton_connection import ConnectionOptions
from dstack_sched.app.gpus import gpu_rows
from dstack_sched.app.status import StatusReader
from dstack_sched.app.status_reading import Sources
from dstack_sched.cli import app
from dstack_sched.cli.common import JsonOption, StateOption, connects, console, print_json, say
from dstack_sched.cli.host_gpus import gpu_watch, local_view
from dstack_sched.cli.mps import mps_now
from dstack_sched.cli.status_view import decision_lines, view
from dstack_sched.cli.timeline import save_timelines
from dstack_sched.errors import InputError

SAMPLE_S = 1.0
MOST_DECISIONS = 10_000


@app.command()
@connects
def status(
    state: StateOption,
    connection: ConnectionOptions,
    socket: Annotated[
        Path | None, typer.Option("--socket", metavar="PATH", help="The arbiter's socket.")
    ] = None,
    watch: Annotated[bool, typer.Option("--watch", help="Keep it on the screen until Ctrl-C.")] = False,
    stages: Annotated[
        bool, typer.Option("--stages", help="Where the time of a request goes, by stage.")
    ] = False,
    why: Annotated[bool, typer.Option("--why", help="The last decisions, with reasons.")] = False,
    count: Annotated[int, typer.Option("-n", metavar="N", help="How many decisions.")] = 10,
    timeline: Annotated[
        Path | None,
        typer.Option("--timeline", metavar="FILE.html", help="Draw what the arbiter granted, as a chart."),
    ] = None,
    last: Annotated[float, typer.Option("--last", metavar="S", help="Seconds in the chart.")] = 10.0,
    json_output: JsonOption = False,
) -> None:
    """Each model's share, batch, rates, latency, attainment and queue; each GPU; arbiter, controller and MPS;
    faults. Parts that do not answer are named, the rest is shown. --why alone needs nothing that runs.

    Example: dstackctl status --watch --url 127.0.0.1:8001
    """
    if not 1 <= count <= MOST_DECISIONS:
        raise InputError(f"-n {count}: 1 to {MOST_DECISIONS} decisions")
    if watch and json_output:
        raise InputError("--watch and --json: one of the two; Prometheus endpoints are there for programs")
    if timeline is not None:
        for path, what in save_timelines(SocketArbiterClient(socket or socket_path()), timeline, last):
            say(f"{path}: {what}")
        return
    log = FileDecisionLog(state)
    if why and not (watch or stages or json_output):
        show_decisions(log, count)
        return
    with TritonClient(connection) as server:
        reader = StatusReader(sources(server, connection.url, socket, state))
        reader.read()
        if watch:
            keep_showing(reader, log if why else None, count, stages)
            return
        time.sleep(SAMPLE_S)
        document = reader.read()
    if why or json_output:
        document["decisions"] = log.last(count)
    if json_output:
        print_json(document)
    else:
        screen = console()
        screen.print(view(document, width=screen.width, stages=stages))


def sources(server: TritonClient, url: str, socket: Path | None, state: Path) -> Sources:
    """Everything of this host, and the Triton that was named."""
    host = local_view(url, state)
    watch = host.watch if host else gpu_watch(state, ())

    def gpus() -> Mapping[str, Mapping[str, Any]]:
        watch.look()
        return gpu_rows(watch.states)

    return Sources(
        server,
        SocketArbiterClient(socket or socket_path()),
        SystemClock(),
        boards=lambda: {
            "controller": read_board(state, CONTROLLER_BOARD),
            "serve": read_board(state, SERVE_BOARD),
        },
        gpus=gpus,
        mps=lambda: mps_now(tuple(each.reading for each in watch.states)),
    )


def show_decisions(log: FileDecisionLog, count: int) -> None:
    """The decision log alone."""
    lines = decision_lines(log.last(count))
    for line in lines:
        print(line)  # noqa: T201
    if not lines:
        say(f"no decision yet in {log.path}; dstackctl run and serve write them (--state names the place)")


def keep_showing(reader: StatusReader, log: FileDecisionLog | None, count: int, stages: bool) -> None:
    """A new reading every second until Ctrl-C: on a terminal in place, else one below the other."""
    screen = console()
    try:
        with Live(console=screen, auto_refresh=False, screen=False) as live:
            while True:
                time.sleep(SAMPLE_S)
                document = reader.read()
                if log:
                    document["decisions"] = log.last(count)
                table = view(document, width=screen.width, stages=stages)
                if screen.is_terminal:
                    live.update(table, refresh=True)
                else:
                    screen.print(time.strftime("%F %T"), table, sep="\n")
    except KeyboardInterrupt:
        return
