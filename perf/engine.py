"""How long a decision takes, and how long a backend waits for a grant: perf/reports/engine.json.

    make perf-engine      (or: python perf/engine.py [--events N] [--rounds N] [--out FILE])

Decisions: the D-STACK engine with 64 models under steady load, driven in virtual time by a small model of
their backends (Poisson arrivals, one report an arrival, batches that take what the profile says, with
jitter); every call of `handle` is timed. Round trips: `dstackctl arbiter` in its own process; a backend
process that always has work sends Done and waits for its next Grant, while a second process plays the other
clients, each of which asks (or starts under its standing grant) 50 times a second.
"""

from __future__ import annotations

import argparse
import gc
import heapq
import os
import re
import select
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dstack_backend import wire
from dstack_sched.adapters.arbiter_client import SocketArbiterClient
from dstack_sched.domain.decision import Grant, Revoke, SetTimer, Shed
from dstack_sched.domain.event import (
    BackendJoined,
    BatchFinished,
    BatchStarted,
    EngineModel,
    PlanChanged,
    TimerFired,
    WorkQueued,
)
from dstack_sched.domain.json_form import gpus_to_json
from dstack_sched.domain.workload import OnLate
from dstack_sched.engine.interface import Engine
from dstack_sched.engine.registry import make_engine
from dstack_sched.errors import MachineError
from report import REPORTS, write_report

MODELS = 64
LEVELS = (10.0, 20.0, 30.0, 50.0, 70.0, 100.0)
BATCHES = (1, 2, 4, 8, 16, 32)
CAPACITY_PERCENT = 200.0  # what an H100 was found to take (FACTS)
LOAD = 0.7  # demand over capacity, GPU%-time: the steady load of the targets
OTHER_LOADS = (0.4, 1.0, 1.3)
CLIENTS = (1, 2, 4, 8, 16, 32, 48)
OTHERS_PERIOD_S = 0.02
SCRAPED_CLIENTS, SCRAPE_EVERY_S = 8, 0.1  # 150 times as often as Prometheus does
SCRAPER = """
import sys, time, urllib.request
while True:
    urllib.request.urlopen(sys.argv[1]).read()
    time.sleep(float(sys.argv[2]))
"""
TARGET = {"decision_us_p50": 20.0, "decision_us_p99": 50.0, "grant_roundtrip_us_p50": 100.0}
SEED = 20261122


# -- decisions -----------------------------------------------------------------------------------------------


@dataclass
class Model:
    """A model and the queue of its one instance. a: f(p, b) = a0 + a1 b + (a2 + a3 b)/p in ms."""

    plan: EngineModel
    a: np.ndarray
    rate_per_us: float
    deadlines_us: list[int]

    def run_us(self, percent: float, rows: int) -> float:
        a0, a1, a2, a3 = self.a
        return 1000.0 * (a0 + a1 * rows + (a2 + a3 * rows) / percent)


def draw_models(rng: np.random.Generator, count: int, load: float = LOAD) -> list[Model]:
    """Models from a quarter to twice as heavy as ResNet-50 on an H100 (4.3, 6.3, 10.8 ms for 16 rows at 100,
    50, 25%), objectives of 50 to 200 ms, rates of equal GPU%-time that sum to `load` of the capacity."""
    models = []
    for i in range(count):
        a = np.array([0.6, 0.10, 9.0, 12.5]) * np.exp(rng.uniform(np.log(0.25), np.log(2.0)))
        percent = float(rng.choice(LEVELS[:4]))
        table = tuple(tuple(float(a[0] + a[1] * b + (a[2] + a[3] * b) / p) for b in BATCHES) for p in LEVELS)
        plan = EngineModel(
            f"model_{i:02d}", percent, 16, int(rng.uniform(50_000, 200_000)), 1.0, OnLate.SERVE, percent,
            LEVELS, BATCHES, table, 0.002,
        )  # fmt: skip
        model = Model(plan, a, 0.0, [])
        share_us = percent * model.run_us(percent, 8) / 8  # GPU%-us a row
        model.rate_per_us = load * CAPACITY_PERCENT / count / share_us
        models.append(model)
    return models


