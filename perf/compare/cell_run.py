"""One cell: its servers, the peaks of all alternatives, repeats of them, goodput curves; in this order."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures import TimeoutError as TooLong
from dataclasses import replace
from typing import Any

from compare.alternatives import Alternative, Served
from compare.cells import Cell, network_of
from compare.deployment import Deployment, Site
from compare.fleet import Fleet
from compare.peak import Trial, find_peak
from compare.planning import LEARN_LOAD, Learned, Solo
from compare.static_search import StaticSearch
from compare.study import ATTAINMENT, SEED, Study, best_trial, point, search_figures, worst_miss
from compare.traces import LostLoadError
from dstack_sched.app.arbiter_plans import arbiter_form
from dstack_sched.app.bench import BenchOptions, again_if_silent
from dstack_sched.domain.workload import OnLate, Workload
from dstack_sched.errors import MachineError, ServerError
from report import commit, now

CURVE_LOADS = (0.5, 0.8, 1.2, 1.5)  # of the alternative's own peak; the peak itself is measured anyway
AGAIN_STEP = 1.1  # of a repeat, whose peak is about known
TAIL_S = 0.3  # perf_analyzers start late, so they end late: little load is needed behind the window
OVERHEAD_S = 1.5  # of a trial: perf_analyzer's start and end, reading its export
SOLO_S = 1.0
FIRST_ANSWER_S = 5.0  # an overloaded server is quick with the first requests
PATIENCE_S = 15.0  # a backlog of several times the trial's length is gone by then
SUMS_LIMIT_S = 20.0  # beyond the start of the servers
BLIND_GUESS_PER_S = 500.0


class CellRun:
    """One cell of a study, on servers of its own."""

    def __init__(self, study: Study, cell: Cell, site: Site, alternatives: Sequence[Alternative]) -> None:
        self._study, self._cell = study, cell
        self._alternatives = alternatives
        self._expected: Solo = study.planner.expected_solo(cell, study.solo_ms)
        self._fleet = Fleet(site, len(cell.models), self._served, study.say)
        self._guesses: dict[str, float] = {}
        self._static: dict[str, Served] = {}  # what best-static is to be deployed as
        options = study.options
        self.trial_s: float = options.warmup_s + options.seconds + TAIL_S + OVERHEAD_S
        self.blind_s = 3 * self.trial_s  # less than this is no time to begin a search in

    def run(self) -> None:
        """As far as the time goes. What fails is noted as a problem, and the next goes on."""
        study, cell = self._study, self._cell
        with self._fleet as fleet, ThreadPoolExecutor(1) as beside:
            sums = beside.submit(self._do_sums)
            fleet.open(each for each in self._alternatives if each.shares != "searched")
            try:
                sums.result(SUMS_LIMIT_S)  # nothing else of ours is to run while something is measured
            except TooLong:
                study.say("plans and predictions are still being made")
            self._measure_solo()
            for repeat in range(study.options.repeats):
                for each in self._alternatives:
                    if study.repeats(cell, each) <= repeat and not self._guarded(self._repeat, each, repeat):
                        return
            if study.options.curve:
                for each in self._alternatives:
                    if not self._guarded(self._curve, each):
                        return

    def _do_sums(self) -> None:
        """What the simulator expects of each alternative, and the plans that trials will probably need."""
        planner, cell, solo = self._study.planner, self._cell, self._expected
        planner.ask("static", cell, solo)  # first: servers wait for it
        peaks = [(each, planner.ask("peak", cell, solo, each)) for each in self._alternatives]
        plans = []
        for each, peak in peaks:
            guess = peak.result()
            if guess:
                self._guesses[each.name] = guess
                if each.policy is not None:
                    plans.append(planner.prepare_plan(cell, solo, each))
        for plan in plans:
            plan.result()

    def _guarded(self, step: Any, alternative: Alternative, *more: Any) -> bool:
        """Do a step of one alternative; False when the time is up."""
        study = self._study
        if study.left_s() < self.blind_s:
            study.say(f"{self._cell.key}: no time left for {alternative.name}")
            return False
        try:
            step(alternative, *more)
        except Exception as error:  # whatever fails, the alternatives behind it are still wanted
            study.problem(f"{self._cell.key} {alternative.name}", error)
        return True

    # -- deployments ---------------------------------------------------------------------------------------

    def _served(self, alternative: Alternative) -> dict[str, Served]:
        """How the models of an alternative are deployed."""
        extra = {**alternative.config, **dict(self._study.options.parameters)}
        if alternative.shares == "whole":
            return {model: Served(extra=extra) for model in self._cell.models}
        planner = self._study.planner
        if alternative.shares == "own":
            planned = planner.own(self._cell, self._expected, alternative, self._learned(alternative))
        else:
            planned = planner.static(self._cell, self._expected)
        return {model: replace(how, extra=extra) for model, how in planned.items()}

    def _learned(self, alternative: Alternative) -> Learned:
        """What the alternative has learned of the profiles so far."""
        return self._study.learned(self._cell) or () if alternative.learn else ()

    def _learn(self, alternative: Alternative, guess_per_s: float) -> None:
        """Correct the profiles by what service shows and deploy the shares of the plan that follows, as the
        controller of `dstackctl run` does while it serves: load below the peak, a look, another plan."""
        study, cell = self._study, self._cell
        began = time.monotonic()
        learned = dict(study.learned(cell) or ())
        for _ in range(study.options.learn_rounds):
            if study.left_s() < self.blind_s + self.trial_s:
                return
            self._trial(alternative, LEARN_LOAD * guess_per_s, 0)
            deployment = self._deployed(alternative)
            seen = {network_of(model): deployment.seen(model) for model in cell.models}
            refits = {n: study.planner.learn(n, learned.get(n), runs) for n, runs in seen.items()}
            learned |= {network: refit for network, refit in refits.items() if refit is not None}
            study.learn(cell, tuple(sorted(learned.items())), time.monotonic() - began)
            served = self._served(alternative)
            shares = ", ".join(f"{model} {how.gpu_percent:g}%" for model, how in served.items())
            study.say(f"{cell.key} {alternative.name}: shares by what was seen: {shares}")
            if not deployment.change(served):
                break
            deployment.settle()
        study.learn(cell, tuple(sorted(learned.items())), time.monotonic() - began)

    def _measure_solo(self) -> None:
        """Latency of a lone request at the client, of every network that is not known yet."""
        study = self._study
        networks = {network_of(model): model for model in reversed(self._cell.models)}
        missing = {network: model for network, model in networks.items() if network not in study.solo_ms}
        if not missing:
            return
        whole = [each for each in self._alternatives if each.shares == "whole" and not each.one_process]
        whole = whole or [Alternative.parse("mps-default")]
        deployment = self._fleet.get(whole[0])
        deployment.use(replace(whole[0], policy=None))
        study.versions["triton"] = deployment.triton_version()
        for network, model in missing.items():
            study.solo_ms[network] = round(deployment.solo_ms(model, SOLO_S), 3)
        study.say("alone at the client, ms: " + ", ".join(f"{n} {study.solo_ms[n]}" for n in missing))

    @property
    def _solo(self) -> dict[str, float]:
        """Model -> ms of a lone request."""
        return {model: self._study.solo_ms[network_of(model)] for model in self._cell.models}

    # -- load ----------------------------------------------------------------------------------------------

    def _deployed(self, alternative: Alternative) -> Deployment:
        """The alternative's server, in its hands."""
        deployment = self._fleet.get(alternative)
        if alternative.shares == "searched" and self._static:
            deployment.change(self._static)
        deployment.use(alternative)
        return deployment

    def _trial(self, alternative: Alternative, rate_per_s: float, repeat: int) -> Trial:
        """One stretch of load. Where requests are not answered within PATIENCE_S, nothing is known of it but
        that it did not hold; the server is started anew."""
        study, cell, options = self._study, self._cell, self._study.options
        deployment = self._deployed(alternative)
        workload = cell.workload(self._solo, rate_per_s, OnLate.SERVE)  # perf_analyzer ends at a rejection
        if alternative.policy is not None:
            self._tell(deployment, alternative, workload)
        bench = BenchOptions(
            options.seconds, options.warmup_s, SEED + repeat,
            tail_s=TAIL_S, patience_s=PATIENCE_S, first_answer_s=FIRST_ANSWER_S,
        )  # fmt: skip

        def run() -> Trial:
            return again_if_silent(lambda: deployment.trial(cell, workload, bench, repeat), study.say)

        try:
            try:
                trial = run()
            except LostLoadError as error:
                study.problem(f"{cell.key} {alternative.name} at {rate_per_s:.0f}/s, once more", error)
                trial = run()
        except (MachineError, ServerError) as error:
            study.problem(f"{cell.key} {alternative.name} at {rate_per_s:.0f}/s", error)
            self._fleet.drop(alternative)
            return Trial(rate_per_s, 0.0, 0.0)
        study.say(
            f"  {cell.key} {alternative.name}: {rate_per_s:7.0f}/s -> worst attainment "
            f"{trial.attainment:.3f}, goodput {trial.goodput_per_s:.0f}/s"
            f", left out {trial.figures['left_out_share']:.0%}"
        )
        return trial

    def _tell(self, deployment: Deployment, alternative: Alternative, workload: Workload) -> None:
        """Send the arbiter the plan that a controller would have in force. The SLO it is told is
        what serving leaves of the client's."""
        planner, cell = self._study.planner, self._cell
        learned = self._learned(alternative)
        plan = planner.plan(cell, self._expected, alternative, learned)
        if not plan.models:
            self._study.say(f"  no plan: {plan.binding[0]}")
            return
        told = planner.inside(cell, tuple(sorted(self._study.solo_ms.items())), workload)
        form = arbiter_form(plan, planner.profiles(cell, learned), told)
        deployment.control("plan", gpus=form)

    def _guess(self, alternative: Alternative) -> float:
        """Where to start: the simulator's peak, corrected by how it was off in this cell so far; where there
        is none, the middle of what was measured."""
        peaks = {
            each.name: result["peak_per_s"]
            for each in self._alternatives
            if (result := self._study.find(self._cell, each)) is not None and result["peak_per_s"]
        }
        guess = self._guesses.get(alternative.name)
        if guess is None:
            return statistics.median(peaks.values()) if peaks else BLIND_GUESS_PER_S
        off = [peak / self._guesses[name] for name, peak in peaks.items() if name in self._guesses]
        return max(10.0, guess * (statistics.median(off) if off else 1.0))

    # -- what is measured ----------------------------------------------------------------------------------

    def _repeat(self, alternative: Alternative, repeat: int) -> None:
        """One search of the peak. The first one of best-static searches its shares before."""
        study, cell = self._study, self._cell
        known = study.find(cell, alternative)
        guess = known["peak_per_s"] if known else 0.0
        if alternative.shares == "searched":
            self._search_static(alternative, repeat)
            guess = guess or study.searches[cell.key]["peak_per_s"]
        deployment = self._deployed(alternative)
        guess = guess or self._guess(alternative)
        if alternative.learn and study.learned(cell) is None:
            self._learn(alternative, guess)
        began = time.monotonic()
        found = find_peak(
            lambda rate: self._trial(alternative, rate, repeat), guess, wanted=ATTAINMENT,
            tolerance=study.options.tolerance, step=AGAIN_STEP if known else 1.25, left_s=study.left_s,
            trial_s=self.trial_s,
        )  # fmt: skip
        if not found.trials:
            return
        result = dict(known or self._new_result(alternative, deployment))
        result["repeats"] = [*result["repeats"], search_figures(found, SEED + repeat)]
        peaks = [each["peak_per_s"] for each in result["repeats"]]
        result["peak_per_s"] = round(statistics.mean(peaks), 1)
        result["at_peak"] = best_trial(found) or result["at_peak"]
        result["at_miss"] = worst_miss(found) or result.get("at_miss", {})
        if known is None:
            points = [point(trial) for trial in found.trials if trial.figures]
            result["goodput_curve"] = sorted(points, key=lambda each: each["offered_per_s"])
        result["measure_s"] = round(result["measure_s"] + time.monotonic() - began, 1)
        if alternative.policy is not None:
            result["plan_s"] = round(study.planner.plan_s.get(cell.key, 0.0), 2)
        study.keep(result)
        study.say(f"{cell.key} {alternative.name}: peak {found.peak_per_s:.0f}/s")

    def _new_result(self, alternative: Alternative, deployment: Deployment) -> dict[str, Any]:
        cell = self._cell
        return {
            "cell": cell.key, "mix": cell.mix, "slo_factor": cell.slo_factor, "rates": cell.rates,
            "arrivals": cell.arrivals, "policy": alternative.name, "letter": alternative.letter,
            "variant_of": alternative.variant_of, "commit": commit(), "date": now(),
            "slo_ms": {m: round(cell.slo_factor * ms, 3) for m, ms in self._solo.items()},
            "shares": {m: [how.gpu_percent, how.batch_size, how.instances]
                       for m, how in deployment.served.items()},
            "parameters": alternative.config, "told": alternative.told_by_name,
            "guess_per_s": self._guesses.get(alternative.name),
            "ideal_corun_per_s": None, "ideal_isolated_per_s": None, "predicted_peak_per_s": None,
            "peak_per_s": 0.0, "repeats": [], "at_peak": {}, "at_miss": {}, "goodput_curve": [],
            "curve_done": False, "measure_s": 0.0, "server_start_s": round(deployment.start_s, 1),
        }  # fmt: skip

    def _search_static(self, alternative: Alternative, repeat: int) -> None:
        """Find the best fixed shares, as far as the time for it goes, before the first repeat."""
        study, cell = self._study, self._cell
        deployment = self._deployed(alternative)
        search = StaticSearch()
        if cell.key in study.searches:
            search = StaticSearch.from_json(study.searches[cell.key])
        if not search.complete and repeat == 0:
            until = time.monotonic() + study.options.static_search_s
            planned = study.find(cell, Alternative.parse("mps-static"))

            def keep() -> None:
                study.searches[cell.key] = search.to_json()
                study.write()

            search.run(
                self._served(alternative), self._use_static,
                lambda rate: self._trial(alternative, rate, 0),
                wanted=ATTAINMENT, start_per_s=planned["peak_per_s"] if planned else 0.0,
                left_s=lambda: min(until - time.monotonic(), study.left_s() - self.blind_s),
                candidate_s=deployment.start_s / 2 + self.trial_s, trial_s=self.trial_s,
                say=lambda text: study.say(f"{cell.key} {alternative.name}: {text}"), keep=keep,
            )  # fmt: skip
            keep()
        self._static = dict(search.shares)

    def _use_static(self, shares: Mapping[str, Served]) -> None:
        self._static = dict(shares)

    def _curve(self, alternative: Alternative) -> None:
        """Goodput at fixed shares of the alternative's own peak."""
        study, cell = self._study, self._cell
        known = study.find(cell, alternative)
        if known is None or known["curve_done"] or not known["peak_per_s"]:
            return
        if alternative.shares == "searched":
            self._search_static(alternative, 1)
        result = dict(known)
        for load in CURVE_LOADS:
            if study.left_s() < self.trial_s:
                return
            trial = self._trial(alternative, load * known["peak_per_s"], 0)
            result["curve_done"] = load == CURVE_LOADS[-1]
            if trial.figures:
                curve = [*result["goodput_curve"], point(trial)]
                result["goodput_curve"] = sorted(curve, key=lambda each: each["offered_per_s"])
                result["saturated"] = {
                    "load": load, "jain_fairness": trial.figures["jain_fairness"],
                    "gpu": trial.figures["gpu"],
                }  # fmt: skip
            study.keep(result)
