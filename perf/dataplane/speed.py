"""Parts `served`, `overhead` and `graphs`: what clients get through Triton, beside the raw loop's figures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from dataplane.clients import ClosedLoop, perf_analyzer, shm_client
from dataplane.references import TOLERANCE, reference, relative_error
from dataplane.server import Server
from dataplane.study import Study
from dstack_sched.errors import MachineError

BATCH = 16
GRAPH_BATCHES = (1, 4, 16)
CHECK_ROWS = 3
WHOLE_BATCH_CONCURRENCY = (4, 8)  # requests of 16 rows each
SINGLE_ROW_CONCURRENCY = (128,)
CUDA_CONCURRENCY = (2, 4)
CUDA_MODEL = "resnet50"
CUDA_CLIENT_S = 2.0
GRAPH_MODELS = ("resnet50", "mobilenet_v2", "bert_base")
PLAIN = "_without_graphs"
FLOOR, BUSY, BEFORE = "_floor", "_busy", "_before"
TURNS = 3
GRAPHS_LIMIT_S = 75.0  # of the part; rows that do not fit are said to be missing
GRAPH_WINDOW_S = 0.4


def speed_server(study: Study) -> tuple[Server, list[str]]:
    """The server of the three parts, and the models that it serves, right, at batch size 16."""
    if study.shared is None:
        study.shared = server = Server(study.options.state / "speed", study.provider)
        for name in study.models:
            server.add(name, study.path(name), batch_size=BATCH)
        took_s = study.each(study.models, lambda name: server.load(name)[name], together=True)
        study.say(f"loaded in s: {took_s}")
        right = study.each(took_s, lambda name: check_answers(server, name, study.path(name), CHECK_ROWS))
        study.shared_models = list(right)
    return study.shared, study.shared_models


def check_answers(server: Server, served: str, path: Path, rows: int) -> float:
    """How far the served answer is from the CPU provider's. Errors: MachineError where it is wrong."""
    feeds, wanted = reference(path, rows)
    error = relative_error(server.infer(served, feeds), wanted)
    if error > TOLERANCE:
        raise MachineError(
            f"{served}: answers differ from the CPU provider's by {error:.2g} (relative, norm)"
        )
    return error


def served(study: Study) -> dict[str, Any]:
    """Throughput at saturation: by model the best of several concurrencies, all of which are listed."""
    server, names = speed_server(study)
    before = server.metrics()

    def saturated(name: str) -> dict[str, Any]:
        whole = best(study, server, name, BATCH, WHOLE_BATCH_CONCURRENCY)
        whole["stages_us"] = stage_means_us(before, server.metrics(), name)
        study.say(f"{name}: {whole['stages_us']}")
        found = {
            "client_batch_16": whole,
            "client_batch_1": best(study, server, name, 1, SINGLE_ROW_CONCURRENCY),
            "relative_error": check_answers(server, name, study.path(name), BATCH),
            "raw": study.raw(name, BATCH),
        }
        if name == CUDA_MODEL:
            found["cuda_shared_memory"] = with_cuda_memory(study, server, name)
        return found

    return {"models": study.each(names, saturated)}


def best(
    study: Study, server: Server, name: str, rows: int, concurrencies: tuple[int, ...]
) -> dict[str, Any]:
    """{"best": the fastest, "all": every concurrency}."""
    loops = [
        perf_analyzer(server, name, concurrency=concurrency, client_batch=rows)
        for concurrency in concurrencies
    ]
    for loop in loops:
        say(study, name, loop)
    return best_of(loops)


def best_of(loops: list[ClosedLoop]) -> dict[str, Any]:
    fastest = max(loops, key=lambda loop: loop.rows_per_s)
    return {"best": fastest.as_dict(), "all": [loop.as_dict() for loop in loops]}


