"""Profile the eight standard models on this GPU and judge the profiles: `make perf-h100-profiles`.

    python perf/h100_profiles.py [--out DIR] [--models a,b] [--time-budget-s 560] [--device cuda|cpu]

Steps: export with torch (what is not there yet), an adaptive profile of each model, models side by side,
and the figures. Of two models, right after their adaptive profile and by the same workers: an exhaustive
grid, and what the two would choose measured side by side, in turns. Every step has its share of the time,
what one leaves goes to the next. After each step everything known so far is written, so a run that is cut
short (a SIGTERM, too) leaves usable files, and running again with the same --out and --state goes on: what is
done stays, models without a profile come next, then those that were cut short. Models side by side may be
left to a second command (--corun-only).

Writes into DIR: profiles.json (the profiles.json format, with the figures and how they were made beside),
profiles.md (the tables) and profiles_exhaustive.json (the reference grids).
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))
os.environ["OPENBLAS_NUM_THREADS"] = "1"  # small problems: threads would only disturb what is measured

from dstack_sched.adapters.clock import SystemClock
from dstack_sched.adapters.mps import MpsDaemon
from dstack_sched.adapters.onnx_graph import read_kernels
from dstack_sched.adapters.probe import CorunSeat, ModelProbe, ProbeSettings, measure_corun
from dstack_sched.adapters.profile_files import profiles_json, read_profiles, write_profiles
from dstack_sched.adapters.profile_store import FileProfileStore, model_sha256
from dstack_sched.app.corun_profiling import corun_batches, corun_percents, measure_coruns
from dstack_sched.app.profiling import (
    ProfilingOptions,
    ProfilingResult,
    candidate_batches,
    candidate_percents,
    profile_model,
)
from dstack_sched.domain.profile import Device, ModelProfile, ProfileSet
from dstack_sched.errors import DstackError, InputError, MachineError
from dstack_sched.policy.sampling import corun_design
from export_models import DEFAULT_MODELS, MODELS
from profile_analysis import SideBySide, analyse, markdown, side_by_side_places
from report import REPORTS, ROOT, write_report

COMMAND = "make perf-h100-profiles"
EXHAUSTIVE_MODELS = ("resnet50", "mobilenet_v2")
MODEL_BUDGET_S = 56.0  # the target is 60 s a model, loading included
LEAST_MODEL_S = 10.0
FEW_POINTS = 12  # a profile of fewer was cut short
RESERVE_S = 15.0  # for the figures at the end
GRID_S = 62.0  # what a reference grid and its winners side by side take on an H100
CORUN_S = 40.0  # with less time left, co-runs are left to a second command
EXPORT_LIMIT_S = 240.0
CAP_S = 0.5


class Study:
    """One run: what is known, and where it goes."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.names: list[str] = options.models.split(",")
        self.started_s = time.monotonic()
        self.store = FileProfileStore(options.state / "adaptive")
        self.grid_store = FileProfileStore(options.state / "exhaustive")
        self.device: Device | None = None
        self.hashes: dict[str, str] = {}
        self.kernels: dict[str, Any] = {}
        self.references: dict[str, ModelProfile] = {}
        self.side_by_side: dict[str, SideBySide] = {}
        self.timing: dict[str, Any] = {"command": COMMAND, "models_s": {}, "export_s": 0.0, "profiles_s": 0.0}
        self.problems: list[str] = []
        self.earlier = self._earlier_timing()

    def _earlier_timing(self) -> dict[str, Any]:
        """The seconds that the files of an earlier run state."""
        path = self.options.out / "profiles.json"
        if not path.exists():
            return {}
        timing: dict[str, Any] = (
            json.loads(path.read_text(encoding="utf-8")).get("figures", {}).get("timing", {})
        )
        return timing

    def left_s(self) -> float:
        return self.options.time_budget_s - RESERVE_S - (time.monotonic() - self.started_s)

    def model_budget_s(self, name: str) -> float:
        """This model's part of what the later steps leave, with an equal part for each model to come."""
        to_come = [n for n in self.names[self.names.index(name) :] if self.is_due(n)]
        grids = len([n for n in to_come if n in self.options.exhaustive])
        return min(MODEL_BUDGET_S, (self.left_s() - GRID_S * grids) / len(to_come))

    @contextmanager
    def timed(self, phase: str, name: str = "") -> Iterator[None]:
        """Seconds of a phase into the figures and onto stdout."""
        started = time.monotonic()
        try:
            yield
        finally:
            seconds = round(time.monotonic() - started, 1)
            if name:
                self.timing.setdefault(phase, {})[name] = seconds
            else:
                self.timing[phase] = seconds
            self.say(f"PHASE {phase} {name} {seconds} s".replace("  ", " "))

    def go_on(self) -> None:
        """Take over what an earlier run with this --state has left in --out."""
        try:
            profiles, content = earlier_run(self)
        except InputError:
            return
        self.hashes = {
            name: sha256
            for name in self.names
            if name in profiles.models
            and self.store.get(sha256 := model_sha256(self.path(name)), profiles.device)
        }
        if not self.hashes:  # of another machine, or with another --state
            self.device, self.references, self.side_by_side = None, {}, {}
            return
        self.say(f"going on from an earlier run: {', '.join(self.hashes)}")
        before = content.get("figures", {}).get("timing", {})
        for phase in ("models_s", "exhaustive_s", "side_by_side_s"):
            known = before.get(phase, {})
            self.timing[phase] = {name: known[name] for name in self.hashes if name in known}
        self.timing["profiles_s"] = round(sum(self.timing["models_s"].values()), 1)
        self.timing["corun_s"] = before.get("corun_s", 0.0)

    def is_due(self, name: str) -> bool:
        """Whether there is something left to measure of this model alone."""
        known = (
            self.store.get(self.hashes[name], self.device) if self.device and name in self.hashes else None
        )
        if known is None or len(known.points) < FEW_POINTS:
            return True
        return name in self.options.exhaustive and not self.is_compared(name)

    def is_compared(self, name: str) -> bool:
        """Whether its grid is there, and all that the grid and the profile would choose is measured again."""
        assert self.device
        known, grid = self.store.get(self.hashes[name], self.device), self.references.get(name)
        if known is None or grid is None or name not in self.side_by_side:
            return False
        return set(side_by_side_places(known, grid)) <= self.side_by_side[name].latencies_ms.keys()

    def path(self, name: str) -> Path:
        return self.options.models_dir / f"{name}.onnx"

    def say(self, text: str) -> None:
        print(f"[{time.monotonic() - self.started_s:6.1f} s] {text}", flush=True)

    def problem(self, text: str) -> None:
        self.problems.append(text)
        self.say(f"PROBLEM {text}")

    def export(self) -> None:
        """Export what is missing; models that fail are left out, with their reason on stdout."""
        started = time.monotonic()
        missing = [name for name in self.names if not self.path(name).exists()]
        if missing:
            workers = str(max(2, len(os.sched_getaffinity(0)) - 2))
            command = [sys.executable, str(ROOT / "perf" / "export_models.py"), str(self.options.models_dir)]
            try:
                subprocess.run(
                    [*command, "--models", ",".join(missing), "--workers", workers], timeout=EXPORT_LIMIT_S
                )
            except subprocess.TimeoutExpired:
                self.problem(f"export took more than {EXPORT_LIMIT_S:g} s")
        self.timing["export_s"] = round(time.monotonic() - started, 1)
        for name in self.names:
            if not self.path(name).exists():
                self.problem(f"{name}: was not exported")
        self.names = [name for name in self.names if self.path(name).exists()]
        if not self.names:
            raise MachineError(
                f"no model in {self.options.models_dir}; export needs torch, torchvision, transformers"
            )

    def profile(self, settings: ProbeSettings) -> None:
        """The adaptive profile of every model, the references first, and their grids; what an earlier run has
        is kept."""
        self.names.sort(key=lambda name: (name in self.hashes, name not in self.options.exhaustive))
        for name in filter(self.is_due, list(self.names)):
            budget_s = self.model_budget_s(name)
            if budget_s < LEAST_MODEL_S:
                lacks = "profile it" if name not in self.hashes else "go on with it"
                self.problem(f"{name}: no time left to {lacks}")
                continue
            try:
                with ModelProbe(self.path(name), settings) as probe:
                    self._adaptive(name, probe, budget_s)
                    if name in self.options.exhaustive:
                        self._reference(name, probe)
            except DstackError as error:
                self.problem(f"{name}: {error}")
            self.write()

    def _adaptive(self, name: str, probe: ModelProbe, budget_s: float) -> None:
        self.kernels[name] = read_kernels(self.path(name))
        # All workers load together, the one that tells the device among them.
        probe.start(candidate_percents(self.device) if self.device else (100.0,))
        result = self._measured(name, probe, self.store, budget_s, exhaustive=False)
        self.device = result.device
        self.hashes[name] = result.profile.sha256
        # A run that goes on where another was cut short counts the other's seconds, too.
        earlier_s = self.earlier.get("models_s", {}).get(name, 0.0) if result.reused else 0.0
        seconds = earlier_s + (result.seconds if result.measured else 0.0)
        self.timing["models_s"][name] = round(seconds, 1)
        self.timing["profiles_s"] = round(sum(self.timing["models_s"].values()), 1)

    def _reference(self, name: str, probe: ModelProbe) -> None:
        """The full grid, apart from the adaptive profile; then the places that the two would choose."""
        if self.is_compared(name):
            return
        if self.left_s() < LEAST_MODEL_S:
            self.problem(f"{name}: no time left for the exhaustive grid")
            return
        assert self.device
        with self.timed("exhaustive_s", name):
            grid = self._measured(name, probe, self.grid_store, self.left_s(), exhaustive=True).profile
        self.references[name] = grid
        write_profiles(
            self.options.out / "profiles_exhaustive.json", ProfileSet(self.device, dict(self.references))
        )
        with self.timed("side_by_side_s", name):
            again = self.side_by_side[name] = SideBySide()
            adaptive = self.store.get(self.hashes[name], self.device)
            assert adaptive
            for place in side_by_side_places(adaptive, grid):
                if self.left_s() <= 0:
                    self.problem(f"{name}: no time left to measure all choices side by side")
                    break
                again.add(probe.measure(*place))

    def _measured(
        self, name: str, probe: ModelProbe, store: FileProfileStore, budget_s: float, *, exhaustive: bool
    ) -> ProfilingResult:
        device = probe.device()
        result = profile_model(
            name,
            model_sha256(self.path(name)),
            probe,
            store,
            SystemClock(),
            ProfilingOptions(
                batches=self.options.batches or candidate_batches(device),
                time_budget_s=budget_s,
                exhaustive=exhaustive,
            ),
            self.kernels[name],
            lambda at: self.say(f"  {at.model}: {at.points} points, error {at.error:.1%}"),
        )
        for note in result.notes:
            self.problem(note)
        self.say(
            f"{name}: {len(result.profile.points)} points in {result.seconds:.1f} s of {budget_s:.0f} s"
            f" ({result.measured} measured), error {result.error:.1%}"
        )
        return result

    def corun(self, settings: ProbeSettings) -> None:
        """Models side by side, for the interference model and the capacity."""
        if not self.device or self.left_s() < CORUN_S:
            self.say(
                "no time left for models side by side: run again with --corun-only, same --out and --state"
            )
            return
        started = time.monotonic()
        profiles = self.store.export(self.device, self.hashes)
        design = corun_design(list(profiles.models), corun_percents(self.device))
        with ExitStack() as stack:
            probes = {n: stack.enter_context(ModelProbe(self.path(n), settings)) for n in profiles.models}
            try:
                for name, percent in sorted({seat for entry in design for seat in entry}):
                    probes[name].start([percent])
                for probe in probes.values():
                    probe.wait()
                self.say(f"{len(design)} settings side by side, workers ready")
                points = measure_coruns(
                    design,
                    corun_batches(profiles.models.values()),
                    lambda seats: measure_corun([CorunSeat(n, probes[n], p, b) for n, p, b in seats]),
                    self.store,
                    self.device,
                    self.hashes,
                    self.left_s,
                )
                self.say(f"{len(points)} of {len(design)} measured side by side")
            except DstackError as error:
                self.problem(f"side by side: {error}")
        earlier_s = self.timing.get("corun_s", 0.0)
        self.timing["corun_s"] = round(earlier_s + time.monotonic() - started, 1)
        self.timing["profiles_with_interference_s"] = round(
            self.timing.get("profiles_s", 0.0) + self.timing["corun_s"], 1
        )
        self.write()

    def write(self, final: bool = False) -> None:
        """Everything known so far; figures only at the end, they take a while."""
        if not self.device:
            return
        profiles = self.store.export(self.device, self.hashes)
        content: dict[str, Any] = {k: v for k, v in profiles_json(profiles).items() if k != "version"}
        self.timing["total_s"] = round(time.monotonic() - self.started_s, 1)
        if final:
            with self.timed("figures_s"):
                figures = analyse(profiles, self.references, self.kernels, self.timing, self.side_by_side)
            (self.options.out / "profiles.md").write_text(markdown(profiles, figures), encoding="utf-8")
        else:
            figures = {"timing": self.timing}
        figures["side_by_side"] = {name: again.as_json() for name, again in self.side_by_side.items()}
        figures["problems"] = self.problems
        write_report(self.options.out / "profiles.json", COMMAND, {**content, "figures": figures})


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=REPORTS / "h100")
    parser.add_argument(
        "--models", default=",".join(DEFAULT_MODELS), help="by comma, of " + ", ".join(MODELS)
    )
    parser.add_argument("--models-dir", type=Path, default=ROOT / "run" / "models")
    parser.add_argument("--state", type=Path, default=ROOT / "run" / "h100-profiles")
    parser.add_argument(
        "--exhaustive", default=",".join(EXHAUSTIVE_MODELS), help="models of the reference grid"
    )
    parser.add_argument("--batch-sizes", default="", help="by comma; default: those that suit the device")
    parser.add_argument("--time-budget-s", type=float, default=560.0)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda", help="cpu: a dry run")
    parser.add_argument("--corun-only", action="store_true", help="after a run that had no time left for it")
    parser.add_argument("--analyse-only", action="store_true", help="figures anew from the files in --out")
    options = parser.parse_args()
    options.exhaustive = tuple(name for name in options.exhaustive.split(",") if name)
    options.batches = tuple(int(b) for b in options.batch_sizes.split(",") if b)
    return options


