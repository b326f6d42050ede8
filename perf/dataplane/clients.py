"""Load for the study: perf_analyzer in closed loop, and clients of ours that check every answer."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import tritonclient.grpc as grpc
from tritonclient.utils import InferenceServerException

from dataplane.references import TOLERANCE, relative_error
from dataplane.server import Server, outputs_of, request_inputs
from dstack_sched.adapters.perf_analyzer import example_request, find_perf_analyzer
from dstack_sched.errors import MachineError

WINDOWS = 3  # perf_analyzer prints no summary of fewer
WINDOW_S = 0.7
RUN_LIMIT_S = 30.0
REQUEST_LIMIT_S = 5.0
DRAIN_S = 2.0
FAILURE_PAUSE_S = 0.02  # of a closed loop: a server that refuses at once must not be hammered
CUDA_CLIENT = Path(__file__).with_name("shm_client.py")
FIGURES = {
    "rows_per_s": r"Throughput: ([\d.]+) infer/sec",
    "latency_us_p50": r"p50 latency: (\d+) usec",
    "latency_us_p99": r"p99 latency: (\d+) usec",
}


@dataclass(frozen=True, slots=True)
class ClosedLoop:
    """How a model was driven, and what came of it. rows_per_s counts rows, not requests."""

    client: str
    shared_memory: str
    client_batch: int
    concurrency: int
    rows_per_s: float
    latency_ms_p50: float
    latency_ms_p99: float

    def as_dict(self) -> dict[str, Any]:
        return {
            key: round(value, 4) if isinstance(value, float) else value for key, value in asdict(self).items()
        }


def perf_analyzer(
    server: Server,
    model: str,
    *,
    concurrency: int,
    client_batch: int = 1,
    shared_memory: str = "system",
    window_s: float = WINDOW_S,
) -> ClosedLoop:
    """`concurrency` requests of `client_batch` rows each always under way. Errors: MachineError."""
    config = server.client.config(model)
    with tempfile.TemporaryDirectory(prefix="dp-load-") as directory:
        data = Path(directory) / "data.json"
        data.write_text(json.dumps({"data": [example_request(config, {})]}))
        command = [
            str(find_perf_analyzer()), "-m", model, "-i", "grpc", "-u", server.grpc_url, "--async",
            "--shared-memory", shared_memory, "--output-shared-memory-size", str(row_bytes(config)),
            "--input-data", str(data), "-b", str(client_batch), "--concurrency-range", str(concurrency),
            "--measurement-interval", str(int(window_s * 1000)), "--max-trials", str(WINDOWS),
            "--stability-percentage", "100000",
        ]  # fmt: skip
        environment = server.client_environment()
        if shared_memory == "cuda":
            links = cuda_runtime_by_plain_name(Path(directory))
            environment["LD_LIBRARY_PATH"] = f"{links}:{environment.get('LD_LIBRARY_PATH', '')}"
        run = run_limited(server, model, command, environment)
    said = run.stdout + run.stderr
    found = {key: re.search(pattern, said) for key, pattern in FIGURES.items()}
    if run.returncode or not all(found.values()):
        lines = [line.strip() for line in said.splitlines() if line.strip()]
        raise MachineError(f"{model}: perf_analyzer ({run.returncode}): {' / '.join(lines[-3:])[:400]}")
    value = {key: float(match.group(1)) for key, match in found.items() if match}
    return ClosedLoop(
        "perf_analyzer", shared_memory, client_batch, concurrency, value["rows_per_s"],
        value["latency_us_p50"] / 1e3, value["latency_us_p99"] / 1e3,
    )  # fmt: skip


def run_limited(
    server: Server, model: str, command: list[str], environment: Mapping[str, str]
) -> subprocess.CompletedProcess[str]:
    """Run perf_analyzer. On a machine that is busy it hangs now and then at its own end: once more then, but
    only where Triton owes it no answer. Errors: MachineError, with what hangs."""
    for last in (False, True):
        try:
            return subprocess.run(
                command, capture_output=True, text=True, timeout=RUN_LIMIT_S, env=environment
            )
        except subprocess.TimeoutExpired as error:
            server.say_where()
            said = (error.stdout or b"").decode(errors="replace").strip().splitlines()[-1:]
            owed = pending(server, model)
            if last or owed:
                raise MachineError(
                    f"{model}: perf_analyzer took more than {RUN_LIMIT_S:g} s; its last words: {said}; Triton"
                    f" owes it {owed} answers; the stubs' stacks are in Triton's log"
                ) from None
    raise AssertionError


def pending(server: Server, model: str) -> int:
    """Requests that Triton has taken for a model and not answered."""
    values = server.metrics()
    return int(
        sum(v for key, v in values.items() if key[:2] == ("nv_inference_pending_request_count", model))
    )


def row_bytes(config: Mapping[str, Any]) -> int:
    """Bytes of the largest output, one row; 8 bytes an element bound every type."""
    return max(8 * int(np.prod([max(1, int(dim)) for dim in output["dims"]])) for output in config["output"])


def cuda_runtime_by_plain_name(directory: Path) -> Path:
    """perf_analyzer opens "libcudart.so", which wheels ship under its versioned name only: a folder with a
    link of that name. Errors: MachineError."""
    folders = [Path(each) for each in os.environ.get("LD_LIBRARY_PATH", "").split(":") if each]
    folders += [Path(each) / "nvidia" / "cu13" / "lib" for each in sys.path if each]
    for pattern in ("libcudart.so.13*", "libcudart.so*"):
        for folder in folders:
            found = sorted(folder.glob(pattern))
            if found:
                link = directory / "libcudart.so"
                link.symlink_to(found[-1].resolve())
                return directory
    raise MachineError("no CUDA runtime library (libcudart.so.13) on LD_LIBRARY_PATH")


def shm_client(
    server: Server, model: str, path: Path, *, concurrency: int, rows: int, memory: str, seconds: float
) -> tuple[ClosedLoop, float]:
    """Our own client with system or CUDA shared memory, in a process of its own (shm_client.py).

    Returns what it measured and the relative error of the answers. Errors: MachineError.
    """
    command = [
        sys.executable, str(CUDA_CLIENT), server.grpc_url, model, str(path), "--memory", memory,
        "--rows", str(rows), "--concurrency", str(concurrency), "--seconds", str(seconds),
    ]  # fmt: skip
    try:
        run = subprocess.run(
            command,
            capture_output=True,
            text=True,
            timeout=seconds + RUN_LIMIT_S,
            env=server.client_environment(),
        )
    except subprocess.TimeoutExpired:
        raise MachineError(f"{model}: the {memory} shared memory client hangs") from None
    if run.returncode:
        lines = [line.strip() for line in run.stderr.splitlines() if line.strip()] or ["it said nothing"]
        raise MachineError(f"{model}: {memory} shared memory client: {lines[-1][:300]}")
    found = json.loads(run.stdout.splitlines()[-1])
    loop = ClosedLoop(
        "shm_client.py", memory, rows, concurrency, found["rows_per_s"],
        found["latency_ms_p50"], found["latency_ms_p99"],
    )  # fmt: skip
    return loop, float(found["relative_error"])


@dataclass
class Checked:
    """What the requests to one model came to: (sent, ended) of each, time.monotonic() seconds, by sending."""

    model: str
    sent: list[float] = field(default_factory=list)
    answered: list[tuple[float, float]] = field(default_factory=list)
    failed: list[tuple[float, float]] = field(default_factory=list)
    wrong: int = 0
    worst_error: float = 0.0
    first_failure: str = ""

    def well_since(self, since_s: float) -> bool:
        """Whether requests were sent after a time and nine of ten of them are answered right by now."""
        sent = sum(at > since_s for at in self.sent)
        return sent > 0 and sum(at > since_s for at, _ in self.answered) >= 0.9 * sent

    def last_failure_sent_s(self) -> float:
        """When the last request that failed was sent; 0: none failed."""
        return max((sent for sent, _ in self.failed), default=0.0)


class CheckedClients:
    """A thread a model sends the same request over and over; each answer is compared with what is expected.

    under_way: requests of a model that may wait for their answers at once. pause_s: between two requests;
    with a pause and many under way the load stays the same whatever the server does. Failures are counted
    and the load goes on. limit_s: for one request; one that runs into it is cancelled, which can crash
    Triton 2.51 (server issue 7368). Started when made; `stop`, then read `clients`.
    """

    def __init__(
        self,
        url: str,
        expected: Mapping[str, tuple[Mapping[str, np.ndarray], Mapping[str, np.ndarray]]],
        *,
        under_way: int = 1,
        pause_s: float = 0.0,
        limit_s: float = REQUEST_LIMIT_S,
    ) -> None:
        self._url, self._expected, self._limit_s = url, expected, limit_s
        self._under_way, self._pause_s = under_way, pause_s
        self._stop = threading.Event()
        self.clients = {model: Checked(model) for model in expected}
        self._threads = [
            threading.Thread(target=self._run, args=(seen,), daemon=True) for seen in self.clients.values()
        ]
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """End; what is under way has a moment to be answered, the rest is cancelled and has failed."""
        self._stop.set()
        for thread in self._threads:
            thread.join(4 * DRAIN_S)
        time.sleep(FAILURE_PAUSE_S)

    def _run(self, seen: Checked) -> None:
        feeds, wanted = self._expected[seen.model]
        places = threading.Semaphore(self._under_way)
        with grpc.InferenceServerClient(self._url) as client:
            inputs = request_inputs(feeds)
            while not self._stop.is_set():
                if places.acquire(timeout=0.1):
                    seen.sent.append(time.monotonic())
                    ended = partial(self._ended, seen, wanted, seen.sent[-1], places)
                    client.async_infer(seen.model, inputs, ended, client_timeout=self._limit_s)
                    if self._pause_s:
                        self._stop.wait(self._pause_s)
            until = time.monotonic() + DRAIN_S
            for _ in range(self._under_way):
                places.acquire(timeout=max(0.0, until - time.monotonic()))

    def _ended(
        self,
        seen: Checked,
        wanted: Mapping[str, np.ndarray],
        sent_s: float,
        places: threading.Semaphore,
        result: grpc.InferResult | None,
        error: InferenceServerException | None,
    ) -> None:
        """One answer; called by the client's thread, one at a time."""
        times_s = (sent_s, time.monotonic())
        if error is not None or result is None:
            seen.failed.append(times_s)
            seen.first_failure = seen.first_failure or " ".join(str(error).split())[:200]
            if not self._pause_s:
                self._stop.wait(FAILURE_PAUSE_S)
        else:
            error_now = relative_error(outputs_of(result), wanted)
            seen.worst_error = max(seen.worst_error, error_now)
            if error_now > TOLERANCE:
                seen.wrong += 1
            else:
                seen.answered.append(times_s)
        places.release()


def totals(loads: CheckedClients) -> dict[str, Any]:
    """Requests answered, failed and wrong, over all models."""
    clients = list(loads.clients.values())
    return {
        "answered": sum(len(seen.answered) for seen in clients),
        "failed": sum(len(seen.failed) for seen in clients),
        "wrong_answers": sum(seen.wrong for seen in clients),
        "worst_relative_error": max(seen.worst_error for seen in clients),
        "first_failure": next((seen.first_failure for seen in clients if seen.first_failure), ""),
    }
