"""Parts `instances`, `leak` and `mps`: many instances, many loads, and the MPS daemon killed under load."""

from __future__ import annotations

import contextlib
import os
import signal
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from tritonclient.utils import InferenceServerException

from dataplane.clients import Checked, CheckedClients, perf_analyzer, totals
from dataplane.references import reference
from dataplane.server import Server
from dataplane.small_network import save_network
from dataplane.speed import check_answers
from dataplane.study import Study
from dstack_backend.device import gpu_memory_used
from dstack_backend.optimized import CACHE_VARIABLE
from dstack_backend.session import ladder
from dstack_sched.errors import MachineError

SMALL_BATCH = 4  # few buckets to prepare: these parts load often
SETTLE_S = 1.0  # the driver gives a dead process's memory back a moment later
CHECKS_A_INSTANCE = 40
LEAK_ABREAST = 10
LEVELS_CYCLES, LEVELS_ABREAST = 9, 3  # of a real network that holds programs at several levels
SLOWEST = "mobilenet_v2"  # to load: cuDNN compiles its convolutions
LOAD_BATCH = 16
SEARCH_NEEDS_S = 130.0  # of the time budget, for the second round of `loading` and the parts behind it
MPS_MODELS = ("resnet50", "bert_base", "mobilenet_v2")
PROGRAMS_LIMIT_S = 60.0
LEVELS_NEED_S = 120.0  # of the time budget, left to the parts behind
QUIET_BEFORE_S = 2.0
QUIET_AFTER_S = 2.0  # without a failure, until all counts as well again
RECOVERY_LIMIT_S = 75.0
SEND_EVERY_S = 0.02  # a request a model, whatever becomes of those before it
MOST_UNDER_WAY = 2000
HANG_LIMIT_S = 30.0  # what was with a dead process hangs; cancelled while we look, it may crash Triton
SERVING_LIMIT_S = 40.0


def memory(study: Study, server: Server) -> dict[str, int]:
    """What stays while no model is loaded: device memory of everybody, host memory of all but the stubs, in
    all and by program."""
    time.sleep(SETTLE_S)
    held = {"host_bytes": 0, "open_files": 0, "threads": 0}
    for process in server.processes():
        with contextlib.suppress(psutil.NoSuchProcess):  # one that only put a question to the MPS daemon
            host_bytes, of_program = process.memory_full_info().uss, f"host_bytes of {process.name()}"
            held["host_bytes"] += host_bytes
            held[of_program] = held.get(of_program, 0) + host_bytes
            held["open_files"] += process.num_fds()
            held["threads"] += process.num_threads()
    return {
        "device_bytes": gpu_memory_used(0) if study.provider == "cuda" else 0,
        **held,
        "shared_memory_bytes": sum(path.stat().st_size for path in Path("/dev/shm").glob(server.shm_pattern)),
    }


def growth(before: dict[str, int], after: dict[str, int]) -> dict[str, int]:
    return {key: after.get(key, 0) - before.get(key, 0) for key in before | after}


def instances(study: Study) -> dict[str, Any]:
    """24 instances of the models at once: loaded, each of them serving, unloaded, memory back."""
    a_model, rest = divmod(study.options.instances, len(study.models))
    counts = {name: a_model + (index < rest) for index, name in enumerate(study.models)}
    with Server(study.options.state / "instances", study.provider) as server:
        before = memory(study, server)
        for name, count in counts.items():
            server.add(name, study.path(name), batch_size=SMALL_BATCH, count=count)
        took_s = server.load(*counts)
        loaded = memory(study, server)
        study.say(f"{sum(counts.values())} instances loaded in s: {took_s}")
        with ThreadPoolExecutor(len(counts)) as pool:
            list(pool.map(lambda name: serve_some(study, server, name, counts[name]), counts))
        metrics = server.metrics()
        served = {
            instance: int(value)
            for (metric, _, instance), value in metrics.items()
            if metric == "dstack_requests_total" and not instance.startswith("seed")
        }
        stubs = len(server.stub_pids())
        unloading_s = server.unload(*counts)
        after = memory(study, server)
        return {
            "instances": counts,
            "processes": stubs,
            "served_by_instance": served,
            "all_served": len(served) == stubs == study.options.instances and all(served.values()),
            "load_s": took_s,
            "unload_s": unloading_s,
            "loaded": growth(before, loaded),
            "left_behind": growth(before, after),
            "processes_left": len(server.stub_pids()),
        }


