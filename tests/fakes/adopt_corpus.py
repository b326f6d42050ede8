"""A model repository as deployments have them: configs as Triton's documentation has them, ONNX models.

`CORPUS` says for each model how it is made and what `dstackctl adopt` must make of it.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import onnx

from fakes import feature_models as made

SAMPLES = Path(__file__).resolve().parents[2] / "model_repository"
Feeds = Mapping[str, np.ndarray]


@dataclass(frozen=True)
class Case:
    """config None: no config.pbtxt. why: a part of the reason it is left alone; "" where it is adopted.

    requests: what a client sends, for all that this machine's Triton can serve. served: also in the default
    run of the tests.
    """

    config: str | bytes | None
    proto: Callable[[], onnx.ModelProto] | None = None
    why: str = ""
    sample: str = ""
    versions: tuple[str, ...] = ("1",)
    file: str = "model.onnx"
    extra: Mapping[str, bytes] = field(default_factory=dict)
    requests: Feeds = field(default_factory=dict)
    served: bool = False
    note: str = ""


rng = np.random.default_rng(7)
ROWS = {"x": rng.standard_normal((3, 16)).astype(np.float32)}
FOUR = {"x": rng.standard_normal((2, 4)).astype(np.float32)}


def _three(dtype: object) -> np.ndarray:
    values = ["a", "b", "c"] if dtype is np.object_ else [0, 1, 1]
    return np.array([values], dtype)


MINIMAL = """\
platform: "onnxruntime_onnx"
max_batch_size: 8
input [
  {
    name: "x"
    data_type: TYPE_FP32
    dims: [ 16 ]
  }
]
output [
  {
    name: "scores"
    data_type: TYPE_FP32
    dims: [ 5 ]
  },
  {
    name: "mean"
    data_type: TYPE_FP32
    dims: [ 1 ]
    reshape: { shape: [ ] }
  }
]
"""

SCHEDULED = """\
# Front page classifier. Owner: search-infra@ - ask before you touch the queue policies!
name: "scheduled"
backend: "onnxruntime"      # moved from TensorRT in 2023
max_batch_size: 16
dynamic_batching {
  preferred_batch_size: [ 4, 8 ]
  max_queue_delay_microseconds: 100
  priority_levels: 3
  default_priority_level: 2
  default_queue_policy {
    timeout_action: REJECT
    default_timeout_microseconds: 10000000
    allow_timeout_override: true
    max_queue_size: 1000
  }
  priority_queue_policy {
    key: 1
    value { timeout_action: DELAY max_queue_size: 100 }
  }
}
"""

WARMED = """\
backend: "onnxruntime"
max_batch_size: 8
model_warmup [
  {
    name: "zeros, a whole batch"
    batch_size: 8
    inputs { key: "x" value: { data_type: TYPE_FP32 dims: [ 16 ] zero_data: true } }
  },
  {
    name: "noise"
    batch_size: 1
    inputs { key: "x" value: { data_type: TYPE_FP32 dims: [ 16 ] random_data: true } }
    count: 3
  }
]
dynamic_batching { preserve_ordering: true }
response_cache { enable: false }
metric_tags { key: "team" value: "search" }
"""

TUNED = """\
backend: "onnxruntime"
max_batch_size: 8
instance_group [
  { count: 2 kind: KIND_CPU rate_limiter { resources [ { name: "R1" count: 4 } ] priority: 2 } }
]
parameters { key: "intra_op_thread_count" value { string_value: "1" } }
parameters { key: "execution_mode" value: { string_value: "0" } }
parameters { key: "gpu_mem_limit" value: { string_value: "4294967200" } }
optimization {
  graph: { level: 1 }
  input_pinned_memory { enable: true }
  execution_accelerators { gpu_execution_accelerator: [ { name: "tensorrt" } ] }
}
"""

ON_GPU = """\
backend: "onnxruntime"
max_batch_size: 8
instance_group [ { count: 1 kind: KIND_GPU gpus: [ 0 ] } ]
optimization { execution_accelerators {
  gpu_execution_accelerator : [ {
    name : "cuda"
    parameters { key: "cudnn_conv_algo_search" value: "EXHAUSTIVE" }
    parameters { key: "use_tf32" value: "0" }
    parameters { key: "gpu_mem_limit" value: "2147483648" }
  } ]
}}
"""

RESHAPED = """\
backend: "onnxruntime"
max_batch_size: 8
input [ { name: "x" data_type: TYPE_FP32 dims: [ 2, 2 ] reshape { shape: [ 4 ] } } ]
output [ { name: "y" data_type: TYPE_FP32 dims: [ 1, 4 ] reshape { shape: [ 4 ] } } ]
"""

LABELLED = """\
backend: "onnxruntime"
max_batch_size: 8
input [ { name: "x" data_type: TYPE_FP32 dims: [ 4 ] } ]
output [ { name: "y" data_type: TYPE_FP32 dims: [ 4 ] label_filename: "labels.txt" } ]
version_policy: { specific { versions: [ 1, 3 ] } }
"""

ODD = (
    "name:'odd',max_batch_size:0x8;instance_group<count:1,kind:KIND_CPU>"
    'backend:"onnx" "runtime";a_field_of_the_future{key:[1,2],other:"}"}#no line end'
)

AGENT = """\
backend: "onnxruntime"
model_repository_agents { agents [ { name: "checksum" parameters { key: "MD5:%s" value: "00" } } ] }
"""

ENSEMBLE = """\
platform: "ensemble"
max_batch_size: 4
input [ { name: "pixels" data_type: TYPE_FP32 dims: [ 16 ] } ]
output [
  { name: "row" data_type: TYPE_FP32 dims: [ 5 ] },
  { name: "twice" data_type: TYPE_FP32 dims: [ 5 ] }
]
ensemble_scheduling {
  step [
    {
      model_name: "minimal"
      model_version: -1
      input_map { key: "x" value: "pixels" }
      output_map { key: "scores" value: "row" }
    },
    {
      model_name: "ragged_rows"
      model_version: -1
      input_map { key: "x" value: "row" }
      output_map { key: "twice" value: "twice" }
    }
  ]
}
"""

BLS = """\
import triton_python_backend_utils as pb_utils


