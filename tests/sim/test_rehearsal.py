"""Shares tried in simulation: what is found is better where others look, and what is held stays."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from dstack_sched.adapters.profile_files import read_profiles
from dstack_sched.domain.workload import ModelDemand, Workload
from dstack_sched.sim.rehearsal import BEYOND, GAIN, rehearse
from dstack_sched.sim.study import Case, make_case, result_of

PROFILES = Path(__file__).parents[2] / "perf" / "reports" / "h100" / "profiles.json"
GRID = tuple(float(p) for p in range(10, 101, 10))
DEMANDS = (ModelDemand("resnet50", 12.0, 900.0), ModelDemand("bert_base", 14.0, 600.0))
GRIDS = {"resnet50": GRID, "bert_base": GRID}
SMALL = {"resnet50": 30.0, "bert_base": 20.0}


def case_of(*demands: ModelDemand) -> Case:
    return make_case(read_profiles(PROFILES), Workload(demands))


def test_better_shares_are_found_and_carry_what_is_said_under_arrivals_that_the_search_did_not_see() -> None:
    case = case_of(*DEMANDS)
    found = rehearse(case, [SMALL], GRIDS, trials=25)
    assert found.changed and found.factor >= 1.3 * found.before > 0
    assert found.limit in GRIDS and found.shares.gpu_percent != SMALL
    assert found == rehearse(case, [SMALL], GRIDS, trials=25)

    def keeps(gpu_percent: dict[str, float], capacity: float, seed: int) -> bool:
        shares = replace(found.shares, gpu_percent=gpu_percent)
        deployed = replace(case, shares=shares, capacity_percent=capacity).scaled(0.85 * found.factor)
        return result_of(deployed, "dstack", 3.0, seed).worst_attainment >= case.attainment

    for seed in (1, 2, 3):
        assert keeps(found.shares.gpu_percent, found.capacity_percent, seed)
        assert not keeps(SMALL, 200.0, seed)


def test_what_cannot_be_bettered_stays_as_it_is_and_what_is_held_is_not_moved() -> None:
    case = case_of(*DEMANDS)
    best = rehearse(case, [SMALL], GRIDS, trials=25).shares.gpu_percent
    held = {name: (percent,) for name, percent in best.items()}
    again = rehearse(case, [best], held, trials=12)
    assert again.shares.gpu_percent == best
    half = rehearse(case, [SMALL], {**GRIDS, "bert_base": (20.0,)}, trials=15)
    assert half.shares.gpu_percent["bert_base"] == 20.0


@pytest.mark.parametrize(("slo_ms", "rate_per_s", "factor"), [(0.2, 300.0, 0.0), (500.0, 1.0, BEYOND)])
def test_what_no_share_keeps_and_what_any_share_carries_needs_no_search(
    slo_ms: float, rate_per_s: float, factor: float
) -> None:
    found = rehearse(case_of(ModelDemand("bert_base", slo_ms, rate_per_s)), [SMALL], GRIDS, trials=200)
    assert found.trials < 60 and not found.changed
    assert (found.factor == 0.0) if not factor else (found.factor * GAIN >= factor)
