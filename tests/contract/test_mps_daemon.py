"""MpsDaemon, MpsConsole and `dstackctl mps` against a program that speaks as nvidia-cuda-mps-control does."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result
from typer.testing import CliRunner

from dstack_sched.adapters import mps, mps_percent
from dstack_sched.adapters.mps import LOG_VARIABLE, MpsDaemon, find_daemon
from dstack_sched.adapters.mps_console import PIPE_VARIABLE, MpsConsole
from dstack_sched.cli import app, register
from dstack_sched.domain.mps import MpsClient, MpsServer, clients_by_gpu
from dstack_sched.errors import DstackError, InputError, MachineError
from fakes.gpus import use_fake_nvml, write_host
from fakes.mps_control import install_control, set_servers

A, B = "GPU-aaaa-1", "GPU-bbbb-2"


@pytest.fixture(autouse=True)
def gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    device = tmp_path / "nvidiactl"
    device.touch()
    monkeypatch.setattr(mps, "GPU_DEVICE", device)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[MpsDaemon]:
    daemon = MpsDaemon(tmp_path / "mps.log", install_control(tmp_path / "bin"))
    yield daemon
    daemon.stop()


def test_own_daemon_runs_in_private_directories_and_leaves_nothing(daemon: MpsDaemon, tmp_path: Path) -> None:
    environment = daemon.start()
    pipe = Path(environment[PIPE_VARIABLE])
    assert daemon.owned and daemon.running()
    assert pipe != tmp_path / "bin" / "usual-pipe"
    assert pipe.stat().st_mode & 0o077 == 0
    assert Path(environment[LOG_VARIABLE]).is_dir()
    assert daemon.start() == environment, "a second start changes nothing"
    daemon.stop()
    assert not pipe.exists() and not daemon.running()
    daemon.stop()


def test_the_daemon_sees_all_gpus_whatever_is_visible_to_us(tmp_path: Path) -> None:
    """Guards against numbering twice: the daemon's CUDA_VISIBLE_DEVICES, then the client's own."""
    environ = install_control(tmp_path / "bin") | {"CUDA_VISIBLE_DEVICES": "1"}
    daemon = MpsDaemon(tmp_path / "mps.log", environ)
    pipe = Path(daemon.start()[PIPE_VARIABLE])
    try:
        seen = json.loads((pipe / "environ.json").read_text())
        assert "CUDA_VISIBLE_DEVICES" not in seen and seen[PIPE_VARIABLE] == str(pipe)
    finally:
        daemon.stop()


def test_an_existing_daemon_is_used_and_never_stopped(tmp_path: Path) -> None:
    environ = install_control(tmp_path / "bin")
    theirs = Path(environ[PIPE_VARIABLE])
    theirs.mkdir()
    (theirs / "control").write_text(str(os.getpid()))
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


def test_a_dead_daemon_is_seen_and_comes_back_where_its_clients_look(daemon: MpsDaemon) -> None:
    environment = daemon.start()
    assert daemon._process is not None
    os.kill(daemon._process.pid, signal.SIGKILL)
    daemon._process.wait(10)
    assert daemon.failure() == "ended with status 137"
    assert daemon.servers() is None
    assert daemon.start() == environment
    assert daemon.failure() is None and daemon.running() and daemon.servers() == ()


def test_a_daemon_that_does_not_start_is_one_clear_line(tmp_path: Path) -> None:
    daemon = MpsDaemon(tmp_path / "mps.log", install_control(tmp_path / "bin", broken=True))
    with pytest.raises(MachineError, match=r"did not start; see .*mps\.log or use --no-mps"):
        daemon.start()
    assert not daemon.owned


def test_without_a_gpu_nothing_is_started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mps, "GPU_DEVICE", tmp_path / "none")
    daemon = MpsDaemon(tmp_path / "mps.log", install_control(tmp_path / "bin"))
    assert daemon.start() == {} and not daemon.owned and not daemon.running()


# -- what the daemon tells ----------------------------------------------------------------------------------


def test_servers_tell_their_state_and_their_clients(daemon: MpsDaemon) -> None:
    pipe = Path(daemon.start()[PIPE_VARIABLE])
    assert daemon.servers() == ()
    set_servers(pipe, {
        501: {"status": "ACTIVE", "clients": [[11, A, "stub one two"], [12, B, "stub"]]},
        502: {"status": "FAULT", "clients": []},
    })  # fmt: skip
    servers = daemon.servers()
    assert servers == (
        MpsServer(501, "ACTIVE", (MpsClient(11, A, "stub one two"), MpsClient(12, B, "stub"))),
        MpsServer(502, "FAULT"),
    )
    assert clients_by_gpu(servers, (A, B, "GPU-cccc")) == {
        0: frozenset({11}),
        1: frozenset({12}),
        2: frozenset(),
    }


def test_a_daemon_without_ps_still_tells_its_clients_and_they_count_on_every_gpu(tmp_path: Path) -> None:
    daemon = MpsDaemon(tmp_path / "mps.log", install_control(tmp_path / "bin", has_ps=False))
    try:
        pipe = Path(daemon.start()[PIPE_VARIABLE])
        set_servers(pipe, {501: {"status": "ACTIVE", "clients": [[11, A, "x"]]}})
        servers = daemon.servers()
        assert servers == (MpsServer(501, "ACTIVE", (MpsClient(11),)),)
        assert clients_by_gpu(servers, (A, B)) == {0: frozenset({11}), 1: frozenset({11})}
    finally:
        daemon.stop()


# -- the verbs ----------------------------------------------------------------------------------------------


class Shell:
    """`dstackctl mps ...` in an environment with the fake program and a fake NVML."""

    def __init__(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, **how: bool) -> None:
        self.state = tmp_path / "state"
        for key, value in install_control(tmp_path / "bin", **how).items():
            monkeypatch.setenv(key, value)
        use_fake_nvml(monkeypatch, write_host(tmp_path / "host.json", [{"uuid": A}, {"uuid": B}]))
        register(["mps"])

    def __call__(self, *words: str) -> Result:
        return CliRunner().invoke(app, ["mps", *words], catch_exceptions=True)

    def json(self, *words: str) -> dict[str, Any]:
        answer = self(*words, "--json")
        assert answer.exception is None or isinstance(answer.exception, SystemExit), answer.exception
        found: dict[str, Any] = json.loads(answer.stdout)
        return found

    def status(self, *words: str) -> dict[str, Any]:
        return self.json("status", "--state", str(self.state), *words)


@pytest.fixture
def shell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Shell]:
    shell = Shell(tmp_path, monkeypatch)
    yield shell
    console = find_daemon(os.environ)
    if console is not None:
        console.quit(1.0)


def test_start_status_stop_by_hand(shell: Shell) -> None:
    assert shell("status", "--state", str(shell.state)).exit_code == 1
    assert not shell.status()["running"]
    answer = shell("start")
    assert answer.exit_code == 0
    pipe = Path(answer.stdout.splitlines()[0].removeprefix(f"export {PIPE_VARIABLE}="))
    assert MpsConsole(pipe, os.environ).answers()
    assert not shell.json("start")["started"], "the second start finds the first one's daemon"
    set_servers(pipe, {501: {"status": "ACTIVE", "clients": [[11, A, "a b"]]}})
    told = shell.status()
    assert (told["owner"], told["client_limit"], told["clients"]) == (
        "dstackctl mps start",
        48,
        {"0": 1, "1": 0},
    )
    assert told["servers"][0]["clients"][0]["pid"] == 11 and told["default_percent"] == 100.0
    refused = shell("stop")
    assert isinstance(refused.exception, InputError) and "1 processes use the MPS daemon (11)" in str(
        refused.exception
    )
    assert MpsConsole(pipe, os.environ).answers()
    assert shell.json("stop", "--force")["stopped"]
    assert not pipe.exists()
    assert not shell.json("stop")["stopped"], "a second stop has nothing to do"


def test_stop_leaves_the_daemon_of_serve_and_those_of_others_alone(
    shell: Shell, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    daemon = MpsDaemon(tmp_path / "mps.log", os.environ)
    daemon.start()
    try:
        answer = shell("stop", "--force")
        assert isinstance(answer.exception, DstackError)
        assert f"belongs to a running dstackctl, process {os.getpid()}" in str(answer.exception)
        assert daemon.running()
    finally:
        daemon.stop()
    theirs = Path(os.environ[PIPE_VARIABLE])
    theirs.mkdir()
    (theirs / "control").write_text(str(os.getpid()))
    answer = shell("stop", "--force")
    assert isinstance(answer.exception, DstackError) and "was not started by us; it is left alone" in str(
        answer.exception
    )
    (theirs / "control").unlink()


def test_a_background_daemon_that_does_not_start_is_one_clear_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shell = Shell(tmp_path, monkeypatch, broken=True)
    answer = shell("start")
    assert isinstance(answer.exception, MachineError)
    assert "did not start: Cannot start: no device; see " in str(answer.exception)


def test_percentages_are_measured_once_a_gpu_and_driver(
    shell: Shell, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The probe is a stand-in for a CUDA client: 132 SMs in steps of 2, as it sees its own environment."""
    probe = (
        "import os, math; p = float(os.environ['CUDA_MPS_ACTIVE_THREAD_PERCENTAGE']);"
        "assert os.environ['CUDA_MPS_PIPE_DIRECTORY'].endswith('mps'); print(2 * math.ceil(0.66 * p))"
    )
    real = mps_percent.subprocess.run

    def run(command: list[str], **options: Any) -> Any:
        if "dstack_backend.sm_count" in command:
            command = [sys.executable, "-c", probe]
        return real(command, **options)

    monkeypatch.setattr(mps_percent.subprocess, "run", run)
    shell("start")
    told = shell.status("--measure")
    assert told["granularity_sms"] == 2
    table = {row["gpu_percent"]: row["sms"] for row in told["percentages"]}
    assert table[100] == 132 and table[1] == 2 and table[50] == 66
    assert shell.status()["percentages"] == told["percentages"], "kept"
    host = Path(os.environ["FAKE_NVML"])
    write_host(host, [{"uuid": A}], driver="590.1")
    again = shell.status()
    assert again["percentages"] == [] and again["client_limit"] == 60, "another driver: to be measured anew"


def test_a_probe_that_fails_is_one_clear_line(tmp_path: Path) -> None:
    with pytest.raises(MachineError, match=r"a client of MPS at 50%: .*; see dstackctl doctor"):
        mps_percent.measure_percentages({"LD_LIBRARY_PATH": str(tmp_path)}, 99, [50])
