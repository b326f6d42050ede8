"""What Triton serves through `dstack` on this GPU, against what the GPU can do: `make perf-h100-dataplane`.

    python perf/h100_dataplane.py [--parts served,leak] [--out DIR] [--time-budget-s 540] [--provider cpu]

Parts, in order of importance (--parts runs them in the order given); each is written to DIR/dataplane.json
and DIR/dataplane.md as soon as it is done, beside the parts, and the models, that earlier runs left there
with their own dates; one that fails is recorded with its error and the next goes on:

    raw        onnxruntime alone, I/O binding, CUDA graph: the measure of all else
    served     throughput through Triton at saturation, system and CUDA shared memory clients
    overhead   latency of one client, where it goes by stage, and what of it is Triton's own
    graphs     served throughput with and without CUDA graphs; outputs of both
    levels     a change of GPU% by level and by reload: time, memory, throughput, interference
    loading    time to load the network that takes longest: first, again, and after a dead process
    mps        the MPS daemon killed under load: recovery, requests failed, every answer checked
    leak       device and host memory over 100 load/unload cycles
    instances  24 model instances on one GPU load, serve, unload

--provider cpu tries everything out without a GPU, as far as it goes; it never writes below perf/reports/.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))
os.environ["OPENBLAS_NUM_THREADS"] = "1"  # our own arithmetic is small: threads would only disturb

from dataplane.endurance import instances, leak, loading, mps
from dataplane.levels import levels
from dataplane.raw import raw
from dataplane.speed import graphs, overhead, served
from dataplane.study import KNOWN_MODELS, Study
from dataplane.table import figures, markdown
from report import REPORTS, ROOT

EXPORT_LIMIT_S = 120.0
# Part -> what it does, about how many seconds it needs at least.
PARTS: dict[str, tuple[Callable[[Study], Mapping[str, Any]], float]] = {
    "raw": (raw, 20.0),
    "served": (served, 40.0),
    "overhead": (overhead, 20.0),
    "graphs": (graphs, 40.0),
    "levels": (levels, 40.0),
    "loading": (loading, 30.0),
    "mps": (mps, 40.0),
    "leak": (leak, 40.0),
    "instances": (instances, 40.0),
}
ONE_SERVER = ("served", "overhead", "graphs")


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--parts", default=",".join(PARTS), help="by comma, of " + ", ".join(PARTS) + " (default: all)"
    )
    parser.add_argument("--out", type=Path, help="default: perf/reports/h100 (run/dataplane-cpu on the CPU)")
    parser.add_argument("--models", default=",".join(KNOWN_MODELS), help="by comma; default: %(default)s")
    parser.add_argument("--models-dir", type=Path, default=ROOT / "run" / "models")
    parser.add_argument("--state", type=Path, default=ROOT / "run" / "dataplane", help="logs and scratch")
    parser.add_argument("--log", type=Path, help="all that is said, and the logs of what fails")
    parser.add_argument("--time-budget-s", type=float, default=540.0)
    parser.add_argument("--raw-seconds", type=float, default=0.6, help="for one figure of the raw loop")
    parser.add_argument("--cycles", type=int, default=100, help="load/unload cycles of the leak test")
    parser.add_argument(
        "--before", type=Path, metavar="DIR", help="a backend/dstack of another commit, beside `overhead`"
    )
    parser.add_argument("--instances", type=int, default=24, help="of all models together")
    parser.add_argument("--provider", choices=["cuda", "cpu"], default="cuda", help="cpu: for trying out")
    parser.add_argument("--fresh", action="store_true", help="drop what earlier runs left in the report")
    options = parser.parse_args()
    unknown = [part for part in options.parts.split(",") if part not in PARTS]
    if unknown:
        parser.error(f"no part {unknown[0]!r}; there are {', '.join(PARTS)}")
    if options.before and not (options.before / "model.py").is_file():
        parser.error(f"--before {options.before}: there is no model.py; a backend/dstack folder is wanted")
    cpu = options.provider == "cpu"
    options.out = options.out or (ROOT / "run" / "dataplane-cpu" if cpu else REPORTS / "h100")
    if cpu and options.out.resolve().is_relative_to(REPORTS):
        parser.error("--provider cpu is for trying out and does not write below perf/reports; give --out")
    options.state = options.state.resolve()
    options.log = options.log or options.state / "dataplane.txt"
    return options


def export(study: Study) -> None:
    """Export what is missing; models that cannot be had are left out, and said to be."""
    missing = [name for name in study.models if not study.path(name).exists()]
    if missing:
        command = [sys.executable, str(ROOT / "perf" / "export_models.py"), str(study.options.models_dir)]
        log = study.log_file("export")
        try:
            with log.open("wb") as out:
                subprocess.run(
                    [*command, "--models", ",".join(missing), "--workers", str(len(missing))],
                    stdout=out,
                    stderr=subprocess.STDOUT,
                    timeout=EXPORT_LIMIT_S,
                )
        except subprocess.TimeoutExpired:
            study.problem(f"the export took more than {EXPORT_LIMIT_S:g} s")
    for name in [name for name in study.models if not study.path(name).exists()]:
        study.problem(f"{name}: no {study.path(name)}, and it could not be exported")
        study.models.remove(name)


def main() -> int:
    study = Study(parse_options())
    wanted = study.options.parts.split(",")

    def write() -> None:
        found = figures(study)
        study.write(found)
        (study.options.out / "dataplane.md").write_text(markdown(study, found), encoding="utf-8")

    try:
        export(study)
        for name in [name for name in wanted if study.models]:
            part, needs_s = PARTS[name]
            if name not in ONE_SERVER:
                study.close()  # the others have the GPU to themselves
            study.run(name, part, needs_s, write)
    finally:
        study.close()
        write()
    study.say(f"done, {len(study.problems)} problems; {study.report}")
    print((study.options.out / "dataplane.md").read_text(encoding="utf-8"))
    return 0 if study.models and not study.problems else 1


if __name__ == "__main__":
    sys.exit(main())