class TritonPythonModel:
    def execute(self, requests):
        responses = []
        for request in requests:
            inner = pb_utils.InferenceRequest(
                model_name="minimal", requested_output_names=["scores"], inputs=request.inputs()
            ).exec()
            if inner.has_error():
                raise pb_utils.TritonModelException(inner.error().message())
            responses.append(pb_utils.InferenceResponse(output_tensors=inner.output_tensors()))
        return responses
"""
BLS_CONFIG = """\
backend: "python"
max_batch_size: 8
input [ { name: "x" data_type: TYPE_FP32 dims: [ 16 ] } ]
output [ { name: "scores" data_type: TYPE_FP32 dims: [ 5 ] } ]
instance_group [ { kind: KIND_CPU } ]
"""
SEQUENCE = """\
backend: "onnxruntime"
max_batch_size: 8
sequence_batching {
  max_sequence_idle_microseconds: 5000000
  control_input [
    { name: "START" control [ { kind: CONTROL_SEQUENCE_START fp32_false_true: [ 0, 1 ] } ] }
  ]
  state [
    { input_name: "s" output_name: "s_out" data_type: TYPE_FP32 dims: [ -1 ] }
  ]
}
"""
ONNX = 'backend: "onnxruntime"\n'

CORPUS: dict[str, Case] = {
    # -- adopted
    "minimal": Case(MINIMAL, made.dense, requests=ROWS, served=True),
    "bare": Case(None, lambda: made.dense(seed=2), requests=ROWS, served=True),
    "empty": Case(
        "", made.every_type, requests={f"in_{kind}": _three(dtype) for kind, (_, dtype) in made.TYPES.items()}
    ),
    "scheduled": Case(SCHEDULED, lambda: made.dense(seed=3), requests=ROWS),
    "warmed": Case(WARMED.replace("\n", "\r\n"), lambda: made.dense(seed=4), requests=ROWS, served=True),
    "tuned": Case(
        TUNED,
        made.lookup,
        requests={"index": np.array([[1], [7]], np.int64)},
        note="parameter execution_mode is onnxruntime's",
    ),
    "on_gpu": Case(ON_GPU, made.dense, note="conv_algo_search EXHAUSTIVE says what"),
    "reshaped": Case(RESHAPED, lambda: made.plus(2), requests={"x": FOUR["x"].reshape(2, 2, 2)}),
    "labelled": Case(
        LABELLED,
        lambda: made.plus(3),
        versions=("1", "2", "3"),
        requests=FOUR,
        served=True,
        extra={"labels.txt": b"cat\ndog\nowl\nfox\n"},
    ),
    "odd": Case(ODD, lambda: made.dense(seed=5)),
    "latin": Case(
        b"# M\xfcller & S\xf6hne, Stra\xdfe 1\n" + ONNX.encode() + b"max_batch_size: 4",
        made.dense,
        requests=ROWS,
    ),
    "named_file": Case(
        ONNX + 'default_model_filename: "net.onnx"\n',
        lambda: made.plus(5),
        file="net.onnx",
        requests=FOUR,
    ),
    "folder": Case(ONNX, lambda: made.dense(seed=6), file="model.onnx/model.onnx", requests=ROWS),
    "words": Case(ONNX, made.text, requests={"x": np.array([["a", "b"], ["\u00e9", ""]], np.object_)}),
    "no_batch": Case(
        ONNX + "max_batch_size: 0\n",
        made.without_batch,
        requests={"x": np.eye(3, dtype=np.float32)},
    ),
    "scalar": Case(ONNX, made.scalar, requests={"x": np.array([4.0], np.float32)}),
    "defaults": Case(ONNX, made.with_default, requests=FOUR),
    "ragged_rows": Case(ONNX + "max_batch_size: 4\n", made.dynamic, requests=FOUR, served=True),
    "checked_file": Case(AGENT % "1/model.onnx", made.dense, note="repository agent 'checksum' goes on"),
    "variants": Case(ONNX, made.dense, extra={"configs/h100.pbtxt": b""}, note="configs/ holds h100.pbtxt"),
    "magika": Case(
        None,
        sample="magika",
        requests={"bytes": rng.integers(0, 256, (2, 2048)).astype(np.int32)},
        served=True,
    ),
    "silero_vad": Case(
        None,
        sample="silero_vad",
        requests={
            "input": rng.standard_normal((1, 576)).astype(np.float32),
            "state": np.zeros((2, 1, 128), np.float32),
        },
    ),
    # -- left alone
    "pipeline": Case(ENSEMBLE, None, "an ensemble: it stays"),
    "caller": Case(
        BLS_CONFIG, None, 'backend "python": it stays', file="model.py", extra={"1/model.py": BLS.encode()}
    ),
    "sequence": Case(SEQUENCE, made.dynamic, "sequence_batching"),
    "accelerated": Case(
        ONNX
        + 'optimization { execution_accelerators { cpu_execution_accelerator [ { name: "openvino" } ] } }\n',
        made.dense,
        "execution accelerator 'openvino'",
    ),
    "decoupled": Case(ONNX + "model_transaction_policy { decoupled: true }\n", made.dense, "decoupled"),
    "by_model": Case(ONNX + "instance_group [ { kind: KIND_MODEL } ]\n", made.dense, "KIND_MODEL"),
    "ragged": Case(
        ONNX + 'input [ { name: "x" data_type: TYPE_FP32 dims: [ -1 ] allow_ragged_batch: true } ]\n',
        made.dynamic,
        "allow_ragged_batch",
    ),
    "custom_ops": Case(
        ONNX + 'model_operations { op_library_filename: "ops.so" }\n', made.dense, "custom op"
    ),
    "by_gpu": Case(ONNX + 'cc_model_filenames { key: "9.0" value: "h100.onnx" }\n', made.dense, "cc_model"),
    "checked_config": Case(AGENT % "config.pbtxt", made.dense, "has a checksum of config.pbtxt"),
    "own_build": Case(
        ONNX + 'runtime: "libtriton_onnxruntime_mine.so"\n', made.dense, "a build of the backend"
    ),
    "identity": Case('backend: "identity"\n', None, 'backend "identity"'),
    "plan": Case(None, made.dense, "tensorrt", extra={"1/model.plan": b"plan"}),
    "torch": Case("max_batch_size: 8\n", None, "pytorch", extra={"1/model.pt": b""}),
    "nothing": Case(None, None, "no model.onnx", extra={"1/readme": b""}),
    "truncated": Case(ONNX, None, "copy it again", extra={"1/model.onnx": b"\x08\x07"}),
    "wrong_dims": Case(
        ONNX + 'max_batch_size: 8\ninput [ { name: "x" data_type: TYPE_FP32 dims: [ 17 ] } ]\n',
        made.dense,
        "config says dims [17], the graph [16]",
    ),
    "missing_input": Case(
        ONNX + 'input [ { name: "z" data_type: TYPE_FP32 dims: [ 4 ] } ]\n',
        made.dense,
        "config names input 'z'",
    ),
    "no_version": Case(
        ONNX + "version_policy { specific { versions: [ 9 ] } }\n", made.dense, "no version dir"
    ),
    "broken": Case("backend: onnxruntime {\n", made.dense, "is not a model config"),
    "other_name": Case(ONNX + 'name: "elsewhere"\n', made.dense, "its config names it 'elsewhere'"),
}
ADOPTED = [name for name, case in CORPUS.items() if not case.why]
SERVABLE = [name for name, case in CORPUS.items() if case.requests]
SERVED = [name for name, case in CORPUS.items() if case.served]


def build(root: Path, names: list[str] | None = None) -> Path:
    """The repository, or some models of it, and one model that is a dstack model already."""
    for name in names or CORPUS:
        _build_model(root / name, CORPUS[name])
    return root


def model_file(root: Path, name: str, version: str = "") -> Path:
    """The ONNX file of a model's version (the last one), for plain onnxruntime."""
    case = CORPUS[name]
    return root / name / (version or case.versions[-1]) / case.file


def snapshot(root: Path) -> dict[str, bytes]:
    """Every file below a directory, by its path there."""
    return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def _build_model(folder: Path, case: Case) -> None:
    for version in case.versions:
        (folder / version).mkdir(parents=True)
        if case.sample:
            shutil.copy(SAMPLES / case.sample / "1" / "model.onnx", folder / version / "model.onnx")
        elif case.proto:
            made.save(case.proto(), folder / version / case.file)
    for name, data in case.extra.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    config = case.config
    if case.sample:
        text = (SAMPLES / case.sample / "config.pbtxt").read_text()
        config = text.replace('backend: "dstack"', 'backend: "onnxruntime"')
    if config is not None:
        (folder / "config.pbtxt").write_bytes(config.encode() if isinstance(config, str) else config)
