"""perf/staying_up: growth is told from restarts, noise and what dead stubs cost; roles of processes."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "perf"))

from staying_up.growth import MIN_SAMPLES, grows, growths
from staying_up.processes import Sample, role_of

RUN_S = 1800.0


def samples(
    slope_per_hour: float = 0.0,
    *,
    restart_every_s: float = RUN_S,
    per_dead: float = 0.0,
    noise: float = 0.2,
    seed: int = 0,
) -> list[Sample]:
    """One role over half an hour; a process that is restarted comes back at another level."""
    rng = np.random.default_rng(seed)
    found = []
    for at_s in np.arange(0.0, RUN_S, 5.0):
        pid, age_s = divmod(at_s, restart_every_s)
        dead = int(age_s // 300) if per_dead else 0
        level = 50.0 + 7.0 * pid + slope_per_hour * at_s / 3600 + per_dead * dead
        memory = level + rng.normal(0.0, noise)
        found.append(
            Sample(float(at_s), "triton", int(pid), float(age_s), memory, memory, memory, 60, 20, 30, dead)
        )
    return found


def memory_of(found: list[Sample], tolerance: float = 3.0) -> tuple[float, bool]:
    growth = growths(found, "triton", 60.0, RUN_S)["rss_mib"]
    return growth.over_run, grows(growth, tolerance)


@pytest.mark.parametrize("seed", range(5))
def test_restarts_at_other_levels_and_noise_are_no_growth(seed: int) -> None:
    over_run, growing = memory_of(samples(restart_every_s=480.0, seed=seed))
    assert abs(over_run) < 1.0 and not growing


@pytest.mark.parametrize("restart_every_s", [RUN_S, 480.0])
def test_a_leak_is_found_through_restarts(restart_every_s: float) -> None:
    over_run, growing = memory_of(samples(12.0, restart_every_s=restart_every_s))
    assert over_run == pytest.approx(6.0, abs=0.7) and growing


def test_what_dead_stubs_cost_is_told_from_a_leak() -> None:
    found = samples(per_dead=1.5)
    growth = growths(found, "triton", 60.0, RUN_S)["rss_mib"]
    assert growth.per_dead_stub == pytest.approx(1.5, abs=0.4)
    assert not grows(growth, 3.0)
    both = growths(samples(12.0, per_dead=1.5), "triton", 60.0, RUN_S)["rss_mib"]
    assert both.over_run == pytest.approx(6.0, abs=1.0) and grows(both, 3.0)


def test_warm_up_and_short_lives_are_left_out() -> None:
    young = [replace(each, age_s=each.age_s % 60) for each in samples(100.0)]
    assert growths(young, "triton", 60.0, RUN_S) == {}
    assert growths(samples()[: 12 + MIN_SAMPLES - 1], "triton", 60.0, RUN_S) == {}
    assert growths(samples(), "arbiter", 60.0, RUN_S) == {}


@pytest.mark.parametrize(
    ("argv", "role"),
    [
        (["/x/bin/tritonserver", "--model-repository=/m"], "triton"),
        (["/x/triton_python_backend_stub", "/m/alpha/1/model.py", "shm"], "stub of alpha"),
        (["python", "-I", "-S", "/x/adapters/keeper.py", "{}"], "keeper"),
        (["python", "-m", "dstack_sched", "serve", "/m"], "serve"),
        (["python", "-m", "dstack_sched", "arbiter"], "arbiter"),
        (["python", "-m", "dstack_sched", "run", "/m"], "controller"),
        (["python", "-m", "dstack_sched", "status"], None),
        (["sleep", "1"], None),
        ([], None),
    ],
)
def test_roles(argv: list[str], role: str | None) -> None:
    assert role_of(argv) == role
