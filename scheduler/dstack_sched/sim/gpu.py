"""The simulated GPU: batches side by side slow each other down, and a batch varies as it was measured to.

Each running batch has work left, in microseconds alone; it melts at 1 / slowdown(co-runners' GPU%). When one
starts or ends, the others' speeds change from there on.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from dstack_sched.policy.interference import Interference
from dstack_sched.policy.latency import LatencySurface

_P99 = 2.3263  # 99th percentile of the standard normal distribution
_DRAWS = 4096
NEVER_US = float(1 << 62)
HOST_US = 300.0  # of a run, in which the device does not compute


@dataclass(frozen=True, slots=True)
class SpeedModel:
    """The truth of the simulated world. jitter: whether run times vary as p99/p50 of the profile says.
    sliced: without MPS the driver takes turns between the processes. Launch and copies (HOST_US of a run)
    wait for nobody; of the rest each gets its part (decisions/0126)."""

    surfaces: dict[str, LatencySurface]
    interference: Interference
    jitter: bool = True
    sliced: bool = False


class Job:
    """One batch on the GPU."""

    __slots__ = (
        "coefficient", "computing", "end_us", "left_us", "owner", "percent", "rows", "slow", "start_us",
    )  # fmt: skip

    def __init__(self, owner: int, percent: float, rows: int, work_us: float, coefficient: float) -> None:
        self.owner = owner
        self.percent = percent
        self.rows = rows
        self.left_us = work_us
        self.computing = max(0.0, 1.0 - HOST_US / work_us) if work_us else 0.0  # part of it on the device
        self.coefficient = coefficient  # slowdown caused by co-runners of 100% in all
        self.slow = 1.0
        self.start_us = 0
        self.end_us = NEVER_US


class Gpu:
    """Running batches of all instances of one GPU. Times are float microseconds of simulated time."""

    def __init__(self, speeds: SpeedModel, rng: np.random.Generator) -> None:
        self.jobs: list[Job] = []
        self.next_end_us = NEVER_US
        self.promised = 0.0
        self.max_promised = 0.0
        self.busy_percent_us = 0.0  # integral of min(promised, 100) over time
        self._speeds = speeds
        self._exponent = speeds.interference.exponent
        self._touched_us = 0.0
        self._rng = rng
        self._normals: list[float] = []
        self._alone: dict[tuple[str, float], tuple[list[float], list[float]]] = {}

    def make(self, owner: int, model: str, percent: float, rows: int, stretch: float = 1.0) -> Job:
        """A batch that is not on the GPU yet. stretch: a fault's slow-down factor; inf hangs it."""
        median_us, sigma = self._curve(model, percent)
        row = min(rows, len(median_us) - 1)
        work_us = median_us[row] * (rows / row if rows > row else 1.0) * stretch
        if self._speeds.jitter and sigma[row] > 0:
            work_us *= np.exp(sigma[row] * self._normal())
        interference = self._speeds.interference
        coefficient = interference.k.get(model, interference.default)
        return Job(owner, percent, rows, float(work_us), coefficient)

    def launch(self, job: Job, now: float) -> None:
        """Put a batch on the GPU."""
        job.start_us = int(now)
        self._advance(now)
        self.jobs.append(job)
        self.promised += job.percent
        self.max_promised = max(self.max_promised, self.promised)
        self._reschedule()

    def finish(self, job: Job, now: float) -> None:
        """Take a batch off the GPU, ended or killed; nothing to do where it was never launched."""
        if job not in self.jobs:
            return
        self._advance(now)
        self.jobs.remove(job)
        self.promised = self.promised - job.percent if self.jobs else 0.0
        self._reschedule()

    def hang(self, job: Job, now: float) -> None:
        """The batch will never end by itself."""
        self._advance(now)
        job.left_us = NEVER_US
        self._reschedule()

    def ended(self) -> Job:
        """The batch that ends at next_end_us."""
        return min(self.jobs, key=lambda job: job.end_us)

    def close(self, now: float) -> None:
        """Count the time up to the end of the simulation."""
        self._advance(now)

    def _advance(self, now: float) -> None:
        elapsed = now - self._touched_us
        if elapsed > 0:
            self.busy_percent_us += min(self.promised, 100.0) * elapsed
            for job in self.jobs:
                job.left_us -= elapsed / job.slow
            self._touched_us = now

    def _reschedule(self) -> None:
        exponent, promised, at = self._exponent, self.promised, self._touched_us
        first = NEVER_US
        sliced = self._speeds.sliced
        turns = sum(job.computing for job in self.jobs) if sliced else 0.0
        for job in self.jobs:
            beside = (promised - job.percent) / 100.0
            if sliced:
                job.slow = 1.0 + job.computing * (turns - job.computing)
            elif beside > 1e-9:
                job.slow = 1.0 + job.coefficient * (beside if exponent == 1.0 else beside**exponent)
            else:
                job.slow = 1.0
            job.end_us = at + (job.left_us if job.left_us > 0.0 else 0.0) * job.slow
            if job.end_us < first:
                first = job.end_us
        self.next_end_us = first

    def _curve(self, model: str, percent: float) -> tuple[list[float], list[float]]:
        """Median run time in us and sigma of its log-normal spread, by batch size; cached."""
        key = (model, percent)
        known = self._alone.get(key)
        if known is None:
            surface = self._speeds.surfaces[model]
            b = np.maximum(np.arange(surface.max_batch + 1), 1)
            p = max(percent, surface.min_percent)
            median = surface.latency_ms(p, b) * (p / percent)
            sigma = np.log(np.maximum(surface.p99_ms(p, b) * (p / percent) / median, 1.0)) / _P99
            known = ([float(x) for x in median * 1000.0], [float(x) for x in np.minimum(sigma, 0.5)])
            self._alone[key] = known
        return known

    def _normal(self) -> float:
        if not self._normals:
            self._normals = self._rng.standard_normal(_DRAWS).tolist()
        return self._normals.pop()
