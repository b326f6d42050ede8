"""Requests, a gate and a device for tests of the backend's executor: no Triton, no socket, no model."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from dstack_backend.errors import DeviceLostError, RequestError, RunError
from dstack_backend.interfaces import Listener, Permit
from dstack_backend.tensors import DeviceArray, TensorSpec

PATIENCE_S = 10.0


class FakeRequest:
    """A request of rows of `x`; the answer of FakeDevice to it is twice `x`."""

    def __init__(
        self,
        x: np.ndarray | Sequence[float] | float = 1.0,
        *,
        wanted: Sequence[str] = ("y",),
        budget_us: int = 0,
        cancelled: bool = False,
        others: Mapping[str, np.ndarray] | None = None,
    ):
        self.x = np.atleast_2d(np.asarray(x, np.float32)).T if np.ndim(x) < 2 else np.asarray(x)
        self.wanted = tuple(wanted)
        self.on_device = False
        self.deferred = False
        self.budget_us = budget_us
        self.cancelled = cancelled
        self.others = dict(others or {})
        self.outputs: dict[str, np.ndarray] | None = None
        self.error: RequestError | None = None
        self.settled = threading.Event()
        self.times_settled = 0

    def feeds(self) -> dict[str, np.ndarray]:
        return {"x": self.x, **self.others}

    def defer(self) -> None:
        self.deferred = True

    def is_cancelled(self) -> bool:
        return self.cancelled

    def answer(self, outputs: Mapping[str, np.ndarray]) -> None:
        self.outputs = {name: array.copy() for name, array in outputs.items()}
        self._settle()

    def fail(self, error: RequestError) -> None:
        self.error = error
        self._settle()

    def _settle(self) -> None:
        self.times_settled += 1
        self.settled.set()

    def wait(self) -> FakeRequest:
        assert self.settled.wait(PATIENCE_S), "never answered"
        return self


class ManualGate:
    """Grants when the test says so. `calls` is the story; `done_of` the rows of each permit."""

    def __init__(self) -> None:
        self.listener: Listener | None = None
        self.void: set[Permit] = set()
        self.finished: list[tuple[Permit, int, int]] = []
        self.worked = 0
        self.at_hand: list[Permit] = []  # what take() gives
        self.begun: list[Permit] = []
        self.closed = False
        self._changed = threading.Condition()

    def start(self, listener: Listener) -> None:
        self.listener = listener

    def work(self) -> None:
        with self._changed:
            self.worked += 1
            self._changed.notify_all()

    def take(self) -> Permit | None:
        return self.at_hand.pop() if self.at_hand else None

    def begin(self, permit: Permit, rows: int, expected_us: int) -> bool:
        if permit in self.void:
            return False
        self.begun.append(permit)
        return True

    def done(self, permit: Permit, rows: int, late: int, run_us: int) -> None:
        with self._changed:
            self.finished.append((permit, rows, late))
            self._changed.notify_all()

    def close(self) -> None:
        self.closed = True

    def grant(self, batch_size: int, *, void: bool = False) -> Permit:
        permit = Permit(batch_size, 100.0)
        if void:
            self.void.add(permit)
        assert self.listener is not None
        self.listener.on_grant(permit)
        return permit

    def wait_done(self, count: int) -> list[int]:
        """Rows of the permits used up, once there are `count`."""
        with self._changed:
            assert self._changed.wait_for(lambda: len(self.finished) >= count, PATIENCE_S), "no done came"
            return [rows for _, rows, _ in self.finished]


class FakeDevice:
    """A session: y = 2 x, z = -x. A run can be held; rows of 13 fail, of 99 lose the device.

    `batches` are the x of every launch. synchronous: it runs in launch(), as the CPU provider does; else in
    wait(). on_run is called in each run.
    """

    def __init__(self, synchronous: bool = True, on_run: Callable[[], None] = lambda: None) -> None:
        self.inputs = (TensorSpec("x", "tensor(float)", ("batch", None)),)
        self.outputs = tuple(TensorSpec(name, "tensor(float)", ("batch", None)) for name in ("y", "z"))
        self.levels: tuple[float, ...] = ()
        self.groups = self.graphs = self.preparing = self.device_bytes = 0
        self.synchronous, self.on_run = synchronous, on_run
        self.takes_parts = False
        self.prepared_rows = 0  # the largest batch it is prepared for; 0: any
        self.parts: list[int] = []  # how many parts each batch came in
        self.batches: list[np.ndarray] = []
        self.names: list[list[str]] = []
        self.asked: list[tuple[float | None, int]] = []  # gpu_percent, sm_groups of every launch
        self.staged = 0
        self.open = 0  # batches between stage() and close()
        self.waiting = 0  # launched and not yet waited for
        self.most_launched = 0
        self.threads: set[int] = set()
        self.checks, self.lost = 0, False
        self.entered = threading.Semaphore(0)
        self.hold = threading.Event()
        self.hold.set()

    def rows_at_once(self, rows: int) -> int:
        return max(1, min(rows, self.prepared_rows or rows))

    def stage(self, feeds: Mapping[str, Any]) -> FakeBatch:
        self.staged += 1
        self.open += 1
        x = feeds["x"]
        if isinstance(x, list):
            assert self.takes_parts
            self.parts.append(len(x))
            x = np.concatenate(x)
        return FakeBatch(self, x.copy())

    def launch(
        self,
        staged: FakeBatch,
        outputs: Sequence[str] | None = None,
        *,
        device_outputs: Sequence[str] = (),
        gpu_percent: float | None = None,
        sm_groups: int = 0,
    ) -> FakeBatch:
        self.batches.append(staged.x)
        self.names.append(list(outputs or ()))
        self.asked.append((gpu_percent, sm_groups))
        self.threads.add(threading.get_ident())
        self.waiting += 1
        self.most_launched = max(self.most_launched, self.waiting)
        staged.names, staged.device_names = list(outputs or ()), list(device_outputs)
        if self.synchronous:
            try:
                staged.run()
            except Exception:  # `staged` is used up, also by an error
                staged.close()
                self.waiting -= 1
                raise
        return staged

    def allocate(self, shape: tuple[int, ...], dtype: object) -> np.ndarray:
        return np.empty(shape, dtype)

    def check(self) -> None:
        self.checks += 1
        if self.lost:
            raise DeviceLostError("the MPS server is gone")

    def wait_running(self) -> None:
        assert self.entered.acquire(timeout=PATIENCE_S), "nothing runs"


class FakeBatch:
    """Staged and Running."""

    def __init__(self, device: FakeDevice, x: np.ndarray):
        self.device, self.x, self.rows = device, x, len(x)
        self.names: list[str] = []
        self.device_names: list[str] = []
        self.times_us = {"copy_in": 5, "run": 100, "copy_out": 7}
        self.closed = False

    def run(self) -> None:
        self.device.entered.release()
        self.device.on_run()
        assert self.device.hold.wait(PATIENCE_S)
        first = self.x.ravel()[0] if self.x.size else 0
        if first == 13:
            raise RunError("unlucky")
        if first == 666:
            raise ZeroDivisionError("a defect")
        if first == 99:
            raise DeviceLostError("the context is gone")

    def wait(self) -> None:
        try:
            if not self.device.synchronous:
                self.run()
        finally:
            self.device.waiting -= 1

    def outputs(self) -> list[np.ndarray]:
        if self.x.size and self.x.ravel()[0] == 7:
            return [self.x[:1] for _ in self.names]
        return [{"y": 2 * self.x, "z": -self.x}[name] for name in self.names]

    def device_outputs(self) -> list[DeviceArray]:
        """At made-up addresses: whoever reads them crashes."""
        return [
            DeviceArray(4096 * (1 + number), (self.rows, 10), np.dtype(np.float32), 0, self)
            for number in range(len(self.device_names))
        ]

    def close(self) -> None:
        if not self.closed:
            self.closed = True
            self.device.open -= 1
