"""The controller's loop: profile what is new, plan, put in force; then watch the rates and plan again.

The steps come in as functions, so that the loop only decides when and why. Everything it decides goes to the
decision log with its reason. It keeps nothing that a new controller could not find again in the repository,
the profile store and the arbiter.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from dstack_sched.app.rates import RateMeter, arrivals
from dstack_sched.app.replan import ReplanSettings, Watch, demand_now, look, worth_applying
from dstack_sched.domain.change import ApplyReport
from dstack_sched.domain.plan import Plan
from dstack_sched.domain.profile import ProfileSet
from dstack_sched.domain.workload import Workload
from dstack_sched.errors import DstackError, InfeasibleError, ServerError
from dstack_sched.ports import Clock, DecisionLog, ModelServer


class Steps(Protocol):
    """What the loop has done for it. Errors: any DstackError; what it was about then stays as it was."""

    def profile(self, models: Iterable[str]) -> ProfileSet:
        """Profiles of these models on this device; measured where they are not stored yet."""
        ...

    def plan(self, profiles: ProfileSet, workload: Workload) -> Plan: ...
    def apply(self, plan: Plan, profiles: ProfileSet, workload: Workload) -> ApplyReport: ...
    def stated(self, plan: Plan) -> Plan:
        """The plan with what the configs state now in place of its own; models without that are left out."""
        ...


@dataclass(frozen=True, slots=True)
class Round:
    """One pass: what was planned and, unless it only advised, what came of it."""

    profiles: ProfileSet
    workload: Workload
    plan: Plan
    report: ApplyReport | None


class ControlLoop:
    """`once` profiles, plans and applies; `watch` goes on from there until stopped."""

    def __init__(
        self,
        steps: Steps,
        server: ModelServer,
        clock: Clock,
        log: DecisionLog,
        stated: Workload,
        *,
        settings: ReplanSettings | None = None,
        dry_run: bool = False,
        say: Callable[[str], None] = lambda line: None,
    ) -> None:
        self._steps = steps
        self._server = server
        self._clock = clock
        self._log = log
        self._stated = stated
        self._settings = settings or ReplanSettings()
        self._dry_run = dry_run
        self._say = say
        self._meters = {model.name: RateMeter(self._settings.window_s) for model in stated.models}

    def once(self, reason: str = "start") -> Round:
        """Profile what is new, plan for the stated rates, put in force."""
        profiles = self._steps.profile(model.name for model in self._stated.models)
        return self._round(profiles, self._stated, reason)

    def watch(self, first: Round, interval_s: float, keep_on: Callable[[], bool]) -> Round:
        """Look at the rates every `interval_s` and plan again when they have left what was planned for.

        A look or a new plan that fails is logged and tried again: the last plan stays in force.
        """
        current, watch = first, Watch(self._clock.now_us())
        while keep_on():
            self._clock.sleep_s(interval_s)
            try:
                measured = self.measure()
            except DstackError as error:
                self._say(f"rates cannot be read: {error}")
                continue
            now_us = self._clock.now_us()
            planned = {model.name: model.rate_per_s for model in current.workload.models}
            watch, reason = look(watch, planned, measured, now_us, self._settings)
            if reason is None:
                continue
            workload = demand_now(self._stated, measured, self._settings)
            watch = Watch(now_us)
            try:
                current = self._round(current.profiles, workload, reason)
            except DstackError as error:
                self._decide("kept", f"{reason}; no new plan: {error}", measured=measured)
        return current

    def measure(self) -> dict[str, float]:
        """Read every model's counters; the rates that are known by now, per second.

        A model that cannot be read (not loaded just now) is left out. Errors: ServerError when none can be.
        """
        rates = {}
        failure: DstackError | None = None
        for model, meter in self._meters.items():
            try:
                meter.add(arrivals(self._server.statistics(model), model), self._clock.now_us())
            except ServerError as error:
                failure = error
                continue
            rate = meter.rate_per_s()
            if rate is not None:
                rates[model] = rate
        if failure is not None and not rates:
            raise failure
        return rates

    def _round(self, profiles: ProfileSet, workload: Workload, reason: str) -> Round:
        plan = self._steps.plan(profiles, workload)
        if not plan.feasible:
            raise InfeasibleError(plan.binding[0] if plan.binding else "no plan meets every SLO")
        stated = self._steps.stated(plan)
        why = worth_applying(stated, plan, self._settings)
        summary: dict[str, Any] = {
            "rates": {model.name: round(model.rate_per_s, 3) for model in workload.models},
            "plan": {
                name: {"gpu_percent": row.gpu_percent, "batch_size": row.batch_size}
                for name, row in plan.models.items()
            },
            "headroom": round(plan.headroom, 3),
        }
        if self._dry_run:
            self._decide("advised", f"{reason}; {why or 'nothing to change'}", **summary)
            return Round(profiles, workload, plan, None)
        chosen = plan if why else stated
        report = self._steps.apply(chosen, profiles, workload)
        what = "applied" if why else "kept"
        self._decide(
            what, f"{reason}; {why or 'too little to gain by reloads'}", loads=report.loads, **summary
        )
        return Round(profiles, workload, chosen, report)

    def _decide(self, what: str, reason: str, **fields: Any) -> None:
        self._say(f"{what}: {reason}")
        entry: Mapping[str, Any] = {
            "time_s": round(self._clock.wall_time_s(), 3),
            "what": what,
            "reason": reason,
        }
        self._log.append({**entry, **fields})
