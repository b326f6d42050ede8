"""Whether something grows: a straight line through what the processes of a role held over time.

For each quantity y of a role: y = a_group + b t, by least squares. A group is one process, for Triton further
split by the number of models that it still holds though their stub was killed (Triton 2.51 never frees such
a model once a request met it: decisions/0100). Each group has a level a of its own, so that neither a restart
nor a dead stub counts as growth; the first `warm_up_s` of each group are left out. b is the growth that is
left: ours, and what matters.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from staying_up.processes import QUANTITIES, Sample

MIN_SAMPLES = 8


@dataclass(frozen=True)
class Growth:
    """level: median. per_hour: b, with its standard error; over_run: b times the length of the run.
    per_dead_stub: mean step of the level with each further model held, None where there was none."""

    level: float
    per_hour: float
    per_hour_error: float
    over_run: float
    per_dead_stub: float | None


def growths(samples: Sequence[Sample], role: str, warm_up_s: float, run_s: float) -> dict[str, Growth]:
    """Quantity -> growth of one role; empty where no group lasted long enough."""
    groups: dict[tuple[int, int], list[Sample]] = {}
    for each in samples:
        if each.role == role:
            groups.setdefault((each.pid, each.dead_stubs), []).append(each)
    kept = {}
    for (pid, dead), group in groups.items():
        since_s = group[0].at_s if dead else float("-inf")
        warm = [e for e in group if e.age_s >= warm_up_s and e.at_s - since_s >= warm_up_s]
        if len(warm) >= MIN_SAMPLES:
            kept[pid, dead] = warm
    return {name: growth(kept, name, run_s) for name in QUANTITIES} if kept else {}


def growth(groups: Mapping[tuple[int, int], Sequence[Sample]], quantity: str, run_s: float) -> Growth:
    """See the module's docstring. groups: (process id, dead stubs) -> at least MIN_SAMPLES samples."""
    y = np.array([getattr(each, quantity) for group in groups.values() for each in group], float)
    hours = np.array([each.at_s for group in groups.values() for each in group]) / 3600
    levels = np.repeat(np.eye(len(groups)), [len(group) for group in groups.values()], axis=0)
    design = np.hstack([levels, hours[:, None]])
    found, _, rank, _ = np.linalg.lstsq(design, y, rcond=None)
    left = y - design @ found
    covariance = np.linalg.pinv(design.T @ design) * float(left @ left) / max(1, len(y) - int(rank))
    level_of = dict(zip(groups, found, strict=False))
    steps = [
        (level_of[pid, dead] - level_of[pid, before]) / (dead - before)
        for pid, dead in groups
        for before in [max((d for p, d in groups if p == pid and d < dead), default=None)]
        if before is not None
    ]
    return Growth(
        level=float(np.median(y)),
        per_hour=float(found[-1]),
        per_hour_error=float(np.sqrt(max(0.0, covariance[-1, -1]))),
        over_run=float(found[-1]) * run_s / 3600,
        per_dead_stub=float(np.mean(steps)) if steps else None,
    )


def grows(growth: Growth, tolerance: float) -> bool:
    """Whether it grew over the run by more than the tolerance, clearly (two standard errors)."""
    if growth.over_run <= tolerance:
        return False
    return growth.per_hour > 2 * growth.per_hour_error
