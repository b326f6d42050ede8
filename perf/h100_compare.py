"""D-STACK against the alternatives through real Triton and perf_analyzer: `make perf-h100-compare`.

    python perf/h100_compare.py [--cells C-4:5,C-7:5] [--alternatives dstack,temporal] [--time-budget-s 540]

For each cell (a mix of models, an SLO factor, a split of the rates, a kind of arrivals; compare/cells.py) and
each alternative (compare/alternatives.py): the peak, i.e. the largest total rate at which every model keeps
99% of its requests within its SLO at the client (failures and rejections are misses), goodput against offered
load up to 1.5 times the peak, latencies, GPU activity, energy and fairness. Same models, same build, same
clients, same arrival seeds for all. SLO = factor x the latency at the client of a lone batch-1 request to
the model, all of the GPU its own, measured once per --out (kept in compare.json for all later leases).

Results are written after every trial series; a run that is cut short leaves what it has, and the next goes
on with what is missing (--again measures anew). Servers are shared by the alternatives that can.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

from compare.alternatives import ALTERNATIVES, Alternative, Served
from compare.cells import CELLS, Cell, file_of, network_of
from compare.deployment import Deployment
from compare.peak import PeakSearch, Trial, find_peak
from compare.planning import Planner
from compare.report import peaks_table
from compare.report import write as write_readme
from compare.static_search import candidates
from dstack_sched.adapters.profile_files import read_profiles
from dstack_sched.domain.workload import OnLate
from dstack_sched.errors import DstackError, InputError, MachineError
from report import REPORTS, ROOT, write_report

COMMAND = "make perf-h100-compare"
ATTAINMENT = 0.99
CURVE_LOADS = (0.5, 0.8, 1.2, 1.5)  # of the alternative's own peak; the peak itself is measured anyway
SEED = 20261122
RESERVE_S = 15.0


class Study:
    """What is known, where it goes, how much time is left."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.started_s = time.monotonic()
        self.path: Path = options.out / "compare.json"
        known = json.loads(self.path.read_text()) if self.path.exists() else {}
        self.results: list[dict[str, Any]] = known.get("cells", [])
        self.solo_ms: dict[str, float] = known.get("solo_ms", {})
        self.problems: list[str] = known.get("problems", [])
        self.planner = Planner(read_profiles(options.profiles))

    def left_s(self) -> float:
        return self.options.time_budget_s - RESERVE_S - (time.monotonic() - self.started_s)

    def say(self, text: str) -> None:
        print(f"[{time.monotonic() - self.started_s:6.1f} s] {text}", flush=True)

    def problem(self, text: str) -> None:
        self.problems.append(text)
        self.say(f"PROBLEM {text}")

    def find(self, cell: Cell, alternative: Alternative) -> dict[str, Any] | None:
        """What is known of an alternative in a cell."""
        for each in self.results:
            if each["cell"] == cell.key and each["policy"] == alternative.name:
                return each
        return None

    def is_done(self, cell: Cell, alternative: Alternative) -> bool:
        known = self.find(cell, alternative)
        repeats = self.options.repeats
        return known is not None and len(known["repeats"]) >= repeats and not self.options.again

    def keep(self, result: dict[str, Any]) -> None:
        """Add or replace a result, and write all."""
        self.results = [
            each
            for each in self.results
            if (each["cell"], each["policy"]) != (result["cell"], result["policy"])
        ]
        self.results.append(result)
        write_report(
            self.path, COMMAND,
            {"attainment": ATTAINMENT, "device": self.options.device, "solo_ms": self.solo_ms,
             "cells": self.results, "problems": self.problems},
        )  # fmt: skip


