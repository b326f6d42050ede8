"""Alternative (e): the best fixed shares, found by trial, as Model Analyzer finds configurations.

Candidates: the knee shares and equal shares, each scaled to promise a total of 100% to 400% of the GPU, no
limits at all, twice the batch size, two instances a model. Each is deployed and given a little more than the
best peak so far; one that holds it is the best from then on, and its own peak is searched. The best is then
measured as every alternative is. A search that was cut short goes on where it was (decisions/0120 says why
this is not Model Analyzer itself).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from compare.alternatives import MAX_BATCH_SIZE, Served
from compare.peak import PeakSearch, Trial, find_peak

PROMISES_PERCENT = (200.0, 150.0, 300.0, 100.0, 400.0)  # the likeliest first
LEAST_PERCENT = 5.0
BETTER = 1.06  # a candidate must hold this much more than the best so far


def candidates(knees: Mapping[str, Served]) -> Iterator[tuple[str, dict[str, Served]]]:
    """(name, deployment) of each candidate, the likeliest first, none twice. knees: each model at its planned
    share."""
    seen: list[dict[str, Served]] = [dict(knees)]
    for name, shares in _candidates(knees):
        if shares not in seen:
            seen.append(shares)
            yield name, shares


def _candidates(knees: Mapping[str, Served]) -> Iterator[tuple[str, dict[str, Served]]]:
    total = sum(each.gpu_percent for each in knees.values())
    equal = {model: 100.0 / len(knees) for model in knees}
    proportional = {model: 100.0 * each.gpu_percent / total for model, each in knees.items()}
    yield "no limits", {model: replace(each, gpu_percent=100.0) for model, each in knees.items()}
    for promise in PROMISES_PERCENT:
        for name, split in (("knee", proportional), ("equal", equal)):
            yield f"{name} shares, {promise:g}% promised", shared(knees, split, promise)
    double = shared(knees, proportional, 200.0)
    yield (
        "knee shares, 200% promised, batches twice as large",
        {m: replace(s, batch_size=min(MAX_BATCH_SIZE, 2 * s.batch_size)) for m, s in double.items()},
    )
    half = shared(knees, proportional, 100.0)
    yield (
        "two instances a model, knee shares, 200% promised in all",
        {m: replace(s, instances=2) for m, s in half.items()},
    )


def shared(knees: Mapping[str, Served], split: Mapping[str, float], promise: float) -> dict[str, Served]:
    """The knees' deployment with `promise` percent of the GPU in all, split so (percents that sum to 100)."""
    return {
        model: replace(
            each, gpu_percent=round(min(100.0, max(LEAST_PERCENT, split[model] * promise / 100.0)), 1)
        )
        for model, each in knees.items()
    }


@dataclass(slots=True)
class StaticSearch:
    """What is known: the peak of the best candidate, its deployment, all that were tried; seconds spent."""

    best: str = ""
    peak_per_s: float = 0.0
    shares: dict[str, Served] = field(default_factory=dict)
    tried: list[dict[str, Any]] = field(default_factory=list)
    search_s: float = 0.0
    complete: bool = False

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> StaticSearch:
        shares = {model: Served(**each) for model, each in document["shares"].items()}
        return cls(**{**document, "shares": shares})

    def run(
        self,
        knees: Mapping[str, Served],
        deploy: Callable[[Mapping[str, Served]], None],
        run: Callable[[float], Trial],
        *,
        wanted: float,
        start_per_s: float,
        left_s: Callable[[], float],
        candidate_s: float,
        trial_s: float,
        say: Callable[[str], None],
        keep: Callable[[], None],
    ) -> None:
        """Try what was not tried while there is time. knees: (d)'s deployment, whose peak is start_per_s
        where that is known, else 0. candidate_s: what one candidate takes at least."""
        if not self.shares and start_per_s > 0:
            self.best, self.peak_per_s, self.shares = "knee shares as planned", start_per_s, dict(knees)
        known = {each["shares"] for each in self.tried}
        for name, shares in candidates(knees):
            if name in known:
                continue
            if left_s() < candidate_s:
                say(f"no time left to try {name}")
                return
            began = time.monotonic()
            deploy(shares)
            found = self._peak(run, wanted, left_s, trial_s)
            self.search_s = round(self.search_s + time.monotonic() - began, 1)
            held = found.peak_per_s
            self.tried.append(
                {"shares": name, "held_per_s": round(held, 1), "failed_at_per_s": found.failed_at_per_s}
            )
            if held > self.peak_per_s:
                self.best, self.peak_per_s, self.shares = name, held, dict(shares)
            say(f"{name}: " + (f"{held:.0f}/s" if held else f"below {found.failed_at_per_s or 0:.0f}/s"))
            keep()
        self.complete = True
        keep()

    def _peak(
        self, run: Callable[[float], Trial], wanted: float, left_s: Callable[[], float], trial_s: float
    ) -> PeakSearch:
        least = self.peak_per_s * BETTER
        return find_peak(
            run, least or 100.0, wanted=wanted, tolerance=BETTER - 1.0, max_trials=4 if least else 8,
            worth_per_s=least, left_s=left_s, trial_s=trial_s,
        )  # fmt: skip
