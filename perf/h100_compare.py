"""D-STACK against the alternatives through real Triton and perf_analyzer: `make perf-h100-compare`.

    python perf/h100_compare.py [--cells C-4:5,C-7:5] [--alternatives dstack,temporal] [--time-budget-s 540]

For each cell (a mix of models, an SLO factor, a split of the rates, a kind of arrivals; compare/cells.py) and
each alternative (compare/alternatives.py): the peak, i.e. the largest total rate at which every model keeps
99% of its requests within its SLO at the client (failures and rejections are misses), goodput against offered
load up to 1.5 times the peak, latencies, GPU activity, energy and fairness. Same models, same build, same
clients, same arrival seeds for all. SLO = factor x the latency at the client of a lone batch-1 request to
the model, all of the GPU its own, measured once per --out (kept in compare.json for all later leases).

All servers of a cell are started together. The peaks of all alternatives come first, then further repeats
(--repeats), then the curves (--curve). compare.json and README.md are written after each; a run that is cut
short leaves what it has, and the next goes on with what is missing (--again measures anew).

    --alternatives time-sliced,dstack,dstack+levels=off,dstack+capacity=250     variants, side by side
    --predict    no load, no GPU: the simulator's peaks and the bounds, with the SLOs that were measured
    --device cpu --out DIR    a dry run on CPU instances
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

from compare.alternatives import ALTERNATIVES, Alternative
from compare.cell_run import CellRun
from compare.cells import CELLS, Cell, file_of, names_to, trace
from compare.deployment import Site, stop_quietly
from compare.gpu_watch import Nvml
from compare.planning import LEARN_ROUNDS, SIM_SECONDS, Planner
from compare.report import peaks_table
from compare.report import write as write_readme
from compare.study import Study
from compare.wakeful import wakeful_environment
from dstack_backend.settings import PARAMETERS
from dstack_sched.adapters.mps import MpsDaemon
from dstack_sched.adapters.perf_analyzer import find_perf_analyzer
from dstack_sched.adapters.server_install import find_server
from dstack_sched.errors import DstackError, InputError, MachineError
from report import REPORTS, ROOT

EXPORT_LIMIT_S = 150.0


def main() -> int:
    """Run the study; exit 1 when a result that was asked for is missing."""
    options = parse_options()
    planner = Planner(options.profiles, options.workers)
    try:
        study = Study(options, Nvml(), planner)
        if options.predict:
            predict(study)
        else:
            measure(study)
        return finish(study)
    except DstackError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    finally:
        planner.close()


def measure(study: Study) -> None:
    """Every cell that was asked for, as far as the time goes. Errors: what keeps all of them from running."""
    options = study.options
    find_perf_analyzer()
    find_server(None)
    if any(cell.arrivals == "trace" for cell in options.cells):
        trace()
    options.out.mkdir(parents=True, exist_ok=True)
    options.work.mkdir(parents=True, exist_ok=True)
    export(study)
    daemon = MpsDaemon(options.work / "mps.log")
    if options.device == "cuda" and not daemon.available():
        raise MachineError("no GPU, or no nvidia-cuda-mps-control on PATH; --device cpu is a dry run")
    environment = wakeful_environment(options.work)
    if not environment:
        study.say("no C compiler: a perf_analyzer may miss its start, and its trial is repeated then")
    try:
        daemon.start()  # one for all servers of all cells, which find it
        for cell in options.cells:
            run_cell(study, cell, environment)
    finally:
        stop_quietly(daemon.stop)


def run_cell(study: Study, cell: Cell, environment: Mapping[str, str]) -> None:
    """One cell; what fails is noted, and the next cell goes on."""
    options = study.options
    for each in options.alternatives if options.again else ():
        study.forget(cell, each)
    todo = [each for each in options.alternatives if not study.is_done(cell, each)]
    if not todo:
        return
    site = Site(
        options.work, options.models_dir, "KIND_GPU" if options.device == "cuda" else "KIND_CPU",
        options.shared_memory, study.nvml, environment,
    )  # fmt: skip
    try:
        run = CellRun(study, cell, site, todo)
        if study.left_s() < run.blind_s:
            study.say(f"{cell.key}: no time left")
            return
        study.say(f"{cell.key}: {', '.join(each.name for each in todo)}")
        run.run()
    except Exception as error:  # whatever fails, the cells behind it are still wanted
        study.problem(cell.key, error)
    finally:
        if study.results:
            study.write()
            report(study)


def predict(study: Study) -> None:
    """The bounds and the simulator's peak of every result, by the SLOs that it was measured with."""
    planner = study.planner
    asked = []
    for result in study.results:
        cell, alternative = Cell.parse(result["cell"]), Alternative.parse(result["policy"])
        solo = planner.expected_solo(cell, study.solo_ms)
        peak = planner.ask("peak", cell, solo, alternative, seconds=SIM_SECONDS)
        asked.append((result, peak, planner.ask("bounds", cell, solo)))
    for result, peak, bounds in asked:
        ideal = bounds.result()
        if ideal is not None:
            result["ideal_corun_per_s"], result["ideal_isolated_per_s"] = (round(each, 1) for each in ideal)
        found = peak.result()
        result["predicted_peak_per_s"] = None if found is None else round(found, 1)
        study.say(f"{result['cell']} {result['policy']}: {result['predicted_peak_per_s']}/s")
        study.write()


