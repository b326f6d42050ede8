"""Drift: when runs no longer take what the profile says, and what is put in its place."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from dstack_sched.app.drift import (
    DriftSettings,
    DriftWatch,
    corrected,
    corrected_set,
    digest,
    look,
    slowdowns,
    start,
)
from dstack_sched.domain.event import EngineModel
from dstack_sched.domain.profile import (
    Correction,
    CorunMember,
    CorunPoint,
    Device,
    ModelProfile,
    ProfilePoint,
    ProfileSet,
)
from dstack_sched.domain.workload import OnLate
from dstack_sched.engine.run_times import RunTimes, Seen
from dstack_sched.policy.interference import fit_interference, interference_of
from dstack_sched.policy.latency import LatencySurface

SETTINGS = DriftSettings()
PERCENTS, BATCHES = (25.0, 50.0, 100.0), (1, 2, 4, 8)


def ms(percent: float, batch: int) -> float:
    return 2.0 + 400.0 * batch / percent


PROFILE = ModelProfile(
    "m", "f" * 64, 1,
    tuple(ProfilePoint(p, b, ms(p, b), 1.1 * ms(p, b), 50) for p in PERCENTS for b in BATCHES),
)  # fmt: skip


def seen(factor: float, *cells: tuple[float, int], runs: int = 100) -> list[Seen]:
    return [Seen(p, b, runs, 1000 * factor * ms(p, b), 1200 * factor * ms(p, b)) for p, b in cells]


def after_looks(watch: DriftWatch, *cells: Seen, looks: int = SETTINGS.looks):
    found = None
    for _ in range(looks):
        found = look(watch, PROFILE, cells, SETTINGS)
        watch = found.watch
    assert found is not None
    return found


def test_what_runs_as_profiled_is_left_alone() -> None:
    found = after_looks(start(PROFILE, None), *seen(1.08, (50.0, 4), (50.0, 8)), looks=50)
    assert found.refit is None
    assert found.drift == pytest.approx(1.08)
    assert corrected(PROFILE, found.watch.correction) is PROFILE


def test_too_few_runs_say_nothing() -> None:
    found = after_looks(start(PROFILE, None), *seen(3.0, (50.0, 4), runs=SETTINGS.runs - 1), looks=20)
    assert (found.drift, found.refit) == (None, None)


def test_a_common_factor_scales_the_surface() -> None:
    found = after_looks(start(PROFILE, None), *seen(1.5, (50.0, 4), (50.0, 8)))
    assert found.refit == Correction(digest(PROFILE), 1.5)
    assert "scaled by 1.50" in found.why
    surface = LatencySurface.from_profile(corrected(PROFILE, found.refit))
    assert float(surface.latency_ms(25.0, 2)) == pytest.approx(1.5 * ms(25.0, 2), rel=0.02)


def test_one_look_is_not_enough() -> None:
    """Guards against refits by a hiccup."""
    first = look(start(PROFILE, None), PROFILE, seen(2.0, (50.0, 4)), SETTINGS)
    assert first.refit is None
    back = look(first.watch, PROFILE, seen(1.0, (50.0, 4)), SETTINGS)
    assert back.watch.outside == 0


def test_where_no_factor_fits_the_seen_cells_replace_the_points_beside_them() -> None:
    cells = [*seen(1.0, (50.0, 1)), *seen(2.5, (50.0, 8)), *seen(1.0, (50.0, 2))]
    found = after_looks(start(PROFILE, None), *cells)
    assert found.refit is not None
    assert {(p.gpu_percent, p.batch_size) for p in found.refit.points} == {(50.0, 1), (50.0, 2), (50.0, 8)}
    now = corrected(PROFILE, found.refit)
    assert len({(p.gpu_percent, p.batch_size) for p in now.points}) == len(now.points)
    surface = LatencySurface.from_profile(now)
    assert float(surface.latency_ms(50.0, 8)) == pytest.approx(2.5 * ms(50.0, 8), rel=0.15)
    assert float(surface.latency_ms(50.0, 1)) == pytest.approx(ms(50.0, 1), rel=0.25)


def test_after_a_refit_only_new_runs_count() -> None:
    cells = seen(1.5, (50.0, 4))
    found = after_looks(start(PROFILE, None), *cells)
    assert look(found.watch, PROFILE, cells, SETTINGS).drift is None
    more = [replace_runs(cell, 200) for cell in cells]
    assert look(found.watch, PROFILE, more, SETTINGS).drift == pytest.approx(1.0, rel=0.01)


def test_a_reload_starts_the_counts_anew_and_blinds_nobody() -> None:
    found = after_looks(start(PROFILE, None), *seen(1.5, (50.0, 4), runs=10_000))
    assert look(found.watch, PROFILE, seen(1.5, (50.0, 4), runs=60), SETTINGS).drift is not None


def test_latencies_that_never_settle_are_refitted_ever_more_rarely() -> None:
    """Guards against a plan every few seconds for a model whose run times swing."""
    watch, refits = start(PROFILE, None), []
    for turn in range(600):
        factor = 1.0 if (turn // 5) % 2 else 3.0
        found = look(watch, PROFILE, seen(factor, (50.0, 4), runs=1000 * (turn + 1)), SETTINGS)
        watch = found.watch
        if found.refit is not None:
            refits.append(turn)
    assert len(refits) <= 4


def test_a_ratio_beyond_the_bounds_stops_there_and_is_not_found_again() -> None:
    watch, refits = start(PROFILE, None), 0
    for turn in range(200):
        found = look(watch, PROFILE, seen(100.0, (50.0, 4), runs=1000 * (turn + 1)), SETTINGS)
        watch = found.watch
        refits += found.refit is not None
    assert refits == 1 or watch.correction.points, "the same correction again and again is no news"
    assert watch.correction.scale <= SETTINGS.bounds[1]
    assert refits <= 2


def test_a_stored_correction_holds_for_its_own_profile_only() -> None:
    stored = Correction(digest(PROFILE), 1.7)
    assert start(PROFILE, stored).correction is stored
    anew = replace(
        PROFILE, points=tuple(replace(p, latency_ms_p50=0.9 * p.latency_ms_p50) for p in PROFILE.points)
    )
    assert start(anew, stored).correction == Correction(digest(anew))


def replace_runs(cell: Seen, runs: int) -> Seen:
    return cell._replace(runs=runs)


def test_a_correction_changes_how_long_runs_take_and_not_what_co_runners_do_to_them() -> None:
    """Co-runs beside runs alone: corrected on one side only, a faster model would seem to suffer more."""
    other = replace(PROFILE, name="n")
    corun = tuple(
        CorunPoint(tuple(CorunMember(n, p, 4, 1.6 * ms(p, 4), 4e3 / (1.6 * ms(p, 4))) for n in ("m", "n")))
        for p in (25.0, 50.0)
    )
    device = Device("g", 100, 1 << 30, "d", "r")
    profiles = ProfileSet(device, {"m": PROFILE, "n": other}, corun)
    found = corrected_set(profiles, {"m": Correction(digest(PROFILE), 0.5)})

    def slowdowns(each: ProfileSet) -> list[float]:
        surfaces = {name: LatencySurface.from_profile(profile) for name, profile in each.models.items()}
        fit = fit_interference(surfaces, each.corun)
        return [float(fit.slowdown(name, 50.0)) for name in ("m", "n")]

    assert slowdowns(found) == pytest.approx(slowdowns(profiles)) and slowdowns(profiles)[0] > 1.4
    assert float(LatencySurface.from_profile(found.models["m"]).latency_ms(50.0, 4)) == pytest.approx(
        0.5 * ms(50.0, 4)
    )
    assert found.models["n"] is other and found.corun[0].members[1] == corun[0].members[1]
    assert found.corun[0].members[0].throughput_per_s == pytest.approx(
        2 * corun[0].members[0].throughput_per_s
    )


def runs_beside(slowdown: float, told: float, crowds: tuple[float, ...]) -> list[Seen]:
    """What an engine told a slowdown of `told` keeps of 64 runs a cell beside co-runners, 2% of noise."""
    rng = np.random.default_rng(5)
    times = RunTimes((50.0,), 8, EngineModel("m", 50.0, 4, 0, 1.0, OnLate.SERVE, 50.0))
    for rows in (2, 4):
        for crowd in np.resize(crowds, 64):
            whole_us = 1e3 * ms(50.0, rows) * (1 + slowdown * crowd) * rng.normal(1.0, 0.02)
            times.observe(0, rows, whole_us / (1 + told * crowd), whole_us, float(crowd))
    return list(times.seen())


def test_what_co_runners_do_is_read_from_runs_beside_them_and_the_profile_is_left_alone() -> None:
    """The co-runs said 0.8, service shows 0.3: runs alone are as profiled, though told runs look faster."""
    cells = runs_beside(0.3, 0.8, (0.0, 0.5, 1.0, 1.5))
    found = after_looks(start(PROFILE, None, 0.8), *cells)
    assert found.refit is not None and found.refit.slowdown == pytest.approx(0.3, abs=0.03)
    assert found.drift == pytest.approx(1.0, abs=0.02) and found.refit.scale == pytest.approx(1.0, abs=0.02)
    assert "co-runners of 100% slow it by 3" in found.why or "co-runners of 100% slow it by 2" in found.why
    device = Device("g", 100, 1 << 30, "d", "r")
    profiles = corrected_set(ProfileSet(device, {"m": PROFILE}), {"m": found.refit})
    surfaces = {"m": LatencySurface.from_profile(profiles.models["m"])}
    assert interference_of(profiles, surfaces).k["m"] == found.refit.slowdown
    # Told what was found, runs say nothing new.
    again = after_looks(start(PROFILE, found.refit, 0.8), *runs_beside(0.3, found.refit.slowdown, (0.0, 1.0)))
    assert again.refit is None


@pytest.mark.parametrize(
    ("crowds", "believed"),
    [((1.0, 1.0), 0.8), ((0.0, 0.02), 0.8), ((0.0, 1.0), None)],
    ids=["always the same co-runners", "hardly ever any", "a CPU"],
)
def test_runs_that_cannot_tell_change_no_slowdown(crowds: tuple[float, ...], believed: float | None) -> None:
    found = after_looks(start(PROFILE, None, believed), *runs_beside(0.8, 0.8, crowds))
    assert found.refit is None and found.watch.correction.slowdown is None


def test_slowdowns_are_looked_at_on_a_gpu_only() -> None:
    gpu, cpu = Device("g", 100, 1 << 30, "d", "r"), Device("cpu", 4, 1 << 30, "cpu", "r")
    assert slowdowns(ProfileSet(gpu, {"m": PROFILE})) == {"m": 0.0}
    assert slowdowns(ProfileSet(cpu, {"m": PROFILE})) == {}
