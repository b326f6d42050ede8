"""The knee of a latency curve: the GPU% beyond which more GPU% is hardly worth it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import ArrayLike

from dstack_sched.policy.latency import LatencySurface
from dstack_sched.policy.monotone import Array

KNEE_FRACTION = 0.05
KNEE_STEP_PERCENT = 10.0


def knee_percent(
    surface: LatencySurface,
    batch_size: int,
    *,
    fraction: float = KNEE_FRACTION,
    percents: Sequence[float] = (),
) -> float:
    """Smallest GPU% p beyond which 10 more points cut the latency of a batch by less than `fraction`.

    Looked for in steps of 1% from the smallest measured GPU%; 100 when the curve never flattens. With
    `percents` (runnable values) the answer is the smallest of them that is not below the knee.
    """
    knee = knee_of_curve(
        lambda p: surface.latency_ms(p, batch_size), lowest_percent=surface.min_percent, fraction=fraction
    )
    reachable = [p for p in percents if p >= knee - 1e-9]
    return float(min(reachable)) if reachable else knee


def knee_of_curve(
    latency_ms: Callable[[ArrayLike], Array], *, lowest_percent: float, fraction: float = KNEE_FRACTION
) -> float:
    """The knee of any curve GPU% -> latency in ms (a surface at one batch size, the parallelism model)."""
    p = np.append(np.arange(lowest_percent, 100.0 - KNEE_STEP_PERCENT, 1.0), 100.0 - KNEE_STEP_PERCENT)
    p = p[p >= lowest_percent]
    if p.size == 0:
        return 100.0
    here = latency_ms(p)
    gain = 1.0 - latency_ms(p + KNEE_STEP_PERCENT) / here
    steep = np.nonzero(gain >= fraction)[0]
    if steep.size == 0:
        return float(p[0])
    last = int(steep[-1])
    return 100.0 if last == p.size - 1 else float(p[last + 1])
