"""`dstackctl simulate`: any policy on profiled models, in simulated time."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from dstack_sched.adapters.plan_files import read_plan
from dstack_sched.adapters.profile_files import read_profiles
from dstack_sched.cli import app
from dstack_sched.cli.common import JsonOption, print_json, print_table, progress
from dstack_sched.config import read_workload
from dstack_sched.engine.registry import POLICIES, policy
from dstack_sched.errors import InputError
from dstack_sched.sim.arrivals import Arrivals, parse_arrivals, parse_trace
from dstack_sched.sim.chart import timeline_html
from dstack_sched.sim.result import SimResult, document, summarize
from dstack_sched.sim.study import Bounds, Case, bounds_of, find_peak, make_case, simulate

MAX_DURATION_S = 86_400.0
PEAK_SEEDS = 3


@app.command("simulate")
def simulate_command(
    profiles: Annotated[Path, typer.Option("--profiles", metavar="FILE", help="A profiles.json.")],
    workload: Annotated[Path, typer.Option("--workload", metavar="FILE", help="A workload.yaml.")],
    policy_name: Annotated[
        str, typer.Option("--policy", metavar="NAME", help=f"One of {', '.join(POLICIES)}.")
    ] = "dstack",
    duration_s: Annotated[
        float, typer.Option("--duration-s", metavar="N", help="Simulated seconds of arrivals.")
    ] = 10.0,
    seed: Annotated[int, typer.Option("--seed", metavar="K", help="Of arrivals and run times.")] = 1,
    json_output: JsonOption = False,
    all_policies: Annotated[bool, typer.Option("--all", help="A table of all policies.")] = False,
    peak: Annotated[
        bool,
        typer.Option("--peak", help="The largest total rate at which every model keeps its attainment."),
    ] = False,
    timeline: Annotated[
        Path | None, typer.Option("--timeline", metavar="FILE.html", help="Draw what ran on the GPU.")
    ] = None,
    arrivals: Annotated[
        str,
        typer.Option(
            "--arrivals",
            metavar="KIND",
            help="poisson, periodic, gamma:CV, onoff:ON_S:OFF_S, trace:FILE or closed:N clients a model.",
        ),
    ] = "poisson",
    levels: Annotated[
        str, typer.Option("--levels", metavar="P,P,...", help="GPU% that D-STACK may choose from by batch.")
    ] = "",
    plan: Annotated[
        Path | None,
        typer.Option("--plan", metavar="FILE", help="Shares of a plan.json; default: the best static ones."),
    ] = None,
) -> None:
    """Run a workload on a simulated GPU of the profiled kind under a scheduling policy.

    Exit status 1 when a model misses the workload's attainment (or no rate keeps it, with --peak).

    Example: dstackctl simulate --profiles profiles.json --workload workload.yaml --all --duration-s 20
    """
    if not 0 < duration_s <= MAX_DURATION_S:
        raise InputError(f"--duration-s {duration_s:g}: seconds in (0, {MAX_DURATION_S:g}] are wanted")
    if seed < 0:
        raise InputError(f"--seed {seed}: a whole number from 0 is wanted")
    policy(policy_name)
    case = make_case(
        read_profiles(profiles),
        read_workload(workload),
        levels=_levels(levels),
        arrivals=_arrivals(arrivals),
        plan=read_plan(plan) if plan else None,
    )
    names = list(POLICIES) if all_policies else [policy_name]
    if peak:
        served = _show_peaks(case, names, duration_s, seed, json_output)
    else:
        served = _show_runs(case, names, duration_s, seed, json_output, timeline)
    if not served:
        raise typer.Exit(1)


def _levels(text: str) -> tuple[float, ...]:
    try:
        found = tuple(sorted({float(part) for part in text.split(",") if part.strip()}))
    except ValueError:
        found = (0.0,)
    if any(not 0 < level <= 100 for level in found):
        raise InputError(f"--levels {text!r}: percentages in (0, 100], separated by commas, are wanted")
    return found


def _arrivals(text: str) -> Arrivals:
    kind, _, name = text.partition(":")
    if kind != "trace" or not name:
        return parse_arrivals(text)
    try:
        content = Path(name).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"--arrivals: trace {name} cannot be read ({error})") from None
    return parse_arrivals(text, parse_trace(content, name))


def _show_runs(
    case: Case, names: list[str], duration_s: float, seed: int, json_output: bool, timeline: Path | None
) -> bool:
    """One run a policy; True when every model of the first one kept its attainment."""
    bounds = bounds_of(case)
    results = []
    with progress() as bar:
        task = bar.add_task("simulating", total=len(names))
        for name in names:
            world = simulate(case, name, duration_s, seed, record=timeline is not None)
            results.append(summarize(world, name, seed))
            if timeline is not None:
                _draw(_beside(timeline, name, names), world.intervals or [], name, world)
            bar.advance(task)
    documents = [document(r, bounds.corun.goodput_per_s, bounds.isolated.goodput_per_s) for r in results]
    if json_output:
        print_json(documents[0] if len(documents) == 1 else {"version": 1, "policies": documents})
    else:
        _tables(results, bounds)
    return results[0].worst_attainment >= case.attainment


def _beside(path: Path, name: str, names: list[str]) -> Path:
    return path if len(names) == 1 else path.with_name(f"{path.stem}.{name}{path.suffix}")


def _draw(path: Path, intervals: Any, name: str, world: Any) -> None:
    engine = world.engine
    capacity = engine.snapshot()["capacity_percent"] if engine is not None else 100.0
    title = f"{name}: {len(intervals)} batches in {world.scenario.duration_us / 1e6:g} s, simulated"
    try:
        path.write_text(timeline_html(intervals, title=title, capacity_percent=capacity), encoding="utf-8")
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}; choose another file with --timeline") from None


def _tables(results: list[SimResult], bounds: Bounds) -> None:
    ideal = bounds.corun.goodput_per_s
    print_table(
        f"ideal: {ideal:.0f}/s beside co-runners, {bounds.isolated.goodput_per_s:.0f}/s without interference",
        ("policy", "goodput/s", "of ideal", "worst model", "GPU busy", "Jain", "most GPU%"),
        [
            (
                r.policy, r.total_goodput_per_s, r.total_goodput_per_s / max(ideal, 1e-9), r.worst_attainment,
                r.gpu_utilization, r.jain_fairness, r.max_granted_percent,
            )
            for r in results
        ],
    )  # fmt: skip
    if len(results) > 1:
        return
    print_table(
        f"{results[0].policy}: models",
        ("model", "offered", "in SLO", "rejected", "late", "p50 ms", "p99 ms", "mean batch"),
        [
            (
                name, m.offered, m.slo_attainment, m.rejected, m.late, m.latency_ms_p50, m.latency_ms_p99,
                m.mean_batch_size,
            )
            for name, m in results[0].models.items()
        ],
    )  # fmt: skip


def _show_peaks(case: Case, names: list[str], duration_s: float, seed: int, json_output: bool) -> bool:
    """The peak of each policy; True when the first one has one."""
    bounds = bounds_of(case)
    rate = case.total_rate_per_s
    rows = []
    with progress() as bar:
        task = bar.add_task("searching peaks", total=len(names))
        for name in names:
            found = find_peak(case, name, duration_s, range(seed, seed + PEAK_SEEDS))
            rows.append(
                {
                    "policy": name,
                    "peak_per_s": round(found.factor * rate, 3),
                    "low_per_s": round(found.low * rate, 3),
                    "high_per_s": round(found.high * rate, 3),
                    "scale": round(found.factor, 5),
                    "fraction_of_ideal": round(found.factor / max(bounds.corun.peak_scale, 1e-9), 5),
                }
            )
            bar.advance(task)
    if json_output:
        head = {"version": 1, "seed": seed, "duration_s": duration_s, "attainment": case.attainment}
        ideal = {"ideal_corun_peak_per_s": round(bounds.corun.peak_scale * rate, 3)}
        print_json({**head, **ideal, "policies": rows})
    else:
        print_table(
            f"peaks at attainment {case.attainment:g}; ideal {bounds.corun.peak_scale * rate:.0f}/s",
            ("policy", "peak/s", "low/s", "high/s", "of ideal"),
            [
                tuple(
                    row[k] for k in ("policy", "peak_per_s", "low_per_s", "high_per_s", "fraction_of_ideal")
                )
                for row in rows
            ],
        )
    return bool(rows[0]["peak_per_s"])
