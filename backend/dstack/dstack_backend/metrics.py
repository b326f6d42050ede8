"""Publishes an instance's counters as Triton custom metrics, once a second: each update is a round trip to
the server process, so nothing of it is on a request's path.

One metric family of each name exists per process; series are labelled by model, version and instance.
"""

from __future__ import annotations

import logging
import os
import threading
from typing import Any

from dstack_backend.stats import STAGES, Stats

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
    "grants": "Grants received from the arbiter",
    "unused_grants": "Permits that found nothing to run",
    "ungated_batches": "Batches run without the arbiter",
    "arbiter_connects": "Times the instance joined the arbiter",
    "arbiter_disconnects": "Times the arbiter was lost",
}
GAUGES = {
    "waiting_rows": "Rows waiting in the backend",
    "gated": "1 while batches run under the arbiter's grants",
    "gpu_percent": "GPU% the instance was loaded with",
    "batch_size": "Planned rows of a batch",
}
STAGE_HELP = "Summed time by stage"
SIZE_HELP = "Batches by rows, rounded up to a power of two"


class Publisher:
    """Sends `stats` to Triton until closed; where Triton has no metrics it says so once and does nothing.

    constants: gauges that do not change.
    """

    def __init__(
        self,
        pb_utils: Any,
        stats: Stats,
        labels: dict[str, str],
        constants: dict[str, float],
        period_s: float = PERIOD_S,
    ):
        self._period_s = period_s
        self._pb = pb_utils
        self._stats = stats
        self._labels = labels
        self._constants = constants
        self._families: dict[str, Any] = {}
        self._series: dict[tuple[str, str], Any] = {}
        self._sent: dict[tuple[str, str], float] = {}
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
            self._add(counter, f"dstack_{name}_total", help_text, "", "", value)
        for stage in STAGES:
            self._add(
                counter, "dstack_stage_seconds_total", STAGE_HELP, "stage", stage, stats.stage_ns[stage] / 1e9
            )
        for rows, count in sorted(stats.sizes.items()):
            self._add(counter, "dstack_batches_by_size_total", SIZE_HELP, "up_to_rows", str(rows), count)
        for name, help_text in GAUGES.items():
            value = self._constants.get(name, getattr(stats, name, 0))
            self._set(gauge, f"dstack_{name}", help_text, value)

    def _add(self, kind: Any, name: str, help_text: str, key: str, label: str, total: float) -> None:
        """Bring a counter up to `total`; Triton's counters take increments."""
        increment = total - self._sent.get((name, label), 0)
        if increment > 0 or (name, label) not in self._sent:
            self._metric(kind, name, help_text, key, label).increment(increment)
            self._sent[(name, label)] = total

    def _set(self, kind: Any, name: str, help_text: str, value: float) -> None:
        if self._sent.get((name, "")) != value:
            self._metric(kind, name, help_text, "", "").set(value)
            self._sent[(name, "")] = value

    def _metric(self, kind: Any, name: str, help_text: str, key: str, label: str) -> Any:
        if (name, label) not in self._series:
            family = self._families.get(name)
            if family is None:
                family = self._pb.MetricFamily(name=name, description=help_text, kind=kind)
                self._families[name] = family
            labels = {**self._labels, **({key: label} if key else {})}
            self._series[(name, label)] = family.Metric(labels=labels)
        return self._series[(name, label)]


def labels_of(model: str, version: str, instance: str) -> dict[str, str]:
    """Labels of an instance's series. The process id keeps the old and the new instance of a reload apart."""
    return {"model": model, "version": version, "instance": instance, "pid": str(os.getpid())}
