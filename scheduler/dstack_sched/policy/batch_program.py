"""The batch program: the best (GPU%, batch size) of one model on its own (DESIGN section 3).

    maximise   eta = b / (p f(p, b)^2)                      efficacy, 1/(percent ms^2)
    subject to 1 <= b <= b_max,   p_min <= p <= 100
               f <= S/2                                     a request that just misses a batch waits one run
               (b - 1)/lambda + f <= S                      the first request of a batch waits for the last

f is a posynomial, so this is a geometric program; the last limit is one too, as b + lambda f <= lambda S + 1.
cvxpy compiles it once; each solve sets parameters. The optimum is then rounded to runnable values exactly:
for a fixed b, eta is log-concave in log p and the feasible p are an interval, so the best runnable p is next
to the best p; the best eta as a function of b is log-concave in log b, so walking away from the optimum may
stop as soon as its bound falls below the best runnable point found.
"""

from __future__ import annotations

import functools
import math
import warnings
from bisect import bisect_left
from dataclasses import dataclass
from typing import Any, Literal

import cvxpy as cp
import numpy as np
from numpy.typing import NDArray

from dstack_sched.errors import InfeasibleError
from dstack_sched.policy.latency import LatencySurface
from dstack_sched.policy.monotone import Array
from dstack_sched.policy.runnable import RunnableGrid

_TINY = 1e-12

Mask = NDArray[np.bool_]
Method = Literal["geometric program", "grid search"]


@dataclass(frozen=True, slots=True)
class Relaxed:
    """The optimum before rounding: an upper bound on the efficacy of every runnable point."""

    gpu_percent: float
    batch_size: float
    efficacy: float


@dataclass(frozen=True, slots=True)
class BatchChoice:
    """The best runnable point.

    assembly_ms: (b-1)/lambda. binding: the limits that alone keep a better point out ("slo/2", "slo",
    "batch_max", "percent_min", "percent_max"). relaxed: None when the surface is a measured grid (or the
    solver failed) and the runnable grid was searched in full.
    """

    gpu_percent: float
    batch_size: int
    latency_ms: float
    efficacy: float
    assembly_ms: float
    binding: tuple[str, ...]
    method: Method
    relaxed: Relaxed | None


def solve_batch_program(
    surface: LatencySurface, *, slo_ms: float | None, rate_per_s: float, grid: RunnableGrid
) -> BatchChoice:
    """The runnable (p, b) of greatest efficacy. slo_ms None: no latency limit. rate_per_s >= 0.

    Errors: InfeasibleError when even the fastest run is longer than half the SLO.
    """
    problem = _Limits(surface, math.inf if slo_ms is None else slo_ms, rate_per_s / 1000.0, grid)
    fastest = float(surface.latency_ms(grid.percents[-1], grid.batches[0]))
    if 2 * fastest > problem.slo_ms:
        raise InfeasibleError(slo_too_short(surface, problem.slo_ms, grid))
    relaxed = (
        solve_relaxed(surface, problem.slo_ms, rate_per_s, grid) if surface.kind == "posynomial" else None
    )
    p, b = _search(problem) if relaxed is None else _round(problem, relaxed)
    latency_ms = float(surface.latency_ms(p, b))
    return BatchChoice(
        gpu_percent=p,
        batch_size=b,
        latency_ms=latency_ms,
        efficacy=efficacy(p, b, latency_ms),
        assembly_ms=assembly_ms(b, rate_per_s),
        binding=_binding(problem, p, b),
        method="grid search" if relaxed is None else "geometric program",
        relaxed=relaxed,
    )


def slo_too_short(surface: LatencySurface, slo_ms: float, grid: RunnableGrid) -> str:
    """One line: the SLO, the fastest possible run, and the smallest SLO that could be met."""
    p, b = grid.percents[-1], grid.batches[0]
    fastest = float(surface.latency_ms(p, b))
    return (
        f"SLO {slo_ms:g} ms of {surface.name} cannot be met: the fastest run is {fastest:.3g} ms at {p:g}%, "
        f"b={b}; the SLO must be at least {_round_up(2 * fastest):g} ms"
    )


def _round_up(value: float) -> float:
    """Up to three digits, so that the stated SLO is one that works."""
    unit = 10.0 ** (math.floor(math.log10(value)) - 2)
    return round(math.ceil(value / unit - 1e-9) * unit, 10)


