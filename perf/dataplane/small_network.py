"""A small network of convolutions with random weights, for parts that load often."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

CHANNELS, SIDE, CLASSES = (3, 16, 32), 32, 10


def save_network(path: Path, seed: int = 0) -> None:
    """Convolutions with biases, a pool and a matrix product: "small_scores" [batch, CLASSES] of "small_image"
    [batch, 3, SIDE, SIDE]."""
    rng = np.random.default_rng(seed)
    nodes, constants, at = [], {}, "small_image"
    for index, (before, after) in enumerate(pairwise(CHANNELS)):
        constants[f"w{index}"] = rng.standard_normal((after, before, 3, 3)) / np.sqrt(9 * before)
        constants[f"b{index}"] = rng.standard_normal(after)
        names = [at, f"w{index}", f"b{index}"]
        nodes += [
            helper.make_node("Conv", names, [f"c{index}"], pads=[1] * 4, strides=[2, 2]),
            helper.make_node("Relu", [f"c{index}"], [f"r{index}"]),
        ]
        at = f"r{index}"
    constants["head"] = rng.standard_normal((CHANNELS[-1], CLASSES))
    nodes += [
        helper.make_node("GlobalAveragePool", [at], ["pooled"]),
        helper.make_node("Flatten", ["pooled"], ["flat"]),
        helper.make_node("MatMul", ["flat", "head"], ["small_scores"]),
    ]
    graph = helper.make_graph(
        nodes,
        "small",
        [helper.make_tensor_value_info("small_image", TensorProto.FLOAT, ["batch", CHANNELS[0], SIDE, SIDE])],
        [helper.make_tensor_value_info("small_scores", TensorProto.FLOAT, ["batch", CLASSES])],
        [numpy_helper.from_array(value.astype(np.float32), name) for name, value in constants.items()],
    )
    opset = [helper.make_opsetid("", 17)]
    onnx.save(helper.make_model(graph, opset_imports=opset, ir_version=8), str(path))
