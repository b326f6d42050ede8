"""The programs of a session, by SM groups and batch size: made at load, or later by a thread of its own."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeAlias

from dstack_backend.cuda_groups import SmGroups
from dstack_backend.cuda_programs import Program
from dstack_backend.cuda_sessions import agree
from dstack_backend.errors import DeviceLostError, ModelError, one_line
from dstack_backend.tensors import Array

log = logging.getLogger("dstack")

Key: TypeAlias = tuple[int, int]  # (mask of SM groups, 0: all that the process has; batch size)
THREADS = 6  # that prepare programs at a time
MAX_EXTRA = 24  # programs made on demand beyond those of warm-up; the longest unused ones go first
# A program that takes longer than this is not made for other SM groups alone while the instance serves: cuDNN
# compiles for it, seconds on several cores, and those that the levels were prepared on do nearly as well.
QUICK_S = 1.0
RESERVE_BYTES = 1 << 30  # of device memory, left to others by programs that are made on demand
Trial: TypeAlias = Callable[[int], tuple[Mapping[str, Array], list[Array]]]  # size -> feeds, wanted answers


class Shelf:
    """make(size, stream, graphs) -> a Program not captured yet; trial(size) -> what it must answer.

    groups: None where the share is fixed. compute: the stream that programs are launched on. limit_bytes:
    device memory (0: no limit) that used_bytes() may reach."""

    def __init__(
        self,
        cuda: Any,
        make: Callable[[int, int, bool], Program],
        trial: Trial,
        *,
        compute: int,
        groups: SmGroups | None,
        graphs: bool,
        limit_bytes: int = 0,
        name: str = "",
    ):
        self._cuda, self._make, self._trial, self._compute = cuda, make, trial, compute
        self._groups, self._name, self._limit_bytes = groups, name, limit_bytes
        self.graphs = graphs  # as long as none failed
        self.bound = True  # as long as programs answer rightly at all
        self.used_bytes = 0
        self.launching = threading.Lock()  # held from find() until what was found is queued
        self._lock = threading.Lock()
        self._programs: dict[Key, Program] = {}
        self._kept: set[Key] = set()  # from warm-up
        self._last_use: dict[Key, int] = {}
        self._uses = 0
        self._refused: set[Key] = set()
        self._wished: list[Key] = []
        self._wishing: threading.Thread | None = None
        self._closing = False
        self._slowest_s = 0.0  # what a program took to make

    @property
    def preparing(self) -> int:
        """Programs that are still to be made in the background."""
        with self._lock:
            return len(self._wished)

    @property
    def sizes(self) -> list[int]:
        with self._lock:
            return sorted({size for _, size in self._programs})

    @property
    def captured(self) -> int:
        """Batch sizes with a CUDA graph."""
        with self._lock:
            return len({size for (_, size), program in self._programs.items() if program.captured})

    def find(self, mask: int, rows: int) -> tuple[int, Program] | None:
        """The program for a batch and its SM groups: the smallest size that holds it, on the groups nearest
        to the mask (0: those of the smallest key). What is missing is wished for.
        """
        with self._lock:
            sizes = [size for _, size in self._programs if size >= rows]
            if not sizes:
                return None
            size = min(sizes)
            masks = [each for each, its in self._programs if its == size]
            nearest = min(masks, key=lambda each: distance(each, mask))
            if nearest == mask or not mask:  # one that stands in for another is not wanted for itself
                self._uses += 1
                self._last_use[nearest, size] = self._uses
            program = self._programs[nearest, size]
        if nearest != mask and self._slowest_s <= QUICK_S:
            self.wish(mask, size)
        return nearest, program

    def prepare(self, keys: Sequence[Key], *, keep: bool = True) -> None:
        """Make the programs that are not there. What cannot be had is logged, once; batches do without.

        Several at a time: cuDNN compiles kernels for each on the host. One at a time where memory is
        bounded, to see what each takes; and again where some failed, for one that allocates may disturb one
        that captures. Raises DeviceLostError."""
        with self._lock:
            if keep:
                self._kept.update(keys)
            missing = [key for key in keys if key not in self._programs and key not in self._refused]
        if not missing or not self.bound:
            return
        several = 1 if self._limit_bytes else THREADS
        if self.graphs:
            missing = self._attempt_all(missing, several, graphs=True)
            self.graphs = bool(self._programs)
        if missing and self.graphs and several > 1:
            missing = self._attempt_all(missing, 1, graphs=True)
        if missing and not self.graphs and self._groups is None:
            missing = self._attempt_all(missing, several, graphs=False)
            self.bound = bool(self._programs)
        with self._lock:
            self._refused.update(missing)
        self._make_room()

    def _attempt_all(self, keys: Sequence[Key], several: int, *, graphs: bool) -> list[Key]:
        """Make programs, several at the same time, and see what they took; those that cannot be had."""
        refused: dict[Key, str] = {}
        with ThreadPoolExecutor(several, thread_name_prefix="dstack-prepare") as pool:
            for first in range(0, len(keys), several):
                some = keys[first : first + several]
                free_before = self._cuda.memory_info()[0]
                made = list(pool.map(lambda key: self._attempt(key, graphs), some))
                taken_bytes = max(0, free_before - self._cuda.memory_info()[0])
                for key, program in zip(some, made, strict=True):
                    if isinstance(program, str):
                        refused[key] = program
                    elif self._limit_bytes and self.used_bytes + taken_bytes > self._limit_bytes:
                        refused[key] = "gpu_memory_limit_mb would be exceeded"
                        self._end(program)
                        taken_bytes = 0
                    else:
                        with self._lock:
                            self._programs[key] = program
                self.used_bytes += taken_bytes
        what = "CUDA graph" if graphs else "bound buffers"
        for why in dict.fromkeys(refused.values()):
            sizes = sorted({key[1] for key in refused if refused[key] == why})
            log.warning("%s: no %s for batch sizes %s: %s", self._name, what, str(sizes)[1:-1], why)
        return list(refused)

    def _attempt(self, key: Key, graphs: bool) -> Program | str:
        """A program that passed its trial, or why there is none."""
        mask, size = key
        program, stream = None, 0
        began_s = time.monotonic()
        try:
            stream = self._groups.stream(mask) if self._groups else self._cuda.stream()
            program = self._make(size, stream, graphs)
            if graphs:
                program.capture()
            self._check(program)
            self._slowest_s = max(self._slowest_s, time.monotonic() - began_s)
            return program
        except DeviceLostError:
            raise
        except Exception as error:  # ONNX Runtime's own path can still do what cannot be captured or bound
            why = one_line(error)
        self._cuda.check()
        if program is not None:
            program.close()
        if stream:
            self._cuda.destroy_stream(stream)
        return why

    def _check(self, program: Program) -> None:
        """Raise ModelError unless it answers as it must: twice, for a first replay may leave something
        behind.
        """
        feeds, wanted = self._trial(program.size)
        for _ in range(2):
            got = program.answer(feeds)
            if len(got) != len(wanted) or not all(map(agree, wanted, got)):
                raise ModelError("its outputs differ from a plain run")

    # On demand

    def defer(self, keys: Sequence[Key]) -> None:
        """Have the programs made in the background, to be kept as those of prepare() are."""
        with self._lock:
            self._kept.update(keys)
        for mask, size in keys:
            self.wish(mask, size)

    def wish(self, mask: int, size: int) -> None:
        """Have a program made in the background, where one can be had."""
        key = mask, size
        with self._lock:
            refused = key in self._programs or key in self._refused or key in self._wished
            if refused or self._closing or not (self.bound and self.graphs):
                return
            self._wished.append(key)
            if self._wishing is None:
                self._wishing = threading.Thread(target=self._fulfil, name="dstack-programs", daemon=True)
                self._wishing.start()

    def _fulfil(self) -> None:
        while True:
            with self._lock:
                if not self._wished or self._closing:
                    self._wished.clear()
                    self._wishing = None
                    return
                keys = self._wished[:THREADS]
            try:
                if self._cuda.memory_info()[0] > RESERVE_BYTES:
                    self.prepare(keys, keep=False)
            except Exception as error:  # a lost device: the next launch says so to whom it concerns
                log.error("%s: cannot prepare SM groups %x: %s", self._name, keys[0][0], one_line(error))
                self._refused.update(keys)
            with self._lock:
                self._wished = self._wished[len(keys) :]

    def _make_room(self) -> None:
        """Drop the longest unused programs beyond MAX_EXTRA."""
        while True:
            with self.launching, self._lock:
                extra = [key for key in self._programs if key not in self._kept]
                if len(extra) <= MAX_EXTRA:
                    return
                key = min(extra, key=lambda each: self._last_use.get(each, self._uses))
                program = self._programs.pop(key)
            self._cuda.wait(self._compute)  # its last launch, if that is still under way
            self._drop(program)

    def _end(self, program: Program) -> None:
        program.close()
        self._cuda.destroy_stream(program.stream)

    def _drop(self, program: Program) -> None:
        free_before = self._cuda.memory_info()[0]
        self._end(program)
        self.used_bytes = max(0, self.used_bytes - max(0, self._cuda.memory_info()[0] - free_before))

    def clear(self) -> None:
        """Drop all programs, once nothing of them is under way; more can be made."""
        with self._lock:
            programs, self._programs = self._programs, {}
            self._kept.clear()
        for program in programs.values():
            self._drop(program)

    def close(self) -> None:
        """Stop the thread and drop everything."""
        with self._lock:
            self._closing = True
            thread = self._wishing
        if thread is not None:
            thread.join()
        self.clear()


def distance(have: int, wanted: int) -> tuple[int, int, int]:
    """How far a set of SM groups is from a wanted one: first by their number, then by how many are others."""
    if not wanted:
        return 0, 0, have
    return abs(have.bit_count() - wanted.bit_count()), (have ^ wanted).bit_count(), have
