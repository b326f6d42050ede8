"""perf_analyzer as a load generator: a process a model, arrival times of ours, latencies from its export."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from dstack_backend import synthetic
from dstack_backend.tensors import TensorSpec
from dstack_sched.adapters.triton_connection import ConnectionOptions
from dstack_sched.domain.load import LoadTrace
from dstack_sched.errors import InputError, MachineError

PROGRAM = "perf_analyzer"
ONNX_TYPES = {
    "TYPE_BOOL": "tensor(bool)",
    "TYPE_UINT8": "tensor(uint8)",
    "TYPE_UINT16": "tensor(uint16)",
    "TYPE_UINT32": "tensor(uint32)",
    "TYPE_UINT64": "tensor(uint64)",
    "TYPE_INT8": "tensor(int8)",
    "TYPE_INT16": "tensor(int16)",
    "TYPE_INT32": "tensor(int32)",
    "TYPE_INT64": "tensor(int64)",
    "TYPE_FP16": "tensor(float16)",
    "TYPE_FP32": "tensor(float)",
    "TYPE_FP64": "tensor(double)",
    "TYPE_STRING": "tensor(string)",
}
# It only sends; answers come in asynchronously. Of several senders one alone may miss its start (see
# again_if_silent in app/bench.py), and its requests would look like those that a server never answers.
SENDERS = 1
# What it keeps of each request until it ends: three copies of the inputs; later versions write every value to
# the export as a number, which takes this many bytes more each (decision 0121). None with shared memory.
COPIES = 3
BYTES_A_NUMBER = 20
MOST_MEMORY = 0.5  # of what is free
KEEPS_COPIES_ONLY = re.compile(r"Version 2\.(?:[0-3]?\d|4[0-8])\.")


def find_perf_analyzer(environ: Mapping[str, str] = os.environ) -> Path:
    """$PERF_ANALYZER, else the one beside our Python, else the one on PATH. Errors: MachineError."""
    named = environ.get("PERF_ANALYZER")
    beside = Path(sys.executable).parent / PROGRAM
    on_path = shutil.which(PROGRAM, path=environ.get("PATH"))
    for candidate in (named, beside, on_path):
        if candidate and os.access(candidate, os.X_OK):
            return Path(candidate)
    raise MachineError(
        f"{PROGRAM} is missing; run make setup, or set PERF_ANALYZER to the program"
        + (f" (it names {named}, which cannot be run)" if named else "")
    )


@dataclass(frozen=True)
class LoadOptions:
    """How requests travel. shapes: model -> input -> dimensions without the batch. data: model -> file.
    names: model -> its name at the server, where that is another. environment: added to perf_analyzer's.

    connection: headers go over HTTP only (perf_analyzer sends none over gRPC), TLS over gRPC only.
    """

    url: str
    protocol: str = "grpc"
    connection: ConnectionOptions | None = None
    shared_memory: str = "none"
    shapes: Mapping[str, Mapping[str, Sequence[int]]] = field(default_factory=dict)
    data: Mapping[str, Path] = field(default_factory=dict)
    names: Mapping[str, str] = field(default_factory=dict)
    environment: Mapping[str, str] = field(default_factory=dict)


class PerfAnalyzerLoad:
    """app.bench.LoadGenerator. A context manager: its files go, and what still runs is killed, at the end.

    configs: model -> its Triton configuration in force, from which inputs are made up.
    """

    def __init__(self, program: Path, options: LoadOptions, configs: Mapping[str, Mapping[str, Any]]) -> None:
        self._program = program
        self._options = options
        self._configs = configs
        self._directory = Path(tempfile.mkdtemp(prefix="dstack-bench-"))
        self._runs: list[PerfAnalyzerRun] = []
        self._kept_bytes: dict[str, int] = {}  # of a request, by model
        self._numbers = not KEEPS_COPIES_ONLY.search(version_of(program))
        self._data = {model: self._input_data(model) for model in configs}

    def __enter__(self) -> PerfAnalyzerLoad:
        return self

    def __exit__(self, *_: object) -> None:
        for run in self._runs:
            run.kill()
        shutil.rmtree(self._directory, ignore_errors=True)

    def start(self, model: str, intervals_us: np.ndarray) -> PerfAnalyzerRun:
        """Send requests to `model`, one after each interval (whole microseconds, shape (requests,)).

        Errors: InputError where what perf_analyzer would keep of them does not fit the memory.
        """
        kept_bytes = len(intervals_us) * self._kept_bytes.get(model, 0)
        self._check_memory(model, len(intervals_us), kept_bytes)
        files = self._directory / f"{model}-{len(self._runs)}"
        files.mkdir()
        (files / "intervals").write_text("".join(f"{value}\n" for value in intervals_us.tolist()))
        command = self._command(model, files, len(intervals_us))
        run = PerfAnalyzerRun(command, files, kept_bytes, self._options.environment)
        self._runs.append(run)
        return run

    def _check_memory(self, model: str, requests: int, kept_bytes: int) -> None:
        free_bytes = available_bytes()
        others = sum(run.kept_bytes for run in self._runs if not run.ends_within(0.0))
        if free_bytes and kept_bytes + others > free_bytes * MOST_MEMORY:
            raise InputError(
                f"{model}: {PROGRAM} keeps the inputs of all its requests, {kept_bytes / 1e9:.1f} GB for "
                f"{requests} of them, and {free_bytes / 1e9:.1f} GB are free; use --shared-memory system "
                "(one model at a time), a shorter --seconds or a smaller --scale"
            )

    def _command(self, model: str, files: Path, requests: int) -> list[str]:
        options = self._options
        return [
            str(self._program), "-m", options.names.get(model, model),
            "-i", options.protocol, "-u", options.url, "--async",
            "--max-threads", str(SENDERS), "--shared-memory", options.shared_memory,
            "--request-intervals", str(files / "intervals"), "--request-count", str(requests),
            "--input-data", str(self._data[model]), "--profile-export-file", str(files / "export.json"),
            *_connection_arguments(options),
        ]  # fmt: skip

    def _input_data(self, model: str) -> Path:
        if model in self._options.data:
            return self._options.data[model]
        path = self._directory / f"{model}.json"
        request = example_request(self._configs[model], self._options.shapes.get(model, {}))
        if self._options.shared_memory == "none":
            self._kept_bytes[model] = kept_bytes_of(request, numbers=self._numbers)
        path.write_text(json.dumps({"data": [request]}))
        return path


def version_of(program: Path) -> str:
    """What it says of its version; "" where it says nothing."""
    try:
        said = subprocess.run([str(program), "--version"], capture_output=True, text=True, timeout=10.0)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return said.stdout + said.stderr


def available_bytes() -> int:
    """Memory that can be had without swapping; 0 where Linux does not tell."""
    try:
        text = Path("/proc/meminfo").read_text()
    except OSError:
        return 0
    found = re.search(r"^MemAvailable:\s+(\d+) kB", text, re.MULTILINE)
    return int(found[1]) * 1024 if found else 0


def kept_bytes_of(request: Mapping[str, Mapping[str, Any]], *, numbers: bool) -> int:
    """What perf_analyzer keeps of a request as `example_request` makes it. numbers: module constants."""
    kept = 0
    for tensor in request.values():
        elements = int(np.prod(tensor["shape"], dtype=np.int64))
        if "b64" in tensor:
            kept += COPIES * (len(tensor["b64"]) * 3 // 4) + (BYTES_A_NUMBER * elements if numbers else 0)
        else:
            kept += COPIES * sum(len(each) for each in tensor["content"])
    return kept


def _connection_arguments(options: LoadOptions) -> list[str]:
    connection = options.connection
    if connection is None:
        return []
    if options.protocol == "http":
        return [word for key, value in connection.headers.items() for word in ("-H", f"{key}:{value}")]
    if not connection.encrypted:
        return []
    files = {
        "root-certifications": connection.tls_ca,
        "private-key": connection.tls_key,
        "certificate-chain": connection.tls_cert,
    }
    named = [word for name, path in files.items() if path for word in (f"--ssl-grpc-{name}-file", str(path))]
    return ["--ssl-grpc-use-ssl", *named]


class PerfAnalyzerRun:
    """One running perf_analyzer."""

    def __init__(
        self, command: Sequence[str], files: Path, kept_bytes: int, environment: Mapping[str, str]
    ) -> None:
        self._files = files
        self.kept_bytes = kept_bytes
        with (files / "output").open("wb") as output:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env={**os.environ, **environment},
            )

    def ends_within(self, timeout_s: float) -> bool:
        """Whether it has ended, after waiting for that up to `timeout_s`."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(timeout_s)
        return self._process.poll() is not None

    def wait(self, timeout_s: float) -> LoadTrace:
        """What it did. A run that takes longer than `timeout_s` is killed."""
        try:
            status = self._process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            self.kill()
            late = f"{PROGRAM} was not done within {timeout_s:.0f} s, killed"
            return LoadTrace.cut(late, request_failed=False)
        if status != 0:
            return why(self._files / "output", status)
        return parse_export(self._files / "export.json")

    def kill(self) -> None:
        """End it now; safe to repeat."""
        if self._process.poll() is None:
            self._process.kill()
        self._process.wait()


