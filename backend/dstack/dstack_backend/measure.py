"""Measure one model at one GPU% with the backend's own runtime: a worker the profiler talks to.

    python -m dstack_backend.measure MODEL.onnx --provider cuda --gpu-percent 40

GPU% is fixed for the life of a process (MPS fixes it when the CUDA context is made), so the profiler runs one
worker a GPU%. Worker and profiler exchange JSON, one object a line: commands on stdin, answers on stdout.

    (starts)                                       <- {"ready": true, "device": {...}, ...}
    {"do": "prepare", "batch_sizes": [1, 8]}       <- {"prepared": [1, 8]}    made ready now, and kept
    {"do": "measure", "batch_size": 8, "cap_s": 1} <- {"latency_ms_p50": ..., "latency_ms_p99": ..., ...}
    {"do": "loop", "batch_size": 8}                <- {"looping": true}    runs back to back from now on
    {"do": "mark"}                                 <- {"marked": true}     counts from here
    {"do": "stop"}                                 <- as measure, and "throughput_per_s"
    {"do": "used"}                                 <- {"device_used_bytes": ...}    of all processes
    {"do": "exit"}, or the end of stdin               ends

A latency is the time from launch to end, how long a batch holds the device when it is served: its inputs
are there before, its outputs leave behind it. A loop launches each batch before the one ahead has ended, as
under full load. measure and loop take "gpu_percent" and "sm_groups" too, for a worker that has levels
(--levels).

A failure is answered by {"error": "one line"}; one that makes the worker useless also ends it.
"""

from __future__ import annotations

import argparse
import json
import os
import queue
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TextIO

import numpy as np

from dstack_backend.synthetic import feeds

WARM_UP_S = 0.15  # an idle GPU runs at a fraction of its clock; it needs some load to come up
MIN_WARM_UP_RUNS = 3
MIN_SAMPLES = 15
CHECK_EVERY = 15
MIN_SAMPLE_S = 0.2  # clocks and neighbours change from one tenth of a second to the next
MAX_SAMPLES = 2000
SETTLED = 0.01  # relative half-width of the median's confidence interval at which measuring ends


def half_width(samples_ms: Sequence[float]) -> float:
    """Relative half-width of the 95% confidence interval of the median, from order statistics."""
    ordered = np.sort(samples_ms)
    n = ordered.size
    reach = 0.98 * np.sqrt(n)
    low, high = int(max(0, np.floor(n / 2 - reach))), int(min(n - 1, np.ceil(n / 2 + reach)))
    return float((ordered[high] - ordered[low]) / 2 / np.median(ordered))


def drift(samples_ms: Sequence[float]) -> float:
    """Relative difference between the medians of the first and the second half: a clock still coming up."""
    half = len(samples_ms) // 2
    first, second = float(np.median(samples_ms[:half])), float(np.median(samples_ms[half:]))
    return abs(first - second) / max(first, second)


def summary(samples_ms: Sequence[float]) -> dict[str, Any]:
    """Median and 99th percentile of latencies in ms."""
    return {
        "latency_ms_p50": float(np.median(samples_ms)),
        "latency_ms_p99": float(np.percentile(samples_ms, 99, method="higher")),
        "samples": len(samples_ms),
    }