def finish(study: Study) -> int:
    """The README and the last words."""
    options = study.options
    if study.results:
        report(study)
        print("\n".join(peaks_table(json.loads(study.path.read_text()))))
    wanted = (
        [] if options.predict else [(cell, each) for cell in options.cells for each in options.alternatives]
    )
    missing = [f"{cell.key} {each.name}" for cell, each in wanted if study.find(cell, each) is None]
    study.say(f"done; {len(missing)} of {len(wanted)} results missing; {study.path}")
    return 1 if missing else 0


def report(study: Study) -> None:
    """README.md and its plots. What goes wrong there must not cost a measurement: it can be made again."""
    try:
        write_readme(json.loads(study.path.read_text()), study.options.out)
    except Exception as error:
        study.problem("README.md", error)


def export(study: Study) -> None:
    """Export with torch what is not there yet; models that cannot be had fail when their cell loads."""
    options = study.options
    names = sorted({file_of(model) for cell in options.cells for model in cell.models})
    missing = [name for name in names if not (options.models_dir / f"{name}.onnx").exists()]
    if not missing:
        return
    try:
        done = subprocess.run(
            [sys.executable, str(ROOT / "perf" / "export_models.py"), str(options.models_dir),
             "--models", ",".join(missing), "--workers", str(max(2, len(os.sched_getaffinity(0)) - 2))],
            timeout=EXPORT_LIMIT_S,
        )  # fmt: skip
        if done.returncode:
            study.problem(f"export of {', '.join(missing)} ended with status {done.returncode}")
    except subprocess.TimeoutExpired:
        study.problem(f"the export took more than {EXPORT_LIMIT_S:g} s")
    study.say(f"exported {len(missing)} models")


def pair(text: str) -> tuple[str, str]:
    """KEY=VALUE of a backend parameter. Errors: InputError."""
    key, separator, value = text.partition("=")
    if not separator or key not in PARAMETERS:
        raise InputError(f"{text!r}: KEY=VALUE is wanted, KEY one of {', '.join(PARAMETERS)}")
    return key, value


def parse_options(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=REPORTS / "h100")
    parser.add_argument("--profiles", type=Path, default=REPORTS / "h100" / "profiles.json")
    parser.add_argument("--models-dir", type=Path, default=ROOT / "run" / "models")
    parser.add_argument("--work", type=Path, default=ROOT / "run" / "compare")
    parser.add_argument("--cells", type=names_to(Cell.parse), default=list(CELLS), help="by comma")
    parser.add_argument(
        "--alternatives", type=names_to(Alternative.parse), default=list(ALTERNATIVES.values()),
        help="by comma, with NAME+KEY=VALUE for variants: " + ", ".join(ALTERNATIVES),
    )  # fmt: skip
    parser.add_argument("--time-budget-s", type=float, default=560.0)
    parser.add_argument("--seconds", type=float, default=2.5, help="measured stretch of a trial")
    parser.add_argument("--warmup-s", type=float, default=0.7)
    parser.add_argument("--tolerance", type=float, default=0.06, help="of a peak, relative")
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--curve", action="store_true", help="also goodput at fixed shares of the peak")
    parser.add_argument("--static-search-s", type=float, default=45.0, help="for best-static, a cell and run")
    parser.add_argument(
        "--learn-rounds", type=int, default=LEARN_ROUNDS, help="of dstack, before its first peak"
    )
    parser.add_argument("--again", action="store_true", help="measure what is known already, too")
    parser.add_argument("--predict", action="store_true", help="only the simulator's side of compare.json")
    parser.add_argument("--parameters", type=names_to(pair), default=[], help="KEY=VALUE for every config")
    parser.add_argument("--shared-memory", choices=["none", "system"], default="none")
    parser.add_argument("--workers", type=int, default=min(6, max(1, len(os.sched_getaffinity(0)) - 1)))
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda", help="cpu: a dry run")
    options = parser.parse_args(arguments)
    options.arguments = list(sys.argv[1:] if arguments is None else arguments)
    if options.device == "cpu" and options.out.resolve().is_relative_to(REPORTS):
        parser.error("--device cpu is a dry run and does not write below perf/reports; give --out")
    if options.predict and not (options.out / "compare.json").exists():
        parser.error(f"--predict: there is no {options.out / 'compare.json'}")
    return options


if __name__ == "__main__":
    sys.exit(main())
