"""What the shares would bring in the world that service has shown: `make perf-service-world`.

    python perf/service_world.py [--report COMPARE.json] [--cells C-4:5,C-7:5]

Profiles are measured model by model, through one session; what a batch takes among others, behind Triton, is
another thing. This fits the simulator's run times to the stage times of a comparison that was measured
(compare.json of perf/h100_compare.py): by network a factor on its profile and the slowdown that co-runners of
100% cause, f' = s f (1 + k q / 100), least squares over the mean run times of the trials in which backends
ran when they liked. In that world it deploys the shares of the profiles, none at all, and those of D-STACK's
plans after each round of learning from service (app/drift.py), and finds the peaks. One-sided on purpose: it
cannot say what D-STACK reaches on the GPU, only what the plan's error costs. Writes service_world.json and
.md.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import numpy as np
from scipy.optimize import nnls

from compare.cells import Cell, names_to, network_of
from compare.planning import LEARN_LOAD, LEARN_ROUNDS, Sum, case_of, learn, plan_at_half, shares_of
from compare.report import table
from dstack_sched.adapters.profile_files import read_profiles
from dstack_sched.app.drift import corrected, corrected_set
from dstack_sched.domain.profile import Correction, ProfileSet
from dstack_sched.policy.interference import Interference, fit_interference
from dstack_sched.policy.latency import LatencySurface
from dstack_sched.sim.study import Case, find_peak, simulate
from report import REPORTS, ROOT, write_report

UNGATED = {"mps-static": "mps-static", "mps-default": "mps-default", "rate-limiter": "triton-rate-limiter"}
RIVALS = ("mps-static", "mps-default")
CELLS = "C-4:5,C-7:5,C-2:5,C-3:5,C-4:3,C-7:3,C-2:3,C-3:3,C-4:12,C-7:12"
FIT_ROUNDS, FIT_SECONDS, STEP = 5, 2.0, 0.7  # STEP: of the way to the new solution, each round
PRIOR = 0.3  # pull of each factor towards 1: decides only what the trials leave open
LEARN_SECONDS = 4.0
PEAK_SECONDS, SEEDS = 4.0, (1, 2, 3)
SAMPLE_US = 200.0


@dataclass(frozen=True, slots=True)
class World:
    """By network: factor on the profile, slowdown by co-runners of 100%. error: root mean square of the log
    of simulated over measured mean run times."""

    factor: Mapping[str, float]
    slowdown: Mapping[str, float]
    error: float = math.nan


@dataclass(frozen=True, slots=True)
class Trial:
    """One measured trial: how it is simulated, and the mean run times, ms, by model."""

    case: Case
    policy: str
    rate_per_s: float
    run_ms: Mapping[str, float]


def main() -> int:
    options = parse_options()
    report = json.loads(options.report.read_text())
    profiles = read_profiles(options.profiles)
    solo = tuple(sorted(report["solo_ms"].items()))
    world = fit_world(trials_of(report, profiles, solo), profiles)
    print(f"run times met within {world.error:.1%} (root mean square)", flush=True)
    asked = [(cell, options.profiles, solo, world) for cell in options.cells]
    with ProcessPoolExecutor(options.workers) as pool:
        rows = []
        for row in pool.map(study, asked):
            rows.append(row)
            print(json.dumps(row), flush=True)
    content = {
        "report": os.path.relpath(options.report, ROOT), "fitted": {
            n: {"factor": round(world.factor[n], 3), "slowdown": round(world.slowdown[n], 3)}
            for n in sorted(world.factor)
        },
        "run_time_error": round(world.error, 4), "cells": rows,
    }  # fmt: skip
    write_report(options.out / "service_world.json", "make perf-service-world", content)
    (options.out / "service_world.md").write_text("\n".join(markdown(content)) + "\n")
    return 0


def trials_of(report: Mapping[str, Any], profiles: ProfileSet, solo: Any) -> list[Trial]:
    """The trials at the peaks, and the nearest ones that missed, of alternatives that ask nobody."""
    found = []
    for result in report["cells"]:
        policy = UNGATED.get(result["policy"])
        if policy is None:
            continue
        case = case_of(profiles, Cell.parse(result["cell"]), solo)
        if policy != "mps-default":
            shares = {model: how[0] for model, how in result["shares"].items()}
            case = replace(case, shares=replace(case.shares, gpu_percent=shares))
        if policy == "triton-rate-limiter":
            case = replace(case, capacity_percent=100.0)
        for trial in (result["at_peak"], result["at_miss"]):
            if trial and trial["figures"].get("stages_ms"):
                run_ms = {m: stages["run"] for m, stages in trial["figures"]["stages_ms"].items()}
                found.append(Trial(case, policy, trial["rate_per_s"], run_ms))
    return found


def fit_world(trials: Sequence[Trial], profiles: ProfileSet) -> World:
    """Simulate the trials, solve for factors and slowdowns at the batches and co-runners that came of it, and
    again: both depend on how long runs take."""
    believed = fit_interference(
        {name: LatencySurface.from_profile(profile) for name, profile in profiles.models.items()},
        profiles.corun,
    )
    factor = dict.fromkeys(profiles.models, 1.0)
    slowdown = {name: believed.k.get(name, believed.default) for name in profiles.models}
    errors: list[float] = []
    for _ in range(FIT_ROUNDS):
        rows: dict[str, list[tuple[float, float, float]]] = {}
        errors = []
        for trial in trials:
            seen_now = observed(trial, World(factor, slowdown), profiles)
            for model, (alone_ms, beside, run_ms) in seen_now.items():
                rows.setdefault(network_of(model), []).append((alone_ms, beside, trial.run_ms[model]))
                errors.append(math.log(run_ms / trial.run_ms[model]))
        for network, seen in rows.items():
            alone_ms, beside, measured_ms = np.array(seen).T
            # measured = s alone + (s k) alone beside, each row relative to what was measured
            system = np.stack([alone_ms, alone_ms * beside], axis=1) / measured_ms[:, None]
            wanted = np.ones(len(measured_ms))
            (s, sk), _ = nnls(np.vstack([system, [PRIOR, 0.0]]), np.append(wanted, PRIOR))
            s = max(s, 0.2)
            factor[network] += STEP * (s - factor[network])
            slowdown[network] += STEP * (sk / s - slowdown[network])
    return World(factor, slowdown, float(np.sqrt(np.mean(np.square(errors)))))


def observed(trial: Trial, world: World, profiles: ProfileSet) -> dict[str, tuple[float, float, float]]:
    """Model -> (mean of the profile's run times of the batches that ran, mean of the co-runners' GPU% / 100
    meanwhile, mean run time), of the trial simulated in that world."""
    case = in_world(trial.case, world, profiles)
    run = simulate(
        case.scaled(trial.rate_per_s / case.total_rate_per_s), trial.policy, FIT_SECONDS, 1, record=True
    )
    assert run.intervals is not None
    held = {b.name: np.zeros(int(run.until_us / SAMPLE_US) + 2) for b in run.backends}
    for each in run.intervals:
        held[each.name][int(each.start_us / SAMPLE_US) : int(each.end_us / SAMPLE_US)] = each.gpu_percent
    total = sum(held.values())
    found = {}
    for name, own in held.items():
        mine = [each for each in run.intervals if each.name == name]
        surface = trial.case.speeds.surfaces[name]
        rows = np.minimum([each.rows for each in mine], surface.max_batch)
        alone_ms = float(np.mean(surface.latency_ms(mine[0].gpu_percent, rows)))
        run_ms = float(np.mean([each.end_us - each.start_us for each in mine])) / 1e3
        found[name] = (alone_ms, float((total - own)[own > 0].mean()) / 100.0, run_ms)
    return found


def in_world(case: Case, world: World, profiles: ProfileSet) -> Case:
    """The case where runs take what service has shown; its engine keeps believing the profiles."""
    scaled = {
        network: LatencySurface.from_profile(
            corrected(profiles.models[network], Correction("", world.factor[network]))
        )
        for network in {network_of(model) for model in case.speeds.surfaces}
    }
    surfaces = {model: scaled[network_of(model)] for model in case.speeds.surfaces}
    slowdown = {model: world.slowdown[network_of(model)] for model in surfaces}
    truth = replace(case.speeds, surfaces=surfaces, interference=Interference(slowdown, 0.0, 1.0))
    return replace(case, speeds=truth, believed=case.believed or case.speeds)


def study(asked: tuple[Cell, Path, Any, World]) -> dict[str, Any]:
    """One cell: peaks of the rivals and of D-STACK by round of learning."""
    cell, path, solo, world = asked
    profiles = read_profiles(path)
    case = in_world(case_of(profiles, cell, solo), world, profiles)
    rivals = {name: peak(case, policy) for name, policy in UNGATED.items() if policy in RIVALS}
    learned: dict[str, Correction] = {}
    rounds: list[dict[str, Any]] = []
    in_force: tuple[tuple[str, float], ...] = ()
    for _ in range(LEARN_ROUNDS + 1):
        known = corrected_set(profiles, learned)
        plan = plan_at_half(known, Sum("plan", path, cell, solo, in_force=in_force))
        if not plan.models:
            break
        in_force = shares_of(plan)
        planned = case_of(known, cell, solo, plan=plan)  # what the plan's maker believes
        deployed = replace(
            case, shares=planned.shares, capacity_percent=planned.capacity_percent, believed=planned.speeds
        )
        found = peak(deployed, "dstack")
        rounds.append({"peak_per_s": found, "gpu_percent": dict(in_force)})
        for network, seen in runs_of(deployed, LEARN_LOAD * max(found, 100.0)).items():
            refit = learn(profiles, network, learned.get(network), seen)
            learned |= {network: refit} if refit is not None else {}
    return {"cell": cell.key, "rivals_per_s": rivals, "dstack": rounds}


def runs_of(case: Case, rate_per_s: float) -> dict[str, Any]:
    """Network -> what the engine has seen of its runs."""
    run = simulate(case.scaled(rate_per_s / case.total_rate_per_s), "dstack", LEARN_SECONDS, 5)
    assert run.engine is not None
    return {network_of(b.spec.demand.name): run.engine.run_times(b.spec.demand.name) for b in run.backends}


def peak(case: Case, policy: str) -> float:
    """Requests/s, mean over the seeds."""
    found = find_peak(case, policy, PEAK_SECONDS, SEEDS, tolerance=0.02)
    return round(found.factor * case.total_rate_per_s, 1)


def markdown(content: Mapping[str, Any]) -> list[str]:
    """The tables."""
    fitted = [
        [name, f"{each['factor']:.2f}", f"{each['slowdown']:.2f}"] for name, each in content["fitted"].items()
    ]
    rows = []
    for each in content["cells"]:
        peaks = [done["peak_per_s"] for done in each["dstack"]]
        rivals = each["rivals_per_s"]
        cells = [f"{p:.0f}" for p in peaks] + ["-"] * (LEARN_ROUNDS + 1 - len(peaks))
        ratio = f"{peaks[-1] / max(rivals.values()):.2f}" if peaks and any(rivals.values()) else "-"
        rows.append([each["cell"], *(f"{rivals[name]:.0f}" for name in RIVALS), *cells, ratio])
    return [
        "# What learning from service is worth, simulated", "",
        f"`make perf-service-world`: run times fitted to the stage times of `{content['report']}`,",
        f"met within {content['run_time_error']:.0%}: by network a factor on the profile and the slowdown by",
        "co-runners of 100%.", "",
        *table(("network", "factor", "slowdown"), fitted), "",
        "Peaks in that world, requests/s: MPS static with the shares of the profiles, MPS default; D-STACK",
        "with the plan of the profiles, and after one and two rounds of learning; the last over the better",
        "rival's.", "",
        *table(("cell", *RIVALS, "D-STACK", "after 1", "after 2", "last / best"), rows),
    ]  # fmt: skip


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--report", type=Path, default=REPORTS / "h100" / "second" / "compare.json")
    parser.add_argument("--profiles", type=Path, default=REPORTS / "h100" / "profiles.json")
    parser.add_argument("--cells", type=names_to(Cell.parse), default=CELLS, help="by comma")
    parser.add_argument("--workers", type=int, default=max(1, len(os.sched_getaffinity(0))))
    parser.add_argument("--out", type=Path, default=REPORTS)
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
