"""`dstackctl plan`: for each model a GPU, a GPU% and a batch size that keep every SLO."""

from __future__ import annotations

from collections.abc import Collection
from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from dstack_sched.adapters.plan_files import plan_json, write_plan
from dstack_sched.adapters.profile_files import read_profiles
from dstack_sched.app.planning import REHEARSAL_TRIALS, PlanOptions, explain_plan, make_plan
from dstack_sched.cli import app
from dstack_sched.cli.common import JsonOption, StateOption, print_json, print_table, progress, say
from dstack_sched.cli.host_gpus import ExcludeGpuOption, gpus_here
from dstack_sched.config import read_workload
from dstack_sched.domain.gpu import HostGpus
from dstack_sched.domain.plan import Plan
from dstack_sched.domain.profile import Device
from dstack_sched.errors import InfeasibleError, InputError
from dstack_sched.policy.runnable import CPU_DRIVER

MOST_GPUS = 64


class ObjectiveName(str, Enum):
    DEMAND = "demand"
    EFFICACY = "efficacy"


class Minimize(str, Enum):
    GPUS = "gpus"


class Maximize(str, Enum):
    HEADROOM = "headroom"


@app.command()
def plan(
    profiles: Annotated[Path, typer.Option("--profiles", metavar="FILE", help="A profiles.json.")],
    workload: Annotated[Path, typer.Option("--workload", metavar="FILE", help="A workload.yaml.")],
    state: StateOption,
    json_output: JsonOption = False,
    out: Annotated[
        Path | None, typer.Option("--out", metavar="FILE", help="Also write the plan there, atomically.")
    ] = None,
    objective: Annotated[
        ObjectiveName,
        typer.Option("--objective", help="demand: the joint program; efficacy: each model's batch program."),
    ] = ObjectiveName.DEMAND,
    gpus: Annotated[
        int | None,
        typer.Option(
            "--gpus",
            metavar="N",
            show_default="those of this host, if they are of the profiled kind; else 1",
            help="GPUs of the profiled kind.",
        ),
    ] = None,
    minimize: Annotated[
        Minimize | None, typer.Option("--minimize", help="Use as few of the --gpus as possible.")
    ] = None,
    maximize: Annotated[
        Maximize | None, typer.Option("--maximize", help="Leave the most room for higher rates, as run does.")
    ] = None,
    capacity_percent: Annotated[
        float | None,
        typer.Option(
            "--capacity",
            metavar="PERCENT",
            help="GPU% that may be promised at once; default: as measured by co-runs, else 100.",
        ),
    ] = None,
    exclude_gpu: ExcludeGpuOption = None,
    memory_limits: Annotated[
        bool, typer.Option("--memory-limits", help="Bound the GPU memory of each model's processes (MPS).")
    ] = False,
    rehearse: Annotated[
        bool,
        typer.Option("--rehearse", help="Try shares in simulation and better them, as run does on a GPU."),
    ] = False,
    explain: Annotated[bool, typer.Option("--explain", help="Say why: limits, fits, bounds.")] = False,
) -> None:
    """Choose GPU, GPU% and batch size of every model, so that each keeps its SLO at its rate.

    Exit status 1 when the workload does not fit; the line then names the model, the limit and the largest
    scale of the rates that fits.

    Example: dstackctl plan --profiles profiles.json --workload workload.yaml --out plan.json
    """
    known, wanted = read_profiles(profiles), read_workload(workload)
    host = None
    if gpus is None and minimize is not Minimize.GPUS:
        host = host_of(known.device, state, exclude_gpu or ())
    options = PlanOptions(
        objective=objective.value,
        gpus=gpus if gpus is not None else MOST_GPUS if minimize is Minimize.GPUS else 1,
        minimize_gpus=minimize is Minimize.GPUS,
        maximize_headroom=maximize is Maximize.HEADROOM,
        capacity_percent=capacity_percent,
        host=host,
        memory_limits=memory_limits,
        rehearsal_trials=REHEARSAL_TRIALS if rehearse else 0,
    )
    with progress() as bar:
        if rehearse:
            bar.add_task("rehearsing shares", total=None)
        found = make_plan(known, wanted, options)
    if out is not None:
        write_plan(out, found)
    if json_output:
        print_json(plan_json(found))
    else:
        show_plan(found)
    if explain:
        for line in explain_plan(found, known, wanted, options):
            say(line)
    if not found.feasible:
        raise InfeasibleError(found.binding[0])


def host_of(device: Device, state: Path, excluded: Collection[str]) -> HostGpus | None:
    """The GPUs of this host, if it has some of the kind that the profiles were made on.

    Errors: InputError where a GPU is to be left out of none.
    """
    here = gpus_here(state, excluded) if device.driver != CPU_DRIVER else HostGpus()
    if device.name in here.names:
        return here
    if excluded:
        raise InputError(
            f"--exclude-gpu: this host has no {device.name}; give the number of GPUs with --gpus"
        )
    return None


def show_plan(plan: Plan) -> None:
    """The plan as a table for people, on stdout."""
    rows = [
        (
            name,
            ",".join("cpu" if each.gpu < 0 else str(each.gpu) for each in row.replicas) or str(row.gpu),
            f"{row.gpu_percent:g}",
            row.batch_size,
            row.rate_per_s,
            row.throughput_per_s,
            f"{100 * row.utilization:.0f}%",
            row.latency_ms,
            row.slo_ms,
            f"{row.knee_percent:g}",
        )
        for name, row in plan.models.items()
    ]
    state = "fits" if plan.feasible else "does not fit; below: the largest scale of the rates that does"
    print_table(
        f"{len(plan.gpus)} x {plan.gpus[0]}, capacity {plan.capacity_percent:g}%: {state}; "
        f"headroom {plan.headroom:.3g}",
        ("model", "gpu", "GPU%", "batch", "rate/s", "can/s", "busy", "run ms", "SLO ms", "knee%"),
        rows,
    )
