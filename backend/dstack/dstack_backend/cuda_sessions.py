"""ONNX Runtime sessions of one model on one CUDA device: their options, and the weights they share."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort

from dstack_backend import dlpack
from dstack_backend.errors import DeviceError, ModelError, one_line
from dstack_backend.onnx_file import external_files
from dstack_backend.optimized import Cache, key_of
from dstack_backend.runtime import open_onnx, session_options, specs_of
from dstack_backend.settings import CONV_LAYOUTS, CONV_SEARCHES
from dstack_backend.tensors import Array, TensorSpec
from dstack_backend.weights import SharedWeights

log = logging.getLogger("dstack")

AGREEMENT = 0.02  # largest relative difference of two runs, by norm: algorithms may differ (TF32)
TRIAL_ROWS = 3  # no dimension of a model happens to have it as easily as 1, 2 or 4
SHARED_FROM_BYTES = 1024  # smaller weights stay in the model: some are shapes that ONNX Runtime must see
_MODEL, _WEIGHTS = "model.onnx", "weights.bin"  # of a cache entry
REFERENCE_BYTES = 16 << 20  # about what an entry of answers takes at most
_FORM = "3"  # of cache entries; another one for each change of what they hold


@dataclass(frozen=True, slots=True)
class CudaOptions:
    """How a model runs on the GPU.

    cuda_graphs: try them. tf32: let FP32 matrix products use TF32, ONNX Runtime's default.
    conv_algo_search: HEURISTIC loads fast and the same everywhere; EXHAUSTIVE benchmarks while loading.
    conv_layout: nhwc runs convolutions with channels last, which many GPUs do faster; auto: where a trial
    shows it. memory_limit_bytes: bound of the device memory that the model takes beside CUDA's own, 0 for
    none. process_memory_limit_bytes: bound that MPS sets to the process, 0 for none. levels: GPU% that a
    run can name, by green contexts; empty: the share is MPS's, for the whole process. levels_needed: a
    driver without green contexts is an error; else the share is MPS's there."""

    cuda_graphs: bool = True
    tf32: bool = True
    conv_algo_search: str = "HEURISTIC"
    conv_layout: str = "auto"
    memory_limit_bytes: int = 0
    process_memory_limit_bytes: int = 0
    levels: tuple[float, ...] = ()
    levels_needed: bool = True

    def __post_init__(self) -> None:
        if self.conv_algo_search not in CONV_SEARCHES:
            raise ModelError(
                f"conv_algo_search {self.conv_algo_search!r}: one of {', '.join(CONV_SEARCHES)} is wanted"
            )
        if self.conv_layout not in CONV_LAYOUTS:
            raise ModelError(f"conv_layout {self.conv_layout!r}: one of {', '.join(CONV_LAYOUTS)} is wanted")
        if any(not 0 < level <= 100 for level in self.levels):
            raise ModelError(f"levels {list(self.levels)}: numbers in (0, 100] are wanted")