def parse_export(path: Path) -> LoadTrace:
    """The requests of a profile export (JSON), in order of sending. Errors: MachineError (other format)."""
    try:
        text = path.read_bytes().decode("utf-8", "replace")  # it quotes outputs as they are, tensors too
        experiments = json.loads(text, strict=False)["experiments"]
        pairs = [
            (request["timestamp"], request["response_timestamps"][-1])
            for experiment in experiments
            for request in experiment["requests"]
            if request["response_timestamps"]
        ]
    except (OSError, ValueError, KeyError, TypeError, IndexError) as error:
        raise MachineError(f"{path}: not a perf_analyzer profile export ({str(error)[:80]})") from error
    times = np.array(sorted(pairs), dtype=np.int64).reshape(-1, 2)
    return LoadTrace(sent_s=times[:, 0] / 1e9, latency_ms=(times[:, 1] - times[:, 0]) / 1e6)


def why(output: Path, status: int) -> LoadTrace:
    """A stretch that ended early, with the first error that perf_analyzer printed: that of a request, if one
    failed, else its own. It prints one line a type warning, which say nothing."""
    lines = output.read_text(errors="replace").splitlines()
    for line in lines:
        match = re.match(r"\s*Thread \[\d+\] had error: (?P<message>.+)", line)
        if match:
            return LoadTrace.cut(match.group("message").strip(), request_failed=True)
    said = [line.strip() for line in lines if line.strip() and not line.startswith(("WARNING", "***"))]
    error = f"{PROGRAM} ended with status {status}: {said[-1] if said else 'no output'}"
    return LoadTrace.cut(error, request_failed=False)


