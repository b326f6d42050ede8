"""Which forecast plans best for arrivals that were recorded: how much is lost against how much is provided.

    python perf/forecast.py        ../shared/traces/azure_llm_2023_conv.csv -> perf/reports/forecast.json

Each forecast sees the counts of whole seconds and sets the capacity two seconds later (a plan takes time).
A fluid queue with that capacity loses what would wait longer than 0.2 s. Every forecast has a knob (a
factor, or the number of sigmas for bursts); at the setting that loses 2% of the rows, what counts is how
much capacity it provided over the mean rate. The trace is sped up to three rates, as it is and in steps of
a minute."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from dstack_sched.app.forecast import ForecastSettings, dispersion, forecast
from dstack_sched.sim.arrivals import parse_trace
from report import REPORTS, write_report
from shifting.scenario import TRACE, warped

SECONDS, LAG_S, WAIT_S, WARM_S, LOST = 600, 2, 0.2, 20, 0.02
RATES_PER_S = (5.5, 30.0, 100.0)
STEPS = (0.3, 0.5, 1.0, 1.2, 2.0)
FACTORS = (1.0, 1.1, 1.2, 1.35, 1.5, 1.75, 2.0, 2.5, 3.0, 4.0)
SIGMAS = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 9.0)
Knobbed = Callable[
    [np.ndarray], tuple[float, float]
]  # counts so far -> (forecast, what one unit of the knob adds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--out", type=Path, default=REPORTS / "forecast.json")
    arguments = parser.parse_args()
    cases = dict(all_cases())
    table: dict[str, dict[str, float | None]] = {}
    for name, (rule, knobs) in rules().items():
        began_s = time.perf_counter()
        table[name] = {case: provided(rule, knobs, series) for case, series in cases.items()}
        print(
            f"{name:24s}",
            {k: v and round(v, 2) for k, v in table[name].items()},
            f"{time.perf_counter() - began_s:.1f} s",
        )
    figures = {"trace": "azure_llm_2023_conv.csv, timing only", "lost": LOST, "provided_over_mean": table}
    print(write_report(arguments.out, "make perf-forecast", figures), "written")


def all_cases() -> Iterator[tuple[str, list[np.ndarray]]]:
    """Name -> counts of SECONDS seconds, one series a stripe of the trace."""
    trace = np.asarray(parse_trace(TRACE.read_text(encoding="utf-8"), str(TRACE)), np.float64)
    for rate in RATES_PER_S:
        for shape in ("as recorded", "steps"):
            series = []
            for stripe in range(3):
                if shape == "steps":
                    per_s = rate * np.random.default_rng(stripe).permutation(np.tile(STEPS, 2))
                    times = warped(trace, per_s, 60.0, stripe)
                else:
                    times = warped(trace, [rate], float(SECONDS), stripe)
                series.append(np.histogram(times, np.arange(SECONDS + 1))[0].astype(float))
            yield f"{shape}, {rate:g}/s", series


def rules() -> dict[str, tuple[Knobbed, tuple[float, ...]]]:
    found: dict[str, tuple[Knobbed, tuple[float, ...]]] = {}
    for window in (5, 10, 30, 60):
        found[f"mean of {window} s x factor"] = scaled(lambda c, w=window: c[-w:].mean()), FACTORS
    for weight in (0.1, 0.3):
        found[f"EWMA {weight} x factor"] = scaled(lambda c, a=weight: ewma(c, a)), FACTORS
    found["Holt x factor"] = scaled(holt), FACTORS
    found["peak of 30 s (5 s means) x factor"] = scaled(peak), FACTORS
    for window in (10, 30):
        found[f"mean of {window} s + bursts"] = (lambda c, w=window: bursty(c[-w:])), SIGMAS
    for sigmas in (2.5, 3.0, 4.0):
        found[f"since the last change, {sigmas:g} sigmas"] = since_change(sigmas), SIGMAS
    return found


def scaled(base: Callable[[np.ndarray], float]) -> Knobbed:
    return lambda counts: (0.0, float(base(counts)))


def ewma(counts: np.ndarray, weight: float) -> float:
    weights = (1 - weight) ** np.arange(min(counts.size, 200))
    return float((counts[-weights.size :][::-1] * weights).sum() / weights.sum())


def holt(
    counts: np.ndarray, level_weight: float = 0.3, trend_weight: float = 0.1, ahead_s: float = 5.0
) -> float:
    level, trend = counts[0], 0.0
    for count in counts[-120:]:
        before, level = level, level_weight * count + (1 - level_weight) * (level + trend)
        trend = trend_weight * (level - before) + (1 - trend_weight) * trend
    return max(float(level + ahead_s * max(trend, 0.0)), 0.1)


def peak(counts: np.ndarray, window: int = 30, part: int = 5) -> float:
    last = counts[-window:]
    if last.size < part:
        return float(last.mean())
    return float(last[last.size % part :].reshape(-1, part).mean(axis=1).max())


def bursty(counts: np.ndarray) -> tuple[float, float]:
    mean = float(counts.mean())
    return mean, float(np.sqrt(dispersion(np.ones(counts.size), counts) * mean / ForecastSettings().burst_s))


def since_change(sigmas: float) -> Knobbed:
    settings = ForecastSettings(change_sigmas=sigmas, burst_sigmas=1.0)

    def rule(counts: np.ndarray) -> tuple[float, float]:
        steps = [(1.0, float(count)) for count in counts[-int(settings.window_s) :]]
        found = forecast(steps, settings)
        assert found is not None
        return found.mean_per_s, found.rate_per_s - found.mean_per_s

    return rule


def provided(rule: Knobbed, knobs: tuple[float, ...], series: list[np.ndarray]) -> float | None:
    """Capacity over mean rate at the knob that loses LOST of the rows, interpolated; None where none does."""
    parts = [
        np.array([rule(counts[: k + 1]) for k in range(WARM_S - LAG_S, counts.size - LAG_S)])
        for counts in series
    ]
    lost, over = [], []
    for knob in knobs:
        results = [
            fluid(part[:, 0] + knob * part[:, 1], counts) for part, counts in zip(parts, series, strict=True)
        ]
        lost.append(np.mean([each[0] for each in results]))
        over.append(np.mean([each[1] for each in results]))
    if min(lost) > LOST:
        return None
    order = np.argsort(lost)
    return float(np.interp(np.log(LOST), np.log(np.array(lost)[order] + 1e-6), np.array(over)[order]))


def fluid(capacity: np.ndarray, counts: np.ndarray) -> tuple[float, float]:
    """(share lost, capacity over mean rate). capacity[i] holds in second WARM_S + i."""
    waiting = lost = 0.0
    arrived = counts[WARM_S:]
    for rows, limit in zip(arrived, capacity, strict=True):
        waiting = max(waiting + rows - limit, 0.0)
        excess = waiting - limit * WAIT_S
        if excess > 0:
            lost += excess
            waiting -= excess
    return lost / arrived.sum(), float(capacity.mean() / arrived.mean())


if __name__ == "__main__":
    main()