def main() -> int:
    """Run the study; exit 1 when a cell that was asked for has no result."""
    options = parse_options()
    options.out.mkdir(parents=True, exist_ok=True)
    study = Study(options)
    cells, alternatives = options.cells, options.alternatives
    export(study, cells)
    for group in groups(alternatives, cells):
        try:
            run_group(study, *group)
        except (InputError, MachineError, DstackError) as error:
            study.problem(f"{group[0][0].name}: {error}")
    if study.path.exists():
        document = json.loads(study.path.read_text())
        study.say(f"{write_readme(document, options.out)} written")
        print("\n".join(peaks_table(document)))
    missing = [
        f"{cell.key} {each.name}" for cell in cells for each in alternatives if study.find(cell, each) is None
    ]
    study.say(f"done; {len(missing)} of {len(cells) * len(alternatives)} results missing; {study.path}")
    return 1 if missing else 0


def groups(
    alternatives: Sequence[Alternative], cells: Sequence[Cell]
) -> Iterable[tuple[list[Alternative], list[Cell]]]:
    """Alternatives and cells that one server can serve: shares by cell need a server a cell."""
    by_server: dict[Any, list[Alternative]] = {}
    for each in alternatives:
        by_server.setdefault(each.server, []).append(each)
    for members in by_server.values():
        if members[0].shares == "whole":
            yield members, list(cells)
        else:
            for cell in cells:
                yield members, [cell]


def run_group(study: Study, alternatives: list[Alternative], cells: list[Cell]) -> None:
    """One server, and everything that can be measured on it."""
    todo = [(cell, each) for cell in cells for each in alternatives if not study.is_done(cell, each)]
    if not todo or study.left_s() < 60:
        return
    options, first = study.options, alternatives[0]
    if first.shares == "searched":
        search_static(study, first, cells[0])
        return
    models = sorted({model for cell, _ in todo for model in cell.models})
    served = {model: Served(extra=dict(options.parameters)) for model in models}
    if first.shares == "planned":
        served = study.planner.static(cells[0], study.solo_ms, served)
    if any(each.levels for each in alternatives) and options.levels != "off":
        served = {
            name: replace(how, extra={**how.extra, "levels": options.levels}) for name, how in served.items()
        }
    study.say(f"starting a server for {', '.join(each.name for each in alternatives)}: {len(models)} models")
    deployment = deploy(study, first, served)
    try:
        measure_solo(study, deployment, models)
        for cell, alternative in todo:
            if study.left_s() < 25:
                study.say("no time left for more")
                return
            deployment.use(alternative)
            measure(study, deployment, cell, alternative)
    finally:
        deployment.close()


def deploy(study: Study, alternative: Alternative, served: Mapping[str, Served]) -> Deployment:
    """A running server."""
    options = study.options
    deployment = Deployment(
        options.work / alternative.name, options.models_dir, served, alternative,
        kind="KIND_GPU" if options.device == "cuda" else "KIND_CPU", shared_memory=options.shared_memory,
    )  # fmt: skip
    study.say(f"ready after {deployment.start_s:.1f} s")
    return deployment


def search_static(study: Study, alternative: Alternative, cell: Cell) -> None:
    """Deploy candidate after candidate, keep the best, and measure that one as all others are."""
    options, started = study.options, time.monotonic()
    solo_ms = {model: study.solo_ms[network_of(model)] for model in cell.models}
    served = {model: Served(extra=dict(options.parameters)) for model in cell.models}
    tried: list[dict[str, Any]] = []
    best: tuple[float, str, dict[str, Served]] | None = None
    for name, shares in candidates(study.planner.static(cell, study.solo_ms, served)):
        if (
            study.left_s() < options.static_search_s / 8
            or time.monotonic() - started > options.static_search_s
        ):
            study.say(f"{cell.key} {alternative.name}: no time left to try {name}")
            break
        deployment = deploy(study, alternative, shares)
        try:
            deployment.use(alternative)
            found = find_peak(
                lambda rate, on=deployment: on.trial(  # type: ignore[misc]
                    cell.workload(solo_ms, rate, OnLate.SERVE), options.seconds, options.warmup_s, SEED
                ),
                best[0] if best else study.planner.guess_per_s(cell, solo_ms, alternative),
                wanted=ATTAINMENT, tolerance=0.1, max_trials=6, left_s=study.left_s,
                trial_s=options.seconds + 6.0,
            )  # fmt: skip
        finally:
            deployment.close()
        study.say(f"{cell.key} {alternative.name}: {name}: {found.peak_per_s:.0f}/s")
        tried.append({"shares": name, **search_figures(found, SEED)})
        if best is None or found.peak_per_s > best[0]:
            best = (found.peak_per_s, name, shares)
    if best is None:
        return
    searched_s = time.monotonic() - started
    deployment = deploy(study, alternative, best[2])
    try:
        deployment.use(alternative)
        measure(study, deployment, cell, alternative)
    finally:
        deployment.close()
    result = study.find(cell, alternative)
    if result is not None:
        shares_found = {model: each.gpu_percent for model, each in best[2].items()}
        study.keep(result | {"search_s": round(searched_s, 1), "tried": tried, "shares": shares_found})


