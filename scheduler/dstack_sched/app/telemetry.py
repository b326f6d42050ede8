"""What the controller counts about itself goes through ports.Metrics; here is the one that keeps nothing."""

from __future__ import annotations

from collections.abc import Mapping

from dstack_sched.domain.metrics import Metric


class NoMetrics:
    """ports.Metrics that keeps nothing: for `run` without an endpoint, and for tests that do not look."""

    def count(self, metric: Metric, by: float = 1.0, **labels: str) -> None: ...
    def set(self, metric: Metric, value: float, **labels: str) -> None: ...
    def observe(self, metric: Metric, value: float, **labels: str) -> None: ...
    def replace(self, metric: Metric, values: Mapping[tuple[str, ...], float]) -> None: ...
