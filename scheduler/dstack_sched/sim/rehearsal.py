"""Shares tried out in simulated time before anybody loads a model for them.

The joint program counts what batches demand; what a share is worth besides depends on who waits for whom,
and that the simulator knows, with the engine that will be in charge. From several deployments (the plan's,
the best side by side, both stretched) a search goes on by small moves that let more of the worst model's
requests make it at GAIN times the rates that the best one so far carries. All trials of the search see the
same arrivals; other arrivals decide whether what it found is better than what it began with.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np

from dstack_sched.sim.result import summarize
from dstack_sched.sim.side_by_side import Shares
from dstack_sched.sim.study import Case, simulate

Percents = Mapping[str, float]
"""Model -> its GPU%."""

GAIN = 1.05  # below that two deployments are equal: their peaks are not known any better
STRETCHES = (1.5, 2.0, 0.75)  # of the deployments that it begins with
REQUESTS, REQUESTS_OF_EACH, MOST_REQUESTS = 6000, 500, 18_000  # of a trial
LEAST_SLOS, SLOS, LONGEST_S = 10, 50, 10.0  # so many times the largest SLO, where not too many requests
CHECK_LONGER = 3  # the check lasts so many times as long: queues need time to grow
LEAST = 0.02  # a deployment that does not carry so much of the rates carries nothing
STEP = 0.003  # of attainment: less is no progress
ALL_AT_ONCE = 1  # of ROOMS
BEYOND = 4.0  # rates this many times higher are no matter
SEARCH_SEED, CHECK_SEED = 11, 12
RUN_PARTS = (0.5, 0.3, 0.15)  # of the SLO, for a planned batch: it waits at most for so many rows
ROOMS = (None, 1.0, 0.75, 1.25)  # capacity over the sum of the shares; None: the capacity of the case


@dataclass(frozen=True, slots=True)
class Rehearsed:
    """The deployment found. factor: largest factor on the rates that it carries, by the check, 0: none;
    before: that of the first start, by the search; both at most BEYOND. limit: the model that misses first
    above. changed: whether it is another deployment than the first start."""

    shares: Shares
    capacity_percent: float
    factor: float
    before: float
    limit: str
    trials: int
    changed: bool


def rehearse(
    case: Case,
    starts: Sequence[Percents],
    grids: Mapping[str, Sequence[float]],
    *,
    trials: int,
    enough: float = BEYOND,
) -> Rehearsed:
    """The best deployment in about so many trials; the first start where nothing is clearly better, or where
    it carries `enough` times the rates.

    starts: deployments to begin with; the first one, at the capacity of the case, is to be bettered. grids:
    the shares that each model can have, ascending (one: it is held).
    """
    search = _Search(case, grids, trials)
    first = search.on_grid(starts[0])
    before = search.peak(first, 1.0, SEARCH_SEED)
    best, factor = first, before
    if factor < enough:
        for start in _with_stretches(starts):
            tried = search.on_grid(start)._replace(room=ALL_AT_ONCE)
            best, factor = search.better(tried, best, factor)
        if factor:
            best, factor = search.climb(best, factor, enough)
    if best != first:
        was, now = (search.worst(each, max(factor, LEAST), CHECK_SEED) for each in (first, best))
        best = best if now >= was + STEP else first
    checked = search.peak(best, factor, CHECK_SEED)
    return Rehearsed(
        search.shares(best), search.deployed(best).capacity_percent, checked, before,
        search.first_to_miss(best, checked), search.spent, best != first,
    )  # fmt: skip


def _with_stretches(starts: Sequence[Percents]) -> Iterator[Percents]:
    yield from starts
    for factor in STRETCHES:
        for start in starts:
            yield {model: percent * factor for model, percent in start.items()}


class _Deployment(NamedTuple):
    """Places on the grids, in the order of the demands, and of RUN_PARTS and ROOMS."""

    places: tuple[int, ...]
    part: int = 0
    room: int = 0


class _Search:
    """Trials of deployments (tuples of grid places, in the order of the demands), each done once."""

    def __init__(self, case: Case, grids: Mapping[str, Sequence[float]], trials: int) -> None:
        self._case = case
        self._names = [demand.name for demand in case.demands]
        self._grids = [tuple(grids[name]) for name in self._names]
        self._trials = trials
        self._seen: dict[tuple[_Deployment, float, int], dict[str, float]] = {}

    @property
    def spent(self) -> int:
        return len(self._seen)

    def on_grid(self, percents: Percents) -> _Deployment:
        """The nearest shares that can be had."""
        return _Deployment(
            tuple(
                min(range(len(grid)), key=lambda i: abs(grid[i] - percents[name]))
                for name, grid in zip(self._names, self._grids, strict=True)
            )
        )

    def percents(self, deployment: _Deployment) -> dict[str, float]:
        return {n: g[i] for n, g, i in zip(self._names, self._grids, deployment.places, strict=True)}

    def shares(self, deployment: _Deployment) -> Shares:
        """With the largest batch that ends in its part of the SLO beside all the others."""
        case, percents = self._case, self.percents(deployment)
        told = case.believed or case.speeds
        total, batches = sum(percents.values()), {}
        for demand in case.demands:
            surface, percent = told.surfaces[demand.name], percents[demand.name]
            slow = float(told.interference.slowdown(demand.name, total - percent))
            limit_ms = RUN_PARTS[deployment.part] * (demand.slo_ms or float("inf"))
            run_ms = surface.latency_ms(percent, np.arange(1, surface.max_batch + 1)) * slow
            batches[demand.name] = max(1, int(np.searchsorted(run_ms, limit_ms, side="right")))
        return Shares(percents, batches, case.shares.scale)

    def deployed(self, deployment: _Deployment) -> Case:
        shares = self.shares(deployment)
        percents, room = shares.gpu_percent.values(), ROOMS[deployment.room]
        wanted = self._case.capacity_percent if room is None else room * sum(percents)
        capacity = max(wanted, *percents)
        return replace(self._case, shares=shares, capacity_percent=capacity)

    def attainment(self, deployment: _Deployment, factor: float, seed: int) -> dict[str, float]:
        """Of each model with an objective."""
        key = (deployment, round(factor, 6), seed)
        if key not in self._seen:
            case = self.deployed(deployment).scaled(factor)
            seconds = _seconds(case) * (CHECK_LONGER if seed == CHECK_SEED else 1)
            result = summarize(simulate(case, "dstack", seconds, seed), "dstack", seed)
            self._seen[key] = {
                d.name: result.models[d.name].slo_attainment for d in case.demands if d.slo_ms is not None
            }
        return self._seen[key]

    def worst(self, deployment: _Deployment, factor: float, seed: int = SEARCH_SEED) -> float:
        return min(self.attainment(deployment, factor, seed).values())

    def keeps(self, deployment: _Deployment, factor: float, seed: int) -> bool:
        return self.worst(deployment, factor, seed) >= self._case.attainment

    def first_to_miss(self, deployment: _Deployment, factor: float) -> str:
        """The model with the least attainment a little above the peak."""
        found = self.attainment(deployment, max(factor, LEAST) * GAIN, SEARCH_SEED)
        return min(found, key=lambda name: found[name])

    def peak(self, deployment: _Deployment, near: float, seed: int) -> float:
        """The largest factor that it keeps, to GAIN, sought from `near`; 0 where it does not keep LEAST."""
        low, high, step = 0.0, 0.0, GAIN**4
        at = min(max(near, LEAST), BEYOND)
        while not (low and high):
            if self.keeps(deployment, at, seed):
                low, at = at, min(at * step, BEYOND)
                if low >= BEYOND:
                    return low
            else:
                if at <= LEAST:
                    return 0.0
                high, at = at, max(at / step, LEAST)
            step *= step if not (low and high) else 1.0
        while high > low * GAIN * 1.001:
            middle = (low * high) ** 0.5
            low, high = (middle, high) if self.keeps(deployment, middle, seed) else (low, middle)
        return low

    def better(self, tried: _Deployment, best: _Deployment, factor: float) -> tuple[_Deployment, float]:
        """The better one of the two, and what it carries."""
        if self.spent >= self._trials or tried == best:
            return best, factor
        enough = factor * GAIN or LEAST
        if not self.keeps(tried, enough, SEARCH_SEED):
            return best, factor
        return tried, self.peak(tried, enough, SEARCH_SEED)

    def climb(self, best: _Deployment, factor: float, enough: float) -> tuple[_Deployment, float]:
        """From move to move, each of which lets more of the worst model's requests make it a little above the
        peak; the last one that lets enough of them, and what it carries."""
        here, enough_of_each = best, self._case.attainment
        score = self.worst(here, factor * GAIN)
        while factor < enough:
            for move in self.moves(here, self.first_to_miss(here, factor)):
                if self.spent >= self._trials:
                    return best, factor
                reached = self.worst(move, factor * GAIN)
                if reached >= enough_of_each:
                    best = move
                    factor = self.peak(move, factor * GAIN, SEARCH_SEED)
                if reached >= enough_of_each or reached >= score + STEP:
                    here, score = move, self.worst(move, factor * GAIN)
                    break
            else:
                return best, factor
        return best, factor

    def moves(self, deployment: _Deployment, miss: str) -> Iterator[_Deployment]:
        """Neighbours, those first that help the model that misses first."""
        at = self.percents(deployment)
        others = [name for name in self._names if name != miss]
        largest = max(others, key=lambda name: at[name], default=miss)
        for part in range(len(RUN_PARTS)):
            if abs(part - deployment.part) == 1:
                yield deployment._replace(part=part)
        for changes in (
            {miss: 1.25}, {miss: 1.5}, {largest: 0.75}, dict.fromkeys(others, 0.8), {miss: 2.0},
            dict.fromkeys(others, 1.2), dict.fromkeys(self._names, 0.85), {miss: 0.8},
            *({name: factor} for name in others for factor in (0.75, 1.33)),
        ):  # fmt: skip
            moved = self.on_grid({name: at[name] * changes.get(name, 1.0) for name in self._names}).places
            if moved != deployment.places:
                yield deployment._replace(places=moved)
        for room in range(len(ROOMS)):
            if room not in (deployment.room, 0):
                yield deployment._replace(room=room)


def _seconds(case: Case) -> float:
    """Long enough for every model that is called at all to be judged."""
    rates = [d.rate_per_s for d in case.demands if d.slo_ms is not None and d.rate_per_s > 0]
    total = max(case.total_rate_per_s, 1e-9)
    wanted = max(REQUESTS, min(MOST_REQUESTS, REQUESTS_OF_EACH * total / min(rates, default=total)))
    slo_s = max((d.slo_ms or 0.0) for d in case.demands) / 1000
    most_s = max(MOST_REQUESTS / total, LEAST_SLOS * slo_s)
    return min(max(wanted / total, SLOS * slo_s), most_s, LONGEST_S)
