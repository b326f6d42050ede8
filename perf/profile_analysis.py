"""What the profiles of `h100_profiles.py` are worth: figures and Markdown tables, from files only."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from dstack_sched.domain.kernels import KernelWork
from dstack_sched.domain.profile import Device, ModelProfile, ProfilePoint, ProfileSet
from dstack_sched.errors import DstackError, InfeasibleError
from dstack_sched.policy.batch_program import assembly_ms, efficacy, solve_batch_program
from dstack_sched.policy.interference import fit_interference, measured_capacity_percent
from dstack_sched.policy.knee import knee_of_curve
from dstack_sched.policy.latency import LatencySurface
from dstack_sched.policy.parallelism import fit_parallelism, held_out_errors
from dstack_sched.policy.runnable import runnable_grid

RATE_PER_S = 1000.0
TIE = 0.05  # what two measurements of one place may differ by on a quiet H100 (mean 2%, sometimes 9%)
SLO_MULTIPLES = (2.5, 4.0, 8.0, 16.0, 32.0)  # of the fastest possible run of the model


def errors(values: Sequence[float]) -> dict[str, float]:
    """Mean and largest absolute relative error."""
    size = np.abs(np.asarray(values, np.float64))
    return {"mean": round(float(size.mean()), 4), "max": round(float(size.max()), 4)}


def slo_list(profile: ModelProfile) -> list[float]:
    """SLOs from tight to loose, in ms: multiples of the fastest measured run."""
    fastest = min(point.latency_ms_p50 for point in profile.points)
    return [round(fastest * multiple, 2) for multiple in SLO_MULTIPLES]


def model_figures(profile: ModelProfile, device: Device, kernels: Sequence[KernelWork]) -> dict[str, Any]:
    """Knee, errors of fit and parallelism model, and the batch program's choices, of one adaptive profile."""
    assert profile.fit and profile.knee
    surface = LatencySurface.from_profile(profile)
    figures: dict[str, Any] = {
        "points": len(profile.points),
        "knee_percent": profile.knee.gpu_percent,
        "knee_batch_size": profile.knee.batch_size,
        "fit_error_max": round(profile.fit.max_relative_error, 4),
        "surface": surface.kind,
        "memory_mib": round(profile.memory_bytes / 2**20),
        "choices": choices(surface, profile, device),
    }
    if kernels:
        model = fit_parallelism(kernels, device.sms, profile.points)
        batch = profile.knee.batch_size
        figures["parallelism"] = {
            "kernels": len(kernels),
            "fit_error_max": round(model.max_relative_error, 4),
            "held_out_error": errors(held_out_errors(kernels, device.sms, profile.points)),
            "knee_percent": knee_of_curve(
                lambda p: model.latency_ms(p, batch), lowest_percent=surface.min_percent
            ),
        }
    return figures


def choices(surface: LatencySurface, profile: ModelProfile, device: Device) -> list[dict[str, Any]]:
    """What the batch program chooses for each SLO, at RATE_PER_S."""
    rows: list[dict[str, Any]] = []
    for slo_ms in slo_list(profile):
        row: dict[str, Any] = {"slo_ms": slo_ms}
        try:
            choice = solve_batch_program(
                surface, slo_ms=slo_ms, rate_per_s=RATE_PER_S, grid=runnable_grid(surface, device)
            )
            row |= {
                "gpu_percent": choice.gpu_percent,
                "batch_size": choice.batch_size,
                "latency_ms": round(choice.latency_ms, 3),
                "efficacy": float(f"{choice.efficacy:.4g}"),
                "binding": list(choice.binding),
            }
        except InfeasibleError as error:
            row["infeasible"] = str(error)
        rows.append(row)
    return rows