def example_request(config: Mapping[str, Any], shapes: Mapping[str, Sequence[int]]) -> dict[str, Any]:
    """One request for perf_analyzer's --input-data, made up as the profiler makes its inputs up.

    config: Triton's model configuration. shapes: input -> dimensions without the batch, for those whose
    dimensions are dynamic. Errors: InputError.
    """
    batched = config["max_batch_size"] > 0
    specs = [input_spec(each, batched) for each in config["input"]]
    try:
        arrays = synthetic.feeds(specs, 1, shapes)
    except ValueError as error:
        raise InputError(f"{config['name']}: {error}") from error
    return {name: encoded(array[0] if batched else array) for name, array in arrays.items()}


def input_spec(declared: Mapping[str, Any], batched: bool) -> TensorSpec:
    """One input of a Triton configuration as the backend describes it, batch dimension in front."""
    if declared["data_type"] not in ONNX_TYPES:
        raise InputError(
            f"input {declared['name']!r}: cannot make up {declared['data_type']} data; give --input-data"
        )
    dims = tuple(int(dim) if int(dim) >= 0 else None for dim in declared["dims"])
    return TensorSpec(
        declared["name"],
        ONNX_TYPES[declared["data_type"]],
        (None, *dims) if batched else dims,
        optional=bool(declared.get("optional")),
    )


def encoded(array: np.ndarray) -> dict[str, Any]:
    """One tensor in perf_analyzer's JSON: raw bytes in base64, strings as they are."""
    shape = list(array.shape)
    if array.dtype == np.object_:
        return {"content": [str(each) for each in array.ravel()], "shape": shape}
    raw = np.ascontiguousarray(array).tobytes()
    return {"b64": base64.b64encode(raw).decode(), "shape": shape}
