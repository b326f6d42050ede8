"""Where to measure a latency surface: few points, each where it tells the most.

Three predictors that err in different ways look at the points measured so far: the four-term posynomial, the
interpolation of the points in log space, and the parallelism model where the graph is known. Where they
disagree, the surface is unsure, and that is where to measure next; before that, the points that plans would
be made of are measured themselves. How good the surface is, is told by leaving each point out.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import product

import numpy as np
from scipy.interpolate import LinearNDInterpolator

from dstack_sched.domain.kernels import KernelWork
from dstack_sched.domain.profile import ProfilePoint
from dstack_sched.policy.latency import LatencySurface, fit_posynomial
from dstack_sched.policy.monotone import Array
from dstack_sched.policy.parallelism import MIN_POINTS, fit_parallelism

MIN_INNER_POINTS = 2
LIMITS = (1.25, 2.0, 4.0, 8.0, 16.0, float("inf"))
NEAR = 0.03  # what a latency may be off by when a limit is judged
DOUBT = (0.18, 0.3)  # how much better than predicted the efficacy of an unmeasured place may be
REPEAT_DOUBT = 0.1  # twice what two single measurements of efficacies differ by on a quiet H100 (5%)
CORUN_PERCENTS = (25.0, 50.0, 70.0, 100.0)
Place = tuple[float, int]


def start_design(percents: Sequence[float], batches: Sequence[int]) -> list[Place]:
    """The corners and two places inside: enough to fit all four terms and to doubt them. No place twice.

    percents, batches: ascending. The cheapest corner comes first.
    """
    p_low, p_high, p_mid = percents[0], percents[-1], _middle(percents)
    b_low, b_high, b_mid = batches[0], batches[-1], int(_middle(batches))
    wanted = [
        (p_high, b_low),
        (p_high, b_high),
        (p_low, b_low),
        (p_low, b_high),
        (p_mid, b_mid),
        (p_mid, b_high),
    ]
    return list(dict.fromkeys(wanted))


def surface_error(points: Sequence[ProfilePoint], *, complete: bool = False) -> float:
    """The largest relative error of the surface: at its points, and at each inner point when left out.

    A point is inner when the others still span its GPU% and batch size; leaving out any other asks for
    extrapolation, which planners never do. Infinite with fewer than MIN_INNER_POINTS inner points.
    complete: no candidate is unmeasured, so only the error at the points counts.
    """
    if complete and points:
        return LatencySurface("", points).max_relative_error
    inner = [i for i in range(len(points)) if _is_inner(points, i)]
    if len(inner) < MIN_INNER_POINTS:
        return float("inf")
    errors = [LatencySurface("", points).max_relative_error]
    for i in inner:
        rest = LatencySurface("", [*points[:i], *points[i + 1 :]])
        predicted = float(rest.latency_ms(points[i].gpu_percent, points[i].batch_size))
        errors.append(abs(predicted / points[i].latency_ms_p50 - 1.0))
    return max(errors)


def promises(points: Sequence[ProfilePoint], candidates: Sequence[Place]) -> Array:
    """How near each candidate comes to the best that a plan may choose: 1 for a place that is one, shape
    (candidates,).

    A plan limits the latency by its SLO, and the batch size by the rate. For each latency limit (LIMITS times
    the fastest run) and each largest batch size: the predicted efficacy b / (p f^2) over the greatest within
    the limit; 0 beyond it, where a place that misses it by NEAR counts, too: it may be within.
    """
    p, b = (np.array(column, np.float64) for column in zip(*candidates, strict=True))
    latency_ms = LatencySurface("", points).latency_ms(p, b)
    efficacy = b / (p * latency_ms**2)
    promise = np.zeros(len(candidates))
    for largest, limit in product(np.unique(b), LIMITS):
        limit_ms = limit * latency_ms.min()
        within = (b <= largest) & (latency_ms <= limit_ms)
        if within.any():
            near = (b <= largest) & (latency_ms <= limit_ms * (1.0 + NEAR))
            promise = np.maximum(promise, np.where(near, efficacy / efficacy[within].max(), 0.0))
    return promise


def next_decisive(
    points: Sequence[ProfilePoint],
    candidates: Sequence[Place],
    times: Mapping[Place, int],
    error: float,
    most_times: int,
) -> Place | None:
    """The place to measure, or to measure again, that may most of all be better than what plans would be made
    of; None when none is left that may.

    times: how often each place was measured. Efficacy squares latency, so a place that was not measured may
    be better than predicted by twice the `error` of the surface (held between DOUBT); one measured n times
    by REPEAT_DOUBT / sqrt(n). The best of many measurements owes some of its lead to chance: it and its
    rivals are measured again, in turns, as a device drifts, but no place more than `most_times`.
    """
    doubt = float(np.clip(2.0 * error, *DOUBT))
    best: Place | None = None
    most = 1.0
    for place, promise in zip(candidates, promises(points, candidates), strict=True):
        n = times.get(place, 0)
        may_reach = promise + (REPEAT_DOUBT / np.sqrt(n) if n else doubt)
        if n < most_times and may_reach > most:
            best, most = place, may_reach
    return best


def most_unsure_place(
    points: Sequence[ProfilePoint], candidates: Iterable[Place], kernels: Sequence[KernelWork], sms: int
) -> Place | None:
    """The candidate not measured yet where the predictors disagree most; None when all are measured.

    points: at least MIN_POINTS. kernels may be empty; sms: of the device.
    """
    measured = {(point.gpu_percent, point.batch_size) for point in points}
    open_places = [place for place in candidates if place not in measured]
    if not open_places:
        return None
    return open_places[int(np.argmax(prediction_spread(points, open_places, kernels, sms)))]


def prediction_spread(
    points: Sequence[ProfilePoint], places: Sequence[Place], kernels: Sequence[KernelWork], sms: int
) -> Array:
    """How far the predictors disagree at each place: largest / smallest - 1. Shape (places,)."""
    p = np.array([point.gpu_percent for point in points], np.float64)
    b = np.array([point.batch_size for point in points], np.float64)
    ms = np.array([point.latency_ms_p50 for point in points], np.float64)
    at_p, at_b = (np.array(column, np.float64) for column in zip(*places, strict=True))
    posynomial = fit_posynomial(p, b, ms)(at_p, at_b)
    predictions = [posynomial, _interpolated(p, b, ms, at_p, at_b, posynomial)]
    if kernels and len(points) >= MIN_POINTS:
        predictions.append(fit_parallelism(kernels, sms, points).latency_ms(at_p, at_b))
    stacked = np.stack(predictions)
    return np.asarray(stacked.max(axis=0) / stacked.min(axis=0) - 1.0, np.float64)


def corun_design(
    models: Sequence[str], percents: Sequence[float] = CORUN_PERCENTS, group_size: int = 4
) -> list[tuple[tuple[str, float], ...]]:
    """Who is measured side by side at which GPU%: the interference model needs each model beside others at
    several promises, and the capacity needs the same mix at several promises (policy.interference).

    Each model beside the next at two of `percents` (that nearest to 50, and the largest), and groups of
    `group_size` at each of them; one model alone runs beside itself. Entries: ((model, gpu_percent), ...).
    """
    if not models or not percents:
        return []
    ring = list(models) if len(models) > 1 else [models[0], models[0]]
    pairs = [(ring[i], ring[(i + 1) % len(ring)]) for i in range(len(ring) if len(ring) > 2 else 1)]
    half = min(percents, key=lambda percent: abs(percent - 50.0))
    design = [
        tuple((name, p) for name in pair) for p in dict.fromkeys((half, max(percents))) for pair in pairs
    ]
    groups = [ring[i : i + group_size] for i in range(0, len(ring), group_size)]
    return design + [
        tuple((name, p) for name in group) for p in percents for group in groups if len(group) > 2
    ]


def _middle(values: Sequence[float]) -> float:
    """The inner value nearest to the geometric mean of the ends; the last value where none is inside."""
    inside = values[1:-1] or values[-1:]
    target = np.sqrt(values[0] * values[-1])
    return min(inside, key=lambda value: abs(np.log(value / target)))


def _is_inner(points: Sequence[ProfilePoint], index: int) -> bool:
    """Whether the other points still span this one's GPU% and batch size, seen from every corner."""
    here = points[index]
    others = [point for i, point in enumerate(points) if i != index]
    return all(
        any(
            (other.gpu_percent - here.gpu_percent) * to_more_percent >= 0
            and (other.batch_size - here.batch_size) * to_larger_batch >= 0
            for other in others
        )
        for to_more_percent, to_larger_batch in product((-1, 1), (-1, 1))
    )


def _interpolated(p: Array, b: Array, ms: Array, at_p: Array, at_b: Array, outside: Array) -> Array:
    """Piecewise linear interpolation in (log p, log b, log f); `outside` where the points do not reach."""
    log_points = np.stack([np.log(p), np.log(b)], axis=1)
    if np.linalg.matrix_rank(log_points - log_points[0]) < 2:
        return outside
    log_ms = LinearNDInterpolator(log_points, np.log(ms))(np.log(at_p), np.log(at_b))
    return np.where(np.isnan(log_ms), outside, np.exp(np.where(np.isnan(log_ms), 0.0, log_ms)))
