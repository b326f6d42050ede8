"""ONNX graphs as kernels: shapes, work and traffic recomputed by hand on small graphs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from dstack_sched.adapters.onnx_graph import graph_kernels, read_kernels
from dstack_sched.adapters.onnx_shapes import has_free_batch, load_graph, without_weights
from dstack_sched.domain.kernels import HOST_COPY
from dstack_sched.errors import InputError
from fakes.onnx_models import SlowSum

LIGHT = Path(onnx.__file__).parent / "backend/test/data/light"


def model_of(nodes, inputs, outputs, weights) -> onnx.ModelProto:
    """inputs, outputs: name -> dims; weights: name -> array."""

    def infos(tensors):
        return [
            helper.make_tensor_value_info(name, TensorProto.FLOAT, dims) for name, dims in tensors.items()
        ]

    graph = helper.make_graph(
        nodes,
        "g",
        infos(inputs),
        infos(outputs),
        [numpy_helper.from_array(np.asarray(value), name) for name, value in weights.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def kernels_of(model: onnx.ModelProto, **shapes):
    """Without the last record, that of the host's copies, which has a test of its own."""
    *kernels, copies = graph_kernels(without_weights(model), "g.onnx", shapes)
    assert copies.op == HOST_COPY
    return kernels


def test_a_convolution_with_what_is_fused_behind_it() -> None:
    """Conv + Relu + residual Add is one kernel; the Add's other operand is traffic of it."""
    model = model_of(
        [
            helper.make_node("Conv", ["x", "w1"], ["c1"], kernel_shape=[1, 1]),
            helper.make_node("Relu", ["c1"], ["r1"]),
            helper.make_node("Conv", ["r1", "w2"], ["c2"], kernel_shape=[3, 3], pads=[1, 1, 1, 1]),
            helper.make_node("Add", ["c2", "r1"], ["y"]),
        ],
        {"x": ["batch", 8, 10, 10]},
        {"y": ["batch", 16, 10, 10]},
        {"w1": np.zeros((16, 8, 1, 1), np.float32), "w2": np.zeros((16, 16, 3, 3), np.float32)},
    )
    first, second = kernels_of(model)
    assert (first.rows_fixed, first.rows_per_row, first.columns, first.depth) == (0, 100, 16, 8)
    assert (second.rows_per_row, second.columns, second.depth) == (100, 16, 16 * 9)
    assert (first.groups_fixed, first.groups_per_row) == (1, 0)
    assert first.bytes_fixed == 4 * 16 * 8
    assert first.bytes_per_row == 4 * (8 + 16) * 100
    assert second.bytes_fixed == 4 * 16 * 16 * 9
    assert second.bytes_per_row == 4 * (16 + 16 + 16) * 100, "in, out, and the residual once"


def test_inputs_and_outputs_are_copied_by_the_host() -> None:
    model = model_of(
        [helper.make_node("MatMul", ["x", "w"], ["y"])],
        {"x": ["batch", 64]},
        {"y": ["batch", 8]},
        {"w": np.zeros((64, 8), np.float32)},
    )
    copies = graph_kernels(without_weights(model), "g.onnx", {})[-1]
    assert (copies.op, copies.bytes_fixed, copies.bytes_per_row) == (HOST_COPY, 0, 4 * (64 + 8))


def test_a_depthwise_convolution_has_a_group_a_channel() -> None:
    model = model_of(
        [
            helper.make_node(
                "Conv", ["x", "w"], ["y"], group=32, strides=[2, 2], pads=[1, 1, 1, 1], kernel_shape=[3, 3]
            )
        ],
        {"x": ["batch", 32, 20, 20]},
        {"y": ["batch", 32, 10, 10]},
        {"w": np.zeros((32, 1, 3, 3), np.float32)},
    )
    (kernel,) = kernels_of(model)
    assert (kernel.rows_per_row, kernel.columns, kernel.depth, kernel.groups_fixed) == (100, 1, 9, 32)


