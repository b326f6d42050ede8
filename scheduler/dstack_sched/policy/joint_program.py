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
from dstack_sched.policy.joint_model import Answer, Goal, JointModel, Limits

MAX_MPS_CLIENTS = 48
_COLUMN_BUDGET = 5000
_SCALE_ROUNDS = 12
_SCALE_TOLERANCE = 1e-3


@dataclass(frozen=True, slots=True)
class JointSetting:
    """The GPUs (all alike) and how hard to look. capacities: percent, ascending, tried in turn. gap: relative
    MIP gap that counts as solved; time_limit_s: for each mixed-integer program."""

    gpus: int
    memory_bytes: int
    interference: Interference
    capacities: tuple[float, ...] = (100.0,)
    max_clients: int = MAX_MPS_CLIENTS
    gap: float = 1e-4
    time_limit_s: float = 4.0


@dataclass(frozen=True, slots=True)
class Placed:
    """Where one model runs: the candidate on each of its GPUs (they differ in `alone` only)."""

    task: JointTask
    on: tuple[tuple[int, Candidate], ...]


@dataclass(frozen=True, slots=True)
class JointPlan:
    """A plan that fits. demand_percent: weighted demand over all GPUs in percent of one; gap: proven relative
    distance from the best over the candidates; 0.0 when optimal within the setting's gap."""

    capacity_percent: float
    placed: tuple[Placed, ...]
    demand_percent: float
    gap: float


@dataclass(frozen=True, slots=True)
class Scale:
    """The largest factor on all rates that fits, and a plan for the rates times it. `limits`: what stops it
    from growing, one line each. Factor 0 without a plan when nothing fits at any rate."""

    factor: float
    plan: JointPlan | None
    limits: tuple[str, ...]


def solve_joint(tasks: Sequence[JointTask], setting: JointSetting) -> JointPlan | None:
    """The plan of least weighted demand at the smallest capacity that fits; None when none was found."""
    for capacity in setting.capacities:
        found = _at(tasks, setting, capacity, "demand", 1.0)
        if found is not None and found[1].chosen:
            model, answer = found
            gap = 0.0 if answer.status == "optimal" else _relative(answer.value, answer.bound)
            return _plan(model, answer, capacity, gap)
    return None


def largest_scale(tasks: Sequence[JointTask], setting: JointSetting) -> Scale:
    """Largest s such that the rates times s fit, over all capacities and candidates.

    For fixed candidates the program is linear in t = 1/s. Candidates themselves depend on s (at a higher rate
    a batch fills sooner), so s and the candidates are improved in turn until s stands still.
    """
    best = Scale(0.0, None, ())
    for capacity in setting.capacities:
        found = _scale_at(tasks, setting, capacity)
        if found.factor > best.factor * (1 + _SCALE_TOLERANCE) or best.plan is None:
            best = found if found.factor > 0 or not best.limits else best
    return best


def fewest_gpus(tasks: Sequence[JointTask], setting: JointSetting) -> tuple[int, JointPlan] | None:
    """The smallest number of GPUs, at most setting.gpus, with a plan of least demand on them; or None."""
    top = setting.capacities[-1]
    least = 1
    options = _options(tasks, replace(setting, capacities=(top,)), top, 1.0)
    if options is not None:
        demand = sum(min(c.demand_percent * c.replicas for c in items) for items in options)
        memory = sum(task.memory_bytes for task in tasks)
        least = max(
            1,
            math.ceil(demand / top - 1e-6),
            math.ceil(memory / setting.memory_bytes - 1e-9),
            math.ceil(len(tasks) / setting.max_clients),
        )
    for gpus in range(min(least, setting.gpus), setting.gpus + 1):
        plan = solve_joint(tasks, replace(setting, gpus=gpus))
        if plan is not None:
            return gpus, plan
    return None


def why_not(tasks: Sequence[JointTask], setting: JointSetting) -> str:
    """The limit that keeps every plan out, whatever the rates: found by leaving one limit out at a time."""
    capacity = setting.capacities[-1]
    slow = [t.name for t in tasks if not _candidates_of(t, setting, capacity, 1.0, 12)]
    if slow:
        return f"{slow[0]}: no GPU% and batch size keep its SLO beside the other models"
    for limit, text in (("memory", _memory_line), ("clients", _clients_line), ("wait", _wait_line)):
        found = _at(tasks, setting, capacity, "headroom", 1.0, frozenset({limit}))
        if found is not None and found[1].chosen:
            return text(tasks, setting)
    return "memory, MPS clients and waiting for co-runners together leave no room"


def _memory_line(tasks: Sequence[JointTask], setting: JointSetting) -> str:
    largest = max(tasks, key=lambda t: t.memory_bytes)
    total = sum(t.memory_bytes for t in tasks)
    return (
        f"{largest.name}: GPU memory: the models need {total / 2**30:.3g} GiB, most of it {largest.name} "
        f"({largest.memory_bytes / 2**30:.3g} GiB), and {setting.gpus} GPU(s) have "
        f"{setting.gpus * setting.memory_bytes / 2**30:.3g} GiB"
    )


