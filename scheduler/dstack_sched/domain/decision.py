"""What the engine answers: decide first, act later."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias


@dataclass(frozen=True, slots=True)
class Grant:
    """Run one batch of at most `batch_size` rows at `gpu_percent`; the share returns at `lease_until_us`.

    sm_groups: the SM groups to run on, bit i for group i; 0: whichever the instance likes.
    standing: given ahead of the work, to be begun with BatchStarted when there is some."""

    instance: str
    grant_id: int
    gpu_percent: float
    batch_size: int
    lease_until_us: int
    sm_groups: int = 0
    standing: bool = False


@dataclass(frozen=True, slots=True)
class Revoke:
    """Give a standing grant back: answered by BatchFinished with rows 0, unless it has begun meanwhile."""

    instance: str
    grant_id: int


@dataclass(frozen=True, slots=True)
class Shed:
    """Reject the waiting rows whose deadline is before `deadline_before_us`: they cannot make it."""

    instance: str
    deadline_before_us: int


@dataclass(frozen=True, slots=True)
class SetTimer:
    """Send TimerFired at `at_us`. Replaces the timer set before."""

    at_us: int


@dataclass(frozen=True, slots=True)
class Overload:
    """The engine could not keep a promise to this model: reported, counted, logged."""

    model: str
    reason: str
    waited_us: int


Decision: TypeAlias = Grant | Revoke | Shed | SetTimer | Overload
