"""The use case `plan`: profiles and a workload in, a plan out. Pure: no file, no clock, no machine."""

from __future__ import annotations

import math
from dataclasses import replace

from dstack_sched.app.plan_case import (
    CONTROL_OPTIONS,
    DEFAULT_OPTIONS,
    REHEARSAL_TRIALS,
    Case,
    Objective,
    PlanOptions,
    gpu_index,
    gpu_names,
    make_case,
    notes,
)
from dstack_sched.app.planning_host import plan_on_host
from dstack_sched.app.planning_rehearsal import rehearsed
from dstack_sched.domain.plan import ModelPlan, Plan, Replica
from dstack_sched.domain.profile import ProfileSet
from dstack_sched.domain.workload import Workload
from dstack_sched.errors import InfeasibleError, InputError
from dstack_sched.policy.batch_program import assembly_ms, efficacy, slo_too_short, solve_batch_program
from dstack_sched.policy.candidates import Candidate, JointTask, candidate
from dstack_sched.policy.joint_program import (
    JointPlan,
    JointSetting,
    Placed,
    Scale,
    fewest_gpus,
    largest_scale,
    solve_joint,
    why_not,
)
from dstack_sched.policy.joint_rows import slots_in_force
from dstack_sched.policy.knee import knee_percent
from dstack_sched.policy.runnable import CPU_DRIVER, RunnableGrid
from dstack_sched.sim.rehearsal import BEYOND

__all__ = [
    "CONTROL_OPTIONS", "REHEARSAL_TRIALS", "Objective", "PlanOptions", "better_on_cores", "explain_plan",
    "make_plan",
]  # fmt: skip

BETTER_ON_CORES = 1.1  # headroom over that of one instance a model: instances cost memory and a start


def make_plan(profiles: ProfileSet, workload: Workload, options: PlanOptions = DEFAULT_OPTIONS) -> Plan:
    """The plan for the workload; one that does not fit gives a plan with feasible False (domain/plan.py).

    Errors: InputError for a model without a profile, an SLO below its fastest run, or an option out of range.
    """
    if options.host is not None and profiles.device.driver != CPU_DRIVER:
        return plan_on_host(
            lambda gpus, memory_bytes, others: make_plan(
                profiles,
                workload,
                # One client more than planned is there while a model reloads.
                replace(
                    options, host=None, gpus=gpus, memory_bytes=memory_bytes, clients_of_others=others + 1
                ),
            ),
            options.host,
            profiles.device.name,
            options.current,
        )
    case = make_case(profiles, workload, options)
    for task in case.tasks:
        fastest = float(task.surface.latency_ms(task.grid.percents[-1], task.grid.batches[0]))
        if task.slo_ms is not None and fastest > task.slo_ms and not options.lenient:
            raise InputError(slo_too_short(task.surface, task.slo_ms, task.grid))
        if task.slo_ms is not None and 2 * fastest > task.slo_ms:
            return _nothing(case, slo_too_short(task.surface, task.slo_ms, task.grid))
    if options.objective == "efficacy":
        return _efficacy_plan(case)
    return better_on_cores(_joint_plan(case), case)


def better_on_cores(whole: Plan, case: Case) -> Plan:
    """On a CPU: instances of one thread each, more than one of a model where it pays; else the plan given.

    Threads of one batch wait for each other and instances do not, so several instances of a model serve
    more than one with as many threads (decisions/0093), only each batch takes longer. To the joint program
    a core is a device of its own; the engine then lets any instance run on any core.
    """
    cores, options = case.device.sms, case.options
    one = 100.0 / cores if cores else 0.0
    held = [percent for percent, _ in options.held.values()]
    plain = options.gpus == 1 and options.capacity_percent is None and not options.minimize_gpus
    if case.device.driver != CPU_DRIVER or cores < 2 or not plain or any(abs(p - one) > 1e-6 for p in held):
        return whole
    if any(task.surface.min_percent > one + 1e-9 for task in case.tasks):
        return whole
    tasks = tuple(replace(t, grid=RunnableGrid((one,), t.grid.batches)) for t in case.tasks)
    split = replace(case, tasks=tasks, capacities=(one,), options=replace(options, gpus=cores))
    found = _joint_plan(split)
    if not found.models or found.headroom < BETTER_ON_CORES * whole.headroom:
        return whole
    return replace(found, capacity_percent=one * cores)