def measure_solo(study: Study, deployment: Deployment, models: Iterable[str]) -> None:
    """Latency of a lone request at the client, once for all leases."""
    for model in models:
        name = network_of(model)
        if name not in study.solo_ms and not deployment.alternative.one_process:
            study.solo_ms[name] = round(deployment.solo_ms(model), 3)
            study.say(f"{name}: {study.solo_ms[name]} ms alone at the client")


def measure(study: Study, deployment: Deployment, cell: Cell, alternative: Alternative) -> None:
    """The peak by the wanted number of repeats, and the curve."""
    options = study.options
    solo_ms = {model: study.solo_ms[network_of(model)] for model in cell.models}
    on_late = OnLate.SERVE  # perf_analyzer ends at the first rejection

    def run(rate_per_s: float, seed: int) -> Trial:
        workload = cell.workload(solo_ms, rate_per_s, on_late)
        if alternative.policy is not None:
            study.planner.tell(deployment, cell, workload)
        trial = deployment.trial(workload, options.seconds, options.warmup_s, seed)
        study.say(
            f"  {cell.key} {alternative.name}: {rate_per_s:7.0f}/s -> worst attainment "
            f"{trial.attainment:.3f}, goodput {trial.goodput_per_s:.0f}/s"
        )
        return trial

    started = time.monotonic()
    known = study.find(cell, alternative) if not options.again else None
    searches: list[dict[str, Any]] = list(known["repeats"]) if known else []
    curve: list[dict[str, Any]] = list(known["goodput_curve"]) if known else []
    at_peak: dict[str, Any] = dict(known["at_peak"]) if known else {}
    guess = searches[-1]["peak_per_s"] if searches else study.planner.guess_per_s(cell, solo_ms, alternative)
    while len(searches) < options.repeats and study.left_s() > 25:
        seed = SEED + len(searches)
        found = find_peak(
            lambda rate, seed=seed: run(rate, seed), max(guess, 10.0), wanted=ATTAINMENT,
            step=1.6 if not searches else 1.15, left_s=study.left_s, trial_s=options.seconds + 6.0,
        )  # fmt: skip
        searches.append(search_figures(found, seed))
        guess = found.peak_per_s or guess
        at_peak = best_trial(found) or at_peak
        curve += [point(trial) for trial in found.trials] if len(searches) == 1 else []
        peak = statistics.mean(each["peak_per_s"] for each in searches)
        study.keep(
            {
                "cell": cell.key, "mix": cell.mix, "slo_factor": cell.slo_factor, "rates": cell.rates,
                "arrivals": cell.arrivals, "policy": alternative.name, "letter": alternative.letter,
                "slo_ms": {m: round(cell.slo_factor * solo_ms[m], 3) for m in cell.models},
                "peak_per_s": round(peak, 1), "repeats": searches, "at_peak": at_peak,
                "goodput_curve": sorted(curve, key=lambda each: each["offered_per_s"]),
                **study.planner.bounds(cell, solo_ms),
                "predicted_peak_per_s": study.planner.predicted_peak_per_s(cell, solo_ms, alternative),
                "search_s": round(time.monotonic() - started, 1),
                "server_start_s": round(deployment.start_s, 1),
                "levels": options.levels if alternative.levels else "off",
            }
        )  # fmt: skip
        study.say(f"{cell.key} {alternative.name}: peak {found.peak_per_s:.0f}/s")
    if options.curve and guess > 0 and not known:
        for load in CURVE_LOADS:
            if study.left_s() > options.seconds + 10.0:
                curve.append(point(run(load * guess, SEED)))
        result = study.find(cell, alternative)
        if result is not None:
            result["goodput_curve"] = sorted(curve, key=lambda each: each["offered_per_s"])
            study.keep(result)