def compare_with_grid(
    profile: ModelProfile, reference: ModelProfile, device: Device, kernels: Sequence[KernelWork]
) -> dict[str, Any]:
    """The adaptive profile against an exhaustive grid measured apart from it.

    For every SLO (and none): the grid point that the adaptive surface calls best, and the one that the grid's
    own measurements call best; both valued by the grid's measurements. efficacy_ratio is the first over the
    second. Points within TIE of an SLO's limits are left out on the grid's side, and allowed on the other:
    two measurements of one point differ by as much, and which side of the limit they fall on is chance.
    efficacy_ratio_pooled values a place by the mean of both measurements where there are two: the best of 60
    measurements owes some of its lead to chance.
    """
    surface = LatencySurface.from_profile(profile)
    places = {(point.gpu_percent, point.batch_size): point for point in profile.points}
    apart = [p for p in reference.points if (p.gpu_percent, p.batch_size) not in places]
    figures: dict[str, Any] = {
        "grid_points": len(reference.points),
        "adaptive_points": len(profile.points),
        "surface_error": errors(relative_errors(surface, reference.points)),
        "surface_error_at_unmeasured": errors(relative_errors(surface, apart)) if apart else None,
        "repeat_error": errors(
            [
                p.latency_ms_p50 / places[p.gpu_percent, p.batch_size].latency_ms_p50 - 1
                for p in reference.points
                if (p.gpu_percent, p.batch_size) in places
            ]
            or [0.0]
        ),
        "choices": [
            compare_choice(surface, reference.points, slo, places)
            for slo in [*slo_list(reference), float("inf")]
        ],
    }
    if kernels and apart:
        model = fit_parallelism(kernels, device.sms, profile.points)
        figures["parallelism_error_at_unmeasured"] = errors(relative_errors(model, apart))
    figures["efficacy_ratio_without_slo"] = figures["choices"][-1]["efficacy_ratio"]
    for kind in ("efficacy_ratio", "efficacy_ratio_pooled"):
        figures[f"{kind}_min"] = min(row[kind] for row in figures["choices"])
    return figures


def relative_errors(model: Any, points: Sequence[ProfilePoint]) -> list[float]:
    """model.latency_ms / measured - 1 at each point."""
    return [float(model.latency_ms(p.gpu_percent, p.batch_size)) / p.latency_ms_p50 - 1 for p in points]


def compare_choice(
    surface: LatencySurface,
    grid: Sequence[ProfilePoint],
    slo_ms: float,
    adaptive: Mapping[tuple[float, int], ProfilePoint],
) -> dict[str, Any]:
    """One SLO of compare_with_grid. adaptive: the points of the adaptive profile by place."""

    def allowed(point: ProfilePoint, latency_ms: float, slack: float = 1.0) -> bool:
        waits = assembly_ms(point.batch_size, RATE_PER_S) if np.isfinite(slo_ms) else 0.0
        return 2 * latency_ms <= slo_ms * slack and waits + latency_ms <= slo_ms * slack

    def predicted(point: ProfilePoint) -> float:
        return float(surface.latency_ms(point.gpu_percent, point.batch_size))

    def of_grid(point: ProfilePoint) -> float:
        return efficacy(point.gpu_percent, point.batch_size, point.latency_ms_p50)

    def pooled(point: ProfilePoint) -> float:
        twin = adaptive.get((point.gpu_percent, point.batch_size), point)
        mean_ms = (point.latency_ms_p50 + twin.latency_ms_p50) / 2
        return efficacy(point.gpu_percent, point.batch_size, mean_ms)

    safe = [p for p in grid if allowed(p, p.latency_ms_p50, slack=1 - TIE)]
    seen = [p for p in grid if allowed(p, predicted(p))] or [min(grid, key=predicted)]
    chosen = max(seen, key=lambda p: efficacy(p.gpu_percent, p.batch_size, predicted(p)))
    best = max(safe, key=of_grid)
    return {
        "slo_ms": slo_ms if np.isfinite(slo_ms) else None,
        "adaptive": [chosen.gpu_percent, chosen.batch_size],
        "grid": [best.gpu_percent, best.batch_size],
        "efficacy_ratio": round(of_grid(chosen) / of_grid(best), 4),
        "efficacy_ratio_pooled": round(pooled(chosen) / max(pooled(p) for p in safe), 4),
        "meets_slo": allowed(chosen, chosen.latency_ms_p50, slack=1 + TIE),
    }


def interference_figures(profiles: ProfileSet) -> dict[str, Any]:
    """The interference model on the co-run points, its error before and after, and the capacity."""
    surfaces = {name: LatencySurface.from_profile(model) for name, model in profiles.models.items()}
    model = fit_interference(surfaces, profiles.corun)
    return {
        "coruns": len(profiles.corun),
        "k": {name: round(k, 4) for name, k in model.k.items()},
        "exponent": round(model.exponent, 3),
        "error_without": vars_of(model.before),
        "error_with": vars_of(model.after),
        "capacity_percent": round(measured_capacity_percent(profiles.corun), 1),
    }


def vars_of(error: Any) -> dict[str, float] | None:
    return None if error is None else {"mean": round(error.mean, 4), "max": round(error.largest, 4)}


