"""Small ONNX models, one for each thing a backend must be able to serve, made on the spot."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

# Short name -> (ONNX type, NumPy type) of every tensor type that is served.
TYPES: dict[str, tuple[int, Any]] = {
    "bool": (TensorProto.BOOL, np.bool_),
    "u1": (TensorProto.UINT8, np.uint8),
    "u2": (TensorProto.UINT16, np.uint16),
    "u4": (TensorProto.UINT32, np.uint32),
    "u8": (TensorProto.UINT64, np.uint64),
    "i1": (TensorProto.INT8, np.int8),
    "i2": (TensorProto.INT16, np.int16),
    "i4": (TensorProto.INT32, np.int32),
    "i8": (TensorProto.INT64, np.int64),
    "f2": (TensorProto.FLOAT16, np.float16),
    "f4": (TensorProto.FLOAT, np.float32),
    "f8": (TensorProto.DOUBLE, np.float64),
    "text": (TensorProto.STRING, np.object_),
}
FLOAT = TensorProto.FLOAT


def value(name: str, kind: int, shape: Sequence[int | str | None]) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, kind, list(shape))


def model(
    nodes: Sequence[onnx.NodeProto],
    inputs: Sequence[onnx.ValueInfoProto],
    outputs: Sequence[onnx.ValueInfoProto],
    constants: dict[str, np.ndarray] | None = None,
    opset: int = 18,
) -> onnx.ModelProto:
    initializers = [numpy_helper.from_array(array, name) for name, array in (constants or {}).items()]
    graph = helper.make_graph(list(nodes), "graph", list(inputs), list(outputs), initializers)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=9)


def every_type() -> onnx.ModelProto:
    """13 inputs and outputs, one a type: "out_T" is "in_T" with its three columns in reverse."""
    nodes, inputs, outputs = [], [], []
    for name, (kind, _) in TYPES.items():
        nodes.append(helper.make_node("Gather", [f"in_{name}", "reverse"], [f"out_{name}"], axis=1))
        inputs.append(value(f"in_{name}", kind, ["batch", 3]))
        outputs.append(value(f"out_{name}", kind, ["batch", 3]))
    return model(nodes, inputs, outputs, {"reverse": np.array([2, 1, 0], np.int64)})


def dense(seed: int = 0, width: int = 64) -> onnx.ModelProto:
    """ "scores" = relu(x A) B and "mean" of each row of x: two outputs of different rank."""
    rng = np.random.default_rng(seed)
    a = rng.standard_normal((16, width)).astype(np.float32)
    b = rng.standard_normal((width, 5)).astype(np.float32)
    nodes = [
        helper.make_node("MatMul", ["x", "a"], ["h"]),
        helper.make_node("Relu", ["h"], ["r"]),
        helper.make_node("MatMul", ["r", "b"], ["scores"]),
        helper.make_node("ReduceMean", ["x", "axis"], ["mean"], keepdims=0),
    ]
    outputs = [value("scores", FLOAT, ["batch", 5]), value("mean", FLOAT, ["batch"])]
    constants = {"a": a, "b": b, "axis": np.array([1], np.int64)}
    return model(nodes, [value("x", FLOAT, ["batch", 16])], outputs, constants)


def slow(repeats: int = 40) -> onnx.ModelProto:
    """A matrix product repeated until a row takes some milliseconds; "y" has the shape of "x"."""
    rng = np.random.default_rng(1)
    q, _ = np.linalg.qr(rng.standard_normal((512, 512)))
    names = ["x", *(f"h{index}" for index in range(repeats - 1)), "y"]
    nodes = [helper.make_node("MatMul", [names[i], "q"], [names[i + 1]]) for i in range(repeats)]
    shape = ["batch", 16, 512]
    return model(nodes, [value("x", FLOAT, shape)], [value("y", FLOAT, shape)], {"q": q.astype(np.float32)})


def dynamic() -> onnx.ModelProto:
    """Rows of any length: "total" is the sum of a row, "twice" the row added to itself."""
    nodes = [
        helper.make_node("ReduceSum", ["x", "axis"], ["total"], keepdims=1),
        helper.make_node("Add", ["x", "x"], ["twice"]),
    ]
    outputs = [value("total", FLOAT, ["batch", 1]), value("twice", FLOAT, ["batch", "length"])]
    constants = {"axis": np.array([1], np.int64)}
    return model(nodes, [value("x", FLOAT, ["batch", "length"])], outputs, constants)


def without_batch() -> onnx.ModelProto:
    """Indices of non-zero elements: as many as there are, so rows of the output are not rows of the input."""
    return model(
        [helper.make_node("NonZero", ["x"], ["where"])],
        [value("x", FLOAT, ["rows", "columns"])],
        [value("where", TensorProto.INT64, [2, "found"])],
    )


def halves() -> onnx.ModelProto:
    """Every other row: as many dimensions with free sizes as a model that batches, but fewer rows out than
    in.
    """
    return model(
        [helper.make_node("Slice", ["x", "from", "to", "axis", "step"], ["y"])],
        [value("x", FLOAT, ["rows", 2])],
        [value("y", FLOAT, ["half", 2])],
        {
            name: np.array([number], np.int64)
            for name, number in {"from": 0, "to": 1 << 30, "axis": 0, "step": 2}.items()
        },
    )


def fixed() -> onnx.ModelProto:
    """Fixed shapes: "y" [2, 5] is A times "x" [2, 16], and "top", a scalar, the largest of it."""
    a = np.random.default_rng(4).standard_normal((16, 5)).astype(np.float32)
    nodes = [
        helper.make_node("MatMul", ["x", "a"], ["y"]),
        helper.make_node("ReduceMax", ["y"], ["top"], keepdims=0),
    ]
    outputs = [value("y", FLOAT, [2, 5]), value("top", FLOAT, [])]
    return model(nodes, [value("x", FLOAT, [2, 16])], outputs, {"a": a})


def scalar() -> onnx.ModelProto:
    """A scalar in, a scalar out."""
    return model([helper.make_node("Neg", ["x"], ["y"])], [value("x", FLOAT, [])], [value("y", FLOAT, [])])


def with_default(default: float = 1.0) -> onnx.ModelProto:
    """y = x * scale + shift; "scale" may be left out, the graph holds a value for it; "shift" is a weight
    that an old exporter listed among the inputs."""
    nodes = [
        helper.make_node("Mul", ["x", "scale"], ["scaled"]),
        helper.make_node("Add", ["scaled", "shift"], ["y"]),
    ]
    inputs = [
        value("x", FLOAT, ["batch", 4]),
        value("scale", FLOAT, ["batch", 4]),
        value("shift", FLOAT, [4]),
    ]
    constants = {
        "scale": np.full((1, 4), default, np.float32),
        "shift": np.arange(4, dtype=np.float32),
    }
    return model(nodes, inputs, [value("y", FLOAT, ["batch", 4])], constants)


def with_optional() -> onnx.ModelProto:
    """y = x + bias, where "bias" is of ONNX's optional type; y = x + x without it."""
    tensor = helper.make_tensor_type_proto(FLOAT, ["batch", 4])
    bias = helper.make_value_info("bias", helper.make_optional_type_proto(tensor))
    given = helper.make_graph(
        [helper.make_node("OptionalGetElement", ["bias"], ["b"])],
        "given",
        [],
        [value("b", FLOAT, None or [])],
    )
    given.output[0].type.tensor_type.ClearField("shape")
    missing = helper.make_graph(
        [helper.make_node("Identity", ["x"], ["i"])], "missing", [], [value("i", FLOAT, [])]
    )
    missing.output[0].type.tensor_type.ClearField("shape")
    nodes = [
        helper.make_node("OptionalHasElement", ["bias"], ["has"]),
        helper.make_node("If", ["has"], ["addend"], then_branch=given, else_branch=missing),
        helper.make_node("Add", ["x", "addend"], ["y"]),
    ]
    return model(nodes, [value("x", FLOAT, ["batch", 4]), bias], [value("y", FLOAT, ["batch", 4])])


