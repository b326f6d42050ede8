"""Plans, bounds and predictions of the cells, from the profiles that were measured on this kind of GPU."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

from compare.alternatives import Alternative, Served
from compare.cells import Cell, network_of
from dstack_sched.adapters.arbiter_client import SocketArbiterClient
from dstack_sched.app.arbiter_plans import send_plans
from dstack_sched.app.planning import PlanOptions, make_plan
from dstack_sched.domain.profile import CorunPoint, ProfileSet
from dstack_sched.domain.workload import OnLate, Workload
from dstack_sched.errors import DstackError
from dstack_sched.policy.latency import LatencySurface
from dstack_sched.sim.study import Case, bounds_of, find_peak, make_case

if TYPE_CHECKING:
    from compare.deployment import Deployment

SIM_SECONDS = 4.0
SIM_SEEDS = (1, 2)
GUESS = 0.5  # of the ideal, where the simulator has no prediction
SIMULATED = {
    "dstack": "dstack", "temporal": "temporal", "mps-default": "mps-default", "mps-static": "mps-static",
    "rate-limiter": "triton-rate-limiter",
}  # fmt: skip


class Planner:
    """Plans by the profiles; the SLO that is planned for is what serving leaves of the client's."""

    def __init__(self, profiles: ProfileSet) -> None:
        self._profiles = profiles

    def profiles(self, cell: Cell) -> ProfileSet:
        """The profiles of a cell's models; copies have that of their model."""
        models = {
            model: replace(self._profiles.models[network_of(model)], name=model) for model in cell.models
        }
        copies = {model: network_of(model) for model in cell.models if model != network_of(model)}
        corun = list(self._profiles.corun)
        for copy, model in copies.items():
            corun += [
                CorunPoint(
                    tuple(replace(m, model=copy if m.model == model else m.model) for m in each.members)
                )
                for each in self._profiles.corun
            ]
        return replace(self._profiles, models=models, corun=tuple(corun))

    def inside(self, cell: Cell, solo_ms: Mapping[str, float], workload: Workload) -> Workload:
        """The workload with the SLO that is left for waiting and running: what serving adds is taken off."""
        models = []
        for demand in workload.models:
            surface = LatencySurface.from_profile(self._profiles.models[network_of(demand.name)])
            outside_ms = max(0.0, solo_ms[demand.name] - float(surface.latency_ms(100.0, 1)))
            assert demand.slo_ms is not None
            models.append(replace(demand, slo_ms=round(demand.slo_ms - outside_ms, 3)))
        return replace(workload, models=tuple(models))

    def static(
        self, cell: Cell, solo_ms: Mapping[str, float], served: Mapping[str, Served]
    ) -> dict[str, Served]:
        """Fixed shares and batch sizes that suit all models side by side (GSLICE-like)."""
        shares = self.case(cell, solo_ms).shares
        return {
            model: replace(
                how, gpu_percent=shares.gpu_percent[model], batch_size=max(1, shares.batch_size[model])
            )
            for model, how in served.items()
        }

    def case(self, cell: Cell, solo_ms: Mapping[str, float], levels: tuple[float, ...] = ()) -> Case:
        """The simulator's case at a total rate of 1000/s."""
        solo = {network_of(model): solo_ms[network_of(model)] for model in cell.models}
        by_model = {model: solo[network_of(model)] for model in cell.models}
        workload = self.inside(cell, by_model, cell.workload(by_model, 1000.0, OnLate.REJECT))
        return make_case(self.profiles(cell), workload, levels=levels)

    def tell(self, deployment: Deployment, cell: Cell, workload: Workload) -> None:
        """Send the arbiter the plan that a controller would make for this workload."""
        client = SocketArbiterClient(deployment.host.socket)
        try:
            profiles = self.profiles(cell)
            plan = make_plan(profiles, workload, PlanOptions())
            send_plans(client, plan, profiles, workload)
        finally:
            client.close()

    def bounds(self, cell: Cell, solo_ms: Mapping[str, float]) -> dict[str, float]:
        """The ideal peaks of the cell."""
        found = _bounds(self, cell, tuple(sorted(solo_ms.items())))
        return {"ideal_corun_per_s": round(found[0], 1), "ideal_isolated_per_s": round(found[1], 1)}

    def predicted_peak_per_s(
        self, cell: Cell, solo_ms: Mapping[str, float], alternative: Alternative
    ) -> float | None:
        """The simulator's peak; None where it has no such alternative."""
        name = SIMULATED.get(alternative.name)
        if name is None or cell.arrivals != "poisson":
            return None
        try:
            return round(_predicted(self, cell, tuple(sorted(solo_ms.items())), name), 1)
        except DstackError:
            return None

    def guess_per_s(self, cell: Cell, solo_ms: Mapping[str, float], alternative: Alternative) -> float:
        """Where to start the search."""
        predicted = self.predicted_peak_per_s(cell, solo_ms, alternative)
        return predicted or GUESS * self.bounds(cell, solo_ms)["ideal_corun_per_s"]


@functools.lru_cache(maxsize=256)
def _bounds(planner: Planner, cell: Cell, solo: tuple[tuple[str, float], ...]) -> tuple[float, float]:
    case = planner.case(cell, dict(solo))
    found = bounds_of(case)
    total = case.total_rate_per_s
    return found.corun.peak_scale * total, found.isolated.peak_scale * total


@functools.lru_cache(maxsize=256)
def _predicted(planner: Planner, cell: Cell, solo: tuple[tuple[str, float], ...], name: str) -> float:
    levels = tuple(round(100 * 8 * k / 132, 2) for k in range(1, 17)) if name == "dstack" else ()
    case = planner.case(cell, dict(solo), levels)
    start = planner.bounds(cell, dict(solo))["ideal_corun_per_s"] / 4 / case.total_rate_per_s
    return (
        find_peak(case.scaled(start), name, SIM_SECONDS, SIM_SEEDS, tolerance=0.03).factor
        * start * case.total_rate_per_s
    )  # fmt: skip
