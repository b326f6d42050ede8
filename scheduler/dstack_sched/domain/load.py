"""What a load generator did to one model, request by request, and what that means against its SLO."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, slots=True)
class LoadTrace:
    """One stretch of load on one model.

    sent_s: wall-clock send times, seconds, ascending. latency_ms: of the same requests. Both of shape
    (requests,). error: why the stretch ended early, None where it ran to its end. request_failed: it ended so
    because a request was answered with an error; False: the generator itself failed.
    """

    sent_s: np.ndarray
    latency_ms: np.ndarray
    error: str | None = None
    request_failed: bool = False

    @classmethod
    def cut(cls, error: str, *, request_failed: bool) -> LoadTrace:
        """A stretch of which nothing is known but why it ended."""
        return cls(np.empty(0), np.empty(0), error, request_failed)


@dataclass(frozen=True, slots=True)
class ModelResult:
    """One model in the measured window.

    requests: answered and failed. failed: answered with an error. unmeasured: answered in a stretch that an
    error cut short, so that their latencies are lost. errors: why stretches were cut short, each once.
    slo_attainment: share of all requests whose latency is known, failed ones included, that were answered
    within the SLO; None without an SLO or requests. goodput_per_s: requests answered within the SLO (all,
    without one) a second. send_lag_ms_p99: how late the generator sent against its own schedule.
    """

    slo_ms: float | None
    rate_per_s: float
    requests: int
    failed: int
    unmeasured: int
    latency_ms_p50: float | None
    latency_ms_p95: float | None
    latency_ms_p99: float | None
    slo_attainment: float | None
    goodput_per_s: float
    send_lag_ms_p99: float | None
    errors: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class BenchResult:
    """All models under load together. missed: models whose attainment is below the wanted one."""

    seconds: float
    warmup_s: float
    seed: int
    attainment: float
    models: dict[str, ModelResult]
    missed: tuple[str, ...]
