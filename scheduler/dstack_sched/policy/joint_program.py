"""The joint program: (GPU%, batch size, GPU or GPUs) for all models at once (DESIGN section 3).

`solve_joint` minimises the weighted demand; `largest_scale` finds the largest factor on all rates that still
fits; `fewest_gpus` the smallest number of GPUs. The capacity is tried at 100% first and then at the measured
oversubscription: a smaller promise means less interference, so more is promised only where it is needed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from dstack_sched.policy.candidates import Candidate, JointTask, candidates
from dstack_sched.policy.interference import Interference
from dstack_sched.policy.joint_model import JointModel
from dstack_sched.policy.joint_pack import solve_one_gpu
from dstack_sched.policy.joint_pool import solve_pooled
from dstack_sched.policy.joint_rows import Answer, Limits, slots_in_force

MAX_MPS_CLIENTS = 48
# Up to this many replica columns (candidates x GPUs) the program is solved in full, beyond it pooled.
_FULL_COLUMNS = 200
_POOL_COLUMNS = 900
_FULL_ROUNDS, _POOL_ROUNDS = 8, 4
_LEAST_SCALE = 1e-3


@dataclass(frozen=True, slots=True)
class JointSetting:
    """The GPUs (all alike) and how hard to look. capacities: percent, ascending, tried in turn. gap: relative
    MIP gap that counts as solved; time_limit_s: for each mixed-integer program."""

    gpus: int
    memory_bytes: int
    interference: Interference
    capacities: tuple[float, ...] = (100.0,)
    max_clients: int = MAX_MPS_CLIENTS
    gap: float = 1e-3
    time_limit_s: float = 2.0


@dataclass(frozen=True, slots=True)
class Placed:
    """Where one model runs: the candidate on each of its GPUs (they differ in `alone` only)."""

    task: JointTask
    on: tuple[tuple[int, Candidate], ...]


@dataclass(frozen=True, slots=True)
class JointPlan:
    """A plan that fits. demand_percent: weighted demand over all GPUs in percent of one; gap: proven relative
    distance from the best over the candidates at this capacity, 0.0 when optimal within the setting's gap.
    growth: the factor by which all rates can grow with the plan as it is; limits: what stops them there."""

    capacity_percent: float
    placed: tuple[Placed, ...]
    demand_percent: float
    gap: float
    growth: float
    limits: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Scale:
    """The largest factor on all rates that fits, within `_tolerance`, and a plan for the rates times it.
    `limits`: what stops it from growing, one line each. Factor 0 without a plan: nothing fits at any rate."""

    factor: float
    plan: JointPlan | None
    limits: tuple[str, ...]


def solve_joint(
    tasks: Sequence[JointTask], setting: JointSetting, rate_scale: float = 1.0, *, prove: bool = True
) -> JointPlan | None:
    """The plan of least weighted demand at the smallest capacity that fits; None when none was found."""
    for capacity in setting.capacities:
        found = _fit(tasks, setting, capacity, rate_scale, prove=prove)
        if found is not None:
            return found
    return None


def largest_scale(tasks: Sequence[JointTask], setting: JointSetting, known: JointPlan | None = None) -> Scale:
    """Largest s such that the rates times s fit, over all capacities and candidates.

    A plan in hand (`known`, for s = 1) grows until one of its limits is met: growth shortens assembly and so
    breaks no other limit. From there s is doubled while plans are found, then halved in.
    """
    if all(task.rate_per_s == 0 or task.slo_ms is None for task in tasks):
        plan = known or solve_joint(tasks, setting)
        return Scale(math.inf if plan else 0.0, plan, ())
    tolerance = _tolerance(len(tasks) * setting.gpus)
    setting = replace(setting, gap=max(setting.gap, tolerance / 2))
    best = Scale(0.0, None, ())
    if known is not None:
        best, setting = Scale(known.growth, known, known.limits), _from(setting, known.capacity_percent)
    scale, fails = 1.0, math.inf
    while scale > _LEAST_SCALE and fails > best.factor * (1 + tolerance):
        if best.plan is not None:
            scale = min(2.0 * best.factor, math.sqrt(best.factor * fails))
        found = solve_joint(tasks, setting, scale, prove=False)
        if found is not None:
            best = Scale(scale * found.growth, found, found.limits)
            setting = _from(setting, found.capacity_percent)
        else:
            fails = scale
            scale /= 2.0
    return best


def _from(setting: JointSetting, capacity: float) -> JointSetting:
    """Without the capacities that were too small already at a lower rate."""
    return replace(setting, capacities=tuple(c for c in setting.capacities if c >= capacity))


def _tolerance(cells: int) -> float:
    """How closely the largest scale is searched for, by size of the program (models x GPUs)."""
    return 0.01 if cells <= 12 else 0.02 if cells <= 100 else 0.05


def fewest_gpus(tasks: Sequence[JointTask], setting: JointSetting) -> tuple[int, JointPlan] | None:
    """The smallest number of GPUs, at most setting.gpus, with a plan of least demand on them; or None.

    Looked for from a number below which demand, memory or clients cannot fit, up to that at which every
    replica has a GPU of its own.
    """
    top = setting.capacities[-1]
    options = [_candidates_of(task, setting, top, 1.0, 12) for task in tasks]
    lone = [[c.replicas for c in items if c.alone] for items in options]
    if not all(options):
        return None
    demand = sum(min(c.demand_percent * c.replicas for c in items) for items in options)
    memory = sum(task.memory_bytes for task in tasks)
    least = max(
        1,
        math.ceil(demand / top - 1e-6),
        math.ceil(memory / setting.memory_bytes - 1e-9),
        math.ceil(len(tasks) / setting.max_clients),
    )
    most = setting.gpus
    if all(lone):
        most = min(most, max(least, sum(min(counts) for counts in lone)))
    for gpus in range(least, most + 1):
        plan = solve_joint(tasks, replace(setting, gpus=gpus))
        if plan is not None:
            return gpus, plan
    return None


def why_not(tasks: Sequence[JointTask], setting: JointSetting) -> str:
    """The limit that keeps every plan out, whatever the rates: found by leaving one limit out at a time."""
    capacity = setting.capacities[0]
    slow = [t.name for t in tasks if not _candidates_of(t, setting, capacity, _LEAST_SCALE, 12)]
    if slow:
        return f"{slow[0]}: no GPU% and batch size keep its SLO beside the other models"
    for limit, text in (("memory", _memory_line), ("clients", _clients_line), ("wait", _wait_line)):
        if _fit(tasks, setting, capacity, _LEAST_SCALE, frozenset({limit})) is not None:
            return text(tasks, setting)
    return f"{tasks[0].name}: memory, MPS clients and waiting for co-runners together leave no room"


def _memory_line(tasks: Sequence[JointTask], setting: JointSetting) -> str:
    largest = max(tasks, key=lambda t: t.memory_bytes)
    total = sum(t.memory_bytes for t in tasks)
    return (
        f"{largest.name}: GPU memory: the models need {total / 2**30:.3g} GiB, most of it {largest.name} "
        f"({largest.memory_bytes / 2**30:.3g} GiB), and {setting.gpus} GPU(s) have "
        f"{setting.gpus * setting.memory_bytes / 2**30:.3g} GiB"
    )


def _clients_line(tasks: Sequence[JointTask], setting: JointSetting) -> str:
    return (
        f"{tasks[-1].name}: MPS clients: {len(tasks)} models on {setting.gpus} GPU(s), "
        f"{setting.max_clients} clients a GPU at most"
    )


def _wait_line(tasks: Sequence[JointTask], setting: JointSetting) -> str:
    with_slo = [t for t in tasks if t.slo_ms is not None]
    tight = min(with_slo, key=lambda t: _spare(t) / (t.slo_ms or 1.0))
    return f"{tight.name}: SLO {tight.slo_ms:g} ms leaves too little time to wait for the other models' runs"


def _spare(task: JointTask) -> float:
    fastest = float(task.surface.latency_ms(task.grid.percents[-1], task.grid.batches[0]))
    return (task.slo_ms or math.inf) - 2 * fastest


def _candidates_of(
    task: JointTask, setting: JointSetting, capacity: float, rate_scale: float, limit: int, few: bool = False
) -> tuple[Candidate, ...]:
    return candidates(
        task,
        setting.interference,
        capacity,
        gpus=setting.gpus,
        limit=limit,
        every_count=few,
        rate_scale=rate_scale,
    )


def _options(
    tasks: Sequence[JointTask], setting: JointSetting, capacity: float, rate_scale: float
) -> list[tuple[Candidate, ...]] | None:
    """Candidates of every task, fewer a model the more models there are; None when some task has none."""
    limit = max(8, min(24, _POOL_COLUMNS // len(tasks)))
    found = []
    for task in tasks:
        items = _candidates_of(task, setting, capacity, rate_scale, limit, len(tasks) <= 4)
        if setting.gpus == 1 and len(tasks) > 1:
            items = tuple(c for c in items if not c.alone)
        if not items:
            return None
        found.append(items)
    return found


def _fit(
    tasks: Sequence[JointTask],
    setting: JointSetting,
    capacity: float,
    rate_scale: float,
    relaxed: frozenset[str] = frozenset(),
    *,
    prove: bool = True,
) -> JointPlan | None:
    """The plan of least weighted demand at one capacity for the rates times rate_scale."""
    options = _options(tasks, setting, capacity, rate_scale)
    if options is None:
        return None
    limits = Limits(setting.gpus, capacity, setting.memory_bytes, setting.max_clients, relaxed)
    gap, time_limit_s = setting.gap, setting.time_limit_s
    if sum(map(len, options)) * setting.gpus <= _FULL_COLUMNS:
        model = JointModel(tasks, options, limits, _FULL_ROUNDS)
        answer = model.solve(gap=gap, time_limit_s=time_limit_s)
    elif setting.gpus == 1:
        answer = solve_one_gpu(tasks, options, limits, gap=gap, time_limit_s=time_limit_s, prove=prove)
    else:
        answer = solve_pooled(
            tasks, options, limits, rounds=_POOL_ROUNDS, gap=gap, time_limit_s=time_limit_s, prove=prove
        )
    return _plan(tasks, options, answer, limits) if answer.chosen else None


def _plan(
    tasks: Sequence[JointTask], options: Sequence[Sequence[Candidate]], answer: Answer, limits: Limits
) -> JointPlan:
    placed, demand = [], 0.0
    for m, task in enumerate(tasks):
        on = tuple((g, options[m][k]) for i, k, g in sorted(answer.chosen, key=lambda c: c[2]) if i == m)
        placed.append(Placed(task, on))
        demand += task.weight * sum(c.demand_percent for _, c in on)
    gap = 0.0
    if answer.status != "optimal":
        gap = max(0.0, 1.0 - answer.bound / answer.value) if math.isfinite(answer.bound) else 1.0
    load = _load(placed, limits)
    growth = 1.0 / max(load.values()) if max(load.values()) > 0 else math.inf
    tight = tuple(line for line, part in load.items() if part * growth > 1 - 1e-3)
    return JointPlan(limits.capacity_percent, tuple(placed), demand, gap, growth, tight)


def _load(placed: Sequence[Placed], limits: Limits) -> dict[str, float]:
    """How full each limit is that grows with the rates: GPUs by demand, replicas by utilization."""
    load: dict[str, float] = {}
    for gpu in range(limits.gpus):
        here = [(x.task.name, c.demand_percent) for x in placed for g, c in x.on if g == gpu]
        if here:
            most = max(here, key=lambda x: x[1])[0]
            line = f"{most}: capacity of gpu {gpu} ({limits.capacity_percent:g}%), most of it taken by {most}"
            load[line] = sum(d for _, d in here) / limits.capacity_percent
        members = [(x.task.name, c) for x in placed for g, c in x.on if g == gpu]
        slots = slots_in_force([c for _, c in members], limits.capacity_percent)
        if slots is not None:
            most = max(members, key=lambda x: x[1].utilization)[0]
            line = f"{most}: gpu {gpu} runs {slots} shares of this size at a time, most of the time {most}"
            load[line] = sum(c.utilization for _, c in members) / slots
    for x in placed:
        for gpu, c in x.on:
            load[f"{x.task.name}: throughput at {c.gpu_percent:g}%, b={c.batch_size} on gpu {gpu}"] = (
                c.utilization
            )
    return load
