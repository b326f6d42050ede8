"""When to plan again, and which of the plans that could be in force is worth its reloads: functions of
values.

A new plan is made when the forecast of some model has clearly left the rate that was planned for, when a
profile was refitted, or when something else says so (a GPU went, the workload file changed). Changes that
are told (app/changes.py) cost nothing. Loads cost capacity while the new process starts beside the old one.
So three kinds of plan are held against each other, by rows answered in time over the next `horizon_s`:

    live   every share that a load would change is held as it is: only messages
    full   the best plan, whatever it loads
    between: the best plan with some of those shares held, as many as can be without losing more than they
    cost

What a plan is worth: with headroom h (largest factor on the rates that fits) the share of rows that will miss
is E[(1 - h X)+], X log-normal with median 1 and deviation `capacity_error`: the capacity that was predicted
is not the one that is met. h = 1 loses 6% at an error of 15%, h = 1.2 loses 1%, h = 1.5 nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from statistics import NormalDist

from dstack_sched.app.changes import Change, Reach, changes, loaded
from dstack_sched.app.forecast import Forecast
from dstack_sched.domain.plan import ModelPlan, Plan
from dstack_sched.domain.workload import Workload

Held = Mapping[str, tuple[float, int]]
"""Model -> the GPU% and the number of instances that it keeps."""
Planner = Callable[[Held], Plan]
"""What is held -> the best plan with that."""


@dataclass(frozen=True, slots=True)
class ReplanSettings:
    """band, sigmas: a forecast further than this from the rate planned for (relative; standard errors of its
    mean) calls for a plan. cooldown_s: between two rounds with loads; settle_s: from a change of a rate to
    a load for it. floor: share of a model's stated rate that is planned for even when nobody calls it.
    horizon_s: over which a load must pay. load_s: how long one takes, until one was measured.
    capacity_error: module docstring. load_factor: part of the capacity that is planned to be used
    (decisions/0092)."""

    band: float = 0.1
    sigmas: float = 2.0
    cooldown_s: float = 10.0
    settle_s: float = 2.5
    floor: float = 0.1
    horizon_s: float = 60.0
    load_s: float = 3.0
    capacity_error: float = 0.15
    load_factor: float = 0.9


@dataclass(frozen=True, slots=True)
class Choice:
    """The plan to put in force, what changes by it, and why it and no other. lost: expected share of rows
    that miss; cost_rows: of its loads."""

    plan: Plan
    found: tuple[Change, ...]
    lost: float
    cost_rows: float
    why: str


def moved(planned: Mapping[str, float], now: Mapping[str, Forecast], settings: ReplanSettings) -> str | None:
    """The model whose forecast is furthest from the rate planned for, as a reason to plan again, or None."""
    worst, reason = 0.0, None
    for model, forecast in now.items():
        if model not in planned:
            continue
        apart = abs(forecast.rate_per_s - planned[model])
        room = max(
            settings.band * max(planned[model], forecast.rate_per_s), settings.sigmas * forecast.noise_per_s
        )
        if room > 0 and apart / room > max(worst, 1.0):
            worst = apart / room
            reason = (
                f"{model}: {forecast.rate_per_s:.3g}/s forecast (mean {forecast.mean_per_s:.3g}/s over "
                f"{forecast.window_s:.0f} s, dispersion {forecast.dispersion:.2g}), "
                f"{planned[model]:.3g}/s planned for"
            )
    return reason


def settled(now: Mapping[str, Forecast], settings: ReplanSettings) -> bool:
    """Whether every forecast rests on enough time since its last change to load models by it."""
    return all(forecast.window_s >= settings.settle_s for forecast in now.values())


def rates_to_plan(stated: Workload, now: Mapping[str, Forecast], settings: ReplanSettings) -> Workload:
    """The stated workload at the rates forecast; a model without a forecast keeps its stated rate."""
    models = []
    for model in stated.models:
        if model.name in now:
            rate = max(now[model.name].rate_per_s, model.rate_per_s * settings.floor)
            model = replace(model, rate_per_s=rate)
        models.append(model)
    return replace(stated, models=tuple(models))


def with_reserve(workload: Workload, settings: ReplanSettings) -> Workload:
    """The rates over the load factor: what the planner is asked to fit."""
    models = tuple(replace(m, rate_per_s=m.rate_per_s / settings.load_factor) for m in workload.models)
    return replace(workload, models=models)


def expected_loss(headroom: float, error: float) -> float:
    """E[(1 - h X)+], ln X normal with mean 0 and deviation `error` > 0: share of rows beyond the capacity."""
    if headroom <= 0:
        return 1.0
    if math.isinf(headroom):
        return 0.0
    phi = NormalDist().cdf
    d = -math.log(headroom) / error
    return max(0.0, phi(d) - headroom * math.exp(error**2 / 2) * phi(d - error))


def load_cost_rows(
    models: Collection[str],
    plan: Plan,
    rows_per_s: float,
    took_s: Mapping[str, float],
    settings: ReplanSettings,
) -> float:
    """Rows that the loads keep from being answered in time: while a model starts anew its share counts
    twice."""
    busy = min(1.0, 1.0 / plan.headroom) if plan.headroom > 0 else 1.0
    cost = 0.0
    for model in models:
        row = plan.models.get(model)
        share = row.gpu_percent / plan.capacity_percent if row else 1.0
        cost += took_s.get(model, settings.load_s) * min(share, 1.0) * busy * rows_per_s
    return cost


def as_it_is(row: ModelPlan) -> tuple[float, int]:
    """What a model keeps when nothing of it is loaded."""
    return row.gpu_percent, max(1, len(row.replicas))


def choose(
    make: Planner,
    stated: Callable[[Plan], Plan],
    reach: Reach,
    rows_per_s: float,
    took_s: Mapping[str, float],
    settings: ReplanSettings,
) -> Choice:
    """The plan that loses the fewest rows over the horizon, loads included (module docstring).

    make({}) is the full plan; `stated` gives what is in force for the models of a plan; took_s: how long the
    last load of each model took.
    """

    def weighed(plan: Plan, what: str) -> tuple[float, Choice]:
        found = changes(stated(plan), plan, reach)
        lost = expected_loss(plan.headroom, settings.capacity_error)
        cost = load_cost_rows(loaded(found), plan, rows_per_s, took_s, settings)
        total = lost * rows_per_s * settings.horizon_s + cost
        return total, Choice(plan, found, lost, cost, what)

    def held_at(models: Collection[str]) -> dict[str, tuple[float, int]]:
        return {m: as_it_is(in_force.models[m]) for m in models if m in in_force.models}

    full = make({})
    in_force = stated(full)
    best_rows, best = weighed(full, "the best plan")
    to_load = [m for m in loaded(best.found) if m in in_force.models]
    if not to_load:
        return best
    if not full.models:
        to_load = list(in_force.models)
    live_rows, live = weighed(make(held_at(to_load)), "no load is worth what it would gain")
    held: list[str] = []
    if len(to_load) > 1:
        for model in sorted(to_load, key=lambda m: -full.models[m].gpu_percent):
            rows, tried = weighed(make(held_at([*held, model])), f"{model} can stay as it is")
            if rows <= best_rows:
                held.append(model)
                best_rows, best = rows, replace(tried, why=f"{', '.join(held)} can stay as it is")
    gain_rows = (live.lost - best.lost) * rows_per_s * settings.horizon_s
    if live.plan.models and live_rows <= best_rows:
        return replace(
            live,
            why=f"{live.why}: {max(gain_rows, 0):.0f} rows in {settings.horizon_s:.0f} s at a cost of "
            f"{best.cost_rows:.0f}",
        )
    return replace(
        best,
        why=f"{best.why}: {live.lost:.1%} would miss without it, {best.lost:.1%} with it; its loads cost "
        f"{best.cost_rows:.0f} rows and gain {gain_rows:.0f} in {settings.horizon_s:.0f} s",
    )