def text() -> onnx.ModelProto:
    """Strings in, strings out: each with "!" behind it."""
    return model(
        [helper.make_node("StringConcat", ["x", "mark"], ["y"])],
        [value("x", TensorProto.STRING, ["batch", "words"])],
        [value("y", TensorProto.STRING, ["batch", "words"])],
        {"mark": np.array("!", dtype=np.object_)},
        opset=20,
    )


def lookup() -> onnx.ModelProto:
    """Rows of a table by index; an index beyond its 8 rows fails while it runs."""
    table = np.arange(32, dtype=np.float32).reshape(8, 4)
    nodes = [helper.make_node("Gather", ["table", "index"], ["row"], axis=0)]
    inputs = [value("index", TensorProto.INT64, ["batch", 1])]
    return model(nodes, inputs, [value("row", FLOAT, ["batch", 1, 4])], {"table": table})


def plus(number: float) -> onnx.ModelProto:
    """y = x + number."""
    nodes = [helper.make_node("Add", ["x", "number"], ["y"])]
    shapes = ["batch", 4]
    constants = {"number": np.array(number, np.float32)}
    return model(nodes, [value("x", FLOAT, shapes)], [value("y", FLOAT, shapes)], constants)


def save(proto: onnx.ModelProto, path: Path, *, external: str = "") -> None:
    """Write a model; its larger initializers into a file `external` beside it, where one is named."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if external:
        onnx.save(proto, str(path), save_as_external_data=True, location=external, size_threshold=1000)
    else:
        onnx.save(proto, str(path))
