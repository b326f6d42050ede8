"""`dstackctl run`: the controller. Profiles what is new, plans, applies; then watches and plans again."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated

import typer

from dstack_sched.adapters.clock import SystemClock
from dstack_sched.adapters.controller_board import FileStatusBoard
from dstack_sched.adapters.decision_log import FileDecisionLog
from dstack_sched.adapters.logs import LogOptions, logging_to
from dstack_sched.adapters.plan_files import plan_json
from dstack_sched.adapters.prometheus import PrometheusMetrics
from dstack_sched.adapters.pushed_repository import PushedRepository
from dstack_sched.adapters.triton_connection import ConnectionOptions
from dstack_sched.adapters.triton_metrics import TritonMetrics
from dstack_sched.app.control_loop import ControlLoop, Round
from dstack_sched.app.forecast import ForecastSettings
from dstack_sched.app.host_view import HostView
from dstack_sched.app.planning import CONTROL_OPTIONS, PlanOptions
from dstack_sched.app.profiling import ProfilingOptions
from dstack_sched.app.replan import ReplanSettings
from dstack_sched.app.telemetry import ControllerTelemetry, NoBoard, gpu_samples
from dstack_sched.app.watcher import Watcher
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
from dstack_sched.cli.deployment import Deployment, PushOption, connected
from dstack_sched.cli.endpoint import EndpointOptions, exports, served
from dstack_sched.cli.healing import CONTROLLER as HEALTH_SETTINGS
from dstack_sched.cli.healing import controller_guards, make_health
from dstack_sched.cli.host import signals_interrupt
from dstack_sched.cli.host_gpus import ExcludeGpuOption, local_view
from dstack_sched.cli.live_steps import LiveSources, LiveSteps, WorkloadFile
from dstack_sched.cli.options import logs
from dstack_sched.cli.plan import show_plan
from dstack_sched.config import read_workload
from dstack_sched.domain.metrics import CONTROLLER, HEALTH, Sample
from dstack_sched.domain.workload import Workload
from dstack_sched.errors import InputError
from dstack_sched.ports import Metrics


@app.command()
@connects
@exports
@logs
def run(
    workload: Annotated[Path, typer.Option("--workload", metavar="FILE", help="SLOs and expected rates.")],
    state: StateOption,
    connection: ConnectionOptions,
    metrics: EndpointOptions,
    log: LogOptions,
    repository: Annotated[
        Path | None,
        typer.Argument(
            metavar="[REPOSITORY]", help="Model repository; default: what the local Triton serves."
        ),
    ] = None,
    push: PushOption = False,
    profiles: Annotated[
        Path | None,
        typer.Option("--profiles", metavar="FILE", help="Latencies; default: measured here, where new."),
    ] = None,
    socket: Annotated[
        Path | None, typer.Option("--socket", metavar="PATH", help="The arbiter's socket.")
    ] = None,
    triton_metrics: Annotated[
        str | None,
        typer.Option("--triton-metrics", metavar="HOST:PORT", help="Triton's metrics; default: port 8002."),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only advise: change nothing.")] = False,
    once: Annotated[bool, typer.Option("--once", help="Plan and apply once, then end.")] = False,
    interval_s: Annotated[float, typer.Option("--interval-s", help="Between two looks at the rates.")] = 1.0,
    window_s: Annotated[
        float, typer.Option("--window-s", help="Forecasts look back so far, or to the last change.")
    ] = 60.0,
    cooldown_s: Annotated[
        float, typer.Option("--cooldown-s", help="At least so long between plans that reload.")
    ] = 10.0,
    horizon_s: Annotated[
        float, typer.Option("--horizon-s", help="A reload must pay for itself within so long.")
    ] = 60.0,
    gpus: Annotated[
        int | None,
        typer.Option("--gpus", show_default="those of this host", help="GPUs of the profiled kind."),
    ] = None,
    exclude_gpu: ExcludeGpuOption = None,
    memory_limits: Annotated[
        bool, typer.Option("--memory-limits", help="Bound the GPU memory of each model's processes (MPS).")
    ] = False,
    rehearse: Annotated[
        bool,
        typer.Option(
            "--rehearse/--no-rehearse", help="On a GPU: try shares in simulation before they are loaded."
        ),
    ] = True,
    time_budget_s: Annotated[
        float, typer.Option("--time-budget-s", help="For profiling one new model.")
    ] = 60.0,
    target_error: Annotated[float, typer.Option("--target-error", help="Of the profiles.")] = 0.05,
    provider: Annotated[str, typer.Option("--provider", help="Profile on: auto, cpu or cuda.")] = "auto",
    json_output: JsonOption = False,
) -> None:
    """Profile what is new, plan, apply; then watch rates and latencies, and plan again where that pays.

    Changes take the least disruptive way: a message to the arbiter where that is enough, a reload only where
    it pays. What does not fit is planned as far as it goes, and said. The workload file is read again when it
    changes. Needs a running Triton in explicit model control (dstackctl serve, or your own). Ctrl-C ends it;
    what it put in force stays. Decisions and their reasons: dstackctl status --why.

    With a Triton on another host, name its repository on a shared path; or leave it out, and configs are
    pushed with the loads (--push, needs --profiles): such a config replaces the one on Triton's disk as a
    whole, a restart of Triton forgets it, and a load of others brings the disk's back only once a file there
    is newer.

    Example: dstackctl run model_repository --workload perf/workloads/sample.yaml
    """
    if interval_s <= 0 or window_s < 3 * interval_s or cooldown_s < 0 or horizon_s <= 0:
        raise InputError(
            "--interval-s and --horizon-s must be above 0, --window-s at least three intervals, --cooldown-s "
            "0 or more"
        )
    state_dir(state)
    read_workload(workload)
    with ExitStack() as stack:
        stack.enter_context(logging_to("controller", log))
        site, server = stack.enter_context(connected(connection, repository, state, push=push))
        deployment = Deployment(site, server, state, socket)
        if isinstance(site, PushedRepository) and profiles is None:
            raise InputError(f"the models of {site.name} cannot be measured from here: give --profiles FILE")
        wanted = WorkloadFile(workload, lambda read, where: check_models(read, deployment, where))
        if not dry_run:
            deployment.recover()
        prometheus = PrometheusMetrics((*CONTROLLER, *HEALTH))
        arbiter = deployment.arbiter_plans.arbiter
        host = None if gpus else local_view(connection.url, state, exclude_gpu or (), arbiter)
        url = stack.enter_context(served(prometheus, metrics, *gpu_metrics(host)))
        if url:
            say(f"metrics of the controller: {url}")
        loop = live_loop(
            deployment,
            wanted.read,
            prometheus,
            ProfilingOptions(target_error=target_error, time_budget_s=time_budget_s),
            replace(
                CONTROL_OPTIONS,
                gpus=gpus or 1,
                memory_limits=memory_limits,
                rehearsal_trials=CONTROL_OPTIONS.rehearsal_trials if rehearse else 0,
            ),
            host=host,
            settings=ReplanSettings(cooldown_s=cooldown_s, horizon_s=horizon_s),
            forecasting=ForecastSettings(window_s=window_s),
            triton_metrics=triton_metrics or f"{connection.url.rpartition(':')[0]}:8002",
            provider=provider,
            dry_run=dry_run,
            profiles=profiles,
        )
        first = loop.once()
        show(first, json_output)
        if not once:
            watch(loop, first, interval_s)
        elif first.shortfall:
            say(first.shortfall)
            raise typer.Exit(1)


def gpu_metrics(host: HostView | None) -> tuple[Callable[[], Iterable[Sample]], ...]:
    """Reads the GPUs of the host for a scrape, where there are any."""
    return () if host is None else (lambda: gpu_samples(host.watch.states),)


def live_loop(
    deployment: Deployment,
    wanted: Callable[[], Workload],
    metrics: Metrics,
    profiling: ProfilingOptions,
    planning: PlanOptions,
    *,
    settings: ReplanSettings | None = None,
    forecasting: ForecastSettings | None = None,
    triton_metrics: str = "",
    provider: str = "auto",
    dry_run: bool = False,
    host: HostView | None = None,
    profiles: Path | None = None,
    make_watcher: Callable[..., Watcher] = Watcher,
) -> ControlLoop:
    """The loop on a deployment, all wired. triton_metrics: HOST:PORT, "": backlogs are not looked at. host:
    the GPUs to plan with, None: as many as `planning` says. profiles: None: measured as needed. make_watcher:
    who looks, for studies that know more."""
    clock, state, server = SystemClock(), deployment.state, deployment.server
    about = {"url": server.url, "repository": deployment.repository.name, "dry_run": dry_run}
    board = NoBoard() if dry_run else FileStatusBoard(state)
    telemetry = ControllerTelemetry(metrics, board, clock, about)

    def named() -> list[str]:
        return [model.name for model in wanted().models]

    guards = controller_guards(server, deployment.repository, named, deployment.arbiter_plans, host)
    health = make_health(guards, state, deployment.repository, telemetry.health, HEALTH_SETTINGS)
    steps = LiveSteps(deployment, wanted, profiling, planning, provider, health.check, host, profiles)
    sources = LiveSources(deployment, TritonMetrics(triton_metrics) if triton_metrics else None)
    watcher = make_watcher(named(), server, sources, clock, forecasting)
    log = FileDecisionLog(state, say)
    return ControlLoop(steps, watcher, clock, log, telemetry, settings=settings, dry_run=dry_run, say=say)


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
                f"{where}: model {model.name} is not in {deployment.repository.name}; "
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