def earlier_run(study: Study) -> tuple[ProfileSet, dict[str, Any]]:
    """What the files in --out hold, into the study; the profiles, and the content beside them."""
    out = study.options.out
    profiles = read_profiles(out / "profiles.json")
    study.device = profiles.device
    if (out / "profiles_exhaustive.json").exists():
        study.references = dict(read_profiles(out / "profiles_exhaustive.json").models)
    for name in profiles.models:
        if study.path(name).exists():
            study.kernels[name] = read_kernels(study.path(name))
    content: dict[str, Any] = json.loads((out / "profiles.json").read_text(encoding="utf-8"))
    before = content.get("figures", {})
    study.side_by_side = {
        name: SideBySide.of_json(rows) for name, rows in before.get("side_by_side", {}).items()
    }
    return profiles, content


def corun_only(study: Study, settings: ProbeSettings) -> None:
    """Models side by side, with the profiles of an earlier run, as they are."""
    profiles, content = earlier_run(study)
    study.hashes = {name: model.sha256 for name, model in profiles.models.items()}
    assert study.device
    known = [name for name, sha256 in study.hashes.items() if study.store.get(sha256, study.device)]
    if known != list(study.hashes) or any(not study.path(name).exists() for name in known):
        raise InputError(f"{study.options.state}, {study.options.models_dir}: not those of the run in --out")
    before = content.get("figures", {})
    study.timing = before.get("timing", study.timing)
    study.problems = before.get("problems", [])
    study.corun(settings)


