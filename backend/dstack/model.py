"""The dstack backend: glue between Triton's Python backend and dstack_backend. See README.md beside it."""

from __future__ import annotations

import faulthandler
import json
import logging
import signal
import sys
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))  # our dstack_backend wins over an installed one

import numpy as np
import triton_python_backend_utils as pb_utils

from dstack_backend import dlpack, numpy_bridge
from dstack_backend.errors import BackendError, RequestError, RunError, one_line
from dstack_backend.instance import Instance, complete_config
from dstack_backend.metrics import Publisher, labels_of
from dstack_backend.tensors import DeviceArray, text_of

log = logging.getLogger("dstack")
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
        faulthandler.register(signal.SIGUSR1)  # a stub that hangs says where, into Triton's log
        try:
            self._instance = Instance(args)
        except BackendError as error:
            raise pb_utils.TritonModelException(str(error)) from None
        settings = self._instance.settings
        self._metrics = Publisher(
            pb_utils,
            self._instance.stats,
            labels_of(settings.model, settings.version, settings.instance),
            self._instance.gauges,
        )
        self._instance.before_end = self._metrics.close
        self._metrics.start()

    def execute(self, requests: list[Any]) -> list[Any] | None:
        """Accept requests; those that are not answered here and now (None) other threads answer. Blocks while
        enough waits here."""
        taken = [TritonRequest(request) for request in requests]
        try:
            self._instance.submit(taken)
        except Exception as error:  # Triton 2.51 dies where execute() raises after a sender was taken
            log.exception("execute() failed")
            for request in taken:
                request.fail(RunError(f"{type(error).__name__}: {one_line(error)}"))
        responses = [request.response for request in taken]
        return responses if any(responses) else None

    def finalize(self) -> None:
        self._instance.close()
        self._metrics.close()


class TritonRequest:
    """dstack_backend.interfaces.Request over a request of Triton's. response: the answer, if it is kept.

    Triton must not be asked about a request that was answered: it crashes.
    """

    __slots__ = ("_answered", "_lock", "_request", "_sender", "on_device", "response", "wanted")

    def __init__(self, request: Any):
        self._request = request
        self._sender: Any = None
        self._answered = False
        self._lock = threading.Lock()
        self.on_device = False
        self.response: Any = None
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

    def feeds(self) -> dict[str, Any]:
        feeds: dict[str, Any] = {}
        tensors = self._request.inputs()
        on_device = 0
        for tensor in tensors:
            if not tensor.is_cpu():
                on_device += 1
                feeds[tensor.name()] = dlpack.from_capsule(tensor.to_dlpack())
                continue
            array = tensor.as_numpy()
            if array.dtype == np.object_:
                array = text_of(array, tensor.name())
            feeds[tensor.name()] = array
        self.on_device = on_device == len(tensors) > 0
        return feeds

    def defer(self) -> None:
        self._sender = self._request.get_response_sender()

    def is_cancelled(self) -> bool:
        with self._lock:
            return not self._answered and bool(self._request.is_cancelled())

    def answer(self, outputs: Mapping[str, Any]) -> None:
        tensors = [
            pb_utils.Tensor.from_dlpack(name, dlpack.to_capsule(array))
            if isinstance(array, DeviceArray)
            else make_tensor(name, array)
            for name, array in outputs.items()
        ]
        self._respond(pb_utils.InferenceResponse(output_tensors=tensors))

    def fail(self, error: RequestError) -> None:
        code = getattr(pb_utils.TritonError, error.code)
        self._respond(pb_utils.InferenceResponse(error=pb_utils.TritonError(str(error), code)))

    def _respond(self, response: Any) -> None:
        with self._lock:
            if self._answered:
                return
            self._answered = True
        if self._sender is None:
            self.response = response
        else:
            self._sender.send(response, flags=FINAL)


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
    if not log.handlers:
        log.addHandler(TritonLog())
        log.setLevel(logging.INFO)
        log.propagate = False
