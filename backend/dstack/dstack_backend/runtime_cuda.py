"""ONNX Runtime on a CUDA device: bound buffers, pinned staging, one CUDA graph a batch-size bucket.

Where a model's shapes are fixed but for the batch, each bucket owns its device buffers; a batch is padded up
to the next bucket, and its rows alone are copied in and out. Everything of a batch goes through one stream,
so one wait at the end is enough. CUDA graphs are used where a trial at load shows that the model allows them
and that their outputs agree with a plain run. Other models take ONNX Runtime's own path.

ONNX Runtime keeps captured graphs by thread: warm up in the thread that will run.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort

from dstack_backend.cuda_driver import Driver, driver
from dstack_backend.errors import DeviceError, ModelError, RunError, one_line
from dstack_backend.runtime import open_onnx, session_options, specs_of
from dstack_backend.tensors import TensorSpec

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
    return CudaSession(model_path, device_id, options)


def limit_process(gpu_percent: float) -> None:
    """Set this process's MPS limit before its CUDA context is made. Raises DeviceError if it has another."""
    wanted = f"{gpu_percent:g}"
    if os.environ.setdefault(MPS_PERCENT, wanted) != wanted:
        raise DeviceError(
            f"gpu_percent {wanted} asked of a process that runs at {os.environ[MPS_PERCENT]}: MPS fixes it "
            f"when the process starts; unset {MPS_PERCENT} or load the model in a process of its own"
        )


class CudaSession:
    """A model on one CUDA device, with a stream of its own. One call at a time."""

    def __init__(self, model_path: Path, device_id: int, options: CudaOptions):
        self._driver = driver(device_id)
        self._device_id = device_id
        self._stream = self._driver.stream()
        self._buckets: dict[int, Bucket] = {}
        self.graphs = options.cuda_graphs
        try:
            self._open(model_path, options)
        except Exception:
            self._driver.destroy_stream(self._stream)
            raise
        self._names = [spec.name for spec in self.outputs]
        self._bound = all(_batch_only(spec) for spec in (*self.inputs, *self.outputs))
        self.graphs = self.graphs and self._bound

    def _open(self, model_path: Path, options: CudaOptions) -> None:
        """Open with CUDA graphs where asked for; ONNX Runtime refuses them to models not all on the GPU."""
        try:
            self._session = self._try_open(model_path, options, graphs=self.graphs)
        except ModelError as error:
            if not self.graphs:
                raise
            self._session = self._try_open(model_path, options, graphs=False)
            log.info("%s: no CUDA graphs: %s", model_path, error)
            self.graphs = False
        self.inputs, self.outputs = specs_of(self._session, model_path)

    def _try_open(self, model_path: Path, options: CudaOptions, *, graphs: bool) -> Any:
        provider: dict[str, Any] = {
            "device_id": self._device_id,
            "user_compute_stream": str(self._stream),
            "cudnn_conv_algo_search": options.conv_algo_search,
            "arena_extend_strategy": "kSameAsRequested",
            "use_tf32": int(options.tf32),
            "enable_cuda_graph": int(graphs),
        }
        if options.memory_limit_bytes:
            provider["gpu_mem_limit"] = options.memory_limit_bytes
        session = session_options()
        session.intra_op_num_threads = 1  # nodes on the CPU are few and small
        return open_onnx(model_path, [("CUDAExecutionProvider", provider)], session)

    def warm_up(self, batch_sizes: Sequence[int]) -> None:
        """Prepare the buckets of these batch sizes, in the thread that will run them. Raises RunError."""
        for rows in sorted({bucket_of(size) for size in batch_sizes if size > 0}):
            self._bucket(rows)

    def run(self, feeds: Mapping[str, np.ndarray], outputs: Sequence[str] | None = None) -> list[np.ndarray]:
        """As Session.run. Inputs must share their first dimension where the model has a batch dimension."""
        names = list(outputs or self._names)
        try:
            rows = (
                next(iter(feeds.values())).shape[0] if self._bound and len(feeds) == len(self.inputs) else 0
            )
            bucket = self._bucket(bucket_of(rows)) if rows else None
            if bucket is not None:
                return bucket.run(feeds, names, rows)
            answer: list[np.ndarray] = self._session.run(names, dict(feeds))
            return answer
        except Exception as error:
            raise RunError(one_line(error)) from error

    def _bucket(self, size: int) -> Bucket | None:
        """The buffers of a batch size, made on first use; None where the model cannot be bound to any."""
        bucket = self._buckets.get(size)
        if bucket is not None or not self._bound:
            return bucket
        bucket = Bucket(self._session, self._driver, self._stream, self._device_id, self, size)
        self._buckets[size] = bucket
        self._bound = bucket.try_plain()
        if not self._bound:
            return None
        if self.graphs:
            self.graphs = bucket.try_graph()
        return bucket

    def close(self) -> None:
        """Give the device memory back."""
        for bucket in self._buckets.values():
            bucket.close()
        self._buckets.clear()
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
        self._session, self._driver, self._stream, self._model = session, cuda, stream, model
        self._binding = session.io_binding()
        self._plain = _run_options(NO_GRAPH)
        self._options = self._plain
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

    def _samples(self) -> dict[str, np.ndarray]:
        rng = np.random.default_rng(self.size)
        return {name: buffer.sample(rng) for name, buffer in self._inputs.items()}

    def try_plain(self) -> bool:
        """Whether a run leaves in the bound buffers what ONNX Runtime's own path answers.

        It does not where the first dimension of an output is not the batch.
        """
        feeds, names = self._samples(), list(self._outputs)
        wanted = self._session.run(names, feeds, self._plain)
        try:
            bound = self.run(feeds, names, self.size)
        except Exception as error:  # shapes that do not fit: the model takes the other path
            log.info("outputs are not one row a row of the batch: %s", one_line(error))
            return False
        return all(a.shape == b.shape and _agree(a, b) for a, b in zip(wanted, bound, strict=True))

    def try_graph(self) -> bool:
        """Capture a graph and keep it if its outputs agree with a plain run on random inputs."""
        feeds, names = self._samples(), list(self._outputs)
        plain = self.run(feeds, names, self.size)
        try:
            self._options = _run_options(str(self.size))
            for _ in range(RUNS_TO_CAPTURE):
                captured = self.run(feeds, names, self.size)
            if all(_agree(a, b) for a, b in zip(plain, captured, strict=True)):
                return True
            reason = "its outputs differ from a plain run"
        except Exception as error:  # whatever ONNX Runtime could not capture, a plain run can still do
            reason = one_line(error)
        log.warning("no CUDA graph at batch size %d: %s", self.size, reason)
        self._options = self._plain
        return False

    def close(self) -> None:
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


def _run_options(graph_id: str) -> ort.RunOptions:
    options = ort.RunOptions()
    options.add_run_config_entry("gpu_graph_id", graph_id)
    # Our own wait behind the copies out is the only one needed.
    options.add_run_config_entry("disable_synchronize_execution_providers", "1")
    return options
