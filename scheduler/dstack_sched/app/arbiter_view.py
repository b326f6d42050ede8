"""What people and tools see of the arbiter: status and timeline, in plain JSON types."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from dstack_sched.app.arbiter_record import PAGE_ROWS, WAIT_BOUNDS_US, Record
from dstack_sched.app.arbiter_session import Gpu, Session
from dstack_sched.domain.event import EngineModel
from dstack_sched.errors import InputError

REPORTS_SHOWN = 8
TELEMETRY_PAGE = 24


def status(
    gpus: Mapping[int, Gpu], sessions: Collection[Session], record: Record, now_us: int
) -> dict[str, Any]:
    """{"gpus", "models", "wait_bounds_us" (of each model's "wait_us"), "backends", "backend_states",
    "decision_us", "overload_reports"}.

    Totals count since the arbiter started; utilization over a while is the difference of two
    "gpu_percent_ms" over the time between, in percent of the GPU.
    """
    backends = [_backend(session, now_us) for session in sessions]
    states = dict.fromkeys(("idle", "waiting", "running", "hung"), 0)
    for backend in backends:
        states[backend["state"]] += 1
    return {
        "now_us": now_us,
        "gpus": {str(index): _gpu(index, gpu, sessions, record, now_us) for index, gpu in gpus.items()},
        "models": {name: counters.as_dict() for name, counters in record.models.items()},
        "wait_bounds_us": list(WAIT_BOUNDS_US),
        "backends": backends,
        "backend_states": states,
        "decision_us": record.decision_percentiles(),
        "overload_reports": list(record.overload_reports)[-REPORTS_SHOWN:],
    }


def _gpu(index: int, gpu: Gpu, sessions: Collection[Session], record: Record, now_us: int) -> dict[str, Any]:
    """One GPU. "plan": what is in force for each model; "scores": GPU%-ms served over the fairness weight, as
    the policy counts them (the least is served first)."""
    running_ms = sum(
        grant.gpu_percent * max(0, min(now_us, grant.lease_until_us) - grant.granted_us) / 1000
        for session in sessions if session.gpu == index
        for grant in session.running[:1]
    )  # fmt: skip
    state = gpu.engine.snapshot()
    return {
        "capacity_percent": gpu.plan.capacity_percent,
        "granted_percent": round(state.get("granted_percent", 0.0), 3),
        "standing_percent": round(state.get("standing_percent", 0.0), 3),
        "gpu_percent_ms": round(record.gpu_percent_ms.get(index, 0.0) + running_ms, 1),
        "planned_models": [model.name for model in gpu.plan.models],
        "plan": {model.name: _plan(model) for model in gpu.plan.models},
        "scores": {
            name: round(each["served_percent_us"] / 1000 / max(each["weight"], 1e-6))
            for name, each in state.get("models", {}).items()
        },
    }


def _plan(model: EngineModel) -> dict[str, Any]:
    """latency_ms: of a planned batch alone on the device, as profiled; None where that is not known."""
    latency_ms = None
    if model.gpu_percent in model.gpu_percents and model.batch_size in model.batch_sizes:
        row = model.latency_ms[model.gpu_percents.index(model.gpu_percent)]
        latency_ms = round(row[model.batch_sizes.index(model.batch_size)], 3)
    return {
        "gpu_percent": model.gpu_percent,
        "batch_size": model.batch_size,
        "slo_ms": model.slo_us / 1000,
        "latency_ms": latency_ms,
    }


def _backend(session: Session, now_us: int) -> dict[str, Any]:
    """State "hung": a lease ended before its batch did. levels: it takes any share from batch to batch."""
    running = session.running
    hung = any(grant.lease_until_us < now_us for grant in running)
    state = "hung" if hung else "running" if running else "waiting" if session.waiting else "idle"
    return {
        "instance": session.joined.instance,
        "model": session.joined.model,
        "gpu": session.gpu,
        "gpu_percent": session.joined.gpu_percent,
        "levels": len(session.joined.levels) > 1,
        "pid": session.pid,
        "state": state,
        "waiting": session.waiting,
        "outstanding": len(running),
        "standing": len(session.grants) - len(running),
    }


def telemetry(sessions: Collection[Session], asked: Mapping[str, object], now_us: int) -> dict[str, Any]:
    """A page of what the instances last told of themselves: {"instances": {NAME: {"model", "gpu", "session",
    "age_s", ...}}, "next_since", "more"}. asked: since (after that session number). Errors: InputError."""
    since = _count(asked, "since", 0)
    told = [each for each in sessions if each.number > since and each.telemetry is not None]
    told.sort(key=lambda each: each.number)
    page = told[:TELEMETRY_PAGE]
    instances = {
        each.joined.instance: {
            **(each.telemetry or {}),
            "model": each.joined.model,
            "gpu": each.gpu,
            "session": each.number,
            "age_s": round((now_us - each.telemetry_us) / 1e6, 3),
        }
        for each in page
    }
    return {
        "instances": instances,
        "next_since": page[-1].number if page else since,
        "more": len(told) > len(page),
    }


def timeline(
    gpus: Mapping[int, Gpu],
    sessions: Collection[Session],
    record: Record,
    asked: Mapping[str, object],
    now_us: int,
) -> dict[str, Any]:
    """A page of ended intervals and what runs now. asked: since_seq (after that sequence number) or since_us
    (ended then or later), and limit. Errors: InputError."""
    most = _count(asked, "limit", PAGE_ROWS)
    if "since_us" in asked:
        since = record.sequence_before(_count(asked, "since_us", 0))
    else:
        since = _count(asked, "since_seq", 0)
    running = [
        {
            "gpu": session.gpu,
            "model": session.joined.model,
            "instance": session.joined.instance,
            "gpu_percent": grant.gpu_percent,
            "start_us": max(grant.granted_us, session.free_since_us),
            "batch_size": grant.batch_size,
        }
        for session in sessions
        for grant in session.running[:1]
    ]
    return record.page(since, most) | {
        "now_us": now_us,
        "running": running,
        "capacity_percent": {str(index): gpu.plan.capacity_percent for index, gpu in gpus.items()},
    }


def _count(asked: Mapping[str, object], name: str, default: int) -> int:
    value = asked.get(name, default)
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < 1 << 53:
        raise InputError(f"{asked.get('verb', 'timeline')}: {name} must be a whole number from 0")
    return value
