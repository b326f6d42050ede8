"""What a perfect scheduler could serve: upper bounds on goodput, by linear programs (DESIGN section 3).

`ideal_isolated`: time fractions x of points (m, p, b), each model at its isolated latency:
    sum x p <= capacity,   sum over (p, b) of x_m <= instances,   served_m = sum x 1000 b / f
`ideal_corun`: time fractions of configurations, sets of (m, p, b) that run side by side with the latencies f'
of the interference model and promise no more than the capacity, by column generation.

A point counts where its latency is within the SLO: requests may arrive in the best possible way, so no
waiting is charged. Both answer two questions: the largest total goodput when the demands' rates are upper
limits, and the largest common factor on all rates (the peak of the mix). Rates are per second, latencies ms.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import linprog

from dstack_sched.domain.workload import ModelDemand
from dstack_sched.errors import SolverError
from dstack_sched.policy.interference import Interference
from dstack_sched.policy.latency import LatencySurface
from dstack_sched.policy.monotone import Array

_GAP = 1e-6
_MAX_ROUNDS = 400
_COLUMNS_A_ROUND = 12


@dataclass(frozen=True, slots=True)
class Bound:
    """goodput_per_s: most requests a second within their SLO, no model served beyond its offered rate;
    served_per_s: each model's part of it. peak_scale: largest factor on all rates that can be served at once
    (0 when some model cannot meet its SLO at all). gap: relative tolerance; the bounds include it."""

    goodput_per_s: float
    served_per_s: Mapping[str, float]
    peak_scale: float
    gap: float = 0.0


def ideal_isolated(
    surfaces: Mapping[str, LatencySurface],
    demands: Sequence[ModelDemand],
    capacity: float = 100.0,
    *,
    percents: Sequence[float] | None = None,
    instances: int = 1,
    gpus: int = 1,
) -> Bound:
    """The bound without interference. percents: GPU% that may be granted (default whole percents from each
    model's smallest measured one); instances: copies of a model on one GPU that may run at once."""
    wanted = [d for d in demands if d.rate_per_s > 0]
    rows, shares, rates, can_serve = [], [], [], []
    for m, demand in enumerate(wanted):
        surface = surfaces[demand.name]
        p = _percents(surface, percents)
        best = _best_rate(surface, p, demand.slo_ms, np.ones(1))[:, 0]
        can_serve.append(bool((best > 0).any()))
        for share, rate in zip(p, best, strict=True):
            if rate > 0:
                rows.append(m)
                shares.append(float(share))
                rates.append(float(rate))
    if not rows:
        return Bound(0.0, {d.name: 0.0 for d in demands}, 0.0 if wanted else float("inf"))
    serve = np.zeros((len(wanted), len(rows)))
    serve[rows, np.arange(len(rows))] = rates
    limits = np.vstack([(serve > 0).astype(float), np.asarray(shares)])
    room = np.append(np.full(len(wanted), float(instances * gpus)), capacity * gpus)
    offered = np.array([d.rate_per_s for d in wanted])
    total, served, _, _ = _goodput(serve, limits, room, offered)
    peak = _peak(serve, limits, room, offered)[0] if all(can_serve) else 0.0
    return Bound(total, _named(demands, wanted, served), peak)


def ideal_corun(
    surfaces: Mapping[str, LatencySurface],
    demands: Sequence[ModelDemand],
    interference: Interference,
    oversubscription: float = 1.0,
    *,
    percents: Sequence[float] | None = None,
    unit_percent: float = 1.0,
    instances: int = 1,
    gpus: int = 1,
) -> Bound:
    """The bound with interference: what a perfect scheduler could reach on this kind of GPU.

    The capacity is 100 x oversubscription. Promises are added up in units of `unit_percent`, rounded down
    (100 / cores on a CPU host): exact where percents are multiples of it, else still an upper bound.
    """
    wanted = [d for d in demands if d.rate_per_s > 0]
    pricing = _Pricing(
        surfaces, wanted, interference, 100.0 * oversubscription, percents, unit_percent, instances
    )
    offered = np.array([d.rate_per_s for d in wanted])
    if not wanted or not pricing.can_serve.any():
        return Bound(0.0, {d.name: 0.0 for d in demands}, 0.0 if wanted else float("inf"))
    columns = pricing.alone()

    def goodput(serve: Array, limits: Array, room: Array) -> tuple[float, Array, Array, float]:
        return _goodput(serve, limits, room, offered)

    total, served, columns = _generate(goodput, pricing, columns, float(gpus))
    peak = 0.0
    if pricing.can_serve.all():

        def mix(serve: Array, limits: Array, room: Array) -> tuple[float, Array, Array, float]:
            return _peak(serve, limits, room, offered)

        peak, _, _ = _generate(mix, pricing, columns, float(gpus))
    return Bound(total, _named(demands, wanted, served), peak, _GAP)


Master = Callable[[Array, Array, Array], tuple[float, Array, Array, float]]


def _generate(master: Master, pricing: _Pricing, columns: Array, gpus: float) -> tuple[float, Array, Array]:
    """Column generation. columns: (models, configurations) of served rates. Returns an upper bound on the
    value (the dual one, valid at any round), the served rates and all columns found."""
    room = np.array([gpus])
    best = float("inf")
    for _ in range(_MAX_ROUNDS):
        value, served, worth, rest = master(columns, np.ones((1, columns.shape[1])), room)
        top, new = pricing.best(worth)
        best = min(best, rest + gpus * top)
        if best <= value * (1 + _GAP) + 1e-12:
            return best, served, columns
        columns = np.hstack([columns, new])
    raise SolverError(
        f"the co-run bound did not close its gap in {_MAX_ROUNDS} rounds: {value:g} to {best:g}"
    )


def _goodput(serve: Array, limits: Array, room: Array, offered: Array) -> tuple[float, Array, Array, float]:
    """max sum(served), served = min(serve x, offered), limits x <= room. Returns value, served, the worth of
    one request a second of each model (duals) and the dual value that is not tied to `room`."""
    models, columns = serve.shape
    result = linprog(
        np.concatenate([np.zeros(columns), -np.ones(models)]),
        A_ub=np.block([[-serve, np.eye(models)], [limits, np.zeros((limits.shape[0], models))]]),
        b_ub=np.concatenate([np.zeros(models), room]),
        bounds=[(0, None)] * columns + [(0, rate) for rate in offered],
        method="highs",
    )
    if result.status != 0:
        raise SolverError(f"the goodput bound was not solved: {result.message}")
    worth = np.clip(-result.ineqlin.marginals[:models], 0.0, 1.0)
    return float(-result.fun), result.x[columns:], worth, float(((1.0 - worth) * offered).sum())


def _peak(serve: Array, limits: Array, room: Array, offered: Array) -> tuple[float, Array, Array, float]:
    """max s with s offered <= serve x, limits x <= room; the same returns as `_goodput`."""
    models, columns = serve.shape
    result = linprog(
        np.append(np.zeros(columns), -1.0),
        A_ub=np.block([[-serve, offered[:, None]], [limits, np.zeros((limits.shape[0], 1))]]),
        b_ub=np.concatenate([np.zeros(models), room]),
        bounds=[(0, None)] * (columns + 1),
        method="highs",
    )
    if result.status != 0:
        raise SolverError(f"the peak bound was not solved: {result.message}")
    worth = np.maximum(-result.ineqlin.marginals[:models], 0.0)
    # Duals add up to one over the mix (s is free to grow); rounding is taken out to keep the bound a bound.
    worth /= float(worth @ offered)
    return float(-result.fun), float(-result.fun) * offered, worth, 0.0


class _Pricing:
    """Finds the configuration worth most: for every total promise T a knapsack, one point or none a copy of a
    model, promises adding up to T exactly, each point's rate that at co-runners of T minus its own."""

    def __init__(
        self,
        surfaces: Mapping[str, LatencySurface],
        demands: Sequence[ModelDemand],
        interference: Interference,
        capacity_percent: float,
        percents: Sequence[float] | None,
        unit_percent: float,
        instances: int,
    ) -> None:
        self.totals = int(np.floor(capacity_percent / unit_percent + 1e-9))
        self.models = len(demands)
        self.copies = instances
        self.slots: list[NDArray[np.int64]] = []
        self.rates: list[Array] = []  # [point, slots held by co-runners], per second
        held = np.arange(self.totals + 1) * unit_percent
        for demand in demands:
            surface = surfaces[demand.name]
            p = _percents(surface, percents)
            slots = np.floor(p / unit_percent + 1e-9).astype(np.int64)
            p, slots = p[slots <= self.totals], slots[slots <= self.totals]
            self.slots.append(np.maximum(slots, 1))
            slowdown = interference.slowdown(demand.name, held)
            self.rates.append(_best_rate(surface, p, demand.slo_ms, slowdown))
        self.can_serve = np.array([bool((rate > 0).any()) for rate in self.rates], bool)

    def alone(self) -> Array:
        """The configurations of one model at its best, as columns (models, models)."""
        return np.diag([float(rate[:, 0].max(initial=0.0)) for rate in self.rates])

    def best(self, worth: Array) -> tuple[float, Array]:
        """The greatest worth of a configuration, and the best few configurations as columns."""
        total = np.arange(self.totals + 1)
        value = np.full((self.totals + 1, self.totals + 1), -np.inf)  # [T, promised so far]
        value[:, 0] = 0.0
        choices = []
        for m in [m for m in range(self.models) for _ in range(self.copies)]:
            after, choice = value.copy(), np.full(value.shape, -1, np.int32)
            for i, slot in enumerate(self.slots[m]):
                gain = worth[m] * self.rates[m][i, np.maximum(total - slot, 0)]
                gain[(total < slot) | (gain <= 0)] = -np.inf
                candidate = value[:, : value.shape[1] - slot] + gain[:, None]
                better = candidate > after[:, slot:]
                after[:, slot:][better] = candidate[better]
                choice[:, slot:][better] = i
            value = after
            choices.append((m, choice))
        worths = value[total, total]
        order = np.argsort(-worths)[:_COLUMNS_A_ROUND]
        return float(worths.max()), np.stack([self._column(int(t), choices) for t in order], axis=1)

    def _column(self, promise: int, choices: list[tuple[int, NDArray[np.int32]]]) -> Array:
        rates, left = np.zeros(self.models), promise
        for m, choice in reversed(choices):
            i = int(choice[promise, left])
            if i >= 0:
                rates[m] += self.rates[m][i, promise - self.slots[m][i]]
                left -= int(self.slots[m][i])
        return rates


def _percents(surface: LatencySurface, percents: Sequence[float] | None) -> Array:
    if percents is None:
        return np.arange(np.ceil(surface.min_percent - 1e-9), 100.5, 1.0)
    return np.array([p for p in sorted(set(percents)) if p >= surface.min_percent - 1e-9], np.float64)


def _best_rate(surface: LatencySurface, p: Array, slo_ms: float | None, slowdown: Array) -> Array:
    """[point, slowdown]: most requests a second at GPU% p over batch sizes whose slowed run keeps the SLO."""
    b = np.arange(1, surface.max_batch + 1, dtype=np.float64)
    rates = np.zeros((p.size, slowdown.size))
    for i, share in enumerate(p):
        latency_ms = surface.latency_ms(share, b)[:, None] * slowdown[None, :]
        rate = 1000.0 * b[:, None] / latency_ms
        rates[i] = (rate if slo_ms is None else np.where(latency_ms <= slo_ms * (1 + 1e-12), rate, 0.0)).max(
            axis=0
        )
    return rates


def _named(demands: Sequence[ModelDemand], wanted: Sequence[ModelDemand], served: Array) -> dict[str, float]:
    found = {d.name: float(rate) for d, rate in zip(wanted, served, strict=True)}
    return {d.name: found.get(d.name, 0.0) for d in demands}
