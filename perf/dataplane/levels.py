"""Part `levels`: a change of a model's GPU% by levels (green contexts) against a reload (MPS percentage)."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import Any

from dataplane.clients import CheckedClients, totals
from dataplane.references import reference
from dataplane.server import Server
from dataplane.study import Study
from dstack_backend.cuda_groups import GROUP_SMS
from dstack_backend.device import gpu_memory_used
from dstack_sched.adapters.arbiter_client import SocketArbiterClient
from dstack_sched.adapters.probe import ProbeSettings, Worker
from dstack_sched.domain.event import EngineModel, PlanChanged
from dstack_sched.domain.json_form import CPU_INDEX, gpus_to_json
from dstack_sched.domain.workload import OnLate
from dstack_sched.errors import DstackError, MachineError

MODEL, NEIGHBOUR = "resnet50", "bert_base"
LEVELS = (25.0, 50.0, 100.0)
LOW, HALF, WHOLE = LEVELS
BATCH = 16
SWITCHES = 40
SWITCH_PAUSE_S = 0.04
RELOADS = 3
MEASURE_S = 1.0
SETTLE_S = 0.3
FREED_LIMIT_S = 4.0
POLICY = "mps-static"  # grants what the plan says and nothing else: the switch alone is measured


def levels(study: Study) -> dict[str, Any]:
    """By section; one that fails is named with its error, the others stand."""
    found: dict[str, Any] = {}
    first = MODEL if MODEL in study.models else study.models[0]
    second = NEIGHBOUR if NEIGHBOUR in study.models else study.models[-1]
    arguments = ["--policy", POLICY]
    with Server(study.options.state / "levels", study.provider, arguments=arguments) as server:
        sections = {
            "switch": lambda: switch(study, server, first),
            "reload": lambda: {first: reload(study, server, first)},
            "alone": lambda: alone(study, server, first),
            "side_by_side": lambda: side_by_side(study, server, (first, second)),
        }
        for name, section in sections.items():
            try:
                found[name] = section()
                study.say(f"levels, {name}: {found[name]}")
            except (DstackError, KeyError, ValueError, OSError) as error:
                found[name] = {"error": " ".join(str(error).split())[:400]}
                study.problem(f"levels, {name}: {found[name]['error']}")
    return found


# -- through Triton and the arbiter ------------------------------------------------------------------------


def switch(study: Study, server: Server, name: str) -> dict[str, Any]:
    """Time from telling the arbiter another GPU% until the first batch that runs at it, one-row requests in
    closed loop. `started`: until the grant of that batch began; `ended`: until the device had finished it."""
    server.add(name, study.path(name), batch_size=4, levels=",".join(f"{level:g}" for level in LEVELS))
    server.load(name)
    arbiter = SocketArbiterClient(server.socket)
    load = CheckedClients(server.grpc_url, {name: reference(study.path(name), 1)}, under_way=2)
    taken: list[tuple[float, float, float]] = []
    try:
        time.sleep(SETTLE_S)
        for number in range(SWITCHES):
            taken.append(one_switch(study, arbiter, name, (LOW, WHOLE)[number % 2]))
    finally:
        load.stop()
        arbiter.close()
        server.unload(name)
    seen = totals(load)
    if seen["failed"] or seen["wrong_answers"]:
        raise MachineError(f"requests failed while the level changed: {seen}")
    started, ended, runs = zip(*taken[2:], strict=True)  # the first at each level may prepare something
    return {
        "model": name,
        "switches": len(started),
        "started_ms_p50": round(statistics.median(started), 3),
        "started_ms_max": round(max(started), 3),
        "ended_ms_p50": round(statistics.median(ended), 3),
        "run_ms_p50": {
            f"{LOW:g}": statistics.median(runs[0::2]),
            f"{WHOLE:g}": statistics.median(runs[1::2]),
        },
        "answered": seen["answered"],
    }


def one_switch(
    study: Study, arbiter: SocketArbiterClient, name: str, gpu_percent: float
) -> tuple[float, float, float]:
    """(until the first grant began, until it ended, median time of the grants) in ms."""
    gpu = 0 if study.provider == "cuda" else CPU_INDEX
    model = EngineModel(name, gpu_percent, 4, 0, 1.0, OnLate.SERVE, gpu_percent)
    decided_us = time.monotonic_ns() // 1000
    arbiter.request("plan", gpus=gpus_to_json({gpu: PlanChanged(100.0, (model,))}))
    time.sleep(SWITCH_PAUSE_S)
    page = arbiter.request("timeline", since_us=decided_us)
    rows = [dict(zip(page["fields"], row, strict=True)) for row in page["rows"]]
    at_level = [
        row for row in rows if row["model"] == name and row["rows"] and row["gpu_percent"] == gpu_percent
    ]
    if not at_level:
        raise MachineError(f"no batch ran at {gpu_percent:g}% within {SWITCH_PAUSE_S:g} s of the change")
    first = min(at_level, key=lambda row: row["end_us"])
    runs_ms = [(row["end_us"] - row["start_us"]) / 1e3 for row in at_level]
    return (
        max(0, first["start_us"] - decided_us) / 1e3,
        (first["end_us"] - decided_us) / 1e3,
        round(statistics.median(runs_ms), 3),
    )


def reload(study: Study, server: Server, name: str) -> dict[str, Any]:
    """Time from rewriting the config with another GPU% until the model answers at it."""
    served = f"{name}_reloaded"
    feeds, _ = reference(study.path(name), 1)
    taken = []
    try:
        for number in range(RELOADS + 1):
            percent = (WHOLE, HALF)[number % 2]
            began_s = time.monotonic()
            server.add(served, study.path(name), batch_size=BATCH, gpu_percent=f"{percent:g}")
            server.load(served)
            server.infer(served, feeds)
            taken.append(round(time.monotonic() - began_s, 3))
    finally:
        server.unload(served)
    return {"first_load_s": taken[0], "reload_s": taken[1:], "reload_s_p50": statistics.median(taken[1:])}


# -- the session alone, under the same MPS daemon ----------------------------------------------------------


def worker(study: Study, server: Server, name: str, *, percent: float = WHOLE, levels: Any = ()) -> Worker:
    """A measuring process with the backend's runtime: with levels, or at an MPS percentage."""
    settings = ProbeSettings(study.provider, environment=server.client_environment(), levels=levels)
    return Worker(study.path(name), percent, settings)


