"""Made-up models and scenarios for the engine's and the simulator's tests: no file, no measurement."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from dstack_sched.domain.event import EngineModel, PlanChanged
from dstack_sched.domain.profile import ProfilePoint
from dstack_sched.domain.workload import ModelDemand, OnLate
from dstack_sched.policy.interference import Interference
from dstack_sched.policy.latency import LatencySurface
from dstack_sched.sim.arrivals import Arrivals
from dstack_sched.sim.gpu import SpeedModel
from dstack_sched.sim.scenario import Delays, Fault, Scenario, SimInstance

PERCENTS = (10, 20, 40, 60, 80, 100)
BATCHES = (1, 2, 4, 8, 16)
LIGHT = (0.75, 0.01, 10.0, 6.2)
HEAVY = (1.0, 0.04, 40.0, 22.0)


def surface(name: str, a: Sequence[float] = LIGHT, tail: float = 1.02) -> LatencySurface:
    """f(p, b) = a0 + a1 b + (a2 + a3 b) / p exactly; p99 = tail x p50."""
    points = []
    for p in PERCENTS:
        for b in BATCHES:
            ms = a[0] + a[1] * b + (a[2] + a[3] * b) / p
            points.append(ProfilePoint(p, b, ms, ms * tail, 40))
    return LatencySurface(name, points)


def engine_model(
    shape: LatencySurface,
    demand: ModelDemand,
    gpu_percent: float,
    batch_size: int,
    interference: Interference,
) -> EngineModel:
    """What the engine is told of a model with this surface."""
    return EngineModel(
        demand.name, gpu_percent, batch_size, round(demand.slo_ms * 1000) if demand.slo_ms else 0,
        demand.weight, demand.on_late, gpu_percent, shape.percents, shape.batches,
        shape.table(shape.percents, shape.batches),
        interference.k.get(demand.name, interference.default) / 100.0, interference.exponent,
    )  # fmt: skip


def scenario(
    models: Sequence[tuple[ModelDemand, float, Sequence[float]]],
    *,
    capacity_percent: float = 100.0,
    duration_s: float = 1.0,
    arrivals: Arrivals | None = None,
    levels: Sequence[float] = (),
    interference: Interference | None = None,
    faults: Sequence[Fault] = (),
    profiled: bool = True,
    jitter: bool = True,
    batch_size: int = 8,
) -> Scenario:
    """models: (demand, GPU%, shape of its surface). profiled False: the engine is told no run times."""
    interference = interference or Interference()
    surfaces = {d.name: surface(d.name, a) for d, _, a in models}
    instances = tuple(SimInstance(d.name, d, p, tuple(levels), 16, batch_size, 16) for d, p, _ in models)
    plans = [engine_model(surfaces[d.name], d, p, batch_size, interference) for d, p, _ in models]
    if not profiled:
        plans = [replace(x, gpu_percents=(), batch_sizes=(), latency_ms=()) for x in plans]
    return Scenario(
        SpeedModel(surfaces, interference, jitter), instances, PlanChanged(capacity_percent, tuple(plans)),
        round(duration_s * 1e6), arrivals or Arrivals(), Delays(), tuple(faults),
    )  # fmt: skip


def demand(
    name: str,
    rate_per_s: float,
    slo_ms: float | None = 20.0,
    weight: float = 1.0,
    on_late: OnLate = OnLate.REJECT,
) -> ModelDemand:
    return ModelDemand(name, slo_ms, rate_per_s, weight, on_late)
