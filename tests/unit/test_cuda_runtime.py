"""The CUDA runtime over a fake device whose streams are lazy: order of copies and runs, programs, weights,
ends.
"""

from __future__ import annotations

import itertools
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from dstack_backend import cuda_host, cuda_pace, cuda_shelf, cuda_slots, runtime_cuda
from dstack_backend.cuda_layout import with_best_layout
from dstack_backend.cuda_programs import Program
from dstack_backend.cuda_sessions import CudaOptions
from dstack_backend.errors import DeviceError, DeviceLostError, ModelError, RunError
from dstack_backend.executor import Executor
from dstack_backend.interfaces import Permit
from dstack_backend.optimized import SUMS, Cache, seal
from dstack_backend.pipeline import Pipeline
from dstack_backend.runtime import CpuSession
from dstack_backend.runtime_cuda import CudaSession, limit_process, that_run
from dstack_backend.session import ladder
from dstack_backend.staging import Staging
from dstack_backend.tensors import DeviceArray
from fakes import cuda
from fakes import feature_models as made
from fakes.backend import FakeRequest
from fakes.cuda import CpuSessions, FakeCuda, FakeGroups, device_array, read
from fakes.networks import convolutional

BATCH = 8
CLOSE = {"rtol": 1e-5, "atol": 1e-5}
SIZES = ladder(BATCH)
GROUPS = 16


class Rig:
    """A model on the fake device, and the same on the CPU."""

    def __init__(self, path: Path, cache: Path):
        self.path = path
        self.cuda = FakeCuda()
        self.groups = FakeGroups(self.cuda, GROUPS)
        self.reference = CpuSession(path, 1)
        self.cache = Cache(cache)
        self.rng = np.random.default_rng(7)
        self.no_graphs = False
        self.tried: list[bool] = []
        self.gpu_percent = 50.0

    def load(self, sizes: Any = SIZES, **options: Any) -> CudaSession:
        self.sessions = CpuSessions(
            self.path, CudaOptions(**options), self.cuda, self.cache, no_graphs=self.no_graphs
        )
        session = CudaSession(self.sessions, self.cuda, self.gpu_percent, self.groups)
        session.warm_up(sizes)
        self.cuda.log.clear()
        return session

    def rows(self, count: int) -> np.ndarray:
        return self.rng.standard_normal((count, 16)).astype(np.float32)

    def wanted(self, x: np.ndarray, names: Any = None) -> list[np.ndarray]:
        return self.reference.run({"x": x}, names)

    def check(self, got: Any, x: np.ndarray, names: Any = None) -> None:
        for one, other in zip(got, self.wanted(x, names), strict=True):
            assert one.shape == other.shape
            np.testing.assert_allclose(one, other, **CLOSE)


@pytest.fixture
def rig(tmp_path: Path) -> Rig:
    made.save(made.dense(), tmp_path / "dense.onnx")
    return Rig(tmp_path / "dense.onnx", tmp_path / "cache")


@pytest.fixture
def session(rig: Rig) -> Iterator[CudaSession]:
    session = rig.load()
    yield session
    session.close()
    rig.cuda.assert_nothing_left()


def eventually(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.002)


# Batches


@pytest.mark.parametrize("cuda_graphs", [True, False])
def test_every_batch_size_answers_as_the_cpu_does(rig: Rig, cuda_graphs: bool) -> None:
    """Rows of earlier, larger batches lie behind in padded buffers: they must not show."""
    session = rig.load(cuda_graphs=cuda_graphs)
    assert session.graphs == (4 if cuda_graphs else 0)
    for rows in (8, 1, 5, 3, 8, 2, 7):
        x = rig.rows(rows)
        rig.check(session.run({"x": x}), x)
        rig.check(session.run({"x": x}, ["mean"]), x, ["mean"])
    session.close()
    rig.cuda.assert_nothing_left()


def test_batches_overlap_in_any_order_of_waiting(rig: Rig, session: CudaSession) -> None:
    """Three batches are staged and launched before anyone waits; the last one is waited for first."""
    batches = [rig.rows(rows) for rows in (5, 8, 1)]
    staged = [session.stage({"x": x}) for x in batches]
    running = [session.launch(each) for each in staged]
    assert "run" not in rig.cuda.log, "nothing but graphs"
    for index in (2, 0, 1):
        running[index].wait()
        rig.check(running[index].outputs(), batches[index])
        assert running[index].times_us == {"copy_in": 7, "run": 7, "copy_out": 7}
    for each in running:
        each.close()


