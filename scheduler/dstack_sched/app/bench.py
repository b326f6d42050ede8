"""Load all models of a workload at once, open loop, and hold what came back against their SLOs.

Arrivals are Poisson, drawn here with a seed and a stream for each model: perf_analyzer's own generator starts
from one fixed seed, so that all models would get the same pattern at the same moments.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import numpy as np

from dstack_sched.domain.load import BenchResult, LoadTrace, ModelResult
from dstack_sched.domain.workload import ModelDemand, Workload
from dstack_sched.errors import InputError, MachineError
from dstack_sched.ports import Clock, ModelServer

TAIL_S = 1.0  # load goes on behind the measured window: processes do not start in the same instant
SHORTEST_STRETCH_S = 1.0
MAX_STRETCHES = 50
PATIENCE_S = 60.0  # beyond the schedule, for answers that are late
FIRST_ANSWER_S = 15.0  # beyond the first request: where none is answered by then, none was sent, most likely
ATTEMPTS = 3


Result = TypeVar("Result")

# (model, its rate a second, seconds, its random stream) -> ascending times in [0, seconds), shape (arrivals,)
Arrivals = Callable[[ModelDemand, float, float, np.random.Generator], np.ndarray]


class LoadRun(Protocol):
    """A stretch of load that is under way."""

    def ends_within(self, timeout_s: float) -> bool: ...

    def wait(self, timeout_s: float) -> LoadTrace: ...


class LoadGenerator(Protocol):
    """Sends requests to one model, one after each interval (whole microseconds)."""

    def start(self, model: str, intervals_us: np.ndarray) -> LoadRun: ...


@dataclass(frozen=True, slots=True)
class BenchOptions:
    """seconds: the measured window; warmup_s: before it, tail_s: behind it; scale: a factor on all rates;
    patience_s: how long after the schedule's end answers are waited for; first_answer_s: and after the first
    request, for the first one."""

    seconds: float = 20.0
    warmup_s: float = 2.0
    seed: int = 1
    scale: float = 1.0
    tail_s: float = TAIL_S
    patience_s: float = PATIENCE_S
    first_answer_s: float = FIRST_ANSWER_S

    def __post_init__(self) -> None:
        if self.seconds <= 0 or self.warmup_s < 0 or self.scale <= 0:
            raise InputError("bench: --seconds and --scale must be above 0, --warmup 0 or more")


def check_served(workload: Workload, server: ModelServer) -> None:
    """Errors: InputError that names the first model of the workload which the server does not serve."""
    ready = [model for model, state in server.models().items() if state == "READY"]
    for demand in workload.models:
        if demand.name not in ready:
            known = ", ".join(sorted(ready)) or "none"
            raise InputError(f"workload: model {demand.name!r} is not served; ready are: {known}")


def arrival_times_s(rate_per_s: float, duration_s: float, rng: np.random.Generator) -> np.ndarray:
    """Times of a Poisson process on [0, duration_s), ascending, shape (arrivals,)."""
    count = rng.poisson(rate_per_s * duration_s)
    return np.sort(rng.uniform(0.0, duration_s, count))


def poisson(
    demand: ModelDemand, rate_per_s: float, duration_s: float, rng: np.random.Generator
) -> np.ndarray:
    """Arrivals: a Poisson process."""
    return arrival_times_s(rate_per_s, duration_s, rng)


class SilentLoadError(MachineError):
    """Requests to a model were due, and not one came through."""


def again_if_silent(run: Callable[[], Result], say: Callable[[str], None] = lambda text: None) -> Result:
    """What `run` returns, started anew where it raises SilentLoadError, up to ATTEMPTS times in all. `say` is
    told of each.

    perf_analyzer wakes its sender without holding the lock that the sender waits with (ResumeWorkers in its
    request_rate_manager.cc, still so in 2025): now and then, mostly on a busy machine, the sender misses the
    call and sends nothing for ever.
    """
    for _ in range(ATTEMPTS - 1):
        try:
            return run()
        except SilentLoadError as error:
            say(f"{error}; the run is repeated")
    return run()


def run_bench(
    workload: Workload,
    generator: LoadGenerator,
    server: ModelServer,
    clock: Clock,
    options: BenchOptions,
    started: Callable[[], None] = lambda: None,
    arrivals: Arrivals | None = None,
) -> BenchResult:
    """Drive the load and measure. `started` is called once all models are under load. arrivals: default
    Poisson.

    Errors: InputError when a model is not served, MachineError when the generator cannot be used,
    SilentLoadError when nothing came through.
    """
    check_served(workload, server)
    duration_s = options.warmup_s + options.seconds + options.tail_s
    draw = arrivals or poisson
    schedules = {
        demand.name: draw(demand, demand.rate_per_s * options.scale, duration_s, stream(options, demand))
        for demand in workload.models
    }
    loaded = [demand for demand in workload.models if schedules[demand.name].size]
    before = {demand.name: counts(server.statistics(demand.name)) for demand in loaded}
    with ThreadPoolExecutor(max(1, len(loaded))) as pool:
        begin_s = clock.wall_time_s()
        stretches = {
            demand.name: _Stretches(
                demand.name, schedules[demand.name], generator, server, clock, begin_s, options
            )
            for demand in loaded
        }
        waiting = {name: pool.submit(each.finish) for name, each in stretches.items()}
        started()
        traces = {name: future.result() for name, future in waiting.items()}
    window = (begin_s + options.warmup_s, begin_s + options.warmup_s + options.seconds)
    models = {}
    for demand in workload.models:
        parts = traces.get(demand.name, [])
        check_driven(demand.name, parts)
        failed, unmeasured = 0, 0
        if any(part.error for part in parts):
            failed, unmeasured = losses(before[demand.name], counts(server.statistics(demand.name)), parts)
        lag_s = send_lag_s(schedules[demand.name], parts, begin_s)
        models[demand.name] = result_of(demand, parts, window, failed, unmeasured, lag_s, options.scale)
    return BenchResult(
        options.seconds, options.warmup_s, options.seed, workload.attainment, models,
        tuple(name for name, each in models.items() if is_missed(each, workload.attainment)),
    )  # fmt: skip


def stream(options: BenchOptions, demand: ModelDemand) -> np.random.Generator:
    """The model's own random stream: independent of the other models and of their order."""
    return np.random.default_rng([options.seed, zlib.crc32(demand.name.encode())])


