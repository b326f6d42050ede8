"""What the users of the models want: rates and latency objectives."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum


class OnLate(str, Enum):
    """What to do with a request that can no longer meet its SLO."""

    SERVE = "serve"
    REJECT = "reject"


@dataclass(frozen=True, slots=True)
class ModelDemand:
    """One model's demand. `slo_ms` None marks a best-effort model, which fills what is left."""

    name: str
    slo_ms: float | None
    rate_per_s: float
    weight: float = 1.0
    on_late: OnLate = OnLate.SERVE


@dataclass(frozen=True, slots=True)
class Workload:
    """The content of a workload.yaml. `attainment`: wanted share of requests within their SLO."""

    models: tuple[ModelDemand, ...]
    attainment: float = 0.99
