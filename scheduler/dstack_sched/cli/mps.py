"""`dstackctl mps start|stop|status`: NVIDIA's Multi-Process Service on this host."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from dstack_sched.adapters.mps import (
    BY_HAND,
    client_environment,
    find_daemon,
    mps_available,
    owner_of,
    start_in_background,
    stop_in_background,
)
from dstack_sched.adapters.mps_console import CONTROL, MpsConsole
from dstack_sched.adapters.mps_percent import (
    granularity,
    keep_percentages,
    kept_percentages,
    measure_percentages,
)
from dstack_sched.adapters.nvml import NvmlInventory
from dstack_sched.cli import app
from dstack_sched.cli.common import JsonOption, StateOption, print_json, print_table, say, state_dir
from dstack_sched.domain.gpu import GpuReading, mps_client_limit
from dstack_sched.domain.mps import MpsServer, clients_by_gpu
from dstack_sched.errors import InputError, MachineError

mps = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode=None,
    help="NVIDIA's Multi-Process Service (MPS) on this host. Example: dstackctl mps status",
)
app.add_typer(mps, name="mps")


@mps.callback()
def _root() -> None:
    """NVIDIA's Multi-Process Service (MPS) on this host."""


@mps.command()
def start(json_output: JsonOption = False) -> None:
    """Start a daemon of your own in the background, where none answers yet; GPU settings stay as they are.

    `dstackctl serve` does this itself. This is for a Triton that you start yourself: it needs the environment
    that is printed.

    Example: eval "$(dstackctl mps start)"
    """
    require_mps()
    console = find_daemon()
    started = console is None
    if console is None:
        console = start_in_background()
    environment = client_environment(console.pipe_dir)
    say(f"MPS daemon at {console.pipe_dir}: {'started' if started else 'there already, left as it is'}")
    if json_output:
        print_json({"version": 1, "started": started, "environment": environment})
    else:
        typer.echo("\n".join(f"export {key}={value}" for key, value in environment.items()))


@mps.command()
def stop(
    force: Annotated[
        bool, typer.Option("--force", help="Also while programs use it: their GPU contexts end.")
    ] = False,
    json_output: JsonOption = False,
) -> None:
    """Stop the daemon that `dstackctl mps start` started; any other one is left alone.

    Example: dstackctl mps stop
    """
    console = find_daemon()
    if console is None:
        say("no MPS daemon answers: nothing to stop")
    else:
        require_ours(console)
        clients = sorted(client.pid for server in console.servers() or () for client in server.clients)
        if clients and not force:
            pids = ", ".join(map(str, clients[:8]))
            raise InputError(
                f"{len(clients)} processes use the MPS daemon ({pids}); stop them first, or use --force"
            )
        stop_in_background(console)
        say(f"MPS daemon at {console.pipe_dir}: stopped")
    if json_output:
        print_json({"version": 1, "stopped": console is not None})


@mps.command()
def status(
    state: StateOption,
    measure: Annotated[
        bool, typer.Option("--measure", help="Measure what percentages really give (half a minute).")
    ] = False,
    json_output: JsonOption = False,
) -> None:
    """The daemon, its servers and clients, the clients' limit, and what percentages really give.

    Exit status 1 when no daemon answers.

    Example: dstackctl mps status --measure
    """
    console = find_daemon()
    gpus = NvmlInventory().read()
    table = percentages(console, state_dir(state), gpus, measure)
    document = describe(console, gpus, table)
    if json_output:
        print_json(document)
    else:
        show(document)
    if console is None:
        raise typer.Exit(1)


def percentages(
    console: MpsConsole | None, state: Path, gpus: tuple[GpuReading, ...], measure: bool
) -> dict[float, int] | None:
    """GPU% -> SMs on GPU 0, measured now or before. Errors: MachineError."""
    if not gpus:
        return None
    if measure:
        require_mps()
        if console is None:
            raise MachineError("no MPS daemon answers; dstackctl mps start")
        table = measure_percentages(client_environment(console.pipe_dir))
        keep_percentages(state, gpus[0].name, gpus[0].driver, table)
        return table
    return kept_percentages(state, gpus[0].name, gpus[0].driver)


def mps_now(gpus: tuple[GpuReading, ...]) -> dict[str, Any] | None:
    """The daemon of this host with its clients, for `dstackctl status`; None where none answers."""
    console = find_daemon()
    return None if console is None else describe(console, gpus, None)


def describe(
    console: MpsConsole | None, gpus: tuple[GpuReading, ...], table: dict[float, int] | None
) -> dict[str, Any]:
    """All of it as plain JSON types."""
    servers: tuple[MpsServer, ...] = (console.servers() or ()) if console else ()
    held = clients_by_gpu(servers, tuple(gpu.uuid for gpu in gpus))
    return {
        "version": 1,
        "running": console is not None,
        "pipe_directory": str(console.pipe_dir) if console else None,
        "owner": (owner_of(console) or "not ours") if console else None,
        "default_percent": console.default_percent() if console else None,
        "client_limit": mps_client_limit(gpus[0].driver) if gpus else None,
        "clients": {str(gpu): len(pids) for gpu, pids in held.items()},
        "servers": [asdict(server) for server in servers],
        "granularity_sms": granularity(table) if table else None,
        "percentages": [{"gpu_percent": p, "sms": sms} for p, sms in sorted((table or {}).items())],
    }


def show(document: dict[str, Any]) -> None:
    """For people."""
    if not document["running"]:
        say("no MPS daemon answers; `dstackctl mps start` starts one, `dstackctl serve` does it itself")
    else:
        say(f"MPS daemon at {document['pipe_directory']} ({document['owner']})")
        rows = [
            [str(client["pid"]), str(server["pid"]), server["status"], client["device"], client["command"]]
            for server in document["servers"]
            for client in server["clients"]
        ]
        print_table("clients", ["pid", "server", "server's state", "GPU", "command"], rows)
        for gpu, count in document["clients"].items():
            say(f"GPU {gpu}: {count} of at most {document['client_limit']} clients")
    if document["percentages"]:
        rows = [[f"{row['gpu_percent']:g}", str(row["sms"])] for row in document["percentages"]]
        print_table("what percentages give", ["GPU%", "SMs"], rows)
        say(f"shares grow in steps of {document['granularity_sms']} SMs")


def require_mps() -> None:
    """Errors: MachineError on a host without a GPU or without the control program."""
    if not mps_available():
        raise MachineError(f"no GPU with {CONTROL} here; install the driver's utilities (dstackctl doctor)")


def require_ours(console: MpsConsole) -> None:
    """Errors: InputError for a daemon that `mps start` did not start."""
    owner = owner_of(console)
    if owner == BY_HAND:
        return
    who = f"belongs to a running {owner}, which stops it when it ends" if owner else "was not started by us"
    raise InputError(f"the MPS daemon at {console.pipe_dir} {who}; it is left alone")