class _Stretches:
    """The load on one model. perf_analyzer ends at the first error, so the rest is sent by the next one; one
    that failed by itself is replaced in the same way."""

    def __init__(
        self,
        model: str,
        schedule_s: np.ndarray,
        generator: LoadGenerator,
        server: ModelServer,
        clock: Clock,
        begin_s: float,
        options: BenchOptions,
    ) -> None:
        self._model = model
        self._schedule_s = schedule_s
        self._generator = generator
        self._clock = clock
        self._begin_s = begin_s
        self._server = server
        self._options = options
        self._counts = (0, 0)
        self._first_due_s = 0.0
        self._run: LoadRun | None = self._start_rest()

    def _start_rest(self) -> LoadRun | None:
        """Send what is still to come; None when less than a second of it is left."""
        self._counts = counts(self._server.statistics(self._model))
        now_s = self._clock.wall_time_s() - self._begin_s
        rest = self._schedule_s[self._schedule_s >= now_s]
        if not rest.size or (now_s > SHORTEST_STRETCH_S and rest[-1] - now_s < SHORTEST_STRETCH_S):
            return None
        self._first_due_s = float(rest[0])
        intervals_us = np.diff(np.round(rest * 1e6), prepend=round(now_s * 1e6)).astype(np.int64)
        return self._generator.start(self._model, np.maximum(intervals_us, 1))

    def finish(self) -> list[LoadTrace]:
        """Errors: SilentLoadError."""
        parts: list[LoadTrace] = []
        while self._run is not None and len(parts) < MAX_STRETCHES:
            self._check_sound(self._run)
            parts.append(self._run.wait(self._left_s(self._schedule_s[-1]) + self._options.patience_s))
            self._run = self._start_rest() if parts[-1].error else None
        return parts

    def _left_s(self, until_s: float) -> float:
        return max(0.0, self._begin_s + float(until_s) - self._clock.wall_time_s())

    def _check_sound(self, run: LoadRun) -> None:
        """Errors: SilentLoadError where the server has nothing to show for the stretch, good or bad."""
        patience_s = self._options.first_answer_s
        if run.ends_within(self._left_s(self._first_due_s) + patience_s):
            return
        if counts(self._server.statistics(self._model)) == self._counts:
            run.wait(0.0)
            raise SilentLoadError(
                f"{self._model}: no request was answered within {patience_s:g} s of the first; where the "
                "model answers others, the load generator hangs"
            )


