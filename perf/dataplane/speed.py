"""Parts `served`, `overhead` and `graphs`: what clients get through Triton, beside the raw loop's figures."""

from __future__ import annotations

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
FLOOR = "_floor"
GRAPH_WINDOW_S = 0.4


def speed_server(study: Study) -> tuple[Server, list[str]]:
    """The server of the three parts, and the models that it serves, right, at batch size 16."""
    if study.shared is None:
        study.shared = server = Server(study.options.state / "speed", study.provider)
        for name in study.models:
            server.add(name, study.path(name), batch_size=BATCH)
        took_s = study.each(study.models, lambda name: server.load(name)[name], together=True)
        study.say(f"loaded in s: {took_s}")
        right = study.each(took_s, lambda name: check_answers(study, server, name, name, CHECK_ROWS))
        study.shared_models = list(right)
    return study.shared, study.shared_models


def check_answers(study: Study, server: Server, served: str, name: str, rows: int) -> float:
    """How far the served answer is from the CPU provider's. Errors: MachineError where it is wrong."""
    feeds, wanted = reference(study.path(name), rows)
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
            "relative_error": check_answers(study, server, name, name, BATCH),
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
    once. The floor's throughput with 16 rows a request bounds what any Python-based backend can serve."""
    server, names = speed_server(study)
    before = server.metrics()
    found = study.each(names, lambda name: perf_analyzer(server, name, concurrency=1).as_dict())
    after = server.metrics()
    floors = study.each(found, lambda name: floor(server, name))
    for name, row in found.items():
        row["stages_us"] = stage_means_us(before, after, name)
        row["floor"] = floors.get(name, {})
        study.say(f"{name}: p50 {row['latency_ms_p50']:.3f} ms, floor {row['floor']}; {row['stages_us']}")
    return {"models": found}


def floor(server: Server, name: str) -> dict[str, float]:
    """Latency of one client and throughput of 16-row clients, without any work of ours."""
    server.add_floor(name + FLOOR, name, batch_size=BATCH)
    server.load(name + FLOOR)
    try:
        alone = perf_analyzer(server, name + FLOOR, concurrency=1)
        full = perf_analyzer(server, name + FLOOR, concurrency=WHOLE_BATCH_CONCURRENCY[0], client_batch=BATCH)
    finally:
        server.unload(name + FLOOR)
    return {"latency_ms_p50": alone.latency_ms_p50, "rows_per_s_client_batch_16": full.rows_per_s}


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

    plain = study.each(names, load_plain, together=True)
    try:
        found = study.each(
            plain,
            lambda name: {str(rows): with_and_without(study, server, name, rows) for rows in GRAPH_BATCHES},
        )
    finally:
        server.unload(*plain.values())
    return {"models": found}


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