def with_cuda_memory(study: Study, server: Server, name: str) -> dict[str, Any]:
    """CUDA-shared-memory clients: perf_analyzer and, as a check of the answers, a client of our own. On the
    CPU provider the same clients with system shared memory, to try them out."""
    memory = "cuda" if study.provider == "cuda" else "system"
    loops, found, problems = [], {}, []
    for concurrency in CUDA_CONCURRENCY:
        try:
            loops.append(
                perf_analyzer(server, name, concurrency=concurrency, client_batch=BATCH, shared_memory=memory)
            )
        except MachineError as error:
            problems.append(str(error))
            break
    try:
        loop, found["relative_error"] = shm_client(
            server,
            name,
            study.path(name),
            concurrency=CUDA_CONCURRENCY[-1],
            rows=BATCH,
            memory=memory,
            seconds=CUDA_CLIENT_S,
        )
        if found["relative_error"] > TOLERANCE:
            problems.append(f"answers in {memory} shared memory are off by {found['relative_error']:.2g}")
        else:
            loops.append(loop)
    except MachineError as error:
        problems.append(str(error))
    for loop in loops:
        say(study, name, loop)
    for problem in problems:
        study.problem(problem)
    if loops:
        found |= best_of(loops)
    return {**found, "memory": memory, "problems": problems}


def say(study: Study, name: str, loop: ClosedLoop) -> None:
    study.say(
        f"{name}: {loop.shared_memory} memory, {loop.concurrency} x {loop.client_batch} rows:"
        f" {loop.rows_per_s:.0f}/s, p50 {loop.latency_ms_p50:.2f} ms, p99 {loop.latency_ms_p99:.2f} ms"
    )


def overhead(study: Study) -> dict[str, Any]:
    """One client, one row at a time: latency, where it goes by stage (mean microseconds a request), and what
    of it Triton takes: the floor is a model of the same tensors in Triton's Python backend that answers at
    once, or after a spin as long as the raw run. The floor's throughput with 16 rows a request bounds what
    any Python-based backend can serve. --before: another commit's backend, by turns with this one."""
    server, names = speed_server(study)
    before = server.metrics()
    found = study.each(names, lambda name: perf_analyzer(server, name, concurrency=1).as_dict())
    after = server.metrics()
    floors = study.each(found, lambda name: floor(study, server, name))
    if study.options.before:
        for name, row in study.each(list(found)[:1], lambda name: by_turns(study, server, name)).items():
            found[name]["by_turns"] = row
            study.say(f"{name}: by turns {row}")
    for name, row in found.items():
        row["stages_us"] = stage_means_us(before, after, name)
        row["floor"] = floors.get(name, {})
        row["raw"] = study.raw(name, 1)
        study.say(f"{name}: p50 {row['latency_ms_p50']:.3f} ms, floor {row['floor']}; {row['stages_us']}")
    return {"models": found}


def floor(study: Study, server: Server, name: str) -> dict[str, float]:
    """Latency of one client and throughput of 16-row clients, without any work of ours."""
    raw_ms = study.raw(name, 1).get("device", {}).get("latency_ms_p50", 0.0)
    names = {FLOOR: 0, BUSY: round(1000 * raw_ms)}
    for suffix, busy_us in names.items():
        server.add_floor(name + suffix, name, batch_size=BATCH, busy_us=busy_us)
    server.load(*(name + suffix for suffix in names))
    try:
        alone, busy = (perf_analyzer(server, name + suffix, concurrency=1) for suffix in names)
        full = perf_analyzer(server, name + FLOOR, concurrency=WHOLE_BATCH_CONCURRENCY[0], client_batch=BATCH)
    finally:
        server.unload(*(name + suffix for suffix in names))
    return {
        "latency_ms_p50": alone.latency_ms_p50,
        "busy_us": names[BUSY],
        "busy_latency_ms_p50": busy.latency_ms_p50,
        "rows_per_s_client_batch_16": full.rows_per_s,
    }