def analyse(
    profiles: ProfileSet,
    references: Mapping[str, ModelProfile],
    kernels: Mapping[str, Sequence[KernelWork]],
    timing: Mapping[str, Any],
) -> dict[str, Any]:
    """All figures; a part that cannot be computed says why instead of hiding the others."""
    figures: dict[str, Any] = {"timing": dict(timing), "models": {}, "against_exhaustive_grid": {}}
    for name, profile in profiles.models.items():
        try:
            figures["models"][name] = model_figures(profile, profiles.device, kernels.get(name, ()))
            if name in references:
                figures["against_exhaustive_grid"][name] = compare_with_grid(
                    profile, references[name], profiles.device, kernels.get(name, ())
                )
        except (DstackError, ValueError, ArithmeticError) as error:
            figures["models"].setdefault(name, {})["failed"] = f"{type(error).__name__}: {error}"
    if profiles.corun:
        figures["interference"] = interference_figures(profiles)
    return figures


def grid_line(name: str, row: Mapping[str, Any]) -> str:
    """One sentence or two on a compare_with_grid result."""
    error, repeat = row["surface_error_at_unmeasured"] or row["surface_error"], row["repeat_error"]
    return (
        f"{name}: {row['adaptive_points']} adaptive points against {row['grid_points']} of the grid: error at"
        f" unmeasured points {error['mean']:.1%} mean, {error['max']:.1%} max. Efficacy of the choice over"
        f" the grid's best: {row['efficacy_ratio_without_slo']:.3f} without an SLO, worst over the SLOs"
        f" {row['efficacy_ratio_min']:.3f} ({row['efficacy_ratio_pooled_min']:.3f} where a place measured"
        f" twice counts with its mean; the two differ by {repeat['mean']:.1%} mean, {repeat['max']:.1%} max)."
    )


def markdown(profiles: ProfileSet, figures: Mapping[str, Any]) -> str:
    """The tables beside profiles.json."""
    timing = figures["timing"]
    lines = [
        f"# Profiles on {profiles.device.name}",
        "",
        f"Driver {profiles.device.driver}, {profiles.device.runtime}; made by `{timing.get('command', '')}`.",
        f"Profiling all models took {timing.get('profiles_s', 0):.0f} s, side by side"
        f" {timing.get('corun_s', 0):.0f} s more; export {timing.get('export_s', 0):.0f} s.",
        "",
        "| model | points | seconds | knee (batch) | fit error | surface | parallelism fit, held out | MiB |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, row in figures["models"].items():
        if "points" not in row:
            lines.append(f"| {name} | failed: {row.get('failed', '')} | | | | | | |")
            continue
        parallelism = row.get("parallelism")
        held = (
            f"{parallelism['fit_error_max']:.1%} / {parallelism['held_out_error']['mean']:.1%} mean,"
            f" {parallelism['held_out_error']['max']:.1%} max"
            if parallelism
            else "-"
        )
        seconds = timing.get("models_s", {}).get(name, 0.0)
        lines.append(
            f"| {name} | {row['points']} | {seconds:.0f} |"
            f" {row['knee_percent']:g}% ({row['knee_batch_size']}) |"
            f" {row['fit_error_max']:.1%} | {row['surface']} | {held} | {row['memory_mib']} |"
        )
    lines += ["", f"Chosen GPU%, batch for SLOs from tight to loose, at {RATE_PER_S:.0f} requests/s:", ""]
    lines += ["| model | " + " | ".join(f"SLO {m:g} x fastest" for m in SLO_MULTIPLES) + " |"]
    lines += ["|---" * (1 + len(SLO_MULTIPLES)) + "|"]
    for name, row in figures["models"].items():
        cells = [
            f"{c['slo_ms']:g} ms: "
            + (f"{c['gpu_percent']:g}%, {c['batch_size']}" if "batch_size" in c else "none")
            for c in row.get("choices", [])
        ]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    for name, row in figures["against_exhaustive_grid"].items():
        lines += ["", grid_line(name, row)]
    for name, row in figures.get("run_before", {}).items():
        lines += ["", "In the run before, " + grid_line(name, row)]
    if "interference" in figures:
        found = figures["interference"]
        lines += [
            "",
            f"Interference over {found['coruns']} measurements side by side: error"
            f" {found['error_without']['mean']:.1%} without the model and"
            f" {found['error_with']['mean']:.1%} with it;"
            f" exponent {found['exponent']}; best promise {found['capacity_percent']:g}%.",
        ]
    return "\n".join(lines) + "\n"
