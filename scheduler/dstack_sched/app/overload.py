"""A plan whatever the demand: where the workload does not fit, the best that can be had, and what it leaves
out.

Rates that do not fit are cut to shares in proportion to weight: model m keeps min(1, t w_m / max w) of its
rate, with the largest t that fits. With equal weights all are cut alike; a model of half the weight is cut
twice as deep before the others are touched. That is where the engine's scoreboard drives the traffic anyway
(service over weight), so the plan states what overload will look like.

An SLO that no share and batch can keep (two runs do not fit into it) must not leave the others without a
plan: such a model is planned at the shortest SLO that can be kept. Its stated SLO stays in force, so that its
requests go first, and attainment tells the truth.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from dstack_sched.domain.plan import Plan
from dstack_sched.domain.workload import ModelDemand, Workload

LEAST_KEPT = 0.02
PRECISION = 0.02  # of the largest t
SLO_STEPS = 16  # times an SLO is stretched by STRETCH before it counts as hopeless
STRETCH = 1.25

Planner = Callable[[Workload], Plan]
"""A workload -> its plan, as app.planning.make_plan gives it."""


@dataclass(frozen=True, slots=True)
class BestPlan:
    """plan: as for a workload that fits, or for the part that does (feasible False then, and binding[0] says
    why). kept: model -> share of its rate that was planned for. slo_ms: model -> the SLO planned for in place
    of the stated one, which cannot be kept."""

    plan: Plan
    kept: Mapping[str, float]
    slo_ms: Mapping[str, float]

    @property
    def shortfall(self) -> str:
        """What is left out, one line; empty where nothing is."""
        cut = [f"{model} {share:.0%}" for model, share in self.kept.items() if share < 1 - 1e-9]
        lines = [f"of the rates this much fits: {', '.join(cut)}"] if cut else []
        lines += [
            f"{model}: its SLO cannot be kept, planned for {ms:.3g} ms" for model, ms in self.slo_ms.items()
        ]
        return "; ".join(lines)


def best_plan(make: Planner, workload: Workload) -> BestPlan:
    """The plan of the workload, else of the largest part of it. Its `models` are empty only where nothing
    fits at any rate (memory, clients). Errors: those of `make`."""
    plan = make(workload)
    kept = dict.fromkeys((model.name for model in workload.models), 1.0)
    if plan.feasible:
        return BestPlan(plan, kept, {})
    reasons, asked = plan.binding, workload
    slo_ms: dict[str, float] = {}
    if not plan.models:
        asked, slo_ms, plan = _with_slos_that_can_be_kept(make, workload, plan)
    if plan.models and not plan.feasible:
        kept, plan = _largest_part(make, asked, plan)
    stated = {model.name: model.slo_ms for model in workload.models}
    rows = {name: replace(row, slo_ms=stated[name]) for name, row in plan.models.items()}
    headroom = min(plan.headroom, *kept.values(), 1.0)
    return BestPlan(
        replace(plan, models=rows, feasible=False, binding=reasons, headroom=headroom), kept, slo_ms
    )


def _largest_part(make: Planner, workload: Workload, plan: Plan) -> tuple[dict[str, float], Plan]:
    """The rates cut by weight, as far as must be, and their plan. `plan`: the infeasible one, at its one
    scale for all rates; it is taken where nothing better is found."""
    top = max(model.weight for model in workload.models)
    equal = all(model.weight == top for model in workload.models)
    uniform = dict.fromkeys((model.name for model in workload.models), min(plan.headroom, 1.0))
    if equal:
        return uniform, plan
    low, high = LEAST_KEPT, top / min(model.weight for model in workload.models)
    found: tuple[dict[str, float], Plan] | None = None
    while high > low * (1 + PRECISION):
        middle = (low * high) ** 0.5
        kept = {m.name: min(1.0, middle * m.weight / top) for m in workload.models}
        part = make(_scaled(workload, kept))
        if part.feasible:
            found, low = (kept, part), middle
        else:
            high = middle
    return found or (uniform, plan)


def _with_slos_that_can_be_kept(
    make: Planner, workload: Workload, plan: Plan
) -> tuple[Workload, dict[str, float], Plan]:
    """The SLOs that stand in every plan's way, stretched until a plan is found; nothing else is touched.

    A model alone, at next to no rate, shows whether its SLO can be kept at all. What is left after that is
    the wait for co-runners: those models are stretched on, and if that is not enough all are.
    """
    slo_ms: dict[str, float] = {}
    for model in workload.models:
        stretched = model.slo_ms
        for _ in range(SLO_STEPS):
            if stretched is None or make(Workload((_slow(model, stretched),))).models:
                break
            stretched *= STRETCH
        if stretched is not None and stretched != model.slo_ms:
            slo_ms[model.name] = stretched
    guilty = frozenset(slo_ms)
    for step in range(2 * SLO_STEPS):
        relaxed = _relaxed(workload, slo_ms)
        plan = make(relaxed)
        if plan.models:
            return relaxed, slo_ms, plan
        longer = {m.name: STRETCH * m.slo_ms for m in relaxed.models if m.slo_ms is not None}
        if guilty and step < SLO_STEPS:  # those that cannot keep theirs anyhow make room first
            longer = {name: ms for name, ms in longer.items() if name in guilty}
        slo_ms |= longer
    return workload, {}, plan


def _slow(model: ModelDemand, slo_ms: float) -> ModelDemand:
    return replace(model, slo_ms=slo_ms, rate_per_s=1e-3)


def _relaxed(workload: Workload, slo_ms: Mapping[str, float]) -> Workload:
    models = tuple(replace(m, slo_ms=slo_ms.get(m.name, m.slo_ms)) for m in workload.models)
    return replace(workload, models=models)


def _scaled(workload: Workload, kept: Mapping[str, float]) -> Workload:
    models = tuple(replace(m, rate_per_s=m.rate_per_s * kept[m.name]) for m in workload.models)
    return replace(workload, models=models)
