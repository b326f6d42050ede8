"""Profile the eight standard models on this GPU and judge the profiles: `make perf-h100-profiles`.

    python perf/h100_profiles.py [--out DIR] [--models a,b] [--time-budget-s 540] [--device cuda|cpu]

Steps: export with torch (what is not there yet), an adaptive profile of each model, an exhaustive grid of
two as the reference, models side by side, and the figures. After each step everything known so far is
written, so a run that is cut short leaves usable files, and running again goes on (--state keeps points).

Writes into DIR: profiles.json (the profiles.json format, with the figures and how they were made beside),
profiles.md (the tables) and profiles_exhaustive.json (the reference grids).
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from contextlib import ExitStack
from dataclasses import replace
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
from dstack_sched.app.profiling import (
    ProfilingOptions,
    ProfilingResult,
    candidate_batches,
    candidate_percents,
    corun_batches,
    corun_percents,
    measure_coruns,
    profile_model,
)
from dstack_sched.domain.profile import Device, ModelProfile, ProfileSet
from dstack_sched.errors import DstackError, InputError, MachineError
from dstack_sched.policy.sampling import corun_design
from export_models import DEFAULT_MODELS, MODELS
from profile_analysis import analyse, compare_with_grid, markdown
from report import REPORTS, ROOT, write_report

COMMAND = "make perf-h100-profiles"
EXHAUSTIVE_MODELS = ("resnet50", "mobilenet_v2")
EXHAUSTIVE_PERCENTS = tuple(float(p) for p in range(10, 101, 10))
MODEL_BUDGET_S = 50.0  # the target is 60 s a model, loading included
RESERVE_S = 25.0  # for the figures at the end
EXPORT_LIMIT_S = 240.0


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
        self.timing: dict[str, Any] = {"command": COMMAND, "models_s": {}, "export_s": 0.0}
        self.problems: list[str] = []

    def left_s(self) -> float:
        return self.options.time_budget_s - RESERVE_S - (time.monotonic() - self.started_s)

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
        """The adaptive profile of every model."""
        started = time.monotonic()
        for name in self.names:
            if self.left_s() < 10:
                self.problem(f"{name}: no time left to profile it")
                continue
            result = self._profile(name, settings, self.store, ())
            if result:
                self.device = result.device
                self.hashes[name] = result.profile.sha256
                self.timing["models_s"][name] = round(result.seconds, 1)
                self.timing["profiles_s"] = round(time.monotonic() - started, 1)
                self.write()

    def exhaustive(self, name: str, settings: ProbeSettings) -> None:
        """The full grid of one model, measured apart from its adaptive profile."""
        if name not in self.hashes or self.left_s() < 20:
            self.problem(f"{name}: no time left for the exhaustive grid")
            return
        percents = EXHAUSTIVE_PERCENTS if settings.provider == "cuda" else ()
        result = self._profile(name, settings, self.grid_store, percents, exhaustive=True)
        if result and self.device:
            self.references[name] = result.profile
            self.timing.setdefault("exhaustive_s", {})[name] = round(result.seconds, 1)
            write_profiles(
                self.options.out / "profiles_exhaustive.json", ProfileSet(self.device, dict(self.references))
            )
            self.write()

    def _profile(
        self,
        name: str,
        settings: ProbeSettings,
        store: FileProfileStore,
        percents: tuple[float, ...],
        exhaustive: bool = False,
    ) -> ProfilingResult | None:
        budget = self.left_s() if exhaustive else min(MODEL_BUDGET_S, self.left_s())
        try:
            self.kernels[name] = self.kernels.get(name) or read_kernels(self.path(name))
            with ModelProbe(self.path(name), settings) as probe:
                # All workers load together, the one that tells the device among them.
                probe.start(percents or (candidate_percents(self.device) if self.device else (100.0,)))
                device = probe.device()
                result = profile_model(
                    name,
                    model_sha256(self.path(name)),
                    probe,
                    store,
                    SystemClock(),
                    ProfilingOptions(
                        percents=percents,
                        batches=self.options.batches or candidate_batches(device),
                        time_budget_s=budget,
                        exhaustive=exhaustive,
                    ),
                    self.kernels[name],
                    lambda at: self.say(f"  {at.model}: {at.points} points, error {at.error:.1%}"),
                )
        except DstackError as error:
            self.problem(f"{name}: {error}")
            return None
        for note in result.notes:
            self.problem(note)
        self.say(
            f"{name}: {len(result.profile.points)} points in {result.seconds:.1f} s"
            f" ({result.measured} measured), error {result.error:.1%}"
        )
        return result

    def corun(self, settings: ProbeSettings) -> None:
        """Models side by side, for the interference model and the capacity."""
        if not self.device or self.left_s() < 30:
            self.problem("no time left to measure models side by side")
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
        self.timing["corun_s"] = round(time.monotonic() - started, 1)
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
            figures = analyse(profiles, self.references, self.kernels, self.timing)
            (self.options.out / "profiles.md").write_text(markdown(profiles, figures), encoding="utf-8")
        else:
            figures = {"timing": self.timing}
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
    parser.add_argument("--time-budget-s", type=float, default=540.0)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda", help="cpu: a dry run")
    parser.add_argument("--analyse-only", action="store_true", help="figures anew from the files in --out")
    parser.add_argument("--before", type=Path, help="with --analyse-only: an earlier run's files, judged too")
    options = parser.parse_args()
    options.batches = tuple(int(b) for b in options.batch_sizes.split(",") if b)
    return options


def analyse_only(study: Study) -> None:
    """Figures and tables again, from the files of an earlier run."""
    out = study.options.out
    profiles = read_profiles(out / "profiles.json")
    study.device = profiles.device
    if (out / "profiles_exhaustive.json").exists():
        study.references = dict(read_profiles(out / "profiles_exhaustive.json").models)
    for name in profiles.models:
        if study.path(name).exists():
            study.kernels[name] = read_kernels(study.path(name))
    content = json.loads((out / "profiles.json").read_text(encoding="utf-8"))
    before = content.pop("figures", {})
    figures = analyse(profiles, study.references, study.kernels, before.get("timing", {}))
    figures["problems"] = before.get("problems", [])
    if study.options.before:
        earlier = read_profiles(study.options.before / "profiles.json")
        grids = read_profiles(study.options.before / "profiles_exhaustive.json").models
        figures["run_before"] = {
            name: compare_with_grid(earlier.models[name], grid, earlier.device, study.kernels.get(name, ()))
            for name, grid in grids.items()
        }
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
    try:
        study.export()
        if options.device == "cuda" and not daemon.available():
            raise MachineError("no GPU with nvidia-cuda-mps-control here; use --device cpu for a dry run")
        environment = dict(daemon.start()) if options.device == "cuda" else {}
        settings = ProbeSettings(options.device, environment=environment, cap_s=0.5)
        study.profile(settings)
        references = [name for name in options.exhaustive.split(",") if name in study.names]
        for name in references[:1]:
            study.exhaustive(name, replace(settings, cap_s=0.4))
        study.corun(settings)
        for name in references[1:]:
            study.exhaustive(name, replace(settings, cap_s=0.4))
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
