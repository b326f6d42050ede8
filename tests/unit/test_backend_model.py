"""The glue to Triton, with a stand-in for triton_python_backend_utils."""

from __future__ import annotations

import importlib.util
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dstack_backend import dlpack
from dstack_backend.errors import RejectedError, RunError
from dstack_backend.tensors import DeviceArray

MODEL = Path(__file__).parents[2] / "backend" / "dstack" / "model.py"


class Response:
    def __init__(self, output_tensors: Any = None, error: Any = None):
        self.output_tensors, self.error = output_tensors, error


class Tensor:
    """A tensor as Triton hands it over or gets it back."""

    def __init__(self, name: str, array: Any, pointer: int = 0):
        self._name, self.array, self.pointer = name, array, pointer

    @staticmethod
    def from_dlpack(name: str, capsule: Any) -> Tensor:
        taken = dlpack.from_capsule(capsule)
        return Tensor(name, None, taken.pointer)

    def name(self) -> str:
        return self._name

    def is_cpu(self) -> bool:
        return not self.pointer

    def as_numpy(self) -> Any:
        assert self.is_cpu(), "Triton raises here"
        return self.array

    def to_dlpack(self) -> Any:
        kind = dlpack.type_code(self.array.dtype)
        return dlpack.capsule(self.pointer, self.array.shape, kind)


class Sender:
    def __init__(self) -> None:
        self.sent: list[Response] = []

    def send(self, response: Response, flags: int) -> None:
        assert flags == 1
        self.sent.append(response)


class Request:
    """Triton's side of a request; asking about one that was answered kills the server."""

    def __init__(self, *tensors: Tensor, parameters: str = "{}"):
        self.tensors, self._parameters = tensors, parameters
        self.sender = Sender()
        self.senders = 0
        self.asked = 0

    def requested_output_names(self) -> list[str]:
        return ["y"]

    def inputs(self) -> tuple[Tensor, ...]:
        return self.tensors

    def parameters(self) -> str:
        return self._parameters

    def timeout(self) -> int:
        return 0

    def get_response_sender(self) -> Sender:
        self.senders += 1
        return self.sender

    def is_cancelled(self) -> bool:
        assert not self.sender.sent, "SIGSEGV in TRITONBACKEND_ResponseFactoryIsCancelled"
        self.asked += 1
        return True


@pytest.fixture
def glue(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    utils = types.ModuleType("triton_python_backend_utils")
    utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL = 1  # type: ignore[attr-defined]
    utils.InferenceResponse, utils.Tensor = Response, Tensor  # type: ignore[attr-defined]

    class TritonError(Exception):
        INVALID_ARG, UNAVAILABLE, CANCELLED, INTERNAL = range(4)

    utils.TritonError = TritonError  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, utils.__name__, utils)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr("dstack_backend.numpy_bridge.install", lambda _: Tensor)
    interval = sys.getswitchinterval()
    spec = importlib.util.spec_from_file_location("dstack_model_under_test", MODEL)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    sys.setswitchinterval(interval)


def execute(glue: Any, submit: Any, *requests: Request) -> Any:
    model = glue.TritonPythonModel()
    model._instance = types.SimpleNamespace(submit=submit)
    return model.execute(list(requests))


def outputs() -> dict[str, np.ndarray]:
    return {"y": np.ones((1, 2), np.float32)}


def test_what_is_answered_at_once_is_returned(glue: Any) -> None:
    request, other = Request(), Request()

    def submit(taken: Any) -> None:
        taken[0].answer(outputs())
        taken[1].defer()

    returned = execute(glue, submit, request, other)
    assert returned[0].output_tensors[0].array.shape == (1, 2) and returned[1] is None
    assert request.senders == 0 and other.senders == 1 and not other.sender.sent


def test_what_is_answered_later_is_sent(glue: Any) -> None:
    request, held = Request(), []

    def submit(taken: Any) -> None:
        taken[0].defer()
        held.extend(taken)

    assert execute(glue, submit, request) is None
    held[0].fail(RejectedError("too late"))
    (response,) = request.sender.sent
    assert "too late" in str(response.error)


def test_a_defect_in_execute_answers_everything_and_does_not_raise(glue: Any) -> None:
    """Triton 2.51 dies when execute() raises after a response sender was taken."""
    kept, sent, done = Request(), Request(), Request()

    def submit(taken: Any) -> None:
        taken[1].defer()
        taken[2].defer()
        taken[2].answer(outputs())
        raise KeyError("a slip")

    returned = execute(glue, submit, kept, sent, done)
    assert "a slip" in str(returned[0].error) and returned[1:] == [None, None]
    assert [len(each.sender.sent) for each in (kept, sent, done)] == [0, 1, 1]
    assert done.sender.sent[0].error is None


def test_a_request_is_answered_once_and_not_asked_about_afterwards(glue: Any) -> None:
    request = Request()
    taken = glue.TritonRequest(request)
    taken.defer()
    assert taken.is_cancelled() and request.asked == 1
    taken.answer(outputs())
    taken.fail(RunError("too late"))
    assert not taken.is_cancelled()
    assert request.asked == 1 and len(request.sender.sent) == 1


def test_gpu_tensors_come_and_go_without_the_host(glue: Any) -> None:
    pointer = 0x7F00_0000_0000
    taken = glue.TritonRequest(Request(Tensor("x", np.empty((2, 3), np.float16), pointer)))
    feeds = taken.feeds()
    assert taken.on_device and isinstance(feeds["x"], DeviceArray)
    assert (feeds["x"].pointer, feeds["x"].shape, feeds["x"].dtype) == (pointer, (2, 3), np.float16)
    taken.answer({"y": feeds["x"][1:]})
    assert taken.response.output_tensors[0].pointer == pointer + 6


def test_a_request_with_one_tensor_on_the_host_is_answered_there(glue: Any) -> None:
    tensors = Tensor("x", np.empty((2, 3), np.float16), 4096), Tensor("z", np.zeros(2, np.float32))
    taken = glue.TritonRequest(Request(*tensors))
    feeds = taken.feeds()
    assert isinstance(feeds["x"], DeviceArray) and isinstance(feeds["z"], np.ndarray)
    assert not taken.on_device
