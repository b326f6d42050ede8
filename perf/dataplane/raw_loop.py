"""What ONNX Runtime alone can do: a loop with I/O binding, in a process without any of our runtime.

    python perf/dataplane/raw_loop.py MODEL.onnx --provider cuda --batches 1,16 --seconds 1

Inputs and outputs are bound once to device buffers and the session replays its CUDA graph where it can
capture one, with convolutions in channels-first or channels-last layout, whichever is faster. Two modes:
"device", the run alone on inputs that lie on the device, waited for batch by batch; "copies", the same
between a copy from pinned host memory and a copy back into pinned host memory, all on one stream; "pauses",
at batch size 1, as "device" with a pause before each run, as between the requests of one client. On the CPU
provider there is no "copies". Says {"ready": true}, waits for a line on stdin, then measures and prints
{"1": {"device": {...}, "copies": {...}, "cuda_graph": true, "layout": "nhwc", "layouts_ms": {...}}, ...}.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort

from dstack_backend.synthetic import feeds as made_up
from dstack_backend.tensors import TensorSpec

WARM_UP_S = 0.2
RUNS_TO_CAPTURE = 4
AGREEMENT = 2e-2
TRIAL_S = 0.15
PAUSE_S = 0.5e-3


def specs(nodes: Any) -> list[TensorSpec]:
    return [
        TensorSpec(n.name, n.type, tuple(d if isinstance(d, int) else None for d in n.shape)) for n in nodes
    ]


def cpu_session(path: Path, threads: int) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


class CpuLoop:
    """The CPU provider, bound to host memory: for trying the study out."""

    graph, layout = False, "nchw"

    def __init__(self, path: Path, batch: int) -> None:
        self._session = cpu_session(path, threads=len(os.sched_getaffinity(0)))
        self._binding = self._session.io_binding()
        for name, array in made_up(specs(self._session.get_inputs()), batch, {}).items():
            self._binding.bind_cpu_input(name, array)
        for node in self._session.get_outputs():
            self._binding.bind_output(node.name)

    def modes(self) -> dict[str, Callable[[], None]]:
        return {"device": lambda: self._session.run_with_iobinding(self._binding)}


class CudaLoop:
    """The CUDA provider on a stream of torch's, which also gives the buffers, on the device and pinned."""

    def __init__(self, path: Path, batch: int, layout: str) -> None:
        import torch

        self._torch, self._path, self.layout = torch, path, layout
        self._stream = torch.cuda.Stream()
        reference = cpu_session(path, threads=4)
        feeds = made_up(specs(reference.get_inputs()), batch, {})
        wanted = reference.run(None, feeds)
        self._inputs = {name: self._buffers(array) for name, array in feeds.items()}
        self._outputs = {
            node.name: self._buffers(np.zeros_like(array))
            for node, array in zip(reference.get_outputs(), wanted, strict=True)
        }
        self._options = ort.RunOptions()
        self._options.add_run_config_entry("disable_synchronize_execution_providers", "1")
        try:
            self._session, self.graph = self._open(graphs=True), True
            self._bind()
            for _ in range(RUNS_TO_CAPTURE):
                self.with_copies()
        except Exception as error:  # a model that cannot be captured runs plainly
            print(f"{path.name}: no CUDA graph: {' '.join(str(error).split())[:200]}", file=sys.stderr)
            self._session, self.graph = self._open(graphs=False), False
            self._bind()
        self._check(wanted)

    def _open(self, *, graphs: bool) -> ort.InferenceSession:
        options = ort.SessionOptions()
        options.intra_op_num_threads = 1
        options.log_severity_level = 3
        provider = {
            "device_id": 0,
            "user_compute_stream": str(self._stream.cuda_stream),
            "cudnn_conv_algo_search": "HEURISTIC",  # as the backend's default, as TF32 is
            "prefer_nhwc": int(self.layout == "nhwc"),
            "enable_cuda_graph": int(graphs),
        }
        session = ort.InferenceSession(
            str(self._path), options, providers=[("CUDAExecutionProvider", provider)], enable_fallback=False
        )
        if session.get_providers()[0] != "CUDAExecutionProvider":
            raise RuntimeError("the CUDA provider did not start")
        return session

    def _buffers(self, array: np.ndarray) -> tuple[Any, Any, Any]:
        """(pinned host tensor, device tensor, numpy type)."""
        host = self._torch.from_numpy(np.ascontiguousarray(array)).pin_memory()
        return host, host.to("cuda"), array.dtype.type

    def _bind(self) -> None:
        self._binding = self._session.io_binding()
        for name, (_, device, dtype) in self._inputs.items():
            self._binding.bind_input(name, "cuda", 0, dtype, tuple(device.shape), device.data_ptr())
        for name, (_, device, dtype) in self._outputs.items():
            self._binding.bind_output(name, "cuda", 0, dtype, tuple(device.shape), device.data_ptr())

    def _check(self, wanted: list[np.ndarray]) -> None:
        """Raises RuntimeError unless a bound run answers as the CPU does; old outputs are wiped before."""
        for host, device, _ in self._outputs.values():
            device.fill_(float("nan") if device.is_floating_point() else -1)
            host.zero_()
        self._torch.cuda.synchronize()
        self.with_copies()
        for (host, _, _), want in zip(self._outputs.values(), wanted, strict=True):
            got = host.numpy().astype(np.float64)
            error = np.linalg.norm(got - want) / (np.linalg.norm(want.astype(np.float64)) + 1e-12)
            if not error < AGREEMENT:
                raise RuntimeError(f"{self._path.name}: the bound run is wrong by {error:.2g}")

    def on_device(self) -> None:
        self._session.run_with_iobinding(self._binding, self._options)
        self._stream.synchronize()

    def with_copies(self) -> None:
        with self._torch.cuda.stream(self._stream):
            for host, device, _ in self._inputs.values():
                device.copy_(host, non_blocking=True)
            self._session.run_with_iobinding(self._binding, self._options)
            for host, device, _ in self._outputs.values():
                host.copy_(device, non_blocking=True)
        self._stream.synchronize()

    def modes(self) -> dict[str, Callable[[], None]]:
        return {"device": self.on_device, "copies": self.with_copies}


