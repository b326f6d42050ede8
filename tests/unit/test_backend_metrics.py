"""Custom metrics: counters become increments, one family a name; a Triton without metrics does no harm."""

from __future__ import annotations

import logging
from typing import Any

import pytest

from dstack_backend.metrics import COUNTERS, GAUGES, LABELLED, Publisher, counter_name
from dstack_backend.stats import STAGES, Stats

LABELS = {"model": "m", "version": "1"}


class FakeMetric:
    def __init__(self) -> None:
        self.value = 0.0

    def increment(self, by: float) -> None:
        assert by >= 0
        self.value += by

    def set(self, value: float) -> None:
        self.value = value


class FakeTriton:
    """Stands for triton_python_backend_utils; a second family of a name is an error, as clients see it."""

    def __init__(self) -> None:
        families: dict[str, Any] = {}
        self.series: dict[tuple[str, tuple], FakeMetric] = {}
        triton = self

        class MetricFamily:
            COUNTER, GAUGE = 0, 1

            def __init__(self, name: str, description: str, kind: int):
                assert name not in families
                assert description
                families[name] = self
                self.name = name

            def Metric(self, labels: dict[str, str]) -> FakeMetric:
                return triton.series.setdefault((self.name, tuple(sorted(labels.items()))), FakeMetric())

        self.MetricFamily = MetricFamily

    def value(self, name: str, **labels: str) -> float:
        return self.series[(name, tuple(sorted({**LABELS, **labels}.items())))].value


def test_counters_follow_the_totals() -> None:
    triton, stats = FakeTriton(), Stats()
    publisher = Publisher(triton, stats, LABELS, lambda: {"gpu_share_ratio": 0.4})
    batches = 0
    for requests, run_us in ((3, 2_000_000), (3, 0), (10, 1_500_000)):
        stats.requests = requests
        if run_us:
            batches += 1
            stats.batch_done(7, {"run": run_us})
            stats.request_done(2 * run_us)
        publisher.publish()
        assert triton.value("dstack_requests_total") == requests
        assert triton.value("dstack_stage_samples_total", stage="run") == batches
        assert triton.value("dstack_batches_by_size_total", up_to_rows="8") == batches
        assert triton.value("dstack_stage_p99_seconds", stage="run") == pytest.approx(run_us / 1e6, rel=0.13)
        assert triton.value("dstack_latency_quantile_seconds", quantile="0.5") == pytest.approx(
            2 * run_us / 1e6, rel=0.13
        )
    assert triton.value("dstack_stage_seconds_total", stage="run") == 3.5
    assert triton.value("dstack_latency_seconds_total") == 7
    assert triton.value("dstack_gpu_share_ratio") == 0.4
    assert triton.value("dstack_gated") == 0


def test_all_that_is_documented_is_published_from_the_start() -> None:
    """A dashboard must see zeros, not gaps."""
    triton = FakeTriton()
    Publisher(triton, Stats(), LABELS, dict).publish()
    names = {name for name, _ in triton.series}
    assert names == {
        *map(counter_name, COUNTERS), *(f"dstack_{name}" for name in GAUGES),
        *(name for name, _, label, _ in LABELLED if label != "up_to_rows"),
    }  # fmt: skip
    assert all(triton.value("dstack_stage_seconds_total", stage=stage) == 0 for stage in STAGES)


def test_without_metrics_in_triton_serving_goes_on(caplog: pytest.LogCaptureFixture) -> None:
    class NoMetrics:
        @property
        def MetricFamily(self) -> Any:
            raise RuntimeError("metrics not supported")

    logging.getLogger("dstack").propagate = True
    publisher = Publisher(NoMetrics(), Stats(), LABELS, dict, period_s=0.001)
    publisher.start()
    publisher.close()
    assert "custom metrics are off: metrics not supported" in caplog.text
