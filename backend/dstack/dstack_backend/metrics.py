"""Publishes an instance's counters as Triton custom metrics, once a second: each update is a round trip to
the server process, so nothing of it is on a request's path.

One metric family of each name exists per process; series are labelled by model, version and instance.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable, Mapping
from typing import Any

from dstack_backend.stats import LATENCY, STAGES, Histogram, Stats, Window

log = logging.getLogger("dstack")

PERIOD_S = 1.0
COUNTERS = {
    "requests": "Requests accepted by the backend",
    "rows": "Rows (batch items) accepted by the backend",
    "batches": "Batches run",
    "failed": "Requests failed by the runtime",
    "rejected": "Requests rejected because their deadline could not be met",
    "cancelled": "Requests cancelled by the client before they ran",
    "late": "Requests answered past their deadline",
    "returned": "Requests answered by Triton's own thread, at once",
    "grants": "Grants received from the arbiter",
    "standing_grants": "Grants received ahead of the work, among all grants",
    "unused_grants": "Permits that found nothing to run",
    "ungated_batches": "Batches run without the arbiter",
    "arbiter_connects": "Times the instance joined the arbiter",
    "arbiter_disconnects": "Times the arbiter was lost",
}
GAUGES = {
    "waiting_rows": "Rows waiting in the backend",
    "gated": "1 while batches run under the arbiter's grants",
    "gpu_share_ratio": "Share of the GPU that the instance was loaded with, 1: the whole",
    "batch_size_rows": "Planned rows of a batch, in force",
    "slo_seconds": "Latency objective in force, 0: best effort",
    "cuda_graphs": "Batch sizes that run as a CUDA graph",
    "preparing_programs": "Programs still to be made in the background; their batches take a larger one",
    "device_memory_bytes": "Device memory that the instance holds",
}
# Further series: (name, kind, label, help).
LABELLED = (
    ("dstack_stage_seconds_total", "counter", "stage", "Time of batches by stage, summed"),
    ("dstack_stage_samples_total", "counter", "stage", "Batches whose stage was timed"),
    ("dstack_stage_p99_seconds", "gauge", "stage", "99th percentile over the last period, by stage"),
    ("dstack_latency_seconds_total", "counter", "", "Time of requests in the backend, summed"),
    ("dstack_latency_samples_total", "counter", "", "Requests answered"),
    ("dstack_latency_quantile_seconds", "gauge", "quantile", "Latency over the last period"),
    ("dstack_batches_by_size_total", "counter", "up_to_rows", "Batches by rows, up to a power of two"),
)
OF_REQUESTS = ("failed", "rejected", "cancelled", "late", "returned")
HELP = {name: text for name, _, _, text in LABELLED}


class Publisher:
    """Sends `stats` to Triton until closed; where Triton has no metrics it says so once and does nothing.

    gauges: gives those that are no counters.
    """

    def __init__(
        self,
        pb_utils: Any,
        stats: Stats,
        labels: dict[str, str],
        gauges: Callable[[], Mapping[str, float]],
        period_s: float = PERIOD_S,
    ):
        self._period_s = period_s
        self._pb = pb_utils
        self._stats = stats
        self._labels = labels
        self._gauges = gauges
        self._families: dict[str, Any] = {}
        self._series: dict[tuple[str, str], Any] = {}
        self._sent: dict[tuple[str, str], float] = {}
        self._window = Window(stats, 0)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._loop, name="dstack-metrics", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def close(self) -> None:
        """Publish a last time and stop."""
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join(2.0)
        self._series.clear()
        self._families.clear()

    def _loop(self) -> None:
        try:
            while not self._stop.wait(self._period_s):
                self.publish()
            self.publish()
        except Exception as error:  # a Triton without metrics: serving goes on
            log.warning("custom metrics are off: %s", " ".join(str(error).split()))

    def publish(self) -> None:
        """Bring every series up to date."""
        counter, gauge = self._pb.MetricFamily.COUNTER, self._pb.MetricFamily.GAUGE
        stats = self._stats
        for name, help_text in COUNTERS.items():
            value = getattr(stats, name)
            self._add(counter, counter_name(name), help_text, "", "", value)
        recent = self._window.look(0)
        for stage in STAGES:
            p99_s = recent["stages_us"].get(stage, {}).get("p99", 0) / 1e6
            self._timed("dstack_stage", stats.stages[stage], "stage", stage)
            name = "dstack_stage_p99_seconds"
            self._set(gauge, name, HELP[name], p99_s, "stage", stage)
        self._timed("dstack_latency", stats.stages[LATENCY], "", "")
        for quantile, key in (("0.5", "p50"), ("0.99", "p99")):
            name, value_s = "dstack_latency_quantile_seconds", recent["latency_us"].get(key, 0) / 1e6
            self._set(gauge, name, HELP[name], value_s, "quantile", quantile)
        for rows, count in sorted(stats.sizes.items()):
            name = "dstack_batches_by_size_total"
            self._add(counter, name, HELP[name], "up_to_rows", str(rows), count)
        values = self._gauges()
        for name, help_text in GAUGES.items():
            self._set(gauge, f"dstack_{name}", help_text, values.get(name, getattr(stats, name, 0)))

    def _timed(self, prefix: str, histogram: Histogram, key: str, label: str) -> None:
        counter = self._pb.MetricFamily.COUNTER
        totals = {
            f"{prefix}_seconds_total": histogram.sum_us / 1e6,
            f"{prefix}_samples_total": histogram.total,
        }
        for name, total in totals.items():
            self._add(counter, name, HELP[name], key, label, total)

    def _add(self, kind: Any, name: str, help_text: str, key: str, label: str, total: float) -> None:
        """Bring a counter up to `total`; Triton's counters take increments."""
        increment = total - self._sent.get((name, label), 0)
        if increment > 0 or (name, label) not in self._sent:
            self._metric(kind, name, help_text, key, label).increment(increment)
            self._sent[(name, label)] = total

    def _set(
        self, kind: Any, name: str, help_text: str, value: float, key: str = "", label: str = ""
    ) -> None:
        if self._sent.get((name, label)) != value:
            self._metric(kind, name, help_text, key, label).set(value)
            self._sent[(name, label)] = value

    def _metric(self, kind: Any, name: str, help_text: str, key: str, label: str) -> Any:
        if (name, label) not in self._series:
            family = self._families.get(name)
            if family is None:
                family = self._pb.MetricFamily(name=name, description=help_text, kind=kind)
                self._families[name] = family
            labels = {**self._labels, **({key: label} if key else {})}
            self._series[(name, label)] = family.Metric(labels=labels)
        return self._series[(name, label)]


def counter_name(counter: str) -> str:
    """The series of one of COUNTERS; what only requests can be is said to count requests."""
    return f"dstack_{counter}_requests_total" if counter in OF_REQUESTS else f"dstack_{counter}_total"


def labels_of(model: str, version: str, instance: str) -> dict[str, str]:
    """Labels of an instance's series. The process id keeps the old and the new instance of a reload apart."""
    return {"model": model, "version": version, "instance": instance, "pid": str(os.getpid())}
