"""A model as a function of arrays: ONNX Runtime sessions on the CPU or a CUDA device.

    session = load_session(Path("1/model.onnx"), provider="cpu", gpu_percent=50)
    (scores,) = session.run({"image": images}, ["scores"])

GPU% means a share of the SMs on a GPU (enforced by MPS) and a share of the cores on the CPU (threads).
What the provider cannot do is an error; there is no silent fallback from CUDA to the CPU.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import onnxruntime as ort

from dstack_backend.errors import DeviceError, ModelError, RunError, one_line
from dstack_backend.session import Session, Staged, TwoPhases
from dstack_backend.staging import aligned
from dstack_backend.tensors import Array, DeviceArray, Feed, TensorSpec, check_served

PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}


def cpu_cores() -> int:
    """Cores this process may use."""
    return len(os.sched_getaffinity(0))


def threads_for(gpu_percent: float, cores: int) -> int:
    """Intra-op threads that a GPU% buys on a CPU host: max(1, round(cores p / 100))."""
    return max(1, int(cores * gpu_percent / 100 + 0.5))


def load_session(
    model_path: Path, *, provider: str, gpu_percent: float, device_id: int = 0, **options: Any
) -> Session:
    """Load a model file.

    provider: "cpu" or "cuda". gpu_percent in (0, 100]. device_id: the CUDA device. Further options are those
    of runtime_cuda.CudaOptions (ignored on the CPU: they describe a device that is not used).
    Raises ModelError (the file), DeviceError (the provider or device).
    """
    if provider not in PROVIDERS:
        raise ModelError(f"execution provider {provider!r}: one of {', '.join(PROVIDERS)} is wanted")
    if not 0 < gpu_percent <= 100:
        raise ModelError(f"gpu_percent {gpu_percent:g}: a number in (0, 100] is wanted")
    check_provider(provider)
    if provider == "cuda":
        from dstack_backend.cuda_sessions import CudaOptions
        from dstack_backend.runtime_cuda import load_cuda_session

        return load_cuda_session(Path(model_path), gpu_percent, device_id, CudaOptions(**options))
    threads = threads_for(gpu_percent, cpu_cores())
    return CpuSession(Path(model_path), threads, gpu_percent=gpu_percent)


def check_provider(provider: str) -> None:
    """Raise DeviceError where this onnxruntime has no such provider."""
    if PROVIDERS[provider] not in ort.get_available_providers():
        raise DeviceError(
            f"onnxruntime {ort.__version__} has no {PROVIDERS[provider]}: install "
            f"{'onnxruntime-gpu in place of onnxruntime' if provider == 'cuda' else 'onnxruntime'}"
        )


class CpuBatch:
    """Staged and Running of the CPU provider: host arrays in, host arrays out. It runs in launch()."""

    def __init__(self, feeds: Mapping[str, Array], rows: int, gpu_percent: float):
        self.feeds, self.rows = feeds, rows
        self.gpu_percent, self.sm_groups = gpu_percent, 0
        self.times_us: Mapping[str, int] = MappingProxyType({})
        self.arrays: list[Array] = []

    def execute(self, call: Callable[[], list[Array]]) -> None:
        """Take what the call returns as the outputs, and its time as that of the run."""
        started_ns = time.perf_counter_ns()
        self.arrays = call()
        run_us = (time.perf_counter_ns() - started_ns) // 1000
        self.times_us = {"copy_in": 0, "run": run_us, "copy_out": 0}

    def wait(self) -> None:
        """It has run."""

    def outputs(self) -> list[Array]:
        return self.arrays

    def device_outputs(self) -> list[DeviceArray]:
        return []

    def close(self) -> None:
        """Its arrays are Python's to free."""


class CpuSession(TwoPhases):
    """ONNX Runtime's CPU provider with a bounded number of threads.

    Idle threads do not spin: other models share these cores. optimize False: for a look at the graph only.
    """

    def __init__(self, model_path: Path, threads: int, *, gpu_percent: float = 100.0, optimize: bool = True):
        options = session_options()
        if not optimize:
            options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        self.threads = threads
        self.takes_parts = False
        self.levels: tuple[float, ...] = ()
        self.groups = self.graphs = self.preparing = self.device_bytes = 0
        self._gpu_percent = gpu_percent
        self._session: ort.InferenceSession | None = open_onnx(model_path, ["CPUExecutionProvider"], options)
        self.inputs, self.outputs = specs_of(self._session, model_path)
        self._names = [spec.name for spec in self.outputs]

    def rows_at_once(self, rows: int) -> int:
        return max(1, rows)

    def stage(self, feeds: Mapping[str, Feed]) -> CpuBatch:
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
        assert isinstance(staged, CpuBatch) and not device_outputs
        session, names = self._session, list(outputs or self._names)
        if session is None:
            raise RunError("the session is closed")
        try:
            staged.execute(lambda: list(session.run(names, staged.feeds)))
        except Exception as error:
            raise RunError(one_line(error)) from error
        return staged

    def warm_up(self, batch_sizes: Sequence[int], within_s: float = math.inf) -> None:
        """Nothing to prepare: the CPU provider plans for any shape."""

    def forget(self) -> None:
        """Nothing is kept by batch size."""

    def allocate(self, shape: tuple[int, ...], dtype: Any) -> Array:
        return aligned(shape, dtype)

    def check(self) -> None:
        """The CPU is there."""

    def close(self) -> None:
        self._session = None


