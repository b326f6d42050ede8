"""The interference model: what it recovers, how well it meets the measured H100 co-runs, the capacity."""

from __future__ import annotations

import numpy as np
import pytest

from dstack_sched.domain.profile import CorunMember, CorunPoint
from dstack_sched.policy.interference import (
    NO_INTERFERENCE,
    CorunTotal,
    Interference,
    fit_interference,
    measured_capacity_percent,
)
from fakes.surfaces import h100_coruns, h100_surfaces, h100_totals, random_surface


def _corun(surfaces, true: Interference, members) -> CorunPoint:
    promise = sum(p for _, p, _ in members)
    found = []
    for name, p, b in members:
        ms = float(surfaces[name].latency_ms(p, b)) * float(true.slowdown(name, promise - p))
        found.append(CorunMember(name, p, b, ms, 1000 * b / ms))
    return CorunPoint(tuple(found))


def test_recovers_the_slowdowns_that_made_the_measurements():
    surfaces = {name: random_surface(np.random.default_rng(i), name) for i, name in enumerate("abc")}
    true = Interference({"a": 0.2, "b": 0.9, "c": 0.5}, 0.5, 1.4)
    mixes = [
        [("a", 50.0, 4), ("b", 50.0, 4)],
        [("a", 30.0, 4), ("c", 60.0, 8)],
        [("b", 100.0, 4), ("c", 100.0, 8)],
        [("a", 70.0, 4), ("b", 70.0, 4), ("c", 70.0, 8)],
        [("a", 20.0, 1), ("b", 20.0, 1), ("c", 20.0, 1)],
    ]
    found = fit_interference(surfaces, [_corun(surfaces, true, mix) for mix in mixes])
    assert found.exponent == pytest.approx(1.4, abs=0.1)
    for name, k in true.k.items():
        assert found.k[name] == pytest.approx(k, abs=0.1)
    assert found.after is not None and found.before is not None
    assert found.after.largest < 0.05 < found.before.largest


def test_meets_the_measured_h100_coruns_where_isolated_latency_does_not():
    """The figures of decisions/0021: mean 64% without, below 2% with the model, largest below 5%."""
    found = fit_interference(h100_surfaces(), h100_coruns(), h100_totals((16,)))
    assert found.before is not None and found.before.mean > 0.5
    assert found.after is not None and found.after.mean < 0.02 and found.after.largest < 0.05
    assert 1.2 < found.exponent < 2.0


def test_the_exponent_is_worth_having_on_the_h100(monkeypatch):
    """With the exponent held at 1 (DESIGN's formula) the same data is met about four times worse."""
    free = fit_interference(h100_surfaces(), h100_coruns(), h100_totals((16,)))
    monkeypatch.setattr("dstack_sched.policy.interference._MAX_EXPONENT", 1.0 + 1e-9)
    linear = fit_interference(h100_surfaces(), h100_coruns(), h100_totals((16,)))
    assert free.after is not None and linear.after is not None
    assert linear.exponent == pytest.approx(1.0, abs=1e-6)
    assert linear.after.mean > 3 * free.after.mean


def test_few_coruns_fit_the_proportional_formula_only():
    """One exponent and one slope cannot be told apart from two points."""
    found = fit_interference(h100_surfaces(), h100_coruns()[:1])
    assert found.exponent == 1.0
    assert found.k["resnet50"] == pytest.approx((6.31 / 5.29 - 1) / 0.5, rel=0.05)


def test_slowdown_is_one_alone_and_grows_with_co_runners():
    found = Interference({"a": 0.5}, 0.2, 1.5)
    assert float(found.slowdown("a", 0.0)) == 1.0 == float(found.slowdown("a", -5.0))
    assert (np.diff(found.slowdown("a", np.linspace(0, 300, 50))) > 0).all()
    assert float(found.slowdown("unknown", 100.0)) == pytest.approx(1.2)
    k = found.per_percent("a", 80.0)
    assert 1 + k * 80.0 == pytest.approx(float(found.slowdown("a", 80.0)))
    assert found.per_percent("a", 0.0) == 0.0


def test_nothing_measured_means_none_assumed():
    surfaces = h100_surfaces()
    alone = CorunPoint((CorunMember("resnet50", 50.0, 16, 6.0, 2666.0),))
    other = CorunPoint(tuple(CorunMember("unknown", 50.0, 1, 1.0, 1.0) for _ in range(2)))
    assert fit_interference(surfaces, []) is NO_INTERFERENCE
    assert fit_interference(surfaces, [alone, other]) is NO_INTERFERENCE


def test_the_capacity_is_where_the_measured_throughput_peaks():
    """FACTS: the best promise to all together was about 200 to 280%."""
    assert measured_capacity_percent(h100_coruns(), h100_totals((1, 4, 8, 16))) == 200.0
    assert measured_capacity_percent(h100_coruns()) == 200.0
    assert measured_capacity_percent([]) == 100.0
    assert measured_capacity_percent(h100_coruns()[:1]) == 100.0
    flat = [CorunTotal((("a", p, 1), ("b", p, 1)), 1000.0 + p / 10) for p in (50.0, 75.0, 100.0)]
    assert measured_capacity_percent([], flat) == 100.0  # more promised for a gain of noise is not worth it