def _joint_plan(case: Case) -> Plan:
    setting = case.setting()
    plan: JointPlan | None
    if case.options.minimize_gpus:
        fewest = fewest_gpus(case.tasks, setting)
        plan = fewest[1] if fewest else None
        if fewest:
            setting = replace(setting, gpus=fewest[0])
        scale = largest_scale(case.tasks, setting, plan)
    elif case.options.maximize_headroom:
        scale = largest_scale(case.tasks, setting)
        plan = scale.plan if scale.factor >= 1 else None
    else:
        plan = solve_joint(case.tasks, setting)
        scale = largest_scale(case.tasks, setting, plan)
    if plan is None and scale.factor >= 1:
        plan = scale.plan
    if not case.options.rehearsal_trials:
        return _of_joint(case, plan, setting, scale)
    found = rehearsed(case, plan or scale.plan, setting.gpus)
    if isinstance(found, str):
        done = _of_joint(case, plan, setting, scale)
        return replace(done, notes=(*done.notes, found))
    if math.isfinite(found.factor):
        scale = Scale(found.factor, found.plan, (f"{found.limit} misses its SLO first, in rehearsal",))
    else:
        scale = replace(scale, factor=max(scale.factor, BEYOND))
    fits = scale.factor >= 1
    done = _plan(case, found.plan, setting.gpus, scale, feasible=fits, rate_scale=min(1.0, scale.factor))
    return replace(done, capacity_percent=found.plan.capacity_percent, notes=(*done.notes, found.note))


def _of_joint(case: Case, plan: JointPlan | None, setting: JointSetting, scale: Scale) -> Plan:
    """The joint program's plan, for a part of the rates or none where it has none."""
    if plan is not None:
        return _plan(case, plan, setting.gpus, scale, feasible=True, rate_scale=1.0)
    if scale.plan is None:
        return _nothing(case, why_not(case.tasks, setting))
    return _plan(case, scale.plan, setting.gpus, scale, feasible=False, rate_scale=scale.factor)


def _plan(case: Case, plan: JointPlan, gpus: int, scale: Scale, *, feasible: bool, rate_scale: float) -> Plan:
    binding = scale.limits
    if not feasible:
        first = scale.limits[0] if scale.limits else "no limit alone"
        binding = (
            f"the workload does not fit {gpus} x {case.device.name}: {first}; "
            f"the rates fit when scaled by {_floor(scale.factor):g}",
            *scale.limits,
        )
    return Plan(
        capacity_percent=case.capacities[-1],
        gpus=gpu_names(case, gpus),
        models={
            placed.task.name: _row(case, plan, placed, rate_scale if not feasible else 1.0)
            for placed in plan.placed
        },
        feasible=feasible,
        binding=binding,
        headroom=scale.factor if feasible else min(scale.factor, 1.0),
        gap=plan.gap,
        notes=notes(case),
    )


def _row(case: Case, plan: JointPlan, placed: Placed, rate_scale: float) -> ModelPlan:
    """One model's row; rates as demanded, times rate_scale for a workload that does not fit."""
    task, demand = placed.task, case.demands[placed.task.name]
    rate = demand.rate_per_s * rate_scale
    chosen = placed.on[0][1]
    p, b = chosen.gpu_percent, chosen.batch_size
    latencies = [_beside(case, plan, gpu, item) for gpu, item in ((g, (task, c)) for g, c in placed.on)]
    throughput = sum(1000.0 * b / ms for ms in latencies)
    per_replica = rate / len(placed.on)
    isolated = float(task.surface.latency_ms(p, b))
    return ModelPlan(
        gpu=gpu_index(case, placed.on[0][0]),
        gpu_percent=p,
        batch_size=b,
        max_queue_delay_us=_queue_delay_us(b, per_replica, max(latencies), task.slo_ms),
        latency_ms=max(latencies),
        throughput_per_s=throughput,
        efficacy=efficacy(p, b, isolated),
        knee_percent=knee_percent(task.surface, b, percents=task.grid.percents),
        utilization=rate / throughput,
        replicas=tuple(Replica(gpu_index(case, g), c.gpu_percent, per_replica) for g, c in placed.on),
        slo_ms=demand.slo_ms,
        rate_per_s=rate,
        weight=demand.weight,
        on_late=demand.on_late,
        memory_limit_mb=_memory_limit_mb(case, task),
    )


def _memory_limit_mb(case: Case, task: JointTask) -> int | None:
    """Room above what the profile saw: other batch sizes and a second graph must not end a sound instance."""
    if not case.options.memory_limits or not task.memory_bytes or case.device.driver == CPU_DRIVER:
        return None
    return math.ceil(max(1.25 * task.memory_bytes, task.memory_bytes + (512 << 20)) / (1 << 20))


def _beside(case: Case, plan: JointPlan, gpu: int, item: tuple[JointTask, Candidate]) -> float:
    """Predicted latency beside the models that share the GPU: they hold what they were promised, or what is
    left of the capacity where that is less."""
    task, chosen = item
    others = sum(c.gpu_percent for x in plan.placed for g, c in x.on if g == gpu and x.task.name != task.name)
    left = max(0.0, plan.capacity_percent - chosen.gpu_percent)
    slowdown = float(case.interference.slowdown(task.name, min(left, others)))
    return float(task.surface.latency_ms(chosen.gpu_percent, chosen.batch_size)) * slowdown