def serve_some(study: Study, server: Server, name: str, count: int) -> None:
    """Right answers from a model under enough clients to reach each of its instances."""
    feeds, wanted = reference(study.path(name), SMALL_BATCH)  # a full batch: one request, one instance
    clients = CheckedClients(server.grpc_url, {name: (feeds, wanted)}, under_way=3 * count)
    until = time.monotonic() + 20.0
    while time.monotonic() < until and len(clients.clients[name].answered) < CHECKS_A_INSTANCE * count:
        time.sleep(0.05)
    clients.stop()
    seen = totals(clients)
    if seen["failed"] or seen["wrong_answers"] or not seen["answered"]:
        raise MachineError(f"{name} with {count} instances: {seen}")


def leak(study: Study) -> dict[str, Any]:
    """Memory after many load/unload cycles of a small network, which loads quickly, and after a few of a
    large one with levels. What leaks does so by the load: sessions, graphs, contexts, shared memory, stubs.
    """
    small = study.options.state / "small.onnx"
    save_network(small)
    with Server(study.options.state / "leak", study.provider) as server:
        found = {"model": "small", **cycles(study, server, small, study.options.cycles, LEAK_ABREAST)}
        name = study.models[0]
        if study.provider == "cuda" and study.left_s() > LEVELS_NEED_S:
            found["with_levels"] = {
                "model": name,
                **cycles(study, server, study.path(name), LEVELS_CYCLES, LEVELS_ABREAST, levels="auto"),
            }
    return found


