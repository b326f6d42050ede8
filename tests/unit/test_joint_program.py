"""The joint program against brute force, and what is built on it: scale, fewest GPUs, reasons."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest

from dstack_sched.policy.candidates import Candidate, JointTask, candidates, pareto
from dstack_sched.policy.interference import NO_INTERFERENCE, Interference
from dstack_sched.policy.joint_model import JointModel
from dstack_sched.policy.joint_pack import solve_one_gpu
from dstack_sched.policy.joint_pool import solve_pooled
from dstack_sched.policy.joint_program import (
    JointPlan,
    JointSetting,
    fewest_gpus,
    largest_scale,
    solve_joint,
    why_not,
)
from dstack_sched.policy.joint_rows import Limits
from dstack_sched.policy.runnable import runnable_grid
from fakes.surfaces import GPU, random_surface

INSTANCES = 520
GIB = 2**30
EPS = 1e-7


def gpu_fits(members: list[tuple[JointTask, Candidate]], limits: Limits) -> bool:
    """One GPU's limits, written down again from joint_model's formulas, for one GPU and its members."""
    found = [c for _, c in members]
    capacity = limits.capacity_percent
    if sum(c.demand_percent for c in found) > capacity * (1 + EPS):
        return False
    if sum(task.memory_bytes for task, _ in members) > limits.memory_bytes or len(found) > limits.max_clients:
        return False
    if any(c.alone for c in found):
        return len(found) == 1
    if sum(c.gpu_percent for c in found) <= capacity * (1 + EPS):
        return True
    return any(_slots_fit(found, capacity, slots) for slots in range(1, 30))


def _slots_fit(found: list[Candidate], capacity: float, slots: int) -> bool:
    if any(c.gpu_percent * slots > capacity * (1 + EPS) for c in found):
        return False
    if sum(c.utilization for c in found) > slots * (1 + EPS):
        return False
    for c in found:
        wait = (sum(x.latency_ms for x in found) - c.latency_ms) / slots
        if wait > c.slack_ms + EPS * (1 + wait):
            return False
    return True


def random_instance(seed: int):
    """Up to 4 models, 3 GPUs and 6 candidates a model; every limit binds in some instances."""
    rng = np.random.default_rng(seed)
    models, gpus = int(rng.integers(1, 5)), int(rng.integers(1, 4))
    capacity = float(rng.choice([100.0, 100.0, 150.0, 200.0]))
    limits = Limits(gpus, capacity, 4 * GIB, int(rng.choice([2, 3, 48])))
    surface = random_surface(np.random.default_rng(0))
    tasks, options = [], []
    for m in range(models):
        slo = float(rng.choice([20.0, 40.0, 80.0]))
        best_effort = rng.random() < 0.05
        tasks.append(
            JointTask(
                surface, None if best_effort else slo, 100.0, float(rng.choice([1.0, 1.0, 2.0])),
                int(rng.choice([1, 1, 2, 3]) * GIB), runnable_grid(surface, GPU),
            )
        )  # fmt: skip
        found = []
        for _ in range(int(rng.integers(1, 7 if models < 4 or gpus < 3 else 4))):
            p = float(rng.choice([10, 20, 25, 40, 50, 60, 75, 100]))
            latency = float(rng.uniform(1.0, slo / 2))
            demand = p * float(rng.uniform(0.05, 1.0))
            slack = math.inf if best_effort else float(rng.uniform(0, slo - 2 * latency))
            replicas = int(rng.integers(1, gpus + 1)) if m == 0 and rng.random() < 0.5 else 1
            alone = bool(rng.random() < 0.2)
            if best_effort:
                demand = 0.0
            found.append(Candidate(p, 1 + len(found), replicas, alone, latency, demand / p, demand, slack))
            if replicas > 1:  # the same choice may also run alone, and cheaper, on a GPU of its own
                found.append(
                    Candidate(p, len(found), replicas, True, latency / 2, demand / p / 2, demand / 2, slack)
                )
        options.append(found[:6])
        if all(c.replicas > gpus for c in options[m]):
            options[m] = [Candidate(50.0, 1, 1, False, 2.0, 0.2, 10.0, 5.0)]
    return tasks, options, limits


def placements(items: list[Candidate], gpus: int) -> list[tuple[int, ...]]:
    """Every way to run one model: for each GPU the index of a candidate, or -1."""
    ways = []
    for way in itertools.product(range(-1, len(items)), repeat=gpus):
        used = [items[k] for k in way if k >= 0]
        if (
            used
            and len({(c.gpu_percent, c.batch_size, c.replicas) for c in used}) == 1
            and (len(used) == used[0].replicas)
        ):
            ways.append(way)
    return ways


def cost(task: JointTask, c: Candidate) -> float:
    if math.isinf(c.slack_ms):
        return 1e-6 * c.gpu_percent * c.latency_ms / c.batch_size
    return task.weight * c.demand_percent


def brute_force(tasks, options, limits) -> float | None:
    """Least weighted demand over all placements, depth first, dropping what already costs more than the best
    found; a GPU's limits are checked as it fills (every one of them only gets tighter)."""
    best = [math.inf]
    order = range(len(tasks))
    ways = [placements(options[m], limits.gpus) for m in order]
    costs = [[sum(cost(tasks[m], options[m][k]) for k in way if k >= 0) for way in ways[m]] for m in order]
    members: list[list[tuple[JointTask, Candidate]]] = [[] for _ in range(limits.gpus)]

    def place(m: int, spent: float) -> None:
        if spent >= best[0]:
            return
        if m == len(tasks):
            best[0] = spent
            return
        for i in np.argsort(costs[m]):
            way = ways[m][i]
            for g, k in enumerate(way):
                if k >= 0:
                    members[g].append((tasks[m], options[m][k]))
            if all(gpu_fits(members[g], limits) for g, k in enumerate(way) if k >= 0):
                place(m + 1, spent + costs[m][i])
            for g, k in enumerate(way):
                if k >= 0:
                    members[g].pop()

    place(0, 0.0)
    return None if math.isinf(best[0]) else best[0]


