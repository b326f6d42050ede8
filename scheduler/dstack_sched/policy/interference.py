"""What models that run side by side do to each other, fitted from co-run measurements.

    f'_m = f_m (1 + k_m (q / 100)^g),    q = sum of the GPU% of m's co-runners

k_m >= 0 is the slowdown that co-runners of 100% cause, g >= 1 one exponent for the GPU. With g = 1 this is
the formula of DESIGN section 3. On the H100 the slowdown grows faster than in proportion (decisions/
0021-interference-exponent.md): g is fitted where co-runs were measured at three or more different q, else 1.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import ArrayLike
from scipy.optimize import least_squares

from dstack_sched.domain.profile import CorunPoint, ProfileSet
from dstack_sched.policy.latency import LatencySurface
from dstack_sched.policy.monotone import Array

_MAX_EXPONENT = 3.0
_PRIOR = 0.1  # pull of each k towards their mean: decides only what the measurements leave open
_NEAR_BEST = 0.98  # a smaller promise that reaches this part of the best throughput is preferred


@dataclass(frozen=True, slots=True)
class CorunTotal:
    """A closed-loop co-run of which only the sum is known. members: (model, gpu_percent, batch_size)."""

    members: tuple[tuple[str, float, int], ...]
    total_per_s: float


@dataclass(frozen=True, slots=True)
class FitError:
    """Mean and largest relative error of predicted latency (or total throughput) over the co-runs."""

    mean: float
    largest: float


@dataclass(frozen=True, slots=True)
class Interference:
    """k: slowdown by 100% of co-runners, per model; other models take `default`. exponent: g.

    before, after: error on the measured co-runs without and with the model; None when none was measured.
    """

    k: Mapping[str, float] = field(default_factory=dict)
    default: float = 0.0
    exponent: float = 1.0
    before: FitError | None = None
    after: FitError | None = None

    def slowdown(self, model: str, co_percent: ArrayLike) -> Array:
        """f'/f of the model while co-runners hold `co_percent` of GPU% in all; the shape of co_percent."""
        return self._slowdown(self.k.get(model, self.default), co_percent)

    def per_percent(self, model: str, co_percent: float) -> float:
        """The slope k of f' = f (1 + k q) that agrees with this model at q = co_percent (for the engine)."""
        if co_percent <= 0:
            return 0.0
        return float(self.slowdown(model, co_percent) - 1.0) / co_percent

    def _slowdown(self, k: float, co_percent: ArrayLike) -> Array:
        q = np.maximum(np.asarray(co_percent, np.float64), 0.0)
        return np.asarray(1.0 + k * (q / 100.0) ** self.exponent)


NO_INTERFERENCE = Interference()


def interference_of(profiles: ProfileSet, surfaces: Mapping[str, LatencySurface]) -> Interference:
    """Fitted to the co-runs, and for models where service has shown better, as it has."""
    fitted = fit_interference(surfaces, profiles.corun)
    return replace(fitted, k={**fitted.k, **profiles.slowdown}) if profiles.slowdown else fitted


def fit_interference(
    surfaces: Mapping[str, LatencySurface], points: Sequence[CorunPoint], totals: Sequence[CorunTotal] = ()
) -> Interference:
    """Least squares of log(predicted / measured) over member latencies and total throughputs.

    Members whose model has no surface are left out; a point with fewer than two members says nothing.
    """
    samples = _samples(surfaces, points, totals)
    if not samples:
        return NO_INTERFERENCE
    names = sorted({name for sample in samples for name, _, _, _ in sample.members})
    place = {name: i for i, name in enumerate(names)}
    shares = {round(q) for sample in samples for _, _, _, q in sample.members}
    free_exponent = len(shares) >= 3

    def model(x: Array) -> Interference:
        exponent = float(x[-1]) if free_exponent else 1.0
        return Interference(
            {n: float(x[i]) for n, i in place.items()}, float(x[: len(names)].mean()), exponent
        )

    def residuals(x: Array) -> Array:
        k = x[: len(names)]
        return np.concatenate([_log_errors(model(x), samples), _PRIOR * (k - k.mean())])

    start = np.full(len(names) + free_exponent, 0.5)
    upper = np.full_like(start, 100.0)
    lower = np.zeros_like(start)
    if free_exponent:
        start[-1], lower[-1], upper[-1] = (1.0 + _MAX_EXPONENT) / 2, 1.0, _MAX_EXPONENT
    found = model(least_squares(residuals, start, bounds=(lower, upper)).x)
    return Interference(
        found.k,
        found.default,
        found.exponent,
        _fit_error(NO_INTERFERENCE, samples),
        _fit_error(found, samples),
    )


