"""Plans, bounds and predictions of the cells, from the profiles that were measured on this kind of GPU.

All of it is arithmetic, some of it of many seconds: it is done by processes of low priority beside the start
of the servers (`Planner.prepare`), or after the lease (`exact`, by --predict).
"""

from __future__ import annotations

import functools
import multiprocessing
import os
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from compare.alternatives import Alternative, Served
from compare.cells import Cell, network_of, trace
from dstack_sched.adapters.profile_files import read_profiles
from dstack_sched.app.drift import DriftSettings, corrected_set, look, slowdowns, start
from dstack_sched.app.planning import CONTROL_OPTIONS, make_plan
from dstack_sched.app.replan import ReplanSettings, with_reserve
from dstack_sched.domain.plan import Plan
from dstack_sched.domain.profile import Correction, CorunPoint, ProfileSet
from dstack_sched.domain.workload import OnLate, Workload
from dstack_sched.engine.registry import POLICIES
from dstack_sched.engine.run_times import Seen
from dstack_sched.errors import DstackError
from dstack_sched.policy.latency import LatencySurface
from dstack_sched.sim.scenario import BUSY_HOST, TAIL_US, TRITON_H100
from dstack_sched.sim.study import Case, bounds_of, find_peak, make_case

SIM_SECONDS = 4.0
SIM_SEEDS = (1, 2)
GUESS_SECONDS = 1.5
SERVING_MS = 1.3  # what Triton and client add to a lone run (perf/reports/h100/dataplane.md): until measured
PREPARE_MS, ANSWER_MS = TRITON_H100.prepare_us / 1000, TRITON_H100.answer_us / 1000
JITTER_MS = TAIL_US / 1000
LEARNING = DriftSettings(band=0.05, looks=1)
LEARN_ROUNDS, LEARN_LOAD = 2, 0.7  # the load: of the peak that is known or expected
LEVELS_PERCENT = {"off": (), "auto": (25.0, 50.0, 100.0)}
SIMULATED = {
    "dstack": "dstack", "temporal": "temporal", "mps-default": "mps-default", "mps-static": "mps-static",
    "best-static": "mps-static", "rate-limiter": "triton-rate-limiter", "one-process": "mps-default",
    "time-sliced": "time-sliced",
}  # fmt: skip
NOT_EXACT = ("best-static", "one-process")  # the simulator has the likes of them, not them

Solo = tuple[tuple[str, float], ...]  # (network, ms of a lone request at the client), by name
Learned = tuple[tuple[str, Correction], ...]  # (network, what service has shown its profile to be), by name


@dataclass(frozen=True, slots=True)
class Sum:
    """What is to be worked out, as it travels to a worker. told: what a plan differs in from the controller's
    (alternatives.TOLD). learned: what corrects the profiles. in_force: (model, GPU%) that a plan follows."""

    what: str
    profiles: Path
    cell: Cell
    solo: Solo
    alternative: Alternative | None = None
    told: tuple[tuple[str, float], ...] = ()
    seconds: float = GUESS_SECONDS
    learned: Learned = ()
    in_force: tuple[tuple[str, float], ...] = ()