def _queue_delay_us(b: int, rate_per_s: float, latency_ms: float, slo_ms: float | None) -> int:
    """How long the first request of a batch may wait for the rest: the time the batch takes to fill, never so
    long that its run would end past the SLO; one run for a best-effort model whose batch may never fill."""
    fill = assembly_ms(b, rate_per_s)
    limit = latency_ms if slo_ms is None else max(0.0, slo_ms - latency_ms)
    return round(1000.0 * min(fill, limit))


def _efficacy_plan(case: Case) -> Plan:
    """Each model at its own best (p, b); the most demanding placed first, where there is least demand."""
    gpus, capacity = case.options.gpus, case.capacities[-1]
    binding: list[str] = []
    chosen: list[tuple[JointTask, Candidate]] = []
    for task in case.tasks:
        try:
            best = solve_batch_program(
                task.surface, slo_ms=task.slo_ms, rate_per_s=task.rate_per_s, grid=task.grid
            )
        except InfeasibleError as error:
            return _nothing(case, str(error))
        binding += [f"{task.name}: {name}" for name in best.binding]
        point = (best.gpu_percent, best.batch_size, 1)
        chosen.append((task, candidate(task, case.interference, capacity, point, alone=True)))
    load = [0.0] * gpus
    where: dict[str, int] = {}
    for task, item in sorted(chosen, key=lambda x: -x[1].demand_percent):
        where[task.name] = load.index(min(load))
        load[where[task.name]] += item.demand_percent
    placed = tuple(Placed(task, ((where[task.name], item),)) for task, item in chosen)
    plan = JointPlan(capacity, placed, sum(load), 0.0, math.inf, ())
    full: dict[str, float] = {}
    busy, on_slots = [0.0] * gpus, [0.0] * gpus
    for task, item in chosen:
        gpu = where[task.name]
        if task.slo_ms is not None:
            latency_ms = _beside(case, plan, gpu, (task, item))
            used = task.rate_per_s * latency_ms / item.batch_size / 1000.0
            full[f"{task.name}: throughput at {item.gpu_percent:g}%, b={item.batch_size}"] = used
            busy[gpu] += used * item.gpu_percent / capacity
            full[f"{task.name}: capacity of gpu {gpu} ({capacity:g}%)"] = busy[gpu]
            on_slots[gpu] += used
            slots = slots_in_force([c for t, c in chosen if where[t.name] == gpu], capacity)
            if slots is not None:
                full[f"{task.name}: shares too large for more than {slots} at a time"] = on_slots[gpu] / slots
    top = max(full.values(), default=0.0)
    factor = 1.0 / top if top > 0 else math.inf
    limits = tuple(binding)
    if factor < 1:
        limits = (max(full, key=lambda line: full[line]), *limits)
    return _plan(case, plan, gpus, Scale(factor, plan, limits), feasible=factor >= 1, rate_scale=factor)


def _nothing(case: Case, reason: str) -> Plan:
    """The plan of a workload that fits at no rate."""
    return Plan(
        capacity_percent=case.capacities[-1],
        gpus=gpu_names(case, case.options.gpus),
        models={},
        feasible=False,
        binding=(reason,),
        headroom=0.0,
        notes=notes(case),
    )


def _floor(value: float) -> float:
    """Down to three digits, so that the stated scale does fit."""
    if value <= 0 or not math.isfinite(value):
        return value
    unit = 10.0 ** (math.floor(math.log10(value)) - 2)
    return round(math.floor(value / unit + 1e-9) * unit, 12)


def explain_plan(
    plan: Plan, profiles: ProfileSet, workload: Workload, options: PlanOptions = DEFAULT_OPTIONS
) -> tuple[str, ...]:
    """Why the plan is as it is, one line each: the fits, each model's own best, limits, gap."""
    case = make_case(profiles, workload, options)
    lines = []
    for task in case.tasks:
        surface = task.surface
        lines.append(
            f"{task.name}: {surface.kind} surface of {len(surface.errors)} points, "
            f"largest error {100 * surface.max_relative_error:.1f}%"
        )
        try:
            best = solve_batch_program(
                surface, slo_ms=task.slo_ms, rate_per_s=task.rate_per_s, grid=task.grid
            )
        except InfeasibleError as error:
            lines.append(str(error))
            continue
        bound = "" if best.relaxed is None else f", bound {best.relaxed.efficacy:.3g}"
        lines.append(
            f"{task.name}: alone, the greatest efficacy is at {best.gpu_percent:g}%, b={best.batch_size} "
            f"({best.efficacy:.3g}{bound}; {best.method}; limited by {', '.join(best.binding) or 'nothing'})"
        )
    lines += [f"limit: {line}" for line in plan.binding]
    if plan.feasible and 0 < plan.gap < 1:
        lines.append(f"the plan asks at most {100 * plan.gap:.1f}% more than the proven least demand")
    return (*lines, *plan.notes)
