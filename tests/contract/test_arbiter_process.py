"""`dstackctl arbiter` as a process: restarts, signals, bad arguments, a damaged plan file."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from dstack_backend import wire
from dstack_sched.domain.event import PlanChanged
from dstack_sched.domain.json_form import gpus_to_json
from fakes.arbiter_bench import ArbiterProcess, Backend, Client, deadline_us, model_plan, works


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "private" / "arbiter.sock"


def test_process_comes_back_with_its_plan_and_counts_what_runs(path: Path, tmp_path: Path) -> None:
    first = ArbiterProcess(path, tmp_path / "log")
    plans = {0: PlanChanged(100.0, (model_plan("a", gpu_percent=80.0), model_plan("b", gpu_percent=80.0)))}
    first.client.request("plan", gpus=gpus_to_json(plans))
    with Backend(path, "a", gpu_percent=80.0) as before:
        before.send(wire.Work(1, deadline_us()))
        before.granted()
        assert first.end(signal.SIGKILL) == -signal.SIGKILL
        assert before.receive() is None
    second = ArbiterProcess(path, tmp_path / "log")
    try:
        assert second.client.request("status")["gpus"]["0"]["planned_models"] == ["a", "b"]
        with Client(path) as rejoined, Backend(path, "b", gpu_percent=80.0) as other:
            # its batch runs on for a while: b must not get the share that a still uses
            until_us = deadline_us(10_000)
            rejoined.send(wire.Join("a", "a_0", 1, 0, 80.0, 8, 8, 100_000, False, (), 80.0, until_us))
            assert rejoined.receive() == wire.Welcome(2, 100.0)
            other.send(wire.Work(1, deadline_us()))
            assert other.ask(wire.Ping(1)) == wire.Pong(1)
            rejoined.send(wire.Done(0, 8, 0, 9_000, 0, 0))
            other.finish(other.granted())
    finally:
        assert second.end(signal.SIGTERM) == 0
    assert not path.exists()


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGINT])
def test_process_stops_cleanly_and_ignores_hang_up(path: Path, tmp_path: Path, how: signal.Signals) -> None:
    process = ArbiterProcess(path, tmp_path / "log")
    process.popen.send_signal(signal.SIGHUP)
    works(path)
    assert process.end(how) == 0
    assert not path.exists()
    assert "Traceback" not in (tmp_path / "log").read_text()


def test_stopped_process_resumes_with_all_its_clients(path: Path, tmp_path: Path) -> None:
    process = ArbiterProcess(path, tmp_path / "log")
    with Backend(path, "a") as backend:
        process.popen.send_signal(signal.SIGSTOP)
        backend.send(wire.Work(1, deadline_us()))
        backend.send(wire.Ping(5))
        with pytest.raises(TimeoutError):
            backend.receive(0.3)
        process.popen.send_signal(signal.SIGCONT)
        grant = backend.granted()
        assert backend.receive() == wire.Pong(5)
        backend.finish(grant)
    assert process.end(signal.SIGTERM) == 0


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--policy", "nonsense"], "choose one of"),
        (["--capacity", "0"], "--capacity 0"),
        (["--capacity", "nan"], "--capacity nan"),
    ],
)
def test_bad_arguments_are_one_line(path: Path, arguments: list[str], says: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "dstack_sched", "arbiter", "--socket", str(path), *arguments],
        capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == 2 and says in done.stderr and done.stderr.count("\n") == 1
    assert not path.exists()


def test_kept_plan_that_is_damaged_is_set_aside(path: Path, tmp_path: Path) -> None:
    path.parent.mkdir(mode=0o700)
    path.with_suffix(".plan.json").write_text('{"version": 1, "gpus": {"0": {"capacity')
    process = ArbiterProcess(path, tmp_path / "log")
    works(path)
    assert process.end(signal.SIGTERM) == 0
    assert "is not used" in (tmp_path / "log").read_text()
    assert path.with_suffix(".plan.json.bad").exists()