class Sessions:
    """Makes the sessions of a model. memory: the Driver of the device."""

    provider = "CUDAExecutionProvider"
    device_name = "cuda"  # as io_binding calls it
    device_type = dlpack.CUDA

    def __init__(
        self,
        model_path: Path,
        device_id: int,
        options: CudaOptions,
        memory: Any,
        cache: Cache | None = None,
        *,
        nhwc: bool = False,
    ):
        self.path, self.device_id, self.options = model_path, device_id, options
        self.cache, self.nhwc = cache or Cache(), nhwc
        self._memory = memory
        self._weights: SharedWeights | None = None
        self._optimized: Path | None = None

    @property
    def traits(self) -> list[str]:
        """What, beside the model and the layout, changes how it is optimised and how fast it is."""
        options = self.options
        return [
            _FORM,
            ort.__version__,
            self.provider,
            self._memory.name(),
            self._memory.version(),
            str(options.tf32),
            options.conv_algo_search,
        ]

    @property
    def shared_bytes(self) -> int:
        """Device memory of the weights that the sessions share; 0: each has its own."""
        return self._weights.size_bytes if self._weights else 0

    def open(self, stream: int, *, graphs: bool = False) -> ort.InferenceSession:
        """A session on a stream; it must be gone before close(). graphs: refuse models that cannot be
        captured.

        Raises ModelError, DeviceError.
        """
        if self._weights is None or self._optimized is None:
            return self._open(self.path, session_options(), stream, graphs)
        return self._open_shared(self._optimized, self._weights, stream, graphs)

    def share(self, stream: int) -> None:
        """Load the weights once for all sessions opened from now on, where the model allows it: its inputs
        are dynamic in the batch only, and a session with shared weights answers as one without.
        """
        if self._weights is not None:
            return
        try:
            size_bytes = sum(path.stat().st_size for path in (self.path, *external_files(self.path)))
            key = key_of(self.path, [*self.traits, str(self.nhwc)])
            entry = self.cache.get(key, lambda made: self._optimize(made / _MODEL, stream), size_bytes)
            self._weights = SharedWeights(entry / _MODEL, self._memory, (self.device_type, self.device_id))
            self._optimized = entry / _MODEL
        except Exception as error:  # whatever is wrong with sharing, the model can be served without
            log.info("%s: its sessions have weights of their own: %s", self.path, one_line(error))

    def close(self) -> None:
        if self._weights is not None:
            self._weights.close()
            self._weights = None

    def _optimize(self, path: Path, stream: int) -> None:
        """Write the model as optimised for this device; raise where it cannot be served from that."""
        options = session_options()
        options.optimized_model_filepath = str(path)
        options.add_session_config_entry("session.optimized_model_external_initializers_file_name", _WEIGHTS)
        options.add_session_config_entry(
            "session.optimized_model_external_initializers_min_size_in_bytes", str(SHARED_FROM_BYTES)
        )
        # Refused where the CPU takes part: it could not read weights that lie on the device.
        self._open(self.path, session_options(), stream, graphs=True)
        original = self._open(self.path, options, stream, graphs=False)
        inputs, outputs = specs_of(original, self.path)
        if form_of(inputs, outputs) is None:
            raise ModelError("it has other dynamic dimensions than the batch")
        weights = SharedWeights(path, self._memory, (self.device_type, self.device_id))
        try:
            feeds, wanted = self.reference(inputs, TRIAL_ROWS, stream)
            shared = self._open_shared(path, weights, stream, graphs=False)
            got = shared.run(None, feeds)
            if not all(agree(one, other) for one, other in zip(wanted, got, strict=True)):
                raise ModelError("with shared weights it answers differently")
            del shared
        finally:
            weights.close()

    def reference(
        self, inputs: Sequence[TensorSpec], rows: int, stream: int
    ) -> tuple[dict[str, Array], list[Array]]:
        """Random rows, and the answers to them in graph order: on ONNX Runtime's ordinary path, in the usual
        layout, with weights of its own. Computed once for a model and a device, and kept in the cache, for
        cuDNN may compile for seconds for such a run. Raises what ONNX Runtime raises.
        """
        feeds = samples(inputs, rows, seed=rows)
        computed: list[Array] = []

        def fill(entry: Path) -> None:
            computed.extend(self._answers(feeds, stream))
            for index, answer in enumerate(computed):
                np.save(entry / f"{index}.npy", answer, allow_pickle=False)

        try:
            key = key_of(self.path, [*self.traits, f"reference {rows}"])
            entry = self.cache.get(key, fill, REFERENCE_BYTES)
            if not computed:
                files = [entry / f"{index}.npy" for index in range(len(list(entry.glob("*.npy"))))]
                return feeds, [np.load(file, allow_pickle=False) for file in files]
        except (OSError, DeviceError) as error:
            log.info("%s: its reference is not kept: %s", self.path, one_line(error))
        return feeds, computed or self._answers(feeds, stream)

    def _answers(self, feeds: Mapping[str, Array], stream: int) -> list[Array]:
        session = self._open(self.path, session_options(), stream, graphs=False, usual_layout=True)
        return list(session.run(None, dict(feeds)))

    def _open_shared(
        self, path: Path, weights: SharedWeights, stream: int, graphs: bool
    ) -> ort.InferenceSession:
        options = session_options()
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        weights.add_to(options)
        return self._open(path, options, stream, graphs)

    def _open(
        self,
        path: Path,
        options: ort.SessionOptions,
        stream: int,
        graphs: bool,
        *,
        usual_layout: bool = False,
    ) -> ort.InferenceSession:
        options.intra_op_num_threads = 1  # nodes on the CPU are few and small
        options.enable_mem_pattern = False  # what the first run took would lie beside what the pattern takes
        provider_options = self._provider_options(stream, graphs)
        if usual_layout:
            provider_options["prefer_nhwc"] = 0
        return open_onnx(path, [(self.provider, provider_options)], options)

    def _provider_options(self, stream: int, graphs: bool) -> dict[str, Any]:
        found: dict[str, Any] = {
            "device_id": self.device_id,
            "user_compute_stream": str(stream),
            "cudnn_conv_algo_search": self.options.conv_algo_search,
            "arena_extend_strategy": "kSameAsRequested",
            "use_tf32": int(self.options.tf32),
            "enable_cuda_graph": int(graphs),
            "prefer_nhwc": int(self.nhwc),
        }
        if self.options.memory_limit_bytes:
            found["gpu_mem_limit"] = max(1, self.options.memory_limit_bytes - self.shared_bytes)
        return found