def test_products_with_weights_and_of_activations() -> None:
    """Rows of a product with weights grow with the batch; in attention it is the number of products."""
    model = model_of(
        [
            helper.make_node("MatMul", ["x", "w"], ["q"]),
            helper.make_node("Transpose", ["q"], ["k"], perm=[0, 2, 1]),
            helper.make_node("MatMul", ["q", "k"], ["s"]),
            helper.make_node("Softmax", ["s"], ["y"]),
        ],
        {"x": ["batch", 6, 64]},
        {"y": ["batch", 6, 6]},
        {"w": np.zeros((64, 32), np.float32)},
    )
    weights, transpose, scores, softmax = kernels_of(model)
    assert (weights.rows_fixed, weights.rows_per_row, weights.columns, weights.depth) == (0, 6, 32, 64)
    assert (scores.rows_fixed, scores.rows_per_row, scores.columns, scores.depth) == (6, 0, 6, 32)
    assert (scores.groups_fixed, scores.groups_per_row) == (0, 1)
    assert [k.op for k in (transpose, softmax)] == ["Transpose", "Softmax"]
    assert (softmax.depth, softmax.rows_per_row) == (0, 36)


def test_shapes_that_the_graph_computes_are_followed() -> None:
    """Exporters write Shape, Gather, Concat, Reshape for a free batch: onnx alone loses the shape there."""
    model = model_of(
        [
            helper.make_node("Shape", ["x"], ["shape"]),
            helper.make_node("Gather", ["shape", "zero"], ["n"]),
            helper.make_node("Mul", ["n", "two"], ["n2"]),
            helper.make_node("Unsqueeze", ["n2", "axis"], ["n3"]),
            helper.make_node("Concat", ["n3", "rest"], ["target"], axis=0),
            helper.make_node("Reshape", ["x", "target"], ["r"]),
            helper.make_node("MatMul", ["r", "w"], ["y"]),
        ],
        {"x": ["batch", 8]},
        {"y": None},
        {
            "zero": np.int64(0),
            "two": np.int64(2),
            "axis": np.array([0]),
            "rest": np.array([4]),
            "w": np.zeros((4, 5), np.float32),
        },
    )
    (kernel,) = kernels_of(model)
    assert (kernel.rows_fixed, kernel.rows_per_row, kernel.columns, kernel.depth) == (0, 2, 5, 4)


def test_free_dimensions_take_the_sizes_given() -> None:
    model = model_of(
        [helper.make_node("Conv", ["x", "w"], ["y"], kernel_shape=[1, 1])],
        {"x": ["batch", 3, "height", "width"]},
        {"y": None},
        {"w": np.zeros((16, 3, 1, 1), np.float32)},
    )
    assert kernels_of(model)[0].rows_per_row == 224 * 224
    assert kernels_of(model, x=(3, 48, 320))[0].rows_per_row == 48 * 320


def test_a_fixed_batch_has_no_slope() -> None:
    kernels = read_kernels(LIGHT / "light_squeezenet.onnx")
    assert all(k.rows_per_row == k.groups_per_row == k.bytes_per_row == 0 for k in kernels)
    assert not has_free_batch(load_graph(LIGHT / "light_squeezenet.onnx"))


@pytest.mark.parametrize(
    ("name", "gflops"),
    # Published multiply-adds times two: 4.1, 19.6 and 0.7 (AlexNet with groups) billion.
    [("light_resnet50", 8.2), ("light_vgg19", 39.3), ("light_bvlc_alexnet", 1.4)],
)
def test_known_networks_have_their_published_work(name: str, gflops: float) -> None:
    kernels = read_kernels(LIGHT / f"{name}.onnx")
    flops = sum(2 * k.rows_fixed * k.columns * k.depth * k.groups_fixed for k in kernels)
    assert flops / 1e9 == pytest.approx(gflops, rel=0.08)


def test_large_weights_are_not_needed(tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    SlowSum("m", inner=256, depth=3).save(path)
    light = load_graph(path)
    assert has_free_batch(light)
    assert light.ByteSize() < path.stat().st_size / 10
    kernels = read_kernels(path)[:-1]
    assert [(k.rows_per_row, k.columns, k.depth) for k in kernels] == [
        (1, 256, 32),
        *[(1, 256, 256)] * 3,
        (1, 32, 256),
    ]


def test_what_cannot_be_read_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"none\.onnx: no such file"):
        read_kernels(tmp_path / "none.onnx")
    (tmp_path / "x.onnx").write_bytes(b"\x00garbage")
    with pytest.raises(InputError, match=r"x\.onnx: is not an ONNX model"):
        read_kernels(tmp_path / "x.onnx")