def assert_valid(tasks, options, limits, chosen) -> None:
    """Each model as its candidate wants it, on distinct GPUs, and each GPU within its limits."""
    for m in range(len(tasks)):
        mine = [(options[m][k], g) for i, k, g in chosen if i == m]
        assert mine and len({(c.gpu_percent, c.batch_size, c.replicas) for c, _ in mine}) == 1
        assert len(mine) == mine[0][0].replicas == len({g for _, g in mine})
    for g in range(limits.gpus):
        assert gpu_fits([(tasks[m], options[m][k]) for m, k, gpu in chosen if gpu == g], limits)


def test_equals_brute_force_on_random_instances():
    """520 seeds of up to 4 models, 3 GPUs and 6 candidates, with replicas, lone GPUs and best effort."""
    infeasible = 0
    for seed in range(INSTANCES):
        tasks, options, limits = random_instance(seed)
        expected = brute_force(tasks, options, limits)
        answer = JointModel(tasks, options, limits).solve(gap=0.0, time_limit_s=30)
        if expected is None:
            assert answer.status == "infeasible", f"seed {seed}"
            infeasible += 1
            continue
        assert answer.status == "optimal", f"seed {seed}: {answer}"
        assert answer.value == pytest.approx(expected, rel=1e-6, abs=1e-6), f"seed {seed}"
        assert_valid(tasks, options, limits, answer.chosen)
    assert INSTANCES / 20 < infeasible < INSTANCES / 2


def test_one_gpu_rule_by_rule_equals_brute_force():
    """The quick way for one GPU is as exact as the full program, where all rounds are tried."""
    compared = 0
    for seed in range(2000, 2100):
        tasks, options, limits = random_instance(seed)
        options = [[c for c in items if not c.alone and c.replicas == 1] for items in options]
        limits = replace(limits, gpus=1)
        if not all(options):
            continue
        expected = brute_force(tasks, options, limits)
        answer = solve_one_gpu(tasks, options, limits, gap=1e-9, time_limit_s=10, most_programs=10**6)
        assert answer.bound <= (math.inf if expected is None else expected * (1 + 1e-6) + 1e-6)
        if expected is None:
            assert answer.status == "infeasible", f"seed {seed}"
            continue
        compared += 1
        assert answer.value == pytest.approx(expected, rel=1e-6, abs=1e-6), f"seed {seed}"
        assert_valid(tasks, options, limits, answer.chosen)
    assert compared > 20


def test_pooled_plans_are_valid_and_their_bound_is_one():
    """Pooling may miss the best plan, but never claim a wrong one, nor a bound above the optimum."""
    found, close = 0, 0
    for seed in range(1000, 1120):
        tasks, options, limits = random_instance(seed)
        expected = brute_force(tasks, options, limits)
        answer = solve_pooled(tasks, options, limits, rounds=8, gap=1e-4, time_limit_s=10)
        if expected is None:
            assert not answer.chosen, f"seed {seed}"
            continue
        assert answer.bound <= expected * (1 + 1e-5) + 1e-6, f"seed {seed}"
        if answer.chosen:
            found += 1
            close += answer.value <= expected * 1.1
            assert_valid(tasks, options, limits, answer.chosen)
            assert answer.value >= expected * (1 - 1e-5) - 1e-6
    assert found > 50 and close > 0.75 * found


