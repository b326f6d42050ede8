"""ports.Metrics with prometheus_client, and the HTTP endpoint that Prometheus scrapes.

Registries are our own: nothing of the process-wide default one is used, so that two endpoints of one process
do not see each other.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    disable_created_metrics,
    start_http_server,
)
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.registry import Collector

from dstack_sched.domain.metrics import Buckets, Kind, Metric, Sample
from dstack_sched.errors import MachineError

CLIENT_TIMEOUT_S = 10.0  # a client that connects and says nothing must not hold a thread for good
disable_created_metrics()  # a second series for each counter that nobody asks for
Family = CounterMetricFamily | GaugeMetricFamily | HistogramMetricFamily


class PrometheusMetrics:
    """Counts, sets and observes the metrics of one table. Thread-safe.

    Errors: KeyError for a metric that is not in the table, ValueError for labels that it does not have: both
    are defects of the caller.
    """

    def __init__(self, table: Iterable[Metric]) -> None:
        self.registry = CollectorRegistry()
        self._families = {metric: self._make(metric) for metric in table}
        self._replaced: dict[Metric, set[tuple[str, ...]]] = {}
        self._replacing = threading.Lock()

    def _make(self, metric: Metric) -> Any:
        about = metric.name, metric.help, metric.labels
        match metric.kind:
            case Kind.COUNTER:
                return Counter(*about, registry=self.registry)
            case Kind.GAUGE:
                return Gauge(*about, registry=self.registry)
            case Kind.HISTOGRAM:
                return Histogram(*about, registry=self.registry, buckets=metric.bounds)

    def count(self, metric: Metric, by: float = 1.0, **labels: str) -> None:
        """Add to a counter; by >= 0."""
        self._series(metric, labels).inc(by)

    def set(self, metric: Metric, value: float, **labels: str) -> None:
        """Set a gauge."""
        self._series(metric, labels).set(value)

    def observe(self, metric: Metric, value: float, **labels: str) -> None:
        """Put a value into a histogram."""
        self._series(metric, labels).observe(value)

    def replace(self, metric: Metric, values: Mapping[tuple[str, ...], float]) -> None:
        """Set every series of a gauge: label values in the table's order -> value. Those not named go."""
        family = self._families[metric]
        with self._replacing:
            for gone in self._replaced.get(metric, set()) - values.keys():
                family.remove(*gone)
            for labels, value in values.items():
                family.labels(*labels).set(value)
            self._replaced[metric] = set(values)

    def _series(self, metric: Metric, labels: Mapping[str, str]) -> Any:
        family = self._families[metric]
        return family.labels(**labels) if metric.labels else family


class Snapshots(Collector):
    """Reads all values anew at each scrape: for what is counted elsewhere, in plain numbers. To be
    registered; scrapes at the same time call `read` at the same time."""

    def __init__(self, read: Callable[[], Iterable[Sample]]) -> None:
        self._read = read

    def describe(self) -> Iterable[Family]:
        """Nothing: registering must not read."""
        return ()

    def collect(self) -> Iterator[Family]:
        """The families of the samples, in their order."""
        families: dict[Metric, Family] = {}
        for sample in self._read():
            family = families.get(sample.metric)
            if family is None:
                family = families[sample.metric] = _family(sample.metric)
            _add(family, sample)
        yield from families.values()


def _family(metric: Metric) -> Family:
    match metric.kind:
        case Kind.COUNTER:
            return CounterMetricFamily(metric.name, metric.help, labels=metric.labels)
        case Kind.GAUGE:
            return GaugeMetricFamily(metric.name, metric.help, labels=metric.labels)
        case Kind.HISTOGRAM:
            return HistogramMetricFamily(metric.name, metric.help, labels=metric.labels)


def _add(family: Family, sample: Sample) -> None:
    if isinstance(family, HistogramMetricFamily):
        assert isinstance(sample.value, Buckets)
        running, buckets = 0, []
        for bound, count in zip((*sample.value.bounds, float("inf")), sample.value.counts, strict=True):
            running += count
            buckets.append(("+Inf" if bound == float("inf") else repr(float(bound)), running))
        family.add_metric(sample.labels, buckets=buckets, sum_value=sample.value.total)
    else:
        assert not isinstance(sample.value, Buckets)
        family.add_metric(sample.labels, sample.value)


class MetricsEndpoint:
    """Serves a registry over HTTP from a thread of its own until `close`.

    port 0: any free one. Errors: MachineError where it cannot listen, one line that names the address.
    """

    def __init__(self, registry: CollectorRegistry, port: int, address: str = "127.0.0.1") -> None:
        try:
            self._server, self._thread = start_http_server(port, address, registry)
        except (OSError, OverflowError) as error:
            why = getattr(error, "strerror", None) or error
            raise MachineError(
                f"metrics at {address}:{port}: {why}; choose another port (0: any free one) or address"
            ) from None
        self._server.RequestHandlerClass = _patient(self._server.RequestHandlerClass)
        host = f"[{address}]" if ":" in address else address
        self.url = f"http://{host}:{self._server.server_port}/metrics"

    def close(self) -> None:
        """Stop listening. Safe to repeat."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join(CLIENT_TIMEOUT_S)


def _patient(handler: Any) -> Any:
    """The handler, which hangs up on a client that does not get to the point."""
    return type("MetricsHandler", (handler,), {"timeout": CLIENT_TIMEOUT_S})
