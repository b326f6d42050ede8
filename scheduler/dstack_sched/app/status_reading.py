"""One reading of everything that `dstackctl status` shows. Parts that do not answer are noted, not errors."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from dstack_sched.app.rates import arrivals
from dstack_sched.domain.model_config import BACKEND
from dstack_sched.errors import DstackError
from dstack_sched.ports import ArbiterClient, Clock, ModelServer

Body = Mapping[str, Any]
MAX_PAGES = 64


@dataclass(frozen=True)
class Sources:
    """Where a reading comes from. boards: what `run` and `serve` last wrote, by name ("controller", "serve").
    gpus: as gpus.gpu_rows. mps: as `dstackctl mps status` tells it, None where no daemon answers. Both may
    raise DstackError."""

    server: ModelServer
    arbiter: ArbiterClient
    clock: Clock
    boards: Callable[[], Mapping[str, Body | None]] = dict
    gpus: Callable[[], Mapping[str, Body]] = dict
    mps: Callable[[], Body | None] = lambda: None


@dataclass(frozen=True)
class ServedNow:
    """One model in Triton: arrivals since it was loaded, and its queue times (count, nanoseconds)."""

    state: str
    config: Body
    arrivals: int
    queued: int
    queue_ns: int


@dataclass(frozen=True)
class Reading:
    """Everything at one moment; {} or None where a part does not answer, with the reason in `missing`."""

    time_us: int
    time_s: float
    about: Body
    models: Mapping[str, ServedNow]
    arbiter: Body
    telemetry: Mapping[str, Body]
    boards: Mapping[str, Body | None]
    gpus: Mapping[str, Body]
    mps: Body | None
    missing: Mapping[str, str] = field(default_factory=dict)


def take(sources: Sources) -> Reading:
    """Read all of it. Never fails."""
    missing: dict[str, str] = {}

    def attempt(part: str, read: Callable[[], Any], otherwise: Any) -> Any:
        try:
            return read()
        except DstackError as error:
            missing[part] = str(error)
            return otherwise

    about = attempt("server", sources.server.metadata, {})
    return Reading(
        time_us=sources.clock.now_us(),
        time_s=sources.clock.wall_time_s(),
        about=about,
        models=attempt("server", lambda: _served(sources.server), {}) if about else {},
        arbiter=attempt("arbiter", lambda: sources.arbiter.request("status"), {}),
        telemetry=read_telemetry(sources.arbiter) if "arbiter" not in missing else {},
        boards=sources.boards(),
        gpus=attempt("gpus", sources.gpus, {}),
        mps=attempt("mps", sources.mps, None),
        missing=missing,
    )


def read_telemetry(arbiter: ArbiterClient) -> dict[str, Body]:
    """Instance -> what it last told the arbiter of itself; what can be had of it where the arbiter fails."""
    instances: dict[str, Body] = {}
    since = 0
    for _ in range(MAX_PAGES):
        try:
            page = arbiter.request("telemetry", since=since)
        except DstackError:
            break
        instances |= page.get("instances", {})
        since = page.get("next_since", 0)
        if not page.get("more"):
            break
    return instances


def _served(server: ModelServer) -> dict[str, ServedNow]:
    """Our models, and those that are not loaded: whose they are cannot be told."""
    states = server.models()
    statistics = server.statistics("")
    found = {}
    for model, state in states.items():
        config = _config(server, model) if state == "READY" else {}
        if config and config.get("backend") != BACKEND:
            continue
        queued, queue_ns = _queue(statistics, model)
        found[model] = ServedNow(state, config, arrivals(statistics, model), queued, queue_ns)
    return found


def _config(server: ModelServer, model: str) -> Body:
    """{} for one that was unloaded since it was listed."""
    try:
        return server.config(model)
    except DstackError:
        return {}


def _queue(statistics: Body, model: str) -> tuple[int, int]:
    """Requests that left Triton's queue, and their time in it, over the versions."""
    queues = [
        entry.get("inference_stats", {}).get("queue", {})
        for entry in statistics.get("model_stats", ())
        if entry.get("name") == model
    ]
    return sum(int(q.get("count", 0)) for q in queues), sum(int(q.get("ns", 0)) for q in queues)
