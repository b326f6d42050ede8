"""An ONNX graph as a list of kernels with their parallel work and traffic (domain/kernels.py).

Everything that counts is linear in the batch size, so shapes at two batch sizes tell it all. Elementwise
operators count as fused behind the kernel that made their last input, as ONNX Runtime does with most; views
and what is computed from constants cost nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path

import onnx

from dstack_sched.adapters.onnx_shapes import ShapedGraph, infer, load_graph
from dstack_sched.domain.kernels import HOST_COPY, KernelWork
from dstack_sched.errors import InputError

FREE = frozenset(
    {"Constant", "ConstantOfShape", "Shape", "Size", "Reshape", "Flatten", "Squeeze", "Unsqueeze", "Identity"}
    | {"Dropout", "Range"}
)
ELEMENTWISE = frozenset(
    {
        "Add",
        "Sub",
        "Mul",
        "Div",
        "Pow",
        "Sqrt",
        "Exp",
        "Log",
        "Erf",
        "Neg",
        "Abs",
        "Sign",
        "Reciprocal",
        "Mod",
    }
    | {
        "Relu",
        "LeakyRelu",
        "PRelu",
        "Clip",
        "Sigmoid",
        "HardSigmoid",
        "HardSwish",
        "Tanh",
        "Gelu",
        "Elu",
        "Selu",
    }
    | {
        "Softplus",
        "Mish",
        "BatchNormalization",
        "Cast",
        "Expand",
        "Floor",
        "Ceil",
        "Round",
        "Sum",
        "Min",
        "Max",
    }
    | {"Where", "Equal", "Less", "Greater", "LessOrEqual", "GreaterOrEqual", "Not", "And", "Or"}
)
CONVOLUTIONS = {"Conv": 1, "ConvInteger": 1, "ConvTranspose": 1, "QLinearConv": 3, "FusedConv": 1}
PRODUCTS = {"MatMul": 1, "Gemm": 1, "MatMulInteger": 1, "QLinearMatMul": 3, "FusedMatMul": 1}
BATCH_SIZES = (1, 2)


@dataclass(slots=True)
class _Kernel:
    """A kernel at one batch size; its traffic grows as operators are fused behind it."""

    op: str
    rows: int
    columns: int
    depth: int
    groups: int
    traffic_bytes: int


def read_kernels(
    model_path: Path, shapes: Mapping[str, Sequence[int]] | None = None
) -> tuple[KernelWork, ...]:
    """The kernels of a model file. shapes: NAME -> dimensions without the batch, for inputs with free ones.

    Errors: InputError when the file is no ONNX model or its shapes cannot be inferred.
    """
    return graph_kernels(load_graph(model_path), str(model_path), shapes or {})


def graph_kernels(
    light: onnx.ModelProto, source: str, shapes: Mapping[str, Sequence[int]]
) -> tuple[KernelWork, ...]:
    """As read_kernels, of a model from onnx_shapes.load_graph; `source` names it in errors."""
    try:
        one, two = (_kernels(infer(light, batch_size, shapes)) for batch_size in BATCH_SIZES)
    except (onnx.shape_inference.InferenceError, ValueError) as error:
        raise InputError(f"{source}: shapes cannot be inferred ({str(error).splitlines()[0]})") from None
    if not one or [kernel.op for kernel in one] != [kernel.op for kernel in two]:
        raise InputError(f"{source}: its shapes cannot be inferred; give free input dimensions with --shape")
    return tuple(_line(a, b) for a, b in zip(one, two, strict=True))


def _line(one: _Kernel, two: _Kernel) -> KernelWork:
    """The line through batch sizes 1 and 2 (a batch that is fixed gives a slope of 0)."""
    rows, groups = two.rows - one.rows, two.groups - one.groups
    traffic = two.traffic_bytes - one.traffic_bytes
    return KernelWork(
        op=one.op,
        rows_fixed=one.rows - rows,
        rows_per_row=rows,
        columns=one.columns,
        depth=one.depth,
        groups_fixed=one.groups - groups,
        groups_per_row=groups,
        bytes_fixed=one.traffic_bytes - traffic,
        bytes_per_row=traffic,
    )


def _kernels(graph: ShapedGraph) -> list[_Kernel]:
    kernels: list[_Kernel] = []
    made_by: dict[str, int] = {}  # tensor -> index of the kernel that writes it

    def size(name: str) -> int:
        return prod(graph.dims.get(name, (0,))) * graph.element_bytes.get(name, 0)

    for node in graph.nodes:
        inputs, outputs = [n for n in node.input if n], [n for n in node.output if n]
        producers = [made_by[name] for name in inputs if name in made_by]
        if all(name in graph.constants for name in inputs) or outputs[0] not in graph.dims:
            continue
        if node.op_type in FREE:
            made_by.update({name: max(producers) for name in outputs if producers})
            continue
        if node.op_type in ELEMENTWISE and producers:
            index = max(producers)
            kernels[index].traffic_bytes += sum(size(name) for name in inputs if made_by.get(name) != index)
        else:
            index = len(kernels)
            kernels.append(_new_kernel(node, graph.dims, sum(size(name) for name in (*inputs, *outputs))))
        made_by.update(dict.fromkeys(outputs, index))
    if kernels:
        kernels.append(_Kernel(HOST_COPY, 0, 1, 0, 1, sum(size(name) for name in graph.ends)))
    return kernels


def _new_kernel(node: onnx.NodeProto, dims: Mapping[str, tuple[int, ...]], traffic_bytes: int) -> _Kernel:
    out = dims[node.output[0]]
    if node.op_type in CONVOLUTIONS:
        weight = dims[node.input[CONVOLUTIONS[node.op_type]]]
        groups = next((int(a.i) for a in node.attribute if a.name == "group"), 1)
        # Weights of Conv are (out, in / groups, ...), those of ConvTranspose (in, out / groups, ...).
        depth = prod(weight[1:]) if node.op_type != "ConvTranspose" else weight[0] // groups
        return _Kernel(node.op_type, prod(out) // out[1], out[1] // groups, depth, groups, traffic_bytes)
    if node.op_type in PRODUCTS and len(out) > 1:
        left, right = dims[node.input[0]], dims[node.input[PRODUCTS[node.op_type]]]
        transposed = any(a.name == "transA" and a.i for a in node.attribute)
        depth = left[0] if transposed else left[-1]
        if len(right) > 2:
            return _Kernel(node.op_type, out[-2], out[-1], depth, prod(out[:-2]), traffic_bytes)
        return _Kernel(node.op_type, prod(out[:-1]), out[-1], depth, 1, traffic_bytes)
    return _Kernel(node.op_type, prod(out), 1, 0, 1, traffic_bytes)