class Planner:
    """Sums in worker processes, each done once. Close it."""

    def __init__(self, profiles: Path, workers: int) -> None:
        self._path = profiles
        self._profiles = read_profiles(profiles)
        context = multiprocessing.get_context("spawn")  # threads and sockets of ours stay here
        self._pool = ProcessPoolExecutor(max(1, workers), context, initializer=_be_nice)
        self._asked: dict[Sum, Future[Any]] = {}
        self._plans: dict[tuple[Any, ...], list[tuple[Learned, Future[Any]]]] = {}  # one after the other
        self.plan_s: dict[str, float] = {}  # by cell: the longest that a plan took to make

    def close(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)

    def expected_solo(self, cell: Cell, known: Mapping[str, float]) -> Solo:
        """Latency of a lone request by network: as measured, else as the profile and serving let expect."""
        found = {}
        for network in sorted({network_of(model) for model in cell.models}):
            if network in known:
                found[network] = known[network]
            else:
                surface = LatencySurface.from_profile(self._profiles.models[network])
                found[network] = round(float(surface.latency_ms(100.0, 1)) + SERVING_MS, 3)
        return tuple(sorted(found.items()))

    def ask(
        self, what: str, cell: Cell, solo: Solo, alternative: Alternative | None = None, **more: Any
    ) -> Future[Any]:
        """The future of a sum; asked again, the same."""
        wanted = Sum(what, self._path, cell, solo, alternative, **more)
        if wanted not in self._asked:
            self._asked[wanted] = self._pool.submit(work_out, wanted)
        return self._asked[wanted]

    def static(self, cell: Cell, solo: Solo) -> dict[str, Served]:
        """Fixed shares and batch sizes that suit all models side by side (GSLICE-like)."""
        shares: dict[str, Served] = self.ask("static", cell, solo).result()
        return shares

    def own(
        self, cell: Cell, solo: Solo, alternative: Alternative, learned: Learned = ()
    ) -> dict[str, Served]:
        """The shares of D-STACK's plan; fixed ones as `static` where it has none."""
        rows = self.plan(cell, solo, alternative, learned).models
        shares = {model: Served(row.gpu_percent, max(1, row.batch_size)) for model, row in rows.items()}
        return shares or self.static(cell, solo)

    def plan(self, cell: Cell, solo: Solo, alternative: Alternative, learned: Learned = ()) -> Plan:
        """The plan that a controller would have in force. Its time counts to D-STACK's way to its plan."""
        plan: Plan
        plan, took_s = self.prepare_plan(cell, solo, alternative, learned).result()
        if alternative.policy == "dstack":
            self.plan_s[cell.key] = max(took_s, self.plan_s.get(cell.key, 0.0))
        return plan

    def prepare_plan(
        self, cell: Cell, solo: Solo, alternative: Alternative, learned: Learned = ()
    ) -> Future[Any]:
        """Ask for the plan: D-STACK's own, or for another policy of the arbiter the joint program's alone.
        The plan after more was learned keeps the shares of the one before where others are not better."""
        what = "plan" if alternative.policy == "dstack" else "joint"
        made = self._plans.setdefault((what, cell, solo, alternative.told), [])
        for known, plan in made:
            if known == learned:
                return plan
        in_force = shares_of(made[-1][1].result()[0]) if made else ()
        made.append(
            (learned, self.ask(what, cell, solo, told=alternative.told, learned=learned, in_force=in_force))
        )
        return made[-1][1]

    def inside(self, cell: Cell, solo: Solo, workload: Workload) -> Workload:
        return inside(self._profiles, solo, workload)

    def profiles(self, cell: Cell, learned: Learned = ()) -> ProfileSet:
        return profiles_of(corrected_set(self._profiles, dict(learned)), cell)

    def learn(self, network: str, known: Correction | None, seen: Sequence[Seen]) -> Correction | None:
        return learn(self._profiles, network, known, seen)


def learn(
    profiles: ProfileSet, network: str, known: Correction | None, seen: Sequence[Seen]
) -> Correction | None:
    """What runs in service say of a profile, as the controller takes it (app/drift.py), but at one look; None
    where they say nothing new."""
    profile = profiles.models[network]
    return look(start(profile, known, slowdowns(profiles).get(network)), profile, seen, LEARNING).refit


def shares_of(plan: Plan) -> tuple[tuple[str, float], ...]:
    """Sum.in_force while the plan is in force."""
    return tuple((model, row.gpu_percent) for model, row in plan.models.items())


def _be_nice() -> None:
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    os.nice(15)


# In the workers


def work_out(wanted: Sum) -> Any:
    """The result of a sum; None where a peak or a bound cannot be had."""
    profiles = corrected_set(_read(wanted.profiles), dict(wanted.learned))
    case = functools.partial(case_of, profiles, wanted.cell, wanted.solo)
    if wanted.what == "static":
        shares = case().shares
        return {
            model: Served(shares.gpu_percent[model], max(1, shares.batch_size[model]))
            for model in wanted.cell.models
        }
    if wanted.what in ("plan", "joint"):
        began = time.monotonic()
        return plan_at_half(profiles, wanted), time.monotonic() - began
    alternative = wanted.alternative
    try:
        if wanted.what == "bounds":
            found, total = bounds_of(case()), case().total_rate_per_s
            return found.corun.peak_scale * total, found.isolated.peak_scale * total
        assert alternative is not None
        return _peak(profiles, wanted, alternative)
    except DstackError:
        return None


@functools.lru_cache(maxsize=4)
def _read(path: Path) -> ProfileSet:
    return read_profiles(path)


def profiles_of(all_profiles: ProfileSet, cell: Cell) -> ProfileSet:
    """The profiles of a cell's models; copies have that of their model."""
    models = {model: replace(all_profiles.models[network_of(model)], name=model) for model in cell.models}
    corun = list(all_profiles.corun)
    for copy in cell.models:
        if copy != network_of(copy):
            corun += [
                CorunPoint(
                    tuple(
                        replace(m, model=copy if m.model == network_of(copy) else m.model)
                        for m in each.members
                    )
                )
                for each in all_profiles.corun
            ]
    known = all_profiles.slowdown
    slowdown = {model: known[network_of(model)] for model in cell.models if network_of(model) in known}
    return replace(all_profiles, models=models, corun=tuple(corun), slowdown=slowdown)