def measure(run: Callable[[], None], batch: int, seconds: float, pause_s: float = 0.0) -> dict[str, float]:
    """Closed loop: median and 99th percentile in ms, rows a second."""
    until = time.perf_counter() + WARM_UP_S
    while time.perf_counter() < until:
        run()
    samples_ms = []
    began = time.perf_counter()
    while (before := time.perf_counter()) < began + seconds or not samples_ms:
        if pause_s:
            time.sleep(pause_s)
            before = time.perf_counter()
        run()
        samples_ms.append((time.perf_counter() - before) * 1e3)
    took_s = time.perf_counter() - began
    return {
        "latency_ms_p50": round(float(np.percentile(samples_ms, 50)), 4),
        "latency_ms_p99": round(float(np.percentile(samples_ms, 99)), 4),
        "rows_per_s": round(batch * len(samples_ms) / took_s, 1),
        "samples": len(samples_ms),
    }


def cpu_loops(path: Path, batch: int, layouts: Sequence[str]) -> list[Any]:
    return [CpuLoop(path, batch)]


def cuda_loops(path: Path, batch: int, layouts: Sequence[str]) -> list[Any]:
    """In these layouts; one that does not work or is wrong is said and left out, but not both."""
    loops = []
    graph = onnx.load(str(path), load_external_data=False).graph
    if not any(node.op_type == "Conv" for node in graph.node):
        layouts = layouts[:1]
    for layout in layouts:
        try:
            loops.append(CudaLoop(path, batch, layout))
        except Exception as error:  # the other layout may do, and if not, the last error is raised below
            print(f"{path.name}, {layout}: {' '.join(str(error).split())[:200]}", file=sys.stderr)
            if layout == layouts[-1] and not loops:
                raise
    return loops


def best_of(loops: list[Any], batch: int, seconds: float) -> dict[str, Any]:
    """All modes of the loop that is fastest in a short trial."""
    trial_ms = {
        loop.layout: measure(loop.modes()["device"], batch, TRIAL_S)["latency_ms_p50"] for loop in loops
    }
    loop = min(loops, key=lambda each: trial_ms[each.layout])
    found = {mode: measure(run, batch, seconds) for mode, run in loop.modes().items()}
    if batch == 1:
        found["pauses"] = measure(loop.modes()["device"], batch, seconds, PAUSE_S)
    return {**found, "cuda_graph": loop.graph, "layout": loop.layout, "layouts_ms": trial_ms}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--provider", choices=["cuda", "cpu"], required=True)
    parser.add_argument("--batches", default="1,16")
    parser.add_argument("--layouts", default="nchw,nhwc", help="of convolutions, to try")
    parser.add_argument("--seconds", type=float, default=1.0)
    options = parser.parse_args()
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # libraries that print must not get between the lines
    make = cuda_loops if options.provider == "cuda" else cpu_loops
    layouts = options.layouts.split(",")
    loops = {batch: make(options.model, batch, layouts) for batch in map(int, options.batches.split(","))}
    print(json.dumps({"ready": True}), file=answers, flush=True)
    sys.stdin.readline()
    found = {str(batch): best_of(each, batch, options.seconds) for batch, each in loops.items()}
    print(json.dumps(found), file=answers, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
