"""An open-loop client: requests leave at given times, whatever has come back. Run as a program of its own.

    python -m shifting.open_loop PLAN.npz RESULT.npz

perf_analyzer ends at the first request that is refused; here refusals are part of what is measured. Requests
are made once and sent as they are, answers are not looked into: two cores are shared with what is measured.
"""

from __future__ import annotations

import sys
import threading
import time
from pathlib import Path

import grpc
import numpy as np
from tritonclient.grpc import service_pb2

INFER = "/inference.GRPCInferenceService/ModelInfer"
ANSWER_WITHIN_S = 10.0
CHANNEL = [("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1)]
PENDING, ANSWERED, REFUSED, FAILED = range(4)


def request_bytes(model: str, inputs: dict[str, np.ndarray], types: dict[str, str]) -> bytes:
    """A ModelInferRequest, ready to send."""
    message = service_pb2.ModelInferRequest(model_name=model)
    for name, array in inputs.items():
        message.inputs.add(name=name, datatype=types[name], shape=array.shape)
        message.raw_input_contents.append(np.ascontiguousarray(array).tobytes())
    return bytes(message.SerializeToString())


class OpenLoop:
    """Sends and notes. models: name -> (send times in s from the start, request)."""

    def __init__(self, url: str, models: dict[str, tuple[np.ndarray, bytes]]) -> None:
        self._channels = {name: grpc.insecure_channel(url, CHANNEL) for name in models}
        self._call = {name: channel.unary_unary(INFER) for name, channel in self._channels.items()}
        self._models = models
        self.sent_s = {name: np.full(times.size, np.nan) for name, (times, _) in models.items()}
        self.latency_ms = {name: np.full(times.size, np.nan) for name, (times, _) in models.items()}
        self.outcome = {name: np.full(times.size, PENDING, np.int8) for name, (times, _) in models.items()}
        self._open = 0
        self._idle = threading.Condition()

    def run(self, begin_s: float) -> None:
        """Send all, the first ones at begin_s (wall clock); returns when the last answer is in."""
        schedule = sorted(
            (at, name, index) for name, (times, _) in self._models.items() for index, at in enumerate(times)
        )
        for at_s, name, index in schedule:
            wait_s = begin_s + at_s - time.time()
            if wait_s > 0:
                time.sleep(wait_s)
            self._send(name, index, begin_s)
        with self._idle:
            self._idle.wait_for(lambda: self._open == 0, ANSWER_WITHIN_S + 5)

    def _send(self, name: str, index: int, begin_s: float) -> None:
        with self._idle:
            self._open += 1
        self.sent_s[name][index] = time.time() - begin_s
        began = time.perf_counter()
        future = self._call[name].future(self._models[name][1], timeout=ANSWER_WITHIN_S)
        future.add_done_callback(lambda done: self._done(name, index, began, done))

    def _done(self, name: str, index: int, began: float, done: grpc.Future) -> None:
        self.latency_ms[name][index] = (time.perf_counter() - began) * 1e3
        error = done.exception()
        refused = error is not None and error.code() == grpc.StatusCode.UNAVAILABLE
        self.outcome[name][index] = ANSWERED if error is None else REFUSED if refused else FAILED
        if error is not None and not refused:
            print(f"{name}: {error.code()}: {error.details()}", file=sys.stderr)
        with self._idle:
            self._open -= 1
            if not self._open:
                self._idle.notify()


def main() -> None:
    plan = np.load(sys.argv[1], allow_pickle=False)
    names = [str(name) for name in plan["names"]]
    models = {name: (plan[f"{name}.times_s"], plan[f"{name}.request"].tobytes()) for name in names}
    load = OpenLoop(str(plan["url"]), models)
    load.run(float(plan["begin_s"]))
    columns = {"sent_s": load.sent_s, "latency_ms": load.latency_ms, "outcome": load.outcome}
    arrays = {f"{name}.{key}": column[name] for key, column in columns.items() for name in names}
    np.savez(Path(sys.argv[2]), **arrays)


if __name__ == "__main__":
    main()
