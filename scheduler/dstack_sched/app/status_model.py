"""One model's row of the status: what Triton, the arbiter, its backends and the controller say of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dstack_backend.stats import STAGES
from dstack_sched.app.status_reading import Body, Reading, ServedNow

TRITON_QUEUE = "triton_queue"
ALL_STAGES = (TRITON_QUEUE, *STAGES)


@dataclass(frozen=True)
class Delta:
    """Differences of a model's counters in the arbiter between two readings, or since its start where nothing
    came in between (`lately` False then). seconds: between the readings, None in the first."""

    counts: Mapping[str, float]
    seconds: float | None
    lately: bool

    def __getitem__(self, key: str) -> float:
        return self.counts.get(key, 0.0)

    def per_s(self, key: str) -> float | None:
        """None where it is not known; 0 where nothing came."""
        if self.seconds is None:
            return None
        return self[key] / self.seconds if self.lately else 0.0

    def ratio(self, above: float, below: float) -> float | None:
        return above / below if below > 0 else None


def model_row(model: str, now: Reading, before: Reading | None) -> dict[str, Any]:
    """Everything known of one model, None where it is not. Times as their names say; rates in rows a second.

    level_percent: GPU% of its batches, mean over their time. goodput_per_s: rows answered in time.
    latency_p50_ms, _p99_ms: of requests in the backend, the worst instance. predicted_run_ms: of a planned
    batch, by the controller with its co-runners, else alone. stages_us: {STAGE: {"mean", "p99"}}.
    """
    served = now.models.get(model)
    parameters = _parameters(served)
    backends = [each for each in now.arbiter.get("backends", ()) if each["model"] == model]
    gpu, plan = _plan(model, now.arbiter)
    controller = now.boards.get("controller") or {}
    look = controller.get("models", {}).get(model, {}) if controller.get("running") else {}
    told = [body for body in now.telemetry.values() if body.get("model") == model]
    delta = _delta(model, now, before)
    batches = delta["grants"] - delta["unused_grants"]
    return {
        "state": served.state if served else None,
        "gpus": sorted({str(each["gpu"]) for each in backends} or ({gpu} if gpu else set())),
        "gpu_percent": _first(
            plan.get("gpu_percent"),
            _number(parameters.get("gpu_percent")),
            *(each.get("gpu_percent") for each in backends),
        ),
        "level_percent": delta.ratio(delta["gpu_percent_ms"], delta["run_ms"]),
        "batch_size": plan.get("batch_size", _number(parameters.get("batch_size"), int)),
        "batch_rows_mean": delta.ratio(delta["rows"], batches),
        "granted_rows_mean": delta.ratio(delta["granted_rows"], delta["grants"]),
        "max_batch_size": served.config.get("max_batch_size") if served else None,
        "slo_ms": plan.get("slo_ms") or _number(parameters.get("slo_ms")),
        "rate_per_s": _rate(model, now, before),
        "forecast_per_s": look.get("forecast_per_s"),
        "planned_per_s": look.get("planned_per_s"),
        "within_slo": delta.ratio(delta["rows"] - delta["late_rows"], delta["rows"]),
        "goodput_per_s": _difference(delta.per_s("rows"), delta.per_s("late_rows")),
        "grants_per_s": delta.per_s("grants"),
        "predicted_run_ms": look.get("predicted_run_ms") or plan.get("latency_ms"),
        "measured_run_ms": delta.ratio(delta["run_ms"], batches),
        "drift": look.get("drift"),
        "latency_p50_ms": _latency_ms(told, "p50"),
        "latency_p99_ms": _latency_ms(told, "p99"),
        "utilization_percent": _used(delta),
        "waiting": sum(each["waiting"] for each in backends) if backends else None,
        "instances": [each["state"] for each in backends],
        "totals": _totals(told),
        "stages_us": stages(model, now, before, told),
    }


def stages(
    model: str, now: Reading, before: Reading | None, told: Sequence[Body]
) -> dict[str, dict[str, float]]:
    """Stage -> {"mean", "p99"} in microseconds, the worst instance's; triton_queue, which Triton alone sees,
    as the mean of the requests since the reading before."""
    found: dict[str, dict[str, float]] = {}
    queue_us = _queue_us(model, now, before)
    if queue_us is not None:
        found[TRITON_QUEUE] = {"mean": queue_us}
    for stage in STAGES:
        seen = [body["stages_us"][stage] for body in told if stage in body.get("stages_us", {})]
        keys = [key for key in ("mean", "p50", "p99") if any(key in each for each in seen)]
        if seen:
            found[stage] = {key: max(each.get(key, 0.0) for each in seen) for key in keys}
    return found


def _delta(model: str, now: Reading, before: Reading | None) -> Delta:
    last = _counters(now.arbiter, model)
    first = _counters(before.arbiter, model) if before else {}
    seconds = (now.time_us - before.time_us) / 1e6 if before and now.time_us > before.time_us else None
    since = {key: value - first.get(key, 0.0) for key, value in last.items()}
    if any(value < 0 for value in since.values()):  # the arbiter started anew
        return Delta(last, None, lately=False)
    if not first or not since.get("grants"):
        return Delta(last, seconds, lately=False)
    return Delta(since, seconds, lately=True)


def _counters(arbiter: Body, model: str) -> dict[str, float]:
    found = arbiter.get("models", {}).get(model, {})
    return {key: value for key, value in found.items() if isinstance(value, int | float)}


def _used(delta: Delta) -> float | None:
    """GPU% held on average between the two readings."""
    share = delta.per_s("gpu_percent_ms")
    return None if share is None else share / 1000


def _rate(model: str, now: Reading, before: Reading | None) -> float | None:
    last, first = now.models.get(model), before.models.get(model) if before else None
    if before is None or last is None or first is None or now.time_us <= before.time_us:
        return None
    came = last.arrivals - first.arrivals if last.arrivals >= first.arrivals else last.arrivals
    return came * 1e6 / (now.time_us - before.time_us)  # a reload starts the counter again


def _queue_us(model: str, now: Reading, before: Reading | None) -> float | None:
    """Mean time in Triton's queue since the reading before; since the load where none came in between."""
    last, first = now.models.get(model), before.models.get(model) if before else None
    if last is None or not last.queued:
        return None
    if first is not None and last.queued > first.queued and last.queue_ns >= first.queue_ns:
        return (last.queue_ns - first.queue_ns) / (last.queued - first.queued) / 1000
    return last.queue_ns / last.queued / 1000