def inside(profiles: ProfileSet, solo: Solo, workload: Workload) -> Workload:
    """The workload with the SLO that is left for waiting and running: what serving adds outside the instance
    (the lone request's latency less its run) is taken off."""
    by_network, models = dict(solo), []
    for demand in workload.models:
        network = network_of(demand.name)
        surface = LatencySurface.from_profile(profiles.models[network])
        lone_ms = float(surface.latency_ms(100.0, 1)) + PREPARE_MS + ANSWER_MS
        outside_ms = max(0.0, by_network[network] - lone_ms)
        assert demand.slo_ms is not None
        models.append(replace(demand, slo_ms=round(demand.slo_ms - outside_ms, 3)))
    return replace(workload, models=tuple(models))


def _workload(profiles: ProfileSet, cell: Cell, solo: Solo, rate_per_s: float) -> Workload:
    by_network = dict(solo)
    by_model = {model: by_network[network_of(model)] for model in cell.models}
    return inside(profiles, solo, cell.workload(by_model, rate_per_s, OnLate.SERVE))


def case_of(
    profiles: ProfileSet, cell: Cell, solo: Solo, *, levels: tuple[float, ...] = (), plan: Plan | None = None
) -> Case:
    """The simulator's case at a total rate of 1000/s. The SLOs are those inside, less the jitter that
    one of a hundred may meet outside; of what serving costs only that is left which the queue or the batch
    size makes more of. Errors: InputError, an SLO that the jitter alone takes up."""
    workload = _workload(profiles, cell, solo, 1000.0)
    quick = tuple(replace(each, slo_ms=(each.slo_ms or 0.0) - JITTER_MS) for each in workload.models)
    case = make_case(
        profiles_of(profiles, cell), replace(workload, models=quick), levels=levels, plan=plan,
        arrivals=trace() if cell.arrivals == "trace" else None,
        serving=replace(TRITON_H100, outside_us=0),
    )  # fmt: skip
    return replace(case, delays=BUSY_HOST)


def plan_at_half(profiles: ProfileSet, wanted: Sum) -> Plan:
    """As `dstackctl run` makes it for about half of what the bound says: most headroom, with the reserve of
    its load factor, scaled down where it does not fit, rehearsed (what "joint": not)."""
    cell, told = wanted.cell, dict(wanted.told)
    ideal = work_out(replace(wanted, what="bounds", learned=()))
    settings = ReplanSettings()
    settings = replace(settings, load_factor=told.get("load_factor", settings.load_factor))
    workload = _usual(_workload(profiles, cell, wanted.solo, ideal[0] / 2 if ideal else 1000.0))
    options = replace(CONTROL_OPTIONS, lenient=True, in_force=dict(wanted.in_force))
    if wanted.what == "joint":
        options = replace(options, rehearsal_trials=0)
    plan = make_plan(profiles_of(profiles, cell), with_reserve(workload, settings), options)
    return replace(plan, capacity_percent=told.get("capacity", plan.capacity_percent))


def _usual(workload: Workload) -> Workload:
    """Clients' SLOs again, as if serving took outside what a planner takes for usual."""
    usual_ms = TRITON_H100.outside_us / 1000
    models = tuple(replace(d, slo_ms=(d.slo_ms or 0.0) + usual_ms) for d in workload.models)
    return replace(workload, models=models)


def _peak(profiles: ProfileSet, wanted: Sum, alternative: Alternative) -> float | None:
    """The simulated peak of an alternative, /s in all; None where the simulator has no such policy."""
    name = SIMULATED.get(alternative.name.split("+")[0])
    if alternative.policy is not None:
        name = alternative.policy
    if name not in POLICIES:
        return None
    cell, solo = wanted.cell, wanted.solo
    plan: Plan | None = None
    levels: tuple[float, ...] = ()
    if alternative.policy == "dstack":
        levels = _levels(alternative.config["levels"])
        plan = plan_at_half(profiles, replace(wanted, what="plan", told=alternative.told))
    case = case_of(profiles, cell, solo, levels=levels, plan=plan if plan and plan.models else None)
    if alternative.rate_limiter:
        case = replace(case, capacity_percent=100.0)
    found = find_peak(case, name, wanted.seconds, SIM_SEEDS, tolerance=0.03)
    return found.factor * case.total_rate_per_s


def _levels(text: str) -> tuple[float, ...]:
    return LEVELS_PERCENT[text] if text in LEVELS_PERCENT else tuple(float(x) for x in text.split(","))
