"""The rate to plan for, from what arrived lately: the mean since the last change, and room for bursts.

Arrivals are counted in steps of about a second. Two questions, both answered by measurement (decisions/0090):

- Since when? Means over a fixed window are late when rates jump and restless when they do not. Here the
  window reaches back to the last clear change: at every cut the newer steps are set against the older ones,
  and what lies before the clearest break is forgotten. "Clear" is `change_sigmas` of the noise that the
  arrivals themselves show, sqrt(D m (1/s + 1/t)) for a rate m over parts of s and t seconds.
- How bursty? D is the index of dispersion, variance over mean of the counts in steps (1: Poisson): the larger
  of single steps and of five at a time, since real bursts are longer than a second.

    rate = mean + burst_sigmas sqrt(D mean / burst_s)

which burst_s seconds seldom exceed. A trend that goes on (Holt, or a clear slope since the change) brought
nothing beyond this on the recorded trace, so there is none.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

MIN_STEPS = 3  # below this nothing is known
POOLED = 5


@dataclass(frozen=True, slots=True)
class ForecastSettings:
    """window_s: the longest look back. change_sigmas: what makes a change clear. burst_sigmas, burst_s:
    room for bursts (module docstring)."""

    window_s: float = 60.0
    change_sigmas: float = 3.0
    burst_sigmas: float = 1.5
    burst_s: float = 5.0


@dataclass(frozen=True, slots=True)
class Forecast:
    """Rates per second. rate: to plan for. dispersion: D. window_s: how far back the mean reaches. noise:
    standard error of the mean."""

    rate_per_s: float
    mean_per_s: float
    dispersion: float
    window_s: float
    noise_per_s: float


class History:
    """The newest steps of one model: how long each was and how many rows arrived in it."""

    def __init__(self, window_s: float) -> None:
        self._window_s = window_s
        self._steps: deque[tuple[float, float]] = deque()
        self._total_s = 0.0

    def add(self, seconds: float, arrived: float) -> None:
        """seconds > 0; what is older than the window goes."""
        self._steps.append((seconds, arrived))
        self._total_s += seconds
        while len(self._steps) > MIN_STEPS and self._total_s - self._steps[0][0] >= self._window_s:
            self._total_s -= self._steps.popleft()[0]

    def forecast(self, settings: ForecastSettings) -> Forecast | None:
        """None before there are MIN_STEPS steps."""
        return forecast(list(self._steps), settings)


def forecast(steps: Sequence[tuple[float, float]], settings: ForecastSettings) -> Forecast | None:
    """The forecast from (seconds, arrivals) steps, oldest first; None where there are fewer than
    MIN_STEPS."""
    if len(steps) < MIN_STEPS:
        return None
    seconds, counts = (np.asarray(column, np.float64) for column in zip(*steps, strict=True))
    first = _last_change(seconds, counts, settings.change_sigmas)
    before = _jitter(seconds, counts)  # after a change there is too little to tell how rows come
    seconds, counts = seconds[first:], counts[first:]
    span_s = float(seconds.sum())
    mean = float(counts.sum()) / span_s
    spread = max(dispersion(seconds, counts), before if counts.size <= POOLED else 1.0)
    noise = math.sqrt(max(spread * mean, 1.0 / span_s) / span_s)
    burst = settings.burst_sigmas * math.sqrt(spread * mean / settings.burst_s)
    return Forecast(mean + burst, mean, spread, span_s, noise)


def dispersion(seconds: np.ndarray, counts: np.ndarray) -> float:
    """Variance over mean of the counts, at least 1 (Poisson): of the steps, or of five at a time if more.
    A linear trend is taken out first, else it would count as bursts."""
    found = 1.0
    for pool in (1, POOLED):
        groups = counts.size // pool
        if groups < MIN_STEPS + 1:
            continue
        c = counts[counts.size - groups * pool :].reshape(groups, pool).sum(axis=1)
        s = seconds[seconds.size - groups * pool :].reshape(groups, pool).sum(axis=1)
        mean = c.sum() / s.sum()
        if mean <= 0:
            continue
        at = np.cumsum(s) - s / 2
        line = np.polyval(np.polyfit(at, c / s, 1), at) if groups > MIN_STEPS + 1 else mean
        free = groups - (2 if groups > MIN_STEPS + 1 else 1)
        found = max(found, float(((c - line * s) ** 2 / s).sum() / free / mean))
    return found


def _last_change(seconds: np.ndarray, counts: np.ndarray, sigmas: float) -> int:
    """The first step after the clearest break between older and newer steps; 0 where none is clear."""
    first = 0
    while counts.size - first >= MIN_STEPS:
        here_s, here = seconds[first:], counts[first:]
        s, c = np.cumsum(here_s), np.cumsum(here)
        old_s, old = s[1:-1], c[1:-1]  # at least two steps on the old side, one on the new
        new_s, new = s[-1] - old_s, c[-1] - old
        mean = np.maximum(np.maximum(old / old_s, new / new_s), 1.0 / s[-1])
        noise = np.sqrt(_jitter(here_s, here) * mean * (1.0 / old_s + 1.0 / new_s))
        score = np.abs(old / old_s - new / new_s) / noise
        best = int(score.argmax())
        if score[best] < sigmas:
            break
        first += best + 2
    return first


def _jitter(seconds: np.ndarray, counts: np.ndarray) -> float:
    """The index of dispersion from the differences of neighbouring steps, at least 1: hardly touched by a
    jump or a trend. The largest difference is left out: it may be the jump."""
    mean = counts.sum() / seconds.sum()
    if counts.size < MIN_STEPS + 1 or mean <= 0:
        return 1.0
    squares = np.sort(np.diff(counts / seconds) ** 2)[:-1]
    return max(1.0, float(squares.mean()) / 2 * float(seconds.mean()) / mean)