def measured_capacity_percent(points: Sequence[CorunPoint], totals: Sequence[CorunTotal] = ()) -> float:
    """The GPU% worth promising to all together (100 x oversubscription), from co-runs at several promises.

    Among co-runs of the same models and batch sizes, the smallest promise within 2% of the best total
    throughput; the median over such groups. 100 when no group was measured at two promises or more.
    """
    groups: dict[tuple[tuple[str, int], ...], dict[float, float]] = defaultdict(dict)
    for point in points:
        mix = tuple(sorted((x.model, x.batch_size) for x in point.members))
        groups[mix][sum(x.gpu_percent for x in point.members)] = sum(
            x.throughput_per_s for x in point.members
        )
    for total in totals:
        mix = tuple(sorted((name, b) for name, _, b in total.members))
        groups[mix][sum(p for _, p, _ in total.members)] = total.total_per_s
    best = [
        min(promise for promise, rate in group.items() if rate >= _NEAR_BEST * max(group.values()))
        for group in groups.values()
        if len(group) >= 2
    ]
    return max(100.0, float(np.median(best))) if best else 100.0


@dataclass(frozen=True, slots=True)
class _Sample:
    """members: (model, batch size, isolated latency ms, co-runners' GPU%). measured: the latency in ms of the
    only member that is compared, or, with `is_total`, the sum of throughputs per second."""

    members: tuple[tuple[str, int, float, float], ...]
    measured: float
    is_total: bool


def _samples(
    surfaces: Mapping[str, LatencySurface], points: Sequence[CorunPoint], totals: Sequence[CorunTotal]
) -> list[_Sample]:
    samples = []
    for point in points:
        promise = sum(x.gpu_percent for x in point.members)
        for x in point.members:
            if len(point.members) < 2 or x.model not in surfaces:
                continue
            alone = float(surfaces[x.model].latency_ms(x.gpu_percent, x.batch_size))
            member = (x.model, x.batch_size, alone, promise - x.gpu_percent)
            samples.append(_Sample((member,), x.latency_ms_p50, False))
    for total in totals:
        promise = sum(p for _, p, _ in total.members)
        if len(total.members) < 2 or any(name not in surfaces for name, _, _ in total.members):
            continue
        members = tuple(
            (name, b, float(surfaces[name].latency_ms(p, b)), promise - p) for name, p, b in total.members
        )
        samples.append(_Sample(members, total.total_per_s, True))
    return samples


def _log_errors(interference: Interference, samples: Sequence[_Sample]) -> Array:
    """log(predicted / measured), one a sample."""
    errors = []
    for sample in samples:
        latency_ms = [alone * float(interference.slowdown(n, q)) for n, _, alone, q in sample.members]
        predicted = latency_ms[0]
        if sample.is_total:
            predicted = sum(1000.0 * x[1] / ms for x, ms in zip(sample.members, latency_ms, strict=True))
        errors.append(np.log(predicted / sample.measured))
    return np.asarray(errors, np.float64)


def _fit_error(interference: Interference, samples: Sequence[_Sample]) -> FitError:
    relative = np.abs(np.expm1(_log_errors(interference, samples)))
    return FitError(float(relative.mean()), float(relative.max()))
