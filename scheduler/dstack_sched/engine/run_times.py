"""How long a batch runs: the profile's table turned into lists, corrected or learned from what was seen.

All times are microseconds of a batch that has the GPU to itself; the caller applies the slowdown by
co-runners. Lists of ints, one a level, indexed by batch size: a decision costs a look-up or a bisection.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import deque
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from dstack_sched.domain.event import EngineModel

LEARN_RATE = 0.1  # weight of one observation in the moving averages
MIN_SCALE, MAX_SCALE = 0.2, 10.0
GUESS_US = 10_000  # before anything is known, and no objective says otherwise
SEEN_CELLS, SEEN_RUNS = 32, 64  # what is kept of what was seen: cells an instance, newest runs a cell


class Beside(NamedTuple):
    """The newest `runs` as they were, beside their co-runners. run_us: their median. crowd: mean of the runs'
    mean (q / 100)^g, of co-runners that held q of GPU% (policy/interference.py); spread: its variance; slope,
    scatter: covariance with it, and variance, of the run time over its mean."""

    runs: int
    run_us: float
    crowd: float
    spread: float
    slope: float
    scatter: float


class Seen(NamedTuple):
    """Runs of one batch size at one share: `runs` so far; median and 99th percentile of the newest, in us,
    the slowdown by co-runners taken out as the plan predicts it; beside: with it."""

    gpu_percent: float
    rows: int
    runs: int
    p50_us: float
    p99_us: float
    beside: Beside | None = None


class _Affine:
    """Exponentially weighted least squares of run time = alpha + beta b at one level; alpha, beta >= 0."""

    __slots__ = ("n", "sb", "sbb", "sby", "seen", "sy")

    def __init__(self) -> None:
        self.n = self.sb = self.sbb = self.sy = self.sby = 0.0
        self.seen = 0

    def add(self, rows: int, run_us: float) -> None:
        keep = 1.0 - LEARN_RATE / 2
        self.n = self.n * keep + 1.0
        self.sb = self.sb * keep + rows
        self.sbb = self.sbb * keep + rows * rows
        self.sy = self.sy * keep + run_us
        self.sby = self.sby * keep + rows * run_us
        self.seen += 1

    def line(self) -> tuple[float, float]:
        spread = self.n * self.sbb - self.sb * self.sb
        mean_b, mean_y = self.sb / self.n, self.sy / self.n
        if spread < 1e-6 * self.n * self.sbb:  # one batch size seen: half of it taken as fixed cost
            return mean_y / 2, mean_y / 2 / mean_b
        beta = min(max((self.n * self.sby - self.sb * self.sy) / spread, 0.0), mean_y / mean_b)
        return mean_y - beta * mean_b, beta


class RunTimes:
    """Run times of one instance. `us[level][b]`, b = 0..max_batch (b = 0 reads as 1), never decreasing in b.

    levels: GPU percentages, ascending. `scale` multiplies the table: the moving average of seen / predicted.
    `spread` is the moving average of |seen / predicted - scale|, a measure of jitter.
    """

    __slots__ = ("_counts", "_learned", "_runs", "known", "levels", "max_batch", "scale", "spread", "us")

    def __init__(self, levels: Sequence[float], max_batch: int, model: EngineModel) -> None:
        self.levels = tuple(levels)
        self.max_batch = max_batch
        self.scale = 1.0
        self.spread = 0.05
        self.known = bool(model.latency_ms)
        self._runs: dict[tuple[float, int], deque[tuple[float, float, float]]] = {}
        self._counts: dict[tuple[float, int], int] = {}
        self._learned: list[_Affine] = [_Affine() for _ in self.levels]
        self.us: list[list[int]] = _table(model, self.levels, max_batch) if self.known else []
        if not self.known:
            guess = model.slo_us // 4 if model.slo_us else GUESS_US
            self.us = [[max(1, guess)] * (max_batch + 1) for _ in self.levels]

    def largest_batch(self, level: int, budget_us: float) -> int:
        """Largest b whose scaled run time fits the budget; 0 when not even one row does."""
        row = self.us[level]
        return min(bisect_right(row, budget_us / self.scale, 1) - 1, self.max_batch)

    def observe(
        self, level: int, rows: int, run_us: float, whole_us: float = 0.0, crowd: float = 0.0
    ) -> None:
        """A batch of `rows` took run_us, with the slowdown by co-runners already taken out; whole_us with it,
        0: the same. crowd: see Beside."""
        rows = min(rows, self.max_batch)
        if rows < 1 or run_us <= 0:
            return
        self._note((self.levels[level], rows), (run_us, whole_us or run_us, crowd))
        if self.known:
            ratio = run_us / self.us[level][rows]
            self.spread += LEARN_RATE * (min(abs(ratio - self.scale), 2.0) - self.spread)
            scale = self.scale + LEARN_RATE * (ratio - self.scale)
            self.scale = min(max(scale, MIN_SCALE), MAX_SCALE)
            return
        line = self._learned[level]
        line.add(rows, run_us)
        if line.seen <= 8 or line.seen % 16 == 0:
            self._rebuild(level)

    def _note(self, cell: tuple[float, int], run: tuple[float, float, float]) -> None:
        """Keep the run; a cell too many takes the place of the oldest."""
        runs = self._runs.get(cell)
        if runs is None:
            if len(self._runs) >= SEEN_CELLS:
                oldest = next(iter(self._runs))
                del self._runs[oldest], self._counts[oldest]
            runs = self._runs[cell] = deque(maxlen=SEEN_RUNS)
            self._counts[cell] = 0
        runs.append(run)
        self._counts[cell] += 1

    def seen(self) -> tuple[Seen, ...]:
        """What was observed, by share and batch size; for people and for whoever refits the profile."""
        rows = []
        for (percent, size), runs in self._runs.items():
            alone_us, whole_us, crowd = np.array(runs).T
            p50, p99 = np.percentile(alone_us, (50, 99))
            covariance = np.cov(crowd, whole_us / whole_us.mean(), ddof=0)
            (spread, slope), (_, scatter) = covariance.tolist()
            beside = Beside(
                len(runs), float(np.median(whole_us)), float(crowd.mean()), spread, slope, scatter
            )
            rows.append(Seen(percent, size, self._counts[percent, size], float(p50), float(p99), beside))
        return tuple(rows)

    def go_on_from(self, old: RunTimes) -> None:
        """Keep what another one (of the plan before) has seen, and its predictions where the tables differ by
        a factor only: a plan is no reason to learn the machine's speed anew."""
        self._runs, self._counts = old._runs, old._counts
        if self.known and old.known and len(self.us[-1]) == len(old.us[-1]):
            scale = old.scale * sum(old.us[-1]) / sum(self.us[-1])
            self.scale = min(max(scale, MIN_SCALE), MAX_SCALE)
            self.spread = old.spread

    def _rebuild(self, level: int) -> None:
        """Redraw the learned level, and those never seen from it: time grows as 1/p below, stays above."""
        alpha, beta = self._learned[level].line()
        row = [max(1, int(alpha + beta * max(b, 1))) for b in range(self.max_batch + 1)]
        for other, percent in enumerate(self.levels):
            if other == level:
                self.us[other] = row
            elif not self._learned[other].seen:
                factor = max(1.0, self.levels[level] / percent)
                self.us[other] = [int(us * factor) for us in row]


def _table(model: EngineModel, levels: Sequence[float], max_batch: int) -> list[list[int]]:
    """The profile's table at these levels and every batch size: linear in 1/p and in b between its points,
    in proportion beyond them (upper bounds: f grows no faster than b and 1/p)."""
    inverse = 1.0 / np.asarray(model.gpu_percents, np.float64)[::-1]
    sizes = np.asarray(model.batch_sizes, np.float64)
    latency_us = np.asarray(model.latency_ms, np.float64)[::-1] * 1000.0
    batches = np.arange(max_batch + 1, dtype=np.float64)
    batches[0] = 1.0
    stretch = np.maximum(batches / sizes[-1], 1.0)
    rows = []
    for percent in levels:
        x = 1.0 / percent
        at_percent = np.array([np.interp(x, inverse, column) for column in latency_us.T])
        at_percent *= max(x / inverse[-1], 1.0)
        row = np.interp(batches, sizes, at_percent) * stretch
        rows.append([max(1, int(us)) for us in np.maximum.accumulate(row)])
    return rows
