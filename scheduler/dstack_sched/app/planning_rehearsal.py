"""A plan tried out in simulated time, and bettered there, before anybody loads a model for it.

The joint program counts what batches demand and charges the wait for co-runners at a bound; the simulator
has the engine that will be in charge make its decisions (sim/rehearsal.py, decisions/0127). GPU by GPU:
models with one replica may get another share, the others keep theirs.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

from dstack_sched.app.plan_case import Case
from dstack_sched.domain.workload import ModelDemand
from dstack_sched.errors import InputError
from dstack_sched.policy.candidates import JointTask, candidate
from dstack_sched.policy.joint_program import JointPlan, Placed
from dstack_sched.policy.runnable import CPU_DRIVER
from dstack_sched.sim.gpu import SpeedModel
from dstack_sched.sim.rehearsal import BEYOND, Rehearsed, rehearse
from dstack_sched.sim.scenario import BUSY_HOST, TAIL_US, TRITON_H100
from dstack_sched.sim.side_by_side import Shares, side_by_side
from dstack_sched.sim.study import Case as SimCase
from dstack_sched.sim.study import within_serving

# What a request may meet outside: the usual, and what one of a hundred meets.
OUTSIDE = replace(TRITON_H100, outside_us=TRITON_H100.outside_us + TAIL_US)
ENOUGH = 2.0  # where what is in force carries so many times the rates, it stays


@dataclass(frozen=True, slots=True)
class Outcome:
    """plan: with the shares and the capacity found. factor: largest factor on the rates at which every model
    keeps its attainment, inf where that is not known; limit: who misses above. note: one line for the
    reader."""

    plan: JointPlan
    factor: float
    limit: str
    note: str


def rehearsed(case: Case, plan: JointPlan | None, gpus: int) -> Outcome | str:
    """What came of it, or why there is nothing to rehearse.

    plan None: the program has found none; on one GPU the shares that suit all models side by side are begun
    with.
    """
    if case.device.driver == CPU_DRIVER:
        return "rehearsal: of GPUs only, the profiles are of a CPU"
    if all(task.slo_ms is None for task in case.tasks):
        return "rehearsal: no model has an SLO"
    unknown = [task.name for task in case.tasks if task.name not in case.interference.k]
    if len(case.tasks) > 1 and unknown and case.interference.after is None:
        return (
            f"rehearsal: what co-runners do to {', '.join(unknown)} is not known yet; measure it with "
            "`dstackctl profile measure --corun`, or let service show it"
        )
    if plan is None and gpus > 1:
        return "rehearsal: there is no plan to begin with"
    placed = {each.task.name: each for each in plan.placed} if plan else {}
    capacity = plan.capacity_percent if plan else case.capacities[-1]
    found: list[Rehearsed] = []
    rows: dict[str, Placed] = dict(placed)
    for gpu in range(gpus):
        here = [task for task in case.tasks if plan is None or gpu in _gpus(placed[task.name])]
        if not any(task.slo_ms is not None for task in here):
            continue
        try:
            one = _on_one(case, here, placed, capacity)
        except InputError as error:
            return f"rehearsal: {error}"
        if not one.factor:
            return f"rehearsal: no shares keep the SLO of {one.limit}, whatever the rate"
        found.append(one)
        rows |= {task.name: _placed(case, task, gpu, one) for task in here if _is_free(placed, task.name)}
    least = min(found, key=lambda each: each.factor)
    before = min(each.before for each in found)
    capacity = max(capacity if gpus > 1 else 0.0, *(each.capacity_percent for each in found))
    changed = any(each.changed for each in found)
    what = f"{before:.3g} with the shares it began with" if changed else "no other shares carry more"
    more = " or more" if least.factor >= BEYOND else ""
    note = (
        f"rehearsal: {least.factor:.3g} times the rates{more} keep every SLO in simulation ({what}; "
        f"{sum(each.trials for each in found)} trials)"
    )
    new = JointPlan(
        capacity, tuple(rows[task.name] for task in case.tasks),
        sum(item.demand_percent for each in rows.values() for _, item in each.on),
        plan.gap if plan and not changed else 0.0, least.factor, (),
    )  # fmt: skip
    return Outcome(new, math.inf if more else least.factor, least.limit, note)


def _gpus(placed: Placed) -> set[int]:
    return {gpu for gpu, _ in placed.on}


def _is_free(placed: Mapping[str, Placed], name: str) -> bool:
    """Whether its share may be another one: all replicas of a model have the same."""
    return name not in placed or len(placed[name].on) == 1


def _on_one(case: Case, here: list[JointTask], placed: Mapping[str, Placed], capacity: float) -> Rehearsed:
    """One GPU. Errors: InputError, an SLO that serving alone takes up."""
    surfaces = {task.name: task.surface for task in here}
    demands = tuple(within_serving(_demand(case, task, placed), OUTSIDE) for task in here)
    beside = side_by_side(surfaces, demands, case.interference)
    planned = {name: placed[name].on[0][1].gpu_percent for name in surfaces if name in placed}
    starts = [planned or beside.gpu_percent, beside.gpu_percent]
    now, enough = {n: p for n, p in case.options.in_force.items() if n in surfaces}, BEYOND
    if len(now) == len(here):
        enough = ENOUGH
        starts.insert(0, now)
        capacity = max(capacity, sum(now.values()))
    grids = {
        task.name: _choice(task, now) if _is_free(placed, task.name) else (planned[task.name],)
        for task in here
    }
    deployed = SimCase(
        SpeedModel(surfaces, case.interference), demands, case.attainment,
        Shares(dict(starts[0]), beside.batch_size, 1.0), capacity,
        delays=BUSY_HOST, serving=replace(TRITON_H100, outside_us=0),
    )  # fmt: skip
    return rehearse(deployed, starts, grids, trials=case.options.rehearsal_trials, enough=enough)


def _choice(task: JointTask, now: Mapping[str, float]) -> tuple[float, ...]:
    """The shares that it can have, the one that it has now among them."""
    percents = set(task.grid.percents)
    if len(percents) > 1 and task.name in now and now[task.name] >= task.surface.min_percent:
        percents.add(now[task.name])
    return tuple(sorted(percents))


def _demand(case: Case, task: JointTask, placed: Mapping[str, Placed]) -> ModelDemand:
    """Its part of the rate on one GPU."""
    demand = case.demands[task.name]
    replicas = len(placed[task.name].on) if task.name in placed else 1
    return replace(demand, rate_per_s=demand.rate_per_s / replicas)


def _placed(case: Case, task: JointTask, gpu: int, found: Rehearsed) -> Placed:
    choice = (found.shares.gpu_percent[task.name], found.shares.batch_size[task.name], 1)
    return Placed(
        task, ((gpu, candidate(task, case.interference, found.capacity_percent, choice, alone=False)),)
    )