def sample(
    run: Callable[[], object], cap_s: float, clock: Callable[[], float] = time.perf_counter
) -> list[float]:
    """Latencies in ms of `run`, warmed up, until the median has settled, at most for about `cap_s` seconds.

    Slow models get fewer samples, at least one. Earlier samples are dropped while the clock still drifts.
    """
    run()  # the first run prepares buffers, chooses algorithms, captures graphs: not on our time
    started = clock()
    warm_ups = 1
    while (warm_ups < MIN_WARM_UP_RUNS or clock() - started < WARM_UP_S) and clock() - started < cap_s / 3:
        run()
        warm_ups += 1
    taken: list[float] = []
    sampling_since = clock()
    while not taken or (clock() - started < cap_s and len(taken) < MAX_SAMPLES):
        before = clock()
        run()
        taken.append((clock() - before) * 1e3)
        long_enough = len(taken) >= MIN_SAMPLES and clock() - sampling_since >= min(MIN_SAMPLE_S, cap_s / 2)
        if long_enough and len(taken) % CHECK_EVERY == 0 and half_width(taken) < SETTLED:
            if drift(taken) < 2 * SETTLED:
                break
            taken = taken[len(taken) // 2 :]
    return taken


class Worker:
    """Holds one session and answers commands.

    memory_bytes: what this process holds, asked after a run; device_used_bytes: what all processes hold.
    """

    def __init__(
        self,
        session: Any,
        shapes: Mapping[str, Sequence[int]],
        memory_bytes: Callable[[], int | None],
        device_used_bytes: Callable[[], int | None],
    ) -> None:
        self._session = session
        self._shapes = shapes
        self._memory_bytes = memory_bytes
        self._device_used_bytes = device_used_bytes
        self._prepared: set[int] = set()
        self._loop: Loop | None = None

    def answer(self, command: Mapping[str, Any]) -> dict[str, Any]:
        """One answer a command. Errors: ValueError for a command that makes no sense now."""
        what = command.get("do")
        if what == "prepare":
            self._prepared = {int(size) for size in command["batch_sizes"]}
            self._session.warm_up(sorted(self._prepared))
            return {"prepared": sorted(self._prepared)}
        if what == "measure":
            batch_size = int(command["batch_size"])
            flight = self._flight(batch_size, command)
            try:
                taken = sample(flight.run, float(command.get("cap_s", 1.0)))
                found = {**summary(taken), "memory_bytes": self._memory_bytes()}
            finally:
                flight.close()
            self._forget(batch_size)
            return found
        if what == "used":
            return {"device_used_bytes": self._device_used_bytes()}
        if what == "loop":
            if self._loop:
                raise ValueError("already looping")
            batch_size = int(command["batch_size"])
            self._loop = Loop(self._flight(batch_size, command, ahead=1), batch_size)
            return {"looping": True}
        if what in ("mark", "stop"):
            if not self._loop:
                raise ValueError(f"{what}: no loop is running")
            if what == "mark":
                self._loop.mark()
                return {"marked": True}
            loop, self._loop = self._loop, None
            loop.flight.close()
            self._forget(loop.batch_size)
            return loop.result()
        raise ValueError(f"unknown command {what!r}")

    def idle(self) -> bool:
        """Run one batch if a loop is on. False: there is nothing to do until the next command."""
        return self._loop.step() if self._loop else False

    def _flight(self, batch_size: int, command: Mapping[str, Any], ahead: int = 0) -> Flight:
        batch = feeds(self._session.inputs, batch_size, self._shapes)
        self._session.warm_up([batch_size])  # as it is served: with a CUDA graph where the model allows one
        share = {key: command[key] for key in ("gpu_percent", "sm_groups") if key in command}
        return Flight(self._session, batch, share, ahead)

    def _forget(self, batch_size: int) -> None:
        """A session keeps what it made for a batch size; those of all workers at once may be too much."""
        if batch_size not in self._prepared:
            self._session.forget()


class Flight:
    """The same batch again and again, as it is served: its inputs lie where the session takes them fastest
    and are staged while the batch before computes. ahead: batches launched before the one that is waited
    for.
    """

    def __init__(
        self, session: Any, batch: Mapping[str, Any], share: Mapping[str, Any], ahead: int = 0
    ) -> None:
        self._session, self._share, self._ahead = session, share, ahead
        self._batch = {}
        for name, array in batch.items():
            self._batch[name] = session.allocate(array.shape, array.dtype)
            self._batch[name][...] = array
        self._launched: deque[Any] = deque()
        self._computed: Any = None
        self._staged = session.stage(self._batch)

    def run(self) -> None:
        """Launch one batch and wait for one; at the first call the same, then the one launched `ahead`
        before.
        """
        staged, self._staged = self._staged, None
        self._launched.append(self._session.launch(staged, **self._share))
        self._staged = self._session.stage(self._batch)
        self._take_outputs()
        if len(self._launched) > self._ahead:
            self._computed = self._launched.popleft()
            self._computed.wait()

    def _take_outputs(self) -> None:
        computed, self._computed = self._computed, None
        if computed is not None:
            computed.outputs()
            computed.close()

    def close(self) -> None:
        """What is under way ends first."""
        for each in (self._staged, self._computed, *self._launched):
            if each is not None:
                each.close()
        self._launched.clear()
        self._staged = self._computed = None


class Loop:
    """Runs back to back, for models measured side by side. A failure ends it and is reported by `result`."""

    def __init__(self, flight: Flight, batch_size: int) -> None:
        for _ in range(2):  # from the second on, each call waits for a batch
            flight.run()
        self.flight, self.batch_size = flight, batch_size
        self._ends_s = [time.perf_counter()]
        self._marked_s = 0.0
        self._failure: Exception | None = None

    def step(self) -> bool:
        """One run. False after a failure."""
        if self._failure is None:
            try:
                self.flight.run()
            except Exception as error:  # the asker gets it as the answer to "stop"
                self._failure = error
            self._ends_s.append(time.perf_counter())
        return self._failure is None

    def mark(self) -> None:
        """Runs that end from now on count."""
        self._marked_s = time.perf_counter()

    def result(self) -> dict[str, Any]:
        """Latency from end to end of runs and rows per second, since the mark."""
        if self._failure:
            raise self._failure
        ends = np.array(self._ends_s)
        spans_ms = np.diff(ends)[ends[1:] > self._marked_s] * 1e3
        if not spans_ms.size:
            raise ValueError("no batch ran from start to end while measuring: measure for longer")
        rows_per_s = self.batch_size * 1e3 / float(spans_ms.mean())
        return {**summary(spans_ms.tolist()), "throughput_per_s": rows_per_s}


def memory_bytes(provider: str, device_id: int) -> int | None:
    """What this process holds: on a GPU its device memory where the driver tells, else host memory."""
    if provider == "cuda":
        from dstack_backend.device import gpu_memory_of_process

        return gpu_memory_of_process(device_id, os.getpid())
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def device_used_bytes(provider: str, device_id: int) -> int | None:
    """Device memory in use by all processes; the profiler's fallback where the driver tells no more."""
    if provider == "cuda":
        from dstack_backend.device import gpu_memory_used

        return gpu_memory_used(device_id)
    return None


def parse_shape(text: str) -> tuple[str, tuple[int, ...]]:
    """NAME:D1,D2,... as perf_analyzer takes it: the dimensions of an input without the batch."""
    name, _, dims = text.rpartition(":")
    try:
        shape = tuple(int(dim) for dim in dims.split(",")) if dims else ()
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text}: wanted NAME:D1,D2,... with whole numbers") from None
    if not name or any(dim < 1 for dim in shape):
        raise argparse.ArgumentTypeError(f"{text}: wanted NAME:D1,D2,... with whole numbers of at least 1")
    return name, shape


