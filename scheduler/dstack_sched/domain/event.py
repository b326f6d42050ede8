"""What the engine is told. All times are CLOCK_MONOTONIC microseconds of the host (or of the simulation).

An `instance` is one running copy of a model (one Triton model instance, one stub process), named uniquely.
`waiting` counts rows (batch items), not requests: a request of batch 4 is 4 rows.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

from dstack_sched.domain.workload import OnLate


@dataclass(frozen=True, slots=True)
class BackendJoined:
    """An instance is ready to run. `levels`: GPU percentages it can take from one batch to the next;
    a single value means it can run at that share only. `slo_us` 0 marks a best-effort model.

    running_percent, running_until_us: a batch it runs right now without a grant (it joins again after the
    arbiter was away) and when that should end; its share counts as granted, under grant id 0, until
    BatchFinished(grant_id=0) or, at the latest, a lease from that end. 0 and 0 when idle.

    sm_groups: how many groups of SMs its device is split into, which a grant can name. 0: none."""

    instance: str
    model: str
    gpu_percent: float
    levels: tuple[float, ...]
    max_batch_size: int
    batch_size: int
    slo_us: int
    on_late: OnLate
    running_percent: float = 0.0
    running_until_us: int = 0
    sm_groups: int = 0


@dataclass(frozen=True, slots=True)
class BackendLeft:
    """The instance unloaded, died, or its connection broke. Its grants end now."""

    instance: str


@dataclass(frozen=True, slots=True)
class WorkQueued:
    """The state of an instance's queue, absolute, not a delta: repeating it is harmless.

    earliest_deadline_us is that of the most urgent waiting row; 0 when waiting is 0.
    """

    instance: str
    waiting: int
    earliest_deadline_us: int


@dataclass(frozen=True, slots=True)
class BatchStarted:
    """A standing grant is in use from now on, for `rows` rows. waiting and earliest_deadline_us are the queue
    beside them, as in WorkQueued."""

    instance: str
    grant_id: int
    rows: int
    waiting: int
    earliest_deadline_us: int


@dataclass(frozen=True, slots=True)
class BatchFinished:
    """A granted batch ended (rows 0: the grant was not used). run_us: its time on the device. late: how
    many of its rows ended past their deadline.

    Carries the queue's state after it, so that one message both ends a grant and asks for the next.
    """

    instance: str
    grant_id: int
    rows: int
    run_us: int
    waiting: int
    earliest_deadline_us: int
    late: int = 0


@dataclass(frozen=True, slots=True)
class EngineModel:
    """What the engine knows of a model: its plan and its latency surface as a table.

    latency_ms[i][j] is f at gpu_percents[i], batch_sizes[j] (both ascending); it may be empty when no
    profile exists, then the engine learns from run times. `weight` is the fairness weight.
    interference: f' = f (1 + 100 k (q/100)^g) while co-runners hold q percent in all; k is
    interference_per_percent, g the exponent; with g = 1 this is f (1 + k q).
    """

    name: str
    gpu_percent: float
    batch_size: int
    slo_us: int
    weight: float
    on_late: OnLate
    knee_percent: float
    gpu_percents: tuple[float, ...] = ()
    batch_sizes: tuple[int, ...] = ()
    latency_ms: tuple[tuple[float, ...], ...] = ()
    interference_per_percent: float = 0.0
    interference_exponent: float = 1.0


@dataclass(frozen=True, slots=True)
class PlanChanged:
    """New plan for this GPU; takes effect at the next grant. capacity_percent is 100 x oversubscription."""

    capacity_percent: float
    models: tuple[EngineModel, ...]


@dataclass(frozen=True, slots=True)
class TimerFired:
    """The time asked for by the last SetTimer has come."""


Event: TypeAlias = (
    BackendJoined | BackendLeft | WorkQueued | BatchStarted | BatchFinished | PlanChanged | TimerFired
)
