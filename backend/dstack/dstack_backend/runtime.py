"""A model as a function of arrays: ONNX Runtime sessions on the CPU or a CUDA device.

    session = load_session(Path("1/model.onnx"), provider="cpu", gpu_percent=50)
    (scores,) = session.run({"image": images}, ["scores"])

GPU% means a share of the SMs on a GPU (enforced by MPS) and a share of the cores on the CPU (threads).
What the provider cannot do is an error; there is no silent fallback from CUDA to the CPU.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import onnxruntime as ort

from dstack_backend.errors import DeviceError, ModelError, RunError, one_line
from dstack_backend.staging import aligned
from dstack_backend.tensors import Array, TensorSpec, check_served

PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}


class Session(Protocol):
    """A loaded model. `run` may be called from any thread, one call at a time."""

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]

    def run(self, feeds: Mapping[str, Array], outputs: Sequence[str] | None = None) -> list[Array]:
        """Outputs by name, in the order asked for (all, in graph order, for None). Raises RunError."""
        ...

    def warm_up(self, batch_sizes: Sequence[int]) -> None:
        """Prepare the device for these batch sizes, in the thread that will run them."""
        ...

    def forget(self) -> None:
        """Give back what warming up and runs keep by batch size; it is made again when needed."""
        ...

    def allocate(self, shape: tuple[int, ...], dtype: Any) -> Array:
        """Memory to gather inputs in that run() takes fastest. Good until close()."""
        ...

    def close(self) -> None: ...


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
        from dstack_backend.runtime_cuda import CudaOptions, load_cuda_session

        return load_cuda_session(Path(model_path), gpu_percent, device_id, CudaOptions(**options))
    return CpuSession(Path(model_path), threads_for(gpu_percent, cpu_cores()))


def check_provider(provider: str) -> None:
    """Raise DeviceError where this onnxruntime has no such provider."""
    if PROVIDERS[provider] not in ort.get_available_providers():
        raise DeviceError(
            f"onnxruntime {ort.__version__} has no {PROVIDERS[provider]}: install "
            f"{'onnxruntime-gpu in place of onnxruntime' if provider == 'cuda' else 'onnxruntime'}"
        )


class CpuSession:
    """ONNX Runtime's CPU provider with a bounded number of threads.

    Idle threads do not spin: other models share these cores. optimize False: for a look at the graph only.
    """

    def __init__(self, model_path: Path, threads: int, *, optimize: bool = True):
        options = session_options()
        if not optimize:
            options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        self.threads = threads
        self._session: ort.InferenceSession | None = open_onnx(model_path, ["CPUExecutionProvider"], options)
        self.inputs, self.outputs = specs_of(self._session, model_path)
        self._names = [spec.name for spec in self.outputs]

    def run(self, feeds: Mapping[str, Array], outputs: Sequence[str] | None = None) -> list[Array]:
        if self._session is None:
            raise RunError("the session is closed")
        try:
            return list(self._session.run(list(outputs or self._names), feeds))
        except Exception as error:
            raise RunError(one_line(error)) from error

    def warm_up(self, batch_sizes: Sequence[int]) -> None:
        """Nothing to prepare: the CPU provider plans for any shape."""

    def forget(self) -> None:
        """Nothing is kept by batch size."""

    def allocate(self, shape: tuple[int, ...], dtype: Any) -> Array:
        return aligned(shape, dtype)

    def close(self) -> None:
        self._session = None


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
