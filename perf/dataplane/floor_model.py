"""A model of Triton's Python backend that answers with zeros, at once or after `busy_us` (a parameter of its
config): what Triton itself takes of a request. Meanwhile it spins, as a thread that waits for a GPU does.

server.py copies this file into a model repository as 1/model.py; the config names inputs and outputs.
"""

import json
import time

import numpy as np
import triton_python_backend_utils as pb_utils

from dstack_backend import numpy_bridge

make_tensor = numpy_bridge.install(pb_utils)


class TritonPythonModel:
    """What Triton's stub calls."""

    def initialize(self, args):
        """Shapes and types of the outputs, without the batch."""
        config = json.loads(args["model_config"])
        busy_us = config.get("parameters", {}).get("busy_us", {}).get("string_value", "0")
        self._busy_ns = 1000 * int(busy_us)
        self._outputs = [
            (
                output["name"],
                [int(dim) for dim in output["dims"]],
                pb_utils.triton_string_to_numpy(output["data_type"]),
            )
            for output in config["output"]
        ]

    def execute(self, requests):
        """One answer a request, of as many rows; inputs are where Triton has put them, and are not read."""
        until_ns = time.perf_counter_ns() + self._busy_ns
        while time.perf_counter_ns() < until_ns:
            pass
        answers = []
        for request in requests:
            rows = request.inputs()[0].shape()[0]
            tensors = [make_tensor(name, np.zeros([rows, *dims], kind)) for name, dims, kind in self._outputs]
            answers.append(pb_utils.InferenceResponse(output_tensors=tensors))
        return answers
