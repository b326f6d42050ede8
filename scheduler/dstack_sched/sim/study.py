"""From profiles, demands and a policy's name to results: how each policy is deployed, one run, the peak.

A policy is deployed as its users would: processes with the whole GPU or with fixed shares (the plan's, or the
best static ones of side_by_side.py), or, for D-STACK with levels, a choice of shares by batch. Policies that
need no arbiter pay no control-plane delay.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from scipy.stats import t as student

from dstack_sched.domain.event import EngineModel, PlanChanged
from dstack_sched.domain.plan import Plan
from dstack_sched.domain.profile import ProfileSet
from dstack_sched.domain.workload import ModelDemand, Workload
from dstack_sched.engine.registry import policy as find_policy
from dstack_sched.errors import InputError
from dstack_sched.policy.bounds import Bound, ideal_corun, ideal_isolated
from dstack_sched.policy.interference import interference_of
from dstack_sched.policy.latency import LatencySurface
from dstack_sched.sim.arrivals import Arrivals
from dstack_sched.sim.gpu import SpeedModel
from dstack_sched.sim.result import SimResult, summarize
from dstack_sched.sim.scenario import NO_SERVING, Delays, Fault, Scenario, Serving, SimInstance
from dstack_sched.sim.side_by_side import Shares, side_by_side
from dstack_sched.sim.world import World

BOUND_STEP_PERCENT = 5.0
LEVELS_CAPACITY = 225.0  # with levels, where no plan says otherwise (decisions/0051)
_PEAK_STEPS = 40


@dataclass(frozen=True, slots=True)
class Case:
    """What is asked: models at given rates on one GPU of the profiled kind. levels: shares that backends take
    from batch to batch; empty: fixed shares. shares: the static deployment. capacity_percent: of the engine.
    believed: what the engine is told of the speeds, where that is not the truth (profiles that have drifted).
    """

    speeds: SpeedModel
    demands: tuple[ModelDemand, ...]
    attainment: float
    shares: Shares
    capacity_percent: float
    levels: tuple[float, ...] = ()
    arrivals: Arrivals = field(default_factory=Arrivals)
    delays: Delays = field(default_factory=Delays)
    faults: tuple[Fault, ...] = ()
    serving: Serving = field(default_factory=Serving)
    believed: SpeedModel | None = None

    def scaled(self, factor: float) -> Case:
        """The same with all rates times factor."""
        demands = tuple(replace(d, rate_per_s=d.rate_per_s * factor) for d in self.demands)
        return replace(self, demands=demands)

    @property
    def total_rate_per_s(self) -> float:
        return sum(d.rate_per_s for d in self.demands)


def make_case(
    profiles: ProfileSet,
    workload: Workload,
    *,
    levels: Sequence[float] = (),
    arrivals: Arrivals | None = None,
    plan: Plan | None = None,
    faults: Sequence[Fault] = (),
    serving: Serving = NO_SERVING,
) -> Case:
    """The case of a workload on one profiled GPU. The SLOs are the clients': what serving takes outside the
    instance is taken off. Raises InputError for a model without a profile or an SLO that leaves nothing."""
    missing = [d.name for d in workload.models if d.name not in profiles.models]
    if missing:
        raise InputError(f"{missing[0]}: in the workload but not in the profiles; profile it first")
    workload = replace(workload, models=tuple(within_serving(d, serving) for d in workload.models))
    surfaces = {d.name: LatencySurface.from_profile(profiles.models[d.name]) for d in workload.models}
    speeds = SpeedModel(surfaces, interference_of(profiles, surfaces))
    shares = (
        _planned(plan, workload) if plan else side_by_side(surfaces, workload.models, speeds.interference)
    )
    total = sum(shares.gpu_percent.values())
    capacity = plan.capacity_percent if plan else max(LEVELS_CAPACITY if levels else 100.0, total)
    return Case(
        speeds, tuple(workload.models), workload.attainment, shares, capacity,
        tuple(sorted(levels)), arrivals or Arrivals(), faults=tuple(faults), serving=serving,
    )  # fmt: skip


def within_serving(demand: ModelDemand, serving: Serving) -> ModelDemand:
    """The demand with the SLO that serving leaves for waiting and running. Raises InputError for an SLO that
    leaves nothing."""
    if demand.slo_ms is None or not serving.outside_us:
        return demand
    left_ms = demand.slo_ms - serving.outside_us / 1000
    if left_ms <= 0:
        raise InputError(f"{demand.name}: slo_ms {demand.slo_ms:g} is less than serving alone takes")
    return replace(demand, slo_ms=left_ms)


def _planned(plan: Plan, workload: Workload) -> Shares:
    """The plan's shares. Raises InputError where it leaves a model of the workload out."""
    for demand in workload.models:
        if demand.name not in plan.models:
            raise InputError(f"{demand.name}: in the workload but not in the plan; plan again")
    rows = {d.name: plan.models[d.name] for d in workload.models}
    return Shares(
        {name: row.gpu_percent for name, row in rows.items()},
        {name: row.batch_size for name, row in rows.items()},
        plan.headroom,
    )