def efficacy(p: float, b: float, latency_ms: float) -> float:
    """Throughput over (latency x GPU%): b / (p f^2), in 1/(percent ms^2)."""
    return b / (p * latency_ms * latency_ms)


def assembly_ms(b: int, rate_per_s: float) -> float:
    """How long the first request of a batch of b waits for the last at this rate; inf if none ever comes."""
    if b <= 1:
        return 0.0
    return 1000.0 * (b - 1) / rate_per_s if rate_per_s > 0 else math.inf


@dataclass(frozen=True, slots=True)
class _Limits:
    surface: LatencySurface
    slo_ms: float
    rate_per_ms: float
    grid: RunnableGrid

    def met(self, b: Array, latency_ms: Array) -> tuple[Mask, Mask]:
        """Which points keep f <= S/2, and which keep assembly + f <= S. Without an SLO nothing limits."""
        if math.isinf(self.slo_ms):
            everything = np.ones(np.broadcast(b, latency_ms).shape, bool)
            return everything, everything
        waits = b - 1 <= self.rate_per_ms * (self.slo_ms - latency_ms) * (1 + _TINY) + _TINY
        return 2 * latency_ms <= self.slo_ms * (1 + _TINY), waits


def _search(limits: _Limits) -> tuple[float, int]:
    """The best runnable point by looking at every one; ties go to the smaller p, then the smaller b."""
    p = np.asarray(limits.grid.percents)[:, None]
    b = np.asarray(limits.grid.batches, np.float64)[None, :]
    latency_ms = limits.surface.latency_ms(p, b)
    half, whole = limits.met(b, latency_ms)
    value = np.where(half & whole, b / (p * latency_ms**2), -1.0)
    row, column = np.unravel_index(int(np.argmax(value)), value.shape)
    return limits.grid.percents[row], limits.grid.batches[column]


def _round(limits: _Limits, relaxed: Relaxed) -> tuple[float, int]:
    """The best runnable point, found from the relaxed optimum outwards; equal to `_search`, and proven so."""
    batches = limits.grid.batches
    start = bisect_left(batches, relaxed.batch_size)
    best = (-1.0, 0.0, 0)
    for walk in (range(start, len(batches)), range(start - 1, -1, -1)):
        for index in walk:
            bound, points = _best_percents(limits, batches[index])
            if bound <= best[0] * (1 - 1e-9):
                break
            for value, p in points:
                if value > best[0]:
                    best = (value, p, batches[index])
    return best[1], best[2]


def _best_percents(limits: _Limits, b: int) -> tuple[float, list[tuple[float, float]]]:
    """For one b: the greatest eta over real p, and (eta, p) of the runnable p on either side of it.

    f = A + B/p: p f^2 is least at p = B/A; f at most f_max means p >= B / (f_max - A).
    """
    a0, a1, a2, a3 = limits.surface.a
    serial, shared = a0 + a1 * b, a2 + a3 * b
    f_max = min(limits.slo_ms / 2, _longest_run_ms(limits, b))
    if f_max <= serial and not (shared == 0 and f_max == serial):
        return -1.0, []
    lowest = 0.0 if shared == 0 or math.isinf(f_max) else shared / (f_max - serial) * (1 - 4 * _TINY)
    percents = limits.grid.percents
    low = bisect_left(percents, lowest)
    if low == len(percents):
        return -1.0, []
    ideal = shared / serial if serial > 0 else percents[-1]
    place = min(max(ideal, lowest, percents[0]), percents[-1])
    bound = efficacy(place, b, serial + shared / place)
    near = bisect_left(percents, place)
    picks = sorted({max(low, near - 1), min(max(low, near), len(percents) - 1)})
    return bound, [(efficacy(percents[i], b, serial + shared / percents[i]), percents[i]) for i in picks]


def _longest_run_ms(limits: _Limits, b: int) -> float:
    """The latency at which assembly + f = S."""
    if b <= 1 or math.isinf(limits.slo_ms):
        return limits.slo_ms
    return limits.slo_ms - (b - 1) / limits.rate_per_ms if limits.rate_per_ms > 0 else -math.inf


