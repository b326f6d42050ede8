"""Small ONNX models for tests that serve, made on the spot, and what they compute, in plain NumPy."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

WIDTH = 32


class SlowSum:
    """y = x W^depth with W orthogonal-like, so that a batch takes a while; rows do not mix.

    Input "x_NAME" and output "y_NAME": FP32 [-1, WIDTH]; names differ by model, as perf_analyzer needs.
    detours: so many times W and W^-1 on the way, which takes time and changes no answer.
    """

    def __init__(
        self, name: str, *, inner: int = 512, depth: int = 24, seed: int = 0, detours: int = 0
    ) -> None:
        rng = np.random.default_rng(seed)
        self.name = name
        self.depth = depth
        self.detours = detours
        self.enter = (rng.standard_normal((WIDTH, inner)) / np.sqrt(WIDTH)).astype(np.float32)
        q, _ = np.linalg.qr(rng.standard_normal((inner, inner)))
        self.turn = q.astype(np.float32)
        self.leave = (rng.standard_normal((inner, WIDTH)) / np.sqrt(inner)).astype(np.float32)

    def save(self, path: Path) -> None:
        matrices = {"enter": self.enter, "turn": self.turn, "leave": self.leave}
        if self.detours:
            matrices["back"] = self.turn.T.copy()
        steps = ["enter", *["turn"] * self.depth, *["turn", "back"] * self.detours, "leave"]
        names = [f"x_{self.name}", *(f"h{i}" for i in range(len(steps) - 1)), f"y_{self.name}"]
        nodes = [helper.make_node("MatMul", [names[i], step], [names[i + 1]]) for i, step in enumerate(steps)]
        graph = helper.make_graph(
            nodes,
            self.name,
            [helper.make_tensor_value_info(names[0], TensorProto.FLOAT, ["batch", WIDTH])],
            [helper.make_tensor_value_info(names[-1], TensorProto.FLOAT, ["batch", WIDTH])],
            [numpy_helper.from_array(value, name) for name, value in matrices.items()],
        )
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
        path.parent.mkdir(parents=True, exist_ok=True)
        onnx.save(model, str(path))

    def expected(self, x: np.ndarray) -> np.ndarray:
        """What the model answers, within float32 tolerance."""
        h = x @ self.enter
        for _ in range(self.depth):
            h = h @ self.turn
        return h @ self.leave


def add_model(
    repository: Path, model: SlowSum, *, gpu_percent: float, slo_ms: float, batch_size: int = 8
) -> None:
    """Put the model into a Triton repository, with a config of its own."""
    model.save(repository / model.name / "1" / "model.onnx")
    parameters = {"gpu_percent": f"{gpu_percent:g}", "slo_ms": f"{slo_ms:g}", "batch_size": str(batch_size)}
    lines = "\n".join(
        f'parameters {{ key: "{key}" value {{ string_value: "{value}" }} }}'
        for key, value in parameters.items()
    )
    (repository / model.name / "config.pbtxt").write_text(
        f'backend: "dstack"\nmax_batch_size: {batch_size}\ndynamic_batching {{ }}\n'
        f"instance_group [ {{ kind: KIND_CPU count: 1 }} ]\n{lines}\n"
    )
