"""Requests, a gate and a device for tests of the backend's executor: no Triton, no socket, no model."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence

import numpy as np

from dstack_backend.errors import RequestError, RunError
from dstack_backend.interfaces import Listener, Permit

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
        self.budget_us = budget_us
        self.cancelled = cancelled
        self.others = dict(others or {})
        self.outputs: dict[str, np.ndarray] | None = None
        self.error: RequestError | None = None
        self.settled = threading.Event()
        self.times_settled = 0

    def feeds(self) -> dict[str, np.ndarray]:
        return {"x": self.x, **self.others}

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
        self.closed = False
        self._changed = threading.Condition()

    def start(self, listener: Listener) -> None:
        self.listener = listener

    def work(self) -> None:
        with self._changed:
            self.worked += 1
            self._changed.notify_all()

    def begin(self, permit: Permit, expected_us: int) -> bool:
        return permit not in self.void

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
    """y = 2 x, z = -x. A run can be held; rows of 13 fail. `batches` are the x of every run."""

    def __init__(self) -> None:
        self.batches: list[np.ndarray] = []
        self.names: list[list[str]] = []
        self.threads: set[int] = set()
        self.entered = threading.Semaphore(0)
        self.hold = threading.Event()
        self.hold.set()

    def run(self, feeds: Mapping[str, np.ndarray], names: Sequence[str]) -> list[np.ndarray]:
        self.batches.append(feeds["x"].copy())
        self.names.append(list(names))
        self.threads.add(threading.get_ident())
        self.entered.release()
        assert self.hold.wait(PATIENCE_S)
        x = feeds["x"]
        if x.size and x.ravel()[0] == 13:
            raise RunError("unlucky")
        if x.size and x.ravel()[0] == 666:
            raise ZeroDivisionError("a defect")
        if x.size and x.ravel()[0] == 7:
            return [x[:1] for _ in names]
        return [{"y": 2 * x, "z": -x}[name] for name in names]

    def wait_running(self) -> None:
        assert self.entered.acquire(timeout=PATIENCE_S), "nothing runs"
