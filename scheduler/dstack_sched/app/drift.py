"""Latency as predicted against latency as it runs: when a profile no longer holds, and what holds instead.

The arbiter keeps what the runs of each model took, by share and batch size, with the slowdown by co-runners
taken out (engine/run_times.py). For every cell with enough runs, the ratio is measured over profiled median:

- The ratios agree within `misfit`: the whole surface is scaled by their median. That is what a slower
  clock, a busier host or another driver look like.
- They do not: the seen cells take the place of the profiled points beside them, and the rest is scaled.

On a GPU the slowdown by co-runners is looked at as well: runs of one cell differ by who ran beside them, and
where they differ enough, the line through them says what co-runners of 100% do to the model. Co-runs measured
with large batches say it worse (decisions/0127).

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
from dstack_sched.policy.interference import fit_interference
from dstack_sched.policy.latency import LatencySurface
from dstack_sched.policy.runnable import CPU_DRIVER

MOST_DOUBLINGS = 8
CALM = 10  # so many times the wanted looks within the band: one refit is forgotten


@dataclass(frozen=True, slots=True)
class DriftSettings:
    """band: relative change of a model's ratio that calls for a refit, seen at `looks` looks in a row.
    runs: of a cell before it counts, new ones since the last refit. misfit: largest relative distance of a
    cell from the common ratio that is still taken for a scale. bounds: of the ratio; beyond them something
    is wrong that a plan cannot mend, and the correction stops there. least_known: largest standard error of a
    slowdown by co-runners that is believed."""

    band: float = 0.15
    looks: int = 3
    runs: int = 48
    misfit: float = 0.2
    bounds: tuple[float, float] = (0.25, 8.0)
    least_known: float = 0.05


@dataclass(frozen=True, slots=True)
class DriftWatch:
    """What is remembered of one model between looks. slowdown: by co-runners of 100% as the co-runs say,
    None: not looked at. outside, inside: looks in a row out of and in the band; refits: made lately, each
    doubles the looks that the next one takes (latencies that no correction holds for long must not make plans
    without end). counted: (GPU%, rows) -> runs when last refitted."""

    correction: Correction
    slowdown: float | None = None
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


def start(profile: ModelProfile, stored: Correction | None, slowdown: float | None = None) -> DriftWatch:
    """Begin with the stored correction, if it was made from this profile. slowdown: see DriftWatch."""
    base = digest(profile)
    known = stored if stored is not None and stored.base == base else Correction(base)
    return DriftWatch(known, slowdown)


def slowdowns(profiles: ProfileSet) -> dict[str, float]:
    """Model -> its slowdown by co-runners of 100% as the co-runs say; {} on a CPU, whose plans know none."""
    if profiles.device.driver == CPU_DRIVER:
        return {}
    surfaces = {name: LatencySurface.from_profile(profile) for name, profile in profiles.models.items()}
    found = fit_interference(surfaces, profiles.corun)
    return {name: found.k.get(name, found.default) for name in profiles.models}


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
    """The profiles as they run now. What co-runners do to a model stays what it was measured to be, unless
    service has shown it: the interference is fitted to co-runs over runs alone, so both change alike."""
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
    known = {n: c.slowdown for n, c in corrections.items() if n in models and c.slowdown is not None}
    return replace(profiles, models=models, corun=corun, slowdown={**profiles.slowdown, **known})


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
    shift, slowdown = 0.0, watch.correction.slowdown
    if watch.slowdown is not None:
        shift, slowdown = _shift(cells, watch.slowdown if slowdown is None else slowdown, settings)
        cells = [_alone(cell, slowdown) for cell in cells]
    now = LatencySurface.from_profile(corrected(profile, watch.correction))
    ratios = np.array([c.p50_us / 1000.0 / float(now.latency_ms(c.gpu_percent, c.rows)) for c in cells])
    runs = np.array([c.runs - _before(counted, c) for c in cells], np.float64)
    drift = _weighted_median(ratios, runs)
    worst = float(np.abs(ratios - 1.0).max())
    if max(abs(drift - 1.0), shift) <= settings.band and worst <= settings.misfit + settings.band:
        calm = watch.inside + 1 >= CALM * wanted
        refits = max(0, watch.refits - 1) if calm else watch.refits
        return DriftLook(
            replace(watch, outside=0, inside=0 if calm else watch.inside + 1, refits=refits), drift
        )
    if watch.outside + 1 < wanted:
        return DriftLook(replace(watch, outside=watch.outside + 1, inside=0), drift)
    refit, how = _refit(watch.correction, profile, cells, runs, settings)
    if slowdown != watch.correction.slowdown and watch.slowdown is not None:
        refit, how = replace(refit, slowdown=slowdown), f"{how}; co-runners of 100% slow it by {slowdown:.0%}"
    marks = tuple((c.gpu_percent, c.rows, c.runs) for c in _merged(seen))
    next_watch = DriftWatch(refit, watch.slowdown, 0, 0, watch.refits + 1, marks)
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
        return Correction(
            old.base, round(scale, 4), (), old.slowdown
        ), f"the profile is scaled by {scale:.2f}"
    fresh = tuple(
        ProfilePoint(
            c.gpu_percent, c.rows, c.p50_us / 1e3, max(c.p99_us, c.p50_us) / 1e3, min(c.runs, SEEN_RUNS)
        )
        for c in cells
    )
    taken = {(p.gpu_percent, p.batch_size) for p in fresh}
    older = tuple(p for p in old.points if (p.gpu_percent, p.batch_size) not in taken)
    text = f"{len(fresh)} points are replaced by what was seen, the rest is scaled by {scale:.2f}"
    return Correction(old.base, round(scale, 4), (*older, *fresh), old.slowdown), text


def _shift(cells: Sequence[Seen], believed: float, settings: DriftSettings) -> tuple[float, float]:
    """(by how much runs beside others are mispredicted with the slowdown believed, relative; the slowdown to
    believe). One line through all cells, each relative to its own mean: run time = a (1 + k crowd)."""
    beside = [cell.beside for cell in cells if cell.beside is not None]
    runs = sum(each.runs for each in beside)
    spread = sum(each.runs * each.spread for each in beside)
    if runs <= 2 * len(beside) or spread <= 0:
        return 0.0, believed
    slope = sum(each.runs * each.slope for each in beside) / spread
    left = sum(each.runs * each.scatter for each in beside) - slope * slope * spread
    error = (max(left, 0.0) / (runs - len(beside) - 1) / spread) ** 0.5
    crowd = sum(each.runs * each.crowd for each in beside) / runs
    alone = 1.0 - slope * crowd  # a over the mean run time
    if alone <= 0.1 or error / alone**2 > settings.least_known:
        return 0.0, believed
    found = round(max(slope, 0.0) / alone, 4)
    return abs((1.0 + found * crowd) / (1.0 + believed * crowd) - 1.0), found


def _alone(cell: Seen, slowdown: float) -> Seen:
    """The cell with this slowdown taken out."""
    if cell.beside is None:
        return cell
    p50_us = cell.beside.run_us / (1.0 + slowdown * cell.beside.crowd)
    return cell._replace(p50_us=p50_us, p99_us=cell.p99_us * p50_us / cell.p50_us)


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
