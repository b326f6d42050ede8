"""The peak of an alternative: the largest total rate at which every model keeps its attainment."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

NEAR = 0.95  # attainment of a rate not far above the peak
FAR = 0.6  # of one far above


@dataclass(slots=True)
class Trial:
    """One stretch of load at a total rate. attainment: of the worst model; failures count as misses."""

    rate_per_s: float
    attainment: float
    goodput_per_s: float
    figures: dict[str, Any] = field(default_factory=dict)


@dataclass(slots=True)
class PeakSearch:
    """peak_per_s: largest rate that held. failed_at_per_s: smallest that did not; None: none was tried.
    closed: they are as close as was wanted."""

    trials: list[Trial] = field(default_factory=list)
    peak_per_s: float = 0.0
    failed_at_per_s: float | None = None
    closed: bool = False

    def add(self, trial: Trial, wanted: float) -> bool:
        """Note a trial; whether it held. A rate above one that failed before does not count as held."""
        self.trials.append(trial)
        held = trial.attainment >= wanted
        if held and (self.failed_at_per_s is None or trial.rate_per_s < self.failed_at_per_s):
            self.peak_per_s = max(self.peak_per_s, trial.rate_per_s)
        if not held:
            failed = self.failed_at_per_s
            self.failed_at_per_s = trial.rate_per_s if failed is None else min(failed, trial.rate_per_s)
            if self.peak_per_s >= self.failed_at_per_s:  # it held by chance: the peak is below this rate
                below = [t for t in self.trials if t.rate_per_s < trial.rate_per_s and t.attainment >= wanted]
                self.peak_per_s = max((t.rate_per_s for t in below), default=0.0)
        return held


def find_peak(
    run: Callable[[float], Trial],
    guess_per_s: float,
    *,
    wanted: float,
    tolerance: float = 0.05,
    max_trials: int = 9,
    step: float = 1.25,
    floor_per_s: float = 5.0,
    worth_per_s: float = 0.0,
    left_s: Callable[[], float] = lambda: float("inf"),
    trial_s: float = 0.0,
) -> PeakSearch:
    """Bracket from a guess by factors of `step`, larger ones while it is clearly missed and smaller ones once
    it is near; then bisect (geometric) down to `tolerance`.

    Ends early when max_trials are used, less than trial_s is left, or the peak is known to be below
    worth_per_s; the search then says what is known.
    """
    found = PeakSearch()
    rate, steps = guess_per_s, 0
    while len(found.trials) < max_trials and left_s() > trial_s:
        trial = run(rate)
        found.add(trial, wanted)
        low, high = found.peak_per_s, found.failed_at_per_s
        if high is None:
            steps += 1
            rate = low * step ** min(steps, 3)
        elif high <= worth_per_s or (low <= 0.0 and high / step < floor_per_s):
            break
        elif low <= 0.0:
            steps += 1
            near = trial.attainment >= NEAR
            rate = high / (step**0.5 if near else step ** min(steps + (trial.attainment < FAR), 3))
        elif high / low - 1.0 <= tolerance:
            found.closed = True
            break
        else:
            rate = (low * high) ** 0.5
    return found