def _binding(limits: _Limits, p: float, b: int) -> tuple[str, ...]:
    """The limits that keep a better point out: each eased alone, on the grid with one more step a side."""
    percents, batches = limits.grid.percents, limits.grid.batches
    step = percents[-1] - percents[-2] if len(percents) > 1 else 1.0
    below = percents[0] - (percents[1] - percents[0] if len(percents) > 1 else 1.0)
    wide_p = np.array([max(below, percents[0] / 2), *percents, percents[-1] + step])[:, None]
    wide_b = np.array([*batches, batches[-1] + 1], np.float64)[None, :]
    latency_ms = limits.surface.latency_ms(wide_p, wide_b)
    better = wide_b / (wide_p * latency_ms**2) > efficacy(p, b, float(limits.surface.latency_ms(p, b))) * (
        1 + 1e-9
    )
    half, whole = limits.met(wide_b, latency_ms)
    keeps = {
        "slo/2": half,
        "slo": whole,
        "batch_max": np.broadcast_to(wide_b <= batches[-1], better.shape),
        "percent_min": np.broadcast_to(wide_p >= percents[0], better.shape),
        "percent_max": np.broadcast_to(wide_p <= percents[-1], better.shape),
    }
    binding = []
    for name in keeps:
        others = np.logical_and.reduce([mask for other, mask in keeps.items() if other != name])
        if (better & others & ~keeps[name]).any():
            binding.append(name)
    return tuple(binding)


@functools.cache
def _compiled() -> tuple[cp.Problem, dict[str, Any]]:
    """The geometric program with every number a parameter (DPP), so that cvxpy compiles it once a process."""
    names = ("a0", "a1", "a2", "a3", "p_min", "p_max", "b_min", "b_max", "half_slo", "rate", "waits")
    q = {name: cp.Parameter(pos=True, name=name) for name in names}
    p, b, f = (cp.Variable(pos=True, name=name) for name in ("p", "b", "f"))
    problem = cp.Problem(
        cp.Minimize(p * f**2 / b),
        [
            q["a0"] + q["a1"] * b + q["a2"] / p + q["a3"] * b / p <= f,
            p >= q["p_min"],
            p <= q["p_max"],
            b >= q["b_min"],
            b <= q["b_max"],
            f <= q["half_slo"],
            b + q["rate"] * f <= q["waits"],
        ],
    )
    return problem, {**q, "p": p, "b": b, "f": f}


def solve_relaxed(
    surface: LatencySurface, slo_ms: float, rate_per_s: float, grid: RunnableGrid
) -> Relaxed | None:
    """The geometric program over real (p, b). None when the solver finds no answer (numerical failure)."""
    problem, q = _compiled()
    p_min, p_max, b_min, b_max = grid.percents[0], grid.percents[-1], grid.batches[0], grid.batches[-1]
    slowest = float(surface.latency_ms(p_min, b_max))
    # A missing limit is one that no point reaches; a missing coefficient one too small to matter.
    longest = slo_ms if math.isfinite(slo_ms) else 4 * slowest
    rate_per_ms = rate_per_s / 1000.0 if math.isfinite(slo_ms) else b_max / slowest
    # Time is measured in units of the slowest run, which keeps the solver's numbers near one.
    values = (surface.a[0], surface.a[1] * b_max, surface.a[2] / p_max, surface.a[3] * b_max / p_max)
    floor = 1e-9 * slowest
    a0, a1, a2, a3 = (max(value, floor) / slowest for value in values)
    for name, value in {
        "a0": a0, "a1": a1, "a2": a2, "a3": a3,
        "p_min": p_min / p_max, "p_max": 1.0 + 1e-9, "b_min": b_min / b_max, "b_max": 1.0 + 1e-9,
        "half_slo": longest / 2 / slowest * (1 + 1e-9),
        "rate": max(rate_per_ms * slowest / b_max, 1e-9),
        "waits": (rate_per_ms * longest + 1.0) / b_max * (1 + 1e-9) + 1e-9,
    }.items():  # fmt: skip
        q[name].value = value
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # cvxpy warns of inaccuracy; the status below says it too
        try:
            problem.solve(gp=True, solver=cp.CLARABEL)
        except cp.SolverError:
            return None
    if problem.status not in (cp.OPTIMAL, cp.OPTIMAL_INACCURATE) or q["p"].value is None:
        return None
    p, b = float(q["p"].value) * p_max, float(q["b"].value) * b_max
    return Relaxed(p, b, efficacy(p, b, float(surface.latency_ms(p, b))))
