"""The latency of one client, one row at a time, through several backends in turns: what a change has brought.

    python perf/dataplane/alone.py MODEL.onnx [--backend before=DIR ...] [--rounds 5] [--provider cpu]

All are models of one Triton under one arbiter, and take turns, so that what disturbs the machine meets
each of them: `floor` (Triton's Python backend, answers at once), `busy` (the same, after a spin of
--busy-us), `now` (the working tree) and each `--backend NAME=DIR`, a backend/dstack of another commit:

    git archive COMMIT backend/dstack | tar x -C /tmp/before; ... --backend before=/tmp/before/backend/dstack

Prints one JSON document: by backend the p50 of every round, their median, and that over the floor's.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
os.environ["OPENBLAS_NUM_THREADS"] = "1"

from dataplane.clients import perf_analyzer
from dataplane.server import Server
from dataplane.speed import stage_means_us
from dstack_sched.errors import DstackError

BATCH = 16
NOW, FLOOR, BUSY = "now", "floor", "busy"


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--backend", action="append", default=[], metavar="NAME=DIR")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--busy-us", type=int, default=750, help="default: %(default)s")
    parser.add_argument("--provider", choices=["cuda", "cpu"], default="cuda")
    options = parser.parse_args()
    options.backends = {}
    for each in options.backend:
        name, _, folder = each.partition("=")
        if not (Path(folder) / "model.py").is_file():
            parser.error(f"--backend {each}: NAME=DIR is wanted, DIR with a model.py (a backend/dstack)")
        options.backends[name] = Path(folder)
    if not options.model.is_file():
        parser.error(f"{options.model}: no such file")
    return options


def measure(server: Server, options: argparse.Namespace) -> dict[str, Any]:
    """{backend: {"p50_ms": [...], "median_ms", "over_floor_ms", "stages_us"}}. Errors: DstackError."""
    server.add(NOW, options.model, batch_size=BATCH)
    server.load(NOW)
    server.add_floor(FLOOR, NOW, batch_size=BATCH)
    server.add_floor(BUSY, NOW, batch_size=BATCH, busy_us=options.busy_us)
    for name, folder in options.backends.items():
        server.add_backend(name, NOW, options.model, folder, batch_size=BATCH)
    names = [FLOOR, BUSY, *options.backends, NOW]
    server.load(FLOOR, BUSY, *options.backends)
    before = server.metrics()
    p50_ms: dict[str, list[float]] = {name: [] for name in names}
    for _ in range(options.rounds):
        for name in names:
            p50_ms[name].append(perf_analyzer(server, name, concurrency=1).latency_ms_p50)
    after = server.metrics()
    floor_ms = statistics.median(p50_ms[FLOOR])
    return {
        name: {
            "p50_ms": times_ms,
            "median_ms": statistics.median(times_ms),
            "over_floor_ms": round(statistics.median(times_ms) - floor_ms, 4),
            "ratio": round(statistics.median(times_ms) / floor_ms, 3),
            "stages_us": stage_means_us(before, after, name),
        }
        for name, times_ms in p50_ms.items()
    }


def main() -> int:
    options = parse_options()
    try:
        with (
            tempfile.TemporaryDirectory(prefix="dp-alone-") as state,
            Server(Path(state), options.provider) as server,
        ):
            print(json.dumps(measure(server, options), indent=1))
    except DstackError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
