"""`dstackctl arbiter`: the process that decides who runs now. `dstackctl serve` starts it."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import json
import logging
import os
import signal
from pathlib import Path
from types import FrameType
from typing import Annotated

import typer

from dstack_backend.endpoint import socket_path
from dstack_sched.adapters.arbiter_client import SocketArbiterClient
from dstack_sched.adapters.arbiter_plan_file import ArbiterPlanFile
from dstack_sched.adapters.arbiter_socket import ArbiterLoop, listening, monotonic_us
from dstack_sched.adapters.beside import serve_beside
from dstack_sched.adapters.logs import LogOptions, logging_to
from dstack_sched.app.arbiter import ArbiterService
from dstack_sched.cli import app
from dstack_sched.cli.endpoint import EndpointOptions, exports, serve_arbiter_metrics
from dstack_sched.cli.options import logs
from dstack_sched.domain.json_form import MAX_CAPACITY_PERCENT
from dstack_sched.engine.registry import POLICIES, make_engine
from dstack_sched.errors import InputError

LOG = logging.getLogger("dstack.arbiter")
PR_SET_TIMERSLACK = 29
TIMER_SLACK_NS = 1  # the default, 50 us, tripled the lateness of timers (74 us against 23, median)
LOG_LINES_A_S = 50
NICE = -5  # on a CPU host the models' own threads hold every core, and a late grant idles one of them


arbiter = typer.Typer(invoke_without_command=True, rich_markup_mode=None)
app.add_typer(arbiter, name="arbiter")

SocketOption = Annotated[
    Path | None,
    typer.Option(
        "--socket",
        metavar="PATH",
        help="Default: $DSTACK_ARBITER_SOCKET, or arbiter.sock in the runtime directory.",
    ),
]


@arbiter.callback()
@logs
@exports
def arbiter_command(
    context: typer.Context,
    log: LogOptions,
    metrics: EndpointOptions,
    policy: Annotated[str, typer.Option("--policy", metavar="NAME", help="Scheduling policy.")] = "dstack",
    socket: SocketOption = None,
    capacity: Annotated[
        float,
        typer.Option(
            "--capacity", metavar="P", help="Sum of GPU% of all grants while no plan says otherwise."
        ),
    ] = 100.0,
    plan_file: Annotated[
        Path | None,
        typer.Option(
            "--plan-file",
            metavar="FILE",
            help="Where the last plan is kept over a restart; default: beside the socket.",
        ),
    ] = None,
) -> None:
    """Decide which model instance runs now, with how much of the GPU. Runs until SIGTERM or Ctrl-C.

    Example: dstackctl arbiter --policy dstack --capacity 200 --metrics-port 8003
    """
    if context.invoked_subcommand is not None:
        return
    if not 0 < capacity <= MAX_CAPACITY_PERCENT:
        raise InputError(f"--capacity {capacity:g}: a percentage in (0, {MAX_CAPACITY_PERCENT:g}] is wanted")
    path = (socket or socket_path()).absolute()
    with logging_to("arbiter", log):
        url = serve_beside(lambda: _export(path, metrics)) if metrics.port is not None else None
        with listening(path) as server:
            plans = ArbiterPlanFile(plan_file or path.with_suffix(".plan.json"))
            service = ArbiterService(
                make_engine, policy, plans, capacity_percent=capacity,
                epoch=int.from_bytes(os.urandom(4), "little") | 1, now_us=monotonic_us(),
            )  # fmt: skip
            loop = ArbiterLoop(server, service)
            service.also_report(loop.status)
            LOG.addFilter(_AtMost())
            _stop_on_signals(loop)
            _tune_process()
            LOG.info("listening at %s, policy %s, pid %d", path, policy, os.getpid())
            if url:
                LOG.info("metrics at %s", url)
            loop.run()


def _export(socket: Path, options: EndpointOptions) -> str:
    return serve_arbiter_metrics(socket, options).url


@arbiter.command("policy")
def policy_command(
    name: Annotated[
        str | None, typer.Argument(metavar="[NAME]", help="The policy to go on with; none: say which it is.")
    ] = None,
    socket: SocketOption = None,
    json_output: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Change the policy of the running arbiter, from one grant to the next; no batch is lost.

    Example: dstackctl arbiter policy temporal
    """
    client = SocketArbiterClient((socket or socket_path()).absolute())
    try:
        if name is None:
            now = client.request("ping")["policy"]
            before = now
        else:
            answer = client.request("policy", name=name)
            now, before = answer["policy"], answer["before"]
    finally:
        client.close()
    if json_output:
        print(json.dumps({"version": 1, "policy": now, "before": before, "policies": list(POLICIES)}))  # noqa: T201
    else:
        known = f"choose from {', '.join(POLICIES)}"
        print(f"{now}; {known}" if name is None else f"{before} -> {now}")  # noqa: T201


def _stop_on_signals(loop: ArbiterLoop) -> None:
    def stop(signum: int, frame: FrameType | None) -> None:
        loop.stop()

    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, stop)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)


class _AtMost(logging.Filter):
    """Lets LOG_LINES_A_S lines a second through and says how many it held back: a client that comes and
    goes must not fill the disk."""

    def __init__(self) -> None:
        super().__init__()
        self.second, self.lines = 0, 0

    def filter(self, record: logging.LogRecord) -> bool:
        if int(record.created) != self.second:
            held = self.lines - LOG_LINES_A_S
            self.second, self.lines = int(record.created), 0
            if held > 0:
                record.msg = f"({held} lines held back) {record.msg}"
        self.lines += 1
        return self.lines <= LOG_LINES_A_S


def _tune_process() -> None:
    """No collector on the hot path (the loop collects now and then), exact timers, ahead of the models."""
    gc.collect()
    gc.freeze()
    gc.disable()
    ctypes.CDLL(None).prctl(PR_SET_TIMERSLACK, TIMER_SLACK_NS, 0, 0, 0)
    with contextlib.suppress(PermissionError):  # an ordinary user cannot; the default priority works too
        os.setpriority(os.PRIO_PROCESS, 0, NICE)
