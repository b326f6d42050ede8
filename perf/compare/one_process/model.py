"""Alternative (g) as a Triton Python model: each network has a session, a stream, a thread in this process.

The nearest thing to Triton's own onnxruntime backend that runs here: nobody decides whose turn it is, and no
process has a share of the GPU. Sessions, graphs, batching and pipeline are the dstack backend's own.
"""

from __future__ import annotations

import importlib.util
import json
import sys
import threading
from collections.abc import Mapping
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils

import dstack_backend
from dstack_backend.instance import Instance, complete_config

SEPARATOR = "__"
OUTPUT = "answer"


def backend_model() -> Any:
    """The dstack backend's own glue to Triton: backend/dstack/model.py."""
    path = Path(dstack_backend.__file__).resolve().parent.parent / "model.py"
    spec = importlib.util.spec_from_file_location("dstack_model", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


glue = backend_model()


class PartRequest(glue.TritonRequest):  # type: ignore[misc, name-defined]
    """A request to one of the models, which its inputs name. Answers are sent, never kept: the thread that
    hands it over is not Triton's."""

    __slots__ = ("output",)

    def __init__(self, request: Any, output: str):
        super().__init__(request)
        self.output = output
        self.wanted = (output,)
        super().defer()

    def defer(self) -> None:
        """It is deferred from the start."""

    def feeds(self) -> dict[str, Any]:
        """The inputs, by the names that the model has for them."""
        return {name.split(SEPARATOR, 1)[1]: array for name, array in super().feeds().items()}

    def answer(self, outputs: Mapping[str, Any]) -> None:
        """The one output, a row a row of the batch."""
        array = np.asarray(outputs[self.output])
        super().answer({OUTPUT: array.reshape(len(array), -1)})


class Part:
    """One model of the process, with the thread that hands its requests over: `submit` may block, or run a
    batch itself, and must not hold up the other models."""

    def __init__(self, args: Mapping[str, str], model: str, folder: Path, batch_size: int, most_rows: int):
        config: dict[str, Any] = {
            "name": model, "backend": "dstack", "max_batch_size": most_rows,
            "parameters": {"batch_size": {"string_value": str(batch_size)}},
        }  # fmt: skip
        found = complete_config(config, folder / "1")
        config |= {"input": list(found.inputs), "output": list(found.outputs)}
        self.output: str = found.outputs[0]["name"]
        self._instance = Instance(
            {
                **args, "model_name": model, "model_version": "1", "model_instance_name": f"{model}_0",
                "model_repository": str(folder), "model_config": json.dumps(config),
            }
        )  # fmt: skip
        self.requests: SimpleQueue[PartRequest | None] = SimpleQueue()
        self._thread = threading.Thread(target=self._hand_over, name=f"feed-{model}", daemon=True)
        self._thread.start()

    def _hand_over(self) -> None:
        while (request := self.requests.get()) is not None:
            self._instance.submit([request])

    def close(self) -> None:
        self.requests.put(None)
        self._thread.join()
        self._instance.close()


class TritonPythonModel:
    """What Triton's stub calls."""

    def initialize(self, args: dict[str, str]) -> None:
        glue.log_to_triton()
        config = json.loads(args["model_config"])
        version = Path(args["model_repository"]) / args["model_version"]
        batch_sizes = json.loads((version / "models.json").read_text())
        self._parts = {
            model: Part(args, model, version / "models" / model, batch_size, config["max_batch_size"])
            for model, batch_size in batch_sizes.items()
        }

    def execute(self, requests: list[Any]) -> None:
        """Sort by model; their threads answer."""
        for request in requests:
            part = self._parts[request.inputs()[0].name().split(SEPARATOR, 1)[0]]
            part.requests.put(PartRequest(request, part.output))

    def finalize(self) -> None:
        for part in self._parts.values():
            part.close()


__all__ = ["TritonPythonModel", "pb_utils"]
