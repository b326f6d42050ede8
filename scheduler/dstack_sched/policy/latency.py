"""The latency surface f(p, b): latency of one batch of b rows at GPU% p, model alone (DESIGN section 3).

    f(p, b) = a0 + a1 b + (a2 + a3 b) / p,   a_i >= 0, f in ms, p in percent

a0 + a1 b is the serial part (launch, synchronisation), (a2 + a3 b) / p the part that the granted SMs share.
The fit is a non-negative least squares of relative errors. Where it misses a measured point by more than
MAX_FIT_ERROR, the surface is the monotone interpolation of the measured points instead.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike
from scipy.optimize import nnls

from dstack_sched.domain.profile import LatencyFit, ModelProfile, ProfilePoint
from dstack_sched.errors import InputError
from dstack_sched.policy.monotone import Array, MonotoneGrid

MAX_FIT_ERROR = 0.05  # decisions/0020-when-to-trust-the-fit.md

Kind = Literal["posynomial", "grid"]


@dataclass(frozen=True, slots=True)
class PointError:
    """How well the surface meets one measured point: surface / measured - 1, for p50 and p99."""

    gpu_percent: float
    batch_size: int
    p50: float
    p99: float


@dataclass(frozen=True, slots=True)
class Posynomial:
    """The fitted formula. `max_batch`, `min_percent`: beyond them an axis that was measured at one value only
    is scaled in proportion (an upper bound); inf and 0 where the fit itself knows the axis."""

    a: tuple[float, float, float, float]
    max_batch: float = float("inf")
    min_percent: float = 0.0

    def __call__(self, p: ArrayLike, b: ArrayLike) -> Array:
        p, b = np.asarray(p, np.float64), np.asarray(b, np.float64)
        a0, a1, a2, a3 = self.a
        inside = a0 + a1 * b + (a2 + a3 * b) / p
        if np.isinf(self.max_batch) and self.min_percent == 0.0:
            return np.asarray(inside, np.float64)
        return np.asarray(
            inside * np.maximum(1.0, b / self.max_batch) * np.maximum(1.0, self.min_percent / p)
        )


def fit_posynomial(p: Array, b: Array, latency_ms: Array) -> Posynomial:
    """Least squares of (f(p_i, b_i) - y_i) / y_i over a >= 0. p, b, latency_ms: shape (points,).

    An axis measured at one value only gets no terms of its own: its effect cannot be told from the others.
    """
    many_b, many_p = np.unique(b).size > 1, np.unique(p).size > 1
    used = [True, many_b, many_p, many_b and many_p]
    columns = np.stack([np.ones_like(p), b, 1.0 / p, b / p], axis=1)[:, used]
    # The columns differ by orders of magnitude: scale them for the solver, and back.
    relative = columns / latency_ms[:, None]
    scale = np.linalg.norm(relative, axis=0)
    solution, _ = nnls(relative / scale, np.ones_like(latency_ms))
    a = np.zeros(4)
    a[used] = solution / scale
    return Posynomial(
        (float(a[0]), float(a[1]), float(a[2]), float(a[3])),
        max_batch=float("inf") if many_b else float(b.max()),
        min_percent=0.0 if many_p else float(p.min()),
    )


def fit_profile(points: Sequence[ProfilePoint]) -> LatencyFit:
    """The fit of the median latencies with its largest relative error, as profiles.json holds it."""
    p, b, p50, _ = _columns("profile", points)
    shape = fit_posynomial(p, b, p50)
    return LatencyFit(*shape.a, max_relative_error=float(np.abs(shape(p, b) / p50 - 1).max()))


class LatencySurface:
    """f(p, b) of one model, for p50 and p99. Immutable; calls take scalars or arrays and broadcast.

    kind: "posynomial" or "grid" (of the p50 surface). a: coefficients a0..a3 of the posynomial, also when the
    grid is used (it then guides only cells that were not measured). percents, batches: the measured values,
    ascending. fit_error: largest relative miss of a p50 point by the posynomial. errors: one entry a measured
    point, for the surface in use. repaired: largest relative change that monotonicity forced on a p50 point
    of the grid (0 when none). unknown: what the measured points cannot tell, one line each.
    Outside the measured range a grid answers with upper bounds (monotone.py); planners stay inside
    min_percent..100 and 1..max_batch.
    """

    def __init__(
        self,
        name: str,
        points: Sequence[ProfilePoint],
        fit: LatencyFit | None = None,
        levels: Sequence[float] = (),
    ) -> None:
        """Errors: InputError when a point is not finite and positive, given twice, or none is there."""
        self.name = name
        self.levels = tuple(levels)
        p, b, p50, p99 = _columns(name, points)
        self.percents = tuple(float(x) for x in np.unique(p))
        self.batches = tuple(int(x) for x in np.unique(b))
        shape, self.fit_error = _given_or_fitted(fit, p, b, p50)
        self.a = shape.a
        self.kind: Kind = "posynomial" if self.fit_error <= MAX_FIT_ERROR else "grid"
        self.repaired = 0.0
        self._p50: Posynomial | MonotoneGrid = shape
        if self.kind == "grid":
            grid = MonotoneGrid(p, b, p50, shape)
            self.repaired = float(np.abs(grid.repaired_ms / p50 - 1).max())
            self._p50 = grid
        self._measured = p, b, p50, p99
        self.unknown = self._unknown(p, b)

    @classmethod
    def from_profile(cls, profile: ModelProfile) -> LatencySurface:
        """The surface of a stored profile; a fit that the profile states is used, its error is recomputed."""
        return cls(profile.name, profile.points, profile.fit, profile.levels)

    @property
    def min_percent(self) -> float:
        """Smallest measured GPU%: planners do not go below it."""
        return self.percents[0]

    @property
    def max_batch(self) -> int:
        """Largest measured batch size: planners do not go beyond it."""
        return self.batches[-1]

    @property
    def max_relative_error(self) -> float:
        """Largest miss of a measured p50 point by the surface in use."""
        p, b, p50, _ = self._measured
        return float(np.abs(self.latency_ms(p, b) / p50 - 1).max())

    @cached_property
    def errors(self) -> tuple[PointError, ...]:
        """How well the surface in use meets each measured point."""
        p, b, p50, p99 = self._measured
        error_p50, error_p99 = self.latency_ms(p, b) / p50 - 1, self.p99_ms(p, b) / p99 - 1
        return tuple(
            PointError(float(p[i]), int(b[i]), float(error_p50[i]), float(error_p99[i]))
            for i in range(p.size)
        )

    @cached_property
    def _p99(self) -> Posynomial | MonotoneGrid:
        """Made when first asked for: the profiler makes hundreds of surfaces and needs the medians only."""
        p, b, _, p99 = self._measured
        shape = fit_posynomial(p, b, p99)
        error = float(np.abs(shape(p, b) / p99 - 1).max())
        return shape if error <= MAX_FIT_ERROR else MonotoneGrid(p, b, p99, shape)

    def latency_ms(self, p: ArrayLike, b: ArrayLike) -> Array:
        """Median latency of one batch in ms at GPU% p, batch size b; the broadcast shape of both."""
        return self._p50(p, b)

    def p99_ms(self, p: ArrayLike, b: ArrayLike) -> Array:
        """99th percentile in ms, never below the median; the broadcast shape of p and b."""
        return np.maximum(self._p99(p, b), self._p50(p, b))

    def table(self, percents: Sequence[float], batches: Sequence[int]) -> tuple[tuple[float, ...], ...]:
        """latency_ms as rows [i][j] at percents[i], batches[j]: the form EngineModel takes."""
        grid = self.latency_ms(
            np.asarray(percents, np.float64)[:, None], np.asarray(batches, np.float64)[None, :]
        )
        return tuple(tuple(float(x) for x in row) for row in grid)

    def _unknown(self, p: Array, b: Array) -> tuple[str, ...]:
        lines = []
        if len(self.batches) == 1 and self.batches[0] > 1:
            only = self.batches[0]
            lines.append(
                f"{self.name}: measured at batch size {only} only: a smaller one is taken to be as slow"
            )
        if len(self.percents) == 1:
            lines.append(
                f"{self.name}: measured at {self.percents[0]:g}% only: no smaller share can be planned"
            )
        wanted = (1 + (len(self.batches) > 1)) * (1 + (len(self.percents) > 1))
        columns = np.stack([np.ones_like(p), b, 1.0 / p, b / p], axis=1)
        if wanted == 4 and np.linalg.matrix_rank(columns / np.linalg.norm(columns, axis=0)) < wanted:
            lines.append(f"{self.name}: too few points to tell how GPU% and batch size act together")
        return tuple(lines)


def _given_or_fitted(
    fit: LatencyFit | None, p: Array, b: Array, latency_ms: Array
) -> tuple[Posynomial, float]:
    """The shape and its largest relative error. A stated fit that misses the points is no use as a shape."""
    fitted = fit_posynomial(p, b, latency_ms)
    if fit is None:
        return fitted, float(np.abs(fitted(p, b) / latency_ms - 1).max())
    given = Posynomial((fit.a0, fit.a1, fit.a2, fit.a3))
    error = max(fit.max_relative_error, float(np.abs(given(p, b) / latency_ms - 1).max()))
    return (given if error <= MAX_FIT_ERROR else fitted), error


def _columns(name: str, points: Sequence[ProfilePoint]) -> tuple[Array, Array, Array, Array]:
    """The points as p, b, p50, p99 columns, checked. Errors: InputError."""
    if not points:
        raise InputError(f"{name}: the profile has no points; run dstackctl profile")
    rows = np.array(
        [(x.gpu_percent, x.batch_size, x.latency_ms_p50, x.latency_ms_p99) for x in points], dtype=np.float64
    )
    if not np.isfinite(rows).all() or (rows <= 0).any():
        raise InputError(
            f"{name}: a profile point has a value that is not finite and positive; profile it again"
        )
    if np.unique(rows[:, :2], axis=0).shape[0] < rows.shape[0]:
        raise InputError(f"{name}: the profile has two points at one GPU% and batch size; keep one")
    return rows[:, 0], rows[:, 1], rows[:, 2], rows[:, 3]