def check_driven(model: str, parts: Sequence[LoadTrace]) -> None:
    """Errors: MachineError where the generator failed by itself each time, so that nothing can be said."""
    if parts and all(part.error is not None and not part.request_failed for part in parts):
        raise MachineError(f"{model}: the load could not be driven: {parts[-1].error}")


def counts(statistics: Mapping[str, Any]) -> tuple[int, int]:
    """(answered, failed) requests so far, over all versions, from Triton's statistics."""
    entries = [entry["inference_stats"] for entry in statistics["model_stats"]]
    return (
        sum(int(entry["success"]["count"]) for entry in entries),
        sum(int(entry["fail"]["count"]) for entry in entries),
    )


def losses(before: tuple[int, int], after: tuple[int, int], parts: Sequence[LoadTrace]) -> tuple[int, int]:
    """(failed, unmeasured) requests of a run in which some stretch was cut short.

    Triton's counters start anew when a model is reloaded, so each cut by a failed request counts as one
    failure at least. A generator that failed by itself is none: the server did nothing wrong.
    """
    cuts = sum(part.request_failed for part in parts)
    measured = sum(part.sent_s.size for part in parts)
    answered = after[0] - before[0]
    return max(cuts, after[1] - before[1]), max(0, answered - measured)


def send_lag_s(schedule_s: np.ndarray, parts: Sequence[LoadTrace], begin_s: float) -> np.ndarray:
    """How late each request left, against the schedule, from the first one on; the last stretch only."""
    if not parts or not parts[-1].sent_s.size:
        return np.empty(0)
    sent = parts[-1].sent_s - begin_s
    planned = schedule_s[-sent.size :]
    lag = sent - planned[: sent.size]
    return np.asarray(lag - lag.min())


def result_of(
    demand: ModelDemand,
    parts: Sequence[LoadTrace],
    window: tuple[float, float],
    failed: int,
    unmeasured: int,
    lag_s: np.ndarray,
    scale: float,
) -> ModelResult:
    """The figures of one model over the requests sent in the window (wall-clock seconds)."""
    sent = np.concatenate([part.sent_s for part in parts]) if parts else np.empty(0)
    latency = np.concatenate([part.latency_ms for part in parts]) if parts else np.empty(0)
    latency = latency[(sent >= window[0]) & (sent < window[1])]
    limit_ms = demand.slo_ms if demand.slo_ms is not None else np.inf
    good = int((latency <= limit_ms).sum())
    known = latency.size + failed
    p50, p95, p99 = (
        (float(np.percentile(latency, percent)) for percent in (50, 95, 99))
        if latency.size
        else (None, None, None)
    )
    return ModelResult(
        slo_ms=demand.slo_ms,
        rate_per_s=demand.rate_per_s * scale,
        requests=known + unmeasured,
        failed=failed,
        unmeasured=unmeasured,
        latency_ms_p50=p50,
        latency_ms_p95=p95,
        latency_ms_p99=p99,
        slo_attainment=good / known if known and demand.slo_ms is not None else None,
        goodput_per_s=good / (window[1] - window[0]),
        send_lag_ms_p99=float(np.percentile(lag_s, 99)) * 1e3 if lag_s.size else None,
        errors=tuple(dict.fromkeys(part.error for part in parts if part.error is not None)),
    )


def is_missed(result: ModelResult, attainment: float) -> bool:
    """Whether the objective is not met: too few in time, or nothing answered although something was sent."""
    return result.slo_attainment is not None and result.slo_attainment < attainment
