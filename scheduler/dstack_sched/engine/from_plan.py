"""A plan as the engines take it: one PlanChanged a GPU."""

from __future__ import annotations

from dstack_sched.domain.event import EngineModel, PlanChanged
from dstack_sched.domain.plan import ModelPlan, Plan
from dstack_sched.domain.profile import ProfileSet
from dstack_sched.domain.workload import ModelDemand, Workload
from dstack_sched.policy.interference import Interference, interference_of
from dstack_sched.policy.latency import LatencySurface


def engine_plans(plan: Plan, profiles: ProfileSet, workload: Workload) -> dict[int, PlanChanged]:
    """GPU index -> the event that puts the plan in force there. Models without a profile, and best-effort
    ones that the plan leaves out, come with what is known of them: their engines learn the rest."""
    surfaces = {name: LatencySurface.from_profile(profile) for name, profile in profiles.models.items()}
    interference = interference_of(profiles, surfaces)
    by_gpu: dict[int, list[EngineModel]] = {gpu: [] for gpu in range(max(len(plan.gpus), 1))}
    for demand in workload.models:
        row = plan.models.get(demand.name)
        if row is None:
            continue
        surface = surfaces.get(demand.name)
        placed = {r.gpu: r.gpu_percent for r in row.replicas} or {row.gpu: row.gpu_percent}
        for gpu, percent in placed.items():
            model = engine_model(demand, row, percent, surface, interference)
            by_gpu.setdefault(gpu, []).append(model)
    return {gpu: PlanChanged(plan.capacity_percent, tuple(models)) for gpu, models in by_gpu.items()}


def engine_model(
    demand: ModelDemand,
    row: ModelPlan,
    gpu_percent: float,
    surface: LatencySurface | None,
    interference: Interference,
) -> EngineModel:
    """One model's part. The table holds the measured GPU% and batch sizes, and the planned point."""
    percents: tuple[float, ...] = ()
    batches: tuple[int, ...] = ()
    table: tuple[tuple[float, ...], ...] = ()
    if surface is not None:
        percents = tuple(sorted({*surface.percents, 100.0, gpu_percent}))
        batches = tuple(sorted({*surface.batches, 1, row.batch_size}))
        table = surface.table(percents, batches)
    return EngineModel(
        name=demand.name,
        gpu_percent=gpu_percent,
        batch_size=row.batch_size,
        slo_us=round(demand.slo_ms * 1000) if demand.slo_ms else 0,
        weight=demand.weight,
        on_late=demand.on_late,
        knee_percent=row.knee_percent,
        gpu_percents=percents,
        batch_sizes=batches,
        latency_ms=table,
        interference_per_percent=interference.k.get(demand.name, interference.default) / 100.0,
        interference_exponent=interference.exponent,
    )