def cycles(
    study: Study, server: Server, path: Path, wanted: int, abreast: int, **more: str
) -> dict[str, Any]:
    """So many load/unload cycles of one model, some abreast. The first round is not counted: Triton and the
    driver keep what they need for later loads.
    """
    names = [f"cycle_{path.stem}_{n}" for n in range(min(abreast, wanted))]
    rounds = -(-wanted // len(names))
    for each in names:
        server.add(each, path, batch_size=1, max_batch_size=SMALL_BATCH, **more)
    idle, began_s = memory(study, server), time.monotonic()
    series = [cycle(study, server, names, path)]
    for number in range(1, rounds + 1):
        if study.left_s() < 15:
            study.problem(f"leak: only {number - 1} of {rounds} rounds, the time is up")
            break
        series.append(cycle(study, server, names, path))
        study.say(f"leak: {number * len(names)} cycles: {growth(series[0], series[-1])}")
    return {
        "cycles": (len(series) - 1) * len(names),
        "abreast": len(names),
        "seconds_a_round": round((time.monotonic() - began_s) / len(series), 2),
        **growth(series[0], series[-1]),
        **{f"{key}_per_cycle": slope(series, key) / len(names) for key in ("device_bytes", "host_bytes")},
        "first_round": growth(idle, series[0]),
        "series": series,
    }


def cycle(study: Study, server: Server, names: list[str], path: Path) -> dict[str, int]:
    """Load all, one right answer of each, unload all; the memory afterwards."""
    server.load(*names)
    with ThreadPoolExecutor(len(names)) as pool:
        list(pool.map(lambda each: check_answers(server, each, path, 1), names))
    server.unload(*names)
    return memory(study, server)


def slope(series: list[dict[str, int]], key: str) -> float:
    """Growth a round over the second half of the rounds, by least squares; 0 where they are too few."""
    values = [each[key] for each in series[len(series) // 2 :]]
    return float(np.polyfit(range(len(values)), values, 1)[0]) if len(values) > 2 else 0.0


def loading(study: Study) -> dict[str, Any]:
    """Seconds until the network that takes longest answers, with an empty cache and with a full one, and
    until all of its batch sizes have their programs; the same with cuDNN's fallback list of algorithms, which
    may need no compiling, and what either serves."""
    name = SLOWEST if SLOWEST in study.models else study.models[0]
    with (
        tempfile.TemporaryDirectory(prefix="dp-cache-") as cache,
        cache_at(cache),
        Server(study.options.state / "loading", study.provider) as server,
    ):
        found = {"model": name, "batch_size": LOAD_BATCH, **load_times(study, server, name)}
        if study.left_s() > SEARCH_NEEDS_S:
            found["conv_algo_search_default"] = load_times(study, server, name, conv_algo_search="DEFAULT")
    return found


def load_times(study: Study, server: Server, model: str, **more: str) -> dict[str, Any]:
    """See loading(). more: parameters of the backend."""
    found: dict[str, Any] = {}
    name = "_".join([model, *more.values()]).lower()
    server.add(name, study.path(model), batch_size=LOAD_BATCH, **more)
    for key in ("first", "again"):
        began_s = time.monotonic()
        server.load(name)
        check_answers(server, name, study.path(model), 1)
        found[f"{key}_s"] = round(time.monotonic() - began_s, 2)
        found[f"{key}_all_programs_s"] = programs_s(server, name, study.provider, began_s)
        if key == "again":
            for rows, concurrency in ((1, 1), (LOAD_BATCH, 8)):
                loop = perf_analyzer(server, name, concurrency=concurrency, client_batch=rows)
                found[f"rows_per_s_client_batch_{rows}"] = loop.rows_per_s
        server.unload(name)
        study.say(f"loading {name}: {found}")
    return found


def programs_s(server: Server, name: str, provider: str, began_s: float) -> float | None:
    """Seconds until every batch size has a CUDA graph, by the metrics; None: not so within a minute."""
    wanted = len(ladder(LOAD_BATCH)) if provider == "cuda" else 0
    while time.monotonic() - began_s < PROGRAMS_LIMIT_S:
        values = server.metrics()
        graphs = [
            v for (metric, model, _), v in values.items() if (metric, model) == ("dstack_cuda_graphs", name)
        ]
        if graphs and max(graphs) >= wanted:
            return round(time.monotonic() - began_s, 2)
    return None


@contextlib.contextmanager
def cache_at(folder: str) -> Iterator[None]:
    """A cache of the backend of its own, for what is started meanwhile."""
    before = os.environ.get(CACHE_VARIABLE)
    os.environ[CACHE_VARIABLE] = folder
    try:
        yield
    finally:
        if before is None:
            del os.environ[CACHE_VARIABLE]
        else:
            os.environ[CACHE_VARIABLE] = before


def mps(study: Study) -> dict[str, Any]:
    """The MPS daemon and its server killed under load, then the server alone; on the CPU, where there is no
    MPS, the stubs in their place: what clients saw, and when every model answered again."""
    names = [name for name in MPS_MODELS if name in study.models] or study.models
    expected = {name: reference(study.path(name), 2) for name in names}
    cuda = study.provider == "cuda"
    scenarios = {"daemon": {"daemon", "server"}, "server": {"server"}} if cuda else {"stubs": set()}
    found: dict[str, Any] = {}
    with Server(study.options.state / "mps", study.provider) as server:
        for name in names:
            server.add(name, study.path(name), batch_size=SMALL_BATCH)
        server.load(*names)
        for scenario, victims in scenarios.items():
            if found and study.left_s() < 30:
                study.problem(f"mps: no time left to kill the {scenario}")
                break
            found[scenario] = kill_under_load(study, server, expected, victims)
            study.say(f"mps, {scenario} killed: {found[scenario]}")
    return {"scenarios": found}


def kill_under_load(study: Study, server: Server, expected: Any, victims: set[str]) -> dict[str, Any]:
    """Steady load on all models, the kill, and the wait until all is well; what the clients saw."""
    wait_serving(server, expected)
    load = CheckedClients(
        server.grpc_url, expected, under_way=MOST_UNDER_WAY, pause_s=SEND_EVERY_S, limit_s=HANG_LIMIT_S
    )
    try:
        time.sleep(QUIET_BEFORE_S)
        before = totals(load)
        if before["failed"] or before["wrong_answers"] or not before["answered"]:
            raise MachineError(f"the load does not run well before anything was killed: {before}")
        triton = server.triton()
        killed = kill(server, victims)
        killed_s = time.monotonic()
        restarted_s = wait_well(server, load, victims, killed, killed_s)
    finally:
        load.stop()
    by_model = {name: recovered(seen, killed_s) for name, seen in load.clients.items()}
    times_s = [each for each in by_model.values() if each is not None]
    well = len(times_s) == len(by_model) and restarted_s is not None
    if not well:
        study.problem(f"not all models served again within {RECOVERY_LIMIT_S:g} s: {by_model}")
    return {
        "killed": len(killed),
        "restarted_s": restarted_s,
        "recovered": well,
        "triton_restarted": server.triton() != triton,
        "recovery_s": max(times_s) if well else None,
        "recovery_s_by_model": by_model,
        "sent_every_s": SEND_EVERY_S,
        "request_limit_s": HANG_LIMIT_S,
        **totals(load),
    }


def wait_serving(server: Server, expected: Any) -> None:
    """Until every model answers: the end of the load before may have cost a Triton. Errors: MachineError."""
    until = time.monotonic() + SERVING_LIMIT_S
    for name, (feeds, _) in expected.items():
        while True:
            try:
                server.infer(name, feeds)
                break
            except InferenceServerException as error:
                if time.monotonic() > until:
                    raise MachineError(f"{name} does not answer: {error}") from error
                time.sleep(0.2)


def kill(server: Server, victims: set[str]) -> frozenset[int]:
    """SIGKILL to all that does the work of `victims`. Errors: MachineError where nothing does."""
    pids = at_work(server, victims)
    if not pids:
        raise MachineError(f"serve runs no {' and '.join(sorted(victims)) or 'stubs'} of its own to kill")
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
    return pids


def at_work(server: Server, victims: set[str]) -> frozenset[int]:
    """The MPS processes of these kinds; without kinds, the stubs."""
    if not victims:
        return server.stub_pids()
    return frozenset(pid for pid, kind in server.mps_processes().items() if kind in victims)


def wait_well(
    server: Server, load: CheckedClients, victims: set[str], killed: frozenset[int], killed_s: float
) -> float | None:
    """Wait until all is well again, or the limit. Seconds until a successor of what was killed was seen."""
    restarted_s: float | None = None
    while time.monotonic() - killed_s < RECOVERY_LIMIT_S:
        time.sleep(0.1)
        if restarted_s is None and at_work(server, first_of(victims)) - killed:
            restarted_s = round(time.monotonic() - killed_s, 3)
        quiet_since_s = time.monotonic() - QUIET_AFTER_S
        if (
            restarted_s is not None
            and quiet_since_s > killed_s
            and all(
                seen.last_failure_sent_s() < quiet_since_s and seen.well_since(quiet_since_s)
                for seen in load.clients.values()
            )
        ):
            break
    return restarted_s


def first_of(victims: set[str]) -> set[str]:
    """Whose successor counts as the restart: the daemon's where it was killed too."""
    return {"daemon"} & victims or victims


def recovered(seen: Checked, killed_s: float) -> float | None:
    """Seconds from the kill to the first right answer to a request that was sent after the last one that
    failed; None: no such answer came."""
    since_s = max(killed_s, seen.last_failure_sent_s())
    ends_s = [ended for sent, ended in list(seen.answered) if sent > since_s]
    return round(min(ends_s) - killed_s, 3) if ends_s else None
