"""What is going on now, as plain JSON types: two readings make rates, shares and attainment."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dstack_sched.app.status_model import model_row
from dstack_sched.app.status_reading import Body, Reading, Sources, take


class StatusReader:
    """`read` again and again; figures hold for the time since the reading before, and those that take two are
    None in the first."""

    def __init__(self, sources: Sources) -> None:
        self._sources = sources
        self._before: Reading | None = None

    def read(self) -> dict[str, Any]:
        """See `document`. Never fails: parts that do not answer are named in "missing"."""
        now = take(self._sources)
        result = document(now, self._before)
        self._before = now
        return result


def document(now: Reading, before: Reading | None) -> dict[str, Any]:
    """{"version", "time_s", "server", "arbiter", "controller", "serve", "mps": None where it does not answer,
    "gpus": {INDEX: {...}}, "models": {NAME: status_model.model_row}, "faults": [...],
    "missing": {PART: why}}."""
    return {
        "version": 1,
        "time_s": round(now.time_s, 3),
        "server": {"name": now.about.get("name"), "version": now.about.get("version")} if now.about else None,
        "arbiter": _arbiter(now.arbiter),
        "controller": _board(now, "controller"),
        "serve": _board(now, "serve"),
        "mps": now.mps,
        "gpus": {index: _gpu(index, now, before) for index in _gpu_indices(now)},
        "models": {name: model_row(name, now, before) for name in model_names(now)},
        "faults": faults(now),
        "missing": dict(now.missing),
    }


def model_names(now: Reading) -> list[str]:
    """Models that Triton serves with our backend or has not loaded; without Triton, those that the arbiter or
    the controller knows."""
    if now.about:
        return sorted(now.models)
    known = {each["model"] for each in now.arbiter.get("backends", ())}
    for gpu in now.arbiter.get("gpus", {}).values():
        known |= set(gpu.get("plan", {}))
    controller = now.boards.get("controller") or {}
    if controller.get("running"):
        known |= set(controller.get("models", {}))
    return sorted(known)


def faults(now: Reading) -> list[dict[str, Any]]:
    """What `run` and `serve` see as wrong now, each once. Those of a program that ended are history."""
    found: dict[tuple[str, str], dict[str, Any]] = {}
    for name in ("controller", "serve"):
        board = now.boards.get(name) or {}
        for fault in board.get("faults", ()) if board.get("running") else ():
            found.setdefault((fault["kind"], fault["subject"]), {**fault, "seen_by": name})
    return list(found.values())


def _arbiter(status: Body) -> dict[str, Any] | None:
    if not status:
        return None
    decisions = status.get("decision_us", {})
    return {
        "policy": status.get("policy"),
        "pid": status.get("pid"),
        "uptime_s": status.get("uptime_s"),
        "clients": status.get("clients"),
        "sessions": status.get("backend_states", {}),
        "decision_us": {key: decisions.get(key) for key in ("p50", "p99")},
        "overload_reports": status.get("overload_reports", []),
    }


def _board(now: Reading, name: str) -> dict[str, Any] | None:
    board = now.boards.get(name)
    if board is None:
        return None
    return {**board, "age_s": round(max(0.0, now.time_s - board.get("updated_s", now.time_s)), 1)}


def _gpu_indices(now: Reading) -> list[str]:
    return sorted({*now.arbiter.get("gpus", {}), *now.gpus}, key=int)


def _gpu(index: str, now: Reading, before: Reading | None) -> dict[str, Any]:
    """utilization_percent: GPU% granted on average since the reading before; device_percent: NVML's own."""
    arbiter = now.arbiter.get("gpus", {}).get(index, {})
    device = now.gpus.get(index, {})
    return {
        "name": device.get("name"),
        "capacity_percent": arbiter.get("capacity_percent"),
        "granted_percent": arbiter.get("granted_percent"),
        "utilization_percent": _mean_percent(index, now, before),
        "scores": arbiter.get("scores", {}),
        "device_percent": device.get("utilization_percent"),
        "memory_bytes": device.get("memory_bytes"),
        "used_bytes": device.get("used_bytes"),
        "out": device.get("out"),
    }


def _mean_percent(index: str, now: Reading, before: Reading | None) -> float | None:
    if before is None or now.time_us <= before.time_us:
        return None
    last, first = (_share_time(reading.arbiter, index) for reading in (now, before))
    if last is None or first is None or last < first:
        return None
    return (last - first) * 1000 / (now.time_us - before.time_us)


def _share_time(arbiter: Body, index: str) -> float | None:
    found: Mapping[str, Any] = arbiter.get("gpus", {}).get(index, {})
    return found.get("gpu_percent_ms")