@dataclass(frozen=True, slots=True)
class Form:
    """How a model's tensors lie in buffers that never move: the first dimension of each spec counts rows.

    whole: the model has fixed shapes; each of its tensors is one row, and the first dimension is ours alone.
    """

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    whole: bool = False


def form_of(inputs: Sequence[TensorSpec], outputs: Sequence[TensorSpec]) -> Form | None:
    """The form of a model whose shapes are fixed, or fixed but for the batch; None for others."""
    specs = (*inputs, *outputs)
    if not inputs or any(spec.numpy_dtype.kind == "O" or spec.optional for spec in specs):
        return None
    if all(spec.shape and spec.shape[0] is None and None not in spec.shape[1:] for spec in specs):
        return Form(tuple(inputs), tuple(outputs))
    if all(None not in spec.shape for spec in specs):
        lifted = [replace(spec, dims=(None, *spec.dims)) for spec in specs]
        return Form(tuple(lifted[: len(inputs)]), tuple(lifted[len(inputs) :]), whole=True)
    return None


def samples(inputs: Sequence[TensorSpec], rows: int, seed: int) -> dict[str, Array]:
    """Random inputs that suit most models: unit reals, and zeros and ones for integers (ids, masks)."""
    rng = np.random.default_rng(seed)
    feeds: dict[str, Array] = {}
    for spec in inputs:
        shape = shape_of(spec, rows)
        if spec.numpy_dtype.kind == "f":
            feeds[spec.name] = np.asarray(rng.random(shape, dtype=np.float64)).astype(spec.numpy_dtype)
        else:
            feeds[spec.name] = np.asarray(rng.integers(0, 2, shape)).astype(spec.numpy_dtype)
    return feeds


def shape_of(spec: TensorSpec, rows: int) -> tuple[int, ...]:
    """The shape of a tensor in a batch of so many rows."""
    return tuple(rows if dim is None else dim for dim in spec.shape)


def agree(one: Array, other: Array) -> bool:
    """Whether two answers are the same within what other algorithms for the same thing may change."""
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    if one.dtype.kind != "f":
        return bool(np.array_equal(one, other))
    a, b = one.astype(np.float64), other.astype(np.float64)
    finite = np.isfinite(a)
    if not np.array_equal(finite, np.isfinite(b)):
        return False
    a, b = a[finite], b[finite]
    return bool(np.linalg.norm(a - b) <= AGREEMENT * np.linalg.norm(a) + 1e-12)
