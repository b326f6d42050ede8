"""What can go wrong in the backend. Each message is one line that names the thing and the mend."""

from __future__ import annotations


class BackendError(Exception):
    """Base of all errors that a user can cause or mend; anything else is a defect."""


class ModelError(BackendError):
    """The model file or its config cannot be used as it is: the model does not load."""


class DeviceError(BackendError):
    """The device or execution provider that the instance needs is not there."""


class RequestError(BackendError):
    """One request cannot be served; `code` names the Triton error code that its client sees."""

    code = "INVALID_ARG"


class RejectedError(RequestError):
    """The request was shed because its deadline cannot be met."""

    code = "UNAVAILABLE"


class CancelledError(RequestError):
    """The client gave up before the request ran."""

    code = "CANCELLED"


class RunError(RequestError):
    """ONNX Runtime failed on this batch."""

    code = "INTERNAL"


class DeviceLostError(RunError):
    """The CUDA context is broken (a fault of a kernel, the MPS daemon is gone): every later call in this
    process fails too. Answer, then end the process; a new one starts afresh."""


def one_line(error: BaseException | str) -> str:
    """The text of an error on one line, without ONNX Runtime's prefix of code and level."""
    text = " ".join(str(error).split())
    if text.startswith("[ONNXRuntimeError]"):
        text = text.split(" : ", 3)[-1]
    return text
