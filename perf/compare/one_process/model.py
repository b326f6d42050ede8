"""Alternative (g) as a Triton Python model: each network has a session, a stream, a thread in this process.

The nearest thing to Triton's own onnxruntime backend that runs here: nobody decides whose turn it is, and no
process has a share of the GPU. Sessions, graphs, batching and pipeline are the dstack backend's own.
"""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils

import dstack_backend
from dstack_backend.instance import Instance

SEPARATOR = "__"
OUTPUT = "answer"


def backend_model() -> Any:
    """The dstack backend's own glue to Triton: backend/dstack/model.py."""
    path = Path(dstack_backend.__file__).resolve().parent.parent / "model.py"
    spec = importlib.util.spec_from_file_location("dstack_model", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


glue = backend_model()


class PartRequest(glue.TritonRequest):  # type: ignore[misc, name-defined]
    """A request to one of the models, which its inputs name."""

    __slots__ = ("model", "output")

    def __init__(self, request: Any, model: str, output: str):
        super().__init__(request)
        self.model, self.output = model, output
        self.wanted = (output,)

    def feeds(self) -> dict[str, np.ndarray]:
        """The inputs, by the names that the model has for them."""
        return {name.split(SEPARATOR, 1)[1]: array for name, array in super().feeds().items()}

    def answer(self, outputs: dict[str, np.ndarray]) -> None:
        """The one output, a row a row of the batch."""
        array = np.asarray(outputs[self.output])
        super().answer({OUTPUT: array.reshape(len(array), -1)})


class TritonPythonModel:
    """What Triton's stub calls."""

    def initialize(self, args: dict[str, str]) -> None:
        glue.log_to_triton()
        config = json.loads(args["model_config"])
        version = Path(args["model_repository"]) / args["model_version"]
        batch_sizes = json.loads((version / "models.json").read_text())
        self._instances = {
            model: Instance(
                {
                    **args,
                    "model_name": model,
                    "model_version": "1",
                    "model_instance_name": f"{model}_0",
                    "model_repository": str(version / "models" / model),
                    "model_config": json.dumps(
                        {
                            "name": model,
                            "backend": "dstack",
                            "max_batch_size": config["max_batch_size"],
                            "parameters": {"batch_size": {"string_value": str(batch_size)}},
                        }
                    ),
                }
            )
            for model, batch_size in batch_sizes.items()
        }
        self._outputs = {model: each.output_names[0] for model, each in self._instances.items()}

    def execute(self, requests: list[Any]) -> None:
        """Sort by model; their threads answer."""
        by_model: dict[str, list[PartRequest]] = {}
        for request in requests:
            model = request.inputs()[0].name().split(SEPARATOR, 1)[0]
            by_model.setdefault(model, []).append(PartRequest(request, model, self._outputs[model]))
        for model, part in by_model.items():
            self._instances[model].submit(part)

    def finalize(self) -> None:
        for instance in self._instances.values():
            instance.close()


__all__ = ["TritonPythonModel", "pb_utils"]
