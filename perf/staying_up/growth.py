"""Whether something grows: a straight line through what the processes of a role held over time.

For each quantity y of a role: y = a_process + b t + c dead, by least squares over all samples past the
warm-up of their process. Each process has a level a of its own, so that a restart is no growth; t is time,
`dead` the number of models that a Triton still holds whose stub was killed (Triton 2.51 never frees such a
model once a request met it: decisions/0100). b is the growth that is left: ours, and what matters.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from staying_up.processes import QUANTITIES, Sample

MIN_SAMPLES = 8


@dataclass(frozen=True)
class Growth:
    """level: median. per_hour: b, with its standard error. per_dead_stub: c, None where there was none.
    over_run: b times the length of the run."""

    level: float
    per_hour: float
    per_hour_error: float
    per_dead_stub: float | None
    over_run: float


def growths(samples: Sequence[Sample], role: str, warm_up_s: float, run_s: float) -> dict[str, Growth]:
    """Quantity -> growth of one role; empty where its processes never lived long enough."""
    kept = [each for each in samples if each.role == role and each.age_s >= warm_up_s]
    by_process = {each.pid: [other for other in kept if other.pid == each.pid] for each in kept}
    kept = [each for group in by_process.values() if len(group) >= MIN_SAMPLES for each in group]
    return {name: growth(kept, name, run_s) for name in QUANTITIES} if kept else {}


def growth(samples: Sequence[Sample], quantity: str, run_s: float) -> Growth:
    """See the module's docstring. Samples of at least one process, MIN_SAMPLES of each."""
    y = np.array([getattr(each, quantity) for each in samples], float)
    hours = np.array([each.at_s for each in samples]) / 3600
    dead = np.array([each.dead_stubs for each in samples], float)
    pids = sorted({each.pid for each in samples})
    levels = np.array([[each.pid == pid for pid in pids] for each in samples], float)
    # Within each process: a constant number of dead stubs says nothing of what one costs.
    varies = any(len({e.dead_stubs for e in samples if e.pid == pid}) > 1 for pid in pids)
    columns = [levels, hours[:, None], *([dead[:, None]] if varies else [])]
    design = np.hstack(columns)
    found, _, rank, _ = np.linalg.lstsq(design, y, rcond=None)
    left = y - design @ found
    freedom = max(1, len(y) - int(rank))
    covariance = np.linalg.pinv(design.T @ design) * float(left @ left) / freedom
    slope = len(pids)
    return Growth(
        level=float(np.median(y)),
        per_hour=float(found[slope]),
        per_hour_error=float(np.sqrt(max(0.0, covariance[slope, slope]))),
        per_dead_stub=float(found[slope + 1]) if varies else None,
        over_run=float(found[slope]) * run_s / 3600,
    )


def grows(growth: Growth, tolerance: float) -> bool:
    """Whether it grew over the run by more than the tolerance, clearly (two standard errors)."""
    if growth.over_run <= tolerance:
        return False
    return growth.per_hour > 2 * growth.per_hour_error
