"""What MPS percentages really give: the SMs that a client sees, measured with one short process each.

Kept in STATE/mps_percentages.json for as long as GPU and driver stay the same.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from typing import Any

from dstack_sched.adapters.json_files import parse_json, write_json
from dstack_sched.errors import MachineError

PERCENT_VARIABLE = "CUDA_MPS_ACTIVE_THREAD_PERCENTAGE"
PERCENTS = (1, 2, 3, 4, 5, 6, 8, *range(10, 101, 5))
FILE_NAME = "mps_percentages.json"
AT_ONCE = 4  # each makes a CUDA context, a second of a core
PROBE_TIMEOUT_S = 60.0


def measure_percentages(
    environment: Mapping[str, str], device_id: int = 0, percents: Iterable[float] = PERCENTS
) -> dict[float, int]:
    """GPU% -> SMs. environment: of a client of MPS. Errors: MachineError with the driver's words."""
    wanted = tuple(percents)

    def probe(percent: float) -> int:
        return _probe({**environment, PERCENT_VARIABLE: f"{percent:g}"}, device_id)

    with ThreadPoolExecutor(AT_ONCE) as pool:
        return dict(zip(wanted, pool.map(probe, wanted), strict=True))


def _probe(environment: Mapping[str, str], device_id: int) -> int:
    command = [sys.executable, "-m", "dstack_backend.sm_count", str(device_id)]
    try:
        run = subprocess.run(
            command,
            env={**os.environ, **environment},
            text=True,
            capture_output=True,
            timeout=PROBE_TIMEOUT_S,
        )
    except subprocess.TimeoutExpired:
        raise MachineError(
            f"a client of MPS gave no answer in {PROBE_TIMEOUT_S:g} s; see the MPS log"
        ) from None
    if run.returncode != 0 or not run.stdout.strip().isdigit():
        said = (run.stderr.strip().splitlines() or ["no answer"])[-1]
        raise MachineError(
            f"a client of MPS at {environment[PERCENT_VARIABLE]}%: {said}; see dstackctl doctor"
        )
    return int(run.stdout)


def keep_percentages(state: Path, gpu: str, driver: str, table: Mapping[float, int]) -> None:
    """Errors: InputError where the state directory cannot be written."""
    rows = [{"gpu_percent": percent, "sms": sms} for percent, sms in sorted(table.items())]
    write_json(state / FILE_NAME, {"version": 1, "gpu": gpu, "driver": driver, "percentages": rows})


def kept_percentages(state: Path, gpu: str, driver: str) -> dict[float, int] | None:
    """What was measured on this kind of GPU under this driver; None where nothing was."""
    path = state / FILE_NAME
    if not path.exists():
        return None
    found: Any = parse_json(path.read_text(encoding="utf-8"), str(path))
    if (found.get("gpu"), found.get("driver")) != (gpu, driver):
        return None
    return {float(row["gpu_percent"]): int(row["sms"]) for row in found["percentages"]}


def granularity(table: Mapping[float, int]) -> int | None:
    """The step, in SMs, in which shares really grow: the least difference between two of them."""
    counts = sorted(set(table.values()))
    steps = [later - earlier for earlier, later in pairwise(counts)]
    return min(steps, default=None)
