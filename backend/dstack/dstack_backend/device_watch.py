"""Looks after the device of an instance that has nothing to run.

A broken CUDA context shows at the next run; then requests have come for it already. An idle instance asks the
driver now and then, so that it ends, and is started afresh, before anybody needs it.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

from dstack_backend.errors import BackendError, DeviceLostError
from dstack_backend.stats import Stats

if TYPE_CHECKING:
    from dstack_backend.executor import Executor
    from dstack_backend.session import Session

EVERY_S = 1.0


class DeviceWatch:
    """A thread; start it once the instance serves."""

    def __init__(self, session: Session, executor: Executor, stats: Stats, every_s: float = EVERY_S) -> None:
        self._session, self._executor, self._stats = session, executor, stats
        self._every_s = every_s
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="dstack-watch", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """No look at the device from here on."""
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join()

    def _run(self) -> None:
        batches = self._stats.batches
        while not self._stop.wait(self._every_s):
            if self._stats.batches != batches:  # a run tells by itself
                batches = self._stats.batches
                continue
            try:
                self._session.check()
            except DeviceLostError as error:
                self._executor.lose(error)
                return
            except BackendError:  # the driver could not be asked: the next run will tell
                continue
