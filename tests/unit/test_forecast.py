"""The rate to plan for: quick after a change, calm without one, with room for bursts."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dstack_sched.app.forecast import MIN_STEPS, ForecastSettings, History, dispersion, forecast

SETTINGS = ForecastSettings()


def poisson(rate: float, seconds: int, seed: int = 1) -> list[tuple[float, float]]:
    return [(1.0, float(n)) for n in np.random.default_rng(seed).poisson(rate, seconds)]


def test_nothing_is_known_at_first() -> None:
    assert forecast([(1.0, 5.0)] * (MIN_STEPS - 1), SETTINGS) is None
    assert forecast([(1.0, 5.0)] * MIN_STEPS, SETTINGS) is not None


@pytest.mark.parametrize("rate", [3.0, 30.0, 300.0])
def test_steady_rates_are_averaged_over_the_whole_window(rate: float) -> None:
    """Guards against chasing noise: a Poisson stream has no changes."""
    wide = [forecast(poisson(rate, 60, seed), SETTINGS) for seed in range(20)]
    assert sum(each is not None and each.window_s >= 50 for each in wide) >= 17
    means = [each.mean_per_s for each in wide if each]
    assert np.mean(means) == pytest.approx(rate, rel=0.1)


@pytest.mark.parametrize(("before", "after"), [(20.0, 80.0), (80.0, 20.0), (100.0, 0.0), (0.0, 50.0)])
def test_a_jump_is_followed_within_three_seconds(before: float, after: float) -> None:
    """Guards against the lag of a fixed window, which takes its own length to follow."""
    found = []
    for seed in range(11):
        each = forecast([*poisson(before, 60, seed), *poisson(after, 3, 100 + seed)], SETTINGS)
        assert each is not None
        assert each.window_s <= 6
        found.append(each.mean_per_s)
    assert np.median(found) == pytest.approx(after, rel=0.25, abs=3)


def test_bursts_get_room_and_the_more_of_them_the_more() -> None:
    rng = np.random.default_rng(5)
    bursty = [(1.0, float(n)) for n in rng.poisson(40.0 * rng.gamma(2.0, 0.5, 60))]
    calm, wild = forecast(poisson(40.0, 60), SETTINGS), forecast(bursty, SETTINGS)
    assert calm is not None and wild is not None
    assert wild.dispersion > 4 * calm.dispersion
    assert wild.rate_per_s - wild.mean_per_s > 1.5 * (calm.rate_per_s - calm.mean_per_s)
    assert calm.rate_per_s > calm.mean_per_s


def test_rows_that_come_four_at_a_time_are_no_change() -> None:
    """Guards against taking batched requests for changes of the rate: their counts vary more."""
    rng = np.random.default_rng(7)
    wide = [
        forecast([(1.0, 4.0 * n) for n in rng.poisson(10.0, 60)], SETTINGS) for _ in range(20)
    ]  # fmt: skip
    assert sum(each is not None and each.window_s >= 40 for each in wide) >= 16


def test_the_index_of_dispersion_is_one_for_poisson_and_leaves_a_trend_out() -> None:
    seconds = np.ones(400)
    flat = np.random.default_rng(2).poisson(50.0, 400).astype(float)
    assert dispersion(seconds, flat) == pytest.approx(1.0, abs=0.3)
    rising = np.random.default_rng(2).poisson(np.linspace(10, 90, 400)).astype(float)
    assert dispersion(seconds, rising) < 2.0
    assert dispersion(seconds, np.zeros(400)) == 1.0


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.floats(0.1, 10.0), st.floats(0, 1e4)), min_size=3, max_size=90))
def test_any_history_gives_a_sane_forecast(steps: list[tuple[float, float]]) -> None:
    found = forecast(steps, SETTINGS)
    assert found is not None
    assert 0 <= found.mean_per_s <= found.rate_per_s < float("inf")
    assert found.noise_per_s > 0
    assert 0 < found.window_s <= sum(seconds for seconds, _ in steps) + 1e-9


def test_the_history_is_bounded_by_the_window() -> None:
    history = History(20.0)
    for second in range(1000):
        history.add(1.0, float(second))
    found = history.forecast(SETTINGS)
    assert found is not None
    assert found.window_s <= 21
    assert found.mean_per_s > 970
