"""Measures models with the backend's own runtime: one worker process a model, GPU% and copy.

A worker is `python -m dstack_backend.measure`; MPS fixes its GPU% when its CUDA context is made. Workers are
started together (loading is slow and needs no quiet device) and then measured one at a time. On a host
without a GPU the same workers run on the CPU provider, where GPU% is a share of the cores.
"""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, NamedTuple

from dstack_sched.domain.profile import CorunMember, CorunPoint, Device, ProfilePoint
from dstack_sched.errors import InputError, MachineError

LOAD_TIMEOUT_S = 180.0
ANSWER_TIMEOUT_S = 120.0
EXIT_TIMEOUT_S = 5.0
CORUN_SETTLE_S = 0.5
FULL_PERCENT = 100.0


@dataclass(frozen=True)
class ProbeSettings:
    """How workers run. environment: what MPS clients need; cap_s: about the longest time for one point.

    levels: GPU% that a worker can take from run to run (green contexts); empty: one share a process.
    """

    provider: str = "cpu"
    device_id: int = 0
    environment: Mapping[str, str] = field(default_factory=dict)
    shapes: Mapping[str, Sequence[int]] = field(default_factory=dict)
    cap_s: float = 1.0
    load_timeout_s: float = LOAD_TIMEOUT_S
    levels: tuple[float, ...] = ()


