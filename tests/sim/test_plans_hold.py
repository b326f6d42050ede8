"""Plans in the simulator: what a feasible plan promises, the engine keeps, and no run beats the bounds."""

from __future__ import annotations

import numpy as np
import pytest

from dstack_sched.app.planning import PlanOptions, make_plan
from dstack_sched.domain.profile import Device, ModelProfile, ProfilePoint, ProfileSet
from dstack_sched.domain.workload import ModelDemand, Workload
from dstack_sched.sim.study import bounds_of, make_case, result_of
from fakes.surfaces import h100_coruns, h100_raw

RATES_PER_S = {"resnet50": 500.0, "mobilenet_v2": 300.0, "vgg19": 200.0, "bert": 300.0}


def h100_profiles() -> ProfileSet:
    raw = h100_raw()
    models = {
        name: ModelProfile(name, "0" * 64, 2**30, tuple(ProfilePoint(**x) for x in body["points"]))
        for name, body in raw["models"].items()
    }
    return ProfileSet(Device(**raw["gpu"]), models, tuple(h100_coruns()))


@pytest.mark.parametrize("seed", range(6))
def test_a_feasible_plan_keeps_its_slos_under_poisson_arrivals(seed):
    """Guards the wait bound and the interference in the plan: random SLOs, rates up to 90% of the headroom,
    by either goal; every model must reach its attainment on the simulated GPU."""
    rng = np.random.default_rng(seed)
    profiles = h100_profiles()
    options = PlanOptions(maximize_headroom=bool(seed % 2))
    slos = {name: float(rng.uniform(35.0, 120.0)) for name in RATES_PER_S}
    rates = {name: rate * float(rng.uniform(0.5, 2.0)) for name, rate in RATES_PER_S.items()}

    def workload(scale: float) -> Workload:
        return Workload(tuple(ModelDemand(n, slos[n], rates[n] * scale) for n in RATES_PER_S))

    room = make_plan(profiles, workload(0.1), options).headroom * 0.1
    wanted = workload(0.9 * room)
    plan = make_plan(profiles, wanted, options)
    assert plan.feasible
    case = make_case(profiles, wanted, plan=plan)
    found = result_of(case, "dstack", 3.0, seed)
    for name, model in found.models.items():
        assert model.slo_attainment >= wanted.attainment, f"{name}: {model}"
    bounds = bounds_of(case)
    offered = sum(d.rate_per_s for d in wanted.models)
    # Poisson arrivals of three seconds may exceed the mean rate by a little; the bound is on the mean.
    assert found.total_goodput_per_s <= min(bounds.corun.goodput_per_s, bounds.isolated.goodput_per_s) * 1.05
    assert bounds.corun.goodput_per_s <= offered * (1 + 1e-6)
