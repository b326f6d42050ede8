"""Fixed shares for models that all run side by side, back to back: the best static deployment of this world.

At co-runners' GPU% q a model that always runs takes T = f(p, b) s(q) a batch, and a request that just misses
one waits T and runs T, so T <= S/2. It serves b/T requests a second. The shares are found by coordinate
ascent on the smallest b/T over the offered rate (the peak of the mix), ties to the smaller share.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from dstack_sched.domain.workload import ModelDemand
from dstack_sched.policy.interference import Interference
from dstack_sched.policy.latency import LatencySurface
from dstack_sched.policy.monotone import Array

_ROUNDS = 6


@dataclass(frozen=True, slots=True)
class Shares:
    """gpu_percent and batch_size of each model; scale: largest factor on the rates that they carry."""

    gpu_percent: dict[str, float]
    batch_size: dict[str, int]
    scale: float


def side_by_side(
    surfaces: Mapping[str, LatencySurface],
    demands: Sequence[ModelDemand],
    interference: Interference,
    percents: Sequence[float] = tuple(range(10, 101, 5)),
) -> Shares:
    """The best shares for models that all run all the time. Best-effort models get the smallest share."""
    grid = np.array(sorted(percents), np.float64)
    curves = {d.name: _Curve(surfaces[d.name], d, interference, grid) for d in demands}
    at = {d.name: len(grid) // 2 for d in demands}
    best = _scale(curves, demands, grid, at)
    for _ in range(_ROUNDS):
        before = best
        for demand in demands:
            for i in range(len(grid)):
                trial = {**at, demand.name: i}
                reached = _scale(curves, demands, grid, trial)
                if reached > best * (1 + 1e-6) or (reached >= best * (1 - 1e-6) and i < at[demand.name]):
                    best, at = max(best, reached), trial
        if best <= before * (1 + 1e-4):
            break
    total = float(sum(grid[i] for i in at.values()))
    batches = {name: curves[name].batch(at[name], total - grid[i]) for name, i in at.items()}
    return Shares({name: float(grid[i]) for name, i in at.items()}, batches, best)


def _scale(
    curves: Mapping[str, _Curve], demands: Sequence[ModelDemand], grid: Array, at: Mapping[str, int]
) -> float:
    total = sum(grid[i] for i in at.values())
    factors = [
        curves[d.name].rate(at[d.name], total - grid[at[d.name]]) / max(d.rate_per_s, 1e-9)
        for d in demands
        if d.slo_ms is not None
    ]
    # The smallest one decides; the others break ties, so that the ascent does not stall on a plateau.
    return min(factors) + 1e-3 * float(np.mean(np.minimum(factors, 4 * min(factors)))) if factors else 0.0


class _Curve:
    """b/T of one model by share and co-runners' GPU%."""

    def __init__(
        self, surface: LatencySurface, demand: ModelDemand, interference: Interference, grid: Array
    ) -> None:
        self._batches = np.arange(1, surface.max_batch + 1)
        self._latency_ms = surface.latency_ms(grid[:, None], self._batches[None, :])
        self._limit_ms = demand.slo_ms / 2 if demand.slo_ms else float("inf")
        self._model, self._interference = demand.name, interference

    def batch(self, at: int, co_percent: float) -> int:
        slow = float(self._interference.slowdown(self._model, co_percent))
        return max(1, int(np.searchsorted(self._latency_ms[at] * slow, self._limit_ms, side="right")))

    def rate(self, at: int, co_percent: float) -> float:
        slow = float(self._interference.slowdown(self._model, co_percent))
        batch = self.batch(at, co_percent)
        run_ms = float(self._latency_ms[at][batch - 1]) * slow
        # A batch of one that takes longer than half the objective is no use: worse the longer it takes.
        return 1000.0 * batch / run_ms * min(1.0, (self._limit_ms / run_ms) ** 2)
