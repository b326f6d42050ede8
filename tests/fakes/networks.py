"""A network with the layers that GPUs are fast at, small enough for a test."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import onnx
from onnx import TensorProto, helper

from fakes.feature_models import model, value

SIDE, CHANNELS = 32, (3, 32, 64, 64)


def convolutional(seed: int = 0) -> onnx.ModelProto:
    """Three convolutions with batch normalisation, a pool and a matrix product: "scores" of "image"."""
    rng = np.random.default_rng(seed)
    nodes, constants, at = [], {}, "image"
    for index, (before, after) in enumerate(pairwise(CHANNELS)):
        weight = rng.standard_normal((after, before, 3, 3)) / np.sqrt(9 * before)
        constants[f"w{index}"] = weight.astype(np.float32)
        for name, low in (("scale", 0.5), ("bias", -0.5), ("mean", -0.1), ("variance", 0.5)):
            constants[f"{name}{index}"] = (low + rng.random(after)).astype(np.float32)
        normal = [f"{name}{index}" for name in ("scale", "bias", "mean", "variance")]
        nodes += [
            helper.make_node("Conv", [at, f"w{index}"], [f"c{index}"], pads=[1] * 4, strides=[2, 2]),
            helper.make_node("BatchNormalization", [f"c{index}", *normal], [f"n{index}"]),
            helper.make_node("Relu", [f"n{index}"], [f"r{index}"]),
        ]
        at = f"r{index}"
    constants["head"] = rng.standard_normal((CHANNELS[-1], 10)).astype(np.float32)
    nodes += [
        helper.make_node("GlobalAveragePool", [at], ["pooled"]),
        helper.make_node("Flatten", ["pooled"], ["flat"]),
        helper.make_node("MatMul", ["flat", "head"], ["scores"]),
    ]
    inputs = [value("image", TensorProto.FLOAT, ["batch", CHANNELS[0], SIDE, SIDE])]
    return model(nodes, inputs, [value("scores", TensorProto.FLOAT, ["batch", 10])], constants)
