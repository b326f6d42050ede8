"""The simulation study: every policy in every cell -> perf/reports/simulation.json and simulation.md.

    make perf-simulation      (or: python perf/simulation.py [--quick] [--workers N] [--out DIR])

Cells: the mixes of `make perf-h100-compare` (compare/cells.py) on the profiled H100 x SLOs of 3, 5 and 12
times a lone request's latency at the client (batch 1 and what Triton adds, sim.scenario.TRITON_H100, which
every policy pays) x arrivals (steady Poisson, bursty gamma with CV 3, the Azure trace's timing) x loads of
0.7, 1.0 and 1.5 times the best peak of any policy. Peaks: largest total rate at which every model keeps 99%
of its requests within the SLO, steady arrivals, the mean of three seeds; late requests are served, as there
(its clients end at a rejection). Elsewhere late ones are rejected where the policy can tell (D-STACK, Nexus).
"dstack" runs at fixed MPS shares found by rehearsal (sim/rehearsal.py), as `dstackctl run` deploys it on a
GPU; "dstack-levels" chooses the share of each batch (green contexts) around the shares that mps-static and
the other planned policies have; "best-static" is mps-static with the best of those shares times each of
STATIC_SCALES. Only D-STACK pays control-plane delays. One process with many
streams (issue 7's g) is mps-default here: what its threads cost each other is not modelled.
"""

from __future__ import annotations

import argparse
import functools
import os
import statistics
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from compare.cells import Cell, network_of
from dstack_sched.adapters.profile_files import read_profiles
from dstack_sched.app.planning import REHEARSAL_TRIALS
from dstack_sched.domain.profile import CorunMember, CorunPoint, ProfileSet
from dstack_sched.domain.workload import OnLate, Workload
from dstack_sched.policy.latency import LatencySurface
from dstack_sched.sim.arrivals import Arrivals, parse_trace
from dstack_sched.sim.rehearsal import rehearse
from dstack_sched.sim.result import SimResult
from dstack_sched.sim.scenario import TRITON_H100
from dstack_sched.sim.side_by_side import Shares
from dstack_sched.sim.study import Case, bounds_of, find_peak, make_case, result_of
from report import REPORTS, ROOT, write_report

PROFILES = (REPORTS / "h100" / "profiles.json", ROOT.parent / "shared/measurements/h100_2026-11-22.json")
TRACE = ROOT.parent / "shared/traces/azure_llm_2023_conv.csv"
SIZES = (2, 3, 4, 7, 12)
SLO_FACTORS = (3.0, 5.0, 12.0)
LOADS = (0.7, 1.0, 1.5)
LEVELS = (*(round(100 * 8 * k / 132, 2) for k in range(1, 17)), 100.0)  # groups of 8 SMs of 132
STATIC_SCALES = (1.0, 1.3, 1.6, 2.0)
REQUESTS = 3_000  # about so many a run
PEAK_REQUESTS = 4_000
SEED = 20261122
PEAK_SEEDS = (SEED, SEED + 1, SEED + 2)
BEST_WITHIN = 0.99
IDEAL_AT_PEAK = 0.95
TEMPORAL_FACTOR = 4.0
ENTRIES = (
    "dstack-levels", "dstack", "time-sliced", "temporal", "mps-default", "mps-static", "triton-rate-limiter",
    "fixed-batch", "nexus", "clipper",
)  # fmt: skip
SAME_MODELS = ("mps-default", "mps-static", "triton-rate-limiter")  # issue 7's (c), (d), (f); (g) as (c)


def load_profiles() -> tuple[ProfileSet, str]:
    """The profiles measured last, and the file they are from."""
    path = next(p for p in PROFILES if p.exists())
    return read_profiles(path), str(path.relative_to(ROOT.parent))


def mix_of(profiles: ProfileSet, models: Sequence[str]) -> ProfileSet:
    """The profiles of a mix; a second copy of a model runs, suffers and is suffered as its model does."""
    corun = list(profiles.corun)
    for copy in models:
        if copy != network_of(copy):
            corun += [_renamed(point, network_of(copy), copy) for point in profiles.corun]
    own = {name: replace(profiles.models[network_of(name)], name=name) for name in models}
    return replace(profiles, models=own, corun=tuple(corun))


def _renamed(point: CorunPoint, name: str, copy: str) -> CorunPoint:
    members: Iterable[CorunMember] = (
        replace(m, model=copy if m.model == name else m.model) for m in point.members
    )
    return CorunPoint(tuple(members))


def workload_of(profiles: ProfileSet, cell: Cell, on_late: OnLate) -> Workload:
    """The cell's demands at 100/s a model; scaled later."""
    serving_ms = (TRITON_H100.outside_us + TRITON_H100.prepare_us + TRITON_H100.answer_us) / 1000
    solo_ms = {
        name: serving_ms + float(LatencySurface.from_profile(profiles.models[name]).latency_ms(100.0, 1))
        for name in cell.models
    }
    return cell.workload(solo_ms, 100.0 * len(cell.models), on_late)


