"""The dstack backend: glue between Triton's Python backend and dstack_backend. See README.md beside it."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))  # our dstack_backend wins over an installed one

import numpy as np
import triton_python_backend_utils as pb_utils

from dstack_backend import numpy_bridge
from dstack_backend.errors import BackendError, RequestError
from dstack_backend.instance import Instance, complete_config
from dstack_backend.metrics import Publisher, labels_of
from dstack_backend.tensors import text_of

FINAL = pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL
# The device thread must not wait 5 ms, Python's default, for a thread that loops over strings.
sys.setswitchinterval(0.0005)
make_tensor = numpy_bridge.install(pb_utils)


class TritonPythonModel:
    """What Triton's stub calls."""

    @staticmethod
    def auto_complete_config(auto_complete_model_config: Any) -> Any:
        """Fill inputs, outputs, max_batch_size and dynamic batching from the graph."""
        log_to_triton()
        config = auto_complete_model_config.as_dict()
        try:
            completion = complete_config(config, version_dir())
        except BackendError as error:
            raise pb_utils.TritonModelException(str(error)) from None
        auto_complete_model_config.set_max_batch_size(completion.max_batch_size)
        for tensor in completion.inputs:
            add_tensor(auto_complete_model_config.add_input, config["input"], tensor)
        for tensor in completion.outputs:
            add_tensor(auto_complete_model_config.add_output, config["output"], tensor)
        if completion.max_batch_size and "sequence_batching" not in config:
            auto_complete_model_config.set_dynamic_batching()
        return auto_complete_model_config

    def initialize(self, args: dict[str, str]) -> None:
        log_to_triton()
        try:
            self._instance = Instance(args)
        except BackendError as error:
            raise pb_utils.TritonModelException(str(error)) from None
        settings = self._instance.settings
        self._metrics = Publisher(
            pb_utils,
            self._instance.stats,
            labels_of(settings.model, settings.version, settings.instance),
            {"gpu_percent": settings.gpu_percent, "batch_size": settings.batch_size},
        )
        self._metrics.start()

    def execute(self, requests: list[Any]) -> None:
        """Accept requests; other threads answer them. Blocks while enough waits here."""
        self._instance.submit([TritonRequest(request) for request in requests])

    def finalize(self) -> None:
        self._instance.close()
        self._metrics.close()


class TritonRequest:
    """dstack_backend.batching.Request over a request of Triton's."""

    __slots__ = ("_request", "_sender", "wanted")

    def __init__(self, request: Any):
        self._request = request
        self._sender = request.get_response_sender()
        self.wanted = tuple(request.requested_output_names())

    @property
    def budget_us(self) -> int:
        """Parameter deadline_ms, else Triton's timeout, counted from arrival here; 0: neither given."""
        parameters = self._request.parameters()
        if len(parameters) > 2:  # more than "{}"
            value = json.loads(parameters).get("deadline_ms")
            if value is not None:
                return parse_deadline_us(value)
        return int(self._request.timeout())

    def feeds(self) -> dict[str, np.ndarray]:
        feeds = {}
        for tensor in self._request.inputs():
            array = tensor.as_numpy()
            if array.dtype == np.object_:
                array = text_of(array, tensor.name())
            feeds[tensor.name()] = array
        return feeds

    def is_cancelled(self) -> bool:
        return bool(self._request.is_cancelled())

    def answer(self, outputs: dict[str, np.ndarray]) -> None:
        tensors = [make_tensor(name, array) for name, array in outputs.items()]
        self._sender.send(pb_utils.InferenceResponse(output_tensors=tensors), flags=FINAL)

    def fail(self, error: RequestError) -> None:
        code = getattr(pb_utils.TritonError, error.code)
        self._sender.send(
            pb_utils.InferenceResponse(error=pb_utils.TritonError(str(error), code)), flags=FINAL
        )


def parse_deadline_us(value: Any) -> int:
    """A deadline_ms parameter in microseconds. Raises RequestError."""
    try:
        deadline_us = int(float(value) * 1000)
    except (TypeError, ValueError, OverflowError):
        deadline_us = 0
    if not 0 < deadline_us <= 1 << 52:
        raise RequestError(f"request parameter deadline_ms is {value!r}; a positive number is wanted")
    return deadline_us


def add_tensor(
    add: Callable[[dict[str, Any]], None], tensors: list[dict[str, Any]], tensor: dict[str, Any]
) -> None:
    """Add an input or output to a config; Triton's helper does not know reshape: that is set afterwards."""
    add({key: value for key, value in tensor.items() if key != "reshape"})
    for each in tensors:
        if each["name"] == tensor["name"] and "reshape" in tensor:
            each["reshape"] = tensor["reshape"]


def version_dir() -> Path:
    """The version directory of the model that is being completed: Triton tells the stub's command line only,
    whose first argument is <version directory>/model.py."""
    arguments = Path("/proc/self/cmdline").read_bytes().split(b"\0")
    return Path(arguments[1].decode()).parent


class TritonLog(logging.Handler):
    """Our log in Triton's."""

    def emit(self, record: logging.LogRecord) -> None:
        message = self.format(record)
        if record.levelno >= logging.ERROR:
            pb_utils.Logger.log_error(message)
        elif record.levelno >= logging.WARNING:
            pb_utils.Logger.log_warn(message)
        else:
            pb_utils.Logger.log_info(message)


def log_to_triton() -> None:
    log = logging.getLogger("dstack")
    if not log.handlers:
        log.addHandler(TritonLog())
        log.setLevel(logging.INFO)
        log.propagate = False
