"""`dstackctl run`: the controller. Profiles what is new, plans, applies; then watches and plans again."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated

import typer

from dstack_sched.adapters.clock import SystemClock
from dstack_sched.adapters.decision_log import FileDecisionLog
from dstack_sched.adapters.model_files import find_models
from dstack_sched.adapters.plan_files import plan_json
from dstack_sched.adapters.profile_store import FileProfileStore
from dstack_sched.adapters.triton_client import TritonClient
from dstack_sched.adapters.triton_connection import ConnectionOptions
from dstack_sched.app.control_loop import ControlLoop, Round
from dstack_sched.app.planning import PlanOptions, make_plan
from dstack_sched.app.profiling import ProfilingOptions
from dstack_sched.app.replan import ReplanSettings
from dstack_sched.cli import app
from dstack_sched.cli.apply import show as show_report
from dstack_sched.cli.common import (
    JsonOption,
    StateOption,
    connects,
    print_json,
    say,
    state_dir,
)
from dstack_sched.cli.deployment import Deployment, served_repository
from dstack_sched.cli.host import signals_interrupt
from dstack_sched.cli.plan import show_plan
from dstack_sched.cli.profile import finish, measure_models, probe_settings
from dstack_sched.config import read_workload
from dstack_sched.domain.change import ApplyReport
from dstack_sched.domain.plan import Plan
from dstack_sched.domain.profile import ProfileSet
from dstack_sched.domain.workload import Workload
from dstack_sched.errors import InputError


@dataclass(frozen=True)
class LiveSteps:
    """control_loop.Steps on a real deployment."""

    deployment: Deployment
    profiling: ProfilingOptions
    planning: PlanOptions
    provider: str = "auto"

    def profile(self, models: Iterable[str]) -> ProfileSet:
        """Stored points are reused. Requests that are served meanwhile disturb the measurement."""
        deployment = self.deployment
        found = find_models([deployment.repository.root], list(models))
        store = FileProfileStore(deployment.state / "profiles")
        logs = state_dir(deployment.state / "logs")
        with probe_settings(self.provider, 0, logs / "mps.log") as settings:
            results = measure_models(found, store, settings, self.profiling, {})
            return finish(found, results, store, settings, {}, corun=False)

    def plan(self, profiles: ProfileSet, workload: Workload) -> Plan:
        return make_plan(profiles, workload, self.planning)

    def apply(self, plan: Plan, profiles: ProfileSet, workload: Workload) -> ApplyReport:
        return self.deployment.apply(plan, profiles, workload)

    def stated(self, plan: Plan) -> Plan:
        return self.deployment.stated(plan)


@app.command()
@connects
def run(
    workload: Annotated[Path, typer.Option("--workload", metavar="FILE", help="SLOs and expected rates.")],
    state: StateOption,
    connection: ConnectionOptions,
    repository: Annotated[
        Path | None,
        typer.Argument(
            metavar="[REPOSITORY]", help="Model repository; default: what the local Triton serves."
        ),
    ] = None,
    socket: Annotated[
        Path | None, typer.Option("--socket", metavar="PATH", help="The arbiter's socket.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only advise: change nothing.")] = False,
    once: Annotated[bool, typer.Option("--once", help="Plan and apply once, then end.")] = False,
    interval_s: Annotated[float, typer.Option("--interval-s", help="Between two looks at the rates.")] = 2.0,
    window_s: Annotated[float, typer.Option("--window-s", help="Rates are means over this long.")] = 10.0,
    cooldown_s: Annotated[float, typer.Option("--cooldown-s", help="At least so long between plans.")] = 30.0,
    gpus: Annotated[int, typer.Option("--gpus", help="GPUs of the profiled kind.")] = 1,
    time_budget_s: Annotated[
        float, typer.Option("--time-budget-s", help="For profiling one new model.")
    ] = 60.0,
    target_error: Annotated[float, typer.Option("--target-error", help="Of the profiles.")] = 0.05,
    provider: Annotated[str, typer.Option("--provider", help="Profile on: auto, cpu or cuda.")] = "auto",
    json_output: JsonOption = False,
) -> None:
    """Profile what is new, plan, apply; then watch the arrival rates and plan again when they have shifted.

    Needs a running Triton in explicit model control (dstackctl serve, or your own). Ctrl-C ends it; what it
    put in force stays. Decisions: dstackctl status --why.

    Example: dstackctl run model_repository --workload perf/workloads/sample.yaml
    """
    if interval_s <= 0 or window_s < interval_s or cooldown_s < 0:
        raise InputError(
            "--interval-s must be above 0, --window-s at least the interval, --cooldown-s 0 or more"
        )
    state_dir(state)
    wanted = read_workload(workload)
    with TritonClient(connection) as server:
        server.require_ready()
        deployment = Deployment(served_repository(connection.url, repository), server, state, socket)
        check_models(wanted, deployment, workload)
        if not dry_run:
            deployment.recover()
        loop = ControlLoop(
            LiveSteps(
                deployment,
                ProfilingOptions(target_error=target_error, time_budget_s=time_budget_s),
                PlanOptions(gpus=gpus),
                provider,
            ),
            server,
            SystemClock(),
            FileDecisionLog(state),
            wanted,
            settings=replace(ReplanSettings(), window_s=window_s, hold_s=window_s / 2, cooldown_s=cooldown_s),
            dry_run=dry_run,
            say=say,
        )
        first = loop.once()
        show(first, json_output)
        if not once:
            watch(loop, first, interval_s)


def watch(loop: ControlLoop, first: Round, interval_s: float) -> None:
    """Until Ctrl-C or SIGTERM, also as a background job of a shell, which ignores Ctrl-C for us."""
    say("watching the rates; Ctrl-C ends the controller, what it put in force stays")
    try:
        with signals_interrupt():
            loop.watch(first, interval_s, lambda: True)
    except KeyboardInterrupt:
        say("stopped; the plan stays in force")


def check_models(wanted: Workload, deployment: Deployment, where: Path) -> None:
    """Errors: InputError where the workload names a model that the repository does not have."""
    present = deployment.repository.models()
    for model in wanted.models:
        if model.name not in present:
            raise InputError(
                f"{where}: model {model.name} is not in {deployment.repository.root}; "
                f"it has {', '.join(present)}"
            )


def show(done: Round, json_output: bool) -> None:
    """The plan and what came of it."""
    if json_output:
        report = asdict(done.report) if done.report else None
        print_json({"version": 1, "plan": plan_json(done.plan), "report": report})
        return
    show_plan(done.plan)
    if done.report:
        show_report(done.report)