def calls(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the driver's calls on a batch's way, from now on."""
    made: list[str] = []

    def counted(name: str) -> Callable[..., Any]:
        true = getattr(rig.cuda, name)
        return lambda *arguments: (made.append(name), true(*arguments))[1]

    for name in ("record", "hold", "wait_event", "to_device", "to_host", "copy", "launch", "wait"):
        monkeypatch.setattr(rig.cuda, name, counted(name))
    return made


@pytest.mark.parametrize("alone", [True, False])
def test_few_batches_pay_for_being_timed(
    rig: Rig, session: CudaSession, monkeypatch: pytest.MonkeyPatch, alone: bool
) -> None:
    """One that has the device to itself takes one event, one among others three."""
    other = None if alone else session.stage({"x": rig.rows(1)})
    made, counts = calls(rig, monkeypatch), []
    for _ in range(2 * cuda_slots.TIMED_EVERY):
        made.clear()
        running = session.launch(session.stage({"x": rig.rows(2)}))
        running.outputs()
        assert running.times_us["run"] == 7
        running.close()
        counts.append(made.count("record"))
    assert counts == 2 * [6, *[1 if alone else 3] * (cuda_slots.TIMED_EVERY - 1)]
    if other is not None:
        other.close()


def test_a_batch_that_is_alone_costs_few_calls(
    rig: Rig, session: CudaSession, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each costs the driver 5 to 10 us on the way of a lone client's request."""
    session.run({"x": rig.rows(2)})  # the first use of a slot is timed
    made, x = calls(rig, monkeypatch), rig.rows(2)
    running = session.launch(session.stage({"x": x}), ["scores"])
    running.wait()
    rig.check(running.outputs(), x, ["scores"])
    running.close()
    assert made == ["to_device", "launch", "to_host", "record", "wait_event"]


def test_batches_behind_one_that_is_alone_wait_for_it(rig: Rig, session: CudaSession) -> None:
    """They use the same program's buffers: the first ones' inputs and answers must not be theirs."""
    for first in (1, 3, 8):
        batches = [rig.rows(first), rig.rows(first), rig.rows(2)]
        running = []
        for x in batches:
            running.append(session.launch(session.stage({"x": x})))
        for index in (2, 1, 0):
            running[index].wait()
            rig.check(running[index].outputs(), batches[index])
        for each in running:
            each.close()


def test_a_batch_that_was_staged_alone_may_be_launched_among_others(rig: Rig, session: CudaSession) -> None:
    first, second = rig.rows(3), rig.rows(3)
    alone = session.stage({"x": first})
    other = session.launch(session.stage({"x": second}))
    launched = session.launch(alone)
    rig.check(launched.outputs(), first)
    rig.check(other.outputs(), second)
    launched.close()
    other.close()
    given_up = session.stage({"x": first})
    given_up.close()
    rig.check(session.run({"x": second}), second)


def test_large_batches_overlap_also_where_they_come_alone(
    rig: Rig, session: CudaSession, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runtime_cuda, "ALONE_BYTES", 0)
    made = calls(rig, monkeypatch)
    x = rig.rows(2)
    rig.check(session.run({"x": x}), x)
    assert made.count("record") > 1


def test_memory_that_allocate_gave_is_not_copied_on_the_host(rig: Rig, session: CudaSession) -> None:
    memory = session.allocate((BATCH, 16), np.float32)
    memory[:3] = x = rig.rows(3)
    batch = session.stage({"x": memory[:3]})
    memory[:3] = 0  # not copied yet: the lazy stream reads what is there when it runs
    running = session.launch(batch)
    rig.check(running.outputs(), np.zeros_like(x))
    running.close()


def test_other_memory_may_be_reused_once_staged(rig: Rig, session: CudaSession) -> None:
    x = rig.rows(3)
    fed = x.copy()
    staged = session.stage({"x": fed})
    fed[:] = 0
    running = session.launch(staged)
    rig.check(running.outputs(), x)
    running.close()


def test_parts_from_host_and_device_make_one_batch(rig: Rig, session: CudaSession) -> None:
    x = rig.rows(7)
    there = device_array(rig.cuda, x[2:5])
    parts = [x[:2], there, x[5:6], np.asfortranarray(x[6:])]
    running = session.launch(session.stage({"x": parts}), ["mean"], device_outputs=["scores"])
    running.wait()
    rig.check(running.outputs(), x, ["mean"])
    (scores,) = running.device_outputs()
    assert (scores.shape, scores.device_id) == ((7, 5), 0)
    rig.check([read(rig.cuda, scores)], x, ["scores"])
    rig.check([read(rig.cuda, scores[2:5])], x[2:5], ["scores"])
    running.close()
    rig.cuda.free(there.pointer)


def test_tensors_that_stay_on_the_device_make_no_trip_through_the_host(
    rig: Rig, session: CudaSession
) -> None:
    there = device_array(rig.cuda, rig.rows(4))
    running = session.launch(session.stage({"x": there}), device_outputs=["scores"])
    running.wait()
    assert running.outputs() == []
    assert rig.cuda.log == ["copy", "launch", "copy"]
    running.close()
    rig.cuda.free(there.pointer)


def test_outputs_are_views_until_closed_and_copies_from_run(rig: Rig, session: CudaSession) -> None:
    x = rig.rows(2)
    kept = session.run({"x": x})
    for _ in range(cuda_slots.MAX_SLOTS + 1):
        session.run({"x": rig.rows(2)})
    rig.check(kept, x)


@pytest.fixture
def shared() -> Iterator[np.ndarray]:
    """Shared memory as Triton's stub maps it: rows of the model's input."""
    with tempfile.NamedTemporaryFile(dir="/dev/shm") as file:
        file.truncate(1 << 22)
        yield np.asarray(np.memmap(file.name, np.float32, "r+").reshape(-1, 16))


def test_shared_memory_that_is_seen_again_is_read_by_the_device(
    rig: Rig, session: CudaSession, shared: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cuda_slots, "GATHER_BELOW_BYTES", 3 * 64)
    clock = itertools.count(0, cuda_host.SETTLED_S / 8)
    monkeypatch.setattr(session._host, "_now", lambda: next(clock))
    turns = 2 * cuda_host.SIGHTINGS
    for turn in range(turns):
        shared[:200] = x = rig.rows(200)
        parts = [shared[100:104], shared[7:8], rig.rows(0), shared[50:53]]
        staged = session.stage({"x": parts})
        if turn == 0:
            assert not rig.cuda.registered
        if turn == turns - 1:  # the device reads it when it comes to it
            shared[50:53] = x[50:53] = 0
        running = session.launch(staged)
        rig.check(running.outputs(), np.concatenate([x[100:104], x[7:8], x[50:53]]))
        running.close()
    assert sum(rig.cuda.registered.values()) == 1 << 22


def test_shared_memory_that_cannot_be_registered_is_gathered(
    rig: Rig, session: CudaSession, shared: np.ndarray
) -> None:
    rig.cuda.unregistrable = True
    for _ in range(cuda_host.SIGHTINGS + 2):
        shared[:3] = x = rig.rows(3)
        running = session.launch(session.stage({"x": [shared[:3]]}))
        rig.check(running.outputs(), x)
        running.close()


def test_a_batch_given_up_leaves_its_slot_to_another(rig: Rig, session: CudaSession) -> None:
    for _ in range(3 * cuda_slots.MAX_SLOTS):
        session.stage({"x": rig.rows(2)}).close()
    x = rig.rows(2)
    rig.check(session.run({"x": x}), x)


def test_large_batches_have_fewer_slots(
    rig: Rig, session: CudaSession, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cuda_slots, "LEASE_TIMEOUT_S", 0.01)
    monkeypatch.setattr(cuda_slots, "MANY_BYTES", 1000)
    held = [session.stage({"x": rig.rows(1)}) for _ in range(cuda_slots.LEAST_SLOTS)]
    with pytest.raises(RunError, match="4 batches are under way"):
        session.stage({"x": rig.rows(1)})
    for each in held:
        each.close()


def test_stage_waits_for_a_slot(rig: Rig, session: CudaSession, monkeypatch: pytest.MonkeyPatch) -> None:
    held = [session.stage({"x": rig.rows(1)}) for _ in range(cuda_slots.MAX_SLOTS)]
    x, answers = rig.rows(2), []
    thread = threading.Thread(target=lambda: answers.extend(session.run({"x": x})))
    thread.start()
    held[0].close()
    held[0].close()  # twice is once: the slot must not be given to two batches
    thread.join(10)
    rig.check(answers, x)
    held[0] = session.stage({"x": rig.rows(1)})
    monkeypatch.setattr(cuda_slots, "LEASE_TIMEOUT_S", 0.01)
    with pytest.raises(RunError, match=r"8 batches are under way and none was closed in 0.01 s"):
        session.stage({"x": rig.rows(1)})
    for each in held:
        each.close()


@pytest.mark.parametrize(
    ("feeds", "words"),
    [
        ({"x": np.zeros((2, 15), np.float32)}, r"input 'x' is float32 \[2, 15\]; the model takes"),
        ({"x": np.zeros((2, 16), np.float64)}, r"input 'x' is float64 \[2, 16\]; the model takes float32"),
        ({"x": [np.zeros((1, 16), np.float32), np.zeros((1, 3), np.float32)]}, r"input 'x' is .* \[1, 3\]"),
    ],
)
def test_inputs_of_another_kind_are_refused_and_cost_no_slot(
    rig: Rig, session: CudaSession, feeds: Any, words: str
) -> None:
    for _ in range(cuda_slots.MAX_SLOTS + 1):
        with pytest.raises(RunError, match=words):
            session.stage(feeds)
    x = rig.rows(2)
    rig.check(session.run({"x": x}), x)


def test_a_failed_launch_uses_the_batch_up(rig: Rig, session: CudaSession) -> None:
    for _ in range(cuda_slots.MAX_SLOTS + 1):
        staged = session.stage({"x": rig.rows(2)})
        with pytest.raises(RunError):
            session.launch(staged, ["nothing of that name"])
    x = rig.rows(2)
    rig.check(session.run({"x": x}), x)


def test_any_number_of_threads(rig: Rig, session: CudaSession) -> None:
    batches = [rig.rows(1 + n % BATCH) for n in range(60)]
    wanted = [rig.wanted(x) for x in batches]
    wrong: list[int] = []
    launching = threading.Lock()

    def serve(first: int) -> None:
        for index in range(first, len(batches), 4):
            staged = session.stage({"x": batches[index]})
            with launching:
                running = session.launch(staged)
            running.wait()
            got = running.outputs()
            if not all(np.allclose(a, b, **CLOSE) for a, b in zip(got, wanted[index], strict=True)):
                wrong.append(index)
            running.close()

    threads = [threading.Thread(target=serve, args=(first,)) for first in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert not wrong


class Generous:
    """A gate that grants whenever rows wait, two batches ahead, on groups of its choice."""

    def __init__(self) -> None:
        self._permits = itertools.count()
        self._open = 0
        self._lock = threading.Lock()

    def start(self, listener: Any) -> None:
        self._listener = listener

    def work(self) -> None:
        while self._listener.state()[0]:
            with self._lock:
                if self._open >= 2:
                    return
                self._open += 1
                turn = next(self._permits)
            self._listener.on_grant(Permit(BATCH, 25.0 * (1 + turn % 2), sm_groups=0))

    def take(self) -> None:
        return None

    def begin(self, permit: Permit, rows: int, expected_us: int) -> bool:
        return True

    def done(self, permit: Permit, rows: int, late: int, run_us: int) -> None:
        with self._lock:
            self._open -= 1
        self.work()

    def close(self) -> None: ...


class Spoiled(FakeRequest):
    """A request whose memory is somebody else's once it is answered; now and then its outputs stay on the
    device.
    """

    def __init__(self, cuda: FakeCuda, x: np.ndarray, on_device: bool):
        super().__init__(x, wanted=["scores"])
        self.cuda, self.on_device = cuda, on_device

    def answer(self, outputs: Mapping[str, Any]) -> None:
        read_ = {name: read(self.cuda, a) if isinstance(a, DeviceArray) else a for name, a in outputs.items()}
        self.x[:] = np.nan
        super().answer(read_)


def test_the_executor_over_the_device(rig: Rig, shared: np.ndarray) -> None:
    """All together: requests in shared memory, read by the device while others compute, launched ahead,
    answered from several threads; no copy too late, no buffer reused too early.
    """
    session = rig.load(levels=(25.0,))
    executor = Executor(
        Pipeline(session, Staging(BATCH, session.allocate)),
        Generous(),
        batched=True,
        batch_size=BATCH,
    )
    executor.start()
    requests, wanted, at = [], [], 0
    for number in range(240):
        rows = 1 + number % 7
        memory = shared[at : at + rows]
        memory[:] = rig.rows(rows)
        at += rows
        wanted.append(rig.wanted(memory.copy(), ["scores"])[0])
        requests.append(Spoiled(rig.cuda, memory, on_device=number % 11 == 0))
    feeders = [
        threading.Thread(target=lambda part=part: [executor.submit([each]) for each in part])
        for part in (requests[::2], requests[1::2])
    ]
    for feeder in feeders:
        feeder.start()
    for request, want in zip(requests, wanted, strict=True):
        np.testing.assert_allclose(request.wait().outputs["scores"], want, **CLOSE)  # type: ignore[index]
    for feeder in feeders:
        feeder.join()
    executor.close()
    session.close()
    rig.cuda.assert_nothing_left()


# Programs


def test_larger_batches_are_cut_to_what_is_prepared_until_more_is(rig: Rig, session: CudaSession) -> None:
    """A batch size that is new to ONNX Runtime's own path can take it seconds (decision 0125)."""
    assert [session.rows_at_once(rows) for rows in (0, 1, BATCH)] == [1, 1, BATCH]
    assert session.rows_at_once(BATCH + 3) == BATCH
    eventually(lambda: session.graphs == 5 and session.rows_at_once(BATCH + 3) == BATCH + 3)
    x = rig.rows(BATCH + 3)
    rig.cuda.log.clear()
    rig.check(session.run({"x": x}), x)
    assert "launch" in rig.cuda.log


def test_it_prepares_for_a_few_times_the_largest_batch_at_a_time(rig: Rig, session: CudaSession) -> None:
    assert session.rows_at_once(100 * BATCH) == BATCH
    eventually(lambda: session._shelf.sizes[-1] == runtime_cuda.GROWTH * BATCH)


def test_without_programs_batches_are_as_large_as_they_come(rig: Rig) -> None:
    session = rig.load(sizes=())
    assert session.rows_at_once(100) == 100


def test_a_batch_larger_than_all_programs_runs_plainly(rig: Rig, session: CudaSession) -> None:
    x = rig.rows(100)
    rig.check(session.run({"x": x}), x)
    assert session._shelf._wishing is None and session.graphs == 4


def test_device_outputs_of_the_plain_path(rig: Rig) -> None:
    session = rig.load(sizes=())
    x = rig.rows(3)
    there = device_array(rig.cuda, x)
    running = session.launch(session.stage({"x": [there]}), ["mean"], device_outputs=["scores"])
    rig.check(running.outputs(), x, ["mean"])
    rig.check([read(rig.cuda, each) for each in running.device_outputs()], x, ["scores"])
    running.close()
    rig.cuda.free(there.pointer)
    session.close()
    rig.cuda.assert_nothing_left()


def spoil(monkeypatch: pytest.MonkeyPatch, *, captured: bool) -> None:
    """Programs that are captured (or all) answer wrongly in their trial."""
    true = Program.answer

    def answer(self: Program, feeds: Any) -> list[np.ndarray]:
        answers = true(self, feeds)
        return [each + 1 for each in answers] if self.captured or not captured else answers

    monkeypatch.setattr(Program, "answer", answer)


def test_weights_that_the_cpu_reads_are_not_shared(rig: Rig, tmp_path: Path) -> None:
    """ONNX Runtime refuses to capture where nodes run on the CPU; they would read device memory."""
    rig.no_graphs = True
    session, x = rig.load(), rig.rows(3)
    assert rig.sessions.shared_bytes == 0 and not list((tmp_path / "cache").rglob("model.onnx"))
    rig.check(session.run({"x": x}), x)
    session.close()
    rig.cuda.assert_nothing_left()


@pytest.mark.parametrize("why", ["refused", "host", "wrong"])
def test_a_model_that_cannot_be_captured_runs_bound(
    rig: Rig, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, why: str
) -> None:
    rig.no_graphs, rig.cuda.touching = why == "refused", why == "host"
    if why == "wrong":
        spoil(monkeypatch, captured=True)
    session = rig.load()
    assert session.graphs == 0
    words = {"refused": "cannot use the graph capture", "host": "host memory", "wrong": "outputs differ"}
    warnings = [each.getMessage() for each in caplog.records if each.levelname == "WARNING"]
    assert len(warnings) == 1 and "no CUDA graph for batch sizes 1, 2, 4, 8: " in warnings[0]
    assert words[why] in warnings[0]
    for rows in (8, 3, 1, 8):
        x = rig.rows(rows)
        rig.check(session.run({"x": x}), x)
    assert "launch" not in rig.cuda.log and rig.cuda.log.count("run") == 4
    session.close()
    rig.cuda.assert_nothing_left()


def test_a_capture_that_was_disturbed_is_tried_again(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    true, failed = Program.capture, []

    def capture(self: Program) -> None:
        if self.size == 4 and not failed:
            failed.append(self.size)
            raise DeviceError("cuStreamEndCapture: operation failed due to a previous error (901)")
        true(self)

    monkeypatch.setattr(Program, "capture", capture)
    session = rig.load()
    assert failed and session.graphs == 4
    session.close()
    rig.cuda.assert_nothing_left()


def test_a_model_whose_bound_runs_are_wrong_runs_plainly(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    spoil(monkeypatch, captured=False)
    session = rig.load()
    x = rig.rows(3)
    rig.check(session.run({"x": x}), x)
    assert rig.cuda.log == []
    session.close()
    rig.cuda.assert_nothing_left()


def test_a_model_of_fixed_shapes_has_one_program(tmp_path: Path) -> None:
    made.save(made.fixed(), tmp_path / "m.onnx")
    rig = Rig(tmp_path / "m.onnx", tmp_path / "cache")
    session = rig.load(levels=(25.0,))
    assert session.graphs == 1 and session.levels == (25.0, 50.0)
    batches = [rig.rows(2) for _ in range(3)]
    there = device_array(rig.cuda, batches[2])
    staged = [session.stage({"x": x}) for x in (batches[0], [batches[1]], there)]
    running = [session.launch(each, ["y", "top"], device_outputs=["y"]) for each in staged]
    for index in (1, 2, 0):
        running[index].wait()
        rig.check(running[index].outputs(), batches[index])
        (y,) = running[index].device_outputs()
        rig.check([read(rig.cuda, y)], batches[index], ["y"])
        running[index].close()
    assert rig.cuda.log.count("launch") == 3
    with pytest.raises(RunError, match=r"input 'x' is float32 \[1, 3, 16\]; the model takes"):
        session.stage({"x": rig.rows(3)})
    with pytest.raises(RunError, match="came in parts"):
        session.stage({"x": [rig.rows(1), rig.rows(1)]})
    rig.cuda.free(there.pointer)
    session.close()
    rig.cuda.assert_nothing_left()


def test_programs_that_are_not_captured_run_behind_one_another(rig: Rig) -> None:
    """Each has a stream of its own; slots grow meanwhile, and their events go."""
    session = rig.load(cuda_graphs=False, sizes=[1])
    x = rig.rows(1)
    rig.check(session.run({"x": x}), x)
    session.warm_up([4, 8])
    for rows in (4, 1, 8, 1):
        x = rig.rows(rows)
        rig.check(session.run({"x": x}), x)
    first, second = (session.launch(session.stage({"x": rig.rows(rows)})) for rows in (8, 1))
    second.wait()
    computed = first.slot.event["computed"]  # type: ignore[attr-defined]
    assert rig.cuda.elapsed_us(computed, computed), "it ran before the second"
    for each in (first, second):
        each.close()
    session.close()
    rig.cuda.assert_nothing_left()


@pytest.mark.parametrize(
    ("proto", "feeds"),
    [
        (made.dynamic, {"x": np.ones((3, 7), np.float32)}),
        (made.dynamic, {"x": np.ones((3, 0), np.float32)}),
        (made.with_default, {"x": np.ones((3, 4), np.float32)}),
        (made.text, {"x": np.array([["a", "b"]], np.object_)}),
        (made.without_batch, {"x": np.eye(4, dtype=np.float32)}),
        (made.halves, {"x": np.ones((4, 2), np.float32)}),
    ],
)
def test_models_with_other_shapes_take_the_plain_path(tmp_path: Path, proto: Any, feeds: Any) -> None:
    made.save(proto(), tmp_path / "m.onnx")
    rig = Rig(tmp_path / "m.onnx", tmp_path / "cache")
    session = rig.load()
    for got, want in zip(session.run(feeds), rig.reference.run(feeds), strict=True):
        assert np.array_equal(got, want)
    assert session.allocate((2, 3), np.float32).shape == (2, 3)
    assert rig.cuda.log == []
    session.close()
    rig.cuda.assert_nothing_left()


def test_forgotten_programs_are_made_again(rig: Rig, session: CudaSession) -> None:
    held = session.device_bytes
    session.forget()
    assert session.graphs == 0 and session.device_bytes < held
    x = rig.rows(4)
    rig.check(session.run({"x": x}), x)
    session.warm_up([4])
    assert session.graphs == 1
    rig.check(session.run({"x": x}), x)


def test_the_memory_limit_bounds_programs(rig: Rig, caplog: pytest.LogCaptureFixture) -> None:
    weights = 64 * 16 * 4 + 64 * 5 * 4
    session = rig.load(memory_limit_bytes=weights + 700)
    assert session.graphs == 2, "the fake takes 280 bytes for 1 row, 368 for 2 and 544 for 4"
    assert "no CUDA graph for batch sizes 4, 8: gpu_memory_limit_mb would be exceeded" in caplog.text
    assert session._shelf.used_bytes == weights + 280 + 368
    x = rig.rows(8)
    rig.check(session.run({"x": x}), x)
    session.close()
    rig.cuda.assert_nothing_left()


# Levels


def test_a_run_takes_the_level_it_names(rig: Rig) -> None:
    session = rig.load(levels=(25.0, 100.0))
    assert (session.levels, session.groups) == ((25.0, 50.0, 100.0), GROUPS)
    for percent, groups in ((25, 4), (100, 16), (None, 8), (30, 4), (80, 16)):
        x = rig.rows(3)
        running = session.launch(session.stage({"x": x}), gpu_percent=percent)
        rig.check(running.outputs(), x)
        assert rig.cuda.launched[-1] == running.sm_groups
        assert running.sm_groups.bit_count() == groups
        assert running.gpu_percent == 100 * groups / GROUPS
        running.close()
    session.close()
    rig.cuda.assert_nothing_left()


def test_wanted_groups_are_taken_once_they_are_prepared(rig: Rig) -> None:
    session = rig.load(levels=(25.0, 50.0))
    wanted, x = 0b0110_0110_0000_0000, rig.rows(3)

    def ran_on() -> int:
        before = len(rig.cuda.launched)
        running = session.launch(session.stage({"x": x}), sm_groups=wanted)
        rig.check(running.outputs(), x)
        running.close()
        assert running.sm_groups in rig.cuda.launched[before:]  # trials of new programs are launched, too
        return running.sm_groups

    assert ran_on().bit_count() == 4
    eventually(lambda: ran_on() == wanted)
    session.close()
    rig.cuda.assert_nothing_left()


def test_groups_named_to_a_fixed_share_are_ignored(rig: Rig, session: CudaSession) -> None:
    """As are groups that the device has not."""
    x = rig.rows(3)
    running = session.launch(session.stage({"x": x}), sm_groups=0b1111, gpu_percent=25)
    rig.check(running.outputs(), x)
    assert (running.sm_groups, running.gpu_percent) == (0, 50)
    running.close()
    assert session._shelf._wishing is None
    levelled = rig.load(sizes=[4], levels=(25.0,))
    running = levelled.launch(levelled.stage({"x": x}), sm_groups=1 << GROUPS)
    assert running.sm_groups == levelled._levels.mask()
    running.close()
    levelled.close()


def test_programs_on_demand_leave_memory_to_others(rig: Rig) -> None:
    session, x = rig.load(levels=(25.0,)), rig.rows(4)
    rig.cuda.others_bytes = cuda.TOTAL_BYTES - (1 << 29)
    running = session.launch(session.stage({"x": x}), sm_groups=0b11)
    rig.check(running.outputs(), x)
    running.close()
    eventually(lambda: session._shelf._wishing is None)
    assert 0b11 not in {mask for mask, _ in session._shelf._programs}
    session.close()


def test_groups_that_are_long_unused_make_room(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_shelf, "MAX_EXTRA", 2)
    session = rig.load(sizes=[4], levels=(25.0,))
    homes = {session._levels.mask(level) for level in session.levels}
    shelf, x = session._shelf, rig.rows(4)
    wishes = [0b11 << start for start in (0, 3, 6, 9)]
    for mask in (*wishes, *wishes[-1:]):
        for _ in range(2):
            running = session.launch(session.stage({"x": x}), sm_groups=mask)
            eventually(lambda: shelf._wishing is None)
            rig.check(running.outputs(), x)
            running.close()
        assert running.sm_groups == mask
    assert {mask for mask, _ in shelf._programs} == homes | set(wishes[-2:])
    session.close()
    rig.cuda.assert_nothing_left()


def test_other_groups_are_not_prepared_where_that_takes_long(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cuda_shelf, "QUICK_S", 0.0)
    session, x = rig.load(sizes=[4], levels=(25.0,)), rig.rows(4)
    before = set(session._shelf._programs)
    running = session.launch(session.stage({"x": x}), sm_groups=0b11)
    rig.check(running.outputs(), x)
    running.close()
    assert session.preparing == 0 and session._shelf._wishing is None
    assert set(session._shelf._programs) == before
    session.close()


def test_programs_that_follow_are_counted_until_they_are_there(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = rig.load(sizes=())
    making = threading.Event()
    made = session._shelf._make
    monkeypatch.setattr(session._shelf, "_make", lambda *each: (making.wait(10), made(*each))[1])
    session._shelf.defer([(0, 2), (0, 4)])
    assert session.preparing == 2
    making.set()
    eventually(lambda: session.preparing == 0)
    assert session._shelf.sizes == [2, 4]
    session.close()
    rig.cuda.assert_nothing_left()


def test_levels_of_a_model_that_cannot_be_captured(rig: Rig) -> None:
    """It keeps to the SMs of its own share, on a stream of them."""
    rig.no_graphs = True
    session = rig.load(levels=(25.0, 50.0))
    assert (session.levels, session.groups) == ((), 0)
    x = rig.rows(3)
    running = session.launch(session.stage({"x": x}), gpu_percent=25)
    rig.check(running.outputs(), x)
    assert running.gpu_percent == 50
    assert rig.cuda.streams[session._plain_stream].sms.bit_count() == 8
    session.close()
    rig.cuda.assert_nothing_left()


# Weights


def test_weights_lie_on_the_device_once(rig: Rig) -> None:
    session = rig.load(levels=(25.0, 50.0))
    shared = rig.sessions.shared_bytes
    assert shared == 64 * 16 * 4 + 64 * 5 * 4
    blocks = [block.nbytes - 64 for block in rig.cuda.memory.values()]
    assert blocks.count(shared) == 1
    assert session.device_bytes < 2 * shared + 64 * 1024
    session.close()


def test_the_second_load_takes_the_optimised_model_from_the_cache(rig: Rig, tmp_path: Path) -> None:
    rig.load().close()
    first = len(rig.sessions.opened)
    entries = list((tmp_path / "cache" / "optimized").iterdir())
    rig.load().close()
    assert len(rig.sessions.opened) == first - 4, "nor is the plain run made again that programs must equal"
    assert list((tmp_path / "cache" / "optimized").iterdir()) == entries


def test_a_damaged_entry_is_made_again(rig: Rig, tmp_path: Path) -> None:
    rig.load().close()
    (weights,) = (tmp_path / "cache").rglob("weights.bin")
    data = bytearray(weights.read_bytes())
    data[100] ^= 1
    weights.write_bytes(data)
    session, x = rig.load(), rig.rows(3)
    assert rig.sessions.shared_bytes
    rig.check(session.run({"x": x}), x)
    session.close()


def test_without_a_cache_every_session_has_its_weights(rig: Rig, tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("not a directory")
    session, x = rig.load(), rig.rows(3)
    assert rig.sessions.shared_bytes == 0 and session.graphs == 4
    rig.check(session.run({"x": x}), x)
    session.close()
    rig.cuda.assert_nothing_left()


def test_weights_are_not_shared_where_that_changes_the_answers(
    rig: Rig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    true = FakeCuda.upload
    monkeypatch.setattr(
        FakeCuda, "upload", lambda self, to, source, size: true(self, to, source, min(size, 900))
    )
    session, x = rig.load(sizes=()), rig.rows(3)
    assert rig.sessions.shared_bytes == 0
    assert not list((tmp_path / "cache").rglob("model.onnx"))
    rig.check(session.run({"x": x}), x)
    session.close()
    rig.cuda.assert_nothing_left()


def test_the_reference_is_known_from_an_earlier_load_and_still_heeded(
    rig: Rig, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    rig.load().close()
    monkeypatch.setattr(CpuSessions, "_answers", lambda *_: pytest.fail("computed again"))
    session = rig.load()
    assert session.graphs == len(SIZES)
    session.close()
    (entry,) = (path.parent for path in (tmp_path / "cache").rglob("0.npy"))
    np.save(entry / "0.npy", np.load(entry / "0.npy") + 1, allow_pickle=False)
    (entry / SUMS).unlink()
    seal(entry)
    session = rig.load()
    assert session.graphs == 0, "programs must answer as it says"
    session.close()
    (entry / "0.npy").write_bytes(b"damaged")
    monkeypatch.undo()
    session = rig.load()
    assert session.graphs == len(SIZES), "a damaged one is computed again"
    session.close()


def test_a_model_that_is_slow_to_prepare_serves_before_all_batch_sizes_are_there(rig: Rig) -> None:
    session = rig.load(sizes=())
    session.warm_up(SIZES, within_s=0.0)
    x = rig.rows(2)
    rig.check(session.run({"x": x}), x)
    eventually(lambda: session.graphs == len(SIZES) and session._shelf._wishing is None)
    assert set(session._shelf._programs) <= session._shelf._kept, "no others push them out"
    rig.check(session.run({"x": x}), x)
    session.close()
    rig.cuda.assert_nothing_left()


def test_first_the_smallest_and_the_largest_batch_size(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_shelf.Shelf, "wish", lambda *_: None)
    session = rig.load(sizes=())
    session.warm_up(SIZES, within_s=0.0)
    assert session._shelf.sizes == [SIZES[0], SIZES[-1]]
    session.warm_up(SIZES, within_s=60.0)
    assert tuple(session._shelf.sizes) == SIZES
    session.close()


# Layouts


def layouts(rig: Rig, monkeypatch: pytest.MonkeyPatch, nhwc_us: int, **options: Any) -> CpuSessions:
    """The sessions for a device on which the usual layout takes 100 us; opened: layouts, in order."""
    true, turns = FakeCuda.elapsed_us, itertools.cycle((100, nhwc_us))
    monkeypatch.setattr(FakeCuda, "elapsed_us", lambda *events: true(*events) and next(turns))
    rig.tried = []

    def make(nhwc: bool) -> CpuSessions:
        rig.tried.append(nhwc)
        options_ = CudaOptions(**options)
        return CpuSessions(rig.path, options_, rig.cuda, rig.cache, nhwc=nhwc, no_graphs=rig.no_graphs)

    chosen = with_best_layout(make, rig.cuda)
    rig.cuda.assert_nothing_left()
    assert isinstance(chosen, CpuSessions)
    return chosen


@pytest.fixture
def network(tmp_path: Path) -> Rig:
    made.save(convolutional(), tmp_path / "network.onnx")
    return Rig(tmp_path / "network.onnx", tmp_path / "cache")


@pytest.mark.parametrize(("nhwc_us", "wins"), [(80, True), (98, False), (120, False)])
def test_the_faster_layout_is_found_once(
    network: Rig, monkeypatch: pytest.MonkeyPatch, nhwc_us: int, wins: bool
) -> None:
    assert layouts(network, monkeypatch, nhwc_us).nhwc is wins
    assert network.tried == [False, False, True, *[True] * wins]
    assert layouts(network, monkeypatch, 1).nhwc is wins
    assert network.tried == [False, *[True] * wins], "remembered"


def test_a_layout_that_answers_otherwise_is_not_taken(network: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    answers = itertools.cycle((0.0, 1.0))
    monkeypatch.setattr(Program, "answer", lambda *_: [np.full((8, 10), 5 + next(answers))])
    assert not layouts(network, monkeypatch, 10).nhwc


def test_a_layout_that_cannot_share_weights_is_not_taken(
    network: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    true = CpuSessions.share
    monkeypatch.setattr(CpuSessions, "share", lambda self, stream: None if self.nhwc else true(self, stream))
    assert not layouts(network, monkeypatch, 10).nhwc


def test_what_is_not_tried(network: Rig, rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    assert not layouts(rig, monkeypatch, 10).nhwc, "no convolution"
    assert not layouts(network, monkeypatch, 10, conv_layout="nchw").nhwc
    assert layouts(network, monkeypatch, 1000, conv_layout="nhwc").nhwc
    assert not layouts(network, monkeypatch, 10, cuda_graphs=False).nhwc
    network.no_graphs = True
    assert not layouts(network, monkeypatch, 10).nhwc
    network.no_graphs = False
    assert not layouts(network, monkeypatch, 10).nhwc, "that it cannot be captured is remembered"


# Waiting


def test_waiters_sleep_until_shortly_before_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, slept = SimpleNamespace(ns=0), []
    monkeypatch.setattr(cuda_pace.time, "monotonic_ns", lambda: clock.ns)
    monkeypatch.setattr(cuda_pace.time, "sleep", slept.append)
    pace = cuda_pace.Pace()
    first = pace.behind(None)
    first.doze()
    assert slept == [], "nothing is known yet"
    pace.learn(3000)
    first = pace.behind(None)
    second = pace.behind(first)
    second.doze()
    assert slept == [pytest.approx(0.0055)], "it begins when the first one ends"
    clock.ns = 2_500_000
    first.reached()
    second.doze()
    assert slept[1:] == [pytest.approx(0.0025)], "the first one was quicker than expected"
    clock.ns = 4_000_000
    second.doze()
    assert len(slept) == 2, "too near the end"
    pace.learn(11_000)
    assert pace.run_us == 4000, "slower runs are believed slowly"
    pace.learn(2000)
    assert pace.run_us == 2000


# The end


def test_a_lost_device_is_told_from_a_failed_run(rig: Rig) -> None:
    session = rig.load()
    staged = session.stage({"x": rig.rows(3)})
    running = session.launch(session.stage({"x": rig.rows(3)}))
    rig.cuda.lost = True
    for call in (
        lambda: session.stage({"x": rig.rows(3)}),
        lambda: session.launch(staged),
        running.wait,
        running.outputs,
        lambda: session.run({"x": rig.rows(BATCH + 1)}),
    ):
        with pytest.raises(DeviceLostError, match="illegal memory access"):
            call()
    running.close()
    session.close()


def test_what_onnxruntime_says_of_a_lost_device(rig: Rig, session: CudaSession) -> None:
    """A fault surfaces as ONNX Runtime's own exception first: the driver is asked what it means."""
    session.forget()
    staged = session.stage({"x": rig.rows(3)})

    def fail(*_: Any, **__: Any) -> None:
        rig.cuda.lost = True
        raise RuntimeError("CUDA failure 700")

    session._plain._session.run, kept = fail, None
    with pytest.raises(DeviceLostError):
        session.launch(staged)
    rig.cuda.lost = False
    del session._plain._session.run, kept


def test_a_failed_load_gives_everything_back(rig: Rig) -> None:
    rig.path.write_bytes(b"\x08\x07rubbish")
    with pytest.raises(ModelError):
        rig.load()
    rig.cuda.assert_nothing_left()


def test_closing_ends_the_preparing_of_programs(rig: Rig) -> None:
    session = rig.load(levels=(25.0,))
    for start in range(8):
        session.launch(session.stage({"x": rig.rows(8)}), sm_groups=0b101 << start).close()
    session.close()
    session.close()
    rig.cuda.assert_nothing_left()


def test_levels_need_no_mps_limit_and_others_take_the_process_s(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_MPS_ACTIVE_THREAD_PERCENTAGE", "40")
    limit_process(40)
    with pytest.raises(DeviceError, match="gpu_percent 50 asked of a process that runs at 40"):
        limit_process(50)


def test_levels_on_an_old_driver_are_an_error_or_left_out() -> None:
    """Left out before the context is made: the MPS percentage cannot be set behind it."""
    asked, auto = CudaOptions(levels=(50.0,)), CudaOptions(levels=(50.0,), levels_needed=False)
    assert that_run(asked, 12040) is asked and that_run(auto, 12050) is auto
    assert that_run(auto, 12040) == CudaOptions(levels_needed=False)


@pytest.mark.parametrize(
    ("batch_size", "sizes"), [(1, (1,)), (2, (1, 2)), (6, (1, 2, 4, 6)), (64, (1, 2, 4, 8, 16, 32, 64))]
)
def test_the_sizes_prepared(batch_size: int, sizes: tuple[int, ...]) -> None:
    assert ladder(batch_size) == sizes


def test_bad_options() -> None:
    with pytest.raises(ModelError, match=r"conv_algo_search .FAST.: one of EXHAUSTIVE"):
        CudaOptions(conv_algo_search="FAST")
    with pytest.raises(ModelError, match="levels"):
        CudaOptions(levels=(0.0,))
