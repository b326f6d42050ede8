"""The order that latencies must keep, and who yields to whom."""

from __future__ import annotations

import pytest

from dstack_sched.domain.order import non_monotone, ordered_by_trust
from dstack_sched.domain.profile import ProfilePoint


def point(p: float, b: int, ms: float) -> ProfilePoint:
    return ProfilePoint(p, b, ms, 1.1 * ms, 10)


def test_a_single_measurement_yields_to_one_that_was_repeated() -> None:
    sure, slow, fast = point(20, 2, 2.28), point(30, 2, 2.50), point(10, 2, 2.10)
    times = {(20, 2): 5, (30, 2): 1, (10, 2): 1}
    found = ordered_by_trust([slow, sure, fast], times)
    assert [(p.gpu_percent, p.latency_ms_p50) for p in found] == [(30, 2.28), (20, 2.28), (10, 2.28)]
    assert found[1] == sure
    assert found[0].latency_ms_p99 == pytest.approx(1.1 * 2.28)
    assert non_monotone(found, tolerance=0.0) == []


def test_equals_and_those_in_order_stay_as_they_are() -> None:
    points = [point(20, 1, 1.0), point(30, 1, 1.1), point(20, 2, 1.5), point(40, 4, 1.4)]
    assert ordered_by_trust(points, dict.fromkeys([(20, 1), (30, 1), (20, 2), (40, 4)], 2)) == tuple(points)
    times = {(20, 1): 5, (30, 1): 5, (20, 2): 1, (40, 4): 1}
    assert ordered_by_trust(points, times) == tuple(points), "equals are left to the repair of the surface"


def test_between_two_sure_points_that_contradict_the_slower_one_counts() -> None:
    """Pessimistic, and no crash: the interval that the sure ones leave is empty."""
    points = [point(20, 4, 1.0), point(60, 1, 1.3), point(40, 2, 1.1)]
    found = ordered_by_trust(points, {(20, 4): 5, (60, 1): 5, (40, 2): 1})
    assert found[2].latency_ms_p50 == 1.3