def _tasks(seed: int, models: int, rate: float, slo=(25.0, 50.0, 100.0), memory_gib: float = 1.0):
    rng = np.random.default_rng(seed)
    found = []
    for i in range(models):
        surface = random_surface(rng, f"m{i}")
        fastest = float(surface.latency_ms(100, 1))
        slo_ms = max(float(rng.choice(slo)), 4 * fastest)
        found.append(
            JointTask(
                surface, slo_ms, rate * float(rng.uniform(0.2, 2.0)), 1.0, int(memory_gib * GIB),
                runnable_grid(surface, GPU, step_percent=5),
            )
        )  # fmt: skip
    return found


def _setting(gpus=1, capacities=(100.0,), interference=NO_INTERFERENCE, **changes) -> JointSetting:
    return JointSetting(gpus, 80 * GIB, interference, capacities, **changes)


def _check(plan: JointPlan, tasks, setting: JointSetting, scale: float = 1.0) -> None:
    """Every GPU of a plan within its limits, its numbers recomputed from the surfaces; no replica overrun."""
    limits = Limits(setting.gpus, plan.capacity_percent, setting.memory_bytes, setting.max_clients)
    for g in range(setting.gpus):
        members = [(x.task, c) for x in plan.placed for gpu, c in x.on if gpu == g]
        assert gpu_fits(members, limits)
    for x in plan.placed:
        for _, c in x.on:
            slowdown = float(
                setting.interference.slowdown(x.task.name, plan.capacity_percent - c.gpu_percent)
            )
            f = float(x.task.surface.latency_ms(c.gpu_percent, c.batch_size)) * (1 if c.alone else slowdown)
            rate = x.task.rate_per_s * scale / len(x.on)
            assert c.latency_ms == pytest.approx(f)
            assert c.utilization == pytest.approx(rate * f / c.batch_size / 1000)
            assert c.demand_percent == pytest.approx(c.gpu_percent * c.utilization)
            assert c.utilization <= 1 + 1e-6
            assembly = 1000 * (c.batch_size - 1) / rate if c.batch_size > 1 else 0.0
            p, b = c.gpu_percent, c.batch_size
            tail = min(float(x.task.surface.p99_ms(p, b) / x.task.surface.latency_ms(p, b)), 1.5)
            assert c.slack_ms == pytest.approx(x.task.slo_ms - tail * f - max(f, assembly), abs=1e-6)
            assert c.slack_ms >= -1e-9


@pytest.mark.parametrize(
    "models,gpus,rate", [(1, 1, 100), (4, 1, 100), (6, 2, 300), (12, 1, 30), (24, 4, 120)]
)
def test_plans_keep_every_limit(models, gpus, rate):
    interference = Interference({}, 0.5, 1.5)
    tasks = _tasks(models, models, rate)
    setting = _setting(gpus, (100.0, 200.0), interference)
    plan = solve_joint(tasks, setting)
    assert plan is not None and plan.gap < 0.5
    _check(plan, tasks, setting)
    assert plan.growth >= 1.0


def test_a_hot_model_gets_replicas():
    """One model that asks more than one GPU can give runs on several, each within its throughput."""
    tasks = _tasks(3, 1, 1.0)
    setting = _setting(3)
    one = largest_scale(tasks, _setting(1)).factor
    plan = solve_joint(tasks, setting, one * 2.2)
    assert plan is not None and len(plan.placed[0].on) == 3
    _check(plan, tasks, setting, one * 2.2)
    assert solve_joint(tasks, _setting(1), one * 1.1) is None


def test_more_is_promised_only_where_needed():
    """100% first; the measured oversubscription when 100% does not fit."""
    tasks = _tasks(5, 4, 50.0)
    setting = _setting(1, (100.0, 200.0), Interference({}, 0.3, 1.5))
    plan = solve_joint(tasks, setting)
    assert plan is not None and plan.capacity_percent == 100.0
    at_100 = largest_scale(tasks, _setting(1, (100.0,), setting.interference)).factor
    at_both = largest_scale(tasks, setting)
    assert at_both.factor > at_100 and at_both.plan is not None and at_both.plan.capacity_percent == 200.0


