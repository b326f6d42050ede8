"""ONNX Runtime on a CUDA device: bound buffers, pinned staging, one CUDA graph a batch-size bucket.

Where a model's shapes are fixed but for the batch, each bucket owns its device buffers; a batch is padded up
to the next bucket, and its rows alone are copied in and out. Everything of a batch goes through one stream,
so one wait at the end is enough. CUDA graphs are used where a trial at load shows that the model allows them
and that their outputs agree with a plain run. Other models take ONNX Runtime's own path.

Each captured graph has an ONNX Runtime session of its own. With several graphs in one session a convolution
drops its cuDNN plan when the batch size changes, and the kernels that cuDNN compiled for it with it: the
graph captured before then replays unloaded code (seen on an H100 with MobileNetV2: "illegal instruction").

ONNX Runtime keeps captured graphs by thread: warm up in the thread that will run.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort

from dstack_backend.cuda_driver import Driver, driver
from dstack_backend.errors import DeviceError, ModelError, RunError, one_line
from dstack_backend.runtime import CpuBatch, on_host, open_onnx, rows_of, session_options, specs_of
from dstack_backend.session import Staged, TwoPhases
from dstack_backend.staging import aligned
from dstack_backend.tensors import Feed, TensorSpec

log = logging.getLogger("dstack")

MPS_PERCENT = "CUDA_MPS_ACTIVE_THREAD_PERCENTAGE"
NO_GRAPH = "-1"  # gpu_graph_id of runs that neither capture nor replay
RUNS_TO_CAPTURE = 3  # ONNX Runtime captures within its first runs of an id
AGREEMENT = 0.02  # largest relative difference of graph and plain run, by norm: algorithms may differ (TF32)


@dataclass(frozen=True, slots=True)
class CudaOptions:
    """How a model runs on the GPU.

    cuda_graphs: try them. tf32: let FP32 matrix products use TF32, ONNX Runtime's default.
    conv_algo_search: HEURISTIC loads fast and the same everywhere; EXHAUSTIVE benchmarks while loading.
    memory_limit_bytes: bound of ONNX Runtime's arena, 0 for none.
    """

    cuda_graphs: bool = True
    tf32: bool = True
    conv_algo_search: str = "HEURISTIC"
    memory_limit_bytes: int = 0

    def __post_init__(self) -> None:
        if self.conv_algo_search not in ("HEURISTIC", "EXHAUSTIVE", "DEFAULT"):
            raise ModelError(
                f"conv_algo_search {self.conv_algo_search!r}: HEURISTIC, EXHAUSTIVE or DEFAULT is wanted"
            )


def bucket_of(rows: int) -> int:
    """The batch size that `rows` are padded up to: 1, 2, 3, 4, 6, 8, 12, 16, 24, 32, ..."""
    power = 1 << (rows - 1).bit_length()
    return power * 3 // 4 if power >= 4 and rows <= power * 3 // 4 else power


def load_cuda_session(
    model_path: Path, gpu_percent: float, device_id: int, options: CudaOptions
) -> CudaSession:
    """Load a model on a device at a GPU%, which is that of the whole process from now on.

    Raises ModelError, DeviceError.
    """
    limit_process(gpu_percent)
    return CudaSession(model_path, gpu_percent, device_id, options)


def limit_process(gpu_percent: float) -> None:
    """Set this process's MPS limit before its CUDA context is made. Raises DeviceError if it has another."""
    wanted = f"{gpu_percent:g}"
    if os.environ.setdefault(MPS_PERCENT, wanted) != wanted:
        raise DeviceError(
            f"gpu_percent {wanted} asked of a process that runs at {os.environ[MPS_PERCENT]}: MPS fixes it "
            f"when the process starts; unset {MPS_PERCENT} or load the model in a process of its own"
        )


