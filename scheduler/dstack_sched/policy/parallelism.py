"""The parallelism model: latency from the graph's kernels, the SMs and a few fitted constants (DESIGN 3).

Kernel i, at batch size b, offers n_i(b) thread blocks of t_i milliseconds each and moves d_i(b) bytes. On s
SMs it takes

    max(ceil(n_i(b) / s) t_i, d_i(b) / B(s)) + t_launch,   B(s) = min(s B_sm, B_max)

and the model takes the sum of its kernels, plus d_host(b) / B_host for what the host copies in and out,
which no SM speeds up, plus a constant t_call. A block is a tile x tile
piece of a matrix product, over at most SPLIT_DEPTH of its depth (libraries split a long sum where there are
few tiles), or ELEMENTS_PER_BLOCK elements of anything else. A small batch offers fewer blocks than there
are SMs and leaves the rest idle: that is the knee.

Constants fitted to measured points: the time of a product and of an element on one SM, B_sm, B_max, B_host,
t_launch and t_call, and one of TILES. They start at a common GPU's and are held there weakly (RIDGE), so that
a handful of points is enough.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.optimize import least_squares

from dstack_sched.domain.kernels import HOST_COPY, KernelWork
from dstack_sched.domain.profile import ProfilePoint
from dstack_sched.errors import InputError

Array = NDArray[np.float64]

TILES = (16, 64, 128)
SPLIT_DEPTH = 256
ELEMENTS_PER_BLOCK = 4096
SMALL_DEPTH = 16  # fewer products than this an output (depthwise convolution) run as elementwise work
RIDGE = 0.02  # weight of one e-fold away from the start, against relative errors of the points
# ms for 1e9 products on one SM, ms for 1e9 elements on one SM, ms for 1 GB through one SM, ms for 1 GB
# through the whole device, ms a launch, ms a call, ms for 1 GB from or to the host. Roughly an H100's.
START = np.array([2.0, 50.0, 20.0, 0.5, 0.005, 0.05, 100.0])
# The sum of maxima has local optima: start with compute, memory or launches taking the larger part.
STARTS = START * np.array(
    [[1, 1, 1, 1, 1, 1, 1], [0.3, 0.3, 3, 3, 1, 1, 1], [0.3, 0.3, 0.3, 0.3, 4, 4, 1]], np.float64
)
MIN_POINTS = 3


@dataclass(frozen=True, slots=True)
class ParallelismModel:
    """Fitted to one model on one device. constants: as START; max_relative_error: over the fitted points."""

    kernels: tuple[KernelWork, ...]
    sms: int
    tile: int
    constants: tuple[float, ...]
    max_relative_error: float

    def latency_ms(self, p: ArrayLike, b: ArrayLike) -> Array:
        """Latency of one batch in ms at GPU% p, batch size b; the broadcast shape of both."""
        p, b = np.broadcast_arrays(np.asarray(p, np.float64), np.asarray(b, np.float64))
        work = _Work.of(self.kernels, self.sms, self.tile, p.ravel(), b.ravel())
        return work.latency_ms(np.asarray(self.constants)).reshape(p.shape)


@dataclass(frozen=True, slots=True)
class _Work:
    """The kernels at some points, constants apart. Arrays of shape (points, kernels); sms (points, 1).

    product_waves, element_waves: units of 1e9 products or elements that the busiest SM does one after the
    other; gigabytes: traffic of the kernel; host_gigabytes, shape (points,): copied from and to the host.
    """

    product_waves: Array
    element_waves: Array
    gigabytes: Array
    sms: Array
    host_gigabytes: Array

    @classmethod
    def of(cls, kernels: Sequence[KernelWork], sms: int, tile: int, p: Array, b: Array) -> _Work:
        def column(name: str) -> Array:
            return np.array([getattr(kernel, name) for kernel in kernels], np.float64)[None, :]

        copies = [kernel for kernel in kernels if kernel.op == HOST_COPY]
        kernels = [kernel for kernel in kernels if kernel.op != HOST_COPY]
        batch = b[:, None]
        share = np.maximum(1.0, np.round(sms * p / 100.0))[:, None]
        rows = column("rows_fixed") + column("rows_per_row") * batch
        groups = column("groups_fixed") + column("groups_per_row") * batch
        columns, depth = column("columns"), column("depth")
        is_product = (depth >= SMALL_DEPTH) & (columns > 1)
        splits = np.maximum(1.0, np.round(depth / SPLIT_DEPTH))
        blocks = np.ceil(rows / tile) * np.ceil(columns / tile) * groups * splits
        product_waves = np.ceil(blocks / share) * tile * tile * depth / splits / 1e9
        elements = rows * columns * groups * np.maximum(depth, 1.0)
        per_block = ELEMENTS_PER_BLOCK * np.maximum(depth, 1.0)
        element_waves = np.ceil(elements / per_block / share) * per_block / 1e9
        return cls(
            np.where(is_product, product_waves, 0.0),
            np.where(is_product, 0.0, element_waves),
            (column("bytes_fixed") + column("bytes_per_row") * batch) / 1e9,
            share,
            sum((k.bytes_fixed + k.bytes_per_row * b for k in copies), np.zeros_like(b)) / 1e9,
        )

    def latency_ms(self, constants: Array) -> Array:
        """Shape (points,)."""
        per_product, per_element, gb_sm, gb_device, launch, call, gb_host = constants
        compute = self.product_waves * per_product + self.element_waves * per_element
        memory = self.gigabytes * np.maximum(gb_sm / self.sms, gb_device)
        on_device = (np.maximum(compute, memory) + launch).sum(axis=1)
        return np.asarray(on_device + self.host_gigabytes * gb_host + call, np.float64)


def fit_parallelism(
    kernels: Sequence[KernelWork], sms: int, points: Sequence[ProfilePoint]
) -> ParallelismModel:
    """Fit the constants to measured medians by least squares of relative errors, weakly held at START.

    Errors: InputError with fewer than MIN_POINTS points or without kernels.
    """
    if len(points) < MIN_POINTS or not kernels:
        raise InputError(
            f"the parallelism model needs a graph and {MIN_POINTS} measured points, there are {len(points)}"
        )
    p = np.array([point.gpu_percent for point in points], np.float64)
    b = np.array([point.batch_size for point in points], np.float64)
    measured_ms = np.array([point.latency_ms_p50 for point in points], np.float64)
    best: tuple[float, ParallelismModel] | None = None
    for tile, begin in product(TILES, STARTS):
        work = _Work.of(kernels, sms, tile, p, b)
        start = np.log(begin * np.exp(np.median(np.log(measured_ms / work.latency_ms(begin)))))

        def residuals(x: Array, work: _Work = work, start: Array = start) -> Array:
            return np.concatenate([work.latency_ms(np.exp(x)) / measured_ms - 1.0, RIDGE * (x - start)])

        found = least_squares(residuals, start, max_nfev=200)
        constants = np.exp(found.x)
        error = float(np.abs(work.latency_ms(constants) / measured_ms - 1.0).max())
        model = ParallelismModel(tuple(kernels), sms, tile, tuple(float(c) for c in constants), error)
        if best is None or found.cost < best[0]:
            best = float(found.cost), model
    assert best is not None
    return best[1]


def held_out_errors(
    kernels: Sequence[KernelWork], sms: int, points: Sequence[ProfilePoint]
) -> tuple[float, ...]:
    """Relative error at each point, in their order, of the model fitted to all the others."""
    errors = []
    for i, point in enumerate(points):
        model = fit_parallelism(kernels, sms, [*points[:i], *points[i + 1 :]])
        predicted = float(model.latency_ms(point.gpu_percent, point.batch_size))
        errors.append(predicted / point.latency_ms_p50 - 1.0)
    return tuple(errors)
