"""The table of metrics keeps to Prometheus' conventions, and every port of it takes what it lists."""

from __future__ import annotations

import re

import pytest

from dstack_sched.domain import metrics as table
from dstack_sched.domain.metrics import Kind, Metric

BASE_UNITS = {"seconds": "seconds", "bytes": "bytes", "ratio": "ratio", "rows": "rows"}


@pytest.mark.parametrize("metric", table.ALL, ids=lambda metric: metric.name)
def test_names_follow_prometheus(metric: Metric) -> None:
    """A counter without _total, or milliseconds, would break every dashboard's arithmetic."""
    assert re.fullmatch(r"dstack_[a-z][a-z_]*[a-z]", metric.name)
    stem = metric.name.removesuffix("_total")
    assert (stem != metric.name) == (metric.kind is Kind.COUNTER)
    assert not re.search(r"_(ms|us|ns|milliseconds|percent|mb|kb)(_|$)", stem)
    if metric.unit in BASE_UNITS:
        assert stem.endswith("_" + BASE_UNITS[metric.unit])
    assert metric.help and not metric.help.endswith(".")
    assert all(re.fullmatch(r"[a-z]+", label) and label not in ("le", "quantile") for label in metric.labels)
    assert bool(metric.bounds) == (metric.kind is Kind.HISTOGRAM)
    assert list(metric.bounds) == sorted(set(metric.bounds))


def test_each_name_once() -> None:
    names = [metric.name for metric in table.ALL]
    assert len(names) == len(set(names))
