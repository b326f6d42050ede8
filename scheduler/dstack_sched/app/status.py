"""What is going on now: each model's state, share, batch, rate, lateness, as plain JSON types."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from dstack_sched.app.rates import arrivals
from dstack_sched.domain.model_config import BACKEND
from dstack_sched.errors import DstackError
from dstack_sched.ports import ArbiterClient, Clock, ModelServer

ArbiterStatus = Mapping[str, Any]


class StatusReader:
    """Reads server and arbiter; rates and shares hold for the time between two reads.

    `read` gives {"version", "server", "arbiter", "models": {NAME: {...}}, "gpus"}; figures that take two
    reads are None in the first. Errors: ServerError when Triton does not answer; a missing arbiter is no
    error, its fields are None.
    """

    def __init__(self, server: ModelServer, arbiter: ArbiterClient, clock: Clock) -> None:
        self._server = server
        self._arbiter = arbiter
        self._clock = clock
        self._last: tuple[int, dict[str, int], ArbiterStatus] | None = None

    def read(self) -> dict[str, Any]:
        about = self._server.metadata()
        states = self._server.models()
        arbiter = self._ask_arbiter()
        statistics = self._server.statistics("")
        now_us = self._clock.now_us()
        counts = {model: arrivals(statistics, model) for model in states}
        models = {
            model: row
            for model, state in states.items()
            if (row := self._model(model, state, counts[model], arbiter, now_us)) is not None
        }
        document = {
            "version": 1,
            "server": {"name": about.get("name"), "version": about.get("version")},
            "arbiter": arbiter.get("policy"),
            "gpus": {index: self._gpu(index, gpu, now_us) for index, gpu in arbiter.get("gpus", {}).items()},
            "models": models,
        }
        self._last = (now_us, counts, arbiter)
        return document

    def _ask_arbiter(self) -> ArbiterStatus:
        try:
            return self._arbiter.request("status")
        except DstackError:
            return {}

    def _model(
        self, model: str, state: str, count: int, arbiter: ArbiterStatus, now_us: int
    ) -> dict[str, Any] | None:
        """One row; None for a model of another backend."""
        config = self._server.config(model) if state == "READY" else {}
        if config and config.get("backend") != BACKEND:
            return None
        parameters = {key: each.get("string_value") for key, each in config.get("parameters", {}).items()}
        backends = [each for each in arbiter.get("backends", ()) if each["model"] == model]
        return {
            "state": state,
            "gpu_percent": _float(parameters.get("gpu_percent")),
            "batch_size": _float(parameters.get("batch_size"), int),
            "max_batch_size": config.get("max_batch_size"),
            "slo_ms": _float(parameters.get("slo_ms")),
            "rate_per_s": self._rate(model, count, now_us),
            "within_slo": self._within_slo(model, arbiter),
            "utilization_percent": self._model_share(model, arbiter, now_us),
            "waiting": sum(each["waiting"] for each in backends) if backends else None,
            "instances": [each["state"] for each in backends],
        }

    def _rate(self, model: str, count: int, now_us: int) -> float | None:
        if self._last is None or model not in self._last[1] or now_us <= self._last[0]:
            return None
        before = self._last[1][model]
        delta = count - before if count >= before else count  # a reload starts the counter again
        return delta * 1e6 / (now_us - self._last[0])

    def _within_slo(self, model: str, arbiter: ArbiterStatus) -> float | None:
        """Share of rows answered in time, between two reads; since the arbiter's start where none came."""
        now = _counters(arbiter, model)
        if now is None:
            return None
        before = (_counters(self._last[2], model) if self._last else None) or (0, 0)
        rows, late = now[0] - before[0], now[1] - before[1]
        if rows <= 0 or late < 0:
            rows, late = now
        return 1 - late / rows if rows else None

    def _model_share(self, model: str, arbiter: ArbiterStatus, now_us: int) -> float | None:
        """GPU% held, on average, between the two reads."""
        now = arbiter.get("models", {}).get(model, {}).get("gpu_percent_ms")
        before = self._last[2].get("models", {}).get(model, {}).get("gpu_percent_ms") if self._last else None
        return self._mean_percent(now, before, now_us)

    def _gpu(self, index: str, gpu: Mapping[str, Any], now_us: int) -> dict[str, Any]:
        before = self._last[2].get("gpus", {}).get(index, {}).get("gpu_percent_ms") if self._last else None
        return {
            "capacity_percent": gpu["capacity_percent"],
            "granted_percent": gpu["granted_percent"],
            "utilization_percent": self._mean_percent(gpu["gpu_percent_ms"], before, now_us),
        }

    def _mean_percent(self, now: float | None, before: float | None, now_us: int) -> float | None:
        if now is None or before is None or self._last is None or now < before or now_us <= self._last[0]:
            return None
        return (now - before) * 1000 / (now_us - self._last[0])


def _counters(arbiter: ArbiterStatus, model: str) -> tuple[int, int] | None:
    """(rows, late rows) of a model since the arbiter's start."""
    found = arbiter.get("models", {}).get(model)
    return (found["rows"], found["late_rows"]) if found else None


def _float(text: str | None, kind: Callable[[str], Any] = float) -> Any:
    try:
        return None if text is None else kind(text)
    except ValueError:
        return None
