"""Candidates of the joint program: for each model a few (GPU%, batch size, replicas), and what they cost.

With capacity C (percent), interference slowdown s_m(q) at co-runners of q percent, n replicas that share the
rate lambda evenly, and S the SLO:

    F = f(p, b) s_m(C - p)        latency beside co-runners that take all that is left (the worst case)
    u = (lambda/n) F / b          utilization of one replica, at most 1
    d = p u                       its demand, GPU% on average (share-time per request c = p F / b, times rate)
    A = (b - 1) / (lambda/n)      assembly
    slack = S - r F - max(F, A)   what is left for waiting on co-runners: a request that just misses a batch
                                  waits one run (F) or for its batch to fill (A), then runs: r F in all but
                                  one case of a hundred, r = p99 / p50 of the profile, at most MAX_TAIL

A replica alone on its GPU has no co-runners: F = f there, and it waits for nobody.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from dstack_sched.policy.batch_program import assembly_ms
from dstack_sched.policy.interference import Interference
from dstack_sched.policy.latency import LatencySurface
from dstack_sched.policy.monotone import Array
from dstack_sched.policy.runnable import RunnableGrid

MAX_TAIL = 1.5  # a longer tail is the host's noise, or that of too few samples (decisions/0092)
# Parts of the SLO to keep for waiting: for each GPU% the largest batch that keeps that much is a candidate.
_KEPT_FOR_WAITING = (0.0, 0.2, 0.4, 0.6, 0.8)


@dataclass(frozen=True, slots=True)
class JointTask:
    """One model as the joint program sees it. slo_ms None: best effort, planned for but promised nothing.
    replicas: exactly so many, None: as many as are best."""

    surface: LatencySurface
    slo_ms: float | None
    rate_per_s: float
    weight: float
    memory_bytes: int
    grid: RunnableGrid
    replicas: int | None = None

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
    return _at(task, (p, b, replicas), latency_ms, float(_tail(task, p, b)), alone, rate_scale)


def _tail(task: JointTask, p: ArrayLike, b: ArrayLike) -> Array:
    """r: p99 over p50 of a run, at most MAX_TAIL; the broadcast shape of p and b."""
    return np.minimum(task.surface.p99_ms(p, b) / task.surface.latency_ms(p, b), MAX_TAIL)


def _at(
    task: JointTask,
    choice: tuple[float, int, int],
    latency_ms: float,
    tail: float,
    alone: bool,
    rate_scale: float,
) -> Candidate:
    """The candidate whose latency, beside co-runners or alone, is known; tail: r."""
    p, b, replicas = choice
    rate = task.rate_per_s * rate_scale / replicas
    utilization = rate * latency_ms / b / 1000.0
    if task.slo_ms is None:
        # Best effort fills what is left: it claims no capacity, whatever its rate.
        return Candidate(p, b, replicas, alone, latency_ms, 0.0, 0.0, math.inf)
    slack = task.slo_ms - tail * latency_ms - max(latency_ms, assembly_ms(b, rate))
    return Candidate(p, b, replicas, alone, latency_ms, utilization, p * utilization, slack)


def candidates(
    task: JointTask,
    interference: Interference,
    capacity_percent: float,
    *,
    gpus: int,
    limit: int,
    every_count: bool = False,
    rate_scale: float = 1.0,
) -> tuple[Candidate, ...]:
    """At most about `limit` candidates beside co-runners, and those worth having on a GPU of their own.

    From the runnable grid: for each of a few GPU% the largest batches that leave given parts of the SLO for
    waiting, not dominated, spread over GPU%. Replicas: see `_replica_counts`; all counts with every_count.
    """
    percents = np.asarray(spread(task.grid.percents, max(3, limit // 2)))
    sizes = np.asarray(task.grid.batches)
    alone_ms = task.surface.latency_ms(percents[:, None], sizes[None, :])
    tails = _tail(task, percents[:, None], sizes[None, :])
    slowdown = interference.slowdown(task.name, capacity_percent - percents)
    fill_ms = np.array([assembly_ms(int(b), task.rate_per_s * rate_scale) for b in sizes])
    found: dict[bool, list[Candidate]] = {False: [], True: []}
    for i, p in enumerate(percents):
        picked: set[int] = set()
        for factor in {1.0, float(slowdown[i])}:
            picked |= _batches(task, factor * alone_ms[i], tails[i], fill_ms)
        for j in sorted(picked):
            for alone, kept in found.items():
                latency_ms = float(alone_ms[i, j] * (1.0 if alone else slowdown[i]))
                tail = float(tails[i, j])
                one = _at(task, (float(p), int(sizes[j]), 1), latency_ms, tail, alone, rate_scale)
                for replicas in _replica_counts(one, task.replicas, capacity_percent, gpus, every_count):
                    point = (one.gpu_percent, one.batch_size, replicas)
                    item = one if replicas == 1 else _at(task, point, latency_ms, tail, alone, rate_scale)
                    if item.slack_ms >= 0 and item.utilization <= 1 + 1e-9:
                        kept.append(item)
    return (*_thin(pareto(found[False]), limit), *pareto(found[True]))


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


def _batches(task: JointTask, latency_ms: Array, tail: Array, fill_ms: Array) -> set[int]:
    """Indices of the largest batch sizes that leave given parts of the SLO for waiting (one row per GPU%)."""
    if task.slo_ms is None:
        return {0, latency_ms.size - 1}
    slack = task.slo_ms - tail * latency_ms - np.maximum(latency_ms, fill_ms)
    fits = [np.nonzero(slack >= kept * task.slo_ms)[0] for kept in _KEPT_FOR_WAITING]
    return {int(each[-1]) for each in fits if each.size}


def _replica_counts(
    one: Candidate, held: int | None, capacity_percent: float, gpus: int, every_count: bool
) -> range:
    """From the fewest replicas that one alone would overload; one more for a model that nearly fills them.
    held: that many and no others."""
    if held is not None:
        return range(held, held + 1) if held <= gpus else range(0)
    least = max(1, math.ceil(one.utilization - 1e-9))
    if every_count:
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