def on_host(name: str, feed: Feed) -> Array:
    """A feed as one host array. Raises RunError for device memory, which the CPU cannot read."""
    parts = [feed] if isinstance(feed, np.ndarray | DeviceArray) else list(feed)
    arrays = [part for part in parts if isinstance(part, np.ndarray)]
    if len(arrays) < len(parts):
        raise RunError(f"input {name!r} lies on a GPU, and the model runs on the CPU")
    return arrays[0] if len(arrays) == 1 else np.concatenate(arrays)


def rows_of(feeds: Mapping[str, Array]) -> int:
    """The first dimension of the first input, 0 where there is none."""
    first = next(iter(feeds.values()), None)
    return first.shape[0] if first is not None and first.ndim else 0


ort.set_default_logger_severity(3)  # errors; each session would warn that no plugin device is registered


def session_options() -> ort.SessionOptions:
    """Options that every session of ours shares."""
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.add_session_config_entry("session.inter_op.allow_spinning", "0")
    return options


def open_onnx(
    model_path: Path, providers: Sequence[str | tuple[str, dict[str, Any]]], options: ort.SessionOptions
) -> ort.InferenceSession:
    """An InferenceSession whose first provider is really in force. Raises ModelError, DeviceError.

    Loaded by path, so initializers in external files beside the model are found.
    """
    if not model_path.is_file():
        raise ModelError(
            f"{model_path}: no such model file; put it there or name another with parameter model_file"
        )
    try:
        session = ort.InferenceSession(
            str(model_path), options, providers=list(providers), enable_fallback=False
        )
    except Exception as error:
        raise _explain(model_path, error) from error
    wanted = providers[0] if isinstance(providers[0], str) else providers[0][0]
    if session.get_providers()[0] != wanted:
        raise DeviceError(
            f"{model_path}: {wanted} did not start, only {session.get_providers()[0]} did; "
            f"check the driver, CUDA and cuDNN libraries (dstackctl doctor)"
        )
    return session


def specs_of(
    session: ort.InferenceSession, model_path: Path
) -> tuple[tuple[TensorSpec, ...], tuple[TensorSpec, ...]]:
    """Inputs and outputs of a session. Optional: typed so, or with a default that a feed overrides."""
    inputs = [_spec(node) for node in session.get_inputs()]
    inputs += [_spec(node, has_default=True) for node in session.get_overridable_initializers()]
    outputs = [_spec(node) for node in session.get_outputs()]
    for spec in inputs:
        check_served(spec, "input", model_path)
    for spec in outputs:
        check_served(spec, "output", model_path)
    return tuple(inputs), tuple(outputs)


def _spec(node: Any, has_default: bool = False) -> TensorSpec:
    dtype, optional = node.type, has_default
    if dtype.startswith("optional("):
        dtype, optional = dtype[len("optional(") : -1], True
    return TensorSpec(node.name, dtype, tuple(_dim(dim) for dim in node.shape), optional, has_default)


def _dim(dim: int | str | None) -> int | str | None:
    if isinstance(dim, int):
        return dim if dim >= 0 else None
    return dim or None


_OPERATORS = "export it with the standard operators of an opset that this onnxruntime has"
_VERSION = "upgrade onnxruntime, or export for an older one"
_RETYPE = "export it with another type"
# What a message of ONNX Runtime means to the owner of the model: (a part of it, what it is, the mend).
_CAUSES: tuple[tuple[str, str, str], ...] = (
    ("Protobuf parsing failed", "not a whole ONNX file (truncated, or not ONNX at all)", "copy it again"),
    ("No graph was found", "an empty ONNX file", "copy it again"),
    ("is not a registered function/op", "uses a custom operator", _OPERATORS),
    ("No opset import for domain", "uses a custom operator", _OPERATORS),
    ("No Op registered for", "uses an unknown operator", _OPERATORS),
    ("External data path", "its external data file is missing", "put it beside the model file"),
    ("External initializer", "its external data file is truncated", "copy it again, beside the model file"),
    ("ValidateOpsetForDomain", "its opset is too new for this onnxruntime", _VERSION),
    ("IR version", "its IR version is too new for this onnxruntime", _VERSION),
    ("onnxruntime::Model::Model", "its IR version is too new for this onnxruntime", _VERSION),
    ("Could not find an implementation", "an operator has no kernel for its type here", _RETYPE),
    ("is not currently registered or supported", "has a tensor type that onnxruntime lacks", _RETYPE),
)


def _explain(model_path: Path, error: Exception) -> ModelError | DeviceError:
    text = one_line(error)
    for part, meaning, mend in _CAUSES:
        if part in text:
            return ModelError(f"{model_path}: {meaning}; {mend} ({_shorten(text)})")
    if "CUDA" in text or "cuda" in text or "cudnn" in text.lower():
        return DeviceError(
            f"{model_path}: the CUDA provider failed; check GPU memory and driver ({_shorten(text)})"
        )
    return ModelError(f"{model_path}: onnxruntime cannot load it; check the file ({_shorten(text)})")


def _shorten(text: str, limit: int = 240) -> str:
    text = text.split("failed:", 1)[-1].strip()
    return text if len(text) <= limit else text[: limit - 3] + "..."
