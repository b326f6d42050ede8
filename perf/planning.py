"""How long planning takes: perf/reports/planning.json.

    make perf-planning      (or: python perf/planning.py [--repeats N] [--out FILE])

Batch program: the geometric program, its rounding and the binding limits, for 200 random models one by one.
Joint program: `make_plan` as the command line runs it (surfaces, candidates, the plan and its largest scale),
and the plan alone; random models with SLOs of 40 to 320 ms, a load of 30% of the GPUs, an
interference model like that of the H100, and capacities of 100 and 200%. How the time grows: over models and
over GPUs. gap: distance of a plan that fits from a proven lower bound on the demand of all plans.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np

from dstack_sched.app.planning import PlanOptions, make_plan
from dstack_sched.domain.profile import (
    CorunMember,
    CorunPoint,
    Device,
    ModelProfile,
    ProfilePoint,
    ProfileSet,
)
from dstack_sched.domain.workload import ModelDemand, Workload
from dstack_sched.policy.batch_program import solve_batch_program
from dstack_sched.policy.candidates import JointTask
from dstack_sched.policy.interference import Interference
from dstack_sched.policy.joint_program import JointSetting, solve_joint
from dstack_sched.policy.latency import LatencySurface, Posynomial
from dstack_sched.policy.runnable import runnable_grid
from report import REPORTS, write_report

DEVICE = Device("NVIDIA H100 80GB HBM3", 132, 85_520_809_984, "580.159.04", "onnxruntime-gpu")
INTERFERENCE = Interference({}, 0.6, 1.5)
PERCENTS, BATCHES = (10, 20, 40, 70, 100), (1, 4, 16, 32)
SLOS_MS = (40.0, 80.0, 160.0, 320.0)
LOAD = 0.3  # demand over 100% of every GPU, before interference
SHAPES = ((5, 1), (10, 1), (20, 1), (40, 1), (20, 2), (50, 4), (100, 4), (100, 8), (200, 8))
TARGETS = {"batch_program_ms_p50": 50.0, "joint_20x1_s": 1.0, "joint_100x8_s": 10.0}
SEED = 20261122


def random_profile(rng: np.random.Generator, name: str) -> ModelProfile:
    """A model of plausible speed, measured without noise at 20 points."""
    shape = Posynomial(tuple(float(x) for x in np.array([0.5, 0.05, 20, 10]) * np.exp(rng.normal(0, 0.6, 4))))
    points = tuple(
        ProfilePoint(float(p), b, float(shape(p, b)), 1.05 * float(shape(p, b)), 40)
        for p in PERCENTS
        for b in BATCHES
    )
    return ModelProfile(name, "0" * 64, 2**30, points)


def instance(models: int, gpus: int, seed: int) -> tuple[ProfileSet, Workload]:
    """Profiles with co-runs, and a workload that asks LOAD of the GPUs."""
    rng = np.random.default_rng(seed)
    profiles = {f"model{i:03d}": random_profile(rng, f"model{i:03d}") for i in range(models)}
    surfaces = {name: LatencySurface.from_profile(profile) for name, profile in profiles.items()}
    rates = {name: float(np.exp(rng.normal(0, 0.7))) for name in profiles}
    demand = sum(rate * 40 * float(surfaces[n].latency_ms(40, 16)) / 16 / 1000 for n, rate in rates.items())
    scale = LOAD * 100 * gpus / demand
    workload = Workload(
        tuple(ModelDemand(name, float(rng.choice(SLOS_MS)), rate * scale) for name, rate in rates.items())
    )
    return ProfileSet(DEVICE, profiles, corun_points(surfaces)), workload


def corun_points(surfaces: dict[str, LatencySurface]) -> tuple[CorunPoint, ...]:
    """Two models side by side at three promises, as INTERFERENCE would have them; throughput best at 200%."""
    pair = list(surfaces)[:2]
    found = []
    for percent, gain in ((50.0, 1.0), (100.0, 1.1), (70.0, 1.02)):
        members = []
        for name in pair:
            ms = float(surfaces[name].latency_ms(percent, 16) * INTERFERENCE.slowdown(name, percent))
            members.append(CorunMember(name, percent, 16, ms, 1000 * gain))
        found.append(CorunPoint(tuple(members)))
    return tuple(found)


def time_batch_program(models: int = 200) -> dict[str, float]:
    """Milliseconds a model, each with its own SLO and rate; the first call compiles and is told apart."""
    rng = np.random.default_rng(SEED)
    times = []
    for i in range(models + 1):
        surface = LatencySurface.from_profile(random_profile(rng, f"m{i}"))
        grid = runnable_grid(surface, DEVICE)
        slo_ms = 3.0 * float(surface.latency_ms(100, 1)) * float(rng.uniform(1, 10))
        start = time.perf_counter()
        solve_batch_program(surface, slo_ms=slo_ms, rate_per_s=float(10 ** rng.uniform(1, 4)), grid=grid)
        times.append(1000 * (time.perf_counter() - start))
    first, rest = times[0], sorted(times[1:])
    return {
        "batch_program_ms_p50": round(statistics.median(rest), 3),
        "batch_program_ms_p99": round(rest[int(0.99 * len(rest))], 3),
        "batch_program_first_ms": round(first, 1),
        "batch_program_models": models,
    }


def time_joint(models: int, gpus: int, repeats: int) -> dict[str, Any]:
    """Medians over seeds: all of make_plan, and the plan alone without its headroom; worst gap."""
    whole, alone, gaps, headrooms = [], [], [], []
    for i in range(repeats):
        profiles, workload = instance(models, gpus, SEED + i)
        start = time.perf_counter()
        plan = make_plan(profiles, workload, PlanOptions(gpus=gpus))
        whole.append(time.perf_counter() - start)
        headrooms.append(plan.headroom)
        if plan.feasible:  # else it is the plan of a smaller workload, which nothing was proven about
            gaps.append(plan.gap)
        tasks = [
            JointTask(
                LatencySurface.from_profile(profiles.models[d.name]),
                d.slo_ms,
                d.rate_per_s,
                d.weight,
                2**30,
                runnable_grid(LatencySurface.from_profile(profiles.models[d.name]), DEVICE, step_percent=5),
            )
            for d in workload.models
        ]
        setting = JointSetting(gpus, DEVICE.memory_bytes, INTERFERENCE, (100.0, 200.0))
        start = time.perf_counter()
        solve_joint(tasks, setting)
        alone.append(time.perf_counter() - start)
    return {
        "models": models,
        "gpus": gpus,
        "plan_s": round(statistics.median(whole), 3),
        "plan_s_max": round(max(whole), 3),
        "without_headroom_s": round(statistics.median(alone), 3),
        "gap_max": round(max(gaps), 4) if gaps else None,
        "feasible": len(gaps),
        "headroom_median": round(statistics.median(headrooms), 3),
        "repeats": repeats,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=3, help="instances of each size")
    parser.add_argument("--out", type=Path, default=REPORTS / "planning.json")
    arguments = parser.parse_args()
    figures: dict[str, Any] = time_batch_program()
    print(f"batch program: {figures['batch_program_ms_p50']} ms a model (median)", flush=True)
    scaling = []
    for models, gpus in SHAPES:
        row = time_joint(models, gpus, arguments.repeats)
        scaling.append(row)
        print(
            f"{models:4d} models on {gpus} GPU(s): {row['plan_s']:6.2f} s with its headroom, "
            f"{row['without_headroom_s']:6.2f} s without; {row['feasible']} of {row['repeats']} fit"
            + (f", gap at most {100 * row['gap_max']:.1f}%" if row["feasible"] else ""),
            flush=True,
        )
    by_shape = {(row["models"], row["gpus"]): row for row in scaling}
    figures["joint_20x1_s"] = by_shape[(20, 1)]["plan_s"]
    figures["joint_100x8_s"] = by_shape[(100, 8)]["plan_s"]
    figures["targets"] = TARGETS
    figures["met"] = {name: figures[name] < target for name, target in TARGETS.items()}
    figures["scaling"] = scaling
    figures["load"] = LOAD
    figures["seed"] = SEED
    print(f"written: {write_report(arguments.out, 'make perf-planning', figures)}")


if __name__ == "__main__":
    main()