class CudaSession(TwoPhases):
    """A model on one CUDA device, with a stream of its own. One call at a time."""

    def __init__(self, model_path: Path, gpu_percent: float, device_id: int, options: CudaOptions):
        self.levels: tuple[float, ...] = ()
        self.groups = self.device_bytes = 0
        self._gpu_percent = gpu_percent
        self._driver = driver(device_id)
        self._device_id = device_id
        self._path, self._options = model_path, options
        self._stream = self._driver.stream()
        self._buckets: dict[int, Bucket] = {}
        self.pinned: dict[int, np.ndarray] = {}  # by address: the memory that allocate() has given out
        try:
            self._session = self._open(graphs=False)
            self.inputs, self.outputs = specs_of(self._session, model_path)
        except Exception:
            self._driver.destroy_stream(self._stream)
            raise
        self._names = [spec.name for spec in self.outputs]
        self._bound = all(_batch_only(spec) for spec in (*self.inputs, *self.outputs))
        self._graphs = options.cuda_graphs and self._bound

    @property
    def graphs(self) -> int:
        return len(self._buckets) if self._graphs else 0

    def _open(self, *, graphs: bool) -> Any:
        provider: dict[str, Any] = {
            "device_id": self._device_id,
            "user_compute_stream": str(self._stream),
            "cudnn_conv_algo_search": self._options.conv_algo_search,
            "arena_extend_strategy": "kSameAsRequested",
            "use_tf32": int(self._options.tf32),
            "enable_cuda_graph": int(graphs),
        }
        if self._options.memory_limit_bytes:
            provider["gpu_mem_limit"] = self._options.memory_limit_bytes
        session = session_options()
        session.intra_op_num_threads = 1  # nodes on the CPU are few and small
        return open_onnx(self._path, [("CUDAExecutionProvider", provider)], session)

    def warm_up(self, batch_sizes: Sequence[int]) -> None:
        """Prepare the buckets of these batch sizes, in the thread that will run them. Raises RunError."""
        for rows in sorted({bucket_of(size) for size in batch_sizes if size > 0}):
            self._bucket(rows)

    def forget(self) -> None:
        """Give the buckets' memory back; one that is needed again is made again. For measuring many sizes."""
        for bucket in self._buckets.values():
            bucket.close()
        self._buckets.clear()

    def allocate(self, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
        """As Session.allocate: page-locked where inputs are copied to buffers of ours, so that run() need not
        copy them on the host. Any thread may call it. Freed by close()."""
        if not self._bound or np.dtype(dtype).hasobject:
            return aligned(shape, dtype)
        array = self._driver.allocate_pinned(shape, np.dtype(dtype))
        self.pinned[array.ctypes.data] = array
        return array

    def stage(self, feeds: Mapping[str, Feed]) -> CpuBatch:
        """As Session.stage."""
        arrays = {name: on_host(name, feed) for name, feed in feeds.items()}
        return CpuBatch(arrays, rows_of(arrays), self._gpu_percent)

    def launch(
        self,
        staged: Staged,
        outputs: Sequence[str] | None = None,
        *,
        device_outputs: Sequence[str] = (),
        gpu_percent: float | None = None,
        sm_groups: int = 0,
    ) -> CpuBatch:
        """As Session.launch."""
        assert isinstance(staged, CpuBatch) and not device_outputs
        names = list(outputs or self._names)
        feeds, rows = staged.feeds, staged.rows
        try:
            bound = rows and self._bound and len(feeds) == len(self.inputs)
            bucket = self._bucket(bucket_of(rows)) if bound else None
            started_ns = time.perf_counter_ns()
            staged.arrays = (
                bucket.run(feeds, names, rows) if bucket else self._session.run(names, dict(feeds))
            )
            run_us = (time.perf_counter_ns() - started_ns) // 1000
            staged.times_us = {"copy_in": 0, "run": run_us, "copy_out": 0}
            return staged
        except Exception as error:
            raise RunError(one_line(error)) from error

    def _bucket(self, size: int) -> Bucket | None:
        """The buffers of a batch size, made on first use; None where the model cannot be bound to any."""
        bucket = self._buckets.get(size)
        if bucket is not None or not self._bound:
            return bucket
        plain = Bucket(self._session, self._driver, self._stream, self._device_id, self, size)
        self._bound = plain.agrees()
        graph = self._with_graph(plain) if self._bound and self._graphs else None
        if graph is not None:
            plain.close()
        elif self._bound:
            plain.keep_plain()
        else:
            plain.close()
            return None
        self._buckets[size] = graph or plain
        return self._buckets[size]

    def _with_graph(self, plain: Bucket) -> Bucket | None:
        """The bucket with a captured graph, None where the model does not allow one (then for good)."""
        graph = None
        try:
            session = self._open(graphs=True)
            graph = Bucket(session, self._driver, self._stream, self._device_id, self, plain.size)
            graph.capture()
            if graph.agrees(plain):
                return graph
            reason = "its outputs differ from a plain run"
        except Exception as error:  # whatever ONNX Runtime cannot capture, a plain run can still do
            reason = one_line(error)
        log.warning("%s: no CUDA graph at batch size %d: %s", self._path, plain.size, reason)
        self._graphs = False
        if graph is not None:
            graph.close()
        return None

    def close(self) -> None:
        """Give the device memory back."""
        self.forget()
        for array in self.pinned.values():
            self._driver.free_pinned(array)
        self.pinned.clear()
        if self._stream:
            self._session = None
            self._driver.destroy_stream(self._stream)
            self._stream = 0


class Bucket:
    """The buffers of one batch size, bound once, and its CUDA graph if there is one."""

    def __init__(
        self, session: Any, cuda: Driver, stream: int, device_id: int, model: CudaSession, size: int
    ) -> None:
        self.size = size
        self._session, self._driver, self._stream = session, cuda, stream
        self._pinned = model.pinned
        self._binding = session.io_binding()
        self._options = _run_options(NO_GRAPH, shrink_device=device_id)  # on trial: keep no memory
        self._inputs = {spec.name: Buffer(cuda, spec, size) for spec in model.inputs}
        self._outputs = {spec.name: Buffer(cuda, spec, size) for spec in model.outputs}
        for name, buffer in self._inputs.items():
            self._binding.bind_input(name, "cuda", device_id, buffer.dtype, buffer.shape, buffer.device)
        for name, buffer in self._outputs.items():
            self._binding.bind_output(name, "cuda", device_id, buffer.dtype, buffer.shape, buffer.device)

    def run(self, feeds: Mapping[str, np.ndarray], names: Sequence[str], rows: int) -> list[np.ndarray]:
        """Copy rows in, run, copy rows out, wait. The arrays returned are the caller's own."""
        self._driver.use()
        for name, array in feeds.items():
            buffer = self._inputs[name]
            if array.ctypes.data in self._pinned and array.dtype == buffer.dtype:
                staged = array  # gathered there already
            else:
                staged = buffer.host[:rows]
                np.copyto(staged, array, casting="no")
            self._driver.to_device(buffer.device, staged.ctypes.data, staged.nbytes, self._stream)
        self._session.run_with_iobinding(self._binding, self._options)
        for name in names:
            buffer = self._outputs[name]
            staged = buffer.host[:rows]
            self._driver.to_host(staged.ctypes.data, buffer.device, staged.nbytes, self._stream)
        self._driver.wait(self._stream)
        return [self._outputs[name].host[:rows].copy() for name in names]

    def keep_plain(self) -> None:
        """The trial is over and no graph came of it: run without giving the memory back each time."""
        self._options = _run_options(NO_GRAPH)

    def capture(self) -> None:
        """Run until ONNX Runtime has captured its graph: from then on it replays."""
        self._options = _run_options(str(self.size))
        for _ in range(RUNS_TO_CAPTURE):
            self.run(self.samples(), list(self._outputs), self.size)

    def samples(self) -> dict[str, np.ndarray]:
        """Random inputs, the same for every bucket of this size."""
        rng = np.random.default_rng(self.size)
        return {name: buffer.sample(rng) for name, buffer in self._inputs.items()}

    def agrees(self, other: Bucket | None = None) -> bool:
        """Whether a run answers as the other bucket does; without one, as ONNX Runtime's own path does.

        It does not where the first dimension of an output is not the batch.
        """
        feeds, names = self.samples(), list(self._outputs)
        try:
            answer = self.run(feeds, names, self.size)
        except Exception as error:  # shapes that do not fit the buffers: the model takes the other path
            log.info("outputs are not one row a row of the batch: %s", one_line(error))
            return False
        wanted = (
            other.run(feeds, names, self.size) if other else self._session.run(names, feeds, self._options)
        )
        return all(a.shape == b.shape and _agree(a, b) for a, b in zip(wanted, answer, strict=True))

    def close(self) -> None:
        self._binding = self._session = None
        for buffer in (*self._inputs.values(), *self._outputs.values()):
            buffer.close()


class Buffer:
    """One tensor of a bucket: device memory and its pinned host twin, shape (size, ...)."""

    def __init__(self, cuda: Driver, spec: TensorSpec, size: int):
        self.dtype = spec.numpy_dtype
        self.shape = (size, *(int(dim) for dim in spec.shape[1:] if dim is not None))
        self._driver = cuda
        self.device = cuda.allocate(int(np.prod(self.shape)) * self.dtype.itemsize)
        self.host = cuda.allocate_pinned(self.shape, self.dtype)

    def sample(self, rng: np.random.Generator) -> np.ndarray:
        """Random inputs that suit most models: unit reals, and zeros and ones for integers (ids, masks)."""
        if self.dtype.kind == "f":
            return rng.random(self.shape, dtype=np.float64).astype(self.dtype)
        return rng.integers(0, 2, self.shape).astype(self.dtype)

    def close(self) -> None:
        self._driver.free(self.device)
        self._driver.free_pinned(self.host)


def _batch_only(spec: TensorSpec) -> bool:
    """Whether the first dimension is the only dynamic one (and the type can live on a device)."""
    shape = spec.shape
    return (
        bool(shape)
        and shape[0] is None
        and all(dim is not None for dim in shape[1:])
        and spec.numpy_dtype.kind != "O"
        and not spec.optional
    )


def _agree(one: np.ndarray, other: np.ndarray) -> bool:
    if one.dtype.kind != "f":
        return bool(np.array_equal(one, other))
    a, b = one.astype(np.float64), other.astype(np.float64)
    return bool(np.linalg.norm(a - b) <= AGREEMENT * np.linalg.norm(a) + 1e-12)


def _run_options(graph_id: str, shrink_device: int | None = None) -> ort.RunOptions:
    """shrink_device: give the arena's free memory on this device back after each run."""
    options = ort.RunOptions()
    if shrink_device is not None:
        options.add_run_config_entry("memory.enable_memory_arena_shrinkage", f"gpu:{shrink_device}")
    options.add_run_config_entry("gpu_graph_id", graph_id)
    # Our own wait behind the copies out is the only one needed.
    options.add_run_config_entry("disable_synchronize_execution_providers", "1")
    return options
