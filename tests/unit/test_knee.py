"""The knee: smallest GPU% beyond which ten more points cut latency by less than a fraction."""

from __future__ import annotations

import numpy as np
import pytest

from dstack_sched.policy.knee import knee_of_curve, knee_percent
from dstack_sched.policy.latency import LatencySurface, Posynomial
from fakes.surfaces import h100_surfaces, points, random_surface


def test_knee_is_the_definition_looked_up_by_hand():
    for seed in range(60):
        surface = random_surface(np.random.default_rng(seed), noise=0.1 if seed % 2 else 0.0)
        b = surface.max_batch
        steps = [*np.arange(surface.min_percent, 91.0), 90.0]
        steps = [p for p in sorted(set(steps)) if p >= surface.min_percent]
        gains = [1 - float(surface.latency_ms(p + 10, b)) / float(surface.latency_ms(p, b)) for p in steps]
        expected = 100.0
        for i in range(len(steps) - 1, -1, -1):
            if gains[i] >= 0.05:
                break
            expected = steps[i]
        assert knee_percent(surface, b) == pytest.approx(expected)


def test_a_curve_that_never_flattens_has_its_knee_at_100():
    assert knee_of_curve(lambda p: 100.0 / np.asarray(p), lowest_percent=5) == 100.0


def test_a_flat_curve_has_its_knee_at_the_smallest_measured_gpu_percent():
    assert knee_of_curve(lambda p: np.full(np.shape(p), 3.0), lowest_percent=12.5) == 12.5


def test_a_late_step_counts_even_after_a_flat_stretch():
    """Guards 'beyond which': flat at 20..60 and faster again at 70 is not flat beyond 20."""
    curve = lambda p: np.where(np.asarray(p) < 70, 10.0, 5.0)  # noqa: E731
    assert knee_of_curve(curve, lowest_percent=20) == pytest.approx(70.0)


def test_one_batch_of_resnet50_needs_less_than_sixteen():
    surface = h100_surfaces()["resnet50"]
    assert knee_percent(surface, 1) < knee_percent(surface, 16)


def test_a_larger_fraction_moves_the_knee_down_and_runnable_values_round_it_up():
    surface = LatencySurface("m", points(Posynomial((1.0, 0.1, 40.0, 4.0)), (10, 50, 100), (1, 8)))
    assert knee_percent(surface, 8, fraction=0.2) < knee_percent(surface, 8, fraction=0.05)
    knee = knee_percent(surface, 8, fraction=0.1)
    assert knee_percent(surface, 8, fraction=0.1, percents=(25.0, 50.0, 75.0, 100.0)) == min(
        p for p in (25.0, 50.0, 75.0, 100.0) if p >= knee
    )


def test_only_the_whole_device_measured():
    surface = LatencySurface("m", points(Posynomial((1.0, 0.1, 40.0, 4.0)), (100,), (1, 8)))
    assert knee_percent(surface, 8) == 100.0
