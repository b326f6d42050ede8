"""The ideal bounds: no schedule of their kind may do better, and by enumeration they are exact."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from scipy.optimize import linprog

from dstack_sched.domain.workload import ModelDemand
from dstack_sched.policy.bounds import ideal_corun, ideal_isolated
from dstack_sched.policy.interference import NO_INTERFERENCE, Interference, fit_interference
from fakes.surfaces import h100_coruns, h100_surfaces, h100_totals, random_surface

PERCENTS = (20.0, 40.0, 60.0, 80.0, 100.0)


def _case(seed: int, models: int, largest_batch: int = 32):
    rng = np.random.default_rng(seed)
    surfaces = {f"m{i}": random_surface(rng, f"m{i}", largest_batch=largest_batch) for i in range(models)}
    demands = [
        ModelDemand(
            name,
            float(rng.uniform(0.9, 6.0)) * float(surface.latency_ms(100, 1)) if rng.random() > 0.1 else None,
            float(10 ** rng.uniform(0.5, 3.5)),
        )
        for name, surface in surfaces.items()
    ]
    return rng, surfaces, demands, Interference({}, float(rng.uniform(0, 1)), float(rng.uniform(1, 2)))


def _points(surface):
    return [p for p in PERCENTS if p >= surface.min_percent - 1e-9]


def _configurations(surfaces, demands, interference, capacity):
    """Every set of at most one (p, b) a model within the capacity: its served rates. By hand, in Python."""
    columns = []
    per_model = [
        [None, *itertools.product(_points(surfaces[d.name]), range(1, surfaces[d.name].max_batch + 1))]
        for d in demands
    ]
    for choice in itertools.product(*per_model):
        promise = sum(c[0] for c in choice if c)
        if promise > capacity + 1e-9:
            continue
        served = []
        for d, c in zip(demands, choice, strict=True):
            if c is None:
                served.append(0.0)
                continue
            ms = float(surfaces[d.name].latency_ms(*c)) * float(interference.slowdown(d.name, promise - c[0]))
            served.append(1000.0 * c[1] / ms if d.slo_ms is None or ms <= d.slo_ms else 0.0)
        columns.append(served)
    return np.array(columns).T


def _lp(columns, offered):
    """Best goodput and best common factor over time fractions of the enumerated configurations."""
    models, n = columns.shape
    goodput = linprog(
        np.concatenate([np.zeros(n), -np.ones(models)]),
        A_ub=np.block([[-columns, np.eye(models)], [np.ones((1, n)), np.zeros((1, models))]]),
        b_ub=np.append(np.zeros(models), 1.0),
        bounds=[(0, None)] * n + [(0, x) for x in offered],
    )
    peak = linprog(
        np.append(np.zeros(n), -1.0),
        A_ub=np.block([[-columns, offered[:, None]], [np.ones((1, n)), np.zeros((1, 1))]]),
        b_ub=np.append(np.zeros(models), 1.0),
    )
    return -goodput.fun, -peak.fun


def test_column_generation_equals_the_program_over_all_configurations():
    """Guards pricing and duals: the bound is the optimum of the full LP, to its stated gap, from above."""
    for seed in range(50):
        models, largest_batch = (3, 2) if seed % 5 == 0 else (2, 6)
        _, surfaces, demands, interference = _case(seed, models, largest_batch)
        capacity = 100.0 * (1 + seed % 3 / 2)
        columns = _configurations(surfaces, demands, interference, capacity)
        total, peak = _lp(columns, np.array([d.rate_per_s for d in demands]))
        found = ideal_corun(
            surfaces, demands, interference, capacity / 100, percents=PERCENTS, unit_percent=20.0
        )
        assert found.goodput_per_s == pytest.approx(total, rel=1e-5, abs=1e-6), f"seed {seed}"
        assert found.goodput_per_s >= total * (1 - 1e-9)
        assert found.peak_scale == pytest.approx(peak, rel=1e-5, abs=1e-9), f"seed {seed}"


def test_no_enumerated_schedule_beats_either_bound():
    """500 seeded schedules: random time fractions of random configurations within the capacity, in whole
    percents as the bounds are. Goodput counts no more than was offered."""
    for seed in range(500):
        rng, surfaces, demands, interference = _case(seed, int(np.random.default_rng(seed).integers(1, 4)))
        capacity = float(rng.choice([100.0, 200.0]))
        fractions = rng.dirichlet(np.ones(4))
        with_others, alone = np.zeros(len(demands)), np.zeros(len(demands))
        for fraction in fractions:
            left, picked = capacity, []
            for i in rng.permutation(len(demands)):
                surface = surfaces[demands[i].name]
                least = int(np.ceil(surface.min_percent))
                if left < least or rng.random() < 0.2:
                    continue
                p = int(rng.integers(least, min(100, int(left)) + 1))
                picked.append((i, p, int(rng.integers(1, surface.max_batch + 1))))
                left -= p
            promise = sum(p for _, p, _ in picked)
            for i, p, b in picked:
                d = demands[i]
                f = float(surfaces[d.name].latency_ms(p, b))
                slowed = f * float(interference.slowdown(d.name, promise - p))
                for served, ms in ((alone, f), (with_others, slowed)):
                    if d.slo_ms is None or ms <= d.slo_ms:
                        served[i] += fraction * 1000.0 * b / ms
        offered = np.array([d.rate_per_s for d in demands])
        isolated = ideal_isolated(surfaces, demands, capacity)
        assert np.minimum(alone, offered).sum() <= isolated.goodput_per_s * (1 + 1e-6) + 1e-9
        assert (alone / offered).min() <= isolated.peak_scale * (1 + 1e-6) + 1e-9
        if seed % 10 == 0:  # column generation in whole percents takes longer
            corun = ideal_corun(surfaces, demands, interference, capacity / 100)
            assert np.minimum(with_others, offered).sum() <= corun.goodput_per_s * (1 + 1e-6) + 1e-9
            assert (with_others / offered).min() <= corun.peak_scale * (1 + 1e-6) + 1e-9
            assert corun.goodput_per_s <= isolated.goodput_per_s * (1 + 1e-5)


def test_without_interference_co_running_is_as_good_as_isolated_time_fractions():
    """One model, or room for all: then both programs describe the same schedules."""
    for seed in range(20):
        _, surfaces, demands, _ = _case(seed, 1)
        isolated = ideal_isolated(surfaces, demands, 100.0)
        corun = ideal_corun(surfaces, demands, NO_INTERFERENCE)
        assert corun.goodput_per_s == pytest.approx(isolated.goodput_per_s, rel=1e-5, abs=1e-9)
        assert corun.peak_scale == pytest.approx(isolated.peak_scale, rel=1e-5, abs=1e-9)


def test_isolated_bound_of_one_model_is_its_best_point():
    surface = h100_surfaces()["resnet50"]
    best = max(1000 * b / float(surface.latency_ms(100, b)) for b in range(1, 17))
    found = ideal_isolated({"resnet50": surface}, [ModelDemand("resnet50", 50.0, 1e5)], 100.0)
    assert found.goodput_per_s == pytest.approx(best)
    assert found.served_per_s == {"resnet50": pytest.approx(best)}
    assert found.peak_scale == pytest.approx(best / 1e5)
    twice = ideal_isolated({"resnet50": surface}, [ModelDemand("resnet50", 50.0, 1e5)], 100.0, gpus=2)
    assert twice.goodput_per_s == pytest.approx(2 * best)


def test_interference_takes_its_share_on_the_h100():
    """DESIGN: interference alone takes about a third of the isolated bound."""
    surfaces = h100_surfaces()
    interference = fit_interference(surfaces, h100_coruns(), h100_totals((16,)))
    demands = [ModelDemand(name, 100.0, 1500.0) for name in surfaces]
    isolated = ideal_isolated(surfaces, demands, 200.0)
    corun = ideal_corun(surfaces, demands, interference, 2.0)
    assert 0.4 < corun.peak_scale / isolated.peak_scale < 0.8
    # The best co-run that was measured (50% each, batch 16) reached 5914/s in a mix of its own rates.
    assert sum(d.rate_per_s for d in demands) * corun.peak_scale > 0.8 * 5914


def test_demands_that_cannot_be_served():
    surface = h100_surfaces()["vgg19"]
    surfaces = {"vgg19": surface, "resnet50": h100_surfaces()["resnet50"]}
    demands = [ModelDemand("vgg19", 1.0, 10.0), ModelDemand("resnet50", 50.0, 10.0)]
    for found in (
        ideal_isolated(surfaces, demands, 100.0),
        ideal_corun(surfaces, demands, NO_INTERFERENCE),
    ):
        assert found.peak_scale == 0.0
        assert found.served_per_s["vgg19"] == 0.0
        assert found.goodput_per_s == pytest.approx(10.0, rel=1e-5)
    silent = [ModelDemand("resnet50", 50.0, 0.0)]
    assert ideal_isolated(surfaces, silent, 100.0).goodput_per_s == 0.0
    assert ideal_corun(surfaces, silent, NO_INTERFERENCE).peak_scale == float("inf")


def test_more_instances_of_a_model_can_only_help():
    surfaces = {"resnet50": h100_surfaces()["resnet50"]}
    demands = [ModelDemand("resnet50", 50.0, 1e5)]
    one = ideal_corun(surfaces, demands, Interference({}, 0.3, 1.5), 2.0, unit_percent=10.0,
                      percents=[float(p) for p in range(10, 101, 10)])  # fmt: skip
    two = ideal_corun(surfaces, demands, Interference({}, 0.3, 1.5), 2.0, unit_percent=10.0, instances=2,
                      percents=[float(p) for p in range(10, 101, 10)])  # fmt: skip
    assert two.goodput_per_s > one.goodput_per_s * 1.05
