"""What the profiles of `h100_profiles.py` are worth: figures and Markdown tables, from files only."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
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
TARGET = 0.97  # of the best efficacy
NEAR = 0.015  # what TARGET means for a latency, as efficacy squares it: how near a limit nobody is judged
REFERENCES = 2  # of the grid's best places for an SLO: one that misses it when measured again is none
ROUNDS = 15  # of measuring contested places again, in turns
SLO_MULTIPLES = (2.5, 4.0, 8.0, 16.0, 32.0)  # of the fastest possible run of the model
Place = tuple[float, int]


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


class SideBySide:
    """Latencies of contested places, measured again in turns, within seconds of each other."""

    def __init__(self, latencies_ms: Mapping[Place, Sequence[float]] | None = None) -> None:
        self.latencies_ms = {place: list(values) for place, values in (latencies_ms or {}).items()}

    def add(self, point: ProfilePoint) -> None:
        self.latencies_ms.setdefault((point.gpu_percent, point.batch_size), []).append(point.latency_ms_p50)

    def median_ms(self, place: Place) -> float | None:
        """None for a place that was not measured again."""
        values = self.latencies_ms.get(place)
        return float(np.median(values)) if values else None

    def as_json(self) -> list[dict[str, Any]]:
        return [
            {"gpu_percent": p, "batch_size": b, "latencies_ms": [round(ms, 5) for ms in values]}
            for (p, b), values in self.latencies_ms.items()
        ]

    @classmethod
    def of_json(cls, rows: Sequence[Mapping[str, Any]]) -> SideBySide:
        return cls({(float(r["gpu_percent"]), int(r["batch_size"])): r["latencies_ms"] for r in rows})


@dataclass(frozen=True)
class Contest:
    """One SLO (inf: none): the grid point that the adaptive surface calls best, and the grid's own best ones
    by its own measurements, the best first."""

    slo_ms: float
    adaptive: ProfilePoint
    grid: tuple[ProfilePoint, ...]

    @property
    def agreed(self) -> bool:
        return place_of(self.adaptive) == place_of(self.grid[0])


def place_of(point: ProfilePoint) -> Place:
    return point.gpu_percent, point.batch_size


def allowed(batch_size: int, latency_ms: float, slo_ms: float, slack: float = 1.0) -> bool:
    """Whether a batch keeps the batch program's limits at RATE_PER_S."""
    waits = assembly_ms(batch_size, RATE_PER_S) if np.isfinite(slo_ms) else 0.0
    return 2 * latency_ms <= slo_ms * slack and waits + latency_ms <= slo_ms * slack


def contests(profile: ModelProfile, reference: ModelProfile) -> list[Contest]:
    """One a SLO of slo_list(reference), and one without an SLO."""
    surface = LatencySurface.from_profile(profile)
    grid = reference.points

    def predicted_ms(point: ProfilePoint) -> float:
        return float(surface.latency_ms(point.gpu_percent, point.batch_size))

    found = []
    for slo_ms in [*slo_list(reference), float("inf")]:
        seen = [p for p in grid if allowed(p.batch_size, predicted_ms(p), slo_ms)]
        chosen = max(
            seen or [min(grid, key=predicted_ms)],
            key=lambda p: efficacy(p.gpu_percent, p.batch_size, predicted_ms(p)),
        )
        within = [p for p in grid if allowed(p.batch_size, p.latency_ms_p50, slo_ms)]
        best = sorted(within, key=lambda p: -efficacy(p.gpu_percent, p.batch_size, p.latency_ms_p50))
        found.append(Contest(slo_ms, chosen, tuple(best[:REFERENCES])))
    return found


def side_by_side_places(profile: ModelProfile, reference: ModelProfile) -> list[Place]:
    """What to measure again, in this order: the places of all contests that are not agreed, in turns."""
    contested = {
        place_of(point): None
        for contest in contests(profile, reference)
        if not contest.agreed
        for point in (contest.adaptive, *contest.grid)
    }
    return list(contested) * ROUNDS


def compare_with_grid(
    profile: ModelProfile,
    reference: ModelProfile,
    device: Device,
    kernels: Sequence[KernelWork],
    again: SideBySide,
) -> dict[str, Any]:
    """The adaptive profile against an exhaustive grid measured apart from it.

    efficacy_ratio: that of the adaptive choice over that of the grid's best, both by medians of `again`: the
    best of 60 measurements owes some of its lead to chance, so what chose a place may not judge it.
    efficacy_ratio_raw: both by the grid's single measurements.
    """
    surface = LatencySurface.from_profile(profile)
    places = {place_of(point): point for point in profile.points}
    apart = [p for p in reference.points if place_of(p) not in places]
    repeats = [
        p.latency_ms_p50 / places[place_of(p)].latency_ms_p50 - 1
        for p in reference.points
        if place_of(p) in places
    ]
    figures: dict[str, Any] = {
        "grid_points": len(reference.points),
        "adaptive_points": len(profile.points),
        "surface_error": errors(relative_errors(surface, reference.points)),
        "surface_error_at_unmeasured": errors(relative_errors(surface, apart)) if apart else None,
        "repeat_error": errors(repeats or [0.0]),
        "choices": [judged(contest, again) for contest in contests(profile, reference)],
    }
    if kernels and apart:
        model = fit_parallelism(kernels, device.sms, profile.points)
        figures["parallelism_error_at_unmeasured"] = errors(relative_errors(model, apart))
    for kind in ("efficacy_ratio", "efficacy_ratio_raw"):
        ratios = [row[kind] for row in figures["choices"]]
        figures[f"{kind}_min"] = None if None in ratios else min(ratios)
    return figures


