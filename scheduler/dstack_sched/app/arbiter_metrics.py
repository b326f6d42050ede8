"""The arbiter's status as samples for Prometheus. The arbiter itself only counts; this runs elsewhere, at a
scrape, on the answer to one control message."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from dstack_sched.domain import metrics as table
from dstack_sched.domain.metrics import Buckets, Metric, Sample

Status = Mapping[str, Any]

_BY_MODEL: tuple[tuple[Metric, str, float], ...] = (
    (table.GRANTS, "grants", 1.0),
    (table.UNUSED_GRANTS, "unused_grants", 1.0),
    (table.GRANTED_ROWS, "granted_rows", 1.0),
    (table.ENDED_LEASES, "leases_ended", 1.0),
    (table.ROWS, "rows", 1.0),
    (table.LATE_ROWS, "late_rows", 1.0),
    (table.SHEDS, "shed_orders", 1.0),
    (table.OVERLOADS, "overloads", 1.0),
    (table.RUN_TIME, "run_ms", 1e-3),
    (table.SHARE_TIME, "gpu_percent_ms", 1e-5),
)
_OF_PLAN: tuple[tuple[Metric, str, float], ...] = (
    (table.PLAN_SHARE, "gpu_percent", 1e-2),
    (table.PLAN_BATCH, "batch_size", 1.0),
    (table.PLAN_RUN, "latency_ms", 1e-3),
    (table.PLAN_SLO, "slo_ms", 1e-3),
)


def down() -> tuple[Sample, ...]:
    """What is known of an arbiter that does not answer."""
    return (Sample(table.ARBITER_UP, (), 0.0),)


def samples(status: Status) -> Iterator[Sample]:
    """Every metric of the table's ARBITER part, from one answer of ArbiterService.status."""
    yield Sample(table.ARBITER_UP, (), 1.0)
    yield Sample(table.ARBITER_UPTIME, (), status["uptime_s"])
    yield Sample(table.ARBITER_POLICY, (status["policy"],), 1.0)
    yield Sample(table.CLIENTS, (), status["clients"])
    for reason, count in status["dropped"].items():
        yield Sample(table.DROPPED, (reason,), count)
    for state, count in status["backend_states"].items():
        yield Sample(table.SESSIONS, (state,), count)
    decisions = status["decision_us"]["histogram"]
    yield Sample(table.DECISION_TIME, (), _seconds(decisions["le"], decisions))
    for model, counters in status["models"].items():
        for metric, key, factor in _BY_MODEL:
            yield Sample(metric, (model,), counters[key] * factor)
        waits = _seconds(status["wait_bounds_us"], counters["wait_us"])
        yield Sample(table.GRANT_WAIT, (model,), waits)
    yield from _waiting(status["backends"])
    for gpu, state in status["gpus"].items():
        yield from _gpu(gpu, state)


def _gpu(gpu: str, state: Mapping[str, Any]) -> Iterator[Sample]:
    yield Sample(table.GPU_CAPACITY, (gpu,), state["capacity_percent"] / 100)
    yield Sample(table.GPU_GRANTED, (gpu,), state["granted_percent"] / 100)
    yield Sample(table.GPU_STANDING, (gpu,), state["standing_percent"] / 100)
    yield Sample(table.GPU_SHARE_TIME, (gpu,), state["gpu_percent_ms"] * 1e-5)
    for model, plan in state["plan"].items():
        for metric, key, factor in _OF_PLAN:
            if plan[key] is not None:
                yield Sample(metric, (gpu, model), plan[key] * factor)
    for model, score in state["scores"].items():
        yield Sample(table.SCORE, (gpu, model), score * 1e-5)


def _waiting(backends: Iterable[Mapping[str, Any]]) -> Iterator[Sample]:
    waiting: dict[str, int] = {}
    for backend in backends:
        waiting[backend["model"]] = waiting.get(backend["model"], 0) + backend["waiting"]
    for model, rows in waiting.items():
        yield Sample(table.WAITING_ROWS, (model,), rows)


def _seconds(bounds_us: Iterable[float], histogram: Mapping[str, Any]) -> Buckets:
    """A histogram in microseconds, in seconds."""
    bounds = tuple(bound / 1e6 for bound in bounds_us)
    return Buckets(bounds, tuple(histogram["counts"]), histogram["sum"] / 1e6)