def scenario_of(case: Case, policy_name: str, duration_us: int) -> Scenario:
    """The policy's deployment on the GPU of the case."""
    deployed = find_policy(policy_name)
    percents = {
        d.name: 100.0 if deployed.shares == "whole" else case.shares.gpu_percent[d.name] for d in case.demands
    }
    levels = case.levels if deployed.levels else ()
    instances = tuple(
        SimInstance(
            d.name, d, percents[d.name], levels, case.speeds.surfaces[d.name].max_batch,
            case.shares.batch_size[d.name],
        )
        for d in case.demands
    )  # fmt: skip
    capacity = case.capacity_percent
    if not levels:
        capacity = max(capacity, max(percents.values()))
    models = tuple(_engine_model(case, d, percents[d.name]) for d in case.demands)
    delays = case.delays if deployed.gated else Delays(0, 0)
    plan = PlanChanged(capacity, models)
    speeds = case.speeds if deployed.mps else replace(case.speeds, sliced=True)
    return Scenario(speeds, instances, plan, duration_us, case.arrivals, delays, case.faults, case.serving)


def _engine_model(case: Case, demand: ModelDemand, gpu_percent: float) -> EngineModel:
    told = case.believed or case.speeds
    surface, interference = told.surfaces[demand.name], told.interference
    percents = tuple(sorted({*surface.percents, 100.0, gpu_percent}))
    batches = tuple(sorted({*surface.batches, 1}))
    return EngineModel(
        demand.name, gpu_percent, case.shares.batch_size[demand.name],
        round(demand.slo_ms * 1000) if demand.slo_ms else 0, demand.weight, demand.on_late,
        case.shares.gpu_percent[demand.name], percents, batches, surface.table(percents, batches),
        interference.k.get(demand.name, interference.default) / 100.0, interference.exponent,
    )  # fmt: skip


def simulate(case: Case, policy_name: str, duration_s: float, seed: int, *, record: bool = False) -> World:
    """One run; `summarize` counts it. The same case, policy, duration and seed give the same world."""
    scenario = scenario_of(case, policy_name, round(duration_s * 1e6))
    return World(scenario, find_policy(policy_name).make, seed, record=record).run()


def result_of(case: Case, policy_name: str, duration_s: float, seed: int) -> SimResult:
    """`simulate` and `summarize` in one."""
    return summarize(simulate(case, policy_name, duration_s, seed), policy_name, seed)


@dataclass(frozen=True, slots=True)
class Bounds:
    """Upper bounds of the case (policy.bounds): with interference and without."""

    corun: Bound
    isolated: Bound


def bounds_of(case: Case) -> Bounds:
    """The bounds over every promise up to all models at 100% each, so that they hold for every policy."""
    surfaces, demands = case.speeds.surfaces, case.demands
    top = 100.0 * len(demands)
    percents = [BOUND_STEP_PERCENT * k for k in range(1, int(100 / BOUND_STEP_PERCENT) + 1)]
    corun = ideal_corun(
        surfaces, demands, case.speeds.interference, top / 100.0, percents=percents,
        unit_percent=BOUND_STEP_PERCENT,
    )  # fmt: skip
    return Bounds(corun, ideal_isolated(surfaces, demands, top, percents=percents))


@dataclass(frozen=True, slots=True)
class Peak:
    """Largest factor on the rates at which every model keeps its attainment; 0 when none does. low, high: 95%
    confidence interval over the seeds (equal to factor for one seed)."""

    factor: float
    low: float
    high: float


def find_peak(
    case: Case, policy_name: str, duration_s: float, seeds: Sequence[int], *, tolerance: float = 0.01
) -> Peak:
    """One bisection a seed; the mean of them and Student's interval of the mean."""
    found = [_peak_of(case, policy_name, duration_s, seed, tolerance) for seed in seeds]
    mean = sum(found) / len(found)
    if len(found) < 2:
        return Peak(mean, mean, mean)
    variance = sum((x - mean) ** 2 for x in found) / (len(found) - 1)
    half = float(student.ppf(0.975, len(found) - 1)) * (variance / len(found)) ** 0.5
    return Peak(mean, max(mean - half, 0.0), mean + half)


def _peak_of(case: Case, policy_name: str, duration_s: float, seed: int, tolerance: float) -> float:
    def keeps(factor: float) -> bool:
        result = result_of(case.scaled(factor), policy_name, duration_s, seed)
        return result.worst_attainment >= case.attainment

    low, high = 0.0, 1.0
    for _ in range(_PEAK_STEPS):  # bracket
        if keeps(high):
            low, high = high, high * 2.0
        elif low > 0.0 or high < 1e-3:
            break
        else:
            high /= 2.0
            if keeps(high):
                low, high = high, high * 2.0
                break
    while low > 0.0 and high - low > tolerance * high:
        middle = (low + high) / 2
        low, high = (middle, high) if keeps(middle) else (low, middle)
    return low