def arrival_kinds() -> dict[str, Arrivals]:
    kinds = {"steady": Arrivals(), "bursty": Arrivals("gamma", cv=3.0)}
    if TRACE.exists():
        offsets = parse_trace(TRACE.read_text(), str(TRACE))
        kinds["trace"] = Arrivals("trace", trace_us=offsets)
    return kinds


@functools.lru_cache(maxsize=64)
def case_of(size: int, slo_factor: float, entry: str, on_late: OnLate) -> Case:
    cell = Cell(f"C-{size}", slo_factor)
    profiles = mix_of(load_profiles()[0], cell.models)
    levels = LEVELS if entry == "dstack-levels" else ()
    return make_case(profiles, workload_of(profiles, cell, on_late), levels=levels, serving=TRITON_H100)


@dataclass(frozen=True, slots=True)
class Deployed:
    """What the rehearsal of a mix found."""

    shares: Shares
    capacity_percent: float

    def on(self, case: Case) -> Case:
        return replace(case, shares=self.shares, capacity_percent=self.capacity_percent)


def rehearsed(case: Case) -> Deployed:
    """Begun with the shares of mps-static, at the rates of the case."""
    grid = tuple(float(p) for p in range(10, 101, 5))
    grids = {d.name: grid for d in case.demands}
    found = rehearse(case, [case.shares.gpu_percent], grids, trials=REHEARSAL_TRIALS)
    return Deployed(found.shares, found.capacity_percent)


def policy_of(entry: str) -> str:
    return "dstack" if entry == "dstack-levels" else entry


def best_static(case: Case, peak_per_s: float, at_scale_1: float) -> float:
    """The peak of the best fixed shares: mps-static with its shares stretched alike."""
    best = at_scale_1
    for scale in STATIC_SCALES[1:]:
        percents = {n: min(100.0, scale * p) for n, p in case.shares.gpu_percent.items()}
        stretched = replace(case, shares=replace(case.shares, gpu_percent=percents))
        best = max(best, peak_of(stretched, "mps-static", peak_per_s)[0])
    return best


def peak_of(case: Case, policy_name: str, guess_per_s: float) -> tuple[float, float]:
    """Peak per second, the search beginning at guess_per_s; and its half interval over it."""
    start = guess_per_s / case.total_rate_per_s
    found = find_peak(
        case.scaled(start), policy_name, PEAK_REQUESTS / guess_per_s, PEAK_SEEDS, tolerance=0.03
    )
    half = (found.high - found.factor) / found.factor if found.factor else 0.0
    return found.factor * guess_per_s, half


def peaks_of(task: tuple[int, float]) -> dict[str, Any]:
    """One mix and SLO: the bound and every policy's peak."""
    size, slo_factor = task
    cases = {entry: case_of(size, slo_factor, entry, OnLate.SERVE) for entry in ENTRIES}
    first = cases["dstack"]
    bounds = bounds_of(first)
    ideal = bounds.corun.peak_scale
    guess = max(ideal * first.total_rate_per_s / 3, 10.0)
    own = rehearsed(first.scaled(guess / first.total_rate_per_s))
    cases["dstack"] = own.on(first)
    found = {entry: peak_of(case, policy_of(entry), guess) for entry, case in cases.items()}
    peaks = {entry: peak for entry, (peak, _) in found.items()}
    spread = {entry: half for entry, (_, half) in found.items()}
    peaks["best-static"] = best_static(first, guess, peaks["mps-static"])
    saturated = {}
    for entry in ("dstack", "dstack-levels"):
        case = case_of(size, slo_factor, entry, OnLate.REJECT).scaled(ideal)
        case = own.on(case) if entry == "dstack" else case
        result = result_of(case, "dstack", PEAK_REQUESTS / case.total_rate_per_s, SEED)
        saturated[entry] = result.total_goodput_per_s / case.total_rate_per_s
    return {
        "mix": f"C-{size}",
        "models": {d.name: {"slo_ms": round(d.slo_ms or 0.0, 3)} for d in first.demands},
        "static_gpu_percent": first.shares.gpu_percent,
        "dstack_gpu_percent": own.shares.gpu_percent,
        "dstack_batch_size": own.shares.batch_size,
        "dstack_capacity_percent": own.capacity_percent,
        "slo_factor": slo_factor,
        "ideal_corun_peak_per_s": round(ideal * first.total_rate_per_s, 1),
        "ideal_isolated_peak_per_s": round(bounds.isolated.peak_scale * first.total_rate_per_s, 1),
        "peak_per_s": {entry: round(value, 1) for entry, value in peaks.items()},
        "peak_half_interval": {entry: round(value, 3) for entry, value in spread.items()},
        "goodput_at_ideal_rate": {entry: round(value, 4) for entry, value in saturated.items()},
    }


