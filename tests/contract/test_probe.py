"""Measuring workers as processes: real ONNX Runtime on the CPU, tiny models."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from dstack_sched.adapters.probe import CorunSeat, ModelProbe, ProbeSettings, measure_corun
from dstack_sched.errors import InputError, MachineError
from fakes.onnx_models import SlowSum

SETTINGS = ProbeSettings("cpu", cap_s=0.1)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models") / "slow.onnx"
    SlowSum("slow", inner=512, depth=8).save(path)
    return path


def test_workers_load_together_measure_and_end(model: Path) -> None:
    with ModelProbe(model, SETTINGS) as probe:
        probe.prepare([50.0, 100.0])
        device = probe.device()
        assert device.driver == "cpu"
        assert device.sms == len(os.sched_getaffinity(0))
        assert device.runtime.startswith("onnxruntime ")
        one, many = probe.measure(50.0, 1), probe.measure(50.0, 64)
        assert (one.gpu_percent, one.batch_size) == (50.0, 1)
        assert 0 < one.latency_ms_p50 <= one.latency_ms_p99
        assert many.latency_ms_p50 > one.latency_ms_p50
        assert one.samples >= 1
        assert probe.memory_bytes() > 10 << 20
        pids = [worker._process.pid for worker in probe._workers.values()]
        assert len(set(pids)) == 2
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


def test_models_side_by_side(model: Path) -> None:
    with ModelProbe(model, SETTINGS) as probe:
        point = measure_corun([CorunSeat("a", probe, 50.0, 4), CorunSeat("b", probe, 50.0, 8)], window_s=0.3)
        assert [(m.model, m.gpu_percent, m.batch_size) for m in point.members] == [
            ("a", 50.0, 4),
            ("b", 50.0, 8),
        ]
        assert len(probe._workers) == 2, "a model beside itself takes two processes"
        for member in point.members:
            assert member.throughput_per_s > 0
            # Closed loop: rows per second and latency tell the same story, whatever the noise of a median.
            rate = 1000.0 * member.batch_size / member.latency_ms_p50
            assert 0.02 < member.throughput_per_s / rate < 2.0
        assert probe.measure(50.0, 4).latency_ms_p50 > 0, "the workers are free again"


def test_a_worker_that_dies_is_a_clear_error(model: Path) -> None:
    with ModelProbe(model, SETTINGS) as probe:
        worker = probe.worker(100.0)
        os.kill(worker._process.pid, signal.SIGKILL)
        worker._process.wait()
        with pytest.raises(
            MachineError, match=r"slow\.onnx at GPU% 100: the profiling worker died \(exit status -9\)"
        ):
            probe.measure(100.0, 1)


def test_a_worker_that_hangs_is_given_up(model: Path) -> None:
    with ModelProbe(model, SETTINGS) as probe:
        worker = probe.worker(100.0)
        os.kill(worker._process.pid, signal.SIGSTOP)
        try:
            with pytest.raises(MachineError, match=r"gave no answer in 0\.2 s"):
                worker.ask(timeout_s=0.2, do="used")
        finally:
            os.kill(worker._process.pid, signal.SIGCONT)


def test_a_model_that_does_not_load_is_the_users_to_mend(tmp_path: Path) -> None:
    path = tmp_path / "broken.onnx"
    path.write_bytes(b"nonsense")
    with ModelProbe(path, SETTINGS) as probe, pytest.raises(InputError) as caught:
        probe.device()
    assert str(caught.value).startswith("broken.onnx at GPU% 100: cannot be profiled: ")
    assert "\n" not in str(caught.value)


def test_a_batch_that_the_model_refuses_is_an_input_error(model: Path) -> None:
    with (
        ModelProbe(model, ProbeSettings("cpu", shapes={"nonsense": (1,)})) as probe,
        pytest.raises(InputError, match="no input is named 'nonsense'"),
    ):
        probe.measure(100.0, 1)
