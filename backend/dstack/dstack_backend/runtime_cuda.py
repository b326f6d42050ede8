"""A model on a CUDA device: batches pass through slots, programs compute them, copies overlap computation.

Where a model's shapes are fixed but for the batch, it has a program (cuda_programs.py: a CUDA graph with
buffers) for each of a few batch sizes, and a batch is padded up to the next one; its rows alone are copied.
Programs are used where a trial shows that the model allows them and that they answer as ONNX Runtime's own
path does. All else takes that path: models with other dynamic shapes, and batches larger than any program.

With levels, a program belongs to a set of SM groups (cuda_groups.py). A launch on groups that have no
program yet takes the nearest that have, and a thread prepares the wanted ones."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import logging
import math
import os
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dstack_backend.cuda_batch import CudaBatch, as_run_errors
from dstack_backend.cuda_devices import cuda_version, ordinal_of
from dstack_backend.cuda_driver import driver
from dstack_backend.cuda_groups import CUDA_OF_LEVELS, SmGroups, sm_groups
from dstack_backend.cuda_host import HostMemory
from dstack_backend.cuda_layout import with_best_layout
from dstack_backend.cuda_levels import Levels
from dstack_backend.cuda_pace import Finish
from dstack_backend.cuda_plain import PlainBatch, PlainPath
from dstack_backend.cuda_programs import Program
from dstack_backend.cuda_sessions import TRIAL_ROWS, CudaOptions, Form, Sessions, form_of, shape_of
from dstack_backend.cuda_shelf import Key, Shelf
from dstack_backend.cuda_slots import Leaving, Slots, lifted, row_bytes, rows_of
from dstack_backend.errors import DeviceError, DeviceLostError, ModelError, RunError
from dstack_backend.optimized import Cache
from dstack_backend.runtime import specs_of
from dstack_backend.session import Running, Staged, TwoPhases
from dstack_backend.staging import aligned
from dstack_backend.tensors import Array, Feed

log = logging.getLogger("dstack")

# Copies of a batch this small may take the compute stream while nothing else is under way: a batch that is
# launched behind it waits for no more than some microseconds.
ALONE_BYTES = 2 << 20
GROWTH = 8  # times the largest batch prepared: up to there a program is made on demand
MPS_PERCENT = "CUDA_MPS_ACTIVE_THREAD_PERCENTAGE"


def load_cuda_session(
    model_path: Path, gpu_percent: float, device_id: int, options: CudaOptions
) -> CudaSession:
    """Load a model on a device. Without levels, its GPU% is that of the whole process from now on.

    Raises ModelError, DeviceError.
    """
    if options.process_memory_limit_bytes:
        from dstack_backend.mps_limits import limit_memory

        limit_memory(device_id, options.process_memory_limit_bytes)
    options = that_run(options, cuda_version())
    limit_process(100.0 if options.levels else gpu_percent)
    device_id = ordinal_of(device_id)
    cuda = driver(device_id)
    try:
        cache = Cache()
        sessions = with_best_layout(
            lambda nhwc: Sessions(model_path, device_id, options, cuda, cache, nhwc=nhwc), cuda
        )
        return CudaSession(sessions, cuda, gpu_percent)
    except DeviceError:
        raise
    except RunError as error:  # a device that was lost while loading
        raise DeviceError(str(error)) from error


def that_run(options: CudaOptions, version: int) -> CudaOptions:
    """The options on a driver of that CUDA version: without levels where it has none and none are needed.
    Decided before the context is made, as the share is MPS's then, for the whole process."""
    if options.levels_needed or version >= CUDA_OF_LEVELS:
        return options
    return dataclasses.replace(options, levels=())


