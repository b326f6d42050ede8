"""A deployment in memory for the control loop: counters that follow rates, plans in proportion to them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from dstack_sched.adapters.decision_log import FileDecisionLog
from dstack_sched.app.changes import Reach
from dstack_sched.app.control_loop import ControlLoop, Round
from dstack_sched.app.replan import Held, ReplanSettings
from dstack_sched.app.telemetry import ControllerTelemetry, NoBoard, NoMetrics
from dstack_sched.app.watcher import Watcher
from dstack_sched.domain.change import ApplyReport, ModelOutcome
from dstack_sched.domain.plan import ModelPlan, Plan
from dstack_sched.domain.profile import Correction, Device, ModelProfile, ProfilePoint, ProfileSet
from dstack_sched.domain.workload import ModelDemand, Workload
from dstack_sched.engine.run_times import Seen
from dstack_sched.errors import PlanRefusedError, ServerError
from fakes.serving import FakeClock

SETTINGS = ReplanSettings(cooldown_s=10.0, load_factor=1.0)
STATED = Workload((ModelDemand("a", 50.0, 20.0), ModelDemand("b", 80.0, 5.0)))
PEAK_PER_S = 2.0  # rows a second that one percent of the device serves
CPU = Device("cpu", 2, 1, "cpu", "onnxruntime")


def row(percent: float, batch: int = 4, **extra: Any) -> ModelPlan:
    fields: dict[str, Any] = {"slo_ms": 50.0, "rate_per_s": 1.0} | extra
    return ModelPlan(0, percent, batch, 500, 10.0, 100.0, 1.0, 40.0, 0.5, **fields)


def profile(name: str) -> ModelProfile:
    points = [ProfilePoint(p, b, 200.0 * b / p, 220.0 * b / p, 100) for p in (50.0, 100.0) for b in (1, 4)]
    return ModelProfile(name, f"{ord(name[0]):064x}", 1, tuple(points))


class Counters:
    """A server whose counters follow rates that a test sets; only statistics are asked of it."""

    def __init__(self, clock: FakeClock) -> None:
        self.clock = clock
        self.rates = {"a": 20.0, "b": 5.0}
        self.counts = {"a": 0.0, "b": 0.0}
        self.failed: dict[str, int] = {}
        self.down = False
        self.unloaded = ""
        self._last_s = 0.0

    def statistics(self, model: str) -> dict[str, Any]:
        if self.down or model == self.unloaded:
            raise ServerError("Triton is away")
        passed_s, self._last_s = self.clock.now - self._last_s, self.clock.now
        for name, rate in self.rates.items():
            self.counts[name] = self.counts.get(name, 0.0) + rate * passed_s
        fail = {"fail": {"count": self.failed.get(model, 0)}}
        rows = int(self.counts[model])
        return {"model_stats": [{"name": model, "inference_count": rows, "inference_stats": fail}]}


class FakeSources:
    """watcher.Sources as a test sets them."""

    def __init__(self) -> None:
        self.backlog: dict[str, int] = {}
        self.totals: dict[str, dict[str, Any]] = {}
        self.seen: dict[str, list[Seen]] = {}

    def waiting(self) -> Mapping[str, int]:
        return self.backlog

    def arbiter_models(self) -> Mapping[str, Mapping[str, Any]]:
        return self.totals

    def run_times(self, model: str) -> Sequence[Seen]:
        return self.seen.get(model, [])


class FakeSteps:
    """steps.Steps. A model needs rate / PEAK_PER_S percent, and gets its part of 100% in steps of 10;
    batch 4, or 8 from 30 rows a second on. Remembers what it was asked, states what it applied last."""

    def __init__(self, clock: FakeClock) -> None:
        self.clock = clock
        self.workload = STATED
        self.arbiter = True
        self.levels: tuple[str, ...] = ()
        self.in_force: dict[str, ModelPlan] = {}
        self.profiled: list[list[str]] = []
        self.told: list[Plan] = []
        self.applied: list[Plan] = []
        self.loads: list[str] = []
        self.kept: dict[str, Correction] = {}
        self.news: list[str] = []
        self.health_checks = 0
        self.refuse = ""
        self.fail: Exception | None = None
        self.load_s = 2.0

    def wanted(self) -> Workload:
        return self.workload

    def profile(self, models: Iterable[str]) -> ProfileSet:
        names = list(models)
        self.profiled.append(names)
        return ProfileSet(CPU, {name: profile(name) for name in names})

    def plan(self, profiles: ProfileSet, workload: Workload, held: Held, *, lenient: bool) -> Plan:
        if self.fail:
            raise self.fail
        slow = {name: p.points[0].latency_ms_p50 / 4.0 for name, p in profiles.models.items()}
        needs = {m.name: slow[m.name] * m.rate_per_s / PEAK_PER_S for m in workload.models}
        total = sum(needs.values())
        shares = {n: max(10.0, 10.0 * round(10.0 * need / total)) for n, need in needs.items()} | {
            model: percent for model, (percent, _) in held.items()
        }
        headroom = min(shares[name] / need for name, need in needs.items() if need > 0)
        scale = min(headroom, 1.0)
        rows = {
            m.name: row(
                shares[m.name],
                8 if m.rate_per_s >= 30 else 4,
                slo_ms=m.slo_ms,
                weight=m.weight,
                rate_per_s=m.rate_per_s * scale,
            )
            for m in workload.models
        }
        limits = () if headroom >= 1 else (f"{min(needs)}: too much",)
        return Plan(100.0, ("cpu",), rows, headroom >= 1, limits, headroom)

    def reach(self) -> Reach:
        return Reach(self.arbiter, self.levels)

    def stated(self, plan: Plan) -> Plan:
        rows = {
            m: replace(r, gpu_percent=self.in_force[m].gpu_percent, batch_size=self.in_force[m].batch_size,
                       slo_ms=self.in_force[m].slo_ms)
            for m, r in plan.models.items() if m in self.in_force
        }  # fmt: skip
        return replace(plan, models=rows)

    def stated_instances(self, models: Iterable[str]) -> Held:
        return {m: (self.in_force[m].gpu_percent, 1) for m in models if m in self.in_force}

    def tell(self, plan: Plan, profiles: ProfileSet, workload: Workload) -> bool:
        if self.arbiter:
            self.told.append(plan)
        return self.arbiter

    def apply(self, plan: Plan, reach: Reach) -> ApplyReport:
        outcomes = []
        for model, new in plan.models.items():
            old = self.in_force.get(model)
            if model == self.refuse:
                text = f"{model}: the plan could not be put in force"
                raise PlanRefusedError(model, text) from ServerError("out of memory")
            hard = old is None or (old.gpu_percent != new.gpu_percent and model not in reach.levels)
            soft = old is not None and (old.batch_size, old.slo_ms) != (new.batch_size, new.slo_ms)
            load = hard or (soft and not reach.arbiter)
            if load:
                self.loads.append(model)
                self.clock.now += self.load_s
            action = "reloaded" if load else "told" if soft else "unchanged"
            outcomes.append(
                ModelOutcome(model, action, new.gpu_percent, new.batch_size, self.load_s if load else 0.0)
            )
        self.in_force.update(plan.models)
        self.applied.append(plan)
        return ApplyReport(tuple(outcomes))

    def urgent(self) -> str | None:
        return self.news.pop() if self.news else None

    def corrections(self, profiles: ProfileSet) -> Mapping[str, Correction]:
        return self.kept

    def keep_corrections(self, profiles: ProfileSet, corrections: Mapping[str, Correction]) -> None:
        self.kept = dict(corrections)

    def check_health(self) -> None:
        self.health_checks += 1


class LoopBench:
    """A loop over all of the above."""

    def __init__(self, folder: Path, **options: Any) -> None:
        self.clock = FakeClock()
        self.steps, self.sources = FakeSteps(self.clock), FakeSources()
        self.server = Counters(self.clock)
        self.log = FileDecisionLog(folder)
        self.loop = self.new_loop(**options)

    def new_loop(self, **options: Any) -> ControlLoop:
        """Another controller on the same deployment."""
        watcher = Watcher(["a", "b"], self.server, self.sources, self.clock)
        telemetry = ControllerTelemetry(NoMetrics(), NoBoard(), self.clock)
        return ControlLoop(
            self.steps, watcher, self.clock, self.log, telemetry, **{"settings": SETTINGS, **options}
        )

    def watch(self, first: Round, seconds: float) -> Round:
        end_s = self.clock.now + seconds
        return self.loop.watch(first, 1.0, lambda: self.clock.now < end_s)

    def decisions(self) -> list[str]:
        return [entry["what"] for entry in self.log.last(1000)]

    def reasons(self) -> list[str]:
        return [entry["reason"] for entry in self.log.last(1000)]
