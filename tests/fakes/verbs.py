"""`dstackctl` as a user runs it, and a plan.json for it."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

from dstack_backend.endpoint import SOCKET_VARIABLE

PATIENCE_S = 120
NO_ARBITER = "/nonexistent/none.sock"


def dstackctl(*arguments: object) -> tuple[int, str, str]:
    """Exit status, stdout, stderr; without an arbiter."""
    done = subprocess.run(
        [sys.executable, "-m", "dstack_sched", *map(str, arguments)],
        capture_output=True, text=True, timeout=PATIENCE_S, env={**os.environ, SOCKET_VARIABLE: NO_ARBITER},
    )  # fmt: skip
    return done.returncode, done.stdout, done.stderr


def plan_document(**shares: float) -> dict[str, Any]:
    """plan.json: model -> GPU%, batches of 4."""
    row = {
        "gpu": -1, "batch_size": 4, "max_queue_delay_us": 500, "latency_ms": 1.0, "throughput_per_s": 100.0,
        "efficacy": 1.0, "knee_percent": 50.0, "utilization": 0.1, "slo_ms": 100.0,
    }  # fmt: skip
    return {
        "version": 1, "capacity_percent": 100.0, "gpus": ["test"], "feasible": True, "binding": [],
        "headroom": 2.0, "models": {name: {**row, "gpu_percent": share} for name, share in shares.items()},
    }  # fmt: skip
