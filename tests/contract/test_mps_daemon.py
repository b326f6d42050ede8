"""MpsDaemon against a program that speaks as nvidia-cuda-mps-control does: a real process, no GPU."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from dstack_sched.adapters import mps
from dstack_sched.adapters.mps import LOG_VARIABLE, PIPE_VARIABLE, MpsDaemon
from dstack_sched.errors import InputError, MachineError

CONTROL = """#!{python}
import os, pathlib, signal, sys, time
pipe = pathlib.Path(os.environ.get("CUDA_MPS_PIPE_DIRECTORY", "/nowhere")) / "control"
if sys.argv[1:] == ["-f"]:
    if {broken!r}:
        sys.exit("Cannot find MPS control daemon process")
    pipe.write_text(str(os.getpid()))
    time.sleep(600)
if not pipe.exists():
    sys.exit("Cannot find MPS control daemon process")
if sys.stdin.readline().startswith("quit"):
    os.kill(int(pipe.read_text()), signal.SIGTERM)
    pipe.unlink()
"""


def install_control(directory: Path, *, broken: bool = False) -> dict[str, str]:
    """An environment whose PATH has the control program first."""
    directory.mkdir(exist_ok=True)
    program = directory / "nvidia-cuda-mps-control"
    program.write_text(CONTROL.format(python=sys.executable, broken=broken))
    program.chmod(0o755)
    return {
        "PATH": f"{directory}:{os.environ['PATH']}",
        PIPE_VARIABLE: str(directory / "usual-pipe"),
        "XDG_RUNTIME_DIR": str(directory / "runtime"),
    }


@pytest.fixture(autouse=True)
def gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    device = tmp_path / "nvidiactl"
    device.touch()
    monkeypatch.setattr(mps, "GPU_DEVICE", device)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")


def test_own_daemon_runs_in_private_directories_and_leaves_nothing(tmp_path: Path) -> None:
    daemon = MpsDaemon(tmp_path / "mps.log", install_control(tmp_path / "bin"))
    environment = daemon.start()
    pipe = Path(environment[PIPE_VARIABLE])
    assert daemon.owned and daemon.running()
    assert pipe != tmp_path / "bin" / "usual-pipe"
    assert Path(environment[LOG_VARIABLE]).is_dir()
    assert daemon.start() == environment, "a second start changes nothing"
    daemon.stop()
    assert not pipe.exists() and not daemon.running()
    daemon.stop()


def test_an_existing_daemon_is_used_and_never_stopped(tmp_path: Path) -> None:
    environ = install_control(tmp_path / "bin")
    theirs = Path(environ[PIPE_VARIABLE])
    theirs.mkdir()
    (theirs / "control").write_text("1")
    daemon = MpsDaemon(tmp_path / "mps.log", environ)
    assert daemon.start() == {PIPE_VARIABLE: str(theirs)}
    assert not daemon.owned and daemon.failure() is None
    daemon.stop()
    assert (theirs / "control").exists()


def test_one_that_another_dstackctl_started_is_found_and_left_to_it(tmp_path: Path) -> None:
    """Guards against a profiler beside `serve` that would start a second daemon, or measure without one."""
    environ = install_control(tmp_path / "bin")
    first, second = (MpsDaemon(tmp_path / "mps.log", environ) for _ in range(2))
    environment = first.start()
    try:
        assert second.start()[PIPE_VARIABLE] == environment[PIPE_VARIABLE]
        assert first.owned and not second.owned
        second.stop()
        assert first.running()
    finally:
        first.stop()


def test_a_runtime_directory_that_others_can_write_is_refused(tmp_path: Path) -> None:
    environ = install_control(tmp_path / "bin")
    (tmp_path / "bin" / "runtime" / "dstack").mkdir(parents=True)
    (tmp_path / "bin" / "runtime" / "dstack").chmod(0o777)
    with pytest.raises(InputError, match="nobody else can write"):
        MpsDaemon(tmp_path / "mps.log", environ).start()


def test_a_dead_daemon_is_seen_and_comes_back_where_its_clients_look(tmp_path: Path) -> None:
    daemon = MpsDaemon(tmp_path / "mps.log", install_control(tmp_path / "bin"))
    environment = daemon.start()
    try:
        assert daemon._process is not None
        os.kill(daemon._process.pid, 9)
        daemon._process.wait(10)
        assert daemon.failure() == "ended with status 137"
        assert daemon.start() == environment
        assert daemon.failure() is None and daemon.running()
    finally:
        daemon.stop()


def test_a_daemon_that_does_not_start_is_one_clear_line(tmp_path: Path) -> None:
    daemon = MpsDaemon(tmp_path / "mps.log", install_control(tmp_path / "bin", broken=True))
    with pytest.raises(MachineError, match=r"did not start; see .*mps\.log or use --no-mps"):
        daemon.start()
    assert not daemon.owned


def test_without_a_gpu_nothing_is_started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mps, "GPU_DEVICE", tmp_path / "none")
    daemon = MpsDaemon(tmp_path / "mps.log", install_control(tmp_path / "bin"))
    assert daemon.start() == {} and not daemon.owned and not daemon.running()
