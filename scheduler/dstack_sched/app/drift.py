"""Latency as predicted against latency as it runs: when a profile no longer holds, and what holds instead.

The arbiter keeps what the runs of each model took, by share and batch size, with the slowdown by co-runners
taken out (engine/run_times.py). For every cell with enough runs, the ratio is measured over profiled median:

- The ratios agree within `misfit`: the whole surface is scaled by their median. That is what a slower
  clock, a busier host or another driver look like.
- They do not: the seen cells take the place of the profiled points beside them, and the rest is scaled.

Nothing is measured for this: the model serves on. A correction is stored and holds for the profile it was
made from only: a model that is profiled anew starts without one.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from dstack_sched.domain.profile import (
    Correction,
    CorunMember,
    CorunPoint,
    ModelProfile,
    ProfilePoint,
    ProfileSet,
)
from dstack_sched.engine.run_times import SEEN_RUNS, Seen
from dstack_sched.policy.latency import LatencySurface

MOST_DOUBLINGS = 8
CALM = 10  # so many times the wanted looks within the band: one refit is forgotten


@dataclass(frozen=True, slots=True)
class DriftSettings:
    """band: relative change of a model's ratio that calls for a refit, seen at `looks` looks in a row.
    runs: of a cell before it counts, new ones since the last refit. misfit: largest relative distance of a
    cell from the common ratio that is still taken for a scale. bounds: of the ratio; beyond them something
    is wrong that a plan cannot mend, and the correction stops there."""

    band: float = 0.15
    looks: int = 3
    runs: int = 48
    misfit: float = 0.2
    bounds: tuple[float, float] = (0.25, 8.0)


@dataclass(frozen=True, slots=True)
class DriftWatch:
    """What is remembered of one model between looks. outside, inside: looks in a row out of and in the band;
    refits: made lately, each doubles the looks that the next one takes (latencies that no correction holds
    for long must not make plans without end). counted: (GPU%, rows) -> runs when last refitted."""

    correction: Correction
    outside: int = 0
    inside: int = 0
    refits: int = 0
    counted: tuple[tuple[float, int, int], ...] = ()


@dataclass(frozen=True, slots=True)
class DriftLook:
    """One look at one model. drift: measured over predicted by the corrected profile, None where too little
    ran; refit: the new correction where one is called for, and why."""

    watch: DriftWatch
    drift: float | None
    refit: Correction | None = None
    why: str = ""


def digest(profile: ModelProfile) -> str:
    """Tells this profile from one measured anew."""
    return hashlib.sha256(repr(sorted(map(repr, profile.points))).encode()).hexdigest()[:16]


def start(profile: ModelProfile, stored: Correction | None) -> DriftWatch:
    """Begin with the stored correction, if it was made from this profile."""
    base = digest(profile)
    return DriftWatch(stored if stored is not None and stored.base == base else Correction(base))


def corrected(profile: ModelProfile, correction: Correction) -> ModelProfile:
    """The profile as it runs now. Points beside a seen one (same share, batch within a factor of 1.25) go."""
    if correction.scale == 1.0 and not correction.points:
        return profile
    kept = [
        replace(
            point,
            latency_ms_p50=point.latency_ms_p50 * correction.scale,
            latency_ms_p99=point.latency_ms_p99 * correction.scale,
        )
        for point in profile.points
        if not any(_beside(point, seen) for seen in correction.points)
    ]
    points = tuple(sorted((*kept, *correction.points), key=lambda p: (p.batch_size, p.gpu_percent)))
    return replace(profile, points=points, fit=None, knee=None)


def corrected_set(profiles: ProfileSet, corrections: Mapping[str, Correction]) -> ProfileSet:
    """The profiles as they run now. What co-runners do to a model stays what it was measured to be: the
    interference is fitted to co-runs over runs alone, so both change alike."""
    models = {
        name: corrected(profile, corrections[name]) if name in corrections else profile
        for name, profile in profiles.models.items()
    }
    changed = {
        name: (LatencySurface.from_profile(profiles.models[name]), LatencySurface.from_profile(now))
        for name, now in models.items()
        if now is not profiles.models[name]
    }

    def member(old: CorunMember) -> CorunMember:
        if old.model not in changed:
            return old
        at = (old.gpu_percent, old.batch_size)
        before, now = (float(surface.latency_ms(*at)) for surface in changed[old.model])
        return replace(
            old,
            latency_ms_p50=old.latency_ms_p50 * now / before,
            throughput_per_s=old.throughput_per_s * before / now,
        )

    corun = tuple(CorunPoint(tuple(member(each) for each in point.members)) for point in profiles.corun)
    return replace(profiles, models=models, corun=corun)


def _beside(point: ProfilePoint, seen: ProfilePoint) -> bool:
    low, high = sorted((point.batch_size, seen.batch_size))
    return abs(point.gpu_percent - seen.gpu_percent) < 0.5 and high <= 1.25 * low


def look(
    watch: DriftWatch, profile: ModelProfile, seen: Sequence[Seen], settings: DriftSettings
) -> DriftLook:
    """One look. profile: as it was measured, without the correction."""
    counted = {(percent, rows): runs for percent, rows, runs in watch.counted}
    cells = [c for c in _merged(seen) if c.runs - _before(counted, c) >= settings.runs]
    if not cells:
        return DriftLook(replace(watch, outside=0), None)
    wanted = settings.looks * 2 ** min(watch.refits, MOST_DOUBLINGS)
    now = LatencySurface.from_profile(corrected(profile, watch.correction))
    ratios = np.array([c.p50_us / 1000.0 / float(now.latency_ms(c.gpu_percent, c.rows)) for c in cells])
    runs = np.array([c.runs - _before(counted, c) for c in cells], np.float64)
    drift = _weighted_median(ratios, runs)
    worst = float(np.abs(ratios - 1.0).max())
    if abs(drift - 1.0) <= settings.band and worst <= settings.misfit + settings.band:
        calm = watch.inside + 1 >= CALM * wanted
        refits = max(0, watch.refits - 1) if calm else watch.refits
        return DriftLook(
            replace(watch, outside=0, inside=0 if calm else watch.inside + 1, refits=refits), drift
        )
    if watch.outside + 1 < wanted:
        return DriftLook(replace(watch, outside=watch.outside + 1, inside=0), drift)
    refit, how = _refit(watch.correction, profile, cells, runs, settings)
    marks = tuple((c.gpu_percent, c.rows, c.runs) for c in _merged(seen))
    next_watch = DriftWatch(refit, 0, 0, watch.refits + 1, marks)
    if refit == watch.correction:
        return DriftLook(next_watch, drift)
    why = f"runs take {drift:.2f} of the predicted time over {int(runs.sum())} runs; {how}"
    return DriftLook(next_watch, drift, refit, why)


def _refit(
    old: Correction,
    profile: ModelProfile,
    cells: Sequence[Seen],
    runs: np.ndarray,
    settings: DriftSettings,
) -> tuple[Correction, str]:
    """The correction that explains the cells, against the profile as measured, and how it does."""
    base = LatencySurface.from_profile(profile)
    ratios = np.array([c.p50_us / 1000.0 / float(base.latency_ms(c.gpu_percent, c.rows)) for c in cells])
    scale = float(np.clip(_weighted_median(ratios, runs), *settings.bounds))
    if float(np.abs(ratios / scale - 1.0).max()) <= settings.misfit:
        return Correction(old.base, round(scale, 4)), f"the profile is scaled by {scale:.2f}"
    fresh = tuple(
        ProfilePoint(
            c.gpu_percent, c.rows, c.p50_us / 1e3, max(c.p99_us, c.p50_us) / 1e3, min(c.runs, SEEN_RUNS)
        )
        for c in cells
    )
    taken = {(p.gpu_percent, p.batch_size) for p in fresh}
    older = tuple(p for p in old.points if (p.gpu_percent, p.batch_size) not in taken)
    text = f"{len(fresh)} points are replaced by what was seen, the rest is scaled by {scale:.2f}"
    return Correction(old.base, round(scale, 4), (*older, *fresh)), text


def _merged(seen: Sequence[Seen]) -> list[Seen]:
    """One entry a cell: instances of one model are alike, the one with most runs speaks for all."""
    best: dict[tuple[float, int], Seen] = {}
    for each in seen:
        cell = (each.gpu_percent, each.rows)
        if cell not in best or each.runs > best[cell].runs:
            best[cell] = each
    return list(best.values())


def _before(counted: dict[tuple[float, int], int], cell: Seen) -> int:
    """Runs at the last refit; none where the count began anew since (a reload)."""
    before = counted.get((cell.gpu_percent, cell.rows), 0)
    return before if before <= cell.runs else 0


def _weighted_median(values: np.ndarray, weights: np.ndarray) -> float:
    order = np.argsort(values)
    reached = np.cumsum(weights[order])
    return float(values[order][np.searchsorted(reached, reached[-1] / 2)])