def used_bytes(study: Study) -> int:
    """Device memory in use, once it has stopped changing: the driver frees a process's a moment later."""
    if study.provider != "cuda":
        return 0
    used, until = gpu_memory_used(0), time.monotonic() + FREED_LIMIT_S
    while time.monotonic() < until:
        time.sleep(SETTLE_S)
        before, used = used, gpu_memory_used(0)
        if used == before:
            break
    return used


def alone(study: Study, server: Server, name: str) -> dict[str, Any]:
    """Latency and throughput at each level and at the MPS percentage of as many SMs; device memory."""
    before = used_bytes(study)
    plain = worker(study, server, name)
    try:
        plain.ask(do="prepare", batch_sizes=[BATCH], timeout_s=60)
        whole = plain.ask(do="measure", batch_size=BATCH, cap_s=MEASURE_S)
        sms = int(plain.wait_ready()["device"]["sms"])
        plain_bytes = used_bytes(study) - before
    finally:
        plain.close()
    before = used_bytes(study)
    with_levels = worker(study, server, name, levels=LEVELS if study.provider == "cuda" else ())
    try:
        ready = with_levels.wait_ready()
        with_levels.ask(do="prepare", batch_sizes=[BATCH], timeout_s=60)
        groups = int(ready["sm_groups"])
        by_level = {level: measured(with_levels, level, groups, sms) for level in ready["levels"] or [WHOLE]}
        levels_bytes = used_bytes(study) - before
    finally:
        with_levels.close()
    by_mps = {}
    for level, row in by_level.items():
        if level < WHOLE:
            by_mps[level] = at_mps_percent(study, server, name, 100 * row["sms"] / sms)
    return {
        "model": name,
        "batch": BATCH,
        "without_levels": figures(whole, BATCH) | {"device_bytes": plain_bytes, "sms": sms},
        "levels": {f"{level:g}": row for level, row in by_level.items()},
        "mps": {f"{level:g}": row for level, row in by_mps.items()},
        "level_over_mps": {
            f"{level:g}": round(by_level[level]["rows_per_s"] / row["rows_per_s"], 4)
            for level, row in by_mps.items()
        },
        "device_bytes_with_levels": levels_bytes,
        "device_bytes_a_level": (levels_bytes - plain_bytes) // max(1, len(by_level) - 1),
    }


