"""Health as `serve` and `run` use it: which guards, over which adapters."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from pathlib import Path

from dstack_sched.adapters.clock import SystemClock
from dstack_sched.adapters.decision_log import FileDecisionLog
from dstack_sched.adapters.edit_journal import FileEditJournal
from dstack_sched.adapters.stub_processes import LocalStubProcesses
from dstack_sched.adapters.triton_client import TritonClient
from dstack_sched.app.arbiter_plans import ArbiterPlans
from dstack_sched.app.gpus import GpuGuard
from dstack_sched.app.guards import (
    ArbiterGuard,
    ArbiterPlanGuard,
    LoadedGuard,
    Names,
    ServerGuard,
    StubGuard,
)
from dstack_sched.app.health import Case, Guard, Health, HealthSettings, Outcome
from dstack_sched.app.host_view import HostView
from dstack_sched.app.mps_guard import MpsGuard
from dstack_sched.app.revive import Reviver
from dstack_sched.app.telemetry import HealthTelemetry
from dstack_sched.cli.common import say
from dstack_sched.errors import MachineError
from dstack_sched.ports import ModelRepository

log = logging.getLogger("dstack.serve")

LOOK_EVERY_S = 0.5
AFTER_A_DEFECT_S = 10.0
LOADS_AT_ONCE = 4
# A controller leaves `serve` the time to mend what it sees, too.
CONTROLLER = HealthSettings(confirm_s=4.0)


def model_guards(
    server: TritonClient, repository: ModelRepository, models: Names | None = None
) -> list[Guard]:
    """For the models of one Triton; None: all of them."""
    reviver = Reviver(repository, server, SystemClock())
    stubs = LocalStubProcesses(server.url)
    return [StubGuard(server, stubs, reviver, models), LoadedGuard(server, reviver, models)]


def host_guards(view: HostView | None, url: str) -> list[Guard]:
    """For the GPUs and the MPS daemon of the Triton at `url`; none where there are no GPUs to be seen."""
    if view is None:
        return []
    return [GpuGuard(view.watch), MpsGuard(view.servers, LocalStubProcesses(url))]


def controller_guards(
    server: TritonClient,
    repository: ModelRepository,
    models: Names,
    plans: ArbiterPlans,
    view: HostView | None = None,
) -> list[Guard]:
    """For `run`: the server and the arbiter may be another's, and come and go."""
    return [
        *host_guards(view, server.url),
        ServerGuard(server, "triton"),
        *model_guards(server, repository, models),
        ArbiterGuard(plans.arbiter),
        ArbiterPlanGuard(plans),
    ]


def make_health(
    guards: Iterable[Guard],
    state: Path,
    repository: ModelRepository,
    telemetry: HealthTelemetry,
    settings: HealthSettings | None = None,
    not_now: Callable[[], bool] = lambda: False,
) -> Health:
    """Mends at most LOADS_AT_ONCE things at a time, never while configs are being rewritten or `not_now`."""

    def alone() -> AbstractContextManager[object]:
        if not_now():
            raise MachineError("what processes need to start is being started again")
        return FileEditJournal(state, repository.root).lock

    return Health(
        guards,
        SystemClock(),
        FileDecisionLog(state, say),
        telemetry,
        settings=settings,
        alone=alone,
        each=some_at_once,
    )


def some_at_once(mend: Callable[[Case], Outcome], cases: Iterable[Case]) -> list[Outcome]:
    """All of them, in threads that end with it: there may be nothing to mend for months."""
    with ThreadPoolExecutor(LOADS_AT_ONCE, thread_name_prefix="mend") as pool:
        return list(pool.map(mend, cases))


class HealthThread:
    """Checks in a thread of its own: a load that takes minutes keeps nobody else from being looked after."""

    def __init__(self, check: Callable[[], object], every_s: float = LOOK_EVERY_S) -> None:
        self._check = check
        self._every_s = every_s
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="health", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """No further check; one under way is not waited for: it may be loading a model for minutes."""
        self._stop.set()

    def _run(self) -> None:
        while not self._stop.wait(self._every_s):
            try:
                self._check()
            except Exception:  # a defect of ours: told with its traceback, and what it serves is served on
                log.exception("looking after the models failed")
                self._stop.wait(AFTER_A_DEFECT_S)
