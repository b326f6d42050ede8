"""Whether a model's convolutions run faster with channels last: tried once for a model and a device, then
known.

On an H100 ResNet-50 takes 16 to 20% less time so (decision 0061); other models lose by the transposes.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from dstack_backend.cuda_programs import Program
from dstack_backend.cuda_sessions import Sessions, agree, form_of, samples
from dstack_backend.errors import DeviceError, DeviceLostError, ModelError, one_line
from dstack_backend.onnx_file import operators
from dstack_backend.optimized import key_of
from dstack_backend.runtime import specs_of

log = logging.getLogger("dstack")

ROWS = 8
ROUNDS, RUNS = 5, 8  # rounds take turns; the best round counts: others may use the device meanwhile
WORTH = 0.97  # of the time that the usual layout takes
_CHOICE = "choice.json"


def with_best_layout(make: Callable[[bool], Sessions], cuda: Any) -> Sessions:
    """make(nhwc) -> Sessions; the ones to use, by options.conv_layout. Raises DeviceLostError."""
    usual = make(False)
    wanted = usual.options.conv_layout
    if wanted == "auto":
        return make(True) if _is_faster(make, usual, cuda) else usual
    return make(True) if wanted == "nhwc" else usual


def _is_faster(make: Callable[[bool], Sessions], usual: Sessions, cuda: Any) -> bool:
    def fill(entry: Path) -> None:
        (entry / _CHOICE).write_text(json.dumps(_try(make, cuda)), encoding="utf-8")

    try:
        if not usual.options.cuda_graphs or "Conv" not in operators(usual.path):
            return False
        key = key_of(usual.path, [*usual.traits, "layout"])
        choice = json.loads((usual.cache.get(key, fill, 4096) / _CHOICE).read_text(encoding="utf-8"))
        return bool(choice["nhwc"])
    except DeviceLostError:
        raise
    except Exception as error:  # a model that cannot be tried can be served all the same
        log.info("%s: channels last not tried: %s", usual.path, one_line(error))
        return False


def _try(make: Callable[[bool], Sessions], cuda: Any) -> dict[str, Any]:
    """What is found, also that it cannot be tried; raise only what may be otherwise the next time."""
    try:
        return _measure(make, cuda)
    except (ModelError, DeviceError) as error:
        if "memory" in str(error).lower():
            raise
        return {"nhwc": False, "why": one_line(error)}


def _measure(make: Callable[[bool], Sessions], cuda: Any) -> dict[str, Any]:
    """Time and answers of both layouts; nhwc: the better one in all respects."""
    with ExitStack() as stack:
        usual, other = (stack.enter_context(_Candidate(make(nhwc), cuda)) for nhwc in (False, True))
        with ThreadPoolExecutor(2) as pool:  # cuDNN compiles kernels for each, on the host
            list(pool.map(_Candidate.prepare, (usual, other)))
        for _ in range(ROUNDS):
            for candidate in (usual, other):
                candidate.time()
        same = all(map(agree, usual.answer(), other.answer()))
        shares = bool(other.sessions.shared_bytes) or not usual.sessions.shared_bytes
        faster = other.best_us < WORTH * usual.best_us
        return {
            "nhwc": same and shares and faster,
            "us": {"nchw": usual.best_us / RUNS, "nhwc": other.best_us / RUNS, "rows": ROWS},
            "same": same,
            "shares_weights": shares,
        }


class _Candidate:
    """A layout on trial: a captured program of ROWS rows. Errors: those of Sessions and Program."""

    def __init__(self, sessions: Sessions, cuda: Any):
        self.sessions, self._cuda = sessions, cuda
        self.best_us = float("inf")
        self._stream = cuda.stream()
        self._events: tuple[int, ...] = ()
        self._program: Program | None = None

    def __enter__(self) -> _Candidate:
        return self

    def prepare(self) -> None:
        """Everything up to the first round."""
        self.sessions.share(self._stream)
        form = form_of(*specs_of(self.sessions.open(self._stream), self.sessions.path))
        if form is None:
            raise ModelError("it has other dynamic dimensions than the batch")
        rows = 1 if form.whole else ROWS
        self._feeds = samples(form.inputs, rows, seed=rows)
        self._program = Program(self.sessions, self._cuda, form, rows, self._stream, graphs=True)
        self._program.capture()
        self._events = self._cuda.event(), self._cuda.event()

    def time(self) -> None:
        """One round."""
        assert self._program is not None
        start, end = self._events
        self._cuda.record(start, self._stream)
        for _ in range(RUNS):
            self._program.start(self._stream)
        self._cuda.record(end, self._stream)
        self._cuda.wait(self._stream)
        self.best_us = min(self.best_us, self._cuda.elapsed_us(start, end))

    def answer(self) -> list[Any]:
        assert self._program is not None
        return self._program.answer(self._feeds)

    def __exit__(self, *_: object) -> None:
        if self._program is not None:
            self._program.close()
        for event in self._events:
            self._cuda.destroy_event(event)
        self.sessions.close()
        self._cuda.destroy_stream(self._stream)