def relative_errors(model: Any, points: Sequence[ProfilePoint]) -> list[float]:
    """model.latency_ms / measured - 1 at each point."""
    return [float(model.latency_ms(p.gpu_percent, p.batch_size)) / p.latency_ms_p50 - 1 for p in points]


def judged(contest: Contest, again: SideBySide) -> dict[str, Any]:
    """One SLO of compare_with_grid; efficacy_ratio and meets_slo are None where it was not measured again.

    A reference that, measured again, does not keep the SLO with NEAR to spare is none: on which side of a
    limit such a place falls is chance. Where none is left there is nothing to be beaten by: 1.
    """
    chosen, best = contest.adaptive, contest.grid[0]
    row: dict[str, Any] = {
        "slo_ms": contest.slo_ms if np.isfinite(contest.slo_ms) else None,
        "adaptive": list(place_of(chosen)),
        "grid": list(place_of(best)),
        "efficacy_ratio": 1.0,
        "efficacy_ratio_raw": round(valued(chosen) / valued(best), 4),
        "meets_slo": True,
    }
    if contest.agreed:
        return row
    chosen_ms = again.median_ms(place_of(chosen))
    if chosen_ms is None or any(again.median_ms(place_of(point)) is None for point in contest.grid):
        return row | {"efficacy_ratio": None, "meets_slo": None}
    row["meets_slo"] = allowed(chosen.batch_size, chosen_ms, contest.slo_ms, 1 + NEAR)
    for candidate in contest.grid:
        ms = again.median_ms(place_of(candidate))
        if ms and allowed(candidate.batch_size, ms, contest.slo_ms, 1 - NEAR):
            ratio = round(valued(chosen, chosen_ms) / valued(candidate, ms), 4)
            return row | {"grid": list(place_of(candidate)), "efficacy_ratio": ratio}
    return row


def valued(point: ProfilePoint, latency_ms: float | None = None) -> float:
    """Efficacy of a place, by the grid's measurement unless told another latency."""
    return efficacy(point.gpu_percent, point.batch_size, latency_ms or point.latency_ms_p50)


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
    side_by_side: Mapping[str, SideBySide],
) -> dict[str, Any]:
    """All figures; a part that cannot be computed says why instead of hiding the others. One process a model:
    fits of the parallelism model without each point take seconds."""
    figures: dict[str, Any] = {"timing": timing, "models": {}, "against_exhaustive_grid": {}}
    with ProcessPoolExecutor(min(max(1, len(profiles.models)), len(os.sched_getaffinity(0)))) as pool:
        rows = {
            name: pool.submit(
                one_model,
                profile,
                references.get(name),
                profiles.device,
                kernels.get(name, ()),
                side_by_side.get(name, SideBySide()),
            )
            for name, profile in profiles.models.items()
        }
        for name, row in rows.items():
            figures["models"][name], against = row.result()
            if against:
                figures["against_exhaustive_grid"][name] = against
    if profiles.corun:
        figures["interference"] = interference_figures(profiles)
    return figures


def one_model(
    profile: ModelProfile,
    reference: ModelProfile | None,
    device: Device,
    kernels: Sequence[KernelWork],
    again: SideBySide,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """model_figures, and compare_with_grid where there is a grid."""
    figures: dict[str, Any] = {}
    try:
        figures = model_figures(profile, device, kernels)
        if reference:
            return figures, compare_with_grid(profile, reference, device, kernels, again)
    except (DstackError, ValueError, ArithmeticError) as error:
        figures["failed"] = f"{type(error).__name__}: {error}"
    return figures, {}


def grid_line(name: str, row: Mapping[str, Any]) -> str:
    """Some sentences on a compare_with_grid result."""
    error, repeat = row["surface_error_at_unmeasured"] or row["surface_error"], row["repeat_error"]
    ratio = row["efficacy_ratio_min"]
    agreed = sum(choice["adaptive"] == choice["grid"] for choice in row["choices"])
    told = "was not measured side by side" if ratio is None else f"{ratio:.3f} at worst"
    if ratio is not None and agreed < len(row["choices"]):
        told += f", measured side by side, {ROUNDS} times in turns"
    return (
        f"{name}: {row['adaptive_points']} adaptive points against {row['grid_points']} of the grid: error at"
        f" unmeasured points {error['mean']:.1%} mean, {error['max']:.1%} max. The same place is chosen for"
        f" {agreed} of {len(row['choices'])} SLOs; efficacy of the adaptive choice over that of the grid's"
        f" best: {told} ({row['efficacy_ratio_raw_min']:.3f} by the grid's single measurements, which differ"
        f" from the profile's by {repeat['mean']:.1%} mean, {repeat['max']:.1%} max)."
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