def _plan(model: str, arbiter: Body) -> tuple[str | None, Body]:
    """The first GPU that has the model in its plan, and what that says."""
    for gpu, state in arbiter.get("gpus", {}).items():
        if model in state.get("plan", {}):
            return gpu, state["plan"][model]
    return None, {}


def _latency_ms(told: Sequence[Body], key: str) -> float | None:
    seen = [body["latency_us"][key] for body in told if key in body.get("latency_us", {})]
    return max(seen) / 1000 if seen else None


def _totals(told: Sequence[Body]) -> dict[str, int]:
    """Counters of all instances that run now, since they started."""
    totals: dict[str, int] = {}
    for body in told:
        for key, value in body.get("totals", {}).items():
            totals[key] = totals.get(key, 0) + value
    return totals


def _parameters(served: ServedNow | None) -> dict[str, str | None]:
    found = served.config.get("parameters", {}) if served else {}
    return {key: each.get("string_value") for key, each in found.items()}


def _first(*values: Any) -> Any:
    """The first that is known."""
    return next((value for value in values if value is not None), None)


def _difference(a: float | None, b: float | None) -> float | None:
    return None if a is None or b is None else a - b


def _number(text: str | None, kind: Callable[[str], Any] = float) -> Any:
    try:
        return None if text is None else kind(text)
    except ValueError:
        return None
