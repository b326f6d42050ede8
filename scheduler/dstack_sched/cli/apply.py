"""`dstackctl apply`: put a plan in force on a running Triton."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated

import typer

from dstack_sched.adapters.plan_files import read_plan
from dstack_sched.adapters.profile_files import check_device, check_models, read_profile_file
from dstack_sched.adapters.triton_connection import ConnectionOptions
from dstack_sched.cli import app
from dstack_sched.cli.common import (
    JsonOption,
    StateOption,
    connects,
    print_json,
    print_table,
    say,
    state_dir,
)
from dstack_sched.cli.deployment import (
    Deployment,
    PushOption,
    connected,
    demand_of,
    model_hashes,
    stored_profiles,
)
from dstack_sched.cli.host_gpus import local_view
from dstack_sched.domain.change import ApplyReport
from dstack_sched.errors import InfeasibleError


@app.command()
@connects
def apply(
    plan: Annotated[
        Path, typer.Option("--plan", metavar="FILE", help="plan.json, as `dstackctl plan --json` prints it.")
    ],
    state: StateOption,
    connection: ConnectionOptions,
    repo: Annotated[
        Path | None,
        typer.Option(
            "--repo", metavar="REPO", help="Model repository; default: what the local Triton serves."
        ),
    ] = None,
    push: PushOption = False,
    profiles: Annotated[
        Path | None,
        typer.Option(
            "--profiles", metavar="FILE", help="Latencies for the arbiter; default: the profile store."
        ),
    ] = None,
    socket: Annotated[
        Path | None, typer.Option("--socket", metavar="PATH", help="The arbiter's socket.")
    ] = None,
    json_output: JsonOption = False,
) -> None:
    """Rewrite config.pbtxt and reload, one model at a time, whole or not at all; then tell the arbiter.

    Models that state the plan already are not touched. If one fails to load, all configs go back byte for
    byte and the old versions serve on. Of a Triton whose repository is not visible here, on this host or by
    --repo, configs are pushed with the loads (--push): they replace those on its disk as a whole, until it
    restarts or a file there is newer.

    Example: dstackctl apply --plan plan.json --repo model_repository
    """
    state_dir(state)
    wanted = read_plan(plan)
    if not wanted.feasible:
        raise InfeasibleError(
            f"{plan}: the plan is not feasible ({'; '.join(wanted.binding)}); nothing was changed"
        )
    with connected(connection, repo, state, push=push) as (repository, server):
        present = [model for model in wanted.models if model in repository.models()]
        for model in present:
            repository.config(model)  # a config that does not parse is said with its line, before all else
        hashes = model_hashes(repository, present) if present else {}
        known = read_profile_file(profiles).profiles if profiles else stored_profiles(state, wanted, hashes)
        if profiles:
            for served_on in wanted.gpus[:1]:
                check_device(known, served_on, str(profiles))
            check_models(known, hashes, str(profiles))
        notes: tuple[str, ...] = ()
        host = local_view(connection.url, state)
        if host is not None:
            wanted = host.fitted(wanted)
            notes = host.check_clients(wanted)
        deployment = Deployment(repository, server, state, socket)
        report = deployment.apply(wanted, known, demand_of(wanted))
        report = replace(report, notes=(*report.notes, *notes))
        for note in notes:
            say(note)
    if json_output:
        print_json({"version": 1, "reloads": report.reloads, **asdict(report)})
    else:
        show(report)


def show(report: ApplyReport) -> None:
    """What was done for each model."""
    print_table(
        "applied",
        ["model", "action", "GPU%", "batch", "load s", "old stubs gone"],
        [
            [
                each.model,
                each.action,
                each.gpu_percent,
                each.batch_size,
                each.load_s or None,
                each.old_stubs_gone,
            ]
            for each in report.outcomes
        ],
    )
    say(f"{report.loads} of {len(report.outcomes)} models loaded; the others stated the plan already")