@pytest.mark.parametrize("seed,models,gpus", [(1, 3, 1), (2, 5, 1), (3, 4, 2), (4, 10, 1)])
def test_the_largest_scale_fits_and_a_larger_one_does_not(seed, models, gpus):
    """Both sides of the answer; found from above (rates that do not fit) as from below."""
    setting = _setting(gpus, (100.0,), Interference({}, 0.4, 1.5))
    tasks = _tasks(seed, models, 60.0)
    scale = largest_scale(tasks, setting, solve_joint(tasks, setting))
    assert scale.plan is not None and scale.limits
    assert solve_joint(tasks, setting, scale.factor * 0.95) is not None
    assert solve_joint(tasks, setting, scale.factor * 1.06) is None
    heavy = [replace(t, rate_per_s=t.rate_per_s * scale.factor * 3) for t in tasks]
    assert solve_joint(heavy, setting) is None
    assert largest_scale(heavy, setting).factor == pytest.approx(1 / 3, rel=0.05)


def test_fewest_gpus_is_the_first_number_that_fits():
    tasks = _tasks(7, 8, 40.0)
    one = largest_scale(tasks, _setting(1)).factor
    tasks = [replace(task, rate_per_s=task.rate_per_s * one * 2.3) for task in tasks]
    found = fewest_gpus(tasks, _setting(8))
    assert found is not None
    gpus, plan = found
    assert gpus > 1 and solve_joint(tasks, _setting(gpus - 1)) is None
    _check(plan, tasks, _setting(gpus))
    assert fewest_gpus(tasks, _setting(gpus - 1)) is None


def test_weights_decide_whose_demand_is_spared():
    """Two equal models, room for one to run cheaply: the one of greater weight gets it."""
    surface = random_surface(np.random.default_rng(0))
    cheap, dear = (
        Candidate(20.0, 8, 1, False, 30.0, 0.3, 6.0, 10.0),
        Candidate(60.0, 2, 1, False, 5.0, 0.3, 18.0, 40.0),
    )
    limits = Limits(1, 70.0, GIB, 48)
    for heavy in (0, 1):
        tasks = [
            JointTask(surface, 80.0, 10.0, 5.0 if i == heavy else 1.0, 1, runnable_grid(surface, GPU))
            for i in range(2)
        ]
        answer = JointModel(tasks, [[cheap, dear]] * 2, limits).solve(gap=0.0, time_limit_s=10)
        picked = {m: k for m, k, _ in answer.chosen}
        both_cheap = gpu_fits([(t, cheap) for t in tasks], limits)
        assert both_cheap or picked[heavy] == 0


def test_best_effort_claims_no_capacity_but_gets_a_place():
    tasks = _tasks(9, 3, 100.0)
    idle = random_surface(np.random.default_rng(9), "idle")
    tasks.append(JointTask(idle, None, 1e6, 1.0, GIB, runnable_grid(idle, GPU, step_percent=5)))
    plan = solve_joint(tasks, _setting(1))
    assert plan is not None
    assert plan.placed[3].on[0][1].demand_percent == 0.0


def test_reasons_name_model_and_limit():
    tasks = _tasks(11, 4, 10.0, memory_gib=30.0)
    assert solve_joint(tasks, _setting(1)) is None
    assert largest_scale(tasks, _setting(1)).plan is None
    assert "GPU memory" in why_not(tasks, _setting(1)) and "m0" in why_not(tasks, _setting(1))
    small = _tasks(11, 4, 10.0)
    assert "MPS clients" in why_not(small, _setting(1, max_clients=3))
    tight = [
        replace(t, slo_ms=1.01 * float(t.surface.latency_ms(100, 1) + t.surface.p99_ms(100, 1)))
        for t in small
    ]
    assert "wait" in why_not(tight, _setting(1)) and "SLO" in why_not(tight, _setting(1))


def test_candidates_are_runnable_feasible_and_not_dominated():
    interference = Interference({}, 0.5, 1.5)
    for task in _tasks(12, 6, 200.0):
        items = candidates(task, interference, 100.0, gpus=1, limit=12)
        shared = [c for c in items if not c.alone]
        assert 0 < len(shared) <= 12
        assert pareto(shared) and len(pareto(shared)) == len(shared)
        for c in items:
            assert c.gpu_percent in task.grid.percents and c.batch_size in task.grid.batches
            assert c.slack_ms >= 0 and c.utilization <= 1 + 1e-9