def measured(at: Worker, level: float, groups: int, sms: int) -> dict[str, Any]:
    """At a level, on the first SM groups: all groups but the last are of one size."""
    count = max(1, round(level * groups / 100))
    share = {"gpu_percent": level, "sm_groups": (1 << count) - 1} if groups else {}
    at.ask(do="measure", batch_size=BATCH, cap_s=SETTLE_S, **share)  # groups that are new are prepared beside
    time.sleep(SETTLE_S)
    answer = at.ask(do="measure", batch_size=BATCH, cap_s=MEASURE_S, **share)
    return figures(answer, BATCH) | {"sms": GROUP_SMS * count if count < groups else sms}


def figures(answer: Mapping[str, Any], batch: int) -> dict[str, Any]:
    p50 = answer["latency_ms_p50"]
    return {
        "latency_ms_p50": round(p50, 4),
        "latency_ms_p99": round(answer["latency_ms_p99"], 4),
        "rows_per_s": round(batch * 1e3 / p50, 1),
    }


def at_mps_percent(study: Study, server: Server, name: str, percent: float) -> dict[str, Any]:
    """The same at an MPS percentage; `sms` is what the driver then grants."""
    limited = worker(study, server, name, percent=round(percent, 2))
    try:
        granted = int(limited.wait_ready()["device"]["sms"])
        limited.ask(do="prepare", batch_sizes=[BATCH], timeout_s=60)
        answer = limited.ask(do="measure", batch_size=BATCH, cap_s=MEASURE_S)
    finally:
        limited.close()
    return figures(answer, BATCH) | {"sms": granted, "mps_percent": round(percent, 2)}


def side_by_side(study: Study, server: Server, names: Sequence[str]) -> dict[str, Any]:
    """Two models at half the GPU each, back to back: on disjoint SM groups, and by MPS percentage."""
    if study.provider == "cuda":
        probe = worker(study, server, names[0], levels=LEVELS)
        try:
            groups = int(probe.wait_ready()["sm_groups"])
        finally:
            probe.close()
        low = (1 << groups // 2) - 1
        masks = [low, ((1 << groups) - 1) ^ low]
    else:
        masks = [0, 0]
    by_levels = [{"gpu_percent": HALF, "sm_groups": mask} for mask in masks]
    levels = LEVELS if study.provider == "cuda" else ()
    return {
        "models": list(names),
        "batch": BATCH,
        "levels_disjoint": together(study, server, names, by_levels, WHOLE, levels),
        "mps_halves": together(study, server, names, [{}, {}], HALF, ()),
    }


def together(
    study: Study,
    server: Server,
    names: Sequence[str],
    shares: Sequence[Mapping[str, Any]],
    percent: float,
    levels: Sequence[float],
) -> dict[str, Any]:
    """Rows per second of each and of all, with all of them running all the time."""
    with ExitStack() as stack:
        workers = [worker(study, server, name, percent=percent, levels=tuple(levels)) for name in names]
        for each in workers:
            stack.callback(each.close)
        for each, share in zip(workers, shares, strict=True):  # alone first: whatever must be made is made
            each.ask(do="prepare", batch_sizes=[BATCH], timeout_s=60)
            each.ask(do="measure", batch_size=BATCH, cap_s=MEASURE_S, **share)
        for each, share in zip(workers, shares, strict=True):
            each.ask(do="loop", batch_size=BATCH, **share)
        time.sleep(SETTLE_S)
        for each in workers:
            each.ask(do="mark")
        time.sleep(MEASURE_S)
        for each in workers:
            each.send(do="stop")
        answers = [each.receive() for each in workers]
    rates = [round(answer["throughput_per_s"], 1) for answer in answers]
    return {
        "rows_per_s": dict(zip(names, rates, strict=True)),
        "latency_ms_p50": [round(answer["latency_ms_p50"], 4) for answer in answers],
        "total_rows_per_s": round(sum(rates), 1),
    }