class Drive:
    """Backends in virtual time around one engine; `took_ns[kind]` holds the time of every `handle` call."""

    def __init__(self, engine: Engine, models: list[Model], levels: bool, rng: np.random.Generator) -> None:
        self.engine = engine
        self.rng = rng
        self.models = {model.plan.name: model for model in models}
        self.took_ns: dict[str, list[int]] = {"work": [], "done": [], "timer": []}
        self.agenda: list[tuple[int, int, str, Any]] = []
        self.serial = 0
        self.timer_us = 0
        self.busy_until_us: dict[str, int] = {}
        self.standing: dict[str, Grant] = {}  # grants ahead of the work
        self.rows = self.late = self.batches = 0
        engine.handle(PlanChanged(CAPACITY_PERCENT, tuple(model.plan for model in models)), 0)
        for model in models:
            plan = model.plan
            choices = LEVELS if levels else (plan.gpu_percent,)
            engine.handle(
                BackendJoined(
                    plan.name, plan.name, plan.gpu_percent, choices, 32, 16, plan.slo_us, plan.on_late
                ),
                0,
            )
            self.at(self.next_arrival_us(model, 0), "work", model)

    def at(self, at_us: int, kind: str, what: Any) -> None:
        self.serial += 1
        heapq.heappush(self.agenda, (at_us, self.serial, kind, what))

    def next_arrival_us(self, model: Model, now_us: int) -> int:
        return now_us + 1 + int(self.rng.exponential(1.0 / model.rate_per_us))

    def run(self, events: int) -> None:
        for _ in range(events):
            now_us, _, kind, what = heapq.heappop(self.agenda)
            if kind == "work":
                what.deadlines_us.append(now_us + what.plan.slo_us)
                event = self.arrived(what, now_us)
                self.at(self.next_arrival_us(what, now_us), "work", what)
            elif kind == "done":
                event = self.finish(what, now_us)
            elif now_us != self.timer_us:
                continue  # replaced by another
            else:
                event = TimerFired()
            began_ns = time.perf_counter_ns()
            decisions = self.engine.handle(event, now_us)
            self.took_ns[kind].append(time.perf_counter_ns() - began_ns)
            for decision in decisions:
                self.carry_out(decision, now_us)

    def carry_out(self, decision: Any, now_us: int) -> None:
        match decision:
            case SetTimer(at_us):
                self.timer_us = at_us
                self.at(at_us, "timer", None)
            case Grant(standing=True):
                self.standing[decision.instance] = decision
            case Revoke(instance, _) if instance in self.standing:
                self.at(now_us + 1, "done", (self.standing.pop(instance), 0, 0))
            case Revoke():
                pass  # it has begun
            case Grant():
                start_us = max(now_us, self.busy_until_us.get(decision.instance, 0))
                self.busy_until_us[decision.instance] = start_us + 1
                self.at(start_us, "start", decision)
            case Shed():
                raise AssertionError("these models serve late requests")

    def arrived(self, model: Model, now_us: int) -> WorkQueued | BatchStarted:
        """A request came: it runs under a standing grant, or is reported."""
        waiting = model.deadlines_us
        standing = self.standing.pop(model.plan.name, None)
        if standing is None:
            return WorkQueued(model.plan.name, len(waiting), waiting[0])
        rows = min(standing.batch_size, len(waiting))
        self.at(now_us, "start", standing)
        return BatchStarted(model.plan.name, standing.grant_id, rows, len(waiting) - rows, waiting[0])

    def finish(self, run: tuple[Grant, int, int], now_us: int) -> BatchFinished:
        grant, rows, run_us = run
        waiting = self.models[grant.instance].deadlines_us
        return BatchFinished(
            grant.instance, grant.grant_id, rows, run_us, len(waiting), waiting[0] if waiting else 0
        )


class Backends(Drive):
    """Adds the start of a granted batch: late batching takes the rows that wait at that moment."""

    def run(self, events: int) -> None:
        done = 0
        while done < events:
            while self.agenda[0][2] == "start":
                now_us, _, _, grant = heapq.heappop(self.agenda)
                self.start(grant, now_us)
            super().run(1)
            done += 1

    def start(self, grant: Grant, now_us: int) -> None:
        model = self.models[grant.instance]
        rows = min(grant.batch_size, len(model.deadlines_us))
        batch, model.deadlines_us = model.deadlines_us[:rows], model.deadlines_us[rows:]
        jitter = float(self.rng.normal(1.0, 0.03))
        run_us = int(model.run_us(grant.gpu_percent, rows) * max(jitter, 0.8)) if rows else 1
        self.busy_until_us[grant.instance] = now_us + run_us
        self.rows += rows
        self.batches += 1
        self.late += sum(deadline < now_us + run_us for deadline in batch)
        self.at(now_us + run_us, "done", (grant, rows, run_us))


