"""perf/service_world.py: the run times of a known world are found again in the trials it would have shown."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "perf"))

from compare.cells import Cell
from compare.planning import case_of
from dstack_sched.adapters.profile_files import read_profiles
from dstack_sched.sim.study import simulate
from service_world import World, fit_world, in_world, markdown, trials_of

ROOT = Path(__file__).resolve().parents[2]
PROFILES = read_profiles(ROOT / "perf" / "reports" / "h100" / "profiles.json")
SOLO = {"resnet50": 2.4, "bert_base": 2.6}
CELL = Cell.parse("C-2:5")


def measured(world: World, shares: dict[str, float], policy: str, rate_per_s: float) -> dict[str, Any]:
    """A result as compare.json has it, of a trial in that world."""
    case = case_of(PROFILES, CELL, tuple(sorted(SOLO.items())))
    if policy == "mps-static":
        case = replace(case, shares=replace(case.shares, gpu_percent=shares))
    case = in_world(case, world, PROFILES).scaled(rate_per_s / 1000.0)
    run = simulate(case, policy, 2.0, 9, record=True)
    assert run.intervals is not None
    stages = {}
    for model in SOLO:
        runs_ms = [(x.end_us - x.start_us) / 1e3 for x in run.intervals if x.name == model]
        stages[model] = {"run": sum(runs_ms) / len(runs_ms)}
    trial = {"rate_per_s": rate_per_s, "figures": {"stages_ms": stages}}
    return {
        "cell": CELL.key, "policy": policy, "at_peak": trial, "at_miss": {},
        "shares": {model: [share, 8, 1] for model, share in shares.items()},
    }  # fmt: skip


def test_a_known_world_is_found_again() -> None:
    factor = dict.fromkeys(PROFILES.models, 1.0) | {"resnet50": 0.7, "bert_base": 1.3}
    slowdown = dict.fromkeys(PROFILES.models, 0.3) | {"resnet50": 0.2, "bert_base": 0.6}
    world = World(factor, slowdown)
    whole, halves = dict.fromkeys(SOLO, 100.0), dict.fromkeys(SOLO, 50.0)
    cells = [
        measured(world, halves, "mps-static", 600.0), measured(world, halves, "mps-static", 2000.0),
        measured(world, whole, "mps-default", 600.0), measured(world, whole, "mps-default", 2400.0),
    ]  # fmt: skip
    trials = trials_of({"cells": cells}, PROFILES, tuple(sorted(SOLO.items())))
    found = fit_world(trials, PROFILES)
    assert found.error < 0.05
    for network in SOLO:
        assert found.factor[network] == pytest.approx(factor[network], rel=0.1)
        assert found.slowdown[network] == pytest.approx(slowdown[network], abs=0.2)


def test_the_table_has_what_learning_brings() -> None:
    rounds = [{"peak_per_s": 1000.0}, {"peak_per_s": 1500.0}]
    rivals = {"mps-static": 1200.0, "mps-default": 900.0}
    content = {
        "report": "r", "run_time_error": 0.08, "fitted": {"a": {"factor": 0.8, "slowdown": 0.3}},
        "cells": [{"cell": "C-2:5", "rivals_per_s": rivals, "dstack": rounds}],
    }  # fmt: skip
    text = "\n".join(markdown(content))
    assert "| C-2:5 | 1200 | 900 | 1000 | 1500 | - | 1.25 |" in text and "| a | 0.80 | 0.30 |" in text
