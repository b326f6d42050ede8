"""A model at one batch size on one set of SMs: an ONNX Runtime session, fixed buffers, and a CUDA graph of
its run.

Each program has a session of its own. With several batch sizes in one session a convolution drops its cuDNN
plan when the size changes, and the kernels compiled for it: a graph captured before then replays unloaded
code (decision 0010). The graph is captured on a stream of the SMs it is for and keeps to them wherever it
is launched (decision 0060), so a session launches all of them on one compute stream, one behind the other.
"""

from __future__ import annotations

import gc
from collections.abc import Iterable, Mapping
from typing import Any

import onnxruntime as ort

from dstack_backend.cuda_pace import Pace
from dstack_backend.cuda_sessions import Form, Sessions
from dstack_backend.cuda_slots import Rows, Slot
from dstack_backend.errors import ModelError
from dstack_backend.tensors import Array

WARM_UPS = 2  # ONNX Runtime allocates in its first run, and plans its memory anew in the second


class Program:
    """A session bound to buffers of its own, on a stream of its own. Until capture() it runs node by node, on
    that stream only. graphs: it is to be captured; ModelError where ONNX Runtime sees why it cannot be."""

    def __init__(
        self,
        sessions: Sessions,
        cuda: Any,
        form: Form,
        size: int,
        stream: int,
        *,
        graphs: bool,
    ):
        self.size, self.stream = size, stream
        self.pace = Pace()
        self._cuda = cuda
        self._executable = 0
        self.inputs: dict[str, Rows] = {}
        self.outputs: dict[str, Rows] = {}
        self._session = self._binding = None
        try:
            self.inputs.update((spec.name, Rows(cuda, spec, size)) for spec in form.inputs)
            self.outputs.update((spec.name, Rows(cuda, spec, size)) for spec in form.outputs)
            self._session = sessions.open(stream, graphs=graphs)
            self._binding = self._bind(self._session, sessions.device_name, sessions.device_id, form.whole)
        except BaseException:
            self.close()
            raise
        self._options = run_options()

    def _bind(self, session: Any, device_name: str, device_id: int, whole: bool) -> Any:
        binding = session.io_binding()
        for bind, tensors in ((binding.bind_input, self.inputs), (binding.bind_output, self.outputs)):
            for name, rows in tensors.items():
                shape = rows.row_shape if whole else rows.shape
                bind(name, device_name, device_id, rows.dtype, shape, rows.device)
        return binding

    @property
    def captured(self) -> bool:
        return bool(self._executable)

    def run(self, slot: Slot, rows: int, names: Iterable[str], stream: int) -> None:
        """Queue it on a stream: the slot's rows in, the model, the rows of these outputs back."""
        copy = self._cuda.copy
        for name, target in self.inputs.items():
            copy(target.device, slot.inputs[name].device, rows * target.row_bytes, stream)
        self.start(stream)
        for name in names:
            source = self.outputs[name]
            copy(slot.outputs[name].device, source.device, rows * source.row_bytes, stream)

    def start(self, stream: int) -> None:
        """Queue the model alone."""
        if self._executable:
            self._cuda.launch(self._executable, stream)
        else:
            assert self._session is not None
            self._session.run_with_iobinding(self._binding, self._options)

    def capture(self) -> None:
        """Record a run as a graph. Raises what ONNX Runtime and the driver have against it, ModelError
        where the graph would depend on host memory.
        """
        for _ in range(WARM_UPS):
            self.start(self.stream)
        self._cuda.wait(self.stream)
        self._cuda.begin_capture(self.stream)
        try:
            self.start(self.stream)
        finally:
            graph = self._cuda.end_capture(self.stream)
        if self._cuda.touches_host(graph):
            self._cuda.destroy_graph(graph)
            raise ModelError("its graph reads or writes host memory")
        self._executable = self._cuda.instantiate(graph)

    def answer(self, feeds: Mapping[str, Array]) -> list[Array]:
        """Its outputs for a full batch, in graph order, with the rows first, by itself: for trials."""
        for name, rows in self.inputs.items():
            self._cuda.upload(rows.device, feeds[name].ctypes.data, feeds[name].nbytes)
        for rows in self.outputs.values():  # what was there before must not pass for an answer
            rows.host().view("u1").fill(0xFF)
            self._cuda.upload(rows.device, rows.host().ctypes.data, rows.size_bytes)
        self.start(self.stream)
        for rows in self.outputs.values():
            self._cuda.to_host(rows.host().ctypes.data, rows.device, rows.size_bytes, self.stream)
        self._cuda.wait(self.stream)
        return [rows.host().copy() for rows in self.outputs.values()]

    def close(self) -> None:
        """Once nothing of it is under way."""
        if self._executable:
            self._cuda.destroy_executable(self._executable)
            self._executable = 0
        self._binding = self._session = None
        gc.collect()  # a session that lingers in a cycle would outlive its stream
        for rows in (*self.inputs.values(), *self.outputs.values()):
            rows.close()
        self.inputs.clear()
        self.outputs.clear()


def run_options() -> ort.RunOptions:
    """ONNX Runtime is neither to capture (capture() does) nor to wait (events behind the run are all we
    need).
    """
    options = ort.RunOptions()
    options.add_run_config_entry("gpu_graph_id", "-1")
    options.add_run_config_entry("disable_synchronize_execution_providers", "1")
    return options