def decisions(levels: bool, events: int, load: float = LOAD, count: int = MODELS) -> dict[str, Any]:
    """Time every decision of a fresh engine under steady load; the first tenth warms up."""
    rng = np.random.default_rng(SEED)
    drive = Backends(make_engine("dstack"), draw_models(rng, count, load), levels, rng)
    gc.collect()
    gc.disable()  # as the arbiter does
    try:
        drive.run(events // 10)
        for times in drive.took_ns.values():
            times.clear()
        drive.run(events)
    finally:
        gc.enable()
    drive.engine.check_invariants()
    every = np.concatenate([np.array(times) for times in drive.took_ns.values()]) / 1000
    return {
        "models": count,
        "levels": len(LEVELS) if levels else 1,
        "load": load,
        "events": len(every),
        "mean_batch_rows": round(drive.rows / max(drive.batches, 1), 2),
        "late_share": round(drive.late / max(drive.rows, 1), 5),
        "us_p50": round(float(np.percentile(every, 50)), 2),
        "us_p99": round(float(np.percentile(every, 99)), 2),
        "us_max": round(float(every.max()), 1),
        "us_p50_by_event": {
            kind: round(float(np.median(times)) / 1000, 2) for kind, times in drive.took_ns.items() if times
        },
    }


# -- round trips ---------------------------------------------------------------------------------------------


@contextmanager
def arbiter(directory: Path) -> Iterator[Path]:
    """`dstackctl arbiter` in its own process, with room for all clients at once: no wait is contention. Its
    metrics are served; the log names the URL."""
    path = directory / "arbiter.sock"
    command = [sys.executable, "-m", "dstack_sched", "arbiter", "--socket", str(path), "--metrics-port", "0"]
    with (directory / "arbiter.log").open("w") as log:
        process = subprocess.Popen(command, stderr=log)
    client = SocketArbiterClient(path)
    try:
        for _ in range(500):
            try:
                client.request("ping")
                break
            except MachineError:
                time.sleep(0.02)
        models = tuple(
            EngineModel(
                f"model_{i:02d}", 10.0, 8, 1_000_000, 1.0, OnLate.SERVE, 10.0, (10.0,), (1, 8), ((1.0, 2.0),)
            )
            for i in range(max(CLIENTS))
        )
        client.request("plan", gpus=gpus_to_json({0: PlanChanged(500.0, models)}))
        yield path
        status = client.request("status")["decision_us"]
        say(f"    the arbiter's own decisions: p50 {status['p50']:.1f} us, p99 {status['p99']:.1f} us")
    finally:
        client.close()
        process.send_signal(signal.SIGTERM)
        process.wait(10)


def join(path: Path, i: int) -> socket.socket:
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    connection.connect(str(path))
    name = f"model_{i:02d}"
    connection.send(wire.encode(wire.Join(name, name, os.getpid(), 0, 10.0, 8, 8, 1_000_000, False)))
    assert isinstance(wire.decode(connection.recv(4096)), wire.Welcome)
    return connection


def measure(path: Path, rounds: int) -> None:
    """One backend that always has work: Done -> Grant, timed with the coding of both. Prints p50 and p99."""
    connection = join(path, 0)
    took_ns = []
    gc.disable()
    deadline_us = time.monotonic_ns() // 1000 + 1_000_000
    connection.send(wire.encode(wire.Work(8, deadline_us)))
    grant = wire.decode(connection.recv(4096))
    for i in range(rounds + rounds // 10):
        assert isinstance(grant, wire.Grant)
        time.sleep(0.0005)
        now_ns = time.monotonic_ns()
        done = wire.Done(grant.grant_id, 8, 0, 1000, 8, now_ns // 1000 + 1_000_000)
        connection.send(wire.encode(done))
        grant = wire.decode(connection.recv(4096))
        if i >= rounds // 10:
            took_ns.append(time.monotonic_ns() - now_ns)
    connection.close()
    p50, p99 = np.percentile(np.array(took_ns) / 1000, (50, 99))
    sys.stdout.write(f"{p50:.1f} {p99:.1f}\n")


def play_others(path: Path, count: int) -> None:
    """`count` backends in one process, each asking every OTHERS_PERIOD_S, in turn; until killed."""
    sockets = [join(path, i + 1) for i in range(count)]
    by_descriptor = {each.fileno(): each for each in sockets}
    epoll = select.epoll()
    for descriptor in by_descriptor:
        epoll.register(descriptor, select.EPOLLIN)
    sys.stdout.write("ready\n")
    sys.stdout.flush()
    standing: dict[int, int] = {}  # grants ahead of the work, by descriptor
    turn, next_s = 0, time.monotonic()
    while True:
        for descriptor, _ in epoll.poll(max(0.0, next_s - time.monotonic())):
            message = wire.decode(by_descriptor[descriptor].recv(4096))
            if isinstance(message, wire.Grant) and message.standing:
                standing[descriptor] = message.grant_id
            elif isinstance(message, wire.Grant):
                by_descriptor[descriptor].send(wire.encode(wire.Done(message.grant_id, 8, 0, 1000, 0, 0)))
            elif isinstance(message, wire.Revoke) and standing.pop(descriptor, None):
                by_descriptor[descriptor].send(wire.encode(wire.Done(message.grant_id, 0, 0, 0, 0, 0)))
        if time.monotonic() >= next_s:
            deadline_us = time.monotonic_ns() // 1000 + 1_000_000
            grant_id = standing.pop(sockets[turn].fileno(), None)
            if grant_id is None:
                sockets[turn].send(wire.encode(wire.Work(8, deadline_us)))
            else:
                sockets[turn].send(wire.encode(wire.Start(grant_id, 8, 0, 0)))
                sockets[turn].send(wire.encode(wire.Done(grant_id, 8, 0, 1000, 0, 0)))
            turn = (turn + 1) % count
            next_s = max(next_s + OTHERS_PERIOD_S / count, time.monotonic() - OTHERS_PERIOD_S)


@contextmanager
def scraped(log: Path, every_s: float) -> Iterator[None]:
    """The metrics endpoint is read every so often, by a process of its own; 0: not at all."""
    if not every_s:
        yield
        return
    url = re.search(r"metrics at (http\S+)", log.read_text())
    assert url, "the arbiter's log names its endpoint"
    scraper = subprocess.Popen([sys.executable, "-c", SCRAPER, url[1], str(every_s)])
    try:
        yield
    finally:
        scraper.kill()
        scraper.wait()


def round_trips(clients: int, rounds: int, scrape_every_s: float = 0.0) -> dict[str, Any]:
    """p50 and p99 of one backend's round trip beside `clients` - 1 others."""
    with (
        tempfile.TemporaryDirectory() as directory,
        arbiter(Path(directory)) as path,
        scraped(Path(directory) / "arbiter.log", scrape_every_s),
    ):
        others = _child("--others", str(clients - 1), path, stdout=subprocess.PIPE) if clients > 1 else None
        try:
            if others is not None and others.stdout is not None:
                assert others.stdout.readline() == "ready\n"
            backend = _child("--measure", str(rounds), path, stdout=subprocess.PIPE)
            out, _ = backend.communicate(timeout=120)
            assert backend.returncode == 0
        finally:
            if others is not None:
                others.kill()
                others.communicate()
    p50, p99 = map(float, out.split())
    return {"clients": clients, "scrape_every_s": scrape_every_s, "us_p50": p50, "us_p99": p99}


def _child(verb: str, argument: str, path: Path, stdout: int) -> subprocess.Popen[str]:
    command = [sys.executable, __file__, verb, argument, "--socket", str(path)]
    return subprocess.Popen(command, stdout=stdout, text=True)


# -- the report ----------------------------------------------------------------------------------------------


def say(text: str) -> None:
    sys.stderr.write(text + "\n")


def study(events: int, rounds: int) -> dict[str, Any]:
    """All figures of the report."""
    one, many = decisions(False, events), decisions(True, events)
    rows = [one, many, *(decisions(levels, events, load) for load in OTHER_LOADS for levels in (False, True))]
    for row in rows:
        say(
            f"decisions, {row['models']} models, load {row['load']}, {row['levels']} levels: "
            f"p50 {row['us_p50']} us, p99 {row['us_p99']} us"
        )
    growth = []
    for clients in CLIENTS:
        growth.append(round_trips(clients, rounds))
        say(f"round trip, {clients} clients: p50 {growth[-1]['us_p50']} us, p99 {growth[-1]['us_p99']} us")
    scrape = round_trips(SCRAPED_CLIENTS, rounds, SCRAPE_EVERY_S)
    say(f"the same, {SCRAPED_CLIENTS} clients, scraped: p50 {scrape['us_p50']} us, p99 {scrape['us_p99']} us")
    figures = {
        "decision_us_p50": one["us_p50"],
        "decision_us_p99": one["us_p99"],
        "grant_roundtrip_us_p50": growth[0]["us_p50"],
        "grant_roundtrip_us_p99": growth[0]["us_p99"],
    }
    missed = [
        f"{name} {figures[name]} (target {limit})" for name, limit in TARGET.items() if figures[name] > limit
    ]
    return {
        **figures,
        "targets": TARGET,
        "missed": missed,
        "seed": SEED,
        "decisions": rows,
        "grant_roundtrip_by_clients": growth,
        "grant_roundtrip_scraped": scrape,
    }


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--events", type=int, default=60_000)
    parser.add_argument("--rounds", type=int, default=4_000)
    parser.add_argument("--out", type=Path, default=REPORTS / "engine.json")
    parser.add_argument("--measure", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--others", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--socket", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        measure(arguments.socket, arguments.measure)
        return 0
    if arguments.others:
        play_others(arguments.socket, arguments.others)
        return 0
    figures = study(arguments.events, arguments.rounds)
    say(f"written: {write_report(arguments.out, 'make perf-engine', figures)}")
    for line in figures["missed"]:
        say(f"missed: {line}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
