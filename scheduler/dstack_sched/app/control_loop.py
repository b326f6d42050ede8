"""The controller's loop: profile what is new, plan, put in force; then watch, and plan again when it pays.

The steps come in as a Protocol (app/steps.py), so that the loop only decides when, what and why. Everything
it decides goes to the decision log with its reason. What must outlive it is stored by the steps (profiles,
corrections) or stated by the configs; a new controller finds the rest out again.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from dstack_sched.app.backoff import Backoff, BackoffSettings
from dstack_sched.app.changes import Change, Reach, changes, counts, loaded
from dstack_sched.app.overload import BestPlan, best_plan
from dstack_sched.app.refusals import Refusals
from dstack_sched.app.replan import (
    Choice,
    Held,
    ReplanSettings,
    as_it_is,
    choose,
    moved,
    rates_to_plan,
    settled,
    with_reserve,
)
from dstack_sched.app.steps import Steps
from dstack_sched.app.telemetry import ControllerTelemetry, ModelLook
from dstack_sched.app.watcher import Look, Watcher
from dstack_sched.domain.change import ApplyReport
from dstack_sched.domain.plan import Plan
from dstack_sched.domain.profile import ProfileSet
from dstack_sched.domain.workload import Workload
from dstack_sched.errors import DstackError, InfeasibleError, PlanRefusedError
from dstack_sched.ports import Clock, DecisionLog

SAME_AGAIN_S = 60.0  # a decision that changes nothing is logged once in so long
RETRY_S = 10.0  # a plan that was refused lately is thought over again after so long
START = "start"
AFTER_A_FAILURE = BackoffSettings(first_s=2.0, last_s=30.0)  # a round that failed, whatever by


@dataclass(frozen=True)
class Round:
    """One pass: what was planned and what came of it. workload: the rates planned for, without the reserve.
    shortfall: what does not fit, "" where all does. report: None where it was only advised or kept."""

    profiles: ProfileSet
    workload: Workload
    plan: Plan
    report: ApplyReport | None
    shortfall: str = ""


@dataclass(frozen=True)
class _Decided:
    """A plan chosen and not yet put in force."""

    best: BestPlan
    choice: Choice
    found: tuple[Change, ...]
    reach: Reach


class ControlLoop:
    """`once` profiles, plans and applies; `watch` goes on from there until stopped."""

    def __init__(
        self,
        steps: Steps,
        watcher: Watcher,
        clock: Clock,
        log: DecisionLog,
        telemetry: ControllerTelemetry,
        *,
        settings: ReplanSettings | None = None,
        dry_run: bool = False,
        say: Callable[[str], None] = lambda line: None,
    ) -> None:
        self._steps = steps
        self._watcher = watcher
        self._clock = clock
        self._log = log
        self._telemetry = telemetry
        self._settings = settings or ReplanSettings()
        self._dry_run = dry_run
        self._say = say
        self._refusals = Refusals()
        self._took_s: dict[str, float] = {}
        self._loaded_at_us: int | None = None
        self._retry_at_us: int | None = None  # when a plan that was held back may be tried again
        self._held_back_for = ""  # what it was to be for
        self._failed = Backoff(AFTER_A_FAILURE)
        self._settled = True  # the forecasts rest on more than a moment
        self._wanted = steps.wanted()
        self._measured: ProfileSet | None = None  # the profiles without corrections
        self._silent: tuple[str, int] = ("", 0)  # the last decision that changed nothing, and when

    # -- the start ----------------------------------------------------------------------------------------

    def once(self, reason: str = START) -> Round:
        """Profile what is new, plan for the stated rates, put in force.

        Errors: InfeasibleError where no part of the workload can be planned.
        """
        self._profile(self._wanted)
        return self._round(self._wanted, START, reason, None)

    def _profile(self, wanted: Workload) -> None:
        names = [model.name for model in wanted.models]
        self._measured = self._steps.profile(names)
        self._watcher.follow(names)
        self._watcher.profiled(self._measured, self._steps.corrections(self._measured))

    # -- the watch ----------------------------------------------------------------------------------------

    def watch(self, first: Round, interval_s: float, keep_on: Callable[[], bool]) -> Round:
        """Look at everything every `interval_s` and plan again where there is reason to.

        A look or a plan that fails is logged and tried again: what is in force stays.
        """
        current, blind = first, False
        while keep_on():
            self._clock.sleep_s(interval_s)
            if not self._dry_run:
                self._steps.check_health()
            try:
                look = self._watcher.look()
            except DstackError as error:
                self._telemetry.part("server", up=False)
                if not blind:
                    self._say(f"rates cannot be read, what is in force stays until they can: {error}")
                blind = True
                self._telemetry.publish()  # the faults: nobody else tells them now
                continue
            blind = False
            self._telemetry.part("server", up=True)
            current = self._follow(current, look)
            self._show(current, look)
        return current

    def _follow(self, current: Round, look: Look) -> Round:
        """Plan again where this look, the operator or the machine gives reason to."""
        if self._failed.tries and not self._failed.due(self._clock.now_us()):
            return current
        try:
            cause, reason = self._reason(current, look)
            if not reason:
                return current
            self._held_back_for = reason
            forecasts = look.forecasts()
            self._settled = settled(forecasts, self._settings)
            workload = rates_to_plan(self._wanted, forecasts, self._settings)
            done = self._round(workload, cause, reason, current)
        except DstackError as error:
            self._failed.tried(self._clock.now_us())
            self._retry_at_us = self._failed.retry_at_us
            again = f"next try in {self._failed.wait_s:g} s"
            self._decide("failed", "error", f"no new plan: {error}; {again}")
            return current
        self._failed = Backoff(AFTER_A_FAILURE)
        return done

    def _reason(self, current: Round, look: Look) -> tuple[str, str]:
        """All that calls for a plan, "" where nothing does, and the first cause in one word for the metrics.
        Takes over what has changed."""
        planned = {model.name: model.rate_per_s for model in current.workload.models}
        drifted = self._drifted(look)  # first: what was corrected is kept whatever else fails
        reasons = {
            "workload": self._new_wishes(),
            "fault": self._steps.urgent(),
            "drift": drifted,
            "rate": moved(planned, look.forecasts(), self._settings),
        }
        found = {cause: reason for cause, reason in reasons.items() if reason}
        if found:
            return next(iter(found)), "; ".join(found.values())
        if self._retry_at_us is not None and self._clock.now_us() >= self._retry_at_us:
            return "rate", self._held_back_for
        return "", ""

    def _drifted(self, look: Look) -> str:
        """Whose latencies were corrected in this look, and why. Keeps the corrections for a restart."""
        if not look.refits:
            return ""
        assert self._measured is not None
        if not self._dry_run:
            self._steps.keep_corrections(self._measured, self._watcher.corrections())
        return "; ".join(f"{model}: {why}" for model, (_, why) in look.refits.items())

    def _new_wishes(self) -> str | None:
        """Read the workload again; why that calls for a plan."""
        wanted = self._steps.wanted()
        if wanted == self._wanted:
            return None
        if {model.name for model in wanted.models} - {model.name for model in self._wanted.models}:
            self._profile(wanted)  # where that fails, the wish stands and is tried again
        else:
            self._watcher.follow(model.name for model in wanted.models)
        self._wanted = wanted
        return "the workload file has changed"

    def _may_load(self) -> bool:
        since = self._loaded_at_us
        return since is None or self._clock.now_us() - since >= self._settings.cooldown_s * 1e6

    # -- one round ----------------------------------------------------------------------------------------

    def _round(self, workload: Workload, cause: str, reason: str, current: Round | None) -> Round:
        assert self._measured is not None
        profiles = self._watcher.corrected(self._measured)
        began_us, self._held_back_for = self._clock.now_us(), reason
        decided = self._choose(profiles, workload, cause)
        self._telemetry.planned(decided.best.plan, (self._clock.now_us() - began_us) / 1e6)
        plan, short = decided.best.plan, _short(decided.best)
        if not plan.models:
            raise InfeasibleError(plan.binding[0] if plan.binding else "no plan meets every SLO")
        summary = self._summary(workload, decided)
        why = f"{reason}; {short}{_what(decided)}"
        if self._dry_run:
            self._decide("advised", cause, why, same=_shares(decided), **summary)
            return Round(profiles, workload, plan, None, short)
        held_back = self._refusals.holds_back(plan, self._steps.stated(plan), self._clock.now_us())
        if held_back is not None and current is not None:
            self._retry_at_us = self._clock.now_us() + int(RETRY_S * 1e6)
            self._decide("kept", cause, f"{reason}; {held_back}", same="held back", **summary)
            return Round(profiles, workload, current.plan, None, current.shortfall)
        if not decided.found and cause == "rate":
            self._decide("kept", cause, why, same="", **summary)
            return Round(profiles, workload, plan, None, short)
        report = self._put_in_force(decided, profiles, workload, current)
        what = "applied" if decided.found or report.loads else "kept"
        self._decide(what, cause, why, loads=report.loads, **summary)
        return Round(profiles, workload, plan, report, short)

    def _choose(self, profiles: ProfileSet, workload: Workload, cause: str) -> _Decided:
        """The plan worth having, and the best that can be had where not all fits."""
        steps, lenient = self._steps, cause != START
        reach = steps.reach()
        asked = with_reserve(workload, self._settings)
        rows_per_s = sum(model.weight * model.rate_per_s for model in workload.models)
        may_load = cause != "rate" or (self._may_load() and self._settled)

        def make(held: Held) -> Plan:
            return steps.plan(profiles, asked, held, lenient=lenient)

        def without_loads(held: Held) -> Plan:
            return steps.plan(profiles, asked, {**self._in_force(workload, reach), **held}, lenient=lenient)

        choice = choose(make, steps.stated, reach, rows_per_s, self._took_s, self._settings)
        self._retry_at_us = None
        if not may_load and loaded(choice.found):
            since_us = self._loaded_at_us or 0
            self._retry_at_us = max(since_us + int(self._settings.cooldown_s * 1e6), self._clock.now_us())
            live = choose(without_loads, steps.stated, reach, rows_per_s, self._took_s, self._settings)
            choice = live if live.plan.models else choice
        if choice.plan.feasible:
            return _Decided(BestPlan(choice.plan, {}, {}), choice, choice.found, reach)
        held = {model: as_it_is(row) for model, row in choice.plan.models.items()}
        best = best_plan(lambda part: steps.plan(profiles, part, held, lenient=lenient), asked)
        return _Decided(best, choice, changes(steps.stated(best.plan), best.plan, reach), reach)

    def _in_force(self, workload: Workload, reach: Reach) -> dict[str, tuple[float, int]]:
        """What the configs state of those models whose share is fixed for the life of their process."""
        named = self._steps.stated_instances(model.name for model in workload.models)
        return {model: held for model, held in named.items() if model not in reach.levels}

    def _put_in_force(
        self, decided: _Decided, profiles: ProfileSet, workload: Workload, current: Round | None
    ) -> ApplyReport:
        """The arbiter first, then files, then loads one at a time. Errors: DstackError, with all as
        before."""
        plan, now_us = decided.best.plan, self._clock.now_us
        told = self._steps.tell(plan, profiles, workload)
        self._telemetry.part("arbiter", up=told)
        began_us = now_us()
        try:
            report = self._steps.apply(plan, decided.reach)
        except DstackError as error:
            if current is not None:
                self._steps.tell(current.plan, current.profiles, current.workload)
            if isinstance(error, PlanRefusedError) and error.by_server:
                self._refusals.refused(error, now_us())
                self._telemetry.load_failed(error.model, rolled_back=True)
            raise
        self._refusals.applied(plan)
        self._took_s.update({each.model: each.load_s for each in report.outcomes if each.load_s > 0})
        if report.loads:
            self._loaded_at_us = now_us()
        self._telemetry.applied(report, (now_us() - began_us) / 1e6)
        for way, count in counts(decided.found).items():
            self._telemetry.changed(way.value, count)
        self._telemetry.in_force(plan)
        return report

    # -- what it tells ------------------------------------------------------------------------------------

    def _summary(self, workload: Workload, decided: _Decided) -> dict[str, Any]:
        plan = decided.best.plan
        return {
            "rates": {model.name: round(model.rate_per_s, 3) for model in workload.models},
            "plan": {
                name: {"gpu_percent": row.gpu_percent, "batch_size": row.batch_size}
                for name, row in plan.models.items()
            },
            "headroom": round(min(plan.headroom, 1e6), 3),
            "feasible": plan.feasible,
            "changes": [str(change) for change in decided.found],
        }

    def _decide(self, what: str, cause: str, reason: str, *, same: str | None = None, **fields: Any) -> None:
        """Log it. same: tells decisions that change nothing apart; one like the last is logged once a
        minute."""
        self._telemetry.decided(what, cause, reason)
        now_us = self._clock.now_us()
        if same is not None:
            key, at_us = self._silent
            if key == f"{what} {same}" and now_us - at_us < SAME_AGAIN_S * 1e6:
                return
            self._silent = (f"{what} {same}", now_us)
        else:
            self._silent = ("", 0)
        head = {"time_s": round(self._clock.wall_time_s(), 3), "what": what, "reason": reason, "cause": cause}
        self._log.append({**head, **fields})

    def _show(self, current: Round, look: Look) -> None:
        """What this look saw, for the metrics and the board."""
        planned = {model.name: model.rate_per_s for model in current.workload.models}
        looks = {}
        for model, view in look.views.items():
            row = current.plan.models.get(model)
            looks[model] = ModelLook(
                measured_per_s=view.forecast.mean_per_s if view.forecast else None,
                forecast_per_s=view.forecast.rate_per_s if view.forecast else None,
                planned_per_s=planned.get(model),
                attainment=view.attainment,
                drift=view.drift,
                predicted_run_ms=row.latency_ms if row else None,
                measured_run_ms=view.run_ms,
            )
        self._telemetry.looked(looks)


def _short(best: BestPlan) -> str:
    """What does not fit, as a beginning of a sentence; "" where all does."""
    if best.plan.feasible:
        return ""
    limit = best.plan.binding[0] if best.plan.binding else "the workload does not fit"
    return f"{limit}: {best.shortfall}; " if best.shortfall else f"{limit}; "


def _what(decided: _Decided) -> str:
    """What changes, the least disruptive first, and why no more or no less."""
    found = ", ".join(map(str, decided.found)) or "nothing to change"
    return f"{found} ({decided.choice.why})"


def _shares(decided: _Decided) -> str:
    return ", ".join(map(str, decided.found))
