"""What the controller tells of itself: metrics for Prometheus, and a board that `dstackctl status` reads.

The loop calls these as it goes; nothing here decides anything, and nothing here fails.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from dstack_sched.app.gpus import GpuState
from dstack_sched.domain import metrics as table
from dstack_sched.domain.change import ApplyReport
from dstack_sched.domain.fault import Fault, FaultKind
from dstack_sched.domain.metrics import Metric, Sample
from dstack_sched.domain.plan import Plan
from dstack_sched.ports import Clock, Metrics, StatusBoard

REFRESH_S = 10.0  # a board is a small file: no need to write it twice a second for months


class NoMetrics:
    """ports.Metrics that keeps nothing: for `run` without an endpoint, and for tests that do not look."""

    def count(self, metric: Metric, by: float = 1.0, **labels: str) -> None: ...
    def set(self, metric: Metric, value: float, **labels: str) -> None: ...
    def observe(self, metric: Metric, value: float, **labels: str) -> None: ...
    def replace(self, metric: Metric, values: Mapping[tuple[str, ...], float]) -> None: ...


class NoBoard:
    """ports.StatusBoard that keeps nothing."""

    def write(self, document: Mapping[str, Any]) -> None: ...


@dataclass(frozen=True, slots=True)
class ModelLook:
    """One model as the loop sees it at a look; None: not known (yet). Rates in rows a second.

    attainment: share of rows within their SLO over the last window. drift: measured run time over what the
    profile says for the same batches. run times: of a planned batch on the device, co-runners included.
    """

    measured_per_s: float | None = None
    forecast_per_s: float | None = None
    planned_per_s: float | None = None
    attainment: float | None = None
    drift: float | None = None
    predicted_run_ms: float | None = None
    measured_run_ms: float | None = None


class HealthTelemetry:
    """Counts faults as they come and go. Used by the controller and by `serve`."""

    def __init__(self, metrics: Metrics, clock: Clock) -> None:
        self._metrics = metrics
        self._clock = clock
        self._present: dict[tuple[str, str], tuple[int, float, str]] = {}

    def note(self, faults: Iterable[Fault]) -> None:
        """All faults that are there now. New ones are counted, those that went are booked as recovered."""
        now_us = self._clock.now_us()
        seen = {(str(fault.kind), fault.subject): fault.detail for fault in faults}
        for key in self._present.keys() - seen.keys():
            since_us, _, _ = self._present.pop(key)
            self._metrics.observe(table.RECOVERIES, (now_us - since_us) / 1e6, kind=key[0])
        for key, detail in seen.items():
            since_us, since_s, _ = self._present.get(key, (now_us, self._clock.wall_time_s(), ""))
            if key not in self._present:
                self._metrics.count(table.FAULTS, kind=key[0], subject=key[1])
            self._present[key] = (since_us, since_s, detail)
        self._metrics.replace(table.FAULTS_PRESENT, dict.fromkeys(self._present, 1.0))

    def restarted(self, service: str) -> None:
        """A service was started again."""
        self._metrics.count(table.SERVICE_RESTARTS, service=service)

    def kinds(self) -> set[str]:
        """The kinds of the faults that are there now."""
        return {kind for kind, _ in self._present}

    def document(self) -> list[dict[str, Any]]:
        """The faults that are there now, as plain JSON types; since_s is Unix time."""
        return [
            {"kind": kind, "subject": subject, "since_s": round(since_s, 3), "detail": detail}
            for (kind, subject), (_, since_s, detail) in self._present.items()
        ]


class HealthBoard:
    """Says on a board which faults are there: when they change, and every REFRESH_S while they do not."""

    def __init__(
        self, telemetry: HealthTelemetry, board: StatusBoard, clock: Clock, about: Mapping[str, Any]
    ) -> None:
        self._telemetry = telemetry
        self._board = board
        self._clock = clock
        self._about = dict(about)
        self._said: list[dict[str, Any]] | None = None
        self._again_us = 0

    def publish(self) -> None:
        """To be called after each check."""
        faults, now_us = self._telemetry.document(), self._clock.now_us()
        if faults == self._said and now_us < self._again_us:
            return
        self._said, self._again_us = faults, now_us + round(REFRESH_S * 1e6)
        updated_s = round(self._clock.wall_time_s(), 3)
        self._board.write({"version": 1, **self._about, "updated_s": updated_s, "faults": faults})


class ControllerTelemetry:
    """The controller's metrics and board. about: what the board says of this controller (url, repository,
    dry_run, interval_s, ...), plain JSON types."""

    def __init__(
        self,
        metrics: Metrics,
        board: StatusBoard,
        clock: Clock,
        about: Mapping[str, Any] | None = None,
    ) -> None:
        self._metrics = metrics
        self._board = board
        self._clock = clock
        self._about = dict(about or {})
        self._started_s = clock.wall_time_s()
        self._plan: dict[str, Any] | None = None
        self._fits: dict[str, Any] = {}  # of the last plan made, in force or not: that for the latest rates
        self._last: dict[str, Any] | None = None
        self._looks: Mapping[str, ModelLook] = {}
        self._parts: dict[str, bool] = {}
        self.health = HealthTelemetry(metrics, clock)
        metrics.set(table.CONTROLLER_STARTED, self._started_s)

    def planned(self, plan: Plan, took_s: float) -> None:
        """A plan was made, whether it will be put in force or not."""
        self._metrics.observe(table.PLAN_TIME, took_s)
        self._metrics.set(table.FEASIBLE, float(plan.feasible))
        self._metrics.set(table.HEADROOM, plan.headroom)
        self._fits = {"feasible": plan.feasible, "headroom": plan.headroom}

    def decided(self, outcome: str, cause: str, reason: str) -> None:
        """A round ended. outcome: applied, kept, advised, failed. cause: one of a few words (start, rate,
        drift, fault, ...), a label; reason: the line for people."""
        self._metrics.count(table.ROUNDS, outcome=outcome, reason=cause)
        at_s = round(self._clock.wall_time_s(), 3)
        self._last = {"time_s": at_s, "what": outcome, "cause": cause, "reason": reason}

    def applied(self, report: ApplyReport, took_s: float) -> None:
        """Configs were rewritten and models loaded."""
        self._metrics.observe(table.APPLY_TIME, took_s)
        for outcome in report.outcomes:
            if outcome.action in ("loaded", "reloaded"):
                self._metrics.count(table.RELOADS, model=outcome.model)

    def changed(self, kind: str, count: int = 1) -> None:
        """Changes of one kind were put in force: message, level, instance_group, reload."""
        self._metrics.count(table.CHANGES, count, kind=kind)

    def load_failed(self, model: str, *, rolled_back: bool) -> None:
        """Triton did not load a model; whether the plan was undone for it."""
        self._metrics.count(table.FAILED_LOADS, model=model)
        if rolled_back:
            self._metrics.count(table.ROLLBACKS)

    def in_force(self, plan: Plan) -> None:
        """This plan is what the configs and the arbiter state now."""
        rows = plan.models
        shares: dict[tuple[str, ...], float] = {
            (name, str(gpu)): percent / 100
            for name, row in rows.items()
            for gpu, percent in (
                (row.gpu, row.gpu_percent),
                *((each.gpu, each.gpu_percent) for each in row.replicas),
            )
        }
        replace = self._metrics.replace
        replace(table.PLANNED_SHARE, shares)
        replace(table.PLANNED_BATCH, {(name,): float(row.batch_size) for name, row in rows.items()})
        replace(table.SLO, {(name,): row.slo_ms / 1e3 for name, row in rows.items() if row.slo_ms})
        self._plan = {
            "capacity_percent": plan.capacity_percent,
            "models": {
                name: {
                    "gpu_percent": row.gpu_percent,
                    "batch_size": row.batch_size,
                    "latency_ms": row.latency_ms,
                    "slo_ms": row.slo_ms,
                    "rate_per_s": row.rate_per_s,
                    "utilization": row.utilization,
                }
                for name, row in rows.items()
            },
        }

    def part(self, name: str, *, up: bool) -> None:
        """Whether server or arbiter answers."""
        self._parts[name] = up
        self._metrics.set(table.CONTROLLER_UP, float(up), part=name)

    def looked(self, models: Mapping[str, ModelLook]) -> None:
        """One look at all models; writes the board."""
        self._looks = models
        known = models.items()
        rates: dict[tuple[str, ...], float] = {
            (name, kind): rate
            for name, look in known
            for kind, rate in (
                ("measured", look.measured_per_s),
                ("forecast", look.forecast_per_s),
                ("planned", look.planned_per_s),
            )
            if rate is not None
        }
        replace = self._metrics.replace
        replace(table.ARRIVALS, rates)
        replace(table.ATTAINMENT, _known((name, look.attainment) for name, look in known))
        replace(table.DRIFT, _known((name, look.drift) for name, look in known))
        predicted = _known((name, look.predicted_run_ms) for name, look in known)
        measured = _known((name, look.measured_run_ms) for name, look in known)
        replace(table.PREDICTED_LATENCY, {name: value / 1e3 for name, value in predicted.items()})
        replace(table.MEASURED_LATENCY, {name: value / 1e3 for name, value in measured.items()})
        self.publish()

    def publish(self) -> None:
        """Bring the board up to date."""
        away = self.health.kinds()
        self.part("server", up=FaultKind.SERVER_AWAY not in away)
        self.part("arbiter", up=FaultKind.ARBITER_AWAY not in away)
        self._board.write(
            {
                "version": 1,
                **self._about,
                "started_s": round(self._started_s, 3),
                "updated_s": round(self._clock.wall_time_s(), 3),
                "parts": dict(self._parts),
                "plan": self._plan and {**self._plan, **self._fits},
                "last_round": self._last,
                "models": {name: asdict(look) for name, look in self._looks.items()},
                "faults": self.health.document(),
            }
        )


def _known(values: Iterable[tuple[str, float | None]]) -> dict[tuple[str, ...], float]:
    return {(name,): value for name, value in values if value is not None}


def gpu_samples(states: Iterable[GpuState]) -> Iterator[Sample]:
    """The GPUs as they were read last, for a scrape: nothing is asked of the driver."""
    for state in states:
        gpu, labels = state.reading, (str(state.reading.index), state.reading.uuid)
        yield Sample(table.GPU_USABLE, labels, float(not state.out))
        if gpu.utilization_percent is not None:
            yield Sample(table.GPU_BUSY, labels, gpu.utilization_percent / 100)
        if gpu.memory_bytes:
            yield Sample(table.GPU_MEMORY_USED, labels, float(gpu.used_bytes))
            yield Sample(table.GPU_MEMORY_TOTAL, labels, float(gpu.memory_bytes))