def analyse_only(study: Study) -> None:
    """Figures and tables again, from the files of an earlier run."""
    out = study.options.out
    profiles, content = earlier_run(study)
    before = content.pop("figures", {})
    figures = analyse(profiles, study.references, study.kernels, before.get("timing", {}), study.side_by_side)
    figures["problems"] = before.get("problems", [])
    figures["side_by_side"] = before.get("side_by_side", {})
    head = {key: content[key] for key in ("commit", "date", "machine") if key in content}
    body = {k: v for k, v in content.items() if k not in ("version", "command", *head)}
    write_report(out / "profiles.json", COMMAND, {**body, **head, "figures": figures})
    (out / "profiles.md").write_text(markdown(profiles, figures), encoding="utf-8")


def main() -> int:
    study = Study(parse_options())
    options = study.options
    options.out.mkdir(parents=True, exist_ok=True)
    options.state.mkdir(parents=True, exist_ok=True)
    if options.analyse_only:
        analyse_only(study)
        return 0
    daemon = MpsDaemon(options.state / "mps.log")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("ended by SIGTERM; what is known is written"))
    try:
        if not options.corun_only:
            study.export()
        if options.device == "cuda" and not daemon.available():
            raise MachineError("no GPU with nvidia-cuda-mps-control here; use --device cpu for a dry run")
        environment = dict(daemon.start()) if options.device == "cuda" else {}
        settings = ProbeSettings(options.device, environment=environment, cap_s=CAP_S)
        if options.corun_only:
            corun_only(study, settings)
        else:
            study.go_on()
            study.profile(settings)
            study.corun(settings)
    except (InputError, MachineError) as error:
        study.problem(str(error))
    finally:
        study.write(final=True)
        daemon.stop()
    study.say(f"done, {len(study.problems)} problems; files in {options.out}")
    if (options.out / "profiles.md").exists():
        print((options.out / "profiles.md").read_text(encoding="utf-8"))
    return 0 if len(study.hashes) == len(options.models.split(",")) else 1


if __name__ == "__main__":
    sys.exit(main())
