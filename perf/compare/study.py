"""What is known so far, where it goes, how much time is left."""

from __future__ import annotations

import argparse
import json
import time
import traceback
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import onnxruntime

from compare.alternatives import Alternative
from compare.cells import Cell
from compare.gpu_watch import Nvml
from compare.peak import PeakSearch, Trial
from compare.planning import Learned, Planner
from dstack_sched.adapters.correction_store import correction_of
from dstack_sched.errors import DstackError, InputError
from report import commit, now, write_report

COMMAND = "make perf-h100-compare"
ATTAINMENT = 0.99
SEED = 20261122
RESERVE_S = 12.0  # of the time budget: stopping servers, writing the report


class Study:
    """One run. `results` are those of compare.json, what this run adds included. Errors: InputError when what
    is there was made on another kind of device."""

    def __init__(self, options: argparse.Namespace, nvml: Nvml, planner: Planner) -> None:
        self.options, self.nvml, self.planner = options, nvml, planner
        self.started_s = time.monotonic()
        self.path: Path = options.out / "compare.json"
        known = json.loads(self.path.read_text()) if self.path.exists() else {}
        if known and known["device"] != options.device:
            raise InputError(f"{self.path} is of device {known['device']}; give another --out")
        self.results: list[dict[str, Any]] = known.get("cells", [])
        self.solo_ms: dict[str, float] = known.get("solo_ms", {})
        self.problems: list[str] = known.get("problems", [])
        self.searches: dict[str, Any] = known.get("static_searches", {})
        self._learned: dict[str, Any] = known.get("learned", {})
        self.runs: list[dict[str, Any]] = known.get("runs", [])
        self.runs.append({"date": now(), "commit": commit(), "arguments": options.arguments})
        self.versions: dict[str, str] = known.get("versions", {}) | {"onnxruntime": onnxruntime.__version__}
        self._gpu = known.get("gpu") or {"name": nvml.name(), "driver": nvml.driver()}

    def left_s(self) -> float:
        """Of the time budget."""
        budget_s: float = self.options.time_budget_s
        return budget_s - RESERVE_S - (time.monotonic() - self.started_s)

    def say(self, text: str) -> None:
        print(f"[{time.monotonic() - self.started_s:6.1f} s] {text}", flush=True)

    def problem(self, text: str, error: Exception | None = None) -> None:
        """Note what went wrong; of an error that is no plain one, where it came from goes to the output."""
        if error is not None:
            kind = "" if isinstance(error, DstackError) else f"{type(error).__name__}: "
            text = f"{text}: {kind}{' '.join(str(error).split())[:600]}"
            if kind:
                traceback.print_exception(error)
        self.problems.append(f"{now()}: {text}")
        self.say(f"PROBLEM {text}")

    def find(self, cell: Cell, alternative: Alternative) -> dict[str, Any] | None:
        """What is known of an alternative in a cell."""
        for each in self.results:
            if each["cell"] == cell.key and each["policy"] == alternative.name:
                return each
        return None

    def forget(self, cell: Cell, alternative: Alternative) -> None:
        """Measure it anew (--again)."""
        self.results = [
            each for each in self.results
            if (each["cell"], each["policy"]) != (cell.key, alternative.name)
        ]  # fmt: skip
        if alternative.shares == "searched":
            self.searches.pop(cell.key, None)
        if alternative.learn:
            self._learned.pop(cell.key, None)

    def repeats(self, cell: Cell, alternative: Alternative) -> int:
        known = self.find(cell, alternative)
        return len(known["repeats"]) if known else 0

    def is_done(self, cell: Cell, alternative: Alternative) -> bool:
        known = self.find(cell, alternative)
        if known is None or len(known["repeats"]) < self.options.repeats:
            return False
        return not self.options.curve or bool(known["curve_done"]) or not known["peak_per_s"]

    def learned(self, cell: Cell) -> Learned | None:
        """What service has shown of the profiles in a cell; None where nobody has looked."""
        known = self._learned.get(cell.key)
        if known is None:
            return None
        return tuple((network, correction_of(raw, network)) for network, raw in known["corrections"].items())

    def learn(self, cell: Cell, learned: Learned, seconds: float) -> None:
        """Keep it, and the time that it took so far."""
        found = {network: asdict(each) for network, each in learned}
        self._learned[cell.key] = {"seconds": round(seconds, 1), "corrections": found}
        self.write()

    def keep(self, result: Mapping[str, Any]) -> None:
        """Add or replace a result, and write all."""
        key = (result["cell"], result["policy"])
        kept = [each for each in self.results if (each["cell"], each["policy"]) != key]
        self.results = [*kept, dict(result)]
        self.write()

    def write(self) -> None:
        """compare.json, whole or not at all."""
        write_report(
            self.path, COMMAND,
            {"device": self.options.device, "gpu": self._gpu, "attainment": ATTAINMENT, "seed": SEED,
             "seconds": self.options.seconds, "profiles": str(self.options.profiles.name),
             "versions": self.versions, "runs": self.runs, "solo_ms": self.solo_ms,
             "cells": self.results, "learned": self._learned, "static_searches": self.searches,
             "problems": self.problems},
        )  # fmt: skip


def search_figures(found: PeakSearch, seed: int) -> dict[str, Any]:
    """One repeat, as compare.json keeps it."""
    return {
        "seed": seed,
        "peak_per_s": round(found.peak_per_s, 1),
        "failed_at_per_s": None if found.failed_at_per_s is None else round(found.failed_at_per_s, 1),
        "closed": found.closed,
        "date": now(),
        "trials": [
            [round(trial.rate_per_s, 1), round(trial.attainment, 4), round(trial.goodput_per_s, 1)]
            for trial in found.trials
        ],
    }


def best_trial(found: PeakSearch) -> dict[str, Any] | None:
    """All figures of the trial at the peak."""
    held = [trial for trial in found.trials if trial.rate_per_s == found.peak_per_s]
    return asdict(held[-1]) if held else None


def worst_miss(found: PeakSearch) -> dict[str, Any] | None:
    """All figures of the trial at the smallest rate that did not hold, but its timeline."""
    missed = [t for t in found.trials if t.rate_per_s == found.failed_at_per_s and t.figures]
    if not missed:
        return None
    figures = {key: value for key, value in missed[-1].figures.items() if key != "timeline"}
    return {**asdict(missed[-1]), "figures": figures}


def point(trial: Trial) -> dict[str, Any]:
    """One point of the goodput curve."""
    return {
        "offered_per_s": round(trial.rate_per_s, 1),
        "goodput_per_s": round(trial.goodput_per_s, 1),
        "attainment": round(trial.attainment, 4),
        "jain_fairness": trial.figures["jain_fairness"],
        "gpu": trial.figures["gpu"],
        "models": {
            name: [each["p50_ms"], each["p99_ms"], each["attainment"]]
            for name, each in trial.figures["models"].items()
        },
    }