def limit_process(gpu_percent: float) -> None:
    """Set this process's MPS limit before its CUDA context is made. Raises DeviceError if it has another."""
    wanted = f"{gpu_percent:g}"
    if os.environ.setdefault(MPS_PERCENT, wanted) != wanted:
        raise DeviceError(
            f"gpu_percent {wanted} asked of a process that runs at {os.environ[MPS_PERCENT]}: MPS fixes it "
            f"when the process starts; unset {MPS_PERCENT} or load the model in a process of its own"
        )


class CudaSession(TwoPhases):
    """Session on a CUDA device. cuda: its Driver. groups: the SM groups that levels are made of."""

    takes_parts = True

    def __init__(self, sessions: Sessions, cuda: Any, gpu_percent: float, groups: SmGroups | None = None):
        options = sessions.options
        self._cuda, self._sessions, self._gpu_percent = cuda, sessions, gpu_percent
        self._host = HostMemory(cuda)
        self._last: tuple[int, Finish] | None = None  # of the last launch: its stream, and when it will end
        free_before = cuda.memory_info()[0]
        self._groups = (groups or sm_groups(cuda)) if options.levels else None
        group_count = len(self._groups.sms) if self._groups else 0
        self._levels = Levels(group_count, gpu_percent, options.levels, str(sessions.path))
        self._streams = self._copy_in, self._compute, self._copy_out = [cuda.stream() for _ in range(3)]
        self._plain_stream = self._groups.stream(self._levels.mask()) if self._groups else cuda.stream()
        try:
            if options.cuda_graphs:
                sessions.share(self._plain_stream)
            self._plain = PlainPath(sessions, cuda, self._plain_stream)
            self.inputs, self.outputs = specs_of(self._plain.specs, sessions.path)
        except BaseException:
            self._release()
            raise
        self._names = [spec.name for spec in self.outputs]
        form = form_of(self.inputs, self.outputs)
        self._form = form or Form((), ())
        self._slots = Slots(cuda, self._form.inputs, self._form.outputs)
        self._row_bytes = sum(map(row_bytes, (*self._form.inputs, *self._form.outputs)))
        self._turn = cuda.event()  # the last launch is done
        self._shelf = Shelf(
            cuda,
            self._program,
            self._trial,
            compute=self._compute,
            groups=self._groups,
            graphs=options.cuda_graphs,
            limit_bytes=options.memory_limit_bytes,
            name=str(sessions.path),
        )
        self._shelf.bound = form is not None
        self._reference: tuple[dict[str, Array], list[Array]] | None = None
        self._referring = threading.Lock()
        self._loaded_bytes = max(0, free_before - cuda.memory_info()[0])
        self._shelf.used_bytes = sessions.shared_bytes

    @property
    def levels(self) -> tuple[float, ...]:
        """As Session.levels; none where the model cannot be captured: it keeps to its own share."""
        return self._levels.percents if self._shelf.graphs and self._shelf.bound else ()

    @property
    def groups(self) -> int:
        return self._levels.groups if self.levels else 0

    @property
    def graphs(self) -> int:
        return self._shelf.captured

    @property
    def preparing(self) -> int:
        return self._shelf.preparing

    @property
    def device_bytes(self) -> int:
        """As far as free memory told while it was taken: other processes that load meanwhile blur it."""
        return (
            self._loaded_bytes + self._shelf.used_bytes - self._sessions.shared_bytes + self._slots.size_bytes
        )

    # Preparing

    def warm_up(self, batch_sizes: Sequence[int], within_s: float = math.inf) -> None:
        """As Session.warm_up: make the programs of these batch sizes, at every level; of fixed shapes there
        is but one. Raises DeviceLostError."""
        sizes = sorted({1 if self._form.whole else size for size in batch_sizes if size > 0})
        began_s = time.monotonic()
        first, rest = sizes, []
        if within_s < math.inf and not self._sessions.options.memory_limit_bytes:
            first, rest = [*sizes[:1], *sizes[1:][-1:]], sizes[1:-1]
        self._shelf.prepare(self._keys(first))
        if time.monotonic() - began_s <= within_s:
            self._shelf.prepare(self._keys(rest))
        elif rest:
            log.info("%s: batch sizes %s follow while it serves", self._sessions.path, str(rest)[1:-1])
            self._shelf.defer(self._keys(rest))
        self._slots.capacity = max([self._slots.capacity, *self._shelf.sizes])

    def _keys(self, sizes: Sequence[int]) -> list[Key]:
        return [(mask, size) for mask in self._levels.homes for size in sizes]

    def forget(self) -> None:
        """Drop the programs; warm_up() makes them again. Only while nothing is under way."""
        self._cuda.wait(self._compute)
        self._shelf.clear()

    def _program(self, size: int, stream: int, graphs: bool) -> Program:
        return Program(self._sessions, self._cuda, self._form, size, stream, graphs=graphs)

    def _trial(self, size: int) -> tuple[dict[str, Array], list[Array]]:
        """Feeds and right answers for a program of this size: a few rows, answered once on the plain path,
        again and again. A model whose rows mix, or are not rows out what they are in, fails it. Raises
        ModelError.
        """
        with self._referring:
            if self._reference is None:
                self._reference = self._refer()
        feeds, answers = self._reference
        tile = np.arange(size) % len(answers[0])
        return {name: array[tile] for name, array in feeds.items()}, [array[tile] for array in answers]

    def _refer(self) -> tuple[dict[str, Array], list[Array]]:
        rows = 1 if self._form.whole else TRIAL_ROWS
        feeds, answers = self._sessions.reference(self.inputs, rows, self._plain_stream)
        for answer, spec in zip(answers, self.outputs, strict=True):
            if answer.shape != shape_of(spec, rows):
                raise ModelError(f"output {spec.name!r} has not a row for each row of the batch")
        if self._form.whole:
            return {name: array[None] for name, array in feeds.items()}, [each[None] for each in answers]
        return feeds, answers

    def allocate(self, shape: tuple[int, ...], dtype: Any) -> Array:
        """As Session.allocate: page-locked where inputs are copied to memory of ours."""
        if not self._shelf.bound or np.dtype(dtype).hasobject:
            return aligned(shape, dtype)
        return self._host.allocate(shape, np.dtype(dtype))

    # Batches

    def stage(self, feeds: Mapping[str, Feed]) -> Staged:
        """As Session.stage."""
        with as_run_errors(self._cuda):
            whole = self._form.whole
            rows = 1 if whole else rows_of(feeds)
            if not self._takes(feeds, rows):
                return PlainBatch(self._plain.to_host(feeds), rows, self._gpu_percent)
            self._cuda.use()
            if whole:
                feeds = {name: lifted(feed) for name, feed in feeds.items()}
            slot = self._slots.lease(rows)
            batch = CudaBatch(self._slots, self._cuda, self._sessions.device_id, slot, rows, whole=whole)
            try:
                batch.copies = slot.gather(feeds, self._host)
                if self._slots.in_use > 1 or rows * self._row_bytes > ALONE_BYTES:
                    batch.enter(self._copy_in)
            except BaseException:
                self._cuda.wait(self._copy_in)
                self._slots.give_back(slot)
                raise
            return batch

    def rows_at_once(self, rows: int) -> int:
        """As Session.rows_at_once. ONNX Runtime's own path can take seconds for a batch size new to it."""
        sizes = [] if self._form.whole else self._shelf.sizes
        if not sizes or rows <= sizes[-1]:
            return max(1, rows)
        self._shelf.wish(self._levels.mask(), bucket_of(min(rows, GROWTH * sizes[-1])))
        return sizes[-1]

    def _takes(self, feeds: Mapping[str, Feed], rows: int) -> bool:
        """Whether there is a program for it."""
        sizes = self._shelf.sizes if rows and len(feeds) == len(self.inputs) else []
        return bool(sizes) and rows <= sizes[-1]

    def launch(
        self,
        staged: Staged,
        outputs: Sequence[str] | None = None,
        *,
        device_outputs: Sequence[str] = (),
        gpu_percent: float | None = None,
        sm_groups: int = 0,
    ) -> Running:
        """As Session.launch."""
        names = tuple(outputs if outputs is not None else () if device_outputs else self._names)
        if isinstance(staged, PlainBatch):
            return self._run_plain(staged, names, device_outputs)
        assert isinstance(staged, CudaBatch)
        try:
            with as_run_errors(self._cuda), self._shelf.launching:
                self._cuda.use()
                mask = self._levels.clip(sm_groups) or self._levels.mask(gpu_percent)
                self._queue(staged, names, tuple(device_outputs), mask)
        except BaseException:
            staged.close()
            raise
        return staged

    def _queue(self, batch: CudaBatch, names: tuple[str, ...], left: tuple[str, ...], mask: int) -> None:
        found = self._shelf.find(mask, batch.rows)
        if found is None:
            raise RunError("the programs for this batch were dropped between stage() and launch()")
        mask, program = found
        stream = self._compute if program.captured else program.stream
        last_stream, ahead = self._last or (stream, None)
        if stream != last_stream:
            self._cuda.hold(stream, self._turn)
        if batch.copies is not None and program.captured:
            self._queue_alone(batch, program, Leaving(batch.rows, names, left))
        else:
            self._queue_overlapped(batch, program, Leaving(batch.rows, names, left), stream)
        finish = program.pace.behind(ahead)
        batch.launched(names, left, finish)
        batch.gpu_percent = self._levels.percent(mask) if mask else self._gpu_percent
        batch.sm_groups = mask
        self._last = stream, finish

    def _queue_alone(self, batch: CudaBatch, program: Program, leaving: Leaving) -> None:
        assert batch.copies is not None
        copies, batch.copies, batch.alone = batch.copies, None, True
        try:
            batch.slot.run_alone(program, copies, leaving, self._compute)
        except BaseException:  # what was queued has no event to be waited for by
            self._cuda.wait(self._compute)
            raise

    def _queue_overlapped(self, batch: CudaBatch, program: Program, leaving: Leaving, stream: int) -> None:
        cuda, slot = self._cuda, batch.slot
        if batch.copies is not None:
            batch.enter(self._copy_in)
        cuda.hold(stream, slot.event["arrived"])
        slot.mark("started", stream)
        program.run(slot, batch.rows, dict.fromkeys((*leaving.names, *leaving.left)), stream)
        cuda.record(slot.event["computed"], stream)
        if not program.captured:
            cuda.record(self._turn, stream)
        slot.leave(leaving.names, batch.rows, self._copy_out)

    def _run_plain(self, batch: PlainBatch, names: Sequence[str], left: Sequence[str]) -> PlainBatch:
        with as_run_errors(self._cuda):
            batch.execute(lambda: self._plain.run(batch.feeds, [*names, *left]))
            batch.leave_on_device(len(left), self._cuda)
        return batch

    def check(self) -> None:
        self._cuda.use()
        self._cuda.check()

    def close(self) -> None:
        """Give the device memory back, once nothing is under way."""
        if not self._streams:
            return
        with contextlib.suppress(DeviceLostError):  # nothing is under way there, all of it is gone already
            self._cuda.use()
            for stream in self._streams:
                self._cuda.wait(stream)
            self._shelf.close()
            self._slots.close()
            self._cuda.destroy_event(self._turn)
            self._host.close()
        self._release()

    def _release(self) -> None:
        """The sessions, then what they stand on."""
        if hasattr(self, "_plain"):
            self._plain.close()
        gc.collect()  # a session in a cycle would outlive its stream and its weights
        with contextlib.suppress(DeviceLostError):
            self._sessions.close()
            for stream in (*self._streams, self._plain_stream):
                self._cuda.destroy_stream(stream)
        self._streams = []


def bucket_of(rows: int) -> int:
    """The next power of two."""
    return 1 << (rows - 1).bit_length()