def cells_of(task: tuple[int, float, str, float, Deployed]) -> list[dict[str, Any]]:
    """One mix, SLO and kind of arrivals at all loads, given the best peak of any policy and D-STACK's
    shares."""
    size, slo_factor, kind, peak_per_s, own = task
    cells = []
    for load in LOADS:
        results: dict[str, SimResult] = {}
        for entry in ENTRIES:
            case = replace(case_of(size, slo_factor, entry, OnLate.REJECT), arrivals=arrival_kinds()[kind])
            case = own.on(case) if entry == "dstack" else case
            case = case.scaled(load * peak_per_s / case.total_rate_per_s)
            results[entry] = result_of(case, policy_of(entry), REQUESTS / case.total_rate_per_s, SEED)
        ideal = bounds_of(case).corun.goodput_per_s
        cells.append(
            {
                "mix": f"C-{size}",
                "slo_factor": slo_factor,
                "arrivals": kind,
                "load": load,
                "offered_per_s": round(case.total_rate_per_s, 1),
                "ideal_corun_goodput_per_s": round(ideal, 1),
                "policies": {entry: figures(result, ideal) for entry, result in results.items()},
            }
        )
    return cells


def deployed(peak: Mapping[str, Any]) -> Deployed:
    """D-STACK's shares of a mix, from its peaks."""
    shares = Shares(peak["dstack_gpu_percent"], peak["dstack_batch_size"], 1.0)
    return Deployed(shares, peak["dstack_capacity_percent"])


def figures(result: SimResult, ideal: float) -> dict[str, float]:
    return {
        "goodput_per_s": round(result.total_goodput_per_s, 1),
        "worst_attainment": round(result.worst_attainment, 4),
        "gpu_utilization": round(result.gpu_utilization, 4),
        "jain_fairness": round(result.jain_fairness, 4),
        "fraction_of_ideal": round(result.total_goodput_per_s / max(ideal, 1e-9), 4),
    }


def verdicts(peaks: list[dict[str, Any]], cells: list[dict[str, Any]]) -> dict[str, Any]:
    """Which targets are met, and the names of the cells that miss."""
    found: dict[str, Any] = {}
    for entry in ("dstack", "dstack-levels"):
        rivals = [n for n in ENTRIES if not n.startswith("dstack")]
        misses = []
        for cell in cells:
            best = max(rivals, key=lambda n: cell["policies"][n]["goodput_per_s"])
            ratio = cell["policies"][entry]["goodput_per_s"] / cell["policies"][best]["goodput_per_s"]
            if ratio < BEST_WITHIN:
                own, other = (cell["policies"][n]["worst_attainment"] for n in (entry, best))
                attainment = {"worst_attainment": own, "best_worst_attainment": other}
                misses.append({**_name(cell), "best": best, "ratio": round(ratio, 4), **attainment})
        of_ideal = {_label(p): p["peak_per_s"][entry] / p["ideal_corun_peak_per_s"] for p in peaks}
        of_temporal = {
            _label(p): p["peak_per_s"][entry] / max(p["peak_per_s"]["temporal"], 1e-9) for p in peaks
        }
        of_best = {
            _label(p): p["peak_per_s"][entry] / max(p["peak_per_s"][n] for n in SAME_MODELS) for p in peaks
        }
        of_static = {_label(p): p["peak_per_s"][entry] / p["peak_per_s"]["best-static"] for p in peaks}
        of_sliced = {_label(p): p["peak_per_s"][entry] / p["peak_per_s"]["time-sliced"] for p in peaks}
        found[entry] = {
            "cells": len(cells),
            "cells_best_within_1_percent": len(cells) - len(misses),
            "missed_cells": misses,
            "peak_over_ideal_corun": {k: round(v, 3) for k, v in of_ideal.items()},
            "peaks_at_95_percent_of_ideal": sum(v >= IDEAL_AT_PEAK for v in of_ideal.values()),
            "peak_over_temporal": {k: round(v, 2) for k, v in of_temporal.items()},
            "peak_over_best_rival": {k: round(v, 3) for k, v in of_best.items()},
            "peak_over_best_static": {k: round(v, 3) for k, v in of_static.items()},
            "peak_over_time_sliced": {k: round(v, 2) for k, v in of_sliced.items()},
            "median_peak_over_best_rival": round(statistics.median(of_best.values()), 3),
        }
    return found


def _name(cell: dict[str, Any]) -> dict[str, Any]:
    return {key: cell[key] for key in ("mix", "slo_factor", "arrivals", "load")}


