"""Which (GPU%, batch size) a model can really run at on a device."""

from __future__ import annotations

import math
from dataclasses import dataclass

from dstack_sched.domain.profile import Device
from dstack_sched.policy.latency import LatencySurface

CPU_DRIVER = "cpu"


@dataclass(frozen=True, slots=True)
class RunnableGrid:
    """Runnable GPU percentages and batch sizes, both ascending and not empty."""

    percents: tuple[float, ...]
    batches: tuple[int, ...]


def runnable_grid(
    surface: LatencySurface, device: Device, *, step_percent: int = 1, held_percent: float | None = None
) -> RunnableGrid:
    """What the model can run at, inside the measured range: never below the smallest measured GPU%, never
    above the largest measured batch size.

    CPU host: whole cores, k / cores x 100. A model with levels (shares it can change between from batch to
    batch): those. Otherwise MPS takes whole percents; `step_percent` coarsens them, 100 always included.
    held_percent: the one share there is, that of a process that keeps it.
    """
    lowest = surface.min_percent - 1e-9
    if held_percent is not None:
        percents = {held_percent}
    elif surface.levels:
        percents = {float(p) for p in surface.levels if p >= lowest}
    elif device.driver == CPU_DRIVER:
        percents = {
            100.0 * k / device.sms for k in range(1, device.sms + 1) if 100.0 * k / device.sms >= lowest
        }
    else:
        first = math.ceil(lowest / step_percent) * step_percent
        percents = {float(p) for p in range(first, 101, step_percent)}
        percents.add(float(max(1, math.ceil(lowest))))
        percents.add(100.0)
    return RunnableGrid(tuple(sorted(percents)) or (100.0,), tuple(range(1, surface.max_batch + 1)))