def _clients_line(tasks: Sequence[JointTask], setting: JointSetting) -> str:
    return f"{tasks[-1].name}: MPS clients: {len(tasks)} models, {setting.max_clients} clients a GPU at most"


def _wait_line(tasks: Sequence[JointTask], setting: JointSetting) -> str:
    with_slo = [t for t in tasks if t.slo_ms is not None]
    tight = min(with_slo, key=lambda t: _spare(t) / (t.slo_ms or 1.0))
    return f"{tight.name}: SLO {tight.slo_ms:g} ms leaves too little time to wait for the other models' runs"


def _spare(task: JointTask) -> float:
    fastest = float(task.surface.latency_ms(task.grid.percents[-1], task.grid.batches[0]))
    return (task.slo_ms or math.inf) - 2 * fastest


def _candidates_of(
    task: JointTask, setting: JointSetting, capacity: float, rate_scale: float, limit: int
) -> tuple[Candidate, ...]:
    return candidates(
        task, setting.interference, capacity, gpus=setting.gpus, limit=limit, rate_scale=rate_scale
    )


def _options(
    tasks: Sequence[JointTask], setting: JointSetting, capacity: float, rate_scale: float
) -> list[tuple[Candidate, ...]] | None:
    """Candidates of every task, fewer a model the larger the program; None when some task has none."""
    limit = max(5, min(24, _COLUMN_BUDGET // max(1, len(tasks) * setting.gpus)))
    found = []
    for task in tasks:
        items = _candidates_of(task, setting, capacity, rate_scale, limit)
        if setting.gpus < len(tasks) and len(tasks) > 4 * setting.gpus:
            # With many models a GPU nobody can have one alone, unless it has no other way.
            items = tuple(c for c in items if not c.alone) or items
        if not items:
            return None
        found.append(items)
    return found


def _at(
    tasks: Sequence[JointTask],
    setting: JointSetting,
    capacity: float,
    goal: Goal,
    rate_scale: float,
    relaxed: frozenset[str] = frozenset(),
) -> tuple[JointModel, Answer] | None:
    options = _options(tasks, setting, capacity, rate_scale)
    if options is None:
        return None
    limits = Limits(setting.gpus, capacity, setting.memory_bytes, setting.max_clients, relaxed)
    model = JointModel(tasks, options, limits)
    return model, model.solve(goal, gap=setting.gap, time_limit_s=setting.time_limit_s)


def _scale_at(tasks: Sequence[JointTask], setting: JointSetting, capacity: float) -> Scale:
    best = Scale(0.0, None, ())
    scale = 1.0
    for _ in range(_SCALE_ROUNDS):
        found = _at(tasks, setting, capacity, "headroom", scale)
        if found is None or not found[1].chosen:
            scale /= 2.0
            if best.plan is not None or scale < 1e-3:
                break
            continue
        model, answer = found
        reached = scale / max(answer.value, 1e-9)
        # The candidates were made for `scale`: at lower rates their batches fill more slowly than assumed.
        fits = reached if reached >= scale else 0.0
        if fits > best.factor * (1 + _SCALE_TOLERANCE):
            best = Scale(fits, _plan(model, answer, capacity, 0.0), _tight(model, answer))
        elif best.plan is not None:
            break
        scale = reached
    return best


def _plan(model: JointModel, answer: Answer, capacity: float, gap: float) -> JointPlan:
    placed, demand = [], 0.0
    for m, task in enumerate(model.tasks):
        on = tuple(
            (g, model.options[m][k]) for i, k, g in sorted(answer.chosen, key=lambda c: c[2]) if i == m
        )
        placed.append(Placed(task, on))
        demand += task.weight * sum(c.demand_percent for _, c in on)
    return JointPlan(capacity, tuple(placed), demand, gap)


def _tight(model: JointModel, answer: Answer) -> tuple[str, ...]:
    """The limits that hold with equality at the largest scale: capacity of a GPU, throughput of a model."""
    lines = []
    t = answer.value * (1 - 1e-3)
    for g in range(model.limits.gpus):
        here = [(m, model.options[m][k].demand_percent) for m, k, gpu in answer.chosen if gpu == g]
        if here and sum(d for _, d in here) >= t * model.limits.capacity_percent:
            name = model.tasks[max(here, key=lambda x: x[1])[0]].name
            lines.append(f"capacity: gpu {g} ({model.limits.capacity_percent:g}%), most of it {name}")
    for m, k, g in answer.chosen:
        if model.options[m][k].utilization >= t:
            lines.append(f"throughput: {model.tasks[m].name} on gpu {g} runs back to back")
    return tuple(lines)


def _relative(value: float, bound: float) -> float:
    if not math.isfinite(bound):
        return math.inf
    return max(0.0, (value - bound) / abs(value)) if value else 0.0