def _label(peak: dict[str, Any]) -> str:
    return f"{peak['mix']} {peak['slo_factor']:g}x"


def markdown(peaks: list[dict[str, Any]], cells: list[dict[str, Any]], found: dict[str, Any]) -> str:
    """The table for people."""
    lines = ["# Simulation study", "", "Peak rate per second, every model at 99% within its SLO, steady:", ""]
    columns = (*ENTRIES, "best-static")
    lines.append("| mix | ideal | " + " | ".join(columns) + " |")
    lines.append("|---" * (len(columns) + 2) + "|")
    for p in peaks:
        row = [_label(p), f"{p['ideal_corun_peak_per_s']:.0f}"]
        lines.append("| " + " | ".join(row + [f"{p['peak_per_s'][e]:.0f}" for e in columns]) + " |")
    lines += [
        "",
        "Goodput over the best rival's in the same cell (D-STACK with fixed shares / with levels):",
        "",
    ]
    lines.append("| mix, SLO, arrivals | " + " | ".join(f"load {load:g}" for load in LOADS) + " |")
    lines.append("|---" * (len(LOADS) + 1) + "|")
    rivals = [n for n in ENTRIES if not n.startswith("dstack")]
    rows: dict[str, list[str]] = {}
    for cell in cells:
        best = max(cell["policies"][n]["goodput_per_s"] for n in rivals)
        both = [cell["policies"][e]["goodput_per_s"] / best for e in ("dstack", "dstack-levels")]
        label = f"{cell['mix']} {cell['slo_factor']:g}x {cell['arrivals']}"
        rows.setdefault(label, []).append(" / ".join(f"{x:.3f}" for x in both))
    lines += [f"| {label} | " + " | ".join(values) + " |" for label, values in rows.items()]
    for entry, verdict in found.items():
        lines += ["", f"{entry}: best or within 1% in {verdict['cells_best_within_1_percent']} of "
                  f"{verdict['cells']} cells; peak over the best rival's, median: "
                  f"{verdict['median_peak_over_best_rival']:.2f}."]  # fmt: skip
        below = [f"{k} {v:.2f}" for k, v in verdict["peak_over_temporal"].items() if v < TEMPORAL_FACTOR]
        lines += [
            "",
            f"{entry}: peak under {TEMPORAL_FACTOR:g}x temporal's in: {', '.join(below) or 'none'}.",
        ]
        behind = [f"{k} {v:.2f}" for k, v in verdict["peak_over_best_rival"].items() if v < BEST_WITHIN]
        lines += ["", f"{entry}: peak behind the best rival's in: {', '.join(behind) or 'none'}."]
        static = [f"{k} {v:.2f}" for k, v in verdict["peak_over_best_static"].items()]
        lines += ["", f"{entry}: peak over the best static's: {', '.join(static)}."]
        ideal = [f"{k} {v:.2f}" for k, v in verdict["peak_over_ideal_corun"].items()]
        lines += ["", f"{entry}: peak over ideal_corun: {', '.join(ideal)}."]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="peaks and steady cells of C-2 and C-4 only")
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--out", type=Path, default=REPORTS)
    options = parser.parse_args()
    started = time.monotonic()
    sizes = (2, 4) if options.quick else SIZES
    kinds = ["steady"] if options.quick else list(arrival_kinds())
    with ProcessPoolExecutor(options.workers) as pool:
        tasks = [(size, factor) for size in sorted(sizes, reverse=True) for factor in SLO_FACTORS]
        peaks = list(pool.map(peaks_of, tasks))
        print(f"{len(peaks)} peaks after {time.monotonic() - started:.0f} s", file=sys.stderr, flush=True)
        work = [
            (size, factor, kind, max(p["peak_per_s"].values()), deployed(p))
            for (size, factor), p in zip(tasks, peaks, strict=True)
            for kind in kinds
        ]
        cells = [cell for found in pool.map(cells_of, work) for cell in found]
    peaks.sort(key=lambda p: (int(p["mix"][2:]), p["slo_factor"]))
    cells.sort(key=lambda c: (int(c["mix"][2:]), c["slo_factor"], kinds.index(c["arrivals"]), c["load"]))
    found = verdicts(peaks, cells)
    table = markdown(peaks, cells, found)
    print(table)
    content = {
        "profiles": load_profiles()[1],
        "seed": SEED,
        "seconds_taken": round(time.monotonic() - started, 1),
        "targets": {
            "best_within": BEST_WITHIN, "ideal_at_peak": IDEAL_AT_PEAK, "over_temporal": TEMPORAL_FACTOR
        },
        "verdicts": found,
        "peaks": peaks,
        "cells": cells,
    }  # fmt: skip
    path = write_report(options.out / "simulation.json", "make perf-simulation", content)
    path.with_suffix(".md").write_text(table)


if __name__ == "__main__":
    main()
