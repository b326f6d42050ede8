"""Candidates of the joint program: for each model a few (GPU%, batch size, replicas), and what they cost.

With capacity C (percent), interference slowdown s_m(q) at co-runners of q percent, n replicas that share the
rate lambda evenly, and S the SLO:

    F = f(p, b) s_m(C - p)        latency beside co-runners that take all that is left (the worst case)
    u = (lambda/n) F / b          utilization of one replica, at most 1
    d = p u                       its demand, GPU% on average (share-time per request c = p F / b, times rate)
    A = (b - 1) / (lambda/n)      assembly
    slack = S - F - max(F, A)     what is left for waiting on co-runners: a request that just misses a batch
                                  waits one run (F) or for its batch to fill (A), then runs (F)

A replica alone on its GPU has no co-runners: F = f there, and it waits for nobody.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from dstack_sched.policy.batch_program import assembly_ms
from dstack_sched.policy.interference import Interference
from dstack_sched.policy.latency import LatencySurface
from dstack_sched.policy.runnable import RunnableGrid

# Parts of the SLO to keep for waiting: for each GPU% the largest batch that keeps that much is a candidate.
_KEPT_FOR_WAITING = (0.0, 0.2, 0.4, 0.6, 0.8)


@dataclass(frozen=True, slots=True)
class JointTask:
    """One model as the joint program sees it. slo_ms None: best effort, planned for but promised nothing."""

    surface: LatencySurface
    slo_ms: float | None
    rate_per_s: float
    weight: float
    memory_bytes: int
    grid: RunnableGrid

    @property
    def name(self) -> str:
        return self.surface.name


@dataclass(frozen=True, slots=True)
class Candidate:
    """One way to run one replica of a model (module docstring). alone: on a GPU of its own.

    latency_ms is F; utilization u and demand_percent d are at the planned rate; slack_ms inf: best effort.
    """

    gpu_percent: float
    batch_size: int
    replicas: int
    alone: bool
    latency_ms: float
    utilization: float
    demand_percent: float
    slack_ms: float


def candidate(
    task: JointTask,
    interference: Interference,
    capacity_percent: float,
    choice: tuple[float, int, int],
    *,
    alone: bool,
    rate_scale: float = 1.0,
) -> Candidate:
    """The candidate at choice = (GPU%, batch size, replicas); rate_scale is a factor on the rate."""
    p, b, replicas = choice
    latency_ms = float(task.surface.latency_ms(p, b))
    if not alone:
        latency_ms *= float(interference.slowdown(task.name, capacity_percent - p))
    rate = task.rate_per_s * rate_scale / replicas
    utilization = rate * latency_ms / b / 1000.0
    if task.slo_ms is None:
        # Best effort fills what is left: it claims no capacity, whatever its rate.
        return Candidate(p, b, replicas, alone, latency_ms, 0.0, 0.0, math.inf)
    slack = task.slo_ms - latency_ms - max(latency_ms, assembly_ms(b, rate))
    return Candidate(p, b, replicas, alone, latency_ms, utilization, p * utilization, slack)


def candidates(
    task: JointTask,
    interference: Interference,
    capacity_percent: float,
    *,
    gpus: int,
    limit: int,
    rate_scale: float = 1.0,
    max_utilization: float = 1.0,
) -> tuple[Candidate, ...]:
    """At most about `limit` candidates beside co-runners, and those worth having on a GPU of their own.

    From the runnable grid: for each of a few GPU% the largest batches that leave given parts of the SLO for
    waiting, not dominated, spread over GPU%. Replicas: `_replica_counts`.
    """
    shared: list[Candidate] = []
    single: list[Candidate] = []
    for p in spread(task.grid.percents, max(3, limit // 2)):
        for b in _batches(task, interference, capacity_percent, p, rate_scale):
            for alone, found in ((False, shared), (True, single)):
                for replicas in _replica_counts(
                    task, interference, capacity_percent, (p, b), gpus, rate_scale, max_utilization, alone
                ):
                    item = candidate(
                        task,
                        interference,
                        capacity_percent,
                        (p, b, replicas),
                        alone=alone,
                        rate_scale=rate_scale,
                    )
                    if item.slack_ms >= 0 and item.utilization <= max_utilization * (1 + 1e-9):
                        found.append(item)
    return (*_thin(pareto(shared), limit), *pareto(single))


def pareto(items: Sequence[Candidate]) -> list[Candidate]:
    """Without the candidates that another one beats or equals in everything that counts.

    Beside co-runners: demand, utilization, GPU%, latency (what it makes others wait) and slack. Alone: demand
    and utilization.
    """
    if not items:
        return []
    costs = np.array(
        [
            (
                x.demand_percent,
                x.utilization,
                0.0 if x.alone else x.gpu_percent,
                0.0 if x.alone else x.latency_ms,
                0.0 if x.alone else -x.slack_ms,
                x.replicas,
            )
            for x in items
        ]
    )
    order = np.lexsort(costs.T[::-1])
    kept: list[int] = []
    for i in order:
        if not kept or not (costs[kept] <= costs[i] + 1e-12).all(axis=1).any():
            kept.append(int(i))
    return [items[i] for i in kept]


def spread(values: Sequence[float], count: int) -> list[float]:
    """At most `count` of the ascending values, evenly spread in ratio, both ends included."""
    if len(values) <= count:
        return list(values)
    wanted = np.geomspace(values[0], values[-1], count)
    return [values[i] for i in sorted({int(np.abs(np.asarray(values) - w).argmin()) for w in wanted})]


def _batches(
    task: JointTask, interference: Interference, capacity_percent: float, p: float, rate_scale: float
) -> list[int]:
    """For this GPU%: the largest batch sizes that leave given parts of the SLO for waiting."""
    sizes = np.asarray(task.grid.batches, np.float64)
    if task.slo_ms is None:
        return [task.grid.batches[-1], task.grid.batches[0]]
    latency_ms = task.surface.latency_ms(p, sizes)
    rate = task.rate_per_s * rate_scale
    assembly = np.array([assembly_ms(int(b), rate) for b in sizes])
    picked = set()
    for slowdown in {1.0, float(interference.slowdown(task.name, capacity_percent - p))}:
        slack = task.slo_ms - slowdown * latency_ms - np.maximum(slowdown * latency_ms, assembly)
        for kept in _KEPT_FOR_WAITING:
            fits = np.nonzero(slack >= kept * task.slo_ms)[0]
            if fits.size:
                picked.add(task.grid.batches[int(fits[-1])])
    return sorted(picked)


def _replica_counts(
    task: JointTask,
    interference: Interference,
    capacity_percent: float,
    point: tuple[float, int],
    gpus: int,
    rate_scale: float,
    max_utilization: float,
    alone: bool,
) -> range:
    """From the fewest replicas that keep utilization within bounds; one more for a model that fills more than
    half of them (all counts where there are few GPUs)."""
    one = candidate(task, interference, capacity_percent, (*point, 1), alone=alone, rate_scale=rate_scale)
    least = max(1, math.ceil(one.utilization / max_utilization - 1e-9))
    if gpus <= 3:
        return range(least, gpus + 1)
    hot = max(one.utilization, 2 * one.demand_percent / capacity_percent) > 0.7 * least
    return range(least, min(least + (1 if hot else 0), gpus) + 1)


def _thin(items: list[Candidate], limit: int) -> list[Candidate]:
    """At most `limit`: the extremes of every measure, the rest spread evenly over (GPU%, batch size)."""
    if len(items) <= limit:
        return items
    keys = (
        lambda x: x.demand_percent,
        lambda x: x.gpu_percent,
        lambda x: x.latency_ms,
        lambda x: -x.slack_ms,
        lambda x: x.gpu_percent * x.latency_ms,
        lambda x: x.utilization,
    )
    kept = list(dict.fromkeys(min(items, key=key) for key in keys))[:limit]
    rest = sorted((x for x in items if x not in kept), key=lambda x: (x.gpu_percent, x.batch_size))
    room = limit - len(kept)
    if room > 0:
        kept += [rest[i] for i in sorted({round(x) for x in np.linspace(0, len(rest) - 1, room)})]
    return kept
