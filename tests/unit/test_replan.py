"""Which plan is worth its loads."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import pytest

from dstack_sched.app.changes import Reach, loaded
from dstack_sched.app.forecast import Forecast
from dstack_sched.app.replan import (
    ReplanSettings,
    choose,
    expected_loss,
    moved,
    rates_to_plan,
    settled,
    with_reserve,
)
from dstack_sched.domain.plan import Plan
from dstack_sched.domain.workload import ModelDemand, Workload
from fakes.controller import row

SETTINGS = ReplanSettings()
REACH = Reach(arbiter=True)


def told(rate: float, mean: float | None = None, noise: float = 0.1, window_s: float = 30.0) -> Forecast:
    return Forecast(rate, rate if mean is None else mean, 1.0, window_s, noise)


# -- when -------------------------------------------------------------------------------------------------


def test_a_forecast_within_band_or_noise_is_no_reason() -> None:
    planned = {"a": 100.0}
    assert moved(planned, {"a": told(109.0)}, SETTINGS) is None
    assert moved(planned, {"a": told(130.0, noise=20.0)}, SETTINGS) is None
    assert moved(planned, {"b": told(500.0)}, SETTINGS) is None, "b is not in the plan"
    reason = moved({"a": 100.0, "b": 10.0}, {"a": told(120.0), "b": told(40.0)}, SETTINGS)
    assert reason is not None and reason.startswith("b: 40/s forecast") and "10/s planned for" in reason
    assert moved({"a": 0.0}, {"a": told(0.0)}, SETTINGS) is None


def test_demand_follows_the_forecasts_with_a_floor_and_a_reserve() -> None:
    stated = Workload((ModelDemand("a", 50.0, 20.0), ModelDemand("b", 80.0, 5.0), ModelDemand("c", 9.0, 7.0)))
    now = rates_to_plan(stated, {"a": told(46.0), "b": told(0.0)}, SETTINGS)
    assert [m.rate_per_s for m in now.models] == pytest.approx([46.0, 0.5, 7.0])
    asked = with_reserve(now, SETTINGS)
    assert [m.rate_per_s for m in asked.models] == pytest.approx([46 / 0.9, 0.5 / 0.9, 7 / 0.9])


def test_loads_wait_until_every_rate_has_settled() -> None:
    assert settled({"a": told(5.0), "b": told(5.0)}, SETTINGS)
    assert not settled({"a": told(5.0), "b": told(5.0, window_s=1.0)}, SETTINGS)


# -- what it is worth ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("headroom", [0.5, 0.9, 1.0, 1.1, 1.3])
def test_the_expected_loss_is_that_of_a_capacity_known_within_an_error(headroom: float) -> None:
    draws = np.exp(0.15 * np.random.default_rng(1).standard_normal(400_000))
    assert expected_loss(headroom, 0.15) == pytest.approx(
        np.maximum(1 - headroom * draws, 0).mean(), abs=1e-3
    )


def test_the_expected_loss_at_the_ends() -> None:
    assert expected_loss(0.0, 0.15) == 1.0
    assert expected_loss(math.inf, 0.15) == 0.0
    assert 0 <= expected_loss(5.0, 0.15) < 1e-9


# -- which ------------------------------------------------------------------------------------------------


class Deployment:
    """Shares in force, and plans whose headroom a test states by the shares they end up with."""

    def __init__(
        self, in_force: dict[str, float], best: dict[str, float], headrooms: dict[tuple, float]
    ) -> None:
        self.in_force = in_force
        self.best = best
        self.headrooms = headrooms
        self.planned: list[dict] = []

    def make(self, held: Mapping[str, tuple[float, int]]) -> Plan:
        self.planned.append(dict(held))
        shares = {**self.best, **{model: percent for model, (percent, _) in held.items()}}
        headroom = self.headrooms[tuple(shares[name] for name in sorted(shares))]
        rows = {name: row(percent) for name, percent in shares.items()}
        return Plan(100.0, ("H100",), rows, headroom >= 1, (), headroom)

    def stated(self, plan: Plan) -> Plan:
        rows = {
            m: replace(r, gpu_percent=self.in_force[m]) for m, r in plan.models.items() if m in self.in_force
        }
        return replace(plan, models=rows)

    def choose(self, rows_per_s: float = 100.0, took_s: Mapping[str, float] | None = None):
        return choose(self.make, self.stated, REACH, rows_per_s, took_s or {}, SETTINGS)


def test_a_load_for_a_little_headroom_is_not_done() -> None:
    world = Deployment({"a": 40.0}, {"a": 60.0}, {(60.0,): 1.6, (40.0,): 1.4})
    chosen = world.choose()
    assert loaded(chosen.found) == ()
    assert "no load is worth what it would gain" in chosen.why


def test_a_load_that_saves_an_overload_is_done_and_explained() -> None:
    world = Deployment({"a": 40.0}, {"a": 60.0}, {(60.0,): 1.3, (40.0,): 0.8})
    chosen = world.choose()
    assert loaded(chosen.found) == ("a",)
    assert "would miss without it" in chosen.why
    assert chosen.lost < 0.01


def test_the_same_gain_is_not_worth_a_load_that_takes_a_minute() -> None:
    world = Deployment({"a": 40.0}, {"a": 60.0}, {(60.0,): 1.3, (40.0,): 1.0})
    assert loaded(world.choose(took_s={"a": 2.0}).found) == ("a",)
    assert loaded(world.choose(took_s={"a": 60.0}).found) == ()


def test_only_the_models_that_must_are_loaded() -> None:
    """Guards against three loads where one brings nearly all of the gain."""
    world = Deployment(
        {"a": 40.0, "b": 30.0},
        {"a": 60.0, "b": 35.0},
        {(60.0, 35.0): 1.32, (40.0, 30.0): 0.7, (40.0, 35.0): 0.7, (60.0, 30.0): 1.3},
    )
    chosen = world.choose()
    assert loaded(chosen.found) == ("a",)
    assert "b can stay as it is" in chosen.why


def test_a_model_without_a_plan_is_loaded_whatever_it_costs() -> None:
    world = Deployment({}, {"a": 60.0}, {(60.0,): 5.0})
    assert loaded(world.choose().found) == ("a",)
    assert world.planned == [{}]


def test_idle_models_lose_nothing_by_staying() -> None:
    world = Deployment({"a": 40.0}, {"a": 60.0}, {(60.0,): math.inf, (40.0,): math.inf})
    assert loaded(world.choose(rows_per_s=0.0).found) == ()
