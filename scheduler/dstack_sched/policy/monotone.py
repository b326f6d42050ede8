"""A latency table on measured points only: repaired to be monotone, filled, and interpolated.

Latency falls (or stays) as GPU% p grows and grows (or stays) with batch size b. Measurements break that by
noise; the repair is the nearest monotone table in log space, and how far it moved each point is reported.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.interpolate import LinearNDInterpolator
from scipy.optimize import nnls

Array = NDArray[np.float64]
# Algorithms change with the batch size more than with the SMs: points of the same batch count as nearer.
STRETCH = 4.0
Shape = Callable[[ArrayLike, ArrayLike], Array]


def isotonic_repair(p: Array, b: Array, latency_ms: Array) -> Array:
    """The monotone latencies nearest to the measured ones, in log space by least squares, at the same points.

    p (percent), b (rows), latency_ms: shape (points,), any scatter of distinct points. Point i must be no
    slower than point j where p_i >= p_j and b_i <= b_j. The nearest point of that cone is y + A'u, u >= 0 the
    non-negative least-squares solution of A'u = -y (Moreau's decomposition), A one row a constraint.
    """
    order = _faster_than(p, b)
    log_ms = np.log(latency_ms)
    if not (order & (log_ms[:, None] > log_ms[None, :])).any():
        return latency_ms.astype(np.float64)
    direct = order & ~(order.astype(np.int64) @ order.astype(np.int64) > 0)
    fast, slow = np.nonzero(direct)
    constraints = np.zeros((fast.size, log_ms.size))
    rows = np.arange(fast.size)
    constraints[rows, slow] = 1.0
    constraints[rows, fast] = -1.0
    push, _ = nnls(constraints.T, -log_ms, maxiter=max(100, 30 * fast.size))
    return np.exp(log_ms + constraints.T @ push)


def _faster_than(p: Array, b: Array) -> NDArray[np.bool_]:
    """[i, j] is True where point i cannot be slower than point j (and i is not j)."""
    order = (p[:, None] >= p[None, :]) & (b[:, None] <= b[None, :])
    np.fill_diagonal(order, False)
    return order


class MonotoneGrid:
    """Monotone interpolation of measured latencies: bilinear in (log p, log b, log f).

    Cells of the grid (measured percents x measured batches) that were not measured take `guide` times what
    the measured points around them are off from it (interpolated in log space), clipped between the slowest
    measured point that must be faster and the fastest that must be slower; so the table is monotone and
    passes through every (repaired) point. A chord in log-log space lies above a posynomial: the
    interpolation errs to the slow side. Outside the grid every answer is an upper bound for a posynomial: f
    grows at most as 1/p towards smaller p and as b towards larger b, and is held flat the other way.
    """

    def __init__(self, p: Array, b: Array, latency_ms: Array, guide: Shape) -> None:
        self.repaired_ms = isotonic_repair(p, b, latency_ms)
        self.percents = np.unique(p)
        self.batches = np.unique(b)
        grid_p, grid_b = np.meshgrid(self.percents, self.batches, indexing="ij")
        faster = (p >= grid_p[..., None]) & (b <= grid_b[..., None])
        slower = (p <= grid_p[..., None]) & (b >= grid_b[..., None])
        low = np.where(faster, self.repaired_ms, 0.0).max(axis=-1)
        high = np.where(slower, self.repaired_ms, np.inf).min(axis=-1)
        filled = guide(grid_p, grid_b)
        if p.size < grid_p.size:
            filled = filled * _correction(p, b, self.repaired_ms / guide(p, b), grid_p, grid_b)
            # The correction is not monotone: take the least monotone table that is nowhere faster.
            filled = np.maximum.accumulate(np.maximum.accumulate(filled, axis=1)[::-1], axis=0)[::-1]
        # Repaired neighbours may differ by rounding: the order of the two clips keeps the table monotone.
        self.table_ms = np.maximum(np.minimum(filled, high), low)
        self._log_p, self._log_b = np.log(self.percents), np.log(self.batches)
        self._log_ms = np.log(self.table_ms)

    def __call__(self, p: ArrayLike, b: ArrayLike) -> Array:
        """Latency in ms at GPU% p and batch size b, broadcast together."""
        p, b = np.broadcast_arrays(np.asarray(p, np.float64), np.asarray(b, np.float64))
        row, row_weight = _locate(self._log_p, np.log(np.maximum(p, self.percents[0])))
        column, column_weight = _locate(self._log_b, np.log(np.clip(b, self.batches[0], self.batches[-1])))
        next_row = np.minimum(row + 1, self.percents.size - 1)
        next_column = np.minimum(column + 1, self.batches.size - 1)
        t = self._log_ms
        near = t[row, column] * (1 - column_weight) + t[row, next_column] * column_weight
        far = t[next_row, column] * (1 - column_weight) + t[next_row, next_column] * column_weight
        inside = np.exp(near * (1 - row_weight) + far * row_weight)
        beyond = np.maximum(1.0, self.percents[0] / p) * np.maximum(1.0, b / self.batches[-1])
        return np.asarray(inside * beyond, np.float64)


def _correction(p: Array, b: Array, ratio: Array, at_p: Array, at_b: Array) -> Array:
    """`ratio`, known at (p, b), interpolated linearly in log space; 1 where the points do not reach."""
    places = np.stack([np.log(p), STRETCH * np.log(b)], axis=1)
    if np.linalg.matrix_rank(places - places[0]) < 2:
        return np.ones_like(at_p)
    log_ratio = LinearNDInterpolator(places, np.log(ratio), fill_value=0.0)(
        np.log(at_p), STRETCH * np.log(at_b)
    )
    return np.asarray(np.exp(log_ratio), np.float64)


def _locate(knots: Array, x: Array) -> tuple[NDArray[np.intp], Array]:
    """The cell of each x between ascending knots and its place in it, 0..1; x is held inside the knots."""
    if knots.size == 1:
        return np.zeros(x.shape, np.intp), np.zeros(x.shape)
    cell = np.clip(np.searchsorted(knots, x, side="right") - 1, 0, knots.size - 2)
    weight = (x - knots[cell]) / (knots[cell + 1] - knots[cell])
    return cell, np.clip(weight, 0.0, 1.0)