def by_turns(study: Study, server: Server, name: str) -> dict[str, Any]:
    """p50 in ms of one client, round by round, through the backend that is here and the one of --before; and
    the median of the ratios."""
    other = name + BEFORE
    server.add_backend(other, name, study.path(name), study.options.before, batch_size=BATCH)
    server.load(other)
    reading = server.metrics()
    try:
        rounds = [
            [perf_analyzer(server, each, concurrency=1).latency_ms_p50 for each in (other, name)]
            for _ in range(TURNS)
        ]
        stages_us = {each: stage_means_us(reading, server.metrics(), each) for each in (other, name)}
    finally:
        server.unload(other)
    return {
        "before_ms_p50": [before for before, _ in rounds],
        "now_ms_p50": [now for _, now in rounds],
        "now_over_before": round(float(np.median([now / before for before, now in rounds])), 4),
        "stages_us_before": stages_us[other],
        "stages_us_now": stages_us[name],
    }


def stage_means_us(
    before: dict[tuple[str, str, str], float], after: dict[tuple[str, str, str], float], model: str
) -> dict[str, float]:
    """Mean time a sample of each stage between two readings of the metrics; a stage that does not count its
    samples is taken by request."""
    grown = {key: value - before.get(key, 0.0) for key, value in after.items() if key[1] == model}
    requests = sum(value for key, value in grown.items() if key[0] == "dstack_requests_total")
    means = {}
    for (name, _, stage), seconds in grown.items():
        if name != "dstack_stage_seconds_total":
            continue
        samples = grown.get(("dstack_stage_samples_total", model, stage), requests)
        if samples > 0:
            means[stage] = round(seconds / samples * 1e6, 1)
    return means


def graphs(study: Study) -> dict[str, Any]:
    """Served throughput with and without CUDA graphs, clients of 1, 4 and 16 rows; the outputs of both."""
    server, names = speed_server(study)
    names = [name for name in names if name in GRAPH_MODELS] or names

    def load_plain(name: str) -> str:
        server.add(name + PLAIN, study.path(name), batch_size=BATCH, cuda_graphs="false")
        server.load(name + PLAIN)
        return name + PLAIN

    until_left_s = study.left_s() - GRAPHS_LIMIT_S
    plain = study.each(names, load_plain, together=True)
    found: dict[str, dict[str, Any]] = {name: {} for name in plain}
    try:
        for rows in GRAPH_BATCHES:
            for name in plain:
                if study.left_s() < until_left_s:
                    study.problem(f"graphs: {name}, clients of {rows} rows: {GRAPHS_LIMIT_S:g} s are over")
                    continue
                row = study.try_one(name, lambda name, rows=rows: with_and_without(study, server, name, rows))
                if row is not None:
                    found[name][str(rows)] = row
    finally:
        server.unload(*plain.values())
    if not any(found.values()):
        raise MachineError("no row could be measured")
    return {"models": {name: rows for name, rows in found.items() if rows}}


def with_and_without(study: Study, server: Server, name: str, rows: int) -> dict[str, Any]:
    """One model at one client batch."""
    feeds, _ = reference(study.path(name), rows)
    error = relative_error(server.infer(name, feeds), server.infer(name + PLAIN, feeds))
    concurrency = 4 if rows > 1 else 1
    with_graphs, without = (
        perf_analyzer(server, each, concurrency=concurrency, client_batch=rows, window_s=GRAPH_WINDOW_S)
        for each in (name, name + PLAIN)
    )
    say(study, name, with_graphs)
    say(study, name + PLAIN, without)
    return {
        "with_rows_per_s": with_graphs.rows_per_s,
        "without_rows_per_s": without.rows_per_s,
        "speed_up": round(with_graphs.rows_per_s / without.rows_per_s, 4),
        "latency_ms_p50": [with_graphs.latency_ms_p50, without.latency_ms_p50],
        "concurrency": concurrency,
        "relative_difference": error,
        "outputs_equal": bool(np.isfinite(error) and error < TOLERANCE),
    }
