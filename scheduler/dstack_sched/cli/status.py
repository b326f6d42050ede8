"""`dstackctl status`: what is going on now, and why."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Group
from rich.live import Live
from rich.table import Table

from dstack_backend.endpoint import socket_path
from dstack_sched.adapters.arbiter_client import SocketArbiterClient
from dstack_sched.adapters.clock import SystemClock
from dstack_sched.adapters.decision_log import FileDecisionLog
from dstack_sched.adapters.triton_client import TritonClient
from dstack_sched.adapters.triton_connection import ConnectionOptions
from dstack_sched.app.status import StatusReader
from dstack_sched.cli import app
from dstack_sched.cli.common import (
    JsonOption,
    StateOption,
    cell,
    connects,
    console,
    make_table,
    print_json,
    say,
)
from dstack_sched.cli.timeline import save_timelines

SAMPLE_S = 1.0
DECISIONS_SHOWN = 10


@app.command()
@connects
def status(
    state: StateOption,
    connection: ConnectionOptions,
    socket: Annotated[
        Path | None, typer.Option("--socket", metavar="PATH", help="The arbiter's socket.")
    ] = None,
    watch: Annotated[bool, typer.Option("--watch", help="Keep it on the screen until Ctrl-C.")] = False,
    why: Annotated[
        bool, typer.Option("--why", help="The controller's last decisions, with reasons.")
    ] = False,
    timeline: Annotated[
        Path | None,
        typer.Option("--timeline", metavar="FILE.html", help="Draw what the arbiter granted, as a chart."),
    ] = None,
    last: Annotated[float, typer.Option("--last", metavar="S", help="Seconds in the chart.")] = 10.0,
    json_output: JsonOption = False,
) -> None:
    """Each model's state, share, batch, rate and queue; what the arbiter grants; why the plan is as it is.

    Example: dstackctl status --watch --url 127.0.0.1:8001
    """
    if timeline is not None:
        for path, what in save_timelines(SocketArbiterClient(socket or socket_path()), timeline, last):
            say(f"{path}: {what}")
        return
    log = FileDecisionLog(state)
    with TritonClient(connection) as server:
        server.require_ready()
        reader = StatusReader(server, SocketArbiterClient(socket or socket_path()), SystemClock())
        reader.read()
        time.sleep(SAMPLE_S)
        document = reader.read()
        if why or json_output:
            document["decisions"] = log.last(DECISIONS_SHOWN)
        if json_output:
            print_json(document)
        elif watch:
            keep_showing(reader, log if why else None)
        else:
            console().print(view(document))


def keep_showing(reader: StatusReader, log: FileDecisionLog | None) -> None:
    """Redraw every second until Ctrl-C."""
    try:
        with Live(console=console(), auto_refresh=False) as live:
            while True:
                document = reader.read()
                if log:
                    document["decisions"] = log.last(DECISIONS_SHOWN)
                live.update(view(document), refresh=True)
                time.sleep(SAMPLE_S)
    except KeyboardInterrupt:
        return


def view(document: dict[str, Any]) -> Group:
    """The tables of one reading."""
    server = document["server"]
    parts: list[Any] = [models_table(document["models"], f"{server['name']} {server['version']}")]
    if document["arbiter"] is None:
        parts.append("arbiter: none answers; models run ungated at their GPU%")
    for index, gpu in document["gpus"].items():
        device = "CPU" if index == "-1" else f"GPU {index}"
        parts.append(
            f"{device}: {cell(gpu['utilization_percent'])}% used, {cell(gpu['granted_percent'])}% granted "
            f"now, of {cell(gpu['capacity_percent'])}% (arbiter policy {document['arbiter']})"
        )
    parts += [
        f"{time.strftime('%F %T', time.localtime(entry['time_s']))} {entry['what']}: {entry['reason']}"
        for entry in document.get("decisions", ())
    ]
    return Group(*parts)


def models_table(models: dict[str, Any], title: str) -> Table:
    columns = [
        "model",
        "state",
        "GPU%",
        "batch",
        "rate/s",
        "SLO ms",
        "in SLO",
        "used %",
        "waiting",
        "arbiter",
    ]
    rows = [
        [
            name,
            row["state"].lower(),
            row["gpu_percent"],
            row["batch_size"],
            row["rate_per_s"],
            row["slo_ms"],
            None if row["within_slo"] is None else f"{row['within_slo']:.1%}",
            row["utilization_percent"],
            row["waiting"],
            ", ".join(row["instances"]) or None,
        ]
        for name, row in models.items()
    ]
    return make_table(title, columns, rows)
