"""A batch on its way through the device: gather, stage, launch, wait, bring its outputs out.

The Pipeline knows the session and the staging memory, and neither queue nor gate. The executor says which
thread does what; each call below is about one job, and a job's calls come in the order above. Launches, and
for a session that computes in launch() the runs themselves, come one at a time: the caller holds `turn`.
"""

from __future__ import annotations

import math
import threading
import time

from dstack_backend.batching import Batch, check_rows
from dstack_backend.errors import RequestError, RunError, one_line
from dstack_backend.interfaces import Feeds, Permit
from dstack_backend.session import Running, Session, Staged
from dstack_backend.staging import Staging
from dstack_backend.tensors import Array, DeviceArray, TensorSpec

# Outputs this large stay in device memory where the inputs came in it; below, Triton's exchange of CUDA
# memory handles costs more than a copy.
LARGE_BYTES = 1 << 20


class Job:
    """A permit on its way through the stages; `stage_us`: how long each took."""

    __slots__ = (
        "ahead", "batch", "begun", "buffers", "ended_ns", "error", "here", "launched_ns", "names",
        "on_device", "outputs", "permit", "running", "stage_us", "staged", "unanswered",
    )  # fmt: skip

    def __init__(self, permit: Permit):
        self.permit = permit
        self.batch: Batch | None = None
        self.ahead = False  # made before its permit has come
        self.begun = False  # its permit was found good, and it is on the device
        self.here = False  # Triton's own thread runs and answers it
        self.buffers: Feeds = {}
        self.names: list[str] = []
        self.on_device: list[str] = []  # those of `names` whose outputs stay in device memory
        self.staged: Staged | None = None
        self.running: Running | None = None
        self.outputs: dict[str, Array | DeviceArray] = {}
        self.error: RequestError | None = None
        self.stage_us: dict[str, int] = {}
        self.launched_ns = self.ended_ns = 0
        self.unanswered = 0  # slices of its parts that helpers still answer

    def made(self, now_us: int) -> None:
        """Its batch is made: note how long the requests were on their way to it."""
        assert self.batch is not None
        items = [part.item for part in self.batch.parts]
        count = len(items)
        self.stage_us["hand_over"] = sum(item.queued_us - item.arrival_us for item in items) // count
        self.stage_us["wait_grant"] = max(0, sum(now_us - item.queued_us for item in items) // count)


def parts_of(batch: Batch) -> Feeds:
    """The inputs of a batch as its requests hold them: one array, or the blocks of rows in their order."""
    first, *others = batch.parts
    if not others:
        return {name: first.rows_of(name) for name in first.item.feeds}
    return {name: [part.rows_of(name) for part in batch.parts] for name in first.item.feeds}


def row_bytes(spec: TensorSpec) -> int:
    """Bytes of one row; 0 where they differ from batch to batch."""
    dims = spec.shape[1:]
    if spec.numpy_dtype.hasobject:
        return 0
    return math.prod(dim or 0 for dim in dims) * spec.numpy_dtype.itemsize


class Pipeline:
    """What is done to a job. Errors of a step are kept in job.error: later steps are skipped, close() is not.

    scalars: inputs without dimensions; Triton knows no scalars and carries them as [1].
    """

    def __init__(self, session: Session, staging: Staging):
        self._session = session
        self._staging = staging
        self._lock = threading.Lock()
        self._output_names = [spec.name for spec in session.outputs]
        self._row_bytes = {spec.name: row_bytes(spec) for spec in session.outputs}
        self._scalars = {spec.name for spec in session.inputs if not spec.dims}
        self._last_end_ns = 0
        self.turn = threading.Lock()

    def rows_at_once(self, rows: int) -> int:
        """As Session.rows_at_once."""
        return self._session.rows_at_once(rows)

    def prepare(self, job: Job) -> None:
        """Gather the rows of a batch and bring them to the device."""
        batch = job.batch
        assert batch is not None
        started_ns = time.perf_counter_ns()
        try:
            if self._session.takes_parts:
                feeds = parts_of(batch)
            else:
                with self._lock:
                    job.buffers = self._staging.lease(batch)
                feeds = self._staging.fill(batch, job.buffers)
            for name in self._scalars & feeds.keys() if not batch.batched else ():
                feeds[name] = feeds[name].reshape(())
            job.names = batch.outputs_wanted(self._output_names)
            if batch.on_device:
                large = LARGE_BYTES / batch.rows
                job.on_device = [name for name in job.names if self._row_bytes[name] >= large]
            job.staged = self._session.stage(feeds)
            job.stage_us["gather"] = (time.perf_counter_ns() - started_ns) // 1000
        except Exception as error:
            self._fail(job, error)

    def launch(self, job: Job) -> None:
        """Start a prepared job. The caller holds `turn`."""
        staged, job.staged = job.staged, None
        job.launched_ns = time.perf_counter_ns()
        if job.error is not None or staged is None:
            return
        permit = job.permit
        try:
            job.running = self._session.launch(
                staged,
                [name for name in job.names if name not in job.on_device],
                device_outputs=job.on_device,
                gpu_percent=permit.gpu_percent,
                sm_groups=permit.sm_groups,
            )
        except Exception as error:
            self._fail(job, error)

    def wait(self, job: Job) -> int:
        """Until the device has computed it: how long it had the device, microseconds."""
        try:
            if job.running is not None:
                job.running.wait()
        except Exception as error:
            self._fail(job, error)
        job.ended_ns = time.perf_counter_ns()
        run_us = (job.ended_ns - max(job.launched_ns, self._last_end_ns)) // 1000
        self._last_end_ns = job.ended_ns
        job.stage_us["run"] = run_us
        return run_us

    def collect(self, job: Job) -> None:
        """Bring the outputs to where they can be answered from."""
        batch, running = job.batch, job.running
        assert batch is not None
        if job.error is not None or running is None:
            return
        try:
            host = [name for name in job.names if name not in job.on_device]
            job.outputs = dict(zip(host, running.outputs(), strict=True))
            if job.on_device:
                job.outputs.update(zip(job.on_device, running.device_outputs(), strict=True))
            if not batch.batched:  # a scalar is seen as [1]
                job.outputs = {n: a if a.ndim else a.reshape(1) for n, a in job.outputs.items()}  # type: ignore[union-attr]
            check_rows(batch, job.outputs)
            for stage in ("copy_in", "copy_out"):
                job.stage_us[stage] = running.times_us.get(stage, 0)
        except Exception as error:
            self._fail(job, error)

    def close(self, job: Job) -> None:
        """Nobody reads the job's inputs and outputs any more."""
        for held in (job.staged, job.running):
            if held is not None:
                held.close()
        job.staged = job.running = None
        job.outputs = {}
        if job.batch is not None:
            with self._lock:
                self._staging.release(job.batch, job.buffers)
            job.buffers = {}

    @staticmethod
    def _fail(job: Job, error: Exception) -> None:
        """A defect of ours fails the batch as a failed run does."""
        if not isinstance(error, RequestError):
            error = RunError(f"{type(error).__name__}: {one_line(error)}")
        job.error = job.error or error
