"""Every tensor's shape in an ONNX graph at one batch size.

onnx's own inference stops at shapes that the graph computes by itself (exporters write Shape, Gather, Concat
and Reshape for a free batch). So inference and folding take turns: what depends on nothing but constants and
known shapes is computed here, becomes a constant, and the next inference gets past it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod
from pathlib import Path
from typing import NamedTuple

import numpy as np
import onnx
from onnx import numpy_helper, shape_inference
from onnx.reference import ReferenceEvaluator

from dstack_sched.errors import InputError

MAX_CONSTANT_ELEMENTS = 4096
MAX_ROUNDS = 200
WEIGHT = "weight"
IMAGE_DIMS = (3, 224, 224)
SEQUENCE_DIMS = (128, 64)


class ShapedGraph(NamedTuple):
    """A graph at one batch size: nodes that compute, known shapes, bytes an element, names of constants, and
    those of the tensors that come in and go out."""

    nodes: tuple[onnx.NodeProto, ...]
    dims: Mapping[str, tuple[int, ...]]
    element_bytes: Mapping[str, int]
    constants: frozenset[str]
    ends: tuple[str, ...]


def load_graph(model_path: Path) -> onnx.ModelProto:
    """The model without its large weights: they become inputs, of which the shape remains.

    Errors: InputError when the file is no ONNX model.
    """
    try:
        model = onnx.load(str(model_path), load_external_data=False)
    except FileNotFoundError:
        raise InputError(f"{model_path}: no such file; name an ONNX model file") from None
    except Exception as error:  # protobuf raises classes of its own, by version
        raise InputError(f"{model_path}: is not an ONNX model ({str(error).splitlines()[0]})") from None
    return without_weights(model)


def without_weights(model: onnx.ModelProto) -> onnx.ModelProto:
    """The model with every initializer of more than MAX_CONSTANT_ELEMENTS turned into an input."""
    graph = model.graph
    light = onnx.ModelProto(ir_version=max(model.ir_version, 4), opset_import=model.opset_import)
    light.functions.extend(model.functions)
    light.graph.name = graph.name or "graph"
    light.graph.node.extend(graph.node)
    light.graph.output.extend(graph.output)
    names = {tensor.name for tensor in graph.initializer}
    light.graph.input.extend(value for value in graph.input if value.name not in names)
    for tensor in graph.initializer:
        if prod(tensor.dims) > MAX_CONSTANT_ELEMENTS or tensor.external_data:
            info = onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, list(tensor.dims))
            info.doc_string = WEIGHT
            light.graph.input.append(info)
        else:
            light.graph.initializer.append(tensor)
    return light


def has_free_batch(light: onnx.ModelProto) -> bool:
    """Whether the first dimension of some input is free: the batch. light: a model from `load_graph`."""
    inputs = [value.type.tensor_type.shape.dim for value in light.graph.input if value.doc_string != WEIGHT]
    return any(dims and dims[0].dim_value <= 0 for dims in inputs)


def infer(light: onnx.ModelProto, batch_size: int, shapes: Mapping[str, Sequence[int]]) -> ShapedGraph:
    """Shapes of all tensors. light: a model from `load_graph`, left as it was. shapes: NAME -> dimensions
    without the batch, for inputs with free ones. Errors: onnx's InferenceError or ValueError."""
    model = onnx.ModelProto()
    model.CopyFrom(light)
    _fix_inputs(model, batch_size, shapes)
    for value in model.graph.output:
        value.type.tensor_type.ClearField("shape")
    for _ in range(MAX_ROUNDS):
        inferred = shape_inference.infer_shapes(model, data_prop=True)
        dims, element_bytes = _known(inferred.graph)
        if not _fold(model.graph, dims):
            break
    weights = {value.name for value in model.graph.input if value.doc_string == WEIGHT}
    constants = weights | {tensor.name for tensor in model.graph.initializer}
    ends = [value.name for value in (*model.graph.input, *model.graph.output) if value.name not in constants]
    return ShapedGraph(tuple(model.graph.node), dims, element_bytes, frozenset(constants), tuple(ends))


def _fix_inputs(model: onnx.ModelProto, batch_size: int, shapes: Mapping[str, Sequence[int]]) -> None:
    for value in model.graph.input:
        if value.doc_string == WEIGHT:
            continue
        dims = value.type.tensor_type.shape.dim
        given = tuple(shapes.get(value.name) or (IMAGE_DIMS if len(dims) == 4 else SEQUENCE_DIMS))
        wanted = given if len(given) == len(dims) and value.name in shapes else (batch_size, *given)
        for axis, dim in enumerate(dims):
            if not (dim.HasField("dim_value") and dim.dim_value > 0):
                dim.dim_value = wanted[min(axis, len(wanted) - 1)]


def _known(graph: onnx.GraphProto) -> tuple[dict[str, tuple[int, ...]], dict[str, int]]:
    dims = {tensor.name: tuple(tensor.dims) for tensor in graph.initializer}
    element_bytes = {tensor.name: _width(tensor.data_type) for tensor in graph.initializer}
    for value in (*graph.input, *graph.value_info, *graph.output):
        tensor = value.type.tensor_type
        if tensor.HasField("shape") and all(dim.HasField("dim_value") for dim in tensor.shape.dim):
            dims[value.name] = tuple(dim.dim_value for dim in tensor.shape.dim)
            element_bytes[value.name] = _width(tensor.elem_type)
    return dims, element_bytes


def _fold(graph: onnx.GraphProto, dims: Mapping[str, tuple[int, ...]]) -> int:
    """Turn nodes whose result is known now into initializers. Returns how many."""
    values = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    kept, folded = [], 0
    for node in graph.node:
        results = _results(node, values, dims)
        if results is None:
            kept.append(node)
            continue
        folded += 1
        for name, array in zip(node.output, results, strict=False):
            values[name] = array
            graph.initializer.append(numpy_helper.from_array(array, name))
    if folded:
        del graph.node[:]
        graph.node.extend(kept)
    return folded


def _results(
    node: onnx.NodeProto, values: Mapping[str, np.ndarray], dims: Mapping[str, tuple[int, ...]]
) -> list[np.ndarray] | None:
    """What the node computes, None where that is not known or too large to keep."""
    attributes = {attribute.name: attribute for attribute in node.attribute}
    if node.op_type == "Shape" and node.input[0] in dims:
        start, end = (attributes[k].i if k in attributes else None for k in ("start", "end"))
        return [np.array(dims[node.input[0]][start:end], dtype=np.int64)]
    names = [name for name in node.input if name]
    if node.domain or any(name not in values for name in names) or node.op_type.startswith("Random"):
        return None
    if any(attribute.type == onnx.AttributeProto.GRAPH for attribute in node.attribute):
        return None
    try:
        results = ReferenceEvaluator(node).run(None, {name: values[name] for name in names})
    except Exception:  # an operator that the reference lacks is simply not folded
        return None
    arrays = [np.asarray(result) for result in results]
    return arrays if all(array.size <= MAX_CONSTANT_ELEMENTS for array in arrays) else None


def _width(data_type: int) -> int:
    """Bytes of one element; strings count as pointers."""
    if data_type == onnx.TensorProto.STRING:
        return 8
    return int(onnx.helper.tensor_dtype_to_np_dtype(data_type).itemsize) if data_type else 4
