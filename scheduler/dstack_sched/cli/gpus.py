"""`dstackctl gpus`: what is there, who uses it, and taking one out of service."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from dstack_sched.adapters.gpu_exclusions import GpuExclusions
from dstack_sched.app.gpus import gpu_rows, is_excluded
from dstack_sched.cli import app
from dstack_sched.cli.common import JsonOption, StateOption, print_json, print_table, say, state_dir
from dstack_sched.cli.host_gpus import gpu_watch
from dstack_sched.errors import InputError


@app.command()
def gpus(
    state: StateOption,
    exclude: Annotated[
        list[str] | None,
        typer.Option("--exclude", metavar="GPU", help="Take it (index or UUID) out of service."),
    ] = None,
    include: Annotated[
        list[str] | None, typer.Option("--include", metavar="GPU", help="Put it back.")
    ] = None,
    json_output: JsonOption = False,
) -> None:
    """The GPUs of this host: memory, what programs hold of it, whether each is planned with and why not.

    A GPU that is taken out stays so until it is put back; a running `dstackctl run` moves its models within
    seconds, with no request lost.

    Example: dstackctl gpus --exclude 1
    """
    exclusions = GpuExclusions(state_dir(state))
    watch = gpu_watch(state, ())
    watch.look()
    for name in (*(exclude or ()), *(include or ())):
        if not any(is_excluded(each.reading, {name}) for each in watch.states):
            raise InputError(f"{name!r}: no such GPU here; there are {len(watch.states)}, counted from 0")
    if exclude or include:
        exclusions.change(exclude or (), include or ())
        watch.look()
    rows = gpu_rows(watch.states)
    if json_output:
        print_json({"version": 1, "gpus": rows})
    elif not rows:
        say("no GPU: models run on the CPU provider")
    else:
        show(rows)


def show(rows: dict[str, dict[str, Any]]) -> None:
    """For people."""
    print_table(
        "GPUs of this host",
        ["GPU", "name", "memory GiB", "used GiB", "busy %", "processes", "planned with"],
        [
            [
                index,
                row["name"],
                row["memory_bytes"] / 2**30,
                row["used_bytes"] / 2**30,
                row["utilization_percent"],
                row["processes"],
                f"no: {row['out']}" if row["out"] else "yes",
            ]
            for index, row in rows.items()
        ],
    )