def search_figures(found: PeakSearch, seed: int) -> dict[str, Any]:
    """One repeat, as compare.json keeps it."""
    return {
        "seed": seed,
        "peak_per_s": round(found.peak_per_s, 1),
        "failed_at_per_s": None if found.failed_at_per_s is None else round(found.failed_at_per_s, 1),
        "trials": [
            [round(trial.rate_per_s, 1), round(trial.attainment, 4), round(trial.goodput_per_s, 1)]
            for trial in found.trials
        ],
    }


def best_trial(found: PeakSearch) -> dict[str, Any] | None:
    """All figures of the trial at the peak."""
    held = [trial for trial in found.trials if trial.rate_per_s == found.peak_per_s]
    return asdict(held[-1]) if held else None


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


def export(study: Study, cells: Sequence[Cell]) -> None:
    """Export with torch what is not there yet."""
    options = study.options
    names = sorted({file_of(model) for cell in cells for model in cell.models})
    missing = [name for name in names if not (options.models_dir / f"{name}.onnx").exists()]
    if missing:
        subprocess.run(
            [sys.executable, str(ROOT / "perf" / "export_models.py"), str(options.models_dir),
             "--models", ",".join(missing), "--workers", str(max(2, len(os.sched_getaffinity(0)) - 2))],
            check=True, timeout=300,
        )  # fmt: skip
        study.say(f"exported {len(missing)} models")


def names_to(table: Callable[[str], Any]) -> Callable[[str], list[Any]]:
    """An argparse type: a list by comma."""

    def parse(text: str) -> list[Any]:
        try:
            return [table(part) for part in text.split(",") if part]
        except (KeyError, InputError) as error:
            raise argparse.ArgumentTypeError(str(error)) from None

    return parse


def pair(text: str) -> tuple[str, str]:
    key, separator, value = text.partition("=")
    if not separator:
        raise InputError(f"{text!r}: KEY=VALUE is wanted")
    return key, value


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=REPORTS / "h100")
    parser.add_argument("--profiles", type=Path, default=REPORTS / "h100" / "profiles.json")
    parser.add_argument("--models-dir", type=Path, default=ROOT / "run" / "models")
    parser.add_argument("--work", type=Path, default=ROOT / "run" / "compare")
    parser.add_argument("--cells", type=names_to(Cell.parse), default=list(CELLS), help="by comma")
    parser.add_argument(
        "--alternatives", type=names_to(lambda name: ALTERNATIVES[name]), default=list(ALTERNATIVES.values()),
        help="by comma: " + ", ".join(ALTERNATIVES),
    )  # fmt: skip
    parser.add_argument("--time-budget-s", type=float, default=560.0)
    parser.add_argument("--seconds", type=float, default=5.0, help="measured stretch of a trial")
    parser.add_argument("--warmup-s", type=float, default=1.0)
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--curve", action="store_true", help="also goodput at fixed shares of the peak")
    parser.add_argument("--static-search-s", type=float, default=400.0, help="for best-static, a cell")
    parser.add_argument("--again", action="store_true", help="measure what is known already, too")
    parser.add_argument("--levels", default="auto", help="config parameter levels of D-STACK's models")
    parser.add_argument("--parameters", type=names_to(pair), default=[], help="KEY=VALUE for every config")
    parser.add_argument("--shared-memory", choices=["none", "system"], default="none")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda", help="cpu: a dry run")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
