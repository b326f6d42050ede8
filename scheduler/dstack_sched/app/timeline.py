"""What ran on each GPU in the last seconds, as the arbiter granted it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from dstack_sched.ports import ArbiterClient


@dataclass(frozen=True, slots=True)
class GrantedBatch:
    """One batch: when it had which share (CLOCK_MONOTONIC us, percent), rows in it, rows of them late."""

    model: str
    instance: str
    start_us: int
    end_us: int
    gpu_percent: float
    rows: int
    late_rows: int


@dataclass(frozen=True, slots=True)
class GpuTimeline:
    """One GPU's batches within [since_us, now_us], oldest first. lost: batches that were forgotten before
    they could be read. capacity_percent: as it is now."""

    since_us: int
    now_us: int
    capacity_percent: float
    batches: tuple[GrantedBatch, ...]
    lost: int


def read_timeline(arbiter: ArbiterClient, last_s: float) -> dict[int, GpuTimeline]:
    """GPU index (-1: CPU) -> what ran there in the last `last_s` seconds; what runs now ends now.

    Errors: MachineError when no arbiter answers.
    """
    first = arbiter.request("timeline", limit=1)
    since_us = int(first["now_us"] - last_s * 1e6)
    page = arbiter.request("timeline", since_us=since_us)
    rows: list[dict[str, Any]] = []
    lost = 0
    while True:
        rows += [dict(zip(page["fields"], row, strict=True)) for row in page["rows"]]
        lost += page["lost"]
        if (
            not page["more"] or page["now_us"] - since_us > 2e6 * last_s + 10e6
        ):  # it grows faster than we read
            break
        page = arbiter.request("timeline", since_seq=page["next_since"])
    now_us = page["now_us"]
    running = [row | {"end_us": now_us, "rows": row["batch_size"], "late_rows": 0} for row in page["running"]]
    return {
        int(gpu): GpuTimeline(
            since_us,
            now_us,
            capacity,
            tuple(_batch(row) for row in rows + running if row["gpu"] == int(gpu)),
            lost,
        )
        for gpu, capacity in page["capacity_percent"].items()
    }


def _batch(row: dict[str, Any]) -> GrantedBatch:
    start_us, end_us = row["start_us"], max(row["end_us"], row["start_us"])
    share, rows, late_rows = row["gpu_percent"], row["rows"], row["late_rows"]
    return GrantedBatch(row["model"], row["instance"], start_us, end_us, share, rows, late_rows)
