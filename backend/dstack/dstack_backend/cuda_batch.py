"""A batch on its way through a CUDA session: what stage() and launch() return there."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Mapping
from typing import Any

from dstack_backend.cuda_pace import Finish
from dstack_backend.cuda_slots import Copy, Slot, Slots
from dstack_backend.errors import BackendError, DeviceLostError, RunError, one_line
from dstack_backend.tensors import Array, DeviceArray


class CudaBatch:
    """Staged and Running of a CudaSession: a slot on its way."""

    def __init__(self, slots: Slots, cuda: Any, device_id: int, slot: Slot, rows: int, *, whole: bool):
        self.slot, self.rows, self._whole = slot, rows, whole
        self.gpu_percent, self.sm_groups = 0.0, 0
        self._slots, self._cuda, self._device_id = slots, cuda, device_id
        self._names: tuple[str, ...] = ()
        self._left: tuple[str, ...] = ()
        self._times_us: dict[str, int] = {}
        self.finish: Finish | None = None
        self.copies: list[Copy] | None = None  # of its inputs, while they are not queued
        self.alone = False  # all of it is on one stream
        self._left_device = False  # its outputs are where they are wanted: nothing of it is under way
        self._closing = threading.Lock()
        self._closed = False

    def enter(self, stream: int) -> None:
        """Queue the copies of its inputs."""
        copies, self.copies = self.copies, None
        self.slot.enter(copies or (), stream)

    def launched(self, names: tuple[str, ...], left: tuple[str, ...], finish: Finish) -> None:
        self._names, self._left, self.finish = names, left, finish

    @property
    def times_us(self) -> Mapping[str, int]:
        return self._times_us

    def wait(self) -> None:
        with as_run_errors(self._cuda):
            self._cuda.use()
            if self.finish is not None:
                self.finish.doze()
            self._cuda.wait_event(self.slot.event["left" if self.alone else "computed"])
            self._left_device = self.alone
            if self.finish is not None:
                self.finish.reached()

    def outputs(self) -> list[Array]:
        with as_run_errors(self._cuda):
            if not self._left_device:
                self._cuda.use()
                self._cuda.wait_event(self.slot.event["left"])
                self._left_device = True
            self._times_us = self.slot.times_us()
            if self.finish is not None:
                self.finish.reached()
                if self.slot.timed:
                    self.finish.pace.learn(self._times_us["run"])
        hosts = [self.slot.outputs[name].host() for name in self._names]
        return [host[0] if self._whole else host[: self.rows] for host in hosts]

    def device_outputs(self) -> list[DeviceArray]:
        found = [self.slot.outputs[name] for name in self._left]
        rows = () if self._whole else (self.rows,)
        return [
            DeviceArray(each.device, (*rows, *each.row_shape), each.dtype, self._device_id, self)
            for each in found
        ]

    def close(self) -> None:
        """Also by an error in the middle: what was queued is waited for before the slot serves another
        batch.
        """
        with self._closing:
            closed, self._closed = self._closed, True
        if closed:
            return
        if self.finish is not None:
            self.finish.reached()
        if not self._left_device:
            with contextlib.suppress(BackendError):
                self._cuda.use()
                for event in ("arrived", "computed", "left"):
                    self._cuda.wait_event(self.slot.event[event])
        self._slots.give_back(self.slot)


class as_run_errors:  # noqa: N801  a context manager by use; a class, for it is entered four times a batch
    """Any failure as RunError; as DeviceLostError where the device is lost, whoever noticed."""

    __slots__ = ("_cuda",)

    def __init__(self, cuda: Any):
        self._cuda = cuda

    def __enter__(self) -> None: ...

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if not isinstance(error, Exception) or isinstance(error, DeviceLostError):
            return
        self._cuda.check()
        if not isinstance(error, RunError):
            raise RunError(one_line(error)) from error