def parse_levels(text: str) -> tuple[float, ...]:
    """GPU percentages by comma."""
    try:
        return tuple(float(level) for level in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text}: wanted GPU percentages by comma") from None


def serve(worker: Worker, commands: TextIO, answers: TextIO) -> None:
    """Answer commands until `exit` or the end of the input; while a loop is on, run it in between."""
    lines: queue.SimpleQueue[str] = queue.SimpleQueue()

    def read() -> None:
        for line in commands:
            lines.put(line)
        lines.put("")

    threading.Thread(target=read, name="commands", daemon=True).start()
    while True:
        while lines.empty() and worker.idle():
            pass
        line = lines.get()
        try:
            command = json.loads(line) if line else {"do": "exit"}
            if command.get("do") == "exit":
                return
            reply = worker.answer(command)
        except Exception as error:  # every failure is the asker's to judge: it travels as one line
            reply = {"error": " ".join(f"{type(error).__name__}: {error}".split())}
        say(answers, reply)


def say(answers: TextIO, reply: Mapping[str, Any]) -> None:
    answers.write(json.dumps(reply) + "\n")
    answers.flush()


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; exit status 2 when the model cannot be loaded (the reason went out as an answer)."""
    parser = argparse.ArgumentParser(prog="python -m dstack_backend.measure", description="Profiling worker.")
    parser.add_argument("model", type=Path)
    parser.add_argument("--provider", choices=["cpu", "cuda"], required=True)
    parser.add_argument("--gpu-percent", type=float, default=100.0)
    parser.add_argument("--device-id", type=int, default=0)
    parser.add_argument("--levels", type=parse_levels, default=(), metavar="P1,P2,...")
    parser.add_argument("--shape", type=parse_shape, action="append", default=[], metavar="NAME:D1,D2,...")
    options = parser.parse_args(arguments)
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # libraries that print must not break the protocol
    started_s = time.perf_counter()
    try:
        from dstack_backend.device import identity
        from dstack_backend.runtime import load_session

        used_before = device_used_bytes(options.provider, options.device_id)
        session = load_session(
            options.model,
            provider=options.provider,
            gpu_percent=options.gpu_percent,
            device_id=options.device_id,
            **({"levels": options.levels} if options.levels else {}),
        )
        holds = partial(memory_bytes, options.provider, options.device_id)
        used = partial(device_used_bytes, options.provider, options.device_id)
        worker = Worker(session, dict(options.shape), holds, used)
        device = identity(options.provider, options.device_id)
    except Exception as error:
        say(answers, {"error": " ".join(f"{type(error).__name__}: {error}".split())})
        return 2
    say(
        answers,
        {
            "ready": True,
            "device": device,
            "memory_bytes": holds(),
            "device_used_before_bytes": used_before,
            "inputs": [[t.name, t.dtype, list(t.dims)] for t in session.inputs],
            "levels": list(session.levels),
            "sm_groups": session.groups,
            "load_s": time.perf_counter() - started_s,
        },
    )
    serve(worker, sys.stdin, answers)
    return 0


if __name__ == "__main__":
    sys.exit(main())