class Worker:
    """One measuring process. Errors: MachineError when it dies or stays silent, InputError for its model."""

    def __init__(self, model_path: Path, gpu_percent: float, settings: ProbeSettings) -> None:
        self._name = f"{model_path.name} at GPU% {gpu_percent:g}"
        self._stderr: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115 - lives as long as the worker
        self._buffer = b""
        self._load_timeout_s = settings.load_timeout_s
        self._started: dict[str, Any] | None = None
        arguments = [f"--provider={settings.provider}", f"--gpu-percent={gpu_percent:g}"]
        arguments += [f"--device-id={settings.device_id}"]
        if settings.levels:
            arguments += ["--levels=" + ",".join(f"{level:g}" for level in settings.levels)]
        arguments += [f"--shape={name}:{','.join(map(str, dims))}" for name, dims in settings.shapes.items()]
        environment = {**os.environ, **settings.environment}
        environment.pop("CUDA_MPS_ACTIVE_THREAD_PERCENTAGE", None)
        if settings.provider == "cuda" and gpu_percent < FULL_PERCENT:
            environment["CUDA_MPS_ACTIVE_THREAD_PERCENTAGE"] = f"{gpu_percent:g}"
        self._process = subprocess.Popen(
            [sys.executable, "-m", "dstack_backend.measure", str(model_path), *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._stderr,
            env=environment,
        )

    def wait_ready(self) -> dict[str, Any]:
        """The worker's first answer: device, memory, inputs. Waits for the model to load."""
        if self._started is None:
            answer = self._read(self._load_timeout_s)
            if "error" in answer:
                raise InputError(f"{self._name}: cannot be profiled: {answer['error']}")
            self._started = answer
        return self._started

    def ask(self, timeout_s: float = ANSWER_TIMEOUT_S, **command: Any) -> dict[str, Any]:
        """Send a command and wait for its answer."""
        self.wait_ready()
        self.send(**command)
        return self.receive(timeout_s)

    def send(self, **command: Any) -> None:
        """Send a command without waiting; `receive` gets the answer."""
        assert self._process.stdin
        try:
            self._process.stdin.write(json.dumps(command).encode() + b"\n")
            self._process.stdin.flush()
        except OSError:
            raise self._death() from None

    def receive(self, timeout_s: float = ANSWER_TIMEOUT_S) -> dict[str, Any]:
        answer = self._read(timeout_s)
        if "error" in answer:
            raise InputError(f"{self._name}: {answer['error']}")
        return answer

    def close(self) -> None:
        """End the process: by asking, then by force. Never raises."""
        self.ask_to_end()
        try:
            # A worker that is loading does not read its stdin; there is nothing in it worth waiting for.
            self._process.wait(EXIT_TIMEOUT_S if self._started else 0.1)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        assert self._process.stdout
        self._process.stdout.close()
        self._stderr.close()

    def ask_to_end(self) -> None:
        """Let it end by itself; `close` waits for that."""
        assert self._process.stdin
        with contextlib.suppress(OSError):  # it may be gone already, and with it the pipe
            self._process.stdin.close()

    def _read(self, timeout_s: float) -> dict[str, Any]:
        assert self._process.stdout
        ends_s = time.monotonic() + timeout_s
        with selectors.DefaultSelector() as selector:
            selector.register(self._process.stdout, selectors.EVENT_READ)
            while b"\n" not in self._buffer:
                if not selector.select(max(0.0, ends_s - time.monotonic())):
                    raise MachineError(
                        f"{self._name}: the profiling worker gave no answer in {timeout_s:g} s; is it busy?"
                    )
                chunk = os.read(self._process.stdout.fileno(), 1 << 16)
                if not chunk:
                    raise self._death()
                self._buffer += chunk
        line, _, self._buffer = self._buffer.partition(b"\n")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def _death(self) -> MachineError:
        try:
            status: object = self._process.wait(1.0)
        except subprocess.TimeoutExpired:
            status = "unknown"
        self._stderr.seek(0)
        said = [line for line in self._stderr.read().decode(errors="replace").splitlines() if line.strip()]
        reason = said[-1].strip() if said else "it said nothing"
        return MachineError(f"{self._name}: the profiling worker died (exit status {status}): {reason}")


class ModelProbe:
    """ports.LatencyProbe of one model. Workers start when first needed, or ahead of need by `prepare`."""

    def __init__(self, model_path: Path, settings: ProbeSettings) -> None:
        self.model_path = model_path
        self._settings = settings
        self._workers: dict[tuple[float, int], Worker] = {}
        self._memory_bytes = 0

    def prepare(self, gpu_percents: Iterable[float], batch_sizes: Iterable[int] = ()) -> None:
        """Start the workers of these GPU% together, and let them make these batch sizes ready, together."""
        wanted = [self._start(gpu_percent, 0) for gpu_percent in gpu_percents]
        for worker in wanted:
            worker.wait_ready()
        sizes = list(batch_sizes)
        if sizes:
            for worker in wanted:
                worker.send(do="prepare", batch_sizes=sizes)
            for worker in wanted:
                worker.receive(self._settings.load_timeout_s)

    def start(self, gpu_percents: Iterable[float]) -> None:
        """Start workers and do not wait for them."""
        for gpu_percent in gpu_percents:
            self._start(gpu_percent, 0)

    def wait(self) -> None:
        """Wait for all started workers."""
        for worker in self._workers.values():
            worker.wait_ready()

    def device(self) -> Device:
        """The device as a worker without a limit sees it."""
        seen = self.worker(FULL_PERCENT).wait_ready()["device"]
        return Device(**seen)

    def worker(self, gpu_percent: float, copy: int = 0) -> Worker:
        """The running worker of this GPU%; copies are for models that run beside themselves."""
        worker = self._start(gpu_percent, copy)
        worker.wait_ready()
        return worker

    def measure(self, gpu_percent: float, batch_size: int) -> ProfilePoint:
        """Latency of one batch, alone on the device."""
        worker = self.worker(gpu_percent)
        answer = worker.ask(
            timeout_s=ANSWER_TIMEOUT_S + 10 * self._settings.cap_s,
            do="measure",
            batch_size=batch_size,
            cap_s=self._settings.cap_s,
        )
        self._memory_bytes = max(self._memory_bytes, answer["memory_bytes"] or self._shared_memory(worker))
        return ProfilePoint(
            gpu_percent, batch_size, answer["latency_ms_p50"], answer["latency_ms_p99"], answer["samples"]
        )

    def memory_bytes(self) -> int:
        """The most that one worker held so far."""
        return self._memory_bytes

    def close(self) -> None:
        """End all workers. Never raises."""
        for worker in self._workers.values():
            worker.ask_to_end()
        for worker in self._workers.values():
            worker.close()
        self._workers.clear()

    def __enter__(self) -> ModelProbe:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _start(self, gpu_percent: float, copy: int) -> Worker:
        key = (float(gpu_percent), copy)
        if key not in self._workers:
            self._workers[key] = Worker(self.model_path, gpu_percent, self._settings)
        return self._workers[key]

    def _shared_memory(self, worker: Worker) -> int:
        """A worker's part of what all of them added to the device: for drivers that tell no more."""
        before = [w.wait_ready().get("device_used_before_bytes") for w in self._workers.values()]
        used = worker.ask(do="used")["device_used_bytes"]
        if used is None or None in before:
            return 0
        return max(0, int(used) - min(int(b or 0) for b in before)) // len(before)


class CorunSeat(NamedTuple):
    """One model of a co-run measurement: named for the result, measured with a worker of `probe`."""

    name: str
    probe: ModelProbe
    gpu_percent: float
    batch_size: int


def measure_corun(seats: Sequence[CorunSeat], window_s: float = 1.0) -> CorunPoint:
    """Run all seats back to back at the same time and measure each one, counting only while all run."""
    copies: dict[tuple[int, float], int] = {}
    workers = []
    for seat in seats:
        key = (id(seat.probe), seat.gpu_percent)
        workers.append(seat.probe.worker(seat.gpu_percent, copies.get(key, 0)))
        copies[key] = copies.get(key, 0) + 1
    looping: list[Worker] = []
    try:
        for worker, seat in zip(workers, seats, strict=True):
            worker.send(do="loop", batch_size=seat.batch_size)
        for worker in workers:  # they make themselves ready together
            worker.receive()
            looping.append(worker)
        time.sleep(CORUN_SETTLE_S)
        for worker in workers:
            worker.ask(do="mark")
        time.sleep(window_s)
    finally:
        for worker in looping:
            worker.send(do="stop")
    answers = [worker.receive() for worker in workers]
    return CorunPoint(
        tuple(
            CorunMember(
                seat.name,
                seat.gpu_percent,
                seat.batch_size,
                answer["latency_ms_p50"],
                answer["throughput_per_s"],
            )
            for seat, answer in zip(seats, answers, strict=True)
        )
    )
