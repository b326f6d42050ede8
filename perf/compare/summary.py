"""The figures that the comparison has targets for, from compare.json alone."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from compare.alternatives import ALTERNATIVES
from compare.cells import HEADLINE
from compare.planning import NOT_EXACT

OURS = "dstack"
FREE_RIVALS = ("mps-default", "mps-static", "rate-limiter", "one-process")  # (c), (d), (f), (g)
SMALL_SLO = 3.0

Result = Mapping[str, Any]
Cells = Mapping[str, Mapping[str, Result]]


@dataclass(frozen=True, slots=True)
class Target:
    """One target, what was measured for it, and whether it is met; None: not measured."""

    text: str
    measured: str
    met: bool | None


def by_cell(document: Mapping[str, Any]) -> dict[str, dict[str, Result]]:
    """cell -> policy -> result."""
    cells: dict[str, dict[str, Result]] = {}
    for each in document["cells"]:
        cells.setdefault(each["cell"], {})[each["policy"]] = each
    return cells


def ratio(cell: Mapping[str, Result], rival: str, of: str = OURS) -> float | None:
    """One peak over another; None where one is missing."""
    if of not in cell or rival not in cell or not cell[rival]["peak_per_s"]:
        return None
    return float(cell[of]["peak_per_s"] / cell[rival]["peak_per_s"])


def ratios(cells: Cells, rival: str) -> dict[str, float]:
    """Cell -> our peak over the rival's, where both were measured."""
    return {key: r for key, cell in cells.items() if (r := ratio(cell, rival)) is not None}


def against_best_free(cells: Cells) -> dict[str, float]:
    """Cell -> our peak over the best of (c), (d), (f), (g) that were measured there."""
    found = {}
    for key, cell in cells.items():
        known = [r for rival in FREE_RIVALS if (r := ratio(cell, rival)) is not None]
        if known:
            found[key] = min(known)
    return found


def fraction_of_ideal(cells: Cells) -> dict[str, float]:
    return {
        key: cell[OURS]["peak_per_s"] / cell[OURS]["ideal_corun_per_s"]
        for key, cell in cells.items()
        if OURS in cell and cell[OURS]["ideal_corun_per_s"]
    }


def time_to_find_s(document: Mapping[str, Any], cells: Cells, key: str) -> float | None:
    """What D-STACK took to find the plan of a cell: the longest plan, and the service it learned from."""
    plan_s = cells.get(key, {}).get(OURS, {}).get("plan_s")
    learned = document.get("learned", {}).get(key)
    return plan_s + (learned["seconds"] if learned else 0.0) if plan_s else None


def predictions(cells: Cells) -> dict[tuple[str, str], tuple[float, float]]:
    """(cell, policy) -> (predicted, measured) peak, of the alternatives that the simulator knows."""
    return {
        (key, policy): (each["predicted_peak_per_s"], each["peak_per_s"])
        for key, cell in cells.items()
        for policy, each in cell.items()
        if each["predicted_peak_per_s"] and each["peak_per_s"] and policy not in NOT_EXACT
    }


def prediction_error(found: Mapping[Any, tuple[float, float]]) -> float | None:
    """Median of |predicted / measured - 1|."""
    return median(abs(predicted / measured - 1) for predicted, measured in found.values())


def median(values: Iterable[float]) -> float | None:
    """None of nothing."""
    known = list(values)
    return statistics.median(known) if known else None


def utilization(result: Result) -> float | None:
    """SM activity at the peak, of NVML's counter."""
    value = (result["at_peak"] or {}).get("figures", {}).get("gpu", {}).get("sm_activity")
    return None if value is None else float(value)


def targets(document: Mapping[str, Any]) -> list[Target]:
    """Every target of the comparison."""
    cells = by_cell(document)
    sliced = ratios(cells, "time-sliced")
    small = {k: r for k, r in sliced.items() if next(iter(cells[k].values()))["slo_factor"] <= SMALL_SLO}
    headline = {each.key: sliced[each.key] for each in HEADLINE if each.key in sliced}
    free, static = against_best_free(cells), ratios(cells, "best-static")
    searched = {
        key: search["search_s"] / found_s
        for key, search in document.get("static_searches", {}).items()
        if search["search_s"] and (found_s := time_to_find_s(document, cells, key))
    }
    steady = {k: f for k, f in fraction_of_ideal(cells).items() if k.endswith(":poisson")}
    busy = {
        key: ours / theirs
        for key, cell in cells.items()
        if {OURS, "time-sliced"} <= cell.keys()
        and (ours := utilization(cell[OURS])) and (theirs := utilization(cell["time-sliced"]))
    }  # fmt: skip
    fair = {
        key: cell[OURS]["saturated"]["jain_fairness"]
        for key, cell in cells.items()
        if OURS in cell and cell[OURS].get("curve_done") and "saturated" in cell[OURS]
    }
    errors = {f"{k} {p}": a / b for (k, p), (a, b) in predictions(cells).items()}
    off = prediction_error(predictions(cells))
    return [
        _least("against time-sliced, SLOs of 3x: >= 4", small, 4.0),
        _least("against time-sliced, C-4 and C-7 at 5x: >= 2", headline, 2.0),
        _middle("against the best of (c), (d), (f), (g): median >= 1.3", free, 1.3),
        _least("against the best of (c), (d), (f), (g): never below 1.0", free, 1.0),
        _least("against best static: >= 1.15", static, 1.15),
        _least("best static's search takes >= 10 times as long as ours", searched, 10.0),
        _least("fraction of the ideal on steady mixes: >= 0.9", steady, 0.9),
        _least("SM activity at the peak over time-sliced's: >= 1.6", busy, 1.6),
        _least("Jain fairness at 1.5 times the peak: >= 0.95", fair, 0.95),
        Target(
            "the simulator's peak is within 10% in the median",
            f"{off:.1%} of {len(errors)}" if off is not None else "-",
            None if off is None else off <= 0.1,
        ),
    ]


def _least(text: str, found: Mapping[str, float], wanted: float) -> Target:
    return _target(text, found, wanted, min)


def _middle(text: str, found: Mapping[str, float], wanted: float) -> Target:
    return _target(text, found, wanted, statistics.median)


def _target(
    text: str, found: Mapping[str, float], wanted: float, pick: Callable[[Iterable[float]], float]
) -> Target:
    if not found:
        return Target(text, "-", None)
    shown = ", ".join(f"{key} {value:.2f}" for key, value in found.items())
    return Target(text, shown, pick(found.values()) >= wanted)


def policies_of(document: Mapping[str, Any], *, variants: bool = False) -> list[str]:
    """The alternatives that occur, in the letters' order; with variants, those instead."""
    there = {each["policy"]: each["letter"] for each in document["cells"]}
    chosen = [name for name in there if (name not in ALTERNATIVES) == variants]
    return sorted(chosen, key=lambda name: (there[name], name))
